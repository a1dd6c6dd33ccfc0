"""Check what is published as its users would load it: the files are unchanged since they were written, and stock
libraries, in a process that cannot import this repository, get what manifest, card and reference vectors say.

    facts = verify_model(Path("runs/demo/model"))
    facts = verify_dataset(Path("runs/demo/data/hub"))
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from common.cli import InputError
from common.steps import MANIFEST, files_of, read_manifest
from dataset_builders.card import public_name
from modeling.prompts import baked_prompts
from modeling.reference import REFERENCE
from release.usage import encode_lines, read_settings

CARD = "README.md"
# What readers of a model folder read; nothing else of it is published.
_MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
_RUN_AS_CODE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py")
# Euclidean distance of unit vectors (cosine = 1 - d^2 / 2) between two ways to compute them, by dtype of the weights.
# Other devices, libraries and batches add up the same numbers in another order.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
# Not importable in the clean process, as on other machines.
_OUR_PACKAGES = ("common", "dataset_builders", "modeling", "train_st", "eval", "release", "push_to_hub")


# --- models ---------------------------------------------------------------------------------------------------------


def verify_model(folder: Path) -> dict[str, Any]:
    """The facts of a merged model that its card tells (see `describe_model`, `read_settings`).

    Raises:
        InputError: the model does not load, needs code that others would have to trust, or gives wrong vectors.
    """
    model_files(folder)
    if not (folder / REFERENCE).is_file():
        raise InputError(
            f"{folder}: {REFERENCE} is missing, so nothing shows whether this is the model that was trained; "
            "train_st.py writes it when it saves a model"
        )
    settings = read_settings(folder)
    lines = encode_lines(settings)
    facts = settings | in_clean_process(describe_model, folder, lines or "", library="sentence-transformers")
    for problem in _model_problems(facts):
        raise InputError(f"{folder}: {problem}")
    return facts


def model_files(folder: Path) -> dict[str, Path]:
    """Name in the repository -> file, of what a SentenceTransformer folder (merged or an adapter) publishes.

    Raises:
        InputError: no such folder, weights that run as code, a file other than the one that was saved, a local path.
    """
    if not (folder / "modules.json").is_file():
        raise InputError(f"{folder}: not a SentenceTransformer folder (modules.json is missing); train one first")
    files = made_files(folder) if (folder / MANIFEST).is_file() else {name: folder / name for name in files_of(folder)}
    for path in folder.rglob("*"):
        if path.suffix in _RUN_AS_CODE:
            raise InputError(f"{path}: the Hub's readers run this as code; publish safetensors and no code")
    files = {name: path for name, path in files.items() if path.suffix in _MODEL_FILES}
    if not any(name.endswith(".safetensors") for name in files):
        raise InputError(f"{folder}: no .safetensors weights; save the model with safetensors")
    for name, path in files.items():
        if "config" in name and (found := local_paths(path.read_text(encoding="utf-8"), [folder])):
            raise InputError(f"{path}: names a local folder, {found[0]!r}; write a Hub id there, or remove it")
    return files


def describe_model(path: str, lines: str) -> dict:
    """What the model in `path` does. Runs alone, so it imports all it needs.

    `lines`: the card's code for transformers alone, which defines `encode(texts, prompt)`; empty where there is none.
    """
    import json

    import numpy as np
    from sentence_transformers import SentenceTransformer
    from transformers import AutoTokenizer

    model = SentenceTransformer(path, trust_remote_code=False, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    special = " ".join(map(str, tokenizer.all_special_tokens[:8]))
    texts = ["", "a", "how do I parse a date", f"text {special} text", "a long text " * model.max_seq_length]
    prompts = sorted({"", *model.prompts.values()})
    other_ids, last, lengths = [], set(), []
    for prompt in prompts:
        features = model.preprocess(texts, prompt=prompt or None)
        expected = tokenizer([prompt + text for text in texts], truncation=True, max_length=model.max_seq_length)
        for row, ids in enumerate(expected["input_ids"]):
            read = features["input_ids"][row][features["attention_mask"][row].bool()].tolist()
            other_ids += [prompt] if read != ids else []
            lengths.append(len(ids))
            last.add(tokenizer.convert_ids_to_tokens(ids[-1]) if ids else "")
    longest = max(prompts, key=lambda prompt: len(tokenizer(prompt)["input_ids"]))
    vectors = np.concatenate([model.encode(texts, prompt=prompt) for prompt in ("", longest)]).astype("float32")
    first, second = model.encode(["how do I parse a date", "where is the red house"], prompt=longest)
    alone = None
    if lines:
        names = {"repository": path}
        exec(lines, names)
        found = np.concatenate([names["encode"](texts, prompt).float().numpy() for prompt in ("", longest)])
        alone = float(np.linalg.norm(found - vectors, axis=1).max())
    with open(f"{path}/reference_vectors.json", encoding="utf-8") as stream:
        reference = json.load(stream)
    distances = [
        np.linalg.norm(model.encode(entry["text"], prompt_name=entry["prompt_name"]) - np.array(entry["vector"]))
        for entry in reference["vectors"]
    ]
    norms = np.linalg.norm(vectors, axis=1)
    return {
        "dimensions": model.get_embedding_dimension(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "backbone": model[0].config.model_type,
        "prompts": model.prompts,
        "other_ids": sorted(set(other_ids)),
        "last_tokens": sorted(last),
        "end_token": reference["end_token"],
        "longest": max(lengths),
        "norms": [float(norms.min()), float(norms.max())],
        # a prompt that fills max_seq_length gives every text the same vector, without a warning
        "tells_texts_apart": bool(np.abs(first - second).max() > 1e-4),
        "reference_dtype": reference["dtype"],
        "reference_distance": float(max(distances)),
        "alone_distance": alone,
    }


def _model_problems(facts: Mapping[str, Any]) -> Iterable[str]:
    """What would silently give wrong vectors or scores, causes before their effects."""
    dtype = facts["reference_dtype"]
    if dtype not in TOLERANCE:
        yield f"its weights were {dtype}; publish a model in {', '.join(TOLERANCE)}"
    if facts["other_ids"]:
        yield (
            f"with prompt {facts['other_ids'][0]!r} sentence-transformers reads other tokens than its tokenizer gives "
            "for prompt + text; save it again with train_st.py"
        )
    if facts["pooling_mode"] == "lasttoken" and facts["end_token"] and facts["last_tokens"] != [facts["end_token"]]:
        yield f"texts do not end in {facts['end_token']} but in {facts['last_tokens'][:3]}; save it again"
    if facts["longest"] > facts["max_seq_length"]:
        yield f"texts get longer than max_seq_length {facts['max_seq_length']}"
    # half precision rounds a unit vector's length by up to 2^-8; NaN is near nothing
    if facts["normalised"] and not all(abs(norm - 1) < 5e-3 for norm in facts["norms"]):
        yield f"vectors are not of unit length but of {facts['norms']}; the weights are broken"
    if not facts["tells_texts_apart"]:
        yield "a prompt leaves no room for the text, all texts get one vector; shorten it"
    tasks = [name for name in baked_prompts(None) if name not in ("query", "document")]
    missing = [name for name in tasks if name not in facts["prompts"]]
    if 0 < len(missing) < len(tasks):  # an embedder that goes on as it was published may know none of them
        yield f"{len(missing)} prompts are missing, the first of them {missing[0]!r}; save it again with train_st.py"
    if not facts["reference_distance"] <= TOLERANCE[dtype]:
        yield (
            f"vectors are {facts['reference_distance']:.2g} from those of the model that was saved ({REFERENCE}), "
            f"more than {TOLERANCE[dtype]} ({dtype}); the files are not that model, save it again"
        )
    if facts["alone_distance"] is not None and not facts["alone_distance"] <= TOLERANCE[dtype]:
        yield (
            f"by transformers alone, with the lines of the card, vectors are {facts['alone_distance']:.2g} from those "
            f"of sentence-transformers, more than {TOLERANCE[dtype]} ({dtype}); save it again with train_st.py"
        )


def verify_adapter(folder: Path, model: Path) -> dict[str, Any]:
    """`base`, `revision`, `dtype` and, where the base is in this machine's cache, `distance` of its vectors to those
    of `model` (None where it is not: a base of 14 GB is not fetched for this).

    Raises:
        InputError: an adapter that names no base on the Hub, or is not that of `model`.
    """
    if not (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder}: no adapter (adapter_config.json is missing); train one (use_peft), or drop --adapter"
        )
    model_files(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base or public_name(base) != base or (folder / base).exists():
        raise InputError(
            f"{folder}: its base is {base!r}, which others do not have; train the adapter on a model of the Hub, "
            "or drop --adapter"
        )
    if not revision:
        raise InputError(
            f"{folder}: adapter_config.json names no revision of its base {base}; train with model_revision, or write "
            "the commit of the base there"
        )
    for name in ("modules.json", "config_sentence_transformers.json", "tokenizer.json"):
        if (folder / name).read_bytes() != (model / name).read_bytes():
            raise InputError(f"{folder} and {model}: {name} differs; publish the adapter and the model of one run")
    found = in_clean_process(describe_adapter, folder, model, library="peft")
    if found["distance"] is not None and found["distance"] > TOLERANCE[found["dtype"]]:
        raise InputError(
            f"{folder}: on {base}@{revision} its vectors are {found['distance']:.2g} from those of {model}, more than "
            f"{TOLERANCE[found['dtype']]} ({found['dtype']}); publish the adapter and the model of one run"
        )
    return {"base": base, "revision": revision, **found}


def describe_adapter(path: str, model_path: str) -> dict:
    """How far the vectors of the adapter on its base lie from those of the merged model. Runs alone."""
    import json

    import numpy as np
    from peft import PeftConfig
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    with open(f"{model_path}/reference_vectors.json", encoding="utf-8") as stream:
        entries = json.load(stream)["vectors"]
    model = SentenceTransformer(model_path, trust_remote_code=False, local_files_only=True)

    def vectors():
        return np.array([model.encode(entry["text"], prompt_name=entry["prompt_name"]) for entry in entries])

    merged, dtype = vectors(), next(model.parameters()).dtype
    config = PeftConfig.from_pretrained(path)
    try:
        base = AutoModel.from_pretrained(
            config.base_model_name_or_path, revision=config.revision, dtype=dtype, local_files_only=True
        )
    except OSError:  # not in this machine's cache
        return {"distance": None, "dtype": str(dtype).removeprefix("torch.")}
    base.load_adapter(path)
    model[0].model = base.to(model.device)
    distance = float(np.linalg.norm(vectors() - merged, axis=1).max())
    return {"distance": distance, "dtype": str(dtype).removeprefix("torch.")}


# --- data -----------------------------------------------------------------------------------------------------------


def verify_dataset(folder: Path) -> dict[str, Any]:
    """The facts of a published folder: `configs` (name -> rows), `rows` in all, and `files`, name -> file.

    README.md among them is the card of no repository yet (see `dataset_builders.card.card_for`).

    Raises:
        InputError: files that do not load, hold local paths, or rows that would be trained on wrongly.
    """
    files, manifest = made_files(folder), read_manifest(folder)
    expected = manifest.get("rows")
    if expected is None or CARD not in files:
        raise InputError(f"{folder}: not the folder of a published data set; name DIR or DIR/hub of a build")
    found = in_clean_process(describe_dataset, folder, library="datasets")
    if expected != found:
        raise InputError(f"{folder}: `datasets` reads {found} rows, and the manifest says {expected}; build it again")
    problems = _wrong_rows(folder, list(found))
    places = [folder, *named_paths(manifest["inputs"].get("recipe"))]
    problems += [f"{name} names a local folder" for name in files if local_paths(_readable(files[name]), places)]
    if problems:
        raise InputError(f"{folder}: not to be published: {'; '.join(problems[:10])}; build it again")
    return {"configs": found, "rows": sum(found.values()), "files": files}


def describe_dataset(path: str) -> dict:
    """Rows of every config; `datasets` compares columns and counts with the card. Runs alone."""
    import shutil

    import datasets

    datasets.disable_progress_bars()
    found = {}
    for name in datasets.get_dataset_config_names(path):
        found[name] = datasets.load_dataset(path, name, cache_dir="cache", split="train").num_rows
        shutil.rmtree("cache")
    return found


def _wrong_rows(folder: Path, configs: list[str]) -> list[str]:
    """Labels outside (0, 1), ids that are not unique or refer to nothing; each with the number of rows."""
    import polars as pl

    tables = {name: pl.scan_parquet(folder / name / "*.parquet") for name in configs}
    counts = {}
    for name, table in tables.items():
        schema = table.collect_schema()
        if "label" in schema:
            labels = table.select(pl.col("label").explode() if schema["label"] == pl.List else "label")
            outside = ~pl.col("label").is_between(0, 1, closed="none").fill_null(False)
            counts[f"{name}: label is outside (0, 1)"] = labels.filter(outside)
            if schema["label"] == pl.List:
                width = sum(column == "positive" or column.startswith("negative_") for column in schema)
                counts[f"{name}: label has not {width} values"] = table.filter(pl.col("label").list.len() != width)
        if "teacher_score" in schema:
            counts[f"{name}: teacher_score is not finite"] = table.filter(~pl.col("teacher_score").is_finite())
        for key, home in (("query_id", "queries"), ("document_id", "documents")):
            if name == home:
                counts[f"{name}: {key} that another row has"] = table.filter(pl.col(key).is_duplicated())
            elif key in schema and home in tables:
                ids = tables[home].select(key)
                counts[f"{name}: {key} is in no row of {home}"] = table.join(ids, on=key, how="anti")
    found = {problem: rows.select(pl.len()).collect().item() for problem, rows in counts.items()}
    return [f"{problem} ({rows} rows)" for problem, rows in found.items() if rows]


def _readable(path: Path) -> str:
    """What a file says besides its rows: the card, a plot's notes, a Parquet file's metadata."""
    if path.suffix != ".parquet":
        return path.read_bytes().decode("latin-1")
    import pyarrow.parquet as pq

    notes = pq.read_metadata(path).metadata or {}
    return b"\n".join([*notes, *notes.values()]).decode("latin-1")


# --- both -----------------------------------------------------------------------------------------------------------


def made_files(folder: Path) -> dict[str, Path]:
    """Name -> file, as the manifest of a finished folder lists them. Raises InputError: one is missing or altered."""
    made, found = read_manifest(folder).get("files", {}), files_of(folder)
    wrong = [
        f"{name} {'was altered' if name in found else 'is missing'}"
        for name, content in made.items()
        if found.get(name) != content
    ]
    if wrong:
        raise InputError(f"{folder}: not to be published: {'; '.join(wrong[:10])}; make it again")
    return {name: folder / name for name in made}


def local_paths(text: str, references: Iterable[str | Path]) -> list[str]:
    """Local paths in `text`: the home or the current folder, one of `references` or a folder above it, or a link to
    the Hub that was made of a path.
    """
    places = {str(place) for place in (Path.home(), Path.cwd()) if len(place.parts) > 2}
    for reference in map(Path, references):
        resolved = reference.expanduser().resolve()
        places |= {str(place) for place in (resolved, *resolved.parents) if len(place.parts) > 2}
        places |= {str(reference)} if len(reference.parts) > 1 else set()
    names = [
        ("" if place.startswith("/") else r"(?<![\w/.-])") + re.escape(place) + r"(?![\w-])"
        for place in sorted(places, key=len, reverse=True)
    ]
    return re.findall("|".join([r"huggingface\.co/(?:datasets/)?[./~][^\s)\"']*", *names]), text)


def named_paths(recipe: Any) -> list[str]:
    """The local folders and files that a recipe names, wherever in it."""
    if isinstance(recipe, str):
        return [recipe] if public_name(recipe) != recipe and not re.search(r"\s", recipe) else []
    inner = recipe.values() if isinstance(recipe, Mapping) else recipe if isinstance(recipe, list) else ()
    return [path for value in inner for path in named_paths(value)]


def in_clean_process(describe: Callable[..., dict[str, Any]], *arguments: Path | str, library: str) -> dict[str, Any]:
    """`describe(*arguments)`, paths as absolute ones, in another working folder, without this repository, network or
    token. `describe` is taken there as its source; `library` is what it uses, as the error says.

    Raises:
        InputError: it fails there.
    """
    program = "\n".join(
        [
            "import json, sys",
            f"sys.modules.update(dict.fromkeys({_OUR_PACKAGES!r}))",  # None: importing it is an error
            inspect.getsource(describe),
            f"print(json.dumps({describe.__name__}(*sys.argv[1:])))",
        ]
    )
    texts = [str(argument.resolve()) if isinstance(argument, Path) else argument for argument in arguments]
    environment = {name: value for name, value in os.environ.items() if "TOKEN" not in name} | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-I", "-c", program, *texts],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        reason = (done.stderr.strip() or f"it ended with code {done.returncode}").splitlines()[-1]
        raise InputError(f"{arguments[0]}: plain {library} cannot use it: {reason}")
    return json.loads(done.stdout.splitlines()[-1])
