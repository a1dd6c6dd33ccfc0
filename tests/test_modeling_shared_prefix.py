"""The packed path against the plain one: vectors, gradients and training, whatever could tell them apart."""

import copy
import filecmp
import itertools

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
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
from modeling.encoder import add_adapter, build_encoder, guarantee_eos
from modeling.losses import SoftInfoNCELoss
from modeling.shared_prefix import ARCHITECTURES, Packing, causal_mask, pack, share_prefix

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
    "mistral": lambda **other: MistralConfig(**SIZES, **{"sliding_window": None, **other}),
    "llama": lambda **other: LlamaConfig(**SIZES, **other),
    "qwen2": lambda **other: Qwen2Config(**SIZES, **other),
    "qwen3": lambda **other: Qwen3Config(**SIZES, **other),
    "gemma3_text": lambda **other: Gemma3TextConfig(
        **SIZES,
        **{"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **other},
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


def test_masks_are_made_once_for_all_layers():
    packing = Packing(prefix=3, own=[2, 4], tokens=None, positions=None, places=None)
    like = torch.zeros(())
    assert packing.mask(None, like) is packing.mask(None, like) is packing.mask(99, like)
    assert packing.mask(5, like) is not packing.mask(None, like)
    assert Packing(0, [2, 4], None, None, None).mask(4, like) is None


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


@pytest.mark.parametrize("prefix", [0, 9])
@pytest.mark.parametrize("window", [None, 3, 10])
def test_both_attentions_are_the_same(monkeypatch, prefix, window):
    """That for CUDA with a reference in the place of its kernel: there is no GPU here."""
    monkeypatch.setattr(shared_prefix, "varlen_attn", reference_varlen)
    packing = Packing(prefix, [2, 7, 1], None, None, None)
    generator = torch.Generator().manual_seed(0)
    heads = {"query": 4, "key": 2, "value": 2}
    parts = {
        name: torch.randn(1, count, prefix + 10, 8, generator=generator).requires_grad_()
        for name, count in heads.items()
    }
    by_text = shared_prefix._attention_by_text(*parts.values(), packing, 0.0, 0.3, window)
    varlen = shared_prefix._varlen_attention(*parts.values(), packing, 0.3, window)
    assert by_text.shape == (1, prefix + 10, 4, 8)
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


# --- models and batches that it cannot be done for ------------------------------------------------------------------


def test_unknown_and_bidirectional_models_run_as_before(make, tmp_path):
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
