"""Tables of raw data on the Hugging Face Hub (see tables.py), at a commit."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
from pydantic import Field, model_validator
from tqdm import tqdm

from common.cli import InputError
from common.models import datasets_cache
from common.steps import files_of, fingerprint
from dataset_builders.files import read_batches
from dataset_builders.layouts import COLUMNS, PARTS, Layout
from dataset_builders.tables import TableKeys, Tables

if TYPE_CHECKING:
    from dataset_builders.sources import HubSource

# Of a set on the Hub the configs that hold a part, the first that is there.
PART_CONFIGS = {
    "corpus": ("corpus", "documents"),
    "queries": ("queries",),
    "qrels": ("qrels", "default"),
    "scores": ("scores",),
}


class HubSet(TableKeys):
    """A data set on the Hub, or a folder that `load_dataset` reads."""

    dataset: str = Field(min_length=1)  # Hub id, or a folder that load_dataset reads
    config: str | None = None  # of the data set
    revision: str | None = None  # of the Hub id
    layout: Layout = "pairs"  # where no score_range makes them graded_pairs

    @model_validator(mode="before")
    @classmethod
    def _graded(cls, values: Any) -> Any:
        return {"layout": "graded_pairs", **values} if values.get("score_range") else values

    @model_validator(mode="after")
    def _known_columns(self) -> HubSet:
        kinds = PARTS if self.layout == "corpus" else (self.layout,)
        known = dict.fromkeys(name for kind in kinds for name in COLUMNS[kind])
        for name in self.columns:
            if name not in known:
                raise ValueError(f"layout {self.layout!r} has no column {name!r}; it has {', '.join(known)}")
        return self


class HubTables(Tables):
    """A data set on the Hub at `revision`, or a folder that `load_dataset` reads."""

    published = True
    source: HubSource

    @property
    def layout(self) -> str:
        return self.source.layout

    def __str__(self) -> str:
        return self.source.dataset

    def where(self, name: str) -> str:
        return f"{self.source.dataset} ({name})"

    @cached_property
    def splits(self) -> Sequence[str]:
        from datasets import get_dataset_split_names

        with self._one_line(self.train):
            return get_dataset_split_names(self.source.dataset, self.source.config, revision=self.source.revision)

    @cached_property
    def parts(self) -> Sequence[str]:
        return [part for part in PARTS if part != "scores" or self._config_of(part)]

    def load(self, name: str) -> Iterator[tuple[str, pa.Table]]:
        """A part is a config, as mteb's loader reads it. Corpus and queries have a single split, or one for each."""
        if self.layout != "corpus":
            yield name, self._load(name, self.source.config, name)
        elif name == "scores":
            yield from ((name, table) for table in self._scores())
        elif name == "qrels" and not self._config_of(name) and "scores" in self.parts:
            yield self.train, self._first_of_lists()
        else:
            there = self._load(name, self._config_of(name) or name)
            there = {self.asked_as(split): table for split, table in there.items()}
            # qrels as we publish them name each judgement's split in a column
            is_whole = len(there) == 1 and (name != "qrels" or "split" in next(iter(there.values())).column_names)
            others = [split for split in self.asked[1:] if split in there or not self.source.holdout]
            for split in there if is_whole else (self.train, *others):
                self._check_there(name, split, there)
                yield split, there[split]

    def _config_of(self, part: str) -> str | None:
        """The config that holds a part; None where there is none."""
        names = [f"{self.source.config}-{part}"] if self.source.config else PART_CONFIGS[part]
        return next((name for name in names if name in self._configs), None)

    @cached_property
    def _configs(self) -> list[str]:
        from datasets import get_dataset_config_names

        with self._one_line("corpus"):
            return get_dataset_config_names(self.source.dataset, revision=self.source.revision)

    def _load(self, name: str, config: str | None, split: str | None = None) -> pa.Table | dict[str, pa.Table]:
        """The table of a split, or of each."""
        from datasets import load_dataset

        folder = Path(self.source.dataset)
        cache = datasets_cache(fingerprint(files_of(folder))) if folder.is_dir() else None
        with self._one_line(name):
            loaded = load_dataset(
                self.source.dataset, config, split=split, revision=self.source.revision, cache_dir=cache
            )
        arrow = loaded.with_format("arrow")
        return arrow[:] if split else {name: table[:] for name, table in arrow.items()}

    def _check_there(self, part: str, split: str, there: Iterable[str]) -> None:
        if split not in there:
            raise InputError(f"{self.where(part)}: no split {split!r}; it has {', '.join(there)}")

    def _scores(self) -> Iterator[pa.Table]:
        """From the files as they were published: `datasets` would unpack all of them, and those of other splits."""
        from datasets import load_dataset_builder
        from huggingface_hub import HfFileSystem, hf_hub_download

        with self._one_line("scores"):
            builder = load_dataset_builder(
                self.source.dataset, self._config_of("scores"), revision=self.source.revision
            )
            files = {self.asked_as(str(split)): paths for split, paths in builder.config.data_files.items()}
            [split] = files if len(files) == 1 else [self.train]
            self._check_there("scores", split, files)
            for path in files[split]:
                if path.startswith("hf://"):
                    found = HfFileSystem().resolve_path(path)
                    names = {"repo_type": "dataset", "revision": found.revision}
                    path = hf_hub_download(found.repo_id, found.path_in_repo, **names)
                yield from read_batches(Path(path))

    def _first_of_lists(self) -> pa.Table:
        """Judgements of a set that has scores alone: as in rows of pairs, the positive's score comes first."""
        first = pl.col("document_ids").list.first()
        judged = [piece.select("query_id", corpus_id=first) for piece in self.pieces("scores")]
        told = "no qrels: the first document of each list of scores is the query's positive"
        tqdm.write(f"{self.where('scores')}: {told}", file=sys.stderr)
        return pl.concat(judged).with_columns(score=1).to_arrow()

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
