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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import api, hf_storage, state_dict_loader, state_dict_saver
from torch.distributed.tensor import DTensor

# Private; the same on torch 2.11 to 2.13.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from tqdm import tqdm

from support.distributed import World, duration, launched, local_part
from support.sources import cache_root, local_path, sha256

INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Of a rank's checkpoint; the writer holds a file's bytes in memory twice beside the tensors.
CHECKPOINT_FILE_BYTES = 2**28
SUMS = "sha256.json"  # of a kept folder's other files: {name: (bytes, sha256)}
SHARED_DISK_S = 30.0  # how long a network disk may take to show a node what another one wrote

Json = dict[str, Any]
Maker = Callable[[range], list[Any]]  # of the rows with these numbers

# --- files ----------------------------------------------------------------------------------------


def read_line(line: str | bytes) -> Any:
    """The value that JSON text holds.

    ValueError: it is damaged, or holds NaN or an infinity, which Python alone reads.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def read_object(path: Path, *keys: str, remedy: str = "delete it, and make it again") -> Json:
    """The object in a JSON file, empty if there is no such file.

    ValueError, which names the file and the remedy: it is damaged, or lacks one of the keys.
    """
    content: Any = {}
    try:
        if path.is_file():
            content = read_line(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}; {remedy}") from error
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        words = f"a JSON object with {', '.join(keys)}" if keys else "a JSON object"
        raise ValueError(f"{path} must hold {words}: is it another program's? {remedy}")
    return content


def undamaged(path: Path, *keys: str) -> Json:
    """read_object, empty for a damaged file too."""
    with contextlib.suppress(ValueError, OSError):
        return read_object(path, *keys)
    return {}


def digest(value: Any) -> str:
    """The sha256 sum, in hex, of a value's JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def sha256_all(paths: Sequence[Path], world: World, readers: range) -> dict[str, str]:
    """{file name: sha256} of the files that are there, sorted. `readers`, the ranks that see the
    same files as this one, share the reading.
    """
    own = paths[world.rank - readers.start :: len(readers)]
    mine = {path.name: sha256(path) for path in own if path.is_file()}
    parts = world.gather(mine)
    sums = dict[str, str]()
    for rank in readers:
        sums |= parts[rank]
    return dict(sorted(sums.items()))


def weights_sha256(folder: Path, world: World) -> str:
    """Of a model folder: one sum over config.json, the weights' files and their index, if it has
    one.

    Each node reads its own. ValueError: they are not the same.
    """
    names = ["config.json", *weight_files(folder)]
    if weight_map(folder):
        names.append(INDEX)
    first = world.rank - launched("LOCAL_RANK", 0)
    node = range(first, first + launched("LOCAL_WORLD_SIZE", 1))
    sums = sha256_all([folder / name for name in names], world, node)
    return world.same(f"the model {folder}", digest(sums))


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
        aside.rename(path)
    finally:
        discard(aside)
    discard(earlier)


def set_aside(path: Path, aside: Path) -> None:
    """Rename a folder, at once; what has the name already, left by a kill, goes."""
    discard(aside)
    path.rename(aside)


def remove(path: Path) -> None:
    """Delete a folder; a kill leaves it whole, or nothing of its name."""
    aside = path.with_name(f".{path.name.lstrip('.')}.partial")
    set_aside(path, aside)
    discard(aside)


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


# --- work kept for later runs ---------------------------------------------------------------------


def key_of(identity: Any) -> str:
    """The name under which work is kept: a sum over all that it depends on, as JSON."""
    return digest(identity)[:32]


def has_all_files(folder: Path) -> bool:
    """Whether the files that a kept folder's sums name are there, in their sizes."""
    sums = undamaged(folder / SUMS)
    for name, (size, _) in sums.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            return False
    return bool(sums)


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


def read_part(path: Path, what: str) -> list[Any] | None:
    """The rows that a part keeps; None if there is none, or a damaged one, which is named."""
    if not path.exists():
        return None
    part = undamaged(path, "sha256", "rows")
    if part and part["sha256"] == digest(part["rows"]):
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
        write_text(path, json.dumps({"sha256": digest(rows), "rows": rows}) + "\n")
    return rows


def kept_parts(
    store: Path, identity: Any, count: int, size: int, make: Maker, world: World, what: str
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

    world.from_main(lambda: store.mkdir(parents=True, exist_ok=True))
    quiet = not world.is_main or count <= size
    with tqdm(total=count, desc=what, unit="row", disable=quiet, leave=False) as progress:
        while len(rows) < count:
            part = store / f"{key}-{len(rows)}.json"
            new = world.from_main(functools.partial(read_part, part, what))
            if new is None:
                made = make(range(len(rows), min(len(rows) + size, count)))
                new = world.from_main(functools.partial(keep_part, part, made, what))
            rows += new
            progress.update(len(new))
    return rows


def kept_rows(
    path: Path, identity: Json, count: int, size: int, make: Maker, world: World, what: str
) -> list[Json]:
    """kept_parts of objects, which are written to `path` too, as JSON lines for people to read.

    The parts lie beside it, in `.kept`.
    """
    store = path.parent / ".kept"
    identity = {**identity, "file": path.name}
    rows = kept_parts(store, identity, count, size, make, world, what)
    world.from_main(lambda: write_lines(path, rows))
    return rows


# --- model folders --------------------------------------------------------------------------------


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file of a checkpoint folder, by its index.

    Empty where there is no index. Like transformers also where model.safetensors lies beside it:
    the index is then an older model's. ValueError: the index has no weight_map.
    """
    index = folder / INDEX
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return {}
    return dict(read_object(index, "weight_map", remedy="fetch it again")["weight_map"])


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a checkpoint folder's tensors, sorted."""
    return sorted(set(weight_map(folder).values())) or ["model.safetensors"]


def slices(folder: Path) -> dict[str, Any]:
    """Name -> safetensors slice, read when indexed, of every tensor in the files of a checkpoint
    folder. Reads their headers alone.

    Where another file holds a copy of a tensor, the one that the index names is read. ValueError
    names a file that is damaged or missing.
    """
    stored: Json = {}
    files = weight_map(folder)
    for file in weight_files(folder):
        try:
            handle: Any = safe_open(folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{folder / file}: {error}; only whole safetensors are read; fetch it again"
            ) from error
        for name in handle.keys():  # noqa: SIM118  # a handle is no mapping
            is_older_copy = files.get(name, file) != file
            if not is_older_copy and not name.endswith("rotary_emb.inv_freq"):  # of old Llamas
                stored[name] = handle.get_slice(name)
    return stored


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


def must_be_replaceable(folder: Path, beside: set[str]) -> None:
    """ValueError unless the folder is absent, empty, or a model's alone (config.json,
    model*.safetensors, and files with the names `beside`), and not the one that this process works
    in.
    """
    there = {path.name for path in folder.glob("*")}
    weights = {name for name in there if name.startswith("model") and name.endswith(".safetensors")}
    foreign = there - weights - beside - {INDEX}
    if there and (foreign or not weights or "config.json" not in there):
        raise ValueError(
            f"save folder must be absent, empty or a model's alone, to replace it, got {folder} "
            f"with {min(foreign or there)} in it; choose another, or move that away"
        )
    if Path.cwd().is_relative_to(folder):
        raise ValueError(
            f"save folder {folder} cannot be made anew from inside it; work in another folder"
        )


@torch.no_grad()
def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, writes: bool = True
) -> None:
    """Writes tensors in `dtype`, one in memory at a time: safetensors' save_file wants a whole
    file's at once, and copies them. Every rank calls it with sharded ones, which are gathered; the
    one that `writes` writes.
    """
    entries: Json = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start = end
        end += tensor.numel() * dtype.itemsize
        entries[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
    with open(path if writes else os.devnull, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            whole_tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if writes:
                values = whole_tensor.to("cpu", dtype).contiguous().flatten()
                file.write(values.view(torch.uint8).numpy().data)


# --- checkpoints ----------------------------------------------------------------------------------


@contextlib.contextmanager
def checkpoint_errors(what: str, remedy: str) -> Iterator[None]:
    """torch's CheckpointException, which is no Exception and would pass every handler, as an
    OSError. An interrupt, which torch wraps too, is raised as itself.
    """
    try:
        yield
    except api.CheckpointException as error:
        causes = []
        for rank, (cause, _) in error.failures.items():
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
            causes.append(f"rank {rank}: {str(cause).partition(chr(10))[0]}")
        raise OSError(f"{what} ({'; '.join(causes)}); {remedy}") from error


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first. Whatever else lies there is not ours."""
    name = re.compile(r"step-[0-9]{8}")
    return sorted(p for p in folder.glob("step-*") if name.fullmatch(p.name) and p.is_dir())


def file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """{name: number of its file, from 1}, of CHECKPOINT_FILE_BYTES or little more a file."""
    numbers = {}
    end = 0
    for name, tensor in tensors.items():
        end += local_part(tensor).nbytes
        numbers[name] = 1 + (end - 1) // CHECKPOINT_FILE_BYTES
    return numbers


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], world: World, keep: int
) -> None:
    """Write `folder`/step-<step> from every rank's shards, whole or not at all; keep it and the
    `keep` newest.

    torch.distributed.checkpoint in its safetensors form, plus a manifest with the files' sha256
    sums. A kill at any moment leaves the earlier checkpoints untouched.
    """
    target = folder / f"step-{step:08d}"

    def begin() -> Path:
        for left in folder.glob(".step-[0-9]*"):  # by a save that was killed; damaged ones
            discard(left)
        aside = saving.enter_context(whole(target))
        aside.mkdir()
        return aside

    def drop_old() -> None:
        for old in checkpoints_in(folder)[:-keep]:
            remove(old)

    with contextlib.ExitStack() as saving:  # on rank 0 it ends with the folder's rename
        aside = world.from_main(begin)
        writer = hf_storage.HuggingFaceStorageWriter(
            str(aside), file_numbers(tensors), save_distributed=True
        )
        with checkpoint_errors(f"{target} could not be written", "the earlier ones are whole"):
            state_dict_saver.save(tensors, storage_writer=writer)
        files = world.from_main(lambda: sorted(aside.glob("*.safetensors")))
        sums = sha256_all(files, world, range(world.size))
        manifest = {"step": step, "processes": world.size, "sha256": sums}
        world.from_main(lambda: write_json(aside / MANIFEST, manifest))
    world.from_main(drop_old)


def read_checkpoint(path: Path, tensors: dict[str, Tensor], world: World) -> int | None:
    """Fill `tensors` from an undamaged checkpoint, and return its step; else None."""
    manifest = world.from_main(lambda: undamaged(path / MANIFEST, "step", "sha256"))
    sums = manifest.get("sha256")
    files = [path / name for name in sums or ()]
    if not sums or sha256_all(files, world, range(world.size)) != sums:
        return None
    # Some tensors may be filled by then: the checkpoint before it is no help.
    remedy = "run again, or delete it if it is of another model"
    with checkpoint_errors(f"{path} is whole, but could not be read", remedy):
        reader = hf_storage.HuggingFaceStorageReader(str(path))
        state_dict_loader.load(tensors, storage_reader=reader)
    return int(manifest["step"])


def load_checkpoint(folder: Path, tensors: dict[str, Tensor], world: World) -> int:
    """Fill `tensors` in place from the newest undamaged checkpoint, whatever its number of
    processes; return its step.

    0 when there is none. A checkpoint whose sums do not match is named and set aside, and the one
    before it is tried.
    """
    for path in reversed(world.from_main(lambda: checkpoints_in(folder))):
        step = read_checkpoint(path, tensors, world)
        if step is not None:
            return step
        world.say(f"checkpoint {path} is damaged; trying the one before it")
        world.from_main(functools.partial(set_aside, path, path.with_name(f".{path.name}")))
    return 0


# --- the run folder -------------------------------------------------------------------------------


def surroundings() -> Json:
    """Versions, git commit, hardware and date, for run.json."""
    import importlib.metadata

    commit = ""
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    packages = ("torch", "safetensors", "tokenizers", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **versions},
        "git_commit": commit or None,
        "hardware": {"system": platform.platform(), "cpus": os.cpu_count(), "gpus": gpus},
        "processes": launched("WORLD_SIZE", 1),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def log_rows(path: Path) -> list[Json]:
    """A log's rows; what a kill cut short or somebody damaged is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            row = read_line(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def step_line(row: Mapping[str, Any]) -> str:
    """A step's row as one line a person can follow."""
    parts = [f"loss {row['loss']:.4g}"]
    for name in ("safety", "helpfulness"):
        if f"{name}_loss" in row:
            parts.append(f"{name} {row[f'{name}_loss']:.4g}")
    margins = []
    for quadrant, view in row.get("quadrants", {}).items():
        margins.append(f"{quadrant} {view['margin_nats']:+.1f}->{view['target_nats']:+.1f}")
    if margins:
        parts.append(f"h {', '.join(margins)}")
    parts.append(f"lr {row['lr']:.2g}  {row['rows_per_s']:.3g} rows/s")
    parts.append(f"{row['tokens_per_s']:.0f} tokens/s  {row['memory_gib']:.2f} GiB")
    return "  ".join(parts)


class RunFolder:
    """runs/<name>/: run.json (settings, versions, hardware), log.jsonl, checkpoints/, model/,
    done.json when finished.

    --fresh renames an earlier run to .<name>.old beside it. There it stays until `drop_earlier`,
    which the new run calls when it has a first result. Until then another --fresh removes the new
    run, and not the earlier one.
    """

    def __init__(
        self, path: Path, world: World, program: str = "train", stages: tuple[str, ...] = ()
    ) -> None:
        """stages: folders inside that are runs of this one's own."""
        self.path = path
        self.world = world
        self.program = program
        self.whole = path.resolve()  # the path may be a link to another disk
        self.earlier = self.whole.with_name(f".{self.whole.name}.old")
        self.record = self.whole / "run.json"
        self.runs = [self.whole, *(self.whole / name for name in stages)]
        self.free: frozenset[str] = frozenset()
        self.started = datetime.now().astimezone()  # what templates write as today's date
        self.log = self.whole / "log.jsonl"
        self.lock: IO[str] | None = None

    def _refuse(self, why: str, remedy: str = "pass another --out") -> NoReturn:
        raise ValueError(f"{self.path} {why}; {remedy}")

    def _read(self, path: Path, *keys: str) -> Json:
        remedy = f"pass --fresh to start over, or delete the folder {self.path}"
        return read_object(path, *keys, remedy=remedy)

    def _nearest(self) -> Path:
        """The folder, or the nearest one above it that exists."""
        return next(path for path in (self.whole, *self.whole.parents) if path.exists())

    # Before anything is written

    def check(
        self, settings: Json, free: frozenset[str], fresh: bool, reads: Sequence[str] = ()
    ) -> Json | None:
        """What a finished run of these settings left in done.json; None when there is still
        something to do.

        ValueError when the folder holds files that are no run, another program's run, something
        that this one `reads`, the cache, without `fresh` a run with other settings, which it names,
        and with it the working directory or another run. Settings in `free` may differ: they do not
        change what comes out. Writes nothing. Afterwards `started` is when the run in the folder
        began, or now.
        """
        self.free = free

        def look() -> Json | None:
            self._refuse_used(reads, cache_root(settings.get("cache")).resolve())
            if not self.record.exists():
                self._refuse_foreign()
                return None
            self._refuse_other(settings, {}, fresh)
            done = self.whole / "done.json"
            if fresh or not done.exists():
                return None
            result = self._read(done, "model")
            is_whole = (self.whole / result["model"] / "config.json").is_file()
            return result if is_whole else None  # else: export again

        def began() -> datetime:
            for record in (self.record, self.earlier / "run.json"):
                if record.exists() and not fresh:
                    return datetime.fromisoformat(self._read(record, "started")["started"])
            return self.started

        result = self.world.from_main(look)
        self.started = self.world.from_main(began)
        return result

    def _refuse_used(self, reads: Sequence[str], cache: Path) -> None:
        """ValueError when the folder, or the earlier run's, holds the cache or an input."""
        for place in (self.whole, self.earlier):
            if cache.is_relative_to(place):
                self._refuse(f"must not hold the cache {cache}", "pass another --cache")
            for name in reads:
                path = local_path(name)
                if path and path.resolve().is_relative_to(place):
                    self._refuse(f"must not hold what the run reads, got {name}")

    def _refuse_foreign(self) -> None:
        """ValueError when no run is there, and none can be."""
        for path in self.whole.glob("*"):
            if not path.name.startswith((".lock", ".run.json.")):  # of a run killed at once
                self._refuse(f"is no run folder: it has no run.json, but {path.name}")
        if not self._nearest().is_dir() or not os.access(self._nearest(), os.W_OK):
            self._refuse("must be a folder that can be written")

    def _refuse_other(self, settings: Json, inputs: Mapping[str, str], fresh: bool) -> None:
        """ValueError when another program's run is there, one with other settings or inputs, or,
        with `fresh`, one that must not go.
        """
        read = undamaged if fresh else self._read
        record = read(self.record, "settings", "inputs")
        program = record.get("program", self.program)
        if program != self.program:
            self._refuse(f"holds a run of {program}, not of {self.program}")
        if fresh:
            return self._refuse_loss()
        differences = []
        for key, value in sorted(json.loads(json.dumps(settings)).items()):
            before = record["settings"].get(key)
            if key not in self.free and before != value:
                differences.append(f"{key} was {before!r}, now {value!r}")
        for name, fingerprint in inputs.items():
            if record["inputs"].get(name) != fingerprint:
                causes = "files, tokenizer, chat format or version of this program"
                differences.append(f"{name} is of other {causes}")
        if differences:
            why = f"holds a run with other settings ({', '.join(differences)})"
            self._refuse(why, "pass another --out, or --fresh to start over")

    def _refuse_loss(self) -> None:
        """ValueError when --fresh would remove another run, or the working directory."""
        if Path.cwd().is_relative_to(self.whole):
            self._refuse("cannot be made anew from inside it", "run the command elsewhere")
        for record in self.whole.rglob("run.json"):
            if record.parent not in self.runs:
                self._refuse(
                    f"must not hold other runs, which --fresh would remove, got {record.parent}",
                    "move it away",
                )

    def must_hold(self, needed: int, first: int = 0) -> None:
        """ValueError when the disk has no room for so many bytes. What an earlier part of the run
        wrote there counts as room.

        So does a run that --fresh replaces, but not for the `first` bytes, as it goes only after
        those are written.
        """

        def look() -> None:
            free = shutil.disk_usage(self._nearest()).free
            own = 0
            for place in (self.whole, self.earlier):
                own += sum(path.stat().st_size for path in place.rglob("*.safetensors"))
            if needed > free + own or first > free:
                why = f"needs {needed / 1e9:.3g} GB of disk, but {free / 1e9:.3g} GB are free"
                self._refuse(why, "free space, or pass another --out or a smaller --keep")

        self.world.from_main(look)

    # The run

    def create(
        self, settings: Json, inputs: Mapping[str, str], fresh: bool, facts: Json | None = None
    ) -> None:
        """Make the folder and its run.json, or go on with the run there; `fresh` sets that one
        aside first.

        facts: what else run.json says of the run; nothing is compared with it.

        ValueError when weights or data (`inputs`: name -> fingerprint) are not those that the run
        began with, or when a rank does not see the folder: every rank writes its part of a
        checkpoint there.
        """

        def make() -> str:
            self._make_room(fresh)
            self.whole.mkdir(parents=True, exist_ok=True)
            token = self._lock()
            if self.record.exists():
                self._refuse_other(settings, inputs, False)
                return token
            content = {"program": self.program, "settings": settings, "inputs": inputs}
            content |= {**(facts or {}), **surroundings()}
            content["started"] = self.started.isoformat(timespec="seconds")
            write_json(self.record, content)
            return token

        def content_of_lock() -> str:
            with contextlib.suppress(OSError):
                return (self.whole / ".lock").read_text(encoding="utf-8")
            return ""

        token = self.world.from_main(make)
        deadline = time.monotonic() + SHARED_DISK_S
        while content_of_lock() != token and time.monotonic() < deadline:
            time.sleep(0.5)
        remedy = "put it on a disk that all nodes share"
        self.world.same(f"the run folder {self.whole}", content_of_lock(), remedy)
        if fresh and self.world.from_main(self.earlier.exists):
            self.world.say(
                f"--fresh: the earlier run is kept as {self.earlier} until this one has its first "
                f"result; to go back to it, delete {self.path} and run that one's command"
            )

    def _make_room(self, fresh: bool) -> None:
        """Set the earlier run aside for --fresh, or give it its name back when the one after it has
        gone.
        """
        if fresh and self.record.exists():
            self._lock()
            if self.earlier.exists():  # the run here has no result yet
                remove(self.whole)
            else:
                self.whole.rename(self.earlier)
        elif self.earlier.exists() and not fresh and not self.record.exists():
            discard(self.whole)
            self.earlier.rename(self.whole)

    def _lock(self) -> str:
        """Keep other runs out of the folder for as long as this process lives; returns what the
        lock's file then holds.

        ValueError when one is in it.
        """
        if self.lock:  # of the run that --fresh set aside
            self.lock.close()
        try:
            self.lock = lock(self.whole / ".lock", wait=False)
        except BlockingIOError:
            self._refuse("is in use by another run", "wait for it, or pass another --out")
        token = os.urandom(16).hex()
        self.lock.write(token)
        self.lock.flush()
        return token

    def drop_earlier(self) -> None:
        """Delete the run that --fresh set aside: this one has a checkpoint, a report or a model of
        its own.
        """

        def drop() -> None:
            if self.earlier.exists():
                remove(self.earlier)

        self.world.from_main(drop)

    # Its log and its end

    def start_log(self, step: int, steps: int, print_every: int) -> None:
        """Drop log.jsonl's rows from `step` on: a resumed run of `steps` steps makes them again."""
        self.steps = steps
        self.print_every = print_every
        self.printed = (step, time.monotonic())  # the step last printed, and when
        rows = [row for row in log_rows(self.log) if row["step"] < step]
        self.world.from_main(lambda: write_lines(self.log, rows))

    def write_row(self, row: Json) -> None:
        """A row to log.jsonl, on rank 0."""
        if self.world.is_main:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(as_lines([row]))

    def log_step(self, row: Json) -> None:
        """Write the row of a step; print every few of them, and the last, with the time left."""
        self.write_row(row)
        done = row["step"] + 1
        if done % self.print_every and done != self.steps:
            return
        last, then = self.printed
        now = time.monotonic()
        self.printed = (done, now)
        left = duration((now - then) / (done - last) * (self.steps - done))
        self.world.say(f"step {done}/{self.steps}  {step_line(row)}  left in this stage {left}")

    def finish(self, result: Json) -> None:
        """Mark the run as finished."""
        self.world.from_main(lambda: write_json(self.whole / "done.json", result))
        self.drop_earlier()
