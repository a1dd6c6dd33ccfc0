"""Rows -> corpus/: one document for each distinct text, near duplicates grouped, no query on both sides of a split.

Rules, each with a count in the manifest:
- documents whose texts are equal (case and white space aside) become one, the smallest id's; qrels and classes follow;
- near duplicates (character 5-grams of Jaccard similarity 0.8 or more) stay, and share a group;
- a source without splits gets them by a stable hash of the group, so near duplicates never part: 80 / 10 / 10;
- queries of one split whose texts are equal become one, with all their positives;
- a query to be trained on whose text also stands in another split is dropped: it would leak;
- a recipe with `decontamination` loses from the split to be trained on what evaluation tasks ask about.

The order of the input's rows makes no difference. Frames hold references to texts, which stay where they are mapped
into memory until they are written batch by batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from common.cli import InputError
from common.steps import parquet_writer, write_arrow, write_parquet
from dataset_builders.decontamination import (
    Decontamination,
    Probes,
    contamination_log,
    count_by_kind,
    count_by_task,
    count_searched,
    find_matches,
    read_probes,
)
from dataset_builders.near_duplicates import band_keys, near_duplicate_groups, stable_hash, text_keys
from dataset_builders.readers import Rows
from dataset_builders.schema import CLASSES, DOCUMENTS, GIVEN, GROUPS, QRELS, QUERIES
from dataset_builders.sources import Splits

SPLIT_SHARES = {"train": 80, "validation": 10, "test": 10}  # of 100 hash buckets
BATCH_ROWS = 65_536
BATCH_BYTES = 64 << 20
GIVEN_QUERIES = 1024  # whose given scores are held in memory together
# A given score as it is put into a file: positions among the queries asked and the documents kept.
_PLACED = np.dtype([("query", "u4"), ("document", "u4"), ("given", "f4")])


def write_corpus(
    rows: Rows,
    splits: Splits,
    folder: Path,
    decontamination: Decontamination | None = None,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Write documents, groups, classes, queries and qrels into `folder`; returns the counts for the manifest."""
    probes = read_probes(decontamination, data_root) if decontamination else None
    queries = rows.queries.with_columns(text_keys(rows.queries["text"]))
    documents = rows.documents.with_columns(text_keys(rows.documents["text"])).sort("document_id")
    documents = documents.with_columns(merged_id=pl.col("document_id").first().over("key"))
    kept = documents.filter(pl.col("document_id") == pl.col("merged_id")).drop("merged_id")
    bands = band_keys(kept["text"], "documents: MinHash")
    kept = kept.with_columns(group=kept["document_id"].gather(near_duplicate_groups(kept["text"], bands)))
    qrels = _qrels_of_kept(rows.qrels, documents, kept)
    _check_splits(qrels, splits)
    counts = {
        "exact_duplicate_documents_merged": len(documents) - len(kept),
        "queries_without_positive_dropped": len(queries) - qrels.filter(pl.col("score") > 0)["query_id"].n_unique(),
    }
    qrels, counts["duplicate_queries_merged"], counts["leaking_queries_dropped"] = _clean_queries(
        qrels, queries, splits.split
    )
    if probes:
        qrels, kept, log, counts["contamination"] = _decontaminate(qrels, splits.split, queries, kept, bands, probes)
        write_parquet(folder / "contamination.parquet", log)
    if splits.split not in qrels["split"]:
        raise InputError(f"split {splits.split!r}: no query is left with a positive document; nothing to train on")
    groups = kept.filter(pl.len().over("group") > 1).with_columns(
        pl.col("document_id").first().over("group").alias("group")
    )
    asked = qrels.select("query_id", "split").unique().join(queries, on="query_id").sort("query_id", "split")
    write_arrow(folder / "documents.arrow", _document_batches(kept), DOCUMENTS)
    _write_rows(folder / "groups.parquet", groups, GROUPS)
    _write_rows(folder / "queries.parquet", asked, QUERIES)
    _write_rows(folder / "qrels.parquet", qrels, QRELS)
    if "class" in documents.columns:
        counts["classes"] = documents["class"].n_unique()
        # texts that were merged keep the classes of all
        classes = documents.select(document_id="merged_id", **{"class": "class"}).unique()
        classes = classes.join(kept, on="document_id", how="semi").sort("document_id", "class")
        _write_rows(folder / "classes.parquet", classes, CLASSES)
    if rows.given is not None:
        asked_for = asked.filter(split=splits.split)
        counts["given_scores"] = _write_given(rows.given, asked_for, queries, documents, kept, folder)
    return {
        "pairs_seen": rows.seen,
        "pairs_used": len(rows.qrels),
        "documents": len(kept),
        "queries": dict(asked.group_by("split").len().sort("split").iter_rows()),
        "qrels": len(qrels),
        "near_duplicate_documents": len(groups),
        "near_duplicate_groups": groups["group"].n_unique(),
        **counts,
    }


def split_of(name: str) -> str:
    """The split of a group, decided by its name alone."""
    bucket = stable_hash("split", name) % 100
    for split, share in SPLIT_SHARES.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("the shares sum to 100")


def check_one_scale(largest: pl.DataFrame) -> None:
    """Refuse scores of two scales, such as logits for some queries and probabilities for others.

    largest: of each query `len`, how many scores it has, and `given`, the largest of them without its sign.

    They are told by queries of 4 scores and more: on one scale, hardly any has all of them within [-1, 1] where others
    have one beyond 2. One calibration would turn the labels of the smaller scale into noise.
    """
    largest = largest.filter(pl.col("len") >= 4)["given"]
    small, large = int((largest <= 1).sum()), int((largest > 2).sum())
    if min(small, large) > 0.05 * len(largest):
        raise InputError(
            f"given scores: {small:,} queries have all of theirs within -1 and 1, {large:,} have some up to "
            f"{largest.max():g}: two scales? One calibration cannot serve both; bring them to one, or build them apart"
        )


def _qrels_of_kept(qrels: pl.DataFrame, documents: pl.DataFrame, kept: pl.DataFrame) -> pl.DataFrame:
    """QRELS of the documents that are kept; where the source has no split, the one of the document's group."""
    qrels = qrels.join(documents.select("document_id", "merged_id"), on="document_id")
    qrels = qrels.with_columns(document_id="merged_id")
    if qrels["split"].null_count():
        groups = kept.select("document_id", own_split=pl.col("group").map_elements(split_of, pl.String))
        qrels = qrels.join(groups, on="document_id").with_columns(pl.coalesce("split", "own_split"))
    return _distinct(qrels)


def _write_given(
    given: Iterable[pl.DataFrame],
    asked: pl.DataFrame,
    queries: pl.DataFrame,
    documents: pl.DataFrame,
    kept: pl.DataFrame,
    folder: Path,
) -> int:
    """Write given.parquet: GIVEN of the queries and documents that are kept, in order, of texts that were merged the
    highest score; returns their number.

    All scores need not fit in memory: they are put into files by ranges of queries, and ordered range by range.
    """
    asked = asked.with_row_index("query").with_columns(part=pl.col("query") // GIVEN_QUERIES)
    kept = kept.select(merged_id="document_id").with_row_index("document")
    of_query = queries.select("query_id", "key").join(asked.select("key", "query", "part"), on="key").drop("key")
    of_document = documents.select("document_id", "merged_id").join(kept, on="merged_id").drop("merged_id")
    parts, total, largest = folder / "given.shards", 0, []
    parts.mkdir(exist_ok=True)
    for part in parts.iterdir():  # of a process that was killed
        part.unlink()
    for scores in given:
        scores = scores.join(of_query, on="query_id").join(of_document, on="document_id")
        for (part,), rows in scores.select("part", *_PLACED.names).partition_by("part", as_dict=True).items():
            with (parts / f"{part:06d}").open("ab") as stream:
                rows.drop("part").to_numpy(structured=True).astype(_PLACED).tofile(stream)
    with parquet_writer(folder / "given.parquet", GIVEN) as writer:
        for part in sorted(parts.iterdir()):
            rows = pl.from_numpy(np.fromfile(part, _PLACED))
            rows = rows.group_by("query", "document").agg(pl.col("given").max()).sort("query", "document")
            ids = asked["query_id"].gather(rows["query"]), kept["merged_id"].gather(rows["document"])
            for table in rows.select(*ids, "given").iter_slices(BATCH_ROWS):
                writer.write(table.rename({"merged_id": "document_id"}).to_arrow().cast(GIVEN))
            total += len(rows)
            largest.append(rows.group_by("query").agg(pl.len(), pl.col("given").abs().max()))
    if largest:
        check_one_scale(pl.concat(largest))
    return total


def _distinct(qrels: pl.DataFrame) -> pl.DataFrame:
    """One judgement for each query, document and split, the highest; ordered by them."""
    keys = ["query_id", "document_id", "split"]
    return qrels.group_by(keys).agg(pl.col("score").max()).sort(keys).select(QRELS.names)


def _check_splits(qrels: pl.DataFrame, splits: Splits) -> None:
    found = sorted(qrels.filter(pl.col("score") > 0)["split"].unique())
    for split in splits.searched:
        if split not in found:
            some = ", ".join(found) or "none"
            raise InputError(f"split {split!r}: no query with a positive document; splits that have some: {some}")


def _clean_queries(qrels: pl.DataFrame, queries: pl.DataFrame, train: str) -> tuple[pl.DataFrame, int, int]:
    """Judgements of queries with a positive, merged and free of leaks; numbers of queries merged and dropped."""
    is_train = pl.col("split") == train
    qrels = _with_positive(qrels).join(queries.select("query_id", "key"), on="query_id")
    leaks = is_train & (~is_train).any().over("key")
    leaking, clean = qrels.filter(leaks), qrels.filter(~leaks)
    merged = _distinct(clean.with_columns(pl.col("query_id").min().over("split", "key")))
    number_merged = _number_of_queries(clean) - _number_of_queries(merged)
    return merged, number_merged, _number_of_queries(leaking)


def _with_positive(qrels: pl.DataFrame) -> pl.DataFrame:
    """Judgements of the queries that have a positive in their split."""
    return qrels.filter((pl.col("score") > 0).any().over("query_id", "split"))


def _number_of_queries(qrels: pl.DataFrame) -> int:
    """Queries, each counted in each of its splits."""
    return qrels.select("query_id", "split").n_unique()


def _decontaminate(
    qrels: pl.DataFrame, train: str, queries: pl.DataFrame, kept: pl.DataFrame, bands: np.ndarray, probes: Probes
) -> tuple[pl.DataFrame, pl.DataFrame, pa.Table, dict[str, Any]]:
    """Qrels whose training split asks nothing that a probe asks; the documents that stay; log; counts.

    A document that another split judges stays, without its judgements in the training split.
    """
    is_train = pl.col("split") == train
    asked = queries.join(qrels.filter(is_train), on="query_id", how="semi").sort("query_id")
    bad_queries = find_matches(asked.rename({"query_id": "id"}), band_keys(asked["text"], "queries: MinHash"), probes)
    bad_documents = find_matches(kept.rename({"document_id": "id"}), bands, probes)
    judged_elsewhere = qrels.filter(~is_train)["document_id"].implode()
    bad_documents = bad_documents.with_columns(dropped=~pl.col("id").is_in(judged_elsewhere))
    dropped = bad_documents.filter("dropped")["id"].unique()
    staying = kept.filter(~pl.col("document_id").is_in(dropped.implode()))
    bad = is_train & (
        pl.col("query_id").is_in(bad_queries["id"].implode())
        | pl.col("document_id").is_in(bad_documents["id"].implode())
    )
    cleaned = _with_positive(qrels.filter(~bad))
    log = contamination_log(query=bad_queries.with_columns(dropped=pl.lit(True)), document=bad_documents)
    number_of_bad = bad_queries["id"].n_unique()
    counts = {
        "queries_dropped": number_of_bad,
        "documents_dropped": len(dropped),
        "documents_kept_for_other_splits": bad_documents["id"].n_unique() - len(dropped),
        "queries_left_without_positive_dropped": len(asked)
        - number_of_bad
        - _number_of_queries(cleaned.filter(is_train)),
        "matches": count_by_task(log),
        "by_kind": count_by_kind(log),
        "documents_that_tasks_search": count_searched(staying["key"], probes),
    }
    return cleaned, staying, log, counts


def _document_batches(kept: pl.DataFrame) -> Iterator[pa.RecordBatch]:
    """Of BATCH_ROWS at most, and of about BATCH_BYTES where no document is larger than that itself."""
    by_size = pl.col("text").str.len_bytes().cast(pl.Int64).cum_sum() // BATCH_BYTES
    batch = pl.struct(by_size.alias("size"), (pl.int_range(pl.len()) // BATCH_ROWS).alias("rows")).rle_id()
    for length in kept.select(batch=batch).group_by("batch").len().sort("batch")["len"]:
        part, kept = kept.head(length), kept.slice(length)
        yield from part.select(DOCUMENTS.names).to_arrow().cast(DOCUMENTS).combine_chunks().to_batches()


def _write_rows(path: Path, table: pl.DataFrame, schema: pa.Schema) -> None:
    with parquet_writer(path, schema) as writer:
        for part in table.select(schema.names).iter_slices(BATCH_ROWS):
            writer.write(part.to_arrow().cast(schema))
