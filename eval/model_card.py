"""The model card: what a run left behind (recipe, ledger, scores), told to someone who has only the Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_builders.cli import InputError
from dataset_builders.recipes import read_yaml
from eval.report import format_ledger, read_ledger, read_metrics
from eval.retrieval import format_table
from modeling.recipe import StageArguments

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

TEMPLATE = Path(__file__).parent.parent / "model_card.md"


def read_evidence(run_folder: Path, results: Path | None = None, ablations: Path | None = None) -> dict[str, Any]:
    """The recipe, the ledger and, where there are any, the results of the run that made the model."""
    results = results or run_folder / "results"
    path = run_folder / "recipe.yaml"
    if not path.is_file():
        raise InputError(f"{path}: no such file; the card tells the recipe, name its folder with --run")
    return {
        "recipe": read_yaml(path),
        "recipe_text": path.read_text(encoding="utf-8").strip(),
        "ledger": read_ledger(run_folder),
        "metrics": read_metrics(results) if (results / "metrics.json").is_file() else None,
    }


def render_card(
    repo_id: str,
    facts: Mapping[str, Any],
    evidence: Mapping[str, Any],
    *,
    license: str | None = None,
    adapter_repo_id: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """model_card.md filled in. Raises InputError where the Hub could not read the metadata."""
    from huggingface_hub import ModelCard
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    metadata = card_metadata(license, evidence["recipe"])
    card = environment.get_template(TEMPLATE.name).render(
        metadata=metadata.to_yaml(),
        repo_id=repo_id,
        license=license,
        base_model=metadata.base_model,
        table=format_table(evidence["metrics"]) if evidence["metrics"] else None,
        ledger_table=format_ledger(evidence["ledger"]),
        stages=[
            (stage["name"], stage_values(evidence["recipe"], stage, "loss", StageArguments.loss))
            for stage in evidence["recipe"]["stages"]
        ],
        **facts,
        **evidence,
    )
    parsed = ModelCard(card).data
    if parsed.to_dict() != metadata.to_dict():
        raise InputError(f"{TEMPLATE}: its metadata reads back as {parsed.to_dict()}, not as it was written")
    return card


def stage_values(recipe: Mapping[str, Any], stage: Mapping[str, Any], key: str, default: Any = None) -> list[Any]:
    """The distinct values that a key has in a stage: one, or those of its `datasets:`."""
    shared = stage.get(key, recipe.get(key, default))
    return list(dict.fromkeys(entry.get(key, shared) for entry in stage.get("datasets") or [{}]))


def card_metadata(license: str | None, recipe: Mapping[str, Any]) -> ModelCardData:
    """What the Hub searches by. A local folder is no base model and no data set for a reader elsewhere."""
    from huggingface_hub import ModelCardData

    names = [name for stage in recipe["stages"] for name in stage_values(recipe, stage, "dataset_name")]
    datasets = [name for name in dict.fromkeys(names) if name and _is_hub_id(name)]
    base = None if recipe.get("student") else recipe["model_name_or_path"]
    return ModelCardData(
        language="en",
        license=license,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "dense", "text-embeddings", "graded-embedder"],
        base_model=base.partition("@")[0] if base and _is_hub_id(base) else None,
        datasets=datasets or None,
    )


def _is_hub_id(reference: str) -> bool:
    return (
        not Path(reference).exists()
        and not reference.startswith((".", "/", "~", "package:"))
        and (reference.count("/") <= 1)
    )


def render_adapter_card(
    repo_id: str,
    model_repo_id: str,
    facts: Mapping[str, Any],
    evidence: Mapping[str, Any],
    *,
    license: str | None = None,
) -> str:
    """The card of the LoRA adapter whose merged weights are `model_repo_id`."""
    from huggingface_hub import ModelCard, ModelCardData

    metadata = ModelCardData(
        license=license,
        library_name="peft",
        base_model=card_metadata(license, evidence["recipe"]).base_model,
        tags=["lora", "graded-embedder"],
    )
    metadata.base_model_relation = "adapter"
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n# {repo_id}\n\nThe LoRA adapter of {model_repo_id}.\n"))


def card_files(evidence: Mapping[str, Any]) -> dict[str, Path]:
    """Files that the card shows: name in the repository -> where it lies."""
    return {}
