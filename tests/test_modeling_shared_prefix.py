"""The packed path against the plain one: vectors, gradients and training, whatever could tell them apart."""

import copy
import filecmp
import itertools
import pickle
import weakref

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from modeling import shared_prefix
from modeling.adapters import add_adapter, merge_adapter
from modeling.encoder import build_encoder
from modeling.losses import SoftInfoNCELoss
from modeling.shared_prefix import ARCHITECTURES, Packing, Prefix, causal_mask, pack, share_prefix
from modeling.tokens import guarantee_eos

PROMPT = "Instruct: Given a question, retrieve its answer\nQuery: "
QUERIES = ["how do I parse a date", "read a file", "café", "sort", "what is the answer to a question of many words"]
POSITIVES = ["parse a date with strptime", "open it", "coffee, in French", "sorted(list)", "an answer of many words"]
NEGATIVES = ["a", "given a question", "query query query", "date", "retrieve its answer " * 6]
LABELS = torch.tensor([[0.9, 0.2], [0.8, 0.4], [0.7, 0.1], [0.9, 0.5], [0.6, 0.3]])
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "mistral": lambda **other: MistralConfig(**{**SIZES, "sliding_window": None, **other}),
    "llama": lambda **other: LlamaConfig(**{**SIZES, **other}),
    "qwen2": lambda **other: Qwen2Config(**{**SIZES, **other}),
    "qwen3": lambda **other: Qwen3Config(**{**SIZES, **other}),
    "gemma3_text": lambda **other: Gemma3TextConfig(
        **{**SIZES, "sliding_window": 16, "layer_types": WINDOWED, **other}
    ),
}


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, which keeps the space before a word, or Metaspace, which puts one before every text."""
    if kind == "byte_bpe":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet, size = pre_tokenizers.ByteLevel.alphabet(), 280
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        alphabet, size = [], 60
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([PROMPT, *QUERIES, *POSITIVES, *NEGATIVES] * 2, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    guarantee_eos(wrapped)
    return wrapped


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(family, tokenizer, pooling, **config): a SentenceTransformer with random weights."""

    def make(family="mistral", kind="byte_bpe", pooling="lasttoken", include_prompt=True, **config):
        folder = tmp_path_factory.mktemp("model")
        words = tokenizer(kind)
        words.save_pretrained(folder)
        settings = CONFIGS[family](vocab_size=len(words), **config)
        torch.manual_seed(0)
        backbone = AutoModel.from_config(settings)
        with torch.no_grad():
            for parameter in backbone.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4)  # attention close to uniform would hide what it attends to
        backbone.save_pretrained(folder)
        transformer = Transformer(str(folder), max_seq_length=256)
        pooler = Pooling(SIZES["hidden_size"], pooling_mode=pooling, include_prompt=include_prompt)
        return SentenceTransformer(modules=[transformer, pooler, Normalize()])

    return make


def encode(model, texts=QUERIES, **kwargs):
    kwargs = {"prompt": PROMPT, "convert_to_tensor": True, **kwargs}
    return model.encode(texts, **kwargs)


def assert_equal_vectors(model, texts=QUERIES, **kwargs):
    """And that the prompt was computed once, without which this would compare a path with itself."""
    plain = encode(model, texts, **kwargs)
    with share_prefix(model) as counts:
        shared = encode(model, texts, **kwargs)
    assert counts.tokens_computed < 0.6 * counts.tokens_padded
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-5)
    assert torch.equal(encode(model, texts, **kwargs), plain)  # nothing is left behind
    return plain


# --- layout ---------------------------------------------------------------------------------------------------------


@given(
    prefix=st.lists(st.integers(1, 9), max_size=20),
    rests=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5),
    layout=st.sampled_from(["right", "left", "flattened"]),
)
def test_a_packed_row_holds_each_text_once_and_gives_every_batch_back(prefix, rests, layout):
    texts = [prefix + rest for rest in rests]
    width = max(map(len, texts))
    if layout == "flattened":
        bounds = torch.tensor([0, *(len(text) for text in texts)]).cumsum(0)
        batch = {"input_ids": torch.tensor([[*itertools.chain(*texts)]]), "cu_seq_lens_q": bounds}
        present = torch.ones_like(batch["input_ids"])
    else:
        fill = [[0] * (width - len(text)) for text in texts]
        rows = [[*text, *pad] if layout == "right" else [*pad, *text] for text, pad in zip(texts, fill, strict=True)]
        present = (torch.tensor(rows) > 0).long()
        batch = {"input_ids": torch.tensor(rows), "attention_mask": present}
    packing = pack(batch)
    common = 0
    while all(len(text) > common + 1 and text[common] == texts[0][common] for text in texts):
        common += 1
    common = common if common >= 8 and len(texts) > 1 else 0
    if packing is None:
        assert layout != "flattened" and common == 0 and present.all()
        return
    row = batch["input_ids"].flatten()[packing.tokens]
    assert row.tolist() == texts[0][:common] + [token for text in texts for token in text[common:]]
    positions = [*range(common), *(place for text in texts for place in range(common, len(text)))]
    assert packing.positions.tolist() == positions
    assert packing.own == [len(text) - common for text in texts]
    assert torch.equal(row[packing.places][present.bool()], batch["input_ids"][present.bool()])
    if layout != "flattened":
        last = row[pack(batch, last_only=True).places]
        assert last.tolist() == [[text[-1]] for text in texts]


@given(before=st.integers(0, 8), length=st.integers(1, 6), window=st.none() | st.integers(1, 12))
def test_causal_mask_by_its_definition(before, length, window):
    mask = causal_mask(before, length, window, torch.zeros(()))
    for own in range(length):
        for seen in range(before + length):
            distance = before + own - seen
            visible = distance >= 0 and (window is None or distance < window)
            assert mask[own, seen] == (0 if visible else -torch.inf)


@given(kept=st.lists(st.integers(1, 2), max_size=30), prefix=st.lists(st.integers(1, 2), max_size=30), data=st.data())
def test_what_is_kept_is_not_computed_again(kept, prefix, data):
    """The kept ids and those of the row, put back together, are what the batch would be without anything kept."""
    cut = data.draw(st.integers(0, len(kept)))
    prefix = kept[:cut] + prefix
    texts = [
        prefix + rest for rest in data.draw(st.lists(st.lists(st.integers(1, 9), min_size=1), min_size=1, max_size=4))
    ]
    width = max(map(len, texts))
    batch = {"input_ids": torch.tensor([text + [0] * (width - len(text)) for text in texts])}
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    packing = pack(batch, kept=Prefix(torch.tensor(kept, dtype=torch.long)), keeping=True)
    if packing is None:
        return
    row = [*kept[: packing.known], *batch["input_ids"].flatten()[packing.tokens].tolist()]
    assert row == [*texts[0][: packing.prefix], *(token for text in texts for token in text[packing.prefix :])]
    known = 0
    while known < len(kept) and all(len(text) > known + 1 and text[known] == kept[known] for text in texts):
        known += 1
    assert packing.known == (known if known >= 8 else 0)
    assert packing.positions[: packing.new].tolist() == list(range(packing.known, packing.prefix))
    assert torch.equal(
        torch.tensor(row)[packing.places][batch["input_ids"] > 0], batch["input_ids"][batch["input_ids"] > 0]
    )
    assert (packing.keeps is not None) == (packing.new > 0)
    if packing.keeps:
        assert packing.new >= 8 and packing.keeps.ids.tolist() == texts[0][: packing.prefix]


def test_masks_are_made_once_for_all_layers():
    packing = Packing(prefix=3, own=[2, 4], tokens=None, positions=None, places=None)
    like = torch.zeros(())
    assert packing.mask(3, 4, None, like) is packing.mask(3, 4, None, like) is packing.mask(3, 4, 99, like)
    assert packing.mask(3, 4, 5, like) is not packing.mask(3, 4, None, like)
    assert packing.mask(0, 4, 4, like) is None


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
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        states.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(states)


@pytest.mark.parametrize(("prefix", "known"), [(0, 0), (9, 0), (9, 4), (9, 9)])
@pytest.mark.parametrize("window", [None, 3, 10])
def test_both_attentions_are_the_same(monkeypatch, prefix, known, window):
    """That for CUDA with a reference in the place of its kernel: there is no GPU here."""
    monkeypatch.setattr(shared_prefix, "varlen_attn", reference_varlen)
    packing = Packing(prefix, [2, 7, 1], None, None, None, known)
    generator = torch.Generator().manual_seed(0)
    heads = {"query": 4, "key": 2, "value": 2}
    parts = {
        name: torch.randn(1, count, prefix + 10, 8, generator=generator).requires_grad_()
        for name, count in heads.items()
    }
    whole = shared_prefix._attention_by_text(
        *parts.values(), Packing(prefix, [2, 7, 1], None, None, None), 0, 0.3, window
    )
    parts["query"] = parts["query"][:, :, known:]
    by_text = shared_prefix._attention_by_text(*parts.values(), packing, 0.0, 0.3, window)
    varlen = shared_prefix._varlen_attention(*parts.values(), packing, 0.3, window)
    assert by_text.shape == (1, prefix - known + 10, 4, 8)
    torch.testing.assert_close(by_text, whole[:, known:], rtol=0, atol=1e-5)
    torch.testing.assert_close(varlen, by_text, rtol=0, atol=1e-5)
    along = torch.randn(by_text.shape, generator=generator)
    expected = torch.autograd.grad(by_text, list(parts.values()), along)
    for found, other in zip(torch.autograd.grad(varlen, list(parts.values()), along), expected, strict=True):
        assert other.norm() > 0.1
        torch.testing.assert_close(found, other, rtol=0, atol=1e-5)


# --- encoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("side", ["left", "right"])
def test_vectors_of_every_family(make, family, side):
    model = make(family)
    model.tokenizer.padding_side = side
    plain = assert_equal_vectors(model)
    assert (plain - encode(model, prompt="")).abs().max() > 0.05  # the prompt matters


def test_every_family_is_tested():
    assert set(ARCHITECTURES) == set(CONFIGS)


@pytest.mark.parametrize("kind", ["byte_bpe", "metaspace"])
@pytest.mark.parametrize("ending", ["Query: ", "Query:", "Query:\n", "Query: the", "Query: th"])
def test_any_end_of_a_prompt(make, kind, ending):
    """A prompt tokenised on its own would end in other tokens than it does before a text."""
    model = make(kind=kind)
    assert_equal_vectors(model, ["re", " re", "\nre", "e", ""], prompt=PROMPT + ending)
    assert_equal_vectors(model, prompt=PROMPT + ending)


@pytest.mark.parametrize("pooling", ["lasttoken", "mean", "weightedmean", "max", "cls"])
@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_any_pooling(make, pooling, include_prompt, side):
    model = make(pooling=pooling, include_prompt=include_prompt)
    model.tokenizer.padding_side = side
    assert_equal_vectors(model)


@pytest.mark.parametrize(
    "texts",
    [["", *QUERIES], ["", ""], ["a", "a", "a"], [QUERIES[0], QUERIES[0] + " again"], ["long " * 300, "a", "b"]],
    ids=["empty", "all empty", "equal", "one begins another", "truncated"],
)
def test_any_texts(make, texts):
    assert_equal_vectors(make(), texts)


def test_one_text_runs_as_it_is(make):
    model = make()
    plain = encode(model, "one text")
    with share_prefix(model) as counts:
        assert torch.equal(encode(model, "one text"), plain)
    assert counts.tokens_computed == counts.tokens_padded > 0


def test_padding_alone_is_left_out(make):
    model = make()
    texts = [*POSITIVES, *NEGATIVES]
    plain = encode(model, texts, prompt=None)
    with share_prefix(model) as counts:
        torch.testing.assert_close(encode(model, texts, prompt=None), plain, rtol=0, atol=1e-5)
    needed = sum(len(ids) for ids in model.tokenizer(texts)["input_ids"])
    assert counts.tokens_computed == needed < 0.6 * counts.tokens_padded


def test_token_states_are_those_of_the_plain_path(make):
    model = make(pooling="mean")
    plain = encode(model, output_value="token_embeddings", convert_to_tensor=False)
    with share_prefix(model):
        shared = encode(model, output_value="token_embeddings", convert_to_tensor=False)
    for ours, theirs in zip(shared, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", [4, 12, 40, 500])
@pytest.mark.parametrize("side", ["left", "right"])
def test_sliding_windows_shorter_than_own_part_prefix_and_text(make, window, side):
    model = make(sliding_window=window)
    model.tokenizer.padding_side = side
    plain = assert_equal_vectors(model)
    longest = max(len(ids) for ids in model.tokenizer([PROMPT + text for text in QUERIES])["input_ids"])
    assert 40 < longest < 500
    if window < longest:
        model[0].model.config.sliding_window = None
        assert (plain - encode(model)).abs().max() > 0.01  # the window binds


def test_batches_flattened_for_flash_attention(make):
    """There is no flash attention here, so the flattened batch is made by hand and compared with the padded one."""
    model = make()
    plain = encode(model, QUERIES)
    ids = model.tokenizer([PROMPT + text for text in QUERIES])["input_ids"]
    bounds = torch.tensor([0, *map(len, ids)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    batch = {"input_ids": torch.tensor([[*itertools.chain(*ids)]]), "cu_seq_lens_q": bounds, "modality": "text"}
    with share_prefix(model) as counts, torch.no_grad():
        vectors = model(batch)["sentence_embedding"]
    assert counts.tokens_computed < 0.6 * batch["input_ids"].numel()
    torch.testing.assert_close(vectors, plain, rtol=0, atol=1e-5)


def test_bfloat16_is_as_close_to_the_plain_path_as_its_rounding(make):
    model = make().to(torch.bfloat16)
    plain = encode(model).float()
    with share_prefix(model):
        shared = encode(model).float()
    assert torch.cosine_similarity(plain, shared).min() >= 0.9999


def test_autocast_is_as_close_to_the_plain_path_as_its_rounding(make):
    model = make()
    exact = encode(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = encode(model).float()
        with share_prefix(model):
            shared = encode(model).float()
    assert (plain - exact).abs().max() > 1e-4
    assert torch.cosine_similarity(plain, shared).min() >= 0.9999


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_put_back(make, attention):
    model = make()
    model[0].model.set_attn_implementation(attention)
    with pytest.raises(KeyError), share_prefix(model):
        assert model[0].model.config._attn_implementation == "shared_prefix"
        raise KeyError
    assert model[0].model.config._attn_implementation == attention
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def test_a_context_in_a_context(make):
    model = make()
    plain = encode(model)
    with share_prefix(model), share_prefix(model):
        torch.testing.assert_close(encode(model), plain, rtol=0, atol=1e-5)
    assert torch.equal(encode(model), plain)


def test_saving_inside_writes_the_files_that_saving_outside_does(make, tmp_path):
    model = make()
    plain = encode(model)
    model.save_pretrained(str(tmp_path / "outside"), create_model_card=False)
    with share_prefix(model):
        encode(model)
        model.save_pretrained(str(tmp_path / "inside"), create_model_card=False)
    files = [str(path.relative_to(tmp_path / "outside")) for path in (tmp_path / "outside").rglob("*.*")]
    assert "model.safetensors" in files and "modules.json" in files
    same, different, missing = filecmp.cmpfiles(tmp_path / "outside", tmp_path / "inside", files, shallow=False)
    assert sorted(same) == sorted(files) and not different and not missing
    reloaded = SentenceTransformer(str(tmp_path / "inside"))
    assert torch.equal(encode(reloaded), plain)


# --- batches of one call --------------------------------------------------------------------------------------------

BATCHES = {"batch_size": 2}


def common(ids):
    return next(i for i, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1)


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_is_computed_once_in_a_call(make, family, side):
    model = make(family)
    model.tokenizer.padding_side = side
    plain = assert_equal_vectors(model, **BATCHES)
    ids = model.tokenizer([PROMPT + text for text in QUERIES])["input_ids"]
    prompt = common(ids)
    assert prompt > 20
    with share_prefix(model) as counts:
        for call in (1, 2):
            torch.testing.assert_close(encode(model, **BATCHES), plain, rtol=0, atol=1e-5)
            own = sum(len(text) - prompt for text in ids)
            # at most a few tokens that two texts have in common by chance are computed apart
            assert call * own < counts.tokens_computed <= call * (own + prompt)
            assert counts.tokens_computed > call * (own + prompt - 8)


@pytest.mark.parametrize("pooling", ["lasttoken", "mean", "weightedmean", "max", "cls"])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_any_pooling_over_the_batches_of_a_call(make, pooling, include_prompt):
    assert_equal_vectors(make(pooling=pooling, include_prompt=include_prompt), **BATCHES)


@pytest.mark.parametrize("window", [4, 12, 40, 500])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sliding_window_over_the_batches_of_a_call(make, window, side):
    model = make(sliding_window=window)
    model.tokenizer.padding_side = side
    assert_equal_vectors(model, **BATCHES)


def batches_of(texts, size=2):
    """Of one length each, so that they are batches in this order: sentence-transformers sorts by length."""
    assert len(texts) % size == 0
    return ["".join(text).ljust(100 - i // size, "z") for i, text in enumerate(texts)]


LONG, OTHER = "given a question, retrieve ", "the answer of many words "


@pytest.mark.parametrize(
    "heads",
    [
        [LONG + "a", LONG + "b", "c", "d", LONG + "e", LONG + "f"],
        ["c", "d", LONG + "a", LONG + "b", LONG + "e", LONG + "f"],
        [LONG + "a", LONG + "b", OTHER + "c", OTHER + "d", LONG + "e", OTHER + "f"],
        [LONG + "a", LONG + "a", LONG + "a" + OTHER, LONG + "a" + OTHER, "c", "d", LONG, OTHER],
    ],
    ids=["shrinks and grows", "grows", "changes", "one begins another"],
)
@pytest.mark.parametrize("prompt", [PROMPT, ""], ids=["prompt", "no prompt"])
@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_batches_that_begin_alike_by_chance(make, heads, prompt, pooling):
    model = make(pooling=pooling, sliding_window=40)
    texts = batches_of(heads)
    plain = encode(model, texts, prompt=prompt, **BATCHES)
    with share_prefix(model) as counts:
        torch.testing.assert_close(encode(model, texts, prompt=prompt, **BATCHES), plain, rtol=0, atol=1e-5)
    assert counts.tokens_computed < counts.tokens_padded


def test_kept_keys_in_half_precision(make):
    model = make()
    exact = encode(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = encode(model, **BATCHES).float()
        with share_prefix(model):
            shared = encode(model, **BATCHES).float()
    assert (plain - exact).abs().max() > 1e-4
    assert torch.cosine_similarity(plain, shared).min() >= 0.9999
    half = make().to(torch.bfloat16)
    plain = encode(half, **BATCHES).float()
    with share_prefix(half):
        shared = encode(half, **BATCHES).float()
    assert torch.cosine_similarity(plain, shared).min() >= 0.9999


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rotary_positions_that_depend_on_the_batch(make, monkeypatch, family):
    """Dynamic scaling turns a token by the longest text beside it: keys of another batch would be turned wrongly."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    layers = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    model = make(family, rope_parameters=layers if family == "gemma3_text" else rope, max_position_embeddings=64)
    model.max_seq_length = 200
    texts = ["word " * 30 + "a", "word " * 30 + "b", *QUERIES]
    plain = encode(copy.deepcopy(model), texts, **BATCHES)

    def shared():
        again = copy.deepcopy(model)
        with share_prefix(again):
            return encode(again, texts, **BATCHES)

    torch.testing.assert_close(shared(), plain, rtol=0, atol=1e-5)
    monkeypatch.setattr(shared_prefix, "rotates_by_position", lambda backbone: True)
    assert (shared() - plain).abs().max() > 1e-3


def test_nothing_is_kept_after_a_call(make, monkeypatch):
    made = []
    original = Prefix.__init__
    monkeypatch.setattr(
        Prefix, "__init__", lambda self, *args: (original(self, *args), made.append(weakref.ref(self)))[0]
    )
    model = make()
    with share_prefix(model):
        encode(model, **BATCHES)
        assert made and not any(reference() for reference in made)
        monkeypatch.setattr(model[1], "forward", lambda features: features["no such feature"])
        with pytest.raises(KeyError):
            encode(model, **BATCHES)
        assert not any(reference() for reference in made)
    assert "encode" not in vars(model)


def test_what_is_kept_is_no_view_of_a_whole_row(make, monkeypatch):
    sizes = []
    original = shared_prefix._Packer.unpack

    def unpack(self, *args):
        features = original(self, *args)
        tensors = [*itertools.chain(*self.kept.layers.values()), self.kept.states]
        sizes.append([(tensor.untyped_storage().nbytes(), tensor.nbytes) for tensor in tensors])
        assert len(self.kept.layers) == SIZES["num_hidden_layers"]
        return features

    monkeypatch.setattr(shared_prefix._Packer, "unpack", unpack)
    model = make()
    with share_prefix(model):
        encode(model, **BATCHES)
    assert len(sizes) == 3 and sizes[0] == sizes[1] == sizes[2]
    assert all(held == needed for held, needed in sizes[0])


def double(parameter):
    with torch.no_grad():
        parameter.mul_(2)


def optimizer_step(model):
    model(model.preprocess(QUERIES))["sentence_embedding"].sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()


def quietly(model):
    model[0].model.layers[0].self_attn.k_proj.weight.data.mul_(2)  # notes it in no version counter


def in_inference_mode(model):
    with torch.inference_mode():
        model[0].model.layers[0].self_attn.k_proj.weight.mul_(2)


def load_other_weights(model):
    state = {name: value * 2 if "k_proj" in name else value for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def another_layer(model):
    attention = model[0].model.layers[1].self_attn
    attention.k_proj = torch.nn.Linear(*reversed(attention.k_proj.weight.shape), bias=False)


def half_and_back(model):
    model.to(torch.bfloat16).to(torch.float32)


def narrower_window(model):
    model[0].model.config.sliding_window = 4


def rescale_adapter(model):
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3)


CHANGES = {
    "optimizer step": optimizer_step,
    "in place": lambda model: double(model[0].model.layers[0].self_attn.v_proj.weight),
    "in place, of .data": quietly,
    "in inference mode": in_inference_mode,
    "state dict": load_other_weights,
    "embeddings": lambda model: double(model[0].model.embed_tokens.weight),
    "a module": another_layer,
    "dtype there and back": half_and_back,
    "dtype": lambda model: model.to(torch.float64),
    "window": narrower_window,
    "adapter off": lambda model: model[0].model.disable_adapters(),
    "adapter rescaled": rescale_adapter,
    "adapter rescaled and merged": lambda model: [rescale_adapter(model), merge_adapter(model)],
    "another adapter": lambda model: model.add_adapter(
        LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False), "other"
    ),
    "deleted adapter": lambda model: model.delete_adapter("default"),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_weights_that_change_within_the_context(make, name):
    model = make()
    with_lora(model)
    model.requires_grad_(True)
    with share_prefix(model) as counts:
        before = encode(model, **BATCHES)
        CHANGES[name](model)
        computed = counts.tokens_computed
        after = encode(model, **BATCHES)
        assert counts.tokens_computed > computed
    plain = encode(model, **BATCHES)
    assert (plain - before.to(plain.dtype)).abs().max() > (1e-9 if name == "dtype" else 1e-4)
    torch.testing.assert_close(after, plain, rtol=0, atol=1e-5)


def test_autocast_that_changes_within_the_context(make):
    model = make()
    exact = encode(model, **BATCHES)
    with share_prefix(model):
        with torch.autocast("cpu", torch.bfloat16):
            half = encode(model, **BATCHES).float()
        torch.testing.assert_close(encode(model, **BATCHES), exact, rtol=0, atol=1e-5)
    assert (half - exact).abs().max() > 1e-4


def test_prompts_that_change_within_the_context(make):
    model = make()
    prompts = [PROMPT, PROMPT + "how ", "", PROMPT[:30], None]
    plain = [encode(model, prompt=prompt, **BATCHES) for prompt in prompts]
    with share_prefix(model):
        for prompt, expected in zip(prompts, plain, strict=True):
            torch.testing.assert_close(encode(model, prompt=prompt, **BATCHES), expected, rtol=0, atol=1e-5)


def test_gradients_after_a_call_are_those_of_the_plain_path(make):
    model = make()
    loss = LOSSES["soft"](model)
    value, plain = gradients(model, loss)
    with share_prefix(model):
        encode(model, **BATCHES)
        model.train()
        shared_value, shared = gradients(model, loss)
    assert shared_value == pytest.approx(value, rel=1e-5)
    assert (shared - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_is_a_model_of_its_own(make, copied):
    """Worker processes of sentence-transformers get such copies."""
    model = make()
    plain = encode(model, **BATCHES)
    with share_prefix(model):
        other = copied(model)
        double(model[0].model.embed_tokens.weight)
        torch.testing.assert_close(encode(other, **BATCHES), plain, rtol=0, atol=1e-5)
        assert (encode(model, **BATCHES) - plain).abs().max() > 1e-3


def test_a_context_in_a_context_over_the_batches_of_a_call(make):
    model = make()
    plain = encode(model, **BATCHES)
    with share_prefix(model) as counts:
        encode(model, **BATCHES)
        once = counts.tokens_computed
        with share_prefix(model):
            torch.testing.assert_close(encode(model, **BATCHES), plain, rtol=0, atol=1e-5)
        assert counts.tokens_computed == 2 * once
        encode(model, **BATCHES)
        assert counts.tokens_computed == 3 * once
    assert torch.equal(encode(model, **BATCHES), plain) and "encode" not in vars(model)


# --- models and batches that it cannot be done for ------------------------------------------------------------------


def test_unknown_and_bidirectional_models_run_as_before(make, tmp_path, caplog):
    shared_prefix._warn_once.cache_clear()
    words = tokenizer("byte_bpe")
    bert = BertConfig(vocab_size=len(words), num_hidden_layers=2, **{k: SIZES[k] for k in list(SIZES)[:2]})
    bert.num_attention_heads = 4
    gemma2 = Gemma2Config(**SIZES, vocab_size=len(words))
    gemma3 = CONFIGS["gemma3_text"](vocab_size=len(words), use_bidirectional_attention=True)
    for config in (bert, gemma2, gemma3):
        folder = tmp_path / config.model_type
        AutoModel.from_config(config).save_pretrained(folder)
        words.save_pretrained(folder)
        model = SentenceTransformer(modules=[Transformer(str(folder)), Pooling(32, pooling_mode="mean")])
        plain = encode(model)
        with share_prefix(model) as counts:
            assert torch.equal(encode(model), plain)
        assert counts.tokens_computed == counts.tokens_padded == 0
        with share_prefix(model):
            pass
        (message,) = [record.getMessage() for record in caplog.records if record.name == "modeling.shared_prefix"]
        assert config.model_type in message and all(kind in message for kind in ARCHITECTURES) and "\n" not in message
        caplog.clear()


def test_a_text_without_a_token_takes_the_plain_path(make):
    model = make()
    batch = model.preprocess(QUERIES)
    batch["attention_mask"][1] = 0
    with torch.no_grad():
        plain = model(dict(batch))["sentence_embedding"]
        with share_prefix(model):
            shared = model(dict(batch))["sentence_embedding"]
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-5)


# --- training -------------------------------------------------------------------------------------------------------

LOSSES = {
    "plain": lambda model: MultipleNegativesRankingLoss(model, scale=20),
    "cached": lambda model: CachedMultipleNegativesRankingLoss(model, scale=20, mini_batch_size=2),
    "soft": lambda model: SoftInfoNCELoss(model, temperature=0.05, mini_batch_size=2),
}


def gradients(model, loss):
    """The loss and all gradients as one vector."""
    model.zero_grad()
    columns = [model.preprocess(QUERIES, prompt=PROMPT), model.preprocess(POSITIVES), model.preprocess(NEGATIVES)]
    value = loss(columns, LABELS)
    value.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    return value.item(), torch.cat([parameter.grad.flatten() for parameter in trained])


def assert_equal_gradients(model, loss, tolerance=1e-5):
    value, plain = gradients(model, loss)
    assert plain.norm() > 1e-2
    with share_prefix(model) as counts:
        shared_value, shared = gradients(model, loss)
    assert counts.tokens_computed < 0.8 * counts.tokens_padded
    assert shared_value == pytest.approx(value, rel=1e-5)
    assert (shared - plain).norm() < tolerance * plain.norm()


def with_lora(model):
    torch.manual_seed(0)
    add_adapter(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients(make, name, lora, checkpointing):
    model = make()
    model.train()
    if lora:
        with_lora(model)
    if checkpointing:
        if lora and checkpointing == "reentrant":
            model[0].model.enable_input_require_grads()  # as the trainer does
        model[0].model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    assert_equal_gradients(model, LOSSES[name](model))


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_every_family(make, family, side):
    model = make(family)
    model.tokenizer.padding_side = side
    assert_equal_gradients(model, LOSSES["soft"](model))


@pytest.mark.parametrize("window", [12, 500])
def test_gradients_in_a_sliding_window(make, window):
    model = make(sliding_window=window, pooling="mean")
    assert_equal_gradients(model, LOSSES["cached"](model))


def test_gradients_in_bfloat16_are_no_further_from_the_truth_than_the_plain_path_s(make):
    model = make()
    _, exact = gradients(model, LOSSES["cached"](model))
    half = copy.deepcopy(model).to(torch.bfloat16)
    _, plain = gradients(half, LOSSES["cached"](half))
    with share_prefix(half):
        _, shared = gradients(half, LOSSES["cached"](half))
    errors = [((found.float() - exact).norm() / exact.norm()).item() for found in (plain, shared)]
    assert errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_outside_the_context_fails_under_checkpointing(make, reentrant):
    """It would run the layers once more, without our attention: better to fail than to train on that."""
    model = make()
    model.train()
    model[0].model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model[0].model.enable_input_require_grads()
    with share_prefix(model):
        value = model(model.preprocess(QUERIES, prompt=PROMPT))["sentence_embedding"].sum()
    with pytest.raises(RuntimeError):
        value.backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_takes_the_same_steps(tiny_decoder, tmp_path, checkpointing):
    """20 steps of LoRA by the unmodified trainer, with a prompt for the queries."""
    prompt = "instruct given a question retrieve its answer : query : "
    words = ["how", "do", "i", "parse", "date", "read", "write", "file", "open", "close", "sort", "list"]
    texts = [" ".join(words[(row * step) % 12] for step in range(1, 2 + row % 7)) for row in range(40)]
    rows = {"query": texts, "positive": texts[::-1], "negative_1": texts[5:] + texts[:5]}

    def train(folder, sharing):
        model = build_encoder(tiny_decoder, max_seq_length=32)
        with_lora(model)
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(folder),
            max_steps=20,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=1,
            prompts={"query": prompt},
            gradient_checkpointing=checkpointing,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        loss = SoftInfoNCELoss(model, temperature=0.05, mini_batch_size=None if checkpointing else 4)
        labels = [[0.9, 0.2 + 0.1 * (row % 5)] for row in range(40)]
        trainer = SentenceTransformerTrainer(
            model, arguments, train_dataset=Dataset.from_dict({**rows, "label": labels}), loss=loss
        )
        if sharing:
            with share_prefix(model) as counts:
                trainer.train()
            assert counts.tokens_computed < 0.7 * counts.tokens_padded
        else:
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, torch.cat([value.detach().flatten() for value in model.parameters() if value.requires_grad])

    plain, plain_weights = train(tmp_path / "plain", sharing=False)
    shared, shared_weights = train(tmp_path / "shared", sharing=True)
    assert len(plain) == 20 and min(plain[-5:]) < plain[0] - 0.05
    assert shared == pytest.approx(plain, rel=1e-3)
    start = build_encoder(tiny_decoder, max_seq_length=32)
    with_lora(start)
    before = torch.cat([value.detach().flatten() for value in start.parameters() if value.requires_grad])
    step = (plain_weights - before).norm()
    assert step > 0.1
    assert (shared_weights - plain_weights).norm() < 1e-2 * step  # Adam amplifies rounding where gradients are small


def test_an_evaluator_during_training_sees_the_weights_of_its_step(tiny_decoder, tmp_path):
    """Its calls of encode lie between steps, in the same context."""
    prompt = "instruct given a question retrieve its answer : query : "
    words = ["how", "do", "i", "parse", "date", "read", "write", "file", "open", "close", "sort", "list"]
    texts = [" ".join(words[(row * step) % 12] for step in range(1, 2 + row % 7)) for row in range(24)]
    names = [str(row) for row in range(24)]
    vectors = {}

    class Evaluator(InformationRetrievalEvaluator):
        def __call__(self, model, *args, steps=-1, **kwargs):
            vectors[steps] = model.encode(texts, prompt=prompt, batch_size=4)
            return super().__call__(model, *args, steps=steps, **kwargs)

    def train(folder, sharing):
        vectors.clear()
        model = build_encoder(tiny_decoder, max_seq_length=32)
        with_lora(model)
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(folder),
            max_steps=6,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            prompts={"query": prompt},
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = SentenceTransformerTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_dict({"query": texts, "positive": texts[::-1]}),
            loss=CachedMultipleNegativesRankingLoss(model, mini_batch_size=4),
            evaluator=Evaluator(
                dict(zip(names, texts, strict=True)),
                dict(zip(names, texts[::-1], strict=True)),
                {name: {name} for name in names},
                batch_size=4,
                query_prompt=prompt,
                corpus_prompt=prompt,
                write_csv=False,
            ),
        )
        if sharing:
            with share_prefix(model):
                trainer.train()
        else:
            trainer.train()
        key = "eval_cosine_ndcg@10"
        return dict(vectors), [entry[key] for entry in trainer.state.log_history if key in entry]

    plain, scores = train(tmp_path / "plain", sharing=False)
    shared, shared_scores = train(tmp_path / "shared", sharing=True)
    assert list(plain) == list(shared) == [2, 4, 6] and len(scores) == 3
    assert abs(plain[2] - plain[4]).max() > 1e-3 and abs(plain[4] - plain[6]).max() > 1e-3
    for step in plain:
        assert abs(shared[step] - plain[step]).max() < 2e-4  # Adam amplifies rounding
    assert shared_scores == pytest.approx(scores, abs=0.05)
