"""The file by which mteb knows a published model: what its pull request to mteb adds, filled in from evidence.

    python -m eval.model_meta org/name@COMMIT --run runs/mistral-7b --code https://github.com/org/graded-embedder \\
        --output_dir ../mteb/mteb/models/model_implementations
    python -m eval.model_meta org/name --run runs/demo --dry_run    # before it is published; needs no network

What the run's folder and the commit do not say is None, with a line on stderr; nothing is guessed. Without
--output_dir the file is printed. docs/leaderboard.md has the rest of the way to the leaderboard.
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from common.cli import ArgumentParser, InputError, output_folder, run
from common.models import hub_commit, resolve_model
from common.steps import read_json, written_whole
from dataset_builders.languages import MTEB_CODES
from eval.evidence import base_model, disclosure, other_files, read_evidence
from modeling.reference import REFERENCE

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelCardData
    from mteb.models import ModelMeta

HUB = "https://huggingface.co"
# What train_st.py saves: read by sentence-transformers, and by transformers alone with the lines of the card.
FRAMEWORK = ["Sentence Transformers", "PyTorch", "safetensors", "Transformers"]
# Why a field is None.
UNKNOWN = {
    "revision": "not published yet: the commit",
    "release_date": "not published yet: the date of the commit",
    "license": "not published yet: what the card says",
    "open_weights": "not published yet",
    "public_training_code": "no --code",
    "public_training_data": "the card does not name a public data set for each of those that it was trained on",
    "training_datasets": "not every data set that it was trained on is at hand and states its tasks of mteb",
    "n_embedding_parameters": "no tensor of the name embed_tokens",
    "adapted_from": "the card names no base model on the Hub",
    "citation": "BibTeX of an article about this very model, if there is one",
    "contacts": "GitHub handles of those who answer for it",
    "languages": "no data set that it was trained on states its language",
}
_HEAD = """\
from __future__ import annotations

from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
"""


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    evidence, folder = read_evidence(args.run), args.run / "model"
    if args.dry_run:
        published = {"adapted_from": base_model(evidence["recipe"])}
    else:
        published = read_commit(args.name, args.revision, folder, len(evidence["data"]))
    disclosed = disclosure(evidence["data"], published["adapted_from"])
    meta = make_meta(
        name=args.name,
        reference=f"{HUB}/{args.name}",
        languages=[MTEB_CODES[code] for code in evidence["languages"]] or None,
        public_training_code=args.code,
        training_datasets=set(disclosed["training_datasets"]) if disclosed else None,
        **read_folder(folder),
        **published,
    )
    if args.output_dir:
        print(f"{write_source(meta, args.output_dir)}: how mteb knows {args.name}", file=sys.stderr)
    else:
        print(to_source(meta), end="")
    for field, reason in UNKNOWN.items():
        if getattr(meta, field) is None:
            print(f"{field} is None: {reason}", file=sys.stderr)
    if disclosed:
        import mteb

        share = meta.zero_shot_percentage(mteb.get_benchmark(disclosed["benchmark"]).tasks)
        print(f"by mteb's rule {share} % zero-shot on {disclosed['benchmark']}", file=sys.stderr)


def _parse(argv: Sequence[str]) -> Namespace:
    parser = ArgumentParser(prog="python -m eval.model_meta", description=__doc__)
    parser.add_argument("model", metavar="ORG/NAME@COMMIT", help="the published model; a branch or tag will do")
    parser.add_argument("--run", required=True, type=Path, help="folder with recipe.yaml, ledger.json and model/")
    parser.add_argument("--code", metavar="URL", help="where the code that trained it is public")
    parser.add_argument("--dry_run", action="store_true", help="ask no Hub; what only the commit says is None")
    parser.add_argument("--output_dir", type=output_folder, help="write the file there, as ORG_models.py")
    args = parser.parse_args(argv)
    reference = resolve_model(args.model)
    if reference.is_local:
        raise InputError(f"{args.model}: a folder; name the repository on the Hub, ORG/NAME@COMMIT")
    if reference.name_or_path.count("/") != 1:
        raise InputError(f"{args.model}: mteb knows models as ORG/NAME")
    if args.code is not None and not re.match(r"https://\S+$", args.code):
        raise InputError(f"--code {args.code!r}: give an address, https://...")
    args.name, args.revision = reference.name_or_path, reference.revision
    return args


def read_folder(folder: Path) -> dict[str, Any]:
    """What the files of a model that train_st.py saved say about it. Raises InputError for other folders."""
    from huggingface_hub import get_local_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
    from mteb.types import OutputDType

    try:
        settings = read_json(folder / "config_sentence_transformers.json")
        saved = read_json(folder / REFERENCE)
        places = [folder, *sorted({path.parent for path in folder.glob("*/*.safetensors")})]  # with later modules'
        files = [file for place in places for file in get_local_safetensors_metadata(place).files_metadata.values()]
        tensors = [named for file in files for named in file.tensors.items()]
        embeddings = [tensor for name, tensor in tensors if name.endswith("embed_tokens.weight")]
        size = sum(end - begin for begin, end in (tensor.data_offsets for _, tensor in tensors))
        return {
            "n_parameters": sum(tensor.parameter_count for _, tensor in tensors),
            "n_embedding_parameters": sum(tensor.parameter_count for tensor in embeddings) or None,
            "memory_usage_mb": round(size / 2**20),
            "max_tokens": read_json(folder / "sentence_bert_config.json")["max_seq_length"],
            "embed_dim": len(saved["vectors"][0]["vector"]),
            # mteb: models loaded in lower precision declare it
            "output_dtypes": None if saved["dtype"] == "float32" else OutputDType(saved["dtype"]),
            "similarity_fn_name": settings.get("similarity_fn_name") or "cosine",  # sentence-transformers' default
            "use_instructions": any(settings["prompts"].values()),
        }
    except (NotASafetensorsRepoError, SafetensorsParsingError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: not as train_st.py saves a model ({error}); name the folder of its run") from None


def read_commit(name: str, revision: str | None, folder: Path, data_sets: int) -> dict[str, Any]:
    """What the Hub says about a published model, whose files must be those of `folder`.

    mteb's own draft (ModelMeta.from_hub) reads the branch main whatever the revision, and takes the positions of the
    backbone for the longest text.

    Args:
        name: ORG/NAME.
        revision: commit, branch or tag; None: main.
        folder: the model that was published.
        data_sets: how many data sets it was trained on.

    Raises:
        InputError: no such commit, one of other files, a private repository, no licence, no answer.
    """
    from huggingface_hub import HfApi, ModelCard, hf_hub_download
    from huggingface_hub.errors import HTTPError

    commit, api = hub_commit(name, revision), HfApi()
    try:
        if other := other_files(name, commit, folder):
            raise InputError(
                f"{name}@{commit}: {min(other)} is not that of {folder}; name the commit that this run was pushed as"
            )
        if not api.repo_exists(name, token=False):
            raise InputError(f"{name}: not public, and the leaderboard takes no other model; change its settings")
        date = api.list_repo_commits(name, revision=commit)[0].created_at
        card = ModelCard.load(hf_hub_download(name, "README.md", revision=commit)).data
        data = public_data(api, card, data_sets)
    except (HTTPError, OSError, ValueError) as error:  # also HF_HUB_OFFLINE
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{name}@{commit}: the Hub did not serve it: {reason}; check the name, the network and HF_TOKEN, then "
            "run again, or ask no Hub: --dry_run"
        ) from None
    return {
        "revision": commit,
        "release_date": date.strftime("%Y-%m-%d"),
        "license": licence(card),
        "open_weights": True,
        "public_training_data": data,
        "adapted_from": card.base_model,
    }


def licence(card: ModelCardData) -> str:
    """The card's licence as mteb takes it: a name that it knows, or else the address. Raises InputError."""
    from mteb.types import Licenses

    found = card.license if card.license in get_args(Licenses) else card.get("license_link")
    if not found:
        raise InputError(
            f"mteb knows no licence {card.license!r}, which the card names; push it with another --license, or add "
            "license_link, its address, to the card on the Hub and name that commit"
        )
    return found


def public_data(api: HfApi, card: ModelCardData, data_sets: int) -> str | None:
    """Addresses of the training data; None unless the card names as many as there are and everybody can read them."""
    names = card.datasets or []
    if not data_sets or len(names) < data_sets:
        return None
    if not all(api.repo_exists(name, repo_type="dataset", token=False) for name in names):
        return None
    return ", ".join(f"{HUB}/datasets/{name}" for name in names)


def make_meta(**fields: Any) -> ModelMeta:
    """mteb's ModelMeta of these fields; those of UNKNOWN that are not given are None. Raises InputError."""
    from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
    from pydantic import ValidationError

    try:
        return ModelMeta(
            loader=SentenceTransformerEncoderWrapper,  # it uses the prompts that are saved in the model
            framework=FRAMEWORK,
            **{**dict.fromkeys(UNKNOWN), **fields},
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"mteb does not take {first['input']!r} as {first['loc'][0]}: {first['msg']}; mend it in the card"
        ) from None


def to_source(meta: ModelMeta) -> str:
    """A module of mteb's model_implementations, whose one ModelMeta mteb finds by its type."""
    imports = "from mteb.types import OutputDType\n" if meta.output_dtypes else ""
    return f"{_HEAD}{imports}\n{identifier(meta.name)} = {meta.to_python()}\n"


def identifier(name: str) -> str:
    """
    >>> identifier("my-org/Model-7B.v2"), identifier("01/x")
    ('my_org_model_7b_v2', '_01_x')
    """
    return re.sub(r"\W|^(?=\d)", "_", name.lower())


def write_source(meta: ModelMeta, folder: Path) -> Path:
    """Write it as ORG_models.py, mteb's way to name them. Raises InputError where that file has other content."""
    path, source = folder / f"{identifier(meta.name.partition('/')[0])}_models.py", to_source(meta)
    if path.exists() and path.read_text(encoding="utf-8") != source:
        raise InputError(f"{path}: is there already; add what this prints without --output_dir by hand")
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(source, encoding="utf-8")
    return path


if __name__ == "__main__":
    run(main)
