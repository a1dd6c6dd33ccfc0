"""Pages to look at: one HTML file that needs no network, with figures and rows to search and filter."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, TypedDict

from common.steps import written_whole

TEMPLATE = Path(__file__).with_name("page.html")
MOST_ROWS = 1000
LONGEST = 600  # characters of a text


class Row(TypedDict):
    title: str
    facts: str  # behind the title; "": none
    tags: list[str]  # what rows are filtered by
    documents: list[dict[str, Any]]  # the lines of a table, equal keys in all; `text` is the wide column


def write_page(path: Path, title: str, introduction: str, figures: Mapping[str, Path], rows: Sequence[Row]) -> None:
    """Write `path`. figures: what a picture shows, in words -> the PNG file. Texts are cut to LONGEST characters."""
    pictures = [
        f'<figure><img alt="{html.escape(words)}" src="data:image/png;base64,'
        f'{base64.b64encode(file.read_bytes()).decode()}"><figcaption>{html.escape(words)}</figcaption></figure>'
        for words, file in figures.items()
    ]
    shortened = [
        {**row, "documents": [{**one, "text": _short(one["text"])} for one in row["documents"]]} for row in rows
    ]
    data = {"rows": shortened, "tags": sorted({tag for row in rows for tag in row["tags"]})}
    page = Template(TEMPLATE.read_text(encoding="utf-8")).safe_substitute(
        title=html.escape(title),
        introduction=html.escape(introduction),
        figures="\n".join(pictures),
        data=json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),  # no text ends the script
    )
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def evenly(count: int, most: int = MOST_ROWS) -> list[int]:
    """At most `most` of `count` places, evenly spread.

    >>> evenly(10, 4), evenly(3)
    ([0, 2, 5, 7], [0, 1, 2])
    """
    return [place * count // most for place in range(most)] if count > most else list(range(count))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."
