"""What is wrong with a model or a data set is found before it is published, by a process without our code."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tiny_release import BASE, REVISION, write_published

from common.cli import InputError
from common.steps import MANIFEST, files_of, read_manifest, write_json
from modeling.encoder import build_encoder, save_merged
from modeling.reference import REFERENCE, write_reference
from release import verify
from release.local_paths import check_no_local_path, local_paths, named_paths
from release.outside import describe_model
from release.verify import TOLERANCE, in_clean_process, model_files, verify_adapter, verify_dataset, verify_model


@pytest.fixture(scope="module")
def run(adapted_run, tiny_decoder):
    """With a cache that has the adapter's base."""
    shutil.copytree(tiny_decoder, adapted_run / "cache" / "models--org--tiny" / "snapshots" / REVISION)
    return adapted_run


@pytest.fixture
def model(run, tmp_path):
    """A copy to break."""
    return shutil.copytree(run / "model", tmp_path / "model")


def sign(folder):
    """As a defect of the code that makes the folder would."""
    write_json(folder / MANIFEST, {**read_manifest(folder), "files": files_of(folder)})


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts(run):
    return verify_model(run / "model")


def test_a_clean_process_sees_what_this_one_sees(run, facts):
    here = json.loads(json.dumps(describe_model(str(run / "model"), "auto", None)))
    assert np.array(here.pop("vectors")) == pytest.approx(np.array(facts["vectors"]), abs=1e-6)
    assert {name: facts[name] for name in here} == here and len(facts["asked"]) == len(facts["vectors"]) >= 21
    assert (facts["dimensions"], facts["end_token"], facts["last_tokens"]) == (32, "</s>", ["</s>"])
    assert 0 <= facts["reference_distance"] < 1e-5
    assert facts["oldest_sentence_transformers"] in ("5.4.0", "6.0.0")


def test_the_clean_process_has_neither_this_repository_nor_a_token(tmp_path, monkeypatch):
    """And what fails there is one line."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    source = """
def describe(path):
    import os
    try:
        import modeling.prompts
    except ModuleNotFoundError:
        if "HF_TOKEN" not in os.environ:
            raise ValueError("neither")
"""
    (tmp_path / "describe.py").write_text(source)
    describe = runpy.run_path(str(tmp_path / "describe.py"))["describe"]
    with pytest.raises(InputError, match=r"plain datasets cannot use it: ValueError: neither$"):
        in_clean_process(describe, tmp_path, library="datasets")


def test_reference_vectors_are_those_of_the_model(run):
    reference = json.loads((run / "model" / REFERENCE).read_text())
    names = [entry["prompt_name"] for entry in reference["vectors"]]
    assert names == [None] * 3 + ["query"] * 3 + ["query-1-shot"] * 3
    model = SentenceTransformer(str(run / "model"), device="cpu")
    texts = [model.prompts.get(entry["prompt_name"], "") + entry["text"] for entry in reference["vectors"]]
    expected = np.array([entry["vector"] for entry in reference["vectors"]])
    assert model.encode(texts) == pytest.approx(expected, abs=2e-6)


def test_only_files_that_readers_read_are_published(model):
    (model / "README.md").write_text("written by hand")
    (model / "notes.json").write_text("")
    names = model_files(model)
    assert {"config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", REFERENCE} <= set(names)
    assert not {MANIFEST, "README.md", "notes.json"} & set(names)


def edit(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def set_keys(name, **values):
    return lambda folder: write_json(folder / name, json.loads((folder / name).read_text()) | values)


def change_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["norm.weight"] = weights["norm.weight"].flip(0) * torch.linspace(0.1, 3, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def add_chat_template(folder):
    """As base repositories hold one; it must change what sentence-transformers reads, or the test shows nothing."""
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}how {{ message['content'] }} date </s>{% endfor %}"
    )
    config = json.loads((folder / "sentence_bert_config.json").read_text())
    config["modality_config"]["message"] = {"method": "forward", "method_output_name": "last_hidden_state"}
    write_json(folder / "sentence_bert_config.json", config)


SETTINGS = "config_sentence_transformers.json"
BROKEN = {
    "pickled weights": (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), "run this as code"),
    "code": (lambda folder: (folder / "modeling_x.py").write_text(""), "run this as code"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors weights"),
    "a local path": (lambda folder: set_keys("config.json", _name_or_path=f"{folder}/x")(folder), "a local folder"),
    "a lost prompt": (edit(SETTINGS, '"ArguAna-query"', '"ArguAna-q"'), "1 prompts are missing.* 'ArguAna-query'"),
    "a prompt that leaves no room": (edit(SETTINGS, "Given a question, ret", "date " * 80), "leaves no room"),
    "no end token": (set_keys("tokenizer.json", post_processor=None), "do not end in </s> but in"),
    "a chat template": (add_chat_template, "reads other tokens than its tokenizer gives"),
    "no reference": (lambda folder: (folder / REFERENCE).unlink(), f"{REFERENCE} is missing"),
    "a shot altered": (edit(SETTINGS, "Response: sort a list", "Response: read a file"), "are not that model"),
    "other weights": (change_weights, r"more than 0.001 \(float32\)"),
    "weights of another dtype": (set_keys(REFERENCE, dtype="int8"), "its weights were int8"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.usefixtures("in_this_process")
def test_what_is_broken_is_refused(case, model):
    spoil, message = BROKEN[case]
    spoil(model)
    sign(model)
    with pytest.raises(InputError, match=message):
        model_files(model)
        verify_model(model)


def test_what_the_library_cannot_load_is_refused_in_its_words(model):
    (model / "modules.json").write_text("{")
    with pytest.raises(InputError, match=r"model: plain sentence-transformers cannot use it: .*JSONDecodeError: .+$"):
        verify_model(model)


def test_a_module_that_is_not_the_librarys_own_is_named(facts):
    [problem] = verify._model_problems(facts | {"module_types": ["mine.Pooling"]})
    assert problem == "module mine.Pooling is not one of sentence-transformers' own"


@pytest.mark.usefixtures("in_this_process")
def test_lines_of_the_card_that_give_other_vectors_are_refused(run, facts, monkeypatch):
    pooled_otherwise = verify.encode_lines(facts | {"pooling_mode": "cls"})
    monkeypatch.setattr(verify, "encode_lines", lambda settings: pooled_otherwise)
    with pytest.raises(InputError, match=r"by the card's lines for transformers alone are .* apart, more than 0.001"):
        verify_model(run / "model")


def test_what_was_altered_is_refused(model):
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors was altered; make it again"):
        model_files(model)


@pytest.mark.usefixtures("in_this_process")
def test_half_precision_is_within_its_tolerance(model):
    """bfloat16 in another batch, as the vectors are compared one by one."""
    half = SentenceTransformer(str(model), device="cpu").bfloat16()
    half.save_pretrained(str(model), create_model_card=False)
    write_reference(half, model)
    sign(model)
    facts = verify_model(model)
    assert facts["dtype"] == facts["reference_dtype"] == "bfloat16"
    assert 0 < facts["reference_distance"] < TOLERANCE["bfloat16"]


@pytest.mark.usefixtures("in_this_process")
def test_an_end_token_is_asked_of_last_token_pooling_alone(tiny_decoder, tmp_path):
    encoder = build_encoder(tiny_decoder, max_seq_length=64, pooling="mean", prompts=verify.baked_prompts("Find it"))
    save_merged(encoder, tmp_path)
    write_reference(encoder, tmp_path)
    set_keys(REFERENCE, end_token="<s>")(tmp_path)
    facts = verify_model(tmp_path)
    assert (facts["pooling_mode"], facts["end_token"], facts["last_tokens"]) == ("mean", "<s>", ["</s>"])


# --- adapters -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(run, monkeypatch, in_this_process):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(run / "cache"))


@pytest.fixture
def adapter(run, tmp_path):
    return shutil.copytree(run / "adapter", tmp_path / "adapter")


@pytest.mark.usefixtures("cached")
def test_an_adapter_on_its_base_is_compared_with_the_merged_model(run, facts, adapter):
    from safetensors.torch import load_file, save_file

    found = verify_adapter(adapter, run / "model", facts)
    assert (found["base"], found["revision"], found["dtype"]) == (BASE, REVISION, "float32")
    assert 0 <= found["distance"] < 1e-5
    weights = load_file(adapter / "adapter_model.safetensors")
    weights = {name: -tensor if "lora_A" in name else tensor for name, tensor in weights.items()}
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    sign(adapter)
    with pytest.raises(InputError, match=r"on org/tiny@0123.* and those of .* apart, more than 0.001 \(float32\)"):
        verify_adapter(adapter, run / "model", facts)


@pytest.mark.usefixtures("in_this_process")
def test_a_base_that_is_not_here_is_not_fetched(run, facts):
    assert verify_adapter(run / "adapter", run / "model", facts)["distance"] is None


CONFIG = "adapter_config.json"
BROKEN_ADAPTERS = {
    "a local base": (set_keys(CONFIG, base_model_name_or_path="/models/x"), "its base is '/models/x'"),
    "a base beside it": (set_keys(CONFIG, base_model_name_or_path="1_Pooling"), "its base is '1_Pooling'"),
    "no revision": (set_keys(CONFIG, revision=None), "names no revision of its base org/tiny"),
    "no adapter": (lambda folder: (folder / CONFIG).unlink(), "adapter_config.json is missing"),
    "another tokenizer": (set_keys("tokenizer.json", version="2.0"), "tokenizer.json differs"),
}


@pytest.mark.parametrize("case", BROKEN_ADAPTERS)
def test_an_adapter_that_others_could_not_use_is_refused(case, run, adapter):
    spoil, message = BROKEN_ADAPTERS[case]
    spoil(adapter)
    sign(adapter)
    with pytest.raises(InputError, match=message):
        verify_adapter(adapter, run / "model", {})


# --- data -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("build"))


@pytest.fixture
def data(published, tmp_path):
    return shutil.copytree(published, tmp_path / "hub")


def first_shard(folder, config):
    return sorted((folder / config).glob("*.parquet"))[0]


def rewrite(folder, config, column, change):
    """Change a column of the config's first shard, and the manifest with it: as a defect in the build would."""
    path = first_shard(folder, config)
    table = pq.read_table(path)
    values = pa.array(change(table[column].to_pylist()), table[column].type)
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, table.schema.field(place), values), path)
    sign(folder)


def test_a_sound_folder_gives_its_facts(published):
    facts = verify_dataset(published)
    assert facts["configs"] == read_manifest(published)["rows"] and len(facts["configs"]) == 13
    on_disk = {path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()}
    assert set(facts["files"]) == on_disk - {MANIFEST} and len(on_disk) > 11


FILES = {
    "a shard is gone": (lambda folder: first_shard(folder, "train").unlink(), r"train/.* is missing"),
    "a shard was cut": (lambda folder: first_shard(folder, "train").write_bytes(b"PAR1"), "was altered"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "not a finished folder"),
    "another step's manifest": (
        lambda folder: write_json(folder / MANIFEST, {"files": {}}),
        "not the folder of a pub",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_not_as_they_were_made_are_refused(case, data):
    change, message = FILES[case]
    change(data)
    with pytest.raises(InputError, match=message) as caught:
        verify_dataset(data)
    assert "\n" not in str(caught.value)


def test_what_datasets_reads_is_compared_with_card_and_manifest(data, monkeypatch, tmp_path, in_this_process):
    rows = read_manifest(data)["rows"]["candidates"]
    edit("README.md", f"num_examples: {rows}\n", f"num_examples: {rows + 1}\n")(data)
    sign(data)
    with pytest.raises(Exception, match=f"expected.*num_examples={rows + 1}"):
        verify_dataset(data)
    edit("README.md", f"num_examples: {rows + 1}\n", f"num_examples: {rows}\n")(data)
    manifest = read_manifest(data)
    write_json(data / MANIFEST, {**manifest, "rows": {**manifest["rows"], "candidates": rows + 1}})
    sign(data)
    with pytest.raises(InputError, match=f"reads .*'candidates': {rows}.* manifest says .*'candidates': {rows + 1}"):
        verify_dataset(data)


def with_first(value):
    return lambda values: [value, *values[1:]]


ROWS = {
    "label of 1": ("candidates", "label", with_first(1.0), "candidates: label is outside (0, 1)"),
    "label of NaN": ("candidates", "label", with_first(float("nan")), "candidates: label is outside (0, 1)"),
    "label of null": ("candidates", "label", with_first(None), "candidates: label is outside (0, 1)"),
    "score of NaN": ("candidates", "teacher_score", with_first(float("nan")), "teacher_score is not finite"),
    "a label too few": ("train", "label", lambda rows: [rows[0][1:], *rows[1:]], "train: label has not 4 values"),
    "a label is 2": ("train", "label", lambda rows: [[2, *rows[0][1:]], *rows[1:]], "train: label is outside"),
    "an id twice": ("queries", "query_id", lambda ids: [ids[1], *ids[1:]], "queries: query_id that another row has"),
    "unknown query": ("candidates", "query_id", with_first("x"), "candidates: query_id is in no row of queries"),
    "unknown document": ("qrels", "document_id", with_first("x"), "qrels: document_id is in no row of documents"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_would_train_wrongly_are_refused(case, data, published):
    config, column, change, message = ROWS[case]
    configs = list(read_manifest(data)["rows"])
    assert verify._wrong_rows(published, configs) == []
    rewrite(data, config, column, change)
    assert any(message in problem for problem in verify._wrong_rows(data, configs))


def test_folders_of_the_publisher_are_not_published(tmp_path):
    """In a card, a plot's notes, a Parquet file's metadata; rows are the data's own."""
    files = {name: tmp_path / name for name in ("a.md", "b.png", "c.parquet", "sound.parquet")}
    files["a.md"].write_text(f"made in {tmp_path}")
    files["b.png"].write_bytes(b"\x89PNG tEXt" + str(tmp_path).encode() + b"\xff")
    table = pa.table({"text": [str(tmp_path)]})
    pq.write_table(table.replace_schema_metadata({"source": str(Path.cwd() / "x")}), files["c.parquet"])
    pq.write_table(table, files["sound.parquet"], use_dictionary=False)
    check_no_local_path({"sound.parquet": files.pop("sound.parquet")}, [tmp_path], "x")
    for name, file in files.items():
        with pytest.raises(InputError, match=f"x: {name} names a local folder"):
            check_no_local_path({name: file}, [tmp_path], "x")


@pytest.mark.usefixtures("in_this_process")
def test_a_data_set_that_names_a_folder_is_refused(data):
    (data / "README.md").write_text((data / "README.md").read_text() + f"made in {data.parent}")
    sign(data)
    with pytest.raises(InputError, match=r"README.md names a local folder"):
        verify_dataset(data)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("`dataset_name: runs/x/hub`", ["runs/x/hub"]),
        ("see https://huggingface.co/datasets//data/pairs", ["huggingface.co/datasets//data/pairs"]),
        ("see https://huggingface.co/datasets/./pairs", ["huggingface.co/datasets/./pairs"]),
        (f"in {Path.cwd()}/runs", [str(Path.cwd() / "runs")]),
        ("in /data/customers/x", ["/data/customers"]),
        ("https://huggingface.co/org/name and /usr/bin, and/or runs/x/hubs, an/runs/x/hub", []),
    ],
)
def test_local_paths_are_told_from_other_texts(text, found):
    assert local_paths(text, ["runs/x/hub", "/data/customers/pairs"]) == found


def test_paths_are_told_from_other_values_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / "faq.csv").touch()
    paths = ["my data/faq.csv", "./their data/hub", "/data/pairs"]
    texts = ["Retrieve yes/no/maybe", "... and so on", "whatever " * 99, "x" * 999, "org/name", "package:x"]
    assert named_paths({"a": [*texts, *paths], "b": {"c": 3}}) == paths
