"""The rows a stage trains on, and the sample of searches it is validated with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from dataset_builders.cli import InputError
from dataset_builders.folders import files_of, fingerprint
from dataset_builders.references import hub_commit

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

    cache = None
    if Path(name).is_dir():
        datasets.disable_progress_bars()  # of downloads; reading a folder takes no time to speak of
        # datasets (5.2) caches a folder under its name and its README alone, and would go on serving the rows of
        # another folder of that name, or those from before the folder was built anew
        cache = str(Path(datasets.config.HF_DATASETS_CACHE) / key)
    try:
        return datasets.load_dataset(name, config, split="train", revision=revision, cache_dir=cache)
    except (ValueError, OSError, DatasetsError) as error:
        reason = str(error.__cause__ or error)  # "An error occurred while generating the dataset" helps nobody
        if "BatchSize must be greater than 0" in reason:  # what Parquet files without a row come to
            reason = "it has no rows"
        raise InputError(f"{where}: config {config!r} of dataset {name!r} cannot be read: {reason}") from None


def training_rows(
    rows: Dataset, loss: str, prompted: Sequence[str], where: str, num_negatives: int | None = None
) -> Dataset:
    """The columns that `loss` reads, in its order, after a look at every row; the first `num_negatives` of a row.

    Raises:
        InputError: a missing column, a prompted column that is not there, no rows, an empty text, a bad label.
    """
    texts = _text_columns(rows.column_names, loss, where)
    for column in prompted:
        if column not in texts:
            raise InputError(f"{where}: no column {column!r} to prompt; prompted_columns may hold {', '.join(texts)}")
    labelled = loss != "info_nce"
    if labelled and "label" not in rows.column_names:
        raise InputError(f"{where}: no column 'label', which {loss} trains on")
    if len(rows) == 0:
        raise InputError(f"{where}: no rows; python -m dataset_builders.build makes them")
    rows = rows.select_columns([*texts, "label"] if labelled else texts)
    _check_rows(rows, texts, loss, where)
    return rows if num_negatives is None else _first_negatives(rows, num_negatives, where)


def _text_columns(names: Sequence[str], loss: str, where: str) -> list[str]:
    if loss == "cosent":
        wanted = ["sentence1", "sentence2"]
    else:
        negatives = [name for name in names if name.startswith("negative_")]
        wanted = ["query", "positive", *sorted(negatives, key=lambda name: (len(name), name))]
        if loss == "soft_info_nce" and not negatives:
            wanted.append("negative_1")
    missing = [name for name in wanted if name not in names]
    if missing:
        raise InputError(f"{where}: no column {missing[0]!r}, which {loss} needs; it has {', '.join(names)}")
    return wanted


def _first_negatives(rows: Dataset, num_negatives: int, where: str) -> Dataset:
    """Fewer negatives in every row, and their labels with them; mined ones stand in the order they were chosen in."""
    negatives = [name for name in rows.column_names if name.startswith("negative_")]
    if num_negatives > len(negatives):
        raise InputError(f"{where}: rows have {len(negatives)} negatives; num_negatives is {num_negatives}")
    rows = rows.remove_columns(negatives[num_negatives:])
    if "label" not in rows.column_names:
        return rows
    labels = pc.list_slice(rows.with_format("arrow")["label"][:], 0, num_negatives + 1)
    features = rows.features
    return rows.remove_columns("label").add_column("label", labels).cast(features)


def _check_rows(rows: Dataset, texts: Sequence[str], loss: str, where: str) -> None:
    """Refuse empty texts and labels the loss cannot take. Reads the rows once, in blocks."""
    first = 0
    for block in rows.with_format("arrow").iter(10_000):

        def refuse(bad: np.ndarray, what: str, first: int = first) -> None:
            if bad.any():
                raise InputError(f"{where}: row {first + int(bad.argmax())}: {what}")

        for name in texts:
            lengths = pc.fill_null(pc.utf8_length(pc.utf8_trim_whitespace(block[name])), 0)
            refuse(lengths.to_numpy() == 0, f"column {name!r} is empty; drop the row")
        if loss == "cosent":
            refuse(~np.isfinite(block["label"].to_numpy().astype(float)), "label is not a finite number")
        elif loss == "soft_info_nce":
            counts = pc.fill_null(pc.list_value_length(block["label"]), 0).to_numpy()
            documents = len(texts) - 1
            refuse(counts != documents, f"label must hold {documents} numbers, one for each document")
            labels = pc.list_flatten(block["label"]).to_numpy().reshape(-1, documents)
            inside = (labels >= 0) & (labels <= 1)  # NaN is neither
            refuse(~inside.all(axis=1), "labels must lie in (0, 1): these are not calibrated teacher scores")
        first += len(block)


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
