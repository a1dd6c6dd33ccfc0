"""Commands that talk to a Hub, run again and again in a process of their own: the client reads its endpoint when it is
imported, and waits a thousand times shorter there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from local_hub import TOKEN, LocalHub

ROOT = Path(__file__).parents[1]
# Reads {"module", "argv", "environment", "releases", "stalled"} and answers [exit code, stdout, stderr], a line each.
# `releases` {repository: {name: content}} stand in for a model, which would be verified. Every request has its limit
# of time, a short one if it matches `stalled`: it gets no answer.
WORKER = """
import contextlib, importlib, io, json, os, re, sys, time, traceback
import httpx2
import push_to_hub
from common.cli import run
from common.models import HUB_TIMEOUT
from huggingface_hub import HfFileSystem, close_session

sleep, prepare, send = time.sleep, push_to_hub.prepare_model, httpx2.HTTPTransport.handle_request

def send_with_a_limit(self, request):
    limits = request.extensions["timeout"]
    assert all(limits[kind] and limits[kind] <= HUB_TIMEOUT for kind in ("connect", "read", "write", "pool")), request
    if job["stalled"] and re.search(job["stalled"], f"{request.method} {request.url.raw_path.decode()}"):
        request.extensions["timeout"] = {**limits, "read": 0.1}
    return send(self, request)

httpx2.HTTPTransport.handle_request = send_with_a_limit
time.sleep = lambda seconds: sleep(seconds / 1000)
for line in sys.stdin:
    job = json.loads(line)
    os.environ |= job["environment"]
    HfFileSystem.clear_instance_cache()
    close_session()
    releases = [
        push_to_hub.Release(repo_id, "model", "Model", {name: text.encode() for name, text in files.items()})
        for repo_id, files in job["releases"].items()
    ]
    push_to_hub.prepare_model = (lambda args: releases) if releases else prepare
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            run(importlib.import_module(job["module"]).main, job["argv"])
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = 1
            traceback.print_exc()
    print(json.dumps([code, output.getvalue(), errors.getvalue()]), flush=True)
"""


def environment(hub: LocalHub, folder: Path, token: str = "") -> dict[str, str]:
    """Variables for a client's process; the clients read most of them when they are imported."""
    return {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder / "hf_home"),
        "HF_DATASETS_CACHE": str(folder / "hf_home" / "datasets"),
        "HF_TOKEN": token,  # empty: none, also where the machine has one
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "OMP_NUM_THREADS": "1",
    }


def run_python(script: str, hub: LocalHub, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Python code in a process of its own, with a cache in `folder`."""
    settings = environment(hub, folder) | variables
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=settings, capture_output=True, text=True)


class Client:
    """A process that runs commands against a Hub."""

    def __init__(self, hub: LocalHub, folder: Path, **variables: str):
        settings = environment(hub, folder) | variables
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

    def __call__(self, module, *argv, releases=None, token=TOKEN, stalled="") -> subprocess.CompletedProcess:
        """What the command came to. The token is in nothing that it prints."""
        job = {"module": module, "argv": argv, "environment": {"HF_TOKEN": token}, "releases": releases or {}}
        print(json.dumps({**job, "stalled": stalled}), file=self.process.stdin, flush=True)
        done = subprocess.CompletedProcess(argv, *json.loads(self.process.stdout.readline()))
        assert not token or token not in done.stdout + done.stderr
        return done


def error_of(done: subprocess.CompletedProcess) -> str | None:
    """The one line of a command that ended with exit code 2; None of one that did what it was asked for."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode in (0, 2) and len(lines) == (done.returncode == 2), done.stderr
    assert "Traceback" not in done.stderr
    return lines[0].removeprefix("error: ") if lines else None
