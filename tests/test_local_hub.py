"""The local Hub, asked by the real client in a process of its own, as that reads its endpoint once."""

import json

import numpy as np
import pytest
from local_hub import LocalHub, card_problems
from release_demo import compare

# `tell` notes what a call returned, or the error's class and status
START = """
import json
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download

api, seen = HfApi(), {}

def tell(name, call):
    try:
        seen[name] = call()
    except Exception as error:
        seen[name] = [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]

def commit(files, **more):
    operations = [CommitOperationAdd(name, content.encode()) for name, content in files.items()]
    return api.create_commit("org/model", operations, commit_message="Upload", **more)
"""


def ask(hub, folder, script):
    """What the script put into `seen`."""
    program = f"{START}\n{script}\nprint(json.dumps(seen, default=str))"
    done = hub.run(program, folder, HF_TOKEN="hf_write", HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_folder_is_uploaded_once_and_comes_back(tmp_path):
    files = {"README.md": b"---\nlicense: mit\n---\nA model.\n", "model.safetensors": b"\0weights" * 1000}
    files |= {"modules/a-file.txt": b"a", "modules.json": b"[]", "empty.bin": b"", "text.model": b"x" * 600}
    for name, content in files.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    with LocalHub() as hub:
        seen = ask(
            hub,
            tmp_path,
            f"""
seen["url"] = api.create_repo("org/model")
tell("again", lambda: api.create_repo("org/model"))
folder = {str(tmp_path / "folder")!r}
seen["ids"] = [api.upload_folder(repo_id="org/model", folder_path=folder).oid for _ in range(2)]
seen["snapshot"] = snapshot_download("org/model")
found = api.verify_repo_checksums("org/model", local_dir=folder)
seen["checked"] = [found.checked_count, len(found.mismatches), found.extra_paths]
""",
        )
        assert seen["url"] == f"{hub.endpoint}/org/model" and seen["again"] == ["HfHubHTTPError", 409]
        assert {name: content for name, content in hub.files("org/model").items() if name in files} == files
        assert seen["ids"] == [hub.commits("org/model")[-1].id] * 2 and len(hub.commits("org/model")) == 2
        assert len([line for line in hub.asked if line.startswith("PUT ")]) == 2  # the second upload sent nothing
    assert seen["checked"] == [len(files), 0, []]
    for name, content in files.items():
        assert (tmp_path / "hf_home" / seen["snapshot"] / name).read_bytes() == content


def test_commits_branches_tags_and_pull_requests(tmp_path):
    with LocalHub() as hub:
        first = hub.create("org/model", files={"a.txt": b"1"})
        seen = ask(
            hub,
            tmp_path,
            f"""
first = {first!r}
seen["second"] = commit({{"a.txt": "one"}}, parent_commit=first).oid
tell("outdated", lambda: commit({{"a.txt": "two"}}, parent_commit=first))
made = commit({{"a.txt": "pr"}}, create_pr=True, parent_commit=first)
seen["pull request"] = [made.pr_revision, made.pr_url]
api.create_branch("org/model", branch="dev/x", revision=first)
api.create_tag("org/model", tag="v1", revision=first)
tell("commit to a tag", lambda: commit({{"a.txt": "t"}}, revision="v1"))
tell("commit to nothing", lambda: commit({{"a.txt": "t"}}, revision="none"))
seen["read"] = [open(hf_hub_download("org/model", "a.txt", revision=r)).read() for r in ("v1", "refs/pr/1")]
tell("no file", lambda: hf_hub_download("org/model", "none.txt"))
""",
        )
        refs = hub.refs("org/model")
        assert [commit.id for commit in hub.commits("org/model")][1:] == [first, seen["second"]]
        assert seen["pull request"] == ["refs/pr/1", f"{hub.endpoint}/org/model/discussions/1"]
    assert refs.branches == {"main": seen["second"], "dev/x": first} and refs.tags == {"v1": first}
    assert seen["read"] == ["1", "pr"] and (seen["outdated"][1], seen["commit to a tag"][1]) == (412, 400)
    assert seen["commit to nothing"] == ["RevisionNotFoundError", 404]
    assert seen["no file"] == ["RemoteEntryNotFoundError", 404]


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ("license: mit\nlanguage: [en, de]\nbase_model: org/base\ndatasets: [org/data]", None),
        ("license: MIT", '"license"'),
        ("language: English", '"language"'),
        ("datasets:\n- runs/demo/data/hub", '"datasets" with value "runs/demo/data/hub"'),
        ("license: [", "bad indentation or mapping"),
    ],
)
def test_a_card_is_checked(metadata, problem):
    errors = card_problems(f"---\n{metadata}\n---\n# A card\n")
    assert len(errors) == (problem is not None) and all(problem in error for error in errors)


def test_the_release_demo_tells_what_differs(capsys):
    here = {"rows": {"train": 2}, "hashes": {"train": "a"}, "queries": 3, "ndcg@10": 0.5}
    vectors = np.ones((4, 2), dtype="float32")
    compare({**here, "vectors": vectors}, {**here, "vectors": vectors.copy()}, 0.5004)
    assert "the same rows, vectors and score" in capsys.readouterr().out
    for change in ({"hashes": {"train": "b"}}, {"ndcg@10": 0.4}, {"vectors": vectors * 1.001}):
        with pytest.raises(SystemExit, match="not what RUN holds"):
            compare({**here, "vectors": vectors}, {**here, "vectors": vectors, **change}, 0.5)
