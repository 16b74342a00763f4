"""Runs GGUF files in llama.cpp: logits at every position, greedy generation, tokenization, speed.

    with Llama(path, context=512) as llama:
        llama.logits([1, 5, 9])         # (3, vocabulary) fp32
        llama.tokenize("Hello")
        llama.generate([1, 5, 9], 20)

llama.cpp comes from the wheel `xllamacpp` (pip install finetune12g[export]) and runs in a process of its own (llama_worker.py
says why). Nothing here uses the network.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from finetune.errors import GateError, UserError

WORKER = Path(__file__).with_name("llama_worker.py")
WHEEL = "xllamacpp==2026.10.11549"
THREADS = 2


class Llama:
    """A GGUF file loaded in llama.cpp, until the `with` block ends.

    context: longest sequence in tokens. exact: attention in fp32 (no flash attention, no F16 cache), for comparisons; False is
    llama.cpp's default.

    Raises:
        UserError: xllamacpp is missing, or has an unsupported version.
        GateError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, *, context: int = 512, threads: int = THREADS, exact: bool = True) -> None:
        self.path = path
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],  # -P: the script's folder is not on the path
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"},  # spinning is slower
        )
        try:
            start = {"path": str(path), "context": context, "threads": threads, "exact": exact}
            self.vocabulary: int = self._ask(start)[0]["vocabulary"]
        except BaseException:
            self.close()
            raise

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(len(ids), vocabulary), fp32 on the CPU."""
        _, data = self._ask({"what": "logits", "ids": list(ids)})
        return torch.frombuffer(data, dtype=torch.float32).view(len(ids), self.vocabulary)

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a prompt, with special tokens before it (BOS)."""
        return list(self._ask({"what": "tokenize", "text": text})[0]["ids"])

    def generate(self, ids: Sequence[int], count: int) -> tuple[list[int], float]:
        """Greedily generate `count` tokens after `ids`, past end tokens; and the seconds from the first to the last."""
        reply, _ = self._ask({"what": "generate", "ids": list(ids), "count": count})
        return reply["ids"], reply["seconds"]

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytearray]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise self._stop(f"llama.cpp died with code {self._process.wait()}")
        reply = json.loads(line)
        if error := reply.get("error"):
            if reply["kind"] in ("ImportError", "ModuleNotFoundError"):
                raise UserError("llama.cpp is not installed", got=error, hint=f"pip install {WHEEL}")
            if reply["kind"] in ("LayoutError", "AttributeError"):
                raise UserError("this version of xllamacpp is not supported", got=error, hint=f"pip install {WHEEL}")
            raise self._stop(error)
        return reply, bytearray(self._process.stdout.read(reply["bytes"]))

    def _stop(self, message: str) -> GateError:
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return GateError(message, where=str(self.path), got=" | ".join(lines[-4:])[-600:] or None)

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(10)  # it exits at the end of its input
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._process.kill()
        self.close()


def tokens_per_second(
    paths: Sequence[Path],
    *,
    count: int = 32,
    pairs: int = 5,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Speed of greedy generation of each file in tokens per second, the median of `pairs` interleaved measurements.

    All files are loaded at once and measured in turns, so that other load on the machine affects all alike: compare the
    ratios. count: tokens generated per measurement, after a prompt of four.
    """
    seconds: list[list[float]] = [[] for _ in paths]
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(Llama(path, context=count + 8, threads=threads, exact=False)) for path in paths]
        for model in models:
            model.generate([1, 2, 3, 4], 4)  # the first pass reads the file
        for turn in range(pairs):
            order = range(len(models)) if turn % 2 == 0 else reversed(range(len(models)))
            for i in order:
                seconds[i].append(models[i].generate([1, 2, 3, 4], count)[1])
            if progress is not None:
                progress(turn + 1, pairs)
    return [(count - 1) / statistics.median(times) for times in seconds]
