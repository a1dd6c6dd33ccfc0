"""The formulas, against values worked out by hand, closed-form gradients and properties that any input must have."""

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import modeling.objectives
from modeling.objectives import info_nce, soft_info_nce, soft_targets

shapes = st.tuples(st.integers(1, 5), st.integers(0, 4), st.integers(0, 10**6))


def batch(rows: int, negatives: int, seed: int):
    """Random scores, own columns (first documents of all rows, then second ones, ...) and labels, in float64."""
    generator = torch.Generator().manual_seed(seed)
    documents = rows * (negatives + 1)
    scores = 5 * torch.randn(rows, documents, generator=generator, dtype=torch.float64)
    own = torch.arange(documents).view(negatives + 1, rows).T
    labels = 0.01 + 0.98 * torch.rand(rows, negatives + 1, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, documents, generator=generator) < 0.3
    return scores, own, labels, mask


def test_docstring_examples():
    tested = doctest.testmod(modeling.objectives)
    assert tested.attempted >= 4
    assert tested.failed == 0


def test_hand_computed_values():
    # row 0: odds 3 and 1/3, so targets 0.9 and 0.1; row 1: equal labels, so 0.5 each
    labels = torch.tensor([[0.75, 0.25], [0.4, 0.4]])
    own = torch.tensor([[0, 2], [1, 3]])
    scores = torch.log(torch.tensor([[8.0, 1.0, 4.0, 3.0], [1.0, 2.0, 1.0, 4.0]]))
    row0 = -(0.9 * math.log(8 / 16) + 0.1 * math.log(4 / 16))
    row1 = -(0.5 * math.log(2 / 8) + 0.5 * math.log(4 / 8))
    assert soft_info_nce(scores, own, labels).item() == pytest.approx((row0 + row1) / 2, rel=1e-6)
    # without document 1 in the first row's denominator: 16 - 1 = 15
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 1] = True
    row0 = -(0.9 * math.log(8 / 15) + 0.1 * math.log(4 / 15))
    assert soft_info_nce(scores, own, labels, mask=mask).item() == pytest.approx((row0 + row1) / 2, rel=1e-6)
    # at target temperature 1/2 the odds are squared: 9 and 1/9, so 81/82 and 1/82
    row0 = -(81 / 82 * math.log(8 / 16) + 1 / 82 * math.log(4 / 16))
    value = soft_info_nce(scores, own, labels, target_temperature=0.5).item()
    assert value == pytest.approx((row0 + row1) / 2, rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_one_hot_labels_give_infonce(dtype, tolerance):
    """Also at the limits 0 and 1, whose logits are infinite, and near them."""
    scores, own, labels, mask = batch(4, 3, seed=1)
    scores = scores.to(dtype)
    expected = info_nce(scores, own, mask)
    assert expected.item() == pytest.approx(
        torch.nn.functional.cross_entropy(
            scores.masked_fill(mask.scatter(1, own, False), -torch.inf), own[:, 0]
        ).item(),
        rel=1e-6,
    )
    for low, high in ((0.0, 1.0), (1e-9, 1 - 1e-9)):
        one_hot = torch.full_like(labels, low)
        one_hot[:, 0] = high
        value = soft_info_nce(scores, own, one_hot.to(dtype), mask=mask)
        assert torch.isfinite(value)
        assert value.item() == pytest.approx(expected.item(), rel=max(tolerance, 1e-8))


def test_gradient_is_softmax_minus_target():
    scores, own, labels, mask = batch(3, 2, seed=2)
    scores.requires_grad_()
    soft_info_nce(scores, own, labels, mask=mask).backward()
    kept = mask.scatter(1, own, False)
    target = torch.zeros_like(scores).scatter(1, own, soft_targets(labels))
    expected = (scores.detach().masked_fill(kept, -torch.inf).softmax(1) - target) / 3
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(scores.grad, expected)


def test_half_precision_scores_are_summed_in_float32():
    scores, own, labels, _ = batch(4, 3, seed=3)
    value = soft_info_nce(scores.bfloat16(), own, labels.float())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(soft_info_nce(scores.bfloat16().double(), own, labels).item(), rel=1e-5)


@given(shapes, st.floats(-3, 3))
def test_target_ignores_a_shift_of_all_logits(shape, shift):
    """A teacher that is more generous by a constant asks for the same distribution."""
    _, _, labels, _ = batch(*shape)
    shifted = torch.sigmoid(torch.logit(labels) + shift)
    torch.testing.assert_close(soft_targets(shifted), soft_targets(labels))
    torch.testing.assert_close(soft_targets(labels).sum(1), torch.ones(len(labels), dtype=torch.float64))


@given(shapes, st.floats(0.2, 5))
def test_loss_is_at_least_the_targets_entropy(shape, temperature):
    """Cross-entropy less entropy is a KL divergence, and documents in the denominator only add to it."""
    scores, own, labels, mask = batch(*shape)
    targets = soft_targets(labels, temperature)
    entropy = -(targets * targets.log()).sum(1).mean()
    loss = soft_info_nce(scores, own, labels, temperature, mask)
    assert loss >= entropy - 1e-9
    assert soft_info_nce(scores, own, labels, temperature) >= loss - 1e-9  # masking can only lower it


@given(shapes, st.floats(-20, 20))
def test_loss_does_not_depend_on_order_or_offset(shape, offset):
    scores, own, labels, mask = batch(*shape)
    loss = soft_info_nce(scores, own, labels, mask=mask)
    torch.testing.assert_close(soft_info_nce(scores + offset, own, labels, mask=mask), loss)
    rows = torch.randperm(len(scores))
    torch.testing.assert_close(soft_info_nce(scores[rows], own[rows], labels[rows], mask=mask[rows]), loss)
    columns = torch.randperm(scores.shape[1])
    moved = columns.argsort()[own]
    torch.testing.assert_close(soft_info_nce(scores[:, columns], moved, labels, mask=mask[:, columns]), loss)


@settings(max_examples=25)
@given(shapes)
def test_own_documents_stay_in_the_denominator(shape):
    """A mask by equal text marks a row's own documents too; left out, probabilities would exceed 1."""
    scores, own, labels, mask = batch(*shape)
    everything = torch.ones_like(mask)
    own_alone = soft_info_nce(scores.gather(1, own), torch.arange(own.shape[1]).expand_as(own), labels)
    torch.testing.assert_close(soft_info_nce(scores, own, labels, mask=everything), own_alone)


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan, math.inf])
def test_raw_teacher_scores_are_refused(value):
    labels = torch.tensor([[0.5, value]])
    with pytest.raises(ValueError, match="calibrate"):
        soft_info_nce(torch.zeros(1, 2), torch.tensor([[0, 1]]), labels)


def test_shapes_are_checked():
    scores, own, labels, mask = batch(3, 2, seed=4)
    with pytest.raises(ValueError, match="one row for each row"):
        soft_info_nce(scores, own, labels[:, :2])
    with pytest.raises(ValueError, match="one row for each row"):
        soft_info_nce(scores[:2], own, labels)
    with pytest.raises(ValueError, match="shape of scores"):
        soft_info_nce(scores, own, labels, mask=mask[:, :3])
