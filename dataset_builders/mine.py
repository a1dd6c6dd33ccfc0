"""scores/ -> mined/: hard negatives that the teacher grades clearly below the positive; and graded pairs for STS.

A row is dropped, with its reason counted, when fewer than `num_negatives` candidates qualify: repeating or inventing
negatives would teach the loss something that no teacher said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from dataset_builders.candidates import Dense, dense_top_k, queries_of
from dataset_builders.cli import InputError
from dataset_builders.embeddings import Embedder
from dataset_builders.folders import read_parquet, write_parquet
from dataset_builders.recipes import Section
from dataset_builders.schema import SCORES, STS, mined_schema
from dataset_builders.scores import Calibration, PairScorer, Teacher, count_flat_and_one_hot
from dataset_builders.sources import Splits, stable_hash

STS_BINS = 10  # equal-width bins of the label
STS_NEIGHBOURS = 64  # how far down a query's nearest queries pairs are looked for
STS_POOL = 10  # pairs graded for each pair wanted


class Mining(Section):
    margin: float = Field(0.95, gt=0, le=1)
    num_negatives: int = Field(7, ge=1)
    strategy: Literal["top", "random"] = "top"
    seed: int = 0


class Sts(Section):
    num_rows: int = Field(8000, ge=1)
    seed: int = 0


def select_negatives(
    labels: np.ndarray,
    positive_label: float,
    forbidden: np.ndarray | None = None,
    *,
    margin: float = 0.95,
    num_negatives: int = 7,
    strategy: str = "top",
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Positions of one row's negatives among its candidates, highest label first; fewer when fewer qualify.

    A candidate qualifies iff label < margin * positive_label (NV-Retriever's TopK-PercPos) and it is not
    `forbidden` (labelled positives, exact and near duplicates of one). `top` takes the highest labels, ties in the
    order given; `random` draws evenly with `rng`. Labels are calibrated, in (0, 1): a ratio of raw scores turns
    round where they are negative, so those are refused with ValueError.

    >>> select_negatives(np.array([0.9, 0.2, 0.7, 0.86, 0.8]), 0.9, num_negatives=2)
    array([4, 2])
    """
    labels = np.asarray(labels)
    if not 0 < positive_label < 1 or np.any(~((labels > 0) & (labels < 1))):
        raise ValueError("labels must lie in (0, 1); calibrate raw teacher scores first")
    qualifies = labels < margin * positive_label
    if forbidden is not None:
        qualifies &= ~np.asarray(forbidden, bool)
    positions = np.flatnonzero(qualifies)
    if strategy == "random" and len(positions) > num_negatives:
        if rng is None:
            raise ValueError("strategy 'random' needs an rng")
        positions = np.sort(rng.choice(positions, num_negatives, replace=False))
    return positions[np.argsort(-labels[positions], kind="stable")][:num_negatives]


def write_mined(corpus: Path, scores: Path, mining: Mining, folder: Path) -> dict[str, Any]:
    """Write mined.parquet into `folder`; returns the counts for the manifest."""
    table = read_parquet(scores / "scores.parquet", SCORES.names)
    audit: Counter[str] = Counter()
    rows = list(_mine(table, _groups(corpus), mining, audit))
    if not rows:
        raise InputError(
            f"{scores}: none of {audit['rows']} rows has {mining.num_negatives} negatives below margin "
            f"{mining.margin}; lower --num_negatives or raise the candidates' top_k"
        )
    mined = _with_texts(rows, corpus, mining.num_negatives)
    write_parquet(folder / "mined.parquet", mined)
    labels = mined["label"].combine_chunks().flatten().to_numpy()
    starts = np.arange(len(mined)) * (mining.num_negatives + 1)
    names = ("is_labelled_positive", "is_duplicate_of_positive", "fails_margin", "qualifies")
    return {
        "rows": len(mined),
        "negatives": len(mined) * mining.num_negatives,
        "rows_dropped": {"too_few_negatives": audit["too_few_negatives"], "no_qualifying_candidate": audit["none"]},
        "candidates": {name: audit[name] for name in names},
        "mean_label": {
            "positive": round(float(labels[starts].mean()), 4),
            "negative": round(float(np.delete(labels, starts).mean()), 4),
        },
        **count_flat_and_one_hot(labels, starts),
    }


def _mine(
    table: pa.Table, groups: dict[str, str], mining: Mining, audit: Counter[str]
) -> Iterator[tuple[str, str, list[str], list[float]]]:
    """(query_id, positive_id, negative_ids, labels) of every row kept: one for each labelled positive."""
    query_ids = table["query_id"].to_numpy(zero_copy_only=False)
    document_ids = table["document_id"].to_pylist()
    labels, is_positive = table["label"].to_numpy(), table["is_positive"].to_numpy()
    group_ids = np.array([groups.get(document_id, document_id) for document_id in document_ids], object)
    starts = np.flatnonzero(np.r_[True, query_ids[1:] != query_ids[:-1]])
    for start, stop in zip(starts, [*starts[1:], len(table)], strict=True):
        part = slice(start, stop)
        positive = is_positive[part]
        # exact duplicates were merged in the corpus; what is left of a positive's group are near duplicates
        duplicate = np.isin(group_ids[part].astype(str), group_ids[part][positive].astype(str)) & ~positive
        audit["is_labelled_positive"] += int(positive.sum())
        audit["is_duplicate_of_positive"] += int(duplicate.sum())
        for place in np.flatnonzero(positive):
            qualifying = (labels[part] < mining.margin * labels[start + place]) & ~positive & ~duplicate
            audit["rows"] += 1
            audit["qualifies"] += int(qualifying.sum())
            audit["fails_margin"] += int((~qualifying & ~positive & ~duplicate).sum())
            chosen = select_negatives(
                labels[part],
                labels[start + place],
                positive | duplicate,
                margin=mining.margin,
                num_negatives=mining.num_negatives,
                strategy=mining.strategy,
                # its own seed for every row: order and sharding of the input do not change what is drawn
                rng=np.random.default_rng(stable_hash(mining.seed, query_ids[start], document_ids[start + place])),
            )
            if len(chosen) < mining.num_negatives:
                audit["too_few_negatives" if len(chosen) else "none"] += 1
                continue
            places = start + np.r_[place, chosen]
            yield (
                query_ids[start],
                document_ids[places[0]],
                [document_ids[found] for found in places[1:]],
                labels[places].tolist(),
            )


def _with_texts(rows: Sequence[tuple[str, str, list[str], list[float]]], corpus: Path, num_negatives: int) -> pa.Table:
    documents = read_parquet(corpus / "documents.parquet")
    queries = read_parquet(corpus / "queries.parquet")
    query_ids, positive_ids, negative_ids, labels = zip(*rows, strict=True)

    def texts(ids: Sequence[str], table: pa.Table, key: str) -> pa.ChunkedArray:
        return table["text"].take(pc.index_in(pa.array(ids), table[key].combine_chunks()))

    negatives = [[row[rank] for row in negative_ids] for rank in range(num_negatives)]
    columns = [query_ids, positive_ids, negative_ids, texts(query_ids, queries, "query_id")]
    columns += [texts(ids, documents, "document_id") for ids in (positive_ids, *negatives)]
    schema = mined_schema(num_negatives)
    return pa.table([*columns, labels], schema=schema)


def _groups(corpus: Path) -> dict[str, str]:
    table = read_parquet(corpus / "groups.parquet")
    return dict(zip(table["document_id"].to_pylist(), table["group"].to_pylist(), strict=True))


def write_sts(
    corpus: Path,
    splits: Splits,
    dense: Dense,
    teacher: Teacher,
    calibration: Calibration,
    sts: Sts,
    cache: Path,
    folder: Path,
) -> dict[str, Any]:
    """Write sts.parquet into `folder`: pairs of the graded split's queries, spread over the range of labels.

    Neighbours give the upper end of the range and random pairs the lower; the teacher grades both, and its
    calibrated label decides which pairs are kept.
    """
    queries = queries_of(corpus, splits.searched)
    graded_split = queries_of(corpus, [splits.split])
    rows = np.array([row for row, query_id in enumerate(queries) if query_id in graded_split])
    if len(rows) < 2:
        raise InputError(f"sts: split {splits.split!r} has {len(rows)} query; a pair needs two")
    texts = list(queries.values())
    pool = rows[_sts_pool(Embedder(dense, cache).queries(texts)[rows], sts)]
    scores = np.array(PairScorer(teacher, cache, texts, texts, symmetric=True)(pool, folder / "teacher.npy"))
    labels = calibration(scores)
    chosen = spread_over_bins(labels, sts.num_rows, np.random.default_rng(sts.seed))
    left, right = ([texts[query] for query in side] for side in pool[chosen].T)
    write_parquet(folder / "sts.parquet", pa.table([left, right, pa.array(labels[chosen])], schema=STS))
    (folder / "teacher.npy").unlink(missing_ok=True)
    return {"rows": len(chosen), "pairs_graded": len(pool), "rows_by_label_bin": count_by_bin(labels[chosen])}


def spread_over_bins(labels: np.ndarray, num_rows: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of `num_rows` labels in (0, 1), as evenly over ten equal bins as their numbers allow, in order.

    >>> spread_over_bins(np.array([0.01, 0.02, 0.03, 0.55, 0.99]), 3, np.random.default_rng(0))[1:].tolist()
    [3, 4]
    """
    order = rng.permutation(len(labels))
    # the first of every bin, then the second of every bin, ...: short bins simply run out
    bins = _bins(labels[order])
    turn = np.empty(len(labels), np.int64)
    for number in range(STS_BINS):
        members = np.flatnonzero(bins == number)
        turn[members] = np.arange(len(members))
    return np.sort(order[np.argsort(turn, kind="stable")[:num_rows]])


def count_by_bin(labels: np.ndarray) -> list[int]:
    """How many labels lie in each tenth of (0, 1)."""
    return np.bincount(_bins(labels), minlength=STS_BINS).tolist()


def _bins(labels: np.ndarray) -> np.ndarray:
    return np.minimum((labels * STS_BINS).astype(np.int64), STS_BINS - 1)


def _sts_pool(vectors: np.ndarray, sts: Sts) -> np.ndarray:
    """(n, 2) different pairs of positions: half of them neighbours, nearest first, half of them random."""
    rng = np.random.default_rng(sts.seed)
    count = len(vectors)
    hits = dense_top_k(vectors, vectors, min(STS_NEIGHBOURS + 1, count))["position"]
    wanted = STS_POOL * sts.num_rows // 2
    depth = min(hits.shape[1], 2 + wanted // count)
    near = np.stack([np.repeat(np.arange(count), depth), hits[:, :depth].ravel()], axis=1)
    far = rng.integers(count, size=(wanted, 2))
    pairs = np.sort(np.concatenate([near, far]), axis=1)
    return np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
