"""corpus/ -> candidates/: for each query the best documents by BM25 and by a dense encoder, fused by rank.

Both searches are exact, and ties go to the smaller document id, so a build does not depend on the machine's luck.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from tqdm import tqdm

from dataset_builders.embeddings import SHARD, Embedder, EncoderSection, in_shards
from dataset_builders.folders import read_parquet
from dataset_builders.recipes import Section
from dataset_builders.schema import CANDIDATES
from dataset_builders.sources import Splits

QUERY_BLOCK = 256
DOCUMENT_BLOCK = 8192  # with the above, 8 MiB of scores at a time
# One retrieved document: its position in documents.parquet (-1: none) and its score.
HIT = np.dtype([("position", np.int32), ("score", np.float32)])
Identifier = TypeVar("Identifier", bound=Hashable)


class Bm25(Section):
    backend: Literal["bm25s", "rank_bm25"] = "bm25s"
    top_k: int = Field(100, ge=1)


class Dense(EncoderSection):
    top_k: int = Field(100, ge=1)


class Fusion(Section):
    rrf_k: int = Field(60, ge=0)
    top_k: int = Field(100, ge=1)


def write_candidates(
    corpus: Path, splits: Splits, bm25: Bm25, dense: Dense, fusion: Fusion, cache: Path, folder: Path
) -> dict[str, Any]:
    """Write candidates.parquet into `folder`; returns the counts for the manifest."""
    documents = read_parquet(corpus / "documents.parquet")
    queries = queries_of(corpus, splits.searched)
    document_texts, query_texts = documents["text"].to_pylist(), list(queries.values())
    scorer = bm25_scorer(document_texts, bm25.backend)
    sparse_hits = _search_bm25(scorer, query_texts, bm25.top_k, folder / "bm25.npy")
    embedder = Embedder(dense, cache)
    vectors = embedder.queries(query_texts), embedder.documents(document_texts)
    dense_hits = _search_dense(*vectors, dense.top_k, folder / "dense.npy")
    counts = _fuse(sparse_hits, dense_hits, fusion, list(queries), documents["document_id"], folder)
    for name in ("bm25.npy", "dense.npy"):
        (folder / name).unlink()
    return {"queries": len(queries), "documents": len(documents), **counts}


def queries_of(corpus: Path, splits: Sequence[str]) -> dict[str, str]:
    """query_id -> text of the queries in any of `splits`, by id."""
    table = read_parquet(corpus / "queries.parquet")
    rows = zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
    return {query_id: text for query_id, text, split in rows if split in splits}


def reciprocal_rank_fusion(
    rankings: Sequence[Sequence[Identifier]], k: int = 60, top_k: int | None = None
) -> list[tuple[Identifier, float]]:
    """(document, score) best first, score = sum over rankings of 1 / (k + rank), rank from 1; ties by document id.

    Source: Cormack, Clarke and Buettcher, SIGIR 2009.

    >>> reciprocal_rank_fusion([["a", "b"], ["b", "c"]], k=1)
    [('b', 0.8333333333333333), ('a', 0.5), ('c', 0.3333333333333333)]
    """
    scores: dict[Identifier, float] = {}
    for ranking in rankings:
        for rank, document in enumerate(ranking, start=1):
            scores[document] = scores.get(document, 0.0) + 1 / (k + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:top_k]


def bm25_scorer(texts: Sequence[str], backend: str) -> Callable[[str], np.ndarray]:
    """A function from a query to its BM25 score with every text (k1 = 1.5, b = 0.75; English stop words, stemmed).

    bm25s has Lucene's idf; rank_bm25 (Okapi, negative idf floored) ranks differently, and is there as a reference.
    """
    tokens = tokenise(texts)
    if backend == "rank_bm25":
        from rank_bm25 import BM25Okapi

        index = BM25Okapi(tokens)
    else:
        import bm25s

        index = bm25s.BM25(method="lucene")
        index.index(tokens, show_progress=False)

    def scores(query: str) -> np.ndarray:
        found = tokenise([query])[0]
        return np.asarray(index.get_scores(found), np.float32) if found else np.zeros(len(texts), np.float32)

    return scores


def tokenise(texts: Sequence[str]) -> list[list[str]]:
    """Words of two letters or more in lower case, without English stop words, by their Snowball stem."""
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    return bm25s.tokenize(list(texts), stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)


def dense_top_k(queries: np.ndarray, documents: np.ndarray, top_k: int) -> np.ndarray:
    """(queries, top_k) hits by inner product, best first: exact, block by block, never the whole score matrix."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    best = []
    for start in range(0, len(queries), QUERY_BLOCK):
        block = torch.from_numpy(np.array(queries[start : start + QUERY_BLOCK], np.float32)).to(device)
        keys = torch.empty((len(block), 0), dtype=torch.int64, device=device)
        for first in range(0, len(documents), DOCUMENT_BLOCK):
            texts = torch.from_numpy(np.array(documents[first : first + DOCUMENT_BLOCK], np.float32)).to(device)
            keys = _best_keys(torch.cat([keys, _sort_keys(block @ texts.T, first)], dim=1), top_k)
        best.append(_hits(keys))
    return np.concatenate(best)


def _search_bm25(scorer: Callable[[str], np.ndarray], queries: Sequence[str], top_k: int, path: Path) -> np.ndarray:
    import torch

    def search(rows: np.ndarray) -> np.ndarray:
        found = []
        for row in rows:
            scores = torch.from_numpy(scorer(queries[row]))[None]
            found.append(_hits(_best_keys(_sort_keys(scores, 0), top_k)))
            progress.update()
        hits = _padded(np.concatenate(found), top_k)
        hits["position"][hits["score"] <= 0] = -1  # no word in common: not found
        return hits

    with tqdm(total=len(queries), desc="BM25 search", unit=" queries", smoothing=0) as progress:
        return in_shards(path, np.arange(len(queries)), search, progress)


def _search_dense(queries: np.ndarray, documents: np.ndarray, top_k: int, path: Path) -> np.ndarray:
    def search(rows: np.ndarray) -> np.ndarray:
        hits = _padded(dense_top_k(queries[rows], documents, top_k), top_k)
        progress.update(len(rows))
        return hits

    with tqdm(total=len(queries), desc="dense search", unit=" queries", smoothing=0) as progress:
        return in_shards(path, np.arange(len(queries)), search, progress)


def _sort_keys(scores: Any, first: int) -> Any:
    """(queries, documents) float32 -> int64 that sort by score, then by smaller document position (from `first`).

    The upper half is the float's bits, made to sort as integers; the lower half counts documents downwards.
    """
    import torch

    bits = (scores + 0.0).view(torch.int32)  # + 0.0: no negative zeros
    positions = torch.arange(first, first + scores.shape[1], device=scores.device)
    return (_flip(bits).long() << 32) | (0xFFFFFFFF - positions)


def _flip(bits: Any) -> Any:
    """Negative floats sort the wrong way round as integers: flip all but their sign. Its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _best_keys(keys: Any, top_k: int) -> Any:
    return keys.topk(min(top_k, keys.shape[1]), dim=1).values


def _hits(keys: Any) -> np.ndarray:
    import torch

    hits = np.empty(tuple(keys.shape), HIT)
    hits["position"] = (0xFFFFFFFF - (keys & 0xFFFFFFFF)).cpu().numpy()
    hits["score"] = _flip((keys >> 32).to(torch.int32)).view(torch.float32).cpu().numpy()
    return hits


def _padded(hits: np.ndarray, top_k: int) -> np.ndarray:
    padding = np.full((len(hits), top_k - hits.shape[1]), np.array((-1, 0), HIT), HIT)
    return np.concatenate([hits, padding], axis=1)


def _fuse(
    sparse: np.ndarray, dense: np.ndarray, fusion: Fusion, query_ids: list[str], document_ids: pa.Array, folder: Path
) -> dict[str, Any]:
    """Write candidates.parquet, some queries at a time; returns how many candidates each retriever found."""
    path = folder / "candidates.parquet"
    found = {"bm25_only": 0, "dense_only": 0, "both": 0}
    with pq.ParquetWriter(path.with_name(path.name + ".tmp"), CANDIDATES, compression="zstd") as writer:
        for start in range(0, len(query_ids), SHARD):
            rows = range(start, min(start + SHARD, len(query_ids)))
            positions, columns = zip(*(_fused_query(sparse[row], dense[row], fusion) for row in rows), strict=True)
            counts = [len(position) for position in positions]
            merged = np.concatenate(columns)
            table = {
                "query_id": pa.array(query_ids[start : start + SHARD]).take(np.repeat(np.arange(len(rows)), counts)),
                "document_id": document_ids.take(np.concatenate(positions)),
                **{name: pa.array(merged[name], mask=np.isnan(merged[name])) for name in merged.dtype.names},
            }
            writer.write_table(pa.table(table).select(CANDIDATES.names).cast(CANDIDATES))
            by_bm25, by_dense = ~np.isnan(merged["bm25_rank"]), ~np.isnan(merged["dense_rank"])
            found["bm25_only"] += int((by_bm25 & ~by_dense).sum())
            found["dense_only"] += int((by_dense & ~by_bm25).sum())
            found["both"] += int((by_bm25 & by_dense).sum())
    path.with_name(path.name + ".tmp").rename(path)
    total = sum(found.values())
    return {"candidates": total, "share": {name: round(count / max(total, 1), 4) for name, count in found.items()}}


_FUSED = np.dtype([(name, np.float64) for name in CANDIDATES.names[2:]])


def _fused_query(sparse: np.ndarray, dense: np.ndarray, fusion: Fusion) -> tuple[np.ndarray, np.ndarray]:
    """Document positions by falling RRF score, and their ranks and scores (NaN: not retrieved)."""
    retrieved = [hits[hits["position"] >= 0] for hits in (sparse, dense)]
    fused = reciprocal_rank_fusion([hits["position"].tolist() for hits in retrieved], fusion.rrf_k, fusion.top_k)
    columns = np.full(len(fused), np.nan, _FUSED)
    place = {position: index for index, (position, _) in enumerate(fused)}
    for name, hits in zip(("bm25", "dense"), retrieved, strict=True):
        kept = [
            (place[position], rank) for rank, position in enumerate(hits["position"].tolist()) if position in place
        ]
        if kept:
            places, ranks = np.array(kept).T
            columns[f"{name}_rank"][places] = ranks + 1
            columns[f"{name}_score"][places] = hits["score"][ranks]
    columns["rrf_score"] = [score for _, score in fused]
    columns["rrf_rank"] = np.arange(1, len(fused) + 1)
    return np.array(list(place), np.int64), columns
