"""Train an embedder by a recipe: stages in order, each from the weights of the one before.

    python train_st.py --config recipes/demo/train.yaml [--stages sts,retrieval] [--max_steps N]
                       [--resume_from_checkpoint true] [--KEY VALUE ...]
    python train_st.py --list_keys
    accelerate launch --num_processes 8 train_st.py --config ...        # the same on many devices

docs/keys.md has all keys. Each is a flag, too: --learning_rate 1e-4 holds for all stages,
--retrieval.learning_rate 1e-4 for one, --student.hidden_size 256 for the recipe's `student:`. `--stages` selects
stages and orders them. `--max_steps` holds for each stage; `--total_steps` is shared out among those that run, so that
any selection of stages costs the same.

Result in output_dir: recipe.yaml (what was run), stages.json (all keys of every stage as they hold), STAGE/ for each
stage (a plain SentenceTransformer folder), model/ (the last one, or what `merge:` makes of them), adapter/ (peft
format, when the last stage trained LoRA and nothing is merged), logs/STAGE.json (the trainer's log history),
logs/ (what the libraries of `report_to` write: tensorboard in logs/STAGE/, wandb, trackio) and ledger.json (what it
cost, the data included).

An adapter names the Hub id and revision it was trained from when all LoRA stages up to the last have equal settings:
they then train one adapter. On top of a stage that trained all weights, or other LoRA settings, there is no Hub model
it could belong to: it names that stage's folder, relative to its own (../sts), and model/ is what can be published.

Finished stages are skipped. A killed stage, or one that ran out of memory or disk or into a non-finite loss,
starts again, or, with --resume_from_checkpoint true, goes on from its last checkpoint to the same result.
"""

# For `uv run train_st.py`, in a clone or anywhere (docs/rented-gpus.md); setup.cfg's, as a test checks.
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.8",
#     "transformers>=5.20,<5.24",
#     "sentence-transformers>=6.2,<7",
#     "peft>=0.21",
#     "datasets>=5.0",
#     "huggingface_hub>=2.4",
#     "accelerate>=1.15",
#     "trl>=1.16",
#     "mteb>=2.26",
#     "bm25s>=0.3",
#     "PyStemmer>=3.0",
#     "rank_bm25>=0.2.2",
#     "scikit-learn>=1.7",
#     "numpy>=2.0",
#     "pyarrow>=26",
#     "pydantic>=2.12",
#     "PyYAML>=6.0.2",
#     "Jinja2>=3.1.6",
#     "tqdm>=4.67",
#     "safetensors>=0.6",
#     "filelock>=3.16",
#     "ir-measures>=0.4.3",
#     "matplotlib>=3.10",
# ]
# ///

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import InputError, Unfinished, run
from common.models import resolve_model
from common.steps import MANIFEST, Step, fingerprint, link_files
from modeling.keys import NO_INPUTS, recipe_keys
from modeling.ledger import closing_line, write_ledger, write_log
from modeling.processes import joint_step, keep_freed_memory, launched_with, make_once, processes, refuse_shards
from modeling.recipe import Recipe, Stage, read_recipe, write_recipe, write_stages

if TYPE_CHECKING:
    from modeling.stages import StageData
    from modeling.start import Start
    from modeling.trainer import EmbedderTrainer

ADAPTER = "adapter"


def main(argv: Sequence[str]) -> None:
    if "--list_keys" in argv:
        print("\n".join(recipe_keys()))
        return
    recipe = read_recipe(argv, description=__doc__)
    from modeling.stages import load_data
    from modeling.trainer import forget_deepspeed

    refuse_shards(recipe.stages)
    if launched_with("DEEPSPEED"):
        forget_deepspeed()
    with processes().main_process_first():  # who comes later finds the rows in the cache of `datasets`
        data = {stage.name: load_data(stage) for stage in recipe.stages}
    start, stages = check_start(recipe, data)
    results = {}
    for stage in stages:
        start = results[stage.name] = train_stage(stage, start, data[stage.name], recipe.output_dir)
        if processes().is_main_process:
            write_ledger(stages, recipe.output_dir)
    publish(recipe, results)


def check_start(recipe: Recipe, data: Mapping[str, StageData]) -> tuple[Start, list[Stage]]:
    """The model that the first stage starts from, and the stages with what they leave to it, once everything that they
    ask of it is known to be there.
    """
    from modeling.stages import check_layers, count_batches, with_prompts
    from modeling.start import first_start, load_tokenizer, settle, start_line, untrained_prompt

    start = first_start(recipe)
    stages = [settle(stage, start.published) for stage in recipe.stages]
    tokenizer = load_tokenizer(start, stages[0].own.pooling)
    stages = [with_prompts(stage, data[stage.name].train, tokenizer) for stage in stages]
    for stage in stages:
        count_batches(stage, data[stage.name].train)  # refuses too few now
    check_layers(stages, start)
    if processes().is_main_process:
        write_recipe(recipe)
        keys, before = {}, start.key
        for stage in stages:
            before = keys[stage.name] = fingerprint(stage_inputs(stage, data[stage.name], before))
        write_stages(stages, start.facts(), recipe.output_dir, model_inputs(recipe, keys))
        print(start_line(start, stages[0], tokenizer), flush=True)
        if line := untrained_prompt(stages[-1]):
            print(line, file=sys.stderr, flush=True)
    return start, stages


def train_stage(stage: Stage, start: Start, data: StageData, output_dir: Path) -> Start:
    """Train one stage, unless it is done already, and return its result as the start of the next one."""
    from modeling.start import Start, TrainedAdapter

    folder = output_dir / stage.name
    with joint_step(folder, stage_inputs(stage, data, start.key)) as step:
        if step.done and processes().is_main_process:
            print(f"stage {stage.name}: done before, kept in {folder}", flush=True)
        elif not step.done:
            run_stage(stage, start, data, step, output_dir / "logs")
    adapter = None
    if stage.peft_config:
        before = start.adapter_for(stage)
        adapter = TrainedAdapter(folder / ADAPTER, stage.lora_settings, before.base if before else start)
    return Start(str(folder), None, step.key, stage.name, adapter)


def stage_inputs(stage: Stage, data: StageData, start: str) -> dict[str, Any]:
    """What decides a stage's result; `start` is the key of the model that it starts from."""
    return {"keys": input_keys(stage.values), "data": data.keys, "start": start}


def input_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a stage, and of its data sets, that decide what it comes to."""
    keys = {key: value for key, value in values.items() if key not in NO_INPUTS}
    return keys | ({"datasets": [input_keys(entry) for entry in keys["datasets"]]} if keys.get("datasets") else {})


def run_stage(stage: Stage, start: Start, data: StageData, step: Step, logs: Path) -> None:
    """Load, train, save. Raises Unfinished when it cannot go on; what it has is resumed from then."""
    from modeling.adapters import continue_adapter, quantization
    from modeling.encoder import save_adapter, save_merged
    from modeling.reference import write_reference
    from modeling.shared_prefix import share_prefix
    from modeling.stages import build_model, build_trainer, cut_texts, header, load_encoder
    from modeling.trainer import drop_checkpoints, last_checkpoint, logs_in

    checkpoints = step.path / "checkpoints"
    if processes().is_main_process:
        if (stage.training.resume_from_checkpoint or "false").lower() == "false":
            drop_checkpoints(checkpoints)
        if last_checkpoint(checkpoints) is None:
            shutil.rmtree(logs / stage.name, ignore_errors=True)  # of a run that this one does not go on with
    processes().wait_for_everyone()
    encoder, base = build_model(stage, start)
    if encoder.device.type == "cpu":
        keep_freed_memory()
    with logs_in(logs, stage.name):
        trainer = build_trainer(stage, encoder, data, checkpoints)
        cut = cut_texts(stage, data, encoder.tokenizer)
        if processes().is_main_process:
            print(header(stage, data, trainer, cut), flush=True)
        encoder.max_seq_length = stage.own.train_max_seq_length
        sharing = share_prefix(encoder) if stage.own.share_prefix else contextlib.nullcontext()
        with sharing as counts, stopping(stage, trainer, checkpoints):
            trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    encoder.max_seq_length = stage.own.max_seq_length
    # with bf16, accelerate left it a forward pass in bfloat16, which what is saved does not have
    trainer.accelerator.unwrap_model(encoder, keep_fp32_wrapper=False)
    cost = trainer.cost(counts)
    weights = trainer.whole_weights()
    if not processes().is_main_process:
        return
    if weights is not None:  # those of `encoder` are shards
        encoder, base = build_model(stage, start)
        encoder.load_state_dict({**encoder.state_dict(), **weights})
    if stage.peft_config:
        save_adapter(encoder, step.path / ADAPTER, base.name_from(step.path / ADAPTER), base.revision)
    if quantization(stage.model):  # 4 bits were for training: the adapter belongs into the weights as they were
        encoder = load_encoder(stage, base)
        continue_adapter(encoder, step.path / ADAPTER)
    save_merged(encoder, step.path)
    write_reference(encoder, step.path)
    write_log(trainer.state.log_history, logs / f"{stage.name}.json")
    drop_checkpoints(checkpoints, logs / stage.name)
    step.finish(**cost, cut_texts=cut)
    print(closing_line(stage.name, cost, trainer, step.folder), flush=True)


@contextlib.contextmanager
def stopping(stage: Stage, trainer: EmbedderTrainer, checkpoints: Path) -> Iterator[None]:
    """What ends training as one line: what happened and what to lower. Raises Unfinished where there is a checkpoint
    to go on from, else InputError, which leaves nothing behind.
    """
    from accelerate.utils.memory import should_reduce_batch_size

    from modeling.trainer import last_checkpoint

    try:
        yield
    except Exception as error:
        if isinstance(error, InputError):  # a non-finite loss, too few rows for a batch
            reason = str(error)
        elif should_reduce_batch_size(error):
            reason = f"out of memory; lower {sizes(stage)}"
        elif isinstance(error, ValueError | TypeError) and not trainer.state.global_step:
            reason = f"training cannot start so: {error}"  # settings that torch or transformers refuse once used
        else:
            raise
        checkpoint = last_checkpoint(checkpoints)
        if checkpoint is None:
            raise InputError(f"stage {stage.name!r}: {reason}") from error
        advice = f"--resume_from_checkpoint true goes on from {checkpoint}"
        raise Unfinished(f"stage {stage.name!r}: {reason}; {advice}") from error


def sizes(stage: Stage) -> str:
    """What a stage's memory depends on, with its values, first what changes no result."""
    rows = f"per_device_train_batch_size ({stage.training.per_device_train_batch_size})"
    cached = dict.fromkeys(own.mini_batch_size for own in stage.datasets.values())
    now = ", ".join("null, which is all" if size is None else str(size) for size in cached)
    return f"activation_memory ({stage.own.activation_memory}) or mini_batch_size ({now}): same results; or {rows}"


def publish(recipe: Recipe, results: Mapping[str, Start]) -> None:
    """model/: the last stage's result, or an average; adapter/: where the last stage trained LoRA and nothing is
    averaged.
    """
    from modeling.encoder import name_base
    from modeling.merging import merge_models

    merge, last, output_dir = recipe.merge, [*results.values()][-1], recipe.output_dir
    inputs = model_inputs(recipe, {name: result.key for name, result in results.items()})
    if merge:
        folders = [Path(results[name].name_or_path if name in results else name) for name in merge.stages]
        weights = merge.weights or [1.0] * len(folders)
        make_once(output_dir / "model", inputs, lambda path: merge_models(folders, weights, merge.method, path))
    else:
        without = (ADAPTER, MANIFEST)
        source = Path(last.name_or_path)
        make_once(output_dir / "model", inputs, lambda path: link_files(source, path, without))

    def write_adapter(path: Path) -> None:
        link_files(last.adapter.folder, path)
        base = last.adapter.base
        name_base(path, base.name_from(path), base.revision)

    if last.adapter and not merge:
        make_once(output_dir / ADAPTER, inputs, write_adapter)
    elif processes().is_main_process:  # that of an earlier run into this folder belonged to another model/
        shutil.rmtree(output_dir / ADAPTER, ignore_errors=True)


def model_inputs(recipe: Recipe, keys: Mapping[str, str]) -> dict[str, Any]:
    """What decides model/; `keys` of the stages' results, in order."""
    merge = recipe.merge
    if not merge:
        return {"stage": [*keys.values()][-1]}
    merged = [keys.get(name) or resolve_model(name).fingerprint() for name in merge.stages]
    return {"stages": merged, "method": merge.method, "weights": merge.weights}


if __name__ == "__main__":
    run(main)
