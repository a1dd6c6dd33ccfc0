"""A small Hugging Face Hub over real HTTP, for tests: what its clients ask for to publish and to read models and data.

    with LocalHub() as hub:                                       # clients are processes of their own: hub_client.py
        commit = hub.create("org/model", {"config.json": b"{}"})  # a data set's page is "datasets/org/name"
        hub.fail("POST .*/commit/", "lost")                       # the next commit lands, its answer does not arrive

Written after what huggingface_hub 2.4, datasets 5.2, sentence-transformers 6.2 and transformers 5.23 send and read.
No Xet, multipart uploads, signed URLs, pages of long lists or limits; of cards only the licence is checked.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

TOKEN, READ_TOKEN = "hf_vBqLkWzXnTsYpRdCmGfJhA", "hf_read"
LICENSES = Path(__file__).with_name("hub_licenses.txt").read_text().split()
LFS_SUFFIXES = (".arrow", ".bin", ".gguf", ".onnx", ".parquet", ".png", ".safetensors")
DATE = "2026-01-01T00:00:00.000Z"
ID = "(?P<page>(?:datasets/)?[^/]+/[^/]+)"
API = f"/api/(?:models/)?{ID}"
Answer = tuple[int, dict[str, str], bytes]  # status, headers, body


def is_lfs(name: str) -> bool:
    return name.endswith(LFS_SUFFIXES)


def etag(name: str, content: bytes) -> str:
    """By which clients know a file's content: of an LFS file its SHA-256, of others git's hash."""
    git = f"blob {len(content)}\0".encode() + content
    return hashlib.sha256(content).hexdigest() if is_lfs(name) else hashlib.sha1(git).hexdigest()


class Commit(NamedTuple):
    id: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    page: str
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)  # and pull requests, refs/pr/N; oldest first
    tags: dict[str, str] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)  # pull requests, whose refs stay
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded LFS files, by SHA-256

    def history(self, revision: str) -> list[Commit] | None:
        """The commits up to that of a branch, tag or id, oldest first."""
        if revision in self.branches:
            return self.branches[revision]
        wanted = self.tags.get(revision, revision)
        numbered = ((line, end) for line in self.branches.values() for end in range(1, len(line) + 1))
        return next((line[:end] for line, end in numbered if line[end - 1].id == wanted), None)

    def add(self, branch: str, parents: list[Commit], title: str, files: dict[str, bytes], commit_id="") -> Commit:
        made = hashlib.sha1(f"{self.page} {sum(map(len, self.branches.values()))}".encode()).hexdigest()
        commit = Commit(commit_id or made, title, files)
        self.branches[branch] = [*parents, commit]
        self.objects |= {etag(name, content): content for name, content in files.items() if is_lfs(name)}
        return commit


class LocalHub:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []  # "METHOD path" of every request, in order
        self.faults: list[SimpleNamespace] = []  # pattern, kind, times, happened
        self.lock = threading.RLock()
        self.stopped = threading.Event()

    def __enter__(self) -> "LocalHub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        return self

    def __exit__(self, *error) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()

    def create(self, page: str, files: Mapping[str, bytes] | None = None, private=False, commit_id: str = "") -> str:
        """A new repository: an empty commit, as the Hub makes it, and one with `files`. Returns the id of main."""
        assert page not in self.repositories, f"{page} exists"
        repository = self.repositories[page] = Repository(page, private)
        first = repository.add("main", [], "initial commit", {})
        return self.commit(page, files, commit_id) if files else first.id

    def commit(self, page: str, files: Mapping[str, bytes], commit_id: str = "") -> str:
        """Add or replace files of main, as somebody else's commit. Returns its id."""
        repository = self.repositories[page]
        history = repository.history("main")
        return repository.add("main", history, "Upload files", history[-1].files | dict(files), commit_id).id

    def files(self, page: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[page].history(revision)[-1].files

    def commits(self, page: str, revision: str = "main") -> list[Commit]:
        """Oldest first, without the Hub's own."""
        return self.repositories[page].history(revision)[1:]

    def clear(self) -> None:
        """Neither repositories nor requests nor faults, as at the beginning."""
        for collection in (self.repositories, self.asked, self.faults):
            collection.clear()

    def fail(self, pattern: str, fault: str | Callable[[], object], times: int = 1) -> SimpleNamespace:
        """Let the next `times` requests whose "METHOD path" has `pattern` in it fail; it `happened` so often.

        "429", "503": that answer. "drop": the connection is closed and nothing done. "lost": it is done, and the
        connection closed without an answer. "cut": half of the body, then closed. "stall": no answer while the server
        runs, and nothing done. A function is called before the request is answered as always.
        """
        self.faults.append(SimpleNamespace(pattern=pattern, kind=fault, times=times, happened=0))
        return self.faults[-1]

    def receive(self, line: str) -> str | Callable[[], object] | None:
        """Note a request; the fault that it gets."""
        with self.lock:
            self.asked.append(line)
            for planned in self.faults:
                if planned.times and re.search(planned.pattern, line):
                    planned.times -= 1
                    planned.happened += 1
                    return planned.kind
        return None


class Refused(Exception):
    """An answer with an error, as the Hub words it: its message, and its code where it has one."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = as_json({"error": message}, status, headers)


def as_json(value, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, json.dumps(value).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: LocalHub

    def respond(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.hub.receive(f"{self.command} {self.path}")
        if fault == "stall":
            self.hub.stopped.wait()
        if fault in ("stall", "drop"):
            return self.hang_up()
        if callable(fault):
            fault()
        if fault in ("429", "503"):
            status, headers, content = as_json({"error": "Not now"}, int(fault))
        else:
            with self.hub.lock:
                status, headers, content = self.answer()
        if fault == "lost":
            return self.hang_up()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        if fault == "cut":
            self.hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = respond

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args) -> None:
        pass

    def answer(self) -> Answer:
        url = urlsplit(self.path)
        self.query = dict(parse_qsl(url.query))
        for methods, pattern, function, writes in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and self.command in methods:
                self.names = {name: unquote(value) for name, value in match.groupdict().items() if value}
                try:
                    self.find(writes)
                    return function(self)
                except Refused as refused:
                    return refused.answer
        return Refused(404, f"no page {url.path} here").answer

    def find(self, writes: bool) -> None:
        """The repository and commit of the path. Who may not see a private one is told that it is missing."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READ_TOKEN):
            raise Refused(401, "Invalid credentials in Authorization header")
        self.repository = self.hub.repositories.get(self.names.get("page"))
        if "page" in self.names and (self.repository is None or (self.repository.private and not token)):
            raise Refused(404 if token else 401, "Repository not found", "RepoNotFound")
        if writes and token != TOKEN:
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        if self.repository:
            self.history = self.repository.history(self.names.get("rev", "main"))
            if self.history is None:
                raise Refused(404, f"Invalid rev id: {self.names['rev']}", "RevisionNotFound")
            self.newest = self.history[-1]

    def json(self) -> dict:
        return json.loads(self.body)

    def create(self) -> Answer:
        asked = self.json()
        page = ("datasets/" if asked.get("type") == "dataset" else "") + f"{asked['organization']}/{asked['name']}"
        self.hub.create(page, private=asked.get("visibility") == "private")
        return as_json({"url": f"{self.hub.endpoint}/{page}", "name": page, "id": "0" * 24})

    def validate(self) -> Answer:
        stated = re.findall("^license: *(.*)$", self.json()["content"].split("\n---")[0], re.MULTILINE)
        wrong = [licence for licence in stated if licence not in LICENSES]
        errors = [{"message": f'"license" with value "{licence}" is not valid'} for licence in wrong]
        return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self) -> Answer:
        facts = {"_id": "0" * 24, "id": self.repository.page.removeprefix("datasets/"), "sha": self.newest.id}
        facts |= {"private": self.repository.private, "gated": False, "tags": [], "createdAt": DATE}
        return as_json({**facts, "siblings": [{"rfilename": name} for name in sorted(self.newest.files)]})

    def tree(self) -> Answer:
        prefix = f"{self.names['path'].strip('/')}/" if "path" in self.names else ""
        names = {str(path) for name in self.newest.files for path in (name, *PurePosixPath(name).parents[:-1])}
        inside = sorted(name for name in names if name.startswith(prefix))
        if prefix and not inside:
            raise self.no_entry()
        whole = self.query.get("recursive", "").lower() == "true"
        return as_json([self.entry(name) for name in inside if whole or "/" not in name.removeprefix(prefix)])

    def paths_info(self) -> Answer:
        asked = [path for key, path in parse_qsl(self.body.decode()) if key == "paths"]
        there = [path for path in asked if any(f"{name}/".startswith(f"{path}/") for name in self.newest.files)]
        return as_json([self.entry(path) for path in there])

    def entry(self, name: str) -> dict:
        """A file or folder as tree and paths-info tell it."""
        if name not in self.newest.files:
            return {"type": "directory", "oid": "0" * 40, "path": name}
        oid, size = etag(name, self.newest.files[name]), len(self.newest.files[name])
        lfs = {"lfs": {"oid": oid, "size": size, "pointerSize": 130}} if is_lfs(name) else {}
        return {"type": "file", "oid": oid[:40], "size": size, "path": name, **lfs}

    def no_entry(self) -> Refused:
        return Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": self.newest.id})

    def resolve(self) -> Answer:
        """The file itself, or the part of it that the request's Range names."""
        name = self.names["path"]
        if name not in self.newest.files:
            raise self.no_entry()
        content = self.newest.files[name]
        headers = {"X-Repo-Commit": self.newest.id, "ETag": f'"{etag(name, content)}"', "Accept-Ranges": "bytes"}
        if "Range" not in self.headers:
            return 200, headers, content
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        return 206, headers, part

    def commits(self) -> Answer:
        facts = {"message": "", "authors": [], "date": DATE}
        return as_json([{"id": commit.id, "title": commit.title, **facts} for commit in self.history[::-1]])

    def refs(self) -> Answer:
        def named(commits: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": prefix + name, "targetCommit": commit} for name, commit in commits.items()]

        heads = {name: line[-1].id for name, line in self.repository.branches.items()}
        pulls = {name: heads.pop(name) for name in list(heads) if name.startswith("refs/pr/")}
        found = {"branches": named(heads, "refs/heads/"), "tags": named(self.repository.tags, "refs/tags/")}
        return as_json({**found, "converts": [], "pullRequests": named(pulls, "")})

    def discussions(self) -> Answer:
        assert (self.query["type"], self.query["status"]) == ("pull_request", "open")
        pulls = [name for name in self.repository.branches.keys() - self.repository.closed if "/pr/" in name]
        facts = {"title": "", "createdAt": DATE, "status": "open", "isPullRequest": True}
        facts |= {"repo": {"name": self.repository.page, "type": "model"}}
        found = [{"num": int(name.rpartition("/")[2]), **facts} for name in sorted(pulls)]
        return as_json({"discussions": found, "count": len(found), "start": 0})

    def branch(self) -> Answer:
        self.repository.branches[self.names["name"]] = self.repository.history(self.json()["startingPoint"])
        return 200, {}, b""

    def tag(self) -> Answer:
        self.repository.tags[self.json()["tag"]] = self.newest.id
        return 200, {}, b""

    def preupload(self) -> Answer:
        files = []
        for path in [asked["path"] for asked in self.json()["files"]]:
            there = {"oid": etag(path, self.newest.files[path])} if path in self.newest.files else {}
            mode = "lfs" if is_lfs(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | there)
        return as_json({"files": files, "commitOid": self.newest.id})

    def lfs_batch(self) -> Answer:
        objects = []
        for entry in self.json()["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{self.repository.page}/{entry['oid']}"}}
            is_there = entry["oid"] in self.repository.objects
            objects.append({"oid": entry["oid"], "size": entry["size"], **({} if is_there else {"actions": upload})})
        return as_json({"transfer": "basic", "objects": objects})

    def lfs_put(self) -> Answer:
        assert hashlib.sha256(self.body).hexdigest() == self.names["oid"]
        self.hub.repositories[self.names["of"]].objects[self.names["oid"]] = self.body
        return 200, {}, b""

    def commit(self) -> Answer:
        """All operations or none. Unchanged content makes an empty commit, which the client avoids asking for."""
        branches, branch, history = self.repository.branches, self.names["rev"], self.history
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        page, answered = f"{self.hub.endpoint}/{self.repository.page}", {"success": True}
        if self.query.get("create_pr"):
            number = 1 + sum(name.startswith("refs/pr/") for name in branches)
            branch, history = f"refs/pr/{number}", self.repository.history(header["value"]["parentCommit"])
            answered["pullRequestUrl"] = f"{page}/discussions/{number}"
        elif header["value"].get("parentCommit") not in (None, self.newest.id):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(history[-1].files)
        for key, value in [(operation["key"], operation["value"]) for operation in operations]:
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.repository.objects[value["oid"]]
            else:
                assert key == "deletedFile"
                del files[value["path"]]
        made = self.repository.add(branch, history, header["value"]["summary"], files)
        return as_json({**answered, "commitUrl": f"{page}/commit/{made.id}", "commitOid": made.id})


REV = "(?P<rev>[^/]+)"
ROUTES = (
    # methods, path, who answers, whether that takes a token that may write; a path's page and rev are found before
    ("POST", "/api/repos/create", Handler.create, True),
    ("POST", "/api/validate-yaml", Handler.validate, False),
    ("GET", f"{API}(?:/revision/{REV})?", Handler.info, False),
    ("GET", f"{API}/tree/{REV}(?:/(?P<path>.*))?", Handler.tree, False),
    ("POST", f"{API}/paths-info/{REV}", Handler.paths_info, False),
    ("GET HEAD", f"/{ID}/resolve/{REV}/(?P<path>.+)", Handler.resolve, False),
    ("GET", f"{API}/commits/{REV}", Handler.commits, False),
    ("GET", f"{API}/refs", Handler.refs, False),
    ("GET", f"{API}/discussions", Handler.discussions, False),
    ("POST", f"{API}/branch/(?P<name>[^/]+)", Handler.branch, True),
    ("POST", f"{API}/tag/{REV}", Handler.tag, True),
    ("POST", f"{API}/preupload/{REV}", Handler.preupload, True),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", Handler.lfs_batch, True),
    ("PUT", "/lfs/(?P<of>.+)/(?P<oid>[0-9a-f]{64})", Handler.lfs_put, False),  # on the Hub this is a signed URL
    ("POST", f"{API}/commit/{REV}", Handler.commit, True),
)
