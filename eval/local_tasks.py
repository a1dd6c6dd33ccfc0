"""mteb's task classes over local Parquet files: no network, the same evaluators and the same result layout.

    python -m eval.run_mteb --model PATH --tasks local --data_root DATA --output_dir results

A task that mteb has keeps its name, class, metadata and prompts; the others are defined here. The result's
`dataset_revision` is a hash of the files, so mteb never mixes these scores with those of the Hub's copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import InputError
from common.steps import file_sha256, fingerprint

if TYPE_CHECKING:
    import polars as pl
    from mteb import AbsTask


@dataclass(frozen=True)
class LocalTask:
    """A folder below the data root that holds the data of one mteb task."""

    folder: str
    kind: str  # mteb's task type
    files: tuple[str, ...] = ("test",)  # Parquet files without suffix
    split: str = "test"  # scored
    settings: tuple[tuple[str, Any], ...] = ()  # of the task class, for tasks that mteb does not have
    description: str = ""  # for tasks that mteb does not have


_RETRIEVAL, _TRAIN_TEST = ("corpus", "queries", "qrels"), ("train", "test")
LOCAL_TASKS = {
    "STS12": LocalTask("sts12", "STS"),
    "STS14": LocalTask("sts14", "STS"),
    "STS16": LocalTask("sts16", "STS"),
    "STSBenchmark": LocalTask("stsb", "STS"),
    "SICK-R": LocalTask("sick_r", "STS", ("train", "validation", "test")),  # mteb scores all 9,927 pairs as `test`
    "Banking77Classification": LocalTask("banking77", "Classification", _TRAIN_TEST),
    "EmotionClassification": LocalTask("emotion", "Classification", _TRAIN_TEST),
    "TREC6Classification": LocalTask(
        "trec6", "Classification", _TRAIN_TEST, description="Questions by one of six kinds of answer."
    ),
    "CLINC150Classification": LocalTask(
        "clinc150", "Classification", _TRAIN_TEST, description="Requests to an assistant by one of 150 intents."
    ),
    "StackOverflow20Clustering": LocalTask(
        "stackoverflow20",
        "Clustering",
        settings=(
            ("max_fraction_of_documents_to_embed", None),
            ("max_document_to_embed", 4096),
            ("max_documents_per_cluster", 4096),
        ),
        description="Titles of Stack Overflow questions by one of 20 tags.",
    ),
    "QuoraPairs": LocalTask("quora_pairs", "PairClassification", description="Whether two questions are duplicates."),
    "SNLIPairs": LocalTask(
        "snli_eval", "PairClassification", description="Entailment against contradiction, neutral pairs left out."
    ),
    "SciFact": LocalTask("scifact", "Retrieval", _RETRIEVAL),
    "Cranfield": LocalTask(
        "cranfield", "Retrieval", _RETRIEVAL, description="Abstracts of aerodynamics for questions of researchers."
    ),
    "Vaswani": LocalTask("vaswani", "Retrieval", _RETRIEVAL, description="Abstracts of physics and electronics."),
    "MedQuAD": LocalTask(
        "medquad", "Retrieval", _RETRIEVAL, "validation", description="Answers of NIH pages to medical questions."
    ),
}
_MAIN_SCORES = {
    "Classification": "accuracy",
    "Clustering": "v_measure",
    "PairClassification": "max_ap",
    "Retrieval": "ndcg_at_10",
}
_CATEGORIES = {"Classification": "t2c", "Clustering": "t2c", "PairClassification": "t2t", "Retrieval": "t2t"}


def local_tasks(data_root: Path, names: Sequence[str] | None = None) -> list[AbsTask]:
    """The tasks of `names`, or of all folders below `data_root` that LOCAL_TASKS has.

    Raises InputError where there is no such folder, or a file is missing in it.
    """
    if names is None:
        names = [name for name, task in LOCAL_TASKS.items() if (data_root / task.folder).is_dir()]
        if not names:
            folders = ", ".join(task.folder for task in LOCAL_TASKS.values())
            raise InputError(f"--data_root {data_root}: none of the folders {folders} in it; name another")
    for name in names:
        folder = data_root / LOCAL_TASKS[name].folder
        for file in LOCAL_TASKS[name].files:
            if not (folder / f"{file}.parquet").is_file():
                raise InputError(
                    f"{folder / file}.parquet: no such file, task {name} needs it; name another data_root"
                )
    register_local_tasks()
    return [_local_task(name, data_root / LOCAL_TASKS[name].folder) for name in names]


@functools.cache
def register_local_tasks() -> None:
    """Let mteb know the tasks that only this module has, so that it reads and tabulates their results."""
    from mteb.get_tasks import _TASKS_REGISTRY  # mteb has no public way to add a task

    for name, task in LOCAL_TASKS.items():
        if task.description:
            _TASKS_REGISTRY[name] = _task_class(name, task)


def _task_class(name: str, task: LocalTask) -> type[AbsTask]:
    """The class of a task that mteb does not have."""
    from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskPairClassification, AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    bases = {
        "Classification": AbsTaskClassification,
        "Clustering": AbsTaskClustering,
        "PairClassification": AbsTaskPairClassification,
        "Retrieval": AbsTaskRetrieval,
    }
    metadata = TaskMetadata(
        name=name,
        description=task.description,
        type=task.kind,
        category=_CATEGORIES[task.kind],
        dataset={"path": f"local/{task.folder}", "revision": "local"},
        eval_splits=[task.split],
        eval_langs=["eng-Latn"],
        main_score=_MAIN_SCORES[task.kind],
    )
    return type(name, (bases[task.kind],), {"metadata": metadata, **dict(task.settings)})


def _local_task(name: str, folder: Path) -> AbsTask:
    """mteb's task `name`, reading the Parquet files of `folder` in place of the Hub's."""
    import mteb

    task = LOCAL_TASKS[name]
    base = type(mteb.get_task(name))
    revision = fingerprint([file_sha256(folder / f"{file}.parquet") for file in task.files])
    dataset = {"path": f"local/{task.folder}", "revision": revision}

    def load_data(self: AbsTask, num_proc: int | None = None, **_: Any) -> None:
        self.dataset = _READERS[task.kind](folder, task)
        self.data_loaded = True

    members = {"metadata": base.metadata.model_copy(update={"dataset": dataset}), "load_data": load_data}
    return type(base.__name__, (base,), members)()


def _read(folder: Path, file: str) -> pl.DataFrame:
    import polars as pl

    return pl.read_parquet(folder / f"{file}.parquet")


def _read_sts(folder: Path, task: LocalTask) -> Any:
    """All files are the one scored split."""
    import polars as pl
    from datasets import Dataset

    return {task.split: Dataset.from_polars(pl.concat([_read(folder, file) for file in task.files]))}


def _read_classification(folder: Path, task: LocalTask) -> Any:
    from datasets import Dataset, DatasetDict

    return DatasetDict({file: Dataset.from_polars(_read(folder, file)) for file in task.files})


def _read_clustering(folder: Path, task: LocalTask) -> Any:
    from datasets import Dataset

    rows = _read(folder, task.split).select(sentences="text", labels="label_text")
    return {task.split: Dataset.from_polars(rows)}


def _read_pairs(folder: Path, task: LocalTask) -> Any:
    """Label 1: duplicate, or entailment. As in mteb's NLI tasks, neutral pairs are left out."""
    import polars as pl
    from datasets import Dataset

    is_positive = pl.col("label_text").is_in(["duplicate", "entailment"]).cast(pl.Int64)
    rows = _read(folder, task.split).filter(pl.col("label_text") != "neutral")
    return {task.split: Dataset.from_polars(rows.select(sentence1="text1", sentence2="text2", labels=is_positive))}


def _read_retrieval(folder: Path, task: LocalTask) -> Any:
    import polars as pl
    from datasets import Dataset

    qrels = _read(folder, "qrels").filter(pl.col("split") == task.split)
    relevant: dict[str, dict[str, int]] = {}
    for query_id, document_id, score in qrels.select("query_id", "corpus_id", "score").iter_rows():
        relevant.setdefault(query_id, {})[document_id] = score
    queries = _read(folder, "queries").select(id="_id", text="text").filter(pl.col("id").is_in(list(relevant)))
    documents = _read(folder, "corpus").select(id="_id", title="title", text="text")
    split = {"corpus": Dataset.from_polars(documents), "queries": Dataset.from_polars(queries)}
    return {"default": {task.split: split | {"relevant_docs": relevant, "top_ranked": None}}}


_READERS: dict[str, Callable[[Path, LocalTask], Any]] = {
    "STS": _read_sts,
    "Classification": _read_classification,
    "Clustering": _read_clustering,
    "PairClassification": _read_pairs,
    "Retrieval": _read_retrieval,
}
