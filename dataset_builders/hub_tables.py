"""Tables of raw data on the Hugging Face Hub (see tables.py), at a commit."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import polars as pl
import pyarrow as pa
from tqdm import tqdm

from common.cli import InputError
from common.models import datasets_cache
from common.steps import files_of, fingerprint
from dataset_builders.files import read_batches
from dataset_builders.layouts import Layout
from dataset_builders.tables import TableKeys, Tables

# Of a set on the Hub the configs that hold a part, the first that is there.
PART_CONFIGS = {
    "corpus": ("corpus", "documents"),
    "queries": ("queries",),
    "qrels": ("qrels", "default"),
    "scores": ("scores",),
}


class HubTables(Tables):
    """A data set on the Hub at `revision`, or a folder that `load_dataset` reads."""

    published = True

    def __init__(
        self,
        dataset: str,
        config: str | None,
        revision: str | None,
        layout: Layout,
        asked: Sequence[str],
        keys: TableKeys,
    ) -> None:
        super().__init__(asked, keys)
        self.dataset, self.config, self.revision, self.layout = dataset, config, revision, layout

    def __str__(self) -> str:
        return self.dataset

    @cached_property
    def splits(self) -> Sequence[str]:
        from datasets import get_dataset_split_names

        with self._one_line(self.asked[0]):
            return get_dataset_split_names(self.dataset, self.config, revision=self.revision)

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

    @cached_property
    def _configs(self) -> list[str]:
        from datasets import get_dataset_config_names

        return get_dataset_config_names(self.dataset, revision=self.revision)

    def _config_of(self, part: str) -> str | None:
        """The config that holds a part, as mteb's loader reads it; None where there is none."""
        names = [f"{self.config}-{part}"] if self.config else PART_CONFIGS[part]
        return next((name for name in names if name in self._configs), None)

    @cached_property
    def has_scores(self) -> bool:
        return self._config_of("scores") is not None

    def load_part(self, part: str) -> list[pa.Table]:
        """A part is a config. Corpus and queries have a single split, or one for each."""
        from datasets import load_dataset

        with self._one_line(part):
            config = self._config_of(part)
            if part == "qrels" and not config and self.has_scores:
                return [self._first_of_lists()]
            loaded = load_dataset(self.dataset, config or part, revision=self.revision, cache_dir=self._cache)
        if part != "qrels" and len(loaded) == 1:
            return [table.with_format("arrow")[:] for table in loaded.values()]
        there = {self.asked_as(split): table.with_format("arrow")[:] for split, table in loaded.items()}
        asked = [self.asked[0], *(name for name in self.asked[1:] if name in there or not self.keys.holdout)]
        for split in asked:
            self._check_there(part, split, there, loaded)
        if part != "qrels":
            return [there[split] for split in asked]
        return [there[split].append_column("split", pa.repeat(split, len(there[split]))) for split in asked]

    def _check_there(self, part: str, split: str, there: Container[str], all_splits: Iterable[str]) -> None:
        if split not in there:
            raise InputError(f"{self.where(part)}: no split {split!r}; it has {', '.join(all_splits)}")

    def load_scores(self) -> Iterator[pa.Table]:
        """From the files as they were published: `datasets` would unpack all of them, and those of other splits."""
        from datasets import load_dataset_builder
        from huggingface_hub import HfFileSystem, hf_hub_download

        with self._one_line("scores"):
            builder = load_dataset_builder(self.dataset, self._config_of("scores"), revision=self.revision)
            files = {self.asked_as(str(split)): paths for split, paths in builder.config.data_files.items()}
            [split] = files if len(files) == 1 else self.asked[:1]
            self._check_there("scores", split, files, files)
            for path in files[split]:
                if path.startswith("hf://"):
                    found = HfFileSystem().resolve_path(path)
                    names = {"repo_type": "dataset", "revision": found.revision}
                    path = hf_hub_download(found.repo_id, found.path_in_repo, **names)
                yield from read_batches(Path(path))

    def _first_of_lists(self) -> pa.Table:
        """Judgements of a set that has scores alone: as in rows of pairs, the positive's score comes first."""
        first = pl.col("document_ids").list.first()
        judged = [piece.select("query_id", corpus_id=first) for piece in self.read_scores()]
        told = "no qrels: the first document of each list of scores is the query's positive"
        tqdm.write(f"{self.where('scores')}: {told}", file=sys.stderr)
        return pl.concat(judged).with_columns(score=1, split=pl.lit(self.asked[0])).to_arrow()

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
