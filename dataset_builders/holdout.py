"""`holdout`: validation and test made of the split that is trained on, where a set has none of its own.

A hash of what a row asks decides on which side it is, so a row stays there when others come or go, and no question
(whatever its capitals and spaces) is on two sides.
"""

from __future__ import annotations

import sys

import numpy as np
import polars as pl
from tqdm import tqdm

from common.cli import InputError
from dataset_builders.layouts import ASKED, HELD_OUT
from dataset_builders.near_duplicates import in_blocks, stable_hash, text_keys
from dataset_builders.tables import Tables


def read_splits(tables: Tables) -> pl.DataFrame:
    """The rows of the splits that are asked for (row, split, ...); those that are made have a share of the first."""
    table = tables.read(*(split for split in tables.asked if split not in tables.made[1:]))
    if not tables.made:
        return table
    is_train = table["split"] == tables.train
    rows, others = table.filter(is_train), table.filter(~is_train)
    keys = asked_keys(tables, rows)
    rows = rows.with_columns(split=deal(tables, keys))
    if tables.layout == "pairs":
        rows = _without_answers(tables, rows, keys)
    return pl.concat([rows.filter(pl.col("split").is_in(tables.asked)), others])


def deal_by(tables: Tables, rows: pl.DataFrame, texts: pl.DataFrame) -> pl.DataFrame:
    """`rows` (id, split) of which those of the split trained on are dealt by the texts of their ids.

    texts: the id (by the name that it has in `rows`), text.
    """
    if not tables.made:
        return rows
    name, is_train = texts.columns[0], pl.col("split") == tables.train
    texts = texts.join(rows.filter(is_train), on=name, how="semi")
    sides = texts.select(name, side=deal(tables, text_keys(texts["text"])))
    rows = rows.join(sides, on=name, how="left", maintain_order="left")
    return rows.with_columns(split=pl.when(is_train).then("side").otherwise("split")).drop("side")


def deal(tables: Tables, keys: pl.Series) -> pl.Series:
    """The split of each text, decided by its key and no other text. Raises InputError where one stays empty."""
    first, *missing = tables.made
    share = tables.source.holdout
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
    names = ASKED[tables.layout]
    if len(names) == 1:
        texts = table[names[0]]
        return text_keys((texts.list.join(" ") if texts.dtype == pl.List else texts).fill_null(""))
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    sides = pl.concat([text_keys(table[name].fill_null("")) for name in names])
    nodes = sides.rank("dense").to_numpy() - 1
    graph = coo_matrix((np.ones(len(table)), np.split(nodes, 2)), shape=(nodes.max() + 1,) * 2)
    groups = pl.DataFrame({"key": sides, "group": connected_components(graph)[1][nodes]})
    return groups.with_columns(pl.col("key").min().over("group"))["key"].head(len(table))


def _without_answers(tables: Tables, rows: pl.DataFrame, keys: pl.Series) -> pl.DataFrame:
    """`rows` less those to train on whose positive is a query held out, as where questions answer questions."""
    is_train = rows["split"] == tables.train
    places = rows.filter(is_train).select("row", text="positive")
    places = (places.explode("text") if places.schema["text"] == pl.List else places).drop_nulls()
    held_out = keys.filter(~is_train).unique()
    shown = places.filter(text_keys(places["text"]).is_in(held_out.implode()))["row"].unique()
    if len(shown):
        left_out = f"{len(shown):,} rows left out, their positive is a query held out"
        tqdm.write(f"{tables.where(tables.train)}: {left_out}", file=sys.stderr)
    return rows.filter(~pl.col("row").is_in(shown.implode()))
