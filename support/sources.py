"""Where rows come from: hub data sets, folders and files, with a place in a file for every row that
cannot be read. Columns, checked.

A source is NAME[@REVISION][:SPLIT][[START:STOP]], all but the name optional:
    pairs.jsonl     folder     folder:train[:30000]               a local file or folder (it wins over the hub)
    PKU-Alignment/PKU-SafeRLHF@ff7ba91:train[:20%]                a data set of the Hugging Face hub
    HuggingFaceH4/ultrafeedback_binarized:train_prefs[1000:2000]  rows or percentages of the rows in the files
Files are .jsonl, .json or .parquet, each also .gz or .xz. A file's split is its name without a
shard number, as in data/train_prefs-00000-of-00002.parquet, of mine-train.jsonl what follows the
hyphen; the split with "test" for "train" in its name has the held-out rows.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

FILE = re.compile(
    r"(?P<stem>.+?)(-(?P<part>\d+)-of-(?P<shards>\d+)(-\w+)?)?\.(?P<kind>parquet|jsonl|json)(?P<packed>\.gz|\.xz)?"
)
BOUND = r"\d\d?%|100%|\d+"
SOURCE = re.compile(
    rf"(?P<name>.+?)(:(?P<split>\w+))?(\[(?P<start>{BOUND})?:(?P<stop>{BOUND})?\])?", re.DOTALL
)


class Source(NamedTuple):
    """The files that a source's text stands for."""

    text: str  # as the user wrote it
    training: list[Path]
    test: list[Path]  # of the test split; empty if there is none
    bounds: tuple[str | None, str | None]  # of the training rows: numbers or percentages
    identity: list[str]  # differs whenever the rows may differ


def snapshot(repository: str, revision: str, patterns: list[str], kind: str = "model") -> Path:
    """The folder of a hub repository's files that match, as huggingface_hub keeps it (its cache,
    offline mode and token); its name is the commit. revision "": the newest. kind: model or
    dataset. OSError says in a line why it cannot be had.
    """
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, repo_type=kind, revision=revision or None, allow_patterns=patterns
            )
        )
    except Exception as error:  # its own errors, its transport's, which version to version is another library, the system's
        raise OSError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def _from_hub(name: str, split: str | None) -> Path:
    """The snapshot folder of NAME[@REVISION]; its name is the commit."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[^@]+)?", name) or FILE.fullmatch(name):
        raise ValueError(
            f"a source must be an existing file or folder, or a hub data set, got {name}"
        )
    repository, _, revision = name.partition("@")
    kinds = [
        f"*.{kind}{packed}"
        for kind in ("parquet", "jsonl", "json")
        for packed in ("", ".gz", ".xz")
    ]
    wanted = [f"*{split}*", f"*{split.replace('train', 'test')}*"] if split else kinds
    try:
        return snapshot(repository, revision, wanted, "dataset")
    except OSError as error:
        raise ValueError(
            f"{name} must be a local path or a hub data set within reach (name, revision, network, HF_TOKEN);"
            f" {error}"
        ) from error


def sha256(path: Path) -> str:
    """The sha256 sum of a file, in hex. OSError: it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_root(folder: str | Path | None) -> Path:
    """Where tokenised data and reference log-probabilities are kept: in this folder, else
    $BFPO_CACHE, else ~/.cache/bfpo.
    """
    return Path(folder or os.environ.get("BFPO_CACHE") or "~/.cache/bfpo").expanduser().absolute()


def local_path(text: str) -> Path | None:
    """The file or folder here that a source, a model or a path names, if there is one; its name may
    hold any of a source's characters.
    """
    match = SOURCE.fullmatch(text)
    paths = (Path(name).expanduser() for name in (text, match["name"] if match else "") if name)
    return next((path for path in paths if path.exists()), None)


def check_whole(files: list[Path]) -> None:
    """ValueError where a split's files hold rows twice, or are not all the parts that their names
    speak of.
    """
    matches = [(file.parent, match) for file in files if (match := FILE.fullmatch(file.name))]
    beside: dict[tuple[Path, str], list[re.Match[str]]] = {}
    for folder, match in matches:
        beside.setdefault((folder, match["stem"]), []).append(match)
    for (folder, stem), same in beside.items():
        parts = [match["part"] for match in same]
        if len(parts) > len(set(parts)) or (None in parts and len(parts) > 1):
            names = " and ".join(sorted(match.string for match in same))
            raise ValueError(
                f"the rows of {folder / stem} must be there once, got {names}; move one away, or pass one by its path"
            )
    counts = Counter((match["stem"], match["shards"]) for _, match in matches if match["shards"])
    for (stem, shards), found in counts.items():
        if found < int(shards):
            raise ValueError(f"{stem} must have {int(shards)} parts, got {found}; fetch them again")


def check_names(split: str, files: list[Path]) -> None:
    """ValueError where a split's files have several names in one folder: it cannot be known that
    they belong together.
    """
    for folder in dict.fromkeys(file.parent for file in files):
        stems = {
            match["stem"]
            for file in files
            if file.parent == folder and (match := FILE.fullmatch(file.name))
        }
        if (
            len(names := sorted(stem for stem in stems if not stem.rpartition("-")[2].isdigit()))
            > 1
        ):
            raise ValueError(
                f"the files of split {split} must have one name, got {' and '.join(names)} in {folder}; pass one by its path"
            )


def find_source(text: str, stage: str) -> Source:
    """The files of NAME[@REVISION][:SPLIT][[START:STOP]], fetched from the hub if they are not
    local.
    """
    match = SOURCE.fullmatch(text)
    if match is None:
        raise ValueError(
            "a source must be NAME[@REVISION][:SPLIT][[START:STOP]], got an empty text"
        )
    whole = Path(text).expanduser().exists()  # a local name may hold any of these characters
    name, split, start, stop = (
        (text, None, None, None) if whole else match.group("name", "split", "start", "stop")
    )
    path, commit = Path(name).expanduser(), ""
    if not path.exists():
        path = _from_hub(name, split)
        commit = path.name
    if path.is_file():
        if split or not FILE.fullmatch(path.name):
            raise ValueError(
                f"a file must be .jsonl, .json or .parquet, also .gz or .xz, without a split, got {text}"
            )
        return Source(text, [path], [], (start, stop), [sha256(path)])
    splits: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if (match := FILE.fullmatch(file.name)) and file.is_file() and not hidden:
            stem = match["stem"].rpartition("-")[2]
            splits.setdefault(file.parent.name if stem.isdigit() else stem, []).append(file)
    usual = (
        "train",
        "train_prefs" if stage == "pairs" else "train_sft",
        *(splits if len(splits) == 1 else ()),
    )
    split = split or next((name for name in usual if name in splits), "")
    if split not in splits:
        raise ValueError(
            f"{text} must name a split of {path}, which has {', '.join(splits) or 'no data file'}"
        )
    test = splits.get(split.replace("train", "test"), []) if "train" in split else []
    check_names(split, splits[split])
    check_whole(splits[split])
    check_whole(test)
    identity = [
        f"{file.relative_to(path)} {commit or sha256(file)}" for file in (*splits[split], *test)
    ]
    return Source(text, splits[split], test, (start, stop), identity)


class Damaged(ValueError):
    """What stands in the place of the rows that a file does not give any more."""


def repeated(names: Iterable[str]) -> str | None:
    """The first name that is there more than once, if there is one."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object.

    ValueError names a field that it holds twice, of which Python would keep the last.
    """
    found = dict(fields)
    if len(found) < len(fields):
        raise ValueError(
            f"an object must hold a field once, got {repeated(name for name, _ in fields)} twice"
        )
    return found


JSON = json.JSONDecoder(object_pairs_hook=_object)
FIRST = re.compile(
    r"\[[ \t\r\n]*(\]\Z)?"
)  # what stands before the first row of an array, or is all of it
NEXT = re.compile(r"[ \t\r\n]*(,|\]\Z)[ \t\r\n]*")  # what stands after a row


def _unreadable(error: Exception) -> str:
    """What is wrong with a row's bytes."""
    if isinstance(error, UnicodeDecodeError):
        return (
            f"text must be UTF-8, got byte {error.object[error.start]:#x} at position {error.start}"
        )
    return f"must be JSON: {error}"


def _parse(line: bytes) -> Any:
    try:
        return JSON.decode(line.decode("utf-8-sig").strip())
    except (ValueError, RecursionError) as error:
        return ValueError(_unreadable(error))


def _array_rows(content: bytes) -> Iterator[Any]:
    """The rows of a JSON array; Damaged in the place of the first that cannot be read, and no more."""
    try:
        text = content.decode("utf-8-sig").strip()
        end = 0
        mark = FIRST.match(text)
        while mark and mark[1] != "]":
            row, end = JSON.raw_decode(text, mark.end())
            yield row
            mark = NEXT.match(text, end)
        if not mark:
            raise json.JSONDecodeError("Expecting a comma or the end of the array", text, end)
    except (ValueError, RecursionError) as error:
        yield Damaged(_unreadable(error))


def _parquet_rows(path: Path, file: Path | io.BytesIO) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    def rows_of(batch: Any) -> list[Any]:
        try:
            return list(batch.to_pylist())
        except (
            ValueError,
            ArithmeticError,
            LookupError,
        ) as error:  # text that is no UTF-8, say, in one row or more
            if len(batch) == 1:
                what = (
                    "text must be UTF-8"
                    if isinstance(error, UnicodeDecodeError)
                    else "a value cannot be read"
                )
                return [ValueError(f"{what}: {error}")]
            return [row for i in range(len(batch)) for row in rows_of(batch.slice(i, 1))]

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if doubled := repeated(table.schema_arrow.names):
                yield (
                    f"{path}: row 1",
                    Damaged(f"a table must have columns of different names, got {doubled} twice"),
                )
                return
            # Times are of no use here, and Python does not have them all.
            names = [
                field.name
                for field in table.schema_arrow
                if not pyarrow.types.is_temporal(field.type)
            ]
            for row in chain.from_iterable(
                rows_of(batch.select(names)) for batch in table.iter_batches(256)
            ):
                number += 1
                yield f"{path}: row {number}", row
    except pyarrow.ArrowException as error:
        yield (
            f"{path}: row {number + 1}",
            Damaged(f"the file breaks off or is damaged here ({error})"),
        )


def read_rows(path: Path, parse: Callable[[bytes], Any] = _parse) -> Iterator[tuple[str, Any]]:
    """(file:line, row) of every row, with a ValueError in the place of a row that cannot be read.
    Counted from 1; parse is what makes a line a row.
    """
    match, number = FILE.fullmatch(path.name), 0
    assert match is not None, path  # whoever found the file has looked
    opener: Any = {".gz": gzip.open, ".xz": lzma.open, None: open}[match["packed"]]
    try:
        with opener(path, "rb") as file:
            if match["kind"] == "parquet":
                yield from _parquet_rows(path, io.BytesIO(file.read()) if match["packed"] else path)
                return
            for number, line in enumerate(file, 1):
                if match["kind"] == "json" and line.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                    rows = _array_rows(line + file.read())
                    yield from ((f"{path}: row {n}", row) for n, row in enumerate(rows, 1))
                elif line.lstrip(b"\xef\xbb\xbf").strip():
                    yield f"{path}:{number}", parse(line)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        yield f"{path}:{number + 1}", Damaged(f"the file breaks off or is damaged here ({error})")


def source_rows(source: Source, most_test: int) -> tuple[int, Iterator[tuple[str, Any, bool]]]:
    """(how many, (file:line, row or ValueError, of the test split) of each): the training rows that
    the slice keeps, then the first most_test of the test split. Percentages are of the rows in the
    files, rounded to the nearest row. ValueError: a slice of damaged files, whose rows cannot be
    counted.
    """
    rows, tests = 0, sum(1 for path in source.test for _ in read_rows(path, parse=len))
    for place, row in chain.from_iterable(read_rows(path, parse=len) for path in source.training):
        if isinstance(row, Damaged) and source.bounds != (
            None,
            None,
        ):  # without a slice every row is looked at anyhow
            raise ValueError(f"{place}: {row}")
        rows += 1
    start, stop = (
        None
        if bound is None
        else round(rows * int(bound[:-1]) / 100)
        if bound[-1] == "%"
        else int(bound)
        for bound in source.bounds
    )
    kept = range(rows)[start:stop]
    training = islice(chain.from_iterable(map(read_rows, source.training)), kept.start, kept.stop)
    test = islice(chain.from_iterable(map(read_rows, source.test)), most_test)
    return len(kept) + min(tests, most_test), chain(
        ((*row, False) for row in training), ((*row, True) for row in test)
    )


def checked(row: Mapping[str, Any], name: str, valid: Callable[[Any], Any], wanted: str) -> Any:
    """A column's value. ValueError names the column that is missing or not `wanted`."""
    if name not in row:
        raise ValueError(f"{name} is missing; the row has {', '.join(map(str, row))[:200]}")
    if not valid(row[name]):
        raise ValueError(f"{name} must be {wanted}, got {reprlib.repr(row[name])}")
    return row[name]


def text_of(row: Mapping[str, Any], name: str) -> str:
    """A column's text. ValueError names one that is missing, no text, or not Unicode."""
    return str(
        checked(
            row,
            name,
            lambda value: isinstance(value, str) and not re.search("[\ud800-\udfff]", value),
            "text (Unicode without lone surrogates)",
        )
    )


Row = Mapping[str, Any]

# --- columns --------------------------------------------------------------------------------------


def text(row: Row, *names: str) -> str:
    """The text of the first of these columns that the row has."""
    return text_of(row, next((name for name in names if name in row), " or ".join(names)))


def some_text(row: Row, *names: str) -> str:
    """As text, of one that is not blank."""
    found = text(row, *names)
    if not found.strip():
        raise ValueError(f"{' or '.join(names)} must hold text, got {found!r}")
    return found


def one_of(row: Row, name: str, *words: str) -> str:
    """A column's text, which is one of these words, as they are spelled here."""
    return str(checked(row, name, lambda found: found in words, " or ".join(words)))


def texts(row: Row, name: str) -> tuple[str, ...]:
    """A column's list of texts. ValueError names one that is missing or anything else."""
    return tuple(
        checked(
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
    found: Row = checked(row, name, lambda found: isinstance(found, dict), "an object")
    return found


def number(row: Row, name: str, low: float = 0, high: float = 1) -> float:
    """A number in [low, high]; text will do, as CSV knows no other."""

    def valid(found: Any) -> bool:
        try:
            return low <= float(found) <= high
        except (TypeError, ValueError):
            return False

    return float(checked(row, name, valid, f"a number from {low} to {high}"))


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
        str(checked(row, name, lambda found: str(found).lower() in words, "true or false")).lower()
    ]


# --- files ----------------------------------------------------------------------------------------


def is_table(path: Path) -> bool:
    """Whether read_rows can read this file, by its name."""
    return path.is_file() and (
        path.suffix in (".csv", ".txt") or FILE.fullmatch(path.name) is not None
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
    match = FILE.fullmatch(path.name)
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


def read_table(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, row) of a .csv with a header, a .txt with a prompt a line, or whatever
    sources.read_rows reads; for a row that cannot be read, a ValueError in its place.
    """
    must_be_table(path)
    if path.suffix not in (".csv", ".txt"):
        yield from read_rows(path)
        return
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                csv.field_size_limit(2**31 - 1)  # a cell holds any text
                table = csv.DictReader(file, strict=True)
                if doubled := repeated(table.fieldnames or ()):
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


def parquet_copy(name: str, config: str, split: str) -> Path:
    """The folder of the hub's parquet copy of a data set's split.

    ValueError says why it cannot be had.
    """
    patterns = [f"{config}/{split}/*.parquet"]
    try:
        return snapshot(name, "refs/convert/parquet", patterns, "dataset") / config / split
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
    path = Path(source).expanduser() if source else parquet_copy(*hub.split(":"))
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
        check_names(path.name, files)
        check_whole(files)
    return files
