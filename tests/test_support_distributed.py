"""support/distributed.py and support/storage.py: what kills, signals, damage, full disks and dead
ranks leave behind; checkpoints, run folders.
"""

import errno
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import ROOT, bfpo, drift, launch, log_of, sft

import train
from support import distributed, memory_plan, storage
from support.distributed import World

STEPS = ("--steps", "200")


@pytest.fixture(scope="module")
def world() -> World:
    torch.set_num_threads(1)  # as in the processes that are compared
    return distributed.start("cpu")


# --- SIGKILL --------------------------------------------------------------------------------------


KILLS = 10


def kill_often(toys: Path, out: Path) -> None:
    """A run killed ten times at random and once in its export; after eight kills <out>.copy is
    made. doing.json: what it was doing then.
    """
    rng = random.Random()
    moments = [("start", rng.uniform(0.1, 1.5)) for _ in range(4)] + [
        ("step", float(rng.randint(1, 4)))
    ]
    moments += [("save", float(rng.randint(1, 4))) for _ in range(KILLS - len(moments))]
    rng.shuffle(moments)
    command = bfpo(toys, out, *STEPS, "--save_every", "1")
    what = {"arguments": command, "moments": [*moments, ("export", 0.0)], "copy_at": KILLS - 2}
    done = launch(["killed", json.dumps(what)], program="tests/runs.py")
    assert done.returncode == 0, (moments, done.stderr[-2000:])
    out.with_suffix(".json").write_text(done.stdout.splitlines()[-1], encoding="utf-8")


@pytest.fixture(scope="session")
def killed(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.once(tmp_path_factory, "killed", lambda out: kill_often(toys, out))


def test_run_killed_at_random_moments_ends_with_the_same_bytes(killed: Path, whole: Path) -> None:
    """Claim: SIGKILL at ten random moments, saves included, each followed by the same command: the bytes of
    the run never killed.
    """
    doing = json.loads(killed.with_suffix(".json").read_text(encoding="utf-8"))
    assert doing.count("save") >= 5  # of those that wait for one
    assert runs.model_bytes(killed) == runs.model_bytes(whole)
    assert runs.losses(killed) == runs.losses(whole) and [
        row["step"] for row in log_of(killed)
    ] == list(range(200))
    assert not list(killed.rglob(".*partial*")) and not list((killed / "checkpoints").glob(".*"))


# --- one, two and four processes ------------------------------------------------------------------

# The bound on a step's loss between ways to compute it is 1e-5 of the loss: fp32 sums in another
# order, which 200 steps of training carry on. Measured: 4e-6 for BFPO at a learning rate of 1e-3,
# 1e-7 for SFT of every weight.


@pytest.fixture(scope="session")
def on_two(killed: Path, whole: Path, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes' runs: bfpo in small packs with activations computed again, sft, copy of the
    run killed eight times, and damaged, from a run whose last two checkpoints are. said.txt: what
    they printed.
    """

    def make(folder: Path) -> None:
        shutil.copytree(f"{killed}.copy", folder / "copy")
        damaged = folder / "damaged"
        shutil.copytree(whole, damaged)
        (damaged / "done.json").unlink()
        files = [
            next(path.glob("*.safetensors"))
            for path in sorted((damaged / "checkpoints").glob("step-*"))
        ]
        flipped = bytearray(files[-1].read_bytes())
        flipped[-100] ^= 1
        files[-1].write_bytes(flipped)
        files[-2].write_bytes(files[-2].read_bytes()[:-100])
        commands = [
            bfpo(toys, folder / "bfpo", *STEPS, "--pack_tokens", "120", "--checkpoint_blocks"),
            sft(toys, folder / "sft", "--steps", "30"),
            bfpo(toys, folder / "copy", *STEPS),
            bfpo(toys, damaged, *STEPS),
        ]
        done = launch(["many", json.dumps(commands)], 2, "tests/runs.py")
        assert done.returncode == 0, done.stderr[-2000:]
        (folder / "said.txt").write_text(done.stdout, encoding="utf-8")

    return runs.once(tmp_path_factory, "on_two", make)


def test_two_processes_small_packs_and_recomputing_take_the_same_steps(
    on_two: Path, whole: Path
) -> None:
    """Claim: two processes, two or three pairs a pack, activations computed again: the losses of
    one process with one pack a step.
    """
    said = (on_two / "said.txt").read_text(encoding="utf-8")
    assert said.count("step-0 gate") == 1  # rank 0 alone speaks
    assert drift(on_two / "bfpo", whole) <= 1e-5
    norms = [[row["grad_norm"] for row in log_of(path)] for path in (whole, on_two / "bfpo")]
    assert norms[1] == pytest.approx(
        norms[0], rel=1e-3
    )  # Adam would hide a gradient scaled by the ranks


def test_sft_of_every_weight_takes_the_same_steps(on_two: Path, toys: Path) -> None:
    """Claim: SFT of every weight on two processes has the losses of one. Oracle: 30 steps on one."""
    runs.run_here(sft(toys, toys / "sft1", "--steps", "30"))
    assert drift(on_two / "sft", toys / "sft1") <= 1e-5


def test_killed_run_goes_on_on_other_processes(on_two: Path, whole: Path) -> None:
    """Claim: killed eight times on one process and finished on two, the weights are the whole run's
    to 1e-5 of their norm.
    """
    assert json.loads((on_two / "copy" / "run.json").read_text(encoding="utf-8"))["processes"] == 1
    assert runs.weight_distance(on_two / "copy", whole) <= 1e-5  # fp32 sums in another order


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(
    on_two: Path, whole: Path
) -> None:
    """Claim: a flipped bit and a cut file are noticed, each with a line; the run goes on from the
    checkpoint before them.
    """
    said = (on_two / "said.txt").read_text(encoding="utf-8")
    for name in ("step-00000200", "step-00000190"):
        assert f"{name} is damaged; trying the one before it" in said
    assert "resuming after step 180 of 200" in said
    assert runs.weight_distance(on_two / "damaged", whole) <= 1e-5
    assert sorted(path.name for path in (on_two / "damaged" / "checkpoints").iterdir()) == [
        "step-00000180",
        "step-00000200",
    ]


@pytest.mark.slow  # half a minute: six processes import torch
def test_two_nodes_take_the_same_steps(whole: Path, toys: Path, tmp_path: Path) -> None:
    """Claim: four processes on two nodes, sharded inside a node and replicated across, have the
    losses and weights of one.

    The nodes are two torchruns on this machine that meet by torchrun's own rendezvous.
    """
    nodes = runs.launch_nodes(
        bfpo(toys, tmp_path / "run", *STEPS, "--replicate", "2"),
        [tmp_path] * 2,
        processes=2,
        program="train.py",
    )
    assert [code for code, *_ in nodes] == [0, 0], nodes
    assert sum("step-0 gate" in out for _, out, _ in nodes) == 1
    assert drift(tmp_path / "run", whole) <= 1e-5
    assert runs.weight_distance(tmp_path / "run", whole) <= 1e-5


@pytest.mark.slow  # half a minute: eight processes
def test_nodes_with_other_files_are_refused(toys: Path, tmp_path: Path) -> None:
    """Claim: nodes that find another model, or other rows, under the same name are told so before
    any work, and one of them alone speaks. Oracle: one relative path, two folders.
    """
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        shutil.copytree(toys / "start", folder / "start")
        shutil.copytree(toys / "pku", folder / "pku")
    first, other = (folder / "start" / "model.safetensors" for folder in folders)
    command = bfpo(toys, tmp_path / "run", *STEPS, "--cache", str(tmp_path / "cache"))
    command[command.index("--model") + 1], command[command.index("--safety") + 1] = (
        "start",
        "pku[:40]",
    )
    rows = next((folders[1] / "pku").rglob("train*.jsonl"))
    kept = rows.read_bytes()
    rows.write_bytes(kept + kept.splitlines(keepends=True)[0])
    for what in ("the rows of safety", "the model start"):
        nodes = runs.launch_nodes(command, folders, processes=1, program="train.py")
        said = "".join(err for *_, err in nodes)
        assert (
            all(code for code, *_ in nodes)
            and said.count(f"{what} must be the same on every node") == said.count("error:") == 1
        ), said
        rows.write_bytes(kept)
        flipped = bytearray(first.read_bytes())
        flipped[-1] ^= 1
        other.write_bytes(flipped)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # half a minute of waiting
def test_nodes_without_a_shared_disk_are_refused(toys: Path, tmp_path: Path) -> None:
    """Claim: nodes that do not see each other's run folder are told so before any work. Oracle: one
    relative path, two folders, an earlier run in that of the second.
    """
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    (tmp_path / "b" / "run").mkdir()
    (tmp_path / "b" / "run" / "run.json").write_text("{}")
    nodes = runs.launch_nodes(
        bfpo(toys, Path("run"), *STEPS), folders, processes=1, program="train.py"
    )
    said = "".join(err for *_, err in nodes)
    assert (
        all(code for code, *_ in nodes) and said.count("put it on a disk that all nodes share") == 1
    ), said


@pytest.mark.slow  # ten minutes on two cores
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize(
    "more",
    [(), ("--pack_tokens", "1"), ("--checkpoint_blocks",)],
    ids=["plain", "a pair a pack", "recomputed"],
)
def test_every_way_takes_the_same_steps(
    processes: int, more: tuple[str, ...], whole: Path, toys: Path, tmp_path: Path
) -> None:
    """Claim: BFPO and SFT, on 1, 2 and 4 processes, with any packs, have the losses of the plain run on one
    process.
    """
    runs.run_here(sft(toys, tmp_path / "sft1", *STEPS))
    commands = [
        bfpo(toys, tmp_path / "bfpo", *STEPS, *more),
        sft(toys, tmp_path / "sft", *STEPS, *more),
    ]
    done = launch(["many", json.dumps(commands)], processes, "tests/runs.py")
    assert done.returncode == 0, done.stderr[-2000:]
    found = drift(tmp_path / "bfpo", whole), drift(tmp_path / "sft", tmp_path / "sft1")
    print(
        f"{processes} processes {' '.join(more)}: largest relative difference of a loss {found[0]:.1e} BFPO, {found[1]:.1e} SFT"
    )
    assert max(found) <= 1e-5


@pytest.mark.slow  # six minutes on two cores
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_killed_under_torchrun(processes: int, toys: Path) -> None:
    """Claim: torchrun and its workers killed at ten random moments, saves included: the bytes of
    the same number never killed.
    """
    outs = [toys / f"{name}{processes}" for name in ("torchrun_whole", "torchrun_killed")]
    steps = (
        "--steps",
        str(800 // processes),
        "--save_every",
        "1",
    )  # more than ten starts leave time for
    commands = [bfpo(toys, out, *steps) for out in outs]
    assert launch(commands[0], processes).returncode == 0
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng, doing = random.Random(seed), []
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        str(ROOT / "train.py"),
    ]
    for k in range(10):
        moment = ("save", float(rng.randint(1, 5))) if k % 2 else ("start", rng.uniform(3, 10))
        process = subprocess.Popen(
            [*torchrun, *commands[1]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | runs.ONE_THREAD,
        )
        doing.append(
            runs.kill_at(
                moment, outs[1], process.pid, lambda process=process: process.poll() is None
            )
        )
        assert process.wait() == -signal.SIGKILL, f"the run was over before kill {k}, {moment}"
    assert launch(commands[1], processes).returncode == 0
    assert doing.count("save") >= 2
    assert runs.losses(outs[1]) == runs.losses(outs[0])
    assert runs.model_bytes(outs[1]) == runs.model_bytes(outs[0])


# --- SIGTERM and Ctrl-C ---------------------------------------------------------------------------


def started(command: list[str], *before: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *before, str(ROOT / "train.py"), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | runs.ONE_THREAD,
        preexec_fn=runs.usual_signals,
    )


def wait_until(true, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_stopped_run_saves_says_so_and_goes_on(
    number: signal.Signals, toys: Path, whole: Path, world: World
) -> None:
    """Claim: SIGTERM and Ctrl-C finish the step, save, say how to go on and exit; the same command ends with
    the whole run's bytes.
    """
    out = toys / f"stopped_{number.name}"
    process = started(bfpo(toys, out, *STEPS))
    wait_until(lambda: (out / "log.jsonl").exists() and len(log_of(out)) >= 3, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "resumes from here" in output
    assert (
        len(log_of(out)) == int(next((out / "checkpoints").glob("step-*")).name[-8:])
        and not (out / "done.json").exists()
    )
    train.run(train.parse(bfpo(toys, out, *STEPS)), world)
    assert runs.model_bytes(out) == runs.model_bytes(whole)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, -signal.SIGTERM, ""), (signal.SIGINT, 130, "\nstopped; the same")],
)
def test_stop_outside_the_loop_is_at_once(
    number: signal.Signals, code: int, said: str, toys: Path, tmp_path: Path
) -> None:
    """Claim: before the first step SIGTERM ends a run without a word, and Ctrl-C with a line that
    says how to go on. Oracle: exit codes.
    """
    command = [
        *bfpo(toys, tmp_path / "run"),
        "--safety",
        f"{toys}/pku",
        "--cache",
        str(tmp_path / "cache"),
        "--pack_tokens",
        "1",
    ]
    process = started(command)
    wait_until(
        (tmp_path / "run" / "run.json").exists, process
    )  # the reference pass of 4,000 pairs comes next
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code and not (tmp_path / "run" / "log.jsonl").exists()
    assert said in error and "Traceback" not in error


def test_run_of_every_weight_goes_on_to_the_same_bytes(toys: Path, tmp_path: Path) -> None:
    """Claim: BFPO of every weight, the embedding's and the head's too, stopped and started again
    without its reference cache, ends with the bytes of the whole run. Oracle: that run. The second
    pass for the reference comes before the checkpoint's weights are read.
    """
    out, cache = tmp_path / "run", tmp_path / "cache"
    command = [
        *bfpo(toys, out, "--steps", "12", "--save_every", "5", "--selective", "all"),
        "--cache",
        str(cache),
    ]
    runs.run_here(command)
    expected = runs.model_bytes(out)
    for left in (out / "checkpoints" / "step-00000012", out / "model", cache / "reference"):
        shutil.rmtree(left)
    (out / "done.json").unlink()
    runs.run_here(command)
    assert len(log_of(out)) == 12 and runs.model_bytes(out) == expected


# --- ranks that die, disks that are full ----------------------------------------------------------


def test_rank_that_dies_ends_the_others(toys: Path, tmp_path: Path) -> None:
    """Claim: SIGKILL to one of two ranks ends torchrun within a minute, with that rank and signal on the
    screen.
    """
    out = tmp_path / "run"
    process = started(
        bfpo(toys, out, "--steps", "5000"),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *shutdown_timeout(),
    )
    wait_until(lambda: (out / "log.jsonl").exists() and len(log_of(out)) >= 3, process)
    workers = {rank_of(pid): pid for pid in runs.family(process.pid) if rank_of(pid)}
    began = time.monotonic()
    os.kill(workers["1"], signal.SIGKILL)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 1 and time.monotonic() - began < 60
    assert "Signal 9 (SIGKILL)" in error and "rank      : 1" in error
    assert not [pid for pid in workers.values() if Path(f"/proc/{pid}").exists()]


def rank_of(pid: int) -> str:
    """RANK in a process's environment; empty where there is none, as in torchrun itself."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(
        (entry.partition(b"=")[2].decode() for entry in entries if entry.startswith(b"RANK=")), ""
    )


def shutdown_timeout() -> list[str]:
    """The README's flag, where torchrun knows it (torch 2.11's does not)."""
    known = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return ["--shutdown-timeout", "600"] if "--shutdown-timeout" in known else []


@pytest.mark.parametrize(
    "failing",
    [
        (1,),
        pytest.param((0,), marks=pytest.mark.slow),  # ten seconds each
        pytest.param((0, 1), marks=pytest.mark.slow),
    ],
)
def test_one_rank_reports_an_error(failing: tuple[int, ...], tmp_path: Path) -> None:
    """Claim: an error of one rank or of both is one line.

    A rank that waited for the other has no traceback. Oracle: a collective.
    """
    script = tmp_path / "alone.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from support import distributed, memory_plan
with distributed.errors_in_one_line():
    world = distributed.start("cpu")
    if world.rank in {failing}:
        raise OSError("the disk is full")
    world.sum(torch.ones(3))
""")
    done = launch([], 2, str(script))
    named = "error: " if 0 in failing else "error on rank 1: "
    assert done.returncode == 1 and f"{named}the disk is full" in done.stderr, done.stderr[-2000:]
    assert done.stderr.count("the disk is full") == 1 and "RuntimeError" not in done.stderr, (
        done.stderr[-2000:]
    )


def test_collective_that_breaks_during_a_stop_is_no_error() -> None:
    """Claim: a rank that was told to stop, and whose collective then fails, ends as the signal has
    it. Oracle: the exit code.
    """
    script = """
import os, signal
from support import distributed
with distributed.errors_in_one_line(), distributed.StopRequest():
    os.kill(os.getpid(), signal.SIGTERM)
    raise RuntimeError("connection reset by peer")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGTERM and not done.stderr


def test_full_disk_leaves_the_earlier_checkpoints_whole(
    toys: Path, whole: Path, world: World
) -> None:
    """Claim: a checkpoint that cannot be written ends the run with one line; the earlier one is
    whole, and the run goes on from it.

    Oracle: a limit on the size of files, set while the run is under way, below a checkpoint's and
    above all else that it writes.
    """
    out = toys / "full"
    process = started(bfpo(toys, out, *STEPS, "--save_every", "20"))
    wait_until((out / "checkpoints" / "step-00000020").exists, process)
    size = max(path.stat().st_size for path in (out / "checkpoints" / "step-00000020").iterdir())
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size - 1000, size - 1000))
    _, error = process.communicate(timeout=100)
    assert process.returncode == 1 and error.count("error: ") == 1 and "Traceback" not in error, (
        error
    )
    assert "could not be written" in error and "the earlier ones are whole" in error
    train.run(train.parse(bfpo(toys, out, *STEPS)), world)
    assert runs.model_bytes(out) == runs.model_bytes(whole)


def test_more_processes_than_gpus_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: of two processes of a node with one GPU each gets an error that names the remedy,
    before it joins any group. Oracle: torch, asked to say that there is one.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in ("0", "1"):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, rank)
        with pytest.raises(ValueError, match=r"got 1 for the 2 of this node; .*--nproc_per_node"):
            distributed.start("cuda")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_lack_of_memory_or_disk_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: what a GPU or a disk too small raises ends a program with code 1 and one line that
    says what to do.
    """
    monkeypatch.setattr(
        distributed.dist, "is_initialized", lambda: False
    )  # the group belongs to this module's tests
    with pytest.raises(SystemExit) as leaving, distributed.errors_in_one_line():
        raise error
    said = capsys.readouterr().err
    assert leaving.value.code == 1 and said.startswith("error: ") and said.count("\n") == 1
    assert ("--pack_tokens" if isinstance(error, torch.OutOfMemoryError) else "free space") in said


# --- checkpoints and run folders ------------------------------------------------------------------


def test_checkpoints_after_a_damaged_one(world: World, tmp_path: Path) -> None:
    """Claim: going on from before a damaged checkpoint, a save keeps what it wrote and drops the
    damaged one; asides go too.
    """
    tensors = {"weight": torch.arange(6.0)}
    for step in (50, 100):
        storage.save_checkpoint(tmp_path, step, tensors, world, keep=2)
    (tmp_path / "step-00000100" / "manifest.json").write_text("{", encoding="utf-8")
    (tmp_path / ".step-00000070").mkdir()
    assert storage.load_checkpoint(tmp_path, tensors, world) == 50
    storage.save_checkpoint(tmp_path, 60, tensors, world, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000050", "step-00000060"]
    tensors["weight"].zero_()
    assert storage.load_checkpoint(tmp_path, tensors, world) == 60 and tensors[
        "weight"
    ].tolist() == [0, 1, 2, 3, 4, 5]


def test_only_step_and_digits_are_checkpoints(world: World, tmp_path: Path) -> None:
    """Claim: folders and files beside the checkpoints, of whatever name, are not loaded, counted or
    removed. Oracle: the folders.
    """
    values = {"weight": torch.arange(4.0)}
    storage.save_checkpoint(tmp_path, 4, values, world, keep=2)
    others = ["step-00000004.bak", "step-99999999x", "step-old", "step-notes", ".step-mine"]
    for name in others:
        shutil.copytree(tmp_path / "step-00000004", tmp_path / name)
    (tmp_path / "step-00000009").touch()
    (tmp_path / "step-+5").mkdir()
    for step in (5, 6, 7):
        storage.save_checkpoint(
            tmp_path, step, {"weight": torch.full((4,), float(step))}, world, keep=2
        )
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == sorted([*others, "step-+5", "step-00000006", "step-00000007", "step-00000009"])
    assert (
        storage.load_checkpoint(tmp_path, values, world) == 7
        and values["weight"].tolist() == [7] * 4
    )
    assert storage.read_checkpoint(tmp_path / "step-old", values, world) == 4, (
        "a copy is whole, and was left alone"
    )


def test_checkpoint_of_several_files_comes_back(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: a checkpoint larger than CHECKPOINT_FILE_BYTES is several files, each of which the
    writer must hold in memory, and comes back whole; a damaged one of them is noticed. Oracle: the
    tensors.
    """
    monkeypatch.setattr(storage, "CHECKPOINT_FILE_BYTES", 64)
    saved = {f"weight.{i}": torch.arange(4.0 * i, 4.0 * i + 12) for i in range(5)}  # 48 bytes each
    storage.save_checkpoint(tmp_path, 1, saved, world, keep=2)
    files = sorted((tmp_path / "step-00000001").glob("*.safetensors"))
    assert len(files) == 4, files
    read = {name: torch.zeros(12) for name in saved}
    assert storage.load_checkpoint(tmp_path, read, world) == 1
    assert all(torch.equal(read[name], saved[name]) for name in saved)
    files[2].write_bytes(files[2].read_bytes()[:-1] + b"\1")
    assert storage.load_checkpoint(tmp_path, read, world) == 0


def test_a_whole_checkpoint_of_something_else_is_named(world: World, tmp_path: Path) -> None:
    """Claim: a checkpoint that is whole but lacks a tensor, or has it in another shape, is an error
    in words; one whose sums are of no file is damaged. Oracle: the messages, a checkpoint of other
    tensors.
    """
    storage.save_checkpoint(tmp_path, 1, {"weight": torch.zeros(4)}, world, keep=2)
    for other in ({"weight": torch.zeros(8)}, {"weight": torch.zeros(4), "bias": torch.zeros(1)}):
        with pytest.raises(OSError, match=r"step-00000001 is whole, but could not be read"):
            storage.load_checkpoint(tmp_path, other, world)
    manifest = tmp_path / "step-00000001" / storage.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"sha256": {}}))
    assert storage.load_checkpoint(tmp_path, {"weight": torch.zeros(4)}, world) == 0


def test_an_interrupt_while_a_checkpoint_is_read_is_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: Ctrl-C, or a disk that fails, while a good checkpoint is read ends the run with no
    advice to delete it. Oracle: what is raised out of torch's reader.
    """
    storage.save_checkpoint(tmp_path, 1, {"weight": torch.ones(4)}, world, keep=2)
    failure: BaseException = KeyboardInterrupt()

    def fail(*_: Any) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(storage.hf_storage.HuggingFaceStorageReader, "read_data", fail)
        with pytest.raises(KeyboardInterrupt):
            storage.load_checkpoint(tmp_path, {"weight": torch.zeros(4)}, world)
        failure = OSError(errno.EIO, "Input/output error")
        with pytest.raises(
            OSError,
            match=r"step-00000001 is whole, but could not be read \(rank 0: .*Input/output error\); run",
        ):
            storage.load_checkpoint(tmp_path, {"weight": torch.zeros(4)}, world)
    assert storage.load_checkpoint(tmp_path, {"weight": torch.zeros(4)}, world) == 1


def test_a_launchers_leftovers_are_not_a_group(
    toys: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: WORLD_SIZE and the like without RANK, which some machines export, are one process,
    which reads all of its files and may have all memory. Oracle: the world of none.
    """
    alone = storage.weights_sha256(toys / "start", world)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "64"}.items():
        monkeypatch.setenv(name, value)
    assert (distributed.start("cpu").size, distributed.start("cpu").rank) == (
        1,
        0,
    ) and storage.surroundings()["processes"] == 1
    assert storage.weights_sha256(toys / "start", world) == alone
    memory = Path("/proc/meminfo").read_text(encoding="utf-8").split()
    assert (
        memory_plan.free_bytes(world.device)
        > int(memory[memory.index("MemTotal:") + 1]) * 1024 / 64
    )


def test_run_folder_survives_a_kill_while_it_is_made(world: World, tmp_path: Path) -> None:
    """Claim: what a kill leaves of run.json, or of an earlier run under --fresh, does not lock the
    folder.
    """
    folder = storage.RunFolder(tmp_path / "run", world)
    folder.path.mkdir()
    (folder.path / ".run.json.123").write_text("{", encoding="utf-8")
    assert folder.check({"tau": 1}, frozenset(), fresh=False) is None
    folder.create({"tau": 1}, {}, fresh=False)
    (folder.path / "done.json").write_text('{"model": "model"}', encoding="utf-8")
    assert (
        folder.check({"tau": 1}, frozenset(), fresh=False) is None
    )  # its model is gone: not finished
    (folder.path / "model").mkdir()
    (folder.path / "model" / "config.json").write_text("{}", encoding="utf-8")
    assert folder.check({"tau": 1}, frozenset(), fresh=False) == {"model": "model"}
    for damage in ("{", "[]", "{}"):
        (folder.path / "run.json").write_text(damage, encoding="utf-8")
        with pytest.raises(ValueError, match=r"run\.json must"):
            folder.check({"tau": 1}, frozenset(), fresh=False)
    (folder.path / "log.jsonl").write_bytes(b'{"step": 0}\n[1]\n{}\n\xff\xfe\n{"step": 1}\n{"st')
    assert [row["step"] for row in storage.log_rows(folder.log)] == [0, 1]
    folder.create({"tau": 2}, {}, fresh=True)
    folder.drop_earlier()
    assert folder.check({"tau": 2}, frozenset(), fresh=False) is None and not list(
        tmp_path.glob(".*")
    )
    with pytest.raises(ValueError, match="in use by another run"):
        storage.RunFolder(folder.path, world).create({"tau": 2}, {}, fresh=False)
    with pytest.raises(ValueError, match="weights"):
        folder.create({"tau": 2}, {"weights": "other"}, fresh=False)


def test_run_folder_is_not_what_the_run_reads_or_another_programs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: with --fresh too, a folder that holds what the run reads, or the run of another
    program, is refused and left alone.
    """
    folder = storage.RunFolder(tmp_path / "run", world)
    (folder.path / "model").mkdir(parents=True)
    (folder.path / "rows.jsonl").touch()
    (tmp_path / "link").symlink_to(folder.path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for reads in (
        str(folder.path / "model"),
        f"{folder.path / '..' / 'run' / 'rows.jsonl'}[:20%]",
        str(tmp_path / "link" / "model"),
        "~/run/rows.jsonl:train",
    ):
        with pytest.raises(
            ValueError, match=r"must not hold what the run reads, got .*(model|rows)"
        ):
            folder.check({"tau": 1}, frozenset(), fresh=True, reads=("", str(tmp_path), reads))
    shutil.rmtree(folder.path)
    folder.create({"tau": 1, "lr": 1}, {}, fresh=False)
    for program in ("eval", "redteam"):
        with pytest.raises(ValueError, match=f"holds a run of train, not of {program}"):
            storage.RunFolder(folder.path, world, program).check(
                {"tau": 1, "lr": 1}, frozenset(), fresh=True
            )
    inside = {"tau": 1, "lr": 1, "cache": str(folder.path / "cache")}
    for fresh in (True, False):
        with pytest.raises(ValueError, match=r"must not hold the cache .*run/cache"):
            folder.check(inside, frozenset({"cache"}), fresh)
    storage.RunFolder(folder.path / "sub" / "tau1", world).create({"tau": 2}, {}, fresh=False)
    with pytest.raises(
        ValueError,
        match=r"must not hold other runs, which --fresh would remove, got .*sub/tau1; move it away",
    ):
        folder.check({"tau": 1, "lr": 1}, frozenset(), fresh=True)
    assert folder.check({"tau": 1, "lr": 1}, frozenset(), fresh=False) is None
    shutil.rmtree(folder.path / "sub")
    toy = storage.RunFolder(tmp_path / "toy", world, stages=("sft", "bfpo"))
    for name in ("", "sft", "bfpo"):
        storage.RunFolder(toy.path / name, world).create({"recipe": name or "toy"}, {}, fresh=False)
    assert toy.check({"recipe": "toy"}, frozenset(), fresh=True) is None
    storage.RunFolder(toy.path / "eval", world, "eval").create({}, {}, fresh=False)
    with pytest.raises(
        ValueError, match=r"must not hold other runs, which --fresh would remove, got .*toy/eval"
    ):
        toy.check({"recipe": "toy"}, frozenset(), fresh=True)
    with pytest.raises(
        ValueError, match="is no run folder"
    ):  # of others' runs nothing would be removed
        storage.RunFolder(tmp_path, world).check({"cache": "/elsewhere"}, frozenset(), fresh=True)
    monkeypatch.chdir(
        folder.path
    )  # where a hub's name is no path, and the folder cannot be renamed
    here = storage.RunFolder(Path(), world)
    assert (
        here.check(
            {"tau": 1, "lr": 1},
            frozenset(),
            fresh=False,
            reads=["org/model", "org/data[:20%]", "zephyr"],
        )
        is None
    )
    with pytest.raises(ValueError, match="cannot be made anew from inside it"):
        here.check({"tau": 1, "lr": 1}, frozenset(), fresh=True)
    assert (folder.path / "run.json").is_file()


def test_run_that_began_in_between_is_not_gone_on_with(world: World, tmp_path: Path) -> None:
    """Claim: of two commands that found no run in a folder, the one that comes second is refused
    for its settings, as ever.
    """
    first, second = (storage.RunFolder(tmp_path / "run", world) for _ in range(2))
    for tau, folder in enumerate((first, second)):
        assert folder.check({"tau": tau, "out": tau}, frozenset({"out"}), fresh=False) is None
    first.create({"tau": 0, "out": 0}, {}, fresh=False)
    assert first.lock is not None
    first.lock.close()  # as when its process ends
    with pytest.raises(ValueError, match="tau was 0, now 1"):
        second.create({"tau": 1, "out": 1}, {}, fresh=False)


def test_fresh_replaces_what_a_link_points_to(world: World, tmp_path: Path) -> None:
    """Claim: under --fresh a run folder that is a link to another disk stays one, time after time.

    Oracle: the folders.
    """
    (tmp_path / "disk" / "whole").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "whole")
    for tau in range(3):
        folder = storage.RunFolder(tmp_path / "link", world)
        folder.create({"tau": tau}, {}, fresh=True)
        (folder.path / f"{tau}.txt").touch()
        folder.drop_earlier()
        assert folder.lock is not None
        folder.lock.close()
        assert sorted(path.name for path in (tmp_path / "disk" / "whole").glob("[!.]*")) == [
            f"{tau}.txt",
            "run.json",
        ]
        assert (
            (tmp_path / "link").is_symlink()
            and len(list(tmp_path.iterdir())) == 2
            and len(list((tmp_path / "disk").iterdir())) == 1
        )


def test_fresh_keeps_the_earlier_run_until_there_is_a_result(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: --fresh sets the earlier run aside, says where, and loses it only after a result; it
    comes back when the new run goes.

    Oracle: a file of each run.
    """

    def begin(tau: int, fresh: bool) -> storage.RunFolder:
        folder = storage.RunFolder(tmp_path / "run", world)
        folder.create({"tau": tau}, {}, fresh)
        (folder.path / f"{tau}.txt").touch()
        assert folder.lock is not None
        folder.lock.close()  # as when its process ends
        return folder

    old = tmp_path / ".run.old"
    begin(0, fresh=False)
    for tau in (1, 2):  # runs without a result; the earlier one is not theirs to remove
        begin(tau, fresh=True)
        assert f"the earlier run is kept as {old}" in capsys.readouterr().out
        assert (old / "0.txt").exists() and sorted(
            path.name for path in tmp_path.glob("run/[!.]*")
        ) == [f"{tau}.txt", "run.json"]
    with pytest.raises(ValueError, match="tau was 2, now 0"):
        storage.RunFolder(tmp_path / "run", world).check({"tau": 0}, frozenset(), fresh=False)
    with pytest.raises(
        ValueError, match=r"must not hold what the run reads, got .*\.run\.old/0\.txt"
    ):
        storage.RunFolder(tmp_path / "run", world).check(
            {"tau": 2}, frozenset(), fresh=True, reads=[str(old / "0.txt")]
        )
    shutil.rmtree(tmp_path / "run")
    back = begin(0, fresh=False)
    assert (back.path / "0.txt").exists() and not old.exists()
    begin(3, fresh=True).drop_earlier()
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == ["run"]
        and not (tmp_path / "run" / "0.txt").exists()
    )


def test_damaged_checkpoint_is_set_aside_whatever_a_kill_left(world: World, tmp_path: Path) -> None:
    """Claim: what is left of a clean-up that was killed does not keep the checkpoint before a
    damaged one from being tried.
    """
    values = {"weight": torch.arange(4.0)}
    for step in (1, 2):
        storage.save_checkpoint(tmp_path, step, values, world, keep=2)
    (tmp_path / ".step-00000002").mkdir()
    (tmp_path / ".step-00000002" / "left").touch()
    (tmp_path / "step-00000002" / storage.MANIFEST).write_text("{")
    assert storage.load_checkpoint(tmp_path, {"weight": torch.zeros(4)}, world) == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
@pytest.mark.parametrize("says", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
@pytest.mark.slow  # six seconds each
def test_memory_that_a_step_frees_is_kept(says: dict[str, str]) -> None:
    """Claim: a CPU run gets what it freed without the kernel's help, unless the environment asks
    for glibc's own way. Oracle: the page faults of writing 24 MiB again, 6,144 pages that were
    given back or none.
    """
    script = """
import resource, torch
from support import distributed
distributed.start("cpu")
def write():
    tensors = [torch.zeros(2**18) for _ in range(24)]
for _ in range(4):  # until the heap has settled
    write()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
write()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=clean | says,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(done.stdout) > 3000) == bool(says)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 products of oneDNN here"
)
@pytest.mark.parametrize("says", [{}, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}])
@pytest.mark.slow  # seven seconds each
def test_products_of_new_shapes_take_no_more_memory(says: dict[str, str]) -> None:
    """Claim: a CPU run does not grow with the lengths of its packs in bfloat16, unless the
    environment asks for oneDNN's own capacity. Oracle: the process's anonymous memory before and
    after 120 products of new shapes, of 0.3 MiB each in that cache.
    """
    script = """
import torch
from support import distributed
from train import memory_gib
world = distributed.start("cpu")
weights = [torch.ones(size, 192, dtype=torch.bfloat16) for size in (192, 256, 320)]
for length in range(200, 280):
    if length == 240:
        before = memory_gib(world.device)
    for weight in weights:
        torch.ones(length, 192, dtype=torch.bfloat16) @ weight.mT
print(1024 * (memory_gib(world.device) - before))
"""
    clean = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=clean | says,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (float(done.stdout) > 15) == bool(says), done.stdout
