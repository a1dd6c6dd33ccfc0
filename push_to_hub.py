"""Publish a trained model or graded data on the Hugging Face Hub, checked first as a stranger would load it.

    python push_to_hub.py model runs/demo/model org/name --dry_run
    python push_to_hub.py model runs/mistral-7b/model org/name --license apache-2.0 --adapter --tag v1
    python push_to_hub.py dataset runs/scifact/data org/name-data --private

Everything is verified and every card rendered before the first request; then each repository gets one commit, with all
of it, or none when it holds the same files already. In that commit goes, too, what an earlier version left under names
that readers load (REPLACED); other files of the repository stay as they are. A command that failed or was killed is
run again: files that were sent are not sent twice. Endpoint and token are huggingface_hub's (HF_ENDPOINT, HF_TOKEN).
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import ArgumentParser, InputError, run
from common.models import limit_waiting
from dataset_builders.card import card_for
from dataset_builders.verify import verify_dataset
from eval.evidence import read_evidence
from eval.model_card import card_files, render_adapter_card, render_card
from modeling.verify import other_files, published_files, verify_adapter, verify_model

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import GitRefInfo, RepoFile

CARD = "README.md"
# Files of a repository that go when a new version does not have them, by their names and depths. What is not named
# here is somebody else's: LICENSE, .gitattributes, evaluation results, other formats of the weights.
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
    ),
    "dataset": ("*.parquet", "*/*.parquet", "assets/*.png"),
}
_WAITS = (1, 2, 4)  # seconds before a request that may be repeated is
_PULL_REQUESTS = 20  # the newest ones are searched for the same files


@dataclass(frozen=True)
class Release:
    """What a repository is to hold: name in the repository -> file, or content that was rendered."""

    repo_id: str
    repo_type: str
    title: str
    files: Mapping[str, Path | bytes]


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    releases = prepare(args)
    if args.output_dir:
        write_cards(releases, Path(args.output_dir))
    if not args.dry_run:
        publish(releases, args)
        return
    if not args.output_dir:
        print("\n".join(release.files[CARD].decode() for release in releases))
    for release in releases:
        print(f"{release.repo_id}: {len(release.files)} files are sound; nothing was uploaded", file=sys.stderr)


def _parse(argv: Sequence[str]) -> Namespace:
    parser = ArgumentParser(prog="python push_to_hub.py", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, parser_class=ArgumentParser)
    model = kinds.add_parser("model", help="a trained model")
    model.add_argument("path", metavar="PATH", help="folder of the model (RUN/model)")
    data = kinds.add_parser("dataset", help="graded data")
    data.add_argument("path", metavar="DIR", help="folder of the data (DIR of dataset_builders.build, or DIR/hub)")
    for kind in (model, data):
        kind.add_argument("repo_id", metavar="ORG/NAME", help="repository on the Hub")
        kind.add_argument("--private", action="store_true", help="a new repository; a public one is refused")
        kind.add_argument("--create_pr", action="store_true", help="propose the commit as a pull request")
        kind.add_argument("--revision", help="branch to commit to, made from main if missing (default: main)")
        kind.add_argument("--tag", help="name for the commit that holds the files")
        kind.add_argument("--dry_run", action="store_true", help="verify and render, upload nothing; needs no network")
        kind.add_argument("--output_dir", help="write the card there as README.md")
    model.add_argument(
        "--adapter",
        nargs="?",
        const="",
        metavar="ORG/NAME-adapter",
        help="publish RUN/adapter, too, in a repository of its own (default: ORG/NAME-adapter)",
    )
    model.add_argument("--run", help="folder with recipe.yaml and ledger.json (default: the one that holds PATH)")
    model.add_argument("--results", help="folder with metrics.json or mteb's results (default: RUN/results)")
    model.add_argument(
        "--datasets", nargs="+", default=(), metavar="ORG/NAME", help="where the training data are published"
    )
    model.add_argument("--ablations", help="folder with ablation.json of eval.ablate")
    model.add_argument("--license", help="licence of the weights, as the Hub writes it (apache-2.0, mit, ...)")
    args = parser.parse_args(argv)
    if args.kind == "dataset":
        args.adapter, args.datasets = None, ()
    elif args.adapter == "":
        args.adapter = f"{args.repo_id}-adapter"
    for repo_id in (args.repo_id, args.adapter, *args.datasets):
        if repo_id is not None:
            _check_repo_id(repo_id)
    if args.adapter == args.repo_id:
        raise InputError(f"--adapter {args.adapter}: the merged model has that repository; name another one")
    if args.create_pr and args.tag:
        raise InputError("--tag names a commit that is published; merge the pull request first, then tag it")
    return args


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"repository {repo_id!r}: {error}") from None
    if "/" not in repo_id:
        raise InputError(f"repository {repo_id!r}: write ORG/NAME")


# --- what is published ----------------------------------------------------------------------------------------------


def prepare(args: Namespace) -> list[Release]:
    """Verify everything and render the cards: what is to be published, in that order. Raises InputError."""
    return prepare_model(args) if args.kind == "model" else [prepare_dataset(args)]


def prepare_model(args: Namespace) -> list[Release]:
    folder = Path(args.path)
    run_folder = Path(args.run) if args.run else folder.parent
    files = published_files(folder)
    results, ablations = (Path(path) if path else None for path in (args.results, args.ablations))
    commits = evaluated_commits(args, [results or run_folder / "results", run_folder / "results"])
    evidence = read_evidence(run_folder, results, ablations, commits)
    facts = verify_model(folder)
    links = {"adapter_repo_id": args.adapter, "datasets": args.datasets}
    card = render_card(args.repo_id, facts, evidence, license=args.license, **links)
    releases = [Release(args.repo_id, "model", "Merged model", {**files, **card_files(evidence), CARD: card.encode()})]
    if args.adapter:
        adapter = run_folder / "adapter"
        facts = {**facts, "adapter": verify_adapter(adapter, folder)}
        if facts["adapter"]["distance"] is None:
            base = facts["adapter"]["base"]
            print(f"{adapter}: {base} is not in the cache, so it was not compared with {folder}", file=sys.stderr)
        card = render_adapter_card(args.adapter, args.repo_id, facts, evidence, license=args.license)
        files = {**published_files(adapter), CARD: card.encode()}
        releases.append(Release(args.adapter, "model", "Adapter", files))
    for release in releases:
        _check_no_local_path(release, run_folder)
    return releases


def evaluated_commits(args: Namespace, results: Sequence[Path]) -> list[str]:
    """The repository's commits that eval.run_mteb evaluated and that have the files to be published.

    A commit that was published with an earlier card is one of them: what it scored is what this model scores.
    """
    places = {place for folder in results for place in folder.glob(f"results/{args.repo_id.replace('/', '__')}/*")}
    found = sorted({place.name for place in places if re.fullmatch("[0-9a-f]{40}", place.name)})
    if found and args.dry_run:
        print(f"{args.repo_id}@{found[0]}: its scores are left out, as --dry_run asks no Hub for it", file=sys.stderr)
    if not found or args.dry_run:
        return []
    from huggingface_hub.errors import HTTPError

    limit_waiting()
    try:
        return [commit for commit in found if not other_files(args.repo_id, commit, Path(args.path))]
    except (HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{args.repo_id}: the Hub did not tell the files of the commits that were evaluated: {reason}; check the "
            "network and HF_TOKEN, then run again"
        ) from None


def prepare_dataset(args: Namespace) -> Release:
    folder = Path(args.path)
    if not (folder / CARD).is_file() and (folder / "hub").is_dir():
        folder /= "hub"
    facts = verify_dataset(folder)
    files = {name: folder / name for name in facts["files"]}
    return Release(args.repo_id, "dataset", "Graded data", {**files, CARD: card_for(folder, args.repo_id).encode()})


def _check_no_local_path(release: Release, folder: Path) -> None:
    """A card quotes the recipe, and a recipe may name folders of this machine."""
    card = release.files[CARD].decode()
    for place in (folder.resolve(), Path.cwd(), Path.home()):
        if len(place.parts) > 1 and f"{place}/" in card:
            raise InputError(f"{folder}: the card of {release.repo_id} would tell {place}; write its paths relative")


def write_cards(releases: Sequence[Release], folder: Path) -> None:
    """The first card as README.md, that of the adapter in a folder of its own."""
    for release, target in zip(releases, (folder, folder / "adapter"), strict=False):
        target.mkdir(parents=True, exist_ok=True)
        (target / CARD).write_bytes(release.files[CARD])
        print(f"{target / CARD}: the card of {release.repo_id}", file=sys.stderr)


# --- the Hub --------------------------------------------------------------------------------------------------------


def publish(releases: Sequence[Release], args: Namespace) -> None:
    """Look at every repository before anything is written to the first; then one commit each, and a line about it.

    Raises:
        InputError: what went wrong, what is there now and what to do.
    """
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None:
        raise InputError("no token; set HF_TOKEN or run `hf auth login` (or check without one: --dry_run)")
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise InputError("the token holds spaces, line breaks or letters that no token has; set HF_TOKEN again")

    limit_waiting()
    api = HfApi(token=token)
    uploads = [Upload(api, release, args) for release in releases]
    for upload in uploads:
        _check_no_token(upload.release, token)
        with upload.told():
            upload.look()
    for index, upload in enumerate(uploads):
        try:
            with upload.told():
                print(upload.publish(), flush=True)
        except InputError as error:
            before = "".join(f"{done.release.repo_id} is published; " for done in uploads[:index])
            raise InputError(f"{before}{error}") from error


def _check_no_token(release: Release, token: str) -> None:
    for name, content in release.files.items():
        if not name.endswith((".safetensors", ".parquet")):
            content = content if isinstance(content, bytes) else content.read_bytes()
            if token.encode() in content:
                raise InputError(f"{release.repo_id}: {name} holds the token; remove it, and make a new token")


class Upload:
    """A release on its way into its repository."""

    def __init__(self, api: HfApi, release: Release, args: Namespace) -> None:
        from huggingface_hub import CommitOperationAdd

        self.api = api
        self.release = release
        self.private, self.create_pr, self.tag = args.private, args.create_pr, args.tag
        self.branch = args.revision or "main"
        self.repository = {"repo_id": release.repo_id, "repo_type": release.repo_type}
        # made once, as each reads its file to hash it, and remembers whether it was sent
        self.additions = {name: CommitOperationAdd(name, content) for name, content in release.files.items()}
        self.state = "nothing was changed"

    def look(self) -> None:
        """Read what the repository holds and what a commit would have to change. Writes nothing.

        Raises:
            InputError: it cannot become what was asked for.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        self.exists, self.head, self.has_branch, self.proposed = False, None, False, None
        self.operations = list(self.additions.values())
        name = self.release.repo_id
        try:
            info = _patiently(self.api.repo_info, **self.repository)
        except RepositoryNotFoundError:
            return
        self.exists = True
        if self.private and not info.private:
            raise InputError(f"{name}: is public already; make it private in its settings, or drop --private")
        refs = _patiently(self.api.list_repo_refs, **self.repository, include_pull_requests=True)
        branches = {ref.name: ref.target_commit for ref in refs.branches}
        branches |= {ref.ref: ref.target_commit for ref in refs.pull_requests}
        self.has_branch = self.branch in branches
        if not self.has_branch and self.branch in {ref.name for ref in refs.tags}:
            raise InputError(f"{name}: {self.branch} is a tag; --revision takes a branch")
        if not self.has_branch and self.create_pr:
            raise InputError(f"{name}: no branch {self.branch} for a pull request; push it first, or drop --revision")
        self.head = branches[self.branch if self.has_branch else "main"]
        self.operations = self._changes(self.head)
        if self.create_pr and self.operations:
            self.proposed = self._same_proposal(refs.pull_requests)
        tagged = {ref.name: ref.target_commit for ref in refs.tags}.get(self.tag)
        if tagged and (self.operations or tagged != self.head):
            raise InputError(f"{name}: tag {self.tag} is on another commit, {tagged[:8]}; choose another name")

    def _changes(self, revision: str) -> list[Any]:
        """What a commit on `revision` has to do: add what is new or differs, delete what an earlier version left."""
        from huggingface_hub import CommitOperationDelete
        from huggingface_hub.hf_api import RepoFile

        tree = _patiently(lambda: list(self.api.list_repo_tree(**self.repository, revision=revision, recursive=True)))
        there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        changed = [
            addition
            for name, addition in self.additions.items()
            if name not in there or _oid(addition, there[name]) != _remote_oid(there[name])
        ]
        left = [name for name in there if name not in self.additions and _is_replaced(name, self.release.repo_type)]
        return [*changed, *(CommitOperationDelete(name, is_folder=False) for name in left)]

    def _same_proposal(self, pull_requests: Sequence[GitRefInfo]) -> str | None:
        """The pull request (refs/pr/N) that would be made again: the same files on the same commit."""
        numbers = sorted((int(ref.ref.rpartition("/")[2]) for ref in pull_requests), reverse=True)
        for revision in (f"refs/pr/{number}" for number in numbers[:_PULL_REQUESTS]):
            if not self._changes(revision):
                commits = _patiently(self.api.list_repo_commits, **self.repository, revision=revision)
                if len(commits) > 1 and commits[1].commit_id == self.head:
                    return revision
        return None

    def publish(self) -> str:
        """Make the repository, the branch, the commit and the tag, as far as they are missing; a line about it."""
        name = self.release.repo_id
        if not self.exists:
            made = "the repository is there, without the files"
            self._make(self.api.create_repo, made, f"perhaps {made}", private=self.private or None)
            self.look()
        if not self.has_branch:
            made = f"branch {self.branch} is there, without the files"
            self._make(self.api.create_branch, made, f"perhaps {made}", branch=self.branch, revision=self.head)
        if self.proposed:
            return f"{name}: {self.proposed} proposes these files already; no other one was made"
        unchanged = not self.operations
        if self.operations:
            self._commit()
        page = f"{self.api.endpoint}/{'datasets/' if self.release.repo_type == 'dataset' else ''}{name}"
        if self.proposed:
            return f"{name}: {page}/discussions/{self.proposed.rpartition('/')[2]}"
        if self.tag:
            self._tag()
        if unchanged:
            return f"{name}: {self.branch} holds these files already (commit {self.head[:8]}); no commit was made"
        return f"{name}: {page}/commit/{self.head}"

    def _make(self, request: Callable[..., Any], made: str, perhaps: str, **arguments: Any) -> None:
        """Make what may be there already. `state` says so, or `perhaps` where no answer tells what became of it."""
        try:
            _patiently(request, **self.repository, **arguments, exist_ok=True)
        except Exception as error:
            self.state = perhaps if _passes(error) else self.state
            raise
        self.state = made

    def _commit(self) -> None:
        """One commit, and `head` or `proposed` as it left them. When its answer is lost, look whether it landed."""
        for wait in (*_WAITS, None):
            try:
                made = self.api.create_commit(
                    **self.repository,
                    operations=self.operations,
                    commit_message=self.release.title,
                    revision=self.branch,
                    create_pr=self.create_pr,
                    parent_commit=self.head,
                )
            except Exception as error:
                if not (_status(error) == 412 or (_passes(error) and not _tried_by_client(error))):
                    raise
                before, self.state = self.head, "whether the commit landed is not known"
                self.look()
                self.state = "nothing was committed"
                if self.proposed or not self.operations:
                    return
                if self.head != before:
                    raise InputError(
                        f"{self.release.repo_id}: somebody committed to {self.branch} meanwhile ({self.head[:8]}); "
                        "nothing was overwritten; look at it, then run the same command again"
                    ) from error
                if wait is None:
                    raise
                time.sleep(wait)
            else:
                self.head, self.proposed = made.oid, made.pr_revision
                return

    def _tag(self) -> None:
        files = f"the files are there (commit {self.head[:8]})"
        self.state = f"{files}, the tag is not"
        perhaps = f"{files}, perhaps the tag, too"
        self._make(self.api.create_tag, perhaps, perhaps, tag=self.tag, revision=self.head)
        tags = _patiently(self.api.list_repo_refs, **self.repository).tags
        tagged = {ref.name: ref.target_commit for ref in tags}.get(self.tag)
        if tagged != self.head:  # somebody was quicker
            raise InputError(f"{self.release.repo_id}: tag {self.tag} is on {tagged}; {files}; choose another name")

    @contextmanager
    def told(self) -> Iterator[None]:
        """What the Hub or the network answers as one line: what, where, how things stand, what to do."""
        try:
            yield
        except Exception as error:
            reason = _reason(error, self.api.endpoint)
            if reason is None:
                raise
            raise InputError(f"{self.release.repo_id}: {reason}; {self.state}") from error


def _is_replaced(name: str, repo_type: str) -> bool:
    # fnmatch alone lets * stand for slashes, too
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in REPLACED[repo_type])


def _remote_oid(entry: RepoFile) -> str:
    return entry.lfs.sha256 if entry.lfs else entry.blob_id


def _oid(addition: CommitOperationAdd, entry: RepoFile) -> str | None:
    """What identifies the content of a file where the repository keeps it as it keeps `entry`."""
    if entry.lfs:
        return addition.upload_info.sha256.hex()
    if addition.upload_info.size != entry.size:
        return None
    with addition.as_file() as file:
        return hashlib.sha1(b"blob %d\0" % entry.size + file.read()).hexdigest()


def _patiently(request: Callable[..., Any], **arguments: Any) -> Any:
    """`request(**arguments)`, again after what passes: for requests that may come twice."""
    for wait in _WAITS:
        try:
            return request(**arguments)
        except Exception as error:
            if not _passes(error) or _tried_by_client(error):
                raise
        time.sleep(wait)
    return request(**arguments)


def _status(error: BaseException) -> int | None:
    """The status of the answer, None where there was none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _passes(error: Exception) -> bool:
    """Whether it is the moment rather than the request: too many requests, a server's fault, a lost connection, or an
    answer that is not the API's.
    """
    from huggingface_hub.errors import HTTPError

    status = _status(error)
    if status is not None:
        return status == 429 or status >= 500
    return isinstance(error, HTTPError | json.JSONDecodeError)


def _tried_by_client(error: Exception) -> bool:
    """huggingface_hub repeats these five times itself."""
    request = error if _status(error) is None else error.response
    url = "" if isinstance(error, json.JSONDecodeError) else str(request.request.url)
    return any(step in url for step in ("/preupload/", "/info/lfs/", "/tree/", "/commits/"))


def _reason(error: Exception, endpoint: str) -> str | None:
    """What went wrong and what to do about it; None for what is neither the Hub's nor the network's doing."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, RuntimeError | ValueError) and isinstance(error.__cause__, HTTPError):
        if _status(error.__cause__) == 400:  # the card's metadata; the Hub's reasons are in the message
            return f"the Hub refuses it: {error}"
        error = error.__cause__  # of one file of many
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it, or check without the Hub: --dry_run"
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__ == "hf_xet":  # of Xet storage
        return f"the Hub's storage fails ({error}); check the network, then run the same command again"
    if not isinstance(error, HTTPError | json.JSONDecodeError):
        return None
    status, said = _status(error), getattr(error, "server_message", None) or type(error).__name__
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return f"not found, or the token may not see it ({said}); check the name and the token"
    if status == 401:
        return f"the Hub does not know the token ({said}); make one with write access at {endpoint}/settings/tokens"
    if status == 403:
        return f"the token may not write there ({said}); take one with write access"
    if status == 412:
        return "somebody committed meanwhile; run the same command again"
    if status == 429:
        return "too many requests; wait some minutes, then run the same command again"
    if status is not None and status < 500:
        return f"the Hub refuses it: {said} ({status})"
    what = f"the Hub fails ({status})" if status else f"no answer from {endpoint} ({type(error).__name__})"
    return f"{what}; check the network and HF_ENDPOINT, then run the same command again"


if __name__ == "__main__":
    run(main)
