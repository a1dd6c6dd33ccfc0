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
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.cli import ArgumentParser, InputError, run
from common.models import limit_waiting
from dataset_builders.languages import MTEB_CODES
from release.hub import Release, hub_errors, publish

CARD = "README.md"


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
    from eval.metrics import final_row
    from release.exports import FILES, export
    from release.model_card import render_adapter_card, render_card
    from release.verify import model_files, verify_adapter, verify_model

    folder = Path(args.path)
    files = model_files(folder)
    run_folder = Path(args.run) if args.run else folder.parent
    results, ablations = (Path(path) if path else None for path in (args.results, args.ablations))
    commits = evaluated_commits(args, [results or run_folder / "results", run_folder / "results"])
    evidence = read_evidence(run_folder, results, ablations, commits)
    evidence["languages"] = args.language or evidence["languages"]
    stages = [stage["name"] for stage in evidence["stages"]]
    events = event_files(run_folder / "logs", stages) if args.tensorboard else {}
    facts = verify_model(folder)
    adapter = verify_adapter(run_folder / "adapter", folder, facts) if args.adapter else None
    exports = {kind: export(kind, folder, run_folder / "exports", facts) for kind in FILES if getattr(args, kind)}
    facts |= {"exports": exports, "tensorboard": bool(events), "adapter": adapter}
    shown = {"title": args.title, "license": args.license, "adapter_repo_id": args.adapter, "datasets": args.datasets}
    for added in (evidence["pictures"], events, *(made["files"] for made in exports.values())):
        files |= added
    if relevance := final_row(evidence["metrics"]).get("relevance"):
        files["relevance.json"] = json.dumps(relevance, indent=2).encode()
    files[CARD] = render_card(args.repo_id, facts, evidence, **shown).encode()
    releases = [Release(args.repo_id, "model", "Merged model", files)]
    if adapter:
        if adapter["distance"] is None:
            why = f"{adapter['base']} is not in the cache, or transformers alone cannot say the model"
            print(f"{run_folder / 'adapter'}: not compared with {folder}: {why}", file=sys.stderr)
        card = render_adapter_card(args.adapter, args.repo_id, facts, evidence, license=args.license)
        releases.append(Release(args.adapter, "model", "Adapter", {**adapter["files"], CARD: card.encode()}))
    for release in releases:
        _check_card(release, run_folder, evidence)
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
    from eval.evidence import other_files

    limit_waiting()
    with hub_errors(args.repo_id):
        return [commit for commit in found if not other_files(args.repo_id, commit, Path(args.path))]


def event_files(logs: Path, stages: Sequence[str]) -> dict[str, Path]:
    """Name in the repository -> event file of a stage, where the Hub's tab of curves looks. TensorBoard's own names
    hold the machine's.
    """
    found = [path for name in stages for path in sorted((logs / name).rglob("*tfevents*"))]
    if not found:
        raise InputError(f"{logs}: no event files of TensorBoard; train with report_to: [tensorboard]")
    return {f"runs/{path.parent.name}/events.out.tfevents.{number}": path for number, path in enumerate(found)}


def prepare_dataset(args: Namespace) -> Release:
    from dataset_builders.card import card_for
    from release.verify import verify_dataset

    folder = Path(args.path)
    if not (folder / CARD).is_file() and (folder / "hub").is_dir():
        folder /= "hub"
    files = verify_dataset(folder)["files"]
    return Release(args.repo_id, "dataset", "Graded data", {**files, CARD: card_for(folder, args.repo_id).encode()})


def _check_card(release: Release, run_folder: Path, evidence: Mapping) -> None:
    """Raises InputError where a card names a folder of this machine, which a quoted recipe may."""
    from huggingface_hub import ModelCard

    from release.local_paths import check_no_local_path, named_paths

    recipes = [evidence["recipe"], *(data["recipe"] for data in evidence["data"].values() if data)]
    named = named_paths([str(run_folder), *evidence["data"], *recipes])
    where = f"{run_folder}: the card of {release.repo_id}"
    check_no_local_path({CARD: release.files[CARD]}, named, where)
    metadata = ModelCard(release.files[CARD].decode()).data.to_dict()
    if found := named_paths({key: value for key, value in metadata.items() if key != "widget"}):
        raise InputError(f"{where} would name the local folder {found[0]!r} in its metadata")


def write_cards(releases: Sequence[Release], folder: Path) -> None:
    """The first card as README.md, that of the adapter in a folder of its own."""
    for release, target in zip(releases, (folder, folder / "adapter"), strict=False):
        target.mkdir(parents=True, exist_ok=True)
        (target / CARD).write_bytes(release.files[CARD])
        print(f"{target / CARD}: the card of {release.repo_id}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
