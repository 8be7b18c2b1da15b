"""Seconds and memory to fill a model from a checkpoint: on one process, on four sharded by FSDP2,
and by transformers.

    python benchmarks/load.py                                  # Mistral-7B's shape: 14.5 GB of disk and of memory
    python benchmarks/load.py --layers 2 --hidden 256 --inner 512 --heads 4 --vocabulary 1000
    --rounds 1

The checkpoint is random, bfloat16, in files under 5 GB, written piece by piece. Both sides keep
bfloat16. transformers maps the files and copies nothing on a CPU, so each side then reads every
weight once, and that is in its seconds too. Memory is a process's most anonymous memory (RssAnon)
over what it held before loading, its imports done; of several processes the one with the most.
Rounds are interleaved; the file's pages are in the system's cache or not as they happen to be,
which `--cold` (as root) settles by dropping it before each load.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import anonymous_mib, parameters_of, record

from model import SHARD_BYTES, Config, Mistral, load_weights

SIDES = {"ours, 1 process": 1, "ours, 4 processes": 4, "transformers": 1}
PIECE = 2**24  # values


def write_checkpoint(folder: Path, config: Config) -> None:
    """A random bfloat16 checkpoint; never more than one piece of it is in memory."""
    folder.mkdir()
    entries = {
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    } | dataclasses.asdict(config)
    (folder / "config.json").write_text(json.dumps(entries), encoding="utf-8")
    piece = (
        (0.02 * torch.randn(PIECE, generator=torch.Generator().manual_seed(0)))
        .bfloat16()
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in config.shapes().items():
        if 2 * sum(map(math.prod, [*files[-1].values(), shape])) > SHARD_BYTES:
            files.append({})
        files[-1][name] = shape
    weight_map = {}
    for number, shapes in enumerate(files, 1):
        file, end, header = f"model-{number:05}-of-{len(files):05}.safetensors", 0, {}
        for name, shape in shapes.items():
            header[name] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [end, end := end + 2 * math.prod(shape)],
            }
        text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for left in range(end, 0, -len(piece)):
                out.write(piece[:left])
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8"
    )


def say(**figures: float) -> None:
    os.write(1, (json.dumps(figures) + "\n").encode())  # at once: several processes share the line


def work(side: str, folder: Path) -> None:
    """One side, in its own process: says when it is ready, and then what it took."""
    torch.set_num_threads(1)
    if side == "transformers":
        from transformers import AutoModelForCausalLM
    elif side == "ours, 4 processes":
        import train
        from support import distributed

        world = distributed.start("cpu")
    say(pid=os.getpid(), idle_mib=anonymous_mib(os.getpid()))
    start = time.perf_counter()
    model: Any
    if side == "transformers":
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, low_cpu_mem_usage=True
        )
    elif side == "ours, 1 process":
        model = Mistral.from_pretrained(folder, dtype=torch.bfloat16)
    else:
        with torch.device("meta"):
            model = Mistral(Config.read(folder)).bfloat16()
        train.shard(model, world, torch.bfloat16)
        model.to_empty(device="cpu")
        load_weights(model, folder)
    loaded = time.perf_counter() - start
    for p in model.parameters():
        local = p.to_local() if side == "ours, 4 processes" else p
        local.detach().view(torch.int16).flatten()[:: 2048 // 2].max()  # a value of every page
    say(load_s=loaded, read_s=time.perf_counter() - start)
    if side == "ours, 4 processes":
        torch.distributed.barrier()
        os._exit(0)


def measure(side: str, folder: Path, cold: bool) -> dict[str, float]:
    """{"load_s", "read_s", "memory_mib"} of one load, the slowest and the largest of its processes."""
    if cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("1", encoding="utf-8")
    launch = [sys.executable]
    if SIDES[side] > 1:
        launch += ["-m", "torch.distributed.run", "--nproc_per_node", str(SIDES[side])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.Popen(
        [*launch, __file__, "--worker", side, "--folder", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    idle: dict[int, float] = {}
    most, figures = [0.0], []

    def sample() -> None:
        while run.poll() is None:
            most.extend(anonymous_mib(pid) - before for pid, before in list(idle.items()))
            most[:] = [max(most)]
            time.sleep(0.005)

    threading.Thread(target=sample, daemon=True).start()
    assert run.stdout and run.stderr
    for line in run.stdout:
        said = json.loads(line)
        if "pid" in said:
            idle[said["pid"]] = said["idle_mib"]
        else:
            figures.append(said)
    if run.wait():
        raise SystemExit(run.stderr.read()[-3000:])
    return {key: max(each[key] for each in figures) for key in ("load_s", "read_s")} | {
        "memory_mib": most[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (
        ("hidden", 4096),
        ("inner", 14336),
        ("layers", 32),
        ("heads", 32),
        ("vocabulary", 32000),
        ("rounds", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--folder", help="where the checkpoint is written; a temporary folder by default"
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="drop the system's cache of files before each load (root)",
    )
    parser.add_argument("--write", action="store_true", help="write the figures to results.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, Path(options.folder))
        return
    config = Config(
        options.vocabulary,
        options.hidden,
        options.inner,
        options.layers,
        options.heads,
        max(1, options.heads // 4),
        options.hidden // options.heads,
    )
    values = parameters_of(config)
    rows: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        write_checkpoint(Path(temporary) / "model", config)
        for _ in range(options.rounds):
            for side in SIDES:
                rows[side].append(measure(side, Path(temporary) / "model", options.cold))
    largest = 2 * max(map(math.prod, config.shapes().values())) / 2**20
    print(
        f"{values / 1e9:.2f} B parameters, {2 * values / 2**20:,.0f} MiB in bfloat16, largest tensor {largest:,.0f} MiB; "
        f"{os.cpu_count()} cores, {'cold' if options.cold else 'warm or cold'} file cache"
    )
    for side, each in rows.items():
        spans = [
            f"{min(r[key] for r in each):7.1f} to {max(r[key] for r in each):7.1f}"
            for key in ("load_s", "read_s", "memory_mib")
        ]
        print(
            f"{side:18} load {spans[0]} s, with every weight read {spans[1]} s, memory {spans[2]} MiB"
        )
    if options.write:
        record("load", {"parameters": values, "cold": options.cold, "rounds": rows})


if __name__ == "__main__":
    main()
