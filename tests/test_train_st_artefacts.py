"""The two results of a run, adapter/ on its Hub base and merged model/, give equal vectors without code of ours."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from sentence_transformers import SentenceTransformer
from tiny_training import INSTRUCTION, train, two_stages, write_hub

from eval.evidence import base_model, hub_id, read_evidence
from modeling.recipe import read_stages
from modeling.reference import REFERENCE

REPOSITORY = Path(__file__).parents[1]
BASE, REVISION = "org/tiny", "0123456789abcdef0123456789abcdef01234567"
TEXTS = ["how do i parse a date", "read file", "sort " * 100, ""]

# In a process without our code: adapter/ by peft and transformers alone, as a stranger would read it (base and
# revision out of the adapter, state of the last token), model/ by sentence-transformers.
STRANGER = """
import json, sys
import torch
from peft import PeftConfig, PeftModel
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer
prompt, texts, dtypes = json.loads(sys.argv[1])

def read(dtype):
    config = PeftConfig.from_pretrained(f"{dtype}/adapter")
    base = AutoModel.from_pretrained(config.base_model_name_or_path, revision=config.revision, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(f"{dtype}/adapter")
    strings = [prompt + text for text in texts]
    batch = tokenizer(strings, padding=True, truncation=True, max_length=64, return_tensors="pt")
    last = batch["attention_mask"].sum(1) - 1
    assert (batch["input_ids"][range(len(texts)), last] == tokenizer.eos_token_id).all()

    def vectors(model):
        with torch.no_grad():
            states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return torch.nn.functional.normalize(states[range(len(texts)), last].float(), dim=1).tolist()

    before = vectors(base)
    adapted = vectors(PeftModel.from_pretrained(base, f"{dtype}/adapter"))
    model = SentenceTransformer(f"{dtype}/model", device="cpu")
    assert str(model.dtype) == f"torch.{dtype}" and model.prompts["query"] == prompt
    merged = model.encode(texts, prompt_name="query").astype(float).tolist()
    return before, adapted, merged, config.base_model_name_or_path, config.revision

rooms = ("common", "modeling", "dataset_builders", "train_st", "eval")
assert not [name for name in sys.modules if name.split(".")[0] in rooms]
print(json.dumps({dtype: read(dtype) for dtype in dtypes}))
"""
TRAIN = "import json, sys, train_st; [train_st.main(argv) for argv in json.loads(sys.argv[1])]"


def test_adapter_on_its_base_equals_the_merged_model(tiny_decoder, tmp_path):
    # bfloat16 keeps 8 bits: the merged weights are rounded once more than base and adapter apart
    least_cosine = {"float32": 1 - 1e-6, "bfloat16": 0.999}
    snapshot = tmp_path / "hf" / "hub" / f"models--{BASE.replace('/', '--')}" / "snapshots" / REVISION
    shutil.copytree(tiny_decoder, snapshot)
    main = snapshot.parents[1] / "refs" / "main"  # offline, where the cache says what the base's name stands for
    main.parent.mkdir()
    main.write_text(REVISION)
    recipe = two_stages(Path(BASE), write_hub(tmp_path / "data" / "hub"))
    lora = {key: value for key, value in recipe["stages"][1].items() if key not in ("name", "mini_batch_size")}
    recipe |= {**lora, "eval_strategy": "no", "learning_rate": "1e-2"}
    # equal settings in both stages: one adapter, on the Hub base
    recipe["stages"] = [recipe["stages"][0], {"name": "retrieval"}]
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    environment.pop("HF_HUB_CACHE", None)

    def python(cwd: Path, *arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    command = ["--config", str(tmp_path / "train.yaml")]
    runs = [[*command, "--dtype", dtype, "--output_dir", str(tmp_path / "runs" / dtype)] for dtype in least_cosine]
    python(REPOSITORY, "-c", TRAIN, json.dumps(runs))
    elsewhere = tmp_path / "elsewhere"
    for dtype in least_cosine:
        for name in ("adapter", "model"):
            shutil.copytree(tmp_path / "runs" / dtype / name, elsewhere / dtype / name)
    settings = [f"Instruct: {INSTRUCTION}\nQuery: ", TEXTS, list(least_cosine)]
    read = json.loads(python(elsewhere, "-I", "-c", STRANGER, json.dumps(settings)).splitlines()[-1])
    for dtype, least in least_cosine.items():
        before, adapted, merged = map(np.array, read[dtype][:3])
        assert read[dtype][3:] == [BASE, REVISION]
        manifest = json.loads((tmp_path / "runs" / dtype / "sts" / "manifest.json").read_text())
        assert manifest["inputs"]["start"] == f"{BASE}@{REVISION}"
        assert (adapted * merged).sum(axis=1).min() > least
        assert (before * merged).sum(axis=1).max() < 0.99  # it is the adapter that makes them equal
    for path in elsewhere.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), f"{path} holds a local path"


def test_folders_of_a_run_read_as_no_hub_ids_from_another_folder(tiny_decoder, tmp_path, monkeypatch):
    """models/base and data/hub look like ORG/NAME to whoever does not stand beside them: a card would link to them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_decoder, tmp_path / "models" / "base")
    write_hub(tmp_path / "data" / "hub")
    recipe = two_stages("models/base", "data/hub") | {"max_steps": 1, "eval_strategy": "no"}
    run = train(tmp_path, {**recipe, "stages": recipe["stages"][1:]})
    monkeypatch.chdir(run)
    evidence = read_evidence(run)
    assert base_model(evidence["recipe"]) is None and [*map(hub_id, evidence["data"])] == [None]
    assert read_stages(run)["start"]["model"] == "./models/base"


def test_reference_vectors_of_a_training_in_bfloat16_are_those_of_the_saved_weights(recipe, tmp_path):
    """The arithmetic of training ends with it: what is published is in float32, and compared as such."""
    recipe = {**recipe, "stages": recipe["stages"][1:]}
    run = train(tmp_path, recipe, "--bf16", "true", "--max_steps", "1", "--eval_strategy", "no")
    reference = json.loads((run / "model" / REFERENCE).read_text())
    model = SentenceTransformer(str(run / "model"), device="cpu")
    assert reference["dtype"] == str(model.dtype).removeprefix("torch.") == "float32"
    for entry in reference["vectors"]:
        vector = model.encode(entry["text"], prompt_name=entry["prompt_name"])
        np.testing.assert_allclose(vector, entry["vector"], atol=2e-6)
