"""Pages to look at: one file each, whose rows are those of the data."""

import doctest
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
from tiny_data import write_encoder, write_recipe, write_set

from common import pages
from dataset_builders.build import main as build_main


def test_docstring_examples():
    found = doctest.testmod(pages)
    assert found.attempted == 1 and found.failed == 0


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
