"""The export gate, on plain functions as models: errors beyond the target's own arithmetic fail, smaller ones pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from finetune.errors import GateError
from finetune.exporters.gate import Bounds, Logits, compare, require_pass

BOUNDS = Bounds(factor=2.0, floor=1e-3, ceiling=0.5, kl=1.0)
ROWS = [(list(range(start, start + 6)), [-100, *range(start + 1, start + 6)]) for start in (0, 3, 9)]
TABLE = 2 * torch.randn(16, 20, generator=torch.Generator().manual_seed(0))


def model(change: float = 0.0, *, seed: int = 1, scale: float = 1.0) -> Logits:
    """Looks up logits in a table with relative noise of size `change`."""
    noise = torch.randn(TABLE.shape, generator=torch.Generator().manual_seed(seed))
    table = scale * TABLE + change * TABLE.std() * noise
    return lambda ids: table[ids]


def test_figures_of_identical_models() -> None:
    verdict = compare(ROWS, trained=model(), target=model(), bounds=BOUNDS)
    assert verdict.reason is None
    assert (verdict.error, verdict.noise, verdict.kl, verdict.same_top) == (0, 0, pytest.approx(0, abs=1e-6), 1)
    assert (verdict.rows, verdict.tokens) == (3, 18)
    log = TABLE.log_softmax(-1)
    expected = -torch.stack([log[a, a + 1] for ids, _ in ROWS for a in ids[:-1]]).mean()
    assert verdict.trained_loss == pytest.approx(float(expected), rel=1e-5)
    figures = verdict.as_dict()
    assert figures["status"] == "pass"
    assert figures["good"]["trained_perplexity"] == pytest.approx(math.exp(verdict.trained_loss))


def test_error_is_compared_with_the_targets_own_arithmetic_noise() -> None:
    """The same error passes if the target's arithmetic is that coarse, and fails if it is finer."""
    target = model(0.02, seed=3)
    coarse = compare(ROWS, trained=model(), simulation=model(0.02, seed=2), target=target, bounds=BOUNDS)
    fine = compare(ROWS, trained=model(), simulation=model(0.002, seed=2), target=target, bounds=BOUNDS)
    assert coarse.error == pytest.approx(0.02 * 2**0.5, rel=0.2)
    assert coarse.reason is None
    assert fine.reason is not None
    with pytest.raises(GateError, match="does not match the trained model") as caught:
        require_pass(fine, where="out.gguf", hint="look")
    assert f"{fine.error:.3g}" in str(caught.value)


def test_constant_shift_of_all_logits_is_no_error() -> None:
    target: Logits = lambda ids: TABLE[ids] + 7  # noqa: E731
    assert compare(ROWS, trained=model(), target=target, bounds=BOUNDS).error < 1e-6


def test_export_faithful_to_a_format_that_is_too_coarse_fails() -> None:
    """Target and simulation agree, but both are far from the trained model."""
    broken = model(0.0, scale=-1.0)
    verdict = compare(ROWS, trained=model(), simulation=broken, target=broken, bounds=BOUNDS)
    assert verdict.error == 0
    assert "too coarse for this model" in str(verdict.reason)


def test_relative_error_catches_differences_that_kl_misses() -> None:
    """An untrained model gives all tokens equal probability: KL is zero, but the relative error is not."""
    trained, changed = model(scale=1e-4), model(1e-4, scale=1e-4, seed=2)
    verdict = compare(ROWS, trained=trained, target=changed, bounds=BOUNDS)
    assert verdict.kl < 1e-6
    assert verdict.reason is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_logits_fail(bad: float) -> None:
    def target(ids: list[int]) -> Tensor:
        logits = TABLE[ids].clone()
        logits[0, 0] = bad
        return logits

    assert compare(ROWS, trained=model(), target=target, bounds=BOUNDS).reason is not None


def test_vocabulary_mismatch_and_missing_rows_raise() -> None:
    with pytest.raises(GateError, match="a different vocabulary"):
        compare(ROWS, trained=model(), target=lambda ids: TABLE[ids][:, :19], bounds=BOUNDS)
    with pytest.raises(ValueError, match="no rows"):
        compare([], trained=model(), target=model(), bounds=BOUNDS)


def test_rows_without_labels_have_nan_loss_and_pass() -> None:
    rows = [([1, 2, 3], [-100, -100, -100])]
    verdict = compare(rows, trained=model(), target=model(), bounds=BOUNDS)
    assert math.isnan(verdict.trained_loss)
    assert verdict.reason is None
