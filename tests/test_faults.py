"""Commands that read models and data from a Hub that fails: the same result or one line, never another result.

What becomes of a push that fails stands in test_push_to_hub.py.
"""

import re
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import tiny_training
import yaml
from hub_client import ROOT, Client, environment, error_of
from local_hub import TOKEN, LocalHub
from tiny_data import write_encoder, write_recipe, write_set, write_table

MODEL = "org/name"
LASTING = 10**6


@pytest.fixture(scope="module")
def hub():
    with LocalHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with Client(hub, tmp_path_factory.mktemp("client")) as client:
        yield client


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def read(hub, client, tiny_run, tiny_encoder, tiny_decoder, tmp_path_factory):
    """Runs a command that reads from the Hub; its error, and what it made."""
    folder = tmp_path_factory.mktemp("readers")
    data = shutil.copytree(tiny_run / "data", folder / "data")
    hub.create(MODEL, content(tiny_encoder))
    hub.create("org/base", content(tiny_decoder))
    hub.create("org/teacher", content(write_encoder(folder / "teacher")))
    hub.create("datasets/org/data", content(tiny_training.write_hub(folder / "hub")))
    local = write_set(folder / "set")
    texts, queries = (pq.read_table(local / f"{name}.parquet")["text"].to_pylist() for name in ("corpus", "queries"))
    (folder / "pairs").mkdir()
    write_table(folder / "pairs" / "train.parquet", query=queries, positive=texts[: len(queries)])
    hub.create("datasets/org/pairs", content(folder / "pairs"))
    source = {"kind": "hub", "dataset": "org/pairs", "split": "train"}
    write_recipe(folder / "data.yaml", local, "org/teacher", source=source)
    recipe = tiny_training.two_stages("org/base", "org/data") | {"max_steps": 1, "eval_strategy": "no"}
    (folder / "train.yaml").write_text(yaml.safe_dump(recipe | {"stages": recipe["stages"][1:]}))
    built, trained = folder / "built", folder / "trained"
    commands = {
        "eval.search": (["--model", MODEL, "--data", str(data), "how do i parse a date"], data / "embeddings"),
        "dataset_builders.build": (["--config", str(folder / "data.yaml"), "--output_dir", str(built)], built),
        "train_st": (["--config", str(folder / "train.yaml"), "--output_dir", str(trained)], trained),
    }

    def read(module, **options):
        argv, output = commands[module]
        shutil.rmtree(output, ignore_errors=True)
        done = client(module, *argv, **options)
        kept = {name: made for name, made in content(output).items() if name.endswith((".npy", ".parquet"))}
        kept |= {name: made for name, made in content(output).items() if name.endswith(".safetensors")}
        return error_of(done), (kept, done.stdout if module == "eval.search" else None)

    read.search = commands["eval.search"][0]
    return read


@pytest.fixture(scope="module")
def whole(read, client):
    """Module -> what it makes of a Hub that does not fail."""
    found = {}

    def whole(module):
        if module not in found:
            error, found[module] = read(module)
            assert error is None and found[module][0]
        shutil.rmtree(client.cache, ignore_errors=True)
        return found[module]

    return whole


@pytest.mark.parametrize(
    ("module", "request_", "fault"),
    [
        ("eval.search", "GET /api/models/org/name", "503"),
        ("eval.search", "config_sentence_transformers.json", "drop"),
        ("eval.search", "model.safetensors", "cut"),
        ("dataset_builders.build", "train.parquet", "503"),
        ("train_st", "GET /api/models/org/base", "drop"),
        ("train_st", "train.parquet", "cut"),
    ],
)
def test_a_reader_has_the_same_result_or_one_line(module, request_, fault, hub, read, whole):
    """A second run goes on with what the first one fetched."""
    expected = whole(module)
    planned = hub.fail(re.escape(request_), fault, LASTING)
    error, found = read(module)
    planned.times = 0
    assert planned.happened and (error or found == expected)
    assert not error or read(module) == (None, expected)


@pytest.mark.parametrize("request_", ["GET /api/models/org/name$", "GET /api/models/org/name/tree/"])
def test_a_reader_gives_up_on_a_hub_that_never_answers(request_, hub, read, whole):
    expected = whole("eval.search")
    planned = hub.fail(request_, "stall", LASTING)
    error, _ = read("eval.search", stalled=request_)
    planned.times = 0
    assert planned.happened and re.match(f"model '{MODEL}': .*the Hub did not serve", error), (error, hub.asked)
    assert read("eval.search") == (None, expected)


def test_a_private_model_needs_a_token(hub, read, whole, monkeypatch):
    expected = whole("eval.search")
    monkeypatch.setattr(hub.repositories[MODEL], "private", True)
    error, _ = read("eval.search", token="")
    assert error.startswith(f"model '{MODEL}': not a local folder, and the Hub did not serve it: ")
    assert read("eval.search") == (None, expected)


def test_a_full_disk(hub, read, tmp_path):
    """A file system of 4 KiB for what is downloaded."""
    full = tmp_path / "full"
    full.mkdir()
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mounted += ['mount -t tmpfs -o size=4k tmpfs "$0" && exec "$@"', str(full)]
    if subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    variables = environment(hub, tmp_path, TOKEN) | {"HF_HOME": str(full)}
    command = [*mounted, sys.executable, "-m", "eval.search", *read.search]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert "No space left on device" in error_of(done) or "the disk is full" in error_of(done)
