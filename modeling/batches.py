"""Which rows make a batch, and in which order batches come.

Batches are task-homogeneous: the rows of a step come from one data set, on all devices. Their order in an epoch is a
pure function of (seed, epoch), so a resumed run goes on with the batches that it would have had. Rows of a batch may
have texts in common: the loss leaves equal texts and known positives out of the in-batch negatives (modeling.losses).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler, MultiDatasetDefaultBatchSampler
from torch.utils.data import ConcatDataset

from common.cli import InputError

LABEL = "label"


class EpochBatchSampler(DefaultBatchSampler):
    """The batches of one data set: one pass over its rows an epoch, each in an order of its own.

    The steps of a pass are equally large, up to one row: no small last step counts as much as a full one. With
    `drop_last` or several devices (`world_size`), all batches are complete and the rows that remain are left out:
    losses that gather embeddings need equal numbers of rows. Raises InputError with too few rows for one step.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, drop_last: bool, seed: int = 0, *, world_size: int = 1
    ) -> None:
        super().__init__(dataset, batch_size, drop_last or world_size > 1, seed=seed)
        self.rows, self.world_size = len(dataset), world_size
        size = batch_size * world_size
        self.steps = self.rows // size if self.drop_last else -(-self.rows // size)
        if not self.steps:
            raise InputError(
                f"{self.rows} rows make no step of {world_size} x {batch_size} rows; lower per_device_train_batch_size"
            )

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.epoch * self.steps, (self.epoch + 1) * self.steps):
            yield from self.batches(step)

    def __len__(self) -> int:
        return self.steps * self.world_size

    def batches(self, step: int) -> list[list[int]]:
        """The batches of a step, counted from the first epoch on: one for each device, in accelerate's order."""
        number, place = divmod(step, self.steps)
        rows = self._pass(number)[place]
        return [rows[begin : begin + self.batch_size] for begin in range(0, len(rows), self.batch_size)]

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the training does
    def _pass(self, number: int) -> list[list[int]]:
        order = np.random.default_rng([self.seed, number]).permutation(self.rows)
        if self.drop_last:
            order = order[: self.steps * self.batch_size * self.world_size]
        return [rows.tolist() for rows in np.array_split(order, self.steps)]


class WeightedBatchSampler(MultiDatasetDefaultBatchSampler):
    """Steps of several data sets in a random order, each with its share of them.

    An epoch has as many steps as one pass over every data set, whatever the weights: they change the mixture and not
    the budget. A data set whose rows run out within an epoch starts again, in a new order; one that keeps rows for
    later goes on with them in the next epoch. So the shares hold from the first step to the last, and no row is
    favoured over others of its set.

    `batch_samplers` has one for each data set, of equal batch_size and world_size; `weights` are shares of steps.
    Raises InputError for a weight too small for a single step of an epoch.
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
        following = [self.epoch * count for count in self.steps]
        datasets = np.repeat(np.arange(len(self.steps)), self.steps)
        for number in np.random.default_rng([self.seed, self.epoch]).permutation(datasets).tolist():
            for batch in self.batch_samplers[number].batches(following[number]):
                yield [self.first_rows[number] + row for row in batch]
            following[number] += 1

    def __len__(self) -> int:
        return sum(self.steps) * self.batch_samplers[0].world_size


def steps_by_weight(weights: Mapping[str, float], steps: int) -> list[int]:
    """`steps` divided in proportion to `weights`, by largest remainders.

    >>> steps_by_weight({"a": 1, "b": 1, "c": 0.5}, 12)
    [5, 5, 2]
    """
    exact = np.array(list(weights.values()), dtype=float) / sum(weights.values()) * steps
    counts = np.floor(exact).astype(int)
    largest = np.argsort(counts - exact, kind="stable")[: steps - counts.sum()]
    counts[largest] += 1
    if not counts.all():
        raise InputError(
            f"data set {list(weights)[counts.argmin()]!r}: its weight gives it none of {steps} steps; raise it"
        )
    return counts.tolist()
