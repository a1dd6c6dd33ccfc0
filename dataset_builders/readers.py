"""Reads the documents, queries and qrels in a set's tables, whatever their layout.

Texts without ids get them from a hash, so that the same text has the same id in every build. A judgement of a text
that is not there is an error in a folder, and left out of a set from the Hub.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import polars as pl
from tqdm import tqdm

from common.cli import InputError
from dataset_builders.layouts import COLUMNS
from dataset_builders.near_duplicates import in_blocks, stable_hash, text_keys
from dataset_builders.schema import QRELS, check_rows
from dataset_builders.tables import Tables

TWO_TEXTS = (
    "{where}: id {id!r} stands for two texts; make ids unique, or leave the column out: --columns '{{id: null}}'"
)
# What an evaluation asks about.
ASKED = {
    "pairs": ("query",),
    "texts": ("text",),
    "text_pairs": ("text1", "text2"),
    "graded_pairs": ("sentence1", "sentence2"),
}


@dataclass(frozen=True)
class Rows:
    """Raw data. Ids are unique among the documents and among the queries."""

    documents: pl.DataFrame  # document_id, text; and `class` for classification and clustering
    queries: pl.DataFrame  # query_id, text
    qrels: pl.DataFrame  # query_id, document_id, score (0: judged and not relevant), split (null: the source has none)
    seen: int  # pairs or judgements that the source holds
    # query_id, document_id, given: a teacher's scores that came with the texts, some at a time
    given: Iterable[pl.DataFrame] | None = None


@dataclass(frozen=True)
class Draw:
    """Whole queries, in the order of a seeded hash, that hold up to `num_pairs` positives (null: all queries).

    A larger number holds a smaller one's queries.
    """

    num_pairs: int | None = None
    seed: int = 0

    def keeps(self, qrels: pl.DataFrame, query: str = "query_id") -> pl.DataFrame:
        """The judgements (`query`, score) of the queries that are drawn."""
        if self.num_pairs is None:
            return qrels
        queries = qrels.group_by(query, maintain_order=True).agg(positives=(pl.col("score") > 0).sum())
        queries = queries.with_columns(order=_hashes(queries[query], self.seed)).sort("order", maintain_order=True)
        drawn = (pl.col("positives").cum_sum() <= self.num_pairs) | (pl.int_range(pl.len()) == 0)
        return qrels.join(queries.filter(drawn), on=query, how="semi", maintain_order="left")


def read_layout(tables: Tables, splits: Sequence[str], draw: Draw) -> Rows:
    """What a set holds for `splits`; of the first one, which is trained on, what `draw` keeps."""
    readers = {"corpus": _read_corpus, "pairs": _read_pairs, "texts": _read_texts, "text_pairs": _read_pairs}
    return readers[tables.layout](tables, splits, draw)


def read_graded_pairs(tables: Tables, split: str, draw: Draw) -> pl.DataFrame:
    """sentence1, sentence2, score (float64), in the order of the source."""
    table = tables.whole_rows(tables.read(split), [*COLUMNS["graded_pairs"]], tables.where(split))
    pairs = pl.DataFrame({"query_id": pl.int_range(len(table), eager=True), "score": 1})
    return table[draw.keeps(pairs)["query_id"]]


def read_asked(tables: Tables, split: str) -> tuple[pl.Series, pl.DataFrame | None]:
    """The texts that a split asks about; and the documents (text, perhaps title) that are searched, where some are."""
    if tables.layout != "corpus":
        table = tables.read(split)
        return pl.concat([_exploded(table, name)[name].rename("text") for name in ASKED[tables.layout]]), None
    qrels, queries = tables.read_part("qrels"), part_texts(tables, tables.read_part("queries"), "queries", "query_id")
    corpus = tables.whole_rows(tables.read_part("corpus"), ["text"], tables.where("corpus"))
    return queries.join(qrels.filter(split=split), on="query_id", how="semi")["text"], corpus


def _read_corpus(tables: Tables, splits: Sequence[str], draw: Draw) -> Rows:
    documents = part_texts(tables, tables.read_part("corpus"), "corpus", "document_id")
    queries = part_texts(tables, tables.read_part("queries"), "queries", "query_id")
    where, table = tables.where("qrels"), tables.read_part("qrels").rename({"corpus_id": "document_id"})
    qrels = tables.whole_rows(table, QRELS.names, where).select(QRELS.names)
    seen = len(table)
    for texts, part in ((queries, "queries"), (documents, "corpus")):
        known = _known(tables, qrels, where, texts, part)
        if len(known) < len(qrels):
            left_out = f"{len(qrels) - len(known):,} rows whose {texts.columns[0]} is not in {part} left out"
            tqdm.write(f"{where}: {left_out}", file=sys.stderr)
        qrels = known
    is_train = pl.col("split") == splits[0]
    if tables.made:
        asked = queries.join(qrels.filter(is_train), on="query_id", how="semi")
        dealt = asked.select("query_id", dealt=tables.deal(text_keys(asked["text"])))
        qrels = qrels.join(dealt, on="query_id", how="left", maintain_order="left")
        qrels = qrels.with_columns(split=pl.when(is_train).then("dealt").otherwise("split")).drop("dealt")
    qrels = pl.concat([draw.keeps(qrels.filter(is_train)), qrels.filter(~is_train)])
    known_queries = queries
    if tables.published or draw.num_pairs:  # the judgements of other splits were not read
        queries = queries.join(qrels, on="query_id", how="semi", maintain_order="left")
    given = _given_scores(tables, known_queries, queries, documents) if tables.has_scores else None
    return Rows(documents, queries, qrels, seen, given)


def _known(tables: Tables, rows: pl.DataFrame, where: str, texts: pl.DataFrame, part: str) -> pl.DataFrame:
    """The rows whose id (the first column of `texts`) has a text. Of a folder all must have one, of any set some."""
    column = texts.columns[0]
    known = rows.join(texts, on=column, how="semi", maintain_order="left")
    if len(known) == len(rows) or (tables.published and len(known)):
        return known
    unknown = rows.join(texts, on=column, how="anti", maintain_order="left")[column]
    raise InputError(
        f"{where}: {column} {unknown[0]!r} (and {len(unknown) - 1} more) is not in {tables.where(part)}; "
        "add its text there or leave the row out"
    )


def _given_scores(
    tables: Tables, known_queries: pl.DataFrame, asked: pl.DataFrame, documents: pl.DataFrame
) -> Iterator[pl.DataFrame]:
    """query_id, document_id, given of the queries in `asked`, some at a time."""
    where, left_out = tables.where("scores"), 0
    for table in tables.read_scores():
        lists = _known(tables, table, where, known_queries, "queries").join(asked, on="query_id", how="semi")
        if len(lists):
            scores = _with_scores(lists, "document_ids", "given", where).rename({"document_ids": "document_id"})
            known = _known(tables, scores, where, documents, "corpus")
            left_out += len(scores) - len(known)
            yield known.select("query_id", "document_id", "given")
    if left_out:
        tqdm.write(f"{where}: {left_out:,} scores whose document_id is not in corpus left out", file=sys.stderr)


def _with_scores(table: pl.DataFrame, texts: str, scores: str, where: str) -> pl.DataFrame:
    """A row for each of a row's texts (or ids) and its score. Raises InputError where their numbers differ."""
    if table.schema[texts] != pl.List:
        table = table.with_columns(pl.concat_list(texts))
    wrong = table.filter(pl.col(texts).list.len() != pl.col(scores).list.len())
    if len(wrong):
        raise InputError(f"{where}: row {wrong['row'][0]} has not as many {scores} as {texts}; mend it")
    table = table.filter(pl.col(texts).list.len() > 0).explode(texts, scores)
    bad = table.filter(~pl.col(scores).is_finite())
    if len(bad):
        raise InputError(
            f"{where}: row {bad['row'][0]} has a {scores} that is NaN or infinite; mend it or leave it out"
        )
    return table


def part_texts(tables: Tables, found: pl.DataFrame, part: str, id_name: str) -> pl.DataFrame:
    """`id_name`, text (title and text) of a part that was read. The ids are unique."""
    where = tables.where(part)
    if "title" in found.columns:
        text = pl.concat_str("title", "text", separator=" ", ignore_nulls=True).str.strip_chars()
        found = found.with_columns(text=text)
    found = tables.whole_rows(found.rename({"_id": "id"}), ["id", "text"], where)
    twice = found.filter(pl.col("id").is_duplicated())["id"]
    if len(twice):
        raise InputError(f"{where}: id {twice[0]!r} occurs twice; ids must be unique")
    return found.select(pl.col("id").alias(id_name), "text")


def _read_pairs(tables: Tables, splits: Sequence[str], draw: Draw) -> Rows:
    """Documents are the texts that some query was judged with; of equal judgements the best score counts."""
    parts, seen = [], 0
    for split in splits:
        judged = tables.read(split)
        seen += len(judged)
        judged = (_labelled_pairs if tables.layout == "text_pairs" else _pairs)(tables, split, judged)
        own = [f"own_{name}" for name in ("query", "positive") if f"own_{name}" in judged.columns]
        judged = judged.sort("score", descending=True).unique(["query_key", "document_key", *own], keep="first")
        parts.append(
            (draw.keeps(judged, "query_key") if split == splits[0] else judged).with_columns(split=pl.lit(split))
        )
    found = pl.concat(parts, how="diagonal")
    where = tables.where(splits[0])
    found = _with_ids(_with_ids(found, "query", "own_query", where), "document", "own_positive", where)
    documents = found.select("document_id", text="document").unique("document_id")
    queries = found.select("query_id", text="query").unique("query_id")
    qrels = found.group_by("query_id", "document_id", "split").agg(pl.col("score").max())
    scored = (
        [found.drop_nulls("given").select("query_id", "document_id", "given")] if "given" in found.columns else None
    )
    return Rows(documents, queries, qrels.select(QRELS.names), seen, scored)


def _with_ids(found: pl.DataFrame, side: str, own: str, where: str) -> pl.DataFrame:
    """With `side`_id: the smallest of the source's own ids of a text (a column of `found`, if it has some), else one
    made of its hash.
    """
    key, name = f"{side}_key", f"{side}_id"
    found = found.with_columns(_ids(side[0], found[key]).alias(name))
    if own in found.columns:
        found = found.with_columns(pl.coalesce(pl.col(own).min().over(key), name).alias(name))
        twice = found.filter(pl.col(key).n_unique().over(name) > 1)[name]
        if len(twice):
            raise InputError(TWO_TEXTS.format(where=where, id=twice[0]))
    return found


def _pairs(tables: Tables, split: str, table: pl.DataFrame) -> pl.DataFrame:
    """query, document, score, the hashes of the texts as query_key and document_key, and the source's own ids."""
    where = tables.where(split)
    table = tables.whole_rows(table, ["query"], where)
    own_query = next((name for name in ("query_id", "id") if name in table.columns), None)
    own_positive = next((name for name in ("positive_id", "id") if name in table.columns), None)
    if table.schema["positive"] == pl.List and own_positive == "id":
        own_positive = None  # of one text alone
    table = table.with_columns(query_key=_text_hashes(table["query"]))
    if "scores" in table.columns:
        positives = pl.col("positive").list.len() if table.schema["positive"] == pl.List else pl.lit(1)
        table = table.with_columns(
            positive_score=pl.col("scores").list.head(positives), negative_score=pl.col("scores").list.slice(positives)
        )
    judged = []
    for side, score in (("positive", pl.col("relevance") if "relevance" in table.columns else 1), ("negative", 0)):
        if side not in table.columns:
            continue
        is_scored = f"{side}_score" in table.columns
        found = _with_scores(table, side, f"{side}_score", where) if is_scored else _exploded(table, side)
        if side == "negative":  # a row need not have one
            found = found.filter(pl.col(side).str.strip_chars() != "")
        else:
            found = tables.whole_rows(found, [side], where)
        own = {"own_query": own_query, "own_positive": own_positive if side == "positive" else None}
        own |= {"given": f"{side}_score" if is_scored else None}
        own = {name: pl.col(column) for name, column in own.items() if column}
        score = pl.lit(score, pl.Int32) if isinstance(score, int) else score
        judged.append(
            found.select(
                "query", "query_key", document=side, document_key=_text_hashes(found[side]), score=score, **own
            )
        )
    return pl.concat(judged, how="diagonal")


def _labelled_pairs(tables: Tables, split: str, table: pl.DataFrame) -> pl.DataFrame:
    """The same of pairs whose label says whether they are positives."""
    where = tables.where(split)
    score = table["label"].replace_strict(tables.keys.label_scores, default=None, return_dtype=pl.Int32)
    if score.null_count() == len(score):
        found = ", ".join(map(str, table["label"].unique(maintain_order=True)[:9]))
        known = ", ".join(tables.keys.label_scores)
        raise InputError(f"{where}: no label is one of {known}; found: {found}; say which are 1 or 0: --label_scores")
    table = table.with_columns(score=score).filter(score.is_not_null())
    table = tables.whole_rows(table, ["text1", "text2"], where)
    table = table.filter(text_keys(table["text1"]) != text_keys(table["text2"]))
    hashes = {"query_key": _text_hashes(table["text1"]), "document_key": _text_hashes(table["text2"])}
    return table.select("score", query="text1", document="text2", **hashes)


def _read_texts(tables: Tables, splits: Sequence[str], draw: Draw) -> Rows:
    """Every text is a query, each of the first split a document too; a query's positive is drawn from its class.

    What also stands in another split is no document: as a positive or a negative it would be trained on.
    """
    parts, seen = [], 0
    for split in splits:
        table = _labelled_texts(tables, split)
        seen += len(table)
        table = tables.whole_rows(table, ["text", "label"], tables.where(split))
        # case and white space make no other text: a query whose positive says the same would teach nothing
        rows = zip(in_blocks(table["label"]), in_blocks(table["text"]), strict=True)
        hashes = [stable_hash(label, *text.casefold().split()) for label, text in rows]
        table = table.with_columns(query_id=pl.Series(hashes, dtype=pl.UInt64), split=pl.lit(split))
        table = table.unique("query_id", keep="first", maintain_order=True).with_columns(score=1)
        parts.append(draw.keeps(table) if split == splits[0] else table)
    texts = pl.concat(parts, how="diagonal")
    texts = texts.with_columns(text_keys(texts["text"]))
    is_train = pl.col("split") == splits[0]
    inside = texts.filter(is_train).join(texts.filter(~is_train), on="key", how="anti", maintain_order="left")
    check_rows(inside, f"{tables.where(splits[0])}: every text also stands in {', '.join(splits[1:])}")
    qrels = draw_of_class(texts, inside.select("label", document_id="query_id"), draw.seed)
    ids = _ids_of_texts(texts, tables.where(splits[0]))
    qrels = qrels.with_columns(ids("q", qrels["query_id"]), ids("d", qrels["document_id"]), score=pl.lit(1, pl.Int32))
    documents = inside.select(
        ids("d", inside["query_id"]).alias("document_id"), "text", pl.col("label").alias("class")
    )
    queries = texts.unique("query_id", keep="first", maintain_order=True)
    queries = queries.select(ids("q", queries["query_id"]), "text")
    return Rows(documents, queries, qrels.select(QRELS.names), seen)


def _ids_of_texts(texts: pl.DataFrame, where: str) -> Callable[[str, pl.Series], pl.Series]:
    """(prefix, hashes of `texts`) -> their ids: the source's own, or made of the prefix and the hash."""
    if "id" not in texts.columns:
        return _ids
    named = texts.group_by("query_id").agg(pl.col("id").min(), pl.col("key", "label").first()).sort("query_id")
    twice = named.filter(pl.col("key").n_unique().over("id") > 1)["id"]
    if len(twice):
        raise InputError(TWO_TEXTS.format(where=where, id=twice[0]))
    # a text of several classes is merged again in the corpus, where it keeps the smallest id
    further = pl.int_range(pl.len()).over("id") > 0
    named = named.with_columns(pl.when(further).then(pl.concat_str("id", "label", separator=" ")).otherwise("id"))
    return lambda prefix, hashes: hashes.replace_strict(named["query_id"], named["id"], return_dtype=pl.String)


def _labelled_texts(tables: Tables, split: str) -> pl.DataFrame:
    """row, text, label; a text of several classes has a row for each."""
    table = tables.read(split)
    if tables.keys.label_separator:
        table = table.with_columns(pl.col("label").str.split(tables.keys.label_separator))
    if table.schema["text"] != pl.List:
        return _exploded(table, "label")
    lengths = table.select(pl.col("text", "label").list.len())
    if table.schema["label"] != pl.List or not (lengths["text"] == lengths["label"]).all():
        raise InputError(f"{tables.where(split)}: a row has not as many labels as texts; mend it or leave it out")
    return table.filter(lengths["text"] > 0).explode("text", "label")


def draw_of_class(texts: pl.DataFrame, documents: pl.DataFrame, seed: int) -> pl.DataFrame:
    """`texts` (query_id, label) with the document_id of a document of their label, never their own; others left out.

    Ids are unique hashes, a text's own the same on both sides; `documents` has document_id, label.
    """
    place = pl.int_range(pl.len(), dtype=pl.UInt64).over("label")
    documents = documents.sort("document_id").with_columns(place=place, size=pl.len().cast(pl.UInt64).over("label"))
    own = documents.select(query_id="document_id", own="place")
    texts = texts.with_columns(drawn=_hashes(texts["query_id"], seed))
    texts = texts.join(documents.select("label", "size").unique(), on="label", maintain_order="left")
    texts = texts.join(own, on="query_id", how="left", maintain_order="left")
    texts = texts.with_columns(others=pl.col("size") - pl.col("own").is_not_null().cast(pl.UInt64)).filter(
        pl.col("others") > 0
    )
    texts = texts.with_columns(place=pl.col("drawn") % pl.col("others"))
    texts = texts.with_columns(pl.col("place") + (pl.col("place") >= pl.col("own")).fill_null(False).cast(pl.UInt64))
    return texts.join(documents.drop("size"), on=["label", "place"], maintain_order="left")


def _exploded(table: pl.DataFrame, name: str) -> pl.DataFrame:
    """A row for each text of a column of lists; the table itself where it holds texts."""
    if table.schema[name] != pl.List:
        return table
    return table.filter(pl.col(name).list.len() > 0).explode(name)


def _ids(prefix: str, hashes: pl.Series) -> pl.Series:
    return pl.Series(hashes.name, (f"{prefix}{value:016x}" for value in in_blocks(hashes)), pl.String)


def _text_hashes(texts: pl.Series) -> pl.Series:
    progress = tqdm(in_blocks(texts), "ids of texts", len(texts), unit=" texts", delay=2)
    return pl.Series((stable_hash(text) for text in progress), dtype=pl.UInt64)


def _hashes(values: pl.Series, seed: int) -> pl.Series:
    return pl.Series((stable_hash(seed, value) for value in in_blocks(values)), dtype=pl.UInt64)
