"""Dense retrieval by parts of the corpus: exact inner products block by block; beyond a stated size, FAISS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from common.cli import InputError
from dataset_builders.embeddings import EncoderSection, Vectors
from dataset_builders.engines import Engine, Shards, compute_shards
from dataset_builders.hits import NONE, merge_keys, positions_and_scores, sort_keys

QUERY_BLOCK = 256
DOCUMENT_BLOCK = 8192  # with the above, 8 MiB of scores at a time
GROUP = 8  # documents of which the best is looked at first


class Dense(EncoderSection):
    """Exact search costs queries x documents; a FAISS index misses neighbours, and repays its training late."""

    top_k: int = Field(100, ge=1)
    # Documents from which on FAISS searches. Up to there exact search is minutes on a GPU, and hours on CPU cores.
    faiss_from: int = Field(20_000_000, ge=1)
    # Lists of an inverted file that a query visits, of about 4 sqrt(documents of a part); 64 of 1,024 found 79 % of
    # the 100 nearest of static embeddings in half the time of exact search.
    faiss_probes: int = Field(64, ge=1, le=1_000_000)


def search_dense(
    section: Dense,
    queries: Vectors,
    blocks: Sequence[range],
    documents: Vectors,
    parts: Sequence[range],
    folder: Path,
    engine: Engine,
) -> Shards:
    """Keys of the top-k documents of every part for every block of queries: shard block * len(parts) + part."""
    if len(documents) >= section.faiss_from:
        indexes = compute_shards(
            _FaissIndex(documents, parts),
            [len(part) for part in parts],
            folder / "faiss.shards",
            engine,
            description="FAISS index",
            unit="texts",
        )
        work = _FaissSearch(section, queries, blocks, indexes, parts)
    else:
        work = _ExactSearch(section, queries, blocks, documents, parts)
    return compute_shards(
        work,
        [len(block) * len(part) for block in blocks for part in parts],
        folder / "dense.shards",
        engine,
        description="dense search",
        unit="pairs",
    )


def dense_top_k(queries: np.ndarray, documents: np.ndarray | Vectors, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and inner products of each query's best documents, best first; both (queries, top_k).

    Exact, never the whole score matrix, and ties go to the smaller position.
    """
    return positions_and_scores(_exact_keys(queries, documents, range(len(documents)), top_k))


def _exact_keys(queries: np.ndarray, documents: np.ndarray | Vectors, rows: range, top_k: int) -> np.ndarray:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    best = np.full((len(queries), min(top_k, len(rows))), NONE)
    # a block of documents is read once, and every block of queries compared with it
    for first in range(rows.start, rows.stop, DOCUMENT_BLOCK):
        last = min(first + DOCUMENT_BLOCK, rows.stop)
        texts = torch.from_numpy(np.asarray(documents[first:last], np.float32)).to(device)
        for start in range(0, len(queries), QUERY_BLOCK):
            here = slice(start, start + QUERY_BLOCK)
            block = torch.from_numpy(np.asarray(queries[here], np.float32)).to(device)
            _, lowest = positions_and_scores(best[here, -1])
            found = _contenders(block @ texts.T, first, lowest, top_k)
            best[here] = merge_keys([best[here], found], best.shape[1])
    return best


def _contenders(scores: Any, first: int, lowest: np.ndarray, top_k: int) -> np.ndarray:
    """Keys of a block's documents that can be among a query's `top_k` best: (queries, any number), NONE where fewer.

    `scores`: (queries, documents) tensor, the documents numbered from `first`; `lowest`: (queries,) a score that the
    best must reach, NaN if none is known. Few scores reach it: only groups whose highest does are looked into.
    """
    import torch

    missing = -scores.shape[1] % GROUP
    if missing:  # sorts below every document, and there are as many documents as places for them
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    groups = scores.view(len(scores), GROUP, -1)  # document i in group i mod the number of groups
    highest = groups.amax(dim=1).cpu().numpy()
    width = highest.shape[1]
    if width >= top_k:  # as many documents score at least as high as the k-th highest group
        lowest = np.fmax(lowest, np.partition(highest, -top_k, axis=1)[:, -top_k])
    queries, group = np.divmod(np.flatnonzero(~(highest < lowest[:, None])), width)  # nothing is below a NaN
    members = groups[torch.from_numpy(queries), :, torch.from_numpy(group)].cpu().numpy()
    near = np.flatnonzero(~(members < lowest[queries, None]))
    row, member = np.divmod(near, GROUP)
    keys = sort_keys(members.ravel()[near], first + member * width + group[row])
    queries = queries[row]
    counts = np.bincount(queries, minlength=len(scores))
    found = np.full((len(scores), counts.max()), NONE)
    found[queries, np.arange(len(keys)) - np.repeat(counts.cumsum() - counts, counts)] = keys
    return found


@dataclass(frozen=True)
class _ExactSearch:
    section: Dense
    queries: Vectors
    blocks: Sequence[range]
    documents: Vectors
    parts: Sequence[range]

    def __call__(self, number: int) -> np.ndarray:
        block, part = divmod(number, len(self.parts))
        rows = self.blocks[block]
        return _exact_keys(self.queries[rows.start : rows.stop], self.documents, self.parts[part], self.section.top_k)


@dataclass(frozen=True)
class _FaissIndex:
    """Shard i: an inverted file of part i, trained on its own documents with a fixed seed, as bytes."""

    documents: Vectors
    parts: Sequence[range]

    def __call__(self, number: int) -> np.ndarray:
        faiss = _faiss(len(self.documents))
        rows = self.parts[number]
        vectors = self.documents[rows.start : rows.stop]
        lists = max(min(int(4 * len(rows) ** 0.5), len(rows) // 39), 1)  # FAISS wants 39 training points a list
        index = faiss.index_factory(vectors.shape[1], f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = 0
        index.train(vectors)
        index.add(vectors)
        return faiss.serialize_index(index)


@dataclass(frozen=True)
class _FaissSearch:
    section: Dense
    queries: Vectors
    blocks: Sequence[range]
    indexes: Shards
    parts: Sequence[range]

    def __call__(self, number: int) -> np.ndarray:
        faiss = _faiss(self.parts[-1].stop)
        block, part = divmod(number, len(self.parts))
        rows = self.blocks[block]
        index = faiss.deserialize_index(np.array(self.indexes[part]))
        index.nprobe = self.section.faiss_probes
        scores, places = index.search(self.queries[rows.start : rows.stop], self.section.top_k)
        keys = sort_keys(scores, self.parts[part].start + places)
        keys[places < 0] = NONE  # fewer than top_k in the lists that were visited
        return merge_keys([keys], keys.shape[1])


def _faiss(documents: int) -> Any:
    try:
        import faiss
    except ImportError:
        raise InputError(
            f"{documents:,} documents are searched with FAISS: pip install '.[faiss]', "
            "or raise dense.faiss_from for exact search"
        ) from None
    return faiss
