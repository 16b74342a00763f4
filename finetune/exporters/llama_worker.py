"""The process that runs llama.cpp: a script started by finetune/exporters/llama_cpp.py, without imports from this package.

It is a separate process because llama.cpp aborts its process on unexpected input (GGML_ASSERT), brings its own OpenMP, and
frees its memory only with the process. Protocol: for each JSON line on standard input it writes a JSON line to standard output,
followed by as many raw bytes as the line says. Output of llama.cpp goes to standard error.

It calls llama.cpp's C interface (llama.h), which the wheel `xllamacpp` exports, and not the wheel's server, which only
returns probabilities of generated tokens, as JSON of the whole vocabulary, position by position. In the C interface two
structures are passed by value, and their fields move between versions. So they are used as llama.cpp fills them, and the
few fields that are changed here must hold the defaults of the known layout; any other layout is refused.
"""

import ctypes
import json
import os
import sys
import time
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_void_p
from typing import Any, BinaryIO


class Params(ctypes.Structure):
    """llama_context_params or llama_model_params: at least as large as either; always passed as the last argument."""

    _fields_ = [("words", c_int32 * 64)]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


# llama_context_params: word → default. In order: n_ctx, n_batch, n_ubatch, n_seq_max, n_rs_seq, n_outputs_max,
# n_outputs_max_per_seq, n_threads, n_threads_batch, ctx_type; rope, pooling and attention type, flash_attn_type; four of YaRN;
# its context, defrag_thold; type_k, type_v. Floats of −1 are −1082130432.
F32_MINUS_1 = -1082130432
DEFAULTS = {0: 512, 1: 2048, 2: 512, 3: 1, 4: 0, 5: 0, 6: 1, 7: 4, 8: 4, 9: 0, 10: -1, 11: -1, 12: -1, 13: -1, 14: 0, 15: 0}
DEFAULTS |= dict.fromkeys((16, 17, 18, 19), F32_MINUS_1) | {20: 0, 21: F32_MINUS_1, 26: 1, 27: 1}
N_CTX, N_BATCH, N_UBATCH, N_OUTPUTS, N_THREADS, N_THREADS_BATCH, FLASH, TYPE_K, TYPE_V = 0, 1, 2, 6, 7, 8, 13, 26, 27
F32, OFF = 0, 0


def library() -> Any:
    import xllamacpp.xllamacpp as extension

    lib = ctypes.CDLL(extension.__file__)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_backend_init": (None, []),
        "llama_context_default_params": (Params, []),
        "llama_model_default_params": (Params, []),
        "llama_model_load_from_file": (c_void_p, [c_char_p, Params]),
        "llama_init_from_model": (c_void_p, [c_void_p, Params]),
        "llama_n_ctx": (c_int32, [c_void_p]),
        "llama_n_batch": (c_int32, [c_void_p]),
        "llama_n_ubatch": (c_int32, [c_void_p]),
        "llama_get_memory": (c_void_p, [c_void_p]),
        "llama_memory_clear": (None, [c_void_p, c_bool]),
        "llama_model_get_vocab": (c_void_p, [c_void_p]),
        "llama_vocab_n_tokens": (c_int32, [c_void_p]),
        "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
        "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
        "llama_decode": (c_int32, [c_void_p, Batch]),
        "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class Model:
    """A GGUF in memory, with room for `context` tokens. exact: no flash attention and an F32 cache, so that attention is fp32."""

    def __init__(self, path: str, context: int, threads: int, exact: bool) -> None:
        self.lib = library()
        self.lib.llama_backend_init()
        params = self.lib.llama_context_default_params()
        moved = {index: params.words[index] for index, value in DEFAULTS.items() if params.words[index] != value}
        if moved:
            raise LayoutError(f"llama_context_params has unknown defaults: {moved}")
        self.model = self.lib.llama_model_load_from_file(path.encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp cannot load this file")
        for index, value in {N_CTX: context, N_BATCH: context, N_UBATCH: context, N_OUTPUTS: context}.items():
            params.words[index] = value
        params.words[N_THREADS] = params.words[N_THREADS_BATCH] = threads
        if exact:
            params.words[FLASH], params.words[TYPE_K], params.words[TYPE_V] = OFF, F32, F32
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot create a context for this model")
        if self.lib.llama_n_ctx(self.context) < context or self.lib.llama_n_ubatch(self.context) < context:
            raise LayoutError("llama.cpp did not accept the requested sizes")
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.size = self.lib.llama_vocab_n_tokens(self.vocab)
        self.batch = self.lib.llama_batch_init(context, 0, 1)

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def decode(self, ids: list[int], start: int, every: bool) -> None:
        """Run `ids` at positions start, start + 1, …; logits of every position, or of the last."""
        self.batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i], self.batch.seq_id[i][0] = token, start + i, 1, 0
            self.batch.logits[i] = int(every or i == len(ids) - 1)
        if (code := self.lib.llama_decode(self.context, self.batch)) != 0:
            raise RuntimeError(f"llama_decode returned {code}")

    def logits_at(self, i: int) -> Any:
        return self.lib.llama_get_logits_ith(self.context, i)

    def logits(self, ids: list[int]) -> bytes:
        self.clear()
        self.decode(ids, 0, every=True)
        return b"".join(ctypes.string_at(self.logits_at(i), 4 * self.size) for i in range(len(ids)))

    def generate(self, ids: list[int], count: int) -> tuple[list[int], float]:
        """`count` tokens, greedily, after `ids`; and the seconds from the first to the last of them."""
        import numpy as np

        self.clear()
        self.decode(ids, 0, every=False)
        out = [int(np.ctypeslib.as_array(self.logits_at(len(ids) - 1), (self.size,)).argmax())]
        started = time.perf_counter()
        for position in range(len(ids), len(ids) + count - 1):
            self.decode(out[-1:], position, every=False)
            out.append(int(np.ctypeslib.as_array(self.logits_at(0), (self.size,)).argmax()))
        return out, time.perf_counter() - started

    def tokenize(self, text: str) -> list[int]:
        """Tokenize a prompt, with special tokens before or after it; special tokens in the text count as plain text."""
        data = text.encode()
        buffer = (c_int32 * (len(data) + 8))()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), buffer, len(buffer), True, False)
        if count < 0:
            raise RuntimeError(f"llama_tokenize returned {count}")
        return buffer[:count]


class LayoutError(RuntimeError):
    """The structures of this llama.cpp differ from the supported ones."""


def answer(out: BinaryIO, reply: dict[str, Any], data: bytes = b"") -> None:
    out.write(json.dumps(reply | {"bytes": len(data)}).encode() + b"\n" + data)
    out.flush()


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        model = Model(**json.loads(sys.stdin.readline()))
        answer(out, {"vocabulary": model.size})
        for line in sys.stdin:
            request = json.loads(line)
            what = request.pop("what")
            if what == "logits":
                answer(out, {}, model.logits(**request))
            elif what == "generate":
                ids, seconds = model.generate(**request)
                answer(out, {"ids": ids, "seconds": seconds})
            elif what == "tokenize":
                answer(out, {"ids": model.tokenize(**request)})
    except (RuntimeError, ImportError, AttributeError) as error:  # AttributeError: a function that this wheel does not export
        answer(out, {"error": f"{error}", "kind": type(error).__name__})


if __name__ == "__main__":
    main()
