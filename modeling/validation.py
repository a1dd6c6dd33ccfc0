"""The searches that a stage is validated with while it trains, by sentence-transformers' evaluators."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, NanoBEIREvaluator
from sentence_transformers.util import cos_sim
from tqdm import tqdm

from common.cli import InputError, at
from modeling.processes import processes
from modeling.recipe import Stage
from modeling.training_data import Source

VALIDATION = "validation"


class SearchEvaluator(InformationRetrievalEvaluator):
    """sentence-transformers', with a bar that says what is embedded where that takes a while."""

    shows_bar = False

    def embed_inputs(self, model: SentenceTransformer, sentences: Sequence[str], **keywords: Any) -> torch.Tensor:
        step, parts = 16 * self.batch_size, []
        bar = {"desc": f"evaluate {self.name}", "unit": " texts", "leave": False, "delay": 2}
        with tqdm(total=len(sentences), disable=not self.shows_bar, **bar) as progress:
            for start in range(0, len(sentences), step):
                parts.append(super().embed_inputs(model, sentences[start : start + step], **keywords))
                progress.update(len(parts[-1]))
        return torch.cat(parts)


class NanoEvaluator(NanoBEIREvaluator):
    information_retrieval_class = SearchEvaluator


def load_validation(stage: Stage, sources: Mapping[str, Source]) -> list[SearchEvaluator]:
    """nDCG@10 (and MRR, MAP, recall at 10) by sentence-transformers, on a sample of the searches of each data set that
    publishes any, once where several entries read one data set, and on the whole sets of key `nanobeir`.
    """
    own, training = stage.own, stage.training
    settings = {
        "accuracy_at_k": [10],
        "precision_recall_at_k": [10],
        "map_at_k": [10],
        "batch_size": training.per_device_eval_batch_size,
        "write_csv": False,
        "score_functions": {"cosine": cos_sim},
    }
    evaluators = []
    for name in {source.key: name for name, source in sources.items()}.values():
        source, several = sources[name], len(sources) > 1
        with at(stage.place(name)):
            if several and "qrels" not in source.configs():
                continue  # graded pairs have nothing to search
            tables = [source.read(config) for config in ("queries", "documents", "qrels")]
            sample = search_sample(*tables, own.eval_queries, own.eval_documents, training.seed)
        title = f"validation_{name}" if several else "validation"
        evaluators.append(SearchEvaluator(*sample, name=title, **settings))
    if own.nanobeir:
        try:
            evaluators += NanoEvaluator([*own.nanobeir], **settings).evaluators
        except ValueError as error:  # no such set, or none that the Hub served
            reason = " ".join(str(error.__cause__ or error).split())
            raise InputError(
                f"stage {stage.name!r}: nanobeir {', '.join(own.nanobeir)}: {reason}; it needs the Hub, or its sets "
                "in the cache: leave the key out without them"
            ) from None
    if not evaluators:
        raise InputError(f"stage {stage.name!r}: no data set to evaluate on has qrels; set eval_strategy: 'no'")
    metric, names = training.metric_for_best_model, [evaluator.name for evaluator in evaluators]
    measures = "ndcg|mrr|map|recall|precision|accuracy"
    if metric and not any(re.fullmatch(rf"(eval_)?{name}_cosine_({measures})@10", metric) for name in names):
        measured = " or ".join(f"eval_{name}_cosine_ndcg@10" for name in names)
        raise InputError(
            f"stage {stage.name!r}: metric_for_best_model is {metric!r}; evaluations measure {measured}, or mrr, map, "
            "recall, precision and accuracy instead of ndcg"
        )
    for evaluator in evaluators:
        evaluator.shows_bar = processes().is_main_process and not training.disable_tqdm
    return evaluators


class SearchSample(NamedTuple):
    """Queries, the documents they search, and which are relevant: what sentence-transformers' evaluator takes."""

    queries: dict[str, str]
    documents: dict[str, str]
    relevant: dict[str, set[str]]


def search_sample(
    queries: Dataset, documents: Dataset, qrels: Dataset, max_queries: int, max_documents: int, seed: int
) -> SearchSample:
    """A seeded sample of the validation queries, and of documents with all of their relevant ones in it.

    Raises InputError without a validation split, or for qrels with ids that are not in the other two.
    """
    relevant: dict[str, set[str]] = {}
    for row in qrels:
        if row["split"] == VALIDATION and row["score"] > 0:
            relevant.setdefault(row["query_id"], set()).add(row["document_id"])
    if not relevant:
        raise InputError(f"its qrels have no split {VALIDATION!r} to evaluate on; set eval_strategy: 'no'")
    texts = dict(zip(queries["query_id"], queries["text"], strict=True))
    corpus = dict(zip(documents["document_id"], documents["text"], strict=True))
    generator = random.Random(seed)
    chosen = sorted(generator.sample(sorted(relevant), min(max_queries, len(relevant))))
    relevant = {query_id: relevant[query_id] for query_id in chosen}
    needed = sorted(set().union(*relevant.values()))
    for kind, ids, known in (("query", chosen, texts), ("document", needed, corpus)):
        unknown = [name for name in ids if name not in known]
        if unknown:
            raise InputError(f"its qrels name {kind} {unknown[0]!r}, which is not in its other configs")
    others = sorted(corpus.keys() - set(needed))
    searched = {*needed, *generator.sample(others, min(max(max_documents - len(needed), 0), len(others)))}
    return SearchSample(
        {query_id: texts[query_id] for query_id in chosen},
        {name: text for name, text in corpus.items() if name in searched},
        relevant,
    )
