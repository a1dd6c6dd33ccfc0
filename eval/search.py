"""Ask a model a question: the documents of a data folder that answer it best.

    python -m eval.search --model runs/demo/model --data runs/demo/data "how do I parse a date"
    python -m eval.search --model runs/demo/model --data runs/demo/data --hybrid 0.4 "how do I parse a date"

The documents' vectors are kept under DATA/embeddings, by the hash of the model and of the texts: the first question
waits for them, the next ones do not. --hybrid adds the build's BM25, whose index is kept there, too, with the weight
that `eval.retrieval` printed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.cli import ArgumentParser, InputError, at_least_1, run
from common.steps import fingerprint, folder_step, read_manifest
from dataset_builders.bm25 import Bm25, tokenise
from dataset_builders.dense import dense_top_k
from dataset_builders.embeddings import Embedder, load_model
from dataset_builders.fusion import convex_fusion
from eval.held_out import DEPTH, Documents, load_documents
from eval.systems import encoder_section


class Result(NamedTuple):
    """`score`: by the model's own similarity; of a hybrid search the fused score, in [0, 1]."""

    score: float
    document_id: str
    text: str


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    documents, found_by = load_documents(args.data), read_manifest(args.data / "candidates")["inputs"]
    bm25, language = Bm25(**found_by.get("bm25", {})), found_by.get("language")
    cache = args.data / "embeddings"
    print(format_results(search(args.model, args.question, documents, cache, args.top_k, args.hybrid, bm25, language)))


def _parse(argv: Sequence[str]):
    parser = ArgumentParser(prog="python -m eval.search", description=__doc__)
    parser.add_argument("question")
    parser.add_argument("--model", required=True, help="folder of a model, Hub id or package:NAME")
    parser.add_argument("--data", required=True, type=Path, help="folder that dataset_builders.build wrote")
    parser.add_argument("--top_k", type=at_least_1, default=5, help="documents to show (default: 5)")
    parser.add_argument("--hybrid", type=float, metavar="WEIGHT", help="weight of BM25 in the score, in [0, 1]")
    args = parser.parse_args(argv)
    if not args.question.strip():
        raise InputError("the question is empty; ask one in words")
    try:
        args.question.encode()
    except UnicodeEncodeError:  # bytes on the command line that are no UTF-8
        raise InputError(f"the question {args.question!r} is not UTF-8; write it in that") from None
    if args.hybrid is not None and not 0 <= args.hybrid <= 1:
        raise InputError(f"--hybrid {args.hybrid}: use a weight from 0 to 1")
    return args


def search(
    model: str,
    question: str,
    documents: Documents,
    cache: Path,
    top_k: int,
    hybrid: float | None = None,
    bm25: Bm25 | None = None,
    language: str | None = None,
) -> list[Result]:
    """The `top_k` documents nearest to `question`, best first; with `hybrid`, BM25 has that weight in the score."""
    from sentence_transformers import SentenceTransformer

    section = encoder_section(model)
    ids, texts = list(documents), list(documents.values())
    vectors = Embedder(section, cache).documents(texts)
    # not through the cache: a question is asked once
    encoder = load_model(SentenceTransformer, section)
    by_dot = encoder.similarity_fn_name == "dot"  # as the Embedder has it
    question_vector = encoder.encode_query([question], normalize_embeddings=not by_dot)
    positions, scores = dense_top_k(question_vector, vectors, top_k if hybrid is None else max(top_k, DEPTH))
    best = list(zip(positions[0].tolist(), scores[0].tolist(), strict=True))
    if hybrid is not None:
        sparse = search_bm25(question, texts, max(top_k, DEPTH), bm25 or Bm25(), language, cache)
        best = convex_fusion(sparse, dict(best), hybrid, top_k)
    return [Result(score, ids[position], texts[position]) for position, score in best]


def search_bm25(
    question: str, texts: Sequence[str], top_k: int, section: Bm25, language: str | None, cache: Path
) -> dict[int, float]:
    """Positions and BM25 scores of the documents that share a word with `question`, at most `top_k`.

    bm25s's index is kept below `cache`; rank_bm25's, which is there to compare with, is made for every question.
    """
    [asked] = tokenise([question], language)
    if section.backend == "rank_bm25":
        from rank_bm25 import BM25Okapi

        index = BM25Okapi(tokenise(texts, language), k1=section.k1, b=section.b)
    else:
        import bm25s

        inputs = {"k1": section.k1, "b": section.b, "language": language, "texts": fingerprint(list(texts))}
        with folder_step(cache / fingerprint({"bm25s": inputs}), inputs) as step:
            if not step.done:
                index = bm25s.BM25(k1=section.k1, b=section.b)
                index.index(tokenise(texts, language), show_progress=False)
                index.save(step.path)
                step.finish()
        index = bm25s.BM25.load(step.folder, mmap=True)
    scores = index.get_scores(asked) if asked else np.zeros(len(texts))  # bm25s fails on a question of stop words
    best = (-scores).argsort(kind="stable")[:top_k].tolist()
    return {position: float(scores[position]) for position in best if scores[position] > 0}


def format_results(results: Sequence[Result]) -> str:
    """Rank, score and id on one line, the beginning of the text below it."""
    lines = []
    for rank, result in enumerate(results, start=1):
        snippet = textwrap.shorten(result.text, width=220, placeholder=" ...")
        lines += [
            f"{rank}. {result.score:.3f}  {result.document_id}",
            *textwrap.wrap(snippet, width=110, initial_indent="   ", subsequent_indent="   "),
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
