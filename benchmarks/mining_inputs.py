"""What benchmarks of mining share: texts with what is relevant to them, vectors that are given, and grading."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.synthetic import write_encoder, zipf_texts
from dataset_builders.dense import Dense, search_dense
from dataset_builders.embeddings import SHARD, Vectors, vector_shard
from dataset_builders.engines import LOCAL, compute_shards
from dataset_builders.sources import LocalSource, read_rows
from dataset_builders.teachers import PairScorer, Teacher
from dataset_builders.top_k import Ranking, ranges

PART = 16_384  # documents in a part; a build's parts are larger, which favours it
BLOCK = 8192  # queries that a part answers at a time


@dataclass(frozen=True)
class Texts:
    """Queries and documents, all different, and what is relevant to which: position of the document -> score."""

    documents: list[str]
    queries: list[str]
    judged: list[dict[int, int]]


def read_texts(args: Namespace, queries: int) -> Texts:
    """Up to `queries` queries of the set with a relevant document; or synthetic ones, eight words out of theirs."""
    if not args.set:
        documents = zipf_texts(args.documents, (40, 120), seed=0)
        rows = np.linspace(0, len(documents), min(queries, len(documents)), endpoint=False).astype(np.int64).tolist()
        rng = np.random.default_rng(1)
        asked = [" ".join(rng.permutation(documents[row].split())[:8]) for row in rows]
        return Texts(documents, asked, [{row: 1} for row in rows])
    rows = read_rows(LocalSource(kind="local", path=str(args.set), split=args.split), None)
    positions: dict[str, int] = {}  # text -> position: the first of equal documents stands for all
    ids, texts = (rows.documents[name].to_list() for name in ("document_id", "text"))
    position_of = {name: positions.setdefault(text, len(positions)) for name, text in zip(ids, texts, strict=True)}
    query_texts = dict(zip(*(rows.queries[name].to_list() for name in ("query_id", "text")), strict=True))
    judged: dict[str, dict[int, int]] = {}
    for row in rows.qrels.to_dicts():
        if row["split"] == args.split and row["score"] > 0:
            judged.setdefault(query_texts[row["query_id"]], {})[position_of[row["document_id"]]] = row["score"]
    kept = list(judged)[:queries]
    return Texts(list(positions), kept, [judged[query] for query in kept])


def whole(ranking: Ranking, queries: int) -> np.ndarray:
    """FOUND (queries, k): each query's best documents."""
    return np.concatenate([ranking[rows] for rows in ranges(queries, BLOCK)])


def ndcg(found: np.ndarray, judged: Sequence[Mapping[int, int]]) -> float:
    """nDCG@10, by ir_measures, of (queries, k) positions, best first (-1: none)."""
    import ir_measures

    run = {
        str(row): {str(position): float(-rank) for rank, position in enumerate(positions) if position >= 0}
        for row, positions in enumerate(found.tolist())
    }
    qrels = {str(row): {str(position): score for position, score in one.items()} for row, one in enumerate(judged)}
    [value] = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run).values()
    return value


@dataclass(frozen=True)
class Given:
    """The vectors of a SentenceTransformer that has made them already, for both sides of a comparison."""

    documents: np.ndarray
    queries: np.ndarray

    @classmethod
    def of(cls, texts: Texts, folder: Path) -> Given:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(write_encoder(folder, texts.documents[:10_000])))
        sides = (texts.documents, texts.queries)
        return cls(*(model.encode(side, batch_size=256, normalize_embeddings=True) for side in sides))

    def search(self, folder: Path, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Our dense search, from vectors on disk as a build's are."""
        shutil.rmtree(folder, ignore_errors=True)
        queries, documents = (
            on_disk(vectors, folder / side) for side, vectors in (("q", self.queries), ("d", self.documents))
        )
        parts, blocks = ranges(len(documents), PART), ranges(len(queries), BLOCK)
        ranking = search_dense(Dense(model="given", top_k=top_k), queries, blocks, documents, parts, folder, LOCAL)
        found = whole(ranking, len(queries))
        return found["document"], found["score"]


def on_disk(vectors: np.ndarray, folder: Path) -> Vectors:
    sizes = [len(rows) for rows in ranges(len(vectors), SHARD)]
    return Vectors(compute_shards(_Rows(vectors), sizes, folder, LOCAL, description="vectors", unit="texts"))


@dataclass(frozen=True)
class _Rows:
    vectors: np.ndarray

    def __call__(self, number: int) -> np.ndarray:
        vectors = self.vectors[number * SHARD : (number + 1) * SHARD]
        return vector_shard(vectors, np.zeros(len(vectors)))


class GivenModel:
    """What mine_hard_negatives asks of a SentenceTransformer, answered from vectors. Dot products, the faster way."""

    def __init__(self, given: Given) -> None:
        import torch
        from sentence_transformers import util

        self.given, self.device = given, torch.device("cpu")
        self.similarity, self.similarity_pairwise = util.dot_score, util.pairwise_dot_score

    def encode_document(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        assert len(texts) == len(self.given.documents)
        return self.given.documents

    def encode_query(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        assert len(texts) == len(self.given.queries)
        return self.given.queries


def grade(reranker: Path, texts: Texts, pairs: np.ndarray, work: Path) -> np.ndarray:
    """Our scores of (query, document) positions: a cross-encoder's, in shards."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    scorer = PairScorer(
        Teacher(kind="cross_encoder", model=str(reranker)), work, LOCAL, texts.queries, texts.documents
    )
    return scorer.scores(pairs, work)


def cross_encoder(reranker: Path) -> Any:
    """The same model as sentence-transformers has it."""
    import torch
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(reranker), activation_fn=torch.nn.Identity())
