"""Render the model card from a run's files, for readers who have only its repository on the Hub.

card = render_card("org/name", facts, evidence)         # README.md; of release.verify and of eval.evidence
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from common.cli import InputError
from common.tables import markdown_table
from dataset_builders.card import BENCHMARK, describe_margin, public_name
from dataset_builders.languages import language_name
from eval.ablation_table import format_table as ablation_rows
from eval.evidence import disclosure, hub_id
from eval.leaderboard import Leaderboard, benchmark_tasks, format_means, format_tasks, make_leaderboard
from eval.metrics import final_row, format_table
from eval.report import format_costs
from eval.retrieval import NEAR
from modeling.objectives import OBJECTIVES
from modeling.prompts import QUERY_TEMPLATE, few_shot_prompt, few_shot_prompts, template_of
from release.card_metadata import card_metadata, matryoshka_dims
from release.local_paths import named_paths
from release.usage import encode_lines, reader_lines

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData
    from jinja2 import Environment
    from mteb.results import TaskResult

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = {"model": ROOT / "model_card.md", "adapter": Path(__file__).with_name("adapter_card.md")}
# Keys in the table of settings; recipe.yaml below it has all.
_LORA = ("lora_r", "lora_alpha", "lora_target_modules", "lora_dropout")
_SETTINGS = ("dataset_name", "loss", "temperature", "target_temperature", "alpha", "num_negatives", "instruction")
_SETTINGS += ("shots", "max_seq_length", "train_max_seq_length", "matryoshka_dims", *_LORA, "learning_rate")
_SETTINGS += ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed")
_EXAMPLE = {"query": "a question", "documents": ["a text that answers it", "another text"]}  # without data at hand
# Pooling modes of sentence-transformers -> how text-embeddings-inference and vLLM call them.
SERVER_POOLING = {"lasttoken": ("last-token", "LAST"), "mean": ("mean", "MEAN"), "cls": ("cls", "CLS")}


# --- the cards ------------------------------------------------------------------------------------------------------


def render_card(
    repo_id: str,
    facts: Mapping[str, Any],
    evidence: Mapping[str, Any],
    *,
    title: str | None = None,
    license: str | None = None,
    adapter_repo_id: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """README.md of the merged model.

    Args:
        repo_id: where it will lie.
        facts: of release.verify.verify_model; `exports`, by kind, of release.exports; `tensorboard`: whether event
            files are published.
        evidence: of eval.evidence.read_evidence.
        title: heading of the card; None: repo_id.
        license: of the weights, as the Hub writes it.
        adapter_repo_id: the repository of the adapter, if it is published as well.
        datasets: Hub ids under which the training data are published.

    Raises:
        InputError: metadata that the Hub would read otherwise.
    """
    recipe, metrics, ablation, mteb = (evidence[name] for name in ("recipe", "metrics", "ablation", "mteb"))
    metadata = card_metadata(repo_id, evidence, license, datasets, facts.get("tensorboard", False))
    trained = [entry for stage in evidence["stages"] for entry in stage["datasets"]]
    losses = dict.fromkeys(entry.get("loss") for entry in trained)
    board, exports, final = in_benchmark(mteb, repo_id), facts.get("exports", {}), final_row(metrics)
    template = template_of(facts["prompts"]["query"])
    values = {
        "repo_id": repo_id,
        "title": title or repo_id,
        "languages": " and ".join(map(language_name, evidence["languages"])),
        "license": license,
        "adapter_repo_id": adapter_repo_id,
        "published": datasets,
        "base_model": metadata.base_model,
        "base_revision": recipe.get("model_revision")
        or (recipe.get("model_name_or_path") or "").partition("@")[2]
        or None,
        "start": public_name(recipe.get("model_name_or_path") or ""),
        "example": evidence["example"] or _EXAMPLE,
        "encode_lines": encode_lines(facts),
        "template": template,
        "exports": exports,
        "tensorboard": facts.get("tensorboard", False),
        "export_lines": {kind: reader_lines(kind, facts) for kind in exports},
        "server_pooling": SERVER_POOLING,
        "headline": headline(metrics, final, board),
        "table": format_table(metrics) if metrics else None,
        "cosines_table": cosines_table(final["cosines"]) if final.get("cosines") else None,
        "relevance": final.get("relevance"),
        "thresholds_table": thresholds_table(final["relevance"]) if final.get("relevance") else None,
        "mteb_means": format_means(board) if board else None,
        "mteb_table": format_tasks(make_leaderboard({"score": mteb})) if mteb else None,
        "ablation_table": ablation_rows(ablation) if ablation else None,
        "settings": settings_table(evidence["stages"], evidence["ledger"]),
        "merged": merged(recipe, evidence["stages"]),
        "cut_texts": cut_texts(evidence["ledger"]),
        "matryoshka_dims": matryoshka_dims(evidence["stages"]),
        "losses": {name: _summary(OBJECTIVES[name].function) for name in losses if name in OBJECTIVES},
        "shots": max((entry.get("shots") or 0 for entry in trained), default=0),
        "few_shot_prompts": few_shot_prompts(facts["prompts"]),
        "few_shot": few_shot_prompt(
            "TASK", [("QUERY 1", "POSITIVE 1"), ("QUERY 2", "POSITIVE 2")], template or QUERY_TEMPLATE
        ),
        "disclosure": disclosure(evidence["data"], metadata.base_model),
        "recipe_text": public_recipe_text(recipe),
        "ledger_table": format_costs(evidence["ledger"], metrics),
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

    `facts`: of release.verify.verify_model, with those of verify_adapter as `adapter`. Raises InputError as
    `render_card` does.
    """
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        language=evidence["languages"] or None,
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
        "example": evidence["example"] or _EXAMPLE,
        "encode_lines": encode_lines(facts, facts["adapter"]),
        "lora": [(name, text) for name in _LORA if (text := _setting(evidence["stages"][-1], name))],
    }
    return _render("adapter", metadata, {**facts, **values})


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
        "hub_id": hub_id,
        "margin": describe_margin,
    }
    return environment


def code(text: str) -> str:
    """Any text as code in a line of Markdown.

    >>> print(code("a"), code("two `ticks`"))
    `a` `` two `ticks` ``
    """
    space = " " if "`" in text else ""
    return f"{_ticks(text)}{space}{text}{space}{_ticks(text)}"


def fenced(text: str, language: str) -> str:
    """Any text as a block of code."""
    return f"{_ticks(text, 3)}{language}\n{text}\n{_ticks(text, 3)}"


def _ticks(text: str, least: int = 1) -> str:
    """More backticks than stand together in `text`."""
    return "`" * max([least, *(1 + len(ticks) for ticks in re.findall("`+", text))])


def cell(text: str) -> str:
    """Any text in one cell of a Markdown table.

    >>> print(cell("a | b"), cell("two\\nlines"))
    a \\| b two lines
    """
    return " ".join(text.replace("|", "\\|").split())


# --- scores ---------------------------------------------------------------------------------------------------------


def cosines_table(cosines: Mapping[str, Any]) -> str:
    """Quantiles of cosines (of eval.retrieval's rows) as a Markdown table."""
    heads = [f"{quantile} % are below" for quantile in cosines["quantiles"]]
    titles = {"relevant": "its relevant documents", "others": f"others among the first {NEAR}"}
    rows = [[title, *(f"{value:.2f}" for value in cosines[name])] for name, title in titles.items() if cosines[name]]
    return markdown_table(["cosine of a query and", *heads], rows)


def thresholds_table(relevance: Mapping[str, Any]) -> str:
    """What is kept and lost by cutting at a cosine (of eval.thresholds) as a Markdown table."""
    heads = ["cosine of at least", "relevant, of what is left", "left, of what is relevant", "queries with an answer"]
    shares = ("precision", "recall", "answered")
    rows = [[f"{row['cosine']:.2f}", *(f"{row[name]:.0%}" for name in shares)] for row in relevance["table"]]
    return markdown_table(heads, rows, left=0)


def headline(metrics: Mapping[str, Any] | None, final: Mapping[str, Any], board: Leaderboard | None) -> str | None:
    """The scores in a sentence; None where nothing was measured. `final`: the final model's row of `metrics`."""
    parts = []
    if final:
        measure, baseline, counts = metrics["compared"], metrics["baseline"], metrics["counts"]
        [reference] = [row[measure] for row in metrics["systems"] if row["name"] == baseline]
        difference = final.get("difference")
        interval = " ({mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})".format(**difference) if difference else ""
        parts.append(
            f"{measure} {final[measure]:.3f} on {counts['queries']:,} held-out queries over {counts['documents']:,} "
            f"documents, where {baseline} has {reference:.3f}{interval}"
        )
    scores = board.scores[~np.isnan(board.scores)] if board else []  # NaN: run in part, or no number
    if len(scores):
        count = f"{len(scores)} of the {len(benchmark_tasks())} tasks of {BENCHMARK}"
        parts.append(f"{100 * scores.mean():.2f} on average over {count}")
    return "; ".join(parts) or None


def in_benchmark(results: Sequence[TaskResult], name: str) -> Leaderboard | None:
    """The model's results on tasks of BENCHMARK; None where there is none."""
    names = benchmark_tasks() if results else {}
    ours = [result for result in results if result.task_name in names]
    return make_leaderboard({name: ours}) if ours else None


# --- training -------------------------------------------------------------------------------------------------------


def settings_table(stages: Sequence[Mapping[str, Any]], ledger: Mapping[str, Any]) -> str:
    """What each stage was trained with, as a Markdown table under the recipe's own keys."""
    steps = {row["stage"]: f"{row['steps']:,}" for row in ledger["stages"]}
    rows = [[key, *(_setting(stage, key) for stage in stages)] for key in _SETTINGS]
    rows.append(["optimizer steps", *(steps.get(stage["name"], "") for stage in stages)])
    return markdown_table(["", *(stage["name"] for stage in stages)], [row for row in rows if any(row[1:])])


def _setting(stage: Mapping[str, Any], key: str) -> str:
    """One cell: the distinct values of the stage's data sets; empty where there is none."""
    if key in _LORA and not stage.get("use_peft"):
        return ""
    values = [_public(value) for own in stage["datasets"] if (value := own.get(key)) is not None]
    texts = [", ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values]
    return cell("; ".join(dict.fromkeys(texts)).replace("<", "&lt;"))  # an instruction may hold what looks like HTML


def _summary(function: Callable[..., Any]) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join(function.__doc__.split("\n\n")[0].split())


def merged(recipe: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> str:
    """What the published weights are the average of, in a sentence; empty where they are one stage's.

    >>> merged({"merge": {"stages": ["sts", "runs/b/model"], "weights": [1, 3]}}, [{"name": "sts"}])
    'The published weights are the linear average of those after sts (25 %), those of another model, `model` (75 %).'
    """
    merge = recipe.get("merge")
    if not merge:
        return ""
    names, own = merge["stages"], {stage["name"] for stage in stages}
    weights = merge.get("weights") or [1] * len(names)
    places = ["after " + name if name in own else "of another model, " + code(Path(name).name) for name in names]
    shares = [f"{100 * weight / sum(weights):.0f} %" for weight in weights]
    parts = [f"those {place} ({share})" for place, share in zip(places, shares, strict=True)]
    return f"The published weights are the {merge.get('method') or 'linear'} average of {', '.join(parts)}."


def cut_texts(ledger: Mapping[str, Any]) -> list[str]:
    """By stage and column, how many training texts are longer than what the model read; empty where none is."""
    lines = []
    for row in ledger["stages"]:
        columns = [counts for data in (row.get("cut_texts") or {}).values() for counts in data.items()]
        parts = [f"{name} {cut:,} of {texts:,}" for name, (cut, texts, *_) in columns if cut]
        lines += [f"{row['stage']}: {', '.join(parts)}"] if parts else []
    return lines


def public_recipe_text(recipe: Mapping[str, Any]) -> str:
    """recipe.yaml without the folders of this machine."""
    return yaml.safe_dump(_public(recipe), sort_keys=False, allow_unicode=True, width=110).strip()


def _public(value: Any) -> Any:
    """Replace folders of this machine by their last part.

    >>> _public({"eos_token": "</s>", "dataset_name": ["/data/mine/hub", "org/data", "../sets/y"]})
    {'eos_token': '</s>', 'dataset_name': ['hub', 'org/data', 'y']}
    """
    if isinstance(value, Mapping):
        return {key: _public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and named_paths(value) else value
