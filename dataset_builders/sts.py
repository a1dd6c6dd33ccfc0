"""sts/: sentence pairs with a score in (0, 1), published ones or a build's own queries graded by its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import Field

from common.cli import InputError
from common.recipes import Section
from common.steps import row_groups, write_parquet
from dataset_builders.calibration import Calibration, calibrate
from dataset_builders.decontamination import clean_pairs, read_probes
from dataset_builders.dense import dense_top_k
from dataset_builders.embeddings import Vectors
from dataset_builders.mine import read_classes, share_with_a_positive
from dataset_builders.schema import STS, check_rows
from dataset_builders.sources import read_sts
from dataset_builders.teachers import PairScorer, Teacher, as_teacher

if TYPE_CHECKING:
    from dataset_builders.build_record import Build
    from dataset_builders.data_recipe import StsRecipe

BINS = 10  # equal-width bins of the label
NEIGHBOURS = 64  # nearest queries that a query may be paired with
POOL = 10  # pairs graded for each pair wanted


class Sts(Section):
    num_rows: int = Field(8000, ge=1)  # graded pairs to make
    seed: int = Field(0, ge=0)  # of their draw


def write_pairs(recipe: StsRecipe, folder: Path) -> dict[str, Any]:
    """Write sts.parquet into `folder`: the source's pairs, decontaminated if the recipe says so."""
    table = read_sts(recipe.source, recipe.data_root)
    counts: dict[str, Any] = {"pairs_seen": len(table)}
    if recipe.decontamination:
        probes = read_probes(recipe.decontamination, recipe.data_root)
        table, log, counts["contamination"] = clean_pairs(table, probes)
        write_parquet(folder / "contamination.parquet", log)
    check_rows(table, f"{recipe.source.kind} source: after decontamination")
    write_parquet(folder / "sts.parquet", table)
    return {**counts, "rows": len(table), "rows_by_label_bin": count_by_bin(table["label"].to_numpy())}


def write_sts(build: Build, folder: Path) -> dict[str, Any]:
    """Write sts.parquet into `folder`: pairs of the graded split's queries, spread over the range of labels.

    Neighbours give the upper end of the range and random pairs the lower; the teacher grades both, and its
    calibrated label decides which pairs are kept.
    """
    sts, split = build.recipe.sts, build.splits.split
    in_split = build.queries_of(split)
    rows = np.array([row for row, query_id in enumerate(build.queries) if query_id in in_split])
    if len(rows) < 2:
        raise InputError(f"sts: split {split!r} has {len(rows)} query; a pair needs two")
    texts = list(build.queries.values())
    pool = rows[pairs_to_grade(_Selected(build.query_vectors, rows), sts)]
    teacher, calibration = teacher_of_pairs(build)
    scores = PairScorer(teacher, build.cache, build.engine, texts, texts, symmetric=True).scores(pool, folder)
    labels = calibration(scores)
    chosen = spread_over_bins(labels, sts.num_rows, np.random.default_rng(sts.seed))
    left, right = ([texts[query] for query in side] for side in pool[chosen].T)
    write_parquet(folder / "sts.parquet", pa.table([left, right, pa.array(labels[chosen])], schema=STS))
    return {"rows": len(chosen), "pairs_graded": len(pool), "rows_by_label_bin": count_by_bin(labels[chosen])}


def teacher_of_pairs(build: Build) -> tuple[Teacher, Calibration]:
    """What grades two queries: the teacher; for one that grades documents alone, the dense model, calibrated as
    teachers are: what is in the class of a positive is no other document.
    """
    if isinstance(build.recipe.teacher, Teacher):
        return build.recipe.teacher, Calibration(build.calibration["a"], build.calibration["b"])
    classes, found = read_classes(build.corpus), []
    for table in row_groups(
        build.scores / "scores.parquet", ["query_id", "document_id", "dense_score", "is_positive"]
    ):
        block = pl.from_arrow(table)
        is_relevant = pl.col("is_positive") | share_with_a_positive(block, classes)
        found.append(block.select("dense_score", is_relevant=is_relevant).drop_nulls("dense_score"))
    scores, is_relevant = (column.to_numpy() for column in pl.concat(found))
    return as_teacher(build.recipe.dense), calibrate(scores[is_relevant], scores[~is_relevant])[0]


@dataclass(frozen=True)
class _Selected:
    """Some rows of vectors on disk, read on demand."""

    vectors: Vectors
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return self.vectors[self.rows[rows]]


def pairs_to_grade(vectors: np.ndarray | _Selected, sts: Sts) -> np.ndarray:
    """(n, 2) different pairs of positions: half of them neighbours, nearest first, half of them random."""
    rng = np.random.default_rng(sts.seed)
    count, wanted = len(vectors), POOL * sts.num_rows // 2
    far = rng.integers(count, size=(wanted, 2))
    # of more queries than pairs are wanted, a sample with one neighbour each: every query would be compared with all
    anchors = np.arange(count) if count <= wanted else np.sort(rng.choice(count, wanted, replace=False))
    depth = min(NEIGHBOURS + 1, count, 2 + wanted // len(anchors))
    nearest, _ = dense_top_k(vectors[anchors], vectors, depth)
    near = np.stack([np.repeat(anchors, depth), nearest.ravel()], axis=1)
    pairs = np.sort(np.concatenate([near, far]), axis=1)
    return np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)


def spread_over_bins(labels: np.ndarray, num_rows: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of `num_rows` labels in (0, 1), as evenly over ten equal bins as their numbers allow, in order.

    >>> spread_over_bins(np.array([0.01, 0.02, 0.03, 0.55, 0.99]), 3, np.random.default_rng(0))[1:].tolist()
    [3, 4]
    """
    order = rng.permutation(len(labels))
    bins = _bins(labels[order])
    # the first of every bin, then the second of every bin, ...: bins with few labels run out early
    turn = pl.DataFrame({"bin": bins}).select(pl.int_range(pl.len()).over("bin")).to_series()
    return np.sort(order[np.argsort(turn, kind="stable")[:num_rows]])


def count_by_bin(labels: np.ndarray) -> list[int]:
    """How many labels lie in each tenth of (0, 1)."""
    return np.bincount(_bins(labels), minlength=BINS).tolist()


def _bins(labels: np.ndarray) -> np.ndarray:
    return np.minimum((labels * BINS).astype(np.int64), BINS - 1)
