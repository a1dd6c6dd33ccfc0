"""Steps that keep graphs against sentence-transformers' GradCache, which keeps none: gradients, passes, memory."""

import contextlib
import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from benchmarks.measure import live_tensors
from modeling import gradcache
from modeling.adapters import add_adapter
from modeling.encoder import build_encoder
from modeling.keys import memory_bytes
from modeling.losses import CachedCoSENTLoss, GradedLoss, text_keys
from modeling.shared_prefix import share_prefix

PROMPT = "instruct : given a question retrieve its answer query : "
QUERIES = ["parse date", "read a file", "open file", "sort a list"]
DOCUMENTS = [
    ["how do i parse a date given a date", "read", "open file and close file", "list"],
    ["write", "write a file given a file how do i sort a list", "sort a list", "a date"],
]
LABELS = torch.tensor([[0.9, 0.2], [0.8, 0.4], [0.7, 0.1], [0.9, 0.5]])
EVERYTHING = 1 << 40
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(params=["all weights", "LoRA with dropout"])
def encoder(request, tiny_decoder):
    encoder = build_encoder(tiny_decoder, max_seq_length=64)
    if request.param != "all weights":
        torch.manual_seed(0)
        add_adapter(encoder, LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", init_lora_weights=False))
    text_keys(encoder.preprocess(["a"]))  # makes a table that stays
    return encoder.train()


def step(encoder, loss, columns, labels):
    """Gradients, number of texts that went through the layers, and the most bytes of tensors that were alive."""
    encoder.zero_grad()
    torch.manual_seed(1)
    passes = []
    hook = encoder[1].register_forward_pre_hook(lambda module, args: passes.append(len(args[0]["attention_mask"])))
    with live_tensors() as live:
        loss(columns, labels).backward()
    hook.remove()
    gradients = [weight.grad.flatten() for weight in encoder.parameters() if weight.grad is not None]
    assert live.now <= sum(gradient.nbytes for gradient in gradients)  # no graph is left
    return torch.cat(gradients), sum(passes), live.peak


@pytest.mark.parametrize(("kind", "shared"), [("graded", False), ("cosent", False), ("matryoshka", True)])
def test_gradients_do_not_depend_on_what_is_kept(encoder, kind, shared):
    columns = [encoder.preprocess(QUERIES, prompt=PROMPT), *map(encoder.preprocess, DOCUMENTS)]
    labels, texts = LABELS, 12
    if kind == "cosent":
        columns, labels, texts = columns[1:], LABELS[:, 0], 8
    found, kept = {}, {}
    with share_prefix(encoder) if shared else contextlib.nullcontext():
        for memory in (0, EVERYTHING, "half", 1):
            if memory == "half":
                memory = kept[EVERYTHING] // 2
            sizes = {"mini_batch_size": 2, "activation_memory": memory}
            loss = cached = CachedCoSENTLoss(encoder, **sizes) if kind == "cosent" else GradedLoss(encoder, **sizes)
            if kind == "matryoshka":
                loss = MatryoshkaLoss(encoder, loss, [32, 8])
            first = step(encoder, loss, columns, labels)
            found[memory] = again = step(encoder, loss, columns, labels)  # knows what a token takes
            assert torch.equal(first[0], again[0])
            kept[memory] = cached._used
    none, everything, half, first = found.values()
    used = [*kept.values()]
    assert none[0].norm() > 1e-3 and none[1] == 2 * texts and used[0] == 0
    assert everything[0].equal(none[0]) and everything[1] == texts
    assert half[0].equal(none[0]) and texts < half[1] < 2 * texts
    assert first[0].equal(none[0]) and first[1] == 2 * texts - 2
    assert 0 < used[2] <= used[1] // 2
    assert none[2] <= half[2] < everything[2]
    assert first[2] < 1.25 * none[2]  # the room of one graph is needed anyway


def test_evaluation_keeps_nothing(encoder):
    columns = [encoder.preprocess(QUERIES), *map(encoder.preprocess, DOCUMENTS)]
    loss = GradedLoss(encoder.eval(), mini_batch_size=2, activation_memory=EVERYTHING)
    with torch.no_grad():
        assert not loss(columns, LABELS).requires_grad
    assert loss._used == 0


def test_auto_is_half_of_what_is_free(encoder, monkeypatch, tmp_path):
    columns = [encoder.preprocess(QUERIES), *map(encoder.preprocess, DOCUMENTS)]
    monkeypatch.setattr(gradcache, "_container_free", lambda: 4000)
    assert gradcache.free_memory(torch.device("cpu")) == 4000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert gradcache.free_memory(torch.device("cpu")) == 2000
    loss = GradedLoss(encoder, mini_batch_size=2, activation_memory=memory_bytes("auto"))
    assert step(encoder, loss, columns, LABELS)[1] == 2 * 12 - 2  # the first mini-batch, whose size was not known
    monkeypatch.undo()
    assert gradcache._container_free(tmp_path) == math.inf
    for limit, free in (("max", math.inf), ("5000", 3800), ("900", 0)):
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("1200")
        assert gradcache._container_free(tmp_path) == free


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept():
    program = """
import resource
import numpy as np
from modeling.processes import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(2 << 20)  # 16 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
np.ones(2 << 20)
print(first, faults())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 20, (before, after)
