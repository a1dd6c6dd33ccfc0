"""What the local Hub of the tests holds: repositories with their commits, and its rules for files and cards."""

import fnmatch
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import yaml

LFS_PATTERNS = ["*.arrow", "*.bin", "*.model", "*.npy", "*.parquet", "*.pt", "*.safetensors", "*.png"]
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
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


class Blob(NamedTuple):
    """A file's content, and whether git holds it or a pointer to it."""

    content: bytes
    lfs: bool

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.content).hexdigest() if self.lfs else git_hash("blob", self.content)


class Commit(NamedTuple):
    id: str
    parent: str | None
    title: str
    files: Mapping[str, Blob]


class Refs(NamedTuple):
    """Commit ids by name; those of pull requests are refs/pr/1, refs/pr/2, ..."""

    branches: dict[str, str]
    tags: dict[str, str]
    pull_requests: dict[str, str]


@dataclass
class Repository:
    path: str  # of its page: datasets/org/name
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: Refs = field(default_factory=lambda: Refs({}, {}, {}))
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded LFS files by SHA-256

    def __setitem__(self, commit_id: str, files: Mapping[str, bytes]) -> None:
        """Add a commit of a known id to main, with these files and no other."""
        self.commit("main", blobs(files), commit_id=commit_id)

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
        self, ref: str, files: Mapping[str, Blob], title: str = "Upload", parent: Commit | None = None, commit_id=None
    ) -> Commit:
        """Point a branch or pull request to a new commit after `parent` (without one: after the ref's last)."""
        parent = parent or self.find(ref)
        content = [(name, blob.etag) for name, blob in sorted(files.items())]
        commit_id = commit_id or git_hash("commit", repr([parent and parent.id, title, content]).encode())
        commit = self.commits[commit_id] = Commit(commit_id, parent and parent.id, title, dict(files))
        (self.refs.pull_requests if ref.startswith("refs/pr/") else self.refs.branches)[ref] = commit_id
        self.objects |= {blob.etag: blob.content for blob in files.values() if blob.lfs}
        return commit


def git_hash(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def blobs(files: Mapping[str, bytes]) -> dict[str, Blob]:
    return {name: Blob(content, is_lfs(name, content[:512])) for name, content in files.items()}


def is_lfs(path: str, sample: bytes) -> bool:
    """Whether the Hub asks for a file as LFS: by its name, or because it is not text."""
    name = path.rpartition("/")[2]
    return bool(sample) and (b"\0" in sample or any(fnmatch.fnmatchcase(name, pattern) for pattern in LFS_PATTERNS))


def card_problems(card: str) -> list[str]:
    """Errors in the YAML of a README.md, in the Hub's words."""
    found = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---(?:[\r\n]|$)", card, re.DOTALL)
    try:
        metadata = (yaml.safe_load(found[1]) if found else None) or {}
    except yaml.YAMLError as error:
        return [f"bad indentation or mapping: {error}"]
    rules = {"license": LICENSES.__contains__, "language": re.compile("[a-z]{2,3}|code|multilingual").fullmatch}
    rules |= dict.fromkeys(("base_model", "datasets"), re.compile(r"\w[\w.-]*(/[\w.-]+)?").fullmatch)
    return [
        f'"{key}" with value "{item}" is not valid'
        for key, is_right in rules.items()
        for item in (metadata[key] if isinstance(metadata.get(key), list) else [metadata.get(key)])
        if item is not None and not is_right(str(item))
    ]
