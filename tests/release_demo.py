"""Publish a run's model and data to a Hub on this machine, and use them as a stranger does who knows their names.

    python tests/release_demo.py runs/demo

Publishes RUN/model and RUN/data/hub with push_to_hub.py, each twice: the second time nothing is committed. Then a
process that cannot import this repository, with an empty cache and stock libraries alone, loads both by their names
and scores the model on the test split of the data set's own queries. The same program reads RUN's own folders; the
two must find the same rows, vectors and score. Exit code 1 where they do not.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from local_hub import ROOT, LocalHub

from dataset_builders.cli import ArgumentParser, InputError, run

MODEL, DATA = "demo/model", "demo/data"
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

# Takes a model, a data set and a file for what was found; names on the Hub or folders, it is all the same to it.
READER = """
import sys

sys.modules.update(dict.fromkeys(["dataset_builders", "modeling", "train_st", "eval", "push_to_hub"]))  # not to be had
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
    parser.add_argument("run", metavar="RUN", help="folder with model/ and data/hub/ (runs/demo)")
    source = Path(parser.parse_args(argv).run).resolve()
    missing = [str(path) for path in (source / "model", source / "data" / "hub") if not path.is_dir()]
    if missing:
        raise InputError(f"no {' and no '.join(missing)}; make it first (runs/demo: make demo)")
    with tempfile.TemporaryDirectory() as folder, LocalHub() as hub:
        publish(hub, source, Path(folder))
        there = read(MODEL, DATA, Path(folder) / "stranger", hub.environment(Path(folder) / "stranger"))
        offline = {**hub.environment(Path(folder) / "here"), "HF_HUB_OFFLINE": "1"}
        here = read(str(source / "model"), str(source / "data" / "hub"), Path(folder) / "here", offline)
    compare(here, there)


def publish(hub: LocalHub, source: Path, folder: Path) -> None:
    environment = {**os.environ, **hub.environment(folder / "publisher", "hf_write"), **QUIET}
    for kind, path, name in (("model", source / "model", MODEL), ("dataset", source / "data" / "hub", DATA)):
        commits = []
        for _ in range(2):
            command = [sys.executable, "push_to_hub.py", kind, str(path), name]
            print("$", "python", *command[1:], flush=True)
            if code := subprocess.run(command, cwd=ROOT, env=environment).returncode:
                sys.exit(code)  # it has told why
            commits.append([commit.id for commit in hub.commits(name, kind)])
        if len(commits[0]) != 2 or commits[0] != commits[1]:  # the one that makes the repository, and ours
            changed = [f"{commit.title}: {', '.join(commit.changed)}" for commit in hub.commits(name, kind)]
            sys.exit(f"error: {name} must have two commits after either push, not\n" + "\n".join(changed))
        files = hub.files(name, kind)
        print(f"{name}: {len(files)} files, {sum(map(len, files.values())):,} bytes, one commit\n", flush=True)


def read(model: str, data: str, folder: Path, environment: dict[str, str]) -> dict:
    """What READER found, in a process of its own and a folder of its own."""
    folder.mkdir()
    result = folder / "found.json"
    command = [sys.executable, "-I", "-c", READER, model, data, str(result)]
    subprocess.run(command, cwd=folder, env={**os.environ, **environment, **QUIET}, check=True)
    return {**json.loads(result.read_text()), "vectors": np.load(f"{result}.npy")}


def compare(here: dict, there: dict) -> None:
    print(f"read by name: {', '.join(f'{name} {rows:,}' for name, rows in there['rows'].items())} rows")
    print(
        f"nDCG@10 of {there['queries']} test queries: {there['ndcg@10']:.4f} by name, {here['ndcg@10']:.4f} from RUN"
    )
    apart = np.abs(here.pop("vectors") - (vectors := there.pop("vectors"))).max()
    print(f"{len(vectors)} vectors of {vectors.shape[1]} numbers: apart by {apart:.1e} at most")
    if here != there or apart > 1e-6:
        sys.exit("error: what was read by name is not what RUN holds")
    print("the same rows, vectors and score")


if __name__ == "__main__":
    run(main)
