"""Where raw data comes from: docstrings (`pydocs`), a folder (`local`), the Hugging Face Hub (`hub`), or a set of
sources.yaml (`registry`), which is on the Hub too and comes with its columns, licence and instruction.

Whatever the source, out come documents, queries and qrels, or sentence pairs with a score for task type `sts`.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import os
import platform
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import polars as pl
import pyarrow as pa
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from common.cli import InputError
from common.models import expand_user, hub_commit
from common.recipes import Section, parse_recipe, read_yaml
from common.steps import file_sha256, files_of
from dataset_builders import pydocs
from dataset_builders.generate import Generate
from dataset_builders.hub_tables import HubSet, HubTables
from dataset_builders.languages import Language
from dataset_builders.layouts import COLUMNS, LABEL_SCORES, NEEDED
from dataset_builders.near_duplicates import stable_hash as stable_hash  # for mining
from dataset_builders.readers import Rows, draw, read_layout
from dataset_builders.schema import LABEL_FLOOR, STS
from dataset_builders.tables import FileTables, TableKeys, Tables

REGISTRY = Path(__file__).with_name("sources.yaml")
TaskType = Literal["retrieval", "classification", "clustering", "duplicates", "nli", "sts"]
TASK_LAYOUTS = {
    "retrieval": ("corpus", "pairs", "documents"),
    "classification": ("texts",),
    "clustering": ("texts",),
    "duplicates": ("text_pairs",),
    "nli": ("text_pairs",),
    "sts": ("graded_pairs",),
}


class Splits(Section):
    """`split` is graded and mined; the queries of `eval_splits` get candidates only."""

    language: Language | None = None  # of the texts: BM25's stemmer and stop words (null: English), and the cards
    licence: str | None = None  # of the source's texts, as the card states it; a set of the registry brings its own
    # the mteb tasks whose data this is, which a model trained on it declares; none: it is no task's; null: not known
    training_datasets: tuple[str, ...] | None = None
    split: str = "train"  # that is graded and mined
    eval_splits: tuple[str, ...] = ()  # whose queries get candidates only
    num_pairs: int | None = Field(None, ge=1)  # a stable subset of `split`: a larger number contains a smaller one's
    seed: int = Field(0, ge=0)  # of that subset, and of the positives that are drawn from a class

    @field_validator("training_datasets", mode="before")
    @classmethod
    def _none_of_mteb(cls, names: Any) -> Any:
        return () if names == "none" else names

    @property
    def searched(self) -> tuple[str, ...]:
        return (self.split, *self.eval_splits)

    @model_validator(mode="after")
    def _disjoint(self) -> Splits:
        if self.split in self.eval_splits:
            raise ValueError(f"split {self.split!r} cannot be an eval split too: it would be trained on")
        if len(set(self.eval_splits)) < len(self.eval_splits):
            raise ValueError(f"eval_splits {', '.join(self.eval_splits)}: name each once")
        return self


class OnTheHub(Splits):
    """A set on the Hub, in place of which a copy on this machine may be read."""

    # keys of a local source (path, and what differs there): read in place of the Hub's where it lies below data_root
    local_copy: Mapping[str, Any] | None = None

    @field_validator("local_copy")
    @classmethod
    def _of_a_local_source(cls, keys: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        try:
            _ = keys and parse_recipe(LocalSource, {**keys, "kind": "local"}, "as a local source")
        except InputError as error:
            raise ValueError(str(error)) from None
        return keys


class Entry(HubSet):
    """A set of sources.yaml."""

    revision: str = Field(pattern="^[0-9a-f]{40}$")  # a commit, so that a build reads the same rows in years
    task_type: TaskType
    split: str | None  # null: nothing to train on, and `note` says why
    instruction: str
    licence: str
    mteb_task: str | None  # the evaluation that this is the training set of
    training_datasets: tuple[str, ...]
    local_copy: dict[str, Any] | None = None  # what a source of this set has unless it says otherwise
    note: str = ""

    @property
    def in_batch_negatives(self) -> bool:
        """False where the positive of one row may be of another row's class."""
        return self.task_type in ("retrieval", "duplicates", "nli")


@functools.cache
def registry() -> dict[str, Entry]:
    """sources.yaml, in its order."""
    return {name: parse_recipe(Entry, values, f"{REGISTRY}, {name}") for name, values in read_yaml(REGISTRY).items()}


class PydocsSource(Splits):
    """Docstrings of the standard library and of this project's dependencies: summary = query, body = document."""

    kind: Literal["pydocs"]  # whose keys these are
    language: Language | None = "en"


class LocalSource(Splits, TableKeys):
    """A file or a folder, whose layout shows in its columns; see tables.py."""

    kind: Literal["local"]  # whose keys these are
    path: str  # a file or a folder, below data_root or as written
    queries: Generate | None = None  # who writes them, where `path` holds documents alone

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        known = {name for names in COLUMNS.values() for name in names}
        for name in columns:
            if name not in known:
                raise ValueError(f"our names come first, and {name!r} is none of {', '.join(sorted(known))}")
        return columns

    @model_validator(mode="after")
    def _draws_documents(self) -> LocalSource:
        if self.queries and self.num_pairs:
            raise ValueError("num_pairs does not go with source.queries; write how many documents get some: documents")
        return self


class HubSource(OnTheHub, HubSet):
    kind: Literal["hub"]  # whose keys these are


class RegistrySource(OnTheHub):
    """A set of sources.yaml, whose `split` and `training_datasets` are filled in."""

    kind: Literal["registry"]  # whose keys these are
    name: str  # see --list_sources

    @property
    def entry(self) -> Entry:
        return registry()[self.name]

    @property
    def of_the_hub(self) -> HubSource:
        """The same as a source of kind `hub`."""
        keys = self.model_dump(include={*Splits.model_fields}) | self.entry.model_dump(include={*HubSet.model_fields})
        return HubSource(kind="hub", **keys)

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, values: Any) -> Any:
        entry = registry().get(str(values.get("name")))
        if entry is None or entry.split is None:
            return values  # the name is refused below
        filled = entry.model_dump(include={"split", "training_datasets", "local_copy"})
        return {"language": "en", **filled, **values}

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


def _of_a_path(values: Any) -> Any:
    """--source.path FOLDER reads a folder by the recipe of a set on the Hub, with what the registry knows of it."""
    if not isinstance(values, dict) or values.get("kind") not in ("hub", "registry") or "path" not in values:
        return values
    known, entry = {}, registry().get(str(values.get("name")))
    if entry and entry.split:
        known = entry.model_dump(include={"split", "training_datasets", "score_range", "licence"}) | {"language": "en"}
        known["label_scores"] = {**LABEL_SCORES, **entry.label_scores}  # numbers or words
    kept = {name: value for name, value in values.items() if name in LocalSource.model_fields}
    return {**known, **kept, "kind": "local"}


Source = Annotated[
    PydocsSource | LocalSource | HubSource | RegistrySource,
    Field(discriminator="kind"),
    BeforeValidator(_of_a_path),
]


def prefer_local(source: Source, data_root: str | None) -> Source:
    """`source`, or its local copy where one lies below `data_root` or $DATA_ROOT; one line tells which."""
    keys = getattr(source, "local_copy", None)
    if not keys:
        return source
    found, path = _complete(source), find_copy(keys["path"], data_root)
    if not path:
        print(f"reads {found.dataset} on the Hub: no {keys['path']} below --data_root", file=sys.stderr, flush=True)
        return source
    print(f"reads {path} in place of {found.dataset} on the Hub", file=sys.stderr, flush=True)
    shared = source.model_dump(include={*Splits.model_fields}) | {"score_range": found.score_range}
    shared["licence"] = source.licence or (source.entry.licence if source.kind == "registry" else None)
    # columns are known by their names; labels may be the Hub's numbers or words
    return LocalSource(**{**shared, "label_scores": {**LABEL_SCORES, **found.label_scores}, **keys, "kind": "local"})


# keys that make no difference to a source's rows: what is said of them, and where they lie
NO_MATTER = {"licence", "language", "training_datasets", "path", "queries", "local_copy"}


def describe_source(source: Source, data_root: str | None) -> dict[str, Any]:
    """What decides a source's rows, for the fingerprint of the step that reads them. Raises InputError."""
    if source.kind != "registry" and source.training_datasets:
        _check_training_datasets(source.training_datasets)
    keys = source.model_dump(mode="json", exclude=NO_MATTER)
    if source.kind == "pydocs":
        packages = {name: importlib.metadata.version(name) for name in pydocs.dependencies(pydocs.PROJECT)}
        parser = file_sha256(Path(pydocs.__file__))
        return {**keys, "python": platform.python_version(), "packages": packages, "parser": parser}
    if source.kind == "local":  # the same files are the same source wherever they lie
        files = open_tables(source, data_root).files
        return {**keys, "files": {name: file_sha256(path) for name, path in files.items()}}
    found = _complete(source)
    keys |= {"set": found.model_dump(mode="json", include={*HubSet.model_fields})}
    if Path(found.dataset).is_dir():
        return {**keys, "files": files_of(Path(found.dataset))}
    return {**keys, "commit": hub_commit(found.dataset, found.revision, repo_type="dataset")}


def _check_training_datasets(names: Sequence[str]) -> None:
    """Raises InputError for a name that is neither a task of mteb nor a set of the registry."""
    import mteb

    for name in sorted({*names}.difference(*(entry.training_datasets for entry in registry().values()))):
        try:
            mteb.get_task(name)
        except KeyError as error:  # whose message names what comes close
            reason = str(error.args[0]).removeprefix("KeyError: ")
            raise InputError(f"source.training_datasets: {reason}; write none for data of no task") from None


def check_task_type(task_type: str, source: Source, data_root: str | None) -> None:
    """Raises InputError when a source's rows are not of this task type."""
    for key in ("eval_splits", "holdout"):
        if task_type == "sts" and getattr(source, key, None):
            raise InputError(f"key 'source.{key}': task_type 'sts' reads one split; leave it out")
    if source.kind == "registry" and source.entry.task_type != task_type:
        raise InputError(f"source.name {source.name!r} is for task_type {source.entry.task_type!r}, not {task_type!r}")
    if source.kind != "pydocs" and (task_type == "sts") != (_complete(source).score_range is not None):
        raise InputError("key 'source.score_range' goes with task_type 'sts', which needs it, and with no other")
    if source.kind == "local":
        layout = open_tables(source, data_root).layout
    else:
        layout = "pairs" if source.kind == "pydocs" else _complete(source).layout
    if layout not in TASK_LAYOUTS[task_type]:
        fitting = ", ".join(name for name, layouts in TASK_LAYOUTS.items() if layout in layouts)
        raise InputError(f"task_type {task_type!r}: the source holds {layout!r}, which is for {fitting}")


def read_rows(source: Source, data_root: str | None) -> Rows:
    """Documents, queries and qrels. Raises InputError at the first row that cannot be used."""
    if source.kind == "pydocs":
        return pydocs.read_docstrings(source)
    tables = open_tables(source, data_root)
    rows = read_layout(tables)
    tables.tell()
    return rows


def read_sts(source: Source, data_root: str | None) -> pa.Table:
    """(sentence1, sentence2, label): the published score moved from its stated range into (0, 1)."""
    tables = open_tables(source, data_root)
    table = tables.whole_rows(tables.read(source.split), [*NEEDED["graded_pairs"]])
    pairs = table.select("split", query_id=pl.int_range(pl.len()), score=1)
    table = table[draw(pairs, source)["query_id"]]
    lowest, highest = tables.source.score_range
    outside = table.filter(~pl.col("score").is_between(lowest, highest))
    if len(outside):
        where, row, score = outside.select("where", "row", "score").row(0)
        raise InputError(f"{where}: score {score} in row {row} is outside score_range [{lowest}, {highest}]")
    label = ((pl.col("score") - lowest) / (highest - lowest)).clip(LABEL_FLOOR, 1 - LABEL_FLOOR)
    return table.with_columns(label=label.cast(pl.Float32)).select(STS.names).to_arrow().cast(STS)


def open_tables(source: Source, data_root: str | None) -> Tables:
    """The tables of a source that has some. Raises InputError when there is no such folder or data set."""
    source = _complete(source)
    if source.kind == "local":
        return FileTables(find_source(source.path, data_root), source)
    if source.revision is None and not Path(source.dataset).is_dir():
        source = source.model_copy(update={"revision": hub_commit(source.dataset, None, repo_type="dataset")})
    return HubTables(source)


def find_copy(path: str, data_root: str | None) -> Path | None:
    """`path` under `data_root`, else $DATA_ROOT, where it is there."""
    return next(filter(Path.exists, _below_roots(path, data_root)), None)


def find_source(path: str, data_root: str | None) -> Path:
    """A local set's file or folder: under `data_root`, else $DATA_ROOT, else as written. Raises InputError."""
    places = [*_below_roots(path, data_root), expand_user(path)]
    found = next(filter(Path.exists, places), None)
    if found is None:
        searched = ", ".join(map(str, places))
        raise InputError(
            f"source.path {path!r}: no such folder or file (searched: {searched}); set data_root or $DATA_ROOT"
        )
    return found


def _below_roots(path: str, data_root: str | None) -> list[Path]:
    return [expand_user(root) / path for root in (data_root, os.environ.get("DATA_ROOT")) if root]


def sources_table() -> str:
    """The registry for people to read, by task type."""
    line = "  {:<38} {:<52} {:<10} {:<8} {:<15} {}"
    lines = [line.format("name", "data set on the Hub", "split", "revision", "licence", "in-batch")]
    for task_type in TASK_LAYOUTS:
        lines += ["", task_type]
        for name, entry in registry().items():
            if entry.task_type != task_type:
                continue
            dataset = f"{entry.dataset} ({entry.config})" if entry.config else entry.dataset
            facts = entry.split or "none*", entry.revision[:8], entry.licence[:15]
            lines.append(line.format(name, dataset, *facts, "yes" if entry.in_batch_negatives else "no"))
    lines += ["", "* nothing to train on", ""]
    for name, entry in registry().items():
        if entry.note:
            lines += textwrap.wrap(f"{name}: {entry.note}", 119, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def _complete(source: LocalSource | HubSource | RegistrySource) -> LocalSource | HubSource:
    return source.of_the_hub if source.kind == "registry" else source
