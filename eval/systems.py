"""The models that eval.retrieval compares: those of a run, in the order of training, or any by reference."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from common.cli import InputError
from common.models import check_model_folder, fetch_settings, resolve_model
from common.steps import files_of, fingerprint, folder_step, read_json, read_parquet
from dataset_builders.embeddings import Dtype, EncoderSection, load_model
from modeling.encoder import read_setting
from modeling.prompts import QUERY_TEMPLATE, baked_prompts, few_shot_prompt, few_shot_prompts
from modeling.recipe import STAGES, read_stages

if TYPE_CHECKING:
    import polars as pl

SHOTS = (1, 2)  # demonstrations shown to the untrained model
DTYPES = get_args(Dtype)  # that a model can be run in, whatever it was saved in


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
    dtype: str | None = None  # of weights and products; None: as its weights were saved


def compressed(system: System, dimensions: Sequence[int], precisions: Sequence[str]) -> list[System]:
    """`system` with vectors cut to each of `dimensions`, and in each precision."""
    plain = dataclasses.replace(system, with_bm25=False)
    sizes, kinds = dict.fromkeys(dimensions), dict.fromkeys(precisions)
    cut = [dataclasses.replace(plain, name=f"{plain.name}, {size} dimensions", dimensions=size) for size in sizes]
    return cut + [dataclasses.replace(plain, name=f"{plain.name}, {kind}", precision=kind) for kind in kinds]


def named_systems(references: Sequence[str], output: Path) -> list[System]:
    """Models by reference; one without pooling of its own gets that of `build_encoder`, saved below `output`."""
    systems = []
    for reference in dict.fromkeys(references):
        model = resolve_model(reference)
        folder = reference
        model = dataclasses.replace(model, revision=fetch_settings(model))
        if read_setting(model, "modules.json") is None:
            folder = str(saved_encoder(reference, output / "models" / fingerprint(reference), {}))
        encoder_section(folder)
        systems.append(System(reference, folder, with_bm25=True))
    return systems


def run_systems(run_folder: Path, data: Path, output: Path) -> list[System]:
    """The models of a run: untrained, after each stage, final; then the final one with each few-shot prompt it has."""
    names, final = stage_names(run_folder), run_folder / "model"
    if not final.is_dir():
        raise InputError(f"{final}: no such folder; finish the training with train_st.py first")
    stages = [System(f"after {name}", str(run_folder / name)) for name in names if (run_folder / name).is_dir()]
    for folder in (*(system.model for system in stages), str(final)):
        encoder_section(folder)  # refuses a broken one before hours of work on the others
    if stages and files_of(final).items() <= files_of(Path(stages[-1].model)).items():
        stages[-1] = System(f"{stages[-1].name} (final)", str(final), with_bm25=True)  # the same weights: one row
    else:
        stages.append(System("final model", str(final), with_bm25=True))
    settings = read_json(final / "config_sentence_transformers.json")
    shown = with_shots(stages[-1], settings.get("prompts", {}))
    return [*(untrained_systems(run_folder, data, output) if names else ()), *stages, *shown]


def stage_names(run_folder: Path) -> list[str]:
    """The stages of a run; none of a folder with model/ alone, put there by hand or before there was stages.json."""
    if (run_folder / "model").is_dir() and not (run_folder / STAGES).is_file():
        return []
    return [stage["name"] for stage in read_stages(run_folder)["stages"]]


def compares_by_dot(reference: str) -> bool:
    """Whether a model's own similarity is the inner product, which depends on the lengths of its vectors."""
    model = resolve_model(reference)
    model = dataclasses.replace(model, revision=fetch_settings(model))
    return (read_setting(model, "config_sentence_transformers.json") or {}).get("similarity_fn_name") == "dot"


def check_dimensions(references: Sequence[str], asked: int) -> None:
    """Raises InputError for a model with fewer than `asked` dimensions."""
    from sentence_transformers import SentenceTransformer

    for reference in references:
        there = load_model(SentenceTransformer, encoder_section(reference)).get_embedding_dimension()
        if there and asked > there:
            raise InputError(f"--truncate_dim {asked}: {reference} has {there}; lower it")


def with_shots(system: System, prompts: Mapping[str, str]) -> list[System]:
    """`system` with each of the few-shot prompts that its model was saved with."""
    return [
        System(f"{system.name}, {shots}-shot", system.model, shots, prompt)
        for shots, prompt in few_shot_prompts(prompts).items()
    ]


def untrained_systems(run_folder: Path, data: Path, output: Path) -> list[System]:
    """The start of the run: a finished embedder as it was published; a bare decoder with the final model's prompt,
    length and pooling. A pretrained decoder also with demonstrations where these fit, and with mean pooling.
    """
    resolved = read_stages(run_folder)
    start, keys = resolved["start"], resolved["stages"][-1]["keys"]
    revision = f"@{start['revision']}" if start["revision"] and "@" not in start["model"] else ""
    if start["published"]:
        return [System("untrained", start["model"] + revision)]
    is_student = start["model"] == "student"
    model = str(run_folder / "student") if is_student else start["model"] + revision
    instruction, template = keys["instruction"], keys["query_template"]
    prompts = baked_prompts(instruction, (), template, keys["document_prompt"])
    mined = data / "mined" / "mined.parquet"
    if instruction is not None and not is_student and mined.is_file():
        import polars as pl

        rows = pl.from_arrow(read_parquet(mined, ["query", "positive"]))
        for shots in SHOTS:
            with contextlib.suppress(InputError):  # no rows that fit
                shown = demonstrations(model, rows, instruction, shots, keys["max_seq_length"] // 2, template)
                prompts[f"query-{shots}-shot"] = few_shot_prompt(instruction, shown, template)
    names = ("dtype", "max_seq_length", "min_text_tokens", "pooling", "num_hidden_layers")
    settings = {"prompts": prompts, **{name: keys[name] for name in names}}
    bare = System("untrained", str(saved_encoder(model, output / "untrained", settings)))
    systems = [bare, *with_shots(bare, prompts)]
    if not is_student:
        mean = saved_encoder(model, output / "untrained-mean", settings | {"pooling": "mean"})
        systems.append(System("untrained, mean pooling", str(mean)))
    return systems


def demonstrations(
    reference: str, rows: pl.DataFrame, instruction: str, shots: int, most: int, template: str = QUERY_TEMPLATE
) -> list[tuple[str, str]]:
    """Seeded (query, positive) rows as demonstrations, in at most `most` of the model's tokens."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from modeling.demonstrations import Demonstrations, counter

    model = resolve_model(reference)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, revision=model.revision)
    found = Demonstrations(Dataset.from_polars(rows), instruction, shots, template=template)
    return found.freeze(shots, counter(tokenizer), most)


def saved_encoder(reference: str, folder: Path, settings: Mapping[str, Any]) -> Path:
    """`build_encoder` of a model reference with `settings` (None: not given), saved as a folder once."""
    model = resolve_model(reference)
    settings = {key: value for key, value in settings.items() if value is not None}
    with folder_step(folder, {"model": model.fingerprint(), **settings}) as step:
        if not step.done:
            from modeling.encoder import build_encoder

            build_encoder(reference, **settings).save(str(step.path), create_model_card=False)
            step.finish()
    return folder


def encoder_section(reference: str, dtype: str | None = None) -> EncoderSection:
    """A model in `dtype`, or that of its weights on disk: in float32 a half-precision one would take twice the memory.

    Raises InputError for a folder that is not a SentenceTransformer's.
    """
    from transformers import AutoConfig

    model = resolve_model(reference)
    if model.is_local and not Path(model.name_or_path, "modules.json").is_file():
        # sentence-transformers would load a bare checkpoint and average over its tokens
        raise InputError(f"{reference}: not a SentenceTransformer folder (modules.json is missing); train one first")
    if model.is_local:
        check_model_folder(Path(model.name_or_path))
    try:
        dtype = dtype or AutoConfig.from_pretrained(model.name_or_path, revision=fetch_settings(model)).dtype
    except (OSError, ValueError):  # not at the top of the folder; loading tells whether there is a model at all
        dtype = None
    return EncoderSection(
        model=reference, dtype=str(dtype or "float32").removeprefix("torch."), vector_dtype="float32"
    )
