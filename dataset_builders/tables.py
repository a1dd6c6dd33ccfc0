"""Tables of raw data in one of five layouts (layouts.py), in files; hub_tables.py has those on the Hub.

Columns are known by the names in NAMES; `columns` names others. A list of texts may be written as JSON. A row without
text is an error in a file, and left out of a set from the Hub: whoever builds from that cannot mend it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import Field
from tqdm import tqdm

from common.cli import InputError
from common.recipes import Section
from dataset_builders.files import FORMATS, column_names, read_batches, read_file
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
    names_of,
    plain,
    to_frame,
)
from dataset_builders.near_duplicates import in_blocks, stable_hash, text_keys
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


class Tables:
    """A set that can be read. Its two kinds have:

    layout; splits (a set's own); where(name): a split or a part, as messages name it; load(split): its table;
    load_part(part): the tables of a part, each with a column `split` where that is known; has_scores, and
    load_scores(): a collection's scores of a teacher, some rows at a time.
    """

    published: bool  # rows that cannot be used are left out, not refused
    layout: Layout

    def __init__(self, asked: Sequence[str], keys: TableKeys) -> None:
        self.asked, self.keys = asked, keys  # the first of the splits asked for is trained on
        self.read_as: dict[str, str] = {}  # their columns -> ours, as far as they were read
        self.unread: set[str] = set()

    def read(self, split: str) -> pl.DataFrame:
        """The layout's columns: texts or lists of texts, a score as float64; and `row`."""
        if split not in self.made:
            return self._read(split)
        table, keys, sides = self._dealt
        kept = table.filter(sides == split)
        return self._without_answers(kept, keys.filter(sides != split)) if split == self.asked[0] else kept

    @cached_property
    def _dealt(self) -> tuple[pl.DataFrame, pl.Series, pl.Series]:
        """The rows that splits are made of, read once; for each, what decides its split, and its split."""
        table = self._read(self.asked[0])
        keys = self._asked_keys(table)
        return table, keys, self.deal(keys)

    def _without_answers(self, table: pl.DataFrame, held_out: pl.Series) -> pl.DataFrame:
        """Rows to train on, less those whose positive is a query held out, as where questions answer questions."""
        if self.layout != "pairs":
            return table
        texts = table["positive"] if table.schema["positive"] == pl.List else table["positive"].reshape((-1, 1))
        places = pl.DataFrame({"row": table["row"], "text": texts}).explode("text").drop_nulls()
        shown = places.filter(text_keys(places["text"]).is_in(held_out.unique().implode()))
        if len(shown):
            left_out = f"{shown['row'].n_unique():,} rows left out, their positive is a query held out"
            tqdm.write(f"{self.where(self.asked[0])}: {left_out}", file=sys.stderr)
        return table.join(shown, on="row", how="anti")

    @cached_property
    def made(self) -> tuple[str, ...]:
        """The splits that are made of the one trained on, which is one of them; empty without `holdout`."""
        missing = [name for name in HELD_OUT if name not in map(canonical, (*self.splits, self.asked[0]))]
        return (self.asked[0], *missing) if self.keys.holdout and missing else ()

    def deal(self, keys: pl.Series) -> pl.Series:
        """The split of each text, decided by its key and no other text. Raises InputError where one stays empty."""
        first, *missing = self.made
        place = pl.Series([stable_hash("holdout", key.hex()) / 2**64 for key in in_blocks(keys)], dtype=pl.Float64)
        sides = pl.Series([first], dtype=pl.String).new_from_index(0, len(keys))
        for name, share in zip(HELD_OUT, (place < self.keys.holdout, place >= 1 - self.keys.holdout), strict=True):
            if name in missing:
                sides = sides.zip_with(~share, pl.Series([name]))
        for name in self.made:
            if name not in sides:
                raise InputError(
                    f"{self.where(first)}: holdout {self.keys.holdout} of {keys.n_unique():,} queries leaves none for "
                    f"{name!r}; choose another share, or give a file for each split"
                )
        return sides

    def _asked_keys(self, table: pl.DataFrame) -> pl.Series:
        """What decides a row's split: its query, or the least of the texts that a chain of pairs connects."""
        if self.layout != "text_pairs":
            name = next(iter(COLUMNS[self.layout]))
            texts = table[name] if table.schema[name] != pl.List else table[name].list.join(" ")
            return text_keys(texts.fill_null(""))
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        sides = pl.concat([text_keys(table[name].fill_null("")) for name in ("text1", "text2")])
        nodes = sides.rank("dense").to_numpy() - 1
        graph = coo_matrix((np.ones(len(table)), np.split(nodes, 2)), shape=(nodes.max() + 1,) * 2)
        groups = pl.DataFrame({"key": sides, "group": connected_components(graph)[1][nodes]})
        return groups.with_columns(pl.col("key").min().over("group"))["key"].head(len(table))

    def _read(self, split: str) -> pl.DataFrame:
        return self._frame(self.load(split), COLUMNS[self.layout], self.where(split))

    def _frame(self, table: pa.Table, wanted: Mapping[str, pa.DataType | None], where: str) -> pl.DataFrame:
        found = self.find(wanted, table.column_names)
        return to_frame(table, {name: (theirs, wanted[name]) for name, theirs in found.items()}, where)

    def read_scores(self) -> Iterator[pl.DataFrame]:
        """row, query_id, document_ids and given (lists, or one of each), some rows at a time: all need not fit."""
        row = 0
        for table in self.load_scores():
            yield self._frame(table, PARTS["scores"], self.where("scores")).with_columns(pl.col("row") + row)
            row += len(table)

    def read_part(self, part: str) -> pl.DataFrame:
        """row and the columns of PARTS that are there. Raises InputError where one that is needed is not."""
        frames = [self._frame(table, PARTS[part], self.where(part)) for table in self.load_part(part)]
        frame = pl.concat(frames, how="diagonal")
        if part == "qrels":
            self.splits = frame["split"].drop_nulls().unique().to_list()
            asked = {name: self.asked_as(name) for name in self.splits}
            frame = frame.with_columns(pl.col("split").replace(asked))
        return frame

    def asked_as(self, split: str) -> str:
        """A split of the set by the name that it is asked for with: `validation` may be `dev`."""
        return next((name for name in self.asked if canonical(name) == canonical(split)), split)

    def find(self, wanted: Iterable[str], there: Sequence[str]) -> dict[str, str | Sequence[str]]:
        """Our name -> theirs, of the columns to read. One that is needed and not there keeps our name."""
        found = {}
        for name in wanted:
            theirs = self.keys.columns[name] if name in self.keys.columns else self._named(name, there)
            if theirs or name not in OPTIONAL:
                found[name] = theirs or name
        self.read_as |= {theirs: name for name, several in found.items() for theirs in names_of(several)}
        self.unread = (self.unread | {*there}) - {*self.read_as}
        return found

    def _named(self, name: str, there: Sequence[str]) -> str | Sequence[str] | None:
        if self.published and self.layout != "corpus" and name in OPTIONAL:
            return None
        if self.published and name in there:
            return name
        known = {plain(other): other for other in reversed(there)}
        if named := [known[other] for other in NAMES[name].split() if other in known]:
            return named[0]
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
        found = sorted(file for file in found if file.suffix in FORMATS and file.exists())
        if len({file.suffix for file in found}) > 1:  # beside other files, JSON holds settings
            found = [file for file in found if file.suffix != ".json"]
        self._files: dict[str | None, list[Path]] = {
            part: [file for file in found if re.match(name, self._name(file))] for part, name in PART_FILES.items()
        }
        self._is_corpus = path.is_dir() and bool(self._files["corpus"])
        if not self._is_corpus:
            found, self._files = [file for file in found if file.suffix not in (".txt", ".qrels", ".run", ".trec")], {}
            for file in found:
                self._files.setdefault(self._split_of(file), []).append(file)
            if len(self._files) == 1 and (path.is_file() or None in self._files):
                self._files = {asked[0]: found}
        self.splits = [] if self._is_corpus else [name for name in self._files if name]

    def __str__(self) -> str:
        return str(self.path)

    @property
    def has_scores(self) -> bool:
        return bool(self._files.get("scores"))

    @property
    def files(self) -> dict[str, Path]:
        """What is read, by its name below the set's folder. Raises InputError for what is not there."""
        parts = [part for part in PARTS if part != "scores" or self.has_scores]
        names = parts if self.layout == "corpus" else [name for name in self.asked if name not in self.made[1:]]
        return {self._name(file): file for name in names for file in self._of(name)}

    def where(self, name: str) -> str:
        files = self._of(self.asked[0] if name in self.made else name)
        return str(files[0])

    def load(self, split: str) -> pa.Table:
        return pa.concat_tables([read_file(file) for file in self._of(split)], promote_options="permissive")

    def load_part(self, part: str) -> list[pa.Table]:
        tables = []
        for file in self._of(part):
            headerless = part in ("corpus", "queries") and self._is_headerless(file)
            table = read_file(file, ("_id", "text") if headerless else ())
            split = self._split_of(file) or self.asked[0]
            if part == "qrels" and "split" not in table.column_names:
                table = table.append_column("split", pa.repeat(split, len(table)))
            tables.append(table)
        return tables

    def load_scores(self) -> Iterator[pa.Table]:
        for file in self._of("scores"):
            yield from read_batches(file)

    def _is_headerless(self, file: Path) -> bool:
        """Whether ids and texts begin at once, as MS MARCO's do: two columns whose names nobody knows."""
        if file.suffix != ".tsv" or self.keys.columns:
            return False
        there = column_names(file)
        return len(there) == 2 and not any(self._named(name, there) for name in ("_id", "text", "title"))

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
        file = self._of(self.asked[0])[0]
        there = column_names(file)
        for layout in ("pairs", "texts", "text_pairs", "graded_pairs"):
            needed = {name for theirs in self.find(COLUMNS[layout], there).values() for name in names_of(theirs)}
            self.read_as, self.unread = {}, set()
            if needed <= {*there} and {*self.keys.columns} <= {*COLUMNS[layout]}:
                return layout
        one = (
            (" (is its separator a comma, semicolon, tab or |?)" if len(there) == 1 else " (is this line its header?)")
            if file.suffix in (".csv", ".tsv")
            else ""
        )
        raise InputError(
            f"{file}: columns {', '.join(sorted(there))}{one}; a split has query and positive, text and label, text1, "
            "text2 and label, or sentence1, sentence2 and score; say which yours are: --columns '{query: THEIRS, "
            "...}'; documents alone get queries from a model: source.queries"
        )
