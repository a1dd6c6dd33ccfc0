"""Score every system of a run on held-out queries over all documents: retrievers, teacher, and each stage's model.

    python -m eval.retrieval --run runs/demo --data runs/demo/data --output_dir runs/demo/results

Prints one table and writes OUTPUT_DIR/metrics.json, unless that stands there already for the same files. Embeddings
are kept under DATA/embeddings, by what they were made from, so that a killed evaluation goes on where it stopped and
`eval.search` finds the documents' ready. OUTPUT_DIR/untrained is the encoder before its first stage.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.cli import ArgumentParser, InputError, run
from common.models import check_model_folder, fetch_settings, resolve_model
from common.recipes import read_yaml
from common.steps import (
    MANIFEST,
    file_sha256,
    files_of,
    fingerprint,
    folder_step,
    peak_memory_bytes,
    read_arrow,
    read_manifest,
    read_parquet,
    stack_versions,
    write_json,
)
from dataset_builders.dense import dense_top_k
from dataset_builders.embeddings import Embedder, EncoderSection, Vectors
from dataset_builders.schema import DOCUMENTS, QRELS, QUERIES, to_schema
from modeling.prompts import few_shot_prompts

DEPTH = 100  # documents ranked per query
# In ir_measures' names, with the number of ranks that each looks at; RR is that of the first DEPTH documents.
MEASURES = {"nDCG@10": 10, "R@100": DEPTH, "RR": DEPTH}
# Rows whose ranks stand in candidates.parquet, by the column that holds them.
RETRIEVERS = {"BM25": "bm25_rank", "dense teacher": "dense_rank", "RRF": "rrf_rank"}
BASELINE, COMPARED = "BM25", "nDCG@10"  # differences are to this system, in this measure
# Of the cosines that a model gives: in %, and down to which rank documents that are not relevant are looked at.
QUANTILES, NEAR = (5, 25, 50, 75, 95), 10
BLOCK = 8192  # pairs of vectors in memory at a time

Ranking = dict[str, list[str]]  # query id -> document ids, best first


@dataclass(frozen=True)
class Documents:
    """A document collection, in file order."""

    ids: list[str]
    texts: list[str]


@dataclass(frozen=True)
class Queries:
    """The queries of one split that have a relevant document, and those documents' grades."""

    split: str
    ids: list[str]
    texts: list[str]
    qrels: dict[str, dict[str, int]]


@dataclass(frozen=True)
class System:
    """A model to evaluate: the name of its row, and the folder of a SentenceTransformer."""

    name: str
    folder: Path
    shots: int = 0  # in the prompt of queries, one of those that the model carries
    query_prompt: str | None = None  # None: the model's own


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    run_folder, data, output = Path(args.run), Path(args.data), Path(args.output_dir)
    documents = load_documents(data)
    known = set(documents.ids)
    queries = load_queries(data, args.split, known)
    rankings = candidate_rankings(data, queries, known)
    systems = run_systems(run_folder, output)

    key = evaluation_key(data, args.split, systems)
    metrics = finished_metrics(output, key)
    if metrics is None:
        rows = [
            *(retriever_row(name, queries, *rankings[name]) for name in rankings),
            *(model_row(system, data, documents, queries) for system in systems),
        ]
        metrics = {
            "key": key,
            "command": "python -m eval.retrieval " + shlex.join(argv),
            # relative to the file that holds them, so that a run can be moved as a whole
            "run": os.path.relpath(run_folder, output),
            "data": os.path.relpath(data, output),
            "split": queries.split,
            "counts": count(documents, queries),
            "measures": list(MEASURES),
            "baseline": BASELINE,
            "compared": COMPARED,
            "systems": with_differences(rows),
            "not_evaluated": missing_stages(run_folder),
            "peak_memory_bytes": peak_memory_bytes(),
            "versions": stack_versions(),
        }
        write_json(output / "metrics.json", metrics)
    print(format_table(metrics))


def _parse(argv: Sequence[str]):
    parser = ArgumentParser(prog="python -m eval.retrieval", description=__doc__)
    parser.add_argument("--run", required=True, help="folder that train_st.py wrote")
    parser.add_argument("--data", required=True, help="folder that dataset_builders.build wrote")
    parser.add_argument("--output_dir", required=True, help="where metrics.json goes")
    parser.add_argument("--split", default="test", help="whose queries are asked (default: test)")
    return parser.parse_args(argv)


def load_documents(data: Path) -> Documents:
    """All documents of a data folder, in file order."""
    path = data / "corpus" / "documents.arrow"
    table = to_schema(read_arrow(path, DOCUMENTS.names), DOCUMENTS, str(path))
    if not len(table):
        raise InputError(f"{path}: no documents; build the data again")
    _check_unique(table["document_id"], path)
    return Documents(table["document_id"].to_pylist(), table["text"].to_pylist())


def load_queries(data: Path, split: str, document_ids: set[str]) -> Queries:
    """The queries of `split` with at least one relevant document (a measure is undefined for the others)."""
    queries_path, qrels_path = (data / "corpus" / name for name in ("queries.parquet", "qrels.parquet"))
    queries = to_schema(read_parquet(queries_path, QUERIES.names), QUERIES, str(queries_path))
    qrels = to_schema(read_parquet(qrels_path, QRELS.names), QRELS, str(qrels_path))
    splits = sorted(set(queries["split"].to_pylist()))
    grades: dict[str, dict[str, int]] = {}
    for row in qrels.filter(pc.equal(qrels["split"], split)).to_pylist():
        if row["document_id"] not in document_ids:
            raise InputError(
                f"{qrels_path}: document {row['document_id']!r} of query {row['query_id']!r} is not in "
                "documents.arrow; build the data again"
            )
        grades.setdefault(row["query_id"], {})[row["document_id"]] = row["score"]
    of_split = queries.filter(pc.equal(queries["split"], split))
    _check_unique(of_split["query_id"], queries_path)
    asked = [
        row for row in of_split.to_pylist() if any(grade > 0 for grade in grades.get(row["query_id"], {}).values())
    ]
    if not asked:
        raise InputError(
            f"{data / 'corpus'}: split {split!r} has no query with a relevant document; splits: {', '.join(splits)}"
        )
    ids = [row["query_id"] for row in asked]
    return Queries(split, ids, [row["text"] for row in asked], {query_id: grades[query_id] for query_id in ids})


def _check_unique(ids: pa.ChunkedArray, path: Path) -> None:
    name, times = max(Counter(ids.to_pylist()).items(), key=lambda item: item[1], default=("", 1))
    if times > 1:
        raise InputError(f"{path}: id {name!r} occurs {times} times; build the data again")


def count(documents: Documents, queries: Queries) -> dict[str, int]:
    relevant = sum(grade > 0 for grades in queries.qrels.values() for grade in grades.values())
    return {"documents": len(documents.ids), "queries": len(queries.ids), "relevant": relevant}


def candidate_rankings(data: Path, queries: Queries, document_ids: set[str]) -> dict[str, tuple[Ranking, int]]:
    """The rankings of BM25, of the dense teacher and of their fusion, as the candidates folder holds them.

    With each comes the rank down to which it is whole: the folder keeps the first `fusion.top_k` documents of the
    fused list, and one that BM25 ranks 90th may not be among them.
    """
    top_k = _fused(data / "candidates")
    path = data / "candidates" / "candidates.parquet"
    table = read_parquet(path, ["query_id", "document_id", *RETRIEVERS.values()])
    for column in RETRIEVERS.values():
        if not (pa.types.is_integer(table[column].type) or pa.types.is_null(table[column].type)):
            raise InputError(f"{path}: column {column!r} holds {table[column].type}, not ranks; build the data again")
    ids = pa.schema([("query_id", pa.string()), ("document_id", pa.string())])
    to_schema(table.select(ids.names), ids, str(path))
    table = table.filter(pc.is_in(table["query_id"], value_set=pa.array(queries.ids)))
    if not len(table):
        raise InputError(
            f"{path}: no candidates for the queries of split {queries.split!r}; "
            f"name that split in the recipe's source.eval_splits and build the data again"
        )
    unknown = set(table["document_id"].to_pylist()) - document_ids
    if unknown:  # the retrievers would score too low, and every model too well against them
        raise InputError(f"{path}: document {min(unknown)!r} is not in documents.arrow; build the data again")
    kept = Counter(table["query_id"].to_pylist())
    rankings = {}
    for name, column in RETRIEVERS.items():
        ranked = table.filter(pc.is_valid(table[column])).sort_by(column)
        ranking: Ranking = {query_id: [] for query_id in queries.ids}
        whole = dict.fromkeys(queries.ids, 0)
        columns = (ranked[key].to_pylist() for key in ("query_id", "document_id", column))
        for query_id, document_id, rank in zip(*columns, strict=True):
            ranking[query_id].append(document_id)
            whole[query_id] += rank == whole[query_id] + 1
        rankings[name] = ranking, min((whole[query] for query in queries.ids if kept[query] >= top_k), default=DEPTH)
    return rankings


def _fused(candidates: Path) -> int:
    """How many candidates a query has at most, as their manifest tells."""
    try:
        top_k = read_manifest(candidates)["inputs"]["fusion"]["top_k"]
    except (KeyError, TypeError):
        top_k = None
    if not isinstance(top_k, int):
        raise InputError(f"{candidates / MANIFEST}: no inputs.fusion.top_k in it; build the data again")
    return top_k


def run_systems(run_folder: Path, output: Path) -> list[System]:
    """The models of a run in the order in which they came to be: untrained, after each stage, final; then the final
    one again with each few-shot prompt it carries.
    """
    recipe = run_recipe(run_folder)
    final = run_folder / "model"
    if not final.is_dir():
        raise InputError(f"{final}: no such folder; finish the training with train_st.py first")
    stages = [System(f"after {stage['name']}", run_folder / stage["name"]) for stage in recipe["stages"]]
    stages = [system for system in stages if system.folder.is_dir()]
    for folder in (*(system.folder for system in stages), final):
        encoder_as_saved(str(folder))  # refused now, not after hours of work on the others
    if stages and files_of(final).items() <= files_of(stages[-1].folder).items():
        stages[-1] = System(f"{stages[-1].name} (final)", final)  # the same weights: one row
    else:
        stages.append(System("final model", final))
    settings = json.loads((final / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    few_shot = [
        System(f"{stages[-1].name}, {shots}-shot", final, shots, prompt)
        for shots, prompt in few_shot_prompts(settings.get("prompts", {})).items()
    ]
    return [System("untrained", _untrained(run_folder, recipe, output / "untrained")), *stages, *few_shot]


def missing_stages(run_folder: Path) -> list[str]:
    """Names of stages that the recipe lists and the run has no model of."""
    return [stage["name"] for stage in run_recipe(run_folder)["stages"] if not (run_folder / stage["name"]).is_dir()]


def run_recipe(run_folder: Path) -> dict[str, Any]:
    """What was run. Raises InputError where that is no recipe of train_st.py."""
    if not (run_folder / "recipe.yaml").is_file():
        raise InputError(f"{run_folder}: not a training run (recipe.yaml is missing); make one with train_st.py")
    path = run_folder / "recipe.yaml"
    recipe = read_yaml(path)
    stages = recipe.get("stages")
    if not isinstance(stages, list) or not stages:
        raise InputError(f"{path}: no list of stages; name the folder of a run that train_st.py made")
    for stage in stages:
        if not isinstance(stage, dict) or not str(stage.get("name", "")).isidentifier():
            raise InputError(f"{path}: stage {stage!r} has no name; name the folder of a run that train_st.py made")
        for key in ("max_seq_length", "min_text_tokens"):
            value = {**recipe, **stage}.get(key, 1)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{path}: {key} is {value!r}; it must be a number above 0")
    if "student" not in recipe and not isinstance(recipe.get("model_name_or_path"), str):
        raise InputError(f"{path}: neither student nor model_name_or_path says what was trained")
    return recipe


def _untrained(run_folder: Path, recipe: Mapping[str, Any], folder: Path) -> Path:
    """The encoder as the first stage found it, saved in `folder`."""
    from modeling.prompts import baked_prompts

    keys = {**recipe, **recipe["stages"][-1]}  # the final model's prompt and length, for a fair comparison
    start = resolve_model(str(run_folder / "student") if "student" in keys else keys["model_name_or_path"])
    revision = start.revision or keys.get("model_revision")
    settings = {name: keys[name] for name in ("max_seq_length", "min_text_tokens", "pooling", "dtype") if name in keys}
    prompts = baked_prompts(keys.get("instruction"))
    inputs = {"model": start.fingerprint(), "revision": revision, **settings, "prompts": prompts}
    with folder_step(folder, inputs) as step:
        if not step.done:
            from modeling.encoder import build_encoder

            encoder = build_encoder(start.name_or_path, revision=revision, prompts=prompts, **settings)
            encoder.save(str(step.path), create_model_card=False)
            step.finish()
    return folder


def evaluation_key(data: Path, split: str, systems: Sequence[System]) -> str:
    """Changes when any figure could: with a model, the texts, the grades or the retrievers' rankings."""
    names = ["corpus/documents.arrow", "corpus/queries.parquet", "corpus/qrels.parquet"]
    files = {name: file_sha256(data / name) for name in [*names, "candidates/candidates.parquet"]}
    models = {system.name: resolve_model(str(system.folder)).fingerprint() for system in systems}
    return fingerprint({"split": split, "files": files, "models": models, "cosines": [QUANTILES, NEAR]})


def finished_metrics(output: Path, key: str) -> dict[str, Any] | None:
    """What an earlier run wrote of the same things, if it did: its seconds are those that the work took."""
    try:
        metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return metrics if isinstance(metrics, dict) and metrics.get("key") == key else None


def retriever_row(name: str, queries: Queries, ranking: Ranking, whole: int) -> dict[str, Any]:
    """Scores of a ranking found in the data; None for a measure that looks further than it is `whole`."""
    unknown = dict.fromkeys(measure for measure, depth in MEASURES.items() if depth > whole)
    return {"name": name, "kind": "retriever"} | ranking_scores(queries, ranking) | unknown


def model_row(system: System, data: Path, documents: Documents, queries: Queries) -> dict[str, Any]:
    """Scores of a model over all documents, and the seconds it took (none for vectors that were found ready)."""
    start = time.monotonic()
    section = encoder_as_saved(str(system.folder)).model_copy(update={"query_prompt": system.query_prompt})
    embedder = Embedder(section, data / "embeddings")
    vectors = embedder.queries(queries.texts), embedder.documents(documents.texts)
    positions, scores = dense_top_k(*vectors, DEPTH)
    ranking = {
        query_id: [documents.ids[position] for position in found]
        for query_id, found in zip(queries.ids, positions, strict=True)
    }
    seconds = round(time.monotonic() - start, 1)
    facts = {"name": system.name, "kind": "model", "model": str(system.folder), "seconds": seconds}
    cosines = {"quantiles": QUANTILES} | cosine_quantiles(
        *vectors, positions, scores, relevant_rows(documents, queries)
    )
    return facts | {"shots": system.shots, "cosines": cosines} | ranking_scores(queries, ranking)


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
    """What cosines mean for a model: QUANTILES of those of queries with their relevant documents, wherever these are
    ranked, and with the others among the first NEAR. None where there are none.

    Args:
        queries: (queries, dimensions) unit vectors.
        documents: (documents, dimensions) unit vectors.
        positions: (queries, k) of the retrieved documents, best first, and their
        scores: cosines.
        relevant: the positions of each query's relevant documents.
    """
    pairs = np.array([(query, document) for query, rows in enumerate(relevant) for document in rows])
    blocks = np.split(pairs, range(BLOCK, len(pairs), BLOCK))
    found = [np.einsum("nd,nd->n", queries[rows[:, 0]], documents[rows[:, 1]]) for rows in blocks]
    others = [
        score
        for near, cosines, rows in zip(positions[:, :NEAR], scores[:, :NEAR], relevant, strict=True)
        for position, score in zip(near, cosines, strict=True)
        if position not in rows
    ]
    groups = {"relevant": np.concatenate(found), "others": np.array(others)}
    return {
        name: [round(float(value), 4) for value in np.percentile(group, QUANTILES)] if len(group) else None
        for name, group in groups.items()
    }


def encoder_as_saved(reference: str) -> EncoderSection:
    """A model in the dtype of its weights on disk: in float32 a half-precision one would take twice the memory.

    Raises InputError for a folder that is not a SentenceTransformer's.
    """
    from transformers import AutoConfig

    model = resolve_model(reference)
    if model.is_local and not Path(model.name_or_path, "modules.json").is_file():
        # sentence-transformers would load a bare checkpoint all the same, and average over its tokens
        raise InputError(f"{reference}: not a SentenceTransformer folder (modules.json is missing); train one first")
    if model.is_local:
        check_model_folder(Path(model.name_or_path))
    try:
        dtype = AutoConfig.from_pretrained(model.name_or_path, revision=fetch_settings(model)).dtype
    except (OSError, ValueError):  # not at the top of the folder; that there is no model at all shows in loading it
        dtype = None
    return EncoderSection(
        model=reference, dtype=str(dtype or "float32").removeprefix("torch."), vector_dtype="float32"
    )


def ranking_scores(queries: Queries, ranking: Ranking) -> dict[str, Any]:
    """Mean of each measure over the queries (by ir_measures), and COMPARED of each query, in the order of `queries`.

    A query for which nothing was found counts 0.
    """
    import ir_measures

    measures = [ir_measures.parse_measure(name) for name in MEASURES]
    # the rank is the score: trec_eval orders by score, and would break ties its own way
    scored = {
        query_id: {document_id: -float(rank) for rank, document_id in enumerate(found[:DEPTH])}
        for query_id, found in ranking.items()
    }
    values: dict[str, dict[str, float]] = {name: {} for name in MEASURES}
    for metric in ir_measures.iter_calc(measures, queries.qrels, scored):
        values[str(metric.measure)][metric.query_id] = metric.value
    means = {name: round(float(np.mean([values[name][query_id] for query_id in queries.ids])), 4) for name in values}
    return means | {"per_query": [values[COMPARED][query_id] for query_id in queries.ids]}


def with_differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with each one's mean paired difference to BASELINE in COMPARED and its 95 % bootstrap interval."""
    from scipy.stats import bootstrap

    baseline = next(np.array(row["per_query"]) for row in rows if row["name"] == BASELINE)
    finished = []
    for row in rows:
        row = dict(row)
        differences = np.array(row.pop("per_query")) - baseline
        if row["name"] != BASELINE and len(differences) > 1:
            interval = bootstrap(
                (differences,), np.mean, n_resamples=2000, batch=100, method="percentile", rng=0
            ).confidence_interval
            row["difference"] = {
                "mean": round(float(differences.mean()), 4),
                "low": round(float(interval.low), 4),
                "high": round(float(interval.high), 4),
            }
        finished.append(row)
    return finished


def format_table(metrics: Mapping[str, Any]) -> str:
    """The systems as a Markdown table."""
    counts = metrics["counts"]
    lines = [
        f"{counts['queries']:,} queries of split {metrics['split']}, {counts['documents']:,} documents",
        "",
        f"| system | {' | '.join(metrics['measures'])} | {metrics['compared']} against {metrics['baseline']} [95 %] |",
        "|---|" + "---:|" * (len(metrics["measures"]) + 1),
    ]
    for row in metrics["systems"]:
        difference = row.get("difference")
        against = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**difference) if difference else ""
        scores = " | ".join("-" if row[name] is None else f"{row[name]:.3f}" for name in metrics["measures"])
        lines.append(f"| {row['name']} | {scores} | {against} |")
    if any(row[name] is None for row in metrics["systems"] for name in metrics["measures"]):
        lines += ["", "-: not known, the candidates were cut; make fusion.top_k the sum of both retrievers' top_k."]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
