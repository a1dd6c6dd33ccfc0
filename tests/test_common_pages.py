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


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
def test_a_reader_searches_filters_and_turns_pages_by_keyboard(tmp_path):
    """Found by role and name, as a screen reader finds them; no request leaves the file."""
    api = pytest.importorskip("playwright.sync_api", reason="make test-browser installs playwright")
    rows = [
        Row(
            title=f"row {n}",
            facts="",
            tags=["odd"] * (n % 2),
            documents=[{"document": "positive", "text": f"text {n}"}],
        )
        for n in range(50)
    ]
    write_page(tmp_path / "index.html", "Rows", "Look", {}, rows)
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "index.html").as_uri())
        shown = page.get_by_role("list").last.locator("details")
        assert shown.count() == 20 and "50 of 50 rows" in page.inner_text("main")
        page.get_by_label("Show").select_option("odd")
        assert shown.count() == 20 and "25 of 50 rows" in page.inner_text("main")
        page.get_by_role("button", name="Next 20").press("Enter")
        assert shown.count() == 5
        page.get_by_role("searchbox", name="Text contains").press_sequentially("text 31")
        assert shown.count() == 1 and "row 31" in shown.first.inner_text()
        assert not shown.first.locator("text=positive").is_visible()
        shown.first.locator("summary").press("Enter")
        assert shown.first.get_by_text("text 31").is_visible()
        browser.close()
    assert asked == [(tmp_path / "index.html").as_uri()]
