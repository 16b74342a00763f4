"""A run, from top to bottom: check → preflight → plan → build → measure → train → measure → merge → export → report.

A run is a list of stages, each with a run folder: the run itself, and runs inside it (the float twin of a ternary run). Nothing
is written before preflight and plan have passed. After that every file in the run folder is complete or absent, and a resumed
run continues from the newest complete checkpoint to bit-identical weights.
"""

from __future__ import annotations

import contextlib
from itertools import chain

from finetune.files import require_space
from finetune.libraries import quiet_libraries
from finetune.processes import is_main_process, world_size
from finetune.recipe import Recipe
from finetune.run_dir import RunDir, absolute, bytes_to_write
from finetune.screen import Screen
from finetune.stages.context import Done, RunContext, agreed_dir, recipe_threads, release, signals_as_ctrl_c
from finetune.stages.failure import on_failure


def run(
    recipe: Recipe,
    name: str,
    *,
    resume: bool = False,
    force: bool = False,
    screen: Screen | None = None,
    command: str = "finetune run",
) -> Done:
    """Execute a recipe. name: of the run (the recipe's file name); command: as typed, for the record.

    Raises:
        UserError: the user can fix it; nothing was written. GateError: a gate refused (`force` overrides the gates of preflight
            and plan). Interruption: a signal; training is saved.
    """
    screen, recipe = screen or Screen(), absolute(recipe)
    if world_size() > 1:
        from finetune.stages.preflight import check_processes

        check_processes(recipe, world_size())  # before the processes connect and load their libraries
    run_dir = RunDir(agreed_dir(recipe, name, resume))
    main = RunContext.begin(name, recipe, run_dir, screen, command, resume=resume, force=force)
    stages = [main]
    if not main.is_done():
        with contextlib.ExitStack() as stack:
            stack.callback(release, stages)
            try:
                for setting in (signals_as_ctrl_c(), quiet_libraries(screen), recipe_threads(recipe)):
                    stack.enter_context(setting)
                execute(main)
                stages += stages_within(main)
                for stage in stages[1:]:
                    if not stage.is_done():
                        execute(stage)
                        conclude(stage)
                    stage.print_summary()
                    stage.run_dir.release()
                conclude(main, *stages[1:])
            except BaseException as error:
                if (reported := on_failure(stages, error)) is error:
                    raise
                raise reported from None
    main.print_summary()
    assert main.record is not None
    return Done(main.path, main.record)


def execute(run: RunContext) -> None:
    """Execute one stage in its run folder, from the checks to the exports."""
    from finetune.stages import build, evaluate, export, merge, planning, preflight, train
    from finetune.train import parallel

    # Before anything is written.
    saved = run.run_dir.read() if run.run_dir.exists else None
    checked = run.checked = preflight.preflight(run, saved)
    planned = run.planned = planning.plan_run(run, checked, saved)
    run.recipe = planned.recipe
    require_space(run.path, bytes_to_write(run.recipe, checked.info, checked.trainable), "this run")
    preflight.describe(run, checked)
    if world_size() > 1:
        preflight.agree(run.recipe, checked)  # also a barrier: none writes while another still reads the folder
    run.run_dir.acquire()
    record = run.open_record(checked)
    planning.note(record, planned, checked.device)
    run.save()
    preflight.keep_tokenizer(run, checked)

    # The model, evaluated before training.
    built, record.model = build.build(run, checked, record)
    record.provenance.model = build.model_source(checked, built)
    run.save()
    patches = run.patches = build.patch(run, checked, built)
    record.model.fast = patches.in_words()
    if checked.held_out and record.eval.before is None:
        record.eval.before = evaluate.measure("before", run, checked, built.model, patches)
        run.save()
    if not any(sample.before is not None for sample in record.samples):
        questions = record.samples or checked.data.questions()
        record.samples = evaluate.answers("before", run, checked, built.model, patches, questions)
        run.save()
    evaluate.score("before", run, checked, built.model, patches, record)

    # Training.
    setup, record.model.bytes = train.set_up(run, checked, built, patches)
    progress = train.resume(run, checked, setup) if run.resume else train.Progress()
    trained = train.train(run, checked, setup, patches, progress)
    train.note(run, checked, record, trained)
    run.save()

    # The trained model: evaluated, merged, exported.
    if checked.held_out:
        record.eval.after = evaluate.measure("after", run, checked, built.model, patches)
        record.eval.difference, record.eval.difference_stderr = evaluate.difference(run.run_dir)
        run.save()
    record.samples = evaluate.answers("after", run, checked, built.model, patches, record.samples)
    run.save()
    evaluate.score("after", run, checked, built.model, patches, record)
    run.remove_patches()
    train.unshard(built, checked.device)
    if is_main_process():
        merged = merge.finish(run, checked, built, record.eval.after)
        record.merge = merged.record
        run.save()
        for name, exported in chain(merged.exports.items(), export.export_all(run, checked, built, merged.model)):
            record.exports = (record.exports or {}) | {name: exported}
            run.save()
    parallel.wait()


def stages_within(main: RunContext) -> list[RunContext]:
    """Stages in folders inside the run's own, executed after it has trained."""
    from finetune.stages import twin

    return [twin.begin(main)] if main.recipe.twin else []


def conclude(run: RunContext, *within: RunContext) -> None:
    """Compare a run with the runs inside it, mark it done and write its report. Only the main process does."""
    from finetune.report import write_report
    from finetune.stages import twin

    record = run.record
    assert record is not None
    if not is_main_process():
        return
    for other in within:
        record.twin = twin.compare(run, other)
    record.state, record.next = "done", run.next_commands()
    with run.screen.phase("report"):
        run.save(finished=True)
        write_report(run.path)
    run.done = True
