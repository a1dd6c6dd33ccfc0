"""The packed path against the plain one: vectors, gradients, training; on pretrained weights and on all families."""

import copy
import filecmp
import pickle

import pytest
import torch
from peft import LoraConfig
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from test_modeling_packing import batch_of
from transformers import AutoConfig, AutoModel

from modeling import shared_prefix
from modeling.adapters import add_adapter
from modeling.encoder import build_encoder
from modeling.losses import SoftInfoNCELoss
from modeling.prompts import few_shot_prompt
from modeling.shared_prefix import ARCHITECTURES, share_prefix

PROMPT = "Instruct: Given a question, retrieve its answer\nQuery: "
QUERIES = ["how do I parse a date", "read a file", "café", "sort", "what is the answer to a question of many words"]
POSITIVES = ["parse a date with strptime", "open it", "coffee, in French", "sorted(list)", "an answer of many words"]
NEGATIVES = ["a", "given a question", "query query query", "date", "retrieve its answer " * 6]
LABELS = torch.tensor([[0.9, 0.2], [0.8, 0.4], [0.7, 0.1], [0.9, 0.5], [0.6, 0.3]])
BATCHES = {"batch_size": 2}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
WINDOWED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}
FAMILIES = {
    "mistral": {"sliding_window": None},
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": WINDOWED,
    # queries scaled by position; wider full attention, two layers without keys of their own, inputs for each layer
    "ministral3": {"rope_parameters": YARN},
    "gemma4_text": {
        **WINDOWED,
        "global_head_dim": 16,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 49152,
    },
    "qwen3_5_text": {"layer_types": ["full_attention"] * 4},
}


@pytest.fixture(scope="module")
def pretrained(pretrained_decoder):
    """Not to be changed: tests that do take a copy."""
    return build_encoder(pretrained_decoder, max_seq_length=2048)


@pytest.fixture(scope="module")
def make(pretrained):
    """make(family, pooling, **config): random weights of a family behind the pretrained model's tokenizer."""

    def make(family="mistral", pooling="lasttoken", include_prompt=True, **config):
        model = copy.deepcopy(pretrained, {id(pretrained[0].model): None})  # without its weights
        settings = AutoConfig.for_model(family, vocab_size=49152, **{**SIZES, **FAMILIES.get(family, {}), **config})
        torch.manual_seed(0)
        model[0].model = AutoModel.from_config(settings).eval()
        with torch.no_grad():
            for parameter in model[0].model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(3)  # attention close to uniform would hide what it attends to
        model[1] = Pooling(SIZES["hidden_size"], pooling_mode=pooling, include_prompt=include_prompt)
        return model

    return make


def with_lora(model):
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    add_adapter(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model


def encode(model, texts=QUERIES, **kwargs):
    return model.encode(texts, **{"prompt": PROMPT, "convert_to_tensor": True, **kwargs})


def assert_equal_vectors(model, texts=QUERIES, share=0.6, **kwargs):
    """And that the prompt was computed once, without which this would compare a path with itself."""
    plain = encode(model, texts, **kwargs)
    with share_prefix(model) as counts:
        shared = encode(model, texts, **kwargs)
    assert counts.tokens_computed < share * counts.tokens_padded
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-5)
    assert torch.equal(encode(model, texts, **kwargs), plain)  # nothing is left behind
    return plain


# --- encoding -------------------------------------------------------------------------------------------------------

SHOTS = [(f"what is {number} times {number}", f"It is {number * number}.") for number in range(12, 32)]
CASES = {
    "batches of a call": (QUERIES, PROMPT, BATCHES),
    "a prompt that ends within a word": (["re", "is", "", *QUERIES], PROMPT + "th", {}),
    "20 shots": (QUERIES, few_shot_prompt("Multiply", SHOTS), BATCHES),
    "equal, empty, one begins another": (["", "", "a", "a", "a b"], PROMPT, {}),
    "padding alone": ([*POSITIVES, *NEGATIVES], "", {}),
    "texts that begin alike": ([f"a man plays the {what}" for what in ("piano", "", "flute", "flutes")] * 2, "", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_vectors_of_pretrained_weights(pretrained, case):
    texts, prompt, settings = CASES[case]
    plain = assert_equal_vectors(pretrained, texts, 0.8, prompt=prompt, **settings)
    assert len(plain.unique(dim=0)) >= len(set(texts)) - 1 > 0  # cut texts may be equal


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_vectors_and_gradients_of_every_family(make, family):
    model = make(family)
    for side in ("right", "left")[: 1 if family == "ministral3" else 2]:  # its plain path scales by padded positions
        model.tokenizer.padding_side = side
        plain = assert_equal_vectors(model)
        assert_equal_vectors(model, **BATCHES)
        assert (plain - encode(model, prompt="")).abs().max() > 0.01  # the prompt matters
    assert_equal_gradients(model, LOSSES["soft"](model), 1e-4 if family == "gemma4_text" else 1e-5)
    assert set(ARCHITECTURES) == set(FAMILIES)


@pytest.mark.parametrize(
    ("pooling", "include_prompt"), [("lasttoken", False), ("mean", True), ("mean", False), ("weightedmean", True)]
)
def test_any_pooling(make, pooling, include_prompt):
    model = make(pooling=pooling, include_prompt=include_prompt)
    for side in ("right", "left"):
        model.tokenizer.padding_side = side
        assert_equal_vectors(model)
        assert_equal_vectors(model, **BATCHES)


@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_the_last_layer_computes_what_pooling_reads(make, pooling):
    model = make(pooling=pooling)
    rows = []
    for layer in model[0].model.layers[-2:]:
        layer.mlp.up_proj.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    with share_prefix(model) as counts:
        encode(model, [*QUERIES, QUERIES[0]])
    assert rows == [counts.tokens_computed, len(QUERIES) if pooling == "lasttoken" else counts.tokens_computed]


@pytest.mark.parametrize("window", [4, 14])
def test_sliding_windows_shorter_than_rest_prefix_and_text(make, window):
    model = make(sliding_window=window)
    plain = assert_equal_vectors(model)
    assert_equal_vectors(model, **BATCHES)
    assert_equal_gradients(model, LOSSES["cached"](model))
    model[0].model.config.sliding_window = None
    assert (plain - encode(model)).abs().max() > 0.01  # the window binds


def test_batches_flattened_for_flash_attention(pretrained):
    """There is no flash attention here, so the flattened batch is made by hand and compared with the padded one."""
    batch = batch_of(pretrained.tokenizer([PROMPT + text for text in QUERIES])["input_ids"], "flattened")
    with share_prefix(pretrained) as counts, torch.no_grad():
        vectors = pretrained({**batch, "modality": "text"})["sentence_embedding"]
    assert counts.tokens_computed < 0.6 * batch["input_ids"].numel()
    torch.testing.assert_close(vectors, encode(pretrained), rtol=0, atol=1e-5)


@pytest.mark.parametrize("half", ["weights", "autocast"])
def test_half_precision_is_as_close_to_the_truth_as_the_plain_path(pretrained, half):
    exact = encode(pretrained)
    model = copy.deepcopy(pretrained).to(torch.bfloat16) if half == "weights" else pretrained
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        plain = encode(model).float()
        with share_prefix(model):
            shared = [encode(model).float(), encode(model, **BATCHES).float()]
    error = 1 - torch.cosine_similarity(plain, exact).min()
    assert error > 1e-6
    for vectors in shared:
        assert 1 - torch.cosine_similarity(vectors, exact).min() < max(2 * error, 1e-4)


def test_the_model_is_as_before_after_an_error(make, tmp_path):
    """And inside: it saves the files that it saves outside, and its copies are models of their own."""
    model = make()
    model[0].model.set_attn_implementation("eager")
    plain = encode(model)
    model.save_pretrained(str(tmp_path / "outside"), create_model_card=False)
    with pytest.raises(KeyError), share_prefix(model):
        encode(model)
        model.save_pretrained(str(tmp_path / "inside"), create_model_card=False)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # worker processes get such
        raise KeyError
    assert model[0].model.config._attn_implementation == "eager"
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks and "encode" not in vars(model)
    files = [str(path.relative_to(tmp_path / "outside")) for path in (tmp_path / "outside").rglob("*.*")]
    same, *others = filecmp.cmpfiles(tmp_path / "outside", tmp_path / "inside", files, shallow=False)
    assert sorted(same) == sorted(files) and "model.safetensors" in files and others == [[], []]
    for other in copies:
        torch.testing.assert_close(encode(other, **BATCHES), plain, rtol=0, atol=1e-5)


# --- batches of one call --------------------------------------------------------------------------------------------


def test_a_prompt_is_computed_once_in_a_call_and_in_each_context(pretrained):
    ids = pretrained.tokenizer([PROMPT + text for text in QUERIES])["input_ids"]
    prompt = next(i for i, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1)
    needed = prompt + sum(len(text) - prompt for text in ids)
    with share_prefix(pretrained) as counts:
        encode(pretrained, **BATCHES)
        assert needed - 8 < counts.tokens_computed <= needed  # a few more that two texts share by chance
        once = counts.tokens_computed
        with share_prefix(pretrained) as inner:
            encode(pretrained, **BATCHES)
        encode(pretrained, **BATCHES)
        assert inner.tokens_computed == once and counts.tokens_computed == 3 * once


def test_texts_that_begin_alike_are_in_one_batch_and_computed_once(pretrained):
    """Whatever the order in which they come."""
    texts = [f"{head} {end}" for end in ("a", "b", "b", "c") for head in ("the first of them", "another one")]
    with share_prefix(pretrained) as counts:
        encode(pretrained, texts, prompt="", batch_size=4)
    heads = [len(pretrained.tokenizer(text[:-2])["input_ids"]) - 1 for text in texts[:2]]  # without EOS
    assert counts.tokens_computed == sum(heads) + 2 * 3 * 2


LONG, OTHER = "given a question, retrieve all of its answers ", "the answers of very many different words to it "
HEADS = {
    "shrinks and grows": [LONG + "a", LONG + "b", "c", "d", LONG + "e", LONG + "f"],
    "changes": [LONG + "a", LONG + "b", OTHER + "c", OTHER + "d", LONG + "e", OTHER + "f"],
    "one begins another": [LONG + "a", LONG + "a", LONG + "a" + OTHER, LONG + "a" + OTHER, "c", "d", LONG, OTHER],
}


@pytest.mark.parametrize(
    ("heads", "pooling"), zip(HEADS.values(), ["lasttoken", "mean", "lasttoken"], strict=True), ids=HEADS
)
def test_batches_that_begin_alike_by_chance(make, monkeypatch, heads, pooling):
    """Each longer than the next two, so that they are batches in this order: the longest come first."""
    monkeypatch.setattr(shared_prefix, "alphabetical", len)
    texts = [text + " z" * (60 - 8 * (i // 2)) for i, text in enumerate(heads)]
    for prompt in (PROMPT, ""):
        assert_equal_vectors(make(pooling=pooling, sliding_window=40), texts, 0.97, prompt=prompt, **BATCHES)


def test_rotary_positions_that_depend_on_the_batch(make, monkeypatch):
    """Dynamic scaling turns a token by the longest text beside it: keys of another batch would be turned wrongly."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    layers = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    model = make("gemma3_text", rope_parameters=layers, max_position_embeddings=20)
    texts = ["word " * 30 + "a", "word " * 30 + "b", *QUERIES]
    plain = encode(copy.deepcopy(model), texts, **BATCHES)
    again = copy.deepcopy(model)
    with share_prefix(again):
        torch.testing.assert_close(encode(again, texts, **BATCHES), plain, rtol=0, atol=1e-5)
    monkeypatch.setattr(shared_prefix, "rotates_by_position", lambda backbone: True)
    with share_prefix(model):
        assert (encode(model, texts, **BATCHES) - plain).abs().max() > 1e-3


def test_weights_that_change_within_the_context(make):
    """What a call has kept is not the next one's."""
    model = with_lora(make())
    with share_prefix(model):
        before = encode(model, **BATCHES)
        model[0].model.layers[0].self_attn.k_proj.weight.data.mul_(2)  # notes it in no version counter
        model[0].model.disable_adapters()
        after = encode(model, **BATCHES)
    plain = encode(model, **BATCHES)
    assert (plain - before).abs().max() > 1e-4
    torch.testing.assert_close(after, plain, rtol=0, atol=1e-5)


# --- models and batches that it cannot be done for ------------------------------------------------------------------

GEMMA = {"sliding_window": 16, "layer_types": ["full_attention"] * 4}
REFUSED = {
    "bert": ({}, "bert attends in both directions"),
    "gemma2": (GEMMA, "gemma2 is not one of them"),
    "qwen3_5_text": (
        {
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "qwen3_5_text has layers of linear_attention, which carry a state along the row",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_run_as_before_and_why(make, caplog, family):
    shared_prefix._warn_once.cache_clear()
    settings, reason = REFUSED[family]
    model = make(family, pooling="mean", **settings)
    plain = encode(model)
    for _ in range(2):
        with share_prefix(model) as counts:
            assert torch.equal(encode(model), plain)
    assert counts.tokens_computed == counts.tokens_padded == 0
    (message,) = [record.getMessage() for record in caplog.records if record.name == "modeling.shared_prefix"]
    assert message.startswith(f"share_prefix changes nothing for this model: {reason}; it is for causal decoders")
    assert all(kind in message for kind in ARCHITECTURES) and "\n" not in message


def test_batches_that_take_the_plain_path(pretrained):
    """One text, and a batch in which one has no token."""
    batch = pretrained.preprocess(QUERIES)
    batch["attention_mask"][1] = 0
    single = encode(pretrained, "one text")
    with torch.no_grad():
        plain = pretrained(dict(batch))["sentence_embedding"]
        with share_prefix(pretrained) as counts:
            shared = pretrained(dict(batch))["sentence_embedding"]
            assert torch.equal(encode(pretrained, "one text"), single)
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-5)
    assert counts.tokens_computed == counts.tokens_padded > 0


# --- training -------------------------------------------------------------------------------------------------------

LOSSES = {
    "cached": lambda model: CachedMultipleNegativesRankingLoss(model, scale=20, mini_batch_size=2),
    "soft": lambda model: SoftInfoNCELoss(model, temperature=0.05, mini_batch_size=2),
    "plain": lambda model: SoftInfoNCELoss(model, temperature=0.05),
}


def gradients(model, loss):
    """The loss and all gradients as one vector."""
    model.zero_grad()
    columns = [model.preprocess(QUERIES, prompt=PROMPT), model.preprocess(POSITIVES), model.preprocess(NEGATIVES)]
    value = loss(columns, LABELS)
    value.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = [parameter.grad for parameter in trained if parameter.grad is not None]
    assert len(found) > 0.8 * len(trained)  # layers that borrow keys have none of their own to train
    return value.item(), torch.cat([gradient.flatten() for gradient in found])


def assert_equal_gradients(model, loss, tolerance=1e-5):
    value, plain = gradients(model, loss)
    assert plain.norm() > 1e-3
    with share_prefix(model) as counts:
        encode(model, **BATCHES)  # an evaluation before the step
        shared_value, shared = gradients(model, loss)
    assert counts.tokens_computed < 0.8 * counts.tokens_padded
    assert shared_value == pytest.approx(value, rel=1e-5)
    assert (shared - plain).norm() < tolerance * plain.norm()


@pytest.mark.parametrize(("name", "checkpointing"), [("soft", "reentrant"), ("plain", "not reentrant")])
def test_gradients_of_pretrained_weights(pretrained, name, checkpointing):
    model = with_lora(pretrained).train()
    model[0].model.enable_input_require_grads()  # as the trainer does
    model[0].model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    assert_equal_gradients(model, LOSSES[name](model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_outside_the_context_fails_under_checkpointing(make, reentrant):
    """It would run the layers once more, without our attention: better to fail than to train on that."""
    model = make().train()
    model[0].model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model[0].model.enable_input_require_grads()
    with share_prefix(model):
        value = model(model.preprocess(QUERIES, prompt=PROMPT))["sentence_embedding"].sum()
    with pytest.raises(RuntimeError):
        value.backward()
