"""`finetune resume`."""

from __future__ import annotations

from finetune.commands.common import Force, Processes, RunFolder, leave_processes, spawned, typed


def resume(run: RunFolder, force: Force = False, processes: Processes = 1) -> None:
    """Resume a stopped run with its own resolved recipe."""
    from finetune.recipe import read_resolved
    from finetune.record import read_record

    name = read_record(run).name
    resolved = read_resolved(run / "recipe.yaml", [f"run.dir={run}"])
    if processes > 1:
        spawned(processes, ["resume", str(run), *["--force"] * force])
    from finetune import pipeline

    pipeline.run(resolved, name, resume=True, force=force, command=typed())
    leave_processes()
