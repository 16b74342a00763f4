"""Offloaded layers: training is bit-equal to a resident model, and the weights take no memory."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from finetune.errors import UserError, UserErrors
from finetune.recipe import Adapter, Quant, read_recipe
from finetune.train import offload
from finetune.train.offload import Fetched, Scratch, Streamed
from finetune.train.offload import disk as disk_module
from tests.conftest import Terminal
from tests.support.starts import Start

CPU = torch.device("cpu")
MODES = ("mapped", "memory", "disk")  # the last two are for GPUs; here they copy from CPU memory to CPU memory


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """So small a model gains nothing from a second thread, and would wait for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(layers: int = 4, dtype: torch.dtype = torch.float32, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=72, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True,
        )
    ).to(dtype)  # fmt: skip


def prepare_model(model: Any, move: Any = None, scheme: str = "nf4", device: torch.device = CPU, **adapter: Any) -> Any:
    from finetune.models.prepare import prepare
    from finetune.models.source import Source
    from quant import linear_targets, swap

    if scheme != "none":
        swap(model, scheme=scheme)
    return prepare(
        model,
        quant=Quant(),
        adapter=Adapter(rank=4, **adapter),
        targets=linear_targets(model),
        source=Source("made here", ""),
        device=device,
        checkpointing=True,
        move=move,
    ).model


def offloader(mode: str, folder: Path, offloaded: list[Streamed]) -> Any:
    if mode == "mapped":
        return lambda model: offloaded.append(offload.stream(model, CPU, Scratch(folder)))
    return lambda model: offloaded.append(Fetched(model, CPU, Scratch(folder) if mode == "disk" else None))


def batches(device: torch.device = CPU) -> Tensor:
    return torch.randint(0, 96, (6, 1, 16), generator=torch.Generator().manual_seed(1)).to(device)


def train(model: Any, device: torch.device = CPU) -> list[Tensor]:
    """Losses, gradients, logits, generated tokens and weights of two steps, each of two micro-batches and an evaluation."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, results = torch.optim.AdamW(weights, lr=1e-2), []
    torch.manual_seed(2)
    for pair in batches(device)[:4].split(2):
        model.train()
        for ids in pair:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            results.append(loss.detach())
        results += [p.grad.clone() for p in weights if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.inference_mode():
            results.append(model(input_ids=pair[0]).logits)
        results.append(model.generate(input_ids=pair[0, :, :4], max_new_tokens=3, do_sample=False))
    return [*results, *(p.detach().clone() for p in weights)]


def all_equal(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return len(actual) == len(expected) and all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# ------------------------------------------------------------------------------------------------------------------ equality


@pytest.mark.parametrize(
    ("model_options", "adapter_options"),
    [
        ({}, {}),
        ({"layers": 1}, {}),
        ({"layers": 2}, {"dropout": 0.3}),
        ({"layers": 3, "dtype": torch.bfloat16, "tied": True}, {}),
        ({"layers": 3}, {"scheme": "none"}),
        ({"layers": 3}, {"dora": True}),
    ],
    ids=["nf4", "one-layer", "two-layers-dropout", "bf16-tied", "float-base", "dora"],
)
def test_offloaded_model_trains_bit_equal_to_a_resident_one(tmp_path: Path, model_options: Any, adapter_options: Any) -> None:
    resident = prepare_model(llama(**model_options), **adapter_options)
    expected = train(resident)
    merged = {name: p.clone() for name, p in resident.merge_and_unload().named_parameters()}
    for mode in MODES:
        offloaded: list[Streamed] = []
        model = prepare_model(llama(**model_options), offloader(mode, tmp_path, offloaded), **adapter_options)
        assert all_equal(train(model), expected), mode
        offloaded[0].restore()
        parameters = dict(model.merge_and_unload().named_parameters())
        assert parameters.keys() == merged.keys()
        assert all(torch.equal(parameters[name], merged[name]) for name in merged), mode
        assert not any(module._forward_pre_hooks for module in model.modules()), mode
        assert not any(hasattr(p, "streamed") for p in model.parameters()), mode


def test_training_results_differ_for_another_adapter() -> None:
    """The comparison of the test above can fail."""
    expected, changed = (train(prepare_model(llama(layers=1), alpha=alpha)) for alpha in (4, 8))
    assert all_equal(changed[:2], expected[:2])  # losses before the first step, when adapters add nothing yet
    assert not all_equal(changed, expected)


def test_offloaded_gpt2_trains_bit_equal_to_a_resident_one(tmp_path: Path) -> None:
    """GPT-2 has other layer names, Conv1D, learned positions, biases and LayerNorms; ternary layers cache weight layouts."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2() -> Any:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=3, n_head=4)).to(torch.bfloat16)

    from quant.backends import use

    with use("aten"):
        for scheme in ("nf4", "ternary"):
            expected = train(prepare_model(gpt2(), scheme=scheme))
            for mode in MODES:
                offloaded: list[Streamed] = []
                model = prepare_model(gpt2(), offloader(mode, tmp_path, offloaded), scheme=scheme)
                actual = train(model)
                for result, reference in zip(actual, expected, strict=True):
                    # Few ternary activations go through an int4 kernel that rounds, on a cached layout: not when offloaded.
                    if scheme == "nf4" or result.is_floating_point():
                        assert torch.equal(result, reference), (scheme, mode)
                cached = [m.cached_bytes() for m in model.modules() if hasattr(m, "cached_bytes")]
                assert cached, scheme
                assert not any(cached), (scheme, mode)


def test_backward_without_checkpointing_is_an_error_or_nan(tmp_path: Path) -> None:
    for mode, scheme in (("memory", "nf4"), ("disk", "none")):
        model = prepare_model(llama(), offloader(mode, tmp_path, []), scheme=scheme)
        model.get_base_model().gradient_checkpointing_disable()
        loss = model.train()(input_ids=batches()[0], labels=batches()[0]).loss
        if scheme == "nf4":
            with pytest.raises(RuntimeError, match="stride"):
                loss.backward()
        else:
            loss.backward()
            gradient = next(p.grad for p in model.parameters() if p.grad is not None)
            assert gradient.isnan().all()  # the training loop skips such a step


def test_fast_step_patches_offloaded_layers_and_is_bit_equal() -> None:
    from finetune.train.fast import patching

    def train_fast(move: Any) -> tuple[list[str], list[Tensor]]:
        model = prepare_model(llama(layers=3), move)
        summary = patching.find(model).in_words()  # the trial pass runs norms and MLPs one by one
        with patching.patched(model, not_compiled="not here"):
            return summary, train(model)

    expected = train_fast(None)
    actual = train_fast(lambda model: Fetched(model, CPU, None))
    assert actual[0] == expected[0]
    assert all_equal(actual[1], expected[1])


# --------------------------------------------------------------------------------------------------------------- prefetching


class RecordingFetched(Fetched):
    """Records how many buffers exist at once, and which layers were not prefetched before they ran."""

    def __init__(self, *arguments: Any) -> None:
        self.buffers: list[StorageWeakRef] = []
        self.max_buffers, self.late, self.turns = 0, [], []
        super().__init__(*arguments)

    def _bring(self, index: int, upcoming: int) -> None:
        self.turns.append(index)
        self.late += [index] if index not in self._held else []
        super()._bring(index, upcoming)

    def _fetch(self, index: int) -> None:
        super()._fetch(index)
        self.buffers.append(StorageWeakRef(self._held[index][0].untyped_storage()))
        self.max_buffers = max(self.max_buffers, sum(not buffer.expired() for buffer in self.buffers))


def test_two_layers_are_in_memory_and_the_next_one_is_prefetched() -> None:
    offloaded: list[RecordingFetched] = []
    model = prepare_model(llama(layers=5), lambda model: offloaded.append(RecordingFetched(model, CPU, None)))
    (streamed,) = offloaded
    model.train()
    for ids in batches()[:3]:
        model(input_ids=ids, labels=ids).loss.backward()
    assert streamed.turns == [0, 1, 2, 3, 4, 3, 2, 1, 0, *[1, 2, 3, 4, 3, 2, 1, 0] * 2]
    assert streamed.max_buffers == 2
    assert streamed.late == [0]  # only the very first layer
    assert len(streamed.buffers) == 5 + 3 + 2 * (3 + 3)  # the first and last layer stay in memory between passes
    model.eval()
    streamed.turns.clear()
    with torch.no_grad():
        for _ in range(3):
            model(input_ids=batches()[0])
    assert streamed.turns == [*range(1, 5), *[*range(5)] * 2]
    assert streamed.late == [0]
    assert streamed.max_buffers == 2


def test_layers_that_are_not_running_hold_no_weights() -> None:
    offloaded: list[Fetched] = []
    model = prepare_model(llama(layers=3), lambda model: offloaded.append(Fetched(model, CPU, None)))
    with torch.no_grad():
        model(input_ids=batches()[0])
    layers = model.get_base_model().model.layers
    assert layers[2].input_layernorm.weight.isfinite().all()
    weight = layers[2].self_attn.q_proj.base_layer.weight.data
    before = weight.clone()
    assert layers[1].input_layernorm.weight.isnan().all()
    assert layers[1].self_attn.q_proj.base_layer.weight.eq(255).all()
    assert layers[1].self_attn.q_proj.base_layer.weight.untyped_storage().nbytes() == 1
    assert model.get_input_embeddings().weight.isnan().all()  # embedding vectors are looked up elsewhere
    with torch.no_grad():
        assert layers[1].mlp(torch.ones(1, 2, 64)).isfinite().all()  # running a submodule fetches the layer
        model(input_ids=batches()[1])
    assert torch.equal(weight, before)  # a reference to a fetched weight stays valid
    offloaded[0].restore()
    assert all(p.isfinite().all() for p in model.parameters() if p.is_floating_point())


# ------------------------------------------------------------------------------------------------------------------ refusals


def test_unsupported_recipes_and_models_are_refused(tmp_path: Path, rows_file: Path, tiny_model: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{name: {tiny_model}, offload_layers: disk}}\ndata: {{path: {rows_file}}}\n")
    with pytest.raises(UserErrors, match=r"train\.checkpointing: true"):
        read_recipe(path)
    assert read_recipe(path, ["train.checkpointing=true"]).model.offload_layers == "disk"
    with pytest.raises(UserErrors, match=r"adapter\.kind: lora"):
        read_recipe(path, ["adapter.kind=none", "train.checkpointing=true"])
    with pytest.raises(UserError, match="a CPU run has its layers in CPU memory already"):
        offload.check("memory", CPU)
    offload.check("disk", CPU)
    offload.check("memory", torch.device("cuda"))
    with pytest.raises(UserError, match="its layers have no frozen weights"):
        offload.stream(llama(), CPU, Scratch(tmp_path))
    with pytest.raises(UserError, match="no list of decoder layers"):
        offload.stream(nn.Sequential(nn.Linear(2, 2)), CPU, Scratch(tmp_path))


def test_offloading_to_memory_on_cpu_is_refused_before_loading(
    finetune: Terminal, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(
        f"model: {{name: {tiny_model}, offload_layers: memory}}\ndata: {{path: {rows_file}}}\n"
        "train: {checkpointing: true}\nrun: {device: cpu, dir: run}\n"
    )
    code, _, err = finetune("run", "r.yaml")
    assert code == 2
    assert "model.offload_layers=disk" in err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------- disk


def test_tensors_on_disk_are_equal_aligned_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Scratch(tmp_path)
    monkeypatch.setattr(disk_module, "FILE", 3 * 4096)
    tensors = [
        torch.randn(7, 3, dtype=torch.bfloat16),
        torch.randint(0, 256, (9000,), dtype=torch.uint8),
        torch.tensor(3.0),
        torch.randn(50, 40)[:, ::2],
        torch.empty(0),
    ]
    stored = [disk.put(tensor) for tensor in tensors]
    disk.sync()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(stored, tensors, strict=True))
    assert list(tmp_path.iterdir()) == []  # unlinked files: nothing is left, however the process ends
    assert all(disk.holds(tensor) for tensor in stored[:4])
    assert not any(disk.holds(tensor) for tensor in tensors)
    assert disk.put(stored[0]) is stored[0]
    assert disk.put(stored[1].view(90, 100)).data_ptr() == stored[1].data_ptr()
    spans = disk.spans(stored[:4])
    assert sum(span.stop - span.start for span in spans) == 4096 * (1 + 3 + 1 + 1)
    assert len({id(span.file) for span in spans}) == 3 > len(spans) - 1
    disk_module.read_ahead(spans)
    disk_module.let_go(spans)
    assert all(torch.equal(a, b) for a, b in zip(stored, tensors, strict=True))  # read again
    with pytest.raises(ValueError, match="is not stored on this disk"):
        disk.spans([tensors[0]])

    def disk_full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", disk_full)
    with pytest.raises(UserError, match="No space left on device"):
        disk.put(tensors[0])


def test_planned_disk_space_covers_the_offloaded_weights(tmp_path: Path, tiny_model: Path, rows_file: Path) -> None:
    from finetune.models.architecture import architecture_of
    from finetune.models.config import load_config
    from finetune.models.source import find_model
    from finetune.run_dir import bytes_to_write

    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{name: {tiny_model}}}\ndata: {{path: {rows_file}}}\ntrain: {{checkpointing: true}}\n")
    source = find_model(str(tiny_model))
    architecture = architecture_of(source, load_config(source))
    for scheme in ("nf4", "none"):
        model = llama_of(tiny_model)
        disk = Scratch(tmp_path)
        prepare_model(model, lambda model, disk=disk: offload.stream(model, CPU, disk), scheme=scheme)
        (file,) = disk._files
        options = [f"quant.scheme={scheme}", "model.dtype=fp32"]
        resident, streamed = (
            bytes_to_write(read_recipe(path, [*options, f"model.offload_layers={s}"]), architecture, 0) for s in ("none", "disk")
        )
        assert file.used - 4096 * 100 < streamed - resident < 1.3 * file.used


def llama_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_tmpfs_is_detected_as_memory() -> None:
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no /dev/shm here")
    assert offload.is_memory(Path("/dev/shm")) == "tmpfs"


def test_codes_are_written_to_disk_while_the_model_loads(tmp_path: Path, tiny_model: Path) -> None:
    from finetune.models.config import load_config
    from finetune.models.source import find_model
    from finetune.models.weights import load_weights
    from quant import PackedLinear

    source, disk = find_model(str(tiny_model)), Scratch(tmp_path)
    options: dict[str, Any] = {"dtype": torch.float32, "attention": "auto", "quant": Quant(scheme="nf4")}
    expected = load_weights(source, load_config(source), **options)
    model = load_weights(source, load_config(source), put=disk.put, **options)
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 14
    assert all(disk.holds(part) for layer in layers for part in layer.parts)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    model.save_pretrained(tmp_path / "saved")  # where codes are stored is not part of the saved config
    assert "put" not in json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]


# --------------------------------------------------------------------------------------------------------------------- a run


def test_run_offloaded_to_disk_is_bit_equal_also_when_resumed(
    finetune: Terminal, tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation, samples, adapter, optimizer and merge are compared; a resident run that failed resumes with offloading."""
    (tmp_path / "r.yaml").write_text(
        f"model: {{name: {tiny_model}, dtype: fp32}}\nquant: {{scheme: nf4}}\nadapter: {{rank: 4, dropout: 0.1}}\n"
        f"data: {{path: {rows_file}, max_length: 128, heldout: 4}}\n"
        "train: {max_steps: 4, lr: 1.0e-3, save_steps: 2, eval_steps: 2, checkpointing: true}\n"
        "eval: {samples: 1, max_new_tokens: 4}\nrun: {device: cpu}\n"
    )
    code, _, err = finetune("run", "r.yaml", "run.dir=resident")
    assert code == 0, err
    code, out, err = finetune("run", "r.yaml", "run.dir=streamed", "model.offload_layers=disk")
    assert code == 0, err
    assert "2 layers offloaded to disk" in out

    def record(name: str) -> Any:
        return json.loads((tmp_path / name / "run.json").read_text())

    files = ("adapter/adapter_model.safetensors", "merged/model.safetensors", "checkpoints/step-000004/optimizer.safetensors")
    for file in files:
        assert (tmp_path / "streamed" / file).read_bytes() == (tmp_path / "resident" / file).read_bytes(), file
    streamed, resident = record("streamed"), record("resident")
    assert streamed["model"]["streamed"]["layers"] == 2
    assert resident["model"]["streamed"] is None
    for key in ("eval", "samples", "merge"):
        assert streamed[key] == resident[key], key
    assert {p.name for p in (tmp_path / "streamed").iterdir()} == {p.name for p in (tmp_path / "resident").iterdir()}

    from finetune.train import sft

    loss, calls = sft.SupervisedFineTuning.loss, iter(range(100))

    def fails(self: Any, model: Any, batch: Any) -> Any:
        if next(calls) == 3:  # the first forward pass only checks the swap
            raise RuntimeError("gone")
        return loss(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(sft.SupervisedFineTuning, "loss", fails)
        with pytest.raises(RuntimeError):
            finetune("run", "r.yaml", "run.dir=cut", "run.merge=false")
    code, _, err = finetune("run", "r.yaml", "run.dir=cut", "model.offload_layers=disk", "run.merge=false", "--resume")
    assert code == 0, err
    for file in (files[0], files[2]):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "resident" / file).read_bytes(), file


# -------------------------------------------------------------------------------------------------------------------- memory


def measure(folder: Path, *, forked: bool = False, **settings: Any) -> dict[str, Any]:
    program = Path(__file__).parent / "streamed.py"
    with Start([str(folder), json.dumps(settings)], folder, folder / "streamed.log", program=program, forked=forked) as start:
        printed = start.succeed(3600)
    figures: dict[str, Any] = json.loads(next(line for line in reversed(printed.splitlines()) if line.startswith("{")))
    print(
        {key: f"{value / 2**20:.0f} MiB" for key, value in figures.items() if key not in ("losses", "trained")}, figures["losses"]
    )
    return figures


def test_weights_offloaded_to_disk_take_no_anonymous_memory(tmp_path: Path) -> None:
    # With mmap_threshold the allocator returns freed memory at once, so that only memory in use is counted.
    figures = measure(
        tmp_path, forked=True, mmap_threshold=262144, vocab_size=512, hidden_size=768, intermediate_size=3072,
        num_hidden_layers=30, num_attention_heads=12, tokens=24, rank=1, steps=1,
    )  # fmt: skip
    assert figures["weights"] > 140e6
    assert figures["anonymous"] - figures["before"] < figures["weights"] / 3


@pytest.mark.slow
def test_7b_trains_in_far_less_memory_than_its_weights(tmp_path: Path) -> None:
    figures = measure(
        tmp_path, vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        tokens=96, rank=16, steps=2,
    )  # fmt: skip
    assert figures["weights"] > 3.8e9
    assert figures["trained"] == 39_976_960  # 640 MB with their gradients and Adam's moments
    assert figures["anonymous"] < 1.5 * 2**30
    assert figures["resident"] < 2.5 * 2**30
    assert figures["losses"][1] < figures["losses"][0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_layers_are_fetched_to_the_gpu(tmp_path: Path, mode: str) -> None:
    gpu = torch.device("cuda")
    expected = train(prepare_model(llama(layers=6), device=gpu), gpu)
    disk = Scratch(tmp_path) if mode == "disk" else None
    offloaded: list[Streamed] = []
    model = prepare_model(llama(layers=6), lambda model: offloaded.append(offload.stream(model, gpu, disk)), device=gpu)
    assert all(p.device.type == "cuda" for p in model.parameters())
    for result, reference in zip(train(model, gpu), expected, strict=True):
        torch.testing.assert_close(result, reference)
    offloaded[0].restore()
    assert all(p.device.type == "cpu" for p in model.parameters())
