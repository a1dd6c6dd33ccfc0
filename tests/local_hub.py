"""A small Hugging Face Hub over real HTTP, for tests: what its clients ask for to publish and to read models and data.

    with LocalHub() as hub:
        hub.run("from huggingface_hub import HfApi; HfApi().create_repo('org/model')", tmp_path, HF_TOKEN="hf_write")
        hub.files("org/model")                                    # {name: bytes} of main
        hub.fail(r"POST .*/commit/", "lost")                      # the next commit lands, its answer does not arrive

Written after what huggingface_hub 2.4, datasets 5.2, sentence-transformers 6.2 and transformers 5.23 send and read.
Blobs, trees and commits have git's own hashes over fixed dates, so ids are the same in every run. As on the Hub,
a second address ("storage") takes and serves the bytes of LFS files by signed URLs, without the token: `resolve`
answers 302 to it for an LFS file, and 307 to `/api/resolve-cache` for any other. `hub.asked` lists the requests to
both in order, as "METHOD path".

What the real Hub does that this does not:
- Xet storage (set HF_HUB_DISABLE_XET=1, as `environment` does), multipart LFS uploads, git and ssh access;
- accounts: a token that may write may write everywhere; no organisations' rights, fine-grained tokens or gating;
- .gitignore at preupload, renaming, deleting and settings of repositories, merging and discussing pull requests;
- limits: rates, repository and file sizes, commits in progress at the same time (they queue here, 409 there);
- scans for malware and secrets, Parquet conversion (refs/convert), the viewer, search, likes and download counts;
- validation of cards beyond the top level of their YAML: licence, language, ids and types of fields that have rules;
- compression of answers, caches in front of the storage, signed URLs that expire.
"""

import base64
import fnmatch
import hashlib
import hmac
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

ROOT = Path(__file__).parents[1]
USER = "tester"
LFS_SIZE = 10 * 2**20  # files above are LFS whatever their name
PAGE, EXPANDED_PAGE = 1000, 50  # entries of a tree in one answer

LFS_RULE = "filter=lfs diff=lfs merge=lfs -text"
LFS_PATTERNS = """*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy
*.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite
*.tgz *.wasm *.xz *.zip *.zst *tfevents*"""
LFS_PATTERNS_OF_DATASETS = """*.lz4 *.mds *.pcm *.sam *.raw *.aac *.flac *.mp3 *.ogg *.wav *.bmp *.gif *.png *.tiff
*.jpg *.jpeg *.webp *.mp4 *.webm"""

# https://github.com/huggingface/huggingface_hub/issues/4218 quotes the list
LICENSE_NAMES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
other"""
LICENSES = LICENSE_NAMES.split()


@dataclass(frozen=True)
class Blob:
    """A file's content, and whether git holds it or a pointer to it."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def in_git(self) -> bytes:
        """What git holds: for an LFS file its pointer."""
        if not self.lfs:
            return self.content
        lines = [
            "version https://git-lfs.github.com/spec/v1",
            f"oid sha256:{self.sha256}",
            f"size {len(self.content)}",
        ]
        return "".join(f"{line}\n" for line in lines).encode()

    @property
    def oid(self) -> str:
        return git_hash("blob", self.in_git)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    description: str
    date: str  # ISO 8601
    files: Mapping[str, Blob]
    changed: tuple[str, ...]  # names added, altered or deleted


class Refs(NamedTuple):
    """Commit ids by name; the names of pull requests are refs/pr/1, refs/pr/2, ..."""

    branches: dict[str, str]
    tags: dict[str, str]
    pull_requests: dict[str, str]


@dataclass
class Repository:
    repo_type: str
    id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: Refs = field(default_factory=lambda: Refs({}, {}, {}))
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded LFS files by SHA-256

    @property
    def path(self) -> str:
        """Of its page, without a slash before."""
        return ("datasets/" if self.repo_type == "dataset" else "") + self.id

    def __setitem__(self, commit_id: str, files: Mapping[str, bytes]) -> None:
        """Add a commit of a known id to main, with these files and no other."""
        self.commit("main", self.blobs(files), commit_id=commit_id)

    def blobs(self, files: Mapping[str, bytes]) -> dict[str, Blob]:
        attributes = files.get(".gitattributes") or self.attributes("main")
        return {name: Blob(data, is_lfs(name, len(data), data[:512], attributes)) for name, data in files.items()}

    def attributes(self, revision: str) -> bytes:
        commit = self.find(revision)
        if commit and ".gitattributes" in commit.files:
            return commit.files[".gitattributes"].content
        return default_attributes(self.repo_type)

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, tag, pull request or full id."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        for names in self.refs:
            revision = names.get(name, revision)
        return self.commits.get(revision)

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        commit, found = self.find(revision), []
        while commit:
            found.append(commit)
            commit = self.commits.get(commit.parent)
        return found

    def commit(
        self,
        ref: str,
        files: Mapping[str, Blob],
        title: str = "Upload",
        description: str = "",
        parent: Commit | None = None,
        commit_id: str | None = None,
    ) -> Commit:
        """Point a branch or pull request to a new commit after `parent` (without one: after the ref's last)."""
        parent = parent or self.find(ref)
        before = parent.files if parent else {}
        time = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=len(self.commits))
        if commit_id is None:
            who = f"{USER} <{USER}@example.org> {int(time.timestamp())} +0000"
            lines = [f"tree {tree_oid(files)}", *([f"parent {parent.id}"] if parent else [])]
            lines += [f"author {who}", f"committer {who}", "", title, *(["", description] if description else [])]
            commit_id = git_hash("commit", "\n".join(lines).encode() + b"\n")
        changed = tuple(sorted(name for name in before | files if before.get(name) != files.get(name)))
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z")
        commit = Commit(commit_id, parent and parent.id, title, description, date, dict(files), changed)
        self.commits[commit_id] = commit
        (self.refs.pull_requests if ref.startswith("refs/pr/") else self.refs.branches)[ref] = commit_id
        self.objects |= {blob.sha256: blob.content for blob in files.values() if blob.lfs}
        return commit


def git_hash(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def tree_oid(files: Mapping[str, Blob]) -> str:
    """git's hash of a folder; `files` by their path from there."""
    folders: dict[str, dict[str, Blob]] = {}
    entries = {}
    for path, blob in files.items():
        name, slash, rest = path.partition("/")
        if slash:
            folders.setdefault(name, {})[rest] = blob
        else:
            entries[name] = (f"100644 {name}", blob.oid)
    entries |= {f"{name}/": (f"40000 {name}", tree_oid(inside)) for name, inside in folders.items()}
    lines = [f"{entry}\0".encode() + bytes.fromhex(oid) for _, (entry, oid) in sorted(entries.items())]
    return git_hash("tree", b"".join(lines))


def default_attributes(repo_type: str) -> bytes:
    patterns = LFS_PATTERNS + (" " + LFS_PATTERNS_OF_DATASETS if repo_type == "dataset" else "")
    return "".join(f"{pattern} {LFS_RULE}\n" for pattern in patterns.split()).encode()


def is_lfs(path: str, size: int, sample: bytes, attributes: bytes) -> bool:
    """Whether the Hub asks for a file as LFS: by .gitattributes, by size, or because it is not text."""
    return size > 0 and (matches_attributes(path, attributes) or size > LFS_SIZE or b"\0" in sample)


def matches_attributes(path: str, attributes: bytes) -> bool:
    patterns = [line.split()[0] for line in attributes.decode().splitlines() if "filter=lfs" in line]
    return any(
        fnmatch.fnmatchcase(path if "/" in pattern else path.rpartition("/")[2], pattern.replace("**/", "*"))
        for pattern in patterns
    )


def front_matter(card: str) -> dict[str, str | list[str]] | None:
    """The top level of a card's YAML: text, a list of texts, or the text of what is nested. None without YAML.

    Raises ValueError for a line that is neither `key: value` nor below one.
    """
    found = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---(?:[\r\n]|$)", card, re.DOTALL)
    if found is None:
        return None
    entries: dict[str, list[str]] = {}
    for number, line in enumerate(found[1].splitlines(), start=1):
        key = re.match(r"([^\s#:\-\[{][^:]*):(?:\s+(.*))?$", line)
        if key:
            if key[1] in entries:
                raise ValueError(f"duplicated mapping key ({number}:1)")
            entries[key[1]] = [key[2]] if key[2] else []
        elif line.strip() and not line.startswith("#"):
            if "\t" in line[: len(line) - len(line.lstrip())] or not (entries and line.startswith((" ", "- "))):
                raise ValueError(f"can not read a block mapping entry ({number}:1)")
            entries[list(entries)[-1]].append(line)
    return {key: _value(lines) for key, lines in entries.items()}


def _value(lines: list[str]) -> str | list[str]:
    if len(lines) == 1 and re.match(r"\[.*\]$", lines[0]):
        return [_unquoted(item) for item in lines[0][1:-1].split(",") if item.strip()]
    if lines and all(line.lstrip().startswith("- ") for line in lines):
        return [_unquoted(line.lstrip()[2:]) for line in lines]
    return _unquoted(lines[0]) if len(lines) == 1 else "\n".join(lines)


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def card_problems(card: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a README.md, in the Hub's words."""
    try:
        metadata = front_matter(card)
    except ValueError as error:
        return [f"bad indentation or mapping: {error}"], []
    if not metadata:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    for field_name, value in metadata.items():
        named = [(f"{field_name}[{i}]", item) for i, item in enumerate(value)] if isinstance(value, list) else []
        named = named or [(field_name, value)]
        for name, item in named:
            if field_name == "license" and item not in LICENSES:
                errors.append(f'"{name}" must be one of [{", ".join(LICENSES)}, array]')
            if field_name == "language" and not re.fullmatch(r"[a-z]{2,3}|code|multilingual", str(item)):
                errors.append(
                    f'"{name}" with value "{item}" is not valid. It must be an ISO 639-1, 639-2 or 639-3 code '
                    '(two/three letters), or a special value like "code", "multilingual".'
                )
            if field_name in ("base_model", "datasets") and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(item)):
                what = "model" if field_name == "base_model" else "dataset"
                errors.append(
                    f'"{name}" with value "{item}" is not valid. Use a {what} id from https://hf.co/{what}s.'
                )
        nested = isinstance(value, list) or str(value).lstrip().startswith("- ")
        if field_name in ("tags", "datasets", "metrics", "configs", "model-index", "widget") and not nested:
            errors.append(f'"{field_name}" must be an array')
        if field_name in ("library_name", "pipeline_tag", "pretty_name", "license_name") and not isinstance(
            value, str
        ):
            errors.append(f'"{field_name}" must be a string')
    return errors, []


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    content: bytes


class Refused(Exception):
    """An answer with an error, as the Hub words it: its code where it has one, and its message."""

    def __init__(self, status: int, message: str, code: str | None = None, **more) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = answer_json({"error": message, **more.pop("body", {})}, status, headers | more)


def answer_json(value, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    headers = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
    return Answer(status, headers, json.dumps(value).encode())


@dataclass
class Fault:
    """What the next `times` requests that match get, after `skip` of them."""

    pattern: re.Pattern
    kind: str | Callable[[], object]
    times: int
    skip: int
    happened: int = 0  # so often


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes
    role: str | None = None  # read, write, or None without a token
    names: dict[str, str] = field(default_factory=dict)  # what the route took from the path
    repo: Repository | None = None
    commit: Commit | None = None

    def json(self) -> dict:
        try:
            value = json.loads(self.body)
        except ValueError:
            raise Refused(400, "Invalid JSON in the body") from None
        if not isinstance(value, dict):
            raise Refused(400, "The body must be a JSON object")
        return value


ROUTES: list[tuple[list[str], re.Pattern, Callable, bool]] = []
API = r"/api/(?P<type>model|dataset)s/(?P<repo>[^/]+(?:/[^/]+)?)"
FILES = r"/(?:(?P<type>dataset)s/)?(?P<repo>[^/]+(?:/[^/]+)?)"


def route(methods: str, pattern: str, write: bool = False) -> Callable:
    """The method below answers these requests. Paths with `repo` (and `rev`) arrive with them found."""

    def register(function: Callable) -> Callable:
        ROUTES.append((methods.split(), re.compile(pattern + "$"), function, write))
        return function

    return register


class LocalHub:
    def __init__(
        self,
        repos: Mapping[str, Mapping[str, Mapping[str, bytes]]] | None = None,
        *,
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
            self.repos[repo_id] = Repository("dataset", repo_id)
            for commit_id, files in commits.items():
                self.repos[repo_id][commit_id] = files
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._secret = os.urandom(16)

    # --- what tests use

    def __enter__(self) -> "LocalHub":
        return self.start()

    def __exit__(self, *error) -> None:
        self._stopped.set()
        for server in (self._server, self._storage):
            server.shutdown()
            server.server_close()

    def start(self, port: int = 0) -> "LocalHub":
        self._server, self._storage = (
            Server(("127.0.0.1", number), handler(self, answer))
            for number, answer in ((port, self.answer), (0, self.answer_storage))
        )
        for server in (self._server, self._storage):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        return self

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, folder: Path, token: str | None = None) -> dict[str, str]:
        """Variables for a client's process; the clients read most of them when they are imported."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(folder / "hf_home"),
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
        command = [sys.executable, "-c", script]
        return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=120)

    def create(
        self,
        repo_id: str,
        repo_type: str = "model",
        private: bool = False,
        files: Mapping[str, bytes] | None = None,
    ) -> str:
        """A new repository, with a second commit where there are files. Returns the id of main."""
        with self._lock:
            assert repo_id not in self.stored[repo_type], f"{repo_id} exists"
            repo = self.stored[repo_type][repo_id] = Repository(repo_type, repo_id, private)
            attributes = {".gitattributes": Blob(default_attributes(repo_type), lfs=False)}
            repo.commit("main", attributes, "initial commit")
            return self.commit(repo_id, files, repo_type) if files else repo.refs.branches["main"]

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        repo_type: str = "model",
        revision: str = "main",
        title: str = "Upload files",
    ) -> str:
        """Add or replace files, as somebody else's commit. Returns its id."""
        with self._lock:
            repo = self.stored[repo_type][repo_id]
            return repo.commit(revision, repo.find(revision).files | repo.blobs(files), title).id

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

    def fail(self, pattern: str, fault: str | Callable[[], object], times: int = 1, skip: int = 0) -> Fault:
        """Let the next `times` requests whose "METHOD path" has `pattern` in it fail, after `skip` of them.

        "429", "500", "503": that answer. "drop": the connection is closed and nothing done. "lost": it is done, and
        the connection closed without an answer. "cut": half of the body, then closed; nothing happens to an answer
        without a body. "stall": no answer while the server runs, and nothing done. A function is called before the
        request is answered as always: what happens meanwhile, such as a commit.
        """
        assert callable(fault) or fault in ("429", "500", "503", "drop", "lost", "cut", "stall"), fault
        planned = Fault(re.compile(pattern), fault, times, skip)
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
                    if planned.skip:
                        planned.skip -= 1
                    else:
                        planned.times -= 1
                        planned.happened += 1
                        return planned
        return None

    def answer(self, request: Request) -> Answer:
        with self._lock:
            try:
                request.role = self._role(request)
                for methods, pattern, function, write in ROUTES:
                    match = pattern.match(request.path)
                    if match and request.method in methods:
                        request.names = {
                            name: unquote(value) for name, value in match.groupdict().items() if value is not None
                        }
                        self._find(request, write)
                        return function(self, request)
                raise Refused(404, "Sorry, we can't find the page you are looking for.")
            except Refused as refused:
                return refused.answer

    def _role(self, request: Request) -> str | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not token:
            return None
        if token not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def _find(self, request: Request, write: bool) -> None:
        """The repository and commit that a request names. Who may not see a private one is told that it is missing."""
        names = request.names
        if "repo" in names:
            request.repo = self.stored[names.get("type", "model")].get(names["repo"])
            if request.repo is None or (request.repo.private and request.role is None):
                if request.role is None:
                    raise Refused(401, "Invalid username or password.", "RepoNotFound")
                raise Refused(404, "Repository not found", "RepoNotFound")
        if write and request.role is None:
            # over https the client takes any 401 on a repository as RepoNotFound; over http it needs the code
            raise Refused(401, "Invalid username or password.", "RepoNotFound" if "repo" in names else None)
        if write and request.role != "write":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        if "rev" in names:
            request.commit = request.repo.find(names["rev"])
            if request.commit is None:
                raise Refused(404, f"Invalid rev id: {names['rev']}", "RevisionNotFound")

    # --- users and repositories

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Answer:
        if request.role is None:
            raise Refused(401, "Invalid username or password.")
        token = {"displayName": "test", "role": request.role}
        who = {"type": "user", "id": "0" * 24, "name": USER, "fullname": USER, "isPro": False, "orgs": []}
        return answer_json({**who, "auth": {"type": "access_token", "accessToken": token}})

    @route("POST", "/api/repos/create")
    def _create(self, request: Request) -> Answer:
        asked = request.json()
        repo_type, namespace = asked.get("type") or "model", asked.get("organization") or USER
        if repo_type not in self.stored or not _is_name(namespace) or not _is_name(str(asked.get("name"))):
            raise Refused(400, "Invalid repository type or name")
        repo_id = f"{namespace}/{asked['name']}"
        if request.role is None:
            raise Refused(401, "Invalid username or password.")
        if request.role != "write":
            message = f'You don\'t have the rights to create a {repo_type} under the namespace "{namespace}".'
            raise Refused(403, message)
        url = f"{self.endpoint}/{Repository(repo_type, repo_id).path}"
        if repo_id in self.stored[repo_type]:
            raise Refused(409, f"You already created this {repo_type} repo: {repo_id}", body={"url": url})
        self.create(repo_id, repo_type, asked.get("visibility") == "private")
        return answer_json({"url": url, "name": repo_id, "id": "0" * 24})

    @route("POST", "/api/validate-yaml")
    def _validate(self, request: Request) -> Answer:
        errors, warnings = card_problems(str(request.json().get("content", "")))
        found = {
            "errors": [{"message": text} for text in errors],
            "warnings": [{"message": text} for text in warnings],
        }
        headers = {"X-Error-Message": errors[0]} if errors else {}
        return answer_json(found | ({"error": errors[0]} if errors else {}), 400 if errors else 200, headers)

    @route("GET", API)
    @route("GET", API + "/revision/(?P<rev>[^/]+)")
    def _info(self, request: Request) -> Answer:
        repo, commit = request.repo, request.commit or request.repo.find("main")
        blobs = request.query.get("blobs", "").lower() == "true"
        siblings = [
            {"rfilename": name} | (_blob_fields(blob) if blobs else {}) for name, blob in sorted(commit.files.items())
        ]
        first = self.commits(repo.id, repo.repo_type, commit.id)[0]
        return answer_json(
            {
                "_id": "0" * 24,
                "id": repo.id,
                **({"modelId": repo.id} if repo.repo_type == "model" else {}),
                "author": repo.id.split("/")[0],
                "sha": commit.id,
                "createdAt": first.date,
                "lastModified": commit.date,
                "private": repo.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
            }
        )

    # --- what is in a repository

    @route("GET", API + "/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?")
    def _tree(self, request: Request) -> Answer:
        folder, files = request.names.get("path", "").strip("/"), request.commit.files
        prefix = f"{folder}/" if folder else ""
        inside = {name.removeprefix(prefix) for name in files if name.startswith(prefix)}
        if folder and not inside:
            raise self._no_entry(request, folder)
        found = inside | {
            "/".join(name.split("/")[:depth]) for name in inside for depth in range(1, name.count("/") + 1)
        }
        recursive, expand = (request.query.get(name, "").lower() in ("true", "1") for name in ("recursive", "expand"))
        names = [prefix + name for name in sorted(found) if recursive or "/" not in name]
        return self._page(request, names, lambda name: self._entry(request, name, expand), expand)

    @route("POST", API + "/paths-info/(?P<rev>[^/]+)")
    def _paths_info(self, request: Request) -> Answer:
        if "json" in request.headers.get("Content-Type", ""):
            asked = request.json()
            paths, expand = asked.get("paths", []), asked.get("expand")
        else:
            form = parse_qs(request.body.decode())
            paths, expand = form.get("paths", []), form.get("expand", [""])[0].lower() == "true"
        entries = (self._entry(request, path.strip("/"), bool(expand)) for path in paths)
        return answer_json([entry for entry in entries if entry])

    def _entry(self, request: Request, name: str, expand: bool) -> dict | None:
        """A file or folder as tree and paths-info tell it."""
        files = request.commit.files
        if name in files:
            blob = files[name]
            entry = {"type": "file", "oid": blob.oid, "size": len(blob.content), "path": name, **_lfs_fields(blob)}
        else:
            inside = {
                path.removeprefix(f"{name}/"): blob for path, blob in files.items() if path.startswith(f"{name}/")
            }
            if not inside:
                return None
            entry = {"type": "directory", "oid": tree_oid(inside), "size": 0, "path": name}
        if expand:
            last = next(
                commit
                for commit in request.repo.history(request.commit.id)
                if any(path == name or path.startswith(f"{name}/") for path in commit.changed)
            )
            entry["lastCommit"] = {"id": last.id, "title": last.title, "date": last.date}
        return entry

    def _page(self, request: Request, items: list, render: Callable, small: bool = False) -> Answer:
        """One page of a list; the address of the next is in the Link header."""
        limit = min(int(request.query.get("limit", PAGE)), EXPANDED_PAGE if small else PAGE)
        start = int(base64.urlsafe_b64decode(request.query.get("cursor", "")) or 0)
        headers = {}
        if start + limit < len(items):
            cursor = base64.urlsafe_b64encode(str(start + limit).encode()).decode()
            query = urlencode({**request.query, "limit": limit, "cursor": cursor})
            headers["Link"] = f'<{self.endpoint}{request.path}?{query}>; rel="next"'
        return answer_json([render(item) for item in items[start : start + limit]], 200, headers)

    def _no_entry(self, request: Request, path: str) -> Refused:
        return Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": request.commit.id})

    @route("GET", API + "/commits/(?P<rev>[^/]+)")
    def _commits(self, request: Request) -> Answer:
        return self._page(
            request,
            request.repo.history(request.commit.id),
            lambda commit: {
                "id": commit.id,
                "title": commit.title,
                "message": commit.description,
                "authors": [{"user": USER}],
                "date": commit.date,
            },
            small=True,
        )

    @route("GET HEAD", FILES + "/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
    def _resolve(self, request: Request) -> Answer:
        path = request.names["path"]
        if path not in request.commit.files:
            raise self._no_entry(request, path)
        blob = request.commit.files[path]
        headers = {
            "X-Repo-Commit": request.commit.id,
            "X-Linked-Size": str(len(blob.content)),
            "X-Linked-ETag": f'"{blob.etag}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "text/plain; charset=utf-8",
        }
        if blob.lfs:
            status, location = 302, self._storage_url("GET", request.repo, blob.sha256)
        else:
            kind, where = request.repo.repo_type, quote(f"{request.repo.id}/{request.commit.id}/{path}")
            status, location = 307, f"/api/resolve-cache/{kind}s/{where}?etag={quote(blob.etag)}"
        words = {302: "Found", 307: "Temporary Redirect"}[status]
        return Answer(status, headers | {"Location": location}, f"{words}. Redirecting to {location}".encode())

    @route(
        "GET HEAD", r"/api/resolve-cache/(?P<type>model|dataset)s/(?P<repo>[^/]+/[^/]+)/(?P<rev>[^/]+)/(?P<path>.+)"
    )
    def _resolve_cache(self, request: Request) -> Answer:
        blob = request.commit.files[request.names["path"]]
        headers = {"X-Repo-Commit": request.commit.id, "ETag": f'"{blob.etag}"', "Content-Type": "text/plain"}
        return answer_range(request, blob.content, headers)

    @route("GET HEAD", FILES + "/raw/(?P<rev>[^/]+)/(?P<path>.+)")
    def _raw(self, request: Request) -> Answer:
        """The file as git holds it: for an LFS file its pointer."""
        path = request.names["path"]
        if path not in request.commit.files:
            raise self._no_entry(request, path)
        blob = request.commit.files[path]
        return answer_range(request, blob.in_git, {"X-Repo-Commit": request.commit.id, "ETag": f'"{blob.oid}"'})

    # --- branches, tags and pull requests

    @route("GET", API + "/refs")
    def _refs(self, request: Request) -> Answer:
        branches, tags, pull_requests = (
            [{"name": name, "ref": prefix + name, "targetCommit": commit} for name, commit in sorted(names.items())]
            for names, prefix in zip(request.repo.refs, ("refs/heads/", "refs/tags/", ""), strict=True)
        )
        found = {"branches": branches, "converts": [], "tags": tags}
        return answer_json(found | ({"pullRequests": pull_requests} if request.query.get("include_prs") else {}))

    @route("POST DELETE", API + "/branch/(?P<name>[^/]+)", write=True)
    def _branch(self, request: Request) -> Answer:
        name, branches = request.names["name"], request.repo.refs.branches
        if request.method == "DELETE":
            if name == "main":
                raise Refused(403, "Cannot delete the default branch")
            if name not in branches:
                raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
            del branches[name]
            return Answer(200, {}, b"")
        if not _is_ref_name(name):
            raise Refused(400, f"Invalid reference for a branch: {name}")
        if name in branches:
            raise Refused(409, f"Reference already exists: refs/heads/{name}")
        start = (request.json() if request.body else {}).get("startingPoint", "main")
        commit = request.repo.find(start)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {start}", "RevisionNotFound")
        branches[name] = commit.id
        return Answer(200, {}, b"")

    @route("POST", API + "/tag/(?P<rev>[^/]+)", write=True)
    def _tag(self, request: Request) -> Answer:
        name = str(request.json().get("tag"))
        if not _is_ref_name(name):
            raise Refused(400, f"Invalid reference for a tag: {name}")
        if name in request.repo.refs.tags:
            raise Refused(409, f"Tag reference exists already: refs/tags/{name}")
        request.repo.refs.tags[name] = request.commit.id
        return Answer(200, {}, b"")

    @route("DELETE", API + "/tag/(?P<name>[^/]+)", write=True)
    def _untag(self, request: Request) -> Answer:
        if request.repo.refs.tags.pop(request.names["name"], None) is None:
            raise Refused(404, f"Invalid rev id: {request.names['name']}", "RevisionNotFound")
        return Answer(200, {}, b"")

    # --- uploads

    @route("POST", API + "/preupload/(?P<rev>[^/]+)", write=True)
    def _preupload(self, request: Request) -> Answer:
        attributes, files = request.repo.attributes(request.commit.id), []
        for asked in request.json()["files"]:
            path, there = asked["path"], request.commit.files.get(asked["path"])
            _check_path(path)
            lfs = is_lfs(path, asked["size"], base64.b64decode(asked["sample"]), attributes)
            entry = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            files.append(entry | ({"oid": there.etag} if there else {}))
        return answer_json({"files": files, "commitOid": request.commit.id})

    @route("POST", FILES + r"\.git/info/lfs/objects/batch", write=True)
    def _lfs_batch(self, request: Request) -> Answer:
        asked, objects = request.json(), []
        if asked.get("operation") != "upload" or asked.get("hash_algo", "sha256") != "sha256":
            raise Refused(400, "Only uploads by SHA-256")
        for entry in asked["objects"]:
            oid, size = entry["oid"], entry["size"]
            answered = {"oid": oid, "size": size, "authenticated": True}
            if oid not in request.repo.objects:
                verify = f"{self.endpoint}/{request.repo.path}.git/info/lfs/objects/verify"
                upload = {"href": self._storage_url("PUT", request.repo, oid)}
                answered["actions"] = {"upload": upload, "verify": {"href": verify}}
            objects.append(answered)
        headers = {"Content-Type": "application/vnd.git-lfs+json; charset=utf-8"}
        return answer_json({"transfer": "basic", "objects": objects}, 200, headers)

    @route("POST", FILES + r"\.git/info/lfs/objects/verify", write=True)
    def _lfs_verify(self, request: Request) -> Answer:
        asked = request.json()
        content = request.repo.objects.get(asked["oid"])
        if content is None:
            raise Refused(404, "Object does not exist")
        if len(content) != asked["size"]:
            raise Refused(400, "Object has another size")
        return answer_json({"success": True})

    @route("POST", API + "/commit/(?P<rev>[^/]+)", write=True)
    def _commit(self, request: Request) -> Answer:
        """All operations or none. Unchanged content makes an empty commit, which the client avoids asking for."""
        repo, base, ref = request.repo, request.commit, request.names["rev"]
        header, operations = _read_operations(request)
        expected, pull_request = header.get("parentCommit"), None
        if request.query.get("create_pr"):
            ref = pull_request = f"refs/pr/{len(repo.refs.pull_requests) + 1}"
            if expected:
                base = next((commit for commit in repo.commits.values() if commit.id.startswith(expected)), None)
                if base is None:
                    raise Refused(404, f"Invalid rev id: {expected}", "RevisionNotFound")
        elif ref not in repo.refs.branches | repo.refs.pull_requests:
            raise Refused(400, f"Cannot commit to {ref}: not a branch")
        elif expected and not base.id.startswith(expected):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = self._apply(request, operations, dict(base.files))
        commit = repo.commit(ref, files, header["summary"], header.get("description") or "", parent=base)
        page = f"{self.endpoint}/{repo.path}"
        answered = {
            "success": True,
            "commitUrl": f"{page}/commit/{commit.id}",
            "commitOid": commit.id,
            "hookOutput": "",
        }
        if pull_request:
            answered["pullRequestUrl"] = f"{page}/discussions/{pull_request.rpartition('/')[2]}"
        return answer_json(answered)

    def _apply(self, request: Request, operations: list[tuple[str, dict]], files: dict[str, Blob]) -> dict[str, Blob]:
        attributes = request.repo.attributes(request.commit.id)
        for kind, value in operations:
            path = value["path"].rstrip("/") if kind == "deletedFolder" else value["path"]
            _check_path(path)
            if kind == "file":
                content = value["content"]
                content = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
                files[path] = Blob(content, lfs=False)
                attributes = content if path == ".gitattributes" else attributes
                errors, _ = card_problems(content.decode(errors="replace")) if path == "README.md" else ([], [])
                if errors:
                    raise Refused(400, f"Invalid metadata in README.md: {errors[0]}")
            elif kind == "lfsFile":
                content = request.repo.objects.get(value["oid"])
                if content is None:
                    raise Refused(400, f"LFS pointer of {path} points to a file that does not exist")
                files[path] = Blob(content, lfs=True)
                if not matches_attributes(path, attributes):
                    attributes = attributes.rstrip(b"\n") + f"\n{path} {LFS_RULE}\n".encode()
                    files[".gitattributes"] = Blob(attributes, lfs=False)
            elif kind in ("deletedFile", "deletedFolder"):
                gone = [name for name in files if name == path or name.startswith(f"{path}/")]
                gone = [name for name in gone if (name == path) == (kind == "deletedFile")]
                if not gone:
                    what = "file" if kind == "deletedFile" else "folder"
                    raise Refused(404, f"A {what} with this name doesn't exist: {path}", "EntryNotFound")
                for name in gone:
                    del files[name]
            else:
                raise Refused(400, f"Unknown operation {kind}")
        return files

    # --- storage of LFS files, at an address of its own

    def _storage_url(self, method: str, repo: Repository, oid: str) -> str:
        path = f"/lfs/{repo.repo_type}/{repo.id}/{oid}"
        address = f"http://127.0.0.1:{self._storage.server_address[1]}"
        return f"{address}{path}?{urlencode({'signature': self._signature(method, path)})}"

    def _signature(self, method: str, path: str) -> str:
        return hmac.new(self._secret, f"{method} {path}".encode(), "sha256").hexdigest()

    def answer_storage(self, request: Request) -> Answer:
        match = re.fullmatch(r"/lfs/(model|dataset)/([^/]+/[^/]+)/([0-9a-f]{64})", request.path)
        allowed = {"GET": ["GET"], "HEAD": ["GET"], "PUT": ["PUT"]}.get(request.method, [])
        if not match or request.query.get("signature") not in [self._signature(m, request.path) for m in allowed]:
            return Answer(
                403, {"Content-Type": "application/xml"}, b"<Error><Code>SignatureDoesNotMatch</Code></Error>"
            )
        repo_type, repo_id, oid = match.groups()
        with self._lock:
            objects = self.stored[repo_type][repo_id].objects
            if request.method != "PUT":
                headers = {"ETag": f'"{oid}"', "Content-Type": "binary/octet-stream"}
                return answer_range(request, objects[oid], headers)
            if hashlib.sha256(request.body).hexdigest() != oid:
                return Answer(400, {"Content-Type": "application/xml"}, b"<Error><Code>BadDigest</Code></Error>")
            objects[oid] = request.body
            return Answer(200, {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'}, b"")


def _lfs_fields(blob: Blob, name_of_hash: str = "oid") -> dict:
    fields = {name_of_hash: blob.sha256, "size": len(blob.content), "pointerSize": len(blob.in_git)}
    return {"lfs": fields} if blob.lfs else {}


def _blob_fields(blob: Blob) -> dict:
    """A file in a repository's info, where the hash of LFS content has another name than in a tree."""
    return {"size": len(blob.content), "blobId": blob.oid, **_lfs_fields(blob, "sha256")}


def _is_name(name: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,95}", name)) and "--" not in name and ".." not in name


def _is_ref_name(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name)) and not name.startswith("refs/") and ".." not in name


def _check_path(path: str) -> None:
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(part in ("", ".", "..", ".git") for part in parts):
        raise Refused(400, f"Invalid path: {path!r}")


def _read_operations(request: Request) -> tuple[dict, list[tuple[str, dict]]]:
    """The header of a commit and its operations, a JSON object in each line."""
    try:
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        operations = [(line["key"], line["value"]) for line in lines]
    except (ValueError, KeyError, TypeError):
        raise Refused(400, "The body must be lines of JSON objects with key and value") from None
    if not operations or operations[0][0] != "header" or not operations[0][1].get("summary"):
        raise Refused(400, "The first line must be a header with a summary")
    return operations[0][1], operations[1:]


def answer_range(request: Request, content: bytes, headers: Mapping[str, str]) -> Answer:
    """The content, or the part of it that the request's Range names."""
    headers = {**headers, "Accept-Ranges": "bytes"}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if not match or match.groups() == ("", ""):
        return Answer(200, headers, content)
    first, last = match.groups()
    start = int(first) if first else max(len(content) - int(last), 0)
    end = min(int(last), len(content) - 1) if first and last else len(content) - 1
    if start > end:
        return Answer(416, {**headers, "Content-Range": f"bytes */{len(content)}"}, b"")
    span = f"bytes {start}-{end}/{len(content)}"
    return Answer(206, {**headers, "Content-Range": span}, content[start : end + 1])


class Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no error of ours."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def handler(hub: LocalHub, answer: Callable[[Request], Answer]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def respond(self) -> None:
            body = b"".join(self.read_body())
            planned = hub.receive(f"{self.command} {self.path}")
            fault = planned and planned.kind
            if fault == "stall":
                hub._stopped.wait()
            if fault in ("stall", "drop"):
                return self.hang_up()
            if callable(fault):
                fault()
            url = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
            if fault in ("429", "500", "503"):
                status, headers, content = answer_fault(int(fault))
            else:
                status, headers, content = answer(Request(self.command, url.path, query, self.headers, body))
            if fault == "lost":
                return self.hang_up()
            if fault == "cut" and (self.command == "HEAD" or len(content) < 2):
                fault, planned.happened = None, planned.happened - 1
            self.send_response(status)
            for name, value in {**headers, "X-Request-Id": f"Root=1-{len(hub.asked):08x}"}.items():
                plain = " ".join(value.split())  # messages quote what the client sent
                self.send_header(name, plain.encode("latin-1", "replace").decode("latin-1"))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
            if fault == "cut":
                self.hang_up()

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond

        def read_body(self) -> Iterator[bytes]:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                yield self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

        def hang_up(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *args) -> None:
            pass

    return Handler


def answer_fault(status: int) -> Answer:
    messages = {429: "Too many requests", 500: "Internal Error", 503: "Service Unavailable"}
    limits = {"RateLimit": '"api";r=0;t=1', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    return answer_json({"error": messages[status]}, status, limits if status == 429 else {})
