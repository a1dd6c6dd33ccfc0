"""A set's tables: one for each split, or the parts of a collection; in files (those on the Hub: hub_tables.py).

Columns are known by the names in layouts.py; `columns` names others. A row without text is an error in a file, and
left out of a set from the Hub: whoever builds from that cannot mend it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

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
    Layout,
    canonical,
    plain,
    to_frame,
)
from dataset_builders.schema import check_rows

_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|dev|valid|val)(?![a-z])")
# below a set's own
_FOLDER = re.compile(r"data|corpus|documents|queries|qrels|scores|train|test|validation|dev|valid|val")
PART_FILES = {"corpus": r"(corpus|collection|documents)\b", "queries": r"(queries|topics)\b", "qrels": r".*qrels\b"}
PART_FILES |= {"scores": r"scores\b|(?!.*qrels).*\.(run|trec)$"}


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
    """A set that can be read by the names of its splits or, of layout corpus, of its PARTS. Its two kinds have:

    layout; splits (the set's own; of layout corpus known once its qrels are read); parts (of layout corpus: scores of
    a teacher need not be there); where(name): what messages call it; load(name): its tables, one by one, those of
    qrels with a column `split`.
    """

    published: bool  # rows that cannot be used are left out, not refused
    layout: Layout
    splits: Sequence[str]
    parts: Sequence[str]
    optional = OPTIONAL

    def __init__(self, asked: Sequence[str], keys: TableKeys) -> None:
        self.asked, self.train, self.keys = asked, asked[0], keys  # the first of the splits asked for is trained on
        self.read_as: dict[str, str] = {}  # their columns -> ours, as far as they were read
        self.unread: set[str] = set()

    def read(self, name: str) -> pl.DataFrame:
        """row (from 0) and the columns of COLUMNS or PARTS that are there. Raises InputError without one it needs."""
        pieces = [*self.pieces(name)]
        lists = {column for piece in pieces for column, kind in piece.schema.items() if kind == pl.List}
        if lists:  # in some files; single texts in others
            single = [[name for name in lists if piece.schema.get(name) == pl.String] for piece in pieces]
            listed = zip(pieces, single, strict=True)
            pieces = [piece.with_columns(map(pl.concat_list, names)) for piece, names in listed]
        frame = pl.concat(pieces, how="diagonal")
        check_rows(frame, self.where(name))
        if name == "qrels":
            self.splits = frame["split"].drop_nulls().unique().to_list()
            frame = frame.with_columns(pl.col("split").replace({split: self.asked_as(split) for split in self.splits}))
        return frame

    def pieces(self, name: str) -> Iterator[pl.DataFrame]:
        """The same, some rows at a time: all scores need not fit in memory."""
        types, row = PARTS[name] if self.layout == "corpus" else COLUMNS[self.layout], 0
        for table in self.load(name):
            found = self.find(types, table.column_names)
            self.read_as |= {column: ours for ours, theirs in found.items() for column in theirs}
            self.unread = (self.unread | {*table.column_names}) - {*self.read_as}
            yield to_frame(table, found, types, self.where(name)).with_row_index("row", row)
            row += len(table)

    def asked_as(self, split: str) -> str:
        """A split of the set by the name that it is asked for with: `validation` may be `dev`."""
        return next((name for name in self.asked if canonical(name) == canonical(split)), split)

    @property
    def made(self) -> tuple[str, ...]:
        """The splits that `holdout` makes of the one trained on, which comes first; empty where there are none."""
        if not self.keys.holdout:
            return ()
        missing = [name for name in HELD_OUT if name not in map(canonical, (*self.splits, self.train))]
        return (self.train, *missing) if missing else ()

    def find(self, wanted: Iterable[str], there: Sequence[str]) -> dict[str, Sequence[str]]:
        """Our name -> theirs, of the columns to read. One that is needed and not there keeps our name."""
        found = {}
        for name in wanted:
            theirs = self.keys.columns[name] if name in self.keys.columns else self.named(name, there)
            if theirs or name not in self.optional:
                found[name] = (theirs or name,) if isinstance(theirs or name, str) else theirs
        return found

    def named(self, name: str, there: Sequence[str]) -> str | Sequence[str] | None:
        """The columns that have one of our column's usual names."""
        if self.published and self.layout != "corpus" and name in self.optional:
            return None
        if self.published and name in there:
            return name
        known = {plain(other): other for other in reversed(there)}
        if usual := [known[other] for other in NAMES[name].split() if other in known]:
            return usual[0]
        return [other for other in there if name == "negative" and NUMBERED.fullmatch(plain(other))] or None

    def tell(self) -> None:
        """Print one line on how columns were read, where that is not by our names."""
        others = [
            f"{theirs} as {plain(name)}" for theirs, name in self.read_as.items() if plain(theirs) != plain(name)
        ]
        told = [f"reads {', '.join(others)}"] if others else []
        told += [f"does not read {', '.join(sorted(self.unread))}"] if self.unread else []
        if told:
            print(f"{self}: {'; '.join(told)}; --columns changes that", file=sys.stderr, flush=True)

    def whole_rows(self, name: str, table: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
        """The rows (of a split or a part) without null or blank in `columns`. Raises InputError unless `published`."""
        where = self.where(name)
        texts = [column for column in columns if table.schema[column] == pl.String]
        blank = pl.any_horizontal(pl.col(columns).is_null(), pl.col(texts).str.strip_chars() == "").fill_null(True)
        bad = table.filter(blank)
        if len(bad) and not self.published:
            row = bad.row(0, named=True)
            column = next(column for column in columns if row[column] is None or not str(row[column]).strip())
            raise InputError(f"{where}: row {row['row']} has no {column!r}; fill it in or leave the row out")
        if len(bad):
            tqdm.write(f"{where}: {len(bad):,} rows without {' or '.join(columns)} left out", file=sys.stderr)
            table = table.filter(~blank)
        check_rows(table, where)
        return table


class FileTables(Tables):
    """A file, or a folder with one for each split, or with a corpus, its queries and qrels.

    A file's split is told by its name or its folder's (train.csv, data/dev-00000-of-00002.parquet, qrels/test.tsv);
    one that has no such name, and is alone, holds what is trained on.
    """

    published = False

    def __init__(self, path: Path, asked: Sequence[str], keys: TableKeys | None = None) -> None:
        super().__init__(asked, keys or TableKeys())
        self.path = path
        found = [path]
        if path.is_dir():
            found = [*path.iterdir(), *(file for file in path.glob("*/*") if _FOLDER.fullmatch(file.parent.name))]
        found = sorted(file for file in found if format_of(file) in FORMATS and file.exists())
        if len({format_of(file) for file in found}) > 1:  # beside other files, JSON holds settings
            found = [file for file in found if format_of(file) != ".json"]
        self._files: dict[str | None, list[Path]] = {
            part: [file for file in found if re.match(name, self._name(file).lower())]
            for part, name in PART_FILES.items()
        }
        self._is_corpus = path.is_dir() and bool(self._files["corpus"])
        of_collections = (".txt", ".qrels", ".run", ".trec")
        if not self._is_corpus:
            found, self._files = [file for file in found if format_of(file) not in of_collections], {}
            for file in found:
                self._files.setdefault(self._split_of(file), []).append(file)
            if path.is_file() and not found:
                formats = ", ".join(suffix for suffix in FORMATS if suffix not in of_collections)
                raise InputError(f"{path}: no table in a format that is read alone; these are {formats}")
            if len(self._files) == 1 and (path.is_file() or None in self._files):
                self._files = {self.train: found}
        self.splits = [] if self._is_corpus else [name for name in self._files if name]

    def __str__(self) -> str:
        return str(self.path)

    @property
    def parts(self) -> list[str]:
        """Of a corpus; it need not have a teacher's scores."""
        return [part for part in PARTS if part != "scores" or self._files["scores"]]

    @property
    def files(self) -> dict[str, Path]:
        """What is read, by its name below the set's folder. Raises InputError for what is not there."""
        names = self.parts if self._is_corpus else [name for name in self.asked if name not in self.made[1:]]
        return {self._name(file): file for name in names for file in self._of(name)}

    def where(self, name: str) -> str:
        return str(self._of(self.train if name in self.made else name)[0])

    def load(self, name: str) -> Iterator[pa.Table]:
        for file in self._of(name):
            if name == "scores":
                yield from read_batches(file)
                continue
            headerless = name in ("corpus", "queries") and self._is_headerless(file)
            table = read_file(file, ("_id", "text") if headerless else ())
            if name == "qrels" and "split" not in table.column_names:
                table = table.append_column("split", pa.repeat(self._split_of(file) or self.train, len(table)))
            yield table

    def tell(self) -> None:
        super().tell()
        if others := self._files.get(None):
            names = ", ".join(map(self._name, others))
            message = f"{self}: does not read {names}: named after no split (train, validation, test)"
            print(message, file=sys.stderr, flush=True)

    def _is_headerless(self, file: Path) -> bool:
        """Whether ids and texts begin at once, as MS MARCO's do: two columns whose names nobody knows."""
        if format_of(file) != ".tsv" or self.keys.columns:
            return False
        there = column_names(file)
        return len(there) == 2 and not any(self.named(name, there) for name in ("_id", "text", "title"))

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
    def layout(self) -> Layout:
        if self._is_corpus:
            return "corpus"
        file = self._of(self.train)[0]
        there = column_names(file)
        for layout in ("pairs", "texts", "text_pairs", "graded_pairs"):
            needed = {column for theirs in self.find(COLUMNS[layout], there).values() for column in theirs}
            if needed <= {*there} and {*self.keys.columns} <= {*COLUMNS[layout]}:
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
