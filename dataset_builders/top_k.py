"""The best documents of queries, searched by parts of a corpus, so that memory grows with neither side.

Ties go to the smaller document position, so a build does not depend on a library's choice or on the parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from dataset_builders.engines import Engine, Shards, compute_shards

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


def best(scores: np.ndarray, top_k: int, first: int, above: float = -np.inf) -> np.ndarray:
    """FOUND (queries, up to top_k), best first, from a matrix of scores of the documents numbered from `first`.

    Only scores higher than `above` count. Places left over hold NOTHING.
    """
    queries, documents = scores.shape
    top_k = min(top_k, documents)
    bars = np.full(queries, np.nextafter(np.float32(above), np.float32(np.inf)))
    groups = _GROUPS * top_k
    if documents >= 2 * groups:
        # the top_k-th best of groups' maxima: so many scores reach it and few more, where a sort would look at all
        maxima = scores[:, : documents // groups * groups].reshape(queries, -1, groups).max(axis=1)
        bars = np.maximum(bars, np.partition(maxima, groups - top_k, axis=1)[:, groups - top_k])
    places = np.flatnonzero(scores >= bars[:, None])
    rows, columns = np.divmod(places, documents)
    return ranked(rows, first + columns, scores.ravel()[places], (queries, top_k))


def ranked(rows: np.ndarray, documents: np.ndarray, scores: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """FOUND of `shape` (queries, top_k), best first, from scores of pairs, sorted by query (`rows`) and document."""
    queries, top_k = shape
    order = np.lexsort((-scores, rows))  # stable, so ties keep to their positions
    ranks = np.arange(len(rows)) - np.searchsorted(rows, np.arange(queries))[rows]  # `order` keeps to the rows
    order, rows, ranks = (part[ranks < top_k] for part in (order, rows, ranks))
    found = np.full(shape, NOTHING)
    found["document"][rows, ranks] = documents[order]
    found["score"][rows, ranks] = scores[order] + np.float32(0)  # no negative zeros
    return found


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` on all processors, of functions whose work numpy or polars do, outside Python's lock."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _THREADS)) as pool:
        yield from pool.map(function, items)
