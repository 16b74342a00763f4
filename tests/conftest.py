"""Small things that tests share: a tokenizer of 512 tokens, a tiny random Llama with it, rows in files; SmolLM2's tokenizer."""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and by what is started
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background has it ignored, and so would all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
# What runs note for later plans stays apart from the user's own; matplotlib's fonts need not be listed anew for it.
os.environ.setdefault("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="finetune-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"


# Begun first, so that no worker is left alone with one of them at the end.
LONG = (
    "test_real.py", "test_run.py", "test_bad_inputs.py", "test_nothing_lost.py", "test_offload.py", "test_patching.py",
    "test_keys.py", "test_triton.py", "test_trace.py", "test_report.py", "test_pretrain.py", "test_api.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    if (starts := sys.modules.get("tests.support.starts")) is not None and sys.platform == "linux":
        starts.server()


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data beside the repository, on the machines that have it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no shared/data beside the repository")
    return SHARED


# SmolLM2's template, but for the name of the assistant.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 512


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 512 tokens with SmolLM2's special tokens, which has learnt the words of the rows below."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    chat = "system You are a helpful assistant user " + " assistant ".join(" ".join(row.values()) for row in alpaca(200))
    core.train_from_iterator([story(20_000), chat], trainer)
    unk, bos, eos = special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = CHATML
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    """A fresh one for each test: tests change its template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


def tiny_llama(folder: Path, tokenizer_folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random Llama of two layers with the small tokenizer, saved as a model folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**(config | changes))).save_pretrained(folder)
    for path in tokenizer_folder.iterdir():
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny-llama"), tokenizer_folder)


def alpaca(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"instruction": f"What is {n} plus {n + 3}?", "input": "", "output": f"{n} plus {n + 3} is {2 * n + 3}."}
        for n in range(start, start + count)
    ]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def story(characters: int, seed: int = 0) -> str:
    """Sentences of a little grammar: something to learn, and nobody's text."""
    choose = random.Random(seed).choice
    who, does = ("miller", "sailor", "widow", "fox", "judge"), ("sees", "fears", "follows", "calls", "sells")
    lines: list[str] = []
    while characters > 0:
        lines.append(f"The {choose(who)} {choose(does)} the {choose(who)}, and the {choose(who)} {choose(does)} nobody.")
        characters -= len(lines[-1])
        if len(lines) % 7 == 0:
            lines.append("")
    return "\n".join(lines) + "\n"


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", alpaca(40))


def record_of(run: Path) -> dict[str, Any]:
    """run.json as a script would read it."""
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


class Terminal:
    """Types commands: `(exit code, what was printed, what went to stderr)`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys, self.monkeypatch = folder, capsys, monkeypatch
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", "200")

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["finetune", *words])
        from finetune import cli

        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        out, err = self.capsys.readouterr()
        return code, out, err


@pytest.fixture
def finetune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(tmp_path, monkeypatch, capsys)
