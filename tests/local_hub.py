"""A small Hugging Face Hub over real HTTP, for tests: what its clients ask for to publish and to read models and data.

    with LocalHub() as hub:
        hub.run("from huggingface_hub import HfApi; HfApi().create_repo('org/model')", tmp_path, HF_TOKEN="hf_write")
        hub.files("org/model")                                    # {name: bytes} of main
        hub.fail(r"POST .*/commit/", "lost")                      # the next commit lands, its answer does not arrive

Written after what huggingface_hub 2.4, datasets 5.2, sentence-transformers 6.2 and transformers 5.23 send and read.
`hub.asked` lists the requests in order, as "METHOD path". No Xet storage, multipart uploads, signed URLs, pages of
long lists, git, organisations or limits; of cards only their YAML, licence, language and ids are checked.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import parse_qs, unquote

from hub_http import ROUTES, Answer, Fault, Refused, Request, Server, answer_json, handler, route
from hub_storage import ATTRIBUTES, LICENSES, Blob, Commit, Refs, Repository, blobs, card_problems, is_lfs

__all__ = ["LICENSES", "ROOT", "LocalHub", "card_problems"]
ROOT = Path(__file__).parents[1]
DATE = "2026-01-01T00:00:00.000Z"
API = r"/api/(?P<type>model|dataset)s/(?P<repo>[^/]+(?:/[^/]+)?)"
FILES = r"/(?:(?P<type>dataset)s/)?(?P<repo>[^/]+(?:/[^/]+)?)"


class LocalHub:
    def __init__(
        self,
        repos: Mapping[str, Mapping[str, Mapping[str, bytes]]] | None = None,
        tokens: Mapping[str, str] | None = None,
    ) -> None:
        """`repos`: public data sets as {id: {commit id: {name: content}}}, the last commit being `main`.

        `tokens`: what each may do, "read" or "write".
        """
        self.tokens = {"hf_write": "write", "hf_read": "read"} if tokens is None else dict(tokens)
        self.asked: list[str] = []
        self.stored: dict[str, dict[str, Repository]] = {"model": {}, "dataset": {}}
        self.repos = self.stored["dataset"]
        for repo_id, commits in (repos or {}).items():
            self.repos[repo_id] = Repository(f"datasets/{repo_id}")
            for commit_id, files in commits.items():
                self.repos[repo_id][commit_id] = files
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._stopped = threading.Event()

    # --- what tests use

    def __enter__(self) -> "LocalHub":
        self._server = Server(("127.0.0.1", 0), handler(self))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *error) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, folder: Path, token: str | None = None) -> dict[str, str]:
        """Variables for a client's process; the clients read most of them when they are imported."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(folder / "hf_home"),
            "HF_DATASETS_CACHE": str(folder / "hf_home" / "datasets"),
            "HF_TOKEN": token or "",  # empty: none, also where the machine has one
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_HUB_OFFLINE": "0",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
        """Run Python code in a process of its own, as the client reads its endpoint when it is imported."""
        settings = {**os.environ, **self.environment(folder), **environment}
        return subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=settings, capture_output=True, text=True)

    def create(
        self, repo_id: str, repo_type: str = "model", private: bool = False, files: Mapping[str, bytes] | None = None
    ) -> str:
        """A new repository, with a second commit where there are files. Returns the id of main."""
        with self._lock:
            assert repo_id not in self.stored[repo_type], f"{repo_id} exists"
            path = repo_id if repo_type == "model" else f"datasets/{repo_id}"
            repo = self.stored[repo_type][repo_id] = Repository(path, private)
            repo.commit("main", {".gitattributes": Blob(ATTRIBUTES, lfs=False)}, "initial commit")
            return self.commit(repo_id, files, repo_type) if files else repo.refs.branches["main"]

    def commit(
        self, repo_id: str, files: Mapping[str, bytes], repo_type: str = "model", revision: str = "main"
    ) -> str:
        """Add or replace files, as somebody else's commit. Returns its id."""
        with self._lock:
            repo = self.stored[repo_type][repo_id]
            return repo.commit(revision, repo.find(revision).files | blobs(files), "Upload files").id

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        commit = self.stored[repo_type][repo_id].find(revision)
        return {name: blob.content for name, blob in commit.files.items()}

    def commits(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> list[Commit]:
        """Oldest first."""
        return self.stored[repo_type][repo_id].history(revision)[::-1]

    def refs(self, repo_id: str, repo_type: str = "model") -> Refs:
        return Refs(*(dict(names) for names in self.stored[repo_type][repo_id].refs))

    def clear(self) -> None:
        """Neither repositories nor requests nor faults, as at the beginning."""
        with self._lock:
            for collection in (*self.stored.values(), self.asked, self._faults):
                collection.clear()

    def fail(self, pattern: str, fault: str | Callable[[], object], times: int = 1) -> Fault:
        """Let the next `times` requests whose "METHOD path" has `pattern` in it fail.

        "429", "503": that answer. "drop": the connection is closed and nothing done. "lost": it is done, and the
        connection closed without an answer. "cut": half of the body, then closed. "stall": no answer while the server
        runs, and nothing done. A function is called before the request is answered as always.
        """
        assert callable(fault) or fault in ("429", "503", "drop", "lost", "cut", "stall"), fault
        planned = Fault(re.compile(pattern), fault, times)
        with self._lock:
            self._faults.append(planned)
        return planned

    # --- requests

    def receive(self, line: str) -> Fault | None:
        """Note a request; the fault that it gets."""
        with self._lock:
            self.asked.append(line)
            for planned in self._faults:
                if planned.times and planned.pattern.search(line):
                    planned.times -= 1
                    planned.happened += 1
                    return planned
        return None

    def answer(self, request: Request) -> Answer:
        with self._lock:
            try:
                token = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
                if token and token not in self.tokens:
                    raise Refused(401, "Invalid credentials in Authorization header")
                request.role = self.tokens.get(token)
                for methods, pattern, function, write in ROUTES:
                    match = pattern.match(request.path)
                    if match and request.method in methods:
                        request.names = {name: unquote(value) for name, value in match.groupdict().items() if value}
                        self._find(request, write)
                        return function(self, request)
                raise Refused(404, "Sorry, we can't find the page you are looking for.")
            except Refused as refused:
                return refused.answer

    def _find(self, request: Request, write: bool) -> None:
        """The repository and commit that a request names. Who may not see a private one is told that it is missing."""
        names = request.names
        if "repo" in names:
            request.repo = self.stored[names.get("type", "model")].get(names["repo"])
            if request.repo is None or (request.repo.private and request.role is None):
                status = 401 if request.role is None else 404
                raise Refused(status, "Repository not found", "RepoNotFound")
        if write and request.role != "write":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        if "rev" in names:
            request.commit = request.repo.find(names["rev"])
            if request.commit is None:
                raise Refused(404, f"Invalid rev id: {names['rev']}", "RevisionNotFound")

    @route("POST", "/api/repos/create", write=True)
    def _create(self, request: Request) -> Answer:
        asked = request.json()
        repo_type, repo_id = asked.get("type") or "model", f"{asked.get('organization') or 'tester'}/{asked['name']}"
        is_new = repo_id not in self.stored[repo_type]
        if is_new:
            self.create(repo_id, repo_type, asked.get("visibility") == "private")
        url = f"{self.endpoint}/{self.stored[repo_type][repo_id].path}"
        if not is_new:
            raise Refused(409, f"You already created this {repo_type} repo: {repo_id}", url=url)
        return answer_json({"url": url, "name": repo_id, "id": "0" * 24})

    @route("POST", "/api/validate-yaml")
    def _validate(self, request: Request) -> Answer:
        errors = [{"message": text} for text in card_problems(str(request.json().get("content", "")))]
        return answer_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    @route("GET", API)
    @route("GET", API + "/revision/(?P<rev>[^/]+)")
    def _info(self, request: Request) -> Answer:
        repo, commit = request.repo, request.commit or request.repo.find("main")
        facts = {
            "_id": "0" * 24,
            "id": request.names["repo"],
            "sha": commit.id,
            "createdAt": DATE,
            "lastModified": DATE,
        }
        facts |= {"private": repo.private, "gated": False, "disabled": False}
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        return answer_json({**facts, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings})

    @route("GET", API + "/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?")
    def _tree(self, request: Request) -> Answer:
        folder, files = request.names.get("path", "").strip("/"), request.commit.files
        prefix = f"{folder}/" if folder else ""
        inside = {name.removeprefix(prefix) for name in files if name.startswith(prefix)}
        if folder and not inside:
            raise self._no_entry(request)
        found = inside | {
            "/".join(name.split("/")[:depth]) for name in inside for depth in range(1, name.count("/") + 1)
        }
        recursive = request.query.get("recursive", "").lower() in ("true", "1")
        names = [prefix + name for name in sorted(found) if recursive or "/" not in name]
        return answer_json([self._entry(request, name) for name in names])

    @route("POST", API + "/paths-info/(?P<rev>[^/]+)")
    def _paths_info(self, request: Request) -> Answer:
        is_json = "json" in request.headers.get("Content-Type", "")
        paths = request.json()["paths"] if is_json else parse_qs(request.body.decode()).get("paths", [])
        entries = (self._entry(request, path.strip("/")) for path in paths)
        return answer_json([entry for entry in entries if entry])

    def _entry(self, request: Request, name: str) -> dict | None:
        """A file or folder as tree and paths-info tell it."""
        last = {"lastCommit": {"id": request.commit.id, "title": request.commit.title, "date": DATE}}
        if name in request.commit.files:
            blob = request.commit.files[name]
            size = len(blob.content)
            lfs = {"lfs": {"oid": blob.etag, "size": size, "pointerSize": 130}} if blob.lfs else {}
            return {"type": "file", "oid": blob.etag[:40], "size": size, "path": name, **lfs, **last}
        if any(path.startswith(f"{name}/") for path in request.commit.files):
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name, **last}
        return None

    def _no_entry(self, request: Request) -> Refused:
        return Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": request.commit.id})

    @route("GET", API + "/commits/(?P<rev>[^/]+)")
    def _commits(self, request: Request) -> Answer:
        history = request.repo.history(request.commit.id)
        facts = {"message": "", "authors": [{"user": "tester"}], "date": DATE}
        return answer_json([{"id": commit.id, "title": commit.title, **facts} for commit in history])

    @route("GET HEAD", FILES + "/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
    def _resolve(self, request: Request) -> Answer:
        """The file itself, or the part of it that the request's Range names."""
        if request.names["path"] not in request.commit.files:
            raise self._no_entry(request)
        blob = request.commit.files[request.names["path"]]
        headers = {"X-Repo-Commit": request.commit.id, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if not match:
            return Answer(200, headers, blob.content)
        start, end = int(match[1]), min(int(match[2] or 2**60), len(blob.content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(blob.content)}"
        return Answer(206, headers, blob.content[start : end + 1])

    # --- branches, tags and pull requests

    @route("GET", API + "/refs")
    def _refs(self, request: Request) -> Answer:
        found = [
            [{"name": name, "ref": prefix + name, "targetCommit": commit} for name, commit in sorted(names.items())]
            for names, prefix in zip(request.repo.refs, ("refs/heads/", "refs/tags/", ""), strict=True)
        ]
        pull_requests = {"pullRequests": found[2]} if request.query.get("include_prs") else {}
        return answer_json({"branches": found[0], "converts": [], "tags": found[1]} | pull_requests)

    @route("POST", API + "/branch/(?P<name>[^/]+)", write=True)
    def _branch(self, request: Request) -> Answer:
        start = (request.json() if request.body else {}).get("startingPoint", "main")
        return self._name(request.repo.refs.branches, request.names["name"], request.repo.find(start))

    @route("POST", API + "/tag/(?P<rev>[^/]+)", write=True)
    def _tag(self, request: Request) -> Answer:
        return self._name(request.repo.refs.tags, request.json()["tag"], request.commit)

    def _name(self, names: dict[str, str], name: str, commit: Commit) -> Answer:
        if name in names:
            raise Refused(409, f"Reference already exists: {name}")
        names[name] = commit.id
        return Answer(200, {}, b"")

    # --- uploads

    @route("POST", API + "/preupload/(?P<rev>[^/]+)", write=True)
    def _preupload(self, request: Request) -> Answer:
        files = []
        for asked in request.json()["files"]:
            there = request.commit.files.get(asked["path"])
            mode = "lfs" if is_lfs(asked["path"], base64.b64decode(asked["sample"])) else "regular"
            entry = {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False}
            files.append(entry | ({"oid": there.etag} if there else {}))
        return answer_json({"files": files, "commitOid": request.commit.id})

    @route("POST", FILES + r"\.git/info/lfs/objects/batch", write=True)
    def _lfs_batch(self, request: Request) -> Answer:
        objects = []
        for entry in request.json()["objects"]:
            answered = {"oid": entry["oid"], "size": entry["size"], "authenticated": True}
            if entry["oid"] not in request.repo.objects:
                answered["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{request.repo.path}/{entry['oid']}"}}
            objects.append(answered)
        headers = {"Content-Type": "application/vnd.git-lfs+json; charset=utf-8"}
        return answer_json({"transfer": "basic", "objects": objects}, 200, headers)

    @route("PUT", "/lfs/(?P<page>.+)/(?P<oid>[0-9a-f]{64})")
    def _lfs_put(self, request: Request) -> Answer:
        """Without a token: on the Hub this is a signed URL."""
        assert hashlib.sha256(request.body).hexdigest() == request.names["oid"]
        [repo] = [repo for of in self.stored.values() for repo in of.values() if repo.path == request.names["page"]]
        repo.objects[request.names["oid"]] = request.body
        return Answer(200, {}, b"")

    @route("POST", API + "/commit/(?P<rev>[^/]+)", write=True)
    def _commit(self, request: Request) -> Answer:
        """All operations or none. Unchanged content makes an empty commit, which the client avoids asking for."""
        repo, base, ref = request.repo, request.commit, request.names["rev"]
        header, *operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        expected, pull_request = header["value"].get("parentCommit"), None
        if request.query.get("create_pr"):
            ref = pull_request = f"refs/pr/{len(repo.refs.pull_requests) + 1}"
            base = repo.commits[expected] if expected else base
        elif ref not in repo.refs.branches | repo.refs.pull_requests:
            raise Refused(400, f"Cannot commit to {ref}: not a branch")
        elif expected and base.id != expected:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif operation["key"] == "lfsFile":
                files[value["path"]] = Blob(repo.objects[value["oid"]], lfs=True)
            else:
                assert operation["key"] == "deletedFile"
                del files[value["path"]]
        commit = repo.commit(ref, files, header["value"]["summary"], parent=base)
        page = f"{self.endpoint}/{repo.path}"
        answered = {"success": True, "commitUrl": f"{page}/commit/{commit.id}", "commitOid": commit.id}
        if pull_request:
            answered["pullRequestUrl"] = f"{page}/discussions/{pull_request.rpartition('/')[2]}"
        return answer_json(answered)
