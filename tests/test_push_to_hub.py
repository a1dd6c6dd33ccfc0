"""Publishing over real HTTP to a local Hub: one commit or none, whatever fails on the way."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from local_hub import LocalHub
from test_data_verify import hub as graded_data  # noqa: F401
from test_modeling_verify import BASE, in_this_process, save_adapted  # noqa: F401

import push_to_hub
from common.cli import InputError

ROOT = Path(__file__).parents[1]
TOKENS = {"hf_write": "write", "hf_read": "read"}
# A process that runs push_to_hub.py again and again, as the client reads its endpoint when it is imported; on rendered
# files in place of a model, which would be verified in a process of its own. Reads {"releases": {repository: {name:
# content}}, "argv", "environment"} and answers [exit code, stdout, stderr], a line each.
WORKER = """
import contextlib, io, json, os, sys, traceback
import push_to_hub
from common.cli import run

push_to_hub._WAITS = (0.01, 0.01, 0.01)
for line in sys.stdin:
    job = json.loads(line)
    os.environ |= job["environment"]
    releases = [
        push_to_hub.Release(repo_id, "model", "Model", {name: text.encode() for name, text in files.items()})
        for repo_id, files in job["releases"].items()
    ]
    push_to_hub.prepare = lambda args: releases
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            run(push_to_hub.main, ["model", "unused", releases[0].repo_id, *job["argv"]])
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = 1
            traceback.print_exc()
    print(json.dumps([code, output.getvalue(), errors.getvalue()]), flush=True)
"""
FILES = {
    "README.md": "---\nlicense: mit\n---\n# A model\n",
    "config.json": '{"a": 1}',
    "model.safetensors": "weights" * 100,
    "1_Pooling/config.json": "{}",
}
NAME = "org/name"


@pytest.fixture(scope="module")
def server():
    with LocalHub(tokens=TOKENS) as hub:
        yield hub


@pytest.fixture
def hub(server):
    """The server, empty."""
    server.clear()
    return server


def start(server, folder, **environment):
    environment = {**os.environ, **server.environment(folder), **environment}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", WORKER], cwd=ROOT, env=environment, **pipes)


@pytest.fixture(scope="module")
def worker(server, tmp_path_factory):
    with start(server, tmp_path_factory.mktemp("client")) as process:
        yield process
        process.stdin.close()


def ask(process, *flags, files=FILES, releases=None, token="hf_write"):
    """What the command came to. The token is looked for in all that it prints."""
    job = {"releases": releases or {NAME: files}, "argv": flags, "environment": {"HF_TOKEN": token}}
    print(json.dumps(job), file=process.stdin, flush=True)
    done = subprocess.CompletedProcess(flags, *json.loads(process.stdout.readline()))
    assert not token or token not in done.stdout + done.stderr
    return done


@pytest.fixture
def push(hub, worker):
    """push(*flags, files=..., releases=..., token=...)"""
    return functools.partial(ask, worker)


def refused(done, message):
    """One line, exit code 2."""
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert re.search(message, errors[0]), errors[0]


def holds(hub, files=FILES, commits=1, **where):
    """The repository holds exactly these files, in so many commits after the first, which is the Hub's own."""
    found = hub.files(NAME, **where)
    found.pop(".gitattributes")
    assert {name: content.decode() for name, content in found.items()} == files
    assert len(hub.commits(NAME, **where)) == 1 + commits


# --- one commit -----------------------------------------------------------------------------------------------------


def test_everything_goes_in_one_commit_and_again_in_none(hub, push):
    done = push("--tag", "v1")
    assert done.returncode == 0, done.stderr
    holds(hub)
    [_, commit] = hub.commits(NAME)
    assert done.stdout == f"{NAME}: {hub.endpoint}/{NAME}/commit/{commit.id}\n"
    assert hub.refs(NAME).tags == {"v1": commit.id}
    assert not hub.stored["model"][NAME].private
    asked = len(hub.asked)
    again = push("--tag", "v1")
    assert again.returncode == 0 and f"holds these files already (commit {commit.id[:8]}); no commit" in again.stdout
    holds(hub)
    assert not [line for line in hub.asked[asked:] if not line.startswith("GET") and "/tag/" not in line]


def test_what_a_new_version_lacks_goes_and_what_others_put_there_stays(hub, push):
    theirs = {"LICENSE": b"MIT", "onnx/model.safetensors": b"o", "notes.json": b"{}"}
    older = {"model-00001-of-00002.safetensors": b"1", "2_Dense/config.json": b"{}", "adapter_config.json": b"{}"}
    hub.create(NAME, files=theirs | older)
    assert push().returncode == 0
    holds(hub, FILES | {name: content.decode() for name, content in theirs.items()}, commits=2)


def test_a_changed_file_is_the_only_one_in_its_commit(hub, push):
    push()
    files = FILES | {"config.json": '{"a": 2}'}
    asked = len(hub.asked)
    assert push(files=files).returncode == 0
    holds(hub, files, commits=2)
    assert not [line for line in hub.asked[asked:] if "/info/lfs" in line]


def test_a_branch_is_made(hub, push):
    hub.create(NAME)
    assert push("--revision", "next").returncode == 0
    holds(hub, revision="next")
    holds(hub, {}, commits=0)
    assert push("--revision", "next").returncode == 0
    holds(hub, revision="next")


def test_a_pull_request_is_opened_once_and_never_empty(hub, push):
    hub.create(NAME)
    done = push("--create_pr")
    assert done.stdout == f"{NAME}: {hub.endpoint}/{NAME}/discussions/1\n", done.stderr
    holds(hub, revision="refs/pr/1")
    holds(hub, {}, commits=0)
    assert "refs/pr/1 proposes these files already" in push("--create_pr").stdout
    assert push("--revision", "refs/pr/1", files=FILES | {"config.json": "{}"}).returncode == 0
    assert len(hub.commits(NAME, revision="refs/pr/1")) == 3
    push()
    assert "no commit was made" in push("--create_pr").stdout
    assert list(hub.refs(NAME).pull_requests) == ["refs/pr/1"]


def test_private_holds_for_a_new_repository_and_a_public_one_is_refused(hub, push):
    assert push("--private").returncode == 0
    assert hub.stored["model"][NAME].private
    assert push("--private", files=FILES | {"config.json": "{}"}).returncode == 0
    hub.create("org/public")
    refused(push("--private", releases={"org/public": FILES}), "org/public: is public already; .*drop --private")
    assert len(hub.commits("org/public")) == 1


def test_a_tag_of_another_commit_is_refused_before_anything_is_written(hub, push):
    push("--tag", "v1")
    asked, tags = len(hub.asked), hub.refs(NAME).tags
    refused(push("--tag", "v1", files=FILES | {"config.json": "{}"}), "tag v1 is on another commit")
    holds(hub)
    assert hub.refs(NAME).tags == tags and all(line.startswith("GET") for line in hub.asked[asked:])


def test_a_tag_is_no_branch(hub, push):
    push("--tag", "v1")
    refused(push("--revision", "v1", files={}), "v1 is a tag; --revision takes a branch")


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["429", "503", "drop", "lost"])
@pytest.mark.parametrize("request_", ["repos/create", "/commit/", "validate-yaml", "/refs", "/tree/", "/tag/"])
def test_a_fault_that_passes_changes_nothing(hub, push, request_, fault):
    planned = hub.fail(request_, fault)
    done = push("--tag", "v1")
    assert planned.happened == 1
    assert done.returncode == 0, done.stderr
    holds(hub)
    assert hub.refs(NAME).tags == {"v1": hub.commits(NAME)[-1].id}


def test_a_lost_answer_about_a_pull_request_opens_no_second_one(hub, push):
    hub.create(NAME)
    hub.fail("/commit/", "lost")
    assert push("--create_pr").stdout.endswith("/discussions/1\n")
    assert list(hub.refs(NAME).pull_requests) == ["refs/pr/1"]


def test_a_fault_that_stays_leaves_the_repository_as_it_was_and_a_rerun_finishes(hub, push):
    hub.create(NAME, files={"config.json": b"old"})
    hub.fail("/commit/", "503", times=4)
    refused(push(), r"org/name: the Hub fails \(503\); .*run the same command again; nothing was committed")
    holds(hub, {"config.json": "old"}, commits=1)
    asked = len(hub.asked)
    assert push().returncode == 0
    holds(hub, commits=2)
    assert not [line for line in hub.asked[asked:] if line.startswith("PUT")]  # the weights were there


def test_a_commit_meanwhile_is_told_and_not_overwritten(hub, push):
    hub.create(NAME)
    hub.fail("/commit/", lambda: hub.commit(NAME, {"config.json": b"theirs"}, title="Theirs"))
    refused(push(), r"somebody committed to main meanwhile \(\w{8}\); nothing was overwritten")
    holds(hub, {"config.json": "theirs"}, commits=1)
    assert push().returncode == 0
    holds(hub, commits=2)


def test_between_model_and_adapter(hub, push):
    releases = {NAME: FILES, f"{NAME}-adapter": FILES}
    hub.fail(f"{NAME}-adapter/commit/", "500", times=4)
    refused(
        push(releases=releases), f"^error: {NAME} is published; {NAME}-adapter: the Hub fails .* nothing was commit"
    )
    holds(hub)
    done = push(releases=releases)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    holds(hub)
    assert len(hub.commits(f"{NAME}-adapter")) == 2


def test_all_repositories_are_looked_at_before_the_first_is_written(hub, push):
    hub.create(f"{NAME}-adapter")
    refused(push("--private", releases={NAME: FILES, f"{NAME}-adapter": FILES}), "adapter: is public already")
    assert NAME not in hub.stored["model"]


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "no token; set HF_TOKEN"),
        ("hf_read", "the token may not write there .*take one with write access"),
        ("hf_wrong", "the Hub does not know the token .*settings/tokens; nothing was changed"),
        ("hf_wr ite", "the token holds spaces"),
        ("hf_wrïte", "the token holds spaces, line breaks or letters"),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_tokens(hub, push, token, message, exists):
    if exists:
        hub.create(NAME)
    refused(push(token=token), message)
    assert not exists or len(hub.commits(NAME)) == 1
    assert exists or NAME not in hub.stored["model"]


def test_debug_shows_the_cause_without_the_token(hub, push):
    """`push` searches for it."""
    done = push("--debug", token="hf_wrong")
    assert done.returncode == 1 and "Traceback" in done.stderr and "401" in done.stderr


def test_a_token_among_the_files_is_refused(hub, push):
    refused(push(files=FILES | {"config.json": "hf_write"}), "config.json holds the token")
    assert NAME not in hub.stored["model"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "no answer from http://127.0.0.1:9 .*check the network"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_no_network(server, tmp_path, environment, message):
    with start(server, tmp_path, **environment) as process:
        refused(ask(process), message)
        process.stdin.close()


def test_a_storage_that_does_not_answer(hub, server, tmp_path):
    """hf_xet has errors of its own kinds; the local Hub has no such storage."""
    settings = {"HF_HUB_DISABLE_XET": "0", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1"}
    with start(server, tmp_path, **settings) as process:
        refused(ask(process), r"the Hub's storage fails \(.*404.*; the repository is there, without")
        process.stdin.close()
    assert any("/xet-write-token/" in line for line in hub.asked) and len(hub.commits(NAME)) == 1


def test_metadata_that_the_hub_refuses(hub, push):
    refused(push(files=FILES | {"README.md": "---\nlicense: [\n---\n"}), "the Hub refuses it: Invalid metadata")
    holds(hub, {}, commits=0)


# --- what is published ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tiny_run, tiny_decoder, tmp_path_factory):
    """`tiny_run` with an adapter and the model that has it merged, as train_st.py writes them."""
    folder = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("model"))
    save_adapted(tiny_decoder, folder)
    for name in ("model", "adapter"):
        (folder / name / "manifest.json").write_text("{}")
    return folder


@pytest.mark.usefixtures("in_this_process")
def test_dry_run_needs_neither_network_nor_token(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = ["--adapter", "--datasets", "org/graded", "--dry_run", "--output_dir", str(tmp_path / "card")]
    push_to_hub.main(["model", str(run_folder / "model"), NAME, *flags])
    card = ModelCard((tmp_path / "card" / "README.md").read_text())
    assert "org/graded" in card.data.datasets and "https://huggingface.co/datasets/org/graded)" in card.text
    assert card.data.library_name == "sentence-transformers" and f"{NAME}-adapter" in card.text
    card = ModelCard((tmp_path / "card" / "adapter" / "README.md").read_text())
    assert card.data.base_model == BASE and f"https://huggingface.co/{NAME})" in card.text
    told = capsys.readouterr().err
    assert f"{BASE} is not in the cache" in told and f"{NAME}-adapter: " in told and "nothing was uploaded" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["name"], "write ORG/NAME"),
        (["../name"], "repository '../name'"),
        ([NAME, "--create_pr", "--tag", "v1"], "merge the pull request first"),
        ([NAME, "--adapter", NAME], "the merged model has that repository"),
        ([NAME, "--adapter", "nowhere"], "write ORG/NAME"),
        ([NAME, "--datasets", "org/graded", "nowhere"], "write ORG/NAME"),
        ([NAME, "--run", "tests", "--adapter"], "tests/recipe.yaml: no such file"),
        ([NAME, "--run", "nowhere"], "nowhere/recipe.yaml: no such file"),
    ],
)
def test_bad_flags(run_folder, flags, message, monkeypatch):
    monkeypatch.setattr(
        push_to_hub, "verify_model", lambda folder: pytest.fail("verified") if "--run" in flags else {}
    )
    monkeypatch.setattr(push_to_hub, "render_card", lambda *args, **kwargs: "")
    with pytest.raises(InputError, match=re.escape(message)):
        push_to_hub.main(["model", str(run_folder / "model"), *flags, "--dry_run"])


def test_a_card_that_tells_a_local_path_is_refused(run_folder, monkeypatch):
    monkeypatch.setattr(push_to_hub, "verify_model", lambda folder: {})
    monkeypatch.setattr(push_to_hub, "render_card", lambda *args, **kwargs: f"data: {run_folder}/data/hub")
    with pytest.raises(InputError, match="the card of org/name would tell"):
        push_to_hub.main(["model", str(run_folder / "model"), NAME, "--dry_run"])


def test_the_real_command_publishes_a_model_that_strangers_load(hub, run_folder, tmp_path):
    environment = {**os.environ, **hub.environment(tmp_path, "hf_write")}
    flags = ["--license", "mit", "--adapter", "org/lora"]
    command = [sys.executable, "push_to_hub.py", "model", str(run_folder / "model"), NAME, *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(hub.commits(NAME)) == len(hub.commits("org/lora")) == 2
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} < set(hub.files("org/lora"))
    assert b"(https://huggingface.co/org/lora)" in hub.files(NAME)["README.md"]
    names = set(hub.files(NAME))
    assert {"README.md", "model.safetensors", "reference_vectors.json"} < names and "manifest.json" not in names
    script = """
import json
import numpy as np
from huggingface_hub import hf_hub_download
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("org/name", device="cpu")
reference = json.load(open(hf_hub_download("org/name", "reference_vectors.json")))["vectors"]
found = [model.encode(entry["text"], prompt_name=entry["prompt_name"]) for entry in reference]
print(len(found), np.abs(np.array(found) - [entry["vector"] for entry in reference]).max() < 1e-6)
"""
    read = hub.run(script, tmp_path / "elsewhere")
    assert read.stdout == "6 True\n", read.stderr


def test_the_real_command_publishes_data_that_strangers_load(hub, graded_data, tmp_path):  # noqa: F811
    environment = {**os.environ, **hub.environment(tmp_path, "hf_write")}
    command = [sys.executable, "push_to_hub.py", "dataset", str(graded_data.parent), NAME, "--private"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{NAME}: {hub.endpoint}/datasets/{NAME}/commit/")
    assert len(hub.commits(NAME, "dataset")) == 2 and hub.stored["dataset"][NAME].private
    files = hub.files(NAME, "dataset")
    shards = {path.relative_to(graded_data).as_posix(): path.read_bytes() for path in graded_data.rglob("*.parquet")}
    assert len(shards) > 5
    assert {name: content for name, content in files.items() if name.endswith(".parquet")} == shards
    assert f'load_dataset("{NAME}", "train")'.encode() in files["README.md"] and "manifest.json" not in files
    script = "from datasets import load_dataset; print(load_dataset('org/name', 'train')['train'].num_rows)"
    read = hub.run(script, tmp_path / "elsewhere", HF_TOKEN="hf_read")
    rows = json.loads((graded_data / "manifest.json").read_text())["rows"]["train"]
    assert read.stdout == f"{rows}\n", read.stderr
