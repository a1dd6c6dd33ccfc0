"""Raw text -> graded training data, step by step; finished steps are skipped, a killed one is resumed.

    python -m dataset_builders.build --config recipes/data/scifact.yaml --output_dir runs/scifact/data

Any key of the recipe can be given as a flag: --num_pairs 5000 --margin 0.9 --dense.batch_tokens 8192
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dataset_builders.candidates import Bm25, Dense, Fusion, write_candidates
from dataset_builders.cli import ArgumentParser, InputError, run
from dataset_builders.corpus import write_corpus
from dataset_builders.folders import MANIFEST, folder_step, read_manifest, write_parquet
from dataset_builders.mine import Mining, Sts, count_by_bin, write_mined, write_sts
from dataset_builders.recipes import Section, parse_recipe, read_yaml
from dataset_builders.scores import Calibration, Teacher, write_scores
from dataset_builders.sources import Source, StsSource, describe_source, read_rows, read_sts

STEPS = ("corpus", "candidates", "scores", "mined", "hub")
# sts/ is made after mined/, and anew whenever that is
FOLDERS = ("corpus", "candidates", "scores", "mined", "sts", "hub")


class RetrievalRecipe(Section):
    source: Source
    task_type: Literal["retrieval"]
    instruction: str
    data_root: str | None = None  # where local sets are; else $DATA_ROOT, else the current folder
    bm25: Bm25 = Bm25()
    dense: Dense
    fusion: Fusion = Fusion()
    teacher: Teacher
    mining: Mining = Mining()
    sts: Sts | None = None


class StsRecipe(Section):
    source: StsSource
    task_type: Literal["sts"]
    instruction: str
    data_root: str | None = None


def main(argv: Sequence[str]) -> None:
    options, flags = parse_arguments(argv)
    recipe = load_recipe(options.config, flags)
    build = build_retrieval if isinstance(recipe, RetrievalRecipe) else build_sts
    build(recipe, options.output_dir, options.from_step)


def parse_arguments(argv: Sequence[str]) -> tuple[Any, list[str]]:
    parser = ArgumentParser(prog="python -m dataset_builders.build", description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML recipe; see recipes/data/")
    parser.add_argument("--output_dir", required=True, type=Path, help="one folder for each step comes here")
    parser.add_argument("--from_step", choices=STEPS, help="make this step and those after it again")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    options, flags = parser.parse_known_args(argv)
    if options.engine == "ray":
        raise InputError("--engine ray is not there yet; use --engine local")
    return options, flags


def load_recipe(path: str, flags: Sequence[str]) -> RetrievalRecipe | StsRecipe:
    values = read_yaml(path)
    kinds = {"retrieval": RetrievalRecipe, "sts": StsRecipe}
    task_type = values.get("task_type")
    if task_type not in kinds:
        raise InputError(f"{path}: key 'task_type' is {task_type!r}; it can be {' or '.join(kinds)}")
    return parse_recipe(kinds[task_type], values, path, flags)


def restart_from(step: str | None, output: Path) -> None:
    """Forget the finished folders of `step` and of those after it."""
    for name in FOLDERS[FOLDERS.index(step) :] if step else ():
        if (output / name / MANIFEST).is_file():
            shutil.rmtree(output / name)


def build_retrieval(recipe: RetrievalRecipe, output: Path, from_step: str | None) -> None:
    # resolved before anything is made: a misspelt model or folder should not cost an hour
    dense, teacher = recipe.dense.describe(), recipe.teacher.describe()
    source = describe_source(recipe.source, recipe.data_root)
    restart_from(from_step, output)
    splits = {"split": recipe.source.split, "eval_splits": recipe.source.eval_splits}
    keys = recipe.model_dump(mode="json", exclude={"data_root"})
    folders = {name: output / name for name in FOLDERS}
    cache = output / "embeddings"
    made: dict[str, Any] = {"sts": None}

    def make(name: str, inputs: Mapping[str, Any], write: Callable[[Path], dict[str, Any]]) -> None:
        """Steps are keyed by the files of the steps that they read, and by their own keys of the recipe."""
        read = {step: made[step]["files"] for step in inputs.get("steps", ())}
        made[name] = make_step(folders[name], {**inputs, "steps": read}, write)

    make(
        "corpus",
        {"source": source},
        lambda folder: write_corpus(read_rows(recipe.source, recipe.data_root), recipe.source, folder),
    )
    make(
        "candidates",
        {"steps": ["corpus"], **splits, "bm25": keys["bm25"], "dense": dense, "fusion": keys["fusion"]},
        lambda folder: write_candidates(
            folders["corpus"], recipe.source, recipe.bm25, recipe.dense, recipe.fusion, cache, folder
        ),
    )
    make(
        "scores",
        {"steps": ["corpus", "candidates"], **splits, "teacher": teacher},
        lambda folder: write_scores(
            folders["corpus"], folders["candidates"], recipe.source, recipe.teacher, cache, folder
        ),
    )
    make(
        "mined",
        {"steps": ["corpus", "scores"], "mining": keys["mining"]},
        lambda folder: write_mined(folders["corpus"], folders["scores"], recipe.mining, folder),
    )
    if recipe.sts:
        constants = made["scores"]["calibration"]
        calibration = Calibration(constants["a"], constants["b"])
        make(
            "sts",
            {
                "steps": ["corpus"],
                **splits,
                "sts": keys["sts"],
                "dense": dense,
                "teacher": teacher,
                "calibration": constants,
            },
            lambda folder: write_sts(
                folders["corpus"], recipe.source, recipe.dense, recipe.teacher, calibration, recipe.sts, cache, folder
            ),
        )
    steps = [name for name in made if made[name]]
    make("hub", {"steps": steps, "recipe": keys}, lambda folder: publish(output, steps, {**keys, **made}, folder))


def build_sts(recipe: StsRecipe, output: Path, from_step: str | None) -> None:
    source = describe_source(recipe.source, recipe.data_root)
    restart_from(from_step, output)

    def write(folder: Path) -> dict[str, Any]:
        table = read_sts(recipe.source, recipe.data_root)
        write_parquet(folder / "sts.parquet", table)
        return {"rows": len(table), "rows_by_label_bin": count_by_bin(table["label"].to_numpy())}

    made = make_step(output / "sts", {"source": source}, write)
    keys = recipe.model_dump(mode="json", exclude={"data_root"})
    facts = {**keys, "sts": made, "mined": None}
    make_step(
        output / "hub",
        {"files": made["files"], "recipe": keys},
        lambda folder: publish(output, ["sts"], facts, folder),
    )


def publish(output: Path, steps: Sequence[str], facts: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    from dataset_builders.builders import write_hub  # `datasets` takes seconds to import

    return write_hub(output, steps, facts, folder)


def make_step(folder: Path, inputs: Mapping[str, Any], write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Let `write` fill `folder` unless that was done before; print its counts; returns its manifest."""
    with folder_step(folder, inputs) as step:
        state = "done before" if step.done else "done"
        if not step.done:
            counts = write(step.path)
            step.finish(counts=list(counts), **counts)
    manifest = read_manifest(folder)
    counts = ", ".join(in_words(name, manifest[name]) for name in manifest["counts"])
    line = f"{folder.name}: {state} in {manifest['seconds']:.0f} s: {counts}"
    print(textwrap.fill(line, 119, subsequent_indent="  "), flush=True)
    return manifest


def in_words(name: str, value: Any) -> str:
    """
    >>> in_words("rows_dropped", {"few": 3, "none": 1200})
    'rows dropped (few 3, none 1,200)'
    """
    name = name.replace("_", " ")
    if isinstance(value, Mapping):
        return f"{name} ({', '.join(in_words(key, inner) for key, inner in value.items())})"
    if isinstance(value, list):
        return f"{name} {' '.join(map(str, value))}"
    return f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"


if __name__ == "__main__":
    run(main)
