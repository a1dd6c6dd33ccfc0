"""What eval.retrieval measures: scores of a ranking, differences to BM25, metrics.json and its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.cli import InputError
from common.steps import files_of, fingerprint, read_json
from common.tables import markdown_table
from eval.held_out import DEPTH
from eval.intervals import format_mean, mean_with_interval

# In ir_measures' names, with the number of ranks that each looks at; RR is that of the first DEPTH documents.
MEASURES = {"nDCG@10": 10, "R@100": DEPTH, "RR": DEPTH}
BASELINE, COMPARED = "BM25", "nDCG@10"  # differences are to this system, in this measure


class SystemScores(BaseModel):
    """A row of the table; a measure is null where a cut list of candidates hides it."""

    model_config = ConfigDict(extra="forbid")  # what a row says and this class does not would be lost
    name: str
    kind: Literal["retriever", "model", "fusion"]
    ndcg: float | None = Field(alias="nDCG@10")
    recall: float | None = Field(None, alias="R@100")
    reciprocal_rank: float | None = Field(None, alias="RR")
    difference: dict[str, float] | None = None  # to BASELINE in COMPARED, paired by query: mean, low, high
    model: str | None = None
    files: str | None = None  # changes when the model does (common.models.ModelReference.fingerprint)
    seconds: float = 0.0  # 0 for vectors that were ready
    shots: int = 0
    dimensions: int | None = None  # to which vectors were cut; None: all
    precision: str = "float32"  # of the documents' vectors
    cosines: dict[str, list[int | float] | None] | None = None
    weight: float | None = None  # of BM25 in a fused row
    relevance: dict[str, Any] | None = None  # of eval.thresholds


class Metrics(BaseModel):
    """metrics.json. `run` and `data` are relative to it, so that a run can be moved as a whole."""

    key: str
    command: str
    run: str | None
    data: str
    split: str
    counts: dict[str, int]
    measures: list[str]
    baseline: str
    compared: str
    systems: list[SystemScores]
    not_evaluated: list[str]  # stages of the recipe that the run has no model of
    notes: list[str] = []
    peak_memory_bytes: int | None = None
    versions: dict[str, str]


def read_metrics(results: Path) -> dict[str, Any]:
    """OUTPUT_DIR/metrics.json as it was written. Raises InputError where it is not eval.retrieval's."""
    path, command = results / "metrics.json", "python -m eval.retrieval"
    try:
        return Metrics.model_validate(read_json(path, command)).model_dump(by_alias=True)
    except ValidationError as error:
        location = error.errors()[0]["loc"][:2]
    if not location or location == ("key",):
        raise InputError(f"{path}: not written by eval.retrieval; run {command}")
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)[1:]
    raise InputError(f"{path}: {where} is not as eval.retrieval writes it; delete the file and run it again")


def final_row(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """The final model's row, without shots and with whole vectors: eval.retrieval puts models in the order in which
    they came to be. Empty where no model was evaluated.
    """
    rows = [row for row in (metrics["systems"] if metrics else ()) if row["kind"] == "model" and not row.get("shots")]
    rows = [row for row in rows if not row.get("dimensions") and row.get("precision", "float32") == "float32"]
    return rows[-1] if rows else {}


def check_final(results: Path, metrics: Mapping[str, Any], model: Path) -> None:
    """That the last model in RESULTS/metrics.json is the one in `model`. Raises InputError for another one, such as
    that of an earlier training: its scores would be told of this one.
    """
    measured = final_row(metrics).get("files")
    if measured and model.is_dir() and measured != fingerprint(files_of(model)):
        raise InputError(
            f"{results / 'metrics.json'}: of another model than {model} is now; run `{metrics['command']}` again, or "
            "name other results"
        )


def finished_metrics(output: Path, key: str) -> dict[str, Any] | None:
    """What an earlier run wrote of the same things, if it did: its seconds are those that the work took."""
    try:
        metrics = read_metrics(output)
    except InputError:
        return None
    return metrics if metrics["key"] == key else None


def ranking_scores(
    qrels: Mapping[str, Mapping[str, int]], ranking: Mapping[str, Iterable[str]], measures: Iterable[str] = MEASURES
) -> dict[str, float | list[float]]:
    """Mean of each measure over the queries (by ir_measures), and COMPARED of each query, in the order of `qrels`.

    Args:
        qrels: grades of documents by query.
        ranking: documents by query, best first. A query for which nothing was found counts 0.
    """
    import ir_measures

    # the rank is the score: trec_eval orders by score, and would break ties its own way
    scored = {
        query_id: {document_id: -float(rank) for rank, document_id in enumerate(list(found)[:DEPTH])}
        for query_id, found in ranking.items()
    }
    values: dict[str, dict[str, float]] = {name: {} for name in measures}
    for metric in ir_measures.iter_calc(map(ir_measures.parse_measure, measures), qrels, scored):
        values[str(metric.measure)][metric.query_id] = metric.value
    means = {name: round(float(np.mean([of_query[id] for id in qrels])), 4) for name, of_query in values.items()}
    return means | {"per_query": [values[COMPARED][query_id] for query_id in qrels]}


def with_differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with each one's mean paired difference to BASELINE in COMPARED and its interval."""
    baseline = next(np.array(row["per_query"]) for row in rows if row["name"] == BASELINE)
    finished = []
    for row in rows:
        differences = np.array(row["per_query"]) - baseline
        if row["name"] != BASELINE and len(differences) > 1:
            row = row | {"difference": mean_with_interval(differences[None], digits=4)}
        finished.append({key: value for key, value in row.items() if key != "per_query"})
    return finished


def format_table(metrics: Mapping[str, Any]) -> str:
    """The systems as a Markdown table."""
    counts, measures = metrics["counts"], metrics["measures"]
    rows = []
    for row in metrics["systems"]:
        scores = ["-" if row[name] is None else f"{row[name]:.3f}" for name in measures]
        rows.append([row["name"], *scores, format_mean(row["difference"], "+.3f")])
    lines = [
        f"{counts['queries']:,} queries of split {metrics['split']}, {counts['documents']:,} documents",
        markdown_table(["system", *measures, f"{metrics['compared']} against {metrics['baseline']} [95 %]"], rows),
        *metrics["notes"],
    ]
    if any(row[name] is None for row in metrics["systems"] for name in measures):
        lines.append("-: not known, the candidates were cut; leave fusion.top_k, bm25.top_k and dense.top_k out.")
    return "\n\n".join(lines)
