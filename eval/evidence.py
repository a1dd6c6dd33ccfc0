"""What a run left behind, as far as it can be proved: the evidence that its model's card is made of.

    evidence = read_evidence(run_folder)                    # recipe, ledger, scores, data, ablation, pictures

Nothing here looks at the model: what it is and does is found out by modeling.verify, as a stranger would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import InputError
from common.recipes import read_yaml
from common.steps import MANIFEST, files_of, fingerprint, read_manifest
from dataset_builders.build import FOLDERS
from dataset_builders.card import BENCHMARK, compared_tasks, public_name, source_licence, source_title, used_models
from dataset_builders.sources import registry
from eval.leaderboard import BESIDE_RESULTS, read_result
from eval.report import KEY, read_json, read_ledger, read_manifests, read_metrics

if TYPE_CHECKING:
    from mteb.results import TaskResult

_PICTURES = ("systems.png", "training.png")  # of eval.report, drawn from metrics.json


def read_evidence(
    run_folder: Path, results: Path | None = None, ablations: Path | None = None, commits: Sequence[str] = ()
) -> dict[str, Any]:
    """All that a run's folder can prove about its model.

    Args:
        run_folder: what train_st.py wrote, with eval.report's pictures in report/ if there are any.
        results: folder with eval.retrieval's metrics.json or mteb's results/ (eval.run_mteb's --output_dir), or both;
            run_folder/results is looked at, too.
        ablations: eval.ablate's --output_dir.
        commits: on the Hub that are known to have the model's files; mteb's results of them are the model's.

    Raises:
        InputError: no run, a named folder without results, pictures of other results.
    """
    path = run_folder / "recipe.yaml"
    if not path.is_file():
        raise InputError(f"{path}: no such file; the card tells the recipe, name its folder with --run")
    recipe = read_yaml(path)
    if not isinstance(recipe.get("stages"), list):
        raise InputError(f"{path}: no list of stages; name the folder that train_st.py wrote with --run")
    ledger = read_ledger(run_folder)
    folders = list(dict.fromkeys([results or run_folder / "results", run_folder / "results"]))
    with_metrics = next((folder for folder in folders if (folder / "metrics.json").is_file()), None)
    metrics = read_metrics(with_metrics) if with_metrics else None
    model = run_folder / "model"
    if results and with_metrics != results and not read_mteb([results], model, commits):
        raise InputError(
            f"{results}: neither metrics.json nor mteb's results of {model} are there; "
            "evaluate it with eval.retrieval or eval.run_mteb, or name another folder"
        )
    ablation = read_ablation(ablations) if ablations else None
    pictures = read_pictures(run_folder / "report", metrics)
    if ablations and (ablations / "ablation.png").is_file():
        pictures["ablation.png"] = ablations / "ablation.png"
    return {
        "recipe": recipe,
        "ledger": ledger,
        "versions": stage_versions(run_folder, recipe),
        "commit": ledger.get("commit"),
        "metrics": metrics,
        "mteb": read_mteb(folders, model, commits),
        "ablation": ablation,
        "data": {name: provenance(Path(name)) for name in dataset_names(recipe)},
        "evaluated": provenance(with_metrics / metrics["data"] / "hub") if metrics else None,
        "pictures": pictures,
    }


def read_mteb(folders: Sequence[Path], model: Path, commits: Sequence[str] = ()) -> list[TaskResult]:
    """Results that eval.run_mteb wrote of exactly these weights: their revision is the hash of the model's folder, or
    a commit that has its files. Others are not ours.
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


def stage_versions(run_folder: Path, recipe: Mapping[str, Any]) -> dict[str, str]:
    """The libraries that trained the last stage; empty where it has no manifest."""
    folder = run_folder / recipe["stages"][-1]["name"]
    return read_manifest(folder)["versions"] if (folder / MANIFEST).is_file() else {}


def dataset_names(recipe: Mapping[str, Any]) -> list[str]:
    names = [name for stage in recipe["stages"] for name in stage_values(recipe, stage, "dataset_name")]
    return [name for name in dict.fromkeys(names) if name]


def stage_values(recipe: Mapping[str, Any], stage: Mapping[str, Any], key: str, default: Any = None) -> list[Any]:
    """The distinct values that a key has in a stage: one, or those of its `datasets:`."""
    shared = stage.get(key, recipe.get(key, default))
    values = [entry.get(key, shared) for entry in stage.get("datasets") or [{}]]
    return [value for position, value in enumerate(values) if value not in values[:position]]  # lists have no hash


def provenance(hub: Path) -> dict[str, Any] | None:
    """Where a data set of dataset_builders comes from and how it was made; None where its folder is not at hand.

    A folder on the publisher's machine is told by its name alone, models and data of the Hub by their ids.
    """
    if not (hub / MANIFEST).is_file():
        return None
    recipe = read_manifest(hub)["inputs"]["recipe"]
    made = read_manifests(hub.parent)
    source = recipe["source"]
    entry = registry()[source["name"]] if source["kind"] == "registry" else None
    first = made.get("corpus") or made.get("sts") or {}
    models = {section: public_name(recipe[section]["model"]) for section in ("dense", "teacher") if section in recipe}
    models |= used_models({step: made.get(step) for step in FOLDERS})  # with the commit that was read
    return {
        "title": public_name(source_title(source)),
        "kind": source["kind"],
        "dataset": entry.dataset if entry else source.get("dataset"),
        "commit": first.get("inputs", {}).get("source", {}).get("commit"),
        "licence": entry.licence if entry else source_licence(source),
        "split": source["split"],
        "rows": read_manifest(hub)["rows"],
        "recipe": recipe,
        "models": models,
        "mined": "mined" in made,
        "compared": compared_tasks(made.get("corpus")),
        "contamination": first.get("contamination"),
        "training_datasets": source.get("training_datasets"),  # None: not stated
        "benchmark": (recipe.get("decontamination") or {}).get("benchmark") or BENCHMARK,
    }
