"""What benchmarks of mining share: texts with what is relevant to them, and vectors that are given."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.synthetic import write_encoder, zipf_texts
from dataset_builders.dense import Dense, search_dense
from dataset_builders.embeddings import Embedder, EncoderSection, Vectors
from dataset_builders.engines import LOCAL
from dataset_builders.sources import LocalSource, read_rows
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


def whole(ranking: Ranking) -> np.ndarray:
    """FOUND (queries, k): each query's best documents."""
    return np.concatenate([ranking[rows] for rows in ranking.blocks])


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

    documents: Vectors
    queries: Vectors

    @classmethod
    def of(cls, texts: Texts, folder: Path) -> Given:
        encoder = write_encoder(folder / "encoder", texts.documents[:10_000])
        embedder = Embedder(EncoderSection(model=str(encoder), vector_dtype="float32"), folder / "vectors")
        return cls(embedder.documents(texts.documents), embedder.queries(texts.queries))

    def search(self, folder: Path, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Our dense search: positions and scores, both (queries, top_k)."""
        shutil.rmtree(folder, ignore_errors=True)
        parts, blocks = ranges(len(self.documents), PART), ranges(len(self.queries), BLOCK)
        section = Dense(model="given", top_k=top_k)
        found = whole(search_dense(section, self.queries, blocks, self.documents, parts, folder, LOCAL))
        return found["document"], found["score"]
