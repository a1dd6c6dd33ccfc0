"""The rows a stage trains on, and the sample of searches it is validated with."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.cli import InputError
from common.models import datasets_cache, hub_commit
from common.steps import files_of, fingerprint
from modeling.batches import LABEL
from modeling.objectives import OBJECTIVES

if TYPE_CHECKING:
    from datasets import Dataset

VALIDATION = "validation"


@dataclass(frozen=True)
class SearchSample:
    """Queries, the documents they search, and which are relevant: what sentence-transformers' evaluator takes."""

    queries: dict[str, str]
    documents: dict[str, str]
    relevant: dict[str, set[str]]


def data_key(name: str, revision: str | None, where: str) -> str:
    """Changes when the contents of the dataset do: a Hub commit, or a hash of a folder's files."""
    if Path(name).is_dir():
        return fingerprint(files_of(Path(name)))
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{where}: dataset {name!r}: no such folder; python -m dataset_builders.build makes it")
    return hub_commit(name, revision, repo_type="dataset")


def load_config(name: str, config: str, revision: str | None, key: str, where: str) -> Dataset:
    """One config of a dataset, a Hub id or a folder, whose contents have `key`.

    Raises:
        InputError: when there is none.
    """
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    cache = None
    if Path(name).is_dir():
        datasets.disable_progress_bars()  # of downloads; reading a folder takes no time to speak of
        cache = datasets_cache(key)
    try:
        return datasets.load_dataset(name, config, split="train", revision=revision, cache_dir=cache)
    except (ValueError, OSError, HTTPError, DatasetsError) as error:
        reason = str(error.__cause__ or error)  # "An error occurred while generating the dataset" helps nobody
        if "BatchSize must be greater than 0" in reason:  # what Parquet files without a row come to
            reason = "it has no rows"
        raise InputError(f"{where}: config {config!r} of dataset {name!r} cannot be read: {reason}") from None


def training_rows(
    rows: Dataset, loss: str, prompted: Sequence[str], where: str, num_negatives: int | None = None
) -> Dataset:
    """The columns that `loss` reads, in its order, after a look at every row; the first `num_negatives` of a row.

    Rows may have fewer negatives than there are columns: a null one comes out as "" in the column and NaN in the
    label, which is what `modeling.losses.GradedLoss` leaves out. The label may end before the nulls at the end.

    Args:
        rows: query, positive, negative_1, ... and a list `label` of as many soft labels as documents; or graded pairs,
            sentence1, sentence2 and a number `label`, for "cosent" and for objectives that learn from one document.
        loss: "cosent", or a name in `modeling.objectives.OBJECTIVES`.
        prompted: columns that are to get a prompt.
        where: names the data set in errors.
        num_negatives: None = all.

    Raises:
        InputError: a missing column, a prompted column that is not there, no rows, an empty text, a bad label.
    """
    pairs = loss == "cosent" or _learns_from_pairs(loss, rows.column_names)
    texts = _text_columns(rows.column_names, loss, pairs, where)
    for column in prompted:
        if column not in texts:
            raise InputError(f"{where}: no column {column!r} to prompt; prompted_columns may hold {', '.join(texts)}")
    labelled = loss == "cosent" or "labels" in OBJECTIVES[loss].needs
    if labelled and LABEL not in rows.column_names:
        raise InputError(f"{where}: no column 'label', which {loss} trains on")
    if len(rows) == 0:
        raise InputError(f"{where}: no rows; python -m dataset_builders.build makes them")
    rows = rows.select_columns([*texts, LABEL] if labelled else texts)
    if pairs:
        _check_pairs(rows, texts, loss, where)
        return rows if loss == "cosent" else rows.map(_listed, batched=True, desc="Labels of pairs")
    ragged = _check_rows(rows, texts, labelled, where)
    if num_negatives is not None:
        rows = _first_negatives(rows, num_negatives, where)
    if ragged:
        rows = rows.map(_filled, batched=True, desc="Missing negatives")
    return rows


def _learns_from_pairs(loss: str, names: Sequence[str]) -> bool:
    objective = OBJECTIVES.get(loss)
    return objective is not None and objective.documents == 1 and "labels" in objective.needs and "query" not in names


def _text_columns(names: Sequence[str], loss: str, pairs: bool, where: str) -> list[str]:
    if pairs:
        wanted = ["sentence1", "sentence2"]
    else:
        negatives = [name for name in names if name.startswith("negative_")]
        wanted = ["query", "positive", *sorted(negatives, key=lambda name: (len(name), name))]
        if OBJECTIVES[loss].documents > 1 and not negatives:
            wanted.append("negative_1")
    missing = [name for name in wanted if name not in names]
    if missing:
        raise InputError(f"{where}: no column {missing[0]!r}, which {loss} needs; it has {', '.join(names)}")
    return wanted


def _listed(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {**batch, LABEL: [[label] for label in batch[LABEL]]}


def _filled(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Missing negatives as "" and NaN. Objectives without labels get a label all the same, to say what is missing."""
    documents = [name for name in batch if name not in ("query", LABEL)]
    labels = batch.get(LABEL) or [[0.0] * len(documents)] * len(batch["query"])
    present = zip(*([text is not None for text in batch[name]] for name in documents), strict=True)
    filled = {name: [text or "" for text in texts] for name, texts in batch.items() if name != LABEL}
    filled[LABEL] = [
        [label if there else math.nan for there, label in zip_longest(is_there, row)]
        for is_there, row in zip(present, labels, strict=True)
    ]
    return filled


def _first_negatives(rows: Dataset, num_negatives: int, where: str) -> Dataset:
    """Fewer negatives in every row, and their labels with them; mined ones stand in the order they were chosen in."""
    negatives = [name for name in rows.column_names if name.startswith("negative_")]
    if num_negatives > len(negatives):
        raise InputError(f"{where}: rows have {len(negatives)} negatives; num_negatives is {num_negatives}")
    rows = rows.remove_columns(negatives[num_negatives:])
    if LABEL not in rows.column_names:
        return rows
    labels = pc.list_slice(rows.with_format("arrow")[LABEL][:], 0, num_negatives + 1)
    features = rows.features
    return rows.remove_columns(LABEL).add_column(LABEL, labels).cast(features)


def _check_pairs(rows: Dataset, texts: Sequence[str], loss: str, where: str) -> None:
    for block, refuse in _blocks(rows, where):
        _refuse_empty(block, texts, refuse)
        labels = block[LABEL].to_numpy().astype(float)
        refuse(~np.isfinite(labels), "label is not a finite number")
        if loss != "cosent":
            refuse(
                (labels < 0) | (labels > 1), f"label must lie in (0, 1) for {loss}; rescale the scores, or use cosent"
            )


def _check_rows(rows: Dataset, texts: Sequence[str], labelled: bool, where: str) -> bool:
    """Whether any row lacks negatives. Refuses empty texts and labels that are no soft labels."""
    documents = texts[1:]
    ragged = False
    for block, refuse in _blocks(rows, where):
        _refuse_empty(block, texts, refuse)
        present = np.stack([block[name].is_valid().to_numpy() for name in documents], axis=1)
        ragged |= not present.all()
        if not labelled:
            continue
        counts = pc.fill_null(pc.list_value_length(block[LABEL]), 0).to_numpy()
        given = np.arange(len(documents)) < counts[:, None]
        wrong = (counts > len(documents)) | (present & ~given).any(axis=1)
        refuse(wrong, f"label must hold {len(documents)} numbers, one for each document")
        labels = np.full(present.shape, np.nan)
        labels[given] = pc.list_flatten(block[LABEL]).to_numpy()
        outside = present & ~((labels >= 0) & (labels <= 1))  # NaN is neither
        refuse(outside.any(axis=1), "labels must lie in (0, 1): these are not calibrated teacher scores")
    return ragged


def _blocks(rows: Dataset, where: str) -> Iterator[tuple[pa.Table, Callable[[np.ndarray, str], None]]]:
    """The rows in blocks, read once, each with a function that refuses the first row that is bad."""
    first = 0
    for block in rows.with_format("arrow").iter(10_000):

        def refuse(bad: np.ndarray, what: str, first: int = first) -> None:
            if bad.any():
                raise InputError(f"{where}: row {first + int(bad.argmax())}: {what}")

        yield block, refuse
        first += len(block)


def _refuse_empty(block: pa.Table, texts: Sequence[str], refuse: Callable[[np.ndarray, str], None]) -> None:
    for name in texts:
        # a column of nulls alone has a type of its own
        lengths = pc.utf8_length(pc.utf8_trim_whitespace(block[name].cast(pa.string())))
        if name.startswith("negative_"):  # null, and no other way, says that there is none
            refuse(pc.fill_null(lengths, 1).to_numpy() == 0, f"column {name!r} is empty; make it null or drop the row")
        else:
            refuse(pc.fill_null(lengths, 0).to_numpy() == 0, f"column {name!r} is empty; drop the row")


def search_sample(
    queries: Dataset,
    documents: Dataset,
    qrels: Dataset,
    *,
    max_queries: int,
    max_documents: int,
    seed: int,
    where: str,
) -> SearchSample:
    """A seeded sample of the validation queries, and of documents with all of their relevant ones in it.

    Raises:
        InputError: no validation split, or qrels with ids that are not in the other two.
    """
    relevant: dict[str, set[str]] = {}
    for row in qrels:
        if row["split"] == VALIDATION and row["score"] > 0:
            relevant.setdefault(row["query_id"], set()).add(row["document_id"])
    if not relevant:
        raise InputError(f"{where}: its qrels have no split {VALIDATION!r} to evaluate on; set eval_strategy: 'no'")
    texts = dict(zip(queries["query_id"], queries["text"], strict=True))
    positions = {document_id: position for position, document_id in enumerate(documents["document_id"])}
    generator = random.Random(seed)
    chosen = sorted(generator.sample(sorted(relevant), min(max_queries, len(relevant))))
    relevant = {query_id: relevant[query_id] for query_id in chosen}
    needed = sorted(set().union(*relevant.values()))
    for kind, ids, known in (("query", chosen, texts), ("document", needed, positions)):
        unknown = [name for name in ids if name not in known]
        if unknown:
            raise InputError(f"{where}: its qrels name {kind} {unknown[0]!r}, which is not in its other configs")
    others = sorted(positions.keys() - set(needed))
    needed += generator.sample(others, min(max(max_documents - len(needed), 0), len(others)))
    found = documents.select(sorted(positions[document_id] for document_id in needed))
    return SearchSample(
        {query_id: texts[query_id] for query_id in chosen},
        dict(zip(found["document_id"], found["text"], strict=True)),
        relevant,
    )
