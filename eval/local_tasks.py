"""mteb's task classes over local Parquet files: no network, the same evaluators and the same result layout.

    python -m eval.run_mteb --model PATH --tasks local --data_root DATA --output_dir results

A task that mteb has keeps its name, class, metadata and prompts; the others are defined here. The result's
`dataset_revision` is a hash of the files, so mteb never mixes these scores with those of the Hub's copy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from common.cli import InputError
from common.recipes import Section, read_yaml
from common.steps import file_sha256, fingerprint, read_parquet

if TYPE_CHECKING:
    import polars as pl
    from mteb import AbsTask


class LocalTask(Section):
    """A folder below the data root that holds the data of one mteb task."""

    folder: str
    kind: str  # mteb's task type
    files: tuple[str, ...] = ("test",)  # Parquet files without suffix
    split: str = "test"  # scored
    settings: dict[str, Any] = Field(default_factory=dict)  # of the task class, for tasks that mteb does not have
    description: str = ""  # for tasks that mteb does not have
    instruction: str = ""  # for tasks outside MTEB(eng, v2)
    shown_from: str | None = None  # folder and file that demonstrations come from


LOCAL_TASKS = {name: LocalTask(**values) for name, values in read_yaml(Path(__file__).with_suffix(".yaml")).items()}
# of tasks that mteb does not have: type -> main score, category
_KINDS = {
    "Classification": ("accuracy", "t2c"),
    "Clustering": ("v_measure", "t2c"),
    "PairClassification": ("max_ap", "t2t"),
    "Retrieval": ("ndcg_at_10", "t2t"),
}


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
    from mteb import abstasks
    from mteb.abstasks.task_metadata import TaskMetadata

    main_score, category = _KINDS[task.kind]
    metadata = TaskMetadata(
        name=name,
        description=task.description,
        type=task.kind,
        category=category,
        dataset={"path": f"local/{task.folder}", "revision": "local"},
        eval_splits=[task.split],
        eval_langs=["eng-Latn"],
        main_score=main_score,
    )
    base = getattr(abstasks, f"AbsTask{task.kind}")
    return type(name, (base,), {"metadata": metadata, **task.settings})


def _local_task(name: str, folder: Path) -> AbsTask:
    """mteb's task `name`, reading the Parquet files of `folder` in place of the Hub's."""
    import mteb

    task = LOCAL_TASKS[name]
    base = type(mteb.get_task(name))
    revision = fingerprint([file_sha256(folder / f"{file}.parquet") for file in task.files])
    dataset = {"path": f"local/{task.folder}", "revision": revision}

    def load_data(self: AbsTask, num_proc: int | None = None, **_: Any) -> None:
        self.dataset = _read_task(folder, task)
        self.data_loaded = True

    members = {"metadata": base.metadata.model_copy(update={"dataset": dataset}), "load_data": load_data}
    return type(base.__name__, (base,), members)()


def training_pairs(name: str, data_root: Path) -> pl.DataFrame:
    """(query, positive) of a task's training data, for demonstrations: equal meaning, text and label, or relevance.

    No row has a query that is scored, or a positive that belongs to one. Empty where there is no training data.
    """
    import polars as pl

    task = LOCAL_TASKS[name]
    if task.shown_from is None:
        return pl.DataFrame(schema={"query": pl.String, "positive": pl.String})
    home, _, file = task.shown_from.partition("/")
    rows = _pairs(task.kind, data_root / home, file, are_equal=True)
    files = task.files if task.kind in ("STS", "PairClassification") else [task.split]
    scored = pl.concat([_pairs(task.kind, data_root / task.folder, own) for own in files])
    if task.kind == "Classification":  # labels are the same on both sides
        return rows.join(scored, on="query", how="anti")
    texts = pl.concat([scored["query"], scored["positive"]]).implode()
    return rows.filter(~pl.col("query").is_in(texts), ~pl.col("positive").is_in(texts))


def _pairs(kind: str, folder: Path, split: str, are_equal: bool = False) -> pl.DataFrame:
    """(query, positive) of a split; `are_equal`: of pairs of texts only those of equal meaning."""
    import polars as pl

    if kind == "Retrieval":
        documents = pl.concat_str("title", "text", separator=" ").str.strip_chars()
        relevant = _read(folder, "qrels").filter(pl.col("split") == split, pl.col("score") > 0)
        relevant = relevant.join(_read(folder, "queries").select(query_id="_id", query="text"), on="query_id")
        texts = _read(folder, "corpus").select(corpus_id="_id", positive=documents)
        return relevant.join(texts, on="corpus_id").select("query", "positive")
    rows = _read(folder, split)
    if kind == "Classification":
        return rows.select(query="text", positive="label_text")
    is_sts = kind == "STS"
    if are_equal:
        best = pl.col("score") >= 0.9 * rows["score"].max() if is_sts else pl.col("label_text") == "entailment"
        rows = rows.filter(best)
    return (
        rows.select(query="sentence1", positive="sentence2")
        if is_sts
        else rows.select(query="text1", positive="text2")
    )


def _read(folder: Path, file: str) -> pl.DataFrame:
    import polars as pl

    return pl.from_arrow(read_parquet(folder / f"{file}.parquet"))


def _read_task(folder: Path, task: LocalTask) -> Any:
    """What mteb's class of that type reads."""
    import polars as pl
    from datasets import Dataset, DatasetDict

    if task.kind == "Retrieval":
        return {"default": {task.split: _read_retrieval(folder, task.split)}}
    tables = {file: _rows(task.kind, _read(folder, file)) for file in task.files}
    if task.kind == "STS":  # all files are the one scored split
        tables = {task.split: pl.concat(tables.values())}
    return DatasetDict({split: Dataset.from_polars(table) for split, table in tables.items()})


def _rows(kind: str, rows: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    if kind == "Clustering":
        return rows.select(sentences="text", labels="label_text")
    if kind == "PairClassification":  # as in mteb's NLI tasks, neutral pairs are left out
        is_positive = pl.col("label_text").is_in(["duplicate", "entailment"]).cast(pl.Int64)
        rows = rows.filter(pl.col("label_text") != "neutral")
        return rows.select(sentence1="text1", sentence2="text2", labels=is_positive)
    return rows


def _read_retrieval(folder: Path, split: str) -> dict[str, Any]:
    import polars as pl
    from datasets import Dataset

    qrels = _read(folder, "qrels").filter(pl.col("split") == split)
    relevant: dict[str, dict[str, int]] = {}
    for query_id, document_id, score in qrels.select("query_id", "corpus_id", "score").iter_rows():
        relevant.setdefault(query_id, {})[document_id] = score
    queries = _read(folder, "queries").select(id="_id", text="text").filter(pl.col("id").is_in(list(relevant)))
    documents = _read(folder, "corpus").select(id="_id", title="title", text="text")
    tables = {"corpus": Dataset.from_polars(documents), "queries": Dataset.from_polars(queries)}
    return tables | {"relevant_docs": relevant, "top_ranked": None}
