"""The rows a stage trains on: where they are read from, what is checked, and what else is known of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import polars as pl
from datasets import Dataset, get_dataset_config_names
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError
from transformers import PreTrainedTokenizerBase

from common.cli import InputError
from common.models import datasets_cache, hub_commit
from common.steps import files_of, fingerprint
from modeling.batches import LABEL
from modeling.objectives import OBJECTIVES

Rule = tuple[pl.Expr, str]  # true for a row that is refused, and what is wrong with it


@dataclass(frozen=True)
class Source:
    """A published data set: a Hub id, or a folder with a README.md that has `configs:`."""

    name: str
    revision: str | None = None  # of the Hub id

    @functools.cached_property
    def key(self) -> str:
        """Changes when the contents do: a Hub commit, or a hash of a folder's files."""
        if Path(self.name).is_dir():
            return fingerprint(files_of(Path(self.name)))
        if self.name.count("/") > 1 or self.name.startswith((".", "/", "~")):
            advice = "no such folder; python -m dataset_builders.build makes it"
            raise InputError(f"dataset {self.name!r}: {advice}")
        return hub_commit(self.name, self.revision, repo_type="dataset")

    def configs(self) -> list[str]:
        return get_dataset_config_names(self.name, revision=self.revision)

    def read(self, config: str) -> Dataset:
        """The rows of a config. Raises InputError without one."""
        key, cache = self.key, None
        if Path(self.name).is_dir():
            datasets.disable_progress_bars()  # of downloads; reading a folder takes no time to speak of
            cache = datasets_cache(key)
        try:
            return datasets.load_dataset(self.name, config, split="train", revision=self.revision, cache_dir=cache)
        except (ValueError, OSError, HTTPError, DatasetsError) as error:
            reason = str(error.__cause__ or error)  # "An error occurred while generating the dataset" helps nobody
            if "BatchSize must be greater than 0" in reason:  # what Parquet files without a row come to
                reason = "it has no rows"
            raise InputError(f"config {config!r} of dataset {self.name!r} cannot be read: {reason}") from None


def training_rows(rows: Dataset, loss: str, prompted: Sequence[str], num_negatives: int | None = None) -> Dataset:
    """The columns that `loss` reads, in its order, after a check of every row; the first `num_negatives` of a row.

    Rows are query, positive, negative_1, ... and a list `label` of as many soft labels as documents; or graded pairs,
    sentence1, sentence2 and a number `label`, for "cosent" and for objectives that learn from one document. Rows may
    have fewer negatives than there are columns: a null one comes out as "" and NaN in the label, which
    `modeling.losses.GradedLoss` leaves out. The label may end before the nulls at the end.

    Raises:
        InputError: a missing column (`prompted` ones, too), no rows, an empty text, a bad label.
    """
    objective = OBJECTIVES.get(loss)  # None is CoSENT
    labelled = objective is None or "labels" in objective.needs
    pairs = objective is None or (labelled and objective.documents == 1 and "query" not in rows.column_names)
    texts = _text_columns(rows.column_names, loss, pairs)
    for column in prompted:
        if column not in texts:
            raise InputError(f"no column {column!r} to prompt; prompted_columns may hold {', '.join(texts)}")
    if labelled and LABEL not in rows.column_names:
        raise InputError(f"no column 'label', which {loss} trains on")
    if len(rows) == 0:
        raise InputError("no rows; python -m dataset_builders.build makes them")
    rows = rows.select_columns([*texts, LABEL] if labelled else texts)
    _refuse_first(rows, [*_empty_texts(texts), *(_bad_labels(texts, loss, pairs) if labelled else [])])
    if pairs:
        return rows if loss == "cosent" else rows.map(_listed, batched=True, desc="Labels of pairs")
    dropped: list[str] = []
    if num_negatives is not None:  # mined ones stand in the order they were chosen in
        there, needed = len(texts) - 2, objective.documents - 1
        if not needed <= num_negatives <= there:
            asked = f"{loss} needs {needed}" if num_negatives < needed else f"rows have {there} negatives"
            raise InputError(f"{asked}; num_negatives is {num_negatives}")
        dropped = texts[2 + num_negatives :]
    ragged = any(rows.data.table[name].null_count for name in texts)
    rows = rows.remove_columns(dropped)
    return rows.map(_fitted, batched=True, desc="Negatives") if ragged or (labelled and dropped) else rows


def _text_columns(names: Sequence[str], loss: str, pairs: bool) -> list[str]:
    if pairs:
        wanted = ["sentence1", "sentence2"]
    else:
        negatives = [name for name in names if name.startswith("negative_")]
        wanted = ["query", "positive", *sorted(negatives, key=lambda name: (len(name), name))]
        if OBJECTIVES[loss].documents > 1 and not negatives:
            wanted.append("negative_1")
    missing = [name for name in wanted if name not in names]
    if missing:
        raise InputError(f"no column {missing[0]!r}, which {loss} needs; it has {', '.join(names)}")
    return wanted


def _empty_texts(texts: Sequence[str]) -> Iterator[Rule]:
    for name in texts:
        optional = name.startswith("negative_")  # null, and no other way, says that there is none
        text = pl.col(name).cast(pl.String).fill_null("-" if optional else "")
        remedy = "make it null or drop the row" if optional else "drop the row"
        yield text.str.strip_chars() == "", f"column {name!r} is empty; {remedy}"


def _bad_labels(texts: Sequence[str], loss: str, pairs: bool) -> Iterator[Rule]:
    if pairs:
        number = pl.col(LABEL).cast(pl.Float64)
        yield ~number.is_finite().fill_null(False), "label is not a finite number"
        if loss != "cosent":
            yield ~number.is_between(0, 1), f"label must lie in (0, 1) for {loss}; rescale the scores, or use cosent"
        return
    documents = texts[1:]
    count = pl.col(LABEL).list.len().fill_null(0)
    present = [pl.col(name).is_not_null() for name in documents]
    needed = pl.max_horizontal(pl.when(there).then(at + 1).otherwise(0) for at, there in enumerate(present))
    wrong = (count > len(documents)) | (count < needed)
    yield wrong, f"label must hold {len(documents)} numbers, one for each document"
    outside = pl.any_horizontal(
        there & ~pl.col(LABEL).list.get(at, null_on_oob=True).is_between(0, 1).fill_null(False)
        for at, there in enumerate(present)
    )
    yield outside, "labels must lie in (0, 1): these are not calibrated teacher scores"


def _refuse_first(rows: Dataset, rules: Sequence[Rule]) -> None:
    """Raises InputError for the first row that breaks a rule. Rows are read once, in blocks."""
    first = 0
    for block in rows.with_format("arrow").iter(10_000):
        broken = pl.from_arrow(block).select(bad.alias(str(at)) for at, (bad, _) in enumerate(rules))
        for bad, (_, what) in zip(broken, rules, strict=True):
            if bad.any():
                raise InputError(f"row {first + bad.arg_max()}: {what}")
        first += len(block)


def _listed(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {**batch, LABEL: [[label] for label in batch[LABEL]]}


def _fitted(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Missing negatives as "" and NaN, and the labels of no more documents than there are. Objectives without labels
    get a label all the same, to say what is missing.
    """
    documents = [name for name in batch if name not in ("query", LABEL)]
    labels = batch.get(LABEL) or [[0.0] * len(documents)] * len(batch["query"])
    present = zip(*([text is not None for text in batch[name]] for name in documents), strict=True)
    filled = {name: [text or "" for text in texts] for name, texts in batch.items() if name != LABEL}
    filled[LABEL] = [
        [label if there else math.nan for there, label in zip_longest(is_there, row[: len(documents)])]
        for is_there, row in zip(present, labels, strict=True)
    ]
    return filled


# --- what else is known of the rows ---------------------------------------------------------------------------------


def known_positives(rows: Dataset, source: Source, config: str = "train") -> dict[str, list[str]]:
    """Query text -> texts of all its labelled positives, of those queries in `rows` that have several.

    In a batch these are no negatives of the query, whichever row they come with. They are read from the rows (those of
    `training_rows`; graded pairs have no positives), and from what `source` publishes beside them: the config
    `positives` (query, positive) or, without it, `qrels` with `queries` and `documents`. Rows of another `config` than
    `train` may have been relabelled otherwise, and have positives of their own, by the name that this gave them.
    """
    if "query" not in rows.column_names:
        return {}

    def table(dataset: Dataset) -> pl.LazyFrame:
        return pl.from_arrow(dataset.with_format("arrow")[:]).lazy()

    own, configs = table(rows.select_columns(["query", "positive"])), source.configs()
    pairs, beside = [own], "positives"
    if config.startswith("train-"):
        beside += next((relabel for relabel in ("-exclude", "-promote") if relabel in config), "-none")
    if beside in configs:
        pairs.append(table(source.read(beside)))
    elif {"qrels", "queries", "documents"} <= set(configs):
        judged = table(source.read("qrels")).filter(pl.col("score") > 0)
        judged = judged.join(table(source.read("queries")).select("query_id", query="text"), on="query_id")
        documents = table(source.read("documents")).select("document_id", positive="text")
        pairs.append(judged.join(documents, on="document_id"))
    pairs = pl.concat([pair.select(pl.col("query", "positive").cast(pl.String)) for pair in pairs]).unique()
    several = pairs.group_by("query").agg(pl.col("positive").sort()).filter(pl.col("positive").list.len() > 1)
    return dict(several.join(own.select("query").unique(), on="query", how="semi").collect().iter_rows())


class CutTexts(NamedTuple):
    """How many texts of a column are longer than what the model reads of them."""

    cut: int
    texts: int
    all_equal: bool  # the texts differ, and what the model reads of them does not
    tokens: int = 0  # that the model reads of them


def count_cut(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    prompts: Mapping[str, str],
    max_rows: int = 10_000,
) -> dict[str, CutTexts]:
    """Column -> texts that are cut at `max_seq_length`, prompt (by column) and special tokens included.

    Of more than `max_rows` rows, so many are read, at equal distances.
    """
    if len(rows) > max_rows:
        rows = rows.select(np.linspace(0, len(rows) - 1, max_rows).astype(int))
    read: dict[str, tuple[int, int]] = {}  # prompted text -> its tokens, hash of the ids that are read

    def of_column(texts: Sequence[str], prompt: str) -> CutTexts:
        texts = [prompt + text for text in texts if text]  # "" is a missing document
        new = list(set(texts) - read.keys())
        for begin in range(0, len(new), 1000):
            block = new[begin : begin + 1000]
            for text, ids in zip(block, tokenizer(block, verbose=False)["input_ids"], strict=True):
                read[text] = len(ids), hash(tuple(ids[: max_seq_length - 1]))
        all_equal = len(set(texts)) > 1 and len({read[text][1] for text in texts}) == 1
        lengths = [read[text][0] for text in texts]
        cut = sum(length > max_seq_length for length in lengths)
        return CutTexts(cut, len(texts), all_equal, sum(min(length, max_seq_length) for length in lengths))

    return {name: of_column(rows[name][:], prompts.get(name, "")) for name in rows.column_names if name != LABEL}


def cut_line(counts: Mapping[str, CutTexts], max_seq_length: int, key: str = "max_seq_length") -> str | None:
    """What a person should know of `count_cut`; None where nothing is cut. `key` is the one that sets the length.

    >>> cut_line({"query": CutTexts(0, 8, False), "positive": CutTexts(3, 4, False)}, 64)
    '3 of 12 texts are cut at 64 tokens; positive: 3 of 4, more than half; raise max_seq_length'
    """
    cut, texts = (sum(count[at] for count in counts.values()) for at in range(2))
    if not cut:
        return None
    parts = [f"{cut:,} of {texts:,} texts are cut at {max_seq_length} tokens"]
    for name, count in counts.items():
        if count.all_equal:
            parts.append(f"all {count.texts:,} of {name} read the same")
        elif 2 * count.cut > count.texts:
            parts.append(f"{name}: {count.cut:,} of {count.texts:,}, more than half")
    return "; ".join(parts + [f"raise {key}"] * (len(parts) > 1))
