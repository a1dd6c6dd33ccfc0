"""The formulas, against values worked out by hand, closed-form gradients and properties that any input must have."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.cross_encoder.losses import LambdaLoss, RankNetLoss
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, MarginMSELoss

from modeling.objectives import (
    OBJECTIVES,
    bixse,
    info_nce,
    kl,
    lambda_loss,
    margin_mse,
    pairdistill,
    ranknet,
    soft_info_nce,
    weighted_soft_info_nce,
)

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


# --- the others, against sentence-transformers and plain loops -------------------------------------------------------


def value_of(name, scores, own, labels, mask=None, target_temperature=0.7):
    objective = OBJECTIVES[name]
    given = {"labels": labels, "target_temperature": target_temperature, "mask": mask}
    return objective.function(scores, own, **{need: given[need] for need in objective.needs})


def by_columns(loss, scores, own, labels):
    """The value of a sentence-transformers loss whose similarity of query i and document k of the row is scores_ik."""
    columns = scores.gather(1, own).unsqueeze(2).unbind(1)
    return loss.compute_loss_from_embeddings([torch.ones_like(columns[0]), *columns], labels)


def product(queries, documents):
    return (queries * documents).sum(1)


class Lookup(torch.nn.Module):
    """What a CrossEncoder loss needs of a model, with given scores: documents are their row's columns of a matrix."""

    num_labels = 1
    device = torch.device("cpu")

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def preprocess(self, pairs, **_):
        return {"pairs": torch.tensor(pairs)}

    def forward(self, features):
        return {"scores": self.scores[tuple(features["pairs"].T)]}


def by_lists(kind, scores, own, labels, **kwargs):
    rows = list(range(len(scores)))
    return kind(Lookup(scores), mini_batch_size=-1, **kwargs)((rows, own.tolist()), list(labels))


@given(shapes, st.floats(0.2, 5))
def test_kl_is_distill_kl_div(shape, temperature):
    scores, own, labels, _ = batch(*shape)
    loss = DistillKLDivLoss(None, similarity_fct=product, student_temperature=1, teacher_temperature=temperature)
    if own.shape[1] == 1:  # refused there
        assert kl(scores, own, labels, temperature).abs() < 1e-12
    else:
        expected = by_columns(loss, scores, own, torch.logit(labels))
        torch.testing.assert_close(kl(scores, own, labels, temperature), expected)


@given(shapes.filter(lambda shape: shape[1] > 0), st.floats(0.2, 5))
def test_margin_mse_is_that_of_logits(shape, temperature):
    scores, own, labels, _ = batch(*shape)
    expected = by_columns(MarginMSELoss(None, product), scores, own, torch.logit(labels) / temperature)
    torch.testing.assert_close(margin_mse(scores, own, labels, temperature), expected)


@given(shapes)
def test_lambda_loss_and_ranknet_are_the_cross_encoders(shape):
    """Theirs is the mean over all pairs of the batch, which is ours where rows have equally many: no ties here."""
    scores, own, labels, _ = batch(*shape)
    scores = scores.float()
    assert labels.unique().numel() == labels.numel()
    expected = by_lists(LambdaLoss, scores, own, labels.float())
    torch.testing.assert_close(lambda_loss(scores, own, labels.float()), expected)
    expected = by_lists(RankNetLoss, scores, own, labels.float(), reduction_log="natural")
    torch.testing.assert_close(ranknet(scores, own, labels.float()), expected)


@given(shapes, st.floats(0.2, 5))
def test_pairdistill_is_kl_between_two_way_softmaxes(shape, temperature):
    scores, own, labels, _ = batch(*shape)
    rows = []
    for z, teacher in zip(scores.gather(1, own), torch.logit(labels) / temperature, strict=True):
        pairs = [[k, j] for k in range(len(z)) for j in range(k + 1, len(z))]
        two_way = [torch.distributions.Categorical(logits=x[torch.tensor(pairs)]) for x in (teacher, z) if pairs]
        rows.append(torch.distributions.kl_divergence(*two_way).mean() if pairs else z.new_zeros(()))
    torch.testing.assert_close(pairdistill(scores, own, labels, temperature), torch.stack(rows).mean())


@given(shapes, st.booleans())
def test_bixse_is_binary_cross_entropy_with_zeros_for_other_rows(shape, masked):
    scores, own, labels, mask = batch(*shape)
    total = 0.0
    for row in range(len(scores)):
        grades = dict(zip(own[row].tolist(), labels[row].tolist(), strict=True))
        seen = [j for j in range(scores.shape[1]) if j in grades or not (masked and mask[row, j])]
        bias = math.log(len(grades) / len(seen))
        for j in seen:
            probability = 1 / (1 + math.exp(-scores[row, j].item() - bias))
            grade = grades.get(j, 0.0)
            total -= grade * math.log(probability) + (1 - grade) * math.log(1 - probability)
    value = bixse(scores, own, labels, mask if masked else None)
    assert value.item() == pytest.approx(total / len(scores), rel=1e-9)


@given(shapes.filter(lambda shape: shape[1] > 0), st.floats(0.2, 5))
def test_weighted_soft_info_nce_weighs_negatives(shape, temperature):
    scores, own, labels, mask = batch(*shape)
    total = 0.0
    for row in range(len(scores)):
        positive, *negatives = own[row].tolist()
        odds = [(y / (1 - y)) ** (1 / temperature) for y in labels[row, 1:].tolist()]
        weights = [(1 - 0.9 * x / sum(odds)) / (1 - 0.9 / len(odds)) for x in odds]
        assert sum(weights) == pytest.approx(len(weights))
        assert min(weights) > 0.1 - 1e-9
        weight = {positive: 1.0, **dict(zip(negatives, weights, strict=True))}
        weight |= {j: 1.0 for j in range(scores.shape[1]) if j not in weight and not mask[row, j]}
        denominator = sum(w * math.exp(scores[row, j].item()) for j, w in weight.items())
        total += math.log(denominator) - scores[row, positive].item()
    value = weighted_soft_info_nce(scores, own, labels, temperature, mask)
    assert value.item() == pytest.approx(total / len(scores), rel=1e-9)


# --- all of them ----------------------------------------------------------------------------------------------------


def test_the_registry_names_what_the_formulas_take():
    assert len(OBJECTIVES) == 9
    for name, objective in OBJECTIVES.items():
        assert objective.function.__name__ == name
        assert tuple(inspect.signature(objective.function).parameters) == ("scores", "own", *objective.needs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_which_documents_an_objective_sees(name):
    """Own documents always, those of other rows by its `needs`, and then not the masked ones."""
    scores, own, labels, mask = batch(4, 3, seed=7)
    scores.requires_grad_()
    value_of(name, scores, own, labels, mask).backward()
    is_own = torch.zeros_like(mask).scatter(1, own, True)
    assert (scores.grad[is_own] != 0).float().mean() > 0.7
    foreign = ~is_own & ~mask
    assert foreign.any()
    assert bool((scores.grad[foreign] != 0).any()) == ("mask" in OBJECTIVES[name].needs)
    assert not scores.grad[~is_own & mask].any()


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=30)
@given(shapes, st.integers(0, 10**6))
def test_a_missing_document_is_left_out_of_everything(name, shape, seed):
    """A padded batch is worth what its rows are worth alone, each with the documents it has."""
    scores, own, labels, mask = batch(*shape)
    missing = torch.rand(own.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    missing[:, 0] = False
    mask |= torch.zeros_like(mask[:1]).scatter(1, own[missing][None], True)  # nobody sees their columns
    alone = []
    for row, (columns, absent) in enumerate(zip(own, missing, strict=True)):
        at = slice(row, row + 1)
        alone.append(value_of(name, scores[at], columns[~absent][None], labels[at, ~absent], mask[at]))
    scores.requires_grad_()
    value = value_of(name, scores, own.masked_fill(missing, -1), labels.masked_fill(missing, math.nan), mask)
    torch.testing.assert_close(value, torch.stack(alone).mean())
    value.backward()
    assert torch.isfinite(scores.grad).all()
    assert not scores.grad.gather(1, own)[missing].any()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("labels", [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.5, 0.5]])
def test_extremes_stay_finite(name, labels):
    """Cosines of -1 and 1 at temperature 0.01 in bfloat16, summed in float32; labels at the ends, all equal."""
    scores = torch.tensor([[100.0, -100.0, 100.0, -100.0, 100.0]] * 2, dtype=torch.bfloat16).requires_grad_()
    own = torch.tensor([[0, 1, 2], [1, 2, 3]])
    value = value_of(name, scores, own, torch.tensor([labels] * 2))
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if "labels" in objective.needs])
def test_labels_and_shapes_are_checked_by_every_objective(name):
    scores, own, labels, mask = batch(3, 2, seed=4)
    for raw in (1.5, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="calibrate"):
            value_of(name, scores, own, labels.masked_fill(labels == labels[1, 1], raw))
    with pytest.raises(ValueError, match="one row for each row"):
        value_of(name, scores, own, labels[:2])
    if "mask" in OBJECTIVES[name].needs:
        with pytest.raises(ValueError, match="shape of scores"):
            value_of(name, scores, own, labels, mask[:, :3])
        with pytest.raises(ValueError, match="one row for each row"):
            value_of(name, scores[:2], own, labels, mask[:2])


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=20)
@given(shape=shapes, data=st.data())
def test_no_objective_knows_the_order_of_negatives_rows_or_columns(name, shape, data):
    scores, own, labels, mask = batch(*shape)
    negatives = [0, *(1 + place for place in data.draw(st.permutations(range(shape[1]))))]
    rows = list(data.draw(st.permutations(range(shape[0]))))
    columns = torch.tensor(data.draw(st.permutations(range(scores.shape[1]))))
    expected = value_of(name, scores, own, labels, mask)
    assert expected.isfinite()
    for found in (
        value_of(name, scores, own[:, negatives], labels[:, negatives], mask),
        value_of(name, scores[rows], own[rows], labels[rows], mask[rows]),
        value_of(name, scores[:, columns], torch.argsort(columns)[own], labels, mask[:, columns]),
    ):
        torch.testing.assert_close(found, expected)
