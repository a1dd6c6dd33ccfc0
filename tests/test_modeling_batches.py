"""Batches: nothing is lost, steps are whole, and an epoch's order depends on nothing but seed and epoch."""

from collections import Counter

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset

from common.cli import InputError
from modeling.batches import EpochBatchSampler, WeightedBatchSampler, steps_by_weight


def rows_of(count: int) -> Dataset:
    return Dataset.from_dict({"query": [str(row) for row in range(count)]})


def batches(sampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler) > 0
    return found


@pytest.mark.parametrize(
    ("rows", "drop_last", "sizes"),
    [(64, False, [16] * 4), (49, False, [13, 12, 12, 12]), (49, True, [16] * 3), (5, False, [5])],
)
def test_every_epoch_is_one_pass_of_equal_steps_in_an_order_of_its_own(rows, drop_last, sizes):
    def sampler(seed: int = 1) -> EpochBatchSampler:
        return EpochBatchSampler(rows_of(rows), 16, drop_last, seed)

    epochs = [batches(sampler(), epoch) for epoch in range(4)]
    assert len({str(epoch) for epoch in epochs}) == 4
    for found in epochs:
        assert [len(batch) for batch in found] == sizes
        assert len({row for batch in found for row in batch}) == sum(sizes)
    # a pure function of (seed, epoch): whatever was asked before, in whatever process
    one = sampler()
    assert [batches(one, epoch) for epoch in (3, 1)] == [epochs[3], epochs[1]]
    assert batches(sampler(2), 0) != epochs[0]


def test_devices_of_a_step_have_equal_batches_of_different_rows():
    """As accelerate hands batches out: one to each process, all steps complete."""
    sampler = EpochBatchSampler(rows_of(210), 8, False, world_size=2)
    sampler.set_epoch(1)
    first, second = (list(BatchSamplerShard(sampler, 2, rank, even_batches=False)) for rank in range(2))
    assert len(first) == len(second) == len(sampler) // 2 == 13
    assert {len(batch) for batch in first + second} == {8}
    assert len({row for batch in first + second for row in batch}) == 208


@pytest.mark.parametrize(("drop_last", "world_size", "step"), [(True, 1, "1 x 64"), (False, 2, "2 x 64")])
def test_too_few_rows_for_a_step(drop_last, world_size, step):
    with pytest.raises(InputError, match=rf"^50 rows make no step of {step} rows; lower per_device_train_batch_size"):
        EpochBatchSampler(rows_of(50), 64, drop_last, world_size=world_size)


def mixture(weights: dict[str, float], sizes: tuple[int, ...], world_size: int = 1) -> WeightedBatchSampler:
    sets = [rows_of(size) for size in sizes]
    samplers = [EpochBatchSampler(rows, 8, False, seed=5, world_size=world_size) for rows in sets]
    return WeightedBatchSampler(ConcatDataset(sets), samplers, weights, seed=5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_shares_of_steps(world_size):
    sizes, weights = (160, 480, 320), {"a": 2, "b": 1, "c": 1}
    sampler = mixture(weights, sizes, world_size)
    of_row = np.repeat(np.arange(3), sizes)
    counts = Counter()
    orders = []
    for epoch in range(4):
        found = batches(sampler, epoch)
        assert len(found) == sum(sizes) // 8  # the budget is that of one pass, whatever the weights
        sets = []
        for begin in range(0, len(found), world_size):
            step = [row for batch in found[begin : begin + world_size] for row in batch]
            assert len(set(of_row[step])) == 1  # on all devices
            sets.append(int(of_row[step[0]]))
            counts.update(step)
        assert [sets.count(number) for number in range(3)] == [60 // world_size, 30 // world_size, 30 // world_size]
        orders.append(sets)
    assert len({str(sets) for sets in orders}) == 4
    # 60 batches an epoch of the 20 of a pass: 12 times each row; 120 of 60 and of 40 in all: 2 and 3 times
    for number, times in enumerate((12, 2, 3)):
        assert {counts[int(row)] for row in np.flatnonzero(of_row == number)} == {times}
    assert batches(mixture(weights, sizes, world_size), 2) == batches(sampler, 2)


def test_a_small_set_starts_again_in_another_order():
    found = batches(mixture({"small": 1, "large": 1}, (16, 160)), 0)
    small = [batch for batch in found if batch[0] < 16]
    assert len(small) == 11
    passes = [tuple(small[at] + small[at + 1]) for at in range(0, 10, 2)]
    assert all(sorted(rows) == list(range(16)) for rows in passes)
    assert len(set(passes)) == 5


@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=6), steps=st.integers(600, 5000))
def test_steps_by_weight(weights, steps):
    counts = steps_by_weight({str(number): weight for number, weight in enumerate(weights)}, steps)
    assert sum(counts) == steps
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - weight / sum(weights) * steps) < 1


def test_weights_that_leave_a_set_out():
    with pytest.raises(InputError, match="data set 'b': its weight gives it none of 10 steps"):
        steps_by_weight({"a": 1, "b": 0.01}, 10)
