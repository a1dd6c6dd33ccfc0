"""Averages of weights: the points of an arc by hand, what cannot be averaged, and folders that load alone."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from common.cli import InputError
from modeling.merging import linear, merge_models, merge_weights, slerp


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


def test_states_that_do_not_fit_are_refused():
    state = {"a": torch.ones(2), "positions": torch.arange(3)}
    assert merge_weights([state, {**state, "a": torch.zeros(2)}], [1, 1])["a"].tolist() == [0.5, 0.5]
    assert merge_weights([state, state], [1, 1])["positions"].dtype == torch.int64
    for other, message in [
        ({"a": torch.ones(2)}, "positions is a weight of one"),
        ({**state, "a": torch.ones(3)}, r"a is \(2,\) in one and \(3,\)"),
        ({**state, "positions": torch.arange(1, 4)}, "positions is not made of floating-point numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            merge_weights([state, other], [1, 1])


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


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"num_key_value_heads": 4}, "not of one architecture"),
        ("config.json", {"dtype": "bfloat16"}, None),  # says how it is stored, not what it computes
        ("1_Pooling/config.json", {"pooling_mode": "mean"}, "not of one architecture"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "not of one tokenizer"),
        ("tokenizer.json", {"truncation": None}, None),
    ],
)
def test_what_differs_is_refused_before_weights_are_read(folders, tmp_path, file, change, message):
    edit(folders[0] / file, **change)
    if message is None:
        return merge_models(folders, [1, 1], "linear", tmp_path / "merged")
    (folders[1] / "model.safetensors").unlink()
    with pytest.raises(InputError, match=message):
        merge_models(folders, [1, 1], "linear", tmp_path / "merged")


def test_no_sentence_transformer(folders, tmp_path):
    (folders[0] / "modules.json").unlink()
    with pytest.raises(InputError, match=r"modules\.json: no such file"):
        merge_models(folders, [1, 1], "linear", tmp_path / "merged")
