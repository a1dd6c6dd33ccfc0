"""What our trainer adds to sentence-transformers': weighted data sets in an order that a resumed run replays, known
positives, the cost of training, readable log lines, a stop at the first non-finite loss, adapters resumed alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from common.cli import InputError
from common.models import without_bars
from common.steps import peak_memory_bytes
from modeling.batches import EpochBatchSampler, WeightedBatchSampler
from modeling.demonstrations import DemonstrationCollator, Demonstrations

if TYPE_CHECKING:
    from modeling.shared_prefix import TokenCounts

_NDCG = "_cosine_ndcg@10"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."  # transformers saves adapters under the names that peft's own wrapper gives


class EmbedderTrainer(SentenceTransformerTrainer):
    """Trains on data sets by name, with losses, `weights` (shares of steps), `demonstrations` and known `positives` by
    name; it ends after `patience` evaluations without a better `metric_for_best_model`.

    `seconds` and `tokens` so far go with every entry of the log; both go on after a resume. Raises InputError in
    training when the loss or the gradient is not finite.
    """

    def __init__(
        self,
        *args: Any,
        weights: Mapping[str, float] | None = None,
        demonstrations: Mapping[str, Demonstrations] | None = None,
        positives: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
        patience: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.losses: dict[str, list[float]] = defaultdict(list)  # by data set, since the last line of the log
        self.weights = weights or {}
        self.demonstrations = demonstrations or {}
        self.positives = positives or {}
        self.started, self.seconds_before = time.monotonic(), 0.0  # before: of a run that this one goes on with
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            # where accelerate looks for the last layer's norm: it would take `Normalize` for it, and fail
            self.model.base_model_prefix = "transformers_model"
        for callback in (PrinterCallback, ProgressCallback):  # both print whole dictionaries
            self.remove_callback(callback)
        if not self.args.disable_tqdm:
            self.add_callback(_ProgressBar)
        self.add_callback(_LogLines)
        if patience:
            self.add_callback(_EarlyStopping(patience))

    def get_data_collator(
        self, model: SentenceTransformer, args: SentenceTransformerTrainingArguments, processing_class: Any = None
    ) -> DemonstrationCollator:
        return DemonstrationCollator(
            model.preprocess,
            prompts=args.prompts,
            model=model,
            demonstrations=self.demonstrations,
            positives=self.positives,
        )

    def get_batch_sampler(
        self, dataset: Dataset, batch_size: int, drop_last: bool, seed: int = 0, **kwargs: Any
    ) -> EpochBatchSampler:
        return EpochBatchSampler(dataset, batch_size, drop_last, seed, world_size=self.args.world_size)

    def get_multi_dataset_batch_sampler(
        self, dataset: ConcatDataset, batch_samplers: list[EpochBatchSampler], seed: int = 0, **kwargs: Any
    ) -> WeightedBatchSampler:
        weights = {name: self.weights.get(name, 1.0) for name in self.train_dataset}
        return WeightedBatchSampler(dataset, batch_samplers, weights, seed)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        shard = loader.batch_sampler
        if not hasattr(shard, "set_epoch"):
            # accelerate's BatchSamplerShard hides our sampler's set_epoch: on several devices, a trainer that resumes
            # within an epoch would replay the order of the first one
            shard.set_epoch = shard.batch_sampler.set_epoch
        return loader

    def train(self, resume_from_checkpoint: str | None = None) -> Any:
        if resume_from_checkpoint:
            state = json.loads(Path(resume_from_checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            self.seconds_before = max((entry.get("seconds", 0.0) for entry in state["log_history"]), default=0.0)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.started = time.monotonic()
        return super().train(resume_from_checkpoint=resume_from_checkpoint)

    def _prepare_input(self, data: Any) -> Any:
        """Keep the dtype of labels: transformers would round them to DeepSpeed's bfloat16."""
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = sum(_count_tokens(inputs, key) for key in inputs if key.endswith("input_ids"))
        # a field of the trainer's state, so that checkpoints carry it
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(tokens, "sum"))
        name = inputs.get("dataset_name")
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self._check_finite(float(loss.detach()), f"loss on data set {name!r}" if name else "loss")
        self.losses[name].append(float(self.accelerator.reduce(loss.detach(), "mean")))
        if self.is_deepspeed_enabled and loss.requires_grad and loss.is_leaf:
            # GradCache runs the backward passes of all mini-batches in a hook of its loss. DeepSpeed takes all passes
            # within its own for a single one, but sums the gradients of those outside it
            loss.backward()
            loss = loss.detach().requires_grad_()
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:  # the scaler of fp16 skips steps of infinite gradients
            self._check_finite(float(norm), "norm of the gradient")
        return norm

    def _check_finite(self, value: float, what: str) -> None:
        """Stop before non-finite weights reach a checkpoint."""
        if math.isfinite(value):
            return
        checkpoint = last_checkpoint(Path(self.args.output_dir))
        raise InputError(
            f"step {self.state.global_step + 1}: the {what} is {value}; lower learning_rate or raise warmup_steps; "
            + (f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet")
        )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save what is better than all before, whatever save_steps: transformers would load an older checkpoint."""
        is_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= is_best and self.args.load_best_model_at_end
        return is_best

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if len(self.train_dataset) > 1:
                logs |= {f"loss_{name}": round(mean(losses), 4) for name, losses in sorted(self.losses.items())}
            self.losses.clear()
        cost = {"seconds": round(self.seconds, 2), "tokens": self.state.num_input_tokens_seen}
        super().log({**logs, **cost}, start_time)

    @property
    def seconds(self) -> float:
        """Seconds of training and of the evaluations in it, those before a resume (up to its last log) included."""
        return self.seconds_before + time.monotonic() - self.started

    def cost(self, counts: TokenCounts | None) -> dict[str, Any]:
        """Cost of training so far, seconds before a resume included. Memory is the high-water mark of the process, and
        of its accelerator; `counts` is what share_prefix made of the tokens of this process since it started.
        """
        on_gpu, seconds = torch.cuda.is_available(), round(self.seconds, 2)
        return {
            "steps": self.state.global_step,
            "tokens": self.state.num_input_tokens_seen,
            "training_seconds": seconds,
            "evaluation_seconds": round(sum(entry.get("eval_runtime", 0.0) for entry in self.state.log_history), 2),
            "seconds_before_resume": round(self.seconds_before, 2),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "device_seconds": round(seconds * self.args.world_size, 2),
            "peak_memory_bytes": peak_memory_bytes(),
            "peak_device_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
            "share_prefix": counts and dataclasses.asdict(counts),
        }

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Skip the library's model card: it reads samples of the data and names local paths; ours is model_card.md."""

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """Weights that FSDP (all of them) or ZeRO-3 (the trained ones) shards, gathered on rank 0; None without them.

        A collective call of all processes, after training.
        """
        if self.is_fsdp_enabled:
            return self.accelerator.get_state_dict(self.model_wrapped)
        if not self.is_deepspeed_enabled:
            return None
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                weight = safe_get_full_fp32_param(parameter)  # the optimiser's: those of the model may be bfloat16
                if self.is_world_process_zero():
                    weights[name] = weight.cpu()
        forget_deepspeed()
        return weights

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_deepspeed_enabled:  # its part of a checkpoint holds the weights, as shards
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with without_bars():
            self.model.save_pretrained(output_dir, create_model_card=False)

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        """Load shards as transformers does, and of an adapter its own weights alone.

        sentence-transformers would load shards as whole weights, and the frozen weights again, from the main revision.
        """
        if self.is_fsdp_enabled:
            return Trainer._load_from_checkpoint(self, checkpoint_path, model)
        weights = Path(checkpoint_path, _ADAPTER_WEIGHTS)
        if not weights.is_file():
            return super()._load_from_checkpoint(checkpoint_path)
        from peft import set_peft_model_state_dict

        state = {name.removeprefix(_PEFT_PREFIX): value for name, value in load_file(weights).items()}
        set_peft_model_state_dict(self.model.transformers_model, state)


def forget_deepspeed() -> None:
    """Forget DeepSpeed's settings while no trainer uses them.

    transformers would shard any model that is loaded, and wait for all processes where one alone loads it; accelerate
    would keep the settings of the first stage.
    """
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()


def _count_tokens(inputs: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    """Tokens of one column; flattened columns come without padding and without a mask."""
    mask = inputs.get(key.removesuffix("input_ids") + "attention_mask")
    return torch.tensor(inputs[key].numel(), device=inputs[key].device) if mask is None else mask.sum()


class _ProgressBar(ProgressCallback):
    """The bar alone, by the stage's name: `_LogLines` writes the lines."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:  # of the main process alone
            self.training_bar.set_description(f"train {args.run_name}")

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class _LogLines(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        line = log_line(state.global_step, state.max_steps, logs)
        if line and state.is_world_process_zero:
            tqdm.write(line)  # above the bar, where there is one


class _EarlyStopping(TrainerCallback):
    """transformers' own counts from 0 after a resume; this one counts in the log, which checkpoints carry."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metric = "eval_" + args.metric_for_best_model.removeprefix("eval_")
        scores = [entry[metric] for entry in state.log_history if metric in entry]
        if scores and len(scores) - 1 - scores.index(max(scores)) >= self.patience:
            control.should_training_stop = True

    on_step_end = on_evaluate  # a run that was killed after it had stopped


def log_line(step: int, steps: int, logs: Mapping[str, Any]) -> str:
    """An entry of the log as a line; "" without loss or nDCG.

    >>> log_line(40, 120, {"loss": 0.51234, "learning_rate": 2e-5, "seconds": 61.26, "tokens": 81920})
    'step 40/120: loss 0.5123, learning rate 2e-05, 61 s, 81,920 tokens'
    >>> scores = {"eval_validation_cosine_ndcg@10": 0.5, "eval_NanoNQ_cosine_ndcg@10": 0.25}
    >>> log_line(40, 120, {**scores, "seconds": 61.26, "tokens": 81920})
    'step 40/120: nDCG@10 0.5000, nDCG@10 0.2500 (NanoNQ), 61 s, 81,920 tokens'
    """
    by_name = [f"{key.removeprefix('loss_')} {value:.4f}" for key, value in logs.items() if key.startswith("loss_")]
    parts = [f"loss {logs['loss']:.4f}" + (f" ({', '.join(by_name)})" if by_name else "")] if "loss" in logs else []
    parts += [f"learning rate {logs['learning_rate']:.3g}"] if "learning_rate" in logs else []
    for key, value in logs.items():
        if key.endswith(_NDCG):
            title = key.removeprefix("eval_").removesuffix(_NDCG).removeprefix("validation").lstrip("_")
            parts.append(f"nDCG@10 {value:.4f}" + (f" ({title})" if title else ""))
    if not parts:
        return ""
    return f"step {step}/{steps}: {', '.join(parts)}, {logs['seconds']:.0f} s, {logs['tokens']:,} tokens"


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint under `folder`. The trainer's state is written last, so it marks a whole one."""
    steps = {}
    for state in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}"):
        try:
            steps[json.loads(state.read_text(encoding="utf-8"))["global_step"]] = str(state.parent)
        except ValueError:
            continue  # cut off by a kill
    return steps[max(steps)] if steps else None


def drop_checkpoints(folder: Path, logs: Path | None = None) -> None:
    """Delete `folder`, first the files that mark checkpoints as whole: a kill leaves no broken one marked.

    What others wrote beside the checkpoints (codecarbon's emissions.csv, say) is moved to `logs`.
    """
    for state in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}"):
        state.unlink()
    for path in folder.iterdir() if logs and folder.is_dir() else ():
        if not path.name.startswith(PREFIX_CHECKPOINT_DIR):
            logs.mkdir(parents=True, exist_ok=True)
            shutil.move(path, logs / path.name)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def logs_in(folder: Path, stage: str) -> Iterator[None]:
    """Let tensorboard (in a folder for each stage), wandb and trackio write into `folder`, where the environment names
    no other. Without this they write beside the checkpoints, or into the current folder.
    """
    folder.mkdir(parents=True, exist_ok=True)  # wandb passes over a folder that is not there
    # wandb and trackio read theirs once, whatever stage it is
    places = {"TENSORBOARD_LOGGING_DIR": folder / stage, "WANDB_DIR": folder, "TRACKIO_DIR": folder}
    ours = {name: str(place) for name, place in places.items() if name not in os.environ}
    os.environ |= ours
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
        if "wandb" in sys.modules:  # transformers would log the next stage into this one's run
            sys.modules["wandb"].finish()
        with contextlib.suppress(OSError):  # unless anything was written
            folder.rmdir()
