"""Losses for sentence-transformers' trainer: thin modules over `modeling.objectives`."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns, merge_feature_batches
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from sentence_transformers.util.distributed import all_gather, get_rank
from torch import Tensor, nn
from torch.nn.functional import normalize

from modeling.gradcache import KeepingLossMixin
from modeling.objectives import OBJECTIVES

Features = dict[str, Any]  # what a column's texts become in the collator: input_ids, attention_mask, ...


class GradedLoss(KeepingLossMixin, nn.Module):
    """An objective of `modeling.objectives` over rows of query, positive, negative_1, ..., negative_n, and labels
    (B, n+1): soft labels in (0, 1), NaN where a document (then an empty text) is missing.

    Scores are cosines / temperature. A row is compared with its own documents and, by objectives that take a `mask`,
    with those of the other rows, less those known to be no negatives: equal texts, positives of rows with the same
    query, and the query's known positives (`POSITIVES`, which modeling.demonstrations' collator adds). Texts are
    compared as the model sees them, as token ids. Graded pairs (one document a row) want CoSENT, or "bixse".

    Args:
        model: the SentenceTransformer to train.
        objective: a name in `OBJECTIVES`.
        temperature: divides the cosines; 0.02 is what most LLM embedders train with.
        mini_batch_size: texts embedded at a time, by GradCache (arXiv 2101.06983): one forward pass more, memory for
            so many texts only. Documents are sorted by length first, so that a mini-batch holds next to no padding.
            None = one plain pass.
        activation_memory: bytes in which GradCache keeps graphs, whose texts need no second forward pass; None = half
            of what is free when a step begins.
        target_temperature: divides the teacher's logits, in the objectives that read more than their order.
        alpha: weight of the objective against 1 - alpha of InfoNCE; 0 is InfoNCE alone, and needs no labels.
        in_batch_negatives: False leaves all documents of other rows out: classification and clustering need it, where
            rows with the same label are no negatives.
        false_negative_margin: leave out documents of other rows whose cosine exceeds that of the row's positive by
            more than this (Qwen3 Embedding, arXiv 2506.05176, eq. 2, with 0.1). The model in training is the judge, so
            the line lies above the positive: below it the hard negatives that are still to be learnt would go first.
        gather_across_devices: in-batch negatives of all processes, which need equal numbers of rows and columns. With
            DDP's average of gradients the loss is that of one process with all rows.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: str = "soft_info_nce",
        *,
        temperature: float = 0.02,
        mini_batch_size: int | None = None,
        activation_memory: int | None = 0,
        target_temperature: float = 1.0,
        alpha: float = 1.0,
        in_batch_negatives: bool = True,
        false_negative_margin: float | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
        if min(temperature, target_temperature) <= 0 or not 0 <= alpha <= 1:
            raise ValueError(
                f"temperatures must be > 0, got {temperature} and {target_temperature}; alpha in [0, 1], got {alpha}"
            )
        self.model = model
        self.objective = objective
        self.temperature = temperature
        self.mini_batch_size = mini_batch_size
        self.activation_memory = activation_memory
        self.target_temperature = target_temperature
        self.alpha = alpha
        self.in_batch_negatives = in_batch_negatives
        self.false_negative_margin = false_negative_margin
        self.gather_across_devices = gather_across_devices

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        columns = [dict(column) for column in sentence_features]
        positives = columns[0].pop(POSITIVES, None)
        self._check(columns, labels)
        batch = self._batch(columns, labels, positives)
        if self.uses_gradient_cache:
            columns, order = sort_by_length(columns)
            return self.forward_cached(columns, batch._replace(order=order))
        return self.calculate_loss([[column] for column in embed_columns(self.model, columns)], batch)

    def calculate_loss(self, reps: list[list[Tensor]], labels: _Batch, *, with_backward: bool = False) -> Tensor:
        """The loss over the whole batch, over chunks of `mini_batch_size` rows of the score matrix.

        `reps[0]` are the embeddings of the queries; those of the documents follow, put into their order (all first
        documents of the rows, then all second ones, ...) by `labels.order`.
        """
        batch = labels
        # bfloat16 keeps 8 bits of a cosine: at temperature 0.02 a logit would be off by 0.1
        with torch.autocast(reps[0][0].device.type, enabled=False):
            graph = queries, documents = self._directions(reps, batch)
            if with_backward:
                # chunks share all documents: their gradients are summed here, then go on, and between devices, once
                queries, documents = (directions.detach().requires_grad_() for directions in graph)
            rows = len(queries)
            chunk = self.mini_batch_size or rows
            total = queries.new_zeros(())
            for begin in range(0, rows, chunk):
                part = slice(begin, begin + chunk)
                scores = queries[part] @ documents.T / self.temperature
                loss = self._objective(scores, batch, part) * (len(scores) / rows)
                if with_backward:
                    loss.backward()
                    loss = loss.detach()
                total = total + loss
            if with_backward:
                torch.autograd.backward(graph, (queries.grad, documents.grad))
        return total

    def _batch(self, columns: list[Features], labels: Tensor | None, positives: Tensor | None) -> _Batch:
        queries = text_keys(columns[0])
        documents = torch.stack([text_keys(column) for column in columns[1:]])
        missing = torch.zeros_like(documents, dtype=torch.bool)
        if labels is not None and labels.shape == documents.T.shape:
            missing = labels.isnan().T
            if missing[0].any():
                raise ValueError("the first label of a row is NaN: its positive is missing; drop the row")
        documents = documents.masked_fill(missing, MISSING)
        rows, first = len(queries), 0
        if self._gathers:
            _check_alike(documents)
            queries, documents = all_gather(queries), self._gathered(documents.flatten(), rows)
            first = get_rank() * rows
        documents, here = documents.flatten(), slice(first, first + rows)
        own = torch.arange(len(documents), device=documents.device).view(-1, len(queries)).T[here]
        mask = None
        if self._sees_batch:
            mask = known_relevant(queries, documents, here, positives) | (documents == MISSING)
            mask |= not self.in_batch_negatives
        return _Batch(labels, own.masked_fill(missing.T, -1), mask)

    def _directions(self, reps: list[list[Tensor]], batch: _Batch) -> tuple[Tensor, Tensor]:
        """Unit vectors, float32: (B, dim) of the queries, and (N, dim) of the documents, in their order."""
        queries = torch.cat(reps[0])
        documents = torch.cat([embeddings for column in reps[1:] for embeddings in column])
        if batch.order is not None:
            documents = documents[batch.order]
        documents = normalize(documents.float(), dim=1)
        if self._gathers:
            documents = self._gathered(documents, len(queries), with_grad=True)
        return normalize(queries.float(), dim=1), documents

    def _objective(self, scores: Tensor, batch: _Batch, part: slice) -> Tensor:
        """The mean over rows `part` of the batch, alpha of the objective and 1 - alpha of InfoNCE."""
        own, mask = batch.own[part], None if batch.mask is None else batch.mask[part]
        if mask is not None and self.false_negative_margin is not None:
            mask = mask | (scores > scores.gather(1, own[:, :1]) + self.false_negative_margin / self.temperature)
        labels = None if batch.labels is None else batch.labels[part]
        settings = {"labels": labels, "target_temperature": self.target_temperature, "mask": mask}

        def value(name: str) -> Tensor:
            objective = OBJECTIVES[name]
            return objective.function(scores, own, **{need: settings[need] for need in objective.needs})

        if self.alpha == 1:
            return value(self.objective)
        if self.alpha == 0:
            return value("info_nce")
        return self.alpha * value(self.objective) + (1 - self.alpha) * value("info_nce")

    @property
    def _sees_batch(self) -> bool:
        return self.alpha < 1 or "mask" in OBJECTIVES[self.objective].needs

    @property
    def _gathers(self) -> bool:
        return self.gather_across_devices and self.in_batch_negatives and self._sees_batch

    @staticmethod
    def _gathered(documents: Tensor, rows: int, with_grad: bool = False) -> Tensor:
        """(N, ...) of all processes, in the order of one batch of all their rows."""
        by_process = all_gather(documents, with_grad=with_grad).unflatten(0, (-1, len(documents) // rows, rows))
        return by_process.transpose(0, 1).flatten(end_dim=2)

    def _check(self, columns: list[Features], labels: Tensor | None) -> None:
        documents = len(columns) - 1
        if documents < 1:
            raise ValueError(f"expected a query and at least one document column, got {len(columns)} column(s)")
        objective = OBJECTIVES[self.objective]
        if self.alpha > 0 and documents < objective.documents:
            raise ValueError(
                f"{self.objective} learns nothing from the label of a row with one document: it compares documents. "
                "Add negatives, or train graded pairs with CoSENTLoss"
            )
        if self.alpha > 0 and "labels" in objective.needs and (labels is None or labels.shape[1:] != (documents,)):
            shape = None if labels is None else tuple(labels.shape)
            raise ValueError(f"expected {documents} soft labels a row, one a document, got labels {shape}")


class SoftInfoNCELoss(GradedLoss):
    """`GradedLoss` with soft InfoNCE, or, with alpha=0, with InfoNCE."""

    def __init__(
        self, model: nn.Module, temperature: float = 0.02, mini_batch_size: int | None = None, **settings: Any
    ) -> None:
        super().__init__(model, temperature=temperature, mini_batch_size=mini_batch_size, **settings)


class CachedCoSENTLoss(KeepingLossMixin, CoSENTLoss):
    """sentence-transformers' CoSENTLoss over graded pairs, with GradCache (`mini_batch_size` texts at a time, graphs
    kept in `activation_memory` bytes, as in `GradedLoss`; None = one plain pass), and over the pairs of all processes,
    equal numbers of them: each computes the loss of one process with all pairs. `scale` multiplies the cosines:
    1 / temperature.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        *,
        mini_batch_size: int | None = None,
        activation_memory: int | None = 0,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(model, scale)
        self.mini_batch_size = mini_batch_size
        self.activation_memory = activation_memory
        self.gather_across_devices = gather_across_devices

    def forward(self, sentence_features: Iterable[Features], labels: Tensor) -> Tensor:
        if self.uses_gradient_cache:
            return self.forward_cached(sentence_features, labels)
        return super().forward(sentence_features, labels)

    def calculate_loss(self, reps: list[list[Tensor]], labels: Tensor, *, with_backward: bool = False) -> Tensor:
        loss = self.compute_loss_from_embeddings([torch.cat(column) for column in reps], labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        if self.gather_across_devices:
            _check_alike(labels.view(1, -1))
            embeddings = [all_gather(column, with_grad=True) for column in embeddings]
            labels = all_gather(labels)
        return super().compute_loss_from_embeddings(embeddings, labels)


class _Batch(NamedTuple):
    """What the loss knows of a batch besides embeddings: B rows of this process, N documents of all gathered rows,
    first documents of all rows, then second ones, ...
    """

    labels: Tensor | None  # (B, n+1)
    own: Tensor  # (B, n+1) own documents of the rows here, -1 where there is none
    mask: Tensor | None  # (B, N) bool: no negatives of these rows; None where the rows' own documents alone are seen
    order: Tensor | None = None  # (B * (n+1),): embedding order[j] is document j of the rows here; None = in order


MISSING = -(2**63)  # the text key of a missing document
POSITIVES = "known_positives"  # the feature of the query column that holds text keys of the query's known positives


def _check_alike(documents: Tensor) -> None:
    """Raise on all processes where shapes differ, instead of waiting for ever. documents: (n+1, B)."""
    shapes = all_gather(torch.tensor([documents.shape], device=documents.device))
    if (shapes != shapes[0]).any():
        raise ValueError(
            f"gather_across_devices: processes hold (documents a row, rows) {shapes.tolist()}; they must be equal. "
            "Draw a step's batches from one data set on all processes"
        )


def text_keys(features: Features) -> Tensor:
    """(B,) int64 hashes of each text's token ids, whatever the padding; features may be flattened (flash attention).

    A multilinear hash modulo 2^64 with fixed random multipliers, one a position: no copy to the host.
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


def known_relevant(queries: Tensor, documents: Tensor, rows: slice, positives: Tensor | None = None) -> Tensor:
    """(len(rows), N) bool: documents of the batch that are not to count as negatives of these rows.

    True where the text is that of one of the row's own documents, of the positive of a row with the same query, or of
    a known positive of the query.

    Args:
        queries: (B,) text keys.
        documents: (N,) text keys: the B first documents of the rows (positives), the B second ones, ...
        rows: which rows of the batch.
        positives: (len(rows), P) text keys, whether they are in the batch or not; MISSING for none.
    """
    batch = len(queries)
    texts, document_ids = documents.unique(return_inverse=True)
    distinct, query_ids = queries.unique(return_inverse=True)
    relevant = torch.zeros(len(distinct), len(texts), dtype=torch.bool, device=documents.device)
    relevant[query_ids, document_ids[:batch]] = True
    relevant = relevant[query_ids[rows]].scatter_(1, document_ids.view(-1, batch).T[rows], True)
    if positives is not None:
        places = torch.searchsorted(texts, positives).clamp(max=len(texts) - 1)
        row, column = (texts[places] == positives).nonzero(as_tuple=True)
        relevant[row, places[row, column]] = True
    return relevant[:, document_ids]


def sort_by_length(columns: list[Features]) -> tuple[list[Features], Tensor | None]:
    """The query column, and all document columns as one that is sorted by length, longest first.

    GradCache trims the padding that a whole mini-batch shares: next to all of it, where lengths are alike. Queries
    keep their order: they are few and alike. So do columns that cannot be merged, such as those flattened for flash
    attention, which have no padding.

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
