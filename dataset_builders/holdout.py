"""`holdout`: validation and test made of the split that is trained on, where a set has none of its own.

A hash of what a row asks decides on which side it is, so a row stays there when others come or go, and no question
(whatever its capitals and spaces) is on two sides.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import polars as pl
from tqdm import tqdm

from common.cli import InputError
from dataset_builders.layouts import COLUMNS, HELD_OUT
from dataset_builders.near_duplicates import in_blocks, stable_hash, text_keys
from dataset_builders.tables import Tables


def read_splits(tables: Tables) -> Iterator[tuple[str, pl.DataFrame]]:
    """The rows of each split that is asked for; of those that are made, their share of the rows of the first."""
    if tables.made:
        table = tables.read(tables.train)
        keys = asked_keys(tables, table)
        sides = deal(tables, keys)
    for split in tables.asked:
        if split not in tables.made:
            yield split, tables.read(split)
        elif split == tables.train and tables.layout == "pairs":
            yield split, _without_answers(tables, table.filter(sides == split), keys.filter(sides != split))
        else:
            yield split, table.filter(sides == split)


def deal(tables: Tables, keys: pl.Series) -> pl.Series:
    """The split of each text, decided by its key and no other text. Raises InputError where one stays empty."""
    first, *missing = tables.made
    share = tables.keys.holdout
    place = pl.Series([stable_hash("holdout", key.hex()) / 2**64 for key in in_blocks(keys)], dtype=pl.Float64)
    sides = pl.Series([first], dtype=pl.String).new_from_index(0, len(keys))
    for name, is_side in zip(HELD_OUT, (place < share, place >= 1 - share), strict=True):
        if name in missing:
            sides = sides.zip_with(~is_side, pl.Series([name]))
    for name in tables.made:
        if name not in sides:
            raise InputError(
                f"{tables.where(first)}: holdout {share} of {keys.n_unique():,} queries leaves none for {name!r}; "
                "choose another share, or give a file for each split"
            )
    return sides


def asked_keys(tables: Tables, table: pl.DataFrame) -> pl.Series:
    """What decides a row's split: its query, or the least of the texts that a chain of pairs connects."""
    if tables.layout != "text_pairs":
        name = next(iter(COLUMNS[tables.layout]))
        texts = table[name] if table.schema[name] != pl.List else table[name].list.join(" ")
        return text_keys(texts.fill_null(""))
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    sides = pl.concat([text_keys(table[name].fill_null("")) for name in ("text1", "text2")])
    nodes = sides.rank("dense").to_numpy() - 1
    graph = coo_matrix((np.ones(len(table)), np.split(nodes, 2)), shape=(nodes.max() + 1,) * 2)
    groups = pl.DataFrame({"key": sides, "group": connected_components(graph)[1][nodes]})
    return groups.with_columns(pl.col("key").min().over("group"))["key"].head(len(table))


def _without_answers(tables: Tables, table: pl.DataFrame, held_out: pl.Series) -> pl.DataFrame:
    """Rows to train on, less those whose positive is a query held out, as where questions answer questions."""
    texts = table["positive"] if table.schema["positive"] == pl.List else table["positive"].reshape((-1, 1))
    places = pl.DataFrame({"row": table["row"], "text": texts}).explode("text").drop_nulls()
    shown = places.filter(text_keys(places["text"]).is_in(held_out.unique().implode()))
    if len(shown):
        left_out = f"{shown['row'].n_unique():,} rows left out, their positive is a query held out"
        tqdm.write(f"{tables.where(tables.train)}: {left_out}", file=sys.stderr)
    return table.join(shown, on="row", how="anti")
