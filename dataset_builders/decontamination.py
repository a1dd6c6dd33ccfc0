"""Training texts that evaluation tasks ask about: found, dropped and logged; and the paperwork that follows.

What counts. A task's probes are the texts that it asks about: the queries of retrieval and reranking, both sides of
STS and pair classification, the texts of classification, clustering and summarization, of its evaluation splits
alone. A training query or document that equals a probe (case and white space aside), or is nearly one (see
near_duplicates.py), shows the model a test item, whatever the label beside it. So it is dropped with its qrels, from
the split to be trained on; other splits stay as they are. The documents that an evaluation task searches are no
probes: training and test questions share a corpus by design (SciFact's 809 training claims are answered by the 5,183
abstracts of its test), and without the test question beside it such a document tells nothing. They are counted.

A copy that is cut to less than `similarity` of the probe's 5-grams, a paraphrase and a translation are not found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator
from tqdm import tqdm

from common.cli import InputError
from common.recipes import Section
from common.steps import file_sha256, read_parquet
from dataset_builders.columns import TextRows
from dataset_builders.layouts import as_text
from dataset_builders.near_duplicates import (
    NEAR_DUPLICATE,
    TextsByRow,
    band_keys,
    first_equal,
    near_matches,
    same_text,
    text_keys,
)
from dataset_builders.schema import to_schema
from dataset_builders.sources import find_folder

if TYPE_CHECKING:
    from mteb import AbsTask

# `dropped` is false for a document that stays because another split judges it: it must not be trained on either.
CONTAMINATION = pa.schema(
    [
        ("side", pa.string()),  # query | document
        ("id", pa.string()),
        ("text", pa.string()),
        ("task", pa.string()),
        ("matched_text", pa.string()),
        ("kind", pa.string()),  # exact | near
        ("similarity", pa.float32()),
        ("dropped", pa.bool_()),
    ]
)
TEST = "test"  # the evaluation split of a local set
# Where a task of mteb names its text columns, whatever its type; retrieval's are fixed.
_COLUMN_NAMES = (
    "input_column_name",  # classification, clustering, regression
    "column_names",  # STS
    "input1_column_name",  # pair classification
    "input2_column_name",
    "text_column_name",  # summarization
    "human_summaries_column_name",
    "machine_summaries_column_name",
)


class Decontamination(Section):
    """The evaluation tasks whose texts must not be trained on."""

    benchmark: str | None = None  # of mteb
    tasks: tuple[str, ...] = ()  # more tasks of mteb, by name
    local: dict[str, str] = Field(default_factory=dict)  # task name -> folder with its test split: see sources.py
    similarity: float = Field(NEAR_DUPLICATE, ge=0.7, le=1)  # below 0.7 MinHash would miss too many

    @model_validator(mode="after")
    def _some_task(self) -> Decontamination:
        if not (self.benchmark or self.tasks or self.local):
            raise ValueError("name a benchmark, tasks or local sets to compare with")
        return self


@dataclass(frozen=True)
class Probes:
    """What evaluation tasks ask about. `similarity`: from which a training text is nearly a probe."""

    texts: TextRows  # (n,) distinct
    keys: np.ndarray  # (n, 2) text keys
    bands: np.ndarray  # (n, BANDS)
    uses: np.ndarray  # (m, 2) row of a probe, row of a task in `tasks`
    tasks: tuple[str, ...]
    corpora: dict[str, np.ndarray]  # task -> (k, 2) distinct text keys of the documents that it searches
    similarity: float


def describe_decontamination(section: Decontamination | None, data_root: str | None) -> dict[str, Any] | None:
    """What decides the probes, for the fingerprint of the step that compares with them. Raises InputError."""
    if section is None:
        return None
    tasks = {
        task.metadata.name: {
            **{key: task.metadata.dataset[key] for key in ("path", "revision")},
            "splits": list(task.eval_splits),
            "subsets": list(task.hf_subsets),
        }
        for task in mteb_tasks(section)
    }
    local = {
        name: {path.name: file_sha256(path) for path in _local_files(folder, data_root)}
        for name, folder in section.local.items()
    }
    return {"similarity": section.similarity, "tasks": tasks, "local": local}


def mteb_tasks(section: Decontamination) -> list[AbsTask]:
    """The section's tasks of mteb, once each; a task that is made of others gives way to them. Raises InputError."""
    if not (section.benchmark or section.tasks):
        return []
    import mteb
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    try:
        tasks = list(mteb.get_benchmark(section.benchmark).tasks) if section.benchmark else []
        tasks += [mteb.get_task(name) for name in section.tasks]
    except KeyError as error:  # whose message names what comes close
        raise InputError(f"decontamination: {error.args[0].removeprefix('KeyError: ')}") from None
    parts = [part for task in tasks for part in (task.tasks if isinstance(task, AbsTaskAggregate) else [task])]
    return list({part.metadata.name: part for part in parts}.values())


def read_probes(section: Decontamination, data_root: str | None) -> Probes:
    """The probes of a section's tasks, loaded by mteb or read from local sets. Raises InputError."""
    tasks = mteb_tasks(section)
    readers = {name: partial(read_local, folder, data_root) for name, folder in section.local.items()}
    readers |= {task.metadata.name: partial(read_task, task) for task in tasks}
    texts: list[str] = []
    owner: list[int] = []
    corpora = {}
    for number, (name, read) in enumerate(tqdm(readers.items(), desc="evaluation tasks", unit=" tasks")):
        asked, searched = read()
        asked = [text for text in asked if text.strip()]
        if not asked:
            raise InputError(f"decontamination: task {name!r} asks about no text; leave it out")
        texts += asked
        owner += [number] * len(asked)
        if len(searched):
            corpora[name] = searched
    column = pa.chunked_array([pa.array(texts, pa.string())])
    keys = text_keys(TextRows(column, np.arange(len(texts))))
    first, probe = np.unique(first_equal(keys), return_inverse=True)
    distinct = TextRows(column, first)
    uses = np.unique(np.stack([probe, owner], axis=1), axis=0)
    bands = band_keys(distinct, "evaluation tasks: MinHash")
    return Probes(distinct, keys[first], bands, uses, tuple(readers), corpora, section.similarity)


def read_task(task: AbsTask) -> tuple[list[str], np.ndarray]:
    """What a task of mteb asks about in its evaluation splits, and the text keys of the documents that it searches."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    name = task.metadata.name
    try:
        task.load_data()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"decontamination: task {name!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    asked: list[str] = []
    searched: list[np.ndarray] = []
    if isinstance(task, AbsTaskRetrieval):
        task.convert_v1_dataset_format_to_v2(num_proc=None)
        for data in _evaluation_data(task):
            asked += _strings(data["queries"]["text"] if "text" in data["queries"].column_names else [])
            corpus = data["corpus"]
            searched += _searched_keys({name: corpus[name] for name in corpus.column_names})
    else:
        attributes = [getattr(task, attribute) for attribute in _COLUMN_NAMES if hasattr(task, attribute)]
        columns = [column for attribute in attributes for column in _strings(attribute)]
        if not columns:
            kind = task.metadata.type
            raise InputError(
                f"decontamination: task {name!r} is of type {kind}, whose texts are not known; leave it out"
            )
        asked += [text for data in _evaluation_data(task) for column in columns for text in _strings(data[column])]
    task.unload_data()
    return asked, _stacked(searched)


def read_local(folder: str, data_root: str | None) -> tuple[list[str], np.ndarray]:
    """The same of a local set. Raises InputError."""
    files = _local_files(folder, data_root)
    if len(files) == 1:
        table = read_parquet(files[0])
        columns = [name for name in ("text", "text1", "text2", "sentence1", "sentence2") if name in table.column_names]
        columns = [_texts(table, name, files[0]) for name in columns]
        return [text for column in columns for text in column.to_pylist()], _stacked([])
    corpus, queries, qrels = (read_parquet(path) for path in files)
    queries_of, splits = (_texts(qrels, name, files[2]) for name in ("query_id", "split"))
    ids, texts = (_texts(queries, name, files[1]) for name in ("_id", "text"))
    judged = pc.filter(queries_of, pc.equal(splits, TEST))
    asked = pc.filter(texts, pc.is_in(ids, pc.unique(judged))).to_pylist()
    searched = {"text": _texts(corpus, "text", files[0])}
    if "title" in corpus.column_names:  # which a document may lack
        searched["title"] = as_text(corpus["title"], "title", str(files[0]))
    rows = np.arange(len(corpus))
    return asked, _stacked(_searched_keys({name: TextRows(column, rows) for name, column in searched.items()}))


def _texts(table: pa.Table, name: str, path: Path) -> pa.ChunkedArray:
    """A column of `path` that holds a text in every row. Raises InputError."""
    if name not in table.column_names:
        raise InputError(f"{path}: no column {name!r}; it has {', '.join(table.column_names)}")
    column = pa.table({name: as_text(table[name], name, str(path))})
    return to_schema(column, pa.schema([(name, pa.string())]), str(path))[name]


def find_matches(
    side: str, ids: pa.Array, texts: TextRows, keys: np.ndarray, bands: np.ndarray, probes: Probes
) -> tuple[np.ndarray, pa.Table]:
    """Rows of `texts` that are probes or nearly so, and the log of them (CONTAMINATION without `dropped`).

    A row that several tasks ask about occurs once for each, with the most similar of the task's probes.
    """
    equal = same_text(keys, probes.keys)
    rows, matched, scores = near_matches(texts, bands, probes.texts, probes.bands, probes.similarity)
    exact, near = np.flatnonzero(equal >= 0), equal[rows] != matched
    rows = np.concatenate([exact, rows[near]])
    matched = np.concatenate([equal[exact], matched[near]])
    scores = np.concatenate([np.ones(len(exact)), scores[near]])
    is_near = np.arange(len(rows)) >= len(exact)
    # one line for each task of the probe
    first, last = (np.searchsorted(probes.uses[:, 0], matched, side) for side in ("left", "right"))
    line = np.repeat(np.arange(len(rows)), last - first)
    use = np.arange(len(line)) - np.repeat(np.cumsum(last - first) - (last - first), last - first) + first[line]
    rows, matched, scores, is_near, task = rows[line], matched[line], scores[line], is_near[line], probes.uses[use, 1]
    order = np.lexsort((matched, -scores, is_near, task, rows))
    best = order[np.append(True, (np.diff(rows[order]) != 0) | (np.diff(task[order]) != 0))[: len(order)]]
    log = {
        "side": pa.array([side] * len(best), pa.string()),
        "id": ids.take(pa.array(rows[best])),
        "text": pa.array(texts[rows[best]], pa.string()),
        "task": pa.array([probes.tasks[number] for number in task[best]], pa.string()),
        "matched_text": pa.array(probes.texts[matched[best]], pa.string()),
        "kind": pa.array(np.where(is_near[best], "near", "exact").tolist(), pa.string()),
        "similarity": pa.array(scores[best], pa.float32()),
    }
    return rows[best], pa.table(log)


def clean_pairs(pairs: pa.Table, probes: Probes) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    """`pairs` (sentence1, sentence2, ...) without those of which a sentence matches a probe; the log; counts.

    In the log a sentence's id is the number of its row, and both sides are queries.
    """
    logs, matching = [], np.zeros(len(pairs), bool)
    ids = pa.array(range(len(pairs))).cast(pa.string())
    for name in ("sentence1", "sentence2"):
        texts = TextRows(pairs[name], np.arange(len(pairs)))
        rows, log = find_matches("query", ids, texts, text_keys(texts), band_keys(texts, f"{name}: MinHash"), probes)
        matching[rows] = True
        logs.append(log.append_column("dropped", pa.array([True] * len(log), pa.bool_())))
    log = pa.concat_tables(logs).cast(CONTAMINATION)
    matches = {task: sides["queries"] for task, sides in count_by_task(log).items()}
    return pairs.filter(pa.array(~matching)), log, {"pairs_dropped": int(matching.sum()), "sentences": matches}


def count_by_task(log: pa.Table) -> dict[str, dict[str, int]]:
    """task -> number of queries and of documents that match one of its probes."""
    found = Counter(zip(log["task"].to_pylist(), log["side"].to_pylist(), strict=True))
    tasks = sorted({task for task, _ in found})
    return {task: {"queries": found[task, "query"], "documents": found[task, "document"]} for task in tasks}


def count_searched(keys: np.ndarray, probes: Probes) -> dict[str, int]:
    """task -> number of texts (of these keys) that equal a document that the task searches; no zeros."""
    found = {task: int((same_text(keys, known) >= 0).sum()) for task, known in probes.corpora.items()}
    return {task: count for task, count in sorted(found.items()) if count}


def zero_shot(training_datasets: Sequence[str], benchmark: str, base_model: str | None = None) -> dict[str, Any]:
    """What a model trained on these sets (mteb's names) has to state, and how zero-shot mteb will then call it.

    mteb's own rule: a task of the benchmark counts as seen when it, or a task that mteb lists as similar to it (a
    translation, a subset), is among the training sets, or those that mteb knows of its base model (a Hub id).
    Raises InputError for an unknown benchmark.

    >>> zero_shot(["ArguAna", "MSMARCO"], "MTEB(eng, v2)")["trained_on"]
    ['ArguAna']
    """
    from mteb.models import ModelMeta

    names = [task.metadata.name for task in mteb_tasks(Decontamination(benchmark=benchmark))]
    meta = ModelMeta.create_empty({"training_datasets": set(training_datasets), "adapted_from": base_model})
    return {
        "training_datasets": sorted(set(training_datasets)),
        "benchmark": benchmark,
        "zero_shot_percentage": meta.zero_shot_percentage(names),
        "trained_on": sorted(meta.get_training_datasets().intersection(names)),
    }


def _evaluation_data(task: AbsTask) -> Iterator[Any]:
    """A loaded task's data by subset and split, of its evaluation splits."""
    for subset in task.hf_subsets:
        # a task that is not multilingual may leave the level of subsets out
        data = task.dataset if subset == "default" and "default" not in task.dataset else task.dataset[subset]
        for split in task.eval_splits:
            yield data[split]


def _strings(value: Any) -> Iterator[str]:
    """The texts in a value of a column: a text, a list of them, or the turns of a dialogue."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(value.get("content"))
    elif isinstance(value, Iterable):
        for inner in value:
            yield from _strings(inner)


@dataclass(frozen=True)
class _Titled:
    """Documents as they are read: title, space, text."""

    titles: TextsByRow
    texts: TextsByRow

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice) -> list[str]:
        pairs = zip(self.titles[rows], self.texts[rows], strict=True)
        return [f"{title or ''} {text}".strip() for title, text in pairs]


def _searched_keys(corpus: Mapping[str, TextsByRow]) -> list[np.ndarray]:
    """Text keys of a corpus, with and without the titles, if it has texts and titles."""
    keys = [text_keys(corpus["text"])] if "text" in corpus else []
    return keys + ([text_keys(_Titled(corpus["title"], corpus["text"]))] if keys and "title" in corpus else [])


def _stacked(keys: Sequence[np.ndarray]) -> np.ndarray:
    """(n, 2) distinct text keys of all of `keys`."""
    stacked = np.concatenate([np.zeros((0, 2), np.uint64), *keys])
    return stacked[np.unique(first_equal(stacked))]


def _local_files(folder: str, data_root: str | None) -> list[Path]:
    """A local set's files: corpus, queries and qrels, or its test split alone. Raises InputError."""
    place = find_folder(folder, data_root)
    names = ("corpus", "queries", "qrels") if (place / "queries.parquet").is_file() else (TEST,)
    paths = [place / f"{name}.parquet" for name in names]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file; decontamination reads the {TEST} split of a local set")
    return paths
