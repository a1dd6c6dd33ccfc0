"""Results of mteb's tasks as eval.run_mteb leaves them, for real tasks that were not run."""

from pathlib import Path

from common.steps import files_of, fingerprint, write_json


def write_mteb(results: Path, model: Path, tasks: dict[str, tuple[str, str, float]]) -> Path:
    """Task -> (split, metric, score); returns the folder of the model's results."""
    folder = results / "results" / "runs__model" / fingerprint(files_of(model))
    write_json_in(folder / "model_meta.json", {})
    for name, (split, metric, score) in tasks.items():
        write_result(folder, name, split, metric, {"default": score})
    return folder


def write_result(folder: Path, name: str, split: str, metric: str, scores: dict[str, float]) -> None:
    """One task's file; `scores` by subset."""
    subsets = [
        {"hf_subset": subset, "languages": ["eng-Latn"], "main_score": score, metric: score}
        for subset, score in scores.items()
    ]
    facts = {"dataset_revision": f"revision-of-{name}", "task_name": name, "mteb_version": "2.26.24"}
    facts |= {"scores": {split: subsets}, "evaluation_time": 1.0, "kg_co2_emissions": None}
    write_json_in(folder / f"{name}.json", facts)


def write_json_in(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)
