"""The models that eval.retrieval compares: those of a run, in the order of training, or any by reference."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import InputError
from common.models import check_model_folder, fetch_settings, resolve_model
from common.recipes import read_yaml
from common.steps import files_of, folder_step
from dataset_builders.embeddings import EncoderSection
from modeling.prompts import baked_prompts, few_shot_prompt, few_shot_prompts

SHOTS = (1, 2)  # demonstrations shown to the untrained model


@dataclass(frozen=True)
class System:
    """A model to evaluate: the name of its row, and the reference of a SentenceTransformer."""

    name: str
    model: str
    shots: int = 0  # demonstrations in the query prompt
    query_prompt: str | None = None  # None: the model's own
    dimensions: int | None = None  # of its vectors, the first are kept; None: all
    precision: str = "float32"  # of the documents' vectors: sentence-transformers' int8 or binary
    with_bm25: bool = False  # one more row: fused with BM25


def compressed(system: System, dimensions: Sequence[int], precisions: Sequence[str]) -> list[System]:
    """`system` with vectors cut to each of `dimensions`, and in each precision."""
    plain = dataclasses.replace(system, with_bm25=False)
    cut = [dataclasses.replace(plain, name=f"{plain.name}, {size} dimensions", dimensions=size) for size in dimensions]
    return cut + [dataclasses.replace(plain, name=f"{plain.name}, {kind}", precision=kind) for kind in precisions]


def named_systems(references: Sequence[str], output: Path) -> list[System]:
    """Models by reference; one without pooling of its own gets that of `build_encoder`, saved below `output`."""
    systems = []
    for reference in dict.fromkeys(references):
        model = resolve_model(reference)
        folder = reference
        if model.is_local and not is_finished(model.name_or_path):
            folder = str(saved_encoder(reference, output / "models" / model.fingerprint(), {}))
        encoder_section(folder)
        systems.append(System(reference, folder, with_bm25=True))
    return systems


def run_systems(run_folder: Path, data: Path, output: Path) -> list[System]:
    """The models of a run: untrained, after each stage, final; then the final one with each few-shot prompt it has."""
    recipe = run_recipe(run_folder)
    final = run_folder / "model"
    if not final.is_dir():
        raise InputError(f"{final}: no such folder; finish the training with train_st.py first")
    stages = [System(f"after {stage['name']}", str(run_folder / stage["name"])) for stage in recipe["stages"]]
    stages = [system for system in stages if Path(system.model).is_dir()]
    for folder in (*(system.model for system in stages), str(final)):
        encoder_section(folder)  # refuses a broken one before hours of work on the others
    if stages and files_of(final).items() <= files_of(Path(stages[-1].model)).items():
        stages[-1] = System(f"{stages[-1].name} (final)", str(final), with_bm25=True)  # the same weights: one row
    else:
        stages.append(System("final model", str(final), with_bm25=True))
    settings = json.loads((final / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    few_shot = [
        System(f"{stages[-1].name}, {shots}-shot", str(final), shots, prompt)
        for shots, prompt in few_shot_prompts(settings.get("prompts", {})).items()
    ]
    return [*untrained_systems(run_folder, recipe, data, output), *stages, *few_shot]


def run_recipe(run_folder: Path) -> dict[str, Any]:
    """What was run. Raises InputError where that is no recipe of train_st.py."""
    path = run_folder / "recipe.yaml"
    if not path.is_file():
        raise InputError(f"{run_folder}: not a training run (recipe.yaml is missing); make one with train_st.py")
    recipe = read_yaml(path)
    stages = recipe.get("stages")
    if not isinstance(stages, list) or not stages:
        raise InputError(f"{path}: no list of stages; name the folder of a run that train_st.py made")
    return recipe


def untrained_systems(run_folder: Path, recipe: Mapping[str, Any], data: Path, output: Path) -> list[System]:
    """The start of the run: a finished embedder as it was published; a bare decoder with the final model's prompt,
    length and pooling. A pretrained decoder also with demonstrations where these fit, and with mean pooling.
    """
    keys = {**recipe, **recipe["stages"][-1]}
    start = str(run_folder / "student") if "student" in keys else keys["model_name_or_path"]
    if is_finished(resolve_model(start).name_or_path):
        return [System("untrained", start)]
    prompts = baked_prompts(keys.get("instruction"))
    if keys.get("instruction") and "student" not in keys:
        for shots in SHOTS:
            with contextlib.suppress(InputError):  # no rows that fit
                shown = demonstrations(start, keys.get("max_seq_length", 512), data, keys["instruction"], shots)
                prompts[f"query-{shots}-shot"] = few_shot_prompt(keys["instruction"], shown)
    names = ("dtype", "max_seq_length", "min_text_tokens", "pooling", "num_hidden_layers")
    settings = {"revision": keys.get("model_revision"), "prompts": prompts}
    settings |= {name: keys[name] for name in names if name in keys}
    folder = str(saved_encoder(start, output / "untrained", settings))
    systems = [System("untrained", folder)]
    systems += [
        System(f"untrained, {shots}-shot", folder, shots, prompt)
        for shots, prompt in few_shot_prompts(prompts).items()
    ]
    if "student" not in keys:
        mean = saved_encoder(start, output / "untrained-mean", settings | {"pooling": "mean"})
        systems.append(System("untrained, mean pooling", str(mean)))
    return systems


def demonstrations(start: str, length: int, data: Path, instruction: str, shots: int) -> list[tuple[str, str]]:
    """Seeded mined rows of the build as demonstrations, in at most half of a `length` in tokens."""
    import polars as pl
    from datasets import Dataset
    from transformers import AutoTokenizer

    from modeling.demonstrations import Demonstrations

    model = resolve_model(start)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, revision=model.revision)
    rows = Dataset.from_polars(pl.read_parquet(data / "mined" / "mined.parquet", columns=["query", "positive"]))
    return Demonstrations(rows, instruction, shots).freeze(
        shots, lambda texts: [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]], length // 2
    )


def saved_encoder(reference: str, folder: Path, settings: Mapping[str, Any]) -> Path:
    """`build_encoder` of a model reference with `settings` (None: not given), saved as a folder once."""
    model = resolve_model(reference)
    settings = {key: value for key, value in settings.items() if value is not None}
    if model.revision:
        settings["revision"] = model.revision
    with folder_step(folder, {"model": model.fingerprint(), **settings}) as step:
        if not step.done:
            from modeling.encoder import build_encoder

            build_encoder(model.name_or_path, **settings).save(str(step.path), create_model_card=False)
            step.finish()
    return folder


def is_finished(name_or_path: str) -> bool:
    """Whether a model is a SentenceTransformer with modules of its own."""
    return Path(name_or_path, "modules.json").is_file()


def encoder_section(reference: str) -> EncoderSection:
    """A model in the dtype of its weights on disk: in float32 a half-precision one would take twice the memory.

    Raises InputError for a folder that is not a SentenceTransformer's.
    """
    from transformers import AutoConfig

    model = resolve_model(reference)
    if model.is_local and not is_finished(model.name_or_path):
        # sentence-transformers would load a bare checkpoint and average over its tokens
        raise InputError(f"{reference}: not a SentenceTransformer folder (modules.json is missing); train one first")
    if model.is_local:
        check_model_folder(Path(model.name_or_path))
    try:
        dtype = AutoConfig.from_pretrained(model.name_or_path, revision=fetch_settings(model)).dtype
    except (OSError, ValueError):  # not at the top of the folder; loading tells whether there is a model at all
        dtype = None
    return EncoderSection(
        model=reference, dtype=str(dtype or "float32").removeprefix("torch."), vector_dtype="float32"
    )
