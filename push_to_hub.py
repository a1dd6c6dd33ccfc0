"""Prepare a trained model for the Hugging Face Hub: check it as a stranger would load it, and render its card.

    python push_to_hub.py model runs/demo/model org/name --dry_run
    python push_to_hub.py model runs/demo/model org/name --dry_run --license apache-2.0 --output_dir card

Nothing is uploaded. The card goes to stdout, or as README.md into --output_dir.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_builders.cli import ArgumentParser, InputError, run
from dataset_builders.recipes import read_yaml
from eval.report import format_ledger, read_json, read_metrics
from eval.retrieval import format_table
from modeling.recipe import StageArguments

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

TEMPLATE = Path(__file__).with_name("model_card.md")
# Names that a stranger's machine does not have; blocked while the model is checked.
_OUR_PACKAGES = ("dataset_builders", "modeling", "train_st", "eval", "push_to_hub")


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    folder = Path(args.path)
    run_folder = Path(args.run) if args.run else folder.parent
    check_files(folder)
    sources = read_run(run_folder, Path(args.results) if args.results else run_folder / "results")
    facts = describe_in_clean_process(folder)
    check_facts(folder, facts)
    card = render_card(args.repo_id, args.license, facts, sources)
    if args.output_dir:
        output = Path(args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        (output / "README.md").write_text(card, encoding="utf-8")
        print(f"{folder} is sound; the card is {output / 'README.md'}; nothing was uploaded", file=sys.stderr)
    else:
        print(card)


def _parse(argv: Sequence[str]):
    parser = ArgumentParser(prog="python push_to_hub.py", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, parser_class=ArgumentParser)
    model = kinds.add_parser("model", help="a trained model")
    model.add_argument("path", metavar="PATH", help="folder of the model (RUN/model)")
    model.add_argument("repo_id", metavar="ORG/NAME", help="repository on the Hub")
    model.add_argument("--dry_run", action="store_true", help="verify and render, upload nothing")
    model.add_argument("--run", help="folder with recipe.yaml and ledger.json (default: the one that holds PATH)")
    model.add_argument("--results", help="folder with metrics.json (default: RUN/results)")
    model.add_argument("--license", help="licence of the weights, as the Hub writes it (apache-2.0, mit, ...)")
    model.add_argument("--output_dir", help="write the card there as README.md instead of to stdout")
    args = parser.parse_args(argv)
    _check_repo_id(args.repo_id)
    if not args.dry_run:
        raise InputError("uploading is not built yet; add --dry_run to verify the model and render its card")
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


def check_files(folder: Path) -> None:
    """Refuse what a stranger could not load, or should not have to trust: pickled weights, or code."""
    if not (folder / "modules.json").is_file():
        raise InputError(f"{folder}: not a SentenceTransformer folder (modules.json is missing); train one first")
    files = [path for path in folder.rglob("*") if path.is_file()]
    if not any(path.suffix == ".safetensors" for path in files):
        raise InputError(f"{folder}: no .safetensors weights; save the model with safetensors")
    for path in files:
        if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py"):
            raise InputError(f"{path}: the Hub's readers run this as code; publish safetensors and no code")
    for module in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        if not module["type"].startswith("sentence_transformers."):
            raise InputError(f"{folder}: module {module['type']} is not one of sentence-transformers' own")


def describe_model(path: str) -> dict:
    """Load the model, look at what it does and return the facts. Runs alone, so it imports all it needs."""
    import numpy as np
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(path, trust_remote_code=False, local_files_only=True)
    texts = ["", "a", "how do I parse a date", "a long text " * model.max_seq_length]
    prompts = {"": "", **model.prompts}
    longest = max(prompts.values(), key=lambda prompt: len(model.tokenizer(prompt)["input_ids"]))
    last_tokens, lengths, norms = set(), [], []
    for prompt in ("", longest):
        features = model.preprocess(texts, prompt=prompt)
        for ids, mask in zip(features["input_ids"].tolist(), features["attention_mask"].tolist(), strict=True):
            kept = [token for token, used in zip(ids, mask, strict=True) if used]
            last_tokens.add(kept[-1] if kept else None)
            lengths.append(len(kept))
        norms += np.linalg.norm(model.encode(texts, prompt=prompt).astype("float32"), axis=1).tolist()
    first, second = model.encode(["how do I parse a date", "where is the red house"], prompt=longest)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "dimensions": model.get_embedding_dimension(),
        "max_seq_length": model.max_seq_length,
        "parameters": parameters,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "backbone": model[0].config.model_type,
        "prompts": model.prompts,
        "eos": model.tokenizer.eos_token,
        "ends_in_eos": last_tokens == {model.tokenizer.eos_token_id},
        "keeps_max_seq_length": max(lengths) <= model.max_seq_length,
        "norms": [min(norms), max(norms)],
        # a prompt that fills max_seq_length gives every text the same vector, without a warning
        "tells_texts_apart": bool(np.abs(first - second).max() > 1e-4),
    }


def describe_in_clean_process(folder: Path) -> dict[str, Any]:
    """`describe_model` in another folder and without this repository. Raises InputError where that fails."""
    program = "\n".join(
        [
            "import json, sys",
            f"sys.modules.update(dict.fromkeys({_OUR_PACKAGES!r}))",  # None: importing it is an error
            inspect.getsource(describe_model),
            "print(json.dumps(describe_model(sys.argv[1])))",
        ]
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-I", "-c", program, str(folder.resolve())],
            cwd=elsewhere,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise InputError(f"{folder}: plain sentence-transformers cannot use it: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def check_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raises InputError for what would silently give wrong vectors or scores."""
    from modeling.prompts import baked_prompts

    if not facts["ends_in_eos"]:
        raise InputError(f"{folder}: texts do not end in EOS ({facts['eos']}); build the model with build_encoder")
    if not facts["keeps_max_seq_length"]:
        raise InputError(f"{folder}: texts get longer than max_seq_length {facts['max_seq_length']}")
    # half precision rounds a unit vector's length by up to 2^-8
    if not all(abs(norm - 1) < 5e-3 for norm in facts["norms"]):
        raise InputError(f"{folder}: vectors are not of unit length but of {facts['norms']}; add a Normalize module")
    if not facts["tells_texts_apart"]:
        raise InputError(f"{folder}: a prompt leaves no room for the text, all texts get one vector; shorten it")
    missing = [name for name in baked_prompts(None) if name not in facts["prompts"]]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} prompts are missing, the first of them {missing[0]!r}; "
            "save the model with the prompts of modeling.prompts.baked_prompts"
        )


def read_run(run_folder: Path, results: Path) -> dict[str, Any]:
    """The recipe, the ledger and, where there are any, the results of the run that made the model."""
    path = run_folder / "recipe.yaml"
    if not path.is_file():
        raise InputError(f"{path}: no such file; the card tells the recipe, name its folder with --run")
    return {
        "recipe": read_yaml(path),
        "recipe_text": path.read_text(encoding="utf-8").strip(),
        "ledger": read_json(run_folder / "ledger.json"),
        "metrics": read_metrics(results) if (results / "metrics.json").is_file() else None,
    }


def render_card(repo_id: str, license: str | None, facts: Mapping[str, Any], sources: Mapping[str, Any]) -> str:
    """model_card.md filled in. Raises InputError where the Hub could not read the metadata."""
    from huggingface_hub import ModelCard
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    metadata = card_metadata(license, sources["recipe"])
    card = environment.get_template(TEMPLATE.name).render(
        metadata=metadata.to_yaml(),
        repo_id=repo_id,
        license=license,
        base_model=metadata.base_model,
        table=format_table(sources["metrics"]) if sources["metrics"] else None,
        ledger_table=format_ledger(sources["ledger"]),
        stages=[
            (stage["name"], stage_values(sources["recipe"], stage, "loss", StageArguments.loss))
            for stage in sources["recipe"]["stages"]
        ],
        **facts,
        **sources,
    )
    parsed = ModelCard(card).data
    if parsed.to_dict() != metadata.to_dict():
        raise InputError(f"{TEMPLATE}: its metadata reads back as {parsed.to_dict()}, not as it was written")
    return card


def stage_values(recipe: Mapping[str, Any], stage: Mapping[str, Any], key: str, default: Any = None) -> list[Any]:
    """The distinct values that a key has in a stage: one, or those of its `datasets:`."""
    shared = stage.get(key, recipe.get(key, default))
    return list(dict.fromkeys(entry.get(key, shared) for entry in stage.get("datasets") or [{}]))


def card_metadata(license: str | None, recipe: Mapping[str, Any]) -> ModelCardData:
    """What the Hub searches by. A local folder is no base model and no data set for a reader elsewhere."""
    from huggingface_hub import ModelCardData

    names = [name for stage in recipe["stages"] for name in stage_values(recipe, stage, "dataset_name")]
    datasets = [name for name in dict.fromkeys(names) if name and _is_hub_id(name)]
    base = None if recipe.get("student") else recipe["model_name_or_path"]
    return ModelCardData(
        language="en",
        license=license,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "dense", "text-embeddings", "graded-embedder"],
        base_model=base.partition("@")[0] if base and _is_hub_id(base) else None,
        datasets=datasets or None,
    )


def _is_hub_id(reference: str) -> bool:
    return (
        not Path(reference).exists()
        and not reference.startswith((".", "/", "~", "package:"))
        and (reference.count("/") <= 1)
    )


if __name__ == "__main__":
    run(main)
