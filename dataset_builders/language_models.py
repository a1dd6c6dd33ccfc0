"""Instruct models that answer chats, shard by shard: in this process by transformers, or behind an OpenAI address."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from common.cli import InputError, Unfinished
from dataset_builders.embeddings import count_tokens, load_model, longest_first, token_batches
from dataset_builders.near_duplicates import stable_hash

if TYPE_CHECKING:
    from dataset_builders.generate import Generate

TRIES, WAIT = 6, 2.0  # of a request, and the seconds after the first, which double
ADVICE = "start the server, check the address (it ends in /v1, as a rule) and OPENAI_API_KEY"
TIMEOUT = 600  # seconds for an answer
Chat = list[dict[str, str]]  # messages: role, content


@dataclass(frozen=True)
class Writer:
    """Shard i: the answers to the i-th `size` of `chats`, and whether each was cut at its limit."""

    size: ClassVar[int]  # what a killed process loses at most

    section: Generate
    chats: tuple[Chat, ...] = ()

    def __call__(self, number: int) -> np.ndarray:
        answers = list(self.answers(self.chats[number * self.size : (number + 1) * self.size], number))
        # the last line of an answer that was cut is half a query
        whole = [(text.rpartition("\n")[0] if is_cut else text, is_cut) for text, is_cut in answers]
        return np.array(whole, [("text", f"U{max(1, *(len(text) for text, _ in whole))}"), ("is_cut", "?")])


class LocalModel(Writer):
    """By transformers, in this process: batches padded on the left, sampling seeded by the shard."""

    size = 16  # a minute or so of a small model on a CPU

    def check(self) -> None:
        causal_model(self.section)

    def answers(self, chats: Sequence[Chat], number: int) -> list[tuple[str, bool]]:
        import torch
        from transformers import GenerationConfig

        section, (model, tokenizer) = self.section, causal_model(self.section)
        # thinking first is a choice of Qwen3's and its relatives' templates; others do not know the word
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        prompts = [tokenizer.apply_chat_template(turns, **options) for turns in chats]
        lengths, found = count_tokens(tokenizer, prompts) + section.limit, [("", False)] * len(chats)
        order, ends = longest_first(lengths), model.generation_config.eos_token_id
        settings = GenerationConfig(
            max_new_tokens=section.limit,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
            **({"do_sample": True, "temperature": section.temperature, "top_k": 0} if section.temperature else {}),
        )
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(stable_hash(section.seed, number) % 2**63)
            for batch in token_batches(lengths[order], section.batch_tokens):
                rows = order[batch]
                inputs = tokenizer(
                    [prompts[row] for row in rows], return_tensors="pt", padding=True, add_special_tokens=False
                ).to(model.device)
                made = model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :].cpu()
                is_cut = ~np.isin(made, [] if ends is None else ends).any(axis=1)
                for row, tokens, cut in zip(rows, made, is_cut, strict=True):
                    found[row] = tokenizer.decode(tokens, skip_special_tokens=True), bool(cut)
        return found


@lru_cache(maxsize=1)
def causal_model(section: Generate) -> tuple[Any, Any]:
    """Model and tokenizer, which pads on the left. Raises InputError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(path: str, revision: str | None, model_kwargs: dict[str, Any]) -> tuple[Any, Any]:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, padding_side="left")
        if not tokenizer.chat_template:
            raise InputError(f"source.queries.model {section.model!r} has no chat template; name an instruct model")
        return AutoModelForCausalLM.from_pretrained(path, revision=revision, **model_kwargs), tokenizer

    model, tokenizer = load_model(load, section)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


class Server(Writer):
    """By a server's chat completions: POST ADDRESS/chat/completions."""

    size = 256  # requests of a shard go out together

    @cached_property
    def name(self) -> str:
        """The model's. Raises InputError where the recipe names none, and the server does not either."""
        try:
            return self.section.served_model or self._request("models", None, 1)["data"][0]["id"]
        except (Unfinished, KeyError, IndexError, TypeError) as error:
            reason = str(error) if isinstance(error, Unfinished) else "it lists no model"
            raise InputError(f"source.queries.model: {reason}; {ADVICE}, or name served_model") from None

    def check(self) -> None:
        try:
            self._ask([{"role": "user", "content": "Say yes."}], 0, 1, tries=1)
        except Unfinished as error:  # nothing was made yet that could be gone on with
            raise InputError(f"source.queries.model: {error}; {ADVICE} and served_model") from None

    def answers(self, chats: Sequence[Chat], number: int) -> list[tuple[str, bool]]:
        seeds = [stable_hash(self.section.seed, number, place) % 2**31 for place in range(len(chats))]
        with ThreadPoolExecutor(self.section.requests) as pool:
            return list(pool.map(lambda turns, seed: self._ask(turns, seed, self.section.limit), chats, seeds))

    def _ask(self, turns: Chat, seed: int, limit: int, tries: int = TRIES) -> tuple[str, bool]:
        body = {"model": self.name, "messages": turns, "max_tokens": limit, "seed": seed}
        answer = self._request("chat/completions", {**body, "temperature": self.section.temperature}, tries)
        try:
            choice = answer["choices"][0]
            return choice["message"]["content"] or "", choice.get("finish_reason") == "length"
        except (KeyError, IndexError, TypeError):
            raise Unfinished(f"{self.section.model}: what it answers is no chat completion") from None

    def _request(self, route: str, body: dict[str, Any] | None, tries: int) -> Any:
        """What the server answers. Raises Unfinished when it does not, or refuses."""
        key, url = os.environ.get("OPENAI_API_KEY"), f"{self.section.model.rstrip('/')}/{route}"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        for wait in (WAIT * 2**place for place in range(tries)):
            try:
                with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=TIMEOUT) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {error.read(500).decode(errors='replace').strip() or error.reason}"
                if error.code < 500 and error.code not in (408, 409, 429):
                    break  # asking again would not help
            except (OSError, ValueError) as error:
                reason = str(getattr(error, "reason", error))
            if tries > 1:
                time.sleep(wait)
        again = f" ({tries} times); run the same command again when it answers: it goes on" if tries > 1 else ""
        raise Unfinished(f"{url}: {reason}{again}")
