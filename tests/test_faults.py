"""Every request of a push, and every way it can fail: the repositories are as before or whole, a line tells which, and
the same command finishes what was begun. Commands run in a process of their own, where waiting is a thousand times
shorter. `pytest tests/test_faults.py -s` prints the tables of docs/faults.md.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from local_hub import LocalHub
from test_data_verify import hub as graded_data  # noqa: F401
from test_modeling_verify import save_adapted

ROOT = Path(__file__).parents[1]
TOKEN = "hf_vBqLkWzXnTsYpRdCmGfJhA"
# Reads {"module", "argv", "environment"}, answers [exit code, stdout, stderr, what --debug would show], a line each.
# A model or data set is verified the first time that it is pushed.
WORKER = """
import contextlib, functools, importlib, io, json, os, sys, time, traceback
from argparse import Namespace
import push_to_hub
from dataset_builders.cli import run
from huggingface_hub import HfFileSystem

sleep, prepare = time.sleep, push_to_hub.prepare
time.sleep = lambda seconds: sleep(seconds / 1000)
cached = functools.cache(lambda arguments: prepare(Namespace(**dict(arguments))))
push_to_hub.prepare = lambda args: cached(tuple(vars(args).items()))
for line in sys.stdin:
    job = json.loads(line)
    os.environ |= job["environment"]
    HfFileSystem.clear_instance_cache()
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

    def __call__(self, module, *argv, token=TOKEN):
        """Exit code 0, or 2 and one line that starts with `error:`; never the token."""
        job = {"module": module, "argv": argv, "environment": {"HF_TOKEN": token}}
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
        """What the push came to with a fault at a request; then it is run again and has to finish."""
        self.start()
        planned = self.hub.fail(re.escape(line) + "$", fault, times, skip)
        error, _ = self.run()
        if not planned.happened:
            assert fault == "cut" and error is None
            return "-"
        found = self.check(error)
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
    """{(once or lasting, request, fault): outcomes}, filled by the tests and printed at the end."""
    found = {}
    yield found
    print("\n" + tables(found))


def tables(outcomes):
    lines = []
    for times, title in ((ONCE, "Once"), (LASTING, "As long as the command runs")):
        lines += [f"## {title}", "", f"| request | {' | '.join(FAULTS)} |", "|---" * (1 + len(FAULTS)) + "|"]
        for request in dict.fromkeys(request for _, request, _ in outcomes):
            cells = [", ".join(sorted(outcomes.get((times, request, fault), ()))) for fault in FAULTS]
            lines.append(f"| `{request}` | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


@pytest.mark.parametrize("name", PUSHES)
def test_each_request_with_each_fault(name, hub, client, folders, outcomes):
    push = Push(name, hub, client, folders)
    requests = list(each(push.requests))
    assert len(requests) > 10
    for line, skip in requests:
        for fault in FAULTS:
            for times in (ONCE, LASTING):
                found = push.outcome(line, fault, skip, times)
                outcomes.setdefault((times, kind(line), fault), set()).add(found)
