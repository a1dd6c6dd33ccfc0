"""Training objectives as pure functions on tensors: one formula each, with its source.

Shapes: B rows (queries), D documents of the whole batch, n negatives a row. Scores are similarities divided by the
temperature already.
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_targets(labels: Tensor, target_temperature: float = 1.0) -> Tensor:
    """The distribution over a row's own documents that its soft labels ask for.

        t_k = softmax_k(logit(y_k) / target_temperature),   logit(y) = log(y / (1 - y))

    Args:
        labels: (B, n+1) soft labels in [0, 1]. 0 and 1 are taken as the nearest float inside, so that one-hot labels
            give one-hot targets (at target_temperature 1, to within the rounding of the dtype) instead of inf - inf.
        target_temperature: > 0; below 1 sharpens the target, above 1 flattens it.

    Returns:
        (B, n+1) targets, each row summing to 1, in float32 or better.

    Raises:
        ValueError: a label outside [0, 1] or NaN: raw teacher scores would train on nonsense without a word.

    Example:
        The odds 9, 1 and 1/9 sum to 91/9, so:

        >>> soft_targets(torch.tensor([[0.9, 0.5, 0.1]])) * 91
        tensor([[81.0000,  9.0000,  1.0000]])
    """
    if not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError("soft labels must lie in [0, 1]; calibrate raw teacher scores before training on them")
    labels = labels.to(torch.promote_types(labels.dtype, torch.float32))
    logits = torch.logit(labels, eps=torch.finfo(labels.dtype).eps)
    return torch.softmax(logits / target_temperature, dim=-1)


def cross_entropy_on_own(scores: Tensor, own: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy between a target on each row's own documents and the softmax over the documents of the batch.

        L_i = - sum_k t_ik log( exp(z_i,own(i,k)) / sum_{j not in M_i} exp(z_ij) ),   mean over rows

    Args:
        scores: (B, D) similarities / temperature.
        own: (B, n+1) integer columns of each row's own documents, positive first.
        targets: (B, n+1), each row summing to 1.
        mask: optional (B, D) bool, True = leave out of the denominator (M_i). A row's own documents always stay in:
            without them the fraction above would not be a probability.

    Returns:
        Scalar, in the dtype of `scores` but never below float32.
    """
    if own.shape != targets.shape or own.shape[0] != scores.shape[0]:
        raise ValueError(
            f"scores {tuple(scores.shape)}, own {tuple(own.shape)} and targets or labels {tuple(targets.shape)}: "
            "own and labels must have one row for each row of scores and one column for each own document"
        )
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    in_denominator = scores
    if mask is not None:
        if mask.shape != scores.shape:
            raise ValueError(f"mask {tuple(mask.shape)} must have the shape of scores {tuple(scores.shape)}")
        in_denominator = scores.masked_fill(mask.scatter(1, own, False), -torch.inf)
    log_probabilities = scores.gather(1, own) - in_denominator.logsumexp(dim=1, keepdim=True)
    return -(targets.to(scores.dtype) * log_probabilities).sum(dim=1).mean()


def info_nce(scores: Tensor, own: Tensor, mask: Tensor | None = None) -> Tensor:
    """InfoNCE (arXiv 1807.03748) with in-batch and hard negatives: all target mass on the positive, `own[:, 0]`.

    Arguments as in `cross_entropy_on_own`. Equals sentence-transformers' MultipleNegativesRankingLoss without a mask.
    """
    targets = torch.zeros_like(own, dtype=scores.dtype)
    targets[:, 0] = 1
    return cross_entropy_on_own(scores, own, targets, mask)


def soft_info_nce(
    scores: Tensor,
    own: Tensor,
    labels: Tensor,
    target_temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """InfoNCE whose target is made of soft labels: `cross_entropy_on_own` with the targets of `soft_targets`.

    The target is spread over the row's own documents only; the documents of other rows are negatives, as in InfoNCE.
    One-hot labels give `info_nce`.

    Args:
        scores: (B, D) student similarities / temperature over all D documents.
        own: (B, n+1) columns of each row's own documents, positive first.
        labels: (B, n+1) soft labels in (0, 1), same order.
        target_temperature: temperature of the target softmax, > 0.
        mask: optional (B, D) bool, True = leave out of the denominator; own documents always stay in.

    Returns:
        Scalar loss, mean over rows.

    Example:
        One row, two own documents with labels 0.8 and 0.5 (odds 4 and 1, so targets 0.8 and 0.2) and equal scores:
        the loss is log 2; one foreign document with the same score makes it log 3, masking that one log 2 again.

        >>> own, labels = torch.tensor([[0, 1]]), torch.tensor([[0.8, 0.5]])
        >>> soft_info_nce(torch.zeros(1, 2), own, labels).exp()
        tensor(2.)
        >>> soft_info_nce(torch.zeros(1, 3), own, labels, mask=torch.tensor([[False, False, True]])).exp()
        tensor(2.)
    """
    return cross_entropy_on_own(scores, own, soft_targets(labels, target_temperature), mask)
