"""What the tests of training share: tiny data, a recipe of two stages, and how far two models are apart."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file

import train_st

INSTRUCTION = "Given a question, retrieve its answer"
WORDS = "parse date read write file open close sort list how do i given a question"
WORDS = WORDS.split()


def write_hub(folder: Path, **changed: list[dict]) -> Path:
    """A data folder as dataset_builders publishes it: Parquet and a README. 48 rows, 24 queries for validation."""
    documents = [" ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(3, 6 + i % 5)) for i in range(72)]
    documents = [f"{document} {WORDS[i % 14]} {WORDS[i // 14]}" for i, document in enumerate(documents)]
    queries = [" ".join(document.split()[-3:]) for document in documents]
    split = ["validation" if i % 3 == 0 else "train" for i in range(72)]
    train = [i for i in range(72) if split[i] == "train"]
    configs = {
        "train": [
            {
                "query": queries[i],
                "positive": documents[i],
                **{f"negative_{k}": documents[(i + 7 * k) % 72] for k in (1, 2, 3)},
                "label": [0.9, 0.4, 0.2, 0.1 + i / 200],
            }
            for i in train
        ],
        "sts": [
            {"sentence1": queries[i], "sentence2": queries[(i * 5) % 72], "label": (i % 10) / 10 + 0.05} for i in train
        ],
        "documents": [{"document_id": f"d{i}", "text": documents[i]} for i in range(72)],
        "queries": [{"query_id": f"q{i}", "text": queries[i], "split": split[i]} for i in range(72)],
        "qrels": [{"query_id": f"q{i}", "document_id": f"d{i}", "score": 1, "split": split[i]} for i in range(72)],
        **changed,
    }
    folder.mkdir(parents=True)
    for name, rows in configs.items():
        pq.write_table(pa.Table.from_pylist(rows) if isinstance(rows, list) else rows, folder / f"{name}.parquet")
    names = [{"config_name": n, "data_files": [{"split": "train", "path": f"{n}.parquet"}]} for n in configs]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': names})}---\n")
    return folder


def two_stages(model: Path, hub: Path) -> dict:
    """All weights by STS first, then an adapter by retrieval."""
    return {
        "model_name_or_path": str(model),
        "dataset_name": str(hub),
        "instruction": INSTRUCTION,
        "max_seq_length": 64,
        "min_text_tokens": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": "3e-3",
        "num_train_epochs": 2,
        "eval_strategy": "steps",
        "eval_steps": 6,
        "save_steps": 6,
        "logging_steps": 2,
        "eval_queries": 10,
        "eval_documents": 40,
        "disable_tqdm": True,
        "stages": [
            {
                "name": "sts",
                "dataset_config": "sts",
                "loss": "cosent",
                "temperature": 0.05,
                "prompted_columns": ["sentence1", "sentence2"],
            },
            {
                "name": "retrieval",
                "use_peft": True,
                "lora_r": 4,
                "lora_dropout": 0.1,
                "lora_target_modules": "all-linear",
                "mini_batch_size": 4,
            },
        ],
    }


def train(folder: Path, recipe: dict, *flags: str) -> Path:
    """Run a recipe in this process and return its output_dir."""
    (folder / "train.yaml").write_text(yaml.safe_dump(recipe))
    train_st.main(["--config", str(folder / "train.yaml"), "--output_dir", str(folder / "run"), *flags])
    return folder / "run"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def distance(first: Path, second: Path) -> float:
    """Largest difference between the weights of two models."""
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
