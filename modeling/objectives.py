"""Training objectives as pure functions on tensors: one formula each, with its source.

Shapes: B rows (queries), D documents of the whole batch, n+1 own documents a row. Every objective takes

    scores  (B, D) student scores z: similarities / temperature, so logits
    own     (B, n+1) integer columns of each row's own documents, positive first; -1 where a row has fewer
    labels  (B, n+1) soft labels y in [0, 1] in the same order; what stands at a missing document does not matter
    mask    (B, D) bool or None: True = leave out. It hides other rows' documents; a row's own are always seen

and returns a scalar, the mean over rows, in the dtype of `scores` but never below float32. A teacher's logits are
logit(y) = log(y / (1 - y)): where soft labels are a calibrated sigmoid of raw scores, differences of logits are the
differences of raw scores times the calibration's slope. Objectives with a `mask` see the row's own documents and the
other rows' ones; those without see the own ones alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def soft_info_nce(
    scores: Tensor, own: Tensor, labels: Tensor, target_temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """InfoNCE with a soft target: cross-entropy between softmax(cosine / temperature) over the batch's documents and
    softmax(logit(label) / target_temperature) over the row's own.

    That is `cross_entropy_on_own` with the targets of `soft_targets`. The target is spread over the row's own
    documents only; the documents of other rows are negatives, as in InfoNCE. One-hot labels give `info_nce`.

    Example:
        One row, two own documents with labels 0.8 and 0.5 (odds 4 and 1, so targets 0.8 and 0.2) and equal scores:
        the loss is log 2; one foreign document with the same score makes it log 3, masking that one log 2 again.

        >>> own, labels = torch.tensor([[0, 1]]), torch.tensor([[0.8, 0.5]])
        >>> soft_info_nce(torch.zeros(1, 2), own, labels).exp()
        tensor(2.)
        >>> soft_info_nce(torch.zeros(1, 3), own, labels, mask=torch.tensor([[False, False, True]])).exp()
        tensor(2.)
    """
    return cross_entropy_on_own(scores, own, soft_targets(labels, target_temperature, own >= 0), mask)


def info_nce(scores: Tensor, own: Tensor, mask: Tensor | None = None) -> Tensor:
    """InfoNCE (arXiv 1807.03748, eq. 4) with in-batch and hard negatives: all target mass on `own[:, 0]`.

    Equals sentence-transformers' MultipleNegativesRankingLoss without a mask.
    """
    targets = torch.zeros_like(own, dtype=scores.dtype)
    targets[:, 0] = 1
    return cross_entropy_on_own(scores, own, targets, mask)


def weighted_soft_info_nce(
    scores: Tensor, own: Tensor, labels: Tensor, target_temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Soft-InfoNCE (arXiv 2310.08069): InfoNCE in which a negative weighs less the more relevant it may be.

        L_i = - log( exp(z_i0) / (exp(z_i0) + sum_j w_ij exp(z_ij)) ),
        w_ij = (beta - alpha p_ij) / (beta - alpha / n)

    with p_i a distribution over the n negatives of the row, so that weights average 1. The paper estimates p for all
    documents of the batch by BM25 or a small model; here it is softmax(logit(y) / target_temperature) over the row's
    own graded negatives, and documents of other rows, which nobody graded, have the average weight 1. alpha / beta is
    0.9: weights then stay above 0.1, where the authors' code clips them. A row with one negative is InfoNCE's.

    Example:
        Three documents with equal scores, labels of the negatives 0.5 and 0.1 (odds 1 and 1/9, so p = 0.9 and 0.1):
        the weights are (1 - 0.81) / 0.55 and (1 - 0.09) / 0.55, which sum to 2, as those of InfoNCE do. With scores
        log 1, log 100 and log 1 the denominator is 1 + (19 + 0.91) / 0.55.

        >>> own, labels = torch.tensor([[0, 1, 2]]), torch.tensor([[0.9, 0.5, 0.1]])
        >>> weighted_soft_info_nce(torch.zeros(1, 3), own, labels).exp()
        tensor(3.)
        >>> weighted_soft_info_nce(torch.tensor([[1.0, 100.0, 1.0]]).log(), own, labels).exp()
        tensor(37.2000)
    """
    strength = 0.9
    present = (own >= 0)[:, 1:]
    relevance = soft_targets(labels[:, 1:], target_temperature, present)
    count = present.sum(dim=1, keepdim=True, dtype=relevance.dtype).clamp(min=1)
    weights = ((1 - strength * relevance) / (1 - strength / count)).masked_fill(~present, 1)
    log_weights = torch.cat([weights.new_zeros(len(weights), 1), weights.log()], dim=1)
    targets = torch.zeros_like(log_weights)
    targets[:, 0] = 1
    return cross_entropy_on_own(scores, own, targets, mask, log_weights)


def bixse(scores: Tensor, own: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Graded pointwise binary cross-entropy (BiXSE, arXiv 2508.06781), over own and in-batch documents.

        L_i = - sum_j [ y_ij log s(z_ij + b_i) + (1 - y_ij) log(1 - s(z_ij + b_i)) ],   s = sigmoid

    with y_ij the soft label of an own document and 0 for those of other rows. As in SigLIP (arXiv 2303.15343, eq. 1)
    it is the sum over documents and the mean over rows, and b counters the imbalance that in-batch negatives bring.
    SigLIP learns b; here it is what they do to the log-odds of a document's being relevant, log(own / seen) with the
    numbers of the row's own documents and of all that it sees (exact where few of the own ones are relevant): 0
    without in-batch negatives, and nothing to save.

    A logit is a probability here and not one of a softmax, so the temperature wants to be higher than InfoNCE's:
    SigLIP starts at 0.1. It learns from a single graded document a row, too. It wants a start that tells texts apart:
    where all cosines are near 1, as of a bare decoder, its loss begins in the hundreds and training collapsed
    (docs/evidence.md); let a stage of InfoNCE come first.

    Example:
        A document graded 0.75 at score log 3 costs the entropy of 0.75, the least that is possible:

        >>> bixse(torch.tensor([[3.0]]).log(), torch.tensor([[0]]), torch.tensor([[0.75]]))
        tensor(0.5623)
    """
    columns, present = _indexable(own)
    labels = _checked(labels, present)
    scores = _at_least_float32(scores)
    seen = _seen(scores, own, mask)
    bias = torch.log(present.sum(dim=1, keepdim=True, dtype=scores.dtype) / seen.sum(dim=1, keepdim=True))
    # a missing document adds 0 to the positive's label
    targets = torch.zeros_like(scores).scatter_add(1, columns, labels.masked_fill(~present, 0).to(scores.dtype))
    losses = binary_cross_entropy_with_logits(scores + bias, targets, reduction="none")
    return losses.masked_fill(~seen, 0).sum(dim=1).mean()


def kl(scores: Tensor, own: Tensor, labels: Tensor, target_temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) over the row's own documents, as dense retrievers are distilled (arXiv 2010.11386).

        L_i = sum_k t_ik log(t_ik / softmax_k(z_i,own))

    It is soft InfoNCE without in-batch negatives, less the targets' entropy: the gradients are the same. The other
    rows' documents enter by mixing it with InfoNCE (`alpha` of the loss), as BGE-M3 (arXiv 2402.03216) does.

    Example:
        Labels 0.8 and 0.5 (targets 0.8 and 0.2), scores that say the same: nothing is left to learn.

        >>> kl(torch.tensor([[4.0, 1.0]]).log(), torch.tensor([[0, 1]]), torch.tensor([[0.8, 0.5]])).abs() < 1e-6
        tensor(True)
    """
    targets = soft_targets(labels, target_temperature, own >= 0)
    entropy = -torch.xlogy(targets, targets).sum(dim=1).mean()
    return cross_entropy_on_own(scores, own, targets, torch.ones_like(scores, dtype=torch.bool)) - entropy


def margin_mse(scores: Tensor, own: Tensor, labels: Tensor, target_temperature: float = 1.0) -> Tensor:
    """Margin-MSE (arXiv 2010.02666): the student's margins are to be as wide as the teacher's.

        L_i = 1/n sum_k ( (z_i0 - z_ik) - (logit(y_i0) - logit(y_ik)) / target_temperature )^2

    with k over the row's own negatives. The paper's margins are of raw teacher scores. With soft labels they are in
    logits, raw scores times the slope of the calibration, so that the student has no teacher's scale to copy; cosines
    follow at `temperature` a logit: at 0.02 a margin of 5 logits is one of 0.1 in cosine. Labels of 0 and 1 count as
    logits of about -16 and 16.

    Example:
        Odds 4 and 1 ask for a margin of log 4; there is none:

        >>> margin_mse(torch.zeros(1, 2), torch.tensor([[0, 1]]), torch.tensor([[0.8, 0.5]])).sqrt().exp()
        tensor(4.0000)
    """
    z, logits, present = _own_only(scores, own, labels)
    error = (z[:, :1] - z[:, 1:]) - (logits[:, :1] - logits[:, 1:]) / target_temperature
    return _row_means(error.square(), present[:, 1:])


def ranknet(scores: Tensor, own: Tensor, labels: Tensor) -> Tensor:
    """RankNet (Burges et al., ICML 2005, eq. 3): of two own documents the one with the higher label is to win.

        L_i = mean over k, l with y_ik > y_il of -log s(z_ik - z_il),   s = sigmoid

    Labels give the order alone, ties nothing. For pairs by how much they differ, see `pairdistill`.

    Example:
        >>> ranknet(torch.zeros(1, 3), torch.tensor([[0, 1, 2]]), torch.tensor([[0.9, 0.5, 0.5]])).exp()
        tensor(2.)
    """
    z, logits, present = _own_only(scores, own, labels)
    return _row_means(-logsigmoid(_differences(z)), (_differences(logits) > 0) & _pairs(present))


def pairdistill(scores: Tensor, own: Tensor, labels: Tensor, target_temperature: float = 1.0) -> Tensor:
    """PairDistill (arXiv 2410.01383): RankNet with the probability by which the teacher prefers one document.

        L_i = mean over pairs k < l of KL( p_ikl || s(z_ik - z_il) ),
        p_ikl = s((logit(y_ik) - logit(y_il)) / target_temperature),   s = sigmoid

    between the distributions over the two. The paper asks an LLM to compare two documents; here it is the two grades
    that are compared (Bradley-Terry). Up to the teacher's entropy it is RankNet's cross-entropy with soft targets.

    Example:
        Odds 4 and 1, so p = 0.8, against an undecided student: log 2 less the entropy of 0.8.

        >>> pairdistill(torch.zeros(1, 2), torch.tensor([[0, 1]]), torch.tensor([[0.8, 0.5]]))
        tensor(0.1927)
    """
    z, logits, present = _own_only(scores, own, labels)
    student, teacher = _differences(z), _differences(logits) / target_temperature
    preferred = torch.sigmoid(teacher)
    divergence = binary_cross_entropy_with_logits(student, preferred, reduction="none")
    divergence = divergence - binary_cross_entropy_with_logits(teacher, preferred, reduction="none")
    return _row_means(divergence, _pairs(present).triu(diagonal=1))


def lambda_loss(scores: Tensor, own: Tensor, labels: Tensor) -> Tensor:
    """LambdaLoss, NDCG-Loss2++ (Wang et al., CIKM 2018): RankNet's pairs, weighted by what they do to nDCG.

        L_i = mean over k, l with y_ik > y_il of -w_ikl log2 s(z_ik - z_il),   s = sigmoid
        w_ikl = |G_k - G_l| (10 d(|r_k - r_l|) + |1/D(r_k) - 1/D(r_l)|),
        d(m) = 1/D(m) - 1/D(m+1),  D(r) = log2(1 + r),  G = (2^y - 1) / best DCG

    with r the rank, from 1, that the student gives a document among the row's own. The paper sums over pairs; the
    mean, which sentence-transformers' LambdaLoss takes too, does not grow with the number of documents.

    Example:
        Labels 1 and 0 in the right order by log 3, so s = 3/4; D = 1 and log2 3; the best DCG is 1.
        w = 11 (1 - 1 / log2 3), about 4.06, times -log2 3/4, about 0.415:

        >>> lambda_loss(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]]))
        tensor(1.6850)
    """
    z, _, present = _own_only(scores, own, labels)
    labels = labels.to(z.dtype).masked_fill(~present, 0)
    order = z.detach().masked_fill(~present, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks = order.argsort(dim=1) + 1

    def discount(rank: Tensor) -> Tensor:
        return 1 / torch.log2(1 + rank.to(z.dtype))

    gains = torch.exp2(labels) - 1
    best = gains.sort(dim=1, descending=True).values @ discount(torch.arange(1, z.shape[1] + 1, device=z.device))
    gains = gains / best.clamp(min=torch.finfo(z.dtype).tiny)[:, None]
    apart = _differences(ranks).abs().clamp(min=1)  # no document is compared with itself
    weights = 10 * (discount(apart) - discount(apart + 1)) + _differences(discount(ranks)).abs()
    losses = _differences(gains).abs() * weights * -logsigmoid(_differences(z)) / math.log(2)
    return _row_means(losses, (_differences(labels) > 0) & _pairs(present))


class Objective(NamedTuple):
    """A formula by name, for recipes."""

    function: Callable[..., Tensor]
    needs: tuple[str, ...]  # what it takes besides scores and own; "mask" = it sees the other rows' documents
    documents: int = 2  # the fewest own documents a row with which it learns something


OBJECTIVES = {
    "soft_info_nce": Objective(soft_info_nce, ("labels", "target_temperature", "mask")),
    "info_nce": Objective(info_nce, ("mask",), documents=1),
    "weighted_soft_info_nce": Objective(weighted_soft_info_nce, ("labels", "target_temperature", "mask")),
    "bixse": Objective(bixse, ("labels", "mask"), documents=1),
    "kl": Objective(kl, ("labels", "target_temperature")),
    "margin_mse": Objective(margin_mse, ("labels", "target_temperature")),
    "ranknet": Objective(ranknet, ("labels",)),
    "pairdistill": Objective(pairdistill, ("labels", "target_temperature")),
    "lambda_loss": Objective(lambda_loss, ("labels",)),
}


# --- parts of several objectives ------------------------------------------------------------------------------------


def soft_targets(labels: Tensor, target_temperature: float = 1.0, present: Tensor | None = None) -> Tensor:
    """The distribution over a row's own documents that its soft labels ask for: (B, n+1), each row summing to 1.

        t_k = softmax_k(logit(y_k) / target_temperature),   logit(y) = log(y / (1 - y))

    Labels of 0 and 1 are taken as the nearest float inside, so that one-hot labels give one-hot targets instead of
    inf - inf. A `target_temperature` below 1 sharpens the target, above 1 flattens it. Documents that are not
    `present` (B, n+1) have the target 0.

    Raises:
        ValueError: a label outside [0, 1] or NaN: raw teacher scores would train on nonsense without a word.

    Example:
        The odds 9, 1 and 1/9 sum to 91/9, so:

        >>> soft_targets(torch.tensor([[0.9, 0.5, 0.1]])) * 91
        tensor([[81.0000,  9.0000,  1.0000]])
    """
    if present is None:
        present = torch.ones_like(labels, dtype=torch.bool)
    logits = _logits(labels, present) / target_temperature
    lowest = torch.finfo(logits.dtype).min  # -inf would make rows without documents NaN
    return torch.softmax(logits.masked_fill(~present, lowest), dim=-1).masked_fill(~present, 0)


def cross_entropy_on_own(
    scores: Tensor, own: Tensor, targets: Tensor, mask: Tensor | None = None, log_weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy between a target on each row's own documents and the softmax over the documents of the batch.

        L_i = - sum_k t_ik log( exp(z_i,own(i,k)) / sum_{j not in M_i} w_ij exp(z_ij) ),   mean over rows

    with `targets` (B, n+1), each row summing to 1, M_i the `mask`, and `log_weights` (B, n+1), log w of own documents;
    all others have w = 1. A row's own documents are never masked: without them this would be no probability.
    """
    if own.shape != targets.shape:
        raise ValueError(f"targets {tuple(targets.shape)} and own {tuple(own.shape)} must have the same shape")
    scores = _at_least_float32(scores)
    columns, _ = _indexable(own)
    in_denominator = scores.masked_fill(~_seen(scores, own, mask), -torch.inf)
    if log_weights is not None:
        in_denominator = in_denominator.scatter_add(1, columns, log_weights.to(scores.dtype))
    log_probabilities = scores.gather(1, columns) - in_denominator.logsumexp(dim=1, keepdim=True)
    return -(targets.to(scores.dtype) * log_probabilities).sum(dim=1).mean()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _indexable(own: Tensor) -> tuple[Tensor, Tensor]:
    """Columns that can index, a missing document standing at its row's positive; and (B, n+1) bool: not missing."""
    present = own >= 0
    return torch.where(present, own, own[:, :1]), present


def _seen(scores: Tensor, own: Tensor, mask: Tensor | None) -> Tensor:
    """(B, D) bool: the documents that are not masked, and the row's own ones."""
    if own.shape[0] != scores.shape[0]:
        raise ValueError(f"own {tuple(own.shape)} must have one row for each row of scores {tuple(scores.shape)}")
    if mask is None:
        return torch.ones_like(scores, dtype=torch.bool)
    if mask.shape != scores.shape:
        raise ValueError(f"mask {tuple(mask.shape)} must have the shape of scores {tuple(scores.shape)}")
    return (~mask).scatter(1, _indexable(own)[0], True)


def _checked(labels: Tensor, present: Tensor) -> Tensor:
    if labels.shape != present.shape:
        raise ValueError(
            f"own {tuple(present.shape)} and labels {tuple(labels.shape)}: labels must have one row for each row of "
            "own and one column for each own document"
        )
    if not (((labels >= 0) & (labels <= 1)) | ~present).all():
        raise ValueError("soft labels must lie in [0, 1]; calibrate raw teacher scores before training on them")
    return _at_least_float32(labels)


def _logits(labels: Tensor, present: Tensor) -> Tensor:
    """log(y / (1 - y)) in float32 or better, 0 and 1 taken as the nearest float inside; 0 for missing documents."""
    labels = _checked(labels, present).masked_fill(~present, 0.5)
    return torch.logit(labels, eps=torch.finfo(labels.dtype).eps)


def _own_only(scores: Tensor, own: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, n+1) each: the student's scores of the own documents, the teacher's logits, and which are present."""
    columns, present = _indexable(own)
    return _at_least_float32(scores).gather(1, columns), _logits(labels, present), present


def _differences(values: Tensor) -> Tensor:
    """(B, n+1) -> (B, n+1, n+1): value k - value l."""
    return values[:, :, None] - values[:, None, :]


def _pairs(present: Tensor) -> Tensor:
    """(B, n+1, n+1) bool: both documents are present."""
    return present[:, :, None] & present[:, None, :]


def _row_means(values: Tensor, counted: Tensor) -> Tensor:
    """The mean over rows of the mean of each row's counted values; a row without any has 0."""
    sums = values.masked_fill(~counted, 0).flatten(start_dim=1).sum(dim=1)
    return (sums / counted.flatten(start_dim=1).sum(dim=1).clamp(min=1)).mean()
