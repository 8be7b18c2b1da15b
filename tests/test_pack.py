"""model.Pack: the documented example, who sees whom, and log-probabilities against the padded
two-sequence computation.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CXX
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from model import Config, Mistral, Pack, visible

TESTS = Path(__file__).parent
CONFIG = Config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
MODELS: dict[int | None, Mistral] = {}


def model_with(window: int | None) -> Mistral:
    if window not in MODELS:
        model = MODELS[window] = Mistral(dataclasses.replace(CONFIG, sliding_window=window))
        model.init_weights(0)
        for p in model.parameters():  # 0.02 leaves attention almost flat: sharpen it
            p.data.mul_(10 if p.dim() == 2 else 1)
    return MODELS[window]


def padded_logprobs(model: Mistral, trees: list[list[list[int]]]) -> Tensor:
    """Every prompt + response as a padded row of one batch, full logits, log_softmax, sum: chosen
    ones first.
    """
    pairs = [
        (tree[0], tree[b])
        for b in range(1, max(map(len, trees)))
        for tree in trees
        if b < len(tree)
    ]
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    tokens = torch.tensor(
        [
            prompt + response + [0] * (width - len(prompt) - len(response))
            for prompt, response in pairs
        ]
    )
    logp = model(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    scored = torch.zeros_like(logp)
    for row, (prompt, response) in zip(scored, pairs, strict=True):
        row[len(prompt) - 1 : len(prompt) + len(response) - 1] = 1
    return (logp * scored).sum(1)


def test_pack_lays_out_the_documented_example() -> None:
    """Claim: the docstring's two pairs. Oracle: its table, typed in."""
    pack = Pack.build([([5, 6], [7, 8, 9], [7, 4]), ([3], [2], [8, 2])])
    table = {
        "tokens": [5, 6, 7, 8, 9, 7, 4, 3, 2, 8, 2],
        "positions": [0, 1, 2, 3, 4, 2, 3, 0, 1, 1, 2],
        "tree": [0] * 7 + [1] * 4,
        "branch": [0, 0, 1, 1, 1, 2, 2, 0, 1, 2, 2],
        "rows": [1, 2, 3, 1, 5, 7, 7, 9],
        "targets": [7, 8, 9, 7, 4, 2, 8, 2],
        "response": [0, 0, 0, 2, 2, 1, 3, 3],
    }
    assert {name: getattr(pack, name).tolist() for name in table} == table
    assert pack.lengths == ((2, 3, 2), (1, 1, 2))


def test_visible_is_the_documented_three_tokens() -> None:
    """Claim: prompt a, chosen b, rejected c see a / a b / a c.

    Oracle: the docstring's picture; windows by hand.
    """
    pack, index = Pack.build([([1], [2], [3])]), torch.arange(3)
    assert visible(pack, None)(0, 0, index[:, None], index[None]).int().tolist() == [
        [1, 0, 0],
        [1, 1, 0],
        [1, 0, 1],
    ]
    assert visible(pack, 1)(0, 0, index[:, None], index[None]).int().tolist() == [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
    ]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 4), min_size=2, max_size=4), min_size=1, max_size=3),
    st.sampled_from([None, 1, 2, 3]),
)
def test_visible_is_the_definition(lengths: list[list[int]], window: int | None) -> None:
    """Claim: same tree, prompt or own response, not after, within the window.

    Oracle: those words as Python loops; padding apart.
    """
    pack = Pack.build([[[0] * n for n in sizes] for sizes in lengths]).padded(16)
    index = torch.arange(len(pack.tokens))
    seen = visible(pack, window)(0, 0, index[:, None], index[None])
    position, tree, branch = pack.positions.tolist(), pack.tree.tolist(), pack.branch.tolist()
    for i in index.tolist():
        for j in index.tolist():
            expected = (
                tree[i] == tree[j]
                and branch[j] in (0, branch[i])
                and 0 <= position[i] - position[j] < (window or 99)
            )
            assert seen[i, j] == expected
    assert seen.diagonal().all()  # no row of a softmax is empty, padding included


def test_pack_refuses_empty_parts_and_takes_arrays() -> None:
    """Claim: a tree needs a prompt and responses of one token; numpy arrays and lists are the same.

    Oracle: the message; equality.
    """
    for tree in ([[1], []], [[], [1]], [[1, 2]]):
        with pytest.raises(ValueError, match="tree 1 of a pack"):
            Pack.build([[[1], [2]], tree])
    lists, arrays = (
        [[1, 2], [3], [4, 5]],
        [np.array(x, dtype=np.uint16) for x in ([1, 2], [3], [4, 5])],
    )
    assert torch.equal(Pack.build([lists]).tokens, Pack.build([arrays]).tokens)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 90), st.integers(1, 80), st.integers(1, 80)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([None, 4, 50]),
    st.sampled_from([1, 2]),
    st.integers(0, 1000),
)
@example([(1, 1, 1)], None, 2, 0)
@example([(1, 1, 1), (1, 70, 1), (80, 1, 66)], 4, 2, 0)
@example([(1, 1, 1), (64, 64, 64)], 50, 1, 0)
def test_logprobs_equal_the_padded_computation(
    lengths: list[tuple[int, ...]], window: int | None, responses: int, seed: int
) -> None:
    """Claim: values and every parameter's gradient, for pairs (and single responses) of any
    lengths, one token included, with and without a window. Oracle: padded_logprobs; 1e-5 relative
    in fp32.
    """
    rng = np.random.default_rng(seed)
    trees = [[rng.integers(0, 61, n).tolist() for n in sizes[: responses + 1]] for sizes in lengths]
    model, weights = (
        model_with(window),
        torch.from_numpy(rng.normal(size=len(trees) * responses)).float(),
    )
    results = []
    for compute in (
        lambda: model.logprobs(Pack.build(trees)),
        lambda: padded_logprobs(model, trees),
    ):
        model.zero_grad()
        values = compute()
        (values * weights).sum().backward()
        results.append(
            (values.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None])
        )
    (got, got_grads), (expected, expected_grads) = results
    assert got.dtype == torch.float32 and relative_error(got, expected) < 1e-5
    whole = sum(grad.norm() ** 2 for grad in expected_grads) ** 0.5
    for a, b in zip(got_grads, expected_grads, strict=True):
        # a gradient that cancels to almost nothing (k_proj of one-token prompts) is compared on the
        # scale of all
        assert (a - b).norm() < 1e-5 * max(b.norm(), 1e-2 * whole)


@pytest.mark.parametrize(
    "change",
    [{"model_type": "llama"}, {"model_type": "qwen2"}, {"model_type": "qwen3", "head_dim": 14}],
    ids=lambda change: change["model_type"],
)
def test_every_family_packs_as_it_pads(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: biases, head norms and stretched angles are in packs what they are in sequences, in
    values and gradients, and so they are in the values of the form that a GPU takes. Oracle:
    padded_logprobs; 1e-5 relative in fp32.
    """
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 32
    model = Mistral(dataclasses.replace(CONFIG, rope_scaling=scaling, **change))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * (0.2 if p.dim() == 2 else 0.5))
    trees = [
        [torch.randint(0, 61, (n,), generator=generator).tolist() for n in sizes]
        for sizes in [(70, 20, 30), (3, 2, 4), (1, 66, 5)]
    ]
    found = []
    for compute in (
        lambda: model.logprobs(Pack.build(trees)),
        lambda: padded_logprobs(model, trees),
    ):
        model.zero_grad()
        values = compute()
        (values * torch.linspace(-1, 2, 6)).sum().backward()
        found.append([values.detach(), *(p.grad for p in model.parameters())])
    whole = sum(grad.norm() ** 2 for grad in found[1][1:]) ** 0.5
    for name, got, expected in zip(
        ["values", *dict(model.named_parameters())], *found, strict=True
    ):
        assert (got - expected).norm() < 1e-5 * max(expected.norm(), 1e-2 * whole), name
    monkeypatch.setattr("support.kernels.flex_on", lambda kind: flex_attention)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # that it is slow uncompiled
        assert relative_error(model.logprobs(Pack.build(trees)), found[1][0]) < 1e-5


def test_logprobs_of_trees_with_one_two_and_three_responses() -> None:
    """Claim: branch-first order holds for mixed trees. Oracle: padded_logprobs."""
    trees = [[[1, 2], [3, 4]], [[5], [6], [7, 8]], [[9, 10, 11], [12], [13], [14, 15]]]
    model = model_with(None)
    torch.testing.assert_close(
        model.logprobs(Pack.build(trees)), padded_logprobs(model, trees), rtol=1e-5, atol=1e-5
    )


def rounded_up(pack: Pack) -> tuple[int, int]:
    return tuple(-(-len(x) // 128) * 128 for x in (pack.tokens, pack.rows))  # type: ignore[return-value]


NEEDS_COMPILER = pytest.mark.skipif(not CXX, reason="torch.compile needs a C++ compiler")


@pytest.mark.parametrize("how", ["traced", pytest.param("compiled", marks=NEEDS_COMPILER)])
def test_flex_attention_equals_the_cpu_form(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the path that a GPU takes (packs padded to whole blocks, block masks, scored rows,
    FlexAttention) gives the log-probabilities of the CPU's, with and without a sliding window;
    traced for dynamic shapes as on a GPU, it needs a few graphs, not one a pack; compiled, it is
    right too. Oracles: model.logprobs, and the padded computation; without gradients, as
    FlexAttention has no backward on a CPU, and compiled for fixed shapes, as torch 2.13's C++ code
    for dynamic ones does not always compile; 1e-5 relative is fp32 rounding.
    """
    ways: dict[str, Any] = {
        "traced": {"dynamic": True, "backend": "aot_eager"},
        "compiled": {"dynamic": False},
    }
    torch._dynamo.reset()
    counters.clear()
    flex = torch.compile(flex_attention, **ways[how])
    generator = torch.Generator().manual_seed(0)
    packs = [
        [
            [torch.randint(0, 61, (int(n),), generator=generator).tolist() for n in sizes]
            for sizes in torch.randint(1, 90, (trees, 3), generator=generator)
        ]
        for trees in (2, 1, 4, 9, 6, 3)
    ]
    assert len({rounded_up(Pack.build(trees)) for trees in packs}) == len(packs)
    for window in (None, 9):
        model = model_with(window)
        with (
            torch.no_grad(),
            warnings.catch_warnings(action="ignore"),
        ):  # that it is slow uncompiled
            for trees in packs[:1] if how == "compiled" else packs:
                expected = model.logprobs(Pack.build(trees))
                with monkeypatch.context() as patch:
                    patch.setattr("support.kernels.flex_on", lambda kind: flex)
                    got = model.logprobs(Pack.build(trees))
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
                torch.testing.assert_close(got, padded_logprobs(model, trees), rtol=1e-5, atol=1e-4)
    assert counters["stats"]["unique_graphs"] <= len(packs) / 2 and not counters["graph_break"]


def gpu_kernels(cache: Path, **environment: str) -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton, which torch's CUDA builds bring; pip install triton")
    path = f"{TESTS.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment |= {"PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, TESTS / "gpu_kernels.py"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


@pytest.mark.slow  # three minutes
def test_flex_attention_kernels_of_a_gpu_equal_the_cpu_form(tmp_path: Path) -> None:
    """Claim: the Triton kernels that torch generates for a GPU, forward and backward, compiled once
    for packs of two lengths, give the log-probabilities and the gradients of every parameter, with
    and without a sliding window. Oracle: the CPU's form; the kernels are run by Triton's
    interpreter. 1e-5 relative is fp32 rounding; a token lost or seen too much is over 1e-3.
    """
    errors = gpu_kernels(tmp_path, TRITON_INTERPRET="1")
    assert errors.keys() == {"None", "9"}
    for worst in errors.values():
        assert 0 < worst["error"] < 1e-5, worst


@pytest.mark.slow  # a minute
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """Claim: with a 7B's heads in bfloat16 the kernels of FlexAttention, forward and backward, and
    those of generation's steps become machine code of an H100 whose shared memory it has. Oracle:
    Triton's compiler and the 227 KiB of a block there.
    """
    found = gpu_kernels(tmp_path, TRITON_INTERPRET="0")
    assert {"forward", "backward"} == {
        "backward" if "backward" in k["kernel"] else "forward" for k in found["kernels"]
    }
    assert any("silu" in k["kernel"] for k in found["generation"])
    for kernel in found["kernels"] + found["generation"]:
        assert kernel["code_bytes"] > 0 and kernel["shared_bytes"] <= 227 * 2**10, kernel


@pytest.mark.parametrize("blind_to", ["the other response", "the other pair"])
def test_logprobs_do_not_leak(blind_to: str) -> None:
    """Claim: responses are blind to each other, pairs to each other.

    Oracle: bit-equal values when the unseen tokens change.
    """
    model, prompt = model_with(None), list(range(40))
    change = 2 if blind_to == "the other response" else 3
    first = [[prompt, [1, 2, 3], [4] * 50], [prompt, [5] * 40, [6, 7]]]
    second = [
        [prompt, [1, 2, 3], [9] * 50 if change == 2 else [4] * 50],
        [prompt if change == 2 else prompt[::-1], [5] * 40, [6, 7]],
    ]
    a, b = model.logprobs(Pack.build(first)), model.logprobs(Pack.build(second))
    same = torch.eq(a, b).tolist()
    assert same == ([True, True, False, True] if change == 2 else [True, False, True, False])


def test_empty_pack_gives_an_empty_differentiable_result() -> None:
    """Claim: no trees, no numbers, but a backward that gives every parameter zeros (FSDP2 ranks
    without work need it). Oracle: zeros.
    """
    model = model_with(None)
    model.zero_grad()
    values = model.logprobs(Pack.build([]))
    assert values.shape == (0,) and values.dtype == torch.float32 and values.requires_grad
    values.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
