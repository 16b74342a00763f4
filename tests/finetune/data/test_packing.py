from __future__ import annotations

import random

import pytest

from finetune.data.packing import MULTIPLE, Batches, pack
from finetune.data.samples import IGNORE, Sample


def samples(lengths: list[int]) -> list[Sample]:
    return [Sample(f"rows:{n}", tuple(range(length)), (IGNORE, *range(1, length))) for n, length in enumerate(lengths)]


def test_bins_hold_every_sample_once_within_capacity_and_are_nearly_full() -> None:
    lengths = [random.Random(1).randint(5, 300) for _ in range(2000)]
    bins = pack(lengths, 1024)
    assert sorted(i for row in bins for i in row) == list(range(2000))
    assert all(sum(lengths[i] for i in row) <= 1024 for row in bins)
    assert len(bins) <= 1.02 * sum(lengths) / 1024 + 1


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_epoch_has_every_sample_once_in_an_order_set_by_seed_and_epoch(packing: bool, micro_batch: int) -> None:
    def batches(seed: int) -> Batches:
        return Batches(samples([7, 9, 20, 3, 30, 12, 5]), micro_batch=micro_batch, max_length=32, packing=packing, seed=seed)

    first = batches(1).epoch(0)
    assert sorted(i for key in first for i in key) == list(range(7))
    assert first == batches(1).epoch(0)
    assert first != batches(1).epoch(1)
    assert first != batches(2).epoch(0)
    if not packing:
        assert [len(key) for key in first][:-1] == [micro_batch] * (len(first) - 1)


def test_positions_restart_per_sample_and_padding_has_no_labels() -> None:
    batches = Batches(samples([3, 2, 4]), micro_batch=1, max_length=16, packing=True, seed=0)
    batch = batches.batch((1, 2))
    assert batch.tokens == 6
    assert {part.shape for part in (batch.input_ids, batch.position_ids, batch.labels)} == {(1, MULTIPLE)}
    assert batch.input_ids[0, :6].tolist() == [0, 1, 0, 1, 2, 3]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, *range(MULTIPLE - 6)]]
    # No sample predicts the first token of the next one, and padding has no labels.
    assert batch.labels.tolist() == [[IGNORE, 1, IGNORE, 1, 2, 3, *[IGNORE] * (MULTIPLE - 6)]]


def test_full_row_gets_no_padding() -> None:
    batch = Batches(samples([40, 88]), micro_batch=1, max_length=128, packing=True, seed=0).batch((0, 1))
    assert batch.input_ids.shape == (1, 128) == (1, batch.tokens)


def test_filling_ends_at_the_models_positions() -> None:
    batches = Batches(samples([40, 88, 3]), micro_batch=1, max_length=100, packing=False, seed=0, positions=40)
    assert batches.batch((0,)).input_ids.shape == (1, 40)
    assert batches.batch((2,)).input_ids.shape == (1, 40)
