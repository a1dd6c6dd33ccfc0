"""The metadata on top of a model card: what the Hub searches by, and the scores of its model-index."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eval.evidence import base_model, hub_id
from eval.metrics import final_row

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

# eval.retrieval's measures as mteb's model indexes call them; RR looks at the first 100 documents.
_METRIC_TYPES = {"nDCG@10": "ndcg_at_10", "R@100": "recall_at_100", "RR": "mrr_at_100"}


def card_metadata(
    repo_id: str,
    evidence: Mapping[str, Any],
    license: str | None = None,
    datasets: Sequence[str] = (),
    tensorboard: bool = False,
) -> ModelCardData:
    """The card's YAML. Local folders are left out: nobody else could open them. `tensorboard`: event files are there.

    The Hub knows four relations to a base: adapter, merge (of several), quantized and finetune
    (https://huggingface.co/docs/hub/model-cards#specifying-a-base-model). LoRA merged into its base is a finetune.
    """
    from huggingface_hub import ModelCardData

    base = base_model(evidence["recipe"])
    results, example = evaluations(evidence, datasets), evidence["example"]
    return ModelCardData(
        language=evidence["languages"] or None,
        license=license,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=[
            *("sentence-transformers", "feature-extraction", "dense", "text-embeddings", "graded-embedder"),
            *(["mteb"] if evidence["mteb"] else []),
            *(["tensorboard"] if tensorboard else []),
            *(["matryoshka"] if matryoshka_dims(evidence["stages"]) else []),
        ],
        datasets=list(dict.fromkeys([*datasets, *filter(None, map(hub_id, evidence["data"]))])) or None,
        **({"widget": [{"source_sentence": example["query"], "sentences": example["documents"]}]} if example else {}),
        **({"base_model": base, "base_model_relation": "finetune"} if base else {}),
        **({"model_name": repo_id.partition("/")[2], "eval_results": results} if results else {}),
    )


def evaluations(evidence: Mapping[str, Any], datasets: Sequence[str] = ()) -> list[EvalResult]:
    """Scores of the final model for the Hub's model-index: on the run's own held-out queries, and of mteb's tasks."""
    from huggingface_hub import EvalResult

    results = []
    metrics, final = evidence["metrics"], final_row(evidence["metrics"])
    for row in [final, *shortened_rows(metrics, final)] if final else ():
        suffix = f", {row['dimensions']} dimensions" if row.get("dimensions") else ""
        results += [
            EvalResult(
                task_type="text-retrieval",
                task_name="Retrieval",
                dataset_split=metrics["split"],
                metric_type=_METRIC_TYPES[measure],
                metric_name=measure + suffix,
                metric_value=row[measure],
                **evaluated_on(evidence, datasets),
            )
            for measure in metrics["measures"]
            if row[measure] is not None
        ]
    for result in evidence["mteb"]:
        task = result.task.metadata
        results += [
            EvalResult(
                task_type=task.type,
                dataset_type=task.dataset["path"],
                dataset_name=f"MTEB {task.name}" + (f" ({config})" if config != "default" else ""),
                dataset_config=config,
                dataset_split=split,
                dataset_revision=result.dataset_revision,
                metric_type=task.main_score,
                metric_value=subset["main_score"],
            )
            for split, subsets in result.scores.items()
            for subset in subsets
            for config in [subset["hf_subset"]]
            if not math.isnan(subset["main_score"])  # which the Hub does not take for a number
        ]
    return results


def evaluated_on(evidence: Mapping[str, Any], datasets: Sequence[str] = ()) -> dict[str, Any]:
    """The data set of eval.retrieval's scores, as a model-index names it: the source's Hub id and commit; for other
    sources the Hub id of the graded data, when all training data and the evaluation's are one set; else a name.
    """
    data = evidence["evaluated"]
    if data is None:
        return {"dataset_type": "held-out-queries", "dataset_name": "held-out queries of the training data"}
    if data["dataset"]:
        return {"dataset_type": data["dataset"], "dataset_name": data["title"], "dataset_revision": data["commit"]}
    own = len(datasets) == 1 and list(evidence["data"].values()) == [data]
    name = datasets[0] if own else re.sub(r"\W+", "-", data["title"].lower())
    return {"dataset_type": name, "dataset_name": data["title"]}


def shortened_rows(metrics: Mapping[str, Any], final: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the final model's vectors cut to fewer dimensions."""
    return [row for row in metrics["systems"] if row.get("dimensions") and row.get("model") == final.get("model")]


def matryoshka_dims(stages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The lengths that vectors may be cut to: those that the last stage trained."""
    return sorted(stages[-1].get("matryoshka_dims") or (), reverse=True)
