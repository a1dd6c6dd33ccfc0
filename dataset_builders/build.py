"""Raw text -> graded training data, step by step; finished steps are skipped, a killed one is resumed.

    python -m dataset_builders.build --config recipes/data/scifact.yaml --output_dir runs/scifact/data
    python -m dataset_builders.build --inspect faq.csv --output faq.yaml    # what it would read, and a recipe
    python -m dataset_builders.build --list_sources
    python -m dataset_builders.build --list_keys

Any key of the recipe can be given as a flag: --num_pairs 5000 --margin 0.9 --dense.batch_tokens 8192
"""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.cli import ArgumentParser, InputError, output_folder, run
from common.steps import BUILD_FOLDERS, GENERATED, MANIFEST, folder_step, read_manifest
from common.tables import in_words
from dataset_builders.audit import write_audit
from dataset_builders.build_record import Build
from dataset_builders.candidates import write_candidates
from dataset_builders.check_teacher import check_teacher, refuse_unchecked
from dataset_builders.corpus import write_corpus
from dataset_builders.data_recipe import GradedRecipe, StsRecipe, load_recipes, recipe_keys
from dataset_builders.decontamination import describe_decontamination
from dataset_builders.engines import LOCAL, Engine, RayEngine
from dataset_builders.generate import write_generated
from dataset_builders.inspect_source import inspect
from dataset_builders.mine import Tally, mine, read_graded, write_mined
from dataset_builders.readers import Rows, part_texts
from dataset_builders.round_trip import read_generated
from dataset_builders.scores import scan_given, write_scores
from dataset_builders.sources import describe_source, open_tables, read_rows, sources_table
from dataset_builders.sts import write_pairs, write_sts

STEPS = (GENERATED, "corpus", "candidates", "scores", "mined", "hub")
# audit/ and sts/ are made after mined/, and anew whenever that is
# Keys that make no difference to the rows: where files lie, and who does the work.
NOT_INPUTS = {"data_root", "ray"}


class PlannedStep(NamedTuple):
    name: str
    reads: tuple[str, ...]  # steps whose files it reads
    keys: Mapping[str, Any]  # what else decides its files
    write: Callable[[Build, Path], dict[str, Any]]  # fills a folder; returns counts for the manifest
    cites: tuple[str, ...] = ()  # steps whose manifests it reads: equal files may have come from other texts and keys


def main(argv: Sequence[str]) -> None:
    if "--list_sources" in argv:
        print(sources_table())
        return
    if any(flag.partition("=")[0] == "--inspect" for flag in argv):
        inspect(argv)
        return
    if "--list_keys" in argv:
        print("\n".join(recipe_keys()))
        return
    options, flags = parse_arguments(argv)
    if re.search(r"[*?]|\[.*\]", os.path.realpath(options.output_dir)):
        raise InputError(f"--output_dir {options.output_dir}: `datasets` takes *, ? and [] for patterns; name another")
    recipes = load_recipes(options.config, flags, options.output_dir)
    for folder, recipe in recipes.items() if options.check_teacher is not None else ():
        refuse_unchecked(recipe, folder, options.check_teacher)
    for folder, recipe in recipes.items():
        # absolute: workers on other machines have another current folder
        build = Build(Path(os.path.realpath(folder)), recipe, engine_of(options.engine, recipe))
        plan = plan_sts(recipe) if isinstance(recipe, StsRecipe) else plan_graded(recipe)
        restart_from(options.from_step, build.folder)
        for step in plan:
            if step.name == "scores" and options.check_teacher is not None:
                check_teacher(build, options.check_teacher)
                break
            make_step(build, step)


def parse_arguments(argv: Sequence[str]) -> tuple[Any, list[str]]:
    parser = ArgumentParser(prog="python -m dataset_builders.build", description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML recipe; see recipes/data/")
    parser.add_argument("--output_dir", required=True, type=output_folder, help="one folder for each step comes here")
    parser.add_argument("--from_step", choices=STEPS, help="make this step and those after it again")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: on the cluster of key ray")
    parser.add_argument(
        "--check_teacher", type=int, metavar="PAIRS", help="compare the teacher with its reference scorer, and stop"
    )
    parser.add_argument("--inspect", metavar="PATH", help="print what own files hold, and a recipe for them, and stop")
    parser.add_argument("--list_sources", action="store_true", help="print the sets that source.name can be, and stop")
    parser.add_argument("--list_keys", action="store_true", help="print every key with default and meaning, and stop")
    return parser.parse_known_args(argv)


def engine_of(name: str, recipe: GradedRecipe | StsRecipe) -> Engine:
    if name == "local" or isinstance(recipe, StsRecipe):
        return LOCAL
    engine = RayEngine(recipe.ray)
    engine.connect()  # before anything is made
    return engine


def restart_from(step: str | None, output: Path) -> None:
    """Forget the finished folders of `step` and of those after it."""
    names = (GENERATED, *BUILD_FOLDERS)
    for name in names[names.index(step) :] if step else ():
        if (output / name / MANIFEST).is_file():
            shutil.rmtree(output / name)


def plan_graded(recipe: GradedRecipe) -> list[PlannedStep]:
    """The steps of a graded recipe, in order.

    Raises InputError for a model, a folder or a set that is not there: before anything is made.
    """
    keys = recipe.model_dump(mode="json", exclude=NOT_INPUTS)
    dense, teacher = recipe.dense.describe(), recipe.teacher.describe()
    splits = {"split": recipe.source.split, "eval_splits": recipe.source.eval_splits}
    raw = raw_keys(recipe)
    search = {"bm25": keys["bm25"], "dense": dense, "fusion": keys["fusion"], "language": recipe.source.language}
    graded, mining = {**splits, "teacher": teacher}, {"mining": keys["mining"]}
    if recipe.teacher.kind == "hybrid":  # a retriever's depth and vectors are among what it reads
        graded |= search
    audited = {**splits, **mining, "dense": dense}
    plan = [
        PlannedStep("candidates", ("corpus",), {**splits, **search}, write_candidates),
        PlannedStep("scores", ("corpus", "candidates"), graded, write_scores),
        PlannedStep("mined", ("corpus", "scores"), mining, _mined),
        PlannedStep("audit", ("corpus", "scores", "mined"), audited, write_audit, cites=("candidates", "scores")),
    ]
    if recipe.sts:
        sts = {**splits, "sts": keys["sts"], "dense": dense, "teacher": teacher}
        plan.append(PlannedStep("sts", ("corpus", "scores"), sts, write_sts))
    queries = getattr(recipe.source, "queries", None)
    if queries:
        writing = {"source": raw["source"], "language": recipe.source.language, "instruction": recipe.instruction}
        raw |= {"keep_within": queries.keep_within, "search": search}
        plan.insert(0, PlannedStep(GENERATED, (), {**writing, "queries": queries.describe()}, _generated))
        plan.insert(1, PlannedStep("corpus", (GENERATED,), raw, _corpus_of_generated))
    else:
        plan.insert(0, PlannedStep("corpus", (), raw, _corpus))
    return [*plan, plan_hub(recipe, [step.name for step in plan])]


def plan_sts(recipe: StsRecipe) -> list[PlannedStep]:
    write = PlannedStep("sts", (), raw_keys(recipe), lambda build, folder: write_pairs(build.recipe, folder))
    return [write, plan_hub(recipe, ["sts"])]


def plan_hub(recipe: GradedRecipe | StsRecipe, steps: Sequence[str]) -> PlannedStep:
    keys = recipe.model_dump(mode="json", exclude=NOT_INPUTS)

    def write(build: Build, folder: Path) -> dict[str, Any]:
        from dataset_builders import builders  # `datasets` takes seconds to import

        manifests = {name: read_manifest(build.folder / name) for name in steps}
        facts = {"mined": None, "sts": None, **keys, **manifests}
        published = getattr(recipe, "publish", ())
        return builders.write_hub(build.folder, steps, facts, folder, recipe.max_shard_size, published)

    return PlannedStep("hub", tuple(steps), {"recipe": keys}, write, cites=tuple(steps))


def raw_keys(recipe: GradedRecipe | StsRecipe) -> dict[str, Any]:
    """What decides the texts that are read."""
    return {
        "source": describe_source(recipe.source, recipe.data_root),
        "decontamination": describe_decontamination(recipe.decontamination, recipe.data_root),
    }


def _generated(build: Build, folder: Path) -> dict[str, Any]:
    tables = open_tables(build.recipe.source, build.recipe.data_root)
    return write_generated(build, part_texts(tables, tables.train, "document_id"), folder)


def _corpus_of_generated(build: Build, folder: Path) -> dict[str, Any]:
    rows, counts = read_generated(build, folder)
    return _corpus(build, folder, rows) | counts


def _corpus(build: Build, folder: Path, rows: Rows | None = None) -> dict[str, Any]:
    recipe = build.recipe
    rows = rows or read_rows(recipe.source, recipe.data_root)
    counts = write_corpus(rows, recipe.source, folder, recipe.decontamination, recipe.data_root)
    if recipe.teacher.kind == "given":
        scan_given(folder)  # before hours of search
    return counts


def _mined(build: Build, folder: Path) -> dict[str, Any]:
    """Refuses further training sets that would have no rows before the first one is mined."""
    for mining in build.recipe.publish:
        try:
            next(mine(read_graded(build.corpus, build.scores), mining, Tally()))
        except InputError as error:
            raise InputError(f"publish: {mining.config_name()}: {error}") from None
    return write_mined(build, folder)


def make_step(build: Build, step: PlannedStep) -> None:
    """Make a step unless it was made before from the same files and keys; print its counts."""
    inputs = {**step.keys, "steps": {name: read_manifest(build.folder / name)["files"] for name in step.reads}}
    if step.cites:
        inputs["cites"] = {name: read_manifest(build.folder / name)["key"] for name in step.cites}
    with folder_step(build.folder / step.name, inputs) as made:
        state = "done before" if made.done else "done"
        if not made.done:
            counts = step.write(build, made.path)
            made.finish(counts=list(counts), **counts)
    manifest = read_manifest(build.folder / step.name)
    counts = {name: manifest[name] for name in manifest["counts"]}
    line = f"{step.name}: {state} in {manifest['seconds']:.0f} s: {in_words(counts)}"
    print(textwrap.fill(line, 119, subsequent_indent="  "), flush=True)


if __name__ == "__main__":
    run(main)
