"""Streams frozen weights of a decoder's layers from disk or CPU memory when their layer runs.

    disk on the CPU      weights are memory-mapped files (disk.py). While a layer computes, the next one's pages are read
                         ahead, and those of the previous layer are released.
    memory, on CUDA      weights are in pinned CPU memory. While a layer computes, the next one is copied to the GPU on a
                         stream of its own: two layers are on the GPU at once.
    disk, on CUDA        the same, from mapped files through two pinned buffers.

Results are bit-equal to those with all weights on the device: the same operations run on the same numbers. Layers run in order
in the forward pass and in reverse in the backward pass, where activation checkpointing runs each once more;
which one is next is a guess, and a wrong one only costs time. Adapters, norms outside of the layers and the head stay on the
device; an embedding that is not tied to the head is looked up where it is stored, and only its rows are moved.

Weights are copied into a new buffer each time (the allocator reuses the old one), and released by dropping it. No buffer is
written twice, so stale reads are impossible: the recomputed graph of a layer keeps its buffer until its gradients are known,
and any other reference only costs memory. Between its turns a layer's parameters have their shapes and a single value, NaN or
the largest integer, so that reading them then (as a backward pass without checkpointing would) fails or gives NaN.
"""

from __future__ import annotations

import functools
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.memory import return_freed_memory
from finetune.train.offload.disk import Scratch, let_go, read_ahead

ALIGNED = 256  # bytes: kernels read vectors, and the scales of packed weights are fp32 in bytes


def check(mode: str, device: torch.device) -> None:
    """Raise UserError for `offload_layers: memory` on the CPU, where weights are in that memory anyway."""
    if mode == "memory" and device.type == "cpu":
        raise UserError(
            "a CPU run has its layers in CPU memory already",
            where="model.offload_layers",
            got="memory, on the CPU",
            hint="set model.offload_layers=disk if memory is too small, else model.offload_layers=none",
        )


def stream(model: Any, device: torch.device, scratch: Scratch | None) -> Streamed:
    """Move frozen weights of the layers of `model` to `scratch` (None: CPU memory), and everything else to `device`.

    model: on the CPU, a causal language model of transformers, with adapters attached and checkpointing enabled. It can then be
    used as usual; code that reads the weights themselves (merging) must call `restore` first.

    Raises:
        UserError: no layers are found, nothing in them is frozen, or the disk is full.
    """
    streamed = Mapped(model, scratch) if device.type == "cpu" and scratch is not None else Fetched(model, device, scratch)
    gc.collect()
    return_freed_memory()
    return streamed


# --------------------------------------------------------------------------------------------------------------- the layers


def layers_of(model: Any) -> list[nn.Module]:
    """The decoder's layers, in the order in which they run.

    Raises:
        UserError: there is no list of layers.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    lists, pending = [], [decoder]
    while pending:  # lists inside of layers (experts, convolutions) are skipped
        module = pending.pop()
        if isinstance(module, nn.ModuleList):
            lists.append(module)
        else:
            pending += module.children()
    layers = max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()), default=None)
    if layers is None or not len(layers):
        raise UserError(
            "cannot stream this model: no list of decoder layers found", where="model.offload_layers", got=type(base).__name__
        )
    return list(layers)


@dataclass(frozen=True)
class Layer:
    """A layer and its frozen parameters that no other module shares."""

    module: nn.Module
    frozen: list[nn.Parameter]

    @property
    def bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.frozen)


def _frozen(model: nn.Module, modules: Sequence[nn.Module]) -> tuple[list[Layer], list[nn.Parameter]]:
    """The layers with the frozen parameters that only they use, and all other frozen parameters."""
    holders: dict[nn.Parameter, set[int]] = {}
    layer_of = {part: index for index, module in enumerate(modules) for part in module.modules()}
    for module in model.modules():
        for held in module._parameters.values():
            if held is not None:
                holders.setdefault(held, set()).add(layer_of.get(module, -1))
    layers = [
        Layer(module, [p for p in module.parameters() if not p.requires_grad and holders[p] == {index}])
        for index, module in enumerate(modules)
    ]
    own = {parameter for layer in layers for parameter in layer.frozen}
    if not own:
        raise UserError(
            "cannot stream this model: its layers have no frozen weights",
            where="model.offload_layers",
            got=f"{len(layers)} × {type(modules[0]).__name__}",
            hint="set adapter.kind=lora",
        )
    return layers, [p for p in model.parameters() if not p.requires_grad and p not in own]


class Streamed(ABC):
    """Fetches the weights of a layer when it, or a module in it, is called, and prefetches the next one's."""

    kind: str

    def __init__(self, model: Any) -> None:
        self.layers, self.elsewhere = _frozen(model, layers_of(model))
        self.current: int | None = None
        self._undo: list[Callable[[], None]] = []
        for index, layer in enumerate(self.layers):
            self._hook(index, layer)

    def _hook(self, index: int, layer: Layer) -> None:
        # Not only the layer: checkpointing recomputes it through `forward`, bypassing its hooks (transformers 5.23).
        frozen = set(layer.frozen)
        for module in [m for m in layer.module.modules() if not frozen.isdisjoint(m.parameters())]:
            self._undo.append(module.register_forward_pre_hook(lambda *_: self.enter(index)).remove)
        for parameter in layer.frozen:
            parameter.streamed = True  # type: ignore[attr-defined]  # nothing derived from it is cached (quant/weight_cache.py)
            self._undo.append(functools.partial(delattr, parameter, "streamed"))

    def enter(self, index: int) -> None:
        """Begin a layer's turn: its weights are in place on return, and the next one's are being fetched."""
        if index != self.current:
            upcoming = self._after(index)
            with torch.inference_mode(False), torch.no_grad():  # whatever mode the layer is called in
                self._bring(index, upcoming)
            self.current = index

    def _after(self, index: int) -> int:
        """The layer that probably runs next."""
        last = len(self.layers) - 1
        if self.current is not None and index == self.current - 1 and index > 0:
            return index - 1  # down, in the backward pass
        if index < last:
            return index + 1
        return max(0, last - 1) if torch.is_grad_enabled() else 0  # its backward pass begins, or another forward pass

    @abstractmethod
    def _bring(self, index: int, upcoming: int) -> None:
        """Put the weights of a layer in place, and start to fetch those of the next."""

    def restore(self) -> None:
        """Undo `stream`: the model is on the CPU with all its weights."""
        while self._undo:
            self._undo.pop()()
        self.current = None

    def figures(self) -> dict[str, Any]:
        """Numbers for the run's record."""
        sizes = [layer.bytes for layer in self.layers]
        return {"from": self.kind, "layers": len(sizes), "bytes": sum(sizes), "largest_layer_bytes": max(sizes)}


# ---------------------------------------------------------------------------------------------------------- disk on the CPU


class Mapped(Streamed):
    """Frozen weights in mapped files, embedding and head included: the operating system pages them in."""

    kind = "disk"

    def __init__(self, model: Any, scratch: Scratch) -> None:
        super().__init__(model)
        for parameter in [*(p for layer in self.layers for p in layer.frozen), *self.elsewhere]:
            parameter.data = scratch.put(parameter.data)
        scratch.sync()
        self._spans = [scratch.spans([p.data for p in layer.frozen]) for layer in self.layers]
        for spans in self._spans:
            let_go(spans)
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._undo.append(lambda: self._reader.shutdown())

    def _bring(self, index: int, upcoming: int) -> None:
        if self.current is not None and self.current not in (index, upcoming):
            let_go(self._spans[self.current])
        self._reader.submit(read_ahead, self._spans[upcoming])


# ------------------------------------------------------------------------------------------------------ to the device and back


@dataclass(frozen=True)
class _Piece:
    """A parameter, its storage on the CPU (`home`), and its offset in the layer's buffer (bytes)."""

    parameter: nn.Parameter
    home: Tensor
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.home.numel() * self.home.element_size()

    def of(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.stop].view(self.home.dtype).view(self.home.shape)


class Fetched(Streamed):
    """Copies layers to the device, one ahead of the one that computes. Runs on the CPU too, for tests.

    On CUDA a buffer belongs to the computing stream; the copying stream waits for the work that was queued there when the buffer
    was allocated, and the computing stream waits for the copy when the layer's turn comes.
    """

    def __init__(self, model: Any, device: torch.device, scratch: Scratch | None) -> None:
        super().__init__(model)
        self.kind = "memory" if scratch is None else "disk"
        self._model, self.device, self._cuda = model, device, device.type == "cuda"
        self._copying = torch.cuda.Stream(device) if self._cuda else None
        self._placeholders: dict[torch.dtype, Tensor] = {}
        self._pieces: list[list[_Piece]] = []
        self._blobs: list[Tensor] = []  # memory mode: a layer's weights, laid out as in its buffer
        self._size = max([self._store(layer, scratch) for layer in self.layers])
        self._spans = [[] if scratch is None else scratch.spans(p.home for p in pieces) for pieces in self._pieces]
        self._staging: list[tuple[Tensor, Any]] = []  # disk mode: pinned buffers, and the copy that reads each
        if scratch is not None:
            self._staging = [(torch.empty(self._size, dtype=torch.uint8, pin_memory=self._cuda), None) for _ in range(2)]
            scratch.sync()
        self._held: dict[int, tuple[Tensor, Future[Any]]] = {}
        self._worker = ThreadPoolExecutor(1, "layers")
        self._keep_embedding_home(model, scratch)
        model.to(device)

    def _store(self, layer: Layer, scratch: Scratch | None) -> int:
        """Move the layer's weights to their storage; returns the bytes of its buffer."""
        starts, size = [], 0
        for parameter in layer.frozen:
            starts.append(size)
            size += -(-parameter.numel() * parameter.element_size() // ALIGNED) * ALIGNED
        if scratch is None:
            blob = torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)
            self._blobs.append(blob)
        pieces = []
        for parameter, start in zip(layer.frozen, starts, strict=True):
            home = parameter.data if scratch is None else scratch.put(parameter.data)
            piece = _Piece(parameter, home, start)
            if scratch is None:
                piece.of(blob).copy_(home)
                piece = _Piece(parameter, piece.of(blob), start)
            pieces.append(piece)
            parameter.data = self._placeholder(home)
        self._pieces.append(pieces)
        return size

    def _placeholder(self, like: Tensor) -> Tensor:
        """A stand-in for absent weights: NaN or the largest integer in the shape of `like`, with the memory of one number."""
        if like.dtype not in self._placeholders:
            value = torch.nan if like.is_floating_point() else torch.iinfo(like.dtype).max
            self._placeholders[like.dtype] = torch.full((), value, dtype=like.dtype, device=self.device)
        return self._placeholders[like.dtype].expand(like.shape)

    def _keep_embedding_home(self, model: Any, scratch: Scratch | None) -> None:
        """Leave the embedding table where it is stored, and move only the rows that a batch needs."""
        embedding = model.get_input_embeddings()
        shared = sum(p is embedding.weight for module in model.modules() for p in module._parameters.values()) > 1
        if type(embedding) is not nn.Embedding or embedding.weight.requires_grad or shared:
            return
        weight = embedding.weight
        table = weight.data if scratch is None else scratch.put(weight.data)

        def forward(ids: Tensor) -> Tensor:
            return F.embedding(ids.to(table.device), table).to(self.device)

        weight.data, embedding.forward = self._placeholder(table), forward  # type: ignore[method-assign,assignment]

        def back() -> None:
            weight.data = table
            del embedding.forward

        self._undo.append(back)

    def _bring(self, index: int, upcoming: int) -> None:
        for other in [held for held in self._held if held not in (index, upcoming)]:
            self._drop(other)
        for needed in (index, upcoming):
            if needed not in self._held:
                self._fetch(needed)
        buffer, copied = self._held[index]
        self._wait(copied)
        for piece in self._pieces[index]:
            piece.parameter.data = piece.of(buffer)

    def _fetch(self, index: int) -> None:
        # All buffers have the same size, so that the allocator reuses a freed one.
        buffer = torch.empty(self._size, dtype=torch.uint8, device=self.device)
        free = torch.cuda.current_stream(self.device).record_event() if self._cuda else None
        self._held[index] = buffer, self._worker.submit(self._copy, index, buffer, free)

    def _copy(self, index: int, buffer: Tensor, free: Any) -> Any:
        """Runs in the worker thread. Returns the event after which the buffer is filled, None if it is filled already."""
        source = self._blobs[index] if self._blobs else self._staged(index)
        part = buffer[: source.numel()]
        if self._copying is None:
            part.copy_(source)
            return None
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(free)
            part.copy_(source, non_blocking=True)
            done = self._copying.record_event()
        if self._staging:
            self._staging[-1] = self._staging[-1][0], done
        return done

    def _staged(self, index: int) -> Tensor:
        """Read the layer from its files into the least recently used staging buffer, which becomes the last one."""
        buffer, read = self._staging.pop(0)
        if read is not None:
            read.synchronize()
        for piece in self._pieces[index]:
            piece.of(buffer).copy_(piece.home)
        let_go(self._spans[index])
        self._staging.append((buffer, None))
        return buffer[: self._pieces[index][-1].stop] if self._pieces[index] else buffer[:0]

    def _wait(self, copied: Future[Any]) -> None:
        done = copied.result()
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)

    def _drop(self, index: int) -> None:
        for piece in self._pieces[index]:
            piece.parameter.data = self._placeholder(piece.home)
        _, copied = self._held.pop(index)
        self._wait(copied)  # an unfinished copy must not overlap the buffer's next use

    def restore(self) -> None:
        for index in list(self._held):
            self._drop(index)
        self._worker.shutdown()
        for pieces in self._pieces:
            for piece in pieces:
                piece.parameter.data = piece.home
        super().restore()
        self._model.to("cpu")
