"""Batches: what they may hold together, that nothing gets lost, and that an epoch's order depends on nothing else."""

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from torch.utils.data import ConcatDataset

from common.cli import InputError
from modeling.batches import (
    EpochBatchSampler,
    WeightedBatchSampler,
    fill_up,
    first_fit,
    shared_texts,
    steps_by_weight,
)


def mined(rows: int, documents: int, negatives: int = 3, seed: int = 0) -> Dataset:
    """Rows of mined data: distinct queries, documents that many rows share."""
    drawn = np.random.default_rng(seed).integers(0, documents, (rows, 1 + negatives))
    names = ["positive", *(f"negative_{rank}" for rank in range(1, 1 + negatives))]
    columns = {name: [f"document {number}" for number in drawn[:, at]] for at, name in enumerate(names)}
    labels = [[0.9] + [0.1] * negatives] * rows  # equal labels are no equal texts
    return Dataset.from_dict({"query": [f"query {seed} {row}" for row in range(rows)], **columns, "label": labels})


def batches(sampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler) > 0
    return found


def texts_of(rows: Dataset, row: int) -> set[str]:
    return {value for name, value in rows[row].items() if name != "label"}


def check_distinct(rows: Dataset, batch: list[int]) -> None:
    texts = [text for row in batch for text in texts_of(rows, row)]
    assert len(set(texts)) == len(texts)


# --- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 16, 64])
def test_first_fit_is_the_rule_of_sentence_transformers(size):
    """Given its order, its NoDuplicatesBatchSampler makes the same batches, by another algorithm."""
    rows = mined(300, 200)
    generator = torch.Generator()
    reference = NoDuplicatesBatchSampler(rows, size, False, ["label"], generator, seed=3)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3)).tolist()
    assert sorted(first_fit(order, shared_texts(rows), size)) == sorted(reference)


@settings(max_examples=200)
@given(texts=st.lists(st.lists(st.integers(0, 30), max_size=3), min_size=1, max_size=80), size=st.integers(1, 12))
def test_rows_are_packed_once_and_without_common_texts(texts, size):
    packed = first_fit(range(len(texts)), [sorted(set(row)) for row in texts], size)
    filled = fill_up(packed, [sorted(set(row)) for row in texts], size)
    assert len(filled) <= len(packed)
    for result in (packed, filled):
        assert sorted(row for batch in result for row in batch) == list(range(len(texts)))
        for batch in result:
            assert 1 <= len(batch) <= size
            counts = Counter(text for row in batch for text in set(texts[row]))
            assert max(counts.values(), default=1) == 1


def test_filling_up_makes_complete_batches():
    """What is left over by first fit alone: incomplete batches, in which nothing is contrasted with much."""
    shared = shared_texts(mined(400, 900))
    packed = first_fit(range(400), shared, 40)
    assert len(packed) > 10
    assert [len(batch) for batch in fill_up(packed, shared, 40)] == [40] * 10


def test_shared_texts_look_across_columns_and_past_missing_documents():
    rows = Dataset.from_dict(
        {
            "query": ["a", "b", "c", "d"],
            "positive": ["x", "a", "y", "d"],  # row 1 answers with row 0's query; row 3 repeats itself
            "negative_1": ["", "z", "", "z"],
            "label": [[0.5, 0.5]] * 4,
        }
    )
    first, second, third, fourth = shared_texts(rows)
    assert len(first) == 1
    assert set(first) < set(second)
    assert third == []
    assert set(second) - set(first) == set(fourth)


# --- one data set ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [60, 400, 5000])
@pytest.mark.parametrize("distinct", [True, False])
def test_epochs(documents, distinct):
    """Heavily, somewhat and hardly shared documents: every row equally often, in an order of its own each epoch."""
    rows = mined(210, documents)
    sampler = EpochBatchSampler(rows, 16, False, seed=1, distinct_texts=distinct)
    epochs = [batches(sampler, epoch) for epoch in range(5)]
    assert len({str(epoch) for epoch in epochs}) == 5
    for batch in (batch for epoch in epochs for batch in epoch):
        assert len(batch) <= 16
        if distinct:
            check_distinct(rows, batch)
    assert sorted(row for batch in epochs[0] for row in batch) == list(range(210))
    counts = Counter(row for epoch in epochs for batch in epoch for row in batch)
    assert max(counts.values()) - min(counts.get(row, 0) for row in range(210)) <= (2 if distinct else 0)

    # a pure function of (seed, epoch): whatever was asked before, in whatever process
    fresh = EpochBatchSampler(rows, 16, False, seed=1, distinct_texts=distinct)
    assert batches(fresh, 3) == epochs[3]
    assert batches(fresh, 1) == epochs[1]
    assert batches(EpochBatchSampler(rows, 16, False, seed=2, distinct_texts=distinct), 0) != epochs[0]


def test_a_stream_of_passes_has_no_gaps():
    """Passes of several lengths laid end to end are the epochs laid end to end."""
    rows = mined(120, 60, negatives=2)
    sampler = EpochBatchSampler(rows, 24, False)
    lengths = {len(sampler._pass(number)) for number in range(6)}
    assert len(lengths) > 1  # else this would test nothing
    epochs = [batch for epoch in range(4) for batch in batches(sampler, epoch)]
    passes = [batch for number in range(6) for batch in sampler._pass(number)]
    assert epochs == passes[: len(epochs)]


def test_incomplete_batches_are_dropped_where_asked():
    rows = mined(50, 5000)
    assert sorted(map(len, batches(EpochBatchSampler(rows, 16, False), 0))) == [2, 16, 16, 16]
    assert list(map(len, batches(EpochBatchSampler(rows, 16, True), 0))) == [16, 16, 16]
    with pytest.raises(InputError, match=r"50 rows make no step of 1 x 64 rows .*lower per_device_train_batch_size"):
        EpochBatchSampler(rows, 64, True)


def test_devices_of_a_step_share_no_text_and_have_equal_batches():
    """As accelerate hands batches out: one to each process, all steps complete."""
    rows = mined(210, 500)
    sampler = EpochBatchSampler(rows, 8, False, world_size=2)
    sampler.set_epoch(1)
    first, second = (list(BatchSamplerShard(sampler, 2, rank, even_batches=False)) for rank in range(2))
    assert len(first) == len(second) == len(sampler) // 2 > 10
    for one, other in zip(first, second, strict=True):
        assert len(one) == len(other) == 8
        check_distinct(rows, one + other)
    with pytest.raises(InputError, match="no step of 2 x 128 rows"):
        EpochBatchSampler(rows, 128, False, world_size=2)


# --- several data sets ----------------------------------------------------------------------------------------------


def mixture(weights: dict[str, float], sizes: tuple[int, ...], world_size: int = 1) -> WeightedBatchSampler:
    sets = [mined(size, 5000, seed=number) for number, size in enumerate(sizes)]
    samplers = [EpochBatchSampler(rows, 8, False, seed=5, world_size=world_size) for rows in sets]
    return WeightedBatchSampler(ConcatDataset(sets), samplers, weights, seed=5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_shares_of_steps(world_size):
    sizes = (160, 480, 320)
    sampler = mixture({"a": 2, "b": 1, "c": 1}, sizes, world_size)
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

    assert batches(mixture({"a": 2, "b": 1, "c": 1}, sizes, world_size), 2) == batches(sampler, 2)


def test_a_small_set_starts_again_in_another_order():
    sampler = mixture({"small": 1, "large": 1}, (16, 160))
    small = [batch for batch in batches(sampler, 0) if batch[0] < 16]
    assert len(small) == 11
    passes = [tuple(row for batch in small[begin : begin + 2] for row in batch) for begin in range(0, 10, 2)]
    assert all(sorted(rows) == list(range(16)) for rows in passes)
    assert len(set(passes)) == 5


@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=6), steps=st.integers(600, 5000))
def test_steps_by_weight(weights, steps):
    counts = steps_by_weight({str(number): weight for number, weight in enumerate(weights)}, steps)
    assert sum(counts) == steps
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - weight / sum(weights) * steps) < 1


def test_weights_that_leave_a_set_out():
    with pytest.raises(InputError, match="data set 'b': weight must be above 0"):
        steps_by_weight({"a": 1, "b": 0}, 10)
    with pytest.raises(InputError, match="data set 'b': its weight gives it none of 10 steps"):
        steps_by_weight({"a": 1, "b": 0.01}, 10)
