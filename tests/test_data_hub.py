"""Sets on the Hub, from a stand-in of it: read at the commit that is pinned, or at the newest one, which is kept."""

import json
from pathlib import Path

from hub_client import run_python
from local_hub import LocalHub

from dataset_builders.sources import registry


def json_lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FIQA = {
    "README.md": b"""---
configs:
- {config_name: default, data_files: [{split: train, path: qrels/train.jsonl}, {split: dev, path: qrels/dev.jsonl}]}
- {config_name: corpus, data_files: [{split: corpus, path: corpus.jsonl}]}
- {config_name: queries, data_files: [{split: queries, path: queries.jsonl}]}
---
""",
    # as the set itself has some: a document without a text
    "corpus.jsonl": json_lines(
        *({"_id": str(row), "title": "", "text": f"reply {row}" if row != 3 else ""} for row in range(6))
    ),
    "queries.jsonl": json_lines(*({"_id": f"q{row}", "text": f"question {row}"} for row in range(6))),
    "qrels/train.jsonl": json_lines(
        *({"query-id": f"q{row}", "corpus-id": str(row), "score": 1.0} for row in (0, 1, 3)),
        # and judgements of texts that it no longer holds
        {"query-id": "q0", "corpus-id": "gone", "score": 1.0},
        {"query-id": "gone", "corpus-id": "0", "score": 1.0},
    ),
    "qrels/dev.jsonl": json_lines({"query-id": "q4", "corpus-id": "4", "score": 1.0}),
}


READ = """
import json
from dataset_builders.sources import HubSource, RegistrySource, describe_source, read_rows
kinds = {{"hub": HubSource, "registry": RegistrySource}}
values = json.loads({values!r})
source = kinds[values["kind"]](**values)
rows = read_rows(source, None)
tables = {{name: getattr(rows, name).to_dicts() for name in ("documents", "queries", "qrels")}}
print(json.dumps({{"commit": describe_source(source, None)["commit"], **tables}}))
"""


def read_over_http(hub: LocalHub, folder: Path, **values) -> dict:
    done = run_python(READ.format(values=json.dumps({"kind": "registry", **values})), hub, folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_pinned_set_is_read_from_the_hub_at_its_commit(tmp_path):
    entry = registry()["FiQA2018"]
    with LocalHub() as hub:
        hub.create(f"datasets/{entry.dataset}", FIQA, commit_id=entry.revision)
        hub.commit(f"datasets/{entry.dataset}", {"README.md": b"gone"}, commit_id="0" * 40)
        rows = read_over_http(hub, tmp_path, name="FiQA2018", eval_splits=["dev"])
        assert len([line for line in hub.asked if entry.revision in line]) > 5
        assert not [line for line in hub.asked if "/main" in line or "0" * 40 in line]
    assert rows["commit"] == entry.revision
    assert [row["text"] for row in rows["documents"]] == [f"reply {row}" for row in (0, 1, 2, 4, 5)]
    assert [row["query_id"] for row in rows["queries"]] == ["q0", "q1", "q4"]
    assert [tuple(row.values()) for row in rows["qrels"]] == [
        ("q0", "0", 1, "train"),
        ("q1", "1", 1, "train"),
        ("q4", "4", 1, "dev"),
    ]


def test_a_set_named_without_a_commit_is_read_at_its_newest_one_which_is_kept(tmp_path):
    readme = b"---\nconfigs: [{config_name: pair, data_files: [{split: train, path: pair/train.jsonl}]}]\n---\n"
    old, new = (
        {"README.md": readme, "pair/train.jsonl": json_lines({"question": "why", "answer": answer})}
        for answer in ("so", "because")
    )
    asked = {"kind": "hub", "dataset": "org/why", "config": "pair"}
    asked |= {"columns": {"query": "question", "positive": "answer"}}
    with LocalHub() as hub:
        hub.create("datasets/org/why", old, commit_id="1" * 40)
        first = read_over_http(hub, tmp_path, **asked)
        hub.commit("datasets/org/why", new, commit_id="2" * 40)
        second = read_over_http(hub, tmp_path, **asked)
    assert [rows["commit"] for rows in (first, second)] == ["1" * 40, "2" * 40]
    assert [rows["documents"][0]["text"] for rows in (first, second)] == ["so", "because"]
