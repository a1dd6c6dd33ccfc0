"""Bad input to every command: one line that starts with `error:` and says what and where, exit code 2, nothing left.

Commands run in a copy of a folder of sound inputs and in this process; a few run in a process of their own, and must
answer the same.
"""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import bad_input as bad
import datasets  # noqa: F401  here, as its log keeps the stderr of the moment
import pytest
import yaml
from spoiling import keys
from tiny_data import write_encoder, write_recipe, write_set
from tiny_training import two_stages, write_hub

from common.cli import run

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Command:
    module: str
    inputs: str  # the fixture of its sound inputs
    arguments: list[str]
    keys: str = ""
    flags: str = ""
    files: dict[str, tuple[Callable[[Path], None], str]] = field(default_factory=dict)

    def cases(self) -> dict[str, tuple[Callable[[Path], None], list[str], str]]:
        """Name -> (what is done to the folder, arguments, words of the answer)."""
        found = {name: (change, [], answer) for name, (change, answer) in self.files.items()}
        for line in self.keys.strip().splitlines():
            case, answer = map(str.strip, line.split(" | "))
            found[case] = keys(**yaml.safe_load(case)), [], answer
        for line in self.flags.strip().splitlines():
            case, answer = map(str.strip, line.split(" | "))
            found[case] = (lambda folder: None), shlex.split(case), answer
        return found


BUILD = "dataset_builders.build"
RUN = ["--run", ".", "--data", "data", "--output_dir", "out"]
RECIPE = ["--config", "recipe.yaml", "--output_dir", "out"]
REPORT = ["results", "--output_dir", "out"]
SEARCH = ["how do i", "--model", "model", "--data", "data"]
FROZEN = ["--model", "model", "--output_dir", "out", "--tasks", "STSBenchmark", "--data_root", "data"]
MTEB = ["--model", "model", "--output_dir", "out", "--tasks", "STSBenchmark"]
COMMANDS = {
    "build": Command(
        "dataset_builders.build", "build_inputs", RECIPE, bad.BUILD_KEYS, bad.BUILD_FLAGS, bad.BUILD_FILES
    ),
    "train_st": Command("train_st", "train_inputs", RECIPE, bad.TRAIN_KEYS, bad.TRAIN_FLAGS, bad.TRAIN_FILES),
    "retrieval": Command("eval.retrieval", "run_inputs", RUN, "", bad.RETRIEVAL_FLAGS, bad.RETRIEVAL_FILES),
    "search": Command("eval.search", "run_inputs", SEARCH, "", bad.SEARCH_FLAGS, bad.BAD_MODEL),
    "run_mteb": Command("eval.run_mteb", "run_inputs", MTEB, "", bad.MTEB_FLAGS, bad.BAD_MODEL),
    "frozen": Command("eval.frozen", "run_inputs", FROZEN, "", bad.FROZEN_FLAGS),
    "ablate": Command("eval.ablate", "ablation_inputs", RECIPE, bad.ABLATE_KEYS, "", bad.RECIPE_FILES),
    "report": Command("eval.report", "run_inputs", REPORT, "", "--x | --x", bad.REPORT_FILES),
    "model_meta": Command("eval.model_meta", "run_inputs", ["--run", ".", "--dry_run"], "", bad.META_FLAGS),
    "push_to_hub": Command("push_to_hub", "run_inputs", ["model", "model", "--dry_run"], "", bad.PUSH_FLAGS),
    "a run": Command("push_to_hub", "run_inputs", ["model", "model", "org/name", "--dry_run"], "", "", bad.RUN_FILES),
    "bench_mining": Command("benchmarks.bench_mining", "run_inputs", [], "", bad.BENCHMARK_FLAGS),
    "bench_prefix": Command("benchmarks.bench_prefix", "run_inputs", [], "", bad.PREFIX_FLAGS),
    "bench_scale": Command("benchmarks.bench_scale", "run_inputs", [], "", bad.BENCHMARK_FLAGS),
}
CASES = [(name, case) for name, command in COMMANDS.items() for case in command.cases()]


def test_every_command_has_cases():
    assert len(CASES) >= 200
    scripts = [*REPOSITORY.glob("*.py"), *(REPOSITORY / "eval").glob("*.py")]
    assert {path.stem for path in scripts if "if __name__" in path.read_text()} <= COMMANDS.keys()


@pytest.fixture(scope="module")
def build_inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    write_set(folder / "set")
    write_encoder(folder / "encoder")
    write_recipe(folder / "recipe.yaml", Path("set"), Path("encoder"))
    return folder


@pytest.fixture(scope="module")
def train_inputs(tmp_path_factory, tiny_decoder):
    folder = tmp_path_factory.mktemp("train")
    shutil.copytree(tiny_decoder, folder / "model")
    write_hub(folder / "hub")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(two_stages(Path("model"), Path("hub"))))
    return folder


@pytest.fixture(scope="module")
def ablation_inputs(train_inputs, tmp_path_factory):
    folder = shutil.copytree(train_inputs, tmp_path_factory.mktemp("ablate") / "work")
    (folder / "recipe.yaml").rename(folder / "base.yaml")
    recipe = {"base": "base.yaml", "data": "data", "baseline": "soft", "seeds": [0]}
    recipe["variants"] = {"soft": {}, "kl": {"retrieval.loss": "kl"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def run_inputs(tiny_run, tmp_path_factory):
    unused = shutil.ignore_patterns("embeddings", "results")
    return shutil.copytree(tiny_run, tmp_path_factory.mktemp("run") / "run", ignore=unused)


@pytest.fixture
def spoil(request, tmp_path):
    """A copy of a command's inputs with the case's change, its arguments there, and words of the answer."""

    def spoil(name, case):
        change, added, answer = COMMANDS[name].cases()[case]
        folder = shutil.copytree(request.getfixturevalue(COMMANDS[name].inputs), tmp_path / "work")
        change(folder)
        return folder, [*COMMANDS[name].arguments, *added], answer

    return spoil


def everything(folder):
    """What lies in a folder, and when it was written; empty folders for vectors aside."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir() or path.suffix == ".partial")
    return {path: path.lstat().st_mtime_ns for path in paths}


def refusal(shown: str) -> str:
    """The one line that is no progress bar."""
    lines = [line for line in shown.replace("\r", "\n").splitlines() if line.strip()]
    assert "Traceback" not in shown
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], lines
    assert len(lines[-1]) <= 2010 and lines[-1].isprintable()
    assert not [line for line in lines[:-1] if "it/s" not in line and "examples" not in line and "%|" not in line]
    return lines[-1]


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}: {case}" for name, case in CASES])
def test_bad_input_is_refused_in_one_line(name, case, spoil, tmp_path, capsys, monkeypatch):
    main = importlib.import_module(COMMANDS[name].module).main
    folder, arguments, answer = spoil(name, case)
    before = everything(tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DATA_ROOT", raising=False)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(main, arguments)
    assert stop.value.code == 2
    assert answer in refusal(capsys.readouterr().err)
    assert everything(tmp_path) == before


def process(name, arguments, folder, **variables):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    command = [sys.executable, "-m", COMMANDS[name].module, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "case"),
    [("build", "key twice, deep"), ("train_st", "stages: [{name: ../x}]")],
)
def test_a_process_of_its_own_answers_the_same(name, case, spoil, tmp_path):
    folder, arguments, answer = spoil(name, case)
    before = everything(tmp_path)
    done = process(name, arguments, folder)
    assert done.returncode == 2 and done.stdout == ""
    assert answer in refusal(done.stderr)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("variables", "answer"),
    [
        ({"HF_TOKEN": "hf_secret_é"}, "HF_TOKEN holds a character that no token has"),
        ({"HF_ENDPOINT": "nonsense"}, "missing an 'http://'"),
    ],
)
def test_a_hub_that_cannot_be_asked_is_told_without_the_token(variables, answer, build_inputs, tmp_path):
    folder = shutil.copytree(build_inputs, tmp_path / "work")
    keys(source={"kind": "hub", "dataset": "org/none"})(folder)
    nobody = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path / "home")}
    done = process("build", RECIPE, folder, **{**nobody, **variables})
    assert done.returncode == 2 and answer in refusal(done.stderr)
    assert "secret" not in done.stderr and not (folder / "out").exists()


def test_a_further_set_without_rows_is_told_before_the_first_is_mined(build_inputs, tmp_path, monkeypatch, capsys):
    from dataset_builders import build

    folder = shutil.copytree(build_inputs, tmp_path / "work")
    keys(publish=[{"num_negatives": 2}, {"num_negatives": 900}], **{"source.path": "elsewhere"})(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DATA_ROOT", "/no/such/root")
    with pytest.raises(SystemExit):
        run(build.main, RECIPE)
    assert "searched: /no/such/root/elsewhere, elsewhere" in refusal(capsys.readouterr().err)
    keys(**{"source.path": "set"})(folder)
    with pytest.raises(SystemExit):
        run(build.main, RECIPE)
    assert "publish: train-n900: " in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in (folder / "out").iterdir()} == {"corpus", "candidates", "scores", "embeddings"}


def test_debug_shows_the_traceback(tmp_path):
    from eval import report

    with pytest.raises(Exception, match="no such file") as raised:
        run(report.main, [str(tmp_path), "--output_dir", str(tmp_path / "out"), "--debug"])
    assert not isinstance(raised.value, SystemExit)


@pytest.mark.parametrize(("question", "answer"), [("\u2003 ", "is empty"), ("a\udcff", "is not UTF-8")])
def test_questions_that_are_none(question, answer, capsys):
    from eval import search

    with pytest.raises(SystemExit) as stop:
        run(search.main, ["--model", "m", "--data", "d", question])
    assert stop.value.code == 2 and answer in refusal(capsys.readouterr().err)
