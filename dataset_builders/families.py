"""Which candidates belong with a query's positive: its near duplicates, and the texts of its class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from common.steps import read_parquet
from dataset_builders.columns import positions_of
from dataset_builders.schema import CLASSES


@dataclass(frozen=True)
class Families:
    """Documents that must not be each other's negatives. A document may be in no family, in one or in several."""

    members: np.ndarray  # positions of documents, ascending
    numbers: np.ndarray  # the family of each

    @classmethod
    def of(cls, table: pa.Table, column: str, document_ids: pa.ChunkedArray) -> Families:
        members = positions_of(table["document_id"], document_ids, f"the documents of a {column}")
        numbers = table[column].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
        order = np.argsort(members, kind="stable")
        return cls(members[order], numbers[order])

    def meet_positive(self, queries: np.ndarray, positions: np.ndarray, is_positive: np.ndarray) -> np.ndarray:
        """Which candidates share a family with a positive of their query. All arguments have one value for each."""
        first, last = (np.searchsorted(self.members, positions, side) for side in ("left", "right"))
        counts = last - first
        candidates = np.repeat(np.arange(len(positions)), counts)
        places = np.arange(len(candidates)) + np.repeat(first - np.cumsum(counts) + counts, counts)
        keys = queries[candidates] * (self.numbers.max(initial=0) + 1) + self.numbers[places]
        found = np.zeros(len(positions), bool)
        found[candidates[np.isin(keys, keys[is_positive[candidates]])]] = True
        return found


def read_classes(corpus: Path) -> pa.Table:
    """CLASSES of a corpus; no rows where its task type knows no classes."""
    path = corpus / "classes.parquet"
    return read_parquet(path, CLASSES.names) if path.exists() else CLASSES.empty_table()
