"""Pages to look at: one file each, whose rows are those of the data."""

import json
import re
import shutil
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_data import write_encoder, write_recipe, write_set

from common.pages import Row, write_page
from dataset_builders.build import main as build_main

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def test_the_page_shows_rows_with_what_to_look_for(tmp_path):
    """It opens from a file: nothing is loaded, and no text of the data ends its script."""
    write_set(tmp_path / "set")
    queries = pq.read_table(tmp_path / "set" / "queries.parquet").to_pydict()
    queries["text"][0] += " </script><b>bold</b>"
    pq.write_table(pa.table(queries), tmp_path / "set" / "queries.parquet")
    recipe = write_recipe(tmp_path / "data.yaml", tmp_path / "set", write_encoder(tmp_path / "encoder"))
    build_main(["--config", str(recipe), "--output_dir", str(tmp_path / "data")])
    page = (tmp_path / "data" / "audit" / "index.html").read_text()
    assert page.count("</script>") == 2 and not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("<img alt=") == len(list((tmp_path / "data" / "audit").glob("*.png"))) >= 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    mined = pq.read_table(tmp_path / "data" / "mined" / "mined.parquet").to_pylist()
    assert len(data["rows"]) == len(mined) > 20
    for row, expected in zip(data["rows"], mined, strict=True):
        assert row["title"] == expected["query"]
        texts = [expected["positive"], *(expected[f"negative_{number}"] for number in (1, 2, 3))]
        assert [one["text"] for one in row["documents"]] == texts
        assert [one["label"] for one in row["documents"]] == [f"{label:.3f}" for label in expected["label"]]
        assert ("probable false negative" in row["tags"]) == (expected["label"][1] >= 0.9)
        assert ("flat labels" in row["tags"]) == (max(expected["label"]) - min(expected["label"]) < 0.05)
    assert {tag for row in data["rows"] for tag in row["tags"]} == set(data["tags"])


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
def test_a_browser_shows_the_rows_from_a_file(tmp_path):
    """Texts stay texts, the first twenty rows of thirty are there, and the first filter is that of all rows."""
    documents = [{"document": "positive", "text": "<i>&amp; one</i>"}]
    rows = [Row(title=f"row {n} <b>", facts="", tags=["odd"] * (n % 2), documents=documents) for n in range(30)]
    write_page(tmp_path / "index.html", "A <page>", "Look & see", {}, rows)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{tmp_path / 'index.html'}"], capture_output=True, text=True
    )
    assert done.stdout.count("<details>") == 20 and "30 of 30 rows, here 1 to 20" in done.stdout, done.stderr
    assert "row 0 &lt;b&gt;" in done.stdout and "&lt;i&gt;&amp;amp; one&lt;/i&gt;" in done.stdout
    assert "all 30</option>" in done.stdout and "<h1>A &lt;page&gt;</h1>" in done.stdout
