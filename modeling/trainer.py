"""What our trainer does besides sentence-transformers': it counts what training costs, and resumes adapters alone."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformerTrainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."  # transformers saves adapters under the names that peft's own wrapper gives


class EmbedderTrainer(SentenceTransformerTrainer):
    """Logs `seconds` and `tokens` so far with every entry; both go on after a resume."""

    _seconds_before = 0.0
    _started: float | None = None

    def train(self, resume_from_checkpoint: str | None = None) -> Any:
        if resume_from_checkpoint:
            state = json.loads(Path(resume_from_checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            self._seconds_before = max((entry.get("seconds", 0.0) for entry in state["log_history"]), default=0.0)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._started = time.monotonic()
        return super().train(resume_from_checkpoint=resume_from_checkpoint)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        masks = (value for key, value in inputs.items() if key.endswith("attention_mask"))
        # a field of the trainer's state, so that checkpoints carry it
        self.state.num_input_tokens_seen += int(sum(mask.sum() for mask in masks))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        cost = {"seconds": round(self.seconds, 2), "tokens": self.state.num_input_tokens_seen}
        super().log({**logs, **cost}, start_time)

    @property
    def seconds(self) -> float:
        """Seconds of training and of the evaluations in it, those before a resume (up to its last log) included."""
        return self._seconds_before + (0.0 if self._started is None else time.monotonic() - self._started)

    def cost(self) -> dict[str, Any]:
        """What training took so far. Memory is the high-water mark of the process, and of its accelerator."""
        on_gpu = torch.cuda.is_available()
        high_water = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "steps": self.state.global_step,
            "tokens": self.state.num_input_tokens_seen,
            "training_seconds": round(self.seconds, 2),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "device_seconds": round(self.seconds * self.args.world_size, 2),
            # Linux counts in KiB, macOS in bytes
            "peak_memory_bytes": high_water * (1 if sys.platform == "darwin" else 1024),
            "peak_device_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        }

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """No card: ours is model_card.md, and the library's reads samples of the data and names local paths."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self.model.save_pretrained(output_dir, create_model_card=False)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        """Read an adapter back alone: the parent would load the frozen weights once more, from the main revision."""
        weights = Path(checkpoint_path, _ADAPTER_WEIGHTS)
        if not weights.is_file():
            return super()._load_from_checkpoint(checkpoint_path)
        from peft import set_peft_model_state_dict

        state = {name.removeprefix(_PEFT_PREFIX): value for name, value in load_file(weights).items()}
        result = set_peft_model_state_dict(self.model.transformers_model, state)
        if result.unexpected_keys:
            raise RuntimeError(f"{weights}: weights that the model has not: {result.unexpected_keys[:3]}")


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint under `folder`. The trainer's state is written last, so it marks a whole one."""
    steps = {}
    for state in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}"):
        try:
            steps[json.loads(state.read_text(encoding="utf-8"))["global_step"]] = str(state.parent)
        except ValueError:
            continue  # killed while it was written
    return steps[max(steps)] if steps else None
