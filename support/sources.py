"""The one way to read rows, for training and for tasks: files, folders and hub data sets.

A source is NAME[@REVISION][:SPLIT][[START:STOP]], all but the name optional:
    pairs.jsonl     folder     folder:train[:30000]     a local file or folder, before the hub
    PKU-Alignment/PKU-SafeRLHF@ff7ba91:train[:20%]      a data set of the Hugging Face hub
    owner/name:train_prefs[1000:2000]                   rows or percentages of the rows in the files
Files are .jsonl, .json, .parquet, .csv with a header, or .txt with a prompt in each line. JSON
lines may also be .jsonl.gz or .jsonl.xz. A file's split is its name without a shard number, as in
data/train_prefs-00000-of-00002.parquet. The split with "test" for "train" in its name has the
held-out rows. In a folder, .txt files are notes to its reader.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import json
import lzma
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

FILE = re.compile(
    r"(?P<stem>.+?)(-(?P<part>\d+)-of-(?P<shards>\d+)(-\w+)?)?"
    r"\.(?P<kind>parquet|csv|txt|(jsonl|json)(\.gz|\.xz)?)"
)
KINDS = ".jsonl, .json (also .gz or .xz), .parquet, .csv or .txt"
HUB_PATTERNS = ["*.jsonl", "*.json", "*.json*.gz", "*.json*.xz", "*.parquet", "*.csv"]
BOUND = r"\d\d?%|100%|\d+"
SOURCE = re.compile(
    r"(?P<name>.+?)(:(?P<split>[\w-]+))?"
    rf"(\[(?P<start>{BOUND})?:(?P<stop>{BOUND})?\])?",
    re.DOTALL,
)
GRAMMAR = "NAME[@REVISION][:SPLIT][[START:STOP]]"
USUAL_SPLITS = {  # of a folder with several splits, where the source names none
    "pairs": ("train", "train_prefs"),
    "sft": ("train", "train_sft"),
    "task": ("test",),
}
OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
SURROGATE = re.compile("[\ud800-\udfff]")
LONGEST_CELL = 2**31 - 1  # of a .csv, in characters

Row = Mapping[str, Any]

# --- columns --------------------------------------------------------------------------------------


def checked(row: Row, name: str, valid: Callable[[Any], Any], wanted: str) -> Any:
    """A column's value. ValueError names the column that is missing or not `wanted`."""
    if name not in row:
        raise ValueError(f"{name} is missing; the row has {', '.join(map(str, row))[:200]}")
    if not valid(row[name]):
        raise ValueError(f"{name} must be {wanted}, got {reprlib.repr(row[name])}")
    return row[name]


def text(row: Row, *names: str) -> str:
    """The text of the first of these columns that the row has."""

    def valid(value: Any) -> bool:
        return isinstance(value, str) and not SURROGATE.search(value)

    name = next((name for name in names if name in row), " or ".join(names))
    return str(checked(row, name, valid, "text (Unicode without lone surrogates)"))


def some_text(row: Row, *names: str) -> str:
    """As text, of one that is not blank."""
    value = text(row, *names)
    if not value.strip():
        raise ValueError(f"{' or '.join(names)} must hold text, got {value!r}")
    return value


def one_of(row: Row, name: str, *words: str) -> str:
    """A column's text, which is one of these words, as they are spelled here."""
    return str(checked(row, name, lambda value: value in words, " or ".join(words)))


def texts(row: Row, name: str) -> tuple[str, ...]:
    """A column's list of texts. ValueError names one that is missing or anything else."""

    def valid(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)

    return tuple(checked(row, name, valid, "a list of texts"))


def inside(row: Row, name: str) -> Row:
    """A column's object. ValueError names one that is missing or anything else."""
    value: Row = checked(row, name, lambda value: isinstance(value, dict), "an object")
    return value


def number(row: Row, name: str, low: float = 0, high: float = 1) -> float:
    """A number in [low, high]; text will do, as CSV knows no other."""

    def valid(value: Any) -> bool:
        try:
            return low <= float(value) <= high
        except (TypeError, ValueError):
            return False

    return float(checked(row, name, valid, f"a number from {low} to {high}"))


def whole_number(row: Row, name: str, low: int = 0, high: int = 1) -> int:
    """A number as in `number`, without a fraction."""
    value = number(row, name, low, high)
    if value != int(value):
        raise ValueError(f"{name} must be a whole number, got {row[name]!r}")
    return int(value)


def boolean(row: Row, name: str) -> bool:
    """True or false, as JSON or a CSV spells it (true, 1)."""
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    value = checked(row, name, lambda value: str(value).lower() in words, "true or false")
    return words[str(value).lower()]


def truth(row: Row, name: str) -> bool | None:
    """As boolean; None where the column is missing or empty."""
    return None if row.get(name) in (None, "") else boolean(row, name)


# --- rows of a file -------------------------------------------------------------------------------


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of JSON lines, or of a .json file that is one array."""
    with OPENERS.get(path.suffix, open)(path, "rb") as file:
        start = file.peek(1)[:1000].removeprefix(codecs.BOM_UTF8).lstrip()
        if ".json" in path.suffixes and start.startswith(b"["):
            for number, row in enumerate(json.load(file), 1):
                yield f"{path}: row {number}", row
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield f"{path}:{number}", ValueError(f"must be JSON in UTF-8: {error}")


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    number = 0
    with pyarrow.parquet.ParquetFile(path) as table:
        # Times are of no use here, and Python does not have them all.
        schema = table.schema_arrow
        names = [field.name for field in schema if not pyarrow.types.is_temporal(field.type)]
        for batch in table.iter_batches(256):
            for row in batch.select(names).to_pylist():
                number += 1
                yield f"{path}: row {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(LONGEST_CELL)
    with open(path, encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, strict=True)
        for row in table:
            # DictReader puts cells beyond the header's under None, and None into missing ones.
            if None in row or None in row.values():
                fault = "a row must have as many cells as the header; quote a text with a comma"
                yield f"{path}:{table.line_num}", ValueError(fault)
            else:
                yield f"{path}:{table.line_num}", row


def _prompt_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", {"text": line.strip()}


READERS = {"parquet": _parquet_rows, "csv": _csv_rows, "txt": _prompt_rows}


def is_table(path: Path) -> bool:
    """Whether read_rows can read this file, by its name."""
    return path.is_file() and FILE.fullmatch(path.name) is not None


def stem(path: Path) -> str:
    """A table's name without its ending, and without which part it is of how many."""
    match = FILE.fullmatch(path.name)
    return match["stem"] if match else path.stem


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, row) of every row, an object; for one that cannot be read, a ValueError in its
    place. ValueError: another kind of file, or one that breaks off or is damaged.
    """
    if not is_table(path):
        raise ValueError(f"rows must be in a file {KINDS}, got {path}")
    match = FILE.fullmatch(path.name)
    reader = READERS.get(match["kind"] if match else "", _json_rows)
    place = ""
    try:
        for place, row in reader(path):
            if not isinstance(row, dict | ValueError):
                row = ValueError(f"a row must be an object, got {reprlib.repr(row)}")
            yield place, row
    except Exception as error:  # each kind of file has its own
        after = f"after {place}" if place else "from its start"
        raise ValueError(
            f"{path} must be a whole {path.suffix} file in UTF-8; {after} it is unreadable: {error}"
        ) from error


# --- files of a source ----------------------------------------------------------------------------


def file_rows(files: list[Path]) -> Iterator[tuple[str, Any]]:
    """read_rows of one file after the other."""
    return chain.from_iterable(map(read_rows, files))


class Source(NamedTuple):
    """The files that a source's text stands for."""

    text: str  # as the user wrote it
    files: list[Path]
    test: list[Path]  # of the test split; empty if there is none
    bounds: tuple[str | None, str | None]  # of the rows in `files`: numbers or percentages
    identity: list[str]  # differs whenever the rows may differ

    def rows(self) -> tuple[int, Iterator[tuple[str, Any]]]:
        """(how many, read_rows) of what the slice keeps. Percentages are of the rows in the files,
        rounded to the nearest row. ValueError: a damaged file, whose rows cannot be counted.
        """
        count = sum(1 for _ in file_rows(self.files))
        bounds: list[int | None] = []
        for bound in self.bounds:
            if bound is not None and bound.endswith("%"):
                bounds.append(round(count * int(bound[:-1]) / 100))
            else:
                bounds.append(None if bound is None else int(bound))
        kept = range(count)[slice(*bounds)]
        return len(kept), islice(file_rows(self.files), kept.start, kept.stop)


def snapshot(name: str, patterns: list[str], kind: str = "model") -> Path:
    """The folder of those files of a hub repository, NAME[@REVISION], that match, as
    huggingface_hub keeps it (its cache, offline mode and token); its name is the commit. kind:
    model or dataset. ValueError says in a line why it cannot be had.
    """
    import huggingface_hub

    repository, _, revision = name.partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, repo_type=kind, revision=revision or None, allow_patterns=patterns
            )
        )
    except Exception as error:  # its own errors, and its transport's, which depends on the version
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"{name} must be a local path or a hub {kind} within reach (name, revision, network, "
            f"HF_TOKEN); {reason}"
        ) from error


def _from_hub(name: str, split: str | None) -> Path:
    """The snapshot folder of NAME[@REVISION]; its name is the commit."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[^@]+)?", name) or FILE.fullmatch(name):
        raise ValueError(
            f"a source must be an existing file or folder, or a hub data set, got {name}"
        )
    patterns = HUB_PATTERNS
    if split:
        patterns = [f"*{split}*", f"*{split.replace('train', 'test')}*"]
    return snapshot(name, patterns, "dataset")


def parquet_copy(name: str, config: str, split: str) -> Path:
    """The folder of a data set's split in the parquet copy that the hub keeps of every public data
    set, whatever its own form. ValueError says why it cannot be had.
    """
    patterns = [f"{config}/{split}/*.parquet"]
    return snapshot(f"{name}@refs/convert/parquet", patterns, "dataset") / config / split


def sha256(path: Path) -> str:
    """The sha256 sum of a file, in hex. OSError: it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_root(folder: str | Path | None) -> Path:
    """Where tokenised data and reference log-probabilities are kept: in this folder, else
    $BFPO_CACHE, else ~/.cache/bfpo.
    """
    return Path(folder or os.environ.get("BFPO_CACHE") or "~/.cache/bfpo").expanduser().absolute()


def local_path(source: str) -> Path | None:
    """The file or folder here that a source, a model or a path names, if there is one; its name may
    hold any of a source's characters.
    """
    match = SOURCE.fullmatch(source)
    paths = (Path(name).expanduser() for name in (source, match["name"] if match else "") if name)
    return next((path for path in paths if path.exists()), None)


def check_whole(files: list[Path]) -> None:
    """ValueError where files hold the same rows twice, or are not all the parts that their names
    speak of.
    """
    tables: dict[Path, list[re.Match[str]]] = {}
    for file in files:
        if match := FILE.fullmatch(file.name):
            tables.setdefault(file.parent / match["stem"], []).append(match)
    for table, matches in tables.items():
        parts = [match["part"] for match in matches]
        if len(parts) > len(set(parts)) or (None in parts and len(parts) > 1):
            names = " and ".join(sorted(match.string for match in matches))
            raise ValueError(
                f"the rows of {table} must be there once, got {names}; move one away, or pass one "
                "by its path"
            )
        wanted = int(matches[0]["shards"] or 1)
        if len(parts) < wanted:
            raise ValueError(
                f"{table} must have {wanted} parts, got {len(parts)}; fetch them again"
            )


def _splits_of(folder: Path) -> dict[str, list[Path]]:
    """A folder's data files by split. A numbered file is of the split that its folder names."""
    splits: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if is_hidden or file.suffix == ".txt" or not is_table(file):
            continue
        name = stem(file)
        splits.setdefault(file.parent.name if name.isdigit() else name, []).append(file)
    return splits


def _usual_split(splits: Mapping[str, list[Path]], use: str) -> str:
    """The split that is meant where a source names none, "" if that is not clear."""
    for name in USUAL_SPLITS[use]:
        if name in splits:
            return name
    only = [name for name in splits if "train" in name] if use != "task" else []
    if len(splits) == 1:
        only = list(splits)
    return only[0] if len(only) == 1 else ""


def find_source(source: str, use: str) -> Source:
    """The files of NAME[@REVISION][:SPLIT][[START:STOP]], fetched from the hub if they are not
    local. use: pairs, sft or task.
    """
    match = SOURCE.fullmatch(source)
    if match is None:
        raise ValueError(f"a source must be {GRAMMAR}, got an empty text")
    name, split, start, stop = match.group("name", "split", "start", "stop")
    if Path(source).expanduser().exists():  # a local name may hold any of these characters
        name, split, start, stop = source, None, None, None
    path = Path(name).expanduser()
    commit = ""
    if not path.exists():
        path = _from_hub(name, split)
        commit = path.name
    if path.is_file():
        if split or not is_table(path):
            raise ValueError(f"a file must be {KINDS}, without a split, got {source}")
        return Source(source, [path], [], (start, stop), [sha256(path)])
    if next(path.rglob("*.arrow"), None):
        raise ValueError(
            f"{path} was written by datasets' save_to_disk; write JSON lines instead, split by "
            f"split: datasets.load_from_disk({str(path)!r}).to_json('train.jsonl')"
        )
    splits = _splits_of(path)
    split = split or _usual_split(splits, use)
    if split not in splits:
        raise ValueError(
            f"{source} must name a split of {path}, which has {', '.join(splits) or 'no data file'}"
        )
    files = splits[split]
    test = splits.get(split.replace("train", "test"), []) if "train" in split else []
    check_whole(files)
    check_whole(test)
    identity = [f"{file.relative_to(path)} {commit or sha256(file)}" for file in (*files, *test)]
    return Source(source, files, test, (start, stop), identity)
