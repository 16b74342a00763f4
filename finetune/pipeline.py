"""The story of a run, top to bottom: check → preflight → plan → build → measure → train → measure → merge → export → report.

A run is a list of stages, each of which is a whole run folder: the run itself, and what belongs to it (the float twin of a
ternary run). Nothing is written before preflight and plan have passed. From then on everything lies in the run folder, complete
or absent, and a resumed run goes on from the newest whole checkpoint to the same weights as if nothing had happened.
"""

from __future__ import annotations

import contextlib

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
    """Execute a recipe. `name` is what the run is called (the recipe's file name), `command` what was typed, for its record.

    Raises:
        UserError: the user's; nothing was written. GateError: a gate refused (`force` overrides those before anything is loaded:
            the preflight's and the plan's). Interruption: a signal; what was trained is saved.
    """
    screen, recipe = screen or Screen(), absolute(recipe)
    run_dir = RunDir(agreed_dir(recipe, name, resume))
    main = RunContext.begin(name, recipe, run_dir, screen, command, resume=resume, force=force)
    stages = [main]
    if not main.is_done():
        with contextlib.ExitStack() as stack:
            stack.callback(release, stages)
            try:
                for setting in (quiet_libraries(screen), recipe_threads(recipe), signals_as_ctrl_c()):
                    stack.enter_context(setting)
                execute(main)
                stages += stages_within(main)
                for stage in stages[1:]:
                    if not stage.is_done():
                        execute(stage)
                        conclude(stage)
                    stage.print_summary()
                conclude(main, *stages[1:])
            except BaseException as error:
                if (told := on_failure(stages, error)) is error:
                    raise
                raise told from None
    main.print_summary()
    assert main.record is not None
    return Done(main.path, main.record)


def execute(run: RunContext) -> None:
    """One run folder, from the checks to the exports."""
    from finetune.stages import build, evaluate, export, merge, planning, preflight, train
    from finetune.train import parallel

    # Before anything is written.
    begun = run.run_dir.read() if run.run_dir.exists else None
    checked = run.checked = preflight.preflight(run, begun)
    planned = run.planned = planning.plan_run(run, checked, begun)
    run.recipe = planned.recipe
    require_space(run.path, bytes_to_write(run.recipe, checked.info, checked.trainable), "this run")
    preflight.describe(run, checked)
    if world_size() > 1:
        preflight.agree(run.recipe, checked)  # and none is ahead of another that still looks at the folder
    run.run_dir.acquire()
    record = run.open_record(checked)
    planning.note(record, planned, checked.device)
    run.save()
    preflight.keep_tokenizer(run, checked)

    # The model, measured as it came.
    built, record.model = build.build(run, checked, record)
    record.provenance.model = build.model_source(checked, built)
    run.save()
    patches = build.patch(run, checked, built)
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
    progress = train.go_on(run, checked, setup) if run.resume else train.Progress()
    trained = train.train(run, checked, setup, patches, progress)
    train.note(run, checked, record, trained)
    run.save()

    # The trained model, measured, and what is left of it.
    if checked.held_out:
        record.eval.after = evaluate.measure("after", run, checked, built.model, patches)
        record.eval.difference, record.eval.difference_stderr = evaluate.difference(run.run_dir)
        run.save()
    record.samples = evaluate.answers("after", run, checked, built.model, patches, record.samples)
    run.save()
    evaluate.score("after", run, checked, built.model, patches, record)
    patches.remove()
    train.unshard(built, checked.device)
    if is_main_process():
        merged = merge.finish(run, checked, built, record.eval.after)
        record.merge = merged.record
        if exports := merged.exports | export.export_all(run, checked, built, merged.model):
            record.exports = exports
        run.save()
    parallel.wait()


def stages_within(main: RunContext) -> list[RunContext]:
    """Run folders that a run makes within its own, once it has trained."""
    from finetune.stages import twin

    return [twin.begin(main)] if main.recipe.twin else []


def conclude(run: RunContext, *within: RunContext) -> None:
    """Compare a run with those within it; then it is done, and its report says so. Of several processes the first one does."""
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
