"""Texts and ids that need not fit in memory: columns of Arrow files, read where a row number points."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from common.cli import InputError
from common.steps import read_arrow


@dataclass(frozen=True)
class TextColumn:
    """The texts of an Arrow file: memory-mapped when first used, and pickled as the path alone."""

    path: Path
    column: str = "text"

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, rows: slice | np.ndarray) -> list[str]:
        """The texts of a slice, or of an array of row numbers."""
        return (self._texts[rows] if isinstance(rows, slice) else take(self._texts, rows)).to_pylist()

    @cached_property
    def _texts(self) -> pa.ChunkedArray:
        return read_arrow(self.path, [self.column])[self.column]

    def __reduce__(self) -> tuple:
        return TextColumn, (self.path, self.column)


def take(column: pa.ChunkedArray, rows: np.ndarray) -> pa.Array:
    """The values of `rows`, in their order. `ChunkedArray.take` would copy the whole column into memory first."""
    starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
    order = np.argsort(rows, kind="stable")
    numbers = np.searchsorted(starts, rows[order], side="right") - 1
    parts = [
        column.chunk(numbers[part[0]]).take(pa.array(rows[order[part]] - starts[numbers[part[0]]]))
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(numbers)) + 1)
        if len(part)
    ]
    places = np.empty(len(rows), np.int64)
    places[order] = np.arange(len(rows))
    return pa.concat_arrays(parts or [pa.array([], column.type)]).take(pa.array(places))


def positions_of(ids: pa.Array, known: pa.ChunkedArray, where: str) -> np.ndarray:
    """Where `ids` stand in `known`, which is in order: searched, for a table of a large corpus' ids is larger than it.

    Raises InputError for an id that is not there.
    """
    import pyarrow.compute as pc  # slow to import: --help needs none

    positions = pc.search_sorted(known, ids).to_numpy().astype(np.int64)
    found = take(known, np.minimum(positions, len(known) - 1)) if len(known) else pa.nulls(len(ids), ids.type)
    unknown = pc.fill_null(pc.not_equal(found, ids), True)
    if pc.any(unknown).as_py():
        raise InputError(f"{where}: id {ids.filter(unknown)[0].as_py()!r} is not in the corpus; build it again")
    return positions
