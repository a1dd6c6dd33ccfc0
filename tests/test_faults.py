"""Commands that read models and data from a Hub that fails: the same result or one line, never another result.

What becomes of a push that fails stands in test_push_to_hub.py.
"""

import os
import re
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import tiny_training
import yaml
from hub_client import TOKEN, TOKENS, Client, error_of
from local_hub import ROOT, LocalHub
from tiny_data import write_encoder, write_recipe, write_set, write_table

MODEL, DATA = "org/name", "org/data"
LASTING = 10**6


@pytest.fixture(scope="module")
def server():
    with LocalHub(tokens=TOKENS) as hub:
        yield hub


@pytest.fixture
def hub(server):
    server.clear()
    return server


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    with Client(server, tmp_path_factory.mktemp("client")) as client:
        yield client


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def readers(hub, tiny_run, tiny_encoder, tiny_decoder, tmp_path):
    """Commands that read models and data from the Hub, and the folder that each writes."""
    data = shutil.copytree(tiny_run / "data", tmp_path / "data")
    hub.create(MODEL, files=content(tiny_encoder))
    hub.create("org/base", files=content(tiny_decoder))
    hub.create("org/teacher", files=content(write_encoder(tmp_path / "teacher")))
    hub.create(DATA, "dataset", files=content(tiny_training.write_hub(tmp_path / "hub")))
    local = write_set(tmp_path / "set")
    texts, queries = (pq.read_table(local / f"{name}.parquet")["text"].to_pylist() for name in ("corpus", "queries"))
    (tmp_path / "pairs").mkdir()
    write_table(tmp_path / "pairs" / "train.parquet", query=queries, positive=texts[: len(queries)])
    hub.create("org/pairs", "dataset", files=content(tmp_path / "pairs"))
    source = {"kind": "hub", "dataset": "org/pairs", "split": "train"}
    write_recipe(tmp_path / "data.yaml", local, "org/teacher", source=source)
    recipe = tiny_training.two_stages("org/base", DATA) | {"max_steps": 1, "eval_strategy": "no"}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(recipe | {"stages": recipe["stages"][1:]}))
    built, trained = tmp_path / "built", tmp_path / "trained"
    return {
        "eval.search": (["--model", MODEL, "--data", str(data), "how do i parse a date"], data / "embeddings"),
        "dataset_builders.build": (["--config", str(tmp_path / "data.yaml"), "--output_dir", str(built)], built),
        "train_st": (["--config", str(tmp_path / "train.yaml"), "--output_dir", str(trained)], trained),
    }


# A request of each kind: what is asked first, the settings of a model, its weights, and data.
READS = {
    "eval.search": ["GET /api/models/org/name", "config_sentence_transformers.json", "model.safetensors"],
    "dataset_builders.build": ["GET /api/datasets/org/pairs", "train.parquet"],
    "train_st": ["GET /api/models/org/base", "train.parquet"],
}


@pytest.mark.parametrize(("module", "request_"), [(module, line) for module in READS for line in READS[module]])
def test_a_reader_has_the_same_result_or_one_line(module, request_, hub, client, readers):
    """A second run goes on with what the first one fetched."""
    argv, output = readers[module]

    def read():
        shutil.rmtree(output, ignore_errors=True)
        done = client(module, *argv)
        kept = {name: data for name, data in content(output).items() if name.endswith((".npy", ".parquet"))}
        kept |= {name: data for name, data in content(output).items() if name.endswith(".safetensors")}
        return error_of(done), (kept, done.stdout if module == "eval.search" else None)

    shutil.rmtree(client.cache, ignore_errors=True)
    error, whole = read()
    assert error is None and whole[0]
    for fault in ("503", "drop", "cut"):
        shutil.rmtree(client.cache, ignore_errors=True)
        planned = hub.fail(re.escape(request_), fault, LASTING)
        error, found = read()
        assert planned.happened and (error or found == whole)
        planned.times = 0
        assert not error or read() == (None, whole)


@pytest.mark.parametrize("request_", ["GET /api/models/org/name$", "GET /api/models/org/name/tree/"])
def test_a_reader_gives_up_on_a_hub_that_never_answers(request_, hub, client, readers):
    shutil.rmtree(client.cache, ignore_errors=True)
    planned = hub.fail(request_, "stall", LASTING)
    error = error_of(client("eval.search", *readers["eval.search"][0], stalled=request_))
    assert planned.happened and re.match(f"model '{MODEL}': .*the Hub did not serve", error), (error, hub.asked)
    planned.times = 0
    assert error_of(client("eval.search", *readers["eval.search"][0])) is None


def test_a_private_model_needs_a_token(hub, client, readers):
    hub.stored["model"][MODEL].private = True
    shutil.rmtree(client.cache, ignore_errors=True)
    error = error_of(client("eval.search", *readers["eval.search"][0], token=""))
    assert error.startswith(f"model '{MODEL}': not a local folder, and the Hub did not serve it: ")
    assert error_of(client("eval.search", *readers["eval.search"][0])) is None


def test_a_full_disk(hub, readers, tmp_path):
    """A file system of 16 KiB for what is downloaded."""
    full = tmp_path / "full"
    full.mkdir()
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mounted += ['mount -t tmpfs -o size=16k tmpfs "$0" && exec "$@"', str(full)]
    if subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    environment = {**os.environ, **hub.environment(tmp_path, TOKEN), "HF_HOME": str(full)}
    command = [*mounted, sys.executable, "-m", "eval.search", *readers["eval.search"][0]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "No space left on device" in error_of(done) or "the disk is full" in error_of(done)
