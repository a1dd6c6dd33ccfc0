"""The model card: what a run left behind, told to people who have nothing but its repository on the Hub.

card = render_card("org/name", facts, evidence)         # README.md; of modeling.verify and of eval.evidence
files = card_files(evidence)                            # the pictures that it shows
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from common.cli import InputError
from dataset_builders.card import BENCHMARK, public_name
from dataset_builders.decontamination import zero_shot
from eval.evidence import dataset_names, stage_values
from eval.leaderboard import benchmark_tasks
from eval.report import format_ledger
from eval.retrieval import NEAR, format_table
from modeling.keys import DEFAULTS
from modeling.prompts import few_shot_prompt, few_shot_prompts
from modeling.recipe import StageArguments

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData
    from jinja2 import Environment
    from mteb import AbsTask
    from mteb.results import TaskResult

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = {"model": ROOT / "model_card.md", "adapter": Path(__file__).with_name("adapter_card.md")}
# Losses by the names that recipes use. z_ij: cosine / temperature; y_ik: soft label of a row's own document;
# t_i = softmax_k(logit(y_ik) / target_temperature). modeling/objectives.py computes them and names their sources.
FORMULAS = {
    "soft_info_nce": "`L_i = -sum_k t_ik log softmax_j(z_ij)_k`, j over the row's own and the batch's other documents",
    "info_nce": "`L_i = -log softmax_j(z_ij)_0`, j over all documents of the batch (arXiv 1807.03748)",
    "weighted_soft_info_nce": "InfoNCE in which own negative k weighs `(1 - 0.9 p_ik) / (1 - 0.9 / n)`, "
    "p_i being t_i over the n negatives alone (arXiv 2310.08069)",
    "bixse": "binary cross-entropy of `sigmoid(z_ij + log(own / seen))` with y_ij, 0 for other rows' documents; own "
    "and seen are their numbers (arXiv 2508.06781)",
    "kl": "`L_i = KL(t_i || softmax_k(z_ik))` over the row's own documents (arXiv 2010.11386)",
    "margin_mse": "`L_i = mean_k ((z_i0 - z_ik) - (logit(y_i0) - logit(y_ik)) / target_temperature)^2` "
    "(arXiv 2010.02666)",
    "ranknet": "`L_i = mean of -log sigmoid(z_ik - z_il)` over own documents with y_ik > y_il (RankNet, ICML 2005)",
    "pairdistill": "`L_i = mean of KL(sigmoid((logit(y_ik) - logit(y_il)) / target_temperature) || "
    "sigmoid(z_ik - z_il))` over pairs of own documents (arXiv 2410.01383)",
    "lambda_loss": "RankNet's pairs weighted by what exchanging them does to nDCG (NDCG-Loss2++, CIKM 2018)",
    "cosent": "`L = log(1 + sum of exp((cos_a - cos_b) / temperature))` over pairs of rows with y_a < y_b "
    "(sentence-transformers' CoSENTLoss)",
}
# Pooling by plain torch, for each pooling of modeling.encoder: from ids, mask (B, T) and states (B, T, H) to vectors.
POOLED = {
    "eos": "    vectors = states[torch.arange(len(texts)), mask.sum(dim=1) - 1]  # of the last token, EOS",
    "mean": """\
    weights = mask.unsqueeze(-1).to(states.dtype)
    vectors = (states * weights).sum(dim=1) / weights.sum(dim=1)""",
    "mean_without_prompt": """\
    if prompt:  # its tokens, BOS included, are left out; EOS, the last of the prompt alone, is the text's
        mask[:, : len(tokenizer(prompt)["input_ids"]) - 1] = 0
    weights = mask.unsqueeze(-1).to(states.dtype)
    vectors = (states * weights).sum(dim=1) / weights.sum(dim=1)""",
    "weighted_mean": """\
    weights = (mask * torch.arange(1, 1 + mask.shape[1])).unsqueeze(-1).to(states.dtype)  # by position
    vectors = (states * weights).sum(dim=1) / weights.sum(dim=1)""",
}
# What the table of settings shows, in this order; what belongs to LoRA or to graded lists only where there is some.
_LORA = ("lora_r", "lora_alpha", "lora_target_modules", "lora_dropout")
_GRADED = ("alpha", "target_temperature", "num_negatives", "in_batch_negatives", "false_negative_margin")
_SETTINGS = (
    *("dataset_name", "dataset_config", "loss", "temperature", *_GRADED, "instruction", "prompted_columns"),
    *("shots", "zero_shot_probability", "train_max_seq_length", "use_peft", *_LORA),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "num_train_epochs"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "mini_batch_size", "bf16", "seed"),
)
# eval.retrieval's measures as mteb's model indexes call them; RR looks at the first 100 documents.
_METRIC_TYPES = {"nDCG@10": "ndcg_at_10", "R@100": "recall_at_100", "RR": "mrr_at_100"}


# --- the cards ------------------------------------------------------------------------------------------------------


def render_card(
    repo_id: str,
    facts: Mapping[str, Any],
    evidence: Mapping[str, Any],
    *,
    license: str | None = None,
    adapter_repo_id: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """README.md of the merged model.

    Args:
        repo_id: where it will lie.
        facts: of modeling.verify.verify_model.
        evidence: of `read_evidence`.
        license: of the weights, as the Hub writes it.
        adapter_repo_id: the repository of the adapter, if it is published as well.
        datasets: Hub ids under which the training data are published.

    Raises:
        InputError: metadata that the Hub would read otherwise.
    """
    recipe = evidence["recipe"]
    metadata = card_metadata(repo_id, evidence, license, datasets)
    pooling = last_value(recipe, "pooling", None) or "eos"
    values = {
        "repo_id": repo_id,
        "license": license,
        "adapter_repo_id": adapter_repo_id,
        "published": datasets,
        "base_model": metadata.base_model,
        "base_revision": base_revision(recipe),
        "pooling": pooling,
        "pooling_lines": POOLED[pooling],
        "headline": headline(evidence),
        "table": format_table(evidence["metrics"]) if evidence["metrics"] else None,
        "cosines_table": cosines_table(evidence["metrics"]),
        "mteb_means": mteb_means(evidence["mteb"]),
        "mteb_table": mteb_table(evidence["mteb"]),
        "ablation_table": ablation_table(evidence["ablation"]),
        "settings": settings_table(recipe, evidence["ledger"]),
        "formulas": {name: FORMULAS[name] for name in losses(recipe)},
        "shots": max((max(stage_values(recipe, stage, "shots", 0)) for stage in recipe["stages"]), default=0),
        "few_shot_prompts": few_shot_prompts(facts["prompts"]),
        "few_shot": few_shot_prompt("TASK", [("QUERY 1", "POSITIVE 1"), ("QUERY 2", "POSITIVE 2")]),
        "disclosure": disclosure(evidence["data"], metadata.base_model),
        "recipe_text": public_recipe_text(recipe),
        "ledger_table": format_ledger(evidence["ledger"], evidence["metrics"]),
    }
    return _render("model", metadata, {**facts, **evidence, **values})


def render_adapter_card(
    repo_id: str,
    model_repo_id: str,
    facts: Mapping[str, Any],
    evidence: Mapping[str, Any],
    *,
    license: str | None = None,
) -> str:
    """README.md of the LoRA adapter whose merged weights are `model_repo_id`.

    `facts`: of modeling.verify.verify_model, with those of verify_adapter as `adapter`. Raises InputError as
    `render_card` does.
    """
    from huggingface_hub import ModelCardData

    recipe = evidence["recipe"]
    metadata = ModelCardData(
        language="en",
        license=license,
        library_name="peft",
        pipeline_tag="sentence-similarity",
        tags=["lora", "feature-extraction", "text-embeddings", "graded-embedder"],
        base_model=facts["adapter"]["base"],
        base_model_relation="adapter",
    )
    values = {
        "repo_id": repo_id,
        "model_repo_id": model_repo_id,
        "license": license,
        "pooling_lines": POOLED[(last_value(recipe, "pooling", None) or "eos")],
        "lora": {name.removeprefix("lora_"): _setting(recipe, recipe["stages"][-1], name) for name in _LORA},
    }
    return _render("adapter", metadata, {**facts, **values})


def card_files(evidence: Mapping[str, Any]) -> dict[str, Path]:
    """The pictures that the model's card shows: name in the repository -> file."""
    return dict(evidence["pictures"])


def _render(kind: str, metadata: ModelCardData, values: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCard

    template = TEMPLATES[kind]
    card = _environment().get_template(template.name).render(metadata=metadata.to_yaml(), **values)
    parsed = ModelCard(card).data
    if parsed.to_dict() != metadata.to_dict():
        raise InputError(f"{template}: its metadata reads back as {parsed.to_dict()}, not as it was written")
    return card


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent for template in TEMPLATES.values()]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "count": "{:,}".format,
        "code": code,
        "cell": cell,
        "fenced": fenced,
        "name": public_name,
    }
    return environment


def code(text: str) -> str:
    """Any text as code in a line of Markdown.

    >>> print(code("a"), code("two `ticks`"))
    `a` `` two `ticks` ``
    """
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def cell(text: str) -> str:
    """Any text in one cell of a Markdown table.

    >>> print(cell("a | b"), cell("two\\nlines"))
    a \\| b two lines
    """
    return " ".join(text.replace("|", "\\|").split())


def fenced(text: str, language: str) -> str:
    """Any text as a block of code."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


# --- parts of them --------------------------------------------------------------------------------------------------


def card_metadata(
    repo_id: str, evidence: Mapping[str, Any], license: str | None = None, datasets: Sequence[str] = ()
) -> ModelCardData:
    """What the Hub searches by. A local folder is no base model and no data set for a reader elsewhere.

    The Hub knows four relations to a base: adapter, merge (of several), quantized and finetune
    (https://huggingface.co/docs/hub/model-cards#specifying-a-base-model). LoRA merged into its base is a finetune.
    """
    from huggingface_hub import ModelCardData

    recipe = evidence["recipe"]
    on_hub = [name for name in dataset_names(recipe) if _is_hub_id(name)]
    base = "" if recipe.get("student") else (recipe.get("model_name_or_path") or "").partition("@")[0]
    relation = {"base_model": base, "base_model_relation": "finetune"} if base and _is_hub_id(base) else {}
    results = evaluations(evidence, datasets)
    return ModelCardData(
        language="en",
        license=license,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=[
            *("sentence-transformers", "feature-extraction", "dense", "text-embeddings", "graded-embedder"),
            *(["mteb"] if evidence["mteb"] else []),
        ],
        datasets=list(dict.fromkeys([*datasets, *on_hub])) or None,
        **relation,
        **({"model_name": repo_id.partition("/")[2], "eval_results": results} if results else {}),
    )


def evaluations(evidence: Mapping[str, Any], datasets: Sequence[str] = ()) -> list[EvalResult]:
    """Scores of the final model for the Hub's model-index: on the run's own held-out queries, and of mteb's tasks."""
    from huggingface_hub import EvalResult

    results = []
    metrics, final = evidence["metrics"], final_row(evidence["metrics"])
    if final:
        where = evaluated_on(evidence, datasets)
        for measure in metrics["measures"]:
            if final[measure] is not None:
                results.append(
                    EvalResult(
                        task_type="text-retrieval",
                        task_name="Retrieval",
                        dataset_split=metrics["split"],
                        metric_type=_METRIC_TYPES[measure],
                        metric_name=measure,
                        metric_value=final[measure],
                        **where,
                    )
                )
    for result in evidence["mteb"]:
        task = result.task.metadata
        for split, subsets in result.scores.items():
            for subset in subsets:
                config = subset["hf_subset"]
                results.append(
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
                )
    return results


def evaluated_on(evidence: Mapping[str, Any], datasets: Sequence[str] = ()) -> dict[str, Any]:
    """The data set of eval.retrieval's scores, as a model-index names it: the source's Hub id and commit; for other
    sources the Hub id of the graded data, when all training data and the evaluation's are one set; else a name.
    """
    data = evidence["evaluated"]
    if data is None:
        return {"dataset_type": "held-out-queries", "dataset_name": "held-out queries of the training data"}
    if data["dataset"]:
        return {
            "dataset_type": data["dataset"],
            "dataset_name": data["title"],
            "dataset_revision": data["commit"],
        }
    own = len(datasets) == 1 and list(evidence["data"].values()) == [data]
    return {
        "dataset_type": datasets[0] if own else re.sub(r"\W+", "-", data["title"].lower()),
        "dataset_name": data["title"],
    }


def final_row(metrics: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The final model's row, without shots: eval.retrieval puts models in the order in which they came to be."""
    rows = [row for row in (metrics or {"systems": []})["systems"] if row["kind"] == "model" and not row.get("shots")]
    return rows[-1] if rows else None


def cosines_table(metrics: Mapping[str, Any] | None) -> str | None:
    """What is a high score: the final model's cosines, as a Markdown table; None where nobody measured them."""
    cosines = (final_row(metrics) or {}).get("cosines")
    if not cosines:
        return None
    titles = {"relevant": "its relevant documents", "others": f"others among the first {NEAR}"}
    heads = [f"{quantile} % are below" for quantile in cosines["quantiles"]]
    lines = [f"| cosine of a query and | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    lines += [
        f"| {title} | {' | '.join(f'{value:.2f}' for value in cosines[name])} |"
        for name, title in titles.items()
        if cosines[name]
    ]
    return "\n".join(lines)


def headline(evidence: Mapping[str, Any]) -> str | None:
    """How good it is, in a sentence; None where nothing was measured."""
    parts = []
    metrics, final = evidence["metrics"], final_row(evidence["metrics"])
    if final:
        measure, baseline, counts = metrics["compared"], metrics["baseline"], metrics["counts"]
        [reference] = [row[measure] for row in metrics["systems"] if row["name"] == baseline]
        difference = final.get("difference")
        interval = " ({mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})".format(**difference) if difference else ""
        parts.append(
            f"{measure} {final[measure]:.3f} on {counts['queries']:,} held-out queries over {counts['documents']:,} "
            f"documents, where {baseline} has {reference:.3f}{interval}"
        )
    if evidence["mteb"]:
        ours, tasks = _in_benchmark(evidence["mteb"])
        mean = sum(result.get_score() for result in ours) / len(ours) if ours else None
        parts += (
            [f"{100 * mean:.2f} on average over {len(ours)} of the {len(tasks)} tasks of {BENCHMARK}"] if ours else []
        )
    return "; ".join(parts) or None


def _in_benchmark(results: Sequence[TaskResult]) -> tuple[list[TaskResult], list[AbsTask]]:
    """Those of the results that belong to BENCHMARK, with the splits and languages that it asks for; and its tasks."""
    tasks = benchmark_tasks()
    ours = [result for result in results if result.task_name in tasks]
    return [result.validate_and_filter_scores(tasks[result.task_name]) for result in ours], list(tasks.values())


def mteb_means(results: Sequence[TaskResult]) -> str | None:
    """Means by task type on BENCHMARK, as a Markdown table; it tells how many of its tasks were run."""
    if not results:
        return None
    from eval.run_mteb import format_table as means

    ours, tasks = _in_benchmark(results)
    return means(tasks, ours) if ours else None


def mteb_table(results: Sequence[TaskResult]) -> str | None:
    """Every task's main score (in %), as a Markdown table."""
    if not results:
        return None
    lines = ["| task | type | metric | score |", "|---|---|---|---:|"]
    for result in sorted(results, key=lambda result: (result.task_type, result.task_name)):
        metric = result.task.metadata.main_score
        lines.append(f"| {result.task_name} | {result.task_type} | {metric} | {100 * result.get_score():.2f} |")
    return "\n".join(lines)


def ablation_table(ablation: Mapping[str, Any] | None) -> str | None:
    if ablation is None:
        return None
    from eval.ablation_table import format_table as rows

    return rows(ablation)


def losses(recipe: Mapping[str, Any]) -> list[str]:
    names = [name for stage in recipe["stages"] for name in stage_values(recipe, stage, "loss", StageArguments.loss)]
    return list(dict.fromkeys(names))


def settings_table(recipe: Mapping[str, Any], ledger: Mapping[str, Any]) -> str:
    """What each stage was trained with, defaults included, as a Markdown table under the recipe's own keys."""
    stages = recipe["stages"]
    steps = {row["stage"]: row["steps"] for row in ledger["stages"]}
    lines = [f"| | {' | '.join(stage['name'] for stage in stages)} |", "|---" * (len(stages) + 1) + "|"]
    for key in _SETTINGS:
        cells = [_setting(recipe, stage, key) for stage in stages]
        if any(cells):
            lines.append(f"| {key} | {' | '.join(cells)} |")
    counts = [f"{steps[stage['name']]:,}" if stage["name"] in steps else "" for stage in stages]
    return "\n".join([*lines, f"| optimizer steps | {' | '.join(counts)} |"])


def _setting(recipe: Mapping[str, Any], stage: Mapping[str, Any], key: str) -> str:
    """One cell; empty where the key means nothing in that stage or is not set."""
    if key in _LORA and not stage.get("use_peft", recipe.get("use_peft")):
        return ""
    if key in _GRADED and stage_values(recipe, stage, "loss", StageArguments.loss) == ["cosent"]:
        return ""
    if key == "train_max_seq_length" and stage.get(key, recipe.get(key)) is None:
        key = "max_seq_length"
    values = [_public(value) for value in stage_values(recipe, stage, key, default_of(key)) if value is not None]
    texts = [", ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values]
    return cell("; ".join(texts).replace("<", "&lt;"))  # an instruction may hold what looks like HTML


def default_of(key: str) -> Any:
    """What a key of a recipe is when nobody says."""
    from sentence_transformers import SentenceTransformerTrainingArguments
    from trl import ModelConfig

    if key in DEFAULTS:
        return DEFAULTS[key]
    for kind in (StageArguments, ModelConfig, SentenceTransformerTrainingArguments):
        for field in dataclasses.fields(kind):
            if field.name == key:
                factory = field.default_factory
                default = field.default if factory is dataclasses.MISSING else factory()
                return getattr(default, "value", default)  # an enumeration's
    raise KeyError(key)


def last_value(recipe: Mapping[str, Any], key: str, default: Any) -> Any:
    """A key of the last stage, whose model is published."""
    return recipe["stages"][-1].get(key, recipe.get(key, default))


def base_revision(recipe: Mapping[str, Any]) -> str | None:
    """The commit or branch of the base model that training started from, where the recipe names it."""
    return recipe.get("model_revision") or (recipe.get("model_name_or_path") or "").partition("@")[2] or None


def disclosure(data: Mapping[str, Mapping[str, Any] | None], base_model: str | None = None) -> dict[str, Any] | None:
    """`training_datasets` and mteb's zero-shot share, for all data sets together; None where one is not known.

    The share counts what mteb knows of the base model's training, too.
    """
    known = [entry["training_datasets"] if entry else None for entry in data.values()]
    if not known or None in known:
        return None
    benchmark = next(entry["benchmark"] for entry in data.values())
    return zero_shot([name for names in known for name in names], benchmark, base_model)


def public_recipe_text(recipe: Mapping[str, Any]) -> str:
    """recipe.yaml as a stranger can use it: no folder of this machine, no token."""
    return yaml.safe_dump(_public(recipe), sort_keys=False, allow_unicode=True, width=110).strip()


def _public(value: Any) -> Any:
    """Paths inside the repository as seen from it, others by their names; keys that hold tokens are left out.

    >>> _public({"hub_token": "hf_x", "dataset_name": ["/data/mine/hub", "org/data", "runs/x", "../sets/y"]})
    {'dataset_name': ['hub', 'org/data', 'runs/x', 'y']}
    """
    if isinstance(value, Mapping):
        return {key: _public(inner) for key, inner in value.items() if not str(key).endswith("token")}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    if not isinstance(value, str) or not value.startswith(("/", "~", "..")):
        return value
    path = Path(value).expanduser()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def _is_hub_id(reference: str) -> bool:
    return (
        not Path(reference).exists()
        and not reference.startswith((".", "/", "~", "package:"))
        and (reference.count("/") <= 1)
    )
