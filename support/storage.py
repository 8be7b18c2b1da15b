"""What a run keeps on disk: checkpoints, cached tensors, the run folder with its log. A kill at any
moment damages none of it.

Files and folders are written aside and renamed into place; checkpoints and cached tensors are held
against sha256 sums when read.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import (
    compute_local_shape_and_global_offset,
)  # private; the same on torch 2.11 to 2.13
from tqdm import tqdm

from support.distributed import World, duration, launched, local_part
from support.sources import cache_root, local_path, sha256

MANIFEST = "manifest.json"
CHECKPOINT_FILE_BYTES = (
    2**28
)  # of a rank's checkpoint; the writer holds a file's bytes in memory twice beside the tensors
SUMS = "sha256.json"  # of a kept folder's other files: {name: (bytes, sha256)}
SHARED_DISK_S = 30.0  # how long a network disk may take to show a node what another one wrote

# --- files ----------------------------------------------------------------------------------------


def read_line(line: str | bytes) -> Any:
    """The value that JSON text holds.

    ValueError: it is damaged, or holds NaN or an infinity, which Python alone reads.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file."""
    try:
        content = read_line(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def write_object(path: Path, content: dict[str, Any]) -> None:
    """A JSON object as a file, indented."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def sha256_all(paths: Sequence[Path], world: World) -> dict[str, str]:
    """{file name: sha256}, the reading shared out over the ranks."""
    mine = {path.name: sha256(path) for path in paths[world.rank :: world.size]}
    return dict(
        sorted(item for part in world.gather(mine) for item in part.items())
    )  # in one order on any number of ranks


def weights_sha256(folder: Path, world: World) -> str:
    """Of a model folder: one sum over config.json, the weights' files and their index, if it has
    one.

    Each node reads its own. ValueError: they are not the same.
    """
    names = ["config.json", *weight_files(folder)]
    if weight_map(folder):
        names.append(INDEX)
    files, local = [folder / name for name in names], launched("LOCAL_RANK", 0)
    mine = {path.name: sha256(path) for path in files[local :: launched("LOCAL_WORLD_SIZE", 1)]}
    node = world.rank - local  # its first rank
    sums = dict(
        sorted(
            item
            for first, part in world.gather((node, mine))
            if first == node
            for item in part.items()
        )
    )
    return world.same(f"the model {folder}", hashlib.sha256(json.dumps(sums).encode()).hexdigest())


def discard(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A free name beside `path`, for a file or folder that takes its place when the block ends.

    A kill or an error at any moment leaves what was at `path`, or the new one, and no mixture. One
    process at a time may write to a path.
    """
    aside = path.with_name(f".{path.name}.partial")
    earlier = path.with_name(f".{path.name}.earlier")
    if earlier.exists() and not path.exists():  # a kill came between the two renames
        earlier.rename(path)
    discard(aside)
    discard(earlier)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        if aside.is_file():
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
        if path.is_dir():  # no rename replaces a folder that holds something
            path.rename(earlier)
        aside.replace(path)
    finally:
        discard(aside)
    discard(earlier)


def set_aside(path: Path, aside: Path) -> None:
    """Rename a folder, at once; what has the name already, left by a kill, goes."""
    discard(aside)
    path.rename(aside)


def lock(path: Path, wait: bool = True) -> IO[str]:
    """Hold the lock of this name until the file is closed or the process ends.

    BlockingIOError: another process holds it, and this one does not wait.
    """
    file = open(path, "w")  # noqa: SIM115  # open for as long as the lock is held
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    return file


def write_text(path: Path, text: str) -> None:
    """A file of text, whole or absent."""
    with whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Any JSON value, as write_text writes.

    ValueError: NaN or an infinity, which JSON does not have.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def as_lines(rows: Iterable[Any]) -> str:
    """Rows as JSON lines. ValueError as in write_json."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """JSON lines, as write_text writes."""
    write_text(path, as_lines(rows))


def read_json(
    path: Path, *keys: str, remedy: str = "delete it, and make it again"
) -> dict[str, Any]:
    """The file's object; ValueError that names the file, and the remedy, when it is damaged: not
    JSON, or without one of the keys.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not all(key in value for key in keys):
        raise ValueError(f"{path} is damaged, or another program's; {remedy}")
    return value


def log_rows(path: Path) -> list[dict[str, Any]]:
    """A log's rows; what a kill cut short or somebody damaged is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            row = read_line(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


# --- work kept for later runs ---------------------------------------------------------------------


def key_of(identity: Any) -> str:
    """The name under which work is kept: a sum over all that it depends on, as JSON."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def has_all_files(folder: Path) -> bool:
    """Whether the files that a kept folder's sums name are there, in their sizes."""
    try:
        sums = read_object(folder / SUMS)
        return bool(sums) and all(
            (folder / name).stat().st_size == size for name, (size, _) in sums.items()
        )
    except (ValueError, OSError):
        return False


def kept_folder(root: Path, identity: Any, make: Callable[[Path], None]) -> Path:
    """The folder under `root` that keeps what make(an empty folder) writes for this identity.

    Of any number of processes that call at once one makes it, and the others wait. Later calls
    compare its files' sizes alone, as reading many gigabytes takes long. A damaged folder is named
    and made again.
    """
    folder = root / key_of(identity)
    if has_all_files(folder):
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with lock(folder.with_suffix(".lock")):
        if has_all_files(folder):
            return folder
        if folder.exists():
            print(f"{folder} is damaged; making it again", file=sys.stderr, flush=True)
        with whole(folder) as aside:
            aside.mkdir()
            make(aside)
            sums = {file.name: (file.stat().st_size, sha256(file)) for file in aside.iterdir()}
            write_json(aside / SUMS, sums)
    return folder


def sum_of_rows(rows: list[Any]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_part(path: Path, what: str) -> list[Any] | None:
    """The rows that a part keeps; None if there is none, or a damaged one, which is named."""
    if not path.exists():
        return None
    with contextlib.suppress(ValueError):
        part = read_json(path, "sha256", "rows")
        if part["sha256"] == sum_of_rows(part["rows"]):
            return list(part["rows"])
    print(f"{what}: {path} is damaged; computing it again", flush=True)
    path.unlink()
    return None


def keep_part(path: Path, rows: list[Any], what: str) -> list[Any]:
    """Keep rows as a part; returns them, or what another run has kept there meanwhile."""
    with lock(path.parent / ".lock"):
        others = read_part(path, what)
        if others is not None:
            return others
        rows = json.loads(json.dumps(rows, allow_nan=False))  # as a later run reads them
        write_text(path, json.dumps({"sha256": sum_of_rows(rows), "rows": rows}) + "\n")
    return rows


def kept_parts(
    store: Path,
    identity: Any,
    count: int,
    size: int,
    make: Callable[[range], list[Any]],
    world: World,
    what: str,
) -> list[Any]:
    """Rows 0 to count - 1 of what `identity` stands for, JSON values, the same on every rank: those
    that are kept in `store`, and the others.

    make(numbers) computes the others, at most `size` rows at a time, by all ranks together. Each
    time they become a part, a file that is whole or absent: a kill loses one. Of runs that compute
    a part at the same time the first to end is kept and used by all. On other processes rows differ
    in rounding, and a run that is started again must find those it began with.
    """
    key = key_of(identity)
    rows: list[Any] = []

    def find() -> list[Any] | None:
        found = read_part(part, what)
        if found is None:  # what cannot be written is said before the work
            store.mkdir(parents=True, exist_ok=True)
            open(store / ".lock", "a").close()
        return found

    with tqdm(
        total=count, desc=what, unit="row", disable=not world.is_main or count <= size, leave=False
    ) as progress:
        while len(rows) < count:
            part = store / f"{key}-{len(rows)}.json"
            new = world.from_main(find)
            if new is None:
                made = make(range(len(rows), min(len(rows) + size, count)))
                new = world.from_main(functools.partial(keep_part, part, made, what))
            rows += new
            progress.update(len(new))
    return rows


def kept_rows(
    path: Path,
    identity: Mapping[str, Any],
    count: int,
    size: int,
    make: Callable[[range], list[dict[str, Any]]],
    world: World,
    what: str,
) -> list[dict[str, Any]]:
    """kept_parts of objects, which are written to `path` too, as JSON lines for people to read.

    The parts lie beside it, in `.kept`.
    """
    store = path.parent / ".kept"
    identity = {**identity, "file": path.name}
    rows = kept_parts(store, identity, count, size, make, world, what)
    world.from_main(lambda: write_lines(path, rows))
    return rows


# --- checkpoints ----------------------------------------------------------------------------------


def causes(error: CheckpointException) -> tuple[list[BaseException], str]:
    """What the ranks' saving or loading died of, also in words.

    An interrupt among it, which torch wraps too, is raised as itself.
    """
    found = {rank: failure[0] for rank, failure in error.failures.items()}
    for cause in found.values():
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
    return [*found.values()], "; ".join(
        f"rank {rank}: {str(cause).partition(chr(10))[0]}" for rank, cause in found.items()
    )


def _manifest(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, OSError):
        value = read_json(path / MANIFEST, "step", "sha256")
        return (
            value
            if value["sha256"] and all((path / name).is_file() for name in value["sha256"])
            else None
        )
    return None


def _numbered(folder: Path, prefix: str = "") -> list[Path]:
    """The folders named step- and digits, after `prefix`, by their numbers.

    Whatever else lies there is not ours.
    """
    name = re.compile(re.escape(prefix) + r"step-([0-9]+)")
    found = []
    for path in folder.glob(f"{prefix}step-*"):
        number = name.fullmatch(path.name)
        if number and path.is_dir():
            found.append((int(number[1]), path))
    return [path for _, path in sorted(found)]


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], world: World, keep: int
) -> None:
    """Write `folder`/step-<step> from every rank's shards, whole or not at all; keep it and the
    `keep` newest.

    torch.distributed.checkpoint in its safetensors form, plus a manifest with the files' sha256
    sums. A kill at any moment leaves the earlier checkpoints untouched: the folder gets its name
    only once everything is on disk.
    """
    target, aside = folder / f"step-{step:08d}", folder / f".step-{step:08d}"

    def begin() -> None:
        for left in _numbered(
            folder, "."
        ):  # by a save that was killed or found the disk full; damaged ones
            shutil.rmtree(left)
        aside.mkdir(parents=True)

    def finish() -> None:
        write_json(aside / MANIFEST, {"step": step, "processes": world.size, "sha256": sums})
        shutil.rmtree(target, ignore_errors=True)
        os.rename(aside, target)
        for other in _numbered(folder)[:-keep]:
            os.rename(other, aside)  # at once: what is left of it is no checkpoint
            shutil.rmtree(aside)

    world.from_main(begin)
    ends = accumulate(local_part(tensor).nbytes for tensor in tensors.values())
    files = {
        name: 1 + (end - 1) // CHECKPOINT_FILE_BYTES
        for name, end in zip(tensors, ends, strict=True)
    }
    try:
        save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(aside), files, save_distributed=True),
        )
    except (
        CheckpointException
    ) as error:  # no Exception: it would pass every handler, and hides its causes
        raise OSError(
            f"checkpoint {target} could not be written ({causes(error)[1]}); the earlier ones are whole"
        ) from error
    sums = sha256_all(world.from_main(lambda: sorted(aside.glob("*.safetensors"))), world)
    world.from_main(finish)


def read_checkpoint(path: Path, tensors: dict[str, Tensor], world: World) -> int | None:
    """Fill `tensors` from an undamaged checkpoint, and return its step; else None."""
    found = world.from_main(lambda: _manifest(path))
    if (
        found is None
        or sha256_all([path / name for name in found["sha256"]], world) != found["sha256"]
    ):
        return None
    try:
        load(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
    except (
        CheckpointException
    ) as error:  # some tensors may be filled: no going on from an earlier one
        wrong, said = causes(error)
        if all(
            isinstance(cause, ValueError) or str(cause).startswith("Missing key") for cause in wrong
        ):
            raise ValueError(
                f"checkpoint {path} is whole but not of this model; delete it, and run again ({said})"
            ) from error
        raise OSError(
            f"checkpoint {path} could not be read ({said}); it is whole: run again"
        ) from error
    return int(found["step"])


def load_checkpoint(folder: Path, tensors: dict[str, Tensor], world: World) -> int:
    """Fill `tensors` in place from the newest undamaged checkpoint, whatever its number of
    processes; return its step.

    0 when there is none. A checkpoint whose sums do not match is named and set aside, and the one
    before it is tried.
    """
    for path in reversed(world.from_main(lambda: _numbered(folder))):
        if (step := read_checkpoint(path, tensors, world)) is not None:
            return step
        world.say(f"checkpoint {path} is damaged; trying the one before it")
        world.from_main(functools.partial(set_aside, path, path.with_name(f".{path.name}")))
    return 0


# --- the run folder -------------------------------------------------------------------------------


def surroundings() -> dict[str, Any]:
    """Versions, git commit, hardware and date, for run.json."""
    import importlib.metadata

    commit = ""
    if shutil.which("git"):
        here = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(here, capture_output=True, text=True, check=False).stdout.strip()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "versions": {"python": platform.python_version()}
        | {
            name: importlib.metadata.version(name)
            for name in ("torch", "safetensors", "tokenizers", "numpy")
        },
        "git_commit": commit or None,
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cpus": os.cpu_count(),
            "gpus": gpus,
        },
        "processes": launched("WORLD_SIZE", 1),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def step_line(row: Mapping[str, Any]) -> str:
    """A step's row as one line a person can follow."""
    parts = [f"loss {row['loss']:.4g}"]
    parts += [
        f"{name} {row[f'{name}_loss']:.4g}"
        for name in ("safety", "helpfulness")
        if f"{name}_loss" in row
    ]
    short = {
        "both_safe": "safe/safe",
        "chosen_safe": "safe/unsafe",
        "rejected_safe": "unsafe/safe",
        "both_unsafe": "unsafe/unsafe",
    }
    margins = [
        f"{short[name]} {q['margin_nats']:+.1f}->{q['target_nats']:+.1f}"
        for name, q in row.get("quadrants", {}).items()
    ]
    parts += [f"h {', '.join(margins)}"] if margins else []
    parts += [
        f"lr {row['lr']:.2g}",
        f"{row['rows_per_s']:.3g} rows/s",
        f"{row['tokens_per_s']:.0f} tokens/s",
    ]
    return "  ".join([*parts, f"{row['memory_gib']:.2f} GiB"])


@dataclass
class RunFolder:
    """runs/<name>/: run.json (settings, versions, hardware), log.jsonl, checkpoints/, model/,
    done.json when finished.

    --fresh renames an earlier run to .<name>.old beside it. There it stays until `drop_earlier`,
    which the new run calls when it has a first result. Until then another --fresh removes the new
    run, and not the earlier one.
    """

    path: Path
    world: World
    program: str = "train"
    log: IO[str] | None = field(default=None, repr=False)
    lock: IO[str] | None = field(default=None, repr=False)
    free: frozenset[str] = frozenset()
    steps: int = 0
    print_every: int = 1
    printed: tuple[int, float] = (0, 0.0)  # the step last printed, and when
    started: datetime = field(
        default_factory=lambda: datetime.now().astimezone()
    )  # what templates write as today's date

    def _read(self, path: Path, *keys: str) -> dict[str, Any]:
        return read_json(
            path, *keys, remedy=f"pass --fresh to start over, or delete the folder {self.path}"
        )

    def check(
        self,
        settings: Mapping[str, Any],
        free: frozenset[str],
        fresh: bool,
        reads: Iterable[str] = (),
    ) -> dict[str, Any] | None:
        """What a finished run of these settings left in done.json; None when there is still
        something to do.

        ValueError when the folder holds files that are no run, another program's run, something
        that this one `reads`, without `fresh` a run with other settings, which it names, or, before
        anything is removed or begun, the cache. Settings in `free` may differ: they do not change
        what comes out. Writes nothing. Afterwards `started` is when the run in the folder began, or
        now.
        """
        self.free = free

        def look() -> dict[str, Any] | None:
            record, whole = self.path / "run.json", self.path.resolve()
            for path, name in ((local_path(name), name) for name in reads):
                if path and any(
                    path.resolve().is_relative_to(place) for place in (whole, self._earlier())
                ):
                    raise ValueError(
                        f"{self.path} must not hold what the run reads, got {name}; pass another --out"
                    )
            caches = cache_root(settings.get("cache")).resolve()
            if (fresh or not record.exists()) and caches.is_relative_to(whole):
                raise ValueError(
                    f"{self.path} must not hold the cache {caches}: --fresh would remove it; pass another --cache"
                )
            if fresh and record.exists():
                if Path.cwd().is_relative_to(whole):
                    raise ValueError(
                        f"{self.path} cannot be made anew from inside it; run the command in another folder"
                    )
                own = {
                    whole,
                    *(
                        whole / name
                        for name in ("sft", "bfpo", "dpo", "ipo")
                        if settings.get("recipe") == "toy"
                    ),
                }  # its stages
                if other := next(
                    (path.parent for path in whole.rglob("run.json") if path.parent not in own),
                    None,
                ):
                    raise ValueError(
                        f"{self.path} must not hold other runs, which --fresh would remove, got {other}; move it away"
                    )
            if not record.exists():
                foreign = sorted(
                    path.name
                    for path in self.path.glob(
                        "*"
                    )  # but for what a run leaves that is killed at once
                    if path.name != ".lock" and not path.name.startswith(".run.json.")
                )
                if foreign or (self.path.exists() and not self.path.is_dir()):
                    raise ValueError(
                        f"{self.path} is no run folder (no run.json beside {foreign[:3]}); pass another --out"
                    )
                try:
                    tempfile.TemporaryFile(dir=self._there()).close()  # it never has a name
                except OSError as error:
                    raise ValueError(
                        f"{self.path} must be writable, got {error}; pass another --out"
                    ) from error
                return None
            self._refuse_other(settings, fresh)
            if fresh:
                return None
            done = self.path / "done.json"
            result = self._read(done, "model") if done.exists() else None
            return (
                result
                if result and (self.path / result["model"] / "config.json").is_file()
                else None
            )  # else: export again

        found = self.world.from_main(look)
        self.started = self.world.from_main(lambda: self._began(fresh))
        return found

    def _began(self, fresh: bool) -> datetime:
        """When the run began that this command goes on with; now, if it begins one.

        One date holds from a run's start to its end.
        """
        records = [folder / "run.json" for folder in (self.path, self._earlier())]
        record = next((path for path in records if path.exists()), None)
        if fresh or record is None:
            return datetime.now().astimezone()
        try:
            return datetime.fromisoformat(self._read(record, "started")["started"])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{record} is damaged; pass --fresh to start over, or delete the folder {self.path}"
            ) from error

    def _refuse_other(self, settings: Mapping[str, Any], fresh: bool) -> None:
        """ValueError when the run in the folder is another program's, or, without `fresh`, has
        other settings.
        """
        try:
            record = self._read(self.path / "run.json", "settings", "inputs")
        except ValueError:
            if fresh:
                return  # damaged: it will be removed
            raise
        if (other := record.get("program", self.program)) != self.program:
            raise ValueError(
                f"{self.path} holds a run of {other}, not of {self.program}; pass another --out"
            )
        earlier, plain = record["settings"], json.loads(json.dumps(settings))
        changed = sorted(
            key for key in plain if key not in self.free and earlier.get(key) != plain[key]
        )
        if changed and not fresh:
            differences = ", ".join(
                f"{key} was {earlier.get(key)!r}, now {plain[key]!r}" for key in changed
            )
            raise ValueError(
                f"{self.path} holds a run with other settings ({differences}); pass another --out, or --fresh to start over"
                f"{self._way_back()}"
            )

    def _there(self) -> Path:
        """The folder, or the nearest one above it that exists."""
        return next(path for path in (self.path, *self.path.absolute().parents) if path.exists())

    def _earlier(self) -> Path:
        """Where --fresh keeps the earlier run: beside the folder that the path leads to, which may
        be a link to another disk.
        """
        whole = self.path.resolve()
        return whole.with_name(f".{whole.name}.old")

    def _way_back(self) -> str:
        """How to get back the run that --fresh renamed, if one is kept; part of a message."""
        if not self._earlier().exists():
            return ""
        return f". The run before it is kept as {self._earlier()}; to go back to it, delete {self.path} and run that one's command"

    def must_hold(self, needed: int, first: int = 0) -> None:
        """ValueError when the disk has no room for so many bytes. What an earlier part of the run
        wrote there counts as room.

        So does a run that --fresh replaces, but not for the `first` bytes, as it goes only after
        those are written.
        """

        def look() -> None:
            places = [place for place in (self.path, self._earlier()) if place.exists()]
            mine = sum(
                path.stat().st_size for place in places for path in place.rglob("*.safetensors")
            )
            free = shutil.disk_usage(self._there()).free
            if needed > free + mine or first > free:
                raise ValueError(
                    f"{self.path} needs {needed / 1e9:.3g} GB for checkpoints and the model, but {free / 1e9:.3g} GB "
                    "are free; free space, or pass another --out or a smaller --keep"
                )

        self.world.from_main(look)

    def create(
        self,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        fresh: bool,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the folder and its run.json, or go on with the run there; `fresh` sets that one
        aside first.

        facts: what else run.json says of the run; nothing is compared with it.

        ValueError when weights or data (`inputs`: name -> fingerprint) are not those that the run
        began with, or when a rank does not see the folder: every rank writes its part of a
        checkpoint there.
        """

        def make() -> None:
            record, whole, earlier = self.path / "run.json", self.path.resolve(), self._earlier()
            if fresh and record.exists():
                self._lock()
                if earlier.exists():  # the run here has no result yet
                    self._remove(whole)
                else:
                    os.replace(whole, earlier)  # at once: a kill leaves a whole run, or none
            elif (
                earlier.exists() and not fresh and not record.exists()
            ):  # a kill, or the user, removed the run after it
                shutil.rmtree(whole, ignore_errors=True)
                os.replace(earlier, whole)
            whole.mkdir(parents=True, exist_ok=True)
            self._lock()
            if record.exists():
                self._refuse_other(
                    settings, False
                )  # again: another command may have begun since `check`
                began = self._read(record, "inputs")["inputs"]
                changed = sorted(name for name in inputs if began.get(name) != inputs[name])
                if changed:
                    raise ValueError(
                        f"{self.path} began with other {', '.join(changed)}: files, tokenizer, chat format or version of this "
                        "program; restore them, or pass --fresh to start over"
                    )
                return
            sum_of = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
            write_json(
                record,
                {
                    "program": self.program,
                    "settings": settings,
                    "settings_sha256": sum_of,
                    "inputs": inputs,
                    **(facts or {}),
                    **surroundings(),
                    "started": self.started.isoformat(timespec="seconds"),
                },
            )

        self.world.from_main(make)
        if fresh and self.world.from_main(self._earlier().exists):
            self.world.say(
                f"--fresh: the earlier run is kept as {self._earlier()} until this one has its first result; to go back to it, "
                f"delete {self.path} and run that one's command"
            )
        sign, token = self.path / ".sign", self.world.from_main(lambda: uuid.uuid4().hex)

        def seen() -> bool:
            return sign.exists() and sign.read_text(encoding="utf-8") == token

        self.world.from_main(
            lambda: write_text(sign, token)
        )  # a run.json may be an earlier run's, on a node's own disk
        deadline = time.monotonic() + SHARED_DISK_S
        while not seen() and time.monotonic() < deadline:
            time.sleep(0.5)
        blind = [rank for rank, sees in enumerate(self.world.gather(seen())) if not sees]
        self.world.from_main(sign.unlink)

        def refuse_blind() -> None:
            if blind:
                raise ValueError(
                    f"{self.path.absolute()} must be on a disk that all nodes share, but rank {blind[0]} does not see it"
                )

        self.world.from_main(refuse_blind)

    def _remove(self, folder: Path) -> None:
        """Delete a run's folder; a kill leaves it whole, or nothing of that name."""
        aside = folder.with_name(f".{self.path.resolve().name}.partial")
        set_aside(folder, aside)
        shutil.rmtree(aside)

    def drop_earlier(self) -> None:
        """Delete the run that --fresh set aside: this one has a checkpoint, a report or a model of
        its own.
        """

        def drop() -> None:
            if self._earlier().exists():
                self._remove(self._earlier())

        self.world.from_main(drop)

    def _lock(self) -> None:
        """Keep other runs out of the folder for as long as this process lives.

        ValueError when one is in it.
        """
        self.lock = open(self.path / ".lock", "w")  # noqa: SIM115  # the system lets go of it with the process
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path} is in use by another run; wait for it, or pass another --out"
            ) from None

    def start_log(self, step: int, steps: int, print_every: int) -> None:
        """Open log.jsonl to append, dropping rows from `step` on: a resumed run of `steps` steps
        writes them again.
        """
        self.steps, self.print_every, self.printed = steps, print_every, (step, time.monotonic())

        def rewrite() -> None:
            path = self.path / "log.jsonl"
            aside = path.with_name(".log.jsonl")
            kept = [row for row in self.rows() if row["step"] < step]
            aside.write_text(as_lines(kept), encoding="utf-8")
            os.replace(aside, path)
            self.log = open(path, "a", encoding="utf-8")  # noqa: SIM115  # closed by `finish`, or with the process

        self.world.from_main(rewrite)

    def rows(self) -> list[dict[str, Any]]:
        """What log.jsonl holds, damaged lines left out."""
        return log_rows(self.path / "log.jsonl")

    def write_row(self, row: Mapping[str, Any]) -> None:
        """A row to log.jsonl, on rank 0."""
        if self.log is not None:
            self.log.write(as_lines([row]))
            self.log.flush()

    def log_step(self, row: Mapping[str, Any]) -> None:
        """Write the row of a step; print every few of them, and the last, with the time left."""
        self.write_row(row)
        done = row["step"] + 1
        if done % self.print_every == 0 or done == self.steps:
            (last, then), self.printed = self.printed, (done, time.monotonic())
            left = (self.printed[1] - then) / (done - last) * (self.steps - done)
            self.world.say(
                f"step {done}/{self.steps}  {step_line(row)}  left in this stage {duration(left)}"
            )

    def finish(self, result: Mapping[str, Any]) -> None:
        """Close the log and mark the run as finished."""
        if self.log is not None:
            self.log.close()
            self.log = None
        self.world.from_main(lambda: write_json(self.path / "done.json", result))
        self.drop_earlier()


INDEX = "model.safetensors.index.json"


def part_like(parameter: Tensor, whole: Any) -> tuple[Tensor, Tensor]:
    """What this rank holds of a parameter, and the same part of `whole`, a tensor or a safetensors
    slice.

    Of a parameter sharded by FSDP2 only that part is read.
    """
    if not isinstance(parameter, DTensor):
        return parameter, whole[:]
    local = parameter.to_local()
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    if not local.numel():
        return local, torch.empty_like(local)
    return local, whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


@torch.no_grad()
def fill(parameter: Tensor, whole: Any) -> None:
    """parameter <- whole, a tensor or a safetensors slice, in the parameter's dtype."""
    local, part = part_like(parameter, whole)
    local.copy_(part)


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file of a checkpoint folder, by its index.

    Empty where there is no index. Like transformers also where model.safetensors lies beside it:
    the index is then an older model's. ValueError: the index has no weight_map.
    """
    index = folder / INDEX
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return {}
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict):
        raise ValueError(f"{index} must hold a weight_map from tensors to files, got {named!r}")
    return {name: str(file) for name, file in named.items()}


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a checkpoint folder's tensors, sorted."""
    return sorted(set(weight_map(folder).values())) or ["model.safetensors"]


def slices(folder: Path) -> dict[str, Any]:
    """Name -> safetensors slice, read when indexed, of every tensor in the files of a checkpoint
    folder. Reads their headers alone.

    Where another file holds a copy of a tensor, the one that the index names is read. ValueError
    names a file that is damaged, missing or outside the folder, and a tensor that is in two files
    and not in the index.
    """
    stored = dict[str, Any]()
    named = weight_map(folder)
    for path in (folder / file for file in weight_files(folder)):
        if path.parent != folder or not path.is_file():
            others = sorted(
                p.name
                for p in folder.iterdir()
                if p.suffix in (".bin", ".pt", ".pth", ".safetensors")
            )
            raise ValueError(
                f"{path} must be a file of {folder}, got {others or 'no weights'} there; only whole safetensors are read"
            )
        try:
            handle: Any = safe_open(path, framework="pt")
            for name in handle.keys():  # noqa: SIM118  # a handle is no mapping
                if name.endswith("rotary_emb.inv_freq"):  # the tables of old Llamas
                    continue
                if named.get(name, path.name) != path.name:  # an older copy
                    continue
                if name in stored:
                    raise ValueError(
                        f"{path} and another file hold {name}, and {INDEX} does not say which counts; name it there"
                    )
                stored[name] = handle.get_slice(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} must be a whole safetensors file, got: {error}; fetch it again"
            ) from error
    return stored


def must_be_replaceable(folder: Path, beside: set[str]) -> None:
    """ValueError unless the folder is absent, empty, or a model's alone (config.json,
    model*.safetensors, and files with the names `beside`), and not the one that this process works
    in.
    """
    there = (
        {path.name for path in folder.iterdir()}
        if folder.is_dir()
        else {folder.name}
        if folder.exists()
        else set()
    )
    weights = {name for name in there if name.startswith("model") and name.endswith(".safetensors")}
    foreign = there - weights - beside - {INDEX}
    if there and (foreign or not weights or "config.json" not in there):
        raise ValueError(
            f"save folder must be absent, empty or a model's alone, to replace it, got {folder} with "
            f"{min(foreign or there)} in it; choose another, or move that away"
        )
    if folder.exists() and Path.cwd().is_relative_to(folder):
        raise ValueError(
            f"save folder {folder} cannot be made anew from inside it; work in another folder"
        )


def begin_aside(folder: Path) -> Path:
    """A new folder beside this one, for `put_in_place`; what a kill between that one's two renames
    left gets its name back.
    """
    aside, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left in (aside, old):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def put_in_place(aside: Path, folder: Path) -> None:
    """Gives a folder that is whole its name, and removes the one that had it."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, writes: bool = True
) -> None:
    """Writes tensors in `dtype`, one in memory at a time: safetensors' save_file wants a whole
    file's at once, and copies them. Every rank calls it with sharded ones, which are gathered; the
    one that `writes` writes.
    """
    entries, end = dict[str, Any](__metadata__={"format": "pt"}), 0
    code = {
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.float64: "F64",
    }[dtype]
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": code,
            "shape": list(tensor.shape),
            "data_offsets": [end, end := end + tensor.numel() * dtype.itemsize],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
    with open(path, "wb") if writes else contextlib.nullcontext() as file:
        if file:
            file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if file:
                file.write(
                    whole.to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy().data
                )
