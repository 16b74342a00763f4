"""Data-parallel training over several processes: sharding, gradient sums, collectives. With one process all of it is a no-op.

    ddp    each has the whole model. After a step's last micro-batch the gradients are summed, a bucket at a time.
    fsdp   the decoder's layers are sharded (FSDP2, `fully_shard`): packed codes and scales, adapters and master weights, with
           their gradients and optimizer states. A layer is gathered while it runs. Embedding, last norm and head stay whole, and
           their gradients are summed as under ddp.

Gradients are SUMS over micro-batches, here as in the loop, which divides once by the number of targets: so the micro-batches of
a step can be split across processes in any way, and the step equals that of one process but for the order of fp32 additions.

The model is not wrapped (DistributedDataParallel): the loss calls decoder and head separately (chunked_loss.py),
processes may have different numbers of micro-batches, and experts may get no gradient in one of them. Under fsdp each forward
and each backward pass gathers the layers from all processes: they must run equally many; `idle` runs one without a micro-batch.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune import processes
from finetune.errors import UserError
from finetune.memory import return_freed_memory
from finetune.train import offload

BUCKET = 25 << 20  # bytes of gradients that are summed at a time
PATIENCE = timedelta(hours=12)  # others wait while one evaluates; the launcher notices a process that died
# Settings of `accelerate launch` that `Accelerator` would apply besides the recipe's (transformers too: under USE_FSDP it would
# load weights in one process only). Here the recipe decides.
ACCELERATE = (
    "USE_FSDP", "USE_DEEPSPEED", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG", "MIXED_PRECISION", "DYNAMO_BACKEND",
    "GRADIENT_ACCUMULATION_STEPS",
)  # fmt: skip

_idle = False  # whether the current backward pass belongs to no micro-batch


# ------------------------------------------------------------------------------------------------------ init and shutdown


def init_distributed(device_type: str) -> torch.device:
    """Join the process group, if there are several processes; returns this one's device. cpu: gloo; cuda: nccl, one GPU each.

    Call it before anything is loaded and before an `Accelerator` is created, which then uses the same group.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    for name in ACCELERATE:
        os.environ.pop(f"ACCELERATE_{name}", None)
    if processes.world_size() == 1:
        return torch.device(device_type)
    os.environ.setdefault("LOCAL_RANK", "0")  # accelerate requires it
    if device_type == "cuda" and processes.local_rank() >= torch.cuda.device_count():
        raise UserError(
            "there are fewer GPUs than processes",
            where="run.device",
            got=f"local rank {processes.local_rank()}, {torch.cuda.device_count()} GPUs",
            hint="start as many processes as there are GPUs, or set run.device=cpu",
        )
    from accelerate import PartialState

    cpu = device_type == "cpu"
    state = PartialState(cpu=cpu, backend="gloo" if cpu else "nccl", timeout=PATIENCE)
    return torch.device("cpu") if cpu else torch.device("cuda", state.local_process_index)


def shutdown() -> None:
    """Leave the process group, at the end of a run that succeeded; a failed process just exits."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def several() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device() -> torch.device:
    """The device of tensors for collectives."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------- sharding


def shard(model: Any, device: torch.device) -> None:
    """Shard the decoder's layers over the processes, and move the rest to `device`.

    model: on the CPU, a causal language model of transformers, with adapters attached and checkpointing enabled. Layers move to
    the device one by one. Parameters of layers are DTensors from now on; references to the old ones (an optimizer's) are stale.
    All processes use it in the same way.

    Raises:
        UserError: no layers are found.
    """
    if not several():
        model.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    decoder = _decoder(model)
    try:
        layers = offload.layers_of(model)
    except UserError as error:
        raise UserError(
            "cannot shard this model: no list of decoder layers found",
            where="run.parallel",
            got=error.got,
            hint="set run.parallel=ddp",
        ) from None
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    unsharded = _unsharded(model, layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=unsharded)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not is_shard(parameter):
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    # As the root of its layers the decoder prefetches them; it has no weights of its own to shard.
    fully_shard(decoder, mesh=mesh, ignored_params={p for p in decoder.parameters() if not is_shard(p)})
    for layer in cast(list[Any], layers):
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)  # gloo has no division factor
        layer.set_reduce_scatter_unused_params(True)  # experts that no token of this process reached
        _mark_gathered(layer)
    gc.collect()
    return_freed_memory()


def _decoder(model: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_decoder() if hasattr(base, "get_decoder") else base


def _unsharded(model: nn.Module, layers: Sequence[nn.Module]) -> set[nn.Parameter]:
    """Parameters of the layers that stay whole: used outside their layer too, without dimensions, or of another dtype than most
    that are trained in their layer, whose gradients are combined as one tensor."""  # fmt: skip
    layer_of = {part: number for number, layer in enumerate(layers) for part in layer.modules()}
    holders: dict[nn.Parameter, set[int]] = {}
    for module in model.modules():
        for held in module._parameters.values():
            if held is not None:
                holders.setdefault(held, set()).add(layer_of.get(module, -1))
    unsharded = {parameter for parameter, users in holders.items() if len(users) > 1 or parameter.ndim == 0}
    for layer in layers:
        sizes: dict[torch.dtype, int] = {}
        trained = [p for p in layer.parameters() if p.requires_grad and p not in unsharded]
        for p in trained:
            sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
        most = max(sizes, key=lambda dtype: sizes[dtype], default=None)
        unsharded |= {p for p in trained if p.dtype != most}
    return unsharded


def _mark_gathered(layer: Any) -> None:
    """Mark a layer's gathered parameters, the same objects each time: nothing derived from them is cached
    (quant/weight_cache.py), and their shards record whether this process has a gradient for them."""  # fmt: skip
    shards = dict(layer.named_parameters())
    with gathered(layer):
        for name, parameter in layer.named_parameters():
            shard = shards[name]
            if parameter is shard:
                continue
            parameter.streamed = True
            if parameter.requires_grad:
                shard.has_gradient = False
                parameter.register_post_accumulate_grad_hook(lambda _, shard=shard: _mark_gradient(shard))


def _mark_gradient(shard: Any) -> None:
    if not _idle:
        shard.has_gradient = True


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is sharded, so that this process has one part."""
    if not several():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether layers of `model` are sharded."""
    return several() and any(is_shard(parameter) for parameter in model.parameters())


@contextmanager
def gathered(layer: Any) -> Iterator[None]:
    """Gather the weights of one decoder layer for reading inside the block; a collective, all processes call it."""
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()`, with the weights of a sharded layer gathered while its modules are visited.

    A collective: all processes iterate to the end.
    """
    if not is_sharded(model):
        yield from model.named_modules()
        return
    layers = {id(layer) for layer in offload.layers_of(model)}
    within = None
    for path, module in model.named_modules():
        if within is not None and not path.startswith(within[0] + "."):
            within[1].reshard()
            within = None
        if id(module) in layers:
            within = path, cast(Any, module)
            within[1].unshard()
        yield path, module
    if within is not None:
        within[1].reshard()


def restore(model: Any) -> None:
    """Undo `shard`: the whole model on the CPU of every process, to be merged and written."""
    if not is_sharded(model):
        return
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    layers = offload.layers_of(model)
    for layer in layers:
        full: dict[Tensor, nn.Parameter] = {}
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and is_shard(parameter):
                    if parameter not in full:
                        full[parameter] = nn.Parameter(full_tensor(parameter), parameter.requires_grad)
                    module._parameters[name] = full[parameter]
    for sharded in [*layers, _decoder(model)]:  # torch cannot undo fully_shard: remove its hooks and its class
        state = sharded._get_fsdp_state()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        for group in state._fsdp_param_groups:
            for parameter in group.fsdp_params:
                parameter._post_load_hook_handle.remove()
            group.fsdp_params = []
        sharded.__class__ = type(sharded).__mro__[type(sharded)._orig_cls_mro_index]
        for key in (STATE_KEY, REGISTRY_KEY):  # they hold the process group, which cannot be deep-copied
            sharded.__dict__.pop(key, None)
    model.to("cpu")


def idle(model: Any) -> None:
    """Run a forward and a backward pass without a gradient: for a process without a micro-batch while others
    have one. Under fsdp, in training mode; otherwise a no-op."""  # fmt: skip
    global _idle
    if not is_sharded(model):
        return
    device = model.get_input_embeddings().weight.device
    _idle = True
    try:
        hidden = _decoder(model)(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device), use_cache=False)[0]
        if hidden.requires_grad:
            hidden.backward(torch.zeros_like(hidden))
    finally:
        _idle = False


# ------------------------------------------------------------------------------------------------------------ gradients


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that exist, as plain tensors: whole ones, and this process's part of sharded ones."""
    return [_local(p.grad) for p in parameters if p.grad is not None]


def _local(tensor: Tensor) -> Tensor:
    return cast(Any, tensor).to_local() if is_shard(tensor) else tensor


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum over processes the gradients of whole parameters; those of sharded ones are summed already.

    A parameter without a gradient counts as zeros if another process has one, and stays without if none has. Once a step,
    after its last backward pass, with all trained parameters, also if the step is then skipped.
    """
    if not several():
        return
    parameters = list(parameters)
    sharded = [is_shard(p) for p in parameters]
    here = [bool(cast(Any, p).has_gradient) if part else p.grad is not None for p, part in zip(parameters, sharded, strict=True)]
    anywhere = torch.tensor(here, dtype=torch.int32, device=_device())
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for p, part, exists in zip(parameters, sharded, anywhere.tolist(), strict=True):
        if part:
            cast(Any, p).has_gradient = False
        if not exists:
            p.grad = None  # a sharded one has zeros, which an optimizer would take for a gradient
        elif not part:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
    for bucket in (bucket for grads in by_dtype.values() for bucket in _buckets(grads)):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(bucket[0])
            continue
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat)
        for grad, total in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(total.view(grad.shape))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def grad_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The L2 norm of all gradients together, the same on every process; 0.0 where there are none. After `sum_gradients`."""
    plain: list[Tensor] = []
    parts: list[Tensor] = []
    for p in parameters:
        if p.grad is not None:
            (parts if is_shard(p.grad) else plain).append(_local(p.grad))
    norm = float(torch.nn.utils.get_total_norm(plain)) if plain else 0.0
    if not several():
        return norm
    (squares,) = all_reduce_sum([float(torch.nn.utils.get_total_norm(parts)) ** 2 if parts else 0.0])
    return (norm**2 + squares) ** 0.5 if squares else norm


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients by `factor`."""
    if grads := gradients(parameters):
        torch._foreach_mul_(grads, factor)


# --------------------------------------------------------------------------------------------------------------- tensors


def full_tensor(tensor: Tensor) -> Tensor:
    """A parameter or an optimizer's state, whole, on the CPU, detached. For a sharded one all processes call it together.

    It may share its memory with `tensor`.
    """
    tensor = tensor.detach()
    if is_shard(tensor):
        tensor = cast(Any, tensor).full_tensor()
    return tensor.cpu()


def put(target: Tensor, full: Tensor) -> None:
    """Copy a whole tensor into one of its shape, or into this process's part of it; cached derivatives of it are dropped."""
    from quant.weight_cache import weights_changed

    with torch.no_grad():
        _local(target).copy_(_local(like(target, full)))
    weights_changed()


def like(parameter: Tensor, full: Tensor) -> Tensor:
    """A whole tensor of the parameter's shape, laid out as the parameter is: on its device, or this process's part there."""
    if not is_shard(parameter):
        return full.to(parameter.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    laid_out: Any = parameter
    mesh, placements = laid_out.device_mesh, laid_out.placements
    part = distribute_tensor(full, mesh, placements, src_data_rank=None).to_local().clone()  # a view would keep the whole tensor
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


# -------------------------------------------------------------------------------------------------------------- objects


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Each value's sum over the processes, in float64."""
    if not several():
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(numbers)
    return cast(list[float], numbers.tolist())


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    return all_reduce_sum([float(flag)])[0] > 0


def wait() -> None:
    """Block until all processes have arrived."""
    if several():
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """The first process's `value` in all processes; it must be JSON-serializable."""
    if not several():
        return value
    message = [json.dumps(value) if processes.is_main_process() else None]
    dist.broadcast_object_list(message, src=0)
    return json.loads(cast(str, message[0]))


def all_gather_object(value: Any) -> list[Any]:
    """Each process's `value`, in the order of ranks; it must be JSON-serializable."""
    if not several():
        return [value]
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, json.dumps(value))
    return [json.loads(message) for message in messages]
