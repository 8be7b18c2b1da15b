"""What test_train.py and test_support_distributed.py share: inputs, command lines, and runs in
processes of their own.

As a program it makes runs cheap, which else would spend their time on imports:

    torchrun ... tests/runs.py many '[["bfpo", "--out", ...], ...]'        several runs in one group of processes
    python tests/runs.py killed '{"arguments": [...], "moments": [...]}'   a run killed and started again, each a fork of this process
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
ONE_THREAD = {
    "OMP_NUM_THREADS": "1"
}  # tensors this small gain nothing from a second one; bits may depend on the number
Moment = tuple[
    str, float
]  # ("start", s): seconds after the start; ("step", n), ("save", n): in the n-th from there; ("export", 0)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """What make(folder) made, once for all the processes that tests run in."""
    root = (
        factory.getbasetemp().parent
        if "PYTEST_XDIST_WORKER" in os.environ
        else factory.getbasetemp()
    )
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / f"{name}.made").exists():
            make(root / name)
            (root / f"{name}.made").touch()
    return root / name


def run_here(command: Sequence[str]) -> dict[str, object]:
    """train.run in this process, on one thread, as in the processes that runs are compared with."""
    import train
    from support import distributed

    torch.set_num_threads(1)
    config = train.parse(command)
    return train.run(config, distributed.start("cpu"))


def toy_inputs(folder: Path) -> None:
    """The toy language's data and, in `folder`/start, a Mistral of 27,000 random weights."""
    from model import Config, Mistral
    from support.chat import Chat
    from toy import files as toy_files

    toy_files.build(folder, 0)
    for test in folder.glob("*/test.jsonl"):  # enough to be held out
        test.write_text(
            "".join(test.read_text(encoding="utf-8").splitlines(keepends=True)[:40]),
            encoding="utf-8",
        )
    model = Mistral(
        Config(
            vocab_size=Chat(folder / "tokenizer").vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    )
    model.init_weights(0)
    model.save_pretrained(folder / "start", like=folder / "tokenizer")


def bfpo(toy: Path, out: Path, *more: str) -> list[str]:
    """A BFPO run on 400 + 400 toy pairs; a step holds 4 + 4."""
    return [
        "bfpo",
        "--model",
        str(toy / "start"),
        "--safety",
        f"{toy}/pku[:400]",
        "--helpfulness",
        f"{toy}/ultrafeedback[:400]",
        "--tau",
        "0.25",
        "--batch",
        "4",
        *usual(toy, out),
        *more,
    ]


def sft(toy: Path, out: Path, *more: str) -> list[str]:
    """SFT of every weight on 400 toy conversations; a step holds 8."""
    return [
        "sft",
        "--model",
        str(toy / "start"),
        "--sft",
        f"{toy}/ultrachat[:400]",
        "--selective",
        "all",
        "--batch",
        "8",
        *usual(toy, out),
        *more,
    ]


def usual(toy: Path, out: Path) -> list[str]:
    return [
        "--out",
        str(out),
        "--cache",
        str(toy / "cache"),
        "--max_length",
        "128",
        "--max_prompt",
        "64",
        "--lr",
        "1e-3",
        "--device",
        "cpu",
    ]


# --- looking at a run -----------------------------------------------------------------------------


def log_of(out: Path) -> list[dict[str, object]]:
    return [
        json.loads(line)
        for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        if line[-1] == "\n"
    ]


def losses(out: Path) -> list[float]:
    return [float(str(row["loss"])) for row in log_of(out) if "loss" in row]


def drift(out: Path, other: Path) -> float:
    """The largest relative difference of two runs' losses at a step."""
    return max(abs(a - b) / b for a, b in zip(losses(out), losses(other), strict=True))


def model_bytes(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def weight_distance(out: Path, other: Path) -> float:
    """The largest relative norm of the difference of two exported models' tensors."""
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (out, other))
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in ours)


# --- processes ------------------------------------------------------------------------------------


def usual_signals() -> None:
    """In a child of the tests: SIGTERM and Ctrl-C do what they do by default, though the tests may run where they are ignored."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def launch(
    arguments: Sequence[str], processes: int = 0, program: str = "train.py", *flags: str
) -> subprocess.CompletedProcess[str]:
    """A program as a user starts it: by python, or under torchrun on a free port."""
    command = [sys.executable, str(ROOT / program), *arguments]
    if processes:
        command[1:1] = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
            *flags,
        ]
    environment = os.environ | ONE_THREAD
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
        preexec_fn=usual_signals,
    )


def launch_nodes(
    arguments: Sequence[str], folders: Sequence[Path], processes: int, program: str
) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of one torchrun a node, started in its folder, all on this
    machine, which find each other as nodes do.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        str(len(folders)),
        "--nproc_per_node",
        str(processes),
        "--rdzv_backend",
        "c10d",
        "--rdzv_id",
        "test",
        "--rdzv_endpoint",
        f"localhost:{port}",
        "--local_addr",
        "localhost",
    ]
    started = [
        subprocess.Popen(
            [*torchrun, str(ROOT / program), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | ONE_THREAD,
            cwd=folder,
            preexec_fn=usual_signals,
        )
        for folder in folders
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


def send(number: signal.Signals, pid: int) -> None:
    """A signal to a process and all that descend from it."""
    for process in family(pid):
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


def saving(checkpoints: Path, since: float) -> set[str]:
    """The checkpoints being written, by a process started at `since`: what a killed one left lies
    there until the next save.
    """
    found = set()
    for path in checkpoints.glob(".step-*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ctime > since:
                found.add(path.name)
    return found


def kill_at(moment: Moment, out: Path, pid: int, alive: Callable[[], bool]) -> str:
    """SIGKILL a run and all its processes at a moment; says what it was doing:

    "save", or "" when that cannot be seen.
    """
    kind, number = moment
    since, began, checkpoints, log = (
        time.time(),
        time.monotonic(),
        out / "checkpoints",
        out / "log.jsonl",
    )
    first_row = len(log_of(out)) if log.exists() else 0
    seen: set[str] = set()
    while alive():
        if kind == "start" and time.monotonic() > began + number:
            break
        if kind == "step" and log.exists() and len(log_of(out)) - first_row >= number:
            break
        if kind == "export" and (out / ".model.partial").exists():
            break
        if kind == "save":
            seen |= saving(checkpoints, since)
            if len(seen) >= number:
                time.sleep(random.random() * 0.02)  # a save of this size takes about as long
                send(signal.SIGSTOP, pid)
                time.sleep(0.002)  # whatever call it is in ends, and no other begins
                if saving(checkpoints, since):
                    break
                send(signal.SIGCONT, pid)  # too late, on a busy machine: in the next one
        time.sleep(0.0005)
    send(signal.SIGKILL, pid)
    return "save" if saving(checkpoints, since) else ""


def killed(arguments: list[str], moments: list[Moment], copy_at: int = 0) -> list[str]:
    """What kill_at saw at each moment of a run that was started again after each, and at last left
    to finish.

    copy_at: after that many kills the run folder is copied to <out>.copy.
    """
    import train  # before the forks: each then starts at once. Nothing is computed here, so no thread is lost

    out = Path(train.parse(arguments).out)

    def start() -> int:
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            try:
                train.main(arguments)
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
        return pid

    hits = []
    for number, moment in enumerate(moments):
        pid = start()
        hits.append(
            kill_at(
                moment,
                out,
                pid,
                lambda pid=pid: (
                    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
                ),
            )
        )
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, (
            f"the run was over before kill {number}, {moment}"
        )
        if number + 1 == copy_at:
            shutil.copytree(out, f"{out}.copy")
    assert os.waitpid(start(), 0)[1] == 0
    return hits


def many(commands: list[list[str]]) -> None:
    import train
    from support import distributed

    with distributed.errors_in_one_line():
        for arguments in commands:
            config = train.parse(arguments)
            train.run(config, distributed.start(config.device, config.replicate))


if __name__ == "__main__":
    torch.set_num_threads(1)
    what = json.loads(sys.argv[2])
    if sys.argv[1] == "many":
        many(what)
    else:
        print(json.dumps(killed(**what)))
