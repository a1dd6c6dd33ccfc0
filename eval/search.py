"""Ask a model a question: the documents of a data folder that answer it best.

    python -m eval.search --model runs/demo/model --data runs/demo/data "how do I parse a date"

The documents' embeddings are kept under DATA/embeddings, by the hash of the model and of the texts: the first question
waits for them, the next ones do not.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.cli import ArgumentParser, InputError, run
from dataset_builders.dense import dense_top_k
from dataset_builders.embeddings import Embedder, load_model
from eval.retrieval import Documents, encoder_as_saved, load_documents


class Hit(NamedTuple):
    """`score` is the cosine of question and document, in [-1, 1]."""

    score: float
    document_id: str
    text: str


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    documents = load_documents(Path(args.data))
    hits = search(args.model, args.question, documents, Path(args.data) / "embeddings", args.top_k)
    print(format_hits(hits))


def _parse(argv: Sequence[str]):
    parser = ArgumentParser(prog="python -m eval.search", description=__doc__)
    parser.add_argument("question")
    parser.add_argument("--model", required=True, help="folder of a model, Hub id or package:NAME")
    parser.add_argument("--data", required=True, help="folder that dataset_builders.build wrote")
    parser.add_argument("--top_k", type=int, default=5, help="documents to show (default: 5)")
    args = parser.parse_args(argv)
    if not args.question.strip():
        raise InputError("the question is empty; ask one in words")
    try:
        args.question.encode()
    except UnicodeEncodeError:  # bytes on the command line that are no UTF-8
        raise InputError(f"the question {args.question!r} is not UTF-8; write it in that") from None
    if args.top_k < 1:
        raise InputError(f"--top_k {args.top_k}: use 1 or more")
    return args


def search(model: str, question: str, documents: Documents, cache: Path, top_k: int) -> list[Hit]:
    """The `top_k` documents nearest to `question`, best first (all of them where there are fewer)."""
    from sentence_transformers import SentenceTransformer

    section = encoder_as_saved(model)
    vectors = Embedder(section, cache).documents(documents.texts)
    # the question itself is not worth a place in the cache
    question_vector = load_model(SentenceTransformer, section).encode_query([question], normalize_embeddings=True)
    positions, scores = dense_top_k(question_vector, vectors, top_k)
    return [
        Hit(float(score), documents.ids[position], documents.texts[position])
        for position, score in zip(positions[0], scores[0], strict=True)
    ]


def format_hits(hits: Sequence[Hit]) -> str:
    """Rank, score and id on one line, the beginning of the text below it."""
    lines = []
    for rank, hit in enumerate(hits, start=1):
        snippet = textwrap.shorten(hit.text, width=220, placeholder=" ...")
        lines += [
            f"{rank}. {hit.score:.3f}  {hit.document_id}",
            *textwrap.wrap(snippet, width=110, initial_indent="   ", subsequent_indent="   "),
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
