"""Check what is published as its users would load it: the files are unchanged since they were written, and stock
libraries, in a process that cannot import this repository, get what manifest, card and reference vectors say.

    facts = verify_model(Path("runs/demo/model"))
    facts = verify_dataset(Path("runs/demo/data/hub"))
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import InputError
from common.steps import MANIFEST, files_of, read_manifest
from dataset_builders.card import public_name
from modeling.prompts import baked_prompts
from modeling.reference import REFERENCE
from release.local_paths import check_no_local_path, named_paths
from release.outside import describe_dataset, describe_lines, describe_model
from release.usage import encode_lines, oldest_sentence_transformers

# What readers of a model folder read; nothing else of it is published.
_MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
_RUN_AS_CODE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py")
_BASE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# Euclidean distance of unit vectors (cosine = 1 - d^2 / 2) between two ways to compute them, by dtype of the weights.
# Other devices, libraries and batches add up the same numbers in another order.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
# Not importable in the clean process, as on other machines.
_OUR_PACKAGES = ("common", "dataset_builders", "modeling", "train_st", "eval", "release", "push_to_hub")


# --- models ---------------------------------------------------------------------------------------------------------


def verify_model(folder: Path) -> dict[str, Any]:
    """What the card of a merged model tells of it: see `describe_model`. `model_files` has checked its files.

    Raises:
        InputError: the model does not load, needs code that others would have to trust, or gives wrong vectors.
    """
    if not (folder / REFERENCE).is_file():
        raise InputError(
            f"{folder}: {REFERENCE} is missing, so nothing shows whether this is the model that was trained; "
            "train_st.py writes it when it saves a model"
        )
    facts = in_clean_process(describe_model, folder, "auto", None, library="sentence-transformers")
    for problem in _model_problems(facts):
        raise InputError(f"{folder}: {problem}")
    dtype, again = facts["reference_dtype"], "save it again with train_st.py"
    saved = f"{folder}: its vectors and those of the model that was saved ({REFERENCE})"
    _check_near(facts["reference_distance"], dtype, saved, f"the files are not that model, {again}")
    if lines := encode_lines(facts):
        alone = in_clean_process(describe_lines, folder, None, lines, facts["asked"], library="transformers")
        ways = f"{folder}: vectors by sentence-transformers and by the card's lines for transformers alone"
        _check_near(distance(alone["vectors"], facts["vectors"]), dtype, ways, again)
    return {**facts, "oldest_sentence_transformers": oldest_sentence_transformers(facts["module_types"])}


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
    check_no_local_path({name: path for name, path in files.items() if "config" in name}, [folder], folder)
    return files


def _model_problems(facts: Mapping[str, Any]) -> Iterator[str]:
    """What would silently give wrong vectors or scores, causes before their effects."""
    dtype = facts["reference_dtype"]
    if foreign := [name for name in facts["module_types"] if not name.startswith("sentence_transformers.")]:
        yield f"module {foreign[0]} is not one of sentence-transformers' own"
    if dtype not in TOLERANCE:
        yield f"its weights were {dtype}; publish a model in {', '.join(TOLERANCE)}"
    if facts["other_ids"]:
        yield (
            f"with prompt {facts['other_ids'][0]!r} sentence-transformers reads other tokens than its tokenizer gives "
            "for prompt + text; save it again with train_st.py"
        )
    if facts["pooling_mode"] == "lasttoken" and facts["end_token"] and facts["last_tokens"] != [facts["end_token"]]:
        yield f"texts do not end in {facts['end_token']} but in {facts['last_tokens'][:3]}; save it again"
    by_prompt: dict[str, list[list[float]]] = {}
    for (prompt, _), vector in zip(facts["asked"], facts["vectors"], strict=True):
        by_prompt.setdefault(prompt, []).append(vector)
    # a prompt that fills max_seq_length gives every text the same vector, without a warning
    if any(np.ptp(rows, axis=0).max() < 1e-4 for rows in by_prompt.values()):
        yield "a prompt leaves no room for the text, all texts get one vector; shorten it"
    tasks = [name for name in baked_prompts(None) if name not in ("query", "document")]
    missing = [name for name in tasks if name not in facts["prompts"]]
    if 0 < len(missing) < len(tasks):  # an embedder that goes on as it was published may know none of them
        yield f"{len(missing)} prompts are missing, the first of them {missing[0]!r}; save it again with train_st.py"


def distance(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """The largest Euclidean distance of two vectors in the same row; NaN where one holds NaN."""
    return float(np.linalg.norm(np.subtract(first, second), axis=1).max())


def _check_near(apart: float, dtype: str, vectors: str, advice: str) -> None:
    if not apart <= TOLERANCE[dtype]:  # NaN is near nothing
        raise InputError(f"{vectors} are {apart:.2g} apart, more than {TOLERANCE[dtype]} ({dtype}); {advice}")


def verify_adapter(folder: Path, model: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """`files`, `base`, `revision`, `dtype` and `distance` of the adapter's vectors to those of `model`, whose `facts`
    verify_model found: by the card's lines, None where these cannot say the model, or its base is not in this
    machine's cache (14 GB are not fetched for this).

    Raises:
        InputError: an adapter that names no base on the Hub, or is not that of `model`.
    """
    from huggingface_hub import try_to_load_from_cache

    if not (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder}: no adapter (adapter_config.json is missing); train one (use_peft), or drop --adapter"
        )
    files = model_files(folder)
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
    found = {"files": files, "base": base, "revision": revision, "dtype": facts["dtype"], "distance": None}
    in_cache = any(isinstance(try_to_load_from_cache(base, name, revision=revision), str) for name in _BASE_WEIGHTS)
    if in_cache and (lines := encode_lines(facts, found)):
        alone = in_clean_process(describe_lines, folder, None, lines, facts["asked"], library="peft")
        found["distance"] = distance(alone["vectors"], facts["vectors"])
        ways = f"{folder}: vectors on {base}@{revision} and those of {model}"
        _check_near(found["distance"], facts["dtype"], ways, "publish the adapter and the model of one run")
    return found


# --- data -----------------------------------------------------------------------------------------------------------


def verify_dataset(folder: Path) -> dict[str, Any]:
    """`configs` (name -> rows) of a published folder, and its `files`, name -> file.

    README.md among them is the card of no repository yet (see `dataset_builders.card.card_for`).

    Raises:
        InputError: files that do not load, hold local paths, or rows that would be trained on wrongly.
    """
    files, manifest = made_files(folder), read_manifest(folder)
    expected = manifest.get("rows")
    if expected is None or "README.md" not in files:
        raise InputError(f"{folder}: not the folder of a published data set; name DIR or DIR/hub of a build")
    found = in_clean_process(describe_dataset, folder, library="datasets")
    if expected != found:
        raise InputError(f"{folder}: `datasets` reads {found} rows, and the manifest says {expected}; build it again")
    if problems := _wrong_rows(folder, list(found)):
        raise InputError(f"{folder}: not to be published: {'; '.join(problems[:10])}; build it again")
    check_no_local_path(files, [folder, *named_paths(manifest["inputs"].get("recipe"))], folder)
    return {"configs": found, "files": files}


def _wrong_rows(folder: Path, configs: list[str]) -> list[str]:
    """Labels outside (0, 1), ids that are not unique or refer to nothing; each with the number of rows."""
    import polars as pl

    tables = {name: pl.scan_parquet([*(folder / name).glob("*.parquet")], glob=False) for name in configs}
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


def in_clean_process(describe: Callable[..., dict[str, Any]], *arguments: Any, library: str) -> dict[str, Any]:
    """`describe(*arguments)`, paths as absolute ones, in another working folder, without this repository, network or
    token. The file of `describe` runs there alone; `library` is what it uses, as the error says.

    Raises:
        InputError: it fails there.
    """
    program = f"""
import json, runpy, sys
sys.modules.update(dict.fromkeys({_OUR_PACKAGES!r}))  # None: importing it is an error
describe = runpy.run_path(sys.argv[1])[sys.argv[2]]
print(json.dumps(describe(*json.load(sys.stdin))))
"""
    command = [sys.executable, "-I", "-c", program, inspect.getsourcefile(describe), describe.__name__]
    given = json.dumps([str(value.resolve()) if isinstance(value, Path) else value for value in arguments])
    environment = {name: value for name, value in os.environ.items() if "TOKEN" not in name} | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(command, input=given, cwd=elsewhere, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"it ended with code {done.returncode}").splitlines()[-1]
        raise InputError(f"{arguments[0]}: plain {library} cannot use it: {reason}")
    return json.loads(done.stdout.splitlines()[-1])
