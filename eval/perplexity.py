"""Loss and perplexity of a causal language model on rows of tokens, without padding.

Several rows are packed into one sequence [1, T] whose position ids restart at 0 with every row. transformers builds a
block-diagonal attention mask from that (`masking_utils.find_packed_sequence_indices`, if no attention mask and no cache are
given), so no row sees another. Recurrent models (Mamba, RWKV, hybrids) and custom attentions may ignore position ids;
this is tested on the model (`rows_stay_apart`), and if so, rows run one by one. Logits are computed only where the next
token is supervised: for 2,048 tokens and a vocabulary of 128k all of them would take a gigabyte in fp32.

The loss is the mean over supervised tokens, L = Σ sᵢ / Σ nᵢ with sᵢ the summed negative log-likelihood (nats) of row i and nᵢ
its supervised tokens. Tokens of a row are not independent, rows are: the standard error is that of a ratio of sums over rows
(delta method; Cochran, Sampling Techniques, 3rd ed., §6.4): sqrt(N/(N−1) · Σ(sᵢ − L·nᵢ)²) / Σ nᵢ.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eval.model_state import adds_bos, device_of, evaluating, forget, out_of_memory
from eval.positions import numbers_tokens, positions_of

Row = tuple[list[int], list[int]]  # input ids, labels: the label AT each position (unshifted), IGNORED where none
Progress = Callable[[int, int], None]  # (done, total)
TokenLosses = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(ids (1, T), positions (1, T), keep (n,), targets (n,)) → losses (nats, fp32) of the tokens after positions `keep`, (n,)."""

IGNORED = -100
LOSS_CHUNK = 512  # tokens whose logits are in fp32 at a time


@dataclass(frozen=True)
class LossResult:
    """Loss on a set of rows; the sums by row allow a paired comparison."""

    loss: float  # nats per supervised token
    stderr: float  # of the loss, over rows; NaN with fewer than two rows that have a supervised token
    perplexity: float  # exp(loss)
    tokens: int  # supervised tokens
    rows: int
    row_loss_sums: tuple[float, ...]  # nats; 0 for a row without a supervised token
    row_tokens: tuple[int, ...]

    def as_dict(self, *, by_row: bool = False) -> dict[str, Any]:
        """For JSON: numbers that are not finite become None; the lists by row are optional."""
        numbers = {"loss": self.loss, "stderr": self.stderr, "perplexity": self.perplexity}
        result: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        result |= {"tokens": self.tokens, "rows": self.rows}
        if by_row:
            result |= {"row_loss_sums": list(self.row_loss_sums), "row_tokens": list(self.row_tokens)}
        return result


def _ratio(sums: Sequence[float], tokens: Sequence[int]) -> tuple[float, float]:
    """(Σ sums / Σ tokens, its standard error over the rows that have tokens)."""
    total, n = sum(tokens), sum(1 for count in tokens if count)
    mean = math.fsum(sums) / total
    if n < 2:
        return mean, math.nan
    spread = math.fsum((s - mean * count) ** 2 for s, count in zip(sums, tokens, strict=True))
    return mean, math.sqrt(n / (n - 1) * spread) / total


def paired_difference(before: LossResult, after: LossResult) -> tuple[float, float]:
    """(after.loss − before.loss, its standard error) on the same rows; far more precise than the two separate errors.

    Raises:
        ValueError: the two results are not of the same rows.
    """
    if before.row_tokens != after.row_tokens:
        raise ValueError(
            f"a paired difference needs the same rows: before has {before.rows} rows and {before.tokens} supervised "
            f"tokens, after has {after.rows} and {after.tokens}, or the tokens are distributed differently over the rows"
        )
    changes = [b - a for a, b in zip(before.row_loss_sums, after.row_loss_sums, strict=True)]
    return _ratio(changes, before.row_tokens)


def _inner(model: nn.Module) -> Any:
    """The model inside its wrappers (torch.compile, DDP, PEFT), which pass keywords on."""
    inner: Any = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif "_orig_mod" in inner._modules:
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            return inner


def accepted(model: Any) -> set[str]:
    """Names of the arguments that a model takes; not `position_ids` if it numbers its tokens by a rule of its own."""
    names = set(inspect.signature(model.forward).parameters)
    return names - {"position_ids"} if numbers_tokens(getattr(model, "config", None)) else names


def kept_logits(model: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Logits of one sequence at the positions `keep` only.

    input_ids, position_ids: (1, T) int64, positions restart at 0 with every row in the sequence. keep: (n,) int64.
    → (n, vocabulary) in the model's dtype; differentiable.
    """
    names = accepted(_inner(model))
    given = {"use_cache": False, "position_ids": position_ids, "logits_to_keep": keep}
    arguments: dict[str, Any] = {"input_ids": input_ids} | {name: value for name, value in given.items() if name in names}
    logits = model(**arguments).logits[0]
    return logits if logits.shape[0] == keep.numel() else logits[keep]


def _sequence(
    rows: Sequence[list[int]], keep: list[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pack `rows` into one sequence: ids (1, T), positions (1, T), keep (n,)."""
    ids = torch.tensor([[t for row in rows for t in row]], device=device)
    positions = torch.tensor([[p for row in rows for p in range(len(row))]], device=device)
    return ids, positions, torch.tensor(keep, device=device)


def rows_stay_apart(model: nn.Module, *, highest_id: int, longest: int = 0, device: torch.device | None = None) -> bool:
    """Whether rows packed into one sequence, separated by position ids only, do not affect each other's logits.

    Tested on the model: the logits of a row after two different neighbours of equal length. Shapes are equal, and a masked
    neighbour has a weight of exactly 0, so a remaining difference is the order of summation in kernels (a few ulp of the
    largest logit). The rows consist of the token ids 0 and `highest_id`. Call it in evaluation mode, without gradients.

    longest: tokens of the longest sequence in use. If the model has fewer positions and a table of that size (GPT-Neo's mask),
    the neighbours fill them.
    """
    device, length, inner = device or device_of(model), 8, _inner(model)
    if "position_ids" not in accepted(inner):
        return False
    before = length
    if (positions := positions_of(getattr(inner, "config", None))) is not None and longest > positions:
        before = positions if any(positions in buffer.shape for buffer in inner.buffers()) else length
    row, keep = [highest_id] * length, list(range(before, before + length))
    try:
        one, other = (kept_logits(model, *_sequence([[token] * before, row], keep, device)) for token in (0, highest_id))
    except Exception as error:
        if before == length or out_of_memory(error):
            raise
        forget(error)
        return False
    bound = 4 * torch.finfo(one.dtype).eps * one.abs().max()
    return bool((one - other).abs().max() <= bound)


def _groups(indices: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Consecutive rows whose lengths add up to at most `most`; a longer row is a group of its own."""
    group: list[int] = []
    size = 0
    for index in indices:
        if group and size + lengths[index] > most:
            yield group
            group, size = [], 0
        group.append(index)
        size += lengths[index]
    if group:
        yield group


def _losses(model: nn.Module, rows: Sequence[Row], device: torch.device, of_tokens: TokenLosses | None) -> list[float]:
    """Summed negative log-likelihood of each row, nats; every row has a supervised token."""
    keep: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    start = 0
    for ids, labels in rows:
        positions = [i for i in range(len(ids) - 1) if labels[i + 1] != IGNORED]
        keep += [start + i for i in positions]
        targets += [labels[i + 1] for i in positions]
        counts.append(len(positions))
        start += len(ids)
    sequence = _sequence([ids for ids, _ in rows], keep, device)
    target_ids = torch.tensor(targets, device=device)
    if of_tokens is not None:
        losses = of_tokens(*sequence, target_ids)
    else:
        logits = kept_logits(model, *sequence)
        parts = zip(logits.split(LOSS_CHUNK), target_ids.to(logits.device).split(LOSS_CHUNK), strict=True)
        losses = torch.cat([F.cross_entropy(chunk.float(), goals, reduction="none") for chunk, goals in parts])
    return [row.sum().item() for row in losses.double().cpu().split(counts)]


def evaluate_loss(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    batch_tokens: int = 2048,
    device: torch.device | str | None = None,
    of_tokens: TokenLosses | None = None,
    retry: bool = True,
    progress: Progress | None = None,
) -> LossResult:
    """The model's loss on `rows`; the state of the model and of the random generators does not change.

    Args:
        rows: (input ids, labels), lists of equal length; labels[i] is the token AT position i, or −100 for "not supervised"
            (the shift by one is done here, so a label at position 0 never counts).
        batch_tokens: rows are packed up to this many tokens; a longer row runs alone. If memory runs out, it is halved,
            down to one row.
        device: of the input ids; default: that of the model's first parameter.
        retry: halve after out of memory; off if other processes run the same passes.
        of_tokens: computes the losses instead of the model's logits, for example in chunks.
        progress: called with (rows done, total).

    Raises:
        ValueError: no rows, no supervised token in any of them, or ids and labels that differ in length.
    """
    if not rows:
        raise ValueError("no rows to evaluate the loss on")
    for i, (ids, labels) in enumerate(rows):
        if len(ids) != len(labels):
            raise ValueError(f"row {i} has {len(ids)} input ids and {len(labels)} labels; the numbers must be equal")
    tokens = [sum(1 for label in labels[1:] if label != IGNORED) for _, labels in rows]
    todo = [i for i, count in enumerate(tokens) if count]
    if not todo:
        raise ValueError(
            f"none of the {len(rows)} rows has a supervised token (every label is {IGNORED}): there is no loss to evaluate"
        )

    device = torch.device(device) if device is not None else device_of(model)
    lengths = [len(ids) for ids, _ in rows]
    groups = list(_groups(todo, lengths, batch_tokens))
    sums = [0.0] * len(rows)
    done = len(rows) - len(todo)
    with evaluating(model), torch.no_grad():
        together = any(len(group) > 1 for group in groups)
        highest, longest = max(max(rows[i][0]) for i in todo), max(sum(lengths[i] for i in group) for group in groups)
        if together and not rows_stay_apart(model, highest_id=highest, longest=longest, device=device):
            groups = [[i] for i in todo]
        while groups:
            group = groups[0]
            try:
                losses = _losses(model, [rows[i] for i in group], device, of_tokens)
            except Exception as error:
                if len(group) == 1 or not retry or not out_of_memory(error):
                    raise
                forget(error)
                losses = None
            if losses is None:  # out of memory: half as many tokens from here on
                batch_tokens = max(1, sum(lengths[i] for i in group) // 2)
                halved = group[: len(group) // 2], group[len(group) // 2 :]
                groups = [*halved, *(part for rest in groups[1:] for part in _groups(rest, lengths, batch_tokens))]
                continue
            del groups[0]
            for i, loss in zip(group, losses, strict=True):
                sums[i] = loss
            done += len(group)
            if progress:
                progress(done, len(rows))
    return loss_of(sums, tokens)


def loss_of(sums: Sequence[float], tokens: Sequence[int]) -> LossResult:
    """The loss of rows from their summed losses (nats) and their supervised tokens."""
    loss, stderr = _ratio(sums, tokens)
    perplexity = math.exp(loss) if loss < 709 else math.inf  # exp(710) overflows
    return LossResult(loss, stderr, perplexity, sum(tokens), len(tokens), tuple(sums), tuple(tokens))


def text_rows(tokenizer: Any, text: str, *, length: int, bos: bool = True) -> list[Row]:
    """Plain text as rows: windows of `length` tokens that do not overlap, with all tokens supervised except the first.

    If the tokenizer adds BOS and `bos` is set, every window starts with one (then all of the text's tokens are
    supervised); otherwise the first token of each window is context only. The last window may be shorter.

    Raises:
        ValueError: `length` below 2, or a text too short to supervise a token.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2, one token to read and one to predict, not {length}")
    head = [tokenizer.bos_token_id] if bos and adds_bos(tokenizer) else []
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = length - len(head)
    windows = [head + ids[i : i + step] for i in range(0, len(ids), step)]
    rows = [(window, [IGNORED, *window[1:]]) for window in windows if len(window) > 1]
    if not rows:
        raise ValueError(f"the text is too short: {len(ids)} tokens, at least 2 are needed")
    return rows
