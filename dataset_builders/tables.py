"""Tables of raw data in a folder or on the Hugging Face Hub, in one of five layouts.

| layout | columns | task types |
|---|---|---|
| corpus | a corpus, its queries and qrels, as BEIR and mteb publish them | retrieval |
| pairs | query, positive, negative (on the Hub only where `columns` names it); texts or lists of texts | retrieval |
| texts | text, label (in a folder: label_text); texts or lists of texts | classification, clustering |
| text_pairs | text1, text2, label (in a folder: label_text) | duplicates, nli |
| graded_pairs | sentence1, sentence2, score | sts |

A list of texts may be written as JSON. A row without text is an error in a folder, and left out of a set from the
Hub: whoever builds from that cannot mend it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Literal

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from tqdm import tqdm

from common.cli import InputError
from common.models import datasets_cache
from common.recipes import Section
from common.steps import files_of, fingerprint, read_parquet
from dataset_builders.schema import cast_column, check_rows

Layout = Literal["corpus", "pairs", "texts", "text_pairs", "graded_pairs"]
TEXT = pa.string()
# Column -> type; None: texts or lists of texts.
COLUMNS: dict[str, dict[str, pa.DataType | None]] = {
    "corpus": {},  # its three tables have the columns of PARTS
    "pairs": {"query": TEXT, "positive": None, "negative": None},
    "texts": {"text": None, "label": None},
    "text_pairs": {"text1": TEXT, "text2": TEXT, "label": TEXT},
    "graded_pairs": {"sentence1": TEXT, "sentence2": TEXT, "score": pa.float64()},
}
PARTS = ("corpus", "queries", "qrels")
# What a part's columns are called on the Hub, where they have another name than in a folder.
HUB_PARTS = {"id": "_id", "query-id": "query_id", "corpus-id": "corpus_id"}
# The score of a pair with this label. Pairs with any other label (neutral), and of a text with itself, are left out.
LABEL_SCORES = {"entailment": 1, "contradiction": 0, "duplicate": 1, "not_duplicate": 0}
_JSON_LIST = r'(?s)^\[(".*")?\]$'


class TableKeys(Section):
    """How the tables of a set are read."""

    columns: Mapping[str, str | tuple[str, ...]] = {}  # our name -> theirs; several are joined by a space
    label_separator: str | None = Field(None, min_length=1)  # of texts: a label is several classes with this between
    label_scores: Mapping[str, int] = LABEL_SCORES  # of text_pairs: pairs with another label are left out


class Tables:
    """A set that can be read. Its two kinds have:

    where(name): a split or a part, as messages name it; load(split): its table; load_part(part, splits): _id, text
    and, where there is one, title; of the qrels query_id, corpus_id, score, split.
    """

    published: bool  # rows that cannot be used are left out, not refused

    def __init__(self, layout: Layout, keys: TableKeys, columns: Mapping[str, str | Sequence[str]]) -> None:
        self.layout = layout
        self.label_separator, self.label_scores = keys.label_separator, keys.label_scores
        self.columns = columns  # our name -> theirs, where that is another

    def read(self, split: str) -> pl.DataFrame:
        """The layout's columns: texts or lists of texts, a score as float64; and `row`."""
        table, columns = self.load(split), {}
        for name, type_ in COLUMNS[self.layout].items():
            is_read = name != "negative" or name in self.columns or (not self.published and name in table.column_names)
            columns |= {name: (self.columns.get(name, name), type_)} if is_read else {}
        return to_frame(table, columns, self.where(split))

    def whole_rows(self, table: pl.DataFrame, names: Sequence[str], where: str) -> pl.DataFrame:
        """The rows in which none of `names` is null or blank. Raises InputError for others, unless `published`."""
        texts = [name for name in names if table.schema[name] == pl.String]
        blank = pl.any_horizontal(pl.col(names).is_null(), pl.col(texts).str.strip_chars() == "").fill_null(True)
        bad = table.filter(blank)
        if len(bad) and not self.published:
            row = bad.row(0, named=True)
            name = next(name for name in names if row[name] is None or not str(row[name]).strip())
            raise InputError(f"{where}: row {row['row']} has no {name!r}; fill it in or leave the row out")
        if len(bad):
            tqdm.write(f"{where}: {len(bad):,} rows without {' or '.join(names)} left out", file=sys.stderr)
            table = table.filter(~blank)
        check_rows(table, where)
        return table


class FolderTables(Tables):
    """A folder of Parquet files: SPLIT.parquet, or corpus.parquet, queries.parquet and qrels.parquet."""

    published = False

    def __init__(self, folder: Path, splits: Sequence[str], keys: TableKeys | None = None) -> None:
        keys = keys or TableKeys()
        self.folder = folder
        columns = {"label": "label_text", **keys.columns}
        is_corpus = (folder / "corpus.parquet").is_file()
        super().__init__("corpus" if is_corpus else self._find_layout(splits[0], columns), keys, columns)
        self.files = [folder / f"{name}.parquet" for name in (PARTS if is_corpus else splits)]
        for path in self.files:
            _read_schema(path)

    def _find_layout(self, split: str, columns: Mapping[str, str | Sequence[str]]) -> Layout:
        found = set(_read_schema(self.folder / f"{split}.parquet").names)
        for layout in ("pairs", "texts", "text_pairs", "graded_pairs"):
            needed = {name for ours in COLUMNS[layout] for name in _names(columns.get(ours, ours))}
            if needed - {"negative"} <= found:
                return layout
        raise InputError(
            f"{self.where(split)}: columns {', '.join(sorted(found))}; a split has query and positive, text and "
            "label_text, text1, text2 and label_text, or sentence1, sentence2 and score"
        )

    def where(self, name: str) -> str:
        return str(self.folder / f"{name}.parquet")

    def load(self, split: str) -> pa.Table:
        return read_parquet(Path(self.where(split)))

    def load_part(self, part: str, splits: Sequence[str]) -> pa.Table:
        return read_parquet(Path(self.where(part)))


class HubTables(Tables):
    """A data set on the Hub at `revision`, or a folder that `load_dataset` reads."""

    published = True

    def __init__(
        self, dataset: str, config: str | None, revision: str | None, layout: Layout, keys: TableKeys
    ) -> None:
        super().__init__(layout, keys, keys.columns)
        self.dataset, self.config, self.revision = dataset, config, revision

    @cached_property
    def _cache(self) -> str | None:
        folder = Path(self.dataset)
        return datasets_cache(fingerprint(files_of(folder))) if folder.is_dir() else None

    def where(self, name: str) -> str:
        return f"{self.dataset} ({name})"

    def load(self, split: str) -> pa.Table:
        from datasets import load_dataset

        with self._one_line(split):
            dataset = load_dataset(
                self.dataset, self.config, split=split, revision=self.revision, cache_dir=self._cache
            )
        return dataset.with_format("arrow")[:]

    def load_part(self, part: str, splits: Sequence[str]) -> pa.Table:
        """A part is a config, as mteb's loader reads it. Corpus and queries have a single split, or one for each."""
        from datasets import get_dataset_config_names, load_dataset

        name = f"{self.config}-{part}" if self.config else part
        with self._one_line(part):
            if name == "qrels" and name not in get_dataset_config_names(self.dataset, revision=self.revision):
                name = "default"
            loaded = load_dataset(self.dataset, name, revision=self.revision, cache_dir=self._cache)
        if part != "qrels" and len(loaded) == 1:
            splits = list(loaded)
        tables = []
        for split in splits:
            if split not in loaded:
                raise InputError(f"{self.where(part)}: no split {split!r}; it has {', '.join(loaded)}")
            table = loaded[split].with_format("arrow")[:]
            table = table.rename_columns([HUB_PARTS.get(column, column) for column in table.column_names])
            if part == "qrels":
                table = table.append_column("split", pa.repeat(split, len(table)))
            tables.append(table)
        return pa.concat_tables(tables, promote_options="default")

    @contextmanager
    def _one_line(self, name: str) -> Iterator[None]:
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HTTPError

        try:
            yield
        except (DatasetsError, HTTPError, OSError, ValueError) as error:
            # "An error occurred while generating the dataset" helps nobody
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise InputError(f"data set {self.where(name)}: {reason}") from None


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
        for column in _names(theirs):
            if column not in table.column_names:
                raise InputError(f"{where}: no column {column!r}; it has {', '.join(table.column_names)}")
            values = table[column]
            if type_ is None and not pa.types.is_list(values.type) and not pa.types.is_large_list(values.type):
                type_ = TEXT
            parts.append(pl.Series(name, pl.from_arrow(cast_column(values, name, type_ or pa.list_(TEXT), where))))
        if len(parts) > 1:
            parts = [pl.select(pl.concat_str(parts, separator=" ", ignore_nulls=True).str.strip_chars()).to_series()]
        found[name] = _decoded(parts[0]) if columns[name][1] is None else parts[0]
    return pl.DataFrame(found)


def _names(theirs: str | Sequence[str]) -> Sequence[str]:
    return (theirs,) if isinstance(theirs, str) else theirs


def _decoded(column: pl.Series) -> pl.Series:
    """A column of JSON lists of texts as lists; any other as it is."""
    if column.dtype == pl.String and column.count() and column.str.contains(_JSON_LIST).all():
        return column.str.json_decode(pl.List(pl.String))
    return column


def _read_schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a set has one for each split, or for {', '.join(PARTS)}") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from None
