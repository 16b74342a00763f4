"""Larger than the device: the frozen weights of a decoder's layers lie elsewhere, and come when their layer runs.

    disk on the CPU      they are mapped files (disk.py). While a layer computes, the next one's pages are read ahead, and
                         those of the layer before are let go.
    memory, on CUDA      they lie in pinned CPU memory. While a layer computes, the next one is copied to the card on a stream of
                         its own: two layers are there at once.
    disk, on CUDA        the same, from mapped files by way of two pinned buffers.

What the step computes is what it computes with all weights in place, bit for bit: the same numbers go through the same
operations. Layers run up in the forward pass and down in the backward pass, where activation checkpointing runs each once more;
which comes next is a guess, and a wrong one costs time only. Adapters, norms outside of the layers and the head stay on the
device; an embedding that the head does not share gives its rows from where it lies.

Weights come into a buffer that is new each time (the allocator has the old one ready again), and go by dropping it. No buffer is
ever written twice, so none can be read too late: what checkpointing has recomputed of a layer keeps its weights until its
gradients are known, and whoever else holds some keeps memory, and nothing wrong. Between its turns a layer's parameters have
their shapes and hold one number, NaN or bytes of it: reading them then (as a backward pass without checkpointing would) is an
error, or gives NaN, and is not mistaken for weights.
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
    """Raise UserError for layers that are to be streamed from where they would be anyway."""
    if mode == "memory" and device.type == "cpu":
        raise UserError(
            "on the CPU the layers are in its memory already",
            where="model.offload_layers",
            got="memory, and the run is on the CPU",
            hint="model.offload_layers=disk where that memory is too small, or model.offload_layers=none",
        )


def stream(model: Any, device: torch.device, scratch: Scratch | None) -> Streamed:
    """Take the frozen weights of the layers of `model` to `scratch` (None: CPU memory), and what is left of it to `device`.

    model: on the CPU, a causal language model of transformers, with adapters attached and checkpointing enabled. From now on
    it is used as ever; what is to be done with its weights themselves (merging them) comes after `restore`.

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
    lists, within = [], [decoder]
    while within:  # lists inside of layers are not of interest: experts, convolutions
        module = within.pop()
        if isinstance(module, nn.ModuleList):
            lists.append(module)
        else:
            within += module.children()
    layers = max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=None)
    if layers is None or not len(layers):
        raise UserError(
            "this model has no list of layers that could be streamed", where="model.offload_layers", got=type(base).__name__
        )
    return list(layers)


@dataclass(frozen=True)
class Layer:
    module: nn.Module
    frozen: list[nn.Parameter]  # that no other module has

    @property
    def bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.frozen)


def _frozen(model: nn.Module, modules: Sequence[nn.Module]) -> tuple[list[Layer], list[nn.Parameter]]:
    """The layers with what is frozen in each of them alone, and what is frozen elsewhere."""
    holders: dict[nn.Parameter, set[int]] = {}
    places = {part: index for index, module in enumerate(modules) for part in module.modules()}
    for module in model.modules():
        for held in module._parameters.values():
            if held is not None:
                holders.setdefault(held, set()).add(places.get(module, -1))
    layers = [
        Layer(module, [p for p in module.parameters() if not p.requires_grad and holders[p] == {index}])
        for index, module in enumerate(modules)
    ]
    own = {parameter for layer in layers for parameter in layer.frozen}
    if not own:
        raise UserError(
            "nothing is frozen in the layers of this model, so nothing can be streamed",
            where="model.offload_layers",
            got=f"{len(layers)} × {type(modules[0]).__name__}",
            hint="adapter.kind=lora",
        )
    return layers, [p for p in model.parameters() if not p.requires_grad and p not in own]


class Streamed(ABC):
    """Knows whose turn it is. A layer's turn begins when it is called, or one of the modules in it."""

    kind: str

    def __init__(self, model: Any) -> None:
        self.layers, self.elsewhere = _frozen(model, layers_of(model))
        self.current: int | None = None
        self._undo: list[Callable[[], None]] = []
        for index, layer in enumerate(self.layers):
            self._watch(index, layer)

    def _watch(self, index: int, layer: Layer) -> None:
        # Not the layer alone: checkpointing recomputes it by its `forward`, past its hooks (transformers 5.23).
        frozen = set(layer.frozen)
        for module in [m for m in layer.module.modules() if not frozen.isdisjoint(m.parameters())]:
            self._undo.append(module.register_forward_pre_hook(lambda *_: self.enter(index)).remove)
        for parameter in layer.frozen:
            parameter.streamed = True  # type: ignore[attr-defined]  # nothing that is derived of it is kept (quant/weight_cache.py)
            self._undo.append(functools.partial(delattr, parameter, "streamed"))

    def enter(self, index: int) -> None:
        """It is this layer's turn: its weights are in place when this returns, and the next one's are on their way."""
        if index != self.current:
            upcoming = self._after(index)
            with torch.inference_mode(False), torch.no_grad():  # in whichever mode the layer is called
                self._bring(index, upcoming)
            self.current = index

    def _after(self, index: int) -> int:
        """The layer that runs next, as far as can be told."""
        last = len(self.layers) - 1
        if self.current is not None and index == self.current - 1 and index > 0:
            return index - 1  # down, in the backward pass
        if index < last:
            return index + 1
        return max(0, last - 1) if torch.is_grad_enabled() else 0  # its backward pass begins, or another forward pass

    @abstractmethod
    def _bring(self, index: int, upcoming: int) -> None:
        """Put the weights of a layer in their place, and set out to fetch those of the one that runs next."""

    def restore(self) -> None:
        """The model as it was before `stream`, on the CPU: its weights are at home for good."""
        while self._undo:
            self._undo.pop()()
        self.current = None

    def figures(self) -> dict[str, Any]:
        """For the record."""
        sizes = [layer.bytes for layer in self.layers]
        return {"from": self.kind, "layers": len(sizes), "bytes": sum(sizes), "largest_layer_bytes": max(sizes)}


# ---------------------------------------------------------------------------------------------------------- disk on the CPU


class Mapped(Streamed):
    """All that is frozen is in mapped files, the embedding and the head too: nothing has to be put anywhere."""

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


# ------------------------------------------------------------------------------------------------------ to the card and back


@dataclass(frozen=True)
class _Piece:
    """A parameter, where its numbers are at home (on the CPU), and where they go in the layer's buffer (bytes)."""

    parameter: nn.Parameter
    home: Tensor
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.home.numel() * self.home.element_size()

    def of(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.stop].view(self.home.dtype).view(self.home.shape)


class Fetched(Streamed):
    """Layers are copied to the device one ahead of the one that computes. Runs on the CPU too, where it has no use but tests.

    On CUDA a buffer is of the stream that computes; the copying stream waits for what that stream had to do when the buffer was
    taken, and that stream for the copy when the layer's turn comes.
    """

    def __init__(self, model: Any, device: torch.device, scratch: Scratch | None) -> None:
        super().__init__(model)
        self.kind = "memory" if scratch is None else "disk"
        self._model, self.device, self._cuda = model, device, device.type == "cuda"
        self._copying = torch.cuda.Stream(device) if self._cuda else None
        self._nothing: dict[torch.dtype, Tensor] = {}
        self._pieces: list[list[_Piece]] = []
        self._blobs: list[Tensor] = []  # of memory: a layer's numbers as they lie in its buffer
        self._size = max([self._take(layer, scratch) for layer in self.layers])
        self._spans = [[] if scratch is None else scratch.spans(p.home for p in pieces) for pieces in self._pieces]
        self._staging: list[tuple[Tensor, Any]] = []  # of disk: pinned buffers, and the copy that reads each
        if scratch is not None:
            self._staging = [(torch.empty(self._size, dtype=torch.uint8, pin_memory=self._cuda), None) for _ in range(2)]
            scratch.sync()
        self._held: dict[int, tuple[Tensor, Future[Any]]] = {}
        self._worker = ThreadPoolExecutor(1, "layers")
        self._leave_embedding(model, scratch)
        model.to(device)

    def _take(self, layer: Layer, scratch: Scratch | None) -> int:
        """Bring the layer's weights home; the bytes of its buffer."""
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
            parameter.data = self._none(home)
        self._pieces.append(pieces)
        return size

    def _none(self, like: Tensor) -> Tensor:
        """What stands for weights that are not there: NaN, or its bytes, of the shape of `like` in the memory of one number."""
        if like.dtype not in self._nothing:
            value = torch.nan if like.is_floating_point() else torch.iinfo(like.dtype).max
            self._nothing[like.dtype] = torch.full((), value, dtype=like.dtype, device=self.device)
        return self._nothing[like.dtype].expand(like.shape)

    def _leave_embedding(self, model: Any, scratch: Scratch | None) -> None:
        """Its rows are few in a batch, and the table large: it stays, and the rows are brought."""
        embedding = model.get_input_embeddings()
        shared = sum(p is embedding.weight for module in model.modules() for p in module._parameters.values()) > 1
        if type(embedding) is not nn.Embedding or embedding.weight.requires_grad or shared:
            return
        weight = embedding.weight
        table = weight.data if scratch is None else scratch.put(weight.data)

        def forward(ids: Tensor) -> Tensor:
            return F.embedding(ids.to(table.device), table).to(self.device)

        weight.data, embedding.forward = self._none(table), forward  # type: ignore[method-assign,assignment]

        def back() -> None:
            weight.data = table
            del embedding.forward

        self._undo.append(back)

    def _bring(self, index: int, upcoming: int) -> None:
        for other in [held for held in self._held if held not in (index, upcoming)]:
            self._drop(other)
        for wanted in (index, upcoming):
            if wanted not in self._held:
                self._fetch(wanted)
        buffer, copied = self._held[index]
        self._wait(copied)
        for piece in self._pieces[index]:
            piece.parameter.data = piece.of(buffer)

    def _fetch(self, index: int) -> None:
        # All buffers are of one size, so that one that was given back is the one that is given out.
        buffer = torch.empty(self._size, dtype=torch.uint8, device=self.device)
        free = torch.cuda.current_stream(self.device).record_event() if self._cuda else None
        self._held[index] = buffer, self._worker.submit(self._copy, index, buffer, free)

    def _copy(self, index: int, buffer: Tensor, free: Any) -> Any:
        """In the worker's thread. Returns the event after which the buffer is full, None where it is full already."""
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
        """The layer, read from its files into the buffer that was used least lately, which is the last one then."""
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
            piece.parameter.data = self._none(piece.home)
        _, copied = self._held.pop(index)
        self._wait(copied)  # a copy that nobody waited for must not meet the buffer's next use

    def restore(self) -> None:
        for index in list(self._held):
            self._drop(index)
        self._worker.shutdown()
        for pieces in self._pieces:
            for piece in pieces:
                piece.parameter.data = piece.home
        super().restore()
        self._model.to("cpu")
