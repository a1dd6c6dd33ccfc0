"""A release's way to the Hub: one commit with all its files, or none where the repository holds them already.

Endpoint, token, retries and resumed uploads are huggingface_hub's; what is added is what a rerun needs to end well.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import InputError
from common.models import limit_waiting
from common.steps import fingerprint

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Files that are deleted from a repository when the new version lacks them, by name and depth. All others stay:
# LICENSE, .gitattributes, evaluation results.
REPLACED = {
    "model": (
        "*.safetensors",
        "*.safetensors.index.json",
        "*config*.json",
        "modules.json",
        "*token*",
        "vocab.*",
        "merges.txt",
        "chat_template.jinja",
        "[0-9]*_*/*",
        "reference_vectors.json",
        "onnx/*.onnx*",
        "openvino/openvino_model*",
        "*.gguf",
        "runs/*/events.out.tfevents.*",
    ),
    "dataset": ("*.parquet", "*/*.parquet", "assets/*.png"),
}
_WEIGHTS_AND_ROWS = (".safetensors", ".parquet", ".gguf", ".bin", ".onnx", ".onnx_data")
_REASONS = {
    401: "the Hub does not know the token; make one with write access",
    403: "the token may not write there; take one with write access",
    412: "somebody committed meanwhile, and nothing was overwritten; look at it, then run the command again",
}


@dataclass(frozen=True)
class Release:
    """What a repository is to hold: name in the repository -> file, or content that was rendered."""

    repo_id: str
    repo_type: str
    title: str
    files: Mapping[str, Path | bytes]

    @property
    def repository(self) -> dict[str, str]:
        return {"repo_id": self.repo_id, "repo_type": self.repo_type}


@dataclass(frozen=True)
class Refs:
    """What a repository's names point to, as commit ids; branches include those of pull requests, refs/pr/N."""

    branches: dict[str, str]
    tags: dict[str, str]


def publish(releases: Sequence[Release], args: Namespace) -> None:
    """Check every repository before anything is written to the first; then make one commit each and print a line.

    Raises InputError: what went wrong and what to do.
    """
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None:
        raise InputError("no token; set HF_TOKEN or run `hf auth login` (or check without one: --dry_run)")
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise InputError("the token holds spaces, line breaks or letters that no token has; set HF_TOKEN again")
    limit_waiting()
    api = HfApi(token=token)
    found = []
    for release in releases:
        texts = {name: file for name, file in release.files.items() if not name.endswith(_WEIGHTS_AND_ROWS)}
        for name, file in texts.items():
            if token.encode() in (file if isinstance(file, bytes) else file.read_bytes()):
                raise InputError(f"{release.repo_id}: {name} holds the token; remove it, and make a new token")
        with hub_errors(release.repo_id):
            found.append(find_refs(api, release, args))
    published = ""
    for release, refs in zip(releases, found, strict=True):
        with hub_errors(release.repo_id, published):
            print(push(api, release, refs, args), flush=True)
        published += f"{release.repo_id} is published; "


def find_refs(api: HfApi, release: Release, args: Namespace) -> Refs | None:
    """What its repository's names point to; None without a repository. Raises InputError where flags do not fit."""
    from huggingface_hub.errors import RepositoryNotFoundError

    name, branch, tag = release.repo_id, args.revision or "main", args.tag
    try:
        info = api.repo_info(**release.repository)
    except RepositoryNotFoundError:
        return None
    if args.private and not info.private:
        raise InputError(f"{name}: is public already; make it private in its settings, or drop --private")
    refs = read_refs(api, release)
    if branch not in refs.branches and branch in refs.tags:
        raise InputError(f"{name}: {branch} is a tag; --revision takes a branch")
    if branch not in refs.branches and args.create_pr:
        raise InputError(f"{name}: no branch {branch} for a pull request; push it first, or drop --revision")
    if tag in refs.tags and refs.tags[tag] != refs.branches.get(branch):
        raise InputError(f"{name}: tag {tag} is on another commit, {refs.tags[tag][:8]}; choose another name")
    return refs


def read_refs(api: HfApi, release: Release) -> Refs:
    found = api.list_repo_refs(**release.repository, include_pull_requests=True)
    branches = {ref.name: ref.target_commit for ref in found.branches}
    branches |= {ref.ref: ref.target_commit for ref in found.pull_requests or []}
    return Refs(branches, {ref.name: ref.target_commit for ref in found.tags})


def push(api: HfApi, release: Release, refs: Refs | None, args: Namespace) -> str:
    """Make the repository, the branch, the commit and the tag, as far as they are missing; a line about it."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    name, repository, branch = release.repo_id, release.repository, args.revision or "main"
    if refs is None:
        api.create_repo(**repository, private=args.private or None, exist_ok=True)
        refs = read_refs(api, release)
    head = refs.branches.get(branch, refs.branches["main"])
    if branch not in refs.branches:
        api.create_branch(**repository, branch=branch, revision=head, exist_ok=True)
    additions = [CommitOperationAdd(name, content) for name, content in release.files.items()]
    there = api.list_repo_files(**repository, revision=head)
    left = [name for name in there if name not in release.files and _is_replaced(name, release.repo_type)]
    content = fingerprint([[addition.path_in_repo, addition.upload_info.sha256.hex()] for addition in additions])
    title = f"{release.title} {content[:8]}"
    # a lost answer hides whether the pull request was opened; of merged and closed ones the refs stay
    pulls = {"discussion_type": "pull_request", "discussion_status": "open"}
    for proposal in api.get_repo_discussions(**repository, **pulls) if args.create_pr else ():
        if api.list_repo_commits(**repository, revision=proposal.git_reference)[0].title == title:
            return f"{name}: {proposal.git_reference} proposes these files already; no other one was made"
    # drops files that have not changed, and makes no empty commit
    made = api.create_commit(
        **repository,
        operations=[*additions, *(CommitOperationDelete(name, is_folder=False) for name in left)],
        commit_message=title,
        revision=branch,
        create_pr=args.create_pr,
        parent_commit=head,
    )
    if made.pr_url:
        return f"{name}: {made.pr_url}"
    tagged = refs.tags.get(args.tag, made.oid)
    if tagged != made.oid:
        raise InputError(f"{name}: the files are there, commit {made.oid}; tag {args.tag} is on {tagged[:8]}")
    if args.tag and args.tag not in refs.tags:
        api.create_tag(**repository, tag=args.tag, revision=made.oid)
    if made.oid == head:
        return f"{name}: {branch} holds these files already (commit {head[:8]}); no commit was made"
    return f"{name}: {made.commit_url}"


def _is_replaced(name: str, repo_type: str) -> bool:
    # fnmatch alone lets * stand for slashes, too
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in REPLACED[repo_type])


@contextmanager
def hub_errors(repo_id: str, before: str = "") -> Iterator[None]:
    """Turn errors of the Hub, its storage or the network into one line; `before` says what is finished."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        yield
    except InputError as error:
        raise InputError(f"{before}{error}") from error
    except OfflineModeIsEnabled as error:
        raise InputError("HF_HUB_OFFLINE is set; unset it, or check without the Hub: --dry_run") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # hf_xet's errors are of these, too
        cause = error.__cause__ if isinstance(error.__cause__, HTTPError) else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        reason = _REASONS.get(status) or f"{type(error).__name__}: {error}; run the same command again to finish"
        raise InputError(f"{before}{repo_id}: {reason}") from error
