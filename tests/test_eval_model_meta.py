"""The file by which mteb knows a published model, and the results that go with it: one commit, and mteb takes both."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from hub_client import run_python
from huggingface_hub import ModelCardData
from local_hub import READ_TOKEN, LocalHub
from tiny_release import BASE

import push_to_hub
from common.cli import InputError
from common.steps import folder_step, write_json
from eval import model_meta, run_mteb
from eval.evidence import read_evidence
from modeling.encoder import save_merged
from modeling.recipe import read_stages
from modeling.reference import write_reference
from release.model_card import card_metadata
from release.verify import model_files

ROOT = Path(__file__).parents[1]
NAME = "my-org/tiny"
CODE = "https://github.com/my-org/graded-embedder"
# What a user does from the pushed commit on, in one process: the client reads its endpoint when it is imported.
SCRIPT = """
import json, runpy, sys
import push_to_hub
from argparse import Namespace
from mteb.cli.build_cli import build_cli
from mteb.mocks import MOCK_TASK_REGISTRY
from mteb.models import ModelMeta
from mteb.models.model_implementations import MODEL_REGISTRY
from pathlib import Path
from common.cli import InputError
from eval import model_meta
from eval.run_mteb import evaluate, load_for_mteb

name, commit, other, run, code, fork, results = sys.argv[1:]
for wrong in (f"{name}@{other}", f"{name}@nowhere", "my-org/private"):
    try:
        model_meta.main([wrong, "--run", run])
    except InputError as error:
        print(json.dumps(str(error)))
model_meta.main([f"{name}@{commit}", "--run", run, "--code", code, "--output_dir", fork])
drafted = ModelMeta.from_hub(name, commit)
[meta] = [value for value in runpy.run_path(f"{fork}/my_org_models.py").values() if isinstance(value, ModelMeta)]
print(json.dumps([{**value.to_dict(), "release_date": str(value.release_date)} for value in (meta, drafted)]))
load_for_mteb(f"{name}@{commit}")
print("known from here on", file=sys.stderr)
MODEL_REGISTRY[name] = meta  # as mteb does when it finds the file in its folder
evaluate(load_for_mteb(f"{name}@{commit}"), [MOCK_TASK_REGISTRY["MockSTSTask"]()], Path(results), batch_size=8)
submit = build_cli().parse_args(["submit-results", "-m", name, "--output-folder", results])
submit.func(submit)
(Path(results) / "results" / name.replace("/", "__") / other).mkdir()
asked = Namespace(repo_id=name, path=f"{run}/model", dry_run=False)
print(json.dumps(push_to_hub.evaluated_commits(asked, [Path(results), Path(results)])))
"""


@pytest.fixture(scope="module")
def run_folder(adapted_run):
    """Trained on two data sets that state their tasks, both of them published."""
    folder = adapted_run
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    del recipe["student"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "model_name_or_path": BASE}))
    resolved = read_stages(folder)
    for stage, task in zip(resolved["stages"], ("ArguAna", "MSMARCO"), strict=True):
        hub = folder / "graded" / stage["name"] / "hub"
        source = {"kind": "hub", "dataset": f"org/{stage['name']}", "split": "train", "training_datasets": [task]}
        with folder_step(hub, {"recipe": {"source": source}}) as step:
            step.finish(counts=["rows"], rows={"train": 3})
        stage["datasets"] = {stage["name"]: {"dataset_name": str(hub)}}
    write_json(folder / "stages.json", resolved)
    return folder


def write_results_repository(folder):
    """What mteb clones, with nobody's results, and the settings that let it find this one under the real address."""
    environment = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{folder}.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/embeddings-benchmark/results",
        **{f"GIT_{who}_{what}": "t@t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    (folder / "results").mkdir(parents=True)
    (folder / "results" / "README.md").write_text("results\n")
    for command in (
        ["init", "-q", "-b", "main"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t", "commit", "-qm", "t"],
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return environment


def test_a_dense_layers_numbers_count_as_the_models(adapted_run, tmp_path):
    """As of a finished embedder with a projection, whose weights lie in a folder of their own."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    first, pooling, *_ = SentenceTransformer(str(adapted_run / "model"), device="cpu")
    layers = [Dense(32, 24), Dense(24, 16)]  # whose tensors have the same names
    model = SentenceTransformer(modules=[first, pooling, *layers], prompts={"query": "q"})
    save_merged(model, tmp_path / "model")
    write_reference(model, tmp_path / "model")
    facts, parameters = model_meta.read_folder(tmp_path / "model"), list(model.parameters())
    assert facts["embed_dim"] == 16 and facts["n_parameters"] == sum(map(torch.numel, parameters))
    assert facts["memory_usage_mb"] == round(sum(each.nbytes for each in parameters) / 2**20)


def test_from_a_pushed_commit_to_what_mteb_takes(run_folder, tmp_path):
    metadata = card_metadata(NAME, read_evidence(run_folder), "apache-2.0", ["my-org/sts", "my-org/retrieval"])
    files = {name: path.read_bytes() for name, path in model_files(run_folder / "model").items()}
    environment = write_results_repository(tmp_path / "remote")
    with LocalHub() as hub:
        for name in ("sts", "retrieval"):
            hub.create(f"datasets/my-org/{name}")
        hub.create("my-org/private", files, private=True)
        other = hub.create(NAME, {**files, "model.safetensors": b"other weights"})
        commit = hub.commit(NAME, {**files, "README.md": f"---\n{metadata.to_yaml()}\n---\n# Tiny\n".encode()})
        hub.commit(NAME, {"README.md": b"---\nlicense: mit\n---\nwritten later"})
        places = [str(tmp_path / "fork"), str(tmp_path / "results")]
        arguments = [NAME, commit, other, str(run_folder), CODE, *places]
        script = f"import sys; sys.argv[1:] = {arguments!r}\n{SCRIPT}"
        done = run_python(script, hub, tmp_path, HF_TOKEN=READ_TOKEN, **environment)
    assert done.returncode == 0, done.stderr
    refused, unfound, private, (meta, drafted) = map(json.loads, done.stdout.splitlines()[:4])
    assert "model.safetensors is not that of" in refused and other in refused
    assert "the Hub did not serve it" in unfound
    assert private.startswith("my-org/private: not public")
    before, after = done.stderr.split("known from here on")
    assert "mteb has no file about it" in before and "no file about it" not in after
    assert "by mteb's rule 97 % zero-shot on MTEB(eng, v2)" in done.stderr
    given = {"name": NAME, "revision": commit, "license": "apache-2.0", "open_weights": True, "adapted_from": BASE}
    given |= {"public_training_code": CODE, "max_tokens": 64, "use_instructions": True, "citation": None}
    hub_of = "https://huggingface.co/datasets/my-org"
    given |= {"public_training_data": f"{hub_of}/sts, {hub_of}/retrieval"}
    assert {field: meta[field] for field in given} == given
    assert sorted(meta["training_datasets"]) == ["ArguAna", "MSMARCO"]
    same = ["loader", "n_parameters", "n_embedding_parameters", "memory_usage_mb", "embed_dim", "similarity_fn_name"]
    same += ["modalities", "model_type", "reference", "release_date"]
    assert {field: meta[field] for field in same} == {field: drafted[field] for field in same}
    # what mteb drafts by itself is of main, and not of the length that the model was trained for
    assert (drafted["license"], drafted["max_tokens"], drafted["training_datasets"]) == ("mit", 128, None)

    # the card of the next push has these scores, and none of another model's
    assert json.loads(done.stdout.splitlines()[-1]) == [commit]

    clone = tmp_path / "results" / "remote"
    listed = subprocess.run(["git", "show", "--name-only", "--format="], cwd=clone, capture_output=True, text=True)
    place = f"results/my-org__tiny/{commit}"
    assert sorted(listed.stdout.split()) == [
        f"{place}/MockSTSTask.json",
        f"{place}/model_meta.json",
        f"{place}/run_settings.jsonl",
    ]
    told = json.loads((clone / place / "model_meta.json").read_text())
    told["training_datasets"].sort()
    assert {field: told[field] for field in given} == given and told["training_datasets"] == ["ArguAna", "MSMARCO"]


def test_before_it_is_published_nobody_is_asked(run_folder, tmp_path, capsys, monkeypatch):
    model_meta.main([NAME, "--run", str(run_folder), "--dry_run"])
    shown = capsys.readouterr()
    (tmp_path / "shown.py").write_text(shown.out)
    meta = runpy.run_path(str(tmp_path / "shown.py"))["my_org_tiny"]
    assert (meta.embed_dim, meta.adapted_from, meta.revision, meta.output_dtypes) == (32, BASE, None, None)
    unknown = ["revision", "release_date", "license", "open_weights", "public_training_code", "public_training_data"]
    unknown += ["citation", "contacts", "languages"]
    lines = [f"{field} is None: {model_meta.UNKNOWN[field]}" for field in unknown]
    assert [line for line in shown.err.splitlines() if " is None: " in line] == lines


def test_weights_in_half_precision_are_declared(run_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(run_folder / "model", tmp_path / "model")
    save_file(
        {key: value.bfloat16() for key, value in load_file(folder / "model.safetensors").items()},
        folder / "model.safetensors",
    )
    saved = json.loads((folder / "reference_vectors.json").read_text())
    (folder / "reference_vectors.json").write_text(json.dumps({**saved, "dtype": "bfloat16"}))
    fields = model_meta.read_folder(folder)
    assert fields["n_parameters"] == model_meta.read_folder(run_folder / "model")["n_parameters"]
    meta = model_meta.make_meta(name=NAME, training_datasets=set(), **fields)
    source = model_meta.to_source(meta)
    assert "output_dtypes=OutputDType.BF16" in source and "import OutputDType" in source
    (tmp_path / "x.py").write_text(source)
    [read] = [value for value in runpy.run_path(str(tmp_path / "x.py")).values() if isinstance(value, type(meta))]
    assert read.to_python() == meta.to_python()


def test_a_file_of_other_models_is_never_overwritten(run_folder, tmp_path):
    fields = model_meta.read_folder(run_folder / "model")
    meta = model_meta.make_meta(name=NAME, **fields)
    for _ in range(2):
        path = model_meta.write_source(meta, tmp_path / "new")
        assert path == tmp_path / "new" / "my_org_models.py" and path.read_text() == model_meta.to_source(meta)
    with pytest.raises(InputError, match="is there already"):
        model_meta.write_source(model_meta.make_meta(name=NAME, license="mit", **fields), tmp_path / "new")
    assert path.read_text() == model_meta.to_source(meta)


def test_a_licence_is_one_that_mteb_takes(run_folder):
    """Of the Hub's names mteb does not know all: llama3 is one that it knows by its address alone."""
    address = "https://llama.com/llama3/license"
    assert model_meta.licence(ModelCardData(license="mit", license_link=address)) == "mit"
    assert model_meta.licence(ModelCardData(license="llama3", license_link=address)) == address
    fields = model_meta.read_folder(run_folder / "model")
    assert model_meta.make_meta(name=NAME, license=address, **fields).license == address
    for card in (ModelCardData(), ModelCardData(license="llama3")):
        with pytest.raises(InputError, match=f"mteb knows no licence {card.license!r}"):
            model_meta.licence(card)
    with pytest.raises(InputError, match="mteb does not take 'mine' as license"):
        model_meta.make_meta(name=NAME, license="mine", **fields)


def test_training_data_are_public_only_if_all_are():
    class Anyone:
        def repo_exists(self, name, repo_type, token):
            return (repo_type, token) == ("dataset", False) and name != "org/hidden"

    def told(data_sets, *names):
        return model_meta.public_data(Anyone(), ModelCardData(datasets=list(names) or None), data_sets)

    assert told(1, "org/a") == "https://huggingface.co/datasets/org/a"
    assert told(2, "org/a") is told(2, "org/a", "org/hidden") is told(1) is told(0) is None


def test_a_model_that_was_saved_by_others_is_refused(run_folder, tmp_path):
    """sentence-transformers alone leaves the length out of sentence_bert_config.json."""
    folder = shutil.copytree(run_folder / "model", tmp_path / "model")
    (folder / "sentence_bert_config.json").write_text("{}")
    with pytest.raises(InputError, match="not as train_st"):
        model_meta.read_folder(folder)


def test_the_commands_of_the_page_are_commands():
    """Each with flags that its parser knows; all but git, gh, make and pip are parsed."""
    from mteb.cli.build_cli import build_cli

    text = (ROOT / "docs" / "leaderboard.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    parsers = {"eval.model_meta": model_meta._parse, "eval.run_mteb": run_mteb._parse}
    parsed = []
    for command in filter(None, commands):
        if command[:2] == ["python", "-m"]:
            parsers[command[2]](command[3:])
            parsed.append(command[2])
        elif command[0] == "mteb":
            build_cli().parse_args(command[1:])
            parsed.append(command[1])
        elif command[0] == "python":
            assert command[1] == "push_to_hub.py"
            push_to_hub._parse(command[2:])
            parsed.append(command[1])
    assert sorted({*parsed}) == ["eval.model_meta", "eval.run_mteb", "mock-run", "push_to_hub.py", "submit-results"]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert all((ROOT / "docs" / link).exists() for link in links)
