"""Averages of the weights of models that came from one another: stages of a curriculum, seeds, the untrained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from common.cli import InputError
from modeling.encoder import save_merged
from modeling.reference import write_reference

# Above this cosine two tensors count as parallel: sin(angle) is then too small to divide by in float32.
_PARALLEL = 0.9995


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


def merge_models(folders: Sequence[Path], weights: Sequence[float], method: str, target: Path) -> None:
    """Write into `target` the average of plain SentenceTransformer folders, all in memory at once. Prompts, lengths
    and dtypes are those of the last one. Raises InputError where models pool differently or have other layers: an
    average of their weights would mean nothing.
    """
    models = [SentenceTransformer(str(folder), device="cpu") for folder in folders]
    last = models[-1]
    states = [model.state_dict() for model in models]
    for folder, model, state in zip(folders, models, states, strict=True):
        if [*map(str, model)][1:] != [*map(str, last)][1:]:
            raise InputError(f"{folder} and {folders[-1]}: not of one pooling, so their weights cannot be averaged")
        if {name: value.shape for name, value in state.items()} != {name: v.shape for name, v in states[-1].items()}:
            raise InputError(f"{folder} and {folders[-1]}: not of one layout, so their weights cannot be averaged")
    states, weights = [*reversed(states)], [*reversed(weights)]  # the first one's dtype is the result's
    average = METHODS[method]
    merged = {
        name: average([state[name] for state in states], weights) if tensor.is_floating_point() else tensor
        for name, tensor in states[0].items()
    }
    last.load_state_dict(merged)
    save_merged(last, target)
    write_reference(last, target)
