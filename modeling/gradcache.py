"""GradCache that keeps the graphs of as many mini-batches as memory has room for, and recomputes the others alone.

GradCache (arXiv 2101.06983) embeds all texts without graphs, then, once the loss has given the gradients of their
vectors, mini-batch by mini-batch a second time with one: 6 FLOP a weight and token in a LoRA step instead of 4. A
graph that is kept from the first pass needs no second one. Both passes make the same graph out of the same random
numbers, and the second goes through the mini-batches in the same order: gradients do not depend on what was kept.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

AUTO = 0.5  # of the memory that is free when a step begins: the allocator needs room, and others may ask for some


class KeepingLossMixin(CachedLossMixin):
    """`CachedLossMixin` whose first pass keeps graphs in `activation_memory` bytes; None is AUTO, 0 keeps none.

    The first mini-batches' are kept, which the second pass begins with, so they are used and freed before it makes one
    of its own. It needs room for one anyway: so the very first is kept, whatever its size, if any are to be.
    Under DDP the mini-batch that starts the exchange of gradients is recomputed always.
    """

    mini_batch_size: int | None  # of texts; None is one plain pass
    activation_memory: int | None = 0
    _room = 0  # bytes in which this step may keep graphs; 0 once they are full
    _used = 0  # bytes of graphs kept in this step
    _per_token = 0.0  # bytes of a graph, the most so far

    @property
    def uses_gradient_cache(self) -> bool:
        return self.mini_batch_size is not None

    def forward_cached(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        columns = list(sentence_features)
        self._used, self._room = 0, self.activation_memory
        if self._room is None:
            self._room = int(AUTO * free_memory(columns[0]["input_ids"].device))
        return super().forward_cached(columns, labels)

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Tensor],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        arguments = {"copy_random_state": copy_random_state, "random_state": random_state}
        if with_grad:  # second pass
            kept = vars(random_state).pop("kept", None)
            if kept is not None and not _exchanges_gradients(self.model):
                return kept, random_state
            del kept
        tokens = _tokens(sentence_feature, begin, end)
        if self._used and self._used + self._per_token * tokens > self._room:
            self._room = 0
        if with_grad or not copy_random_state or not self._room:
            return super().embed_minibatch(sentence_feature, begin, end, with_grad, **arguments)
        with _no_exchange(self.model), saved_bytes(self.model) as sizes:
            kept, state = super().embed_minibatch(sentence_feature, begin, end, True, **arguments)
        state.kept = kept
        size = sum(sizes.values())
        self._used += size
        self._per_token = max(self._per_token, size / tokens)
        return kept, state


@contextlib.contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes by storage of what autograd saves for the backward pass, the weights of `model` left out.

    >>> layer = nn.Linear(2, 3)
    >>> with saved_bytes(layer) as sizes:
    ...     kept = layer(torch.ones(5, 2)).exp()
    >>> sorted(sizes.values())  # 5 x 2 and 5 x 3 numbers of 4 bytes
    [40, 60]
    """
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        yield sizes


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still take on `device`; of a CPU's its share, where several processes train."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    free = min(psutil.virtual_memory().available, _container_free())
    return int(free / int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _container_free(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes up to the limit of a container, or of the control group of any other process; no limit is inf."""
    try:
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no such limit, or the word `max`
        return math.inf
    return max(limit - used, 0)


def _tokens(features: dict[str, Any], begin: int, end: int) -> int:
    if "cu_seq_lens_q" in features:
        return int(features["cu_seq_lens_q"][begin : end + 1].diff().sum())
    return int(features["attention_mask"][begin:end].sum())


def _bare(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # of torch.compile


def _exchanges_gradients(model: nn.Module) -> bool:
    """Whether the next backward pass does: DDP has to see its forward pass."""
    return isinstance(_bare(model), DistributedDataParallel) and _bare(model).require_backward_grad_sync


def _no_exchange(model: nn.Module) -> contextlib.AbstractContextManager:
    """A forward pass within it has DDP prepare nothing."""
    return _bare(model).no_sync() if isinstance(_bare(model), DistributedDataParallel) else contextlib.nullcontext()
