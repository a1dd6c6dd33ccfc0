"""Reads the documents, queries and qrels in a set's tables, whatever their layout.

Texts without ids get them from a hash, so that the same text has the same id in every build. A judgement of a text
that is not there is an error in a folder, and left out of a set from the Hub.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

import polars as pl
from polars.selectors import by_name
from tqdm import tqdm

from common.cli import InputError
from dataset_builders.holdout import deal_by, read_splits
from dataset_builders.layouts import ASKED
from dataset_builders.near_duplicates import in_blocks, stable_hash, text_keys
from dataset_builders.schema import QRELS, check_rows
from dataset_builders.tables import Tables

if TYPE_CHECKING:
    from dataset_builders.sources import Splits

# What a row of pairs becomes for each of its texts; ids and scores where the source has some.
JUDGED = ("split", "query", "query_id", "query_key", "document", "document_id", "score", "given")


@dataclass(frozen=True)
class Rows:
    """Raw data. Ids are unique among the documents and among the queries."""

    documents: pl.DataFrame  # document_id, text; and `class` for classification and clustering
    queries: pl.DataFrame  # query_id, text
    qrels: pl.DataFrame  # query_id, document_id, score (0: judged and not relevant), split (null: the source has none)
    seen: int  # pairs or judgements that the source holds
    # query_id, document_id, given: a teacher's scores that came with the texts, some at a time
    given: Iterable[pl.DataFrame] | None = None


def draw(rows: pl.DataFrame, source: Splits, query: str = "query_id") -> pl.DataFrame:
    """`rows` (`query`, score, split) of whole queries, in the order of a seeded hash, that hold up to `num_pairs`
    positives; of the split trained on, or of none: other splits keep all.

    A larger number holds a smaller one's queries.
    """
    if source.num_pairs is None:
        return rows
    is_other = (pl.col("split") != source.split).fill_null(False)
    queries = rows.filter(~is_other).group_by(query, maintain_order=True).agg(positives=(pl.col("score") > 0).sum())
    queries = queries.with_columns(order=_hashes(queries[query], source.seed)).sort("order", maintain_order=True)
    drawn = queries.filter((pl.col("positives").cum_sum() <= source.num_pairs) | (pl.int_range(pl.len()) == 0))
    return rows.filter(is_other | pl.col(query).is_in(drawn[query].implode()))


def read_layout(tables: Tables) -> Rows:
    """What a set holds for the splits that are asked for; of the one trained on, what `draw` keeps."""
    readers = {"corpus": _read_corpus, "pairs": _read_pairs, "texts": _read_texts, "text_pairs": _read_pairs}
    return readers[tables.layout](tables)


def read_asked(tables: Tables, split: str) -> tuple[pl.Series, pl.DataFrame | None]:
    """The texts that a split asks about; and the documents (text, perhaps title) that are searched, where some are."""
    if tables.layout != "corpus":
        table = tables.read(split)
        asked = [_exploded(table, name)[name].rename("text") for name in ASKED[tables.layout]]
        return pl.concat(asked), None
    queries, qrels = part_texts(tables, "queries", "query_id"), tables.read("qrels").filter(split=split)
    corpus = tables.whole_rows(tables.read("corpus"), ["text"])
    return queries.join(qrels, on="query_id", how="semi")["text"], corpus


# --- a collection ---------------------------------------------------------------------------------------------------


def _read_corpus(tables: Tables) -> Rows:
    documents = part_texts(tables, "corpus", "document_id")
    queries = part_texts(tables, "queries", "query_id")
    judged = tables.read("qrels").rename({"corpus_id": "document_id"})
    qrels = tables.whole_rows(judged, QRELS.names)
    for texts, part in ((queries, "queries"), (documents, "corpus")):
        known = _known(tables, qrels, texts, part)
        if len(known) < len(qrels):
            left_out = f"{len(qrels) - len(known):,} rows whose {texts.columns[0]} is not in {part} left out"
            tqdm.write(f"{tables.where('qrels')}: {left_out}", file=sys.stderr)
        qrels = known
    qrels = draw(deal_by(tables, qrels.select(QRELS.names), queries), tables.source)
    asked = queries
    if tables.published or tables.source.num_pairs:  # the judgements of other splits were not read
        asked = queries.join(qrels, on="query_id", how="semi", maintain_order="left")
    given = None
    if "scores" in tables.parts:
        pieces = tables.pieces("scores")
        first = list(islice(pieces, 1))  # now: columns that are not there are told before anything long
        given = _given_scores(tables, chain(first, pieces), queries, asked, documents)
    return Rows(documents, asked, qrels, len(judged), given)


def _given_scores(
    tables: Tables, pieces: Iterable[pl.DataFrame], queries: pl.DataFrame, asked: pl.DataFrame, documents: pl.DataFrame
) -> Iterator[pl.DataFrame]:
    """query_id, document_id, given of the queries in `asked`, some at a time."""
    left_out = 0
    for piece in pieces:
        lists = _known(tables, piece, queries, "queries").join(asked, on="query_id", how="semi")
        if len(lists):
            scores = _exploded(lists, "document_ids", "given").rename({"document_ids": "document_id"})
            scores = scores.drop_nulls("given")  # as in pairs: not scored
            known = _known(tables, scores, documents, "corpus")
            left_out += len(scores) - len(known)
            yield known.select("query_id", "document_id", "given")
    if left_out:
        told = f"{left_out:,} scores whose document_id is not in corpus left out"
        tqdm.write(f"{tables.where('scores')}: {told}", file=sys.stderr)


def _known(tables: Tables, rows: pl.DataFrame, texts: pl.DataFrame, part: str) -> pl.DataFrame:
    """The rows whose id (the first column of `texts`) has a text. Of a folder all must have one, of any set some."""
    name = texts.columns[0]
    known = rows.join(texts, on=name, how="semi", maintain_order="left")
    if len(known) == len(rows) or (tables.published and len(known)):
        return known
    unknown = rows.join(texts, on=name, how="anti", maintain_order="left")
    where, id = unknown.select("where", name).row(0)
    raise InputError(
        f"{where}: {name} {id!r} (and {len(unknown) - 1} more) is not in {tables.where(part)}; add its text there or "
        "leave the row out"
    )


def part_texts(tables: Tables, name: str, id_name: str) -> pl.DataFrame:
    """`id_name`, text (title and text) of the corpus, the queries or documents alone.

    Ids are unique; without any, they are made of the texts.
    """
    found = tables.read(name)
    said = [column for column in ("title", "text") if column in found.columns]
    text = pl.concat_str(said, separator=" ", ignore_nulls=True)
    if "_id" not in found.columns:
        found = found.with_columns(_id=_ids("d", _hashes(found.select(text).to_series())))
        found = found.unique("_id", maintain_order=True)
    if "title" in found.columns:
        found = found.with_columns(text=text.str.strip_chars())
    found = tables.whole_rows(found.rename({"_id": "id"}), ["id", "text"])
    twice = found.filter(pl.col("id").is_duplicated())["id"]
    if len(twice):
        raise InputError(f"{tables.where(name)}: id {twice[0]!r} occurs twice; ids must be unique")
    return found.select(pl.col("id").alias(id_name), "text")


# --- pairs ----------------------------------------------------------------------------------------------------------


def _read_pairs(tables: Tables) -> Rows:
    """Documents are the texts that some query was judged with; of equal judgements the best score counts."""
    table = read_splits(tables)
    judged = _judged(tables, _as_pairs(tables, table) if tables.layout == "text_pairs" else table)
    judged = judged.with_columns(document_key=_hashes(judged["document"]))
    own = [name for name in ("query_id", "document_id") if name in judged.columns]
    judged = judged.sort("score", descending=True).unique(["split", "query_key", "document_key", *own], keep="first")
    found = draw(judged, tables.source, "query_key")
    for side in ("query", "document"):
        found = _with_ids(found, f"{side}_id", f"{side}_key", f"{side}_key", tables.where(tables.train))
    documents = found.select("document_id", text="document").unique("document_id")
    queries = found.select("query_id", text="query").unique("query_id")
    qrels = found.group_by("query_id", "document_id", "split").agg(pl.col("score").max())
    has_scores = "given" in found.columns
    given = [found.drop_nulls("given").select("query_id", "document_id", "given")] if has_scores else None
    return Rows(documents, queries, qrels.select(QRELS.names), len(table), given)


def _judged(tables: Tables, table: pl.DataFrame) -> pl.DataFrame:
    """JUDGED, `query_key` a hash of the query."""
    table = tables.whole_rows(table, ["query"])
    table = table.with_columns(query_key=_hashes(table["query"]))
    has_lists = table.schema["positive"] == pl.List
    if "id" in table.columns:
        named = ("query_id",) if has_lists else ("query_id", "positive_id")
        table = table.with_columns(pl.col("id").alias(name) for name in named if name not in table.columns)
    if "scores" in table.columns:
        positives = pl.col("positive").list.len() if has_lists else pl.lit(1)
        table = table.with_columns(
            positive_score=pl.col("scores").list.head(positives), negative_score=pl.col("scores").list.slice(positives)
        )
    score = pl.col("relevance") if "relevance" in table.columns else pl.lit(1, pl.Int32)
    found = tables.whole_rows(
        _exploded(table.drop("negative", strict=False), "positive", "positive_score"), ["positive"]
    )
    sides = {"positive": found.with_columns(score=score)}
    if "negative" in table.columns:  # a row need not have one
        found = _exploded(table.drop("positive"), "negative", "negative_score")  # without copies of the other texts
        found = found.filter(pl.col("negative").str.contains(r"\S"))
        sides["negative"] = found.with_columns(score=pl.lit(0, pl.Int32))
    judged = []
    for side, found in sides.items():
        names = {side: "document", f"{side}_id": "document_id", f"{side}_score": "given"}
        judged.append(found.rename(names, strict=False).select(by_name(*JUDGED, require_all=False)))
    return pl.concat(judged, how="diagonal")


def _as_pairs(tables: Tables, table: pl.DataFrame) -> pl.DataFrame:
    """text1, text2, label as query, positive, relevance: what the label says."""
    scores = tables.source.label_scores
    score = table["label"].replace_strict(scores, default=None, return_dtype=pl.Int32)
    if score.null_count() == len(score):
        found = ", ".join(map(str, table["label"].unique(maintain_order=True)[:9]))
        raise InputError(
            f"{tables.where(tables.train)}: no label is one of {', '.join(scores)}; found: {found}; say which "
            "are 1 or 0: --label_scores"
        )
    table = table.with_columns(relevance=score).filter(score.is_not_null())
    table = tables.whole_rows(table, ["text1", "text2"])
    table = table.filter(text_keys(table["text1"]) != text_keys(table["text2"]))
    return table.rename({"text1": "query", "text2": "positive"})


# --- labelled texts -------------------------------------------------------------------------------------------------


def _read_texts(tables: Tables) -> Rows:
    """Every text is a query, each of the first split a document too; a query's positive is drawn from its class.

    What also stands in another split is no document: as a positive or a negative it would be trained on.
    """
    where, table = tables.where(tables.train), read_splits(tables)
    if separator := tables.source.label_separator:
        table = table.with_columns(pl.col("label").str.split(separator))
    # a text of several classes has a row for each; of lists of texts each has its own
    lists = ("text", "label") if table.schema["text"] == pl.List else ("label",)
    table = _exploded(table, *lists)
    seen = len(table)
    table = tables.whole_rows(table, ["text", "label"])
    # case and white space make no other text: a query whose positive says the same would teach nothing
    rows = zip(in_blocks(table["label"]), in_blocks(table["text"]), strict=True)
    hashes = [stable_hash(label, *text.casefold().split()) for label, text in rows]
    table = table.with_columns(text_keys(table["text"]), hash=pl.Series(hashes, dtype=pl.UInt64), score=1)
    texts = draw(table.unique(["split", "hash"], keep="first", maintain_order=True), tables.source, "hash")
    if "id" in texts.columns:
        texts = texts.with_columns(query_id="id", document_id="id")
    for name in ("query_id", "document_id"):
        texts = _with_ids(texts, name, "hash", "key", where)
        if "id" in texts.columns:  # a text of several classes is merged again in the corpus, and keeps the smallest id
            further = pl.col("hash").rank("dense").over(name) > 1
            further = pl.when(further).then(pl.concat_str(name, "label", separator=" ")).otherwise(name)
            texts = texts.with_columns(further.alias(name))
    is_train = pl.col("split") == tables.train
    inside = texts.filter(is_train).join(texts.filter(~is_train), on="key", how="anti", maintain_order="left")
    check_rows(inside, f"{where}: every text also stands in {', '.join(tables.asked[1:])}")
    drawn = draw_of_class(texts.drop("document_id"), inside.select("hash", "document_id", "label"), tables.source.seed)
    qrels = drawn.select("query_id", "document_id", pl.col("score").cast(pl.Int32), "split")
    documents = inside.select("document_id", "text", pl.col("label").alias("class"))
    queries = texts.select("query_id", "text").unique("query_id", keep="first", maintain_order=True)
    return Rows(documents, queries, qrels, seen)


def draw_of_class(texts: pl.DataFrame, documents: pl.DataFrame, seed: int) -> pl.DataFrame:
    """`texts` (hash, label) with the document_id of a document of their label, never their own; others left out.

    documents: hash, document_id, label. Hashes are unique, a text's own the same on both sides.
    """
    place, size = pl.int_range(pl.len(), dtype=pl.UInt64), pl.len().cast(pl.UInt64)
    documents = documents.sort("hash").with_columns(place=place.over("label"))
    texts = texts.with_columns(drawn=_hashes(texts["hash"], seed))
    texts = texts.join(documents.group_by("label").agg(others=size), on="label", maintain_order="left")
    texts = texts.join(documents.select("hash", own="place"), on="hash", how="left", maintain_order="left")
    texts = texts.with_columns(pl.col("others") - pl.col("own").is_not_null().cast(pl.UInt64))
    texts = texts.filter(pl.col("others") > 0).with_columns(place=pl.col("drawn") % pl.col("others"))
    texts = texts.with_columns(pl.col("place") + (pl.col("place") >= pl.col("own")).fill_null(False).cast(pl.UInt64))
    return texts.join(documents.drop("hash"), on=["label", "place"], maintain_order="left")


# --- what they share ------------------------------------------------------------------------------------------------


def _exploded(table: pl.DataFrame, texts: str, beside: str = "") -> pl.DataFrame:
    """A row for each text (or id) of a column that may hold lists, with what it has in `beside`, where that is there.

    Raises InputError where a row has not as many of both, or a number is none.
    """
    columns = [name for name in (texts, beside) if name in table.columns]
    single = [name for name in columns if table.schema[name] != pl.List]
    if single == columns == [texts]:
        return table
    table = table.with_columns(map(pl.concat_list, single))
    first, last = pl.col(columns[0]), pl.col(columns[-1])

    def refuse(bad: pl.DataFrame, what: str) -> None:
        if len(bad):
            raise InputError(f"{bad['where'][0]}: row {bad['row'][0]} {what}")

    refuse(table.filter(first.list.len() != last.list.len()), f"has not as many {beside} as {texts}; mend it")
    table = table.filter(first.list.len() > 0).explode(columns)
    if table.schema[columns[-1]].is_float():
        refuse(table.filter(~last.is_finite()), f"has a {beside} that is NaN or infinite; mend it or leave it out")
    return table


def _with_ids(found: pl.DataFrame, name: str, hash: str, text: str, where: str) -> pl.DataFrame:
    """`found` with the ids `name` of its texts: the smallest of the source's own of a `hash`, else made of that.

    Raises InputError for an id of the source's that stands for two of `text`.
    """
    made = _ids(name[0], found[hash])
    if name not in found.columns:
        return found.with_columns(made.alias(name))
    found = found.with_columns(pl.coalesce(pl.col(name).min().over(hash), made))
    twice = found.filter(pl.col(text).n_unique().over(name) > 1)[name]
    if len(twice):
        raise InputError(
            f"{where}: id {twice[0]!r} stands for two texts; make ids unique, or leave the column out: "
            "--columns '{id: null}'"
        )
    return found


def _ids(prefix: str, hashes: pl.Series) -> pl.Series:
    return pl.Series((f"{prefix}{value:016x}" for value in in_blocks(hashes)), dtype=pl.String)


def _hashes(values: pl.Series, *seed: int) -> pl.Series:
    """stable_hash of each value, after `seed`."""
    progress = tqdm(in_blocks(values), "ids of texts", len(values), unit=" texts", delay=2)
    return pl.Series((stable_hash(*seed, value) for value in progress), dtype=pl.UInt64)
