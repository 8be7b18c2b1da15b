"""Rows of any table: a local file or folder, or the hub's parquet copy of a data set, and their
columns with errors that name them.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sources

Row = Mapping[str, Any]

# --- columns ---------------------------------------------------------------------------------------------------------


def text(row: Row, *names: str) -> str:
    """The text of the first of these columns that the row has."""
    return sources.text_of(row, next((name for name in names if name in row), " or ".join(names)))


def some_text(row: Row, *names: str) -> str:
    """As text, of one that is not blank."""
    found = text(row, *names)
    if not found.strip():
        raise ValueError(f"{' or '.join(names)} must hold text, got {found!r}")
    return found


def one_of(row: Row, name: str, *words: str) -> str:
    """A column's text, which is one of these words, as they are spelled here."""
    return str(sources.checked(row, name, lambda found: found in words, " or ".join(words)))


def texts(row: Row, name: str) -> tuple[str, ...]:
    """A column's list of texts. ValueError names one that is missing or anything else."""
    return tuple(
        sources.checked(
            row,
            name,
            lambda found: (
                isinstance(found, list) and all(isinstance(entry, str) for entry in found)
            ),
            "a list of texts",
        )
    )


def inside(row: Row, name: str) -> Row:
    """A column's object. ValueError names one that is missing or anything else."""
    found: Row = sources.checked(row, name, lambda found: isinstance(found, dict), "an object")
    return found


def number(row: Row, name: str, low: float = 0, high: float = 1) -> float:
    """A number in [low, high]; text will do, as CSV knows no other."""

    def valid(found: Any) -> bool:
        try:
            return low <= float(found) <= high
        except (TypeError, ValueError):
            return False

    return float(sources.checked(row, name, valid, f"a number from {low} to {high}"))


def whole_number(row: Row, name: str, low: int = 0, high: int = 1) -> int:
    """A number as in `number`, without a fraction."""
    found = number(row, name, low, high)
    if found != int(found):
        raise ValueError(f"{name} must be a whole number, got {row[name]!r}")
    return int(found)


def truth(row: Row, name: str) -> bool | None:
    """True or False, as JSON or a CSV spells it (true, 1); None where the column is missing or
    empty.
    """
    if row.get(name) in (None, ""):
        return None
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    return words[
        str(
            sources.checked(row, name, lambda found: str(found).lower() in words, "true or false")
        ).lower()
    ]


# --- files -----------------------------------------------------------------------------------------------------------


def is_table(path: Path) -> bool:
    """Whether read_rows can read this file, by its name."""
    return path.is_file() and (
        path.suffix in (".csv", ".txt") or sources.FILE.fullmatch(path.name) is not None
    )


def must_be_table(path: Path) -> None:
    if not is_table(path):
        found = (
            "another file"
            if path.is_file()
            else "a folder without one"
            if path.is_dir()
            else "which is not there"
        )
        raise ValueError(
            f"rows must be in .jsonl, .json, .parquet (also .gz, .xz), .csv or .txt, got {path}, {found}"
        )


def stem(path: Path) -> str:
    """A table's name without its ending, and without which part it is of how many."""
    match = sources.FILE.fullmatch(path.name)
    return match["stem"] if match else path.stem


def whole(row: Row) -> Row | ValueError:
    """A row of csv.DictReader, which puts cells beyond the header's under None, and None into those
    that are missing.
    """
    if None in row or None in row.values():
        return ValueError(
            "a row must have as many cells as the header; a text that holds a comma must be quoted"
        )
    return row


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, row) of a .csv with a header, a .txt with a prompt a line, or whatever
    sources.read_rows reads; for a row that cannot be read, a ValueError in its place.
    """
    must_be_table(path)
    if path.suffix not in (".csv", ".txt"):
        yield from sources.read_rows(path)
        return
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                csv.field_size_limit(2**31 - 1)  # a cell holds any text
                table = csv.DictReader(file, strict=True)
                if doubled := sources.repeated(table.fieldnames or ()):
                    raise ValueError(
                        f"{path} must have columns of different names, got {doubled} twice"
                    )
                yield from ((f"{path}:{table.line_num}", whole(row)) for row in table)
            else:
                yield from (
                    (f"{path}:{number}", {"text": line.strip()})
                    for number, line in enumerate(file, 1)
                    if line.strip()
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be readable UTF-8 text: {error}") from error


def from_hub(name: str, config: str, split: str) -> Path:
    """The folder of the hub's parquet copy of a data set's split.

    ValueError says why it cannot be had.
    """
    patterns = [f"{config}/{split}/*.parquet"]
    try:
        return sources.snapshot(name, "refs/convert/parquet", patterns, "dataset") / config / split
    except OSError as error:
        raise ValueError(
            f"{name} must be within reach (network, HF_TOKEN), or its rows in a local file; {error}"
        ) from error


def find_tables(source: str, hub: str) -> list[Path]:
    """The data files of a file or folder, or, without a source, of the hub's parquet copy of
    NAME:CONFIG:SPLIT.

    A folder's .txt are taken for notes to its reader, several files of one name for a table's
    parts. The hub keeps a parquet copy of every public data set, whatever its own form: branch
    refs/convert/parquet, CONFIG/SPLIT/*.parquet.
    """
    path = Path(source).expanduser() if source else from_hub(*hub.split(":"))
    files = (
        [path]
        if path.is_file()
        else sorted(file for file in path.glob("*") if is_table(file) and file.suffix != ".txt")
    )
    for file in files or [path]:
        must_be_table(file)
    if len(files) > 1 and any(file.suffix == ".csv" for file in files):
        raise ValueError(
            f"{path} must hold one .csv, or another table, got {' and '.join(file.name for file in files)}; pass one of them"
        )
    if not path.is_file():
        sources.check_names(path.name, files)
        sources.check_whole(files)
    return files
