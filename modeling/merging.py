"""Averages of the weights of models that came from one another, such as the stages of a curriculum."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from common.cli import InputError
from modeling.encoder import save_merged
from modeling.reference import write_reference

# Above this cosine two tensors count as parallel: sin(angle) is then too small to divide by in float32.
_PARALLEL = 0.9995
# Keys of config.json that say where a checkpoint came from, not what it computes.
_NO_ARCHITECTURE = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache")


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean (model soup, arXiv 2203.05482), in the shape and dtype of the first tensor.

    >>> linear([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], [3, 1])
    tensor([0.7500, 0.2500])
    """
    total = sum(weights)
    mean = sum(tensor.double() * (weight / total) for tensor, weight in zip(tensors, weights, strict=True))
    return mean.to(tensors[0].dtype)


def slerp(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The point at t = w_1 / (w_0 + w_1) of the arc from one tensor to another, each taken as one long vector.

        sin((1 - t) a) / sin(a) * v_0 + sin(t a) / sin(a) * v_1,   a = the angle between v_0 and v_1

    (Shoemake, SIGGRAPH 1985, section 3.3; lengths are interpolated with the directions.) Parallel, opposite and zero
    vectors have no arc, or no single one, and are averaged by `linear`.

    >>> slerp([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], [1, 1])
    tensor([0.7071, 0.7071])
    """
    first, second = (tensor.double() for tensor in tensors)
    t = weights[1] / sum(weights)
    lengths = first.norm() * second.norm()
    cosine = (first * second).sum() / lengths if lengths > 0 else torch.ones(())
    if cosine.abs() > _PARALLEL:
        return linear(tensors, weights)
    angle = torch.arccos(cosine)
    point = (torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * second) / torch.sin(angle)
    return point.to(tensors[0].dtype)


METHODS = {"linear": linear, "slerp": slerp}


def merge_weights(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float], method: str = "linear"
) -> dict[str, Tensor]:
    """State dicts of equal names and shapes as one, tensor by tensor, in the dtypes of the first.

    What is not a floating-point number (a buffer of positions) must be equal in all and is kept. Raises ValueError
    where names, shapes or whole numbers differ.
    """
    first = states[0]
    for other in states[1:]:
        if first.keys() != other.keys():
            name = sorted(first.keys() ^ other.keys())[0]
            raise ValueError(f"{name} is a weight of one model and not of the other")
        for name, tensor in first.items():
            if tensor.shape != other[name].shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)} in one and {tuple(other[name].shape)} in the other")
            if not tensor.is_floating_point() and not tensor.equal(other[name]):
                raise ValueError(f"{name} is not made of floating-point numbers, and differs")
    average = METHODS[method]
    return {
        name: average([state[name] for state in states], weights) if tensor.is_floating_point() else tensor
        for name, tensor in first.items()
    }


def merge_models(folders: Sequence[Path], weights: Sequence[float], method: str, target: Path) -> None:
    """Write into `target` the average of plain SentenceTransformer folders (no adapters), all in memory at once.

    Prompts and lengths are those of the last folder. Raises InputError for architectures or tokenizers that differ: an
    average of their weights would mean nothing.
    """
    last = folders[-1]
    for folder in folders[:-1]:
        for what, read in (("architecture", _architecture), ("tokenizer", _tokenizer)):
            if read(folder) != read(last):
                raise InputError(f"{folder} and {last}: not of one {what}, so their weights cannot be averaged")
    models = [SentenceTransformer(str(folder), device="cpu") for folder in folders]
    try:
        # the last one's dtypes, as it is the last one that is written
        order = [*reversed(models)]
        merged = merge_weights([model.state_dict() for model in order], [*reversed(weights)], method)
    except ValueError as error:
        raise InputError(f"{', '.join(map(str, folders))}: weights cannot be averaged: {error}") from None
    models[-1].load_state_dict(merged)
    save_merged(models[-1], target)
    write_reference(models[-1], target)


def _architecture(folder: Path) -> list[Any]:
    """Modules, pooling and the backbone's configuration."""
    config = _read_json(folder / "config.json")
    modules = [_read_json(path) for path in (folder / "modules.json", *sorted(folder.glob("*_Pooling/config.json")))]
    return [{key: value for key, value in config.items() if key not in _NO_ARCHITECTURE}, *modules]


def _tokenizer(folder: Path) -> dict[str, Any]:
    tokenizer = _read_json(folder / "tokenizer.json")
    return {key: value for key, value in tokenizer.items() if key not in ("truncation", "padding")}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a plain SentenceTransformer folder has one") from None
