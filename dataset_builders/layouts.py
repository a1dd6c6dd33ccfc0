"""The five layouts of raw data: their columns, the names by which these are known, and a table of them.

| layout | columns | task types |
|---|---|---|
| corpus | a corpus, its queries and qrels, as BEIR and mteb publish them | retrieval |
| pairs | query, positive; negative, relevance, ids; texts or lists of texts | retrieval |
| texts | text, label; texts or lists of texts; id | classification, clustering |
| text_pairs | text1, text2, label | duplicates, nli |
| graded_pairs | sentence1, sentence2, score | sts |

"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import polars as pl
import pyarrow as pa

from common.cli import InputError
from dataset_builders.schema import cast_column, check_rows

Layout = Literal["corpus", "pairs", "texts", "text_pairs", "graded_pairs"]
TEXT, NUMBERS = pa.string(), pa.list_(pa.float32())
# Column -> type; None: texts or lists of texts.
COLUMNS: dict[str, dict[str, pa.DataType | None]] = {
    "corpus": {},  # its three tables have the columns of PARTS
    "pairs": {
        "query": TEXT,
        "positive": None,
        "negative": None,
        "relevance": pa.int32(),
        **dict.fromkeys(("positive_score", "negative_score", "scores"), NUMBERS),
        **dict.fromkeys(("id", "query_id", "positive_id"), TEXT),
    },
    "texts": {"text": None, "label": None, "id": TEXT},
    "text_pairs": {"text1": TEXT, "text2": TEXT, "label": TEXT},
    "graded_pairs": {"sentence1": TEXT, "sentence2": TEXT, "score": pa.float64()},
}
# Read where they are there; those of pairs and texts on the Hub only where `columns` names them. A row's id stands for
# its query, and for its positive where that is one text.
OPTIONAL = {"negative", "relevance", "id", "query_id", "positive_id", "title", "split"}
OPTIONAL |= {"positive_score", "negative_score", "scores"}
PARTS = {
    "corpus": {"_id": TEXT, "title": TEXT, "text": TEXT},
    "queries": {"_id": TEXT, "text": TEXT},
    "qrels": {"query_id": TEXT, "corpus_id": TEXT, "score": pa.int32(), "split": TEXT},
    # a teacher's, for lists of documents; a set need not have them
    "scores": {"query_id": TEXT, "document_ids": None, "given": NUMBERS},
}
# Our name -> what it may be called, the first of them that is there; capitals, spaces and hyphens make no difference.
NAMES = {
    "query": "query question anchor prompt",
    "positive": "positive positives pos answer answers response document passage context text body abstract",
    "negative": "negative negatives neg hard_negative hard_negatives",  # and negative_1, negative_2, ...
    "relevance": "relevance relevant is_relevant judgement judgment",
    # scores of a teacher; `scores` are the positive's and then the negatives'
    "positive_score": "positive_score positive_scores pos_score pos_scores score",
    "negative_score": "negative_score negative_scores neg_score neg_scores",
    "scores": "scores labels",
    "document_ids": "document_ids doc_ids docids corpus_ids document_id doc_id docid corpus_id",
    "given": "scores score labels label",
    "id": "id",
    "query_id": "query_id qid question_id topic_id",
    "positive_id": "positive_id document_id doc_id docid passage_id pid answer_id corpus_id",
    "text": "text sentence sentences utterance content contents body passage document query question",
    "label": "label_text label labels class category intent topic is_duplicate",
    "text1": "text1 sentence1 sentence_a question1 premise",
    "text2": "text2 sentence2 sentence_b question2 hypothesis",
    "sentence1": "sentence1 sentence_a text1",
    "sentence2": "sentence2 sentence_b text2",
    "score": "score similarity_score similarity relatedness relevance rel",
    "_id": "id docid doc_id document_id corpus_id pid passage_id query_id qid topic_id",
    "title": "title",
    "corpus_id": "corpus_id document_id doc_id docid pid passage_id",
    "split": "split",
}
NUMBERED = re.compile(r"(hard_)?neg(ative)?_\d+")
# The splits of a set by the names of its files, and by what else they are called.
SPLIT_NAMES = {"dev": "validation", "valid": "validation", "val": "validation"}
HELD_OUT = ("validation", "test")
# The score of a pair with this label. Pairs with any other label (neutral), and of a text with itself, are left out.
LABEL_SCORES = {"entailment": 1, "contradiction": 0, "duplicate": 1, "not_duplicate": 0}
_JSON_LIST = r'(?s)^\[(".*")?\]$'
_JSON_NUMBERS = r"^\[[-+.,\s\deE]*\]$"


def canonical(split: str) -> str:
    """
    >>> canonical("dev"), canonical("test")
    ('validation', 'test')
    """
    return SPLIT_NAMES.get(split.lower(), split)


def plain(name: str) -> str:
    """
    >>> plain("Query ID"), plain("corpus-id"), plain("_id")
    ('query_id', 'corpus_id', 'id')
    """
    return re.sub(r"\W+", "_", name.strip().lower()).strip("_")


def to_frame(
    table: pa.Table, columns: Mapping[str, tuple[str | Sequence[str], pa.DataType | None]], where: str
) -> pl.DataFrame:
    """row (from 0), and `columns`: our name -> theirs and the type. Several texts are joined by a space.

    Raises InputError for a missing column, and for values of another type.
    """
    check_rows(table, where)
    found = {"row": pl.int_range(len(table), eager=True)}
    for name, (theirs, type_) in columns.items():
        parts = []
        for column in names_of(theirs):
            if column not in table.column_names:
                raise InputError(f"{where}: no column {column!r}; it has {', '.join(table.column_names)}")
            values = table[column]
            if pa.types.is_integer(type_ or TEXT) and pa.types.is_large_string(values.type):  # 1.0, of a text file
                values = cast_column(values, name, pa.float64(), where)
            if type_ == NUMBERS:
                parts.append(_numbers(values, name, where))
                continue
            if type_ is None and not pa.types.is_list(values.type) and not pa.types.is_large_list(values.type):
                type_ = TEXT
            parts.append(pl.Series(name, pl.from_arrow(cast_column(values, name, type_ or pa.list_(TEXT), where))))
        if len(parts) > 1 and name == "negative":
            parts = [pl.select(pl.concat_list(parts)).to_series()]
        elif len(parts) > 1:
            parts = [pl.select(pl.concat_str(parts, separator=" ", ignore_nulls=True).str.strip_chars()).to_series()]
        found[name] = _decoded(parts[0]) if columns[name][1] is None else parts[0]
    return pl.DataFrame(found)


def names_of(theirs: str | Sequence[str]) -> Sequence[str]:
    return (theirs,) if isinstance(theirs, str) else theirs


def _numbers(values: pa.ChunkedArray, name: str, where: str) -> pl.Series:
    """Numbers, or lists of them, perhaps as JSON, as lists."""
    if not pa.types.is_nested(values.type):
        column = _decoded(pl.Series(name, pl.from_arrow(values)))
        if column.dtype != pl.List:
            numbers = pl.Series(name, pl.from_arrow(cast_column(values, name, pa.float32(), where)))
            return pl.select(pl.concat_list(numbers)).to_series()
        values = pa.chunked_array([column.to_arrow()])
    return pl.Series(name, pl.from_arrow(cast_column(values, name, NUMBERS, where)))


def _decoded(column: pl.Series) -> pl.Series:
    """A column of JSON lists of texts or numbers as lists; any other as it is."""
    for pattern, type_ in ((_JSON_LIST, pl.String), (_JSON_NUMBERS, pl.Float32)):
        if column.dtype == pl.String and column.count() and column.str.contains(pattern).all():
            return column.str.json_decode(pl.List(type_))
    return column
