"""The card and the checks before it: what a stranger would meet is what is checked."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard
from jinja2 import UndefinedError

import push_to_hub
from dataset_builders.cli import InputError
from modeling.prompts import baked_prompts
from push_to_hub import (
    card_metadata,
    check_facts,
    check_files,
    describe_in_clean_process,
    describe_model,
    main,
    read_run,
    render_card,
)


@pytest.fixture(scope="module")
def facts(tiny_encoder):
    facts = describe_in_clean_process(tiny_encoder)
    check_facts(tiny_encoder, facts)
    return facts


@pytest.fixture(scope="module")
def sources(tiny_run):
    return read_run(tiny_run, tiny_run / "results")


@pytest.fixture
def encoder(tiny_encoder, tmp_path):
    """A copy to break."""
    return shutil.copytree(tiny_encoder, tmp_path / "encoder")


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_clean_process_sees_what_this_one_sees(facts, tiny_encoder):
    assert facts == json.loads(json.dumps(describe_model(str(tiny_encoder))))
    assert facts["dimensions"] == 32
    assert facts["prompts"] == baked_prompts("Given a question, retrieve its answer")


def test_the_clean_process_cannot_import_this_repository(tiny_encoder, monkeypatch):
    """A model that needs our code would load here and nowhere else."""
    source = "def describe_model(path):\n    import modeling.prompts\n    return {}\n"
    monkeypatch.setattr(push_to_hub.inspect, "getsource", lambda function: source)
    with pytest.raises(InputError, match="ModuleNotFoundError"):
        describe_in_clean_process(tiny_encoder)


def test_dry_run_writes_the_card(tiny_run, tmp_path, capsys):
    main(["model", str(tiny_run / "model"), "org/name", "--dry_run", "--output_dir", str(tmp_path / "card")])
    card = ModelCard((tmp_path / "card" / "README.md").read_text())
    assert card.data.library_name == "sentence-transformers"
    assert card.data.pipeline_tag == "sentence-similarity"
    assert card.data.license is None and card.data.base_model is None
    assert "Not evaluated yet." in card.text
    assert "nothing was uploaded" in capsys.readouterr().err


def test_card_tells_everything(facts, sources):
    row = {"name": "BM25", "kind": "retriever", "nDCG@10": 0.5, "R@100": None, "RR": 0.25}
    metrics = {"systems": [row], "measures": ["nDCG@10", "R@100", "RR"], "baseline": "BM25", "compared": "nDCG@10"}
    metrics |= {"counts": {"queries": 3, "documents": 6}, "split": "test"}
    card = render_card("org/name", "mit", facts, {**sources, "metrics": metrics})
    assert ModelCard(card).data.license == "mit"
    assert "| BM25 | 0.500 | - | 0.250 |" in card
    assert "| retrieval | 20 | 4,000 | 61 | cpu | 3.00 GiB |" in card
    assert "`sts` (loss `soft_info_nce`), `retrieval` (loss `soft_info_nce`)" in card
    assert 'SentenceTransformer("org/name")' in card
    told = re.findall(r"^\| `(\S+)` \| `\"Instruct: ", card, flags=re.MULTILINE)
    assert sorted(told) == sorted(name for name, prompt in facts["prompts"].items() if prompt)
    assert len(told) == 42


def test_usage_in_the_card_runs(facts, sources, tiny_encoder, capsys):
    card = render_card("org/name", None, facts, sources)
    [code] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    exec(code.replace("org/name", str(tiny_encoder)), {})
    assert "tensor([[" in capsys.readouterr().out


def test_an_undefined_name_in_the_template_is_an_error(facts, sources):
    """huggingface_hub's own renderer would leave a hole in the card without a word."""
    with pytest.raises(UndefinedError, match="eos"):
        render_card("org/name", None, {name: fact for name, fact in facts.items() if name != "eos"}, sources)


def test_metadata_names_only_what_the_hub_has(tmp_path):
    stages = [{"name": "a", "dataset_name": "org/pairs"}, {"name": "b", "dataset_name": str(tmp_path)}]
    recipe = {"model_name_or_path": "mistralai/Mistral-7B-v0.1@main", "stages": stages}
    data = card_metadata("mit", recipe)
    assert (data.base_model, data.datasets) == ("mistralai/Mistral-7B-v0.1", ["org/pairs"])
    data = card_metadata(None, {"model_name_or_path": str(tmp_path), "dataset_name": "./x", "stages": [{"name": "a"}]})
    assert (data.base_model, data.datasets) == (None, None)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_custom.py", "1_Pooling/state.pt"])
def test_pickles_and_code_are_refused(encoder, name):
    (encoder / name).write_bytes(b"")
    with pytest.raises(InputError, match="run this as code"):
        check_files(encoder)


def test_a_module_of_ours_is_refused(encoder):
    edit(encoder / "modules.json", "sentence_transformers.base.modules.transformer", "modeling.encoder")
    with pytest.raises(InputError, match="not one of sentence-transformers"):
        check_files(encoder)


def test_a_lost_prompt_is_refused(encoder):
    edit(encoder / "config_sentence_transformers.json", '"ArguAna-query"', '"ArguAna-question"')
    with pytest.raises(InputError, match="1 prompts are missing, the first of them 'ArguAna-query'"):
        check_facts(encoder, describe_model(str(encoder)))


def test_a_lost_eos_is_refused(encoder):
    tokenizer = json.loads((encoder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (encoder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="do not end in EOS"):
        check_facts(encoder, describe_model(str(encoder)))


def test_vectors_that_are_not_unit_are_refused(encoder):
    modules = json.loads((encoder / "modules.json").read_text())
    (encoder / "modules.json").write_text(json.dumps(modules[:2]))
    with pytest.raises(InputError, match="not of unit length"):
        check_facts(encoder, describe_model(str(encoder)))


def test_a_prompt_that_leaves_no_room_is_refused(encoder):
    edit(encoder / "config_sentence_transformers.json", "Given a question, retrieve its answer", "date " * 80)
    with pytest.raises(InputError, match="leaves no room"):
        check_facts(encoder, describe_model(str(encoder)))
