"""No folder of the publisher's machine in what is published: what others cannot open, and need not know."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.cli import InputError
from dataset_builders.card import public_name


def check_no_local_path(files: Mapping[str, Path | bytes], places: Sequence[str | Path], where: object) -> None:
    """Raises InputError where a file (name -> file or content) names the home, the current folder or one of `places`.

    `where`: what the error begins with.
    """
    for name, content in files.items():
        if found := local_paths(readable(content), places):
            raise InputError(f"{where}: {name} names a local folder, {found[0]!r}; write a Hub id there, or remove it")


def readable(content: Path | bytes) -> str:
    """What a file says besides its rows: the card, a plot's notes, a Parquet file's metadata."""
    if isinstance(content, Path) and content.suffix == ".parquet":
        import pyarrow.parquet as pq

        notes = pq.read_metadata(content).metadata or {}
        content = b"\n".join([*notes, *notes.values()])
    return (content if isinstance(content, bytes) else content.read_bytes()).decode(errors="replace")


def local_paths(text: str, references: Sequence[str | Path]) -> list[str]:
    """Local paths in `text`: the home or the current folder, one of `references` or a folder above it, or a link to
    the Hub that was made of a path.
    """
    places = {str(place) for place in (Path.home(), Path.cwd()) if len(place.parts) > 2}
    for reference in map(Path, references):
        resolved = reference.expanduser().resolve()
        places |= {str(place) for place in (resolved, *resolved.parents) if len(place.parts) > 2}
        places |= {str(reference)} if len(reference.parts) > 1 else set()
    names = [
        ("" if place.startswith("/") else r"(?<![\w/.-])") + re.escape(place) + r"(?![\w-])"
        for place in sorted(places, key=len, reverse=True)
    ]
    return re.findall("|".join([r"huggingface\.co/(?:datasets/)?[./~][^\s)\"']*", *names]), text)


def named_paths(recipe: Any) -> list[str]:
    """The local folders and files that a recipe names, wherever in it."""
    if isinstance(recipe, str):
        is_text = re.search(r"\s", recipe) and not (recipe.startswith(("./", "../")) or os.path.exists(recipe))
        return [recipe] if public_name(recipe) != recipe and not is_text else []
    inner = recipe.values() if isinstance(recipe, Mapping) else recipe if isinstance(recipe, list) else ()
    return [path for value in inner for path in named_paths(value)]
