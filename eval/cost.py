"""What a benchmark costs, before it runs: tokens by mteb's own counts of texts, hours by arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from common.tables import markdown_table

if TYPE_CHECKING:
    from mteb import AbsTask
    from sentence_transformers import SentenceTransformer

# Dense bfloat16 peak in FLOP/s, from NVIDIA's data sheets (without sparsity)
PEAKS = {"L4": 121e12, "A100": 312e12, "H100 SXM": 989e12}
UTILISATION = 0.4  # of the peak: what large batches of texts of like length reach with flash attention, by experience
CHARACTERS_PER_TOKEN = 4.0  # English; German or Russian text has two to three, Chinese one


class Cost(NamedTuple):
    """What a task embeds: documents as they are, all others with a prompt."""

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
        for subset in set(task.hf_subsets or subsets) & set(subsets) or subsets:
            for name, number, average in text_statistics(subsets[subset]):
                longest = average / CHARACTERS_PER_TOKEN + (0 if name.startswith("documents") else prompt_tokens)
                texts += number
                tokens += number * min(longest, max_seq_length)
    return Cost(texts, round(tokens)) if texts else None


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


def format_cost(model: SentenceTransformer, tasks: Sequence[AbsTask]) -> str:
    """Texts, tokens and hours by task type, and which tasks mteb has no counts of."""
    from modeling.encoder import UNLIMITED

    parameters = sum(weight.numel() for weight in model.parameters())
    backbone = getattr(model[0], "model", model[0])
    if hasattr(backbone, "get_input_embeddings"):  # looked up, not multiplied
        parameters -= backbone.get_input_embeddings().weight.numel()
    length = model.max_seq_length or UNLIMITED
    prompts = [len(prompt) for prompt in model.prompts.values() if prompt]
    prompt_tokens = round(sum(prompts) / max(len(prompts), 1) / CHARACTERS_PER_TOKEN)
    costs = {task: task_cost(task, length, prompt_tokens) for task in tasks}
    known = {task: cost for task, cost in costs.items() if cost}
    rows = []
    for kind in [*sorted({task.metadata.type for task in known}), "all"]:
        chosen = [cost for task, cost in known.items() if kind in (task.metadata.type, "all")]
        texts, tokens = (sum(counts) for counts in zip(*chosen, strict=True)) if chosen else (0, 0)
        spent = [f"{value:,.2f}" for value in hours(tokens, parameters).values()]
        rows.append([kind, str(len(chosen)), f"{texts:,}", f"{tokens / 1e6:,.1f} M", *spent])
    titles = ["type", "tasks", "texts", "tokens", *(f"{device} hours" for device in PEAKS)]
    below = (
        f"An estimate: mteb's counts, texts cut at {length} tokens, {CHARACTERS_PER_TOKEN:.0f} characters a token, "
    )
    below += f"{UTILISATION:.0%} of the dense bfloat16 peak, {parameters / 1e6:,.0f} M parameters."
    if unknown := [task.metadata.name for task in tasks if task not in known]:
        below += f" Without counts, not in it: {', '.join(unknown)}."
    return f"{markdown_table(titles, rows)}\n\n{below}"
