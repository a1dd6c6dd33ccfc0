"""Where the tokens of a packed row lie, and attention over it: by definition, and both ways of computing it."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling import shared_prefix
from modeling.packing import Packing, Prefix, pack


def batch_of(texts, layout="right"):
    if layout == "flattened":
        bounds = torch.tensor([0, *map(len, texts)]).cumsum(0)
        return {"input_ids": torch.tensor([[*itertools.chain(*texts)]]), "cu_seq_lens_q": bounds}
    width = max(map(len, texts))
    fill = [[0] * (width - len(text)) for text in texts]
    rows = [[*text, *pad] if layout == "right" else [*pad, *text] for text, pad in zip(texts, fill, strict=True)]
    return {"input_ids": torch.tensor(rows), "attention_mask": (torch.tensor(rows) > 0).long()}


def in_common(longest, texts, other):
    """How many tokens, of at least 8, all texts share with `other`, before the last token of each."""
    count = 0
    while count < longest and all(len(text) > count + 1 and text[count] == other[count] for text in texts):
        count += 1
    return count if count >= 8 else 0


def row_of(prefix, texts):
    """The distinct texts in their order, after a prefix: of each what it does not share with the one before it."""
    row, last = texts[0][:prefix], []
    for text in sorted(texts):
        shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(last, text, strict=False))))
        if text != last:
            row = row + text[shared if shared >= prefix + 2 else prefix :]
        last = text
    return row


TOKENS = st.lists(st.integers(1, 2), max_size=20)
RESTS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=6)


@given(head=TOKENS, rests=RESTS, layout=st.sampled_from(["right", "left", "flattened"]))
def test_a_packed_row_holds_each_text_once_and_gives_every_batch_back(head, rests, layout):
    texts = [head + rest for rest in rests]
    batch = batch_of(texts, layout)
    present = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    packing = pack(batch)
    common = in_common(99, texts, texts[0]) if len({*map(tuple, texts)}) > 1 else 0
    if packing is None:
        assert layout != "flattened" and len(row_of(common, texts)) == batch["input_ids"].numel()
        return
    row = packing.ids
    assert row.tolist() == row_of(common, texts)
    assert packing.longest == max(map(len, texts))
    assert torch.equal(row[packing.places][present], batch["input_ids"][present])
    positions = packing.positions[packing.places][present]
    assert positions.tolist() == [place for text in texts for place in range(len(text))]
    if layout != "flattened":
        assert row[pack(batch, last_only=True).places].tolist() == [[text[-1]] for text in texts]


@given(kept=TOKENS, head=TOKENS, rests=RESTS, data=st.data())
def test_what_is_kept_is_not_computed_again(kept, head, rests, data):
    """The kept ids and those of the row, put back together, are what the batch would be without anything kept."""
    head = kept[: data.draw(st.integers(0, len(kept)))] + head
    texts = [head + rest for rest in rests]
    batch = batch_of(texts)
    packing = pack(batch, kept=Prefix(torch.tensor(kept, dtype=torch.long)), keeping=True)
    if packing is None:
        return
    row = [*kept[: packing.known], *packing.ids.tolist()]
    assert row == row_of(packing.prefix, texts)
    assert packing.known == in_common(len(kept), texts, kept)
    assert packing.positions[: packing.new].tolist() == list(range(packing.known, packing.prefix))
    assert (packing.keeps is not None) == (packing.new > 0)
    if packing.keeps:
        assert packing.new >= 8 and packing.keeps.ids.tolist() == texts[0][: packing.prefix]


def reference_varlen(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """torch's varlen_attn by its documentation: the last query of a sequence sees up to its last key."""
    assert enable_gqa and window_size[1] == 0
    states = []
    for i in range(len(cu_q) - 1):
        q, k, v = query[cu_q[i] : cu_q[i + 1]], key[cu_k[i] : cu_k[i + 1]], value[cu_k[i] : cu_k[i + 1]]
        assert 0 < len(q) <= max_q and len(k) <= max_k
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        visible = (distance >= 0) & ((window_size[0] < 0) | (distance <= window_size[0]))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        states.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(dim=-1), v))
    return torch.cat(states)


@pytest.mark.parametrize(("prefix", "known"), [(0, 0), (9, 0), (9, 4), (9, 9)])
@pytest.mark.parametrize("window", [None, 3, 10])
def test_both_attentions_are_the_same(monkeypatch, prefix, known, window):
    """That for CUDA with a reference in the place of its kernel: there is no GPU here."""
    monkeypatch.setattr(shared_prefix, "varlen_attn", reference_varlen)
    generator = torch.Generator().manual_seed(0)
    heads = {"query": 4, "key": 2, "value": 2}
    parts = {name: torch.randn(1, n, prefix + 12, 8, generator=generator) for name, n in heads.items()}
    parts = {name: part.requires_grad_() for name, part in parts.items()}
    lengths = [0, 2, 5, 0], [2, 7, 1, 2]  # of what is shared with the text before, and of the rest
    packing = Packing(prefix, *lengths, None, None, None)
    whole = shared_prefix._attention_by_text(*parts.values(), packing, 0.3, window)
    parts["query"] = parts["query"][:, :, known:]
    packing = Packing(prefix, *lengths, None, None, None, known)
    by_text = shared_prefix._attention_by_text(*parts.values(), packing, 0.3, window)
    varlen = shared_prefix._varlen_attention(*parts.values(), packing, 0.3, window)
    torch.testing.assert_close(by_text, whole[:, known:], rtol=0, atol=1e-5)
    torch.testing.assert_close(varlen, by_text, rtol=0, atol=1e-5)
    along = torch.randn(by_text.shape, generator=generator)
    expected = torch.autograd.grad(by_text, list(parts.values()), along)
    for found, other in zip(torch.autograd.grad(varlen, list(parts.values()), along), expected, strict=True):
        assert other.norm() > 0.1
        torch.testing.assert_close(found, other, rtol=0, atol=1e-5)
