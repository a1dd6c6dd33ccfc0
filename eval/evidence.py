"""Read a run's files: the evidence that its model's card is made of.

    evidence = read_evidence(run_folder)                    # recipe, stages, ledger, scores, data, ablation, pictures

Nothing here loads the model; release.verify does.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import InputError
from common.models import resolve_model
from common.recipes import read_yaml
from common.steps import BUILD_FOLDERS, GENERATED, MANIFEST, files_of, fingerprint, read_json, read_manifest
from dataset_builders.card import BENCHMARK, compared_tasks, public_name, source_licence, source_title, used_models
from dataset_builders.decontamination import zero_shot
from dataset_builders.sources import registry
from eval.figures import KEY
from eval.leaderboard import BESIDE_RESULTS, read_result
from eval.metrics import check_final, read_metrics
from eval.run_files import read_ledger, read_manifests
from modeling import recipe as recipes

if TYPE_CHECKING:
    from mteb.results import TaskResult

_PICTURES = ("systems.png", "training.png")  # of eval.report, drawn from metrics.json
# Files of a model folder that no release holds as they are.
_UNPUBLISHED = {"README.md", MANIFEST}


def read_evidence(
    run_folder: Path, results: Path | None = None, ablations: Path | None = None, commits: Sequence[str] = ()
) -> dict[str, Any]:
    """What a run's folder says about its model.

    Args:
        run_folder: what train_st.py wrote, with eval.report's pictures in report/ if there are any.
        results: folder with eval.retrieval's metrics.json or mteb's results/ (eval.run_mteb's --output_dir), or both;
            run_folder/results is searched, too.
        ablations: eval.ablate's --output_dir.
        commits: on the Hub that are known to have the model's files; mteb's results of them are the model's.

    Raises:
        InputError: no run, a named folder without results, results of another run, pictures of other results.
    """
    path = run_folder / "recipe.yaml"
    if not path.is_file():
        raise InputError(f"{path}: no such file; the card holds the recipe, name its folder with --run")
    resolved, ledger, model = recipes.read_stages(run_folder), read_ledger(run_folder), run_folder / "model"
    stages = [{"name": stage["name"], **stage["keys"], "datasets": stage["datasets"]} for stage in resolved["stages"]]
    stages = [{**stage, "datasets": [{**stage, **own} for own in stage["datasets"].values()]} for stage in stages]
    folders = list(dict.fromkeys([results or run_folder / "results", run_folder / "results"]))
    with_metrics = next((folder for folder in folders if (folder / "metrics.json").is_file()), None)
    metrics = read_metrics(with_metrics) if with_metrics else None
    if metrics and not (metrics["run"] and (with_metrics / metrics["run"]).resolve() == run_folder.resolve()):
        raise InputError(  # of models that were compared any could be the last, whose scores are taken for this one's
            f"{with_metrics / 'metrics.json'}: is not of {run_folder}; "
            f"run python -m eval.retrieval --run {run_folder}, or name another folder of results"
        )
    if metrics:
        check_final(with_metrics, metrics, model)
    if results and with_metrics != results and not read_mteb([results], model, commits):
        raise InputError(
            f"{results}: neither metrics.json nor mteb's results of {model} are there; "
            "evaluate it with eval.retrieval or eval.run_mteb, or name another folder"
        )
    pictures = read_pictures(run_folder / "report", metrics)
    if ablations and (ablations / "ablation.png").is_file():
        pictures["ablation.png"] = ablations / "ablation.png"
    recipe = read_yaml(path)
    names = [own["dataset_name"] for stage in stages for own in stage["datasets"]]
    names = list(dict.fromkeys([*names, *data_of_merged(recipe, [stage["name"] for stage in stages])]))
    last = run_folder / stages[-1]["name"]
    data = {name: provenance(Path(name)) for name in names}
    return {
        "recipe": recipe,
        "stages": stages,
        "quantisation": resolved["start"].get("quantisation"),
        "ledger": ledger,
        "versions": read_manifest(last)["versions"] if (last / MANIFEST).is_file() else {},
        "commit": ledger.get("commit"),
        "metrics": metrics,
        "mteb": read_mteb(folders, model, commits),
        "ablation": read_ablation(ablations) if ablations else None,
        "data": data,
        "changed": changed_since(run_folder, resolved["stages"]),
        "languages": sorted({entry["language"] for entry in data.values() if entry and entry["language"]}),
        "evaluated": provenance(with_metrics / metrics["data"] / "hub") if metrics else None,
        "pictures": pictures,
        "example": next(filter(None, map(read_example, map(Path, names))), None),
    }


# --- scores ---------------------------------------------------------------------------------------------------------


def read_mteb(folders: Sequence[Path], model: Path, commits: Sequence[str] = ()) -> list[TaskResult]:
    """Results that eval.run_mteb wrote of exactly these weights: their revision is the hash of the model's folder, or
    a commit that has its files.
    """
    found = [folder / "results" for folder in folders if (folder / "results").is_dir()]
    if not found or not model.is_dir():
        return []
    revisions = [*commits, fingerprint(files_of(model))]
    paths = {
        path.name: path
        for folder in reversed(found)
        for revision in revisions
        for path in sorted(folder.glob(f"*/{revision}/*.json"))
    }
    return [read_result(path) for name, path in paths.items() if name not in BESIDE_RESULTS]


def other_files(repo_id: str, commit: str, folder: Path) -> set[str]:
    """Names of the files of the model in `folder` that a commit on the Hub lacks, or has with another content."""
    from huggingface_hub import HfApi

    found = HfApi().verify_repo_checksums(repo_id, revision=commit, local_dir=folder)
    return {*(mismatch["path"] for mismatch in found.mismatches), *found.extra_paths} - _UNPUBLISHED


def read_ablation(folder: Path) -> dict[str, Any]:
    """What eval.ablate found."""
    path = folder / "ablation.json"
    ablation = read_json(path)
    if not isinstance(ablation, dict) or not {"rows", "metric", "interval", "counts", "notes"} <= set(ablation):
        raise InputError(f"{path}: not written by eval.ablate; run python -m eval.ablate")
    return ablation


def read_pictures(report: Path, metrics: Mapping[str, Any] | None) -> dict[str, Path]:
    """eval.report's pictures. Raises InputError for those of other results: table and picture would disagree."""
    from PIL import Image

    found = {name: report / name for name in _PICTURES if metrics and (report / name).is_file()}
    for path in found.values():
        with Image.open(path) as image:
            if image.info.get(KEY) != metrics["key"]:
                raise InputError(
                    f"{path}: drawn from other results than those of the card; "
                    f"run python -m eval.report RESULTS --output_dir {report}"
                )
    return found


# --- data -----------------------------------------------------------------------------------------------------------


def hub_id(reference: str | None) -> str | None:
    """ORG/NAME of what lies on the Hub, without revision and file; None for folders, files and packages.

    >>> hub_id("org/name@main"), hub_id("org/name:model.gguf"), hub_id("package:name"), hub_id("/home/me/model")
    ('org/name', 'org/name', None, None)
    """
    try:
        found = resolve_model(reference)
    except InputError:
        return None
    return None if found.gguf == "" or Path(found.source).exists() else found.source


def base_model(recipe: Mapping[str, Any]) -> str | None:
    """The model on the Hub that training started from, if it was one."""
    return None if recipe.get("student") else hub_id(recipe.get("model_name_or_path"))


def data_of_merged(recipe: Mapping[str, Any], stages: Sequence[str]) -> list[str]:
    """What models of other runs, averaged into this one, were trained on; the model itself where no run is beside it,
    as of data of which nothing is known.
    """
    start, names = Path(recipe.get("model_name_or_path") or "."), []
    for name in (recipe.get("merge") or {}).get("stages", ()):
        run = Path(name).parent
        if name in stages or Path(name).resolve() == start.resolve():
            continue
        if (run / recipes.STAGES).is_file():
            read = recipes.read_stages(run)["stages"]
            names += [own["dataset_name"] for stage in read for own in stage["datasets"].values()]
        else:
            names.append(name)
    return names


def provenance(hub: Path) -> dict[str, Any] | None:
    """Where a data set of dataset_builders comes from and how it was made; None where its folder is not at hand.

    A folder on the publisher's machine is named by its last part, models and data of the Hub by their ids.
    """
    if not (hub / MANIFEST).is_file():
        return None
    recipe = read_manifest(hub)["inputs"]["recipe"]
    made = read_manifests(hub.parent)
    source = recipe["source"]
    entry = registry()[source["name"]] if source["kind"] == "registry" else None
    first = made.get("corpus") or made.get("sts") or {}
    commit = first.get("inputs", {}).get("source", {}).get("commit")  # what was read from the Hub has one
    named = {section: recipe[section] for section in ("dense", "teacher") if "model" in recipe.get(section, {})}
    named |= {f"teacher {n}": own for n, own in enumerate(recipe.get("teacher", {}).get("teachers", ()))}
    named |= {"queries": source["queries"]} if source.get("queries") else {}
    models = {section: public_name(own["model"]) for section, own in named.items()}
    # with the commit that was read
    models |= used_models({step: made.get(step) for step in (GENERATED, *BUILD_FOLDERS)})
    return {
        "title": source_title(source) if commit or entry else Path(source_title(source)).name,
        "kind": source["kind"],
        "dataset": (entry.dataset if entry else source.get("dataset")) if commit else None,
        "commit": commit,
        "language": source.get("language"),
        "licence": entry.licence if entry else source_licence(source),
        "split": source["split"],
        "rows": read_manifest(hub)["rows"],
        "recipe": recipe,
        "models": models,
        "mined": "mined" in made,
        "compared": compared_tasks(first) if first else None,  # None: data/hub alone is at hand
        "contamination": first.get("contamination"),
        "training_datasets": source.get("training_datasets"),  # None: not stated
        "benchmark": (recipe.get("decontamination") or {}).get("benchmark") or BENCHMARK,
    }


def changed_since(run_folder: Path, stages: Sequence[Mapping[str, Any]]) -> set[str]:
    """The folders whose files are no longer those that a stage of stages.json was trained on."""
    found = set()
    for stage in stages:
        if (run_folder / stage["name"] / MANIFEST).is_file():
            trained = read_manifest(run_folder / stage["name"])["inputs"]["data"]
            folders = {name: own["dataset_name"] for name, own in stage["datasets"].items()}
            there = {name: folder for name, folder in folders.items() if Path(folder).is_dir()}
            found |= {name for key, name in there.items() if fingerprint(files_of(Path(name))) != trained.get(key)}
    return found


def disclosure(data: Mapping[str, Mapping[str, Any] | None], base: str | None = None) -> dict[str, Any] | None:
    """`training_datasets` and mteb's zero-shot share, for all data sets together; None where one does not state its
    own. The share counts what mteb knows of the training of `base`, too.
    """
    stated = [entry["training_datasets"] if entry else None for entry in data.values()]
    if not stated or None in stated:
        return None
    benchmark = next(entry["benchmark"] for entry in data.values())
    return zero_shot([name for names in stated for name in names], benchmark, base)


def read_example(hub: Path) -> dict[str, Any] | None:
    """A query and two documents out of the training data, shortened; None where those have none at hand."""
    import pyarrow.parquet as pq

    for path in sorted((hub / "train").glob("*.parquet"))[:1]:
        columns = [name for name in ("query", "positive", "negative_1") if name in pq.read_schema(path).names]
        rows = next(pq.ParquetFile(path).iter_batches(batch_size=1, columns=columns), None)
        if rows is not None and len(columns) > 1:
            texts = [textwrap.shorten(rows[column][0].as_py(), 90, placeholder=" ...") for column in columns]
            return {"query": texts[0], "documents": texts[1:]}
    return None
