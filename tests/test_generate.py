"""model.generate against generation without a cache, and the distribution it samples from."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch._dynamo.utils import counters

from data import generate
from model import Block, Config, Mistral, choose
from support.distributed import World

CONFIG = Config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [20], [30, 31, 32], [40, 41, 42, 43, 44]]


def model_with(window: int | None = None, tied: bool = False) -> Mistral:
    model = Mistral(dataclasses.replace(CONFIG, sliding_window=window, tie_word_embeddings=tied))
    model.init_weights(0)
    for p in model.parameters():
        p.data.mul_(12 if p.dim() == 2 else 1)
    return model


@torch.no_grad()
def without_cache(
    model: Mistral,
    prompt: list[int],
    n: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """The whole sequence computed anew for every token."""
    ids, draws = list(prompt), torch.rand(n, generator=torch.Generator().manual_seed(seed))
    for step in range(n):
        ids.append(
            int(
                choose(
                    model(torch.tensor([ids]))[:, -1], draws[step : step + 1], temperature, top_p
                )
            )
        )
    return ids[len(prompt) :]


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generate_equals_generation_without_a_cache(window: int | None, temperature: float) -> None:
    """Claim: greedy and sampled, ragged prompts, with a window shorter than they are.

    Oracle: without_cache, one prompt at a time.
    """
    model = model_with(window)
    got = model.generate(PROMPTS, 20, temperature=temperature, top_p=0.9, seeds=[5, 6, 7, 8])
    assert got == [
        without_cache(model, prompt, 20, temperature, 0.9, seed)
        for prompt, seed in zip(PROMPTS, (5, 6, 7, 8), strict=True)
    ]


def test_generate_does_not_depend_on_the_batch() -> None:
    """Claim: a prompt's answer is its own. Oracle: the same prompt alone, in another order, and in
    batches of two; 12 prompts, so that their prefill takes two widths.
    """
    model, prompts, seeds = (
        model_with(tied=True),
        PROMPTS + [p[::-1] for p in PROMPTS] + [p * 2 for p in PROMPTS],
        list(range(12)),
    )
    for how in ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}):
        together = model.generate(prompts, 15, **how)
        assert together == [
            model.generate([p], 15, **how, seeds=[s])[0]
            for p, s in zip(prompts, seeds, strict=True)
        ]
        assert together[::-1] == model.generate(
            prompts[::-1], 15, **how, seeds=seeds[::-1], batch=2
        )
        assert together != model.generate(prompts, 15, **how, seeds=[9] * 12)


def test_a_gpu_s_compiled_step_gives_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the block that a GPU runs compiled gives what it gives uncompiled, over all of the
    cache's places and while rows leave; all layers, lengths, batches and models of one shape share
    one graph. Oracle: uncompiled generation; the compiler's counts. The graph is run as torch
    operations: what kernels are made of it is the compiler's.
    """
    torch._dynamo.reset()
    counters.clear()
    models, batches, prompts = (
        [model_with(6), model_with(6)],
        (7, 5),
        PROMPTS + [p[::-1] for p in PROMPTS[:3]],
    )
    models[1].init_weights(3)
    expected = [
        m.generate(prompts, 20, temperature=0.8, stop_ids=(7, 30), batch=n)
        for m in models
        for n in batches
    ]
    assert len({len(answer) for answer in expected[0]}) > 2
    compiled = torch.compile(Block.forward, dynamic=True, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr("support.kernels.compiled_on", lambda kind, function: compiled)
    assert expected == [
        m.generate(prompts, 20, temperature=0.8, stop_ids=(7, 30), batch=n)
        for m in models
        for n in batches
    ]
    assert counters["stats"]["unique_graphs"] == 1


def test_generate_stops_where_asked_and_frees_the_row() -> None:
    """Claim: a stop id is left out, what `ended` answers to is kept, the others go on.

    Oracle: the unstopped answers, cut by hand.
    """
    model = model_with()
    full = model.generate(PROMPTS, 20)
    stop = full[0][7]
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in full]
    assert model.generate(PROMPTS, 20, stop_ids=(stop,)) == expected and min(
        map(len, expected)
    ) < 20 < 1 + max(map(len, expected))
    sampled = model.generate(PROMPTS, 20, temperature=1.0)
    stop = sampled[0][
        3
    ]  # a row that leaves early must take its own draws along, not its neighbour's
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in sampled]
    assert (
        model.generate(PROMPTS, 20, temperature=1.0, stop_ids=(stop,)) == expected
        and sorted(map(len, expected))[-1] == 20
    )
    pair = full[1][4:6]
    got = model.generate(PROMPTS, 20, ended=lambda ids: ids[-2:] == pair)
    assert got[1] == full[1][: next(n for n in range(2, 21) if full[1][n - 2 : n] == pair)]
    assert all(a == b[: len(a)] for a, b in zip(got, full, strict=True))


def test_stop_strings_end_an_answer_where_they_are_spelled() -> None:
    """Claim: data.generate ends an answer at a string that two tokens make together, also across
    tokens that decode to nothing, as special ones do. Oracle: the unstopped answers, cut by hand.
    """
    model = model_with()
    full = model.generate(PROMPTS, 20)
    start = next(n for n in range(18) if len(set(full[1][n : n + 3])) == 3)
    first, silent, last = full[1][start : start + 3]

    def decode(ids: list[int]) -> str:
        return "".join(f"<{i}>" for i in ids if i != silent)

    chat: Any = SimpleNamespace(decode=decode, end_ids=())
    world = World(0, 1, torch.device("cpu"), cast(Any, None))
    stop = f"{first}><{last}"
    how: Any = {"max_new_tokens": 20, "temperature": 0.0, "seed": 0, "stop": [stop]}
    for answer, ids in zip(generate(model, chat, PROMPTS, world, **how), full, strict=True):
        ends = [n for n in range(1, 21) if stop in decode(ids[:n])]
        assert answer.tokens == min([*ends, 20]) and answer.at_limit == (not ends)
        assert answer.text == decode(ids).partition(stop)[0]
    assert any(stop in decode(ids) for ids in full)


def test_choose_samples_the_distribution() -> None:
    """Claim: uniform draws give each token its share of the top_p mass at the temperature. Oracle:
    shares computed by hand; 20,000 evenly spaced draws miss a share by less than 1e-4.
    """
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    draws = (torch.arange(20000) + 0.5) / 20000
    cases = (
        (1.0, 1.0, range(5)),
        (1.0, 0.75, (1, 3, 4)),
        (1.0, 0.69, (1, 3)),
        (0.5, 1.0, range(5)),
        (1.0, 1e-6, (1,)),
    )
    for temperature, top_p, kept in cases:
        shares = p ** (1 / temperature) * torch.tensor([float(i in kept) for i in range(5)])
        ids = choose(p.log().expand(20000, 5), draws, temperature, top_p)
        torch.testing.assert_close(
            torch.bincount(ids, minlength=5) / 20000, shares / shares.sum(), rtol=0, atol=1e-4
        )
    last = choose(p.log()[None], torch.tensor([1 - 2**-24]), 1.0, 0.75)  # the largest draw there is
    assert last.item() == 4


def test_generate_in_bf16_and_of_nothing() -> None:
    """Claim: a bf16 cache runs, no prompts or no tokens give nothing. Oracle: shapes."""
    model = model_with().bfloat16()
    assert [len(ids) for ids in model.generate(PROMPTS, 5)] == [5] * 4
    assert model.generate([], 5) == [] and model.generate(PROMPTS, 0) == [[]] * 4


def test_generate_refuses_bad_requests() -> None:
    """Claim: each is named before any work. Oracle: the message."""
    model = model_with()
    for arguments, word in (
        ({"prompts": [[]]}, "prompts"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1e-320}, "temperature must be 0 or at least 1e-06"),
        ({"top_p": 0.0}, "top_p"),
        ({"seeds": [1]}, "seeds"),
    ):
        with pytest.raises(ValueError, match=word):
            model.generate(**{"prompts": PROMPTS, "max_new_tokens": 3} | arguments)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_refuses_logits_that_are_not_finite(temperature: float, tmp_path: Path) -> None:
    """Claim: NaN weights are an error that names them, greedy and sampled, also where a later token brings
    the NaN. Oracle: the message.
    """
    model = model_with()
    second = model.generate(PROMPTS, 2)[0][0]
    model.model.embed_tokens.weight.data[second] = math.nan
    model.save_pretrained(tmp_path / "nan")
    broken = Mistral.from_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match=rf"{tmp_path}/nan gives logits that are not finite"):
        broken.generate([[*PROMPTS[0], second]], 5, temperature=temperature)
    with pytest.raises(ValueError, match=r"the model gives logits that are not finite"):
        model.generate(PROMPTS, 5)


def test_generate_reads_no_memory_that_nobody_wrote() -> None:
    """Claim: what memory held before does not reach an answer. Oracle: torch fills fresh memory
    with NaN in deterministic mode, and a masked NaN would still be a NaN.
    """
    model = model_with()
    expected = model.generate(PROMPTS, 20, temperature=1.0)
    torch.use_deterministic_algorithms(True)
    try:
        assert model.generate(PROMPTS, 20, temperature=1.0) == expected
    finally:
        torch.use_deterministic_algorithms(False)
