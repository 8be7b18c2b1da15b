"""What any training run needs and no reader of the paper does: processes, sharding, checkpoints, run folders, log.

One code path serves one process on a CPU and many nodes under torchrun: there is always a process group (of one, if
torchrun did not start us), and the model is always sharded over it by FSDP2.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

Result = TypeVar("Result")
MANIFEST = "manifest.json"
USER_ERRORS = (ValueError, OSError, SafetensorError)  # bad input, a full disk; the last is how save_file says the second
CANNOT_WRITE = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
SPEAK_GRACE_S = 30.0  # how long a failing rank waits for rank 0 to report the same error

# --- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """This process among its peers, and the mesh over which parameters are sharded."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print on rank 0, at once."""
        if self.is_main:
            print(text, flush=True)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place, of a tensor on this world's device or on the CPU."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_main(self, make: Callable[[], Result]) -> Result:
        """make() as rank 0 computes it, on every rank; an error of the user's making is raised on every rank too."""
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = make()
            except USER_ERRORS as error:
                box[1] = OSError(str(error)) if isinstance(error, SafetensorError) else error
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        if box[1] is not None:
            raise box[1]
        return box[0]  # type: ignore[no-any-return]  # rank 0's Result

    def gather(self, value: Result) -> list[Result]:
        """Every rank's value, on every rank, in rank order."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


def start(device: str = "auto", replicate: int = 1) -> World:
    """Join the process group that torchrun describes, or make a group of one; pick the device; lay out the mesh.

    replicate > 1 shards parameters inside size / replicate ranks (a node, usually) and replicates across. ValueError
    when a GPU is asked for and there is none, or replicate does not divide the number of processes.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no GPU here; pass --device cpu")
    if replicate < 1 or size % replicate:
        raise ValueError(f"replicate must divide the number of processes, {size}, got {replicate}")
    where = torch.device("cpu")
    if device == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(where)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())  # type: ignore[attr-defined]
    shape, names = (size,), ("shard",)
    if replicate > 1:
        shape, names = (replicate, size // replicate), ("replicate", "shard")  # type: ignore[assignment]
    return World(rank, size, where, init_device_mesh(device, shape, mesh_dim_names=names))


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """What a program runs in: an error of the user's making becomes one line and exit code 1, from rank 0 if it fails too.

    A rank that fails alone (its disk is full, say) speaks for itself after SPEAK_GRACE_S; torchrun ends the others. Of
    several processes none goes through Python's own shutdown, where gloo's threads may abort a run that is done.
    """
    code: Any = 0
    try:
        yield
    except SystemExit as leaving:
        code = leaving.code
    except KeyboardInterrupt:
        print("\ninterrupted; the same command, without --fresh, goes on from the last checkpoint", file=sys.stderr)
        code = 130
    except USER_ERRORS as error:
        speak(error)
        code = 1
    several = dist.is_initialized() and dist.get_world_size() > 1
    if dist.is_initialized() and not code:
        dist.destroy_process_group()
    if several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def speak(error: Exception) -> None:
    """Say what went wrong, once for all ranks."""
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        error = OSError(f"{error}; free space, or pass another --out or --cache")
    rank = int(os.environ.get("RANK", 0))
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if store is not None:
            store.set("rank 0 spoke", "1")
    elif store is not None:  # before there is a group, every rank fails alike
        deadline = time.monotonic() + SPEAK_GRACE_S
        while time.monotonic() < deadline and not store.check(["rank 0 spoke"]):
            time.sleep(0.1)
        if not store.check(["rank 0 spoke"]):
            print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)


class StopRequest:
    """Within it, SIGTERM and Ctrl-C are noted, so that the loop can finish its step, save and leave; a second Ctrl-C ends at once.

    requested: the signal's number, 0 before there is one.
    """

    def __init__(self) -> None:
        self.requested = 0

    def __enter__(self) -> "StopRequest":
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number


# --- sharding --------------------------------------------------------------------------------------------------------


def shard(model: nn.Module, blocks: Sequence[nn.Module], world: World, dtype: torch.dtype) -> None:
    """FSDP2 in place: each block is a unit, the rest is the root; compute in `dtype`, reduce gradients in fp32.

    Stored dtypes are the parameters' own: frozen ones in `dtype`, trained ones in fp32 (the masters), cast when gathered.
    """
    # cast_forward_inputs off: the model hands its blocks fp32 tables that must stay fp32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    fully_shard(model, mesh=world.mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "logprobs")


# --- files -----------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_all(paths: Sequence[Path], world: World) -> dict[str, str]:
    """{file name: sha256}, the reading shared out over the ranks."""
    mine = {path.name: sha256(path) for path in paths[world.rank :: world.size]}
    return dict(sorted(item for part in world.gather(mine) for item in part.items()))  # in one order on any number of ranks


def write_json(path: Path, value: Any) -> None:
    """Write aside, flush to disk, rename: the file is whole or absent."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The file's object; ValueError that names the file when it is damaged: not JSON, or without one of the keys."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        value = None
    if not isinstance(value, dict) or not all(key in value for key in keys):
        raise ValueError(f"{path} is damaged; pass --fresh to start over, or delete the folder {path.parent}")
    return value


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], world: World, keep: int) -> None:
    """Write `folder`/step-<step> from every rank's shards, whole or not at all, then drop all but the newest `keep`.

    torch.distributed.checkpoint in its safetensors form, plus a manifest with the files' sha256 sums. A kill at any
    moment leaves the earlier checkpoints untouched: the folder gets its name only once everything is on disk.
    """
    target, aside = folder / f"step-{step:08d}", folder / f".step-{step:08d}"

    def begin() -> None:
        for left in folder.glob(".step-*"):  # by a save that was killed or found the disk full
            shutil.rmtree(left)
        aside.mkdir(parents=True)

    def finish() -> None:
        write_json(aside / MANIFEST, {"step": step, "processes": world.size, "sha256": sums})
        shutil.rmtree(target, ignore_errors=True)
        os.rename(aside, target)
        kept = sorted(path for path in folder.glob("step-*") if path <= target)[-keep:]
        for other in set(folder.glob("step-*")) - set(kept):  # later ones are damaged: this run went on from before them
            shutil.rmtree(other)

    world.from_main(begin)
    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(aside), save_distributed=True))
    except CheckpointException as error:  # no Exception: it would pass every handler, and hides its causes
        causes = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
        raise OSError(f"checkpoint {target} could not be written ({causes}); the earlier ones are whole") from error
    sums = sha256_all(world.from_main(lambda: sorted(aside.glob("*.safetensors"))), world)
    world.from_main(finish)


def load_checkpoint(folder: Path, tensors: dict[str, Tensor], world: World) -> int:
    """Fill `tensors` in place from the newest undamaged checkpoint, whatever its number of processes; return its step.

    0 when there is none. A checkpoint whose sums do not match is named, and the one before it is tried.
    """
    for path in reversed(world.from_main(lambda: sorted(folder.glob("step-*")))):
        step = _checked_step(path, world)
        if step is not None:
            load(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
            return step
        world.say(f"checkpoint {path} is damaged; trying the one before it")
    return 0


def _checked_step(path: Path, world: World) -> int | None:
    """The step of an undamaged checkpoint, else None."""

    def manifest() -> dict[str, Any] | None:
        with contextlib.suppress(ValueError, OSError):
            value = read_json(path / MANIFEST, "step", "sha256")
            return value if all((path / name).is_file() for name in value["sha256"]) else None
        return None

    found = world.from_main(manifest)
    if found is None or sha256_all([path / name for name in found["sha256"]], world) != found["sha256"]:
        return None
    return int(found["step"])


# --- the run folder --------------------------------------------------------------------------------------------------


@dataclass
class RunFolder:
    """runs/<name>/: run.json (settings, versions, hardware), log.jsonl, checkpoints/, model/, done.json when finished."""

    path: Path
    world: World
    log: IO[str] | None = field(default=None, repr=False)
    lock: IO[str] | None = field(default=None, repr=False)

    def check(self, settings: Mapping[str, Any], free: frozenset[str], fresh: bool) -> dict[str, Any] | None:
        """What a finished run of these settings left in done.json; None when there is still something to do.

        ValueError when the folder holds files that are no run, or, without `fresh`, a run with other settings, which it
        names. Settings in `free` may differ: they do not change what comes out. Writes nothing.
        """

        def look() -> dict[str, Any] | None:
            record = self.path / "run.json"
            if not record.exists():
                foreign = [path.name for path in sorted(self.path.glob("[!.]*"))]  # dot files are a killed run's asides
                if foreign or (self.path.exists() and not self.path.is_dir()):
                    raise ValueError(f"{self.path} is no run folder (no run.json beside {foreign[:3]}); pass another --out")
                return None
            if fresh:
                return None
            earlier, plain = read_json(record, "settings", "inputs")["settings"], json.loads(json.dumps(settings))
            changed = sorted(key for key in plain if key not in free and earlier.get(key) != plain[key])
            if changed:
                differences = ", ".join(f"{key} was {earlier.get(key)!r}, now {plain[key]!r}" for key in changed)
                raise ValueError(
                    f"{self.path} holds a run with other settings ({differences}); pass another --out, or --fresh to start over"
                )
            done = self.path / "done.json"
            result = read_json(done, "model") if done.exists() else None
            return result if result and (self.path / result["model"] / "config.json").is_file() else None  # else: export again

        return self.world.from_main(look)

    def create(self, settings: Mapping[str, Any], inputs: Mapping[str, str], fresh: bool) -> None:
        """Make the folder and its run.json, or go on with the run there; `fresh` removes it first.

        ValueError when weights or data (`inputs`: name -> fingerprint) are not those that the run began with.
        """

        def make() -> None:
            record = self.path / "run.json"
            if fresh and record.exists():
                self._lock()
                old = self.path.with_name(f".{self.path.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                os.replace(self.path, old)  # at once: a kill leaves a whole run, or none
                shutil.rmtree(old)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            if record.exists():
                earlier = read_json(record, "inputs")["inputs"]
                changed = sorted(name for name in inputs if earlier.get(name) != inputs[name])
                if changed:
                    raise ValueError(f"{self.path} began with other {', '.join(changed)}; restore them, or pass --fresh to start over")
                return
            sum_of = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
            write_json(record, {"settings": settings, "settings_sha256": sum_of, "inputs": inputs, **surroundings()})

        self.world.from_main(make)

    def _lock(self) -> None:
        """Keep other runs out of the folder for as long as this process lives. ValueError when one is in it."""
        self.lock = open(self.path / ".lock", "w")  # noqa: SIM115  # the system lets go of it with the process
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path} is in use by another run; wait for it, or pass another --out") from None

    def start_log(self, step: int) -> None:
        """Open log.jsonl to append, dropping rows from `step` on: a resumed run writes them again."""

        def rewrite() -> None:
            path = self.path / "log.jsonl"
            aside = path.with_name(".log.jsonl")
            kept = (json.dumps(row) + "\n" for row in self.rows() if row["step"] < step)
            aside.write_text("".join(kept), encoding="utf-8")
            os.replace(aside, path)
            self.log = open(path, "a", encoding="utf-8")  # noqa: SIM115  # closed by `finish`, or with the process

        self.world.from_main(rewrite)

    def rows(self) -> list[dict[str, Any]]:
        """The log's rows; what a kill cut short or somebody damaged is left out."""
        path = self.path / "log.jsonl"
        rows = []
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
        return rows

    def write_row(self, row: Mapping[str, Any]) -> None:
        if self.log is not None:
            self.log.write(json.dumps(row) + "\n")
            self.log.flush()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Close the log and mark the run as finished."""
        if self.log is not None:
            self.log.close()
            self.log = None
        self.world.from_main(lambda: write_json(self.path / "done.json", result))


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
        | {name: importlib.metadata.version(name) for name in ("torch", "safetensors", "tokenizers", "numpy")},
        "git_commit": commit or None,
        "hardware": {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count(), "gpus": gpus},
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


# --- what the log says -----------------------------------------------------------------------------------------------


def memory_gib(device: torch.device) -> float:
    """GiB that this process holds: peak allocated on a GPU; anonymous resident memory on a CPU (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")  # Linux; mapped weight files do not count, as ru_maxrss would
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20


def duration(seconds: float) -> str:
    """4s, 3m20s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
