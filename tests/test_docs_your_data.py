"""docs/your-data.md: every example builds, its names are those that are known, and what inspect writes builds."""

import json
import re
from pathlib import Path

import pytest
from chat_server import ChatServer
from tiny_data import write_encoder

from common.cli import InputError
from common.recipes import read_yaml
from common.steps import read_manifest
from dataset_builders.build import main
from dataset_builders.layouts import NAMES

PAGE = Path(__file__).parents[1] / "docs" / "your-data.md"


@pytest.fixture(scope="module")
def small_encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("model") / "encoder")


@pytest.mark.parametrize("section", re.split(r"(?m)^## ", PAGE.read_text())[2:], ids=lambda text: text.splitlines()[0])
def test_every_example_of_the_page_builds_as_it_stands_there(section, small_encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"(?ms)^```(\w+) ?(\S*)\n(.*?)^```$", section)
    for language, name, text in blocks:
        if language == "python":
            exec(text, {})
        else:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
    sts = "task_type: sts" in section
    flags = [] if sts else ["--dense.model", str(small_encoder)]
    with ChatServer(lambda document: " ".join(document.split()[1::3])) as server:
        flags += ["--source.queries.model", server.address] if "kind: generate" in section else []
        main(["--config", "recipe", "--output_dir", "data", *flags])
    assert read_manifest(Path("data/hub"))["rows"]["sts" if sts else "train"] >= 1
    assert 2 <= len(blocks) <= 5


def test_the_page_names_the_columns_that_are_known():
    table = PAGE.read_text().partition("<!-- names: begin -->")[2].partition("<!-- names: end -->")[0]
    rows = re.findall(r"(?m)^\| `(\w+)` \| (.*) \|$", table)
    assert {name: others.replace("`", "").split(", ") for name, others in rows} == {
        name: others.split() for name, others in NAMES.items()
    }


def test_what_inspect_writes_builds(tmp_path, monkeypatch, capsys, small_encoder):
    monkeypatch.chdir(tmp_path)
    rows = [{"id": row, "Question": f"balu corn {row}", "answer": f"fena gilo {row}"} for row in range(80)]
    (tmp_path / "faq.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main(["--inspect", "faq.jsonl", "--output", "faq.yaml", "--dense.model", str(small_encoder), "--language", "en"])
    told = capsys.readouterr()
    assert "reads Question as query, answer as positive" in told.err and told.err.count("--columns changes that") == 1
    assert re.search(
        r"faq.jsonl: pairs, .*\ntest: \d+ queries\ntrain: 6\d queries\nvalidation: \d+ queries\n", told.out
    )
    assert told.out.count("  query: balu corn") == 3 and "3 tokens at the median" in told.out
    assert told.out.count("at most; none would be cut") == 2
    recipe = read_yaml("faq.yaml")
    columns = {"query": "Question", "positive": "answer"}
    assert recipe["source"]["columns"] == columns and recipe["source"]["holdout"] == 0.1
    main(["--config", "faq.yaml", "--output_dir", "data", "--num_negatives", "1"])
    assert read_manifest(tmp_path / "data" / "hub")["rows"]["train"] > 10
    with pytest.raises(InputError, match=r"faq\.yaml: is there already"):
        main(["--inspect", "faq.jsonl", "--output", "faq.yaml"])
    capsys.readouterr()
    rows.append({"id": 80, "Question": " ", "answer": "fena"})
    (tmp_path / "blank.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="row 80 has no 'query'"):
        main(["--inspect", "blank.jsonl", "--dense.model", str(small_encoder)])
    assert not capsys.readouterr().out  # such as that the rows are too few
