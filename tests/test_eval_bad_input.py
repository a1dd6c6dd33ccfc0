"""Bad input to the commands of evaluation and release: one line, exit code 2, nothing left behind."""

import json
import shutil
from pathlib import Path

import pytest

import push_to_hub
from dataset_builders.cli import run
from dataset_builders.folders import read_arrow, read_parquet, write_arrow, write_parquet
from eval import report, retrieval, run_mteb, search


def delete(name):
    def change(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def write(name, text):
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return change


def table(name, edit):
    def change(folder: Path) -> None:
        if name.endswith(".arrow"):
            rows = edit(read_arrow(folder / name))
            write_arrow(folder / name, rows.to_batches(), rows.schema)
        else:
            write_parquet(folder / name, edit(read_parquet(folder / name)))

    return change


def nothing(folder: Path) -> None:
    pass


RETRIEVAL = (retrieval.main, ["--run", "RUN", "--data", "RUN/data", "--output_dir", "OUT"])
REPORT = (report.main, ["RUN/results", "--output_dir", "OUT"])
SEARCH = (search.main, ["--model", "RUN/model", "--data", "RUN/data", "how do i parse a date"])
MTEB = (run_mteb.main, ["--model", "RUN/model", "--tasks", "STSBenchmark", "--output_dir", "OUT"])
PUSH = (push_to_hub.main, ["model", "RUN/model", "org/name", "--dry_run", "--output_dir", "OUT"])
DOCUMENTS, QRELS = "data/corpus/documents.arrow", "data/corpus/qrels.parquet"

# (command, change of the run before it, arguments added, words of the answer)
CASES = {
    "retrieval: no run": (RETRIEVAL, delete("recipe.yaml"), [], "not a training run"),
    "retrieval: not trained": (RETRIEVAL, delete("model"), [], "finish the training"),
    "retrieval: no corpus": (RETRIEVAL, delete("data/corpus"), [], "no such file"),
    "retrieval: empty corpus": (RETRIEVAL, table(DOCUMENTS, lambda rows: rows.slice(0, 0)), [], "no documents"),
    "retrieval: wrong column": (
        RETRIEVAL,
        table(DOCUMENTS, lambda rows: rows.rename_columns(["id", "text"])),
        [],
        "no column 'document_id'",
    ),
    "retrieval: unknown document in qrels": (
        RETRIEVAL,
        table(DOCUMENTS, lambda rows: rows.slice(1)),
        [],
        "document 'd0' of query 'q0' is not in documents.arrow",
    ),
    "retrieval: unknown split": (RETRIEVAL, nothing, ["--split", "dev"], "splits: test, train"),
    "retrieval: unfinished candidates": (
        RETRIEVAL,
        delete("data/candidates/manifest.json"),
        [],
        "not a finished folder",
    ),
    "retrieval: split without candidates": (RETRIEVAL, nothing, ["--split", "train"], "source.eval_splits"),
    "retrieval: unknown flag": (RETRIEVAL, nothing, ["--top", "5"], "unrecognized arguments"),
    "search: empty question": (SEARCH, nothing, [" "], "unrecognized arguments"),
    "search: no documents asked for": (SEARCH, nothing, ["--top_k", "0"], "use 1 or more"),
    "search: no model": (SEARCH, delete("model"), [], "no such folder, and no Hub id"),
    "search: folder without a model": (SEARCH, delete("model/modules.json"), [], "not a SentenceTransformer folder"),
    "search: broken model": (SEARCH, write("model/config.json", "{"), [], "cannot be loaded"),
    "search: broken weights": (SEARCH, write("model/model.safetensors", "no weights"), [], "cannot be loaded"),
    "search: documents are no Parquet": (SEARCH, write(DOCUMENTS, "a,b"), [], "not a readable Arrow file"),
    "report: not evaluated": (REPORT, nothing, [], "metrics.json: no such file"),
    "report: broken metrics": (REPORT, write("results/metrics.json", "{"), [], "not readable as JSON"),
    "report: other metrics": (REPORT, write("results/metrics.json", "{}"), [], "not written by eval.retrieval"),
    "report: no output": ((report.main, ["RUN/results"]), nothing, [], "--output_dir"),
    "mteb: unknown task": (MTEB, nothing, ["--tasks", "STSBenchmar"], "Did you mean: 'STSBenchmark'"),
    "mteb: task and benchmark": (MTEB, nothing, ["--benchmark", "MTEB(eng, v2)"], "not allowed with"),
    "mteb: no batch": (MTEB, nothing, ["--batch_size", "0"], "use 1 or more"),
    "mteb: no model": (MTEB, delete("model"), [], "no such folder, and no Hub id"),
    "mteb: Hub out of reach": (MTEB, nothing, ["--model", "org/none"], "mteb cannot load it"),
    "push: upload": ((push_to_hub.main, ["model", "RUN/model", "org/name"]), nothing, [], "add --dry_run"),
    "push: bad name": ((push_to_hub.main, ["model", "RUN/model", "a b/c", "--dry_run"]), nothing, [], "'a b/c'"),
    "push: no organisation": ((push_to_hub.main, ["model", "RUN/model", "c", "--dry_run"]), nothing, [], "ORG/NAME"),
    "push: no model": (PUSH, delete("model/modules.json"), [], "not a SentenceTransformer folder"),
    "push: no weights": (PUSH, delete("model/model.safetensors"), [], "no .safetensors weights"),
    "push: no recipe": (PUSH, delete("recipe.yaml"), [], "name its folder with --run"),
    "push: no ledger": (PUSH, delete("ledger.json"), [], "ledger.json: no such file"),
    "push: a data set": ((push_to_hub.main, ["dataset", "RUN", "org/name"]), nothing, [], "invalid choice"),
}


def files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (main, argv), change, added, answer = CASES[name]
    copy = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("embeddings"))
    change(copy)
    before = files(tmp_path)
    argv = [arg.replace("RUN", str(copy)).replace("OUT", str(tmp_path / "out")) for arg in [*argv, *added]]
    with pytest.raises(SystemExit) as stopped:
        run(main, argv)
    shown = capsys.readouterr().err.splitlines()
    lines = [line for line in shown if line.strip() and "%|" not in line]  # without progress bars
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert answer in lines[0]
    assert files(tmp_path) == before


def test_there_are_enough_cases():
    assert len(CASES) >= 30


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(Exception, match="no such file") as raised:
        run(report.main, [str(tmp_path), "--output_dir", str(tmp_path / "out"), "--debug"])
    assert not isinstance(raised.value, SystemExit)


def test_an_empty_question_is_refused(capsys):
    with pytest.raises(SystemExit):
        run(search.main, ["--model", "m", "--data", "d", "  "])
    assert "the question is empty" in capsys.readouterr().err


def test_a_card_needs_the_metrics_it_found_to_be_whole(tiny_run, tmp_path, capsys):
    copy = shutil.copytree(tiny_run, tmp_path / "run")
    (copy / "results").mkdir()
    (copy / "results" / "metrics.json").write_text(json.dumps([1]))
    with pytest.raises(SystemExit):
        run(push_to_hub.main, ["model", str(copy / "model"), "org/name", "--dry_run"])
    assert "not written by eval.retrieval" in capsys.readouterr().err
