"""Weights shared out among processes (FSDP2, on gloo): the same losses and the same weights as in one process.

accelerate 1.15 knows FSDP on accelerators alone and runs plain data parallelism on CPUs without a word, so that the
encoder and the losses are sharded here as accelerate does it: by torch's `fully_shard`, layer by layer.
"""

import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import distributed, multiprocessing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from modeling.encoder import build_encoder
from modeling.losses import SoftInfoNCELoss

QUERIES = ["parse a date", "read a file", "write a file", "sort a list of dates"]
DOCUMENTS = ["date date parse", "open read", "open write", "list sort sort"]
HALVES = slice(0, 2), slice(2, 4)
CASES = [(False, None), (False, 1), (True, 1)]  # (LoRA, texts at a time by GradCache)


def build(folder: Path, lora: bool):
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "FEATURE_EXTRACTION"}
    return build_encoder(folder, max_seq_length=32, peft_config=LoraConfig(**config) if lora else None)


def train(encoder, mini_batch_size: int | None, halves) -> list[float]:
    """Losses of three steps; a step's is the mean over `halves` of the batch, each with its own negatives."""
    loss = SoftInfoNCELoss(encoder, temperature=0.2, mini_batch_size=mini_batch_size)
    optimizer = torch.optim.SGD([parameter for parameter in encoder.parameters() if parameter.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        values = []
        for half in halves:
            texts = QUERIES[half], DOCUMENTS[half], DOCUMENTS[half][::-1]
            features = [encoder.preprocess(column) for column in texts]
            values.append(loss(features, torch.tensor([[0.9, 0.2]] * 2)))
        sum(values).div(len(values)).backward()
        optimizer.step()
        losses.append(sum(value.item() for value in values) / len(values))
    return losses


def worker(rank: int, folder: Path, out: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for case, (lora, mini_batch_size) in enumerate(CASES):
        encoder = build(folder, lora)
        for layer in encoder.transformers_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(encoder, mesh=mesh)
        assert all(isinstance(parameter, DTensor) for parameter in encoder.parameters())
        losses = torch.tensor(train(encoder, mini_batch_size, HALVES[rank : rank + 1]))
        distributed.all_reduce(losses)
        weights = get_model_state_dict(encoder, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            torch.save((losses / 2, weights), out / str(case))
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sharded_runs(tiny_decoder, tmp_path_factory) -> Path:
    """A file for each of CASES: its losses, and the weights as the first process gathered them."""
    out = tmp_path_factory.mktemp("sharded")
    multiprocessing.spawn(worker, (tiny_decoder, out), nprocs=2)
    return out


@pytest.mark.parametrize("case", range(len(CASES)), ids=map(str, CASES))
def test_two_shards_train_as_one_process(tiny_decoder, sharded_runs, case):
    lora, _ = CASES[case]
    sharded_losses, sharded = torch.load(sharded_runs / str(case))
    encoder = build(tiny_decoder, lora)
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    losses = train(encoder, None, HALVES)
    assert abs(losses[-1] - losses[0]) > 1e-3
    torch.testing.assert_close(sharded_losses, torch.tensor(losses), atol=1e-5, rtol=0)
    weights = encoder.state_dict()
    assert sharded.keys() == weights.keys()
    moved = [name for name, weight in weights.items() if abs(weight - before[name]).max() > 1e-5]
    assert len(moved) >= 14 and all("lora" in name for name in moved) == lora
    for name, weight in weights.items():
        torch.testing.assert_close(sharded[name], weight, atol=1e-5, rtol=0, msg=name)
    # what the first process gathered fits an encoder built alone, which can be saved
    whole = build(tiny_decoder, lora)
    whole.load_state_dict(sharded)
    assert abs(whole.encode(QUERIES) - encoder.encode(QUERIES)).max() < 1e-5
