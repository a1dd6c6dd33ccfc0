"""Column names, their order and types, and the checks that every row passes before anything is computed from it."""

from __future__ import annotations

from collections.abc import Sized

import numpy as np
import pyarrow as pa

from common.cli import InputError

# Soft labels stay this far from 0 and 1: losses take their logit, and 1e-4 is a logit of about 9.2.
LABEL_FLOOR = 1e-4

DOCUMENTS = pa.schema([("document_id", pa.string()), ("text", pa.string())])
# Near duplicates of each other share a group; documents that have none are not listed.
GROUPS = pa.schema([("document_id", pa.string()), ("group", pa.string())])
# Documents that share a class are positives of each other; classification and clustering alone have classes.
CLASSES = pa.schema([("document_id", pa.string()), ("class", pa.string())])
QUERIES = pa.schema([("query_id", pa.string()), ("text", pa.string()), ("split", pa.string())])
QRELS = pa.schema(
    [("query_id", pa.string()), ("document_id", pa.string()), ("score", pa.int32()), ("split", pa.string())]
)
# Documents that are a query's own text: no candidates for it, and in no ranking that is scored.
OWN = pa.schema([("query_id", pa.string()), ("document_id", pa.string())])
# Texts of a query and of a document labelled as relevant: no such document is a negative of the query.
POSITIVES = pa.schema([("query", pa.string()), ("positive", pa.string())])
STS = pa.schema([("sentence1", pa.string()), ("sentence2", pa.string()), ("label", pa.float32())])
# Scores of the source's own, in place of a teacher's.
GIVEN = pa.schema([("query_id", pa.string()), ("document_id", pa.string()), ("given", pa.float32())])
# Ranks count from 1; rank and score are null where that retriever did not return the document.
CANDIDATES = pa.schema(
    [
        ("query_id", pa.string()),
        ("document_id", pa.string()),
        ("bm25_rank", pa.int32()),
        ("bm25_score", pa.float32()),
        ("dense_rank", pa.int32()),
        ("dense_score", pa.float32()),
        ("rrf_score", pa.float64()),
        ("rrf_rank", pa.int32()),
        ("convex_score", pa.float64()),
        ("convex_rank", pa.int32()),
    ]
)
SCORES = pa.schema(
    [*CANDIDATES, ("teacher_score", pa.float32()), ("label", pa.float32()), ("is_positive", pa.bool_())]
)


def train_schema(num_negatives: int) -> pa.Schema:
    """What the trainer reads, in its order; `label` holds 1 + num_negatives soft labels, the positive's first."""
    negatives = [(f"negative_{rank}", pa.string()) for rank in range(1, num_negatives + 1)]
    columns = [("query", pa.string()), ("positive", pa.string()), *negatives, ("label", pa.list_(pa.float32()))]
    return pa.schema(columns)


def mined_schema(num_negatives: int) -> pa.Schema:
    """The trainer's columns after the ids they were made from."""
    ids = [("query_id", pa.string()), ("positive_id", pa.string()), ("negative_ids", pa.list_(pa.string()))]
    return pa.schema([*ids, *train_schema(num_negatives)])


def to_schema(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """`table` with exactly the columns of `schema`, cast. Raises InputError for values of another type, or null."""
    import pyarrow.compute as pc  # slow to import: --help needs none

    columns = []
    for field in schema:
        column = cast_column(table[field.name], field.name, field.type, where)
        if column.null_count:
            row = pc.index(pc.is_null(column), True).as_py()
            raise InputError(f"{where}: row {row} has no {field.name!r}; fill it in or leave the row out")
        columns.append(column)
    return pa.table(columns, schema=schema)


def cast_column(column: pa.ChunkedArray, name: str, kind: pa.DataType, where: str) -> pa.ChunkedArray:
    """`column` as `kind`. Raises InputError for values of another type, and text that is not UTF-8."""
    try:
        column = column.cast(kind)
        column.validate(full=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{where}: column {name!r} cannot be read as {kind}: {error}") from None
    return column


def check_rows(table: Sized, where: str) -> None:
    if not len(table):
        raise InputError(f"{where}: no rows")


def check_finite(values: np.ndarray, what: str) -> None:
    """Raises InputError when a model returned NaN or infinity: nothing computed from it would mean anything."""
    bad = np.count_nonzero(~np.isfinite(values))
    if bad:
        raise InputError(f"{what}: {bad} of {values.size} values are NaN or infinite; try another dtype or model")
