"""candidates/ -> scores/: a teacher grades candidates and judged documents; its scores are calibrated to (0, 1).

The raw score is kept as it came. What is to be graded is put into a file, block by block (a row group of the
candidates), and mapped into memory, which does not grow with the number of queries.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from common.cli import InputError
from common.steps import parquet_writer, read_arrow, read_manifest, read_parquet, row_groups, write_arrow
from dataset_builders.build_record import Build
from dataset_builders.calibration import (
    Calibration,
    calibrate,
    check_both_sides,
    check_spread,
    count_flat_and_one_hot,
    describe_labels,
    warnings_of,
)
from dataset_builders.columns import positions_of, take
from dataset_builders.embeddings import warn_of_cut_texts
from dataset_builders.engines import Shards
from dataset_builders.fusion import FEW
from dataset_builders.hybrid import FOLDS, cross_fit, features, folds_of
from dataset_builders.mine import read_classes, share_with_a_positive
from dataset_builders.schema import CANDIDATES, SCORES, check_rows
from dataset_builders.teachers import PAIRS, PairScorer, Teacher, as_teacher, teacher_name

PAIR = ["query_id", "document_id"]
# What is graded. is_relevant: a positive, or of the class of one; is_retrieved: calibration may read it.
GRADED = [*PAIRS, ("is_relevant", pa.bool_()), ("is_retrieved", pa.bool_())]
GRADED = pa.schema([*GRADED, *CANDIDATES, ("is_positive", pa.bool_()), ("given", pa.float32())])
# Of a cross-encoder: counts of the manifest, and the fields of its grades that are summed.
PAIR_COUNTS = {
    "tokens_needed": "tokens",
    "tokens_computed": "computed",
    "pairs_cut": "is_cut",
    "pairs_without_document": "has_no_document",
}
LENGTH_KEYS = {"model", "max_seq_length", "document_prompt"}  # that decide which documents are cut
MAX_OTHERS = 1_000_000  # other documents that calibration reads, at an even stride; it reads every positive


@dataclass(frozen=True)
class Grades:
    """A teacher's grades of all rows of GRADED, and what to tell of them."""

    scores_of: Callable[[pa.RecordBatch, int], np.ndarray]  # of a block, and the place of its first row
    calibration: Calibration
    facts: dict[str, Any]  # of the calibration
    counts: dict[str, int] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def write_scores(build: Build, folder: Path) -> dict[str, Any]:
    """Write scores.parquet into `folder`; returns counts, calibration and warnings for the manifest."""
    import pyarrow.compute as pc  # slow to import: --help needs none

    teacher, graded = build.recipe.teacher, write_graded(build, folder / "graded.arrow")
    grade = {"hybrid": grade_by_features, "given": grade_as_given, "retriever": grade_by_ranking}
    grades = grade.get(teacher.kind, grade_by_model)(build, folder, graded)
    facts = grades.facts
    facts["positives_not_retrieved"] = pc.sum(graded["is_relevant"]).as_py() - facts["positives"]
    counts = Counter(dict.fromkeys(("queries", "graded", "judged_not_retrieved", "flat_rows", "one_hot_rows"), 0))
    with parquet_writer(folder / "scores.parquet", SCORES) as stream:
        for start, block in blocks_of(graded):
            scores = grades.scores_of(block, start)
            labels = grades.calibration(scores)
            columns = {name: block[name] for name in (*CANDIDATES.names, "is_positive")}
            table = pa.table(columns | {"teacher_score": scores, "label": labels})
            stream.write(table.select(SCORES.names).cast(SCORES))
            starts = np.flatnonzero(np.diff(block["query"], prepend=-1))
            counts.update(queries=len(starts), graded=len(block), judged_not_retrieved=block["rrf_rank"].null_count)
            counts.update(count_flat_and_one_hot(labels, starts))
    (folder / "graded.arrow").unlink()
    counts.update(grades.counts)
    for warning in (found := warnings_of(counts, facts)):
        print(f"warning: teacher {teacher_name(teacher)}: {warning}", file=sys.stderr, flush=True)
    return {**counts, "calibration": facts, "warnings": [*grades.warnings, *found]}


# ---- what is graded ------------------------------------------------------------------------------------------------


def write_graded(build: Build, path: Path) -> pa.Table:
    """Rows of GRADED, written to `path` and memory-mapped; each of its batches is a block."""
    query_ids, classes = pa.chunked_array([list(build.queries)], pa.string()), read_classes(build.corpus)

    def batches() -> Iterator[pa.RecordBatch]:
        for block in graded_blocks(build):
            places = {
                name: positions_of(block[f"{name}_id"].to_arrow().cast(pa.string()), known, "graded candidates")
                for name, known in (("query", query_ids), ("document", build.document_ids))
            }
            # given scores are of somebody's candidates, whether or not they are ours
            is_retrieved = pl.any_horizontal(pl.col("given", "rrf_rank").is_not_null())
            is_relevant = pl.col("is_positive") | share_with_a_positive(block, classes)
            block = block.with_columns(**{name: pl.Series(at) for name, at in places.items()})
            block = block.with_columns(is_relevant=is_relevant, is_retrieved=is_retrieved)
            yield from block.select(GRADED.names).to_arrow().cast(GRADED).combine_chunks().to_batches()

    write_arrow(path, batches(), GRADED)
    graded = read_arrow(path)
    check_rows(graded, f"{build.candidates}: nothing to grade for split {build.splits.split!r}")
    return graded


def graded_blocks(build: Build) -> Iterator[pl.DataFrame]:
    """CANDIDATES, is_positive and given of the split's queries, block by block: those retrieved by rank, and below
    them, with null ranks, the judged documents (also those judged not relevant) that no retriever returned.

    Documents that an evaluation task asks about, and that stay for another split's sake, are left out.
    Of teacher `given`: what the source has a score for, found or not, and nothing else.
    A query's rows are together, queries in order of their ids.
    """
    asked = pl.Series([*build.queries_of(build.splits.split)], dtype=pl.String).implode()
    wanted = pl.col("query_id").is_in(asked) & ~pl.col("document_id").is_in(_asked_about(build.corpus).implode())
    qrels = pl.from_arrow(read_parquet(build.corpus / "qrels.parquet")).filter(split=build.splits.split)
    judged = qrels.select(*PAIR, is_positive=pl.col("score") > 0, given=pl.lit(None, pl.Float32))
    judged = judged.filter(pl.col("query_id").is_in(asked))
    scored = scan_given(build.corpus) if build.recipe.teacher.kind == "given" else None
    last = ""
    # after the last block, the queries for which nothing at all was retrieved
    for table in chain(filter(len, row_groups(build.candidates / "candidates.parquet", CANDIDATES.names)), [None]):
        retrieved = pl.from_arrow(CANDIDATES.empty_table() if table is None else table)
        here = pl.col("query_id") > last
        if len(retrieved):
            last = retrieved["query_id"].last()
            here &= pl.col("query_id") <= last
        rows = judged.filter(here)
        if scored is not None:
            rows = scored.filter(here).filter(wanted).collect().join(rows.drop("given"), on=PAIR, how="left")
            rows = rows.select(*PAIR, "is_positive", "given")
        how = "full" if scored is None else "right"
        block = retrieved.filter(wanted).join(rows, on=PAIR, how=how, coalesce=True)
        if len(block):
            block = block.with_columns(pl.col("is_positive").fill_null(False))
            yield block.sort("query_id", "rrf_rank", "document_id", nulls_last=True)


def scan_given(corpus: Path) -> pl.LazyFrame:
    """GIVEN of a finished corpus. Raises InputError where the source has no scores."""
    path = corpus / "given.parquet"
    if not path.exists():
        raise InputError(
            "teacher.kind 'given': the source has no scores; see docs/your-data.md, or name another teacher"
        )
    return pl.scan_parquet(path, glob=False)


def _asked_about(corpus: Path) -> pl.Series:
    """Ids of the documents in the corpus that match what an evaluation task asks about."""
    log = corpus / "contamination.parquet"
    if not log.exists():
        return pl.Series([], dtype=pl.String)
    return pl.read_parquet(log, glob=False).filter(~pl.col("dropped"), side="document")["id"]


def blocks_of(graded: pa.Table) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The place of a block's first row, and the block."""
    blocks = graded.to_batches()
    return zip(np.cumsum([0, *map(len, blocks)]).tolist(), blocks, strict=False)


def rows_to_fit(graded: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Places of all retrieved positives, and of at most MAX_OTHERS other candidates at an even stride.

    Positives that no retriever found are left out: others are here only if one found them, so like would be compared
    with unlike, and where retrieval finds few of many positives, a good teacher would seem to turn labels round.
    """
    import pyarrow.compute as pc  # slow to import: --help needs none

    count = pc.sum(pc.and_not(graded["is_retrieved"], graded["is_relevant"])).as_py()
    stride, seen = max(-(-count // MAX_OTHERS), 1), 0
    positives, others = [], []
    for start, block in blocks_of(graded):
        retrieved, relevant = (np.array(block[name]) for name in ("is_retrieved", "is_relevant"))
        positives.append(start + np.flatnonzero(retrieved & relevant))
        other = start + np.flatnonzero(retrieved & ~relevant)
        others.append(other[-seen % stride :: stride])
        seen += len(other)
    return np.concatenate(positives), np.concatenate(others)


# ---- teachers ------------------------------------------------------------------------------------------------------


def grade_by_model(build: Build, folder: Path, graded: pa.Table) -> Grades:
    """A cross-encoder's or bi-encoder's scores, calibrated."""
    scorer = scorer_of(build, build.recipe.teacher)
    shards = scorer.grade(folder / "graded.arrow", folder / "teacher.shards")
    calibration, facts = calibrate(*(_scores_at(shards, rows) for rows in rows_to_fit(graded)))
    return Grades(
        lambda block, start: _scores(shards, block, start), calibration, facts, *_told_of(build, scorer, shards)
    )


def grade_as_given(build: Build, folder: Path, graded: pa.Table) -> Grades:
    """The source's own scores, calibrated."""
    return _grade_by_column("given", graded, *rows_to_fit(graded))


def grade_by_ranking(build: Build, folder: Path, graded: pa.Table) -> Grades:
    """The scores of one ranking, calibrated."""
    return _grade_by_column(f"{build.recipe.teacher.by}_score", graded, *rows_to_fit(graded))


def _grade_by_column(name: str, graded: pa.Table, *fitted: np.ndarray) -> Grades:
    """A column of GRADED, calibrated on `fitted` rows: positives and others. Null is 0: no retriever found it."""
    calibration, facts = calibrate(*(take(graded[name], rows).fill_null(0.0).to_numpy() for rows in fitted))
    return Grades(lambda block, _: block[name].fill_null(0.0).to_numpy(), calibration, facts)


def grade_by_features(build: Build, folder: Path, graded: pa.Table) -> Grades:
    """The hybrid's cross-fitted log odds.

    Where FEW queries have a positive, the convex sum of candidates/ instead; models that it names are not asked then.
    """
    recipe, (positives, others) = build.recipe, rows_to_fit(graded)
    check_both_sides(len(positives), len(others))
    if len(np.unique(take(graded["query"], positives))) <= FEW:
        weight = read_manifest(build.candidates)["bm25_weight"]
        warning = (
            f"{len(positives)} retrieved positives are too few to fit on: labels come from the convex sum of BM25 "
            f"(weight {weight}) and the dense model alone"
        )
        print(f"warning: hybrid teacher: {warning}", file=sys.stderr, flush=True)
        return replace(_grade_by_column("convex_score", graded, positives, others), warnings=[warning])
    scorers = [scorer_of(build, teacher) for teacher in (as_teacher(recipe.dense), *recipe.teacher.teachers)]
    shards = [
        scorer.grade(folder / "graded.arrow", folder / f"teacher-{number}.shards")
        for number, scorer in enumerate(scorers)
    ]
    counts, warnings = Counter(), []
    for scorer, found in list(zip(scorers, shards, strict=True))[1:]:
        more, told = _told_of(build, scorer, found)
        counts.update(more)
        warnings += told

    def rows_of(block: pa.RecordBatch, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Features and folds."""
        table, depths = pl.from_arrow(block), (recipe.bm25.top_k, recipe.dense.top_k)
        return features(table, [_scores(found, block, start) for found in shards], depths), folds_of(table["query_id"])

    fitted = np.sort(np.concatenate([positives, others]))
    parts: list[tuple[np.ndarray, ...]] = []
    for start, block in blocks_of(graded):
        here = fitted[slice(*np.searchsorted(fitted, [start, start + len(block)]))] - start
        parts.append(tuple(column[here] for column in rows_of(block, start)))
    rows, folds = (np.concatenate(part) for part in zip(*parts, strict=True))
    is_positive = np.isin(fitted, positives)
    model, probability = cross_fit(rows, is_positive, folds), Calibration(1.0, 0.0)
    logits = model.logits(rows, folds)
    check_spread(logits, "scores of the hybrid teacher")
    facts = describe_labels(probability(logits), is_positive)
    facts = {"a": 1.0, "b": 0.0, **facts, "folds": FOLDS, "weights": model.weights(len(recipe.teacher.teachers))}
    return Grades(lambda block, start: model.logits(*rows_of(block, start)), probability, facts, counts, warnings)


def scorer_of(build: Build, teacher: Teacher) -> PairScorer:
    return PairScorer(teacher, build.cache, build.engine, list(build.queries.values()), build.documents)


def _told_of(build: Build, scorer: PairScorer, shards: Shards) -> tuple[dict[str, int], list[str]]:
    """Cut texts and computed tokens of a model's grades, for the manifest; and a warning where most texts are cut."""
    teacher = scorer.teacher
    if teacher.kind == "cross_encoder":
        return {name: sum(int(shard[field].sum()) for shard in shards) for name, field in PAIR_COUNTS.items()}, []
    queries, documents = scorer.vectors
    counts = {"queries_cut": queries.count_cut, "documents_cut": documents.count_cut}
    reads_as_retriever = teacher.model_dump(include=LENGTH_KEYS) == build.recipe.dense.model_dump(include=LENGTH_KEYS)
    return counts, [] if reads_as_retriever else warn_of_cut_texts(documents, teacher)


def _scores(shards: Shards, block: pa.RecordBatch, start: int) -> np.ndarray:
    return shards.rows(start, start + len(block))["score"]


def _scores_at(shards: Shards, rows: np.ndarray) -> np.ndarray:
    """The scores of sorted `rows`."""
    bounds = pairwise(np.searchsorted(rows, shards.starts).tolist())
    parts = zip(shards, shards.starts, bounds, strict=False)
    return np.concatenate([shard["score"][rows[low:high] - start] for shard, start, (low, high) in parts])
