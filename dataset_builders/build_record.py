"""One build as its steps see it: the recipe, the folders, and the texts and vectors that several steps read.

A step is a function `write_x(build, folder)`: it reads the finished folders of `build`, writes into `folder` (still
under its temporary name), and returns counts for the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa

from common.steps import read_arrow, read_manifest, read_parquet
from dataset_builders.columns import TextColumn, positions_of
from dataset_builders.embeddings import Embedder, Vectors
from dataset_builders.engines import LOCAL, Engine

if TYPE_CHECKING:
    from dataset_builders.data_recipe import GradedRecipe
    from dataset_builders.sources import Splits


def _folder(name: str) -> property:
    return property(lambda build: build.folder / name)


@dataclass(frozen=True)
class Build:
    folder: Path
    recipe: GradedRecipe
    engine: Engine = LOCAL
    vectors: Path | None = None  # where they are kept, if not in the build's own folder

    corpus, candidates, scores, mined = map(_folder, ("corpus", "candidates", "scores", "mined"))

    @property
    def cache(self) -> Path:
        """Vectors under keys of all that decides them: steps that need the same ones share them."""
        return self.vectors or self.folder / "embeddings"

    @property
    def splits(self) -> Splits:
        return self.recipe.source

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
    def positives(self) -> pl.DataFrame:
        """query (its place in `queries`), document (its position), gain (above 0) and split of labelled positives."""
        judged = pl.from_arrow(read_parquet(self.corpus / "qrels.parquet"))
        judged = judged.filter((pl.col("score") > 0) & pl.col("split").is_in(list(self.splits.searched)))
        places = pl.DataFrame({"query_id": list(self.queries), "query": range(len(self.queries))})
        judged = judged.join(places, on="query_id")
        documents = positions_of(judged["document_id"].to_arrow().cast(pa.string()), self.document_ids, "qrels")
        return judged.select("query", document=pl.Series(documents, dtype=pl.Int32), gain="score", split="split")

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
