"""Losses for sentence-transformers' trainer: thin modules over `modeling.objectives`."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.base.losses.merged_forward import embed_columns, merge_feature_batches
from torch import Tensor, nn
from torch.nn.functional import normalize

from modeling.objectives import info_nce, soft_info_nce

Features = dict[str, Any]  # what a column's texts become in the collator: input_ids, attention_mask, ...


class SoftInfoNCELoss(CachedLossMixin, nn.Module):
    """Soft InfoNCE over graded rows (query, positive, negative_1, ..., negative_n, label).

    Scores are cosines / temperature against every document of the batch. Documents of other rows that are known to be
    no negatives are left out of a row's denominator: those with the same text as one of the row's own documents, and
    the positives of rows with the same query. Texts are compared as the model sees them, that is as token ids.

    Args:
        model: the SentenceTransformer to train.
        temperature: divides the cosines; 0.02 is what most LLM embedders train with.
        mini_batch_size: texts embedded at a time. None runs one plain forward and backward pass. A number turns on
            GradCache: one forward pass more, but memory for this many texts only. Documents are then sorted by length
            first, so that a mini-batch holds texts of like length and next to no padding.
        target_temperature: see `modeling.objectives.soft_targets`.
        alpha: weight of soft InfoNCE; 1 - alpha is that of InfoNCE on the positive. 0 is InfoNCE alone and needs no
            labels.

    References:
        InfoNCE: arXiv 1807.03748. GradCache: arXiv 2101.06983.

    Inputs:
        +-------------------------------------------------+------------------------------+
        | Inputs                                          | Labels                       |
        +=================================================+==============================+
        | (query, positive, negative_1, ..., negative_n)  | (B, n+1) soft labels in (0,1)|
        +-------------------------------------------------+------------------------------+

    Relations:
        With one-hot labels, or alpha=0, and no duplicates in the batch it equals (Cached)MultipleNegativesRankingLoss.
        A row with a single document has the target 1 whatever its label: graded pairs want CoSENTLoss.
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 0.02,
        mini_batch_size: int | None = None,
        target_temperature: float = 1.0,
        alpha: float = 1.0,
    ) -> None:
        super().__init__()
        if temperature <= 0 or target_temperature <= 0:
            raise ValueError(f"temperatures must be > 0, got {temperature} and {target_temperature}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
        if mini_batch_size is not None and mini_batch_size < 1:
            raise ValueError(f"mini_batch_size must be None or at least 1, got {mini_batch_size}")
        self.model = model
        self.temperature = temperature
        self.mini_batch_size = mini_batch_size
        self.target_temperature = target_temperature
        self.alpha = alpha
        self.uses_gradient_cache = mini_batch_size is not None

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        columns = [dict(column) for column in sentence_features]
        self._check(columns, labels)
        queries = text_keys(columns[0])
        documents = torch.cat([text_keys(column) for column in columns[1:]])
        if self.uses_gradient_cache:
            columns, order = sort_by_length(columns)
            return self.forward_cached(columns, _Batch(labels, queries, documents, order))
        embeddings = [[column] for column in embed_columns(self.model, columns)]
        return self.calculate_loss(embeddings, _Batch(labels, queries, documents))

    def calculate_loss(self, reps: list[list[Tensor]], labels: _Batch, *, with_backward: bool = False) -> Tensor:
        """The loss over the whole batch, over chunks of `mini_batch_size` rows of the score matrix.

        `reps[0]` are the embeddings of the queries; those of the documents follow, put into their order (all first
        documents of the rows, then all second ones, ...) by `labels.order`.
        """
        batch = labels
        queries = torch.cat(reps[0])
        documents = torch.cat([embeddings for column in reps[1:] for embeddings in column])
        if batch.order is not None:
            documents = documents[batch.order]
        rows = len(queries)
        own = torch.arange(len(documents), device=documents.device).view(-1, rows).T
        chunk = self.mini_batch_size or rows
        total = queries.new_zeros((), dtype=torch.float32)
        # bfloat16 keeps 8 bits of a cosine: at temperature 0.02 an error of 0.1 in the exponent
        with torch.autocast(queries.device.type, enabled=False):
            document_directions = normalize(documents.float(), dim=1)
            for begin in range(0, rows, chunk):
                part = slice(begin, begin + chunk)
                scores = normalize(queries[part].float(), dim=1) @ document_directions.T / self.temperature
                mask = known_relevant(batch.queries, batch.documents, part)
                loss = self._objective(scores, own[part], batch.labels, part, mask) * (len(scores) / rows)
                if with_backward:
                    # the normalised documents are shared by all chunks
                    loss.backward(retain_graph=begin + chunk < rows)
                    loss = loss.detach()
                total = total + loss
        return total

    def _objective(self, scores: Tensor, own: Tensor, labels: Tensor | None, part: slice, mask: Tensor) -> Tensor:
        soft = hard = scores.new_zeros(())
        if self.alpha > 0:
            soft = soft_info_nce(scores, own, labels[part], self.target_temperature, mask)
        if self.alpha < 1:
            hard = info_nce(scores, own, mask)
        return self.alpha * soft + (1 - self.alpha) * hard

    def _check(self, columns: list[Features], labels: Tensor | None) -> None:
        if len(columns) < 2:
            raise ValueError(f"expected a query and at least one document column, got {len(columns)} column(s)")
        if self.alpha == 0:
            return
        if len(columns) == 2:
            raise ValueError(
                "soft labels say nothing about a row with one document: its target is 1 whatever the label. "
                "Add negatives, or train graded pairs with CoSENTLoss"
            )
        if labels is None or labels.ndim != 2 or labels.shape[1] != len(columns) - 1:
            shape = None if labels is None else tuple(labels.shape)
            raise ValueError(f"expected {len(columns) - 1} soft labels a row, one a document, got labels {shape}")

    def get_config_dict(self) -> dict[str, Any]:
        """What sentence-transformers' model cards tell about the loss."""
        names = ("temperature", "mini_batch_size", "target_temperature", "alpha")
        return {name: getattr(self, name) for name in names}


class _Batch(NamedTuple):
    """What the loss knows about a batch besides its embeddings. N = B * (n+1) documents."""

    labels: Tensor | None  # (B, n+1)
    queries: Tensor  # (B,) text keys
    documents: Tensor  # (N,) text keys
    order: Tensor | None = None  # (N,): embedding order[j] belongs to document j; None = they are in order


def text_keys(features: Features) -> Tensor:
    """(B,) int64: equal for texts of equal token ids, whatever the padding; equal for others by a rare chance only.

    A multilinear hash modulo 2^64 with fixed random multipliers, one a position: it costs one pass over the ids, no
    copy to the host, and works on padded and on flattened (flash attention) inputs alike.
    """
    ids = features["input_ids"]
    multipliers = _multipliers(ids.device)
    if "attention_mask" in features:
        present = features["attention_mask"].long()
        positions = (present.cumsum(dim=1) - 1) % len(multipliers)
        return ((ids + 1) * multipliers[positions] * present).sum(dim=1)
    bounds = features["cu_seq_lens_q"].long()
    starts = bounds[:-1].repeat_interleave(bounds.diff())
    positions = (torch.arange(ids.shape[-1], device=ids.device) - starts) % len(multipliers)
    sums = ((ids.flatten() + 1) * multipliers[positions]).cumsum(dim=0)
    return torch.cat([sums.new_zeros(1), sums])[bounds].diff()


@functools.cache
def _multipliers(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (32768,), generator=generator).to(device)


def known_relevant(queries: Tensor, documents: Tensor, rows: slice) -> Tensor:
    """(len(rows), N) bool: documents of the batch that are not to count as negatives of these rows.

    True where the text is that of one of the row's own documents, or that of the positive of a row with the same
    query (a query with several labelled positives makes several rows).

    Args:
        queries: (B,) text keys.
        documents: (N,) text keys: the B first documents of the rows (positives), the B second ones, ...
        rows: which rows of the batch.
    """
    batch = len(queries)
    texts, document_ids = documents.unique(return_inverse=True)
    distinct, query_ids = queries.unique(return_inverse=True)
    positives = torch.zeros(len(distinct), len(texts), dtype=torch.bool, device=documents.device)
    positives[query_ids, document_ids[:batch]] = True
    relevant = positives[query_ids[rows]].scatter_(1, document_ids.view(-1, batch).T[rows], True)
    return relevant[:, document_ids]


def sort_by_length(columns: list[Features]) -> tuple[list[Features], Tensor | None]:
    """The query column, and all document columns as one that is sorted by length, longest first.

    GradCache cuts columns into mini-batches and trims the padding that a whole mini-batch shares, which is little
    unless its texts are of like length. Gradients do not depend on the order. The queries keep theirs: they are few
    and alike. So do columns that cannot be merged, such as those flattened for flash attention, which have no padding.

    Returns:
        ([queries, documents], order): embedding order[j] is that of document j of the columns laid end to end. Or, if
        the documents stay as they are, (columns, None).
    """
    documents = merge_feature_batches(columns[1:])
    if documents is None:
        return columns, None
    by_length = documents["attention_mask"].sum(dim=1).argsort(descending=True, stable=True)
    count = len(by_length)
    by_rows = {
        key: value[by_length] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
        for key, value in documents.items()
    }
    return [columns[0], by_rows], by_length.argsort()
