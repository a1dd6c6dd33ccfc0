"""The collator: demonstrations in prompts, and known positives of queries.

All rows of a batch share one prompt, so that its states are computed once (modeling.shared_prefix). Its demonstrations
are a function of the seed and of the batch's texts: a resumed run, and every data loader's worker, make the same.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from transformers import PreTrainedTokenizerBase

from common.cli import InputError
from modeling.batches import LABEL
from modeling.losses import MISSING, POSITIVES, text_keys
from modeling.prompts import QUERY_TEMPLATE, few_shot_prompt, instruction_prompt

_TRIES = 100  # rows tried for one shot, before a batch goes with fewer
_SAMPLE = 1000  # rows tried for all shots of a saved prompt, or looked at for how many would fit
Shots = Sequence[tuple[str, str]]  # (query, positive)
Count = Callable[[Sequence[str]], Sequence[int]]  # tokens of whole strings
Fits = Callable[[Shots, int], bool]  # whether some shots, of so many that are wanted, take no more than their share


def counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[str]], list[int]]:
    """What counts the tokens of whole strings, special ones included."""
    return lambda strings: [len(ids) for ids in tokenizer(list(strings), verbose=False)["input_ids"]]


@dataclass(frozen=True)
class Demonstrations:
    """Where the batches of a data set get demonstrations from. Raises InputError without query and positive."""

    rows: Dataset  # for training
    instruction: str  # of the prompt that the shots stand before
    shots: int  # the most in a prompt; a batch that has any gets 1 to `shots`, each number as often as the others
    shots_budget: int | None = None  # the most tokens of a whole prompt; None = as leave the texts of a batch whole
    zero_shot_probability: float = 0.0  # of a batch without shots
    seed: int = 0
    template: str = QUERY_TEMPLATE  # of the instruction's prompt, see modeling.prompts

    def __post_init__(self) -> None:
        missing = {"query", "positive"} - set(self.rows.column_names)
        if missing:
            raise InputError(f"shots: rows without column {min(missing)!r} make no demonstrations; drop shots")

    def draw(self, texts: Collection[str], fits: Fits = lambda *_: True) -> list[tuple[str, str]]:
        """(query, positive) of 0 to `shots` rows that share no text with each other or with `texts`, the batch's.

        So no shot is a row of the batch or gives away its positive. There are fewer where such rows, and rows that
        `fits` takes, are hard to find.
        """
        generator = random.Random("\0".join([str(self.seed), *sorted(texts)]))
        if generator.random() < self.zero_shot_probability:
            return []
        count = generator.randint(1, self.shots)
        seen, drawn = set(texts), []
        for _ in range(_TRIES * count):
            row = self.rows[generator.randrange(len(self.rows))]
            shot = (row["query"], row["positive"])
            if seen.isdisjoint(shot) and fits([*drawn, shot], count):
                drawn.append(shot)
                seen.update(shot)
            if len(drawn) == count:
                break
        return drawn

    def room(self, texts: Sequence[str], count_tokens: Count, max_seq_length: int) -> Fits:
        """An equal share each of the tokens that the budget, and the longest of `texts` after the bare instruction,
        leave to all shots.
        """
        prompt = instruction_prompt(self.instruction, self.template)
        bare, *whole = count_tokens([prompt, *(prompt + text for text in texts)])
        most = bare + max_seq_length - max(whole)
        return self._share_of(most if self.shots_budget is None else min(most, self.shots_budget), count_tokens)

    def _share_of(self, most: int, count_tokens: Count) -> Fits:
        """An equal share each of what the bare instruction leaves of a prompt of `most` tokens."""
        [bare] = count_tokens([instruction_prompt(self.instruction, self.template)])

        def fits(shots: Shots, count: int) -> bool:
            [length] = count_tokens([few_shot_prompt(self.instruction, shots, self.template)])
            return length - bare <= (most - bare) * len(shots) / count

        return fits

    def freeze(self, shots: int, count_tokens: Count, max_tokens: int) -> list[tuple[str, str]]:
        """(query, positive) of exactly `shots` rows, for the few-shot prompt that a saved model carries.

        A function of the rows and the seed: rows are tried in a random order, and taken if they fit. Each shot may
        take an equal share of `max_tokens` (of the prompt, instruction and special tokens included) and what those
        before it left. `count_tokens` counts whole strings. Raises InputError when not so many rows fit.
        """
        fits, drawn = self._share_of(max_tokens, count_tokens), []
        for shot in self._sample():
            if shot[0] == shot[1] or not {text for pair in drawn for text in pair}.isdisjoint(shot):
                continue
            if fits([*drawn, shot], shots):
                drawn.append(shot)
            if len(drawn) == shots:
                return drawn
        raise InputError(
            f"prompt_shots is {shots}: only {len(drawn)} fit into {max_tokens} tokens, of {len(self.rows):,} rows; "
            "raise shots_budget (or max_seq_length, half of which is the default), or lower prompt_shots"
        )

    def share_that_fits(self, count_tokens: Count, max_tokens: int) -> float:
        """The share, from 0 to 1, of the rows whose prompt of one shot has at most `max_tokens`; of a sample of them.

        Where it is low, all shots are short rows, and batches may find fewer than they want; at 0 they find none.
        """
        lengths = count_tokens([few_shot_prompt(self.instruction, [shot], self.template) for shot in self._sample()])
        return sum(length <= max_tokens for length in lengths) / len(lengths)

    def _sample(self) -> Iterator[tuple[str, str]]:
        """(query, positive) of rows in a random order that depends on the seed alone."""
        for position in random.Random(self.seed).sample(range(len(self.rows)), min(_SAMPLE, len(self.rows))):
            row = self.rows[position]
            yield row["query"], row["positive"]

    def fit(self, shots: Shots, texts: Sequence[str], count_tokens: Count, max_seq_length: int) -> str:
        """The few-shot prompt with as many of `shots`, from the first on, as cost none of `texts` a token. A text too
        long even after the bare instruction gets no shots, nor do those beside it in the batch.

        `count_tokens` counts whole strings, special tokens included: prompt and text as the one string that the
        tokenizer gets, as counted apart tokens at the boundary would come out otherwise.
        """
        for count in range(len(shots), 0, -1):
            prompt = few_shot_prompt(self.instruction, shots[:count], self.template)
            length, *whole = count_tokens([prompt, *(prompt + text for text in texts)])
            if max(whole) <= max_seq_length and (self.shots_budget is None or length <= self.shots_budget):
                return prompt
        return instruction_prompt(self.instruction, self.template)


@dataclass
class DemonstrationCollator(SentenceTransformerDataCollator):
    """sentence-transformers' collator, which also adds demonstrations to prompts, and known positives to queries.

    All prompted columns of a batch get the same prompt, of its own where its data set has demonstrations. The query
    column gets text keys of its queries and of their known positives, (B, P), by which `modeling.losses.GradedLoss`
    tells what is no negative; they are made of the same tokens as those of the positive column.
    """

    # tells what fits: its tokenizer, and its max_seq_length at the time of the batch
    model: SentenceTransformer | None = field(default=None, repr=False)
    demonstrations: Mapping[str, Demonstrations] = field(default_factory=dict, repr=False)  # by data set
    # by data set, texts of all positives by query: modeling.training_data.known_positives
    positives: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict, repr=False)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        self._prompts_of_batch = self.choose_prompts(features)
        batch = super().__call__(features)
        if "query" in features[0]:
            known = self.positives.get(features[0].get("dataset_name"), {})
            # and the query's own text, which is no negative of it either where queries are documents
            positives = [[*known.get(row["query"], ()), row["query"]] for row in features]
            batch[f"query_{POSITIVES}"] = self._keys_of(positives, self._resolve_prompts(batch))
        return batch

    def _keys_of(self, texts: Sequence[Sequence[str]], prompts: str | dict[str, str] | None) -> torch.Tensor:
        """(rows, most texts of a row) text keys of texts of the column `positive`."""
        distinct = list(dict.fromkeys(itertools.chain.from_iterable(texts)))
        keys = text_keys(self.preprocess_fn(distinct, prompt=self._get_prompt_for_column(prompts, "positive")))
        key_of = dict(zip(distinct, keys.tolist(), strict=True))
        width = max(map(len, texts))
        return torch.tensor([[*map(key_of.get, row), *[MISSING] * (width - len(row))] for row in texts])

    def _resolve_prompts(self, batch: dict[str, Any]) -> str | dict[str, str] | None:
        return self._prompts_of_batch or super()._resolve_prompts(batch)

    def choose_prompts(self, features: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
        """Column -> prompt for the rows of a batch; None if their data set has no demonstrations."""
        name = features[0].get("dataset_name")
        demonstrations = self.demonstrations.get(name)
        if demonstrations is None:
            return None
        columns = [column for column in features[0] if column not in ("dataset_name", LABEL)]
        prompted = [column for column in columns if column in self.prompts[name]]
        texts = [row[column] for row in features for column in prompted]
        reads = counter(self.model.tokenizer), self.model.max_seq_length
        fits = demonstrations.room(texts, *reads)
        shots = demonstrations.draw({row[column] for row in features for column in columns}, fits)
        prompt = demonstrations.fit(shots, texts, *reads)
        return dict.fromkeys(prompted, prompt)
