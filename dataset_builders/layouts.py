"""How raw data lies in tables, in a folder or on the Hugging Face Hub, and the documents, queries and qrels in it.

| layout | columns | task types |
|---|---|---|
| corpus | a corpus, its queries and qrels, as BEIR and mteb publish them | retrieval |
| pairs | query, positive, and negative where `columns` names one; texts or lists of texts | retrieval |
| texts | text, label (in a folder: label_text); texts or lists of texts | classification, clustering |
| text_pairs | text1, text2, label (in a folder: label_text) | duplicates, nli |
| graded_pairs | sentence1, sentence2, score | sts |

Rows without ids get them from their texts, so that the same text has the same id in every build. A row without text,
and a judgement of a text that is not there, is refused in a folder, and left out of a set from the Hub: whoever builds
from that cannot mend it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from common.cli import InputError
from common.models import datasets_cache
from common.steps import files_of, fingerprint, read_parquet
from dataset_builders.near_duplicates import normalised
from dataset_builders.schema import DOCUMENTS, QRELS, check_rows, to_schema

Layout = Literal["corpus", "pairs", "texts", "text_pairs", "graded_pairs"]
COLUMNS: dict[str, tuple[str, ...]] = {
    "corpus": (),  # its three tables have the columns of PARTS
    "pairs": ("query", "positive", "negative"),
    "texts": ("text", "label"),
    "text_pairs": ("text1", "text2", "label"),
    "graded_pairs": ("sentence1", "sentence2", "score"),
}
PARTS = {
    "corpus": ("_id", "text"),  # and title, where there is one
    "queries": ("_id", "text"),
    "qrels": ("query_id", "corpus_id", "score"),  # and, in a folder, split
}
# What a part's columns are called on the Hub, where they have another name than in a folder.
HUB_PARTS = {"id": "_id", "query-id": "query_id", "corpus-id": "corpus_id"}
FOLDER_COLUMNS = {"texts": {"label": "label_text"}, "text_pairs": {"label": "label_text"}}
# The score of a pair with this label. One with any other label (neutral) says nothing, and is left out; so is the pair
# of a text with itself.
LABEL_SCORES = {"entailment": 1, "contradiction": 0, "duplicate": 1, "not_duplicate": 0}


@dataclass(frozen=True)
class Rows:
    """Raw data. Ids are unique among the documents and among the queries."""

    documents: pa.Table  # document_id, text; and `class` for classification and clustering
    queries: pa.Table  # query_id, text
    qrels: pa.Table  # query_id, document_id, score (0: judged and not relevant), split (null: the source has none)
    seen: int  # pairs or judgements that the source holds


@dataclass(frozen=True)
class Draw:
    """Whole queries, in the order of a seeded hash, that hold up to `num_pairs` positives (null: all queries).

    A larger number holds a smaller one's queries.
    """

    num_pairs: int | None = None
    seed: int = 0

    def keeps(self, ids: Iterable[object], positives: np.ndarray) -> np.ndarray:
        """Which of the queries are drawn: (n,) bool, of n ids and how many positives each has."""
        kept = np.ones(len(positives), bool)
        if self.num_pairs is not None:
            order = np.argsort(_hashes(ids, self.seed), kind="stable")
            count = np.searchsorted(positives[order].cumsum(), self.num_pairs, side="right")
            kept[order[max(1, count) :]] = False
        return kept


class FolderTables:
    """A folder of Parquet files: SPLIT.parquet, or corpus.parquet, queries.parquet and qrels.parquet."""

    published = False
    label_separator = None
    label_scores = LABEL_SCORES

    def __init__(self, folder: Path, splits: Sequence[str]) -> None:
        self.folder = folder
        self.layout: Layout = self._find_layout(splits[0])
        self.columns = FOLDER_COLUMNS.get(self.layout, {})
        self.files = [folder / f"{name}.parquet" for name in (PARTS if self.layout == "corpus" else splits)]
        for path in self.files:
            _read_schema(path)

    def _find_layout(self, split: str) -> Layout:
        path = self.folder / f"{split}.parquet"
        if (self.folder / "corpus.parquet").is_file():
            return "corpus"
        found = set(_read_schema(path).names)
        for layout in ("pairs", "texts", "text_pairs", "graded_pairs"):
            renamed = FOLDER_COLUMNS.get(layout, {})
            if {renamed.get(name, name) for name in COLUMNS[layout] if name != "negative"} <= found:
                return layout
        raise InputError(
            f"{path}: columns {', '.join(sorted(found))}; a split has query and positive, text and label_text, "
            "text1, text2 and label_text, or sentence1, sentence2 and score"
        )

    def where(self, name: str) -> str:
        return str(self.folder / f"{name}.parquet")

    def read(self, split: str, names: Sequence[str]) -> pa.Table:
        theirs = [self.columns.get(name, name) for name in names]
        return read_parquet(Path(self.where(split)), theirs).rename_columns(list(names))

    def read_part(self, part: str, splits: Sequence[str]) -> pa.Table:
        path = Path(self.where(part))
        more = {"corpus": ["title"] if "title" in _read_schema(path).names else [], "qrels": ["split"]}
        return read_parquet(path, [*PARTS[part], *more.get(part, [])])


@dataclass(frozen=True)
class HubTables:
    """A data set on the Hub at `revision`, or a folder that `load_dataset` reads."""

    dataset: str
    config: str | None
    revision: str | None
    layout: Layout
    columns: Mapping[str, str | Sequence[str]]  # our name -> theirs; several are joined by a space
    label_separator: str | None
    label_scores: Mapping[str, int]
    published: ClassVar[bool] = True

    @cached_property
    def _cache(self) -> str | None:
        folder = Path(self.dataset)
        return datasets_cache(fingerprint(files_of(folder))) if folder.is_dir() else None

    def where(self, name: str) -> str:
        return f"{self.dataset} ({name})"

    def read(self, split: str, names: Sequence[str]) -> pa.Table:
        from datasets import load_dataset

        with self._answered(split):
            dataset = load_dataset(
                self.dataset, self.config, split=split, revision=self.revision, cache_dir=self._cache
            )
        table = dataset.with_format("arrow")[:]
        taken = {}
        for name in names:
            theirs = self.columns.get(name, name)
            theirs = [theirs] if isinstance(theirs, str) else theirs
            self._check_columns(theirs, table, split)
            taken[name] = _joined(table.select(theirs), self.where(split))
        return pa.table(taken)

    def read_part(self, part: str, splits: Sequence[str]) -> pa.Table:
        """A part is a config, as mteb's loader reads it. Corpus and queries have a single split, or one for each."""
        from datasets import get_dataset_config_names, load_dataset

        name = f"{self.config}-{part}" if self.config else part
        with self._answered(part):
            if name == "qrels" and name not in get_dataset_config_names(self.dataset, revision=self.revision):
                name = "default"
            loaded = load_dataset(self.dataset, name, revision=self.revision, cache_dir=self._cache)
        tables = {found: dataset.with_format("arrow")[:] for found, dataset in loaded.items()}
        if part != "qrels" and len(tables) == 1:
            splits = list(tables)
        for split in splits:
            if split not in tables:
                raise InputError(f"{self.where(part)}: no split {split!r}; it has {', '.join(tables)}")
        tables = {
            split: tables[split].rename_columns([HUB_PARTS.get(name, name) for name in tables[split].column_names])
            for split in splits
        }
        names = list(PARTS[part])
        if part == "corpus" and all("title" in table.column_names for table in tables.values()):
            names.append("title")
        for split, table in tables.items():
            self._check_columns(names, table, f"{part}, {split}")
        if part == "qrels":
            return pa.concat_tables(
                table.select(names).append_column("split", pa.repeat(split, len(table)))
                for split, table in tables.items()
            )
        return pa.concat_tables(table.select(names) for table in tables.values())

    def _check_columns(self, names: Iterable[str], table: pa.Table, name: str) -> None:
        for column in names:
            if column not in table.column_names:
                raise InputError(f"{self.where(name)}: no column {column!r}; it has {', '.join(table.column_names)}")

    @contextmanager
    def _answered(self, name: str) -> Iterator[None]:
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HTTPError

        try:
            yield
        except (DatasetsError, HTTPError, OSError, ValueError) as error:
            # "An error occurred while generating the dataset" helps nobody
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise InputError(f"data set {self.where(name)}: {reason}") from None


Tables = FolderTables | HubTables


def read_layout(tables: Tables, splits: Sequence[str], draw: Draw) -> Rows:
    """What a set holds for `splits`; of the first one, which is trained on, what `draw` keeps."""
    readers = {"corpus": _read_corpus, "pairs": _read_pairs, "texts": _read_texts, "text_pairs": _read_pairs}
    if tables.layout not in readers:
        raise InputError(f"{tables.where(splits[0])}: pairs with a score are data for task_type 'sts'")
    return readers[tables.layout](tables, splits, draw)


def read_graded_pairs(tables: Tables, split: str, draw: Draw) -> pa.Table:
    """sentence1, sentence2, score (float64), in the order of the source."""
    where = tables.where(split)
    table = _whole_rows(tables.read(split, COLUMNS["graded_pairs"]), ["sentence1", "sentence2"], tables, where)
    schema = pa.schema([("sentence1", pa.string()), ("sentence2", pa.string()), ("score", pa.float64())])
    table = to_schema(table, schema, where)
    return table.filter(draw.keeps(range(len(table)), np.ones(len(table))))


def stable_hash(*parts: object) -> int:
    """64 bits that depend on nothing but `parts`: the same in every process, on every machine."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _read_corpus(tables: Tables, splits: Sequence[str], draw: Draw) -> Rows:
    documents, queries = (_read_texts_by_id(tables, part, splits) for part in ("corpus", "queries"))
    where = tables.where("qrels")
    qrels = tables.read_part("qrels", splits)
    check_rows(qrels, where)
    qrels = to_schema(qrels.rename_columns(QRELS.names), QRELS, where)
    seen = len(qrels)
    for column, texts, part in (("query_id", queries, "queries"), ("document_id", documents, "corpus")):
        known = pc.is_in(qrels[column], value_set=texts["id"])
        unknown = qrels[column].filter(pc.invert(known))
        if len(unknown) and not (tables.published and pc.any(known).as_py()):  # of all rows: other ids, not lost texts
            raise InputError(
                f"{where}: {column} {unknown[0].as_py()!r} (and {len(unknown) - 1} more) is not in "
                f"{tables.where(part)}; add its text there or leave the row out"
            )
        if len(unknown):
            tqdm.write(f"{where}: {len(unknown):,} rows whose {column} is not in {part} left out", file=sys.stderr)
            qrels = qrels.filter(known)
    documents, queries = (
        _whole_rows(texts, ["text"], tables, tables.where(part), texts["id"])
        for texts, part in ((documents, "corpus"), (queries, "queries"))
    )
    if tables.published:
        # texts may have been left out, and the judgements of other splits were not read
        for column, texts in (("query_id", queries), ("document_id", documents)):
            qrels = qrels.filter(pc.is_in(qrels[column], value_set=texts["id"]))
        trained = pc.equal(qrels["split"], splits[0])
        train = qrels.filter(trained)
        codes = train["query_id"].combine_chunks().dictionary_encode()
        rows = codes.indices.to_numpy()
        positives = np.bincount(rows, weights=train["score"].to_numpy() > 0, minlength=len(codes.dictionary))
        kept = draw.keeps((name.as_py() for name in codes.dictionary), positives)[rows]
        qrels = pa.concat_tables([train.filter(kept), qrels.filter(pc.invert(trained))])
        queries = queries.filter(pc.is_in(queries["id"], value_set=qrels["query_id"]))
    return Rows(documents.rename_columns(DOCUMENTS.names), queries.rename_columns(["query_id", "text"]), qrels, seen)


def _read_texts_by_id(tables: Tables, part: str, splits: Sequence[str]) -> pa.Table:
    """id, text (title and text). The ids are unique."""
    where = tables.where(part)
    table = tables.read_part(part, splits)
    check_rows(table, where)
    sides = ["title", "text"] if "title" in table.column_names else ["text"]
    text = as_text(_joined(table.select(sides), where), "text", where)
    table = pa.table({"id": as_text(table["_id"], "id", where), "text": text})
    to_schema(table.select(["id"]), pa.schema([("id", pa.string())]), where)
    if pc.count_distinct(table["id"]).as_py() < len(table):
        counts = pc.value_counts(table["id"])
        twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))[0].as_py()
        raise InputError(f"{where}: id {twice!r} occurs twice; ids must be unique")
    return table


def _read_pairs(tables: Tables, splits: Sequence[str], draw: Draw) -> Rows:
    """Documents are the texts that some query was judged with; of equal judgements the best score counts."""
    texts: dict[str, list[pa.Table]] = {"q": [], "d": []}
    qrels, seen = [], 0
    for split in splits:
        queries, judged, rows = _judged_pairs(tables, split)
        seen += rows
        asked, answered = _text_hashes(queries), _text_hashes(judged["text"])
        query, document, score = asked[judged["row"].to_numpy()], answered, judged["score"].to_numpy()
        order = np.lexsort((-score, document, query))
        query, document, score = query[order], document[order], score[order]
        first = np.ones(len(order), bool)
        first[1:] = (query[1:] != query[:-1]) | (document[1:] != document[:-1])
        if split == splits[0]:
            distinct, row = np.unique(query, return_inverse=True)
            positives = np.bincount(row, weights=first & (score > 0))
            first &= draw.keeps(distinct, positives)[row]
        query, document, score = query[first], document[first], score[first]
        texts["q"].append(pa.table({"hash": asked, "text": queries}).filter(np.isin(asked, query)))
        texts["d"].append(pa.table({"hash": answered, "text": judged["text"]}).filter(np.isin(answered, document)))
        columns = [_ids("q", query), _ids("d", document), pa.array(score, pa.int32()), pa.repeat(split, len(score))]
        qrels.append(pa.table(columns, schema=QRELS))
    queries, documents = (_distinct(pa.concat_tables(texts[side]), side) for side in "qd")
    return Rows(documents, queries.rename_columns(["query_id", "text"]), pa.concat_tables(qrels), seen)


def _judged_pairs(tables: Tables, split: str) -> tuple[pa.ChunkedArray, pa.Table, int]:
    """The texts of the queries, what each was judged with (row of the query, text, score), rows of the source."""
    where = tables.where(split)
    if tables.layout == "text_pairs":
        table = tables.read(split, COLUMNS["text_pairs"])
        check_rows(table, where)
        rows = len(table)
        labels = as_text(table["label"], "label", where)
        label = pc.index_in(labels, value_set=pa.array(list(tables.label_scores)))
        if label.null_count == len(label):
            found = ", ".join(map(str, pc.unique(labels)[:9].to_pylist()))
            raise InputError(f"{where}: no label is one of {', '.join(tables.label_scores)}; found: {found}")
        table = table.set_column(2, "label", label).filter(pc.is_valid(label))
        table = _whole_rows(table, ["text1", "text2"], tables, where)
        sides = zip(_strings(table["text1"]), _strings(table["text2"]), strict=True)
        table = table.filter(np.fromiter((normalised(one) != normalised(other) for one, other in sides), bool))
        scores = np.array(list(tables.label_scores.values()), np.int32)[table["label"].to_numpy()]
        judged = {"row": np.arange(len(table)), "text": table["text2"], "score": scores}
        return table["text1"], pa.table(judged), rows
    sides = {"positive": 1, "negative": 0} if "negative" in tables.columns else {"positive": 1}
    table = tables.read(split, ["query", *sides])
    rows = len(table)
    table = _whole_rows(table, ["query"], tables, where)
    judged = []
    for side, score in sides.items():
        found = _whole_rows(_flattened(table[side], side), [side], tables, where)
        found = found.append_column("score", pa.array(np.full(len(found), score, np.int32)))
        judged.append(found.rename_columns(["row", "text", "score"]))
    return table["query"], pa.concat_tables(judged), rows


def _read_texts(tables: Tables, splits: Sequence[str], draw: Draw) -> Rows:
    """Every text is a query, each of the first split a document too; a query's positive is drawn from its class.

    What also stands in another split is no document: as a positive or a negative it would be trained on.
    """
    parts, seen = [], 0
    for split in splits:
        where = tables.where(split)
        table = _labelled_texts(tables, split)
        seen += len(table)
        table = _whole_rows(table, ["text", "label"], tables, where)
        # case and white space make no other text: a query whose positive says the same would teach nothing
        parts_of_text = zip(_strings(table["label"]), _strings(table["text"]), strict=True)
        hashes = np.fromiter(
            (stable_hash(label, *text.casefold().split()) for label, text in parts_of_text), np.uint64, len(table)
        )
        table = _first_of_each(table.add_column(0, "hash", pa.array(hashes)))
        if split == splits[0]:
            table = table.filter(draw.keeps(table["hash"].to_numpy(), np.ones(len(table))))
        parts.append(table)
    here, *elsewhere = (_hashes(map(normalised, _strings(table["text"]))) for table in parts)
    inside = parts[0].filter(~np.isin(here, np.concatenate([np.empty(0, np.uint64), *elsewhere])))
    check_rows(inside, f"{tables.where(splits[0])}: every text also stands in {', '.join(splits[1:])}")
    hashes = inside["hash"].to_numpy()
    qrels = []
    for split, table in zip(splits, parts, strict=True):
        own = table["hash"].to_numpy()
        row = draw_of_class(own, table["label"], hashes, inside["label"], draw.seed)
        found = row >= 0
        columns = [
            _ids("q", own[found]),
            _ids("d", hashes[row[found]]),
            pa.repeat(pa.scalar(1, pa.int32()), found.sum()),
        ]
        qrels.append(pa.table([*columns, pa.repeat(split, found.sum())], schema=QRELS))
    documents = pa.table({"document_id": _ids("d", hashes), "text": inside["text"], "class": inside["label"]})
    queries = _distinct(pa.concat_tables(parts).select(["hash", "text"]), "q")
    return Rows(documents, queries.rename_columns(["query_id", "text"]), pa.concat_tables(qrels), seen)


def _labelled_texts(tables: Tables, split: str) -> pa.Table:
    """text, label; a text of several classes has a row for each."""
    table = tables.read(split, COLUMNS["texts"])
    if tables.label_separator:
        labels = pc.split_pattern(as_text(table["label"], "label", tables.where(split)), tables.label_separator)
        table = table.set_column(1, "label", labels)
    texts, labels = (_flattened(table[name], name) for name in ("text", "label"))
    if _is_list(table["label"]) and not _is_list(table["text"]):
        texts = texts.take(labels["row"])
    elif not texts["row"].equals(labels["row"]):
        raise InputError(f"{tables.where(split)}: a row has not as many labels as texts; mend it or leave it out")
    return pa.table({"text": texts["text"], "label": labels["label"]})


def draw_of_class(
    queries: np.ndarray, labels: pa.ChunkedArray, documents: np.ndarray, classes: pa.ChunkedArray, seed: int
) -> np.ndarray:
    """For each query the row of a document of its class, never itself; -1 where the class has no other.

    Queries and documents are unique hashes, a text's own the same on both sides; `labels` and `classes` are what
    each belongs to.
    """
    names = pc.unique(classes)
    code = pc.index_in(classes, value_set=names).to_numpy()
    order = np.lexsort((documents, code))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    wanted = pc.fill_null(pc.index_in(labels, value_set=names), -1).to_numpy()
    start, end = (np.searchsorted(code[order], wanted, side) for side in ("left", "right"))
    by_hash = np.argsort(documents)
    near = by_hash[np.minimum(np.searchsorted(documents, queries, sorter=by_hash), len(documents) - 1)]
    own = np.where(documents[near] == queries, place[near], -1)  # where the query itself stands
    others = end - start - (own >= 0)
    drawn = start + (_hashes(queries, seed) % np.maximum(others, 1).astype(np.uint64)).astype(np.int64)
    drawn += (own >= 0) & (drawn >= own)
    return np.where(others > 0, order[np.minimum(drawn, len(order) - 1)], -1)


def _whole_rows(
    table: pa.Table, names: Sequence[str], tables: Tables, where: str, ids: pa.ChunkedArray | None = None
) -> pa.Table:
    """The rows whose `names` are texts with a visible character; a folder must have no others."""
    check_rows(table, where)
    columns = {name: as_text(table[name], name, where) for name in names}
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    bad = {name: _blank(column) for name, column in columns.items()}
    for name, blank in bad.items():
        row = pc.index(blank, True).as_py()
        if row >= 0 and not tables.published:
            if columns[name][row].as_py() is None:
                raise InputError(f"{where}: row {row} has no {name!r}; fill it in or leave the row out")
            which = ids[row].as_py() if ids else f"row {row}"
            raise InputError(f"{where}: the {name} of {which} is empty; fill it in or leave the row out")
    whole = np.logical_and.reduce([~blank.to_numpy() for blank in bad.values()])
    if whole.all():
        return table
    tqdm.write(f"{where}: {(~whole).sum():,} rows without {' or '.join(names)} left out", file=sys.stderr)
    kept = table.filter(whole)
    check_rows(kept, where)
    return kept


def _blank(column: pa.ChunkedArray) -> pa.ChunkedArray:
    chunks = [pc.fill_null(pc.equal(pc.utf8_trim_whitespace(chunk), ""), True) for chunk in column.chunks]
    return pa.chunked_array(chunks, pa.bool_())


def as_text(column: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray:
    """`column` as strings that are UTF-8: readers of Parquet and Arrow do not look."""
    try:
        column = column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{where}: column {name!r} cannot be read as text: {error}") from None
    row = 0
    for chunk in column.chunks:
        try:
            chunk.validate(full=True)
        except pa.ArrowInvalid:
            for text in chunk.cast(pa.binary()):
                try:
                    (text.as_py() or b"").decode()
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{where}: {name!r} of row {row} is not UTF-8 ({error.reason}); mend it"
                    ) from None
                row += 1
        row += len(chunk)
    return column


def _joined(table: pa.Table, where: str) -> pa.ChunkedArray:
    """The columns side by side with a space between; nothing, or white space around, counts for nothing."""
    if table.num_columns == 1:
        return table[0]
    columns = [as_text(table[name], name, where) for name in table.column_names]
    chunks = [
        pc.utf8_trim_whitespace(pc.binary_join_element_wise(*batch.columns, " ", null_handling="skip"))
        for batch in pa.table(columns, table.column_names).to_batches()
    ]
    return pa.chunked_array(chunks, pa.string())


def _flattened(column: pa.ChunkedArray, name: str) -> pa.Table:
    """row, `name`: a column's texts, or those of its lists, with the row that each is from."""
    if not _is_list(column):
        return pa.table({"row": np.arange(len(column)), name: column})
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    return pa.table({"row": np.repeat(np.arange(len(column)), lengths), name: pc.list_flatten(column)})


def _is_list(column: pa.ChunkedArray) -> bool:
    return pa.types.is_list(column.type) or pa.types.is_large_list(column.type)


def _distinct(texts: pa.Table, prefix: str) -> pa.Table:
    """document_id, text: the first text of each hash."""
    first = _first_of_each(texts)
    return pa.table([_ids(prefix, first["hash"].to_numpy()), first["text"]], schema=DOCUMENTS)


def _first_of_each(table: pa.Table) -> pa.Table:
    """The first row of each `hash`, in order."""
    first = np.zeros(len(table), bool)
    first[np.unique(table["hash"].to_numpy(), return_index=True)[1]] = True
    return table.filter(first)


def _ids(prefix: str, hashes: np.ndarray) -> pa.ChunkedArray:
    """Ids of 64-bit hashes; block by block, as they are Python strings in between."""
    blocks = np.split(hashes, range(65_536, len(hashes), 65_536))
    return pa.chunked_array([[f"{prefix}{value:016x}" for value in block.tolist()] for block in blocks], pa.string())


def _text_hashes(texts: pa.ChunkedArray) -> np.ndarray:
    """(n,) uint64: `stable_hash` of each text."""
    return _hashes(tqdm(_strings(texts), total=len(texts), desc="ids of texts", unit=" texts", delay=2))


def _hashes(values: Iterable[object], *seed: object) -> np.ndarray:
    return np.fromiter((stable_hash(*seed, value) for value in values), np.uint64)


def _strings(column: pa.ChunkedArray) -> Iterator[str]:
    """The values one after the other, without making Python objects of all of them at once."""
    for chunk in column.chunks:
        for start in range(0, len(chunk), 65_536):
            yield from chunk[start : start + 65_536].to_pylist()


def _read_schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a set has one for each split, or for {', '.join(PARTS)}") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from None
