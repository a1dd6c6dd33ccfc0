"""What a stranger would meet in a saved model, found out before it is published: plain sentence-transformers loads it,
in a process that cannot import this repository, and it gives the vectors that it gave when it was saved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from common.cli import InputError
from common.steps import MANIFEST, write_json
from dataset_builders.verify import in_clean_process
from modeling.prompts import baked_prompts, few_shot_prompts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

REFERENCE = "reference_vectors.json"
# How far a vector may lie from the one it was when saved, by the dtype of the weights: Euclidean distance of unit
# vectors, so cosine >= 1 - d^2 / 2. Other devices, libraries and batches add up the same numbers in another order.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
_REFERENCE_TEXTS = [
    "how do I parse a date",
    "Return a copy of the list, sorted; the original is left as it was.",
    "naïve café, 東京, 🙂 and\ttabs\nand lines",
]
_RUN_AS_CODE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py")
# What readers of a model folder read; nothing else is published.
_PUBLISHED = (".json", ".safetensors", ".txt", ".model", ".jinja")


def write_reference(encoder: SentenceTransformer, folder: Path) -> None:
    """Write `reference_vectors.json`: a few texts, bare and with the model's own prompts (`query`, and those with
    demonstrations), and the vectors of `encoder` as it is in memory. Written when a model is saved, it tells later
    whether what was saved is that model.
    """
    own = ["query", *(f"query-{shots}-shot" for shots in few_shot_prompts(encoder.prompts))]
    vectors = []
    for name in [None, *(name for name in own if name in encoder.prompts)]:
        found = encoder.encode(_REFERENCE_TEXTS, prompt_name=name, show_progress_bar=False)
        for text, vector in zip(_REFERENCE_TEXTS, found, strict=True):
            vectors.append({"text": text, "prompt_name": name, "vector": [round(float(x), 7) for x in vector]})
    dtype = str(next(encoder.parameters()).dtype).removeprefix("torch.")
    write_json(folder / REFERENCE, {"dtype": dtype, "vectors": vectors})


def verify_model(folder: Path) -> dict[str, Any]:
    """The facts of a merged model that its card tells (see `describe_model`).

    Raises:
        InputError: what a stranger could not load, should not have to trust, or would get wrong vectors from.
    """
    published_files(folder)
    if not (folder / REFERENCE).is_file():
        raise InputError(
            f"{folder}: {REFERENCE} is missing, so nothing tells whether this is the model that was trained; "
            "train_st.py writes it when it saves a model"
        )
    facts = in_clean_process(describe_model, folder, library="sentence-transformers")
    _check_facts(folder, facts)
    return facts


def verify_adapter(folder: Path, model: Path) -> dict[str, Any]:
    """`base`, `revision` and, where the base is in this machine's cache, `distance` of its vectors to those of `model`
    (None where it is not: a base of 14 GB is not fetched for this).

    Raises:
        InputError: an adapter that names no base on the Hub, or is not that of `model`.
    """
    if not (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder}: no adapter (adapter_config.json is missing); train one (use_peft), drop --adapter"
        )
    published_files(folder)
    config = _read_json(folder / "adapter_config.json")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not is_hub_id(base, folder):
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
        if _read_json(folder / name) != _read_json(model / name):
            raise InputError(f"{folder} and {model}: {name} differs; publish the adapter and the model of one run")
    found = in_clean_process(describe_adapter, folder, model, library="peft")
    if found["distance"] is not None and found["distance"] > TOLERANCE[found["dtype"]]:
        raise InputError(
            f"{folder}: on {base}@{revision} its vectors are {found['distance']:.2g} from those of {model}, more than "
            f"{TOLERANCE[found['dtype']]} ({found['dtype']}); publish the adapter and the model of one run"
        )
    return {"base": base, "revision": revision, **found}


def is_hub_id(reference: str, folder: Path) -> bool:
    """Whether `reference` can only mean a repository on the Hub, and no folder here or relative to `folder`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(reference)
    except HFValidationError:
        return False
    return not (reference.startswith(("..", "~")) or Path(reference).exists() or (folder / reference).exists())


def other_files(repo_id: str, commit: str, folder: Path) -> set[str]:
    """Names of the files that `folder` publishes and that a commit on the Hub lacks, or has with another content."""
    from huggingface_hub import HfApi

    found = HfApi().verify_repo_checksums(repo_id, revision=commit, local_dir=folder)
    return {*(mismatch["path"] for mismatch in found.mismatches), *found.extra_paths} & published_files(folder).keys()


def published_files(folder: Path) -> dict[str, Path]:
    """Name in the repository -> file, of what a SentenceTransformer folder (merged or an adapter) publishes: the files
    that its readers read, at the top and in the folders of its modules. No manifest and no README.md.

    Raises:
        InputError: pickled weights or code, modules that are not sentence-transformers' own, paths of this machine.
    """
    if not (folder / "modules.json").is_file():
        raise InputError(f"{folder}: not a SentenceTransformer folder (modules.json is missing); train one first")
    everything = [path for path in folder.rglob("*") if path.is_file()]
    if not any(path.suffix == ".safetensors" for path in everything):
        raise InputError(f"{folder}: no .safetensors weights; save the model with safetensors")
    for path in everything:
        if path.suffix in _RUN_AS_CODE:
            raise InputError(f"{path}: the Hub's readers run this as code; publish safetensors and no code")
    files = [path for path in folder.iterdir() if path.suffix in _PUBLISHED and path.name != MANIFEST]
    for path in _module_folders(folder):
        files += [file for file in path.rglob("*") if file.suffix in _PUBLISHED]
    files = {path.relative_to(folder).as_posix(): path for path in files if path.is_file()}
    for name, path in files.items():
        if "config" in path.name or path.name == "modules.json":
            _check_no_local_path(path, _read_json(path))
        if any(part.startswith(".") for part in PurePosixPath(name).parts):
            raise InputError(f"{path}: a hidden file; remove it, or publish a folder that train_st.py wrote")
    return dict(sorted(files.items()))


def _module_folders(folder: Path) -> list[Path]:
    modules = _read_json(folder / "modules.json")
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise InputError(f"{folder / 'modules.json'}: not a list of modules; save the model again")
    for module in modules:
        if not str(module.get("type")).startswith("sentence_transformers."):
            raise InputError(f"{folder}: module {module.get('type')} is not one of sentence-transformers' own")
    paths = [PurePosixPath(str(module.get("path") or "")) for module in modules]
    for path in paths:
        if path.is_absolute() or ".." in path.parts:
            raise InputError(f"{folder / 'modules.json'}: module path {str(path)!r} leaves the folder")
    return [folder / path for path in paths if path.parts]


def _check_no_local_path(path: Path, value: Any) -> None:
    """Refuse a string anywhere in a configuration that is a path of this machine."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_no_local_path(path, inner)
    elif isinstance(value, str) and value.startswith(("/", "~")) and os.path.exists(os.path.expanduser(value)):
        raise InputError(f"{path}: holds a path of this machine, {value!r}; write a Hub id there, or remove it")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a SentenceTransformer folder has one") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); save the model again") from None


def describe_model(path: str) -> dict:
    """Load the model, look at what it does and return the facts. Runs alone, so it imports all it needs."""
    import json

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
    with open(f"{path}/reference_vectors.json", encoding="utf-8") as stream:
        reference = json.load(stream)
    distances = [
        np.linalg.norm(model.encode(entry["text"], prompt_name=entry["prompt_name"]) - np.array(entry["vector"]))
        for entry in reference["vectors"]
    ]
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
        "reference_dtype": reference["dtype"],
        "reference_distance": float(max(distances)),
    }


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


def _check_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raises InputError for what would silently give wrong vectors or scores."""
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
    dtype, distance = facts["reference_dtype"], facts["reference_distance"]
    if dtype not in TOLERANCE:
        raise InputError(f"{folder}: its weights were {dtype}; publish a model in {', '.join(TOLERANCE)}")
    if not distance <= TOLERANCE[dtype]:  # a vector of NaN is at no distance
        raise InputError(
            f"{folder}: vectors are {distance:.2g} from those of the model that was saved ({REFERENCE}), more than "
            f"{TOLERANCE[dtype]} ({dtype}); the files are not that model, save it again"
        )
