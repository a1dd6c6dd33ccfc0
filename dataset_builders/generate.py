"""Documents alone -> queries: an instruct model writes what somebody might ask of them (`source.queries`).

    source: {kind: local, path: handbook.csv, holdout: 0.1, queries: {kind: generate, model: org/instruct-model}}

A few examples and the recipe's instruction make the prompt, as in InPars (arXiv 2202.05144), Promptagator (2209.11755)
and Gecko (2403.20327). The model runs here by transformers, or behind an address that speaks OpenAI's chat
completions (vLLM, llama.cpp, TGI, ...; the key, if it wants one, in OPENAI_API_KEY). generated/ keeps what it wrote,
word for word; round_trip.py reads the queries out of it and keeps those that find their document again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import polars as pl
import pyarrow as pa
from pydantic import Field

from common.models import check_model_folder, resolve_model
from common.recipes import Section
from common.steps import write_parquet
from dataset_builders.engines import compute_shards
from dataset_builders.language_models import LocalModel, Server, causal_model
from dataset_builders.languages import Language, language_name
from dataset_builders.near_duplicates import in_blocks, normalised, stable_hash, text_keys

if TYPE_CHECKING:
    from dataset_builders.build_record import Build

SHORTEST, LONGEST = 6, 200  # characters of a query
COPIED = 25  # characters from which a query that stands in its document word for word is a copied passage
OUTPUTS = pa.schema([("document_id", pa.string()), ("output", pa.string())])
PROMPT = (
    "Document: {document}\n\nTask of the search: {instruction}.\nWrite {number} different queries that this document "
    "answers{language}, one a line and nothing else, as somebody would type them who has not seen it."
)
_NUMBER = re.compile(r"^(\W*(query|question)?\s*\d+\s*[.):](?=\D)|[-*•]|\W*(query|question)\s*:)", re.IGNORECASE)
# Of a task's own documents a few are better: source.queries.examples.
EXAMPLES = {
    "The Baltic herring spawns in spring in shallow coastal waters. Young fish stay near the shore until autumn, when "
    "they move to deeper water to feed on plankton.": (
        "when do baltic herring spawn",
        "what do young herring eat after their first summer",
    ),
    "Switch the pump off and close both valves. Turn the housing to the left, take the old filter out and rinse the "
    "seal before the new one goes in. Change the filter every six months.": (
        "how often does a pump filter need replacing",
        "steps to change the filter of a water pump",
    ),
}


class Example(Section):
    document: str
    queries: tuple[str, ...] = Field(min_length=1)


class Generate(Section):
    """Queries that an instruct model writes for documents that have none."""

    kind: Literal["generate"]  # whose keys these are
    # an instruct model (Hub id, folder, GGUF file, package:NAME), or the address of a server: http://localhost:8000/v1
    model: str = Field(min_length=1)
    served_model: str | None = None  # the model's name at an address; null: the first that the server lists
    documents: int | None = Field(None, ge=1)  # that get queries, drawn by `seed`; null: all. All are searched
    per_document: int = Field(2, ge=1, le=100)  # queries asked for
    # A query stays if its document is among the first so many: 1 would keep what both retrievers find anyway, and a
    # reader looks at ten.
    keep_within: int = Field(10, ge=1)
    examples: tuple[Example, ...] = ()  # {document, queries} in the prompt, of your own kind; empty: two general ones
    max_characters: int = Field(2000, ge=100)  # of a document in the prompt; the rest is cut, and counted
    max_new_tokens: int | None = Field(None, ge=8)  # of an answer; null: 32 a query. A model that thinks needs more
    temperature: float = Field(0.7, ge=0, le=2)  # 0: the likeliest words
    seed: int = Field(0, ge=0)  # of the documents drawn and of the sampling
    requests: int = Field(8, ge=1, le=1000)  # to an address at a time
    batch_tokens: int = Field(8192, ge=8)  # padded tokens in a batch, answers included
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of the weights

    @property
    def is_address(self) -> bool:
        return self.model.startswith(("http://", "https://"))

    @property
    def limit(self) -> int:
        """Tokens of an answer."""
        return self.max_new_tokens or 32 * self.per_document

    def describe(self) -> dict[str, Any]:
        """What decides the texts. Raises InputError for a model that is not there, or an address without an answer."""
        keys = self.model_dump(mode="json", exclude={"keep_within", "requests", "batch_tokens", "served_model"})
        if self.is_address:
            return {**keys, "model": Server(self).name}
        model = resolve_model(self.model)
        if model.is_local:
            check_model_folder(Path(model.name_or_path))
        return {**keys, "model": model.fingerprint()}


# --- prompts and answers --------------------------------------------------------------------------------------------


def chat(section: Generate, instruction: str, language: Language | None, document: str) -> list[dict[str, str]]:
    """The messages for one document: the examples as turns. No system message, which some templates refuse."""

    def question(text: str) -> dict[str, str]:
        own = f" in {language_name(language)}" if language else ""
        words = {"instruction": instruction.rstrip("."), "number": section.per_document, "language": own}
        return {"role": "user", "content": PROMPT.format(document=text, **words)}

    turns = []
    for text, queries in examples_of(section).items():
        answer = "\n".join(queries[: section.per_document])
        turns += [question(text), {"role": "assistant", "content": answer}]
    return [*turns, question(document[: section.max_characters])]


def examples_of(section: Generate) -> dict[str, Sequence[str]]:
    return {one.document: one.queries for one in section.examples} or EXAMPLES


def read_queries(output: str, document: str, section: Generate) -> Iterator[tuple[str, str | None]]:
    """The lines of a model's answer without numbers, bullets and quotes, and why each is no query (None: it is one).

    >>> section = Generate(kind="generate", model="x", per_document=1)
    >>> list(read_queries("Here you are:\\n1. How to fly?\\n2. How to land?", "Wings.", section))
    [('Here you are:', 'introduction'), ('How to fly?', None), ('How to land?', 'surplus')]
    """
    kept, text = set(), normalised(document)
    shown = {normalised(query) for queries in examples_of(section).values() for query in queries}
    for line in output.rpartition("</think>")[2].splitlines():
        query = " ".join(_NUMBER.sub("", line.strip()).strip(" \t\"'`*“”„").split())
        if not query:
            continue
        key = normalised(query)
        words = key.rstrip(".?!。？！ ")
        reasons = {
            "introduction": query.endswith((":", "：")),
            "too short": len(query) < SHORTEST,
            "too long": len(query) > LONGEST,
            "copied from the prompt": key in shown,
            "copied from the document": text.startswith(words) or (len(words) >= COPIED and words in text),
            "duplicate": key in kept,
            "surplus": len(kept) == section.per_document,
        }
        reason = next((reason for reason, holds in reasons.items() if holds), None)
        if reason is None:
            kept.add(key)
        yield query, reason


# --- the step -------------------------------------------------------------------------------------------------------


def write_generated(build: Build, documents: pl.DataFrame, folder: Path) -> dict[str, Any]:
    """Write outputs.parquet (OUTPUTS) into `folder`; returns counts for the manifest.

    documents: document_id, text. Raises InputError for a model without a chat template, and an address that refuses.
    """
    section, recipe = build.recipe.source.queries, build.recipe
    drawn = drawn_documents(documents, section)
    chats = [chat(section, recipe.instruction, recipe.source.language, text) for text in drawn["text"]]
    work = (Server if section.is_address else LocalModel)(section, tuple(chats))
    work.check()
    sizes = [min(work.size, len(chats) - start) for start in range(0, len(chats), work.size)]
    shards = compute_shards(
        work, sizes, folder / "outputs.shards", build.engine, description="write queries", unit="documents"
    )
    outputs = [str(text) for shard in shards for text in shard["text"]]
    causal_model.cache_clear()
    write_parquet(folder / "outputs.parquet", pa.table([drawn["document_id"].to_list(), outputs], schema=OUTPUTS))
    return {
        "documents": len(documents),
        "asked_about": len(drawn),
        "documents_cut": int((drawn["text"].str.len_chars() > section.max_characters).sum()),
        "answers_cut": sum(int(shard["is_cut"].sum()) for shard in shards),
        "served": section.is_address,
        "prompt": chat(section, recipe.instruction, recipe.source.language, "...")[-1]["content"],
        "examples": {text: list(queries) for text, queries in examples_of(section).items()},
    }


def drawn_documents(documents: pl.DataFrame, section: Generate) -> pl.DataFrame:
    """Those that get queries, in the order of a seeded hash: a larger number holds a smaller one's. No text twice."""
    unique = documents.with_columns(text_keys(documents["text"])).sort("document_id").unique("key", keep="first")
    order = [stable_hash(section.seed, name) for name in in_blocks(unique["document_id"])]
    drawn = unique.with_columns(order=pl.Series(order, dtype=pl.UInt64)).sort("order")[: section.documents]
    return drawn.select("document_id", "text")
