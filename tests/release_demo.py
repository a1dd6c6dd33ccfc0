"""Publish a run's model and data to a Hub on this machine, and use them as a stranger does who knows their names.

    python tests/release_demo.py runs/demo

Publishes RUN/model and RUN/data/hub with push_to_hub.py, each twice: the second time nothing is committed. RUN/adapter
goes along if it was trained on a model of the Hub. Then a process that cannot import this repository, with an empty
cache and stock libraries alone, loads both by their names and scores the model on the test split of the data set's own
queries. The same program reads RUN's own folders; the two must find the same rows, vectors and score, and that score
must be the one that eval.retrieval wrote. Exit code 1 where they do not.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hub_client import ROOT, environment
from local_hub import TOKEN, LocalHub

from common.cli import ArgumentParser, InputError, run
from eval.evidence import hub_id
from eval.metrics import final_row

MODEL, ADAPTER, DATA = "demo/model", "demo/adapter", "demo/data"
QUIET = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

# Takes a model, a data set and a file for what was found; names on the Hub or folders, it is all the same to it.
READER = """
import sys

ours = ["common", "dataset_builders", "modeling", "train_st", "eval", "release", "push_to_hub"]
sys.modules.update(dict.fromkeys(ours))  # not to be had
import hashlib
import json

import numpy as np
from datasets import get_dataset_config_names, load_dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

model_name, data_name, result = sys.argv[1:]
model = SentenceTransformer(model_name, trust_remote_code=False)
data, rows, hashes = {}, {}, {}
for config in get_dataset_config_names(data_name):
    (data[config],) = load_dataset(data_name, config).values()
    digest = hashlib.sha256()
    for batch in data[config].iter(batch_size=1000):
        digest.update(json.dumps(batch).encode())
    rows[config], hashes[config] = len(data[config]), digest.hexdigest()

queries = {row["query_id"]: row["text"] for row in data["queries"] if row["split"] == "test"}
documents = dict(zip(data["documents"]["document_id"], data["documents"]["text"]))
relevant = {}
for row in data["qrels"]:
    if row["query_id"] in queries and row["score"] > 0:
        relevant.setdefault(row["query_id"], set()).add(row["document_id"])
evaluator = InformationRetrievalEvaluator(queries, documents, relevant, ndcg_at_k=[10])
scores = evaluator(model)
texts = list(queries.values())[:32]
vectors = np.concatenate([model.encode_query(texts), model.encode_document(list(documents.values())[:32])])
np.save(result + ".npy", vectors)
found = {"rows": rows, "hashes": hashes, "queries": len(queries), "ndcg@10": float(scores[evaluator.primary_metric])}
with open(result, "w") as file:
    json.dump(found, file)
"""


def main(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python tests/release_demo.py", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder with model/, data/hub/ and results/ (runs/demo)")
    source = Path(parser.parse_args(argv).run).resolve()
    needed = (source / "model", source / "data" / "hub", source / "results" / "metrics.json")
    missing = [str(path) for path in needed if not path.exists()]
    if missing:
        raise InputError(f"no {' and no '.join(missing)}; make it first (runs/demo: make demo)")
    with tempfile.TemporaryDirectory() as folder, LocalHub() as hub:
        publish(hub, source, Path(folder))
        there = read(MODEL, DATA, Path(folder) / "stranger", environment(hub, Path(folder) / "stranger"))
        offline = environment(hub, Path(folder) / "here") | {"HF_HUB_OFFLINE": "1"}
        here = read(str(source / "model"), str(source / "data" / "hub"), Path(folder) / "here", offline)
    compare(here, there, measured(source / "results" / "metrics.json"))


def measured(path: Path) -> float:
    """nDCG@10 of the final model, as eval.retrieval scored it."""
    return final_row(json.loads(path.read_text()))["nDCG@10"]


def has_public_base(adapter: Path) -> bool:
    """Others can load the adapter: on a model of the Hub, not on what an earlier stage left in the run's folder."""
    config = adapter / "adapter_config.json"
    return config.is_file() and hub_id(json.loads(config.read_text())["base_model_name_or_path"]) is not None


def publish(hub: LocalHub, source: Path, folder: Path) -> None:
    """Push everything twice. Ends the process where that does not come to one commit in each repository."""
    variables = environment(hub, folder / "publisher", TOKEN) | QUIET
    adapter = has_public_base(source / "adapter")
    if not adapter:
        print(f"{source / 'adapter'}: no adapter of a model on the Hub, so the merged model goes alone", flush=True)
    pushes = {
        "model": [str(source / "model"), MODEL, *(["--adapter", ADAPTER] if adapter else [])],
        "dataset": [str(source / "data" / "hub"), DATA],
    }
    for kind, arguments in pushes.items():
        for _ in range(2):
            command = [sys.executable, "push_to_hub.py", kind, *arguments]
            print("$", "python", *command[1:], flush=True)
            if code := subprocess.run(command, cwd=ROOT, env=variables).returncode:
                sys.exit(code)  # it has told why
            for name in (argument for argument in arguments if argument in (MODEL, ADAPTER, DATA)):
                check_commits(hub, f"datasets/{name}" if kind == "dataset" else name)


def check_commits(hub: LocalHub, page: str) -> None:
    commits, files = hub.commits(page), hub.files(page)
    if len(commits) != 1:
        sys.exit(f"error: {page} must have one commit, not {[commit.title for commit in commits]}")
    size = sum(map(len, files.values()))
    print(f"{page}: {len(files)} files, {size:,} bytes, one commit after that of its making", flush=True)


def read(model: str, data: str, folder: Path, variables: dict[str, str]) -> dict:
    """What READER found, in a process of its own and a folder of its own."""
    folder.mkdir()
    result = folder / "found.json"
    command = [sys.executable, "-I", "-c", READER, model, data, str(result)]
    subprocess.run(command, cwd=folder, env=variables | QUIET, check=True)
    return {**json.loads(result.read_text()), "vectors": np.load(f"{result}.npy")}


def compare(here: dict, there: dict, measured: float) -> None:
    """Tell what was found. Ends the process where it is not the same."""
    print(f"read by name: {', '.join(f'{name} {rows:,}' for name, rows in there['rows'].items())} rows")
    scores = f"{there['ndcg@10']:.4f} by name, {here['ndcg@10']:.4f} from RUN, {measured:.4f} by eval.retrieval"
    print(f"nDCG@10 of {there['queries']} test queries: {scores}")
    apart = np.abs(here.pop("vectors") - (vectors := there.pop("vectors"))).max()
    print(f"{len(vectors)} vectors of {vectors.shape[1]} numbers: apart by {apart:.1e} at most")
    if here != there or apart > 1e-6:
        sys.exit("error: what was read by name is not what RUN holds")
    if abs(there["ndcg@10"] - measured) > 1e-3:  # other batches, so other ties
        sys.exit("error: its score is not the one in RUN's results/metrics.json")
    print("the same rows, vectors and score")


if __name__ == "__main__":
    run(main)
