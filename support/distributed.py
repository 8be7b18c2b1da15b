"""What any training run needs and no reader of the paper does: processes and signals.

What a run keeps on disk is in storage.py.

One code path serves one process on a CPU and many nodes under torchrun: there is always a process
group (of one, if torchrun did not start us), and FSDP2 shards the model over it.
"""

import contextlib
import ctypes
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

Result = TypeVar("Result")
# Bad input or a full disk; a model or pack too large for the GPU.
USER_ERRORS = (ValueError, OSError, torch.OutOfMemoryError)
CANNOT_WRITE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.ENOTDIR, errno.EEXIST),
)
SPEAK_AFTER_S = 5.0  # how long another rank than 0 waits before it reports an error
RANK_0_SPEAKS = "rank 0 reports this error"
# Of a collective: ranks wait for one that reads or tokenises alone.
GROUP_TIMEOUT = timedelta(hours=1)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_KEPT = 2**25  # bytes of a freed tensor that glibc may keep for the next one
LARGEST_OF_SEVERAL = 2**22  # with several processes, whose gathered weights leave gaps
KERNELS_KEPT = 64  # by each of oneDNN's caches; about 0.3 MiB each

# --- processes ------------------------------------------------------------------------------------


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

    @property
    def dtype(self) -> torch.dtype:
        """What models compute in here, unless something else is asked for."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def say(self, text: str) -> None:
        """Print on rank 0, at once."""
        if self.is_main:
            print(text, flush=True)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place, of a tensor on this world's device or on the CPU."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum over ranks of each tensor, all of one dtype and on the CPU, by one all-reduce."""
        flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def from_main(self, make: Callable[[], Result]) -> Result:
        """make() as rank 0 computes it, on every rank; an error of the user's making is raised on
        every rank too.
        """
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = make()
            except USER_ERRORS as error:
                box[1] = error
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        if box[1] is not None:
            if not self.is_main:
                box[1].add_note(RANK_0_SPEAKS)
            raise box[1]
        return box[0]  # type: ignore[no-any-return]  # rank 0's Result

    def gather(self, value: Result) -> list[Result]:
        """Every rank's value, on every rank, in rank order."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def same(self, what: str, value: Result, remedy: str = "copy it there") -> Result:
        """The value, if every rank has the same: nodes may have disks of their own.

        ValueError names a rank that has another.
        """
        values = self.gather(value)

        def compare() -> None:
            for rank, other in enumerate(values):
                if other != values[0]:
                    raise ValueError(
                        f"{what} must be the same on every node, but rank {rank} reads another "
                        f"than rank 0; {remedy}"
                    )

        self.from_main(compare)
        return value


def keep_freed_memory(largest: int) -> None:
    """Has glibc keep what a step frees for the next one, up to `largest` bytes a tensor, unless the
    environment says otherwise. By default it gives it back, and the kernel zeroes every page again,
    which costs a CPU's step a few percent.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt and not {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, largest)


def bound_kernel_caches() -> None:
    """Has oneDNN keep KERNELS_KEPT compiled products in each of its two caches, unless the
    environment says otherwise. On a CPU it compiles one for every shape of a bfloat16 product, and
    keeps 1,024. Packs are hardly ever of the same length, so that a run grew by 10 MiB a pack. The
    blocks of a pack share their shapes, so that a few are enough.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS_KEPT))


def launched(name: str, alone: int) -> int:
    """RANK, WORLD_SIZE or the like as torchrun set it; `alone` without RANK: then it did not start
    us, and the others are leftovers.
    """
    return int(os.environ.get(name, alone)) if "RANK" in os.environ else alone


def start(device: str = "auto", replicate: int = 1) -> World:
    """Join the process group that torchrun describes, or make a group of one; pick the device; lay
    out the mesh.

    replicate > 1 shards parameters inside size / replicate ranks (a node, usually) and replicates
    across. ValueError when a GPU is asked for and there is none, or replicate does not divide the
    number of processes.
    """
    rank = launched("RANK", 0)
    size = launched("WORLD_SIZE", 1)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU here; pass --device cpu")
    if replicate < 1 or size % replicate:
        raise ValueError(f"replicate must divide the number of processes, {size}, got {replicate}")
    where = torch.device("cpu")
    if device == "cuda":
        where = torch.device("cuda", launched("LOCAL_RANK", 0))
        processes = max(launched("LOCAL_WORLD_SIZE", 1), where.index + 1)
        if processes > torch.cuda.device_count():
            raise ValueError(
                f"each process needs a GPU of its own, got {torch.cuda.device_count()} for the "
                f"{processes} of this node; pass torchrun a smaller --nproc_per_node, or "
                "--device cpu"
            )
        torch.cuda.set_device(where)
    else:
        keep_freed_memory(LARGEST_KEPT if size == 1 else LARGEST_OF_SEVERAL)
        bound_kernel_caches()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=GROUP_TIMEOUT)
        else:
            dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())  # type: ignore[attr-defined]
    if replicate > 1:
        shape = (replicate, size // replicate)
        mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    return World(rank, size, where, mesh)


def one_line(error: BaseException) -> str:
    """What went wrong, and what helps against a lack of memory or disk."""
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        return f"{error}; free space, or write elsewhere (--out; --cache of train.py)"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"{error}; use more GPUs, or in training smaller --pack_tokens or --checkpoint_blocks"
        )
    return str(error)


def say_why(error: BaseException) -> Any:
    """Print what ended the program, if this rank is to say it; returns the exit code.

    Rank 0 speaks at once. Another rank waits for SPEAK_AFTER_S and then gives its number: if rank 0
    has failed too, torchrun ends this one before. So does a rank whose collective broke, as another
    rank left it.
    """
    rank = launched("RANK", 0)
    if isinstance(error, SystemExit):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends a second one
        if rank == 0:
            remedy = "the same command, without --fresh, goes on from what was saved"
            print(f"\nstopped; {remedy}", file=sys.stderr)
        return 128 + signal.SIGINT
    is_users = isinstance(error, USER_ERRORS)
    if rank or not is_users:
        time.sleep(SPEAK_AFTER_S)
    if not is_users:
        traceback.print_exception(error)
    elif RANK_0_SPEAKS not in getattr(error, "__notes__", ()):
        who = f"error on rank {rank}" if rank else "error"
        print(f"{who}: {one_line(error)}", file=sys.stderr, flush=True)
    return 1


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What a program runs in: bad input becomes one line and exit code 1, and Ctrl-C one line and
    exit code 130.

    Several processes leave by os._exit: in Python's own shutdown gloo's threads may abort a run
    that is done.
    """
    several = launched("WORLD_SIZE", 1) > 1
    code = 0
    try:
        yield
    except BaseException as error:
        if not several and not isinstance(error, (SystemExit, KeyboardInterrupt, *USER_ERRORS)):
            raise
        code = say_why(error)

    if dist.is_initialized() and not code:
        dist.destroy_process_group()
    if several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


class StopRequest:
    """Within it, SIGTERM and Ctrl-C are noted, so that the loop can finish its step, save and
    leave; a second Ctrl-C ends at once.

    requested: the signal's number, 0 before there is one.
    """

    def __init__(self) -> None:
        self.requested = 0

    def __enter__(self) -> "StopRequest":
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if (
            self.requested and kind is RuntimeError
        ):  # a collective broke, as another rank was stopped or died
            signal.raise_signal(self.requested)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number


# --- small things ---------------------------------------------------------------------------------


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard, or all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def duration(seconds: float) -> str:
    """4s, 3m20s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
