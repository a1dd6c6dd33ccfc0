"""Publish a trained model or graded data on the Hugging Face Hub, verified first as its users would load it.

    python push_to_hub.py model runs/demo/model org/name --dry_run
    python push_to_hub.py model runs/mistral-7b/model org/name --license apache-2.0 --adapter --tag v1
    python push_to_hub.py model runs/demo/model org/name --onnx --openvino --gguf
    python push_to_hub.py dataset runs/scifact/data org/name-data --private

Everything is verified and every card rendered before the first request; then each repository gets one commit with all
of it, or none when it holds the same files already. That commit deletes what an earlier version left under names that
readers load (REPLACED); other files of the repository stay as they are. A command that failed or was killed is run
again: files that were uploaded are not sent twice. Endpoint and token are huggingface_hub's (HF_ENDPOINT, HF_TOKEN).
"""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import ArgumentParser, InputError, run
from common.steps import fingerprint
from dataset_builders.languages import MTEB_CODES

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
Refs = dict[str, str]  # name -> commit
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


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    releases = prepare_model(args) if args.kind == "model" else [prepare_dataset(args)]
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
    events = "publish the training's event files, for a tab of curves (they hold your arguments as text)"
    model.add_argument("--tensorboard", action="store_true", help=events)
    adapter = "publish RUN/adapter, too, in a repository of its own (default: ORG/NAME-adapter)"
    model.add_argument("--adapter", nargs="?", const="", metavar="ORG/NAME-adapter", help=adapter)
    for kind, reader in (("onnx", "ONNX Runtime"), ("openvino", "OpenVINO"), ("gguf", "llama.cpp")):
        model.add_argument(f"--{kind}", action="store_true", help=f"add files for {reader}, compared there first")
    model.add_argument("--run", help="folder with recipe.yaml and ledger.json (default: the one that holds PATH)")
    model.add_argument("--results", help="folder with metrics.json or mteb's results (default: RUN/results)")
    published = "where the training data are published"
    model.add_argument("--datasets", nargs="+", default=(), metavar="ORG/NAME", help=published)
    model.add_argument("--ablations", help="folder with ablation.json of eval.ablate")
    model.add_argument("--license", help="licence of the weights, as the Hub writes it (apache-2.0, mit, ...)")
    model.add_argument("--title", help="heading of the card (default: ORG/NAME)")
    model.add_argument("--language", nargs="+", metavar="CODE", help="en de: instead of those that the data state")
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
    for code in getattr(args, "language", None) or ():
        if code not in MTEB_CODES:
            raise InputError(f"--language {code}: write codes such as en or de; known are {', '.join(MTEB_CODES)}")
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


def prepare_model(args: Namespace) -> list[Release]:
    """The merged model and, if asked for, its adapter: verified, with their cards. Raises InputError."""
    from eval.evidence import read_evidence
    from release.card_metadata import final_row
    from release.exports import FILES, export
    from release.model_card import render_adapter_card, render_card
    from release.verify import model_files, verify_adapter, verify_model

    folder = Path(args.path)
    run_folder = Path(args.run) if args.run else folder.parent
    files = model_files(folder)
    results, ablations = (Path(path) if path else None for path in (args.results, args.ablations))
    commits = evaluated_commits(args, [results or run_folder / "results", run_folder / "results"])
    evidence = read_evidence(run_folder, results, ablations, commits)
    evidence["languages"] = args.language or evidence["languages"]
    facts = verify_model(folder)
    exports = {kind: export(kind, folder, run_folder / "exports") for kind in FILES if getattr(args, kind)}
    facts["exports"] = exports
    events = sorted((run_folder / "logs").rglob("*tfevents*")) if args.tensorboard else []
    if args.tensorboard and not events:
        raise InputError(f"{run_folder / 'logs'}: no event files of TensorBoard; train with report_to: [tensorboard]")
    facts["tensorboard"] = bool(events)
    shown = {"title": args.title, "license": args.license, "adapter_repo_id": args.adapter, "datasets": args.datasets}
    card = render_card(args.repo_id, facts, evidence, **shown)
    for made in exports.values():
        files |= made["files"]
    # TensorBoard's own names hold the machine's
    files |= {f"runs/{path.parent.name}/events.out.tfevents.{number}": path for number, path in enumerate(events)}
    files |= evidence["pictures"]
    files[CARD] = card.encode()
    if relevance := (final_row(evidence["metrics"]) or {}).get("relevance"):
        files["relevance.json"] = json.dumps(relevance, indent=2).encode()
    releases = [Release(args.repo_id, "model", "Merged model", files)]
    if args.adapter:
        adapter = run_folder / "adapter"
        facts = {**facts, "adapter": verify_adapter(adapter, folder)}
        if facts["adapter"]["distance"] is None:
            base = facts["adapter"]["base"]
            print(f"{adapter}: {base} is not in the cache, so it was not compared with {folder}", file=sys.stderr)
        card = render_adapter_card(args.adapter, args.repo_id, facts, evidence, license=args.license)
        releases.append(Release(args.adapter, "model", "Adapter", {**model_files(adapter), CARD: card.encode()}))
    for release in releases:
        _check_no_local_path(release, run_folder, evidence)
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
    from common.models import limit_waiting
    from eval.evidence import other_files

    limit_waiting()
    with hub_errors(args.repo_id):
        return [commit for commit in found if not other_files(args.repo_id, commit, Path(args.path))]


def prepare_dataset(args: Namespace) -> Release:
    from dataset_builders.card import card_for
    from release.verify import verify_dataset

    folder = Path(args.path)
    if not (folder / CARD).is_file() and (folder / "hub").is_dir():
        folder /= "hub"
    files = verify_dataset(folder)["files"]
    return Release(args.repo_id, "dataset", "Graded data", {**files, CARD: card_for(folder, args.repo_id).encode()})


def _check_no_local_path(release: Release, run_folder: Path, evidence: Mapping) -> None:
    """Raises InputError where a card names a folder of this machine, which a quoted recipe may."""
    from huggingface_hub import ModelCard

    from release.verify import local_paths, named_paths

    recipes = [evidence["recipe"], *(data["recipe"] for data in evidence["data"].values() if data)]
    places = [run_folder, *evidence["data"], *(path for recipe in recipes for path in named_paths(recipe))]
    places = [place for place in places if named_paths(str(place))]
    card = release.files[CARD].decode()
    metadata = {key: value for key, value in ModelCard(card).data.to_dict().items() if key != "widget"}
    if found := [*local_paths(card, places), *named_paths(metadata)]:
        raise InputError(f"{run_folder}: the card of {release.repo_id} would publish the local folder {found[0]!r}")


def write_cards(releases: Sequence[Release], folder: Path) -> None:
    """The first card as README.md, that of the adapter in a folder of its own."""
    for release, target in zip(releases, (folder, folder / "adapter"), strict=False):
        target.mkdir(parents=True, exist_ok=True)
        (target / CARD).write_bytes(release.files[CARD])
        print(f"{target / CARD}: the card of {release.repo_id}", file=sys.stderr)


# --- the Hub --------------------------------------------------------------------------------------------------------


def publish(releases: Sequence[Release], args: Namespace) -> None:
    """Check every repository before anything is written to the first; then make one commit each and print a line.

    Raises InputError: what went wrong and what to do.
    """
    from huggingface_hub import HfApi, get_token

    from common.models import limit_waiting

    token = get_token()
    if token is None:
        raise InputError("no token; set HF_TOKEN or run `hf auth login` (or check without one: --dry_run)")
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise InputError("the token holds spaces, line breaks or letters that no token has; set HF_TOKEN again")
    limit_waiting()
    api = HfApi(token=token)
    found = []
    for release in releases:
        _check_no_token(release, token)
        with hub_errors(release.repo_id):
            found.append(find_repository(api, release, args))
    published = ""
    for release, refs in zip(releases, found, strict=True):
        with hub_errors(release.repo_id, published):
            print(push(api, release, refs, args), flush=True)
        published += f"{release.repo_id} is published; "


def _check_no_token(release: Release, token: str) -> None:
    for name, content in release.files.items():
        if not name.endswith((".safetensors", ".parquet", ".gguf", ".bin")) and ".onnx" not in name:
            content = content if isinstance(content, bytes) else content.read_bytes()
            if token.encode() in content:
                raise InputError(f"{release.repo_id}: {name} holds the token; remove it, and make a new token")


def find_repository(api: HfApi, release: Release, args: Namespace) -> tuple[Refs, Refs] | None:
    """Its branches and tags, as `read_refs` gives them; None without a repository.

    Raises InputError where flags do not fit them.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    name, branch = release.repo_id, args.revision or "main"
    try:
        info = api.repo_info(**release.repository)
    except RepositoryNotFoundError:
        return None
    if args.private and not info.private:
        raise InputError(f"{name}: is public already; make it private in its settings, or drop --private")
    branches, tags = read_refs(api, release)
    if branch not in branches and branch in tags:
        raise InputError(f"{name}: {branch} is a tag; --revision takes a branch")
    if branch not in branches and args.create_pr:
        raise InputError(f"{name}: no branch {branch} for a pull request; push it first, or drop --revision")
    if args.tag in tags and tags[args.tag] != branches.get(branch):
        raise InputError(f"{name}: tag {args.tag} is on another commit, {tags[args.tag][:8]}; choose another name")
    return branches, tags


def read_refs(api: HfApi, release: Release) -> tuple[Refs, Refs]:
    """Branches, with those of pull requests (refs/pr/N), and tags."""
    found = api.list_repo_refs(**release.repository, include_pull_requests=True)
    branches = {ref.name: ref.target_commit for ref in found.branches}
    branches |= {ref.ref: ref.target_commit for ref in found.pull_requests or []}
    return branches, {ref.name: ref.target_commit for ref in found.tags}


def push(api: HfApi, release: Release, refs: tuple[Refs, Refs] | None, args: Namespace) -> str:
    """Make the repository, the branch, the commit and the tag, as far as they are missing; a line about it."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    name, repository, branch = release.repo_id, release.repository, args.revision or "main"
    if refs is None:
        api.create_repo(**repository, private=args.private or None, exist_ok=True)
        refs = read_refs(api, release)
    branches, tags = refs
    head = branches.get(branch, branches["main"])
    if branch not in branches:
        api.create_branch(**repository, branch=branch, revision=head, exist_ok=True)
    additions = [CommitOperationAdd(name, content) for name, content in release.files.items()]
    left = [
        name
        for name in api.list_repo_files(**repository, revision=head)
        if name not in release.files and _is_replaced(name, release.repo_type)
    ]
    content = fingerprint([[addition.path_in_repo, addition.upload_info.sha256.hex()] for addition in additions])
    title = f"{release.title} {content[:8]}"
    if args.create_pr:
        for proposal in branches:  # a lost answer hides whether the pull request was opened
            if proposal.startswith("refs/pr/"):
                [newest, *_] = api.list_repo_commits(**repository, revision=proposal)
                if newest.title == title:
                    return f"{name}: {proposal} proposes these files already; no other one was made"
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
    if args.tag:
        tagged = tags.get(args.tag)
        if tagged is None:
            api.create_tag(**repository, tag=args.tag, revision=made.oid)
        elif tagged != made.oid:
            raise InputError(f"{name}: the files are there, commit {made.oid}; tag {args.tag} is on {tagged[:8]}")
    if made.oid == head:
        return f"{name}: {branch} holds these files already (commit {head[:8]}); no commit was made"
    page = f"{api.endpoint}/{'datasets/' if release.repo_type == 'dataset' else ''}{name}"
    return f"{name}: {page}/commit/{made.oid}"


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
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, HTTPError) else error
        if not isinstance(cause, HTTPError | OSError | RuntimeError | ValueError):  # hf_xet's errors are of these, too
            raise
        status = getattr(getattr(cause, "response", None), "status_code", None)
        known = {
            401: "the Hub does not know the token; make one with write access",
            403: "the token may not write there; take one with write access",
            412: "somebody committed meanwhile, and nothing was overwritten; look at it, then run the command again",
        }
        if isinstance(error, OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set; unset it, or check without the Hub: --dry_run"
        else:
            reason = known.get(status) or f"{type(error).__name__}: {error}; run the same command again to finish"
        raise InputError(f"{before}{repo_id}: {reason}") from error


if __name__ == "__main__":
    run(main)
