"""Training texts that evaluation tasks ask about: found, dropped and logged; and what a model then has to declare.

A task's probes are the texts that it asks about, of its evaluation splits alone: the queries of retrieval and
reranking, both sides of STS, pair classification and bitext mining, the texts of classification, clustering and
summarization. A training query or document that equals a probe (case and white space aside), is nearly one (see
near_duplicates.py), or is short and one typo apart from one (typos.py), shows the model a test item, whatever its
label. So it is dropped with its qrels from the split to be trained on; other splits stay as they are. The documents
that a task searches are no probes: training and test questions share a corpus by design (SciFact's 809 training claims
are answered by the 5,183 abstracts of its test), and without the test question such a document tells nothing. They are
counted.

Not found: a copy that is cut to less than `similarity` of the probe's 5-grams, a short one with two typos, a
paraphrase, a translation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import Field, model_validator
from tqdm import tqdm

from common.cli import InputError
from common.recipes import Section
from common.steps import file_sha256
from dataset_builders.near_duplicates import NEAR_DUPLICATE, band_keys, near_matches, text_keys
from dataset_builders.readers import read_asked
from dataset_builders.sources import LocalSource, find_copy, open_tables
from dataset_builders.tables import FileTables
from dataset_builders.typos import SHORT, typo_matches

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
        ("kind", pa.string()),  # exact | near | typo
        ("similarity", pa.float32()),
        ("dropped", pa.bool_()),
    ]
)
KINDS = ("exact", "near", "typo")
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
    # task name -> folder with its test split (see sources.py), in place of mteb's where `tasks` names it too
    local: dict[str, str] = Field(default_factory=dict)
    similarity: float = Field(NEAR_DUPLICATE, ge=0.7, le=1)  # below 0.7 MinHash would miss too many

    @model_validator(mode="after")
    def _some_task(self) -> Decontamination:
        if not (self.benchmark or self.tasks or self.local):
            raise ValueError("name a benchmark, tasks or local sets to compare with")
        return self


@dataclass(frozen=True)
class Probes:
    """What evaluation tasks ask about. `similarity`: from which a training text is nearly a probe."""

    texts: pl.DataFrame  # probe (its number), text, key: distinct
    bands: np.ndarray  # (n, BANDS)
    uses: pl.DataFrame  # probe, task (its number in `tasks`)
    tasks: tuple[str, ...]
    searched: dict[str, pl.Series]  # task -> text keys of the documents that it searches
    similarity: float


def describe_decontamination(section: Decontamination | None, data_root: str | None) -> dict[str, Any] | None:
    """What decides the probes, for the fingerprint of the step that compares with them. Raises InputError."""
    if section is None:
        return None
    tasks, local = {}, {}
    for name, task in evaluation_tasks(section, data_root).items():
        if isinstance(task, str):
            files = _local_tables(task, data_root).files
            local[name] = {file: file_sha256(path) for file, path in files.items()}
        else:
            facts = {key: task.metadata.dataset[key] for key in ("path", "revision")}
            tasks[name] = {**facts, "splits": list(task.eval_splits), "subsets": list(task.hf_subsets)}
    return {"similarity": section.similarity, "short": SHORT, "tasks": tasks, "local": local}


def evaluation_tasks(section: Decontamination, data_root: str | None) -> dict[str, str | AbsTask]:
    """Name -> the folder of a local set, or a task of mteb. Raises InputError.

    A local set that `tasks` names too is mteb's where its folder does not lie below `data_root`.
    """
    local = section.local.items()
    tasks = {name: path for name, path in local if name not in section.tasks or find_copy(path, data_root)}
    others = mteb_tasks(section.benchmark, [name for name in section.tasks if name not in tasks])
    return tasks | {task.metadata.name: task for task in others if task.metadata.name not in tasks}


def mteb_tasks(benchmark: str | None, names: Iterable[str] = ()) -> list[AbsTask]:
    """Tasks of mteb, once each; a task that is made of others gives way to them. Raises InputError."""
    if not (benchmark or names):
        return []
    import mteb

    try:
        tasks = [*(mteb.get_benchmark(benchmark).tasks if benchmark else ()), *map(mteb.get_task, names)]
    except KeyError as error:  # whose message names what comes close
        raise InputError(f"decontamination: {error.args[0].removeprefix('KeyError: ')}") from None
    parts = [part for task in tasks for part in (task.tasks if task.is_aggregate else [task])]
    return list({part.metadata.name: part for part in parts}.values())


def read_probes(section: Decontamination, data_root: str | None) -> Probes:
    """The probes of a section's tasks, loaded by mteb or read from local sets. Raises InputError."""
    tasks = evaluation_tasks(section, data_root)
    asked, searched = [], {}
    for number, (name, task) in enumerate(tqdm(tasks.items(), desc="evaluation tasks", unit=" tasks")):
        texts, searched[name] = read_local(task, data_root) if isinstance(task, str) else read_task(task)
        texts = texts.filter(texts.str.strip_chars() != "")
        if not len(texts):
            raise InputError(f"decontamination: task {name!r} asks about no text; leave it out")
        asked.append(pl.DataFrame({"text": texts, "key": text_keys(texts), "task": number}))
    asked = pl.concat(asked)
    distinct = asked.unique("key", keep="first", maintain_order=True).drop("task").with_row_index("probe")
    distinct = distinct.with_columns(pl.col("probe").cast(pl.Int64))
    uses = asked.join(distinct, on="key").select("probe", "task").unique()
    bands = band_keys(distinct["text"], "evaluation tasks: MinHash")
    return Probes(distinct, bands, uses, tuple(tasks), searched, section.similarity)


def read_task(task: AbsTask) -> tuple[pl.Series, pl.Series]:
    """What a task of mteb asks about in its evaluation splits, and the text keys of the documents that it searches."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    name = task.metadata.name
    try:
        task.load_data()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"decontamination: task {name!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    asked: list[str] = []
    searched = [pl.Series(dtype=pl.Binary)]
    if isinstance(task, AbsTaskRetrieval):
        task.convert_v1_dataset_format_to_v2(num_proc=None)
        for data in _evaluation_data(task):
            asked += _strings(data["queries"]["text"] if "text" in data["queries"].column_names else [])
            if "text" in data["corpus"].column_names:
                searched.append(_searched_keys(data["corpus"].to_polars()))
    else:
        columns = _text_columns(task)
        if not columns:
            kind = task.metadata.type
            raise InputError(
                f"decontamination: task {name!r} is of type {kind}, whose texts are not known; leave it out"
            )
        asked += [text for data in _evaluation_data(task) for column in columns for text in _strings(data[column])]
    task.unload_data()
    return pl.Series(asked, dtype=pl.String), pl.concat(searched).unique()


def read_local(folder: str, data_root: str | None) -> tuple[pl.Series, pl.Series]:
    """The same of a local set's test split. Raises InputError."""
    asked, corpus = read_asked(_local_tables(folder, data_root), TEST)
    return asked, pl.Series(dtype=pl.Binary) if corpus is None else _searched_keys(corpus)


def find_matches(texts: pl.DataFrame, bands: np.ndarray, probes: Probes) -> pl.DataFrame:
    """Those of `texts` (id, text, key) that are probes or nearly so: id, text, task, matched_text, kind, similarity.

    A text that several tasks ask about occurs once for each, with the most similar of the task's probes.
    """
    texts = texts.with_columns(row=pl.int_range(pl.len()))
    exact = texts.join(probes.texts, on="key").select("row", "probe", similarity=1.0, kind=pl.lit("exact"))
    near = near_matches(texts["text"], bands, probes.texts["text"], probes.bands, probes.similarity)
    typos = typo_matches(texts["text"], probes.texts["text"], probes.similarity)
    found = pl.concat([near.with_columns(kind=pl.lit("near")), typos.with_columns(kind=pl.lit("typo"))])
    found = pl.concat([exact, found.rename({"other": "probe"})])
    found = found.unique(["row", "probe"], keep="first", maintain_order=True).join(probes.uses, on="probe")
    found = found.sort("row", "task", "kind", "similarity", "probe", descending=[False, False, False, True, False])
    found = found.unique(["row", "task"], keep="first", maintain_order=True)
    found = found.join(texts.select("row", "id", "text"), on="row", maintain_order="left")
    found = found.join(probes.texts.select("probe", matched_text="text"), on="probe", maintain_order="left")
    return found.with_columns(task=pl.Series(probes.tasks, dtype=pl.String).gather(found["task"]))


def contamination_log(**matches: pl.DataFrame) -> pa.Table:
    """CONTAMINATION of the matches (with `dropped`) of each side."""
    sides = [found.with_columns(side=pl.lit(side)).select(CONTAMINATION.names) for side, found in matches.items()]
    return pl.concat(sides).to_arrow().cast(CONTAMINATION)


def clean_pairs(pairs: pa.Table, probes: Probes) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    """`pairs` (sentence1, sentence2, ...) without those of which a sentence matches a probe; the log; counts.

    In the log a sentence's id is the number of its row, and both sides are queries.
    """
    ids, matches = pl.int_range(len(pairs), eager=True).cast(pl.String), []
    for name in ("sentence1", "sentence2"):
        texts = pl.Series("text", pl.from_arrow(pairs[name]))
        found = pl.DataFrame({"id": ids, "text": texts, "key": text_keys(texts)})
        matches.append(find_matches(found, band_keys(texts, f"{name}: MinHash"), probes))
    matches = pl.concat(matches).with_columns(dropped=pl.lit(True))
    log = contamination_log(query=matches)
    matching = ids.is_in(matches["id"].implode())
    sentences = {task: sides["queries"] for task, sides in count_by_task(log).items()}
    counts = {"pairs_dropped": matching.sum(), "sentences": sentences, "by_kind": count_by_kind(log)}
    return pairs.filter((~matching).to_arrow()), log, counts


def count_by_task(log: pa.Table) -> dict[str, dict[str, int]]:
    """task -> number of queries and of documents that match one of its probes."""
    counts = (
        pl.from_arrow(log.select(["task", "side"]))
        .group_by("task")
        .agg(queries=(pl.col("side") == "query").sum(), documents=(pl.col("side") == "document").sum())
    )
    return {row.pop("task"): row for row in counts.sort("task").to_dicts()}


def count_by_kind(log: pa.Table) -> dict[str, int]:
    """exact | near | typo -> number of texts, each under the first that it is to any probe."""
    texts = (
        pl.from_arrow(log.select(["side", "id", "text", "kind"]))
        .group_by("side", "id", "text")
        .agg(pl.col("kind").min())
    )
    return {kind: texts.filter(kind=kind).height for kind in KINDS}


def count_searched(keys: pl.Series, probes: Probes) -> dict[str, int]:
    """task -> number of texts (of these keys) that equal a document that the task searches; no zeros."""
    counts = {task: keys.is_in(known.implode()).sum() for task, known in probes.searched.items()}
    return {task: count for task, count in sorted(counts.items()) if count}


def zero_shot(training_datasets: Sequence[str], benchmark: str, base_model: str | None = None) -> dict[str, Any]:
    """What a model trained on these sets (mteb's names) has to state, and how zero-shot mteb will then call it.

    mteb's own rule: a task of the benchmark counts as seen when it, or a task that mteb lists as similar to it (a
    translation, a subset), is among the training sets, or those that mteb knows of its base model (a Hub id).
    Raises InputError for an unknown benchmark.

    >>> zero_shot(["ArguAna", "MSMARCO"], "MTEB(eng, v2)")["trained_on"]
    ['ArguAna']
    """
    import mteb
    from mteb.models import ModelMeta

    names = [task.metadata.name for task in mteb_tasks(benchmark)]
    trained_on = {*training_datasets}
    for name in training_datasets:
        with contextlib.suppress(KeyError):  # a set need not be a task of mteb
            task = mteb.get_task(name)
            trained_on |= {part.metadata.name for part in task.tasks} if task.is_aggregate else set()
    meta = ModelMeta.create_empty({"training_datasets": trained_on, "adapted_from": base_model})
    return {
        "training_datasets": sorted(trained_on),
        "benchmark": benchmark,
        "zero_shot_percentage": meta.zero_shot_percentage(names),
        "trained_on": sorted(meta.get_training_datasets().intersection(names)),
    }


def _text_columns(task: AbsTask) -> list[str]:
    """The columns that a task other than retrieval asks about; none of a type whose texts are not known."""
    if task.metadata.type == "BitextMining":
        return list(dict.fromkeys(column for pair in task._get_pairs(task.parallel_subsets) for column in pair))
    attributes = [getattr(task, attribute) for attribute in _COLUMN_NAMES if hasattr(task, attribute)]
    return [column for attribute in attributes for column in _strings(attribute)]


def _evaluation_data(task: AbsTask) -> Iterator[Any]:
    """A loaded task's data by subset and split, of its evaluation splits."""
    if getattr(task, "parallel_subsets", False):  # bitext mining of several languages: a column for each
        yield from (task.dataset[split] for split in task.eval_splits)
        return
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


def _searched_keys(corpus: pl.DataFrame) -> pl.Series:
    """Text keys of a corpus' documents, both with and without their titles."""
    texts = [corpus["text"].fill_null("")]
    if "title" in corpus.columns:
        texts.append(corpus.select(pl.concat_str("title", "text", separator=" ", ignore_nulls=True)).to_series())
    return pl.concat([text_keys(part) for part in texts]).unique()


def _local_tables(folder: str, data_root: str | None) -> FileTables:
    return open_tables(LocalSource(kind="local", path=folder, split=TEST), data_root)
