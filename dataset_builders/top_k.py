"""The best documents of queries, searched by parts of a corpus, so that memory grows with neither side.

Ties go to the smaller document position, so a build does not depend on a library's choice or on the parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from dataset_builders.engines import Engine, Shards, compute_shards

if TYPE_CHECKING:
    from torch import Tensor

# A retrieved document: its position in the corpus (-1, with a score of -inf: none) and its score.
FOUND = np.dtype([("document", np.int32), ("score", np.float32)])
NOTHING = np.array((-1, -np.inf), FOUND)
_THREADS = 8  # at most: each holds a block in memory
T, R = TypeVar("T"), TypeVar("R")
_GROUPS = 4  # times top_k: of so many groups of documents the highest score is looked at first


@dataclass(frozen=True)
class Search:
    """Shard block * len(parts) + part: the best documents of a part for a block of queries, as FOUND (queries, k)."""

    top_k: int
    blocks: Sequence[range]  # of queries; of equal length but for the last
    parts: Sequence[range]  # of documents

    def __call__(self, number: int) -> np.ndarray:
        block, part = divmod(number, len(self.parts))
        return self.search(self.blocks[block], part)

    def search(self, queries: range, part: int) -> np.ndarray:
        raise NotImplementedError

    def run(self, folder: Path, engine: Engine, description: str) -> Ranking:
        sizes = [len(block) * len(part) for block in self.blocks for part in self.parts]
        shards = compute_shards(self, sizes, folder, engine, description=description, unit="pairs")
        return Ranking(shards, self.blocks, len(self.parts), self.top_k)


@dataclass(frozen=True)
class Ranking:
    """Each query's best documents of the whole corpus."""

    shards: Shards
    blocks: Sequence[range]
    parts: int
    top_k: int

    def __getitem__(self, rows: range) -> np.ndarray:
        """FOUND (queries, up to top_k), best first, of some queries of one block."""
        block, start = divmod(rows.start, len(self.blocks[0]))
        shards = (self.shards[block * self.parts + part] for part in range(self.parts))
        return merge([shard[start : start + len(rows)] for shard in shards], self.top_k)


def ranges(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def merge(found: Sequence[np.ndarray], top_k: int) -> np.ndarray:
    """FOUND arrays (queries, any number) of several parts, in the parts' order and each as `best` orders them ->
    (queries, up to top_k), best first.
    """
    joined = np.concatenate(found, axis=1)
    order = np.argsort(-joined["score"], axis=1, kind="stable")[:, :top_k]
    return np.take_along_axis(joined, order, axis=1)


def best(scores: np.ndarray | Tensor, top_k: int, first: int, above: float | np.ndarray = -np.inf) -> np.ndarray:
    """FOUND (queries, up to top_k), best first, from a matrix of scores of the documents numbered from `first`.

    Only scores higher than `above` count: one number, or one a query, such as its best so far end with. Places left
    over hold NOTHING. A tensor is looked through where it lies; of one on a CPU give the array, which is faster.
    """
    queries, documents = scores.shape
    top_k = min(top_k, documents)
    bars = np.nextafter(np.full(queries, above, np.float32), np.float32(np.inf))
    groups = _GROUPS * top_k
    # the top_k-th best of groups' maxima: so many scores reach it and few more, where a sort would look at all
    grouped = scores[:, : documents // groups * groups] if np.ndim(above) == 0 and documents >= 2 * groups else None
    if isinstance(scores, np.ndarray):
        if grouped is not None:
            maxima = grouped.reshape(queries, -1, groups).max(axis=1)
            bars = np.maximum(bars, np.partition(maxima, groups - top_k, axis=1)[:, groups - top_k])
        places = np.flatnonzero(scores >= bars[:, None])
        values = scores.ravel()[places]
    else:
        import torch

        bars = torch.from_numpy(bars).to(scores.device)
        if grouped is not None:
            maxima = grouped.unflatten(1, (-1, groups)).amax(dim=1)
            bars = torch.maximum(bars, maxima.topk(top_k).values[:, -1])
        places = (scores >= bars[:, None]).flatten().nonzero().ravel()
        values, places = scores.flatten()[places].cpu().numpy(), places.cpu().numpy()
    rows, columns = np.divmod(places, documents)
    order = np.lexsort((-values, rows))  # stable, so ties keep to their positions
    starts = np.searchsorted(rows, np.arange(queries))
    ranks = np.arange(len(rows)) - starts[rows]  # `order` keeps to the rows
    order, rows, ranks = (part[ranks < top_k] for part in (order, rows, ranks))
    found = np.full((queries, top_k), NOTHING)
    found["document"][rows, ranks] = first + columns[order]
    found["score"][rows, ranks] = values[order] + np.float32(0)  # no negative zeros
    return found


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` on all processors, of functions whose work numpy or polars do, outside Python's lock."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _THREADS)) as pool:
        yield from pool.map(function, items)
