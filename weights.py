"""Weights in safetensors files, a tensor or a part of one in memory at a time. What is sharded by
FSDP2 is read shard by shard, and gathered tensor by tensor where it is written.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import (
    compute_local_shape_and_global_offset,
)  # private; the same on torch 2.11 to 2.13

from chat import read_object

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
