"""`finetune bench bitnet`: training of a ternary model and its exports, against other implementations.

step        forward, loss, backward and AdamW of a whole model, tokens per second, against
                bf16             the same model without quantization, its float twin
                AutoBitLinear    transformers' layers, quantizing online; compiled if there is a compiler
                formula          the straight-through definition in plain torch, what onebitllms trains (its own kernels on CUDA)
memory      the peak of such steps, each side in a process of its own
size        bytes on disk: the packed folder against bf16 safetensors, GGUF TQ2_0 and TQ1_0 against F16
generation  the TQ2_0 file against the F16 file of the same model, both run by llama.cpp

All sides of a step start from the same fp32 master weights and get the same batches, under bf16 autocast if the device
computes in bf16. Before they are timed, ternary sides must have the same loss and gradients in fp32. The gap of a ternary
model to its float twin is measured by recipes (`twin: true`), not here.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.bench import baselines
from finetune.bench.measure import Amounts, Case, Pairing, Side, Skip
from finetune.errors import UserError
from finetune.memory import PeakMemory, resident_bytes, return_freed_memory
from finetune.units import MIB
from quant import backends, swap

SAME_LOSS = 2e-4
SAME_GRADIENTS = 4e-3
"""Relative differences in fp32 above which two sides are different models; gradients are compared on one layer, since one
activation that is rounded differently changes all later ones. Measured: 6e-5 and 9e-4; 1.7e-2 without int8 activations."""
GET_LLAMA = "pip install 'finetune12g[export]'"


class Shape(NamedTuple):
    """Sizes of a BitNetForCausalLM with SiLU, which llama.cpp can run, and a tied head; and of a batch."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    tokens: int

    @property
    def batch(self) -> int:
        return self.rows * self.tokens


CPU = Shape(512, 1536, 6, 8, 2048, 4, 256)
CUDA = Shape(768, 2048, 12, 12, 49152, 4, 1024)


@dataclass(frozen=True)
class Sizes:
    """cpu: 21.5 million parameters; cuda: 125 million with the vocabulary of SmolLM2. generated: tokens per measurement."""

    cpu: Shape = CPU
    cuda: Shape = CUDA
    pairs: int = 11
    generated: int = 128
    generations: int = 15

    def shape(self, device: str) -> Shape:
        return Shape(*(self.cuda if device == "cuda" else self.cpu))


SIZES = Sizes()


def backends_here(device: str) -> dict[str, str]:
    """The backend of our side on `device`, and why if it is not the preferred one."""
    return {"ternary": backends.describe(device, scheme="ternary")}


# ------------------------------------------------------------------------------------------------------------------- steps


def _ours(model: Any) -> None:
    swap(model, scheme="ternary", trainable=True)


SIDES: dict[str, Callable[[Any], None]] = {
    "ours": _ours,
    "bf16": lambda model: None,
    "AutoBitLinear": baselines.auto_bitlinear,
    "formula": baselines.straight_through,
    "onebitllms": baselines.onebitllms_model,
}
"""Functions that convert the float model to a side, in place."""


def build_model(shape: Shape, device: str, side: str) -> Any:
    """The model of `side` on `device`, in fp32, with the same weights for every side."""
    from transformers import BitNetConfig, BitNetForCausalLM

    config = BitNetConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads, hidden_act="silu",
        max_position_embeddings=shape.tokens, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = BitNetForCausalLM(config)
        model.to(device)
    SIDES[side](model)
    return model.train()


def batch(shape: Shape, device: str) -> Tensor:
    """Token ids (rows, tokens)."""
    return torch.randint(0, shape.vocabulary, (shape.rows, shape.tokens), device=device)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of products; None if that is fp32, like the master weights."""
    from finetune.models.precision import default_dtype

    return None if (dtype := default_dtype(device)) == torch.float32 else dtype


def loss_of(model: Any, ids: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Mean cross-entropy of ids (rows, tokens), nats, under autocast to `dtype`."""
    with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype is not None):
        logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


class Steps:
    """Takes training steps of `model`: ids → loss."""

    def __init__(self, model: Any, dtype: torch.dtype | None) -> None:
        self.model, self.dtype = model, dtype
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def __call__(self, ids: Tensor) -> Tensor:
        loss = loss_of(self.model, ids, self.dtype)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def require_same(ours: Any, theirs: Any, ids: Tensor, same_gradients: float) -> None:
    """Raise RuntimeError unless both have the same loss and gradients on `ids` in fp32, up to rounding."""
    results: list[tuple[float, Tensor]] = []
    for model in (ours, theirs):
        loss = loss_of(model, ids, None)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append((float(loss.detach()), torch.cat([gradient.flatten() for gradient in gradients])))
    (mine, gradient), (other, their_gradient) = results
    gradient_difference = float((gradient - their_gradient).norm() / their_gradient.norm())
    loss_difference = abs(mine - other) / abs(other)
    for name, difference, bound in (
        ("loss", loss_difference, SAME_LOSS),
        ("gradients", gradient_difference, same_gradients),
    ):
        if not difference < bound:
            raise RuntimeError(f"the two sides train different models: the {name} differ by {difference:.3g} in fp32")


def _around(device: str, side: str) -> tuple[Callable[[], AbstractContextManager[object]], str]:
    """The context of the steps of `side`, and a note on it."""
    if side != "AutoBitLinear":
        return nullcontext, ""
    note = "" if baselines.compiles(device) else "torch.compile does not work here: theirs runs eagerly"
    return functools.partial(baselines.as_compiled, device), note


def _step(device: str, sizes: Sizes, side: str) -> Pairing:
    shape, dtype = sizes.shape(device), autocast_dtype(device)
    mine, other = (build_model(shape, device, name) for name in ("ours", side))
    within, note = _around(device, side)
    if side != "bf16":
        shallow, ids = shape._replace(layers=1), batch(shape, device)
        with within():
            theirs_shallow = build_model(shallow, device, side)
            try:
                loss_of(theirs_shallow, ids, None).backward()
            except Exception as error:
                raise Skip(f"the other side failed with {type(error).__name__}: {error}") from error
            require_same(build_model(shallow, device, "ours"), theirs_shallow, ids, SAME_GRADIENTS)
            require_same(mine, other, ids, math.inf)
    ours, theirs = (_side(Steps(model, dtype)) for model in (mine, other))
    by = backends.describe(device, scheme="ternary")
    return Pairing(lambda: (batch(shape, device),), ours, theirs, sizes.pairs, by, within, work=shape.batch, note=note)


def _side(steps: Steps) -> Side:
    return lambda ids: lambda: steps(ids)


# ------------------------------------------------------------------------------------------------------------------ memory


def peak(device: str, sizes: Sizes, side: str) -> int:
    """Peak bytes of steps of `side`: the memory of this process beyond what it has after such steps have ended.

    So libraries and compiled code do not count; model, gradients and optimizer states do. Run it in a fresh process (child.py).
    """
    shape, dtype = sizes.shape(device), autocast_dtype(device)

    def run() -> None:
        with _around(device, side)[0]():
            steps = Steps(build_model(shape, device, side), dtype)
            for _ in range(2):  # optimizer states exist from the second one on
                steps(batch(shape, device))

    before = threading.Thread(target=run)  # its thread-local caches end with it
    before.start()
    before.join()
    gc.collect()
    memory = PeakMemory(torch.device(device))
    if not (memory.cuda or return_freed_memory()):
        raise Skip("peak memory is measured on Linux with glibc only")
    base = torch.cuda.memory_allocated() if memory.cuda else resident_bytes()
    memory.reset()
    run()
    return memory.peak() - base


class Peaks:
    """The peak of each side on `device`, measured once."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes
        self._found: dict[str, float] = {}

    def __call__(self, side: str) -> Amounts:
        """Ours against that of `side`, MiB."""
        note = _around(self.device, side)[1]
        ours, theirs = (self._of(name) / MIB for name in ("ours", side))
        return Amounts(ours, theirs, backends.describe(self.device, scheme="ternary"), note)

    def _of(self, side: str) -> float:
        if side not in self._found:
            self._found[side] = in_a_child(self.device, self.sizes, side)
        return self._found[side]


def in_a_child(device: str, sizes: Sizes, side: str) -> int:
    """`peak` in a process of its own, which ends with this one.

    Raises:
        Skip: it failed; its output is on standard error.
    """
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise Skip("peak memory is measured on Linux only")
    if side == "onebitllms" and importlib.util.find_spec(side) is None:
        raise Skip(f"{side} is not installed, pip install {side}")
    command = [sys.executable, "-P", "-m", "finetune.bench.child", "bitnet", device, json.dumps(asdict(sizes)), side]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            reply = child.stdout.read()
            code = child.wait()
        finally:
            child.kill()
    if code:
        raise Skip(f"the steps of {side} failed in a process of their own (exit code {code})")
    return int(json.loads(reply)["peak"])


# ----------------------------------------------------------------------------------------------------------------- exports


class Exports:
    """The ternary model of `shape` in each format, and the float one, in a temporary folder; each is written on first use.

    Weights that are not ternary are bf16, or the format's equivalent. Each export passes its gate.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._bytes: dict[str, int] = {}

    def path(self, format: str) -> Path:  # noqa: A002
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="finetune-bench-")
        return Path(self._folder.name) / (f"{format}.gguf" if format.startswith("gguf") else format)

    def bytes(self, format: str) -> int:  # noqa: A002
        """Of weights on disk (*.safetensors, or the whole GGUF). "bf16": the float model.

        Raises:
            Skip: llama.cpp is not installed.
        """
        if format not in self._bytes:
            self._bytes[format] = self._float() if format == "bf16" else self._exported(format)
        return self._bytes[format]

    def _float(self) -> int:
        folder = self.path("bf16")
        self._model("bf16").save_pretrained(folder)
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    def _model(self, side: str) -> Any:
        from finetune.models.weights import cast

        return cast(build_model(self.shape, "cpu", side), torch.bfloat16).eval()

    def _exported(self, format: str) -> int:  # noqa: A002
        from finetune.data.tokenizer import SMALLEST, train_tokenizer
        from finetune.exporters import export

        if format.startswith("gguf"):
            require_llama_cpp()
        tokenizer = train_tokenizer([__doc__ or ""], SMALLEST)
        ids = batch(self.shape, "cpu")[0].tolist()
        try:
            return int(export(self._model("ours"), tokenizer, self.path(format), format=format, rows=[(ids, ids)])["bytes"])
        except UserError as error:
            raise Skip(str(error)) from error


def require_llama_cpp() -> None:
    """Raise Skip if the packages that write and run GGUF files are not installed."""
    for package in ("gguf", "xllamacpp"):
        if importlib.util.find_spec(package) is None:
            raise Skip(f"{package} is not installed, {GET_LLAMA}")


def _size(exports: Exports, format: str, against: str) -> Amounts:  # noqa: A002
    ours, theirs = (exports.bytes(name) / MIB for name in (format, against))
    return Amounts(ours, theirs, "finetune export")


def _generation(exports: Exports, sizes: Sizes) -> Amounts:
    from finetune.exporters.llama_cpp import WHEEL, tokens_per_second

    paths = []
    for name in ("gguf-tq2_0", "gguf-f16"):
        exports.bytes(name)  # writes it
        paths.append(exports.path(name))
    ours, theirs = tokens_per_second(paths, count=sizes.generated, pairs=sizes.generations, threads=1)
    return Amounts(ours, theirs, WHEEL)


# ------------------------------------------------------------------------------------------------------------------- cases


def cases(device: str, sizes: Sizes) -> list[Case]:
    shape, exports, peaks = sizes.shape(device), Exports(sizes.shape(device)), Peaks(device, sizes)
    prefix = "CUDA " if device == "cuda" else ""
    what = f"{shape.layers} layers of {shape.hidden}, vocabulary {shape.vocabulary}, {shape.rows} × {shape.tokens} tokens"
    products = "bf16 autocast, fp32 masters" if autocast_dtype(device) else "fp32: this device does not compute in bf16"
    opponents = {
        "bf16": "the same model without quantization",
        "AutoBitLinear": "transformers' layer, quantizing online",
        "formula": "what onebitllms trains, in plain torch" + ("" if device == "cuda" else ", because its own kernels need CUDA"),
    } | ({"onebitllms": "its own layer"} if device == "cuda" else {})
    goals = {"bf16": 0.83, "AutoBitLinear": 1.0, "formula": 1.0, "onebitllms": 1.0}  # onebitllms claims 20 % over plain training
    step = (
        f"steps of a BitNetForCausalLM, {what}: forward, loss, backward, fused AdamW; {products}; weights are quantized in "
        f"every step; {'; '.join(f'{side}: {about}' for side, about in opponents.items())}"
    )
    memory = "peak of such steps in a separate process: model, gradients, AdamW states and activations, without libraries"
    step_cases = [
        Case(
            f"{prefix}ternary step", side, "tokens/s", goals[side], functools.partial(_step, device, sizes, side), 30, step,
        )
        for side in opponents
    ] + [
        Case(f"{prefix}peak memory", side, "MiB", 1.0, functools.partial(peaks, side), 24 if side == "bf16" else 12, memory)
        for side in opponents
    ]  # fmt: skip
    if device == "cuda":
        return step_cases
    table = shape.vocabulary * shape.hidden
    body = shape.layers * (4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate)

    def share(bits: float) -> float:
        """Share of the bytes in 16 bits, with 2 % for names, norms and tokens."""
        return 1.02 * (body * bits + table * 16) / ((body + table) * 16)

    disk = f"{(body + table) / 1e6:.1f} million weights, of which {table / 1e6:.1f} million (the embedding) stay in 16 bits"
    return [
        *step_cases,
        Case("bitnet folder", "bf16 safetensors", "MiB", share(2), lambda: _size(exports, "bitnet", "bf16"), 5, disk),
        Case("GGUF TQ2_0", "GGUF F16", "MiB", share(2.0625), lambda: _size(exports, "gguf-tq2_0", "gguf-f16"), 5, disk),
        Case("GGUF TQ1_0", "GGUF F16", "MiB", share(1.6875), lambda: _size(exports, "gguf-tq1_0", "gguf-f16"), 3, disk),
        Case(
            "TQ2_0 generation", "GGUF F16", "tokens/s", None, lambda: _generation(exports, sizes), 8,
            f"llama.cpp on both sides, one thread, the ternary model of {disk}; {sizes.generated} tokens per measurement, "
            f"wall time, medians of {sizes.generations} interleaved measurements",
        ),
    ]  # fmt: skip
