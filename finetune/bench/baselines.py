"""Other libraries that do the same work, called as their users call them. Imported when a case needs one.

Each function raises Skip if the library is not installed, or has an unsupported version.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.bench.measure import Skip


def float_linear(weight: Tensor, *, trained: bool = False) -> nn.Linear:
    """torch's own linear with `weight` (out, in)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=trained)
    return linear


def _bitsandbytes() -> ModuleType:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.setLevel(logging.ERROR)  # on import it warns that an optional kernel package is not installed
    try:
        import bitsandbytes
        from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
    except ImportError as error:
        raise Skip(f"cannot import bitsandbytes ({error}), pip install bitsandbytes") from error
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        raise Skip("bitsandbytes is installed, but its native library did not load")
    return bitsandbytes


def bitsandbytes_functional(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """x → F.linear(x, dequantize_4bit(…)), dequantizing again in the backward pass: as its Linear4bit, but a plain function.

    NF4 with double quantization. Its Linear4bit itself repacks its weight on some CPUs, after which gradients are wrong.
    """
    functional = _bitsandbytes().functional
    codes, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")

    class Multiply(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return F.linear(x, functional.dequantize_4bit(codes, state))

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad @ functional.dequantize_4bit(codes, state)

    return Multiply.apply


def bitsandbytes_linear(weight: Tensor) -> nn.Module:
    """bitsandbytes' Linear4bit as QLoRA uses it: NF4, double quantization, bf16 arithmetic. For CUDA."""
    library = _bitsandbytes()
    out, k = weight.shape
    linear = library.nn.Linear4bit(k, out, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4")
    linear.weight = library.nn.Params4bit(weight.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4")
    return linear.to(weight.device)


def onebitllms_linear(weight: Tensor) -> nn.Module:
    """onebitllms' BitNetLinear with `weight` as its master. For CUDA."""
    try:
        from onebitllms import BitNetLinear
    except ImportError as error:
        raise Skip(f"cannot import onebitllms ({error}), pip install onebitllms") from error
    linear = BitNetLinear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight.clone())
    return linear


def torchao_linear(weight: Tensor) -> nn.Module:
    """torchao's BitNet training (int8 tensor cores) with `weight` as its master, compiled as recommended. For CUDA."""
    try:
        from torchao import quantize_
        from torchao.prototype.quantized_training import bitnet_training
    except ImportError as error:
        raise Skip(f"cannot import torchao's BitNet ({error}), pip install torchao") from error
    layer = nn.Sequential(float_linear(weight.clone(), trained=True))
    quantize_(layer, bitnet_training())
    layer.compile()
    return layer


# ------------------------------------------------------------------------------------------------- ternary models to train


class StraightThrough(nn.Linear):
    """BitNet b1.58 by its definition: y = (x + sg(q(x) − x)) · (W + sg(q(W) − W))ᵀ, where sg stops the gradient.

    The formula of onebitllms' layer and of "Training Tips, Code and FAQ" of BitNet b1.58, in plain torch; q in fp32 (theirs is a
    Triton kernel, which computes in fp32 too).
    """

    def forward(self, x: Tensor) -> Tensor:
        x = x + (_quantized_activations(x) - x).detach()
        weight = self.weight + (_ternary(self.weight) - self.weight).detach()
        return F.linear(x, weight, self.bias)


def _quantized_activations(x: Tensor) -> Tensor:
    scale = 127 / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return ((x.float() * scale).round().clamp(-128, 127) / scale).to(x.dtype)


def _ternary(weight: Tensor) -> Tensor:
    scale = 1 / weight.float().abs().mean().clamp(min=1e-5)
    return ((weight.float() * scale).round().clamp(-1, 1) / scale).to(weight.dtype)


def straight_through(model: nn.Module) -> None:
    """Replace the linears of a transformers model, except its head, by `StraightThrough`."""
    for name, linear in _body(model).items():
        layer = StraightThrough(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight = linear.weight
        model.set_submodule(name, layer)


def onebitllms_model(model: nn.Module) -> None:
    """Replace the linears of a transformers model, except its head, by those of onebitllms. For CUDA."""
    for name, linear in _body(model).items():
        model.set_submodule(name, onebitllms_linear(linear.weight.detach()))


def auto_bitlinear(model: nn.Module) -> None:
    """Replace the linears of a transformers model, except its head, by transformers' AutoBitLinear, which quantizes online."""
    from transformers import BitNetQuantConfig
    from transformers.integrations.bitnet import replace_with_bitnet_linear

    weights = {name: linear.weight for name, linear in _body(model).items()}
    config = BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="online")
    replace_with_bitnet_linear(model, modules_to_not_convert=["lm_head"], quantization_config=config)
    for name, weight in weights.items():
        model.get_submodule(name).weight = weight


def _body(model: nn.Module) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}


@functools.cache
def compiles(device: str) -> bool:
    """Whether torch.compile works here: it needs a C++ compiler on the CPU, Triton on CUDA, and can be switched off."""

    def probe(x: Tensor) -> Tensor:
        return x.exp() + (1.0 if torch.compiler.is_compiling() else 0.0)

    try:
        return bool((torch.compile(probe)(torch.zeros(64, device=device)) == 2).all())
    except Exception:  # any error of a compiler
        return False


def as_compiled(device: str) -> AbstractContextManager[object]:
    """Run code that uses torch.compile inside the block, eagerly if compilation does not work."""
    return nullcontext() if compiles(device) else torch.compiler.set_stance("force_eager")


# ----------------------------------------------------------------------------------------- QLoRA by TRL, PEFT and bitsandbytes

# The fastest settings of glibc's allocator for it: large blocks are kept and reused, while by default each is mapped again and
# every page of it faults. (Pages of 2 MiB, GLIBC_TUNABLES=glibc.malloc.hugetlb=1, did not help further, and took 450 MiB more.)
# On CUDA: torch's own, without fragmentation.
TUNED_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}


def missing_for_qlora(quantized: bool) -> str | None:
    """The missing packages with the command to install them; None if all are installed."""
    names = ["trl", *(["bitsandbytes"] if quantized else [])]
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed, pip install {' '.join(missing)}" if missing else None


def sft_trainer(
    spec: dict[str, Any],
    rows: Path,
    adapter: Path,
    folder: Path,
    device: torch.device,
    *,
    as_ours: bool,
    wait: Callable[[], None],
    stop: Callable[[], None],
    tell: Callable[[float, int, int], None],
) -> Any:
    """TRL's SFTTrainer for QLoRA, as in the documentation of TRL and PEFT, on tokenized rows.

    spec, rows, adapter: shared by finetune/bench/side.py: settings, rows in order, initial weights of the adapters. folder:
    for its output. as_ours: activation checkpointing and dtype of the adapters as ours; else TRL's defaults: it recomputes, and
    casts adapters of a quantized base to bf16 (arXiv 2305.14314, section 3).

    It calls `wait` before each step, `stop` after it, and `tell(loss, tokens, trained tokens)`; a step's batch is
    fetched, its loss summed and its gradient clipped between `wait` and `stop`.
    """
    if why := missing_for_qlora(spec["nf4"]):
        raise Skip(why)
    import numpy as np
    import pyarrow
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    if spec["nf4"]:
        _bitsandbytes()
    settings, lora, dtype = spec["train"], spec["adapter"], getattr(torch, spec["dtype"])
    with np.load(rows) as saved:
        ends = np.concatenate([[0], saved["ends"]]).astype(np.int32)
        columns = {name: pyarrow.ListArray.from_arrays(ends, saved[name]) for name in ("input_ids", "labels")}
    options: dict[str, Any] = {"gradient_checkpointing": bool(settings["checkpointing"])} if as_ours else {}
    if not spec["packing"]:
        options["dataset_kwargs"] = {"skip_prepare_dataset": True}  # no row to cut or drop
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=settings["accumulation"],
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        optim=OPTIMIZERS[settings["optimizer"]],
        adam_beta1=settings["betas"][0],
        adam_beta2=settings["betas"][1],
        adam_epsilon=settings["eps"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"],
        bf16=dtype == torch.bfloat16 or settings["precision"] == "bf16",
        max_length=spec["max_length"],
        packing=spec["packing"],
        shuffle_dataset=spec["packing"],  # it packs the longest rows first
        train_sampling_strategy="sequential",
        max_steps=1 << 30,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=spec["seed"],
        use_cpu=device.type == "cpu",
        model_init_kwargs={"dtype": dtype, "revision": spec["revision"] or "main"}
        | ({} if spec["attention"] == "auto" else {"attn_implementation": spec["attention"]}),
        trust_remote_code=spec["trust_remote_code"],
        **options,
    )
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=spec["double"],
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", *spec["kept"]] if spec["kept"] else None,
    )

    class Counted(SFTTrainer):
        """Collects losses and inputs of a step."""

        batches: list[tuple[Tensor, dict[str, Any]]]

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.batches.append((loss, inputs))
            return loss

    class Steered(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            trainer.batches = []
            wait()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            stop()
            loss = float(sum(loss for loss, _ in trainer.batches))
            masks = [inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])) for _, inputs in trainer.batches]
            trained = sum(int((inputs["labels"][:, 1:] != -100).sum()) for _, inputs in trainer.batches)
            trainer.batches = []
            tell(loss, sum(int(mask.sum()) for mask in masks), trained)
            wait()

    trainer: Any = Counted(
        model=spec["model"],
        args=arguments,
        train_dataset=Dataset(pyarrow.table(columns)),
        quantization_config=nf4 if spec["nf4"] else None,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            lora_dropout=lora["dropout"],
            target_modules=spec["targets"],
            use_rslora=lora["rslora"],
            use_dora=lora["dora"],
        ),
        callbacks=[Steered()],
    )
    if as_ours:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, spec["adapter_dtype"]))
    state = load_file(adapter)
    if state.keys() != get_peft_model_state_dict(trainer.model).keys():
        raise RuntimeError(f"the two sides have adapters on different modules: {len(state)} tensors of ours")
    set_peft_model_state_dict(trainer.model, state)
    return trainer


@contextmanager
def arithmetic_of_training(model: nn.Module) -> Iterator[None]:
    """Keep bitsandbytes' layers in training mode inside the block, whatever mode the model is set to.

    On CPUs with AVX512-BF16 the first forward in evaluation mode repacks their weights for another kernel.
    """
    layers: list[Any] = []
    if importlib.util.find_spec("bitsandbytes") is not None:
        layer_class = _bitsandbytes().nn.Linear4bit
        layers = [module for module in model.modules() if isinstance(module, layer_class)]
    for layer in layers:
        layer.train = lambda mode=True, layer=layer: layer  # an instance attribute hides the method
    try:
        yield
    finally:
        for layer in layers:
            del layer.train


# ------------------------------------------------------------------------------------------------------ llama.cpp's kernels

GGML = "0.20."  # the structures below are those of its headers
F32, TQ2_0 = 0, 35  # ggml_type
BLOCK, BLOCK_BYTES = 256, 66


class _Init(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _Plan(ctypes.Structure):
    """ggml_cplan."""

    _fields_ = [
        ("work_size", ctypes.c_size_t), ("work_data", ctypes.c_void_p), ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p), ("abort_callback", ctypes.c_void_p), ("abort_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    ]  # fmt: skip


def _ggml() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """(libggml-base, libggml-cpu), with their functions declared."""
    try:
        import libggml

        version = importlib.metadata.version("libggml-python")
    except ImportError as error:
        raise Skip("llama.cpp's kernels are not installed, pip install libggml-python") from error
    if not version.startswith(GGML):
        raise Skip(f"libggml-python {version} has other structures than {GGML}x, pip install 'libggml-python=={GGML}*'")
    folder = Path(libggml.__file__).parent
    paths = [next(folder.glob(f"lib*/libggml-{name}.so"), None) for name in ("base", "cpu")]
    if None in paths:
        raise Skip(f"libggml-python {version} has no shared libraries for this system")
    base, cpu = (ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) for path in paths)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_init": (pointer, [_Init]), "ggml_free": (None, [pointer]),
        "ggml_new_tensor_2d": (pointer, [pointer, ctypes.c_int, number, number]),
        "ggml_mul_mat": (pointer, [pointer] * 3), "ggml_new_graph": (pointer, [pointer]), "ggml_get_data": (pointer, [pointer]),
        "ggml_build_forward_expand": (None, [pointer, pointer]),
        "ggml_quantize_chunk": (ctypes.c_size_t, [ctypes.c_int, pointer, pointer, number, number, number, pointer]),
    }  # fmt: skip
    for name, (result, arguments) in signatures.items():
        getattr(base, name).restype, getattr(base, name).argtypes = result, arguments
    cpu.ggml_graph_plan.restype, cpu.ggml_graph_plan.argtypes = _Plan, [pointer, ctypes.c_int, pointer]
    cpu.ggml_graph_compute.restype, cpu.ggml_graph_compute.argtypes = ctypes.c_int, [pointer, ctypes.POINTER(_Plan)]
    cpu.ggml_cpu_init()
    return base, cpu


class GGMLMatrix:
    """A weight (out, k) in TQ2_0, k a multiple of 256, and llama.cpp's own product with a vector, on one thread.

    weight: t / s in floats, so that the largest magnitude of every block of 256 is the scale. The product is a graph of one
    `ggml_mul_mat`, as llama.cpp runs it, which quantizes the vector to int8 (Q8_K) first. The result is not copied: it is
    the graph's own memory, overwritten by the next product.
    """

    def __init__(self, weight: Tensor) -> None:
        self._base, self._cpu = _ggml()
        out, k = weight.shape
        if k % BLOCK:
            raise Skip(f"TQ2_0 takes rows of a multiple of {BLOCK} weights, not {k}")
        base = self._base
        size = out * k // BLOCK * BLOCK_BYTES + 4 * (out + k) + (8 << 20)
        self._context = base.ggml_init(_Init(size, None, False))
        w, x = base.ggml_new_tensor_2d(self._context, TQ2_0, k, out), base.ggml_new_tensor_2d(self._context, F32, k, 1)
        source = weight.float().contiguous()
        base.ggml_quantize_chunk(TQ2_0, source.data_ptr(), base.ggml_get_data(w), 0, out, k, None)
        y = base.ggml_mul_mat(self._context, w, x)
        self._graph = base.ggml_new_graph(self._context)
        base.ggml_build_forward_expand(self._graph, y)
        self._plan = self._cpu.ggml_graph_plan(self._graph, 1, None)
        self._work = ctypes.create_string_buffer(self._plan.work_size + 64)
        self._plan.work_data = ctypes.addressof(self._work)
        self._x, self._y = self._view(x, k), self._view(y, out)

    def _view(self, tensor: int, size: int) -> Tensor:
        memory = (ctypes.c_float * size).from_address(self._base.ggml_get_data(tensor))
        return torch.frombuffer(memory, dtype=torch.float32)

    def prepare(self, x: Tensor) -> Callable[[], Tensor]:
        """x (1, k) → a call that gives fp32 (out,)."""
        self._x.copy_(x.reshape(-1))
        compute, graph, plan = self._cpu.ggml_graph_compute, self._graph, ctypes.byref(self._plan)

        def product() -> Tensor:
            if compute(graph, plan):
                raise RuntimeError("ggml_graph_compute failed")
            return self._y

        return product

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._base.ggml_free(self._context)
