"""One build as its steps see it: the recipe, the folders, and the texts and vectors that several steps read.

A step is a function `write_x(build, folder)`: it reads the finished folders of `build`, writes into `folder` (still
under its temporary name), and returns counts for the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from common.steps import read_arrow, read_manifest, read_parquet
from dataset_builders.columns import TextColumn
from dataset_builders.embeddings import Embedder, Vectors
from dataset_builders.engines import LOCAL, Engine

if TYPE_CHECKING:
    from dataset_builders.data_recipe import GradedRecipe
    from dataset_builders.sources import Splits


@dataclass(frozen=True)
class Build:
    folder: Path
    recipe: GradedRecipe
    engine: Engine = LOCAL

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    @property
    def candidates(self) -> Path:
        return self.folder / "candidates"

    @property
    def scores(self) -> Path:
        return self.folder / "scores"

    @property
    def mined(self) -> Path:
        return self.folder / "mined"

    @property
    def cache(self) -> Path:
        """Vectors under keys of all that decides them: steps that need the same ones share them."""
        return self.folder / "embeddings"

    @property
    def splits(self) -> Splits:
        return self.recipe.source

    @property
    def symmetric(self) -> bool:
        """Queries and documents are texts of one kind: a query's own text is no candidate for it."""
        return self.recipe.task_type != "retrieval"

    @property
    def calibration(self) -> dict[str, Any]:
        """Constants and figures of the finished scores/."""
        return read_manifest(self.scores)["calibration"]

    @cached_property
    def documents(self) -> TextColumn:
        return TextColumn(self.corpus / "documents.arrow")

    @cached_property
    def document_ids(self) -> pa.ChunkedArray:
        """In order; memory-mapped."""
        return read_arrow(self.corpus / "documents.arrow", ["document_id"])["document_id"]

    @cached_property
    def queries(self) -> dict[str, str]:
        """query_id -> text, by id, of all splits that are searched for, graded or not."""
        return self.queries_of(*self.splits.searched)

    def queries_of(self, *splits: str) -> dict[str, str]:
        table = read_parquet(self.corpus / "queries.parquet")
        rows = zip(*(table[name].to_pylist() for name in ("query_id", "text", "split")), strict=True)
        return {query_id: text for query_id, text, split in rows if split in splits}

    @cached_property
    def query_vectors(self) -> Vectors:
        """The dense model's, one for each of `queries`."""
        return self._embedder.queries(list(self.queries.values()))

    @cached_property
    def document_vectors(self) -> Vectors:
        """The dense model's, one for each of `documents`."""
        return self._embedder.documents(self.documents)

    @cached_property
    def _embedder(self) -> Embedder:
        return Embedder(self.recipe.dense, self.cache, self.engine)
