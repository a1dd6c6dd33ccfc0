"""Publishing over real HTTP to a local Hub: one commit or none, whatever fails on the way."""

import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import httpx2
import numpy as np
import pytest
from hub_client import ROOT, Client, environment, error_of, run_python
from huggingface_hub import ModelCard
from local_hub import READ_TOKEN, TOKEN, LocalHub
from release_demo import compare
from tiny_release import BASE, write_published

import push_to_hub
from common.cli import InputError
from release.hub import Release, hub_errors, publish

FILES = {
    "README.md": "---\nlicense: mit\n---\n# A model\n",
    "config.json": '{"a": 1}',
    "model.safetensors": "weights" * 100,
    "1_Pooling/config.json": "{}",
}
NAME, ADAPTER = "org/name", "org/name-adapter"
CHANGED = FILES | {"config.json": '{"a": 2}'}


@pytest.fixture(scope="module")
def server():
    with LocalHub() as hub:
        yield hub


@pytest.fixture
def hub(server):
    """The server, empty."""
    server.clear()
    return server


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    with Client(server, tmp_path_factory.mktemp("client")) as client:
        yield client


@pytest.fixture
def push(hub, client):
    def push(*flags, files=FILES, releases=None, **options):
        releases = releases or {NAME: files}
        return client("push_to_hub", "model", "unused", next(iter(releases)), *flags, releases=releases, **options)

    return push


def refused(done, message):
    assert re.search(message, error_of(done) or ""), done


def holds(hub, files=FILES, commits=1, **where):
    """The repository holds exactly these files, in so many commits after the first, which is the Hub's own."""
    assert {name: content.decode() for name, content in hub.files(NAME, **where).items()} == files
    assert len(hub.commits(NAME, **where)) == commits


# --- one commit -----------------------------------------------------------------------------------------------------


def test_everything_goes_in_one_commit_and_again_in_none(hub, push):
    done = push("--tag", "v1")
    assert error_of(done) is None
    holds(hub)
    [commit] = hub.commits(NAME)
    assert done.stdout == f"{NAME}: {hub.endpoint}/{NAME}/commit/{commit.id}\n"
    assert hub.repositories[NAME].tags == {"v1": commit.id} and not hub.repositories[NAME].private
    again = push("--tag", "v1")
    assert error_of(again) is None
    assert f"holds these files already (commit {commit.id[:8]}); no commit" in again.stdout
    holds(hub)


def test_what_a_new_version_lacks_goes_and_what_others_put_there_stays(hub, push):
    theirs = {"LICENSE": b"MIT", "onnx/model.safetensors": b"o", "notes.json": b"{}"}
    older = {"model-00001-of-00002.safetensors": b"1", "2_Dense/config.json": b"{}", "adapter_config.json": b"{}"}
    hub.create(NAME, theirs | older)
    assert error_of(push()) is None
    holds(hub, FILES | {name: content.decode() for name, content in theirs.items()}, commits=2)
    asked = len(hub.asked)
    assert error_of(push(files=CHANGED)) is None  # the weights are not sent again
    assert not [line for line in hub.asked[asked:] if line.startswith("PUT")]


def test_a_branch_is_made(hub, push):
    hub.create(NAME)
    for _ in range(2):
        assert error_of(push("--revision", "next")) is None
        holds(hub, revision="next")
    holds(hub, {}, commits=0)


def test_a_pull_request_is_opened_once_and_never_empty(hub, push):
    hub.create(NAME)
    hub.fail("/commit/", "lost")
    refused(push("--create_pr"), "run the same command again")
    holds(hub, revision="refs/pr/1")
    holds(hub, {}, commits=0)
    assert "refs/pr/1 proposes these files already" in push("--create_pr").stdout
    assert push("--create_pr", files=CHANGED).stdout == f"{NAME}: {hub.endpoint}/{NAME}/discussions/2\n"
    assert error_of(push("--revision", "refs/pr/1", files=CHANGED)) is None
    assert len(hub.commits(NAME, revision="refs/pr/1")) == 2
    newer = CHANGED | {"config.json": "{}"}
    push(files=newer)
    assert "no commit was made" in push("--create_pr", files=newer).stdout
    assert list(hub.repositories[NAME].branches) == ["main", "refs/pr/1", "refs/pr/2"]
    # back to what one that was merged proposed
    hub.repositories[NAME].closed = {"refs/pr/1", "refs/pr/2"}
    assert push("--create_pr", files=CHANGED).stdout == f"{NAME}: {hub.endpoint}/{NAME}/discussions/3\n"


def test_private_holds_for_a_new_repository_and_a_public_one_is_refused(hub, push):
    assert error_of(push("--private")) is None and hub.repositories[NAME].private
    assert error_of(push("--private", files=CHANGED)) is None
    hub.create(ADAPTER)
    releases = {"org/other": FILES, ADAPTER: FILES}
    refused(push("--private", releases=releases), f"{ADAPTER}: is public already; .*drop --private")
    assert "org/other" not in hub.repositories  # all are looked at before the first is written


def test_a_tag_stays_where_it_is(hub, push):
    push("--tag", "v1")
    first, tags = hub.commits(NAME)[-1].id, dict(hub.repositories[NAME].tags)
    refused(push("--tag", "v1", files=CHANGED), f"the files are there, commit .*; tag v1 is on {first[:8]}")
    assert error_of(push(files=CHANGED)) is None
    asked = len(hub.asked)
    refused(push("--tag", "v1", files=CHANGED), f"tag v1 is on another commit, {first[:8]}")
    assert hub.repositories[NAME].tags == tags and all(line.startswith("GET") for line in hub.asked[asked:])
    refused(push("--revision", "v1"), "v1 is a tag; --revision takes a branch")


# --- faults ---------------------------------------------------------------------------------------------------------

STEPS = {"first": "GET /api/models/org/name", "upload": "PUT /lfs/", "commit": "/commit/"}
FAULTS = {"first": ("503", "stall"), "upload": ("429", "drop"), "commit": ("503", "drop", "lost", "stall")}


@pytest.mark.parametrize(("step", "fault"), [(step, fault) for step, kinds in FAULTS.items() for fault in kinds])
def test_a_failed_push_is_one_line_and_is_finished_by_a_rerun(hub, push, step, fault):
    before = {"config.json": "old"}
    hub.create(NAME, {"config.json": b"old"})
    planned = hub.fail(STEPS[step], fault, times=100)
    refused(push(stalled=STEPS[step] if fault == "stall" else ""), f"^{NAME}: .*; run the same command again")
    assert planned.happened
    landed = step == "commit" and fault == "lost"
    holds(hub, FILES if landed else before, commits=1 + landed)
    planned.times = 0
    asked = len(hub.asked)
    assert error_of(push()) is None
    holds(hub, commits=2)
    assert step != "commit" or not [line for line in hub.asked[asked:] if line.startswith("PUT")]


@pytest.mark.parametrize("fault", ["429", "lost"])
def test_an_upload_that_fails_once_is_repeated(hub, push, fault):
    planned = hub.fail(STEPS["upload"], fault)
    assert error_of(push()) is None and planned.happened
    holds(hub)


def test_a_commit_meanwhile_is_not_overwritten(hub, push):
    hub.create(NAME)
    hub.fail("/commit/", lambda: hub.commit(NAME, {"config.json": b"theirs"}))
    refused(push(), "somebody committed meanwhile, and nothing was overwritten")
    holds(hub, {"config.json": "theirs"}, commits=1)
    assert error_of(push()) is None
    holds(hub, commits=2)


def test_between_model_and_adapter(hub, push):
    releases = {NAME: FILES, ADAPTER: FILES}
    hub.fail(f"{ADAPTER}/commit/", "503")
    refused(push(releases=releases), f"^{NAME} is published; {ADAPTER}: .*503.*run the same command again")
    holds(hub)
    assert len(push(releases=releases).stdout.splitlines()) == 2
    holds(hub)
    assert len(hub.commits(ADAPTER)) == 1


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "no token; set HF_TOKEN"),
        ("hf_read", "the token may not write there; take one with write access"),
        ("hf_wrong", "the Hub does not know the token; make one"),
        ("hf_wrïte", "the token holds spaces, line breaks or letters"),
    ],
)
def test_tokens(hub, push, token, message):
    refused(push(token=token), message)
    assert NAME not in hub.repositories
    hub.create(NAME)
    refused(push(token=token), message)
    assert hub.commits(NAME) == []


def test_debug_shows_the_cause_without_the_token(hub, push):
    """`client` searches for it."""
    done = push("--debug", token="hf_wrong")
    assert done.returncode == 1 and "Traceback" in done.stderr and "401" in done.stderr


def test_a_token_among_the_files_is_refused(hub, push):
    refused(push(files=FILES | {"config.json": "hf_read"}, token="hf_read"), "config.json holds the token")
    assert NAME not in hub.repositories


def test_no_network(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set; unset it, or check without the Hub: --dry_run"):
        publish([Release(NAME, "model", "Model", {})], Namespace(revision=None, tag=None))
    told = f"before; {NAME}: ConnectError: no route; run the same command again to finish"
    with pytest.raises(InputError, match=told), hub_errors(NAME, "before; "):
        raise httpx2.ConnectError("no route")


def test_metadata_that_the_hub_refuses(hub, push):
    refused(push(files=FILES | {"README.md": "---\nlicense: my own\n---\n"}), 'Invalid metadata.*"license" with value')
    holds(hub, {}, commits=0)


# --- what is published ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_this_process")
def test_event_files_are_published_where_the_hub_looks_for_them(adapted_run):
    arguments = push_to_hub._parse(["model", str(adapted_run / "model"), NAME, "--tensorboard", "--dry_run"])
    with pytest.raises(InputError, match="logs: no event files of TensorBoard; train with report_to"):
        push_to_hub.prepare_model(arguments)
    events = adapted_run / "logs" / "sts" / "events.out.tfevents.1.host.2.0"
    earlier = adapted_run / "logs" / "earlier" / events.name  # of a stage that the recipe has no longer
    for path in (events, earlier):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    [release] = push_to_hub.prepare_model(arguments)
    assert release.files["runs/sts/events.out.tfevents.0"] == events and earlier not in release.files.values()
    card = ModelCard(release.files["README.md"].decode())
    assert "tensorboard" in card.data.tags and f"(https://huggingface.co/{NAME}/tensorboard)" in card.text


@pytest.mark.usefixtures("in_this_process")
def test_dry_run_needs_neither_network_nor_token(adapted_run, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    flags = ["--adapter", "--datasets", "org/graded", "--dry_run", "--output_dir", str(tmp_path / "card")]
    flags += ["--title", "Questions about dates", "--language", "de", "en", "--license", "mit"]
    push_to_hub.main(["model", str(adapted_run / "model"), NAME, *flags])
    card = ModelCard((tmp_path / "card" / "README.md").read_text())
    assert (card.data.language, card.data.license) == (["de", "en"], "mit")
    assert "(https://huggingface.co/org/name/tensorboard)" not in card.text and "tensorboard" not in card.data.tags
    assert "\n# Questions about dates\n" in card.text and "German and English text of up to" in card.text
    assert "org/graded" in card.data.datasets and "https://huggingface.co/datasets/org/graded)" in card.text
    assert card.data.library_name == "sentence-transformers" and f"{NAME}-adapter" in card.text
    card = ModelCard((tmp_path / "card" / "adapter" / "README.md").read_text())
    assert card.data.base_model == BASE and f"https://huggingface.co/{NAME})" in card.text
    shown = capsys.readouterr().err
    assert f"{BASE} is not in the cache" in shown and f"{NAME}-adapter: " in shown and "nothing was uploaded" in shown


SCORES = "task: {type: x}, metrics: [{type: x, value: 1}]"


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("data: runs/x/data/hub", "README.md names a local folder, 'runs/x/data/hub'"),
        ("see https://huggingface.co/datasets/../pairs", "names a local folder"),
        ("---\nbase_model: ./models/x\n---\n", "would name the local folder './models/x' in its metadata"),
        (
            f"---\nmodel-index: [{{name: x, results: [{{dataset: {{type: ../pairs, name: x}}, {SCORES}}}]}}]\n---\n",
            "would name the local folder '../pairs' in its metadata",
        ),
        ("---\nbase_model: org/base\n---\nof org/data and x/data/hub", None),
    ],
)
def test_a_card_with_a_local_folder_is_refused(card, message):
    evidence = {"recipe": {"dataset_name": "runs/x/data/hub"}, "data": {"org/data": None, "runs/x/data/hub": None}}
    release = Release(NAME, "model", "Model", {"README.md": card.encode()})
    if message is None:
        return push_to_hub._check_card(release, Path("runs/x"), evidence)
    with pytest.raises(InputError, match=re.escape(message)):
        push_to_hub._check_card(release, Path("runs/x"), evidence)


READ = """
import json
import numpy as np
from datasets import load_dataset
from huggingface_hub import hf_hub_download
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("org/name", device="cpu")
reference = json.load(open(hf_hub_download("org/name", "reference_vectors.json")))["vectors"]
found = [model.encode(entry["text"], prompt_name=entry["prompt_name"]) for entry in reference]
print(len(found), np.abs(np.array(found) - [entry["vector"] for entry in reference]).max() < 1e-6)
whole = load_dataset("org/data", "train")["train"]
streamed = load_dataset("org/data", "train", split="train", streaming=True)
print(whole.num_rows, list(streamed) == whole.to_list())
"""


def test_the_real_command_publishes_what_strangers_load(hub, adapted_run, tmp_path):
    data = write_published(tmp_path / "build")
    for arguments in (["model", adapted_run / "model", NAME], ["dataset", data.parent, "org/data", "--private"]):
        command = [sys.executable, "push_to_hub.py", *map(str, arguments)]
        variables = environment(hub, tmp_path, TOKEN)
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        page = f"datasets/{arguments[2]}" if arguments[0] == "dataset" else arguments[2]
        assert done.stdout == f"{arguments[2]}: {hub.endpoint}/{page}/commit/{hub.commits(page)[-1].id}\n", done.stderr
        assert len(hub.commits(page)) == 1 and "manifest.json" not in hub.files(page)
    assert {"README.md", "model.safetensors", "reference_vectors.json"} < set(hub.files(NAME))
    files = hub.files("datasets/org/data")
    shards = {path.relative_to(data).as_posix(): path.read_bytes() for path in data.rglob("*.parquet")}
    assert len(shards) > 5 and hub.repositories["datasets/org/data"].private
    assert {name: content for name, content in files.items() if name.endswith(".parquet")} == shards
    assert b'load_dataset("org/data", "train")' in files["README.md"]
    read = run_python(READ, hub, tmp_path / "elsewhere", HF_TOKEN=READ_TOKEN)
    rows = json.loads((data / "manifest.json").read_text())["rows"]["train"]
    assert read.stdout == f"9 True\n{rows} True\n", read.stderr


def test_the_release_demo_tells_what_differs(capsys):
    here = {"rows": {"train": 2}, "hashes": {"train": "a"}, "queries": 3, "ndcg@10": 0.5}
    vectors = np.ones((4, 2), dtype="float32")
    compare({**here, "vectors": vectors}, {**here, "vectors": vectors.copy()}, 0.5004)
    assert "the same rows, vectors and score" in capsys.readouterr().out
    for change in ({"hashes": {"train": "b"}}, {"ndcg@10": 0.4}, {"vectors": vectors * 1.001}):
        with pytest.raises(SystemExit, match="not what RUN holds"):
            compare({**here, "vectors": vectors}, {**here, "vectors": vectors, **change}, 0.5)
