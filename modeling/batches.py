"""Which rows make a batch, and in which order batches come.

Batches are task-homogeneous: the rows of one come from one data set, on all devices of a step together. Their order in
an epoch is a pure function of (seed, epoch), so that a resumed run goes on with the batches that it would have had.

sentence-transformers' NoDuplicatesBatchSampler has the rule of `first_fit`, but announces a number of batches that it
does not always keep. The trainer counts epochs by that number: rows are cut off, or a resumed run takes up another
epoch than it left. It also knows no missing documents, and no step of several devices.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from sentence_transformers.base.sampler import DefaultBatchSampler, MultiDatasetDefaultBatchSampler

from common.cli import InputError

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import ConcatDataset

LABEL = "label"


class EpochBatchSampler(DefaultBatchSampler):
    """The batches of one data set: pass after pass over its rows, each pass in an order of its own.

    An epoch is as long as the first pass. Where `distinct_texts` lets later passes come out longer or shorter than
    that, an epoch begins in the pass before or after, so that no row is left out.

    Args:
        dataset: rows of text columns, and `label`, which is not looked at.
        batch_size: rows of a batch on one device.
        drop_last: leave incomplete batches out.
        seed: of the orders.
        distinct_texts: no two rows of a batch may have a text in common, in whatever columns; what in-batch negatives
            ask for. Rows that would break this wait for a later batch, so that a text found in many rows makes
            incomplete batches at the end of a pass. "" is no text but a missing document.
        world_size: devices. A step takes that many batches, without common texts among them either, and all complete:
            losses that gather embeddings need equally many on every device.

    Raises:
        InputError: too few rows for one step.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        drop_last: bool,
        seed: int = 0,
        *,
        distinct_texts: bool = True,
        world_size: int = 1,
    ) -> None:
        super().__init__(dataset, batch_size, drop_last, seed=seed)
        self.rows = len(dataset)
        self.world_size = world_size
        self.shared = shared_texts(dataset) if distinct_texts else None
        self._lengths: list[int] = []  # steps of each pass so far
        self.steps = self._steps_of(0)
        if not self.steps:
            raise InputError(
                f"{self.rows} rows make no step of {world_size} x {batch_size} rows"
                f"{' without common texts' if distinct_texts else ''}; lower per_device_train_batch_size"
            )

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.take(self.epoch * self.steps, self.steps):
            yield from self.split(step)

    def __len__(self) -> int:
        return self.steps * self.world_size

    def take(self, start: int, count: int) -> Iterator[list[int]]:
        """Steps `start` to `start + count` of the endless row of passes: the rows of all devices together."""
        number, before = 0, 0
        while before + self._steps_of(number) <= start:
            before += self._steps_of(number)
            number += 1
        skipped = start - before
        while count:
            steps = self._pass(number)[skipped : skipped + count]
            yield from steps
            number, skipped, count = number + 1, 0, count - len(steps)

    def split(self, step: list[int]) -> Iterator[list[int]]:
        """The batches of a step, one for each device, in the order in which accelerate hands them out."""
        for begin in range(0, len(step), self.batch_size):
            yield step[begin : begin + self.batch_size]

    def _steps_of(self, number: int) -> int:
        while len(self._lengths) <= number:
            self._lengths.append(len(self._pass(len(self._lengths))))
        return self._lengths[number]

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the training does
    def _pass(self, number: int) -> list[list[int]]:
        order = np.random.default_rng([self.seed, number]).permutation(self.rows).tolist()
        size = self.batch_size * self.world_size
        if self.shared is None:
            steps = [order[begin : begin + size] for begin in range(0, self.rows, size)]
        else:
            steps = fill_up(first_fit(order, self.shared, size), self.shared, size)
        if self.drop_last or self.world_size > 1:
            steps = [step for step in steps if len(step) == size]
        return steps


class WeightedBatchSampler(MultiDatasetDefaultBatchSampler):
    """Steps of several data sets in a random order, each set with its share of them.

    An epoch has as many steps as one pass over every data set, whatever the weights: they change the mixture and not
    the budget. A data set whose rows run out within an epoch starts again, in a new order; one that keeps rows for
    later goes on with them in the next epoch. So the shares hold from the first step to the last, and no row is
    favoured over others of its set.

    Args:
        dataset: the rows of all data sets.
        batch_samplers: one for each data set, in the same order, with the same batch_size and world_size.
        weights: share of steps, relative to the others'; all above 0.
        seed: of the order.

    Raises:
        InputError: a weight that is not above 0, or too small for a single step of an epoch.
    """

    def __init__(
        self,
        dataset: ConcatDataset,
        batch_samplers: Sequence[EpochBatchSampler],
        weights: Mapping[str, float],
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, list(batch_samplers), seed=seed)
        self.steps = steps_by_weight(weights, sum(sampler.steps for sampler in batch_samplers))
        self.first_rows = [0, *np.cumsum([sampler.rows for sampler in batch_samplers]).tolist()]

    def __iter__(self) -> Iterator[list[int]]:
        taken = [
            sampler.take(self.epoch * count, count)
            for sampler, count in zip(self.batch_samplers, self.steps, strict=True)
        ]
        numbers = np.repeat(np.arange(len(self.steps)), self.steps)
        for number in np.random.default_rng([self.seed, self.epoch]).permutation(numbers).tolist():
            step = [self.first_rows[number] + row for row in next(taken[number])]
            yield from self.batch_samplers[number].split(step)

    def __len__(self) -> int:
        return sum(self.steps) * self.batch_samplers[0].world_size


def steps_by_weight(weights: Mapping[str, float], steps: int) -> list[int]:
    """`steps` divided in proportion to `weights`, by largest remainders.

    >>> steps_by_weight({"a": 1, "b": 1, "c": 0.5}, 12)
    [5, 5, 2]
    """
    if min(weights.values()) <= 0:
        raise InputError(
            f"data set {min(weights, key=weights.get)!r}: weight must be above 0; leave the set out instead"
        )
    exact = np.array(list(weights.values()), dtype=float) / sum(weights.values()) * steps
    counts = np.floor(exact).astype(int)
    largest = np.argsort(counts - exact, kind="stable")[: steps - counts.sum()]
    counts[largest] += 1
    if not counts.all():
        raise InputError(
            f"data set {list(weights)[counts.argmin()]!r}: its weight gives it none of {steps} steps; raise it"
        )
    return counts.tolist()


def first_fit(order: Iterable[int], shared: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Rows into batches of up to `size`: each goes into the first one that has room and none of its texts.

    Args:
        order: the rows, in the order in which they are placed.
        shared: of each row, its texts that other rows hold as well, as numbers.
        size: of a complete batch.

    >>> first_fit([0, 1, 2, 3], [[7], [7], [], [7]], 2)  # rows 0, 1 and 3 have text 7
    [[0, 2], [1], [3]]
    """
    batches: list[list[int]] = []
    room: dict[int, None] = {}  # numbers of incomplete batches, in order
    holders: dict[int, set[int]] = {}  # text -> the incomplete batches that hold it
    for row in order:
        texts = shared[row]
        refused = set().union(*(holders.get(text, ()) for text in texts))
        number = next((number for number in room if number not in refused), len(batches))
        if number == len(batches):
            batches.append([])
            room[number] = None
        batches[number].append(row)
        if len(batches[number]) < size:
            for text in texts:
                holders.setdefault(text, set()).add(number)
            continue
        del room[number]
        for text in {text for member in batches[number][:-1] for text in shared[member]}:
            holders[text].remove(number)
    return batches


def fill_up(batches: list[list[int]], shared: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """The batches of `first_fit` with the rows of surplus ones moved into the others, as far as that goes.

    What first fit leaves for the end are rows whose texts the incomplete batches hold already. Each takes the place of
    another, which fits into an incomplete batch.

    >>> fill_up([[0, 2], [1], [3]], [[7], [7], [], [7]], 2)  # three rows with text 7 need three batches
    [[0, 2], [1], [3]]
    >>> fill_up([[0, 1], [2], [3]], [[], [], [7], [7]], 2)
    [[3, 1], [2, 0]]
    """
    wanted = -(-sum(map(len, batches)) // size)
    batches = sorted((list(batch) for batch in batches), key=len, reverse=True)
    batches, surplus = batches[:wanted], batches[wanted:]
    texts = [{text for row in batch for text in shared[row]} for batch in batches]

    def make_room(row: int) -> bool:
        room = [number for number, batch in enumerate(batches) if len(batch) < size]
        for number, batch in enumerate(batches):
            common = texts[number].intersection(shared[row])
            for place, other in enumerate(batch):
                if not common.issubset(shared[other]):
                    continue
                for target in room:
                    if target != number and texts[target].isdisjoint(shared[other]):
                        batches[target].append(other)
                        texts[target].update(shared[other])
                        batch[place] = row
                        texts[number].difference_update(shared[other])
                        texts[number].update(shared[row])
                        return True
        return False

    while surplus and make_room(surplus[-1][-1]):
        surplus[-1].pop()
        if not surplus[-1]:
            surplus.pop()
    return batches + surplus


def shared_texts(rows: Dataset) -> list[list[int]]:
    """Of each row, the texts that other rows hold as well, numbered; "" is none.

    Texts are told apart by Python's 64-bit hash: processes salt it differently, but equal texts stay equal.
    """
    names = [name for name in rows.column_names if name != LABEL]
    blocks = [
        np.stack([np.fromiter(map(hash, block[name].to_pylist()), np.int64, len(block)) for name in names], axis=1)
        for block in rows.select_columns(names).with_format("arrow").iter(10_000)
    ]
    keys = np.sort(np.concatenate(blocks), axis=1)
    once = np.ones(keys.shape, dtype=bool)  # a text that a row holds twice counts once
    once[:, 1:] = keys[:, 1:] != keys[:, :-1]
    once &= keys != hash("")
    _, numbers, counts = np.unique(keys[once], return_inverse=True, return_counts=True)
    row_of = np.nonzero(once)[0]
    several = counts[numbers] > 1
    found = np.split(numbers[several], np.searchsorted(row_of[several], np.arange(1, len(keys))))
    return [texts.tolist() for texts in found]
