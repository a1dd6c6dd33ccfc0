"""candidates/ -> scores/: a teacher grades candidates and judged documents; its scores are calibrated to (0, 1).

The raw score is kept as it came. Work goes block by block (a row group of the candidates) and shard by shard (of
pairs), so memory does not grow with the number of queries.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

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
from dataset_builders.columns import positions_of
from dataset_builders.embeddings import warn_of_cut_texts
from dataset_builders.engines import Shards
from dataset_builders.fusion import FEW
from dataset_builders.hybrid import FOLDS, cross_fit, features, folds_of
from dataset_builders.schema import CANDIDATES, SCORES, check_rows
from dataset_builders.teachers import PAIRS, PairScorer, Teacher, as_teacher, teacher_name

# Of a cross-encoder: counts of the manifest, and the fields of its grades that are summed.
PAIR_COUNTS = {
    "tokens_needed": "tokens",
    "tokens_computed": "computed",
    "pairs_cut": "is_cut",
    "pairs_without_document": "has_no_document",
}
LENGTH_KEYS = {"model", "max_seq_length", "document_prompt"}  # that decide which documents are cut
MAX_OTHERS = 1_000_000  # other documents that calibration reads, at an even stride; it reads every positive


class Grades(NamedTuple):
    """A teacher's grades of all pairs, and what to tell of them."""

    # a block of graded pairs, and the place of its first among all -> (rows,) scores and labels
    of: Callable[[pa.Table, int], tuple[np.ndarray, np.ndarray]]
    calibration: dict[str, Any]
    counts: dict[str, int]
    warnings: list[str]


def write_scores(build: Build, folder: Path) -> dict[str, Any]:
    """Write scores.parquet into `folder`; returns counts, calibration and warnings for the manifest."""
    import pyarrow.compute as pc  # slow to import: --help needs none

    teacher, pairs = build.recipe.teacher, write_pairs(build, folder / "pairs.arrow")
    grade = {"hybrid": grade_by_features, "given": grade_as_given}.get(teacher.kind, grade_by_model)
    grades = grade(build, folder, pairs)
    facts = grades.calibration
    facts["positives_not_retrieved"] = (pc.sum(pairs["is_positive"]).as_py() or 0) - facts["positives"]
    counts = {"queries": 0, "graded": 0, "judged_not_retrieved": 0, "flat_rows": 0, "one_hot_rows": 0}
    with parquet_writer(folder / "scores.parquet", SCORES) as stream:
        for block in graded_blocks(build):
            start = counts["graded"]
            scores, labels = grades.of(block, start)
            block = block.append_column("teacher_score", pa.array(scores, pa.float32()))
            block = block.append_column("label", pa.array(labels, pa.float32()))
            stream.write(block.select(SCORES.names).cast(SCORES))
            starts = np.flatnonzero(np.diff(pairs["query"].slice(start, len(block)).to_numpy(), prepend=-1))
            counts["queries"] += len(starts)
            counts["graded"] += len(block)
            counts["judged_not_retrieved"] += block["rrf_rank"].null_count
            for name, count in count_flat_and_one_hot(labels, starts).items():
                counts[name] += count
    (folder / "pairs.arrow").unlink()
    counts |= grades.counts
    for warning in (found := warnings_of(counts, facts)):
        print(f"warning: teacher {teacher_name(teacher)}: {warning}", file=sys.stderr, flush=True)
    return {**counts, "calibration": facts, "warnings": [*grades.warnings, *found]}


def grade_by_model(build: Build, folder: Path, pairs: pa.Table) -> Grades:
    """A cross-encoder's or bi-encoder's scores, calibrated."""
    scorer = scorer_of(build, build.recipe.teacher)
    grades = scorer.grade(folder / "pairs.arrow", folder / "teacher.shards")
    calibration, facts = calibrate(*(_scores_at(grades, rows) for rows in rows_to_fit(pairs)))

    def of(block: pa.Table, start: int) -> tuple[np.ndarray, np.ndarray]:
        scores = grades.rows(start, start + len(block))["score"]
        return scores, calibration(scores)

    return Grades(of, facts, *_counts_of(build, scorer, grades))


def grade_as_given(build: Build, folder: Path, pairs: pa.Table) -> Grades:
    """The source's own scores, calibrated."""
    given = np.concatenate([block["given"].to_numpy() for block in graded_blocks(build)])
    calibration, facts = calibrate(*(given[rows] for rows in rows_to_fit(pairs)))

    def of(block: pa.Table, start: int) -> tuple[np.ndarray, np.ndarray]:
        scores = block["given"].to_numpy()
        return scores, calibration(scores)

    return Grades(of, facts, {}, [])


def grade_by_features(build: Build, folder: Path, pairs: pa.Table) -> Grades:
    """The hybrid's cross-fitted log odds; where FEW queries have a positive, the convex sum of candidates/ instead."""
    positives, others = rows_to_fit(pairs)
    check_both_sides(len(positives), len(others))
    if len(np.unique(pairs["query"].to_numpy()[positives])) <= FEW:
        return grade_by_convex_sum(build, positives, others)
    recipe = build.recipe
    named = [scorer_of(build, teacher) for teacher in recipe.teacher.teachers]
    grades = [
        scorer.grade(folder / "pairs.arrow", folder / f"teacher-{number}.shards")
        for number, scorer in enumerate([scorer_of(build, as_teacher(recipe.dense)), *named])
    ]
    counts, warnings = Counter(), []
    for scorer, graded in zip(named, grades[1:], strict=True):
        found, told = _counts_of(build, scorer, graded)
        counts.update(found)
        warnings += told

    def rows_of(block: pa.Table, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Features and folds."""
        table, stop = pl.from_arrow(block), start + len(block)
        scores = [graded.rows(start, stop)["score"] for graded in grades]
        depths = recipe.bm25.top_k, recipe.dense.top_k
        return features(table, scores, depths), folds_of(table["query_id"])

    fitted, start = np.sort(np.concatenate([positives, others])), 0
    parts: list[tuple[np.ndarray, ...]] = []
    for block in graded_blocks(build):
        here = fitted[(fitted >= start) & (fitted < start + len(block))] - start
        parts.append(tuple(column[here] for column in rows_of(block, start)))
        start += len(block)
    rows, folds = (np.concatenate(part) for part in zip(*parts, strict=True))
    is_positive = np.isin(fitted, positives)
    model, probability = cross_fit(rows, is_positive, folds), Calibration(1.0, 0.0)

    def of(block: pa.Table, start: int) -> tuple[np.ndarray, np.ndarray]:
        logits = model.logits(*rows_of(block, start))
        return logits, probability(logits)

    logits = model.logits(rows, folds)
    check_spread(logits, "scores of the hybrid teacher")
    facts = describe_labels(probability(logits), is_positive)
    facts = {"a": 1.0, "b": 0.0, **facts, "folds": FOLDS, "weights": model.weights(len(named))}
    return Grades(of, facts, dict(counts), warnings)


def grade_by_convex_sum(build: Build, positives: np.ndarray, others: np.ndarray) -> Grades:
    """The convex sum of candidates/, calibrated: a hybrid's stand-in. Models that it names are not asked."""

    def scores_of(block: pa.Table) -> np.ndarray:
        return block["convex_score"].fill_null(0.0).to_numpy()

    convex = np.concatenate([scores_of(block) for block in graded_blocks(build)])
    calibration, facts = calibrate(convex[positives], convex[others])
    weight = read_manifest(build.candidates)["bm25_weight"]
    warning = (
        f"{len(positives)} retrieved positives are too few to fit on: labels come from the convex sum of BM25 (weight "
        f"{weight}) and the dense model alone"
    )
    print(f"warning: hybrid teacher: {warning}", file=sys.stderr, flush=True)
    return Grades(lambda block, _: (scores_of(block), calibration(scores_of(block))), facts, {}, [warning])


def scorer_of(build: Build, teacher: Teacher) -> PairScorer:
    return PairScorer(teacher, build.cache, build.engine, list(build.queries.values()), build.documents)


def _counts_of(build: Build, scorer: PairScorer, grades: Shards) -> tuple[dict[str, int], list[str]]:
    """Cut texts and computed tokens of a model's grades, for the manifest; and a warning where most texts are cut."""
    teacher = scorer.teacher
    if teacher.kind == "cross_encoder":
        return {name: sum(int(grade[field].sum()) for grade in grades) for name, field in PAIR_COUNTS.items()}, []
    queries, documents = scorer.vectors
    counts = {"queries_cut": queries.count_cut, "documents_cut": documents.count_cut}
    reads_as_retriever = teacher.model_dump(include=LENGTH_KEYS) == build.recipe.dense.model_dump(include=LENGTH_KEYS)
    return counts, [] if reads_as_retriever else warn_of_cut_texts(documents, teacher)


def graded_blocks(build: Build) -> Iterator[pa.Table]:
    """CANDIDATES and is_positive of the split's queries, block by block: those retrieved by rank, and below them,
    with null ranks, the judged documents (also those judged not relevant) that no retriever returned.

    Documents that an evaluation task asks about, and that stay for another split's sake, are left out.
    Of teacher `given`: what the source has a score for (`given`), found or not, and nothing else.
    A query's rows are together, queries in order of their ids. Raises InputError when there is nothing to grade.
    """
    import pyarrow.compute as pc  # slow to import: --help needs none

    split = build.splits.split
    split_queries = pa.array(list(build.queries_of(split)), pa.string())
    judged = read_parquet(build.corpus / "qrels.parquet")
    judged = judged.filter((pc.field("split") == split) & pc.field("query_id").isin(split_queries))
    judged = judged.append_column("is_positive", pc.greater(judged["score"], 0)).drop_columns(["score", "split"])
    asked_about, join_type = _asked_about(build.corpus), "full outer"
    if build.recipe.teacher.kind == "given":
        given = _read_given(build.corpus)
        given = given.filter(pc.is_in(given["query_id"], split_queries))
        given = given.filter(pc.invert(pc.is_in(given["document_id"], asked_about)))
        judged, join_type = given.join(judged, ["query_id", "document_id"]), "right outer"
        judged = judged.select(["query_id", "document_id", "is_positive", "given"])
    path = build.candidates / "candidates.parquet"
    # after the last block, the queries for which nothing at all was retrieved
    for retrieved in chain(filter(len, row_groups(path, CANDIDATES.names)), [CANDIDATES.empty_table()]):
        here = judged
        if len(retrieved):
            is_here = pc.less_equal(judged["query_id"], retrieved["query_id"][-1])
            here, judged = judged.filter(is_here), judged.filter(pc.invert(is_here))
        retrieved = retrieved.filter(pc.is_in(retrieved["query_id"], split_queries))
        retrieved = retrieved.filter(pc.invert(pc.is_in(retrieved["document_id"], asked_about)))
        block = retrieved.join(here, ["query_id", "document_id"], join_type=join_type)
        if len(block):
            block = block.set_column(len(CANDIDATES), "is_positive", block["is_positive"].fill_null(False))
            yield block.sort_by([(name, "ascending") for name in ("query_id", "rrf_rank", "document_id")])


def _read_given(corpus: Path) -> pa.Table:
    path = corpus / "given.parquet"
    if not path.exists():
        raise InputError(
            "teacher.kind 'given': the source has no scores; see docs/your-data.md, or name another teacher"
        )
    return read_parquet(path)


def _asked_about(corpus: Path) -> pa.Array:
    """Ids of the documents in the corpus that match what an evaluation task asks about."""
    import pyarrow.compute as pc  # slow to import: --help needs none

    log = corpus / "contamination.parquet"
    if not log.exists():
        return pa.array([], pa.string())
    rows = read_parquet(log, ["side", "id", "dropped"])
    return rows.filter((pc.field("side") == "document") & ~pc.field("dropped"))["id"].combine_chunks()


def write_pairs(build: Build, path: Path) -> pa.Table:
    """The pairs of all graded blocks (PAIRS), written to `path` and memory-mapped."""
    query_ids = pa.chunked_array([list(build.queries)], pa.string())

    def batches() -> Iterator[pa.RecordBatch]:
        for block in graded_blocks(build):
            asked, found = (
                positions_of(block[name].combine_chunks(), known, "graded candidates").astype(np.int32)
                for name, known in (("query_id", query_ids), ("document_id", build.document_ids))
            )
            is_positive = positives_and_their_class(block, build.corpus)
            # given scores are of somebody's candidates, whether or not they are ours
            is_retrieved = block["given" if "given" in block.column_names else "rrf_rank"].is_valid()
            yield pa.record_batch([asked, found, is_positive, is_retrieved.combine_chunks()], schema=PAIRS)

    write_arrow(path, batches(), PAIRS)
    pairs = read_arrow(path)
    check_rows(pairs, f"{build.candidates}: nothing to grade for split {build.splits.split!r}")
    return pairs


def positives_and_their_class(block: pa.Table, corpus: Path) -> np.ndarray:
    """(rows,) bool: labelled positives of a query, and documents of the class of one (see schema.CLASSES)."""
    path, rows = corpus / "classes.parquet", pl.from_arrow(block.select(["query_id", "document_id", "is_positive"]))
    if not path.exists():
        return rows["is_positive"].to_numpy()
    with_class = rows.join(pl.read_parquet(path), on="document_id")
    of_positives = with_class.filter("is_positive").select("query_id", "class")
    same = with_class.join(of_positives, on=["query_id", "class"], how="semi")
    same = same.select("query_id", "document_id", same_class=True).unique()
    joined = rows.join(same, on=["query_id", "document_id"], how="left", maintain_order="left")
    return joined.select(pl.col("is_positive") | pl.col("same_class").fill_null(False))["is_positive"].to_numpy()


def rows_to_fit(pairs: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Places of all retrieved positives, and of at most MAX_OTHERS other candidates at an even stride.

    Positives that no retriever found are left out: others are here only if one found them, so like would be compared
    with unlike, and where retrieval finds few of many positives, a good teacher would seem to turn labels round.
    """
    is_positive, is_retrieved = (pairs[name].to_numpy() for name in ("is_positive", "is_retrieved"))
    others = np.flatnonzero(is_retrieved & ~is_positive)
    return np.flatnonzero(is_retrieved & is_positive), others[:: max(-(-len(others) // MAX_OTHERS), 1)]


def _scores_at(grades: Shards, rows: np.ndarray) -> np.ndarray:
    """The scores of sorted `rows`."""
    bounds = pairwise(np.searchsorted(rows, grades.starts).tolist())
    parts = zip(grades, grades.starts, bounds, strict=False)
    return np.concatenate([grade["score"][rows[low:high] - start] for grade, start, (low, high) in parts])
