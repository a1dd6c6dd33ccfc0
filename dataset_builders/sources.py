"""Where raw data comes from: docstrings (`pydocs`), a folder (`local`), the Hugging Face Hub (`hub`), or a set of
sources.yaml (`registry`), which is on the Hub too and comes with its columns, licence and instruction.

Whatever the source, out come documents, queries and qrels (or sentence pairs with a score), checked row by row.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import os
import platform
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationInfo, field_validator, model_validator

from common.cli import InputError
from common.models import expand_user, hub_commit
from common.recipes import Section, parse_recipe, read_yaml
from common.steps import file_sha256, files_of
from dataset_builders import pydocs
from dataset_builders.layouts import (
    COLUMNS,
    LABEL_SCORES,
    Draw,
    FolderTables,
    HubTables,
    Layout,
    Rows,
    Tables,
    read_graded_pairs,
    read_layout,
)
from dataset_builders.layouts import stable_hash as stable_hash  # for the rooms to the right
from dataset_builders.schema import DOCUMENTS, LABEL_FLOOR, QRELS, STS

REGISTRY = Path(__file__).with_name("sources.yaml")
TaskType = Literal["retrieval", "classification", "clustering", "duplicates", "nli", "sts"]
TASK_LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "retrieval": ("corpus", "pairs"),
    "classification": ("texts",),
    "clustering": ("texts",),
    "duplicates": ("text_pairs",),
    "nli": ("text_pairs",),
    "sts": ("graded_pairs",),
}


class Disclosed(Section):
    licence: str | None = None  # of the source's texts, as the card states it; a set of the registry brings its own
    # the mteb tasks whose data this is: what a model trained on it declares as its `training_datasets`
    training_datasets: tuple[str, ...] = ()


class Splits(Disclosed):
    """`split` is graded and mined; the queries of `eval_splits` get candidates only."""

    split: str = "train"
    eval_splits: tuple[str, ...] = ()

    @property
    def searched(self) -> tuple[str, ...]:
        return (self.split, *self.eval_splits)

    @model_validator(mode="after")
    def _apart(self) -> Splits:
        if self.split in self.eval_splits:
            raise ValueError(f"split {self.split!r} cannot be an eval split too: it would be trained on")
        if len(set(self.eval_splits)) < len(self.eval_splits):
            raise ValueError(f"eval_splits {', '.join(self.eval_splits)}: name each once")
        return self


class Graded(Disclosed):
    """Sentence pairs whose published scores run from score_range[0] to score_range[1]."""

    split: str = "train"
    score_range: tuple[float, float]

    @model_validator(mode="after")
    def _rising(self) -> Graded:
        if not self.score_range[0] < self.score_range[1]:
            raise ValueError("score_range is written [lowest, highest]")
        return self


class Sample(Section):
    """A stable subset of `split`: a larger number contains a smaller one's."""

    num_pairs: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)


class HubSet(Section):
    """A data set on the Hub, or a folder that `load_dataset` reads; see layouts.py."""

    dataset: str = Field(min_length=1)
    config: str | None = None
    revision: str | None = None
    layout: Layout = "pairs"
    columns: Mapping[str, str | tuple[str, ...]] = {}  # our name -> theirs; several are joined by a space
    label_separator: str | None = Field(None, min_length=1)  # of texts: a label is several classes with this between
    label_scores: Mapping[str, int] = LABEL_SCORES  # of text_pairs: pairs with another label are left out

    @model_validator(mode="after")
    def _known_columns(self) -> HubSet:
        for name in self.columns:
            if name not in COLUMNS[self.layout]:
                known = ", ".join(COLUMNS[self.layout]) or "none to rename"
                raise ValueError(f"layout {self.layout!r} has no column {name!r}; it has {known}")
        return self


class Entry(HubSet):
    """A set of sources.yaml."""

    revision: str = Field(pattern="^[0-9a-f]{40}$")  # a commit, so that a build reads the same rows in years
    task_type: TaskType
    split: str | None  # null: nothing to train on, and `note` says why
    instruction: str
    licence: str
    in_batch_negatives: bool  # false where the positive of one row may be of another row's class
    mteb_task: str | None  # the evaluation that this is the training set of
    training_datasets: tuple[str, ...]
    score_range: tuple[float, float] | None = None
    note: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Entry:
        if self.layout not in TASK_LAYOUTS[self.task_type]:
            raise ValueError(f"layout {self.layout!r} does not go with task type {self.task_type!r}")
        if (self.task_type == "sts") != (self.score_range is not None):
            raise ValueError("score_range goes with task type 'sts', and only with that")
        if self.split is None and not self.note:
            raise ValueError("a set without a split to train on says why in its note")
        return self


@functools.cache
def registry() -> dict[str, Entry]:
    """sources.yaml, in its order."""
    return {name: parse_recipe(Entry, values, f"{REGISTRY}, {name}") for name, values in read_yaml(REGISTRY).items()}


class PydocsSource(Splits, Sample):
    """Docstrings of the standard library and of this project's dependencies: summary = query, body = document."""

    kind: Literal["pydocs"]


class LocalSource(Splits):
    """A folder in one of the layouts of layouts.py, which shows in its files; read whole."""

    kind: Literal["local"]
    path: str
    seed: int = Field(0, ge=0)  # of the positives that are drawn from a class


class HubSource(Splits, Sample, HubSet):
    kind: Literal["hub"]


class RegistrySource(Splits, Sample):
    """A set of sources.yaml, whose `split` and `training_datasets` are filled in."""

    kind: Literal["registry"]
    name: str

    @property
    def entry(self) -> Entry:
        return registry()[self.name]

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, values: Any) -> Any:
        entry = registry().get(str(values.get("name")))
        if entry is None or entry.split is None:
            return values  # the name is refused below
        return {"split": entry.split, "training_datasets": entry.training_datasets, **values}

    @field_validator("name")
    @classmethod
    def _trainable(cls, name: str, info: ValidationInfo) -> str:
        if name not in registry():
            known = {known.lower(): known for known in registry()}
            close = difflib.get_close_matches(name.lower(), known, n=1)
            hint = f"did you mean {known[close[0]]!r}?" if close else "see --list_sources"
            raise ValueError(f"not in the registry; {hint}")
        if registry()[name].split is None:
            raise ValueError(registry()[name].note)
        if info.data.get("split") != registry()[name].split:
            raise ValueError(f"its split to train on is {registry()[name].split!r}; the others are for evaluation")
        return name


class LocalStsSource(Graded):
    """A folder with SPLIT.parquet (sentence1, sentence2, score)."""

    kind: Literal["local"]
    path: str


class HubStsSource(Graded, Sample, HubSet):
    kind: Literal["hub"]
    layout: Literal["graded_pairs"] = "graded_pairs"


Source = Annotated[PydocsSource | LocalSource | HubSource | RegistrySource, Field(discriminator="kind")]
StsSource = Annotated[LocalStsSource | HubStsSource | RegistrySource, Field(discriminator="kind")]


def describe_source(source: Any, data_root: str | None) -> dict[str, Any]:
    """What decides a source's rows, for the fingerprint of the step that reads them. Raises InputError."""
    keys = source.model_dump(mode="json", exclude={*Disclosed.model_fields})
    if source.kind == "pydocs":
        packages = {name: importlib.metadata.version(name) for name in pydocs.dependencies(pydocs.PROJECT)}
        parser = file_sha256(Path(pydocs.__file__))
        return {**keys, "python": platform.python_version(), "packages": packages, "parser": parser}
    if source.kind == "local":
        del keys["path"]  # the same files are the same source wherever they lie
        return {**keys, "files": {path.name: file_sha256(path) for path in open_tables(source, data_root).files}}
    found = _hub_set(source)
    keys |= {"set": found.model_dump(mode="json", include={*HubSet.model_fields, "score_range"})}
    if Path(found.dataset).is_dir():
        return {**keys, "files": files_of(Path(found.dataset))}
    return {**keys, "commit": hub_commit(found.dataset, found.revision, repo_type="dataset")}


def check_task_type(task_type: str, source: Any, data_root: str | None) -> None:
    """Raises InputError when a source's rows are not of this task type."""
    if source.kind == "registry" and source.entry.task_type != task_type:
        raise InputError(f"source.name {source.name!r} is for task_type {source.entry.task_type!r}, not {task_type!r}")
    if source.kind == "local":
        layout = open_tables(source, data_root).layout
    else:
        layout = "pairs" if source.kind == "pydocs" else _hub_set(source).layout
    if layout not in TASK_LAYOUTS[task_type]:
        fitting = ", ".join(name for name, layouts in TASK_LAYOUTS.items() if layout in layouts)
        raise InputError(f"task_type {task_type!r}: the source holds {layout!r}, which is for {fitting}")


def read_rows(source: PydocsSource | LocalSource | HubSource | RegistrySource, data_root: str | None) -> Rows:
    """Documents, queries and qrels. Raises InputError at the first row that cannot be used."""
    if source.kind == "pydocs":
        return _read_pydocs(source)
    return read_layout(open_tables(source, data_root), source.searched, _draw_of(source))


def read_sts(source: LocalStsSource | HubStsSource | RegistrySource, data_root: str | None) -> pa.Table:
    """(sentence1, sentence2, label): the published score moved from its stated range into (0, 1)."""
    tables = open_tables(source, data_root)
    table = read_graded_pairs(tables, source.split, _draw_of(source))
    lowest, highest = source.entry.score_range if source.kind == "registry" else source.score_range
    scores = table["score"].to_numpy()
    outside = np.flatnonzero(~((scores >= lowest) & (scores <= highest)))
    if len(outside):
        where = f"{tables.where(source.split)}: score {scores[outside[0]]} in row {outside[0]}"
        raise InputError(f"{where} is outside score_range [{lowest}, {highest}]")
    labels = np.clip((scores - lowest) / (highest - lowest), LABEL_FLOOR, 1 - LABEL_FLOOR)
    return pa.table([table["sentence1"], table["sentence2"], pa.array(labels, pa.float32())], schema=STS)


def open_tables(source: Any, data_root: str | None) -> Tables:
    """The tables of a source that has some. Raises InputError when there is no such folder or data set."""
    if source.kind == "local":
        splits = source.searched if isinstance(source, LocalSource) else (source.split,)
        return FolderTables(find_folder(source.path, data_root), splits)
    found = _hub_set(source)
    revision = found.revision
    if revision is None and not Path(found.dataset).is_dir():
        revision = hub_commit(found.dataset, None, repo_type="dataset")
    keys = {name: getattr(found, name) for name in HubSet.model_fields}
    return HubTables(**{**keys, "revision": revision})


def find_folder(path: str, data_root: str | None) -> Path:
    """A local set's folder: under `data_root`, else under $DATA_ROOT, else as written. Raises InputError."""
    roots = [root for root in (data_root, os.environ.get("DATA_ROOT")) if root]
    places = [*(expand_user(root) / path for root in roots), expand_user(path)]
    for place in places:
        if place.is_dir():
            return place
    looked = ", ".join(map(str, places))
    raise InputError(f"source.path {path!r}: no such folder (looked for {looked}); set data_root or $DATA_ROOT")


def sources_table() -> str:
    """The registry for people to read, by task type."""
    line = "  {:<38} {:<52} {:<10} {:<8} {:<15} {}"
    lines = [line.format("name", "data set on the Hub", "split", "revision", "licence", "in-batch")]
    for task_type in TASK_LAYOUTS:
        lines += ["", task_type]
        for name, entry in registry().items():
            if entry.task_type == task_type:
                dataset = f"{entry.dataset} ({entry.config})" if entry.config else entry.dataset
                in_batch = "yes" if entry.in_batch_negatives else "no"
                lines.append(
                    line.format(
                        name, dataset, entry.split or "none*", entry.revision[:8], entry.licence[:15], in_batch
                    )
                )
    lines += ["", "* nothing to train on", ""]
    for name, entry in registry().items():
        if entry.note:
            lines += textwrap.wrap(f"{name}: {entry.note}", 119, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def _hub_set(source: HubSource | HubStsSource | RegistrySource) -> HubSet:
    return source.entry if source.kind == "registry" else source


def _draw_of(source: Any) -> Draw:
    if isinstance(source, Sample):
        return Draw(source.num_pairs, source.seed)
    return Draw(None, source.seed if isinstance(source, LocalSource) else 0)


def _read_pydocs(source: PydocsSource) -> Rows:
    found = pydocs.docstring_pairs()
    kept = _draw_of(source).keeps([pair.name for pair in found], np.ones(len(found)))
    pairs = [pair for pair, drawn in zip(found, kept, strict=True) if drawn]
    names = pa.array([pair.name for pair in pairs], pa.string())
    summaries, bodies = ([getattr(pair, side) for pair in pairs] for side in ("summary", "body"))
    return Rows(
        documents=pa.table([names, pa.array(bodies, pa.string())], schema=DOCUMENTS),
        queries=pa.table({"query_id": names, "text": pa.array(summaries, pa.string())}),
        qrels=pa.table(
            [names, names, pa.repeat(pa.scalar(1, pa.int32()), len(pairs)), pa.nulls(len(pairs), pa.string())],
            schema=QRELS,
        ),
        seen=len(found),
    )
