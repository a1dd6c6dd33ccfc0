"""candidates/ -> scores/: a teacher grades candidates and judged documents; its scores are calibrated to (0, 1).

The raw score is kept as it came. Work goes block by block (a row group of the candidates) and shard by shard (of
pairs), so memory does not grow with the number of queries.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from common.steps import parquet_writer, read_arrow, read_parquet, row_groups, write_arrow
from dataset_builders.build_record import Build
from dataset_builders.calibration import calibrate, count_flat_and_one_hot, warnings_of
from dataset_builders.columns import positions_of
from dataset_builders.embeddings import warn_of_cut_texts
from dataset_builders.engines import Shards
from dataset_builders.schema import CANDIDATES, SCORES, check_rows
from dataset_builders.teachers import PAIRS, PairScorer

# Of a cross-encoder: counts of the manifest, and the fields of its grades that are summed.
PAIR_COUNTS = {
    "tokens_needed": "tokens",
    "tokens_computed": "computed",
    "pairs_cut": "is_cut",
    "pairs_without_document": "has_no_document",
}
LENGTH_KEYS = {"model", "max_seq_length", "document_prompt"}  # that decide which documents are cut
MAX_OTHERS = 1_000_000  # other documents that calibration reads, at an even stride; it reads every positive


def write_scores(build: Build, folder: Path) -> dict[str, Any]:
    """Write scores.parquet into `folder`; returns counts, calibration and warnings for the manifest."""
    teacher = build.recipe.teacher
    scorer, pairs = pairs_to_grade(build, folder / "pairs.arrow")
    grades = scorer.grade(folder / "pairs.arrow", folder / "teacher.shards")
    calibration, facts = calibrate(*_positives_and_others(pairs, grades))
    facts["positives_not_retrieved"] = (pc.sum(pairs["is_positive"]).as_py() or 0) - facts["positives"]
    counts = {"queries": 0, "graded": 0, "judged_not_retrieved": 0, "flat_rows": 0, "one_hot_rows": 0}
    with parquet_writer(folder / "scores.parquet", SCORES) as stream:
        for block in graded_blocks(build):
            start = counts["graded"]
            scores = grades.rows(start, start + len(block))["score"]
            labels = calibration(scores)
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
    if teacher.kind == "cross_encoder":
        counts |= {name: sum(int(grade[field].sum()) for grade in grades) for name, field in PAIR_COUNTS.items()}
        warnings = []
    else:
        queries, documents = scorer.vectors
        counts |= {"queries_cut": queries.count_cut, "documents_cut": documents.count_cut}
        reads_as_retriever = teacher.model_dump(include=LENGTH_KEYS) == build.recipe.dense.model_dump(
            include=LENGTH_KEYS
        )
        warnings = [] if reads_as_retriever else warn_of_cut_texts(documents, teacher)
    for warning in (found := warnings_of(counts, facts)):
        print(f"warning: teacher {teacher.model}: {warning}", file=sys.stderr, flush=True)
    return {**counts, "calibration": facts, "warnings": [*warnings, *found]}


def graded_blocks(build: Build) -> Iterator[pa.Table]:
    """CANDIDATES and is_positive of the split's queries, block by block: those retrieved by rank, and below them,
    with null ranks, the judged documents (also those judged not relevant) that no retriever returned.

    Documents that an evaluation task asks about, and that stay for another split's sake, are left out.
    A query's rows are together, queries in order of their ids. Raises InputError when there is nothing to grade.
    """
    split = build.splits.split
    split_queries = pa.array(list(build.queries_of(split)), pa.string())
    judged = read_parquet(build.corpus / "qrels.parquet")
    judged = judged.filter((pc.field("split") == split) & pc.field("query_id").isin(split_queries))
    judged = judged.append_column("is_positive", pc.greater(judged["score"], 0)).drop_columns(["score", "split"])
    asked_about = _asked_about(build.corpus)
    path = build.candidates / "candidates.parquet"
    # after the last block, the queries for which nothing at all was retrieved
    for retrieved in chain(filter(len, row_groups(path, CANDIDATES.names)), [CANDIDATES.empty_table()]):
        here = judged
        if len(retrieved):
            is_here = pc.less_equal(judged["query_id"], retrieved["query_id"][-1])
            here, judged = judged.filter(is_here), judged.filter(pc.invert(is_here))
        retrieved = retrieved.filter(pc.is_in(retrieved["query_id"], split_queries))
        retrieved = retrieved.filter(pc.invert(pc.is_in(retrieved["document_id"], asked_about)))
        block = retrieved.join(here, ["query_id", "document_id"], join_type="full outer")
        if len(block):
            block = block.set_column(len(CANDIDATES), "is_positive", block["is_positive"].fill_null(False))
            yield block.sort_by([(name, "ascending") for name in ("query_id", "rrf_rank", "document_id")])


def _asked_about(corpus: Path) -> pa.Array:
    """Ids of the documents in the corpus that match what an evaluation task asks about."""
    log = corpus / "contamination.parquet"
    if not log.exists():
        return pa.array([], pa.string())
    rows = read_parquet(log, ["side", "id", "dropped"])
    return rows.filter((pc.field("side") == "document") & ~pc.field("dropped"))["id"].combine_chunks()


def pairs_to_grade(build: Build, path: Path) -> tuple[PairScorer, pa.Table]:
    """The scorer, and the pairs of all graded blocks (PAIRS), written to `path` and memory-mapped."""
    query_ids = pa.chunked_array([list(build.queries)], pa.string())

    def batches() -> Iterator[pa.RecordBatch]:
        for block in graded_blocks(build):
            asked, found = (
                positions_of(block[name].combine_chunks(), known, "graded candidates").astype(np.int32)
                for name, known in (("query_id", query_ids), ("document_id", build.document_ids))
            )
            is_positive, is_retrieved = positives_and_their_class(block, build.corpus), block["rrf_rank"].is_valid()
            yield pa.record_batch([asked, found, is_positive, is_retrieved.combine_chunks()], schema=PAIRS)

    write_arrow(path, batches(), PAIRS)
    pairs = read_arrow(path)
    check_rows(pairs, f"{build.candidates}: nothing to grade for split {build.splits.split!r}")
    queries = list(build.queries.values())
    return PairScorer(build.recipe.teacher, build.cache, build.engine, queries, build.documents), pairs


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


def _positives_and_others(pairs: pa.Table, grades: Shards) -> tuple[np.ndarray, np.ndarray]:
    """Scores of all retrieved positives, and of at most MAX_OTHERS other candidates at an even stride.

    Positives that no retriever found are left out: others are here only if one found them, so like would be compared
    with unlike, and where retrieval finds few of many positives, a good teacher would seem to turn labels round.
    """
    others_in_all = pc.sum(pc.and_not(pairs["is_retrieved"], pairs["is_positive"])).as_py() or 0
    stride = max(math.ceil(others_in_all / MAX_OTHERS), 1)
    positives, others, seen = [], [], 0
    for grade, start in zip(grades, grades.starts, strict=False):
        part = pairs.slice(start, len(grade))
        is_positive, is_retrieved = (part[name].to_numpy() for name in ("is_positive", "is_retrieved"))
        rest = grade["score"][is_retrieved & ~is_positive]
        positives.append(grade["score"][is_retrieved & is_positive])
        others.append(rest[-seen % stride :: stride])
        seen += len(rest)
    return np.concatenate(positives), np.concatenate(others)
