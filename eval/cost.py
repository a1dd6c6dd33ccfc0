"""What a benchmark costs, before it runs: tokens by mteb's own counts of texts, hours by arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.tables import markdown_table

if TYPE_CHECKING:
    from mteb import AbsTask

# Dense bfloat16 peak in FLOP/s, from NVIDIA's data sheets (without sparsity)
PEAKS = {"L4": 121e12, "A100": 312e12, "H100 SXM": 989e12}
UTILISATION = 0.4  # of the peak: what large batches of texts of like length reach with flash attention, by experience
CHARACTERS_PER_TOKEN = 4.0  # English; German or Russian text has two to three, Chinese one


@dataclass(frozen=True)
class Cost:
    """Texts and tokens that a task embeds, documents as they are and all others with a prompt."""

    task: str
    kind: str
    texts: int
    tokens: int


def task_cost(task: AbsTask, max_seq_length: int, prompt_tokens: int) -> Cost | None:
    """By mteb's statistics of the task's splits; None where it has none.

    Each kind of text counts with its average length, cut at `max_seq_length`: where lengths differ much this is more
    than the truth. Classification draws its training texts from a split that is not counted: some percent.
    """
    splits = task.metadata.descriptive_stats or {}
    texts, tokens = 0, 0.0
    for split in task.eval_splits:
        of_split = splits.get(split, {})
        subsets = of_split.get("hf_subset_descriptive_stats") or {"default": of_split}
        wanted = set(getattr(task, "hf_subsets", None) or subsets) & set(subsets) or set(subsets)
        for subset in wanted:
            for name, number, average in text_statistics(subsets[subset]):
                longest = average / CHARACTERS_PER_TOKEN + (0 if name.startswith("documents") else prompt_tokens)
                texts += number
                tokens += number * min(longest, max_seq_length)
    return Cost(task.metadata.name, task.metadata.type, texts, round(tokens)) if texts else None


def text_statistics(statistics: Mapping[str, Any]) -> Iterable[tuple[str, int, float]]:
    """Name, number of texts and average characters of each kind of text.

    >>> one = {"total_text_length": 60, "average_text_length": 20.0, "unique_texts": 2}
    >>> list(text_statistics({"num_samples": 3, "text_statistics": one, "image_statistics": None}))
    [('text_statistics', 3, 20.0)]
    """
    for name, of_kind in statistics.items():
        if isinstance(of_kind, dict) and of_kind.get("average_text_length"):
            average = of_kind["average_text_length"]
            yield name, round(of_kind["total_text_length"] / average), average


def hours(tokens: int, parameters: int) -> dict[str, float]:
    """Device -> hours of 2 FLOP a parameter and token at UTILISATION of its peak.

    >>> hours(10**9, 7 * 10**9)["A100"] == 14e18 / (0.4 * 312e12) / 3600
    True
    """
    return {device: 2 * parameters * tokens / (UTILISATION * peak) / 3600 for device, peak in PEAKS.items()}


def format_cost(tasks: Sequence[AbsTask], parameters: int, max_seq_length: int, prompt_tokens: int) -> str:
    """Texts, tokens and hours by task type, and which tasks mteb has no counts of.

    `parameters`: without those of token embeddings, which cost no multiplication.
    """
    costs = {task.metadata.name: task_cost(task, max_seq_length, prompt_tokens) for task in tasks}
    known = [cost for cost in costs.values() if cost]
    kinds = sorted({cost.kind for cost in known})
    rows = []
    for kind in [*kinds, "all"]:
        chosen = [cost for cost in known if kind in (cost.kind, "all")]
        tokens = sum(cost.tokens for cost in chosen)
        counts = [kind, str(len(chosen)), f"{sum(cost.texts for cost in chosen):,}", f"{tokens / 1e6:,.1f} M"]
        rows.append([*counts, *(f"{spent:,.2f}" for spent in hours(tokens, parameters).values())])
    titles = ["type", "tasks", "texts", "tokens", *(f"{device} hours" for device in PEAKS)]
    unknown = [name for name, cost in costs.items() if cost is None]
    below = (
        f"An estimate: mteb's counts, texts cut at {max_seq_length} tokens, {CHARACTERS_PER_TOKEN:.0f} characters a "
    )
    below += f"token, {UTILISATION:.0%} of the dense bfloat16 peak, {parameters / 1e6:,.0f} M parameters."
    if unknown:
        below += f" Without counts, not in it: {', '.join(unknown)}."
    return f"{markdown_table(titles, rows)}\n\n{below}"
