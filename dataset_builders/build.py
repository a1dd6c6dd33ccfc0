"""Raw text -> graded training data, step by step; finished steps are skipped, a killed one is resumed.

    python -m dataset_builders.build --config recipes/data/scifact.yaml --output_dir runs/scifact/data
    python -m dataset_builders.build --list_sources

Any key of the recipe can be given as a flag: --num_pairs 5000 --margin 0.9 --dense.batch_tokens 8192
"""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from common.cli import ArgumentParser, InputError, output_folder, run
from common.recipes import Section, parse_recipe, read_yaml
from common.steps import MANIFEST, folder_step, read_manifest, write_parquet
from dataset_builders.audit import write_audit
from dataset_builders.candidates import Bm25, Dense, Fusion, write_candidates
from dataset_builders.check_teacher import check_teacher
from dataset_builders.corpus import write_corpus
from dataset_builders.decontamination import Decontamination, clean_pairs, describe_decontamination, read_probes
from dataset_builders.engines import LOCAL, Engine, Ray, RayEngine
from dataset_builders.mine import Mining, Sts, Tally, count_by_bin, mine, read_graded, write_mined, write_sts
from dataset_builders.schema import check_rows
from dataset_builders.scores import Calibration, Teacher, write_scores
from dataset_builders.sources import (
    Source,
    StsSource,
    check_task_type,
    describe_source,
    read_rows,
    read_sts,
    registry,
    sources_table,
)

STEPS = ("corpus", "candidates", "scores", "mined", "hub")
# audit/ and sts/ are made after mined/, and anew whenever that is
FOLDERS = ("corpus", "candidates", "scores", "mined", "audit", "sts", "hub")
# Where things lie, and who does the work, make no difference to the rows.
WHERE = {"data_root", "ray"}


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

    data_root: str | None = None  # where local sets are; else $DATA_ROOT, else the current folder
    decontamination: Decontamination | None = None
    bm25: Bm25 = Bm25()
    dense: Dense
    fusion: Fusion = Fusion()
    teacher: Teacher
    mining: Mining = Mining()
    publish: Published = ()  # further training sets, mined from the same grades
    max_shard_size: ShardSize = "500MB"
    ray: Ray = Ray()  # of --engine ray


class GradedRecipe(Graders):
    source: Source
    task_type: Literal["retrieval", "classification", "clustering", "duplicates", "nli"]
    instruction: str
    sts: Sts | None = None


class StsRecipe(Section):
    source: StsSource
    task_type: Literal["sts"]
    instruction: str
    data_root: str | None = None
    decontamination: Decontamination | None = None
    max_shard_size: ShardSize = "500MB"


class CollectionRecipe(Graders):
    """Sets of the registry (see --list_sources), each built into a folder of its name."""

    sources: tuple[str, ...] = Field(min_length=1)
    num_pairs: int | None = None  # of each
    seed: int = 0


def main(argv: Sequence[str]) -> None:
    if "--list_sources" in argv:
        print(sources_table())
        return
    options, flags = parse_arguments(argv)
    recipes = load_recipes(options.config, flags, options.output_dir)
    for folder, recipe in recipes.items() if options.check_teacher is not None else ():
        if isinstance(recipe, StsRecipe):
            raise InputError(f"--check_teacher: {folder} would be sts, which has no teacher; drop it")
    for folder, recipe in recipes.items():
        if isinstance(recipe, StsRecipe):
            build_sts(recipe, folder, options.from_step)
        else:
            engine = engine_of(options.engine, recipe.ray)
            build_graded(recipe, folder, engine, options.from_step, options.check_teacher)


def parse_arguments(argv: Sequence[str]) -> tuple[Any, list[str]]:
    parser = ArgumentParser(prog="python -m dataset_builders.build", description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML recipe; see recipes/data/")
    parser.add_argument("--output_dir", required=True, type=output_folder, help="one folder for each step comes here")
    parser.add_argument("--from_step", choices=STEPS, help="make this step and those after it again")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: on the cluster of key ray")
    parser.add_argument(
        "--check_teacher", type=int, metavar="PAIRS", help="compare the teacher with its reference scorer, and stop"
    )
    parser.add_argument("--list_sources", action="store_true", help="print the sets that source.name can be, and stop")
    options, flags = parser.parse_known_args(argv)
    if options.check_teacher is not None and options.check_teacher < 2:
        raise InputError(f"--check_teacher {options.check_teacher}: use 2 or more, to compare their spread")
    return options, flags


def load_recipes(path: str, flags: Sequence[str], output: Path) -> dict[Path, GradedRecipe | StsRecipe]:
    """Folder -> recipe of what is built there: one, or one for each set of a collection."""
    values = read_yaml(path)
    if "sources" in values:
        collection = parse_recipe(CollectionRecipe, values, path, flags)
        return {output / name: recipe_of(name, collection, path) for name in collection.sources}
    task_types = {
        "sts": StsRecipe,
        **dict.fromkeys(GradedRecipe.model_fields["task_type"].annotation.__args__, GradedRecipe),
    }
    task_type = values.get("task_type")
    if not isinstance(task_type, str) or task_type not in task_types:
        raise InputError(f"{path}: key 'task_type' is {task_type!r}; it can be {', '.join(task_types)}")
    recipe = parse_recipe(task_types[task_type], values, path, flags)
    check_task_type(recipe.task_type, recipe.source, recipe.data_root)
    return {output: recipe}


def recipe_of(name: str, collection: CollectionRecipe, path: str) -> GradedRecipe | StsRecipe:
    """The recipe of one set of a collection; task type and instruction are the registry's."""
    shared = collection.model_dump(exclude={"sources", "num_pairs", "seed"})
    source = {"kind": "registry", "name": name, "num_pairs": collection.num_pairs, "seed": collection.seed}
    entry = registry().get(name)
    kind = StsRecipe if entry and entry.task_type == "sts" else GradedRecipe
    own = {name: value for name, value in shared.items() if name in kind.model_fields}
    # an unknown name is told by RegistrySource
    facts = {"task_type": entry.task_type, "instruction": entry.instruction} if entry else {}
    return parse_recipe(kind, {**own, **facts, "source": source}, f"{path}: {name}")


def engine_of(name: str, ray: Ray) -> Engine:
    if name == "local":
        return LOCAL
    engine = RayEngine(ray)
    engine.connect()  # before anything is made
    return engine


def restart_from(step: str | None, output: Path) -> None:
    """Forget the finished folders of `step` and of those after it."""
    for name in FOLDERS[FOLDERS.index(step) :] if step else ():
        if (output / name / MANIFEST).is_file():
            shutil.rmtree(output / name)


def build_graded(
    recipe: GradedRecipe, output: Path, engine: Engine, from_step: str | None, check_pairs: int | None
) -> None:
    # resolved before anything is made: a misspelt model or folder should not cost an hour
    dense, teacher = recipe.dense.describe(), recipe.teacher.describe()
    source = describe_source(recipe.source, recipe.data_root)
    cleaned = describe_decontamination(recipe.decontamination, recipe.data_root)
    output = Path(os.path.realpath(output))  # other machines have another current folder
    restart_from(from_step, output)
    splits = {"split": recipe.source.split, "eval_splits": recipe.source.eval_splits}
    keys = recipe.model_dump(mode="json", exclude=WHERE)
    corpus, candidates, scores, mined = (output / name for name in ("corpus", "candidates", "scores", "mined"))
    cache = output / "embeddings"
    symmetric = recipe.task_type != "retrieval"
    made: dict[str, Any] = {"sts": None}

    def make(name: str, inputs: Mapping[str, Any], write: Callable[[Path], dict[str, Any]]) -> None:
        """Steps are keyed by the files of the steps that they read, and by their own keys of the recipe."""
        read = {step: made[step]["files"] for step in inputs.get("steps", ())}
        made[name] = make_step(output / name, {**inputs, "steps": read}, write)

    make(
        "corpus",
        {"source": source, "decontamination": cleaned},
        lambda folder: write_corpus(
            read_rows(recipe.source, recipe.data_root), recipe.source, folder, recipe.decontamination, recipe.data_root
        ),
    )
    make(
        "candidates",
        {
            "steps": ["corpus"],
            **splits,
            "symmetric": symmetric,
            "bm25": keys["bm25"],
            "dense": dense,
            "fusion": keys["fusion"],
        },
        lambda folder: write_candidates(
            corpus, recipe.source, symmetric, recipe.bm25, recipe.dense, recipe.fusion, cache, engine, folder
        ),
    )
    if check_pairs is not None:
        check_teacher(corpus, candidates, recipe.source, recipe.teacher, cache, engine, check_pairs)
        return
    make(
        "scores",
        {"steps": ["corpus", "candidates"], **splits, "teacher": teacher},
        lambda folder: write_scores(corpus, candidates, recipe.source, recipe.teacher, cache, engine, folder),
    )
    check_published(recipe.publish, corpus, scores)
    make(
        "mined",
        {"steps": ["corpus", "scores"], "mining": keys["mining"]},
        lambda folder: write_mined(corpus, scores, recipe.mining, folder),
    )
    constants = made["scores"]["calibration"]
    make(
        "audit",
        {"steps": ["corpus", "scores", "mined"], **splits, "mining": keys["mining"], "dense": dense},
        lambda folder: write_audit(
            corpus, scores, mined, recipe.source, recipe.mining, constants, recipe.dense, cache, engine, folder
        ),
    )
    if recipe.sts:
        calibration = Calibration(constants["a"], constants["b"])
        make(
            "sts",
            {
                "steps": ["corpus"],
                **splits,
                "sts": keys["sts"],
                "dense": dense,
                "teacher": teacher,
                "calibration": [calibration.a, calibration.b],
            },
            lambda folder: write_sts(
                corpus, recipe.source, recipe.dense, recipe.teacher, calibration, recipe.sts, cache, engine, folder
            ),
        )
    steps = [name for name in made if made[name]]
    make(
        "hub",
        {"steps": steps, "recipe": keys},
        lambda folder: write_hub(output, steps, {**keys, **made}, folder, recipe.max_shard_size, recipe.publish),
    )


def check_published(published: Sequence[Mining], corpus: Path, scores: Path) -> None:
    """Refuse further training sets that would have no rows before the first one is mined."""
    for mining in published:
        try:
            next(mine(read_graded(corpus, scores), mining, Tally()))
        except InputError as error:
            raise InputError(f"publish: {mining.config_name()}: {error}") from None


def build_sts(recipe: StsRecipe, output: Path, from_step: str | None) -> None:
    source = describe_source(recipe.source, recipe.data_root)
    cleaned = describe_decontamination(recipe.decontamination, recipe.data_root)
    restart_from(from_step, output)

    def write(folder: Path) -> dict[str, Any]:
        table = read_sts(recipe.source, recipe.data_root)
        counts = {"pairs_seen": len(table)}
        if recipe.decontamination:
            probes = read_probes(recipe.decontamination, recipe.data_root)
            table, log, counts["contamination"] = clean_pairs(table, probes)
            write_parquet(folder / "contamination.parquet", log)
        check_rows(table, f"{recipe.source.kind} source: after decontamination")
        write_parquet(folder / "sts.parquet", table)
        return {**counts, "rows": len(table), "rows_by_label_bin": count_by_bin(table["label"].to_numpy())}

    made = make_step(output / "sts", {"source": source, "decontamination": cleaned}, write)
    keys = recipe.model_dump(mode="json", exclude=WHERE)
    facts = {**keys, "sts": made, "mined": None}
    make_step(
        output / "hub",
        {"files": made["files"], "recipe": keys},
        lambda folder: write_hub(output, ["sts"], facts, folder, recipe.max_shard_size),
    )


def write_hub(*arguments: Any) -> dict[str, Any]:
    from dataset_builders import builders  # `datasets` takes seconds to import

    return builders.write_hub(*arguments)


def make_step(folder: Path, inputs: Mapping[str, Any], write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Let `write` fill `folder` unless that was done before; print its counts; returns its manifest."""
    with folder_step(folder, inputs) as step:
        state = "done before" if step.done else "done"
        if not step.done:
            counts = write(step.path)
            step.finish(counts=list(counts), **counts)
    manifest = read_manifest(folder)
    counts = {name: manifest[name] for name in manifest["counts"]}
    line = f"{folder.name}: {state} in {manifest['seconds']:.0f} s: {in_words(counts)}"
    print(textwrap.fill(line, 119, subsequent_indent="  "), flush=True)
    return manifest


def in_words(facts: Mapping[str, Any], deep: bool = True) -> str:
    """The numbers among `facts`, and those one level down; the rest is for the manifest and the card.

    >>> in_words({"rows": 1200, "dropped": {"few": 3, "why": ["told", "elsewhere"]}, "share": 0.25, "where": "x"})
    'rows 1,200, dropped (few 3), share 0.25'
    """
    found = []
    for name, value in facts.items():
        name = name.replace("_", " ")
        if isinstance(value, int):
            found.append(f"{name} {value:,}")
        elif isinstance(value, float):
            found.append(f"{name} {value:.4g}")
        elif deep and isinstance(value, Mapping) and (inner := in_words(value, deep=False)):
            found.append(f"{name} ({inner})")
    return ", ".join(found)


if __name__ == "__main__":
    run(main)
