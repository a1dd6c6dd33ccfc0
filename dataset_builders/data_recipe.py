"""The keys of a data recipe: how texts become graded data, and which folder each recipe is built into."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from common.cli import InputError
from common.recipes import Section, key_lines, list_keys, parse_recipe, read_yaml
from dataset_builders.bm25 import Bm25
from dataset_builders.decontamination import Decontamination
from dataset_builders.dense import Dense
from dataset_builders.engines import Ray
from dataset_builders.fusion import Fusion
from dataset_builders.mine import Mining
from dataset_builders.sources import TASK_LAYOUTS, Source, check_task_type, prefer_local, registry
from dataset_builders.sts import Sts
from dataset_builders.teachers import Given, Hybrid, Retriever, Teacher


def _with_unit(size: Any) -> str:
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", str(size)):
        raise ValueError("write a number and its unit, such as 500MB or 2GB")
    return size


# Of a published file's rows in memory; compressed they are less. What breaks off in a download is fetched again, and
# readers work on shards side by side.
ShardSize = Annotated[str, BeforeValidator(_with_unit)]


def _of_different_names(published: tuple[Mining, ...]) -> tuple[Mining, ...]:
    names = [mining.config_name() for mining in published]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is there twice; drop one")
    return published


Published = Annotated[tuple[Mining, ...], AfterValidator(_of_different_names)]


class Graders(Section):
    """How candidates are found, graded and mined, whatever the source."""

    # where local sets and copies of the Hub's are; else $DATA_ROOT, else the current folder
    data_root: str | None = None
    decontamination: Decontamination | None = None  # evaluations whose texts must not be trained on
    bm25: Bm25 = Bm25()  # search by words
    dense: Dense  # search by vectors
    fusion: Fusion = Fusion()  # of both rankings
    # Without a model of its own, the teacher is what both retrievers and the labels know together.
    teacher: Annotated[Teacher | Hybrid | Given | Retriever, Field(discriminator="kind")] = Hybrid(
        kind="hybrid"
    )  # grades the candidates
    mining: Mining = Mining()  # of the training set
    publish: Published = ()  # further training sets, mined from the same grades
    max_shard_size: ShardSize = "500MB"  # of a published file
    ray: Ray = Ray()  # of --engine ray


class GradedRecipe(Graders):
    source: Source  # of the texts
    task_type: Literal[
        "retrieval", "classification", "clustering", "duplicates", "nli"
    ]  # what queries and documents are to each other
    instruction: str  # the task in one sentence
    sts: Sts | None = None  # graded pairs of the source's queries, too


class StsRecipe(Section):
    source: Source  # of the texts
    task_type: Literal["sts"]  # scored pairs
    instruction: str  # the task in one sentence
    data_root: str | None = None
    decontamination: Decontamination | None = None  # evaluations whose texts must not be trained on
    max_shard_size: ShardSize = "500MB"  # of a published file


class CollectionRecipe(Graders):
    """Sets of the registry (see --list_sources), each built into a folder of its name."""

    sources: tuple[str, ...] = Field(min_length=1)  # each is built into a folder of its name
    num_pairs: int | None = None  # of each
    seed: int = 0  # of that choice


def recipe_keys() -> Iterator[str]:
    """Lines of Markdown: every key with its default and meaning."""
    sts = ", ".join(f"`{name}`" for name in StsRecipe.model_fields)
    yield from list_keys(GradedRecipe, f"A recipe; of task type sts {sts} alone")
    own = [name for name in CollectionRecipe.model_fields if name not in Graders.model_fields]
    lines = key_lines(CollectionRecipe)
    yield from ("### Sets of the registry, in place of `source`", "", *(lines[name] for name in own), "")


def load_recipes(path: str, flags: Sequence[str], output: Path) -> dict[Path, GradedRecipe | StsRecipe]:
    """Folder -> recipe of what is built there: one, or one for each set of a collection."""
    values = read_yaml(path)
    if "sources" in values:
        collection = parse_recipe(CollectionRecipe, values, path, flags)
        return {output / name: recipe_of(name, collection, path) for name in collection.sources}
    task_types = {name: StsRecipe if name == "sts" else GradedRecipe for name in TASK_LAYOUTS}
    task_type = values.get("task_type")
    if not isinstance(task_type, str) or task_type not in task_types:
        raise InputError(f"{path}: key 'task_type' is {task_type!r}; it can be {', '.join(task_types)}")
    recipe = parse_recipe(task_types[task_type], values, path, flags)
    return {output: _where_it_lies(recipe)}


def recipe_of(name: str, collection: CollectionRecipe, path: str) -> GradedRecipe | StsRecipe:
    """The recipe of one set of a collection; task type and instruction are the registry's."""
    shared = collection.model_dump(exclude={"sources", "num_pairs", "seed"})
    source = {"kind": "registry", "name": name, "num_pairs": collection.num_pairs, "seed": collection.seed}
    entry = registry().get(name)
    kind = StsRecipe if entry and entry.task_type == "sts" else GradedRecipe
    own = {name: value for name, value in shared.items() if name in kind.model_fields}
    # an unknown name is told by RegistrySource
    facts = {"task_type": entry.task_type, "instruction": entry.instruction} if entry else {}
    return _where_it_lies(parse_recipe(kind, {**own, **facts, "source": source}, f"{path}: {name}"))


def _where_it_lies(recipe: GradedRecipe | StsRecipe) -> GradedRecipe | StsRecipe:
    """The recipe with a copy of its set on this machine in place of the Hub's, if there is one."""
    recipe = recipe.model_copy(update={"source": prefer_local(recipe.source, recipe.data_root)})
    check_task_type(recipe.task_type, recipe.source, recipe.data_root)
    return recipe
