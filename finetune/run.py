"""The story of a run, top to bottom: preflight → plan → load → measure → train → measure → merge → export → twin → report.

Nothing is written before the preflight has passed. From then on everything lies in the run folder, complete or absent, and
`resume` goes on from the newest whole checkpoint to the same weights as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import os
import secrets
import shlex
import shutil
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import GateStop, Interruption, Mistake
from finetune.files import MARK, TOKENIZER, RunFolder, atomic_folder, require_space, write_atomic
from finetune.memory import resident_bytes, usable_bytes
from finetune.place import absolute, bytes_to_write, check_resumable, choose_folder, same_data
from finetune.processes import is_first, rank, world
from finetune.recipe import TERNARY_LR, Export, Quant, Recipe, Tokenizer, Train, dump_recipe
from finetune.screen import Screen
from finetune.units import clock, gib, human_bytes, number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from eval.perplexity import LossResult
    from finetune.material import HeldOut, Material
    from finetune.model import Source
    from finetune.plan.fit import Fit
    from finetune.plan.result import Plan
    from finetune.train.checkpoint import Progress
    from finetune.train.fast.patching import FastStep
    from finetune.train.offload import Streamed

FORMAT = 1


def quiet_libraries() -> None:
    """Their warnings and bars are noise between our lines; their errors are raised anyway."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import logging
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("bitsandbytes", "datasets", "huggingface_hub", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("datasets.utils.file_utils").setLevel(logging.WARNING)  # that the network is gone, and is tried again
    warnings.filterwarnings(
        "ignore", module=r"(torch\.(utils|jit|autograd|nn)|transformers|peft|bitsandbytes|accelerate|datasets)\."
    )


# -------------------------------------------------------------------------------------------------------------- the story


def run(recipe: Recipe, name: str, *, resume: bool = False, force: bool = False, screen: Screen | None = None) -> dict[str, Any]:
    """Execute a recipe; returns run.json's content. `name` is what the run is called (the recipe's file name).

    Raises:
        Mistake: the user's; nothing was written. GateStop: a gate refused (`force` overrides those before
            anything is loaded: the preflight's and the plan's).
    """
    screen = screen or Screen()
    recipe = absolute(recipe)
    folder = RunFolder(_agreed_folder(recipe, name, resume))
    if resume:
        recipe = as_it_was_fitted(recipe, folder)
        check_resumable(folder, recipe)
        if folder.read()["state"] == "done":
            folder.acquire()
            folder.release()  # of one that was killed after its last word, the lock would stay
            screen.say(f"{folder.path} is done already")
            if not (folder.path / "report.html").exists():
                from finetune.report import write_report

                write_report(folder.path)
            farewell(screen, folder.read(), folder.path)
            return folder.read()
    fresh = not folder.path.exists()
    story = _Story(recipe, name, folder, screen, force)
    try:
        with _signals_as_ctrl_c():
            story.prepare()
            if world() > 1:
                story.agree()  # and none is ahead of another that still looks at the folder
            folder.acquire()
            story.tell(resume)
    except BaseException as error:
        if isinstance(error, Exception) and "torch" in sys.modules and (stop := story.no_memory(error)) is not None:
            error = stop
        story.ended_by(error, fresh)
        if isinstance(error, KeyboardInterrupt) and story.record and folder.exists:
            raise Interruption("stopped", do=f"finetune resume {folder.path}") from None
        if isinstance(error, GateStop):
            raise error from None
        raise
    finally:
        folder.release()
    return story.record


def _agreed_folder(recipe: Recipe, name: str, resume: bool) -> Path:
    """Where the run lives; of several processes the first one chooses."""
    if world() == 1:
        return choose_folder(recipe, name, resume)
    from finetune.train import parallel
    from finetune.use import pick_device

    parallel.begin(pick_device(recipe.run.device).type)
    return Path(parallel.share(str(choose_folder(recipe, name, resume)) if is_first() else None))


@contextlib.contextmanager
def _signals_as_ctrl_c() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP do as Ctrl-C does: what is half-done is cleared away, and the record says how it ended."""
    before = {}
    for which in (signal.SIGTERM, signal.SIGHUP):
        if threading.current_thread() is threading.main_thread() and signal.getsignal(which) is signal.SIG_DFL:
            before[which] = signal.signal(which, signal.default_int_handler)
    try:
        yield
    finally:
        for which, old in before.items():
            signal.signal(which, old)


class _Story:
    def __init__(self, recipe: Recipe, name: str, folder: RunFolder, screen: Screen, force: bool) -> None:
        self.recipe, self.name, self.folder, self.screen, self.force = recipe, name, folder, screen, force
        self.record: dict[str, Any] = {}
        self.fast: FastStep | None = None  # while the model is measured and trained
        self.streamed: Streamed | None = None  # where the frozen layers lie elsewhere
        self.plan: Plan | None = None  # None where the model's step cannot be traced
        self.fit: Fit | None = None  # what was changed of the recipe
        self.before: LossResult | None = None  # measured in this process

    # -- before anything is written

    def prepare(self) -> None:
        """Everything that can fail cheaply: sources, data, labels, targets, disk."""
        recipe, screen = self.recipe, self.screen
        with screen.phase("libraries"):
            quiet_libraries()
            import peft  # noqa: F401  # seconds, so they are spent where the user sees for what
            import torch

            from finetune import model as models
            from finetune import provenance
            from finetune.material import gather, open_stream
            from finetune.train import offload, parallel
            from finetune.use import pick_device, tokenizer_of
        _require_trackers(recipe.run.trackers)
        if recipe.run.threads is not None:
            torch.set_num_threads(recipe.run.threads)
        self.device = parallel.begin(pick_device(recipe.run.device).type)
        offload.check(recipe.model.stream, self.device)
        several = f", {world()} processes ({recipe.run.parallel})" if world() > 1 else ""
        screen.say(f"  {provenance.device_name(self.device)}{several}")
        self._check_processes()
        if recipe.train.checkpointing == "offload" and self.device.type == "cpu":
            raise Mistake(
                "on the CPU activations are in its memory already",
                where="train.checkpointing",
                found="offload",
                do="train.checkpointing=true",
            )
        if self.device.type == "cpu" and recipe.run.device == "auto" and Path("/proc/driver/nvidia").exists():
            screen.warn(f"there is an NVIDIA driver, but torch {torch.__version__} cannot use it (CUDA 13.0 needs 580 or newer)")
        with screen.phase("tokenizer") as progress:
            self.source: Source = models.source_of(recipe.model)
            begun = self.folder.read().get("data", {}) if self.folder.exists else {}
            stream = open_stream(recipe, begun.get("revision")) if recipe.kind == "pretrain" else None
            self.tokenizer = tokenizer_of(recipe, self.source, self.folder.path, stream, progress)
            self.config = models.load_config(self.source, self.tokenizer)
            models.check_scheme(self.source, self.config, recipe.quant, frozen=recipe.adapter.kind == "lora", twin=recipe.twin)
            self._check_exports()
            self.stops = models.stop_ids(self.source, self.tokenizer)
        with screen.phase("data") as progress:
            self.material: Material = gather(
                recipe,
                self.tokenizer,
                self.stops,
                limits=models.limits(self.config),
                source=stream,
                progress=lambda done, total: progress(done, total, "rows"),
            )
            self.preflight, self.ends = self.material.preflight, self.material.ends
            self.held_out: HeldOut = self.material.held_out()
        for line in self.material.lines():
            screen.say(f"  {line}")
        for line in self.material.warnings():
            screen.warn(line)
        screen.preflight(self.preflight.checks, self.preflight.examples)
        self.forced = self._gate_preflight()
        with screen.phase("skeleton"):
            self.bones = models.skeleton(self.source, self.config)
            self.targets = models.adapter_targets(recipe.adapter, self.bones) if recipe.adapter.kind == "lora" else []
            trainable = (
                models.adapter_parameters(recipe.adapter, self.bones, self.targets) if self.targets else self.bones.parameters
            )
        self._plan()
        recipe = self.recipe
        require_space(self.folder.path, bytes_to_write(recipe, self.bones, trainable), "this run")
        screen.say(f"  into {self.folder.path}")
        screen.say(
            f"  {self.bones.architecture}, {self.bones.parameters / 1e6:.1f} M parameters, {trainable / 1e6:.2f} M trained"
            + (f" in {len(self.targets)} adapters" if self.targets else "")
        )

    def _check_processes(self) -> None:
        """Refuse what several processes cannot do, before anything is loaded."""
        train, run = self.recipe.train, self.recipe.run
        if world() == 1:
            return
        refused = {
            "train.step_in_backward": (train.step_in_backward, "gradients are added up before the step"),
            "train.stochastic_rounding": (train.stochastic_rounding, "each would round by its own chance"),
            "train.optimizer": (run.parallel == "fsdp" and train.optimizer != "adamw", "8-bit states are not shared out"),
            "fit": (self.recipe.fit == "auto", "each would change the recipe for itself"),
        }
        for key, (wrong, why) in refused.items():
            if wrong:
                do = {
                    "train.optimizer": "train.optimizer=adamw, or run.parallel=ddp",
                    "fit": "fit=none; finetune plan --fit says",
                }
                raise Mistake(f"this is for one process: {why}", where=key, found=f"{world()} processes", do=do.get(key))
        if train.micro_batch * train.accumulation < world():
            raise Mistake(
                "there are more processes than rows in a step",
                where="train.accumulation",
                found=f"micro_batch {train.micro_batch} × accumulation {train.accumulation}, {world()} processes",
                do=f"train.accumulation={-(-world() // train.micro_batch)}; it is dealt out, and the batch of a step stays the "
                "same however many processes there are",
            )

    def agree(self) -> None:
        """Raise GateStop where processes have read other data, or other tokens: what they train together would be neither."""
        from finetune.train import parallel

        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        said = [hashlib.sha256(text.encode()).hexdigest() for text in (vocabulary, dump_recipe(self.recipe))]
        seen = parallel.everyone([self.material.digest, *said])
        for what, values in zip(("data", "tokenizer", "recipe"), zip(*seen, strict=True), strict=True):
            if len(set(values)) > 1:
                found = ", ".join(f"process {number}: {value[:12]}…" for number, value in enumerate(values))
                raise GateStop(f"the processes do not have the same {what}", where=self.material.source, found=found)

    def _plan(self) -> None:
        """What the run will need, before anything of it is loaded; with fit: auto the recipe changes until that is there.

        Raises:
            GateStop: it will not fit, and nobody forces.
        """
        from finetune.plan.devices import parse_bytes, present
        from finetune.plan.estimate import Untraceable
        from finetune.plan.fit import fit
        from finetune.plan.table import cannot, verdict
        from finetune.train import parallel

        recipe, screen = self.recipe, self.screen
        device = present(self.device)
        limit = (
            parse_bytes(recipe.plan.memory)
            if recipe.plan.memory is not None
            else min(device.memory_bytes, usable_bytes(self.device) // (world() if device.kind == "cpu" else 1))
        )
        limit = min(parallel.everyone(limit))
        begun, plan_of = self.folder.exists, self._plan_of(limit)
        try:
            with screen.phase("plan"):
                if recipe.fit == "auto" and not begun:
                    self.fit = fit(recipe, limit, plan_of, kind=device.kind)
                    self.plan, self.recipe = self.fit.plan, self.fit.recipe
                else:
                    self.plan = plan_of(recipe)
        except Untraceable as error:
            screen.warn(f"there is no plan: {error.what} ({error.found})")
            return
        screen.say(f"  {verdict(self.plan)}")
        for change in self.fit.steps if self.fit is not None else []:
            for key, (old, new) in change.keys.items():
                screen.say(f"  fit: {key} {old} → {new}: {change.why}")
        if self.plan.fits:
            return
        found = f"{gib(self.plan.peak_bytes)} GiB in {self.plan.highest.name}; there are {gib(limit)} GiB"
        if world() > 1 and recipe.run.parallel == "fsdp":
            screen.warn(f"the plan is of one process that has the whole model, which would not fit: {found}")
            return
        if self.force:
            screen.warn(f"--force: by the plan it does not fit: {found}")
            return
        raise GateStop(
            "this run would not fit",
            where=device.name,
            found=cannot(self.fit) if self.fit is not None else found,
            do=f"finetune plan RECIPE --fit {gib(limit)}GB says what would; fit=auto does it; --force begins all the same",
        )

    def _plan_of(self, limit: int) -> Callable[[Recipe], Plan]:
        from finetune.plan.devices import present
        from finetune.plan.estimate import plan

        device = present(self.device)
        return lambda other: plan(other, self.name, device, budget_bytes=limit, material=self.material, config=self.config)

    def _check_exports(self) -> None:
        """What the trained model could not be written to is refused before it is trained."""
        from transformers import AutoModelForCausalLM

        from finetune.convert import converted_config
        from finetune.export import check

        recipe, config = self.recipe, self.config
        if recipe.quant.sub_norms:
            import torch

            with torch.device("meta"):
                config = converted_config(AutoModelForCausalLM.from_config(config))
        ternary = recipe.quant.scheme == "ternary"
        for name in [*(["bitnet"] if ternary else []), *recipe.export.formats]:
            check(
                config,
                name,
                ternary=ternary,
                keep=recipe.quant.keep,
                rms_norm=recipe.quant.rms_norm,
                tokenizer=self.tokenizer,
            )

    def _gate_preflight(self) -> str | None:
        """The reasons that --force overrode, or None.

        Raises:
            GateStop: a check failed and nobody forces.
        """
        failed = self.preflight.failed
        if not failed:
            return None
        reasons = "; ".join(f"{check.name}: {check.detail}" for check in failed)
        nothing = any(check.name == "something to learn" for check in failed)
        hopeless = not self.preflight.supervised_tokens or any(check.name == "the model's vocabulary" for check in failed)
        forced_before = self.folder.exists and self.folder.read().get("preflight", {}).get("forced")
        if (self.force or forced_before) and not hopeless:
            self.screen.warn(f"--force: {reasons}")
            return reasons
        raise (Mistake if nothing else GateStop)(
            "there is nothing to train on" if nothing else "the preflight of labels refuses this data",
            where=self.material.source,
            found=reasons,
            do="mend the data or the template"
            + ("" if hopeless else "; --force trains anyway and records why it should not have"),
        )

    # -- the run

    def tell(self, resume: bool) -> None:
        from finetune import provenance
        from finetune.train import parallel
        from finetune.use import tokenizer_of

        recipe, screen, folder = self.recipe, self.screen, self.folder
        if resume:
            begun = folder.read()
            same_data(begun, self.material.digest, folder.path)  # before the record is ours: a refusal leaves it as it was
            self.record = begun | {"state": "running", "error": None}
        else:
            self.record = {
                "format": FORMAT,
                "name": self.name,
                "kind": recipe.kind,
                "about": recipe.about,
                "state": "running",
                "error": None,
                "provenance": provenance.collect(self.device, recipe.run.seed, shlex.join(["finetune", *sys.argv[1:]]))
                | {"started": _now(), "finished": None, "seconds": 0.0, "resumed": []},
                "phases": [],
                "eval": {},
                "samples": [],
            }
            if is_first():
                write_atomic(folder.path / "recipe.yaml", dump_recipe(recipe))
        if self.plan is not None:
            self.record["plan"] = self.plan.as_dict() | ({"fit": self.fit.as_dict()} if self.fit is not None else {})
            training = self.plan.phase("train")
            context, waste = (training.terms.get(term, 0) for term in ("context", "fragmentation"))
            # As the loop measures it: the process on a CPU, with what it has by now; what is allocated on a card.
            other = resident_bytes() - context if self.device.type == "cpu" else -context - waste
            self.record["planned"] = {
                "peak_bytes": training.peak_bytes + other,
                "step_seconds": self.plan.step_seconds,
                "seconds": training.seconds,
            }
        self.record["data"] = self.material.record()
        self.record["preflight"] = self.preflight.as_dict() | {"forced": self.forced}
        self.record["provenance"]["data"] = {
            "source": self.material.source,
            "sha256": self.material.digest,
            "rows": self.record["data"].get("rows"),
        }
        self._save()
        if recipe.model.config is not None and recipe.tokenizer.name is None:  # it was trained on this data
            if is_first() and not (folder.path / TOKENIZER).exists():
                with atomic_folder(folder.path / TOKENIZER) as temporary:
                    self.tokenizer.save_pretrained(temporary)
            parallel.wait()
            self.tokenizer = tokenizer_of(recipe, self.source, folder.path)  # as a run that goes on has it

        self._load()
        self._speed_up()
        if "before" not in self.record["eval"] and self.held_out:
            self._measure("before")
        if not any("before" in sample for sample in self.record["samples"]):
            self._sample("before")
        self._score_tasks("before")

        self._train(resume)

        if self.held_out:
            self._measure("after")
        self._sample("after")
        self._score_tasks("after")
        if self.fast is not None:
            self.fast.remove()
        self.fast = None  # it would hold the model
        if parallel.is_sharded(self.model):
            parallel.restore(self.model)
            if is_first():
                self.model.to(self.device)  # type: ignore[arg-type]
        if is_first():
            self._finish_weights()
            if recipe.export.formats:
                self._exports()
        parallel.wait()
        if recipe.twin:
            self._train_twin(resume)
        if not is_first():
            return

        self.record["state"] = "done"
        self.record["next"] = self._next()
        self._save(finished=True)
        with screen.phase("report"):
            from finetune.report import write_report

            self.record["phases"] = self._phases()
            self._save(finished=True)
            write_report(folder.path)
        farewell(screen, self.record, folder.path)

    def _save(self, finished: bool = False) -> None:
        provenance = self.record["provenance"]
        if finished:
            provenance["finished"] = _now()
        self.record["phases"] = self._phases()
        provenance["seconds"] = round(sum(phase["seconds"] for phase in self.record["phases"]), 1)
        self.folder.write(self.record)

    def _phases(self) -> list[dict[str, Any]]:
        earlier = [phase for phase in self.record.get("phases", []) if phase.get("process") not in (None, os.getpid())]
        return earlier + [phase | {"process": os.getpid()} for phase in self.screen.phases]

    def _load(self) -> None:
        from finetune import model as models
        from finetune.train import offload, parallel
        from quant import backends

        recipe = self.recipe
        disk = offload.Scratch(self.folder.path) if recipe.model.stream == "disk" else None
        if disk is not None and (kind := offload.is_memory(self.folder.path)):
            self.screen.warn(
                f"model.stream: {self.folder.path} lies on {kind}, which is memory and no disk; give another run.dir"
            )
        with self.screen.phase("weights") as progress:
            self.dtype = models.dtype_of(recipe, self.device.type)
            model = models.load_weights(
                self.source,
                self.config,
                dtype=self.dtype,
                attention=recipe.model.attention,
                quant=recipe.quant,
                frozen=recipe.adapter.kind == "lora",
                seed=recipe.run.seed,
                put=disk.put if disk is not None else None,
                progress=progress,
            )
        was_float = recipe.model.name is not None and getattr(model, "hf_quantizer", None) is None
        if recipe.trains_ternary and was_float and self.held_out and "float" not in self.record["eval"]:
            model.to(self.device)  # type: ignore[arg-type]
            self.model = model
            self._measure("float")  # the baseline: what the model was before it is made ternary

        def stream(whole: Any) -> None:
            self.streamed = offload.stream(whole, self.device, disk)

        def shard(whole: Any) -> None:
            parallel.shard(whole, self.device)

        sharded = world() > 1 and recipe.run.parallel == "fsdp"

        with self.screen.phase("prepare") as progress:
            if recipe.quant.sub_norms:
                model = self._with_sub_norms(model)
            prepared = models.prepare(
                model,
                quant=recipe.quant,
                adapter=recipe.adapter,
                targets=self.targets,
                source=self.source,
                device=self.device,
                checkpointing=bool(recipe.train.checkpointing),
                seed=recipe.run.seed,
                move=stream if recipe.model.stream != "none" else shard if sharded else None,
                progress=lambda done, total: progress(done, total, "linears"),
            )
        self.model, self.swap = prepared.model, prepared.swap
        swapped = None
        if self.swap is not None:
            swapped = {
                "scheme": self.swap.scheme,
                "swapped": len(self.swap.swapped),
                "left": self.swap.left,
                "share": self.swap.share,
                "bytes_before": self.swap.bytes_before,
                "bytes_after": self.swap.bytes_after,
                "backend": backends.describe(self.device, scheme=recipe.quant.scheme),
            }
            self.screen.say(
                f"  {len(self.swap.swapped)} linears in {self.swap.scheme} ({self.swap.share:.0%} of the parameters): "
                f"{human_bytes(self.swap.bytes_before)} → {human_bytes(self.swap.bytes_after)}; {swapped['backend']}\n"
                f"  left in floats: {self.swap.left_in_words}"
            )
        figures = self.streamed.figures() if self.streamed is not None else None
        if figures is not None:
            self.screen.say(
                f"  {figures['layers']} layers stream from {figures['from']}: {human_bytes(figures['bytes'])} in all, "
                f"{human_bytes(figures['largest_layer_bytes'])} the largest"
            )
        models.set_stops(self.model, self.stops | self.ends)
        self.record["model"] = {
            "architecture": self.bones.architecture,
            "parameters": prepared.parameters,
            "trainable": prepared.trainable,
            "swap": swapped,
            "streamed": figures,
            "adapters": prepared.adapters,
            "dtype": str(self.dtype).removeprefix("torch."),
            "stop_ids": sorted(self.stops | self.ends),
        }
        self.record["provenance"]["model"] = {"source": self.source.name, "parameters": prepared.parameters}
        self._save()

    def _speed_up(self) -> None:
        """Put in place of the model's pieces what computes the same faster."""
        from finetune.train.fast import patching

        with self.screen.phase("fast step"):
            work = self.record["model"]["parameters"] * self.material.tokens(self.recipe.train)
            self.fast = patching.apply_patches(self.model, self.recipe, self.device, work=work)
        lines = self.fast.in_words()
        for line in lines:
            self.screen.say(f"  {line}")
        self.record["model"]["fast"] = lines

    def _as_it_came(self) -> AbstractContextManager[None]:
        """Within it the model computes without the fast step, for generation."""
        return self.fast.paused() if self.fast is not None else nullcontext()

    def _with_sub_norms(self, model: Any) -> Any:
        """The pretrained model in the layout of 2B4T; what flows through the new norms stays as large as on the first rows."""
        import torch

        from finetune.convert import insert_sub_norms

        rows = [torch.tensor([ids], device=model.device) for ids, _ in self.material.first_rows(8)]
        return insert_sub_norms(model, rows)

    def _teacher(self) -> Any:
        """The float model that the recipe learns from, or None."""
        recipe = self.recipe
        if recipe.distill.teacher is None:
            return None
        from finetune import model as models
        from finetune.train.distill import Distillation

        place = models.find(recipe.distill.teacher, where="distill.teacher")
        with self.screen.phase("teacher") as progress:
            if models.load_tokenizer(place).get_vocab() != self.tokenizer.get_vocab():
                raise Mistake("teacher and student read different tokens", where="distill.teacher", found=recipe.distill.teacher)
            dtype = models.default_dtype(self.device.type) if recipe.model.dtype == "auto" else self.dtype
            options: dict[str, Any] = {"dtype": dtype, "attention": recipe.model.attention, "progress": progress}
            teacher = models.load_weights(place, models.load_config(place), **options)
            said = recipe.distill
            distillation = Distillation(
                teacher.to(self.device),  # type: ignore[arg-type]
                logits=said.logits,
                relations=said.relations,
                temperature=said.temperature,
                layer=said.layer,
                split_heads=None,
            )
            distillation.attach(self.model)
        return distillation

    def _accelerator(self, progress: Progress) -> Any:
        """accelerate's, with the trackers: a run that goes on is the same run there, without what came after its checkpoint."""
        from accelerate import Accelerator

        recipe = self.recipe
        accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            log_with=list(recipe.run.trackers) or None,
            project_dir=str(self.folder.path),
        )
        if recipe.run.trackers:
            own = self.record.setdefault("tracker_id", secrets.token_hex(4))
            self._save()
            options = {
                "tensorboard": {"purge_step": progress.step + 1} if self.record["provenance"]["resumed"] else {},
                "wandb": {"id": own, "resume": "allow"},
                "trackio": {"name": f"{self.name}-{own}", "resume": "allow"},
            }
            accelerator.init_trackers(
                self.name,
                config=_flat(recipe.model_dump(mode="json")),
                init_kwargs={name: options[name] for name in recipe.run.trackers},
            )
        return accelerator

    # -- measuring

    def _loss(self, rows: Any, progress: Callable[[int, int], None] | None = None) -> LossResult:
        from eval.perplexity import IGNORED, evaluate_loss, loss_of
        from finetune.train import parallel
        from finetune.train.fast import chunked_loss

        head = self.fast.head if self.fast is not None else None
        of_tokens = chunked_loss.evaluator(head, self.recipe.train.loss_chunk) if head is not None else None
        shares = [rows[number :: world()] for number in range(world())]
        learnt = [any(label != IGNORED for _, labels in share for label in labels[1:]) for share in shares]
        # Layers that are shared out run in all processes alike: then each measures all rows.
        own = shares[rank()] if all(learnt) and not parallel.is_sharded(self.model) else rows
        result = evaluate_loss(
            self.model,
            own,
            batch_tokens=self.recipe.eval.batch_tokens,
            of_tokens=of_tokens,
            retry=not parallel.is_sharded(self.model),
            progress=progress,
        )
        if world() == 1:
            return result
        if len(own) == len(rows):  # of one mind to the last bit: what is best is decided by it
            return loss_of(*parallel.share([result.row_loss_sums, result.row_tokens]))
        parts = parallel.everyone([result.row_loss_sums, result.row_tokens])
        sums, tokens = ([parts[at % world()][which][at // world()] for at in range(len(rows))] for which in (0, 1))
        return loss_of(sums, tokens)

    def _measure(self, when: str) -> None:
        from eval.perplexity import paired_difference

        said = {"float": "evaluate the float model"}.get(when, f"evaluate {when}")
        with self.screen.phase(said) as progress:
            result = self._loss(self.held_out, lambda done, total: progress(done, total, "held-out rows"))
        self.folder.write_json(f"eval/{when}.json", result.as_dict(by_row=True))
        self.record["eval"][when] = result.as_dict()
        if when == "before":
            self.before = result
        self.screen.say(
            f"  held-out loss {when}: {result.loss:.4f} ± {number(result.as_dict()['stderr'])} nats, "
            f"perplexity {result.perplexity:.2f}"
        )
        if when == "after" and "before" in self.record["eval"]:
            before = self.before or _result(json.loads((self.folder.path / "eval" / "before.json").read_text(encoding="utf-8")))
            difference, error = paired_difference(before, result)
            self.record["eval"] |= {"difference": difference, "difference_stderr": error if math.isfinite(error) else None}
        self._save()

    def _sample(self, when: str) -> None:
        from eval.generation import generate
        from finetune.train import parallel

        samples = self.record["samples"] or self.material.questions()
        if not samples:
            return
        with self.screen.phase(f"answers {when}") as progress, self._as_it_came():
            answers = generate(
                self.model,
                self.tokenizer,
                [sample["prompt"] for sample in samples],
                max_new_tokens=self.recipe.eval.max_new_tokens,
                retry=not parallel.is_sharded(self.model),
                progress=lambda done, total: progress(done, total, "answers"),
            )
        for sample, answer in zip(samples, answers, strict=True):
            sample |= {when: answer.text, f"{when}_ended": answer.ended}
        self.record["samples"] = samples
        self.folder.write_json("samples/samples.json", samples)
        self._save()

    def _score_tasks(self, when: str) -> None:
        recipe = self.recipe.eval
        if not recipe.tasks or when in self.record["eval"].get("tasks", {}):
            return
        with self._as_it_came():
            scores = score_tasks(
                self.model, self.tokenizer, recipe.tasks, recipe.include_path, recipe.limit, self.screen, f"tasks {when}"
            )
        self.record["eval"].setdefault("tasks", {})[when] = scores
        self.folder.write_json(f"eval/tasks-{when}.json", scores)
        self._save()

    # -- training

    def _train(self, resume: bool) -> None:
        from accelerate.utils import set_seed

        from finetune.ready import autocast_of, batching, optimizer_of
        from finetune.train import checkpoint, optim
        from finetune.train.loop import Interrupted, Training
        from finetune.train.ternary import Ternary

        settings, packing = batching(self.recipe, self.model, self.material)
        if settings is not self.recipe.train:
            self.screen.warn(
                f"{self.bones.architecture} lets samples in one row see each other: it gets one sample at a time, "
                f"{settings.accumulation} to a step"
            )
        teacher = self._teacher()
        kind = self.material.kind(
            settings, self.device, packing=packing, head=self.fast.head if self.fast else None, teacher=teacher
        )
        total, limit = self.material.steps(kind, settings)
        optimizer, note = optimizer_of(settings, self.model, self.device.type)
        trained = checkpoint.trained(self.model).values()
        low = {"stochastic_rounding": settings.stochastic_rounding, "in_backward": settings.step_in_backward}
        self.record["model"]["bytes"] = sizes = optim.memory_of(trained, name=settings.optimizer, **low)
        self.screen.say("  trained, without activations: " + ", ".join(f"{k} {human_bytes(v)}" for k, v in sizes.items() if v))
        if note:
            self.screen.warn(note)
        self._prove_swap(kind)
        progress = checkpoint.Progress()
        set_seed(self.recipe.run.seed + rank())  # of python, numpy and torch; each process drops out by its own chance
        if resume:
            progress = self._go_back(optimizer)
        accelerator = self._accelerator(progress)
        rows, watch = self.held_out, None
        if self.recipe.trains_ternary:
            watch = Ternary(self.model, self.recipe, total, self.folder.metrics, self.screen.warn)

        def evaluate(step: int) -> dict[str, float]:
            result = self._loss(rows, lambda done, of: shown(step, total, f"evaluating {done}/{of} held-out rows"))
            measured = {"eval_loss": result.loss, "eval_stderr": result.stderr, "eval_perplexity": result.perplexity}
            return measured | ({"eval_blend": λ} if watch is not None and (λ := watch.schedule.blend(step)) < 1 else {})

        self.screen.say(f"  {total} steps ({limit})")
        with self.screen.phase("train") as shown:
            try:
                figures = Training(
                    self.model,
                    kind,
                    settings,
                    accelerator=accelerator,
                    optimizer=optimizer,
                    total_steps=total,
                    folder=self.folder,
                    progress=progress,
                    autocast=autocast_of(self.recipe, self.dtype, self.device.type),
                    offload=self.recipe.train.checkpointing == "offload",
                    evaluate=evaluate if rows else None,
                    before_step=watch.before if watch else None,
                    after_step=watch.after if watch else None,
                    went_back=watch.rewind if watch else None,
                    show=shown,
                ).run()
            except Interrupted as stop:
                raise Interruption(str(stop), do=f"finetune resume {self.folder.path}") from None
        if settings.best == "use" and "best" in figures:
            self._take_best(figures["best"], figures["steps"])
        for tracker in accelerator.trackers:  # its end_training would leave the other processes, too
            tracker.finish()
        if watch is not None:
            watch.end()
            self.record["ternary"] = watch.summary()
        if teacher is not None:
            teacher.detach()  # else its hooks on the model would keep it
        self.record["data"] = self.material.record()  # a stream knows only now what it skipped
        for line in self.material.warnings():
            self.screen.warn(line)
        # A resumed process knows the speed of its own steps only; one that found training finished knows none.
        if figures["tokens_per_second"] or "train" not in self.record:
            self.record["train"] = figures | ({"processes": world(), "parallel": self.recipe.run.parallel} if world() > 1 else {})
        planned = f", planned {human_bytes(self.record['planned']['peak_bytes'])}" if self.plan is not None else ""
        self.screen.say(
            f"  {figures['steps']} steps, {figures['tokens']} tokens, {figures['tokens_per_second']:.0f} tok/s, "
            f"peak {human_bytes(figures['peak_bytes'])} ({figures['memory_kind']}{planned})"
        )
        self._learn_from(figures)
        self._save()

    def _take_best(self, best: dict[str, Any], last: int) -> None:
        """The weights with the lowest held-out loss, from their checkpoint."""
        from finetune.train import checkpoint

        step, loss = best["step"], best["loss"]
        path = self.folder.path / "checkpoints" / f"{checkpoint.PREFIX}{step:06d}"
        if step != last and (wrong := checkpoint.damage(path)) is not None:
            self.screen.warn(f"the best checkpoint, {path.name}, is damaged ({wrong}): the last weights are used")
            return
        if step != last:
            checkpoint.load_weights(path, self.model)
        self.screen.say(f"  the best held-out loss was {loss:.4f} after step {step} of {last}: these weights are used")

    def no_memory(self, error: Exception) -> GateStop | None:
        """What to say where memory has run out, and nothing is left to halve; None of any other error."""
        from eval._common import forget, out_of_memory
        from finetune.train.recovery import NoMemory

        if isinstance(error, NoMemory):
            return self._with_what_would_fit(error)
        if not out_of_memory(error):
            return None
        trained = bool(self.record) and (self.folder.path / "checkpoints").is_dir()
        do = f"with less beside it, finetune resume {self.folder.path} goes on from the last checkpoint" if trained else None
        said = f"out of memory in the phase {self.screen.now!r}"
        return self._with_what_would_fit(GateStop(said, where=str(self.folder.path), found=forget(error), do=do))

    def _with_what_would_fit(self, stop: GateStop) -> GateStop:
        """With what the plan says of less."""
        from finetune.plan.fit import fit
        from finetune.plan.rewrite import scalar
        from finetune.plan.table import cannot

        if self.plan is None:
            return stop
        limit = int(0.9 * min(self.plan.peak_bytes, self.plan.budget_bytes))  # it was more, whatever the plan said
        try:
            made = fit(self.recipe, limit, self._plan_of(limit), kind="cpu" if self.device.type == "cpu" else "cuda")
        except Exception:  # there is little memory: what is known already is what is to be said
            return stop
        if not made.plan.fits:
            return type(stop)(stop.what, where=stop.where, found=f"{stop.found}; {cannot(made)}", do=stop.do)
        keys = " ".join(f"{key}={scalar(new)}" for change in made.steps for key, (_, new) in change.keys.items())
        saves = f"by the plan {human_bytes(made.plan.peak_bytes)} instead of {human_bytes(self.plan.peak_bytes)}"
        do = f"{keys} ({saves}), in a new run.dir" + (f"; {stop.do}" if stop.do else "")
        return type(stop)(stop.what, where=stop.where, found=stop.found, do=do)

    def _learn_from(self, figures: dict[str, Any]) -> None:
        """Tell later plans on this machine how far this one was off."""
        from finetune.plan import local

        lines = self.folder.metrics.read_text(encoding="utf-8").splitlines() if self.folder.metrics.exists() else []
        took = [seconds for line in lines if (seconds := json.loads(line).get("step_seconds"))]
        if self.plan is not None and len(took) > 1 and world() == 1:
            local.note(
                self.plan,
                self.recipe,
                steps=len(took),
                planned_bytes=self.record["planned"]["peak_bytes"],
                peak_bytes=figures["peak_bytes"],
                step_seconds=statistics.median(took[1:]),  # the first compiles
            )

    def _prove_swap(self, kind: Any) -> None:
        """After one forward, each swapped module has run: a bypassed one would train something else than it evaluates."""
        if self.swap is None:
            return
        import torch

        from quant import prove_used

        self.model.eval()  # dropout would draw random numbers, which a resumed run must not draw twice
        try:
            with torch.no_grad(), prove_used(self.model, self.swap):
                keys = kind.keys(0, 0, None)
                kind.loss(self.model, kind.batch(next(keys)))
                if (close := getattr(keys, "close", None)) is not None:
                    close()
        except RuntimeError as error:
            if "took no part" not in str(error):
                raise
            raise GateStop("packed linears are bypassed", where="quant", found=str(error), do="add them to quant.keep") from None

    def _go_back(self, optimizer: Any) -> Any:
        from finetune.train import checkpoint

        checkpoint.sweep(self.folder.path / "checkpoints")
        with self.screen.phase("checkpoint"):
            path, notes = checkpoint.newest(self.folder.path / "checkpoints")
        for note in notes:
            self.screen.warn(f"damaged checkpoint {note}; using the one before")
        if path is None and notes:
            every = self.folder.path / "checkpoints"
            do = f"bring one back from a copy; to begin again: rm -r {every}, then finetune resume {self.folder.path}"
            raise Mistake("every checkpoint of this run is damaged", where=str(every), found="; ".join(notes), do=do)
        several = {"processes": world()} if world() > 1 else {}
        self.record["provenance"]["resumed"].append({"time": _now(), "from": path.name if path else None} | several)
        self._save()
        if path is None:
            self.screen.say("  no checkpoint yet: beginning again")
            self.folder.cut_metrics(0)
            return checkpoint.Progress()
        progress, size = checkpoint.load(path, self.model, optimizer)
        if self.recipe.train.optimizer.startswith("paged") and self.device.type == "cuda":
            self.screen.warn("the optimizer's states are restored to the card; they are paged again only in a new run")
        self.folder.cut_metrics(size)
        self.screen.say(f"  going on after step {progress.step}")
        return progress

    # -- what is left behind

    def _finish_weights(self) -> None:
        from finetune import merge
        from finetune.files import atomic_folder
        from finetune.model import save_adapter

        recipe, path = self.recipe, self.folder.path
        lora = recipe.adapter.kind == "lora"
        if lora:
            with self.screen.phase("save adapter"):
                save_adapter(self.model, self.tokenizer, path / "adapter")
        if lora and not recipe.run.merge:
            self.record["merge"] = None
            return
        if self.streamed is not None:
            self.streamed.restore()
        if recipe.trains_ternary:
            self._export("bitnet", path / "merged")
            return
        rows = self.held_out[: recipe.eval.merge_rows]
        if lora and recipe.quant.scheme == "ternary":
            self._merge_ternary(rows)
            return
        if not rows:
            with self.screen.phase("save model"), atomic_folder(path / "merged") as temporary:
                merge.write_folder(merge.into_float(self.model, self.dtype), self.tokenizer, temporary)
            self.record["merge"] = {"path": "merged", "gate": None}
            self.screen.warn(
                "the merged model was not compared with the trained one: there are no held-out rows, or eval.merge_rows is 0"
            )
            return
        with self.screen.phase("merge" if lora else "save model") as progress:
            gate = merge.write_gated(
                self.model,
                self.tokenizer,
                path / "merged",
                dtype=self.dtype,
                rows=rows,
                limit=recipe.eval.merge_limit,
                batch_tokens=recipe.eval.batch_tokens,
                device=self.device,
                progress=progress,
            )
        self.record["merge"] = {"path": "merged", "gate": gate, "bytes": gate["bytes"]}
        self.screen.say(
            f"  merged: {human_bytes(gate['bytes'])}; loss {gate['merged_loss']:.4f} against {gate['adapter_loss']:.4f} of the "
            f"trained model on {gate['rows']} rows, both in {gate['arithmetic']} (the gate allows {gate['limit']} nats)"
        )
        own = self.record["eval"]["after"]["loss"]
        if gate["rows"] == self.record["eval"]["after"]["rows"] and abs(own - gate["adapter_loss"]) > gate["limit"]:
            self.screen.warn(
                f"rounding weighs in this model: its loss is {gate['adapter_loss']:.3f} in {gate['arithmetic']} and {own:.3f} in "
                f"{self.record['model']['dtype']}, in which it was trained and measured"
            )

    def _merge_ternary(self, rows: HeldOut) -> None:
        """Adapters into ternary weights again; what that costs is measured and told, and the adapter stays."""
        from finetune import merge

        recipe, path = self.recipe, self.folder.path
        with self.screen.phase("merge") as progress:
            self.model, figures = merge.write_ternary(
                self.model,
                self.tokenizer,
                path / "merged",
                rows=rows or self.material.first_rows(8),
                batch_tokens=recipe.eval.batch_tokens,
                device=self.device,
                progress=progress,
            )
        self.record["merge"] = {"path": "merged", "gate": None, "bytes": figures["bytes"], "reternarized": figures}
        self.screen.say(f"  {merge.ternary_in_words(figures)}")
        lost = figures["merged_loss"] - figures["adapter_loss"]
        if abs(lost) > recipe.eval.merge_limit:
            self.screen.warn(
                "the merged model is not the trained one: three values a weight do not hold what the adapter learned. "
                f"{path / 'adapter'} on its base is the trained model"
            )

    def _exports(self) -> None:
        from finetune import model as models
        from finetune.export import FORMATS

        if self.recipe.quant.scheme != "ternary":  # the trained model was merged away: what was written, and gated, is it
            merged = models.find(str(self.folder.path / "merged"))
            config = models.load_config(merged)
            self.model = models.load_weights(merged, config, dtype=self.dtype, attention="auto")
        for name in self.recipe.export.formats:
            file = f"{self.name}-{name.removeprefix('gguf-').upper()}{FORMATS[name].suffix}"
            self._export(name, self.folder.path / "export" / (file if FORMATS[name].suffix else name))

    def _export(self, name: str, out: Path) -> None:
        """Write the trained model for another program, compared with it by the gate; what that measured is recorded."""
        from finetune.export import export, in_words

        rows = self.held_out or self.material.first_rows(8)
        with self.screen.phase(f"export {name}") as progress:
            figures = export(
                self.model,
                self.tokenizer,
                out,
                format=name,
                rows=rows,
                device=self.device,
                gate_tokens=self.recipe.export.gate_tokens,
                progress=progress,
            )
        figures["path"] = os.path.relpath(figures["path"], self.folder.path)
        self.record.setdefault("exports", {})[name] = figures
        if out.name == "merged":
            self.record["merge"] = {"path": "merged", "gate": None, "bytes": figures["bytes"]}
        self.screen.say(f"  {in_words(figures)}")
        self._save()

    def _train_twin(self, resume: bool) -> None:
        """The same recipe in floats, in a run folder of its own: the baseline by which the ternary model is judged."""
        import torch

        from eval.perplexity import paired_difference

        recipe, path = self.recipe, self.folder.path / "twin"
        lr = recipe.train.twin_lr or recipe.train.lr / TERNARY_LR
        twin = recipe.model_copy(
            update={
                "about": f"the float twin of {self.name}",
                "quant": Quant(),
                "twin": False,
                "train": recipe.train.model_copy(update={"lr": lr, "twin_lr": None, "health_steps": Train().health_steps}),
                "export": Export(),
                "run": recipe.run.model_copy(update={"dir": str(path)}),
            }
        )
        if recipe.model.config is not None and recipe.tokenizer.name is None:
            own = Tokenizer(name=str((self.folder.path / TOKENIZER).absolute()))
            twin = twin.model_copy(update={"tokenizer": own})
        if revision := self.record["data"].get("revision"):
            twin = twin.model_copy(update={"data": recipe.data.model_copy(update={"revision": revision})})
        del self.model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.screen.say(f"\nthe twin: the same in floats, at a peak learning rate of {lr:g}")
        begun, force = (path / MARK).is_file(), self.force or bool(self.forced)
        record = run(twin, f"{self.name}-twin", resume=begun, force=force, screen=Screen(self.screen.console))
        if record["provenance"]["data"]["sha256"] != self.material.digest:
            found = f"{self.material.source} has changed since this run began"
            raise GateStop("the twin has not read the same text, so there is no gap to tell", where=str(path), found=found)
        figures: dict[str, Any] = {"path": "twin", "lr": lr, "seed": recipe.run.seed, "loss": None, "gap": None}
        if self.held_out:
            own_result, its = (
                json.loads((folder / "eval" / "after.json").read_text(encoding="utf-8")) for folder in (self.folder.path, path)
            )
            gap, error = paired_difference(_result(its), _result(own_result))
            figures |= {"loss": its["loss"], "gap": gap, "gap_stderr": error if math.isfinite(error) else None}
            self.screen.say(
                f"\nternary {own_result['loss']:.4f}, float twin {its['loss']:.4f}: a gap of {gap:+.4f} ± {number(error)} nats "
                f"at {record['train']['tokens']} tokens each, seed {recipe.run.seed}"
            )
        self.record["twin"] = figures | {"tokens_per_second": record["train"]["tokens_per_second"]}
        self._save()

    def _next(self) -> list[str]:
        path = self.folder.path
        steps = [f"finetune chat {path}{f' {path}/twin' if self.recipe.twin else ''}", f"finetune show {path}"]
        if self.recipe.adapter.kind == "lora" and not self.recipe.run.merge:
            steps.append(f"finetune merge {path} --out {path}/merged")
        return steps

    # -- when it ends badly

    def ended_by(self, error: BaseException, fresh: bool) -> None:
        """Leave nothing half-written: a run that trained nothing vanishes, another says why it ended."""
        path = self.folder.path
        if not self.record or not self.folder.writes:
            return
        trained = (path / "checkpoints").is_dir() or self.folder.metrics.exists()
        stopped = isinstance(error, KeyboardInterrupt | Interruption)
        if fresh and not trained and (stopped or isinstance(error, Mistake)):
            shutil.rmtree(path, ignore_errors=True)
            return
        self.record |= {"state": "stopped" if stopped else "failed", "error": str(error) or type(error).__name__}
        self.record["next"] = [f"finetune resume {path}"]
        try:
            self._save()
            from finetune.report import write_report

            write_report(path)
        except Exception as second:  # the first error is the one to show
            self.screen.warn(f"how it ended could not be written down: {second}")


def as_it_was_fitted(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The recipe with what fit: auto changed of it when this run began: it goes on as it began."""
    changes = folder.read().get("plan", {}).get("fit", {}).get("changes", []) if folder.exists and recipe.fit == "auto" else []
    said = recipe.model_dump()
    for key, values in (item for change in changes for item in change["keys"].items()):
        section, _, leaf = key.rpartition(".")
        if said[section][leaf] == values["old"]:
            said[section][leaf] = values["new"]
    return Recipe.model_validate(said) if changes else recipe


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            result |= _flat(item, f"{prefix}{key}.")
        else:
            result[prefix + key] = item if isinstance(item, str | int | float | bool) else str(item)
    return result


def _result(saved: dict[str, Any]) -> LossResult:
    from eval.perplexity import LossResult

    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    return LossResult(**values)


def _require_trackers(names: list[Any]) -> None:
    import importlib.util

    for name in names:
        if importlib.util.find_spec(name) is None:
            raise Mistake("this tracker is not installed", where="run.trackers", found=name, do=f"pip install {name}")


def score_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    include_path: str | None,
    limit: int | None,
    screen: Screen,
    name: str,
) -> dict[str, Any]:
    """lm-evaluation-harness, with progress on the screen.

    Raises:
        Mistake: it is not installed, or a task is unknown.
    """
    from eval.harness import UnknownTask, run_tasks

    if include_path is not None and not Path(include_path).is_dir():
        raise Mistake("there is no such folder of tasks", where="include_path", found=include_path)
    with screen.phase(name) as progress:
        try:
            return run_tasks(
                model,
                tokenizer,
                tasks,
                include_path=Path(include_path) if include_path else None,
                limit=limit,
                progress=lambda done, total: progress(done, total, "requests"),
            )
        except ImportError as error:
            raise Mistake(str(error), where="eval.tasks", do="pip install -e '.[eval]'") from None
        except UnknownTask as error:
            raise Mistake(str(error), where="eval.tasks") from None


def farewell(screen: Screen, record: dict[str, Any], path: Path) -> None:
    """The result, and what to type next."""
    measured = record["eval"]
    if "difference" in measured:
        before, after = measured["before"], measured["after"]
        screen.say(
            f"\nheld-out loss {before['loss']:.3f} → {after['loss']:.3f} nats ({measured['difference']:+.3f} ± "
            f"{number(measured['difference_stderr'], 3)}), perplexity {before['perplexity']:.2f} → {after['perplexity']:.2f}; "
            f"{clock(record['provenance']['seconds'])} in all"
        )
    screen.say(f"\nreport   {path / 'report.html'}")
    for line in record.get("next", []):
        screen.say(f"next     {line}")
