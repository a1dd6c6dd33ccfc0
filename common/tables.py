"""Tables for people: Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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
