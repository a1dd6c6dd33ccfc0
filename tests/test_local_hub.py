"""The local Hub, asked by the real clients: each in a process of its own, as they read their endpoint once."""

import base64
import http.client
import json
import os
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import release_demo
import tiny_data
import tiny_training
import yaml
from huggingface_hub import EvalResult, ModelCardData
from local_hub import LocalHub, card_problems, default_attributes, front_matter, matches_attributes
from release_demo import compare

from common.cli import InputError
from dataset_builders import build
from eval import retrieval

# `told` gives what a call returned, or the error's class and status
START = """
import json
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download

api, told = HfApi(), {}

def tell(name, call):
    try:
        told[name] = call()
    except Exception as error:
        told[name] = [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]

def commit(files, title="Upload", **more):
    operations = [CommitOperationAdd(name, content.encode()) for name, content in files.items()]
    return api.create_commit("org/model", operations, commit_message=title, **more)
"""


def ask(hub: LocalHub, folder: Path, script: str, token: str = "hf_write", **environment: str):
    """What the script put into `told`."""
    program = f"{START}\n{script}\nprint(json.dumps(told, default=str))"
    done = hub.run(program, folder, HF_TOKEN=token, HF_HUB_DISABLE_PROGRESS_BARS="1", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def git(folder: Path, *arguments: str, **environment: str) -> str:
    settings = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, **environment}
    done = subprocess.run(["git", *arguments], cwd=folder, env=settings, capture_output=True, text=True, check=True)
    return done.stdout.strip()


FILES = {
    "README.md": b"---\nlicense: mit\n---\nA model.\n",
    "config.json": b"{}",
    "model.safetensors": b"\0weights" * 1000,
    "modules/a-file.txt": b"a",
    "modules.json": b"[]",
}


def test_blobs_trees_and_commits_have_the_ids_that_git_gives_them(tmp_path):
    hub = LocalHub()
    first = hub.create("org/model")
    second = hub.commit("org/model", FILES, title="Upload")
    git(tmp_path, "init", "-q")
    commits = hub.commits("org/model")
    assert [commit.id for commit in commits] == [first, second] and len(commits[1].files) == 6
    parent = []
    for commit in commits:
        for name, blob in commit.files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(blob.in_git)
        git(tmp_path, "-c", "core.autocrlf=false", "-c", "filter.lfs.required=false", "add", "-A")
        who = {f"GIT_{role}_{key}": "tester" for role in ("AUTHOR", "COMMITTER") for key in ("NAME",)}
        who |= {f"GIT_{role}_EMAIL": "tester@example.org" for role in ("AUTHOR", "COMMITTER")}
        who |= {f"GIT_{role}_DATE": commit.date.replace(".000Z", "+0000") for role in ("AUTHOR", "COMMITTER")}
        tree = git(tmp_path, "write-tree")
        assert git(tmp_path, "commit-tree", tree, *parent, "-m", commit.title, **who) == commit.id
        parent = ["-p", commit.id]
    assert (
        commits[1].files["model.safetensors"].in_git.startswith(b"version https://git-lfs.github.com/spec/v1\noid sha")
    )


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_patterns_of_gitattributes_match_what_git_matches(tmp_path, repo_type):
    names = ["a.safetensors", "deep/er/b.parquet", "tokenizer.json", "README.md", "saved_model/x", "saved_model/a/b"]
    names += ["plot.png", "run/events.tfevents.1", "a.tar.gz", "a.lfs.x", "x.bin.txt", "other/saved_model/x"]
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitattributes").write_bytes(default_attributes(repo_type))
    rules = [line.split(": ") for line in git(tmp_path, "check-attr", "filter", *names).splitlines()]
    expected = {name: value == "lfs" for name, _, value in rules}
    assert len(expected) == len(names) and 5 < sum(expected.values()) < len(names)
    assert {name: matches_attributes(name, default_attributes(repo_type)) for name in names} == expected


def test_a_folder_is_uploaded_once_and_comes_back(tmp_path):
    folder = tmp_path / "folder"
    for name, content in {**FILES, "empty.bin": b"", "text.model": b"x" * 600}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with LocalHub() as hub:
        told = ask(
            hub,
            tmp_path,
            f"""
folder = {str(folder)!r}
told["url"] = api.create_repo("org/model")
api.create_repo("org/model", exist_ok=True)
tell("again", lambda: api.create_repo("org/model"))
told["ids"] = [api.upload_folder(repo_id="org/model", folder_path=folder).oid for _ in range(2)]
told["there"] = api.list_repo_files("org/model")
told["lfs"] = [entry.path for entry in api.list_repo_tree("org/model", recursive=True, expand=True)
               if getattr(entry, "lfs", None)]
told["folders"] = [entry.tree_id for entry in api.list_repo_tree("org/model") if hasattr(entry, "tree_id")]
told["titles"] = [commit.title for commit in api.list_repo_commits("org/model")]
told["snapshot"] = snapshot_download("org/model")
told["info"] = api.model_info("org/model", files_metadata=True).siblings[-1].lfs
""",
        )
        assert told["url"] == f"{hub.endpoint}/org/model" and told["again"] == ["HfHubHTTPError", 409]
        files, commits = hub.files("org/model"), hub.commits("org/model")
    assert sorted(files) == sorted(told["there"]) == [".gitattributes", *sorted([*FILES, "empty.bin", "text.model"])]
    assert told["ids"] == [commits[-1].id] * 2 and told["titles"] == [commit.title for commit in commits[::-1]]
    assert commits[-1].changed == tuple(sorted(set(files) - {".gitattributes"}))
    assert told["lfs"] == ["model.safetensors", "text.model"] and len(told["folders"]) == 1
    assert len([line for line in hub.asked if line.startswith("PUT ")]) == 2  # the second upload sent nothing
    for name, content in files.items():
        assert (Path(told["snapshot"]) / name).read_bytes() == content
        assert name == ".gitattributes" or (folder / name).read_bytes() == content
    assert told["info"]["size"] == 600


def test_commits_branches_tags_and_pull_requests(tmp_path):
    with LocalHub() as hub:
        first = hub.create("org/model", files={"a.txt": b"1", "old/b.txt": b"2"})
        told = ask(
            hub,
            tmp_path,
            f"""
first = {first!r}
told["second"] = commit({{"a.txt": "one"}}, parent_commit=first).oid
tell("outdated", lambda: commit({{"a.txt": "two"}}, parent_commit=first))
made = commit({{"a.txt": "pr"}}, create_pr=True, parent_commit=first)
told["pull request"] = [made.pr_revision, made.pr_url, made.oid]
told["on it"] = commit({{"c.txt": "pr"}}, revision="refs/pr/1").oid
told["no pull request"] = commit({{"a.txt": "one"}}, create_pr=True).pr_url
api.create_branch("org/model", branch="dev/x", revision=first)
api.create_branch("org/model", branch="dev/x", exist_ok=True)
tell("branch again", lambda: api.create_branch("org/model", branch="dev/x"))
tell("branch of nothing", lambda: api.create_branch("org/model", branch="y", revision="none"))
tell("branch of a pull request", lambda: api.create_branch("org/model", branch="refs/pr/7"))
told["on branch"] = commit({{"d.txt": "d"}}, revision="dev/x").oid
api.create_tag("org/model", tag="v1", revision=first)
tell("tag again", lambda: api.create_tag("org/model", tag="v1"))
tell("commit to a tag", lambda: commit({{"a.txt": "t"}}, revision="v1"))
tell("commit to nothing", lambda: commit({{"a.txt": "t"}}, revision="none"))
told["read"] = open(hf_hub_download("org/model", "a.txt", revision="v1")).read()
told["read pr"] = open(hf_hub_download("org/model", "a.txt", revision="refs/pr/1")).read()
refs = api.list_repo_refs("org/model", include_pull_requests=True)
told["refs"] = [[(ref.name, ref.ref, ref.target_commit) for ref in found]
                for found in (refs.branches, refs.tags, refs.pull_requests)]
api.delete_tag("org/model", tag="v1")
api.delete_branch("org/model", branch="dev/x")
tell("main", lambda: api.delete_branch("org/model", branch="main"))
delete = CommitOperationDelete
told["deleted"] = api.create_commit("org/model", [delete("old/")], commit_message="-").oid
tell("delete again", lambda: api.create_commit("org/model", [delete("old/")], commit_message="-"))
tell("delete nothing", lambda: api.create_commit("org/model", [delete("none")], commit_message="-"))
""",
        )
        refs = hub.refs("org/model")
        assert hub.files("org/model")["a.txt"] == b"one" and "old/b.txt" not in hub.files("org/model")
        assert hub.files("org/model", revision="refs/pr/1")["a.txt"] == b"pr"
        assert [commit.id for commit in hub.commits("org/model")][1:] == [first, told["second"], told["deleted"]]
        assert hub.commits("org/model")[-1].changed == ("old/b.txt",)
    assert told["pull request"][:2] == ["refs/pr/1", f"{hub.endpoint}/org/model/discussions/1"]
    assert hub.commits("org/model", revision="refs/pr/1")[-2].id == told["pull request"][2]
    assert told["no pull request"] is None and refs == ({"main": told["deleted"]}, {}, {"refs/pr/1": told["on it"]})
    assert told["refs"][0] == [
        ["dev/x", "refs/heads/dev/x", told["on branch"]],
        ["main", "refs/heads/main", told["second"]],
    ]
    assert told["refs"][1:] == [[["v1", "refs/tags/v1", first]], [["refs/pr/1", "refs/pr/1", told["on it"]]]]
    assert (told["read"], told["read pr"]) == ("1", "pr")
    assert told["outdated"] == ["HfHubHTTPError", 412]
    assert told["branch again"] == told["tag again"] == ["HfHubHTTPError", 409]
    assert told["branch of a pull request"] == told["commit to a tag"] == ["BadRequestError", 400]
    assert told["branch of nothing"] == told["commit to nothing"] == ["RevisionNotFoundError", 404]
    assert told["delete again"] == told["delete nothing"] == ["RemoteEntryNotFoundError", 404]
    assert told["main"] == ["HfHubHTTPError", 403]


READS = """
for repo in ("public", "private", "missing"):
    tell(f"{repo} info", lambda: api.model_info(f"org/{repo}").private)
    tell(f"{repo} file", lambda: hf_hub_download(f"org/{repo}", "w.safetensors") and "read")
tell("revision", lambda: api.model_info("org/public", revision="none"))
tell("file of no revision", lambda: hf_hub_download("org/public", "a.txt", revision="none"))
tell("no file", lambda: hf_hub_download("org/public", "none.txt"))
tell("exists", lambda: [api.file_exists("org/public", name) for name in ("w.safetensors", "none.txt")])
tell("whoami", lambda: api.whoami()["auth"]["accessToken"]["role"])
add = [CommitOperationAdd("a.txt", b"a")]
tell("commit", lambda: api.create_commit("org/public", add, commit_message="a").commit_message)
tell("create", lambda: api.create_repo("org/new") and "made")
tell("create existing", lambda: api.create_repo("org/public", exist_ok=True) and "there")
tell("branch", lambda: api.create_branch("org/public", branch="dev"))
"""
OPEN = {"revision": ["RevisionNotFoundError", 404], "file of no revision": ["RevisionNotFoundError", 404]}
OPEN |= {"no file": ["RemoteEntryNotFoundError", 404], "exists": [True, False]}
OPEN |= {"public info": False, "public file": "read"}
HIDDEN, REFUSED = ["RepositoryNotFoundError", 401], ["HfHubHTTPError", 403]
MISSING, WRONG = ["RepositoryNotFoundError", 404], ["HfHubHTTPError", 401]
SEEN = {**OPEN, "private info": True, "private file": "read", "missing info": MISSING, "missing file": MISSING}


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (
            "hf_write",
            {**SEEN, "whoami": "write", "commit": "a", "create": "made", "create existing": "there", "branch": None},
        ),
        (
            "hf_read",
            {**SEEN, "whoami": "read", "commit": REFUSED, "create": REFUSED, "create existing": "there"}
            | {"branch": REFUSED},
        ),
        (
            "",
            {**OPEN, "private info": HIDDEN, "private file": HIDDEN, "missing info": HIDDEN, "missing file": HIDDEN}
            | {"whoami": ["LocalTokenNotFoundError", None], "commit": HIDDEN, "create": WRONG}
            | {"create existing": "there", "branch": HIDDEN},
        ),
        ("hf_wrong", None),
    ],
)
def test_what_a_token_may_do(tmp_path, token, expected):
    with LocalHub() as hub:
        for name in ("public", "private"):
            hub.create(f"org/{name}", private=name == "private", files={"w.safetensors": b"\0", "a.txt": b""})
        told = ask(hub, tmp_path, READS, token)
        made = "org/new" in hub.stored["model"]
        changed = len(hub.commits("org/public")) > 2 or "dev" in hub.refs("org/public").branches
    if expected is None:  # a wrong token is refused also where none is needed
        expected = dict.fromkeys(told, WRONG)
    assert told == expected
    assert made == changed == (token == "hf_write")


def test_a_private_repository_is_made_by_its_first_push(tmp_path):
    with LocalHub() as hub:
        ask(hub, tmp_path, 'api.create_repo("org/data", repo_type="dataset", private=True)')
        assert (
            hub.stored["dataset"]["org/data"].private
            and "*.png" in hub.files("org/data", "dataset")[".gitattributes"].decode()
        )


def fetch(hub: LocalHub, method: str, path: str, body: bytes | None = None, **headers: str):
    """Status, headers and body of one request, without any client's help."""
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=10)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def test_parts_of_a_file_are_served_by_range():
    content = bytes(range(100))
    with LocalHub() as hub:
        hub.create("org/model", files={"a.txt": content.replace(b"\0", b"x")})
        content = hub.files("org/model")["a.txt"]
        status, headers, _ = fetch(hub, "HEAD", "/org/model/resolve/main/a.txt")
        assert status == 307 and headers["X-Linked-Size"] == "100" and headers["X-Repo-Commit"]
        where = headers["Location"]
        assert fetch(hub, "GET", where)[::2] == (200, content)
        for asked, span, part in [
            ("bytes=0-9", "bytes 0-9/100", content[:10]),
            ("bytes=90-", "bytes 90-99/100", content[90:]),
            ("bytes=90-500", "bytes 90-99/100", content[90:]),
            ("bytes=-7", "bytes 93-99/100", content[-7:]),
        ]:
            status, headers, found = fetch(hub, "GET", where, Range=asked)
            assert (status, headers["Content-Range"], found) == (206, span, part)
        status, headers, found = fetch(hub, "GET", where, Range="bytes=100-")
        assert (status, headers["Content-Range"], found) == (416, "bytes */100", b"")


def test_a_download_that_is_cut_goes_on_from_where_it_was(tmp_path):
    content = os.urandom(2**20) * 24  # the client keeps what it has in steps of 10 MiB
    hub, ranges = LocalHub(), []
    serve = hub.answer_storage
    hub.answer_storage = lambda request: ranges.append(request.headers["Range"]) or serve(request)
    with hub:
        hub.create("org/model", files={"w.safetensors": content})
        hub.fail("GET /lfs/", "cut")
        told = ask(hub, tmp_path, 'told["path"] = hf_hub_download("org/model", "w.safetensors")')
    assert ranges == [None, f"bytes={10 * 2**20}-"]
    assert Path(told["path"]).read_bytes() == content


def test_the_storage_needs_a_signed_url():
    with LocalHub() as hub:
        hub.create("org/model", private=True, files={"w.safetensors": b"\0secret"})
        bearer = {"Authorization": "Bearer hf_read"}
        status, headers, _ = fetch(hub, "GET", "/org/model/resolve/main/w.safetensors", **bearer)
        where = urlsplit(headers["Location"])
        assert status == 302 and where.netloc != urlsplit(hub.endpoint).netloc
        for query, method, expected in ((where.query, "GET", 200), ("", "GET", 403), (where.query, "PUT", 403)):
            connection = http.client.HTTPConnection(where.netloc, timeout=10)
            connection.request(method, f"{where.path}?{query}", b"x" if method == "PUT" else None)
            answer = connection.getresponse()
            assert answer.status == expected and (answer.read() == b"\0secret") == (expected == 200)
            connection.close()


@pytest.mark.parametrize("path", ["../a", "a/../../b", "/a", "a//b", ".git/config", "a/.git/b", "", ".", "a\\b"])
def test_a_path_that_leaves_the_repository_is_refused(path):
    line = {"key": "file", "value": {"path": path, "content": base64.b64encode(b"x").decode(), "encoding": "base64"}}
    good = {"key": "file", "value": {"path": "good.txt", "content": "x"}}
    lines = [{"key": "header", "value": {"summary": "title"}}, good, line]
    with LocalHub() as hub:
        first = hub.create("org/model")
        body = "\n".join(json.dumps(line) for line in lines).encode()
        url = "/api/models/org/model/commit/main"
        status, _, content = fetch(hub, "POST", url, body, Authorization="Bearer hf_write")
        assert status == 400 and b"Invalid path" in content
        assert [commit.id for commit in hub.commits("org/model")] == [first]  # and nothing of its other files


def test_long_lists_come_in_pages(tmp_path):
    files = {f"part/{number:04}.txt": b"" for number in range(1100)}
    with LocalHub() as hub:
        hub.create("org/data", "dataset", files=files)
        told = ask(
            hub,
            tmp_path,
            """
told["all"] = api.list_repo_files("org/data", repo_type="dataset")
tree = list(api.list_repo_tree("org/data", "part", repo_type="dataset", expand=True))
told["titles"] = sorted({entry.last_commit.title for entry in tree})
told["folder"] = [entry.path for entry in tree]
told["infos"] = [type(info).__name__ for info in api.get_paths_info("org/data", ["part", "none", "part/0001.txt"],
                                                                     repo_type="dataset")]
tell("no folder", lambda: list(api.list_repo_tree("org/data", "none", repo_type="dataset")))
""",
        )
        pages = [line for line in hub.asked if "/tree/" in line]
    assert told["all"] == [".gitattributes", *files] and told["folder"] == list(files)
    assert told["titles"] == ["Upload files"] and told["infos"] == ["RepoFolder", "RepoFile"]
    assert told["no folder"] == ["RemoteEntryNotFoundError", 404]
    assert len(pages) == 2 + 22 + 1


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ("license: mit\nlanguage: en", None),
        ("license: other\nlanguage: [en, de]\ntags:\n- a\nmodel-index:\n- name: x\n  results: []", None),
        ("language:\n- en\n- code\nbase_model: org/base\ndatasets: [org/data]", None),
        ("license: gpl-2.0-or-later", '"license" must be one of'),
        ("license: MIT", '"license" must be one of'),
        ("license: [mit, mine]", '"license[1]" must be one of'),
        ("language: English", '"language" with value "English" is not valid'),
        ("base_model: ../student", '"base_model" with value "../student" is not valid'),
        ("base_model: /home/me/model", "Use a model id"),
        ("datasets:\n- runs/demo/data/hub", '"datasets[0]" with value "runs/demo/data/hub" is not valid'),
        ("model-index: 3", '"model-index" must be an array'),
        ("configs: all", '"configs" must be an array'),
        ("license: mit\n  or another", '"license" must be one of'),
        ("license mit", "can not read a block mapping entry"),
        ("license: mit\nlicense: mit", "duplicated mapping key"),
        ("tags:\n\t- a", "can not read a block mapping entry"),
    ],
)
def test_a_card_is_checked(metadata, problem):
    errors, warnings = card_problems(f"---\n{metadata}\n---\n# A card\n")
    assert not warnings and len(errors) == (problem is not None)
    assert all(problem in error for error in errors)


def test_the_top_level_of_yaml_is_read_as_a_yaml_parser_reads_it():
    results = [EvalResult("retrieval", "org/data", "Data", "ndcg_at_10", 0.5)]
    lists = {"language": ["en", "de"], "datasets": ["org/data", "other"], "tags": ["a: b", "'c'", "d #e"]}
    data = ModelCardData(
        license="mit", base_model="org/base", model_name="a name: long " * 20, eval_results=results, **lists
    )
    found, expected = front_matter(f"---\n{data.to_yaml()}\n---\n"), yaml.safe_load(data.to_yaml())
    assert found.keys() == expected.keys() and len(expected) == 6
    assert {name: found[name] for name in expected if name not in ("model-index", "tags")} == {
        name: value for name, value in expected.items() if name not in ("model-index", "tags")
    }
    assert card_problems(f"---\n{data.to_yaml()}\n---\n") == ([], [])


def test_a_bad_card_stops_the_client_before_it_uploads(tmp_path):
    with LocalHub() as hub:
        first = hub.create("org/model")
        told = ask(
            hub,
            tmp_path,
            """
import warnings
tell("bad", lambda: commit({"README.md": "---\\nlicense: my own\\n---\\n", "w.safetensors": "weights"}))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    commit({"README.md": "# no metadata"})
told["warned"] = [str(warning.message) for warning in caught]
""",
        )
        assert [commit.parent for commit in hub.commits("org/model")] == [None, first]
    assert told["bad"] == ["ValueError", None]
    assert len(told["warned"]) == 1 and "empty or missing yaml metadata" in told["warned"][0]


@pytest.mark.parametrize(
    ("fault", "error", "landed"),
    [
        ("429", ["HfHubHTTPError", 429], 0),
        ("500", ["HfHubHTTPError", 500], 0),
        ("503", ["HfHubHTTPError", 503], 0),
        ("drop", ["RemoteProtocolError", None], 0),
        ("lost", ["RemoteProtocolError", None], 1),
        ("cut", ["RemoteProtocolError", None], 1),
    ],
)
def test_a_commit_that_fails_has_landed_or_not(tmp_path, fault, error, landed):
    script = 'tell("first", lambda: commit({"a.txt": "a"}))\ncommit({"a.txt": "a"})'
    with LocalHub() as hub:
        hub.create("org/model")
        hub.fail(r"POST .*/commit/main", fault)
        told = ask(hub, tmp_path, script)
        assert told == {"first": error}
        assert len(hub.commits("org/model")) == 2 and hub.files("org/model")["a.txt"] == b"a"
        assert len([line for line in hub.asked if "/commit/" in line]) == 2 - landed


def test_steps_before_the_commit_are_tried_again_by_the_client(tmp_path):
    with LocalHub() as hub:
        hub.create("org/model")
        steps = ("/preupload/", "objects/batch", "^PUT", "objects/verify")
        for step, fault in zip(steps, ("429", "503", "drop", "lost"), strict=True):
            hub.fail(step, fault)
        ask(hub, tmp_path, 'commit({"w.safetensors": "weights"})')
        assert [len([line for line in hub.asked if step.strip("^") in line]) for step in steps] == [2, 2, 2, 2]
        assert len(hub.commits("org/model")) == 2


def test_faults_wait_for_their_turn_and_a_commit_can_come_between(tmp_path):
    with LocalHub() as hub:
        first = hub.create("org/model")
        hub.fail("/commit/", lambda: hub.commit("org/model", {"b.txt": b"theirs"}), skip=1)
        hub.fail("GET /api/models/org/model$", "stall")
        told = ask(
            hub,
            tmp_path,
            f"""
head = commit({{"a.txt": "1"}}, parent_commit={first!r}).oid
tell("meanwhile", lambda: commit({{"a.txt": "2"}}, parent_commit=head))
tell("stalled", lambda: api.model_info("org/model", timeout=0.5))
told["then"] = api.model_info("org/model").sha
""",
        )
        commits = hub.commits("org/model")
    assert told["meanwhile"] == ["HfHubHTTPError", 412] and told["stalled"] == ["ReadTimeout", None]
    assert len(commits) == 3 and told["then"] == commits[-1].id and commits[-1].changed == ("b.txt",)


def test_ids_are_the_same_in_every_run():
    ids = []
    for _ in range(2):
        hub = LocalHub()
        hub.create("org/model", files=FILES)
        ids.append(hub.commit("org/model", {"a": b"a"}))
    assert ids[0] == ids[1] and len(ids[0]) == 40


ENCODE = """
import json
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({model!r}, trust_remote_code=False)
{push}
texts = ["how do i parse date", "read file", ""]
print(json.dumps([model.encode_query(texts).tolist(), model.encode_document(texts).tolist()]))
"""


def test_a_model_that_sentence_transformers_pushed_gives_the_same_vectors(tmp_path, tiny_encoder):
    with LocalHub() as hub:
        push = "model.push_to_hub('org/model', private=True, exist_ok=True)"
        vectors = []
        for name, script in (
            ("here", ENCODE.format(model=str(tiny_encoder), push=push)),
            ("there", ENCODE.format(model="org/model", push="")),
        ):
            done = hub.run(script, tmp_path / name, HF_TOKEN="hf_write")
            assert done.returncode == 0, done.stderr
            vectors.append(json.loads(done.stdout.splitlines()[-1]))
        assert hub.stored["model"]["org/model"].private
        assert "model.safetensors" in hub.files("org/model") and len(hub.commits("org/model")) == 2
    assert len(vectors[0][0]) == 3 and len(vectors[0][0][0]) == 32 and any(vectors[0][0][0])
    assert vectors[0] == vectors[1] and vectors[0][0] != vectors[0][1]


def test_a_data_set_that_datasets_pushed_gives_the_same_rows(tmp_path):
    push = """
from datasets import Dataset
rows = {"query": ["a", "b", "c"], "label": [[0.5, 0.25], [1.0], []]}
data = Dataset.from_dict(rows)
data.push_to_hub("org/data", "train", num_shards=2)
data.push_to_hub("org/data", "train", num_shards=2)
data.select([0]).push_to_hub("org/data", "train", split="test")
"""
    read = """
import json
from datasets import load_dataset
rows = [load_dataset("org/data", "train", split="train", streaming=streaming) for streaming in (False, True)]
rows = [list(found) for found in [*rows, load_dataset("org/data", "train", split="test")]]
print(json.dumps(rows))
"""
    with LocalHub() as hub:
        done = hub.run(push, tmp_path / "here", HF_TOKEN="hf_write")
        assert done.returncode == 0, done.stderr
        assert len(hub.commits("org/data", "dataset")) == 3  # the second push changed nothing
        assert sum(name.endswith(".parquet") for name in hub.files("org/data", "dataset")) == 3
        done = hub.run(read, tmp_path / "there")
        assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    expected = [
        {"query": "a", "label": [0.5, 0.25]},
        {"query": "b", "label": [1.0]},
        {"query": "c", "label": []},
    ]
    assert rows == [expected, expected, expected[:1]]


def test_the_release_demo_tells_what_differs(capsys):
    here = {"rows": {"train": 2}, "hashes": {"train": "a"}, "queries": 3, "ndcg@10": 0.5}
    vectors = np.ones((4, 2), dtype="float32")
    compare({**here, "vectors": vectors}, {**here, "vectors": vectors.copy()}, 0.5004)
    assert "the same rows, vectors and score" in capsys.readouterr().out
    for change in ({"hashes": {"train": "b"}}, {"ndcg@10": 0.4}, {"vectors": vectors * 1.001}):
        with pytest.raises(SystemExit, match="not what RUN holds"):
            compare({**here, "vectors": vectors}, {**here, "vectors": vectors, **change}, 0.5)
    with pytest.raises(SystemExit, match="not the one in RUN's results"):
        compare({**here, "vectors": vectors}, {**here, "vectors": vectors}, 0.51)


@pytest.fixture
def finished(tmp_path, tiny_decoder, monkeypatch):
    """The demo in small, in the words that the tiny decoder knows: data, a model of one stage, and its scores."""
    monkeypatch.setattr(tiny_data, "WORDS", tiny_training.WORDS)
    teacher = tiny_data.write_encoder(tmp_path / "teacher")
    recipe = tiny_data.write_recipe(tmp_path / "data.yaml", tiny_data.write_set(tmp_path / "set"), teacher)
    run = tmp_path / "run"
    build.main(["--config", str(recipe), "--output_dir", str(run / "data")])
    recipe = tiny_training.two_stages(tiny_decoder, run / "data" / "hub")
    recipe |= {"stages": recipe["stages"][1:], "max_steps": 2, "eval_strategy": "no", "num_negatives": 3}
    with tiny_training.own_cache(tmp_path / "cache"):
        assert tiny_training.train(tmp_path, recipe) == run
    retrieval.main(["--run", str(run), "--data", str(run / "data"), "--output_dir", str(run / "results")])
    return run


def test_the_release_demo(finished, capfd):
    release_demo.main([str(finished)])
    told = capfd.readouterr().out
    assert told.count("holds these files already") == 2 and told.count("$ python push_to_hub.py") == 4
    assert "no adapter of a model on the Hub" in told and "20 test queries" in told
    assert told.endswith("the same rows, vectors and score\n")
    (finished / "results" / "metrics.json").unlink()
    with pytest.raises(InputError, match=r"metrics\.json; make it first"):
        release_demo.main([str(finished)])
