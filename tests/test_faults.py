"""Every request of a push, and every way it can fail: the repositories are as before or whole, a line tells which, and
the same command finishes what was begun. Commands run in a process of their own, where waiting is a thousand times
shorter. `pytest tests/test_faults.py -s` prints the table of docs/faults.md.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny_training
import yaml
from local_hub import LocalHub
from test_data_verify import hub as graded_data  # noqa: F401
from test_modeling_verify import save_adapted
from tiny_data import write_encoder, write_recipe, write_set, write_table

ROOT = Path(__file__).parents[1]
TOKEN = "hf_vBqLkWzXnTsYpRdCmGfJhA"
# Reads {"module", "argv", "environment", "stalled"}, answers [exit code, stdout, stderr, what --debug would show], a
# line each. A model or data set is verified the first time that it is pushed. Every request of a push has its limit,
# which is short for those that match `stalled`: they get no answer.
WORKER = """
import contextlib, functools, importlib, io, json, os, re, ssl, sys, time, traceback
from argparse import Namespace
import httpx2
import push_to_hub
from common.cli import run
from common.models import SILENCE
from huggingface_hub import HfFileSystem, close_session

sleep, prepare, send = time.sleep, push_to_hub.prepare, httpx2.HTTPTransport.handle_request

def send_with_a_limit(self, request):
    limits = request.extensions["timeout"]
    assert all(limits[kind] and limits[kind] <= SILENCE for kind in ("connect", "read", "write", "pool")), request
    if job["stalled"] and re.search(job["stalled"], f"{request.method} {request.url.raw_path.decode()}"):
        request.extensions["timeout"] = {**limits, "read": 0.1}
    return send(self, request)

httpx2.HTTPTransport.handle_request = send_with_a_limit
ssl.SSLContext.load_verify_locations = lambda *args, **kwargs: None  # a third of the time of a push, and all is http
time.sleep = lambda seconds: sleep(seconds / 1000)
cached = functools.cache(lambda arguments: prepare(Namespace(**dict(arguments))))
push_to_hub.prepare = lambda args: cached(tuple(vars(args).items()))
for line in sys.stdin:
    job = json.loads(line)
    os.environ |= job["environment"]
    HfFileSystem.clear_instance_cache()
    close_session()  # a proxy is read when a client is made
    output, errors, debug = io.StringIO(), io.StringIO(), ""
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            run(importlib.import_module(job["module"]).main, job["argv"])
        except SystemExit as end:
            code = end.code
            debug = "".join(traceback.format_exception(end.__context__)) if end.__context__ else ""
        except BaseException:
            code = 1
            traceback.print_exc()
    print(json.dumps([code, output.getvalue(), errors.getvalue(), debug]), flush=True)
"""
MODEL, ADAPTER, DATA = "org/name", "org/name-adapter", "org/data"
OLDER = {"config.json": b"{}", "model-00001-of-00002.safetensors": b"older", "LICENSE": b"theirs"}
# The repositories that are there before, and what is pushed to them.
PUSHES = {
    "model": ([MODEL], ["model", "{run}/model", MODEL, "--adapter", "--license", "mit", "--tag", "v1"]),
    "pull request": ([MODEL, ADAPTER], ["model", "{run}/model", MODEL, "--adapter", "--create_pr"]),
    "data set": ([], ["dataset", "{data}", DATA, "--private", "--revision", "next", "--tag", "v1"]),
}
FAULTS = ("429", "500", "503", "drop", "lost", "cut")
ONCE, LASTING = 1, 10**6
# What the line claims -> what is there. All else has to be whole.
CLAIMS = {
    "; nothing was changed": ("as before",),
    "; the repository is there, without the files": ("made",),
    "; perhaps the repository is there, without the files": ("as before", "made"),
    "; branch next is there, without the files": ("made",),
    "; perhaps branch next is there, without the files": ("made",),
    "; nothing was committed": ("as before", "made"),
    "; whether the commit landed is not known": ("as before", "made", "no tag", "whole"),
    ", the tag is not": ("no tag",),
    ", perhaps the tag, too": ("no tag", "whole"),
}


class Client:
    """A process that runs commands against a Hub."""

    def __init__(self, hub, folder, **environment):
        settings = {**os.environ, **hub.environment(folder), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
        self.cache, self.log = folder / "hf_home", folder / "log"
        with self.log.open("w") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            self.process = subprocess.Popen([sys.executable, "-c", WORKER], cwd=ROOT, env=settings, **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        assert TOKEN not in self.log.read_text()  # which the libraries wrote

    def __call__(self, module, *argv, token=TOKEN, proxy="", stalled=""):
        """The error, if there is one, and the output. Exit code 0, or 2 and one line `error: ...`; never the token."""
        environment = {"HF_TOKEN": token, "HTTP_PROXY": proxy}
        job = {"module": module, "argv": argv, "environment": environment, "stalled": stalled}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        code, output, errors, debug = json.loads(self.process.stdout.readline())
        assert not token or token not in output + errors + debug
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert code in (0, 2) and len(lines) == (code == 2) and "Traceback" not in errors, errors
        return lines[0].removeprefix("error: ") if lines else None, output


@pytest.fixture(scope="module")
def server():
    with LocalHub(tokens={TOKEN: "write", "hf_read": "read"}) as hub:
        yield hub


@pytest.fixture
def hub(server):
    server.clear()
    return server


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    with Client(server, tmp_path_factory.mktemp("client")) as client:
        yield client


@pytest.fixture(scope="module")
def folders(tiny_run, tiny_decoder, graded_data, tmp_path_factory):  # noqa: F811
    """A run with an adapter, and graded data."""
    run = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("model"))
    save_adapted(tiny_decoder, run)
    return {"run": run, "data": graded_data}


# --- pushing --------------------------------------------------------------------------------------------------------


def repositories(hub):
    """Branches, tags and pull requests by repository. Commits have the same ids in every run, if they are the same."""
    return {name: hub.refs(name, kind) for kind, stored in hub.stored.items() for name in stored}


class Push:
    """A push, what it does undisturbed, and what it comes to when something fails."""

    def __init__(self, name, hub, client, folders):
        self.hub, self.client = hub, client
        self.there, argv = PUSHES[name]
        self.argv = [argument.format(**folders) for argument in argv]
        self.start()
        self.before = repositories(hub)
        assert self.run()[0] is None
        self.requests = hub.asked.copy()
        self.whole = repositories(hub)
        self.commits = {name: set(repo.commits) for stored in hub.stored.values() for name, repo in stored.items()}
        assert all(len(commits) == 2 + (name in self.there) for name, commits in self.commits.items())
        assert self.run()[0] is None and repositories(hub) == self.whole
        for stored in hub.stored.values():
            for repo in stored.values():
                contents = [blob.content for commit in repo.commits.values() for blob in commit.files.values()]
                assert contents and not any(TOKEN.encode() in content for content in contents)

    def start(self):
        self.hub.clear()
        for name in self.there:
            self.hub.create(name, files=OLDER)

    def run(self):
        return self.client("push_to_hub", *self.argv)

    def outcome(self, line, fault, skip, times):
        """What the push came to with a fault at a request; if it failed, it is run again and has to finish."""
        self.start()
        planned = self.hub.fail(re.escape(line) + "$", fault, times, skip)
        error, _ = self.run()
        if not planned.happened:
            assert fault == "cut" and error is None
            return "-"
        found = self.check(error)
        if error is None:
            return found
        planned.times = 0
        assert self.run()[0] is None
        assert repositories(self.hub) == self.whole
        return found

    def check(self, error):
        """No commit but those of the undisturbed push; and what is there is as the line says."""
        states = {name: self.state(name) for name in self.whole}
        if error is None:
            assert set(states.values()) == {"whole"}
            return "done"
        claimed, name, told = re.fullmatch(r"(org/\S+ is published; )?(org/[\w-]+): (.*)", error).groups()
        assert not claimed or states[claimed.split()[0]] == "whole"
        state = states.pop(name)
        [expected] = [expected for claim, expected in CLAIMS.items() if told.endswith(claim)]
        assert state in expected, (state, error)
        assert re.search(r"run the same command again|check the (network|name)", told)
        assert set(states.values()) <= {"whole" if claimed else "as before"}
        return state

    def state(self, name):
        found, before, whole = (refs.get(name) for refs in (repositories(self.hub), self.before, self.whole))
        if found in (whole, before):
            return "whole" if found == whole else "as before"
        stored = {**self.hub.stored["model"], **self.hub.stored["dataset"]}[name].commits
        assert set(stored) <= self.commits[name]
        if found.branches == whole.branches:
            return "no tag"
        assert len(stored) == 1  # the Hub's own
        return "made"


def kind(line):
    """A request without names and hashes."""
    path = re.sub(r"[0-9a-f]{40,64}", "*", re.sub(r"org/[\w-]+", "ORG/NAME", line))
    return re.sub(r"\?(?!create_pr).*", "", re.sub(r"/(model|dataset)(s?)/", r"/TYPE\2/", path))


def each(requests):
    """(request, how many like it went before), but of the files' own requests only the first in a repository."""
    seen, before = set(), Counter()
    for line in requests:
        repo = re.search(r"org/[\w-]+", line)
        of_file = (kind(line), repo and repo[0]) if "lfs" in line else None
        if of_file not in seen:
            seen |= {of_file} - {None}
            yield line, before[line]
        before[line] += 1


@pytest.fixture(scope="module")
def outcomes():
    """{(request, fault): what the pushes came to}, of faults that stay; printed at the end."""
    found = {}
    yield found
    print("\n" + table(found))


def table(outcomes):
    lines = [f"| request | {' | '.join(FAULTS)} |", "|---" * (1 + len(FAULTS)) + "|"]
    for request in dict.fromkeys(request for request, _ in outcomes):
        cells = [", ".join(sorted(outcomes[request, fault])) for fault in FAULTS]
        lines.append(f"| `{request}` | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("name", PUSHES)
def test_each_request_with_each_fault(name, hub, client, folders, outcomes):
    push = Push(name, hub, client, folders)
    requests = list(each(push.requests))
    assert len(requests) > 10
    for line, skip in requests:
        for fault in FAULTS:
            assert push.outcome(line, fault, skip, ONCE) in ("done", "-")
            outcomes.setdefault((kind(line), fault), set()).add(push.outcome(line, fault, skip, LASTING))


def test_the_docs_have_what_was_found(outcomes):
    assert len(outcomes) > 100, "the tests above have to run first"
    assert table(outcomes) in (ROOT / "docs" / "faults.md").read_text()


STALLED = {
    r"GET /api/datasets/org/data$": "no answer from .*; nothing was changed",
    r"PUT /lfs/dataset/org/data/\w+": "no answer from .*; branch next is there, without the files",
    r"POST /api/datasets/org/data/commit/next": "no answer from .*; nothing was committed",
}


@pytest.mark.parametrize("request_", STALLED, ids=["first", "upload", "commit"])
def test_a_hub_that_never_answers_is_told(request_, hub, client, folders):
    """The library has no limit of its own: a push would wait for ever."""
    argv = [argument.format(**folders) for argument in PUSHES["data set"][1]]
    planned = hub.fail(request_, "stall", LASTING)
    error, _ = client("push_to_hub", *argv, stalled=request_)
    assert planned.happened > 1
    assert re.fullmatch(f"org/data: {STALLED[request_]}", error), error
    planned.times = 0
    assert client("push_to_hub", *argv)[0] is None
    assert set(hub.files(DATA, "dataset", "next")) > {"README.md"}


def test_a_commit_meanwhile_is_kept(hub, client, folders):
    push = Push("data set", hub, client, folders)
    push.start()
    hub.fail("/commit/", lambda: hub.commit(DATA, {"theirs": b""}, "dataset", "next"))
    error, _ = push.run()
    assert re.fullmatch(
        r"org/data: somebody committed to next meanwhile \(\w{8}\); nothing was overwritten; .*", error
    )
    assert set(hub.files(DATA, "dataset", "next")) == {".gitattributes", "theirs"}
    assert push.run()[0] is None
    assert set(hub.files(DATA, "dataset", "next")) > {"theirs", "README.md"}


class Page(BaseHTTPRequestHandler):
    """What a hotel's network answers to everybody."""

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        page = b"<html>Please log in</html>"
        self.send_response(self.server.status)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    do_POST = do_PUT = do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def proxy():
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("name", PUSHES)
def test_nobody_is_let_in(name, hub, client, folders, proxy):
    """Wrong tokens, no network, and a proxy with a page of its own: nothing is changed."""
    push = Push(name, hub, client, folders)
    push.start()
    command = ["push_to_hub", *push.argv]
    first = push.argv[2]
    told = {
        "no token; set HF_TOKEN .*": {"token": ""},
        f"{first}: the Hub does not know the token .*; nothing was changed": {"token": "hf_wrong"},
        f"{first}: the token may not write there .*; nothing was changed": {"token": "hf_read"},
        f"{first}: no answer from .*; check the network .*; nothing was changed": {"proxy": "http://127.0.0.1:9"},
    }
    for line, options in told.items():
        error, _ = client(*command, **options)
        assert re.fullmatch(line, error), error
        assert repositories(hub) == push.before
    for status, line in {200: "no answer from", 407: r"the Hub refuses it: .*\(407\)", 502: "the Hub fails"}.items():
        proxy.status = status
        error, _ = client(*command, proxy=f"http://127.0.0.1:{proxy.server_port}")
        assert re.fullmatch(f"{first}: {line}.*; nothing was changed", error), error
        assert repositories(hub) == push.before
    assert push.run()[0] is None
    assert repositories(hub) == push.whole


# --- reading --------------------------------------------------------------------------------------------------------


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def readers(hub, folders, tiny_encoder, tiny_decoder, tmp_path):
    """Commands that read models and data from the Hub, and the folder that each writes."""
    data = folders["run"] / "data"
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
    config = ["--config", str(tmp_path / "data.yaml")], ["--config", str(tmp_path / "train.yaml")]
    built, trained = tmp_path / "built", tmp_path / "trained"
    return {
        "eval.search": (["--model", MODEL, "--data", str(data), "how do i parse a date"], data / "embeddings"),
        "dataset_builders.build": ([*config[0], "--output_dir", str(built)], built),
        "train_st": ([*config[1], "--output_dir", str(trained)], trained),
    }


READS = {"eval.search": FAULTS[2:4], "dataset_builders.build": FAULTS[3:4], "train_st": FAULTS[3:4]}


@pytest.mark.parametrize("module", READS)
def test_each_request_of_a_reader(module, hub, client, readers):
    """The result is the same or a line tells why there is none; never another result. Every request once, with the
    faults of READS that stay; downloads are cut, too. A second run goes on with what the first one fetched."""
    argv, output = readers[module]

    def read():
        shutil.rmtree(output, ignore_errors=True)
        error, said = client(module, *argv)
        kept = {
            name: data for name, data in content(output).items() if name.endswith((".npy", ".parquet", ".safetensors"))
        }
        return error, (kept, said if module == "eval.search" else None)

    def read_anew():
        shutil.rmtree(client.cache, ignore_errors=True)
        hub.asked.clear()
        return read()

    read_anew()
    error, whole = read_anew()
    assert error is None and whole[0]
    happened = 0
    requests = {kind(line): line for line in reversed(hub.asked)}
    assert len(requests) >= 10
    for line in requests.values():
        downloads = line.startswith(("GET /lfs", "GET /api/resolve-cache"))
        for fault in (*READS[module], *(["cut"] if downloads else [])):
            planned = hub.fail(re.escape(line) + "$", fault, LASTING)
            error, found = read_anew()
            happened += planned.happened > 0
            assert error or found == whole, (line, fault)
            planned.times = 0
            assert not error or read() == (None, whole)
    assert happened >= len(requests)


@pytest.mark.parametrize(
    "request_", ["GET /api/models/org/name$", "GET /api/models/org/name/tree/"], ids=["first", "files"]
)
def test_a_reader_gives_up_on_a_hub_that_never_answers(request_, hub, client, readers):
    shutil.rmtree(client.cache, ignore_errors=True)
    planned = hub.fail(request_, "stall", LASTING)
    error, _ = client("eval.search", *readers["eval.search"][0], stalled=request_)
    assert planned.happened and re.match(f"model '{MODEL}': .*the Hub did not serve", error), (error, hub.asked)
    planned.times = 0
    assert client("eval.search", *readers["eval.search"][0])[0] is None


def test_a_private_model_needs_a_token(hub, client, readers):
    hub.stored["model"][MODEL].private = True
    shutil.rmtree(client.cache, ignore_errors=True)
    error, _ = client("eval.search", *readers["eval.search"][0], token="")
    assert error.startswith(f"model '{MODEL}': not a local folder, and the Hub did not serve it: ")
    assert client("eval.search", *readers["eval.search"][0])[0] is None


# --- a full disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["cache", "temporary files"])
def test_a_full_disk(what, hub, readers, folders, tmp_path):
    """A file system of 16 KiB for what is downloaded, or for what `datasets` unpacks before data are pushed."""
    full = tmp_path / "full"
    full.mkdir()
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mounted += ['mount -t tmpfs -o size=16k tmpfs "$0" && exec "$@"', str(full)]
    if subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    environment = {**os.environ, **hub.environment(tmp_path, TOKEN)}
    if what == "cache":
        command, environment["HF_HOME"] = ["-m", "eval.search", *readers["eval.search"][0]], str(full)
    else:
        command, environment["TMPDIR"] = ["push_to_hub.py", "dataset", str(folders["data"]), "org/new"], str(full)
    done = subprocess.run(
        [*mounted, sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "No space left on device" in lines[0] or "the disk is full" in lines[0]
    assert "org/new" not in hub.stored["dataset"]
