"""The kernels that torch generates for a GPU, on a machine without one: FlexAttention's, and those
of generation's steps. Needs triton, which torch's CUDA builds bring.

    TRITON_INTERPRET=1 PYTHONPATH=. python tests/gpu_kernels.py     run by Triton's interpreter, beside the CPU's form of attention
    PYTHONPATH=. python tests/gpu_kernels.py                        compiled to an H100's machine code, with a 7B's heads in bfloat16;
                                                                    generation's as well

Prints one JSON object. torch takes CPU tensors for a GPU's here, by private names: seen to work
with torch 2.11.0 and 2.13.0.
"""

import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._inductor.async_compile as async_compile
import torch._inductor.config
import torch.nn.attention.flex_attention as flex_attention
import triton
from torch._inductor.kernel import flex as lowerings
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.select_algorithm import TritonTemplate
from triton.backends.compiler import GPUTarget

from model import Config, Mistral, Pack
from support import kernels

H100 = DeviceProperties(
    "cuda",
    0,
    multi_processor_count=132,
    cc=90,
    major=9,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
)


def replaced(source: str, old: str, new: str) -> str:
    if old not in source:
        raise SystemExit(
            f"torch {torch.__version__} has no {old!r} where this script takes the GPU's path"
        )
    return source.replace(old, new)


def take_the_gpu_path() -> None:
    """FlexAttention's checks and its lowering treat the CPU's tensors as they do a GPU's, with an
    H100's choice of tiles.
    """
    for function in (flex_attention._validate_device, flex_attention._apply_kernel_options):
        source = replaced(
            inspect.getsource(function), '.device.type == "cpu"', '.device.type == "none"'
        )
        exec(compile(source, flex_attention.__file__, "exec"), vars(flex_attention))
    name = f"{lowerings.__name__}.flex_attention"
    spec: Any = importlib.util.find_spec(name)
    source = replaced(Path(spec.origin).read_text(), 'query.get_device().type == "cpu"', "False")
    source = replaced(source, "dtype, query.get_device().type", 'dtype, "cuda"')
    for template in [
        template
        for template in TritonTemplate.all_templates
        if template.startswith("flex_attention")
    ]:
        del TritonTemplate.all_templates[template]  # registered again
    sys.modules[name] = lowering = importlib.util.module_from_spec(spec)
    exec(compile(source, spec.origin, "exec"), vars(lowering))
    torch._inductor.config.cpu_backend, torch._inductor.config.compile_threads = "triton", 1
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    driver = {
        "get_current_target": lambda: GPUTarget("cuda", 90, 32),
        "get_current_device": lambda: 0,
        "get_current_stream": lambda _: 0,
    }
    triton.runtime.driver.set_active(SimpleNamespace(**driver))


def compile_only(found: list[dict[str, Any]]) -> None:
    """Every kernel is compiled for an H100 and listed in `found`, and does nothing when it is
    called.
    """
    DeviceProperties.create = classmethod(lambda cls, device: H100)
    triton_helpers.set_driver_to_cpu = triton_helpers.set_driver_to_gpu = lambda: None
    compiled, compile_kernel = [], triton.compile

    def keep(*args: Any, **kwargs: Any) -> Any:
        compiled.append(compile_kernel(*args, **kwargs))
        return compiled[-1]

    def describe(_self: Any, name: str, source: str, device_str: str = "") -> Any:
        kernel = async_compile._load_triton_kernel_from_source(name, source)
        for config in kernel.configs:
            kernel._precompile_config(config)
            found.append(
                {
                    "kernel": name,
                    "shared_bytes": compiled[-1].metadata.shared,
                    "code_bytes": len(compiled[-1].asm["cubin"]),
                }
            )
        return SimpleNamespace(run=lambda *args, **kwargs: None)

    triton.compile, async_compile.AsyncCompile.triton = keep, describe


def values_and_gradients(model: Mistral, pack: Pack) -> dict[str, torch.Tensor]:
    model.zero_grad()
    values = model.logprobs(pack)
    (values * torch.linspace(1, 2, len(values))).sum().backward()
    return {"values": values.detach()} | {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def run(
    lengths: list[list[tuple[int, int, int]]], config: Config, on_gpu: Callable[[str], Any]
) -> dict[str, Any]:
    """The largest relative error of a value or gradient over packs of trees with these lengths, and
    which it was.
    """
    model, generator, errors = Mistral(config), torch.Generator().manual_seed(0), [(0.0, "")]
    model.init_weights(0)
    for p in model.parameters():  # 0.02 leaves attention almost flat: sharpen it
        p.data.mul_(10 if p.dim() == 2 else 1)
    for trees in lengths:
        pack = Pack.build(
            [
                [torch.randint(0, 61, (n,), generator=generator).tolist() for n in sizes]
                for sizes in trees
            ]
        )
        expected = values_and_gradients(model, pack)
        kernels.flex_on = lambda kind: on_gpu("cuda")
        found = values_and_gradients(model, pack)
        kernels.flex_on = on_gpu
        errors += [
            (((found[name] - x).norm() / x.norm()).item(), name) for name, x in expected.items()
        ]
    return dict(zip(("error", "tensor"), max(errors), strict=True))


def main() -> dict[str, Any]:
    take_the_gpu_path()
    on_gpu = kernels.flex_on
    if os.environ.get("TRITON_INTERPRET") == "1":
        small = {
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "head_dim": 16,
        }
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        packs = [
            [(70, 20, 30)],
            [(3, 50, 40), (40, 1, 30)],
        ]  # whole blocks of 128 tokens: one and two
        return {
            str(window): run(packs, Config(**small, **heads, sliding_window=window), on_gpu)
            for window in (None, 9)
        }
    found: list[dict[str, Any]] = []
    compile_only(found)
    model = Mistral(Config(61, 32, 48, 2, 32, 8, 128)).bfloat16()
    kernels.flex_on = lambda kind: on_gpu("cuda")
    for sizes in ((300, 100, 90), (900, 500, 500)):
        values_and_gradients(model, Pack.build([[[1] * n for n in sizes]]))
    of_packs, compiled_on = len(found), kernels.compiled_on
    kernels.compiled_on = lambda kind, function: compiled_on("cuda", function)
    model.generate([[1, 2], [3], [4, 5, 6]], 3)
    return {"kernels": found[:of_packs], "generation": found[of_packs:]}


if __name__ == "__main__":
    print(json.dumps(main()))
