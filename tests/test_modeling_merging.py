"""Averages of weights: the points of an arc by hand, and folders that load alone."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from common.cli import InputError
from modeling.merging import linear, merge_models, slerp


def test_a_third_of_the_way_between_orthogonal_vectors():
    """30 of 90 degrees; lengths 2 and 4 keep their part: sin 60 of the first and sin 30 of the second."""
    point = slerp([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])], [2, 1])
    assert point.tolist() == [[pytest.approx(math.sqrt(3)), pytest.approx(2.0)]]


@pytest.mark.parametrize("second", [[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0], [1.0, 2.001]])
def test_vectors_without_an_arc_are_averaged(second):
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor(second)]
    assert slerp(tensors, [1, 3]).equal(linear(tensors, [1, 3]))
    assert linear(tensors, [1, 3]).tolist() == pytest.approx([(1 + 3 * second[0]) / 4, (2 + 3 * second[1]) / 4])


def test_equal_shares_of_bfloat16_are_added_in_more():
    """Three equal tensors give themselves back, which sums in bfloat16 would not."""
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert linear([tensor] * 3, [1, 1, 1]).equal(tensor)


@pytest.fixture
def folders(tiny_encoder, tmp_path):
    """A model and the same with noise on its weights, and a prompt of its own."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        shutil.copytree(tiny_encoder, folder)
    state = load_file(second / "model.safetensors")
    torch.manual_seed(0)
    save_file(
        {name: value + 0.1 * torch.randn_like(value) for name, value in state.items()}, second / "model.safetensors"
    )
    edit(second / "config_sentence_transformers.json", prompts={"query": "ask: ", "document": ""})
    return first, second


def edit(path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_folders_are_merged_tensor_by_tensor(folders, tmp_path, method):
    merge_models(folders, [3, 1], method, tmp_path / "merged")
    assert (tmp_path / "merged" / "reference_vectors.json").is_file()
    states = [load_file(folder / "model.safetensors") for folder in folders]
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == states[0].keys() and len(merged) > 10
    formula = {"linear": linear, "slerp": slerp}[method]
    for name, value in merged.items():
        assert torch.allclose(value, formula([state[name] for state in states], [3, 1]), atol=1e-7)
        assert not value.equal(states[0][name])
    model = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert model.prompts["query"] == "ask: "  # the last one's
    assert abs((model.encode(["parse a date"]) ** 2).sum() - 1) < 1e-5


def fewer_layers(folder):
    edit(folder / "config.json", num_hidden_layers=1)
    state = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in state.items() if "layers.1." not in name}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda folder: edit(folder / "1_Pooling" / "config.json", pooling_mode="mean"), "not of one pooling"),
        (fewer_layers, "not of one layout"),
    ],
)
def test_models_that_are_no_relatives_are_refused(folders, tmp_path, change, problem):
    change(folders[0])
    with pytest.raises(InputError, match=problem):
        merge_models(folders, [1, 1], "linear", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
