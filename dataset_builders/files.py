"""Reads a table from a file as people have it: Parquet, Arrow, CSV, TSV, JSON lines, JSON, TREC qrels and runs.

Text files are streamed into a temporary Arrow file, which is mapped into memory: memory does not grow with the file.
Values of CSV and TSV are texts (007 stays 007); of JSON a column has the type that fits all of its values.
"""

from __future__ import annotations

import codecs
import glob
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from common.cli import InputError
from common.steps import read_arrow, read_parquet

FORMATS = (".parquet", ".arrow", ".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt", ".qrels", ".run", ".trec")
BATCH = 10_000  # rows of a text file in memory at a time
BATCH_BYTES = 32 << 20  # of `read_batches`: a million or two of scores with their ids
SEPARATORS = ",;\t|"
_TREC = re.compile(r"(\S+)\s+\S+\s+(\S+)\s+(-?\d+)\s*")  # qrels: query, iteration, document, grade
# a run: query, Q0, document, rank, score, name
_TREC_RUN = re.compile(r"(\S+)\s+Q0\s+(\S+)\s+\d+\s+(-?[\d.]+(?:[eE][-+]?\d+)?)\s+\S+\s*")
_JSON = (".jsonl", ".ndjson", ".json")


def format_of(path: Path) -> str:
    """
    >>> format_of(Path("FAQ.CSV"))
    '.csv'
    """
    return path.suffix.lower()


def read_file(path: Path, names: Sequence[str] = ()) -> pa.Table:
    """The rows of a file, memory-mapped where they were text. Raises InputError for what cannot be read.

    names: of the columns of a TSV file that has no header, and quotes nothing.
    """
    if format_of(path) == ".parquet":
        return read_parquet(path)
    if format_of(path) == ".arrow":
        return _read_arrow(path)
    with TemporaryDirectory() as folder, _one_line(path):
        rows, oldest = Path(folder) / "rows.arrow", pl.CompatLevel.oldest()
        _scan(path, None, names).sink_ipc(rows, compat_level=oldest, record_batch_size=BATCH)
        return read_arrow(rows)  # the map outlives the file's name


def read_batches(path: Path) -> Iterator[pa.Table]:
    """As `read_file`, about BATCH_BYTES at a time: memory does not grow with the file."""
    if format_of(path) != ".parquet":
        table = read_file(path)
        rows = BATCH_BYTES * len(table) // max(table.nbytes, 1) + 1
        yield from (table.slice(start, rows) for start in range(0, len(table), rows))
        return
    # a buffer would keep what was read
    with _one_line(path), pq.ParquetFile(path, pre_buffer=False) as file:
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        rows = BATCH_BYTES * file.metadata.num_rows // max(sum(g.total_byte_size for g in groups), 1) + 1
        yield from (pa.Table.from_batches([batch]) for batch in file.iter_batches(rows))


def column_names(path: Path) -> list[str]:
    """Of a file's columns; of JSON lines those of the first thousand rows. Raises InputError as `read_file` does."""
    if format_of(path) == ".arrow":
        return _read_arrow(path).column_names
    with _one_line(path):
        return (
            pq.read_schema(path).names if format_of(path) == ".parquet" else _scan(path, 1000).collect_schema().names()
        )


def _read_arrow(path: Path) -> pa.Table:
    try:
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()  # as `datasets` writes it
    except (pa.ArrowInvalid, OSError):
        return read_arrow(path)


def _scan(path: Path, rows: int | None, names: Sequence[str] = ()) -> pl.LazyFrame:
    """The rows of a text file; types of JSON are those of the first `rows` (None: of all)."""
    plain = glob.escape(path)  # polars takes [ and * for patterns
    if names:
        return pl.scan_csv(
            plain, has_header=False, new_columns=names, separator="\t", quote_char=None, infer_schema=False
        )
    with path.open("rb") as stream:
        line = stream.readline()
    first = line.decode("utf-8-sig")
    if format_of(path) in _JSON:
        listed = _lines(path, first) if format_of(path) == ".json" else None
        if listed is None and line.startswith(codecs.BOM_UTF8):
            listed = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        return pl.scan_ndjson(plain if listed is None else listed, infer_schema_length=rows)
    trec = next((pattern for pattern in (_TREC, _TREC_RUN) if pattern.fullmatch(first)), None)
    if trec:
        parts = pl.col("line").str.extract_groups(trec.pattern).struct
        lines = pl.scan_csv(plain, has_header=False, new_columns=["line"], separator="\x1f", quote_char=None)
        return lines.select(query_id=parts.field("1"), corpus_id=parts.field("2"), score=parts.field("3"))
    separator = "\t" if format_of(path) == ".tsv" else max(SEPARATORS, key=first.count)
    return pl.scan_csv(plain, separator=separator, infer_schema=False)


def _lines(path: Path, first: str) -> bytes | None:
    """A JSON file's list of rows (perhaps below a key), or lists by column, as JSON lines; None where it has lines."""
    try:
        if isinstance(json.loads(first), dict) and first.endswith("\n"):
            return None
    except ValueError:
        pass
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(rows, dict) and len(rows) == 1:
        (rows,) = rows.values()
    elif isinstance(rows, dict) and all(isinstance(values, list) for values in rows.values()):
        rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it holds no list of rows, such as [{...}, {...}]")
    return "\n".join(map(json.dumps, rows)).encode()


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Raises InputError that says what is wrong with a file; with text, in which line, as far as that can be told."""
    kind = "Parquet" if format_of(path) == ".parquet" else format_of(path).removeprefix(".").upper()
    # pyarrow raises OSError for broken pages; with text it tells of the disk
    broken = (pa.ArrowException, OSError) if kind == "Parquet" else (pl.exceptions.PolarsError, ValueError)
    try:
        yield
    except broken as error:
        told = kind != "Parquet" and _wrong_line(path)
        raise InputError(f"{path}: {told or f'not a readable {kind} file: {str(error).splitlines()[0]}'}") from None


def _wrong_line(path: Path) -> str | None:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode()
                if format_of(path) in (".jsonl", ".ndjson") and text.strip():
                    json.loads(text)
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                return f"line {number} is not UTF-8 (byte 0x{byte:02x}); save the whole file as UTF-8"
            except ValueError as error:
                return f"line {number} is no JSON ({error}); mend it or leave it out"
    return None
