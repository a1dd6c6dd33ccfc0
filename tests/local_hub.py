"""A stand-in for the Hugging Face Hub: what its clients ask for to read a data set, over real HTTP.

    with LocalHub({"org/set": {COMMIT: {"README.md": b"...", "train.jsonl": b"..."}}}) as hub:
        hub.run("from datasets import load_dataset; ...", tmp_path)

The last commit of a repository is its `main`. `hub.asked` lists the requests in order.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
API = re.compile(
    r"/api/datasets/(?P<repo>[^/]+/[^/]+)(?:/(?P<verb>revision|tree|paths-info)/(?P<rev>[^/]+)(?P<path>.*))?$"
)
FILE = re.compile(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)$")


class LocalHub:
    def __init__(self, repos: dict[str, dict[str, dict[str, bytes]]]) -> None:
        self.repos = repos
        self.asked: list[str] = []

    def __enter__(self) -> "LocalHub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                hub.asked.append(f"{self.command} {self.path}")
                status, headers, content = hub.answer(unquote(urlsplit(self.path).path), body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = answer

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def run(self, script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
        """Run Python code in a process of its own, as the client reads its endpoint when it is imported."""
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(folder / "hf_home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", script]
        settings = {**os.environ, **settings, **environment}
        return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=120)

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        match = API.match(path) or FILE.match(path)
        if match is None:
            return 404, {}, b""
        repo = self.repos.get(match["repo"])
        if repo is None:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        newest = list(repo)[-1]
        commit = newest if match["rev"] in (None, "main") else match["rev"]
        if commit not in repo:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Revision not found"}, b""
        files = repo[commit]
        if match.re is FILE:
            if match["path"] not in files:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
            content = files[match["path"]]
            return 200, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit}, content
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in files.items()
        ]
        if match["verb"] == "tree":
            folder = match["path"].strip("/")
            return _json([entry for entry in entries if entry["path"].startswith(f"{folder}/" if folder else "")])
        if match["verb"] == "paths-info":
            asked = _asked_paths(body)
            return _json([entry for entry in entries if entry["path"] in asked])
        siblings = [{"rfilename": name} for name in files]
        return _json({"id": match["repo"], "sha": commit, "private": False, "tags": [], "siblings": siblings})


def _asked_paths(body: bytes) -> list[str]:
    try:
        return json.loads(body)["paths"]
    except json.JSONDecodeError:  # a form
        from urllib.parse import parse_qs

        return parse_qs(body.decode())["paths"]


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _json(value) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()
