"""One side of `finetune bench qlora`, in a process of its own: `python -m finetune.bench.side SPEC`, SPEC a JSON file.

Protocol: JSON lines, commands on standard input, answers on standard output (output of libraries goes to standard error).
It exits at the end of its input.

    → {"ready": …}                                      after loading
    {"do": "step"}      → {"loss", "tokens", "trained", "seconds"}   one optimizer step; tokens without padding
    {"do": "peak"}      → {"bytes", "kind"}              peak memory since training began
    {"do": "evaluate"}  → LossResult.as_dict(by_row=True)   the held-out loss; no steps after it
    → {"error": …}, {"skip": why}                       instead of any answer; then it exits

Sides that train: `ours`, as `finetune run`, and `plain` (baselines.py). `ours` starts first and writes to the folder
`share` what the other needs: the rows in order, the adapters' initial weights, the settings. `ceiling` runs
the matrix products of a step alone. `float` and `random` write a model folder and exit.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finetune.errors import Stop, UserErrors
from finetune.files import write_json
from finetune.memory import PeakMemory
from finetune.run_dir import RunDir
from finetune.units import GIB

if TYPE_CHECKING:
    from eval.perplexity import LossResult
    from finetune.data.samples import Sample
    from finetune.recipe import Recipe

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]  # token ids, labels at their own positions
COPIES = GIB  # bytes of weights that the bare products cycle through
FOREVER = 1 << 30  # steps; the parent decides when to stop


class Over(Exception):
    """The parent sent another command than a step, which is kept here."""

    def __init__(self, command: dict[str, Any]) -> None:
        self.command = command
        super().__init__(command.get("do"))


class Pipe:
    """Reads commands and writes answers."""

    def __init__(self, out: int, device: torch.device) -> None:
        self.out, self.device, self.memory = out, device, PeakMemory(device)

    def say(self, **answer: Any) -> None:
        os.write(self.out, (json.dumps(answer) + "\n").encode())

    def receive(self) -> dict[str, Any]:
        line = sys.stdin.readline()
        if not line:
            os._exit(1)  # the parent has gone
        return json.loads(line)

    def next_step(self) -> dict[str, Any]:
        """Wait for the command to take a step, and return it; answers `peak` meanwhile.

        Raises:
            Over: another command came.
        """
        while (command := self.receive())["do"] != "step":
            if command["do"] != "peak":
                raise Over(command)
            self.say(bytes=self.memory.peak(), kind=self.memory.kind)
        return command

    def now(self) -> float:
        """Seconds, after the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()


def save_rows(path: Path, rows: Rows) -> None:
    np.savez(
        path,
        input_ids=np.fromiter((t for ids, _ in rows for t in ids), np.int64),
        labels=np.fromiter((t for _, labels in rows for t in labels), np.int64),
        ends=np.cumsum([len(ids) for ids, _ in rows], dtype=np.int64),
    )


def read_rows(path: Path) -> list[tuple[list[int], list[int]]]:
    with np.load(path) as saved:
        ids, labels, ends = saved["input_ids"], saved["labels"], saved["ends"]
    begins = [0, *ends[:-1]]
    return [(ids[a:b].tolist(), labels[a:b].tolist()) for a, b in zip(begins, ends, strict=True)]


# -------------------------------------------------------------------------------------------------------------------- ours


class _RecordingRunDir(RunDir):
    """A run folder that remembers the last line of the metrics."""

    last: dict[str, Any]

    def append(self, metrics: dict[str, Any]) -> None:
        if "loss" in metrics:
            self.last = metrics
        super().append(metrics)


class _Ours:
    """Trains a recipe as `finetune run` does (finetune/pipeline.py), one step at a time."""

    def __init__(self, recipe: Recipe, device: torch.device, folder: Path) -> None:
        from finetune.assembly import assemble
        from finetune.task_data import Conversations

        self.recipe, self.device, self.folder = recipe, device, _RecordingRunDir(folder / "run")
        self.folder.path.mkdir()
        endless = {"schedule": "constant", "warmup": 0.0, "save_steps": None, "eval_steps": None, "max_steps": None}
        self.assembly = whole = assemble(recipe, device, self.folder.path, endless)  # long enough for compiling to pay off
        assert isinstance(whole.data, Conversations)
        self.source, self.info, self.targets, self.dtype = whole.inputs.source, whole.info, whole.built.targets, whole.built.dtype
        self.quantized = bool(getattr(whole.inputs.config, "quantization_config", None))
        self.data, self.held_out = whole.data, whole.data.held_out()
        self.model, self.parameters, self.trainable = whole.built.model, whole.built.parameters, whole.built.trainable
        self.fast, self.head, self.settings, self.task = whole.patches, whole.patches.head, whole.setup.settings, whole.setup.task

    def steps(self) -> Iterator[list[Sample]]:
        """The samples of each optimizer step, in order, one epoch after the other.

        Without packing they end at an incomplete micro-batch, as at the end of an epoch: it would shift the other side's rows.
        """
        samples = self.data.data.train
        step: list[list[Sample]] = []
        for epoch in count():
            for key in self.task.sampler(epoch, 0, None):
                if not self.recipe.data.packing and len(key) < self.settings.micro_batch:
                    return
                step.append([samples[index] for index in key])
                if len(step) == self.settings.accumulation:
                    yield [sample for batch in step for sample in batch]
                    step = []

    def share(self, folder: Path, most: int) -> list[tuple[int, int]]:
        """Write what the other side needs; returns (tokens, trained tokens) of each of at most `most` steps."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        recipe = self.recipe
        steps = list(islice(self.steps(), most))
        rows = self.data.data.train if recipe.data.packing else [sample for samples in steps for sample in samples]
        save_rows(folder / "rows.npz", [(sample.input_ids, (-100, *sample.labels[1:])) for sample in rows])
        save_rows(folder / "heldout.npz", self.held_out)
        state = get_peft_model_state_dict(self.model)
        first = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
        save_file(first, folder / "adapter.safetensors")
        head = self.model.get_base_model().get_output_embeddings()
        name = next((path for path, module in self.model.get_base_model().named_modules() if module is head), None)
        settings = {
            "model": self.source.folder, "revision": self.source.revision, "trust_remote_code": self.source.trust_remote_code,
            "attention": recipe.model.attention, "dtype": str(self.dtype).removeprefix("torch."), "seed": recipe.run.seed,
            "nf4": recipe.quant.scheme == "nf4" and not self.quantized, "double": recipe.quant.double,
            "kept": self._kept(), "adapter": recipe.adapter.model_dump(),
            "targets": "all-linear" if recipe.adapter.targets == "all-linear" else self.targets,
            "packing": recipe.data.packing, "max_length": recipe.data.max_length,
            "train": recipe.train.model_dump(mode="json"),  # its own batches, which need not be row by row as ours may be
            "adapter_dtype": str(next(p.dtype for p in self.model.parameters() if p.requires_grad)).removeprefix("torch."),
            "batch_tokens": recipe.eval.batch_tokens, "threads": torch.get_num_threads(),
            "linears": [shape for path, shape in self.info.linears.items() if path != name],
            "head": None if head is None else list(head.weight.shape),
        }  # fmt: skip
        write_json(folder / "share.json", settings)
        return [(sum(map(len, samples)), sum(sample.supervised for sample in samples)) for samples in steps]

    def _kept(self) -> list[str]:
        """Linears that the recipe keeps in floats, in addition to the defaults such as the head."""
        from fnmatch import fnmatch

        return [path for path in self.info.linears if any(fnmatch(path, pattern) for pattern in self.recipe.quant.keep)]

    def train(self, pipe: Pipe, counts: list[tuple[int, int]]) -> None:
        """Take steps on command.

        Raises:
            Over: another command came.
        """
        began, supervised = 0.0, 0

        def before(step: int) -> None:
            nonlocal began
            pipe.next_step()
            began = pipe.now()

        def after(step: int) -> dict[str, Any]:
            nonlocal supervised
            seconds, line = pipe.now() - began, self.folder.last
            pipe.say(loss=line["loss"], tokens=counts[step - 1][0], trained=line["supervised"] - supervised, seconds=seconds)
            supervised = line["supervised"]
            return {}

        self.assembly.train(self.folder, FOREVER, before_step=before, after_step=after)

    def evaluate(self) -> LossResult:
        from eval.perplexity import evaluate_loss
        from finetune.train.fast import chunked_loss

        of_tokens = chunked_loss.evaluator(self.head, self.settings.loss_chunk) if self.head is not None else None
        return evaluate_loss(self.model, self.held_out, batch_tokens=self.recipe.eval.batch_tokens, of_tokens=of_tokens)


def ours(pipe: Pipe, spec: dict[str, Any]) -> None:
    from finetune.recipe import read_recipe
    from quant import backends

    recipe, share = read_recipe(Path(spec["recipe"])), Path(spec["share"])
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    side = _Ours(recipe, pipe.device, share)
    counts = side.share(share, spec["steps"])
    pipe.say(
        ready={
            "counts": counts, "parameters": side.parameters, "trainable": side.trainable, "adapters": len(side.targets),
            "held_out": len(side.held_out), "threads": torch.get_num_threads(), "dtype": str(side.dtype).removeprefix("torch."),
            "backend": backends.describe(pipe.device, scheme=recipe.quant.scheme) if recipe.quant.scheme != "none" else "torch",
            "fast": side.fast.in_words(), "architecture": side.info.architecture,
        }
    )  # fmt: skip
    try:
        side.train(pipe, counts)
    except Over as over:
        _evaluations(pipe, over.command, side.evaluate)


def _evaluations(pipe: Pipe, command: dict[str, Any], evaluate: Any) -> None:
    while True:
        if command["do"] != "evaluate":
            raise ValueError(f"unknown command: {command}")
        pipe.say(**evaluate().as_dict(by_row=True))
        command = pipe.receive()


# ------------------------------------------------------------------------------------------------------------------- plain


def plain(pipe: Pipe, spec: dict[str, Any]) -> None:
    from eval.perplexity import evaluate_loss
    from finetune.bench import baselines

    share = Path(spec["share"])
    settings = json.loads((share / "share.json").read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    began = 0.0

    def wait() -> None:
        nonlocal began
        pipe.next_step()
        began = pipe.now()

    def tell(loss: float, tokens: int, trained: int) -> None:
        pipe.say(loss=loss, tokens=tokens, trained=trained, seconds=stopped - began)

    stopped = 0.0

    def stop() -> None:
        nonlocal stopped
        stopped = pipe.now()

    trainer = baselines.sft_trainer(
        settings, share / "rows.npz", share / "adapter.safetensors", Path(spec["folder"]), pipe.device,
        as_ours=spec["as_ours"], wait=wait, stop=stop, tell=tell,
    )  # fmt: skip
    pipe.say(ready={"adapters": str(next(p.dtype for p in trainer.model.parameters() if p.requires_grad)).removeprefix("torch.")})
    pipe.memory.reset()
    try:
        trainer.train()
    except Over as over:
        rows = read_rows(share / "heldout.npz")
        with baselines.arithmetic_of_training(trainer.model):
            _evaluations(pipe, over.command, lambda: evaluate_loss(trainer.model, rows, batch_tokens=settings["batch_tokens"]))


# ----------------------------------------------------------------------------------------------------------------- ceiling


class Products:
    """The matrix products of a step alone: those of every linear in the forward pass and for the gradient of its input.

    shapes: (out, in) of the linears, for all tokens; head: of the head, for trained tokens only. Each linear has its own
    weight, as in the model, up to a GiB in total; inputs and gradients are shared by width.
    """

    def __init__(self, shapes: list[tuple[int, int]], head: tuple[int, int] | None, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        size, self.weights = 0, dict[tuple[int, int], list[torch.Tensor]]()
        for out, k in shapes:
            own = self.weights.setdefault((out, k), [])
            if not own or size + out * k * dtype.itemsize <= COPIES:
                own.append(self._numbers(out, k))
                size += own[-1].nbytes
        self.shapes, self.head = shapes, None if head is None else self._numbers(*head)
        self.rows: dict[int, torch.Tensor] = {}

    def _numbers(self, *shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=self.device) * 0.02).to(self.dtype)

    def _rows(self, count: int, width: int) -> torch.Tensor:
        """A matrix (count, width), cached."""
        have = self.rows.get(width)
        if have is None or have.shape[0] < count:
            have = self.rows[width] = self._numbers(count, width)
        return have[:count]

    def prepare(self, tokens: int, trained: int) -> None:
        """Create the inputs of `step` in advance."""
        for out, k in self.shapes:
            self._rows(tokens, out), self._rows(tokens, k)
        if self.head is not None:
            self._rows(trained, self.head.shape[0]), self._rows(trained, self.head.shape[1])

    @torch.no_grad()
    def step(self, tokens: int, trained: int) -> None:
        used = dict.fromkeys(self.weights, 0)
        for shape in self.shapes:
            own = self.weights[shape]
            self._both(own[used[shape] % len(own)], tokens)
            used[shape] += 1
        if self.head is not None:
            self._both(self.head, trained)

    def _both(self, weight: torch.Tensor, tokens: int) -> None:
        torch.nn.functional.linear(self._rows(tokens, weight.shape[1]), weight)
        torch.mm(self._rows(tokens, weight.shape[0]), weight)


def ceiling(pipe: Pipe, spec: dict[str, Any]) -> None:
    shared = json.loads((Path(spec["share"]) / "share.json").read_text(encoding="utf-8"))
    torch.set_num_threads(shared["threads"])
    linears, head = [(out, k) for out, k in shared["linears"]], shared["head"] and tuple(shared["head"])
    products = Products(linears, head, getattr(torch, shared["dtype"]), pipe.device)
    pipe.say(ready={})
    while True:
        command = pipe.next_step()
        work = command["tokens"], command["trained"]
        products.prepare(*work)
        began = pipe.now()
        products.step(*work)
        pipe.say(tokens=work[0], trained=work[1], seconds=pipe.now() - began, loss=None)


# -------------------------------------------------------------------------------------------------------------- model folders


def as_float(pipe: Pipe, spec: dict[str, Any]) -> None:
    """Write the float model of a recipe's GGUF as a model folder."""
    from finetune.models.config import load_config, load_tokenizer
    from finetune.models.precision import weights_dtype
    from finetune.models.source import source_of
    from finetune.models.weights import load_weights
    from finetune.recipe import read_recipe

    recipe = read_recipe(Path(spec["recipe"]))
    source = source_of(recipe.model)
    dtype = weights_dtype(recipe, pipe.device.type)
    model = load_weights(source, load_config(source), dtype=dtype, attention="auto")
    model.save_pretrained(spec["out"])
    load_tokenizer(source).save_pretrained(spec["out"])
    pipe.say(ready={})


def random_model(pipe: Pipe, spec: dict[str, Any]) -> None:
    """Write a Llama with random NF4 codes, as bitsandbytes stores them, a tokenizer, and `rows` lines of random words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from quant import NF4Linear, swap
    from quant.byte_views import as_bytes

    shape, out = spec["shape"], Path(spec["out"])
    torch.manual_seed(0)
    words = shape["vocab_size"] - 2
    special_tokens = {"bos_token_id": None, "eos_token_id": words, "pad_token_id": words + 1}
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**shape, **special_tokens, tie_word_embeddings=False, dtype=torch.bfloat16))
    model.to(torch.bfloat16)
    swap(model, scheme="nf4")
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, NF4Linear):
                tensor = torch.ones(parameter.shape) if parameter.ndim == 1 else torch.randn(parameter.shape) * 0.02
                tensor = tensor.to(torch.bfloat16)
            elif name in ("weight", "absmax"):
                tensor = torch.randint(0, 256, parameter.shape, dtype=torch.uint8)
            else:  # blocks with a largest weight of 0.03 to 0.05: weights of about 0.02, as in a model
                tensor = as_bytes(torch.full((parameter.numel() // 4,), {"offset": 0.04, "nested_absmax": 0.01}[name]))
            setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))
    model.save_pretrained(out, max_shard_size="1GB")
    known = {f"w{i}": i for i in range(words)} | {"</s>": words, "<pad>": words + 1}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="w0").save_pretrained(out)
    drawn = torch.randint(0, words, (spec["rows"], spec["length"] - 1)).tolist()
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in row)}) + "\n" for row in drawn]
    (out / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    pipe.say(ready={})


SIDES = {"ours": ours, "plain": plain, "ceiling": ceiling, "float": as_float, "random": random_model}


def main(out: int, path: str) -> None:
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    pipe = Pipe(out, torch.device(spec["device"]))
    if pipe.device.type == "cuda" and spec["card_gib"]:
        torch.cuda.set_per_process_memory_fraction(spec["card_gib"] * GIB / torch.cuda.mem_get_info()[1])
    try:
        SIDES[spec["side"]](pipe, spec)
    except Stop as stop:
        message = str(stop) if isinstance(stop, UserErrors) else stop.message
        pipe.say(error={"message": message, "where": stop.where, "got": stop.got, "hint": stop.hint})
    except Exception as error:
        from finetune.bench.measure import Skip

        if not isinstance(error, Skip):
            raise
        pipe.say(skip=str(error))


if __name__ == "__main__":
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        main(own, sys.argv[1])
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
