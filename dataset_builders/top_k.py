"""The best documents of queries, searched by parts of a corpus, so that memory grows with neither side.

Ties go to the smaller document position, so a build does not depend on a library's choice or on the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset_builders.engines import Engine, Shards, compute_shards

if TYPE_CHECKING:
    from torch import Tensor

# A retrieved document: its position in the corpus (-1, with a score of -inf: none) and its score.
FOUND = np.dtype([("document", np.int32), ("score", np.float32)])
NOTHING = np.array((-1, -np.inf), FOUND)


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
    """FOUND arrays (queries, any number) of several parts -> (queries, up to top_k), best first."""
    joined = np.concatenate(found, axis=1)
    order = np.lexsort((joined["document"], -joined["score"]))[:, :top_k]
    return np.take_along_axis(joined, order, axis=1)


def best(scores: Tensor, top_k: int, first: int, above: float = -np.inf) -> np.ndarray:
    """FOUND (queries, up to top_k) from a matrix of scores of the documents numbered from `first`.

    Equal scores are in no order yet: `merge` orders them. Only scores higher than `above` count; places left over hold
    NOTHING.
    """
    values, columns = scores.topk(min(top_k + 1, scores.shape[1]))
    # torch.topk takes any of equal scores: it matters where the last place is one of them
    tied = (
        ((values[:, top_k:] == values[:, top_k - 1 : -1]) & (values[:, top_k:] > above)).any(dim=1).nonzero().ravel()
    )
    if len(tied):
        order = scores[tied].sort(dim=1, descending=True, stable=True).indices
        columns[tied] = order[:, : columns.shape[1]]
    values, columns = values[:, :top_k].cpu().numpy(), columns[:, :top_k].cpu().numpy()
    found = np.full(values.shape, NOTHING)
    is_found = values > above
    found["document"][is_found] = first + columns[is_found]
    found["score"][is_found] = values[is_found] + np.float32(0)  # no negative zeros
    return found
