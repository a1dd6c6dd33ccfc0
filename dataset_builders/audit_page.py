"""audit/index.html: the audit's pictures, and mined rows to read, with what to look for in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from common.pages import MOST_ROWS, Row, evenly, write_page
from dataset_builders.calibration import count_flat_and_one_hot
from dataset_builders.columns import positions_of

if TYPE_CHECKING:
    from dataset_builders.build_record import Build

PICTURES = {
    "labels.png": "Soft labels of positives, of negatives chosen and of all other candidates",
    "reliability.png": "Share of labelled positives by soft label: on the diagonal, labels are probabilities",
    "false_negatives.png": "How many known positives would pass as negatives, by margin",
}
SURE = 0.9  # a negative with such a label may be relevant itself
RANKS = {"bm25_rank": "BM25", "dense_rank": "dense", "rrf_rank": "fused"}


def write_audit_page(build: Build, folder: Path, queries: int) -> None:
    """Write index.html beside the pictures in `folder`: at most 1,000 mined rows, evenly spread."""
    mined = pl.scan_parquet(build.mined / "mined.parquet", glob=False).with_row_index("row")
    count = mined.select(pl.len()).collect().item()
    chosen = mined.filter(pl.col("row").is_in(evenly(count))).collect()
    asked = chosen["query_id"].unique().implode()
    graded = pl.scan_parquet(build.scores / "scores.parquet", glob=False)
    graded = graded.filter(pl.col("query_id").is_in(asked)).collect()
    ids = sorted({*chosen["positive_id"], *chosen["negative_ids"].explode()})
    places = positions_of(pl.Series(ids).to_arrow().cast("string"), build.document_ids, "mined rows")
    is_cut = dict(zip(ids, build.document_vectors.is_cut(places), strict=True))
    by_pair = {(row["query_id"], row["document_id"]): row for row in graded.iter_rows(named=True)}
    highest = graded.filter("is_positive").group_by("query_id").agg(pl.col("label").max())
    above = graded.join(highest, on="query_id", suffix="_highest").filter(pl.col("label") > pl.col("label_highest"))
    above_ids = set(above.filter(~pl.col("is_positive"))["query_id"])
    rows: list[Row] = []
    for row in chosen.iter_rows(named=True):
        documents = []
        for place, document_id in enumerate([row["positive_id"], *row["negative_ids"]]):
            found = by_pair.get((row["query_id"], document_id), {})
            ranks = ", ".join(f"{name} {found[key]}" for key, name in RANKS.items() if found.get(key))
            text = row["positive"] if place == 0 else row[f"negative_{place}"]
            kind = "positive" if place == 0 else f"negative {place}"
            label = f"{row['label'][place]:.3f}"
            cut = "yes" if is_cut[document_id] else ""
            documents.append(
                {"document": kind, "label": label, "found at": ranks or "not found", "cut": cut, "text": text}
            )
        kinds = count_flat_and_one_hot(np.array(row["label"], np.float32), np.array([0]))
        tags = {
            "probable false negative": row["label"][1] >= SURE,
            "candidate graded above every positive": row["query_id"] in above_ids,
            "flat labels": kinds["flat_rows"],
            "one-hot labels": kinds["one_hot_rows"],
            "positive not retrieved": documents[0]["found at"] == "not found",
            "cut text": any(one["cut"] for one in documents),
        }
        named = [tag for tag, holds in tags.items() if holds]
        rows.append(Row(title=row["query"], facts=f"query {row['query_id']}", tags=named, documents=documents))
    shown = (
        f"{len(rows):,} of {count:,} mined rows, evenly spread" if count > MOST_ROWS else f"all {count:,} mined rows"
    )
    introduction = (
        f"{queries:,} graded queries; below are {shown}. A row is a query, one labelled positive and its negatives, "
        "with the teacher's soft labels and each document's rank in the searches. A probable false negative is a "
        f"negative with a label of {SURE:g} or more. Cut: longer than the dense model reads."
    )
    pictures = {words: folder / name for name, words in PICTURES.items() if (folder / name).is_file()}
    write_page(folder / "index.html", "Audit of graded data", introduction, pictures, rows)
