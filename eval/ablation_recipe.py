"""An ablation's recipe: its variants as recipes of train_st.py, and rows mined again for them."""

from __future__ import annotations

import copy
import functools
import itertools
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from common.cli import ArgumentParser, InputError, at
from common.models import resolve_model
from common.recipes import Section, parse_recipe, parse_section, read_yaml
from common.steps import files_of, fingerprint, folder_step
from dataset_builders.embeddings import Dtype
from dataset_builders.mine import Mining
from modeling.recipe import Recipe, nested
from modeling.recipe import parse_recipe as parse_training_recipe

OF_THE_ABLATION = ("seed", "data_seed", "output_dir", "resume_from_checkpoint", "disable_tqdm")  # not a variant's


class Ablation(Section):
    """An ablation's recipe."""

    base: str  # a recipe of train_st.py
    data: str  # folder that dataset_builders.build wrote: its documents are searched
    output_dir: str  # where runs and tables come
    # where ablations with equal runs share them, each trained once; null: below output_dir
    runs_dir: str | None = None
    baseline: str | None = None  # row that the others are compared with; null: the first
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)  # every variant is trained with each
    split: str = "validation"  # whose queries the choice is made on
    report_split: str | None = None  # whose queries the table is about; null: the same
    # mteb's tasks that every run is scored by besides: names, or [local] for all below data_root
    tasks: tuple[str, ...] = ()
    data_root: str | None = None  # folder of local copies of tasks' data, see eval.local_tasks
    # that models are scored in: bfloat16 takes half the time where the processor has it; null: as they were saved
    scoring_dtype: Dtype | None = None
    shared: dict[str, Any] = Field(default_factory=dict)  # overrides of the base for every row
    # name -> overrides: KEY as a flag of train_st.py has it, STAGE.KEY, student.KEY, or mining.KEY for rows mined anew
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    grid: dict[str, list[Any]] = Field(default_factory=dict)  # KEY -> values: every variant with all combinations

    @property
    def splits(self) -> list[str]:
        """Both splits, the one that the table is about last."""
        return list(dict.fromkeys([self.split, self.report_split or self.split]))

    @property
    def compared_with(self) -> str:
        """The name of the row that the others are compared with."""
        return self.baseline if self.baseline is not None else next(iter(combinations(self.variants, self.grid)))


class MinedAnew(Mining):
    """`mining.KEY` of a variant."""

    shuffle_labels: int | None = Field(None, ge=0)  # a control: seed by which each row gets the labels of another


@dataclass(frozen=True)
class Variant:
    """One row of the table: the base with overrides, read and checked."""

    name: str
    overrides: dict[str, Any]
    recipe: Recipe
    mining: dict[str, Any]
    mined: dict[Path, str]  # folders of rows mined again by `mining`, each from the candidates of a published folder
    key: str  # changes when the settings, the training data or the weights to start from do


def read_ablation(argv: Sequence[str], description: str) -> tuple[str, Ablation]:
    parser = ArgumentParser(prog="python -m eval.ablate", description=description)
    parser.add_argument("--config", required=True, metavar="RECIPE")
    parser.add_argument("--seeds", nargs="+", metavar="SEED", help="0 1 2: instead of the recipe's")
    parser.add_argument("--list_keys", action="store_true", help="print every key with default and meaning, and stop")
    args, flags = parser.parse_known_args(argv)
    if args.seeds:  # a list as other commands take one, with commas, or as YAML has it
        flags += ["--seeds", f"[{','.join(args.seeds).strip('[]')}]"]
    ablation = parse_recipe(Ablation, read_yaml(args.config), args.config, flags)
    if len(set(ablation.seeds)) < len(ablation.seeds):
        raise InputError(f"{args.config}: seeds {list(ablation.seeds)}: a seed is there twice")
    return args.config, ablation


def combinations(variants: Mapping[str, dict[str, Any]], grid: Mapping[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Name -> overrides of every variant with every combination of the grid's values.

    >>> combinations({"kl": {"loss": "kl", "alpha": 0.5}}, {"alpha": [0, 1]})
    {'kl, alpha=0': {'loss': 'kl', 'alpha': 0}, 'kl, alpha=1': {'loss': 'kl', 'alpha': 1}}
    >>> combinations({}, {"sts.shots": [2]})
    {'sts.shots=2': {'sts.shots': 2}}
    """
    rows = {}
    for name, overrides in (variants or {"": {}}).items():
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            title = ", ".join([*([name] if name else []), *(f"{key}={value}" for key, value in chosen.items())])
            rows[title] = {**overrides, **chosen}
    return rows


def folder_name(name: str) -> str:
    return re.sub(r"[^\w.,=+-]+", "_", name)


def read_variants(ablation: Ablation) -> list[Variant]:
    """Every row's recipe, checked before anything is trained. Raises InputError on the first that is wrong."""
    combined = combinations(ablation.variants, ablation.grid)
    if list(combined) in ([""], []):
        raise InputError("nothing to compare; name `variants:` or a `grid:`")
    folders = {folder_name(name) for name in combined}
    if len(folders) < len(combined) or not all(re.search(r"\w", name[:1]) and len(name) <= 100 for name in folders):
        raise InputError("variants are also folders: names differ in letters and digits, 100 at most")
    if ablation.baseline is not None and ablation.baseline not in combined:
        raise InputError(f"no variant {ablation.baseline!r} for a baseline; there are {'; '.join(combined)}")
    base, variants = read_yaml(ablation.base), []
    for name, overrides in combined.items():
        # what a variant says of all stages is stronger than what is shared by single ones
        shared = {key: value for key, value in ablation.shared.items() if key.rpartition(".")[2] not in overrides}
        with at(f"variant {name!r}"):
            recipe = override(base, {**shared, **overrides}, ablation.output_dir)
            key, mining, mined = input_key(recipe), read_mining({**shared, **overrides}), {}
            if mining:
                recipe, mined = on_mined_rows(recipe, mining, Path(ablation.output_dir) / "mined")
        variants.append(Variant(name, overrides, recipe, mining, mined, fingerprint([key, mining])))
    return variants


def override(base: Mapping[str, Any], overrides: Mapping[str, Any], output_dir: str) -> Recipe:
    """A recipe of train_st.py with `overrides`: a KEY holds for all stages, as a flag does; STAGE.KEY is stronger."""
    names = [str(stage.get("name")) for stage in base.get("stages") or () if isinstance(stage, dict)]
    for owner, _, name in (key.rpartition(".") for key in overrides):
        if name in OF_THE_ABLATION and owner not in ("student", "mining"):
            raise InputError(f"{name} is not a variant's to set; seeds: and output_dir say it for all of them")
        if owner and owner not in (*names, "student", "mining"):
            raise InputError(f"{owner}.{name}: no stage {owner!r}; there are {', '.join(names)}")
    flags = nested((key, value) for key, value in overrides.items() if not key.startswith("mining."))
    values, selected = dict(base), flags.pop("stages", names)
    selected = selected if isinstance(selected, str) else ",".join(map(str, selected))
    for left_out in set(names) - set(selected.split(",")):  # by a grid of `stages`
        flags.pop(left_out, None)
    for start, other in (("student", "model_name_or_path"), ("model_name_or_path", "student")):
        if start in flags:
            values.pop(other, None)
    return parse_training_recipe(values, selected, {"output_dir": output_dir, **flags})


def input_key(recipe: Recipe) -> str:
    """A hash of all that decides a run of `recipe`. Raises InputError when its data or models are missing."""
    settings = [{key: value for key, value in stage.values.items() if key != "output_dir"} for stage in recipe.stages]
    data = {
        own.dataset_name: data_content(own.dataset_name, own.dataset_revision)
        for stage in recipe.stages
        for own in stage.datasets.values()
    }
    student = recipe.student
    if student:
        if not Path(student.corpus).is_dir():
            raise InputError(f"student.corpus {student.corpus}: no such folder; build the data first")
        start = [student.model_dump(), model_content(student.teacher), corpus_content(student.corpus)]
    else:
        start = [model_content(recipe.values["model_name_or_path"]), recipe.values.get("model_revision")]
    own = {stage.name for stage in recipe.stages}
    others = [model_content(name) for name in recipe.merge.stages if name not in own] if recipe.merge else []
    return fingerprint([settings, recipe.values.get("merge"), data, start, *others])


@functools.cache  # variants read the same, which may be gigabytes
def data_content(name: str, revision: str | None) -> str:
    from modeling.training_data import Source

    return Source(name, revision).key


@functools.cache
def model_content(reference: str) -> str:
    return resolve_model(reference).fingerprint()


@functools.cache
def corpus_content(folder: str) -> str:
    return fingerprint(files_of(Path(folder)))


# --- rows mined again -----------------------------------------------------------------------------------------------


def read_mining(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The keys `mining.KEY`, checked and without their prefix."""
    given = {key.partition(".")[2]: value for key, value in overrides.items() if key.startswith("mining.")}
    with at("mining"):
        parse_section(MinedAnew, given)
    return given


def on_mined_rows(recipe: Recipe, mining: dict[str, Any], output: Path) -> tuple[Recipe, dict[Path, str]]:
    """`recipe` with a folder below `output` for each data set of mined rows, and these folders' published sources."""
    values, mined = copy.deepcopy(recipe.values), {}
    for holder, stage in zip(values["stages"], recipe.stages, strict=True):
        entries = {entry["name"]: entry for entry in holder.get("datasets") or []} or {stage.name: holder}
        for name, own in stage.datasets.items():
            if own.dataset_config == "train":
                source = own.dataset_name
                if not Path(source).is_dir():
                    raise InputError(f"mining.*: {source!r} is no folder here; download the data first")
                folder = output / fingerprint([data_content(source, None), mining])
                entries[name]["dataset_name"], mined[folder] = str(folder), source
    if not mined:
        raise InputError("mining.*: no stage trains on mined rows (dataset_config: train)")
    return parse_training_recipe(values), mined


def write_mined_rows(folder: Path, source: str, mining: dict[str, Any]) -> None:
    import datasets

    from dataset_builders.builders import GradedDataset

    settings = {key: value for key, value in mining.items() if key != "shuffle_labels"}
    with folder_step(folder, {"source": data_content(source, None), "mining": mining}) as step:
        if step.done:
            return
        print(f"mining {source} anew: {mining}", flush=True)
        datasets.disable_progress_bars()
        cache = step.path / "cache"
        made = {}
        sets = [("train", "train", settings)]
        if settings:
            sets.append(("positives", f"positives-{settings.get('relabel', 'none')}", {}))
        elif (Path(source) / "positives").is_dir():  # rows as the build mined them
            sets.append(("positives", "positives", {}))
        for name, config, keys in sets:
            builder = GradedDataset(config_name=config, data_dir=source, cache_dir=str(cache), **keys)
            builder.download_and_prepare(str(step.path / name), file_format="parquet")
            made[name] = builder.info.splits["train"].num_examples
        if made.get("positives") == 0:  # no query has several
            shutil.rmtree(step.path / "positives")
            del made["positives"]
        shutil.rmtree(cache)
        if mining.get("shuffle_labels") is not None:
            shuffle_labels(step.path / "train", mining["shuffle_labels"])
        configs = [{"config_name": name, "data_files": f"{name}/*.parquet"} for name in made]
        (step.path / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n", encoding="utf-8")
        step.finish(rows=made["train"])


def check_rows(variants: Sequence[Variant]) -> None:
    """Raises InputError for columns or negatives that a variant's loss needs and its rows do not have."""
    from modeling.training_data import Source, training_rows

    for variant in variants:
        for stage in variant.recipe.stages:
            for name, own in stage.datasets.items():
                with at(f"variant {variant.name!r}"), at(stage.place(name)), at(f"config {own.dataset_config!r}"):
                    rows = Source(own.dataset_name, own.dataset_revision).read(own.dataset_config)
                    prompted = own.prompted_columns if own.instruction else []
                    # one row has all columns; a run checks the others
                    training_rows(rows.select(range(min(1, len(rows)))), own.loss, prompted, own.num_negatives)


def shuffle_labels(folder: Path, seed: int) -> None:
    """Give every row of the Parquet files in `folder` the labels of another row that has as many.

    A control: what is left of the labels is how high they are on average, place by place, and nothing about the row.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    paths = sorted(folder.glob("*.parquet"))
    table = pa.concat_tables(map(pq.read_table, paths))
    place, counts = table.schema.get_field_index("label"), pc.list_value_length(table["label"]).to_numpy()
    given, random = np.empty(len(table), np.int64), np.random.default_rng(seed)
    for count in np.unique(counts):
        rows = np.flatnonzero(counts == count)
        given[rows] = random.permutation(rows)
    table = table.set_column(place, table.schema.field(place), table["label"].take(pa.array(given)))
    for path in paths[1:]:
        path.unlink()
    pq.write_table(table, paths[0])
