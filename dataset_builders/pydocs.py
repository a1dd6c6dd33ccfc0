"""Real English (question-like, answer-like) pairs that every machine already has: docstrings.

A docstring's first paragraph says what a thing does, the rest how: the summary is the query, the body its document.
Files are parsed with `ast`; nothing is imported or executed. Only the standard library and what this project
depends on are read, never whatever else is installed, so that the pinned stack gives the same pairs everywhere.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import multiprocessing
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tqdm import tqdm

from dataset_builders.readers import Rows, draw

if TYPE_CHECKING:
    from dataset_builders.sources import Splits

PROJECT = "graded-embedder"
# Below these a summary asks nothing ("Returns self.") and a body answers nothing ("Parameters: x").
SUMMARY_WORDS = (4, 40)
BODY_WORDS = (30, 400)
_SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "vendor", "externals", "idlelib", "lib2to3"}
_SKIPPED_FOLDERS |= {"site-packages"}  # lies inside the standard library's folder
# Boilerplate that says nothing about the thing it stands on.
_EMPTY_SUMMARY = re.compile(
    r"(see (the )?(base|parent|super)|inherit|internal|deprecated|alias (for|of)|todo|note:|wrapper (for|around) )"
    r"|\w+ ?\(.*(optional|int|str|float|bool|list)\b",  # a parameter list without a summary above it
    re.IGNORECASE,
)
_MARKUP = [
    (re.compile(r"^\s*(>>>|\.\.\. ).*$", re.M), " "),  # doctests: code, not text
    (re.compile(r"%\(\w+\)s|\{\w+\}"), " "),  # blanks of docstring templates
    (re.compile(r":[a-zA-Z:]+:`~?\.?([^`<]+?)(?:\s*<[^`>]*>)?`"), r"\1"),  # :class:`~a.b`, :ref:`text <label>`
    (re.compile(r"`+~?([^`]+)`+_*"), r"\1"),
    (re.compile(r"^\s*\.\. [\w-]+::.*$", re.M), " "),  # directives
    (re.compile(r"^\s*[-=~^\"'*+#]{3,}\s*$", re.M), " "),  # underlines of headings
]
_WORD = re.compile(r"[A-Za-z]{2,}")


@dataclass(frozen=True, order=True)
class DocstringPair:
    """`name` is where the docstring stands, as one would import it; `summary` and `body` are plain text."""

    name: str
    summary: str
    body: str


def docstring_pairs(progress: bool = True) -> list[DocstringPair]:
    """All pairs of the standard library and of this project's dependencies, sorted by name.

    Names are unique, and so are summaries and bodies (compared in lower case, white space folded): of equal ones
    the first by name stays.
    """
    files = sorted(_standard_library_files()) + sorted(_dependency_files())
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("forkserver")) as pool:
        found = pool.map(_pairs_in_file, files, chunksize=32)
        found = tqdm(found, total=len(files), desc="docstrings", unit=" files", disable=not progress)
        pairs = sorted(pair for pairs in found for pair in pairs)
    return list(_first_of_equals(pairs))


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """(summary, body) in plain text, or None when either is missing, too short, too long or boilerplate.

    >>> split_docstring("Short.") is None
    True
    """
    head, _, rest = inspect.cleandoc(docstring).partition("\n\n")
    summary, body = plain_text(head), plain_text(rest)
    if _EMPTY_SUMMARY.match(summary) or summary.endswith(":"):
        return None
    for text, (least, most) in ((summary, SUMMARY_WORDS), (body, BODY_WORDS)):
        if not least <= len(_WORD.findall(text)) <= most:
            return None
    # a body of numbers, signatures or drawings is no text
    if sum(len(word) for word in _WORD.findall(body)) < 0.5 * len(body.replace(" ", "")):
        return None
    return summary, body


def plain_text(text: str) -> str:
    """`text` without reStructuredText markup, its white space folded.

    >>> plain_text("Return a :class:`~a.B`,\\n  see ``x``.")
    'Return a a.B, see x.'
    """
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def _first_of_equals(pairs: Iterable[DocstringPair]) -> Iterator[DocstringPair]:
    seen: set[str] = set()
    for pair in pairs:
        keys = {f"name {pair.name}", f"summary {pair.summary.lower()}", f"body {pair.body.lower()}"}
        if not keys & seen:
            seen |= keys
            yield pair


def _pairs_in_file(location: tuple[str, str]) -> list[DocstringPair]:
    module, path = location
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return []  # templates and files for other Python versions: not ours to mend
    return list(_pairs_below(tree, module))


def _pairs_below(node: ast.AST, name: str) -> Iterator[DocstringPair]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        pair = split_docstring(docstring) if docstring else None
        if pair:
            yield DocstringPair(name, *pair)
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _pairs_below(child, f"{name}.{child.name}" if named else name)


def _standard_library_files() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not _SKIPPED_FOLDERS & set(relative.parts):
            yield _module_name(relative), str(path)


def _dependency_files() -> Iterator[tuple[str, str]]:
    for name in dependencies(PROJECT):
        for file in importlib.metadata.distribution(name).files or ():
            if file.suffix == ".py" and ".." not in file.parts and not _SKIPPED_FOLDERS & set(file.parts):
                yield _module_name(Path(file)), str(file.locate())


def dependencies(project: str) -> Sequence[str]:
    """The installed distributions that `project` needs, directly or not, extras left out; canonical names, sorted."""
    found: set[str] = set()
    waiting = [project]
    while waiting:
        try:
            requirements = importlib.metadata.requires(waiting.pop()) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, requirements):
            name = canonicalize_name(requirement.name)
            if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                found.add(name)
                waiting.append(name)
    installed = {canonicalize_name(distribution.name) for distribution in importlib.metadata.distributions()}
    return sorted(found & installed)


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def read_docstrings(source: Splits) -> Rows:
    """Summaries as queries, bodies as documents, both under the name of what they describe; no splits."""
    pairs = pl.DataFrame(docstring_pairs()).with_columns(score=pl.lit(1, pl.Int32), split=pl.lit(None, pl.String))
    kept = draw(pairs, source, "name")
    return Rows(
        documents=kept.select(document_id="name", text="body"),
        queries=kept.select(query_id="name", text="summary"),
        qrels=kept.select("score", "split", query_id="name", document_id="name"),
        seen=len(pairs),
    )
