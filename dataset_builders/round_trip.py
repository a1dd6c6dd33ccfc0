"""generated/ -> queries with a document: those that find it again, as Promptagator's round trip keeps them.

The recipe's BM25 and dense model search all documents for every query, and the hybrid teacher (hybrid.py, without
further models) ranks what they find: the document that a query was written for is its labelled positive, and no query
grades itself. A query whose document comes later than `keep_within`, or is not found, goes: the model made it up, or
asked what many documents answer.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from common.cli import InputError
from common.pages import Row, evenly, write_page
from common.steps import GENERATED, folder_step, read_parquet, write_parquet
from dataset_builders.build_record import Build
from dataset_builders.candidates import write_candidates
from dataset_builders.corpus import write_corpus
from dataset_builders.generate import OUTPUTS, read_queries
from dataset_builders.holdout import deal_by
from dataset_builders.near_duplicates import normalised, stable_hash
from dataset_builders.readers import Rows, part_texts
from dataset_builders.scores import blocks_of, grade_by_features, write_graded
from dataset_builders.sources import Splits, open_tables
from dataset_builders.teachers import Hybrid

FOUND = ["query_id", "document_id"]
NOT_FOUND, TOO_LOW = "document not found", "document ranked too low"


def read_generated(build: Build, folder: Path) -> tuple[Rows, dict[str, Any]]:
    """Documents, the queries that stay and their judgements; counts for the manifest.

    generated.parquet and generated.html in `folder` show every line that the model wrote, and why it went. Raises
    InputError when no query stays.
    """
    section = build.recipe.source.queries
    tables = open_tables(build.recipe.source, build.recipe.data_root)
    documents = part_texts(tables, tables.train, "document_id")
    outputs = pl.from_arrow(read_parquet(build.folder / GENERATED / "outputs.parquet", OUTPUTS.names))
    outputs = outputs.join(documents, on="document_id", how="left", maintain_order="left")
    lines = [
        (document_id, query, reason)
        for document_id, output, text in outputs.iter_rows()
        for query, reason in read_queries(output, text, section)
    ]
    schema = {"document_id": pl.String, "query": pl.String, "reason": pl.String}
    table = pl.DataFrame(lines, schema, orient="row")
    asked = [f"q{stable_hash(normalised(query)):016x}" for query in table["query"]]
    table = table.with_columns(query_id=pl.Series(asked, dtype=pl.String))
    good = table.filter(pl.col("reason").is_null())
    ranks = round_trip(build, documents, good, folder / "trial") if len(good) else good.select(*FOUND, rank=None)
    table = table.join(ranks, on=FOUND, how="left", maintain_order="left")
    rank = pl.when(pl.col("reason").is_null()).then(pl.col("rank").cast(pl.UInt32))
    why = pl.when(rank.is_null()).then(pl.lit(NOT_FOUND)).when(rank > section.keep_within).then(pl.lit(TOO_LOW))
    table = table.with_columns(rank=rank, reason=pl.coalesce("reason", why))
    kept = table.filter(pl.col("reason").is_null())
    dropped = table.drop_nulls("reason").group_by("reason").len().sort("len", "reason", descending=True)
    counts = {
        "documents_asked_about": len(outputs),
        "lines": len(table),
        "lines_dropped": dict(dropped.iter_rows()),
        "lines_kept": len(kept),
        "documents_with_queries": kept["document_id"].n_unique(),
    }
    if not len(kept):
        raise InputError(
            f"source.queries: of {len(table):,} lines that {section.model} wrote none stays ({dict(dropped.rows())}); "
            f"read {build.folder / GENERATED / 'outputs.parquet'}, and take a larger model or examples of your own"
        )
    write_parquet(folder / "generated.parquet", table.to_arrow())
    write_generated_page(folder / "generated.html", table, documents, counts)
    rows = rows_of(documents, kept, tables.train, len(table))
    return replace(rows, qrels=deal_by(tables, rows.qrels, documents)), counts  # a document's are in one split


def rows_of(documents: pl.DataFrame, pairs: pl.DataFrame, split: str, seen: int) -> Rows:
    """A query that was written for several documents has them all. pairs: query_id, query, document_id."""
    queries = pairs.select("query_id", text="query").unique("query_id", keep="first", maintain_order=True)
    qrels = pairs.select("query_id", "document_id", score=pl.lit(1, pl.Int32), split=pl.lit(split))
    return Rows(documents, queries, qrels, seen)


def round_trip(build: Build, documents: pl.DataFrame, pairs: pl.DataFrame, folder: Path) -> pl.DataFrame:
    """query_id, document_id and the `rank` of the document for the query (null: no retriever found it).

    pairs: query_id, query, document_id.
    """
    splits = Splits(split="train", language=build.recipe.source.language)
    recipe = build.recipe.model_copy(update={"source": splits, "teacher": Hybrid(kind="hybrid")})
    trial = Build(folder, recipe, build.engine, build.cache)  # of the queries before any goes
    rows = rows_of(documents, pairs, splits.split, len(pairs))
    for name, write in (
        ("corpus", lambda path: write_corpus(rows, splits, path)),
        ("candidates", lambda path: write_candidates(trial, path)),
    ):
        with folder_step(folder / name, {}) as step:  # whoever made this folder knows of what
            if not step.done:
                step.finish(**write(step.path))
    graded, found = write_graded(trial, folder / "graded.arrow"), []
    grades = grade_by_features(trial, folder, graded)
    for start, block in blocks_of(graded):
        scores = pl.Series(grades.scores_of(block, start))
        ranked = pl.from_arrow(block).with_columns(score=scores).filter(pl.col("rrf_rank").is_not_null())
        ranked = ranked.with_columns(rank=pl.col("score").rank("min", descending=True).over("query_id"))
        found.append(ranked.filter("is_positive").select(*FOUND, "rank"))
    shutil.rmtree(folder)
    return pairs.select(FOUND).unique().join(pl.concat(found), on=FOUND, how="left")


def write_generated_page(path: Path, table: pl.DataFrame, documents: pl.DataFrame, counts: dict[str, Any]) -> None:
    """At most 1,000 lines, evenly spread, each with its document and its fate."""
    shown = table[evenly(len(table))].join(documents, on="document_id", how="left", maintain_order="left")
    rows = [
        Row(
            title=row["query"],
            facts="" if row["rank"] is None else f"rank {row['rank']}",
            tags=[row["reason"] or "kept"],
            documents=[{"written for": row["document_id"], "text": row["text"]}],
        )
        for row in shown.iter_rows(named=True)
    ]
    introduction = (
        f"{counts['lines']:,} lines that a model wrote for {counts['documents_asked_about']:,} documents, of which "
        f"{counts['lines_kept']:,} stay; below are {len(rows):,}, evenly spread. Rank: of the document, when the "
        "query is searched for among all of them."
    )
    write_page(path, "Generated queries", introduction, {}, rows)
