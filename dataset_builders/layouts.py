"""What a source's columns mean: the layouts that it may have, the names by which their columns are known, and a table
of them."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

import polars as pl
import pyarrow as pa
from tqdm import tqdm

from common.cli import InputError
from dataset_builders.schema import cast_column

Layout = Literal["corpus", "pairs", "texts", "text_pairs", "graded_pairs"]
PARTS = ("corpus", "queries", "qrels", "scores")  # tables of layout corpus; a teacher's scores need not be there
TEXT = pa.string()
TEXTS, NUMBERS = pa.list_(pa.string()), pa.list_(pa.float32())  # lists of them, perhaps as JSON, or single ones
# The columns that a table of each layout must have: our name -> type.
NEEDED: dict[str, dict[str, pa.DataType]] = {
    "pairs": {"query": TEXT, "positive": TEXTS},  # retrieval
    "texts": {"text": TEXTS, "label": TEXTS},  # classification, clustering
    "text_pairs": {"text1": TEXT, "text2": TEXT, "label": TEXT},  # duplicates, nli
    "graded_pairs": {"sentence1": TEXT, "sentence2": TEXT, "score": pa.float64()},  # sts
    "documents": {"text": TEXT},  # retrieval, by queries that a model writes
    # layout corpus, for retrieval, as BEIR and mteb publish it: its PARTS
    "corpus": {"_id": TEXT, "text": TEXT},
    "queries": {"_id": TEXT, "text": TEXT},
    "qrels": {"query_id": TEXT, "corpus_id": TEXT, "score": pa.int32()},
    "scores": {"query_id": TEXT, "document_ids": TEXTS, "given": NUMBERS},
}
# Read where they are there; those of pairs and texts on the Hub only where `columns` names them. A row's id stands for
# its query, and for its positive where that is one text.
OPTIONAL: dict[str, dict[str, pa.DataType]] = {
    "pairs": {
        "negative": TEXTS,
        "relevance": pa.int32(),
        **dict.fromkeys(("positive_score", "negative_score", "scores"), NUMBERS),
        **dict.fromkeys(("id", "query_id", "positive_id"), TEXT),
    },
    "texts": {"id": TEXT},
    "documents": {"_id": TEXT, "title": TEXT},
    "corpus": {"title": TEXT},
    "qrels": {"split": TEXT},
}
# What an evaluation asks about, and what decides on which side of a hold-out a row is.
ASKED = {
    "pairs": ("query",),
    "texts": ("text",),
    "text_pairs": ("text1", "text2"),
    "graded_pairs": ("sentence1", "sentence2"),
}
COLUMNS = {name: {**columns, **OPTIONAL.get(name, {})} for name, columns in NEEDED.items()}
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
_LIST = r"""(?s)^\s*\[(\s*["'].*)?\]\s*$"""  # a text that looks like a list of texts
_NUMBERS = r"^\[[-+.,\s\deE]*\]$"


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
    table: pa.Table, columns: Mapping[str, Sequence[str]], types: Mapping[str, pa.DataType], where: str
) -> pl.DataFrame:
    """`columns`, our name -> theirs (several are joined by a space, negatives in a list), of `types`, name -> type.

    Raises InputError for a missing column, and for values of another type.
    """
    found = []
    for name, theirs in columns.items():
        for column in theirs:
            if column not in table.column_names:
                there = f"it has {', '.join(table.column_names)}"
                names = NAMES[name].split()
                if column == name and not {*names} & {*map(plain, table.column_names)}:  # looked for by its NAMES
                    others = [other for other in names if other != plain(name)]
                    column = name if plain(name) in names else others.pop(0)
                    there += f", and none of {', '.join(others)}" if others else ""
                    there += f"; --columns '{{{name}: THEIRS}}' says which it is"
                raise InputError(f"{where}: no column {column!r}; {there}")
        parts = [_values(table[column], name, types[name], where) for column in theirs]
        if len(parts) > 1:
            lists = [column for column, part in zip(theirs, parts, strict=True) if part.dtype == pl.List]
            if lists and name != "negative":
                raise InputError(
                    f"{where}: {name!r} joins {', '.join(theirs)}, and {lists[0]!r} holds lists; name one"
                )
            joined = pl.concat_str(parts, separator=" ", ignore_nulls=True).str.strip_chars()
            several = pl.concat_list(parts) if name == "negative" else joined
            parts = [pl.select(several.alias(name)).to_series()]
        found += parts
    return pl.DataFrame(found)


def _values(column: pa.ChunkedArray, name: str, kind: pa.DataType, where: str) -> pl.Series:
    """A column as `kind`; of TEXTS single texts stay as they are, of NUMBERS single ones become lists."""

    def cast(kind: pa.DataType) -> pl.Series:
        return pl.Series(name, pl.from_arrow(cast_column(column, name, kind, where)))

    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if is_text and pa.types.is_integer(kind):  # 1.0, of a text file
        column = cast_column(column, name, pa.float64(), where)
    if not pa.types.is_list(kind) or pa.types.is_nested(column.type):
        return cast(kind)
    if kind == TEXTS:
        return _lists(cast(TEXT), where)
    if is_text and (texts := cast(TEXT)).count() and texts.str.contains(_NUMBERS).all():
        return texts.str.json_decode(pl.List(pl.Float32))
    return pl.select(pl.concat_list(cast(kind.value_type))).to_series()


def _lists(texts: pl.Series, where: str) -> pl.Series:
    """A column of texts; or of lists, where half of what is filled in is one, as JSON or Python (so pandas) writes it.

    Raises InputError for a value among them that cannot be read.
    """
    is_list = texts.str.contains(_LIST).fill_null(False)
    lists = int(is_list.sum())
    if not lists:
        return texts
    filled = texts.str.strip_chars().replace("", None)
    others = filled.count() - lists
    are_lists = lists >= others
    if others:
        message = f"{lists:,} of {lists + others:,} values look like lists; {'the others' if are_lists else 'all'} are"
        tqdm.write(f"{where}: column {texts.name!r}: {message} read as single texts", file=sys.stderr)
    if not are_lists:
        return texts
    values = [value and (_list(value) if listed else [value]) for value, listed in zip(filled, is_list, strict=True)]
    unread = [text for text, value in zip(filled, values, strict=True) if text and value is None]
    if unread:
        raise InputError(
            f"{where}: column {texts.name!r}: {unread[0][:60]!r} looks like a list and is none of JSON's or Python's; "
            "write lists as JSON"
        )
    return pl.Series(texts.name, values, dtype=pl.List(pl.String))


def _list(text: str) -> list[str | None] | None:
    """
    >>> _list('["a", null]'), _list("['a', 'b']"), _list("[]"), _list("['a' 'b']")
    (['a', None], ['a', 'b'], [], None)
    """
    try:
        values = json.loads(text)
    except ValueError:
        try:
            values = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return None
        if repr(values) != text:  # numpy's way has no commas: Python would join the texts
            return None
    return values if all(isinstance(value, str | None) for value in values) else None
