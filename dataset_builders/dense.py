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
from dataset_builders.top_k import NOTHING, Ranking, Search, best, merge, ranges

QUERY_BLOCK = 256
DOCUMENT_BLOCK = 8192  # with the above, 8 MiB of scores at a time


class Dense(EncoderSection):
    """Exact search costs queries x documents; a FAISS index misses neighbours, and repays its training late."""

    top_k: int = Field(100, ge=1)  # documents found for a query
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
) -> Ranking:
    """The queries' top-k documents; shards of unfinished work lie in `folder`."""
    plan = (section.top_k, blocks, parts, queries)
    if len(documents) < section.faiss_from:
        return _ExactSearch(*plan, documents).run(folder / "dense.shards", engine, "dense search")
    sizes = [len(part) for part in parts]
    index = _FaissIndex(documents, parts)
    indexes = compute_shards(index, sizes, folder / "faiss.shards", engine, description="FAISS index", unit="texts")
    return _FaissSearch(*plan, indexes, section.faiss_probes).run(folder / "dense.shards", engine, "dense search")


def dense_top_k(queries: np.ndarray, documents: np.ndarray | Vectors, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and inner products of each query's best documents, best first; both (queries, top_k).

    Exact, never the whole score matrix, and ties go to the smaller position.
    """
    found = _exact(queries, documents, range(len(documents)), top_k)
    return found["document"].astype(np.int64), found["score"]


def _exact(queries: np.ndarray, documents: np.ndarray | Vectors, rows: range, top_k: int) -> np.ndarray:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = np.full((len(queries), min(top_k, len(rows))), NOTHING)
    # a block of documents is read once, and every block of queries compared with it
    for part in ranges(len(rows), DOCUMENT_BLOCK):
        first = rows.start + part.start
        texts = torch.from_numpy(np.asarray(documents[first : first + len(part)], np.float32)).to(device)
        for start in range(0, len(queries), QUERY_BLOCK):
            here = slice(start, start + QUERY_BLOCK)
            block = torch.from_numpy(np.asarray(queries[here], np.float32)).to(device)
            so_far = found[here]
            above = so_far["score"][:, -1] if part.start else -np.inf  # equal scores lose to earlier documents
            scores = block @ texts.T
            scores = scores if scores.is_cuda else scores.numpy()
            found[here] = merge([so_far, best(scores, top_k, first, above)], so_far.shape[1])
    return found


@dataclass(frozen=True)
class _ExactSearch(Search):
    queries: Vectors
    documents: Vectors

    def search(self, queries: range, part: int) -> np.ndarray:
        vectors = self.queries[queries.start : queries.stop]
        return _exact(vectors, self.documents, self.parts[part], self.top_k)


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
class _FaissSearch(Search):
    queries: Vectors
    indexes: Shards
    probes: int

    def search(self, queries: range, part: int) -> np.ndarray:
        index = _faiss(self.parts[-1].stop).deserialize_index(np.array(self.indexes[part]))
        index.nprobe = self.probes
        scores, places = index.search(self.queries[queries.start : queries.stop], self.top_k)
        found = np.full(scores.shape, NOTHING)  # where the lists that were visited hold fewer than top_k
        found["document"][places >= 0] = self.parts[part].start + places[places >= 0]
        found["score"][places >= 0] = scores[places >= 0]
        order = np.lexsort((found["document"], -found["score"]))
        return np.take_along_axis(found, order, axis=1)


def _faiss(documents: int) -> Any:
    try:
        import faiss
    except ImportError:
        raise InputError(
            f"{documents:,} documents are searched with FAISS: pip install '.[faiss]', "
            "or raise dense.faiss_from for exact search"
        ) from None
    return faiss
