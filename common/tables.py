"""Figures for people: Markdown tables, counts in a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Rows under `titles`; the first `left` columns are text, the others numbers on the right.

    >>> print(markdown_table(["model", "score"], [["a", "0.5"]]))
    | model | score |
    |---|---:|
    | a | 0.5 |
    """
    rule = ["---"] * left + ["---:"] * (len(titles) - left)
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in (titles, *rows)]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def in_words(facts: Mapping[str, Any], deep: bool = True) -> str:
    """The numbers among `facts`, and those one level down; the rest is for the manifest and the card.

    >>> in_words({"rows": 1200, "dropped": {"few": 3, "why": ["told", "elsewhere"]}, "share": 0.25, "where": "x"})
    'rows 1,200, dropped (few 3), share 0.25'
    """
    found = []
    for name, value in facts.items():
        name = name.replace("_", " ")
        if isinstance(value, int):
            found.append(f"{name} {value:,}")
        elif isinstance(value, float):
            found.append(f"{name} {value:.4g}")
        elif deep and isinstance(value, Mapping) and (inner := in_words(value, deep=False)):
            found.append(f"{name} ({inner})")
    return ", ".join(found)
