"""A set's tables: one for each split, or the parts of a collection; in files (those on the Hub: hub_tables.py).

Columns are known by the names in layouts.py; `columns` names others. A row without text is an error in a file, and
left out of a set from the Hub: whoever builds from that cannot mend it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
from pydantic import Field, field_validator, model_validator
from tqdm import tqdm

from common.cli import InputError
from common.recipes import Section
from dataset_builders.files import FORMATS, column_names, format_of, read_batches, read_file
from dataset_builders.layouts import (
    COLUMNS,
    HELD_OUT,
    LABEL_SCORES,
    NAMES,
    NUMBERED,
    OPTIONAL,
    PARTS,
    canonical,
    plain,
    to_frame,
)
from dataset_builders.schema import check_rows

if TYPE_CHECKING:
    from dataset_builders.sources import HubSource, LocalSource

_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|dev|valid|val)(?![a-z])")
# below a set's own
_FOLDER = re.compile(r"data|corpus|documents|queries|qrels|scores|train|test|validation|dev|valid|val")
PART_FILES = {"corpus": r"(corpus|collection|documents)\b", "queries": r"(queries|topics)\b", "qrels": r".*qrels\b"}
PART_FILES |= {"scores": r"scores\b|(?!.*qrels).*\.(run|trec)$"}
_OF_COLLECTIONS = (".txt", ".qrels", ".run", ".trec")


class TableKeys(Section):
    """How the tables of a set are read."""

    # our name -> theirs; several are joined by a space (of negative: are several texts); null: is not read
    columns: Mapping[str, str | tuple[str, ...] | None] = {}
    label_separator: str | None = Field(None, min_length=1)  # of texts: a label is several classes with this between
    label_scores: Mapping[str, int] = LABEL_SCORES  # of text_pairs: pairs with another label are left out
    # share of the rows of `split` that become validation, and as many test, where the set has no such split
    holdout: float | None = Field(None, gt=0, lt=0.5)
    score_range: tuple[float, float] | None = None  # of sts: the lowest and the highest published score

    @field_validator("score_range")
    @classmethod
    def _rising(cls, score_range: tuple[float, float] | None) -> tuple[float, float] | None:
        if score_range and not score_range[0] < score_range[1]:
            raise ValueError("score_range is written [lowest, highest]")
        return score_range

    @model_validator(mode="before")
    @classmethod
    def _held_out(cls, values: Any) -> Any:
        """A set that is split by `holdout` is evaluated on the splits that this makes, unless it names others."""
        if not values.get("holdout"):
            return values
        made = [name for name in HELD_OUT if name != values.get("split")]
        return {"eval_splits": made, **values}


class Tables:
    """A source that can be read by the names of its splits or, of layout corpus, of its PARTS. Its two kinds have:

    layout (see layouts.py); splits (the set's own; of layout corpus known once its qrels are read); parts (of layout
    corpus); where(name): what messages call it; load(name): its tables one by one, each after the split of its rows.
    """

    published: bool  # rows that cannot be used are left out, not refused
    layout: str
    splits: Sequence[str] = ()
    parts: Sequence[str] = ()

    def __init__(self, source: LocalSource | HubSource) -> None:
        self.source, self.train, self.asked = source, source.split, source.searched
        self.read_as: dict[str, str] = {}  # their columns -> ours, as far as they were read
        self.unread: set[str] = set()

    def read(self, *names: str) -> pl.DataFrame:
        """The rows of splits, or of a part: `pieces` in one table. Raises InputError as they do."""
        pieces = [piece for name in names for piece in self.pieces(name)]
        # in some files lists, in others single texts
        lists = {column for piece in pieces for column, kind in piece.schema.items() if kind == pl.List}
        single = [[name for name in lists if piece.schema.get(name) == pl.String] for piece in pieces]
        pieces = [piece.with_columns(map(pl.concat_list, ones)) for piece, ones in zip(pieces, single, strict=True)]
        frame = pl.concat(pieces, how="diagonal")
        if names == ("qrels",):
            self.splits = frame["split"].drop_nulls().unique().to_list()
            frame = frame.with_columns(pl.col("split").replace({split: self.asked_as(split) for split in self.splits}))
        return frame

    def pieces(self, name: str) -> Iterator[pl.DataFrame]:
        """where, row (from 0), split, and the COLUMNS that are there; some rows at a time, as scores need not fit in
        memory. Raises InputError without a column that is needed, and without rows.
        """
        kind, where, rows = name if name in PARTS else self.layout, self.where(name), 0
        for split, table in self.load(name):
            columns = self.columns_of(kind, table.column_names)
            self.read_as |= {column: ours for ours, theirs in columns.items() for column in theirs}
            self.unread = (self.unread | {*table.column_names}) - {*self.read_as}
            frame = to_frame(table, columns, COLUMNS[kind], where).with_row_index("row", rows)
            frame = frame if "split" in columns else frame.with_columns(split=pl.lit(split))
            yield frame.with_columns(where=pl.lit(where))
            rows += len(table)
        check_rows(range(rows), where)

    def asked_as(self, split: str) -> str:
        """A split of the set by the name that it is asked for with: `validation` may be `dev`."""
        return next((name for name in self.asked if canonical(name) == canonical(split)), split)

    @property
    def made(self) -> tuple[str, ...]:
        """The splits that `holdout` makes of the one trained on, which comes first; empty where there are none."""
        if not self.source.holdout:
            return ()
        missing = [name for name in HELD_OUT if name not in map(canonical, (*self.splits, self.train))]
        return (self.train, *missing) if missing else ()

    def columns_of(self, kind: str, there: Sequence[str]) -> dict[str, Sequence[str]]:
        """Our name -> theirs, of the COLUMNS of a kind to read. One that is needed and not there keeps our name."""
        found = {}
        for ours in COLUMNS[kind]:
            is_optional = ours in OPTIONAL.get(kind, {})
            if ours in self.source.columns:
                theirs = self.source.columns[ours]
            elif self.published and kind not in PARTS and is_optional:
                continue
            else:
                theirs = ours if self.published and ours in there else usual_columns(ours, there)
            if theirs or not is_optional:
                found[ours] = (theirs or ours,) if isinstance(theirs or ours, str) else theirs
        return found

    def tell(self) -> None:
        """Print one line on how columns were read, where that is not by our names."""
        others = [
            f"{theirs} as {plain(name)}" for theirs, name in self.read_as.items() if plain(theirs) != plain(name)
        ]
        told = [f"reads {', '.join(others)}"] if others else []
        told += [f"does not read {', '.join(sorted(self.unread))}"] if self.unread else []
        if told:
            print(f"{self}: {'; '.join(told)}; --columns changes that", file=sys.stderr, flush=True)

    def whole_rows(self, table: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
        """The rows without null or blank in `columns`. Raises InputError unless `published`."""
        texts = [column for column in columns if table.schema[column] == pl.String]
        blank = pl.any_horizontal(pl.col(columns).is_null(), ~pl.col(texts).str.contains(r"\S")).fill_null(True)
        bad = table.filter(blank)
        if len(bad) and not self.published:
            row = bad.row(0, named=True)
            column = next(column for column in columns if row[column] is None or not str(row[column]).strip())
            raise InputError(f"{row['where']}: row {row['row']} has no {column!r}; fill it in or leave the row out")
        for where, count in bad["where"].value_counts(sort=True).rows():
            tqdm.write(f"{where}: {count:,} rows without {' or '.join(columns)} left out", file=sys.stderr)
        table = table.filter(~blank)
        check_rows(table, str(self))
        return table


def usual_columns(name: str, there: Sequence[str]) -> str | list[str] | None:
    """Theirs that has one of our column's NAMES; of several negatives all."""
    known = {plain(other): other for other in reversed(there)}
    usual = (known[other] for other in NAMES[name].split() if other in known)
    numbered = [other for other in there if name == "negative" and NUMBERED.fullmatch(plain(other))]
    return next(usual, numbered or None)


class FileTables(Tables):
    """A file, or a folder with one for each split, or with a corpus, its queries and qrels; or documents alone.

    A file's split is told by its name or its folder's (train.csv, data/dev-00000-of-00002.parquet, qrels/test.tsv);
    one that has no such name, and is alone, holds what is trained on.
    """

    published = False

    def __init__(self, path: Path, source: LocalSource) -> None:
        super().__init__(source)
        self.path = path
        found = [path]
        if path.is_dir():
            found = [*path.iterdir(), *(file for file in path.glob("*/*") if _FOLDER.fullmatch(file.parent.name))]
        found = sorted(file for file in found if format_of(file) in FORMATS and file.exists())
        if len({format_of(file) for file in found}) > 1:  # beside other files, JSON holds settings
            found = [file for file in found if format_of(file) != ".json"]
        parts = {
            name: [f for f in found if re.match(known, self._name(f).lower())] for name, known in PART_FILES.items()
        }
        is_corpus = path.is_dir() and bool(parts["corpus"])
        if is_corpus and not source.queries:
            self.parts, self._files = [part for part in PARTS if part != "scores" or parts["scores"]], parts
            return
        tables = [file for file in found if format_of(file) not in _OF_COLLECTIONS]
        if path.is_file() and not tables:
            formats = ", ".join(suffix for suffix in FORMATS if suffix not in _OF_COLLECTIONS)
            raise InputError(f"{path}: no table in a format that is read alone; these are {formats}")
        if source.queries:
            if is_corpus and (parts["queries"] or parts["qrels"]):
                raise InputError(
                    f"{path}: holds queries already; leave source.queries out, or name the documents' file alone as "
                    "path"
                )
            self._files = {self.train: parts["corpus"] if is_corpus else tables}
            return
        self._files = {}
        for file in tables:
            self._files.setdefault(self._split_of(file), []).append(file)
        if len(self._files) == 1 and (path.is_file() or None in self._files):
            self._files = {self.train: tables}
        self.splits = [name for name in self._files if name]

    def __str__(self) -> str:
        return str(self.path)

    @property
    def files(self) -> dict[str, Path]:
        """What is read, by its name below the set's folder. Raises InputError for what is not there."""
        names = [name for name in self.asked if name not in self.made[1:]]
        names = self.parts if self.layout == "corpus" else names
        return {self._name(file): file for name in names for file in self._of(name)}

    def where(self, name: str) -> str:
        return str(self._of(self.train if name in self.made else name)[0])

    def load(self, name: str) -> Iterator[tuple[str, pa.Table]]:
        for file in self._of(name):
            split = (self._split_of(file) or self.train) if name == "qrels" else name
            if name == "scores":
                yield from ((split, table) for table in read_batches(file))
            else:
                headerless = name in ("corpus", "queries") and self._is_headerless(file)
                yield split, read_file(file, ("_id", "text") if headerless else ())

    def tell(self) -> None:
        super().tell()
        if others := self._files.get(None):
            names = ", ".join(map(self._name, others))
            message = f"{self}: does not read {names}: named after no split (train, validation, test)"
            print(message, file=sys.stderr, flush=True)

    def _is_headerless(self, file: Path) -> bool:
        """Whether ids and texts begin at once, as MS MARCO's do: two columns whose names nobody knows."""
        if format_of(file) != ".tsv" or self.source.columns:
            return False
        there = column_names(file)
        return len(there) == 2 and not any(usual_columns(name, there) for name in ("_id", "text", "title"))

    def _of(self, name: str) -> list[Path]:
        files = self._files.get(name) or self._files.get(canonical(name))
        if files:
            return files
        there = ", ".join(str(name) for name, files in self._files.items() if files and name) or "none"
        others = "as " + ", ".join(suffix.removeprefix(".") for suffix in FORMATS[1:])
        raise InputError(f"{self.path / name}.parquet: no such file, nor {others}; there are: {there}")

    def _name(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix() if file != self.path else file.name

    def _split_of(self, file: Path) -> str | None:
        """A split that is asked for by the file's very name, or a usual one."""
        if file.stem in self.asked:
            return file.stem
        named = _SPLIT.search(self._name(file).lower())
        return canonical(named[1]) if named else None

    @cached_property
    def layout(self) -> str:
        if self.parts:
            return "corpus"
        file = self._of(self.train)[0]
        there = column_names(file)
        if self.source.queries:
            asking = usual_columns("query", there)
            if asking and usual_columns("positive", there) and not self.source.columns:
                raise InputError(
                    f"{file}: column {asking!r} holds queries already; leave source.queries out, or say which column "
                    "is the documents': --columns '{text: THEIRS}'"
                )
            return "documents"
        for layout in ("pairs", "texts", "text_pairs", "graded_pairs"):
            needed = {column for theirs in self.columns_of(layout, there).values() for column in theirs}
            if needed <= {*there} and {*self.source.columns} <= {*COLUMNS[layout]}:
                return layout
        hint = ""
        if format_of(file) in (".csv", ".tsv"):
            one = "is its separator a comma, semicolon, tab or |?"
            hint = f" ({one if len(there) == 1 else 'is this line its header?'})"
        raise InputError(
            f"{file}: columns {', '.join(sorted(there))}{hint}; a split has query and positive, text and label, "
            "text1, text2 and label, or sentence1, sentence2 and score; say which yours are: --columns "
            "'{query: THEIRS, ...}'; documents alone get queries from a model: source.queries"
        )
