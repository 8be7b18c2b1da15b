"""train.py: settings, the schedule, whole runs, the same steps
on any machine, the step-0 gate.
"""

import contextlib
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, tzinfo
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
import torch
from runs import ROOT, bfpo, drift, launch, log_of, losses, sft
from safetensors.torch import load_file, save_file

import train
from bfpo import QUADRANTS, bfpo_loss, label, margin
from data import batch_indices
from model import Mistral, Pack
from support import distributed, plots, storage
from support.chat import ZEPHYR
from support.distributed import World
from toy import files as toy_files
from toy import language, recipe

WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "sees",
    "likes",
    "blue",
    "red",
    "house",
    "tree",
    "runs",
    "under",
    "because",
    "Ünïcode",
    "東京",
    "42",
)


def text(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def pku_rows(rng: random.Random, n: int) -> list[dict[str, object]]:
    return [
        {
            "prompt": text(rng, 3, 20),
            "response_0": text(rng, 2, 30),
            "response_1": text(rng, 2, 30),
            "is_response_0_safe": rng.random() < 0.5,
            "is_response_1_safe": rng.random() < 0.5,
            "better_response_id": rng.randrange(2),
            "safer_response_id": rng.randrange(2),
        }
        for _ in range(n)
    ]


def ultrafeedback_rows(rng: random.Random, n: int) -> list[dict[str, object]]:
    rows = []
    for _ in range(n):
        prompt = text(rng, 3, 20)
        row: dict[str, object] = {"prompt": prompt, "score_chosen": 8.0, "score_rejected": 3.0}
        for column in ("chosen", "rejected"):
            row[column] = [
                {"content": prompt, "role": "user"},
                {"content": text(rng, 2, 30), "role": "assistant"},
            ]
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, mistral_tokenizer: Path) -> Path:
    """A random Mistral that transformers saved, with Mistral-7B's own tokenizer; PKU as jsonl,
    UltraFeedback as parquet.
    """
    from transformers import MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=None,
    )
    MistralForCausalLM(config).save_pretrained(
        folder / "model", max_shard_size="5MB"
    )  # two files: embeddings, and the rest
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(mistral_tokenizer / name, folder / "model" / name)
    rng = random.Random(0)
    lines = [json.dumps(row) for row in pku_rows(rng, 70)]
    (folder / "PKU.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pq.write_table(
        pa.Table.from_pylist(ultrafeedback_rows(rng, 50)), folder / "ULTRAFEEDBACK.parquet"
    )
    return folder


def flags(inputs: Path, out: Path, *more: str) -> list[str]:
    return [
        "bfpo",
        "--model",
        str(inputs / "model"),
        "--safety",
        str(inputs / "PKU.jsonl"),
        "--helpfulness",
        str(inputs / "ULTRAFEEDBACK.parquet"),
        "--out",
        str(out),
        "--cache",
        str(inputs / "cache"),
        "--batch",
        "4",
        "--lr",
        "1e-3",
        "--device",
        "cpu",
        *more,
    ]


@pytest.fixture(scope="module")
def world() -> World:
    torch.set_num_threads(1)  # as in the processes that runs are compared with
    return distributed.start("cpu")


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["bofp"], "bofp"),
        (["bfpo", "--learning_rate", "1"], "--learning_rate"),
        (["bfpo", "--tau", "-0.1"], "tau must be"),
        (["bfpo", "--b1", "1"], "b1 must be"),
        (["bfpo", "--alpha", "nan"], "alpha must be"),
        (["bfpo", "--batch", "0"], "batch must be"),
        (["bfpo", "--objective", "ppo"], "ppo"),
        (["redteam"], "--safety"),
        (["toy", "--model", "x"], "toy"),
        (["bfpo", "--lr", "zero"], "--lr"),
        (["bfpo", "--batsh", "4"], "unknown setting --batsh; did you mean --batch?"),
        (["bfpo", "--tau", "1e-320"], "targets g / tau and their squares must be finite in fp32"),
        (["bfpo", "--tau", "1e-20"], "targets g / tau and their squares must be finite in fp32"),
        (["bfpo", "--alpha", "1e39"], "targets g / tau"),
        (["bfpo", "--objective", "dpo", "--tau", "1e300"], "targets g / tau"),
        (["bfpo", "--lr", "1e300"], "lr must be > 0 and < 1"),
        (["--nosuch", "1"], "--nosuch"),
        (["--chat_template", "nosuch.jinja"], "nosuch.jinja"),
        (["--seed", "99999999999999999999"], "seed must be"),
        (["bfpo", "--sft", "rows.jsonl"], "--sft"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: wrong usage ends with exit code 2 and a last line that names what is wrong.

    Oracle: argparse's own convention.
    """
    with pytest.raises(SystemExit) as exit_info:
        train.parse(arguments)
    assert exit_info.value.code == 2
    assert named in capsys.readouterr().err.strip().splitlines()[-1]


def test_recipes_are_the_papers() -> None:
    """Claim: the recipe bfpo with no flag has the paper's settings. Oracle: §4.2."""
    config = train.parse(["bfpo"])
    assert (config.tau, config.alpha, config.b1, config.lr, config.warmup) == (
        0.01,
        0.5,
        3.0,
        5e-7,
        0.1,
    )
    assert (config.batch, config.epochs, config.max_length, config.max_prompt, config.seed) == (
        32,
        1,
        1024,
        512,
        42,
    )
    assert config.selective == "down_proj" and config.clip_norm == 0 and config.objective == "bfpo"
    assert train.parse(["redteam", "--safety", "rows.jsonl"]).batch == 16
    sft = train.parse(["sft"])
    assert (sft.model, sft.max_length, sft.batch) == ("mistralai/Mistral-7B-v0.1", 2048, 32)


def test_own_pairs_replace_the_recipes_of_both_kinds() -> None:
    """Claim: --safety or --helpfulness alone leaves nothing of the recipe's sources; other settings of
    the recipe stay. Oracle: the settings.
    """
    for flag, other in (("safety", "helpfulness"), ("helpfulness", "safety")):
        config = train.parse(["bfpo", f"--{flag}", "mine.jsonl"])
        assert getattr(config, flag) == ("mine.jsonl",) and getattr(config, other) == ()
        assert config.model == train.RECIPES["bfpo"]["model"]
    assert train.parse(["bfpo"]).helpfulness == train.RECIPES["bfpo"]["helpfulness"]


def test_learning_rate_warms_up_from_zero_and_ends_near_zero() -> None:
    """Claim: the schedule is transformers' cosine with warm-up.

    Oracle: transformers.get_cosine_schedule_with_warmup.
    """
    from transformers import get_cosine_schedule_with_warmup

    for steps, warmup in ((937, 0.1), (10, 0.0), (7, 0.5), (1, 0.1)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(warmup * steps), steps)
        for step in range(steps):
            # 1e-12: both are the same few float64 operations
            assert train.learning_rate(step, steps, 3.0, warmup) == pytest.approx(
                schedule.get_last_lr()[0], abs=1e-12
            )
            optimizer.step()
            schedule.step()


# --- whole runs on the public schemas -------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(inputs: Path, world: World) -> Path:
    """A run of 12 steps on one process: the run that others are compared with."""
    out = inputs / "one"
    train.run(train.parse(flags(inputs, out, "--steps", "12")), world)
    return out


def test_run_exports_what_transformers_loads(finished: Path, inputs: Path) -> None:
    """Claim: a run on the public schemas trains down_proj alone and exports a model with the same
    logits in transformers.

    Oracle: transformers, and the starting checkpoint for what must not have moved.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = torch.randint(3, 32000, (2, 40), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(finished / "model")(tokens).logits
    ours = Mistral.from_pretrained(finished / "model")(tokens)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()  # fp32, another order of sums
    before, after = (
        {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
        for path in (inputs / "model", finished / "model")
    )
    assert (
        before.keys() == after.keys() and len(list((inputs / "model").glob("*.safetensors"))) == 2
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "down_proj" in name} and len(moved) == 2
    chat = AutoTokenizer.from_pretrained(finished / "model").apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    assert "<|user|>\nhi</s>" in chat


def test_export_names_the_taught_end_token(toys: Path, world: World, tmp_path: Path) -> None:
    """Claim: config.json and generation_config.json of the exported model name the token that ends
    answers in training, then those that the model's own files named; run.json says where the
    template came from. Oracle: transformers' generate stops at each of them.
    """
    from transformers import AutoModelForCausalLM

    start = Path(shutil.copytree(toys / "start", tmp_path / "start"))
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    (start / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 5], "temperature": 0.5, "do_sample": True})
    )
    train.run(
        train.parse(sft(toys, tmp_path / "run", "--model", str(start), "--steps", "2")), world
    )
    model = tmp_path / "run" / "model"
    files = [
        json.loads((model / name).read_text()) for name in ("config.json", "generation_config.json")
    ]
    assert [file["eos_token_id"] for file in files] == [[2, 5, 7]] * 2 and files[1][
        "temperature"
    ] == 0.5
    loaded = AutoModelForCausalLM.from_pretrained(model)
    for end in (2, 5, 7):
        loaded.lm_head.weight.data.zero_()
        loaded.lm_head.weight.data[end] = (
            1e4 * loaded.model(torch.tensor([[1, 9]])).last_hidden_state[0, -1]
        )
        assert loaded.generate(
            torch.tensor([[1, 9]]), do_sample=False, max_new_tokens=5
        ).tolist() == [[1, 9, end]]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["chat_template_source"] == "zephyr, as the model has none" and record[
        "end_ids"
    ] == [2, 5, 7]


def test_a_resumed_run_keeps_its_date(
    toys: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: a template that writes today's date gets the date of the run's start, also when the
    run goes on days later; --fresh takes a new one. Oracle: run.json, and the tokens of the data.
    """

    class Earlier(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime(2020, 1, 2, tzinfo=UTC)

    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%j') }} " + ZEPHYR.replace("\n", ""))
    command = sft(
        toys, tmp_path / "run", "--steps", "2", "--chat_template", str(tmp_path / "dated.jinja")
    )
    with monkeypatch.context() as patch:
        patch.setattr(storage, "datetime", Earlier)
        train.run(train.parse(command), world)
    record = (tmp_path / "run" / "run.json").read_text()
    (tmp_path / "run" / "done.json").unlink()
    train.run(train.parse(command), world)
    assert (tmp_path / "run" / "run.json").read_text() == record and json.loads(record)[
        "started"
    ] == "2020-01-02T00:00:00+00:00"
    train.run(train.parse([*command, "--fresh"]), world)
    again = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (
        again["started"] > "2026" and again["inputs"]["sft"] != json.loads(record)["inputs"]["sft"]
    )


def test_finished_run_shows_its_result(
    toys: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: the command again prints the held-out table, and trains nothing.

    Oracle: the first run's table and log.
    """
    command = bfpo(toys, tmp_path / "run", "--steps", "2")
    train.run(train.parse(command), world)
    table, model = (
        capsys.readouterr().out.partition("held-out safety:")[2].partition("wrote")[0],
        runs.model_bytes(tmp_path / "run"),
    )
    train.run(train.parse(command), world)
    assert table in capsys.readouterr().out and "both_safe" in table
    assert runs.model_bytes(tmp_path / "run") == model and len(log_of(tmp_path / "run")) == 2


def test_first_step_is_the_closed_form(finished: Path) -> None:
    """Claim: at step 0 h = 0, so the loss is mean((g / tau)^2) over the step's pairs of each
    stream. Oracle: the label by hand.

    The learning rate of that step is 0.
    """
    rows = log_of(finished)
    assert [row["step"] for row in rows] == list(range(12)) and rows[0]["lr"] == 0
    targets = {"both_safe": 0.5, "chosen_safe": 1.0, "rejected_safe": -1.0, "both_unsafe": -0.5}
    quadrants = rows[0]["quadrants"]
    assert isinstance(quadrants, dict)
    total = sum(view["pairs"] * (targets[name] / 0.01) ** 2 for name, view in quadrants.items())
    helpful = 4 * (0.5 / 0.01) ** 2
    # 1e-4: |h| of 1e-5 nats against a target of 50 changes the square by 4e-7 of itself; fp32 logs
    # round at 1e-5
    assert rows[0]["loss"] == pytest.approx((total - helpful) / 4 + helpful / 4, rel=1e-4)
    assert rows[0]["helpfulness_loss"] == pytest.approx(2500, rel=1e-4)


def test_log_and_curves_have_it_all(finished: Path, tmp_path: Path) -> None:
    """Claim: a row a step with every figure, by quadrant too; the quadrants add up to the whole;
    curves.png, also on demand.

    Oracle: a quadrant's margin is its chosen change minus its rejected one; the total is the
    quadrants' mean by pairs.
    """
    for row in log_of(finished):
        assert {
            "grad_norm",
            "lr",
            "safety_loss",
            "helpfulness_loss",
            "rows_per_s",
            "tokens_per_s",
            "memory_gib",
        } <= row.keys()
        views = row["quadrants"]
        assert isinstance(views, dict) and sum(view["pairs"] for view in views.values()) == 8
        for view in views.values():
            assert {"margin_nats", "target_nats", "target_side_share"} <= view.keys()
            difference = view["chosen_logprob_change_nats"] - view["rejected_logprob_change_nats"]
            assert view["margin_nats"] == pytest.approx(
                difference, abs=1e-9
            )  # float64 sums of the same numbers
        for key in ("chosen_logprob_change_nats", "rejected_logprob_change_nats"):
            assert row[key] == pytest.approx(
                sum(view["pairs"] * view[key] for view in views.values()) / 8, abs=1e-9
            )
    whole = (finished / "curves.png").read_bytes()
    shutil.copyfile(finished / "log.jsonl", tmp_path / "log.jsonl")
    plots.main([str(tmp_path)])
    assert (tmp_path / "curves.png").read_bytes() == whole and whole[:4] == b"\x89PNG"


def test_repeated_run_is_bit_identical_and_a_finished_one_stops_at_once(
    finished: Path, inputs: Path, world: World
) -> None:
    """Claim: the same command gives the same bytes of weights; on a finished folder it returns the
    result and writes nothing.
    """
    out = inputs / "again"
    config = train.parse(flags(inputs, out, "--steps", "12"))
    result = train.run(config, world)
    assert runs.model_bytes(finished) == runs.model_bytes(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert train.run(config, world) == result
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_clipping_and_bfloat16_run(inputs: Path, world: World, tmp_path: Path) -> None:
    """Claim: --dtype bfloat16 passes its gate, keeps fp32 masters, and --clip_norm bounds the
    update, not the norm in the log.

    Oracle: the dtypes in the checkpoint; the moments that clipped gradients can give.
    """
    out = tmp_path / "run"
    train.run(
        train.parse(
            flags(
                inputs,
                out,
                "--steps",
                "3",
                "--dtype",
                "bfloat16",
                "--clip_norm",
                "1",
                "--warmup",
                "0",
            )
        ),
        world,
    )
    stored = load_file(next((out / "checkpoints" / "step-00000003").glob("*.safetensors")))
    assert {str(value.dtype) for value in stored.values()} == {"torch.float32"} and len(stored) == 6
    exported = load_file(out / "model" / "model.safetensors")
    assert {str(value.dtype) for value in exported.values()} == {"torch.bfloat16"}
    # Adam's first moment after one more step cannot exceed the clipped gradients' norms: (1 - 0.9)
    # * (1 + 0.9 + 0.81)
    moments = [value.norm() ** 2 for name, value in stored.items() if name.startswith("exp_avg.")]
    assert 0 < float(sum(moments)) ** 0.5 <= 0.1 * (1 + 0.9 + 0.81) + 1e-3
    assert all(float(str(row["grad_norm"])) > 10 for row in log_of(out))


# --- the reference --------------------------------------------------------------------------------


def test_live_reference_takes_the_same_steps(
    whole: Path, toys: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: 200 steps with pi_ref computed anew at every step, by a second model, have the losses
    of the cached reference.
    """
    pi_ref = Mistral.from_pretrained(toys / "start")

    class Live(train.Rows):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)  # type: ignore[arg-type]
            self.reference = self  # type: ignore[assignment]

        @torch.no_grad()
        def __getitem__(self, items: torch.Tensor) -> torch.Tensor:
            return (
                pi_ref.logprobs(Pack.build([self.tree(i) for i in items.tolist()])).reshape(2, -1).T
            )

    monkeypatch.setattr(train, "Rows", Live)
    train.run(train.parse(bfpo(toys, toys / "live", "--steps", "200")), world)
    assert (
        drift(toys / "live", whole) <= 1e-5
    )  # fp32 sums in another order, which 200 steps carry on: measured 4e-6


# --- held-out rows --------------------------------------------------------------------------------


def test_held_out_evaluation_leaves_the_run_alone(toys: Path, world: World) -> None:
    """Claim: a run that evaluates every two steps ends with the bytes of one that does not.

    Oracle: the two models.
    """
    for name, more in (("often", ("--eval_every", "2")), ("never", ())):
        result = train.run(train.parse(bfpo(toys, toys / name, "--steps", "7", *more)), world)
        assert sum(view["pairs"] for view in result["held_out"]["safety"].values()) == 40
    assert [row["step"] for row in log_of(toys / "often") if "held_out" in row] == [1, 3, 5]
    assert runs.model_bytes(toys / "often") == runs.model_bytes(toys / "never")


# --- guards ---------------------------------------------------------------------------------------


def test_loss_that_is_not_finite_stops_before_the_update(
    toys: Path, world: World, tmp_path: Path
) -> None:
    """Claim: a NaN stops the run, names the step and the row, and leaves no checkpoint of it.

    Oracle: one NaN in the reference.
    """
    config = train.parse(bfpo(toys, tmp_path / "run", "--steps", "3"))
    true, bad = (
        train.reference_logprobs,
        int(train.Rows.draw(rows_of(config, toys, world), 4, config.seed, 1)[2]),
    )

    def broken(*given: Any) -> torch.Tensor:
        reference = true(*given).clone()
        name, stream = given[5:7]
        if name == "safety" and len(stream) == 400:
            reference[bad, 0] = math.nan
        return reference

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ValueError, match=r"step 1: loss nan") as error,
    ):
        patch.setattr(train, "reference_logprobs", broken)
        train.run(config, world)
    assert (
        f"not finite: safety {bad} (" in str(error.value)
        and not (tmp_path / "run" / "checkpoints").exists()
    )


def rows_of(config: train.Config, toys: Path, world: World) -> train.Rows:
    chat = train.Chat(toys / "start")
    streams, _ = train.open_streams(config, chat, world)
    return train.Rows(streams, {}, chat)


def test_gradient_that_is_not_finite_stops_before_the_update(
    toys: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: with finite losses, an infinite gradient stops the run too, and no checkpoint is left.

    Oracle: one value set to inf.
    """
    true = train.forward_backward

    def overflow(model: Mistral, *rest: object) -> train.Outcome:
        outcome = true(model, *rest)  # type: ignore[arg-type]
        gradient = model.model.layers[0].mlp.down_proj.weight.grad
        gradient[0, 0] = math.inf
        return outcome

    monkeypatch.setattr(train, "forward_backward", overflow)
    with pytest.raises(
        ValueError,
        match=r"step 0: loss \d+.*gradient norm inf.*the largest: \S+ of (safety|helpfulness) \d+",
    ):
        train.run(train.parse(bfpo(toys, tmp_path / "run", "--steps", "3")), world)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_updates_that_the_export_rounds_away_are_counted(
    toys: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: the end of a run says how many trained values the export holds otherwise than the
    start, and warns of less than a tenth. In bfloat16 ten steps of 5e-7 vanish, which the fp32
    masters do not show. Oracle: both models' files, value by value.
    """
    before = load_file(toys / "start" / "model.safetensors")
    for lr, dtype, warned in (
        ("5e-7", "bfloat16", True),
        ("5e-7", "float32", False),
        ("1e-3", "bfloat16", False),
    ):
        out = tmp_path / f"{lr} {dtype}"
        done = train.run(
            train.parse([*bfpo(toys, out, "--steps", "10", "--dtype", dtype), "--lr", lr]), world
        )
        after = load_file(out / "model" / "model.safetensors")
        names = [name for name in after if "down_proj" in name]
        total = sum(after[name].numel() for name in names)
        changed = sum(
            int((after[name] != before[name].to(after[name].dtype)).sum()) for name in names
        )
        said = capsys.readouterr().out
        assert (
            f"{changed:,} of {total:,} trained values" in said and done["changed_values"] == changed
        )
        assert json.loads((out / "done.json").read_text())["changed_values"] == changed
        assert (
            (changed < 0.1 * total) == warned == ("WARNING: most of the training is lost" in said)
        )


def test_gate_refuses_a_reference_of_other_weights(
    toys: Path, world: World, tmp_path: Path
) -> None:
    """Claim: a reference that is not the starting policy stops the run at step 0, before an update.

    Oracle: a shifted cache.
    """
    config = train.parse(bfpo(toys, tmp_path / "run", "--steps", "3"))
    true = train.reference_logprobs
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ValueError, match="policy is not the reference"),
    ):
        patch.setattr(train, "reference_logprobs", lambda *a: true(*a) + torch.tensor([0.5, 0.0]))
        train.run(config, world)
    assert (
        not (tmp_path / "run" / "checkpoints").exists()
        and not (tmp_path / "run" / "model").exists()
    )


@pytest.mark.parametrize(("shift", "passes"), [(0.02, True), (0.6, False)])
def test_gate_in_bfloat16_allows_rounding_alone(
    shift: float, passes: bool, toys: Path, world: World, tmp_path: Path
) -> None:
    """Claim: in bfloat16 the gate lets rounding pass, and no reference that is off by 0.6 nats in
    pairs of 20 answer tokens. Oracle: a shifted reference.
    """
    config = train.parse(bfpo(toys, tmp_path / "run", "--steps", "2", "--dtype", "bfloat16"))
    true = train.reference_logprobs
    refused = pytest.raises(ValueError, match="policy is not the reference")
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.nullcontext() if passes else refused,
    ):
        patch.setattr(train, "reference_logprobs", lambda *a: true(*a) + torch.tensor([shift, 0]))
        train.run(config, world)


def test_gate_refuses_a_policy_that_differs_from_its_own_scoring(
    toys: Path, world: World, tmp_path: Path
) -> None:
    """Claim: passes over equal packs must agree far below what bfloat16 rounds away. Oracle: a
    model whose log-probabilities are 0.02 nats off where gradients are wanted.
    """
    config = train.parse(bfpo(toys, tmp_path / "run", "--steps", "2", "--dtype", "bfloat16"))
    true = Mistral.logprobs

    def off(self: Mistral, pack: Pack) -> torch.Tensor:
        logprobs = true(self, pack)
        chosen = torch.arange(len(logprobs)) < len(logprobs) // 2
        return logprobs + 0.02 * chosen if torch.is_grad_enabled() else logprobs

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ValueError, match="policy is not the reference"),
    ):
        patch.setattr(Mistral, "logprobs", off)
        train.run(config, world)


def test_run_that_would_train_nothing_is_refused(toys: Path, world: World, tmp_path: Path) -> None:
    """Claim: a run whose every step is at learning rate 0 is an error that says how to mend it,
    before anything is written.
    """
    with pytest.raises(ValueError, match="a run of one step has learning rate 0"):
        train.run(train.parse(bfpo(toys, tmp_path / "run", "--steps", "1")), world)
    assert not (tmp_path / "run").exists()


def test_no_held_out_rows_have_no_loss(toys: Path, world: World, tmp_path: Path) -> None:
    """Claim: without held-out rows the held-out loss is null, not 0.

    Oracle: done.json and the log.
    """
    rows = [
        {
            "prompt": f"{i}?",
            "chosen": "I cannot help.",
            "rejected": "Gather the flour.",
            "chosen_safe": True,
            "rejected_safe": True,
        }
        for i in range(8)
    ]
    few = str(tmp_path / "few.jsonl")
    Path(few).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [
        "bfpo",
        "--model",
        str(toys / "start"),
        "--safety",
        few,
        "--helpfulness",
        few,
        "--batch",
        "4",
        "--steps",
        "4",
        "--eval_every",
        "2",
        *runs.usual(toys, tmp_path / "run"),
    ]
    done = train.run(train.parse(command), world)
    assert done["held_out"] == {} and done["held_out_loss"] is None
    assert [row["held_out_loss"] for row in log_of(tmp_path / "run") if "held_out_loss" in row] == [
        None
    ]


def damaged(toys: Path, folder: Path, name: str, rows: slice) -> Path:
    """The starting model with NaN in some rows of a tensor."""
    shutil.copytree(toys / "start", folder)
    weights = load_file(folder / "model.safetensors")
    weights[name][rows] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_starting_weights_that_are_not_finite_are_named(
    toys: Path, world: World, tmp_path: Path
) -> None:
    """Claim: weights that give no row a finite log-probability are blamed: by the reference, and in
    SFT by step 0.
    """
    start = str(damaged(toys, tmp_path / "nan", "model.norm.weight", slice(1)))
    few = (
        "--safety",
        f"{toys}/pku[:8]",
        "--helpfulness",
        f"{toys}/ultrafeedback[:8]",
        "--steps",
        "3",
        "--model",
        start,
    )
    with pytest.raises(
        ValueError,
        match=rf"starting weights {start} give rows .*: safety 0 \(.*safety 4 \([^,]*\) and \d+ more;",
    ):
        train.run(train.parse(bfpo(toys, tmp_path / "run", *few)), world)
    with pytest.raises(
        ValueError, match=r"step 0: loss nan.*The starting weights or --tau cause it"
    ):
        train.run(
            train.parse([*sft(toys, tmp_path / "sft", "--steps", "3"), "--model", start]), world
        )


def test_a_row_that_is_not_finite_under_the_reference_is_named(
    toys: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: the one row that the starting weights make NaN is named before training, none of its
    pack's others, and nothing of it is kept. A NaN that was kept before is computed again. Oracle:
    a word that one row of eight has, with NaN as its embedding.
    """
    rows = [
        {
            "prompt": "How do I make a cake?",
            "chosen": "Gather the flour.",
            "rejected": "I cannot help.",
            "chosen_safe": True,
            "rejected_safe": True,
        }
        for _ in range(8)
    ]
    rows[5]["chosen"] = "Gather the friend."
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    chat = train.Chat(toys / "start")
    (token,) = set(chat.text("Gather the friend.")) - set(chat.text("Gather the flour."))
    start = damaged(toys, tmp_path / "nan", "model.embed_tokens.weight", slice(token, token + 1))
    cache = tmp_path / "cache"
    command = [
        "redteam",
        "--model",
        str(start),
        "--safety",
        str(tmp_path / "rows.jsonl"),
        "--batch",
        "4",
        "--steps",
        "2",
        *runs.usual(toys, tmp_path / "run"),
        "--cache",
        str(cache),
    ]
    with pytest.raises(
        ValueError,
        match=r"starting weights \S+ give rows a log-prob[^:]*: safety 5 \('[^)]*\); use other",
    ):
        train.run(train.parse(command), world)
    assert (
        not list(cache.rglob("reference/*.json"))
        and not (tmp_path / "run" / "checkpoints").exists()
    )


def test_a_held_out_row_that_is_not_finite_costs_no_model(
    toys: Path,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Claim: training goes on and exports; the row is named and counts in no margin, the loss is
    null, every file is JSON, and the command ends in an error, also when it is given again. Oracle:
    one NaN put into the held-out log-probabilities, and a run without.
    """
    true = train.score

    def broken(
        model: Mistral, stream: train.Stream, world: World, budget: int, text: str, *rest: range
    ) -> torch.Tensor:
        logprobs = true(model, stream, world, budget, text, *rest)
        if text == "held-out, safety":
            logprobs[3, 1] = math.nan
        return logprobs

    plain = train.run(train.parse(bfpo(toys, tmp_path / "plain", "--steps", "4")), world)
    monkeypatch.setattr(train, "score", broken)
    out = tmp_path / "run"
    command = train.parse(bfpo(toys, out, "--steps", "4", "--eval_every", "2"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the model is written, .*: safety 3 \('"):
            train.run(command, world)
    assert runs.model_bytes(out) == runs.model_bytes(tmp_path / "plain")
    assert (
        "WARNING: held-out rows whose log-probability is not finite: safety 3 ("
        in capsys.readouterr().out
    )

    def strict(text: str) -> dict[str, object]:
        return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} in JSON"))  # type: ignore[no-any-return]

    done = strict((out / "done.json").read_text())
    logged = [strict(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for row in (done, *(row for row in logged if "held_out" in row)):
        views = row["held_out"]["safety"]  # type: ignore[index]
        assert row["held_out_loss"] is None and len(views.pop("not_finite")) == 1
        assert sum(view["pairs"] for view in views.values()) == 39
        assert sum(view["pairs"] for view in plain["held_out"]["safety"].values()) == 40


def test_no_file_holds_what_json_does_not_have(tmp_path: Path) -> None:
    """Claim: NaN and infinities are refused by every writer, and a log's row that has one is left out.
    Oracle: RFC 8259.
    """
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            storage.write_json(tmp_path / "a.json", {"x": value})
        with pytest.raises(ValueError, match="not JSON compliant"):
            storage.write_lines(tmp_path / "a.jsonl", [{"x": value}])
    assert not list(tmp_path.iterdir())
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"step": 1, "loss": NaN}\n{"step": 2}\n')
    assert [row["step"] for row in storage.log_rows(tmp_path / "log.jsonl")] == [0, 2]


def test_a_stream_smaller_than_its_batch_is_said(
    toys: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: one line names a stream of fewer rows than a step draws and how often a row is in it;
    a larger one gets none.
    """
    for few, said in (("[:3]", True), ("[:4]", False)):
        command = bfpo(
            toys, tmp_path / few, "--helpfulness", f"{toys}/ultrafeedback{few}", "--dry_run"
        )
        train.run(train.parse(command), world)
        found = [
            line
            for line in capsys.readouterr().out.splitlines()
            if line.startswith("WARNING: helpfulness has")
        ]
        rows = 3 if said else 4
        assert (
            found
            == [
                f"WARNING: helpfulness has {rows} rows, and a step draws 4: a row may be in it 2 times"
            ]
            * said
        )


def test_updates_are_adamw_s(toys: Path, world: World, tmp_path: Path) -> None:
    """Claim: five steps give AdamW's weights with betas 0.9 and 0.999, eps 1e-8 and no decay, from
    each step's own gradient.

    Oracle: the algorithm by hand in float64. Gradients are scaled to 1e-8, where eps is half of the
    denominator.
    """
    true, gradients = train.forward_backward, list[dict[str, torch.Tensor]]()

    def small(model: Mistral, *rest: object) -> train.Outcome:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        before = {name: 0 if p.grad is None else p.grad.clone() for name, p in trained.items()}
        outcome = true(model, *rest)  # type: ignore[arg-type]
        own = {name: p.grad - before[name] for name, p in trained.items() if p.grad is not None}
        scale = 1e-8 / torch.cat([g.flatten() for g in own.values()]).square().mean().sqrt()
        for name, gradient in own.items():
            gradient *= scale
            trained[name].grad = before[name] + gradient
        gradients.append({name: g.double() for name, g in own.items()})
        return outcome

    config = train.parse(
        [*bfpo(toys, tmp_path / "run", "--steps", "5", "--warmup", "0.3"), "--lr", "0.02"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "forward_backward", small)
        train.run(config, world)
    before, after = (
        load_file(path / "model.safetensors")
        for path in (toys / "start", tmp_path / "run" / "model")
    )
    assert len(gradients) == 5 and len(gradients[0]) == 2
    for name in gradients[0]:
        weight, m, v = before[name].double(), torch.zeros(()), torch.zeros(())
        for step, gradient in enumerate(own[name] for own in gradients):
            m = 0.9 * m + 0.1 * gradient
            v = 0.999 * v + 0.001 * gradient**2
            m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            weight = weight - train.learning_rate(step, 5, 0.02, 0.3) * m_hat / (
                v_hat.sqrt() + 1e-8
            )
        assert (weight - before[name].double()).abs().max() > 0.02  # else this shows nothing
        # 1e-6: fp32 weights below 0.2, five updates; decay of 0.01 alone would change the largest
        # by 1e-4
        torch.testing.assert_close(after[name].double(), weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("objective", ["dpo", "ipo"])
def test_gate_passes_for_the_other_objectives(
    objective: str, toys: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: DPO and IPO run on the same path; their loss at h = 0 is log 2 and (1 / (2 tau))^2 a stream.
    Oracle: closed form.
    """
    train.run(
        train.parse(
            bfpo(toys, tmp_path / "run", "--objective", objective, "--steps", "1", "--warmup", "0")
        ),
        world,
    )
    expected = 2 * (math.log(2) if objective == "dpo" else 4)
    assert losses(tmp_path / "run")[0] == pytest.approx(
        expected, rel=1e-4
    )  # h is 1e-5 nats of rounding, the targets are 2
    assert "step-0 gate" in capsys.readouterr().out


def test_cached_reference_gives_the_gradient_of_a_live_second_model(
    inputs: Path, world: World, finished: Path
) -> None:
    """Claim: a step's loss and gradient with the cached reference are those with a live pi_ref.

    Oracle: a second model, the file's rows.
    """
    config = replace(
        train.parse(flags(inputs, inputs / "unused")), dtype="float32", pack_tokens=1024
    )
    chat = train.Chat(inputs / "model")
    streams, _ = train.open_streams(config, chat, world)
    model, trained = train.build(config, inputs / "model", world)
    references = {
        name: train.reference_logprobs(model, "these", config, chat, world, name, stream)
        for name, stream in streams.items()
    }
    data = train.Rows(streams, references, chat)
    policy = load_file(finished / "model" / "model.safetensors")
    live, reference = (
        Mistral.from_pretrained(finished / "model"),
        Mistral.from_pretrained(inputs / "model"),
    )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(policy[name])
    items = data.draw(config.batch, config.seed, 3)
    outcome = train.forward_backward(model, config, data, items, world)

    trees = [data.tree(i) for i in items.tolist()]
    with torch.no_grad():
        ref = reference.logprobs(Pack.build(trees)).chunk(2)
    h = margin(*live.logprobs(Pack.build(trees)).chunk(2), *ref)
    rows = {
        (str(row["prompt"]), str(row[f"response_{row['better_response_id']}"])): row
        for row in pku_rows(random.Random(0), 70)
    }
    safe = []  # of the chosen and the rejected answer, read off the file's rows by their decoded text
    for tree, from_safety in zip(trees, [True] * 4 + [False] * 4, strict=True):
        prompt, chosen, _ = (chat.decode(part) for part in tree)
        row = (
            rows.get((prompt.split("<|user|>\n")[-1].split("\n")[0].strip(), chosen.strip()))
            if from_safety
            else None
        )
        assert (row is not None) == from_safety
        better = row["better_response_id"] if row else 0
        safe.append(
            [
                bool(row[f"is_response_{k}_safe"]) if row else True
                for k in (better, 1 - int(str(better)))
            ]
        )
    loss = bfpo_loss(h, label(*torch.tensor(safe).T, config.alpha, config.b1), config.tau)
    (loss.sum() / config.batch).backward()
    order = [outcome.items.tolist().index(i) for i in items.tolist()]
    # rel 1e-5, 1e-4: targets of 50 to 100 nats, log-probabilities that round at 1e-4 nats
    assert outcome.loss[order].tolist() == pytest.approx(loss.tolist(), rel=1e-5)
    expected = dict(live.named_parameters())
    for name, parameter in trained.items():
        ours = parameter.grad
        assert (ours - expected[name].grad).norm() <= 1e-4 * expected[name].grad.norm(), name


def test_reference_cache_is_reused_exactly_when_it_may_be(
    toys: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: another alpha, tau, b1, lr, seed, objective, batch or packing reads the cache; other
    weights (of the frozen part, too), tokenizer, chat format, lengths, data or dtype do not. A
    flipped bit and a cut file are noticed and mended.

    Oracle: what the run says it did, and the losses.
    """
    cache = tmp_path / "cache"
    few = (
        "--steps",
        "1",
        "--warmup",
        "0",
        "--safety",
        f"{toys}/pku[:80]",
        "--helpfulness",
        f"{toys}/ultrafeedback[:80]",
    )

    def computed(name: str, *more: str, model: Path = toys / "start") -> int:
        """How many of the four streams' references the run computed."""
        command = [
            *bfpo(toys, tmp_path / name, *few),
            "--cache",
            str(cache),
            "--model",
            str(model),
            *more,
        ]
        train.run(train.parse(command), world)
        output = capsys.readouterr().out
        figures = re.findall(
            r"reference of .* pairs: (\d+) rows from the cache .*, (\d+) computed", output
        )
        assert len(figures) == 4 and all("0" in pair for pair in figures)
        return sum(read == "0" for read, _ in figures)

    def model_with(name: str, change: Callable[[Path], None]) -> Path:
        shutil.copytree(toys / "start", tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def nudge(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(
            file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])
        )  # the sign or exponent of one frozen value

    def swap(folder: Path) -> None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["gather"], vocabulary["mix"] = vocabulary["mix"], vocabulary["gather"]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")

    assert computed("a") == 4
    same = (
        "--alpha",
        "0.4",
        "--tau",
        "0.1",
        "--b1",
        "4",
        "--lr",
        "1e-4",
        "--objective",
        "ipo",
    )
    assert (
        computed("b", *same, "--pack_tokens", "100", "--checkpoint_blocks", "--selective", "all")
        == 0
    )
    # With --steps another seed draws other rows; the held-out ones are the same.
    assert computed("b-seed", "--seed", "7") == 2
    template = tmp_path / "chat.jinja"
    template.write_text(
        train.Chat(toys / "start").template.replace("<|system|>", "<|user|>"), encoding="utf-8"
    )
    assert computed("c", "--chat_template", str(template)) == 4
    assert computed("d", "--max_length", "60", "--max_prompt", "20") == 4
    assert computed("e", "--dtype", "bfloat16") == 4
    assert computed("f", "--safety", f"{toys}/pku[:81]") == 2  # the helpfulness pairs are the same
    assert computed("g", model=model_with("nudged", nudge)) == 4
    assert computed("h", model=model_with("swapped", swap)) == 4
    assert computed("i", "--prefer", "safe") == 4

    files = sorted((cache / "reference").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)[
        :4
    ]  # of run a
    content = bytearray(files[0].read_bytes())
    content[content.rindex(b".") + 3] ^= 1  # a digit
    files[0].write_bytes(content)
    files[1].write_bytes(files[1].read_bytes()[:-100])
    command = [*bfpo(toys, tmp_path / "z", *few), "--cache", str(cache)]
    train.run(train.parse(command), world)
    output = capsys.readouterr().out
    assert (
        output.count("is damaged; computing it again") == 2
        and output.count(": 0 rows from the cache") == 2
    )
    assert losses(tmp_path / "z") == losses(tmp_path / "a")


def test_weights_are_summed_as_they_are_read(toys: Path, world: World, tmp_path: Path) -> None:
    """Claim: a file of weights that the model does not read is no part of what a run began with;
    one that it reads is, and so is the index. Oracle: the sums.
    """
    shutil.copytree(toys / "start", tmp_path / "model")
    before = storage.weights_sha256(tmp_path / "model", world)
    assert before == storage.weights_sha256(toys / "start", world)
    shutil.copyfile(
        tmp_path / "model" / "model.safetensors", tmp_path / "model" / "consolidated.safetensors"
    )
    assert storage.weights_sha256(tmp_path / "model", world) == before
    with open(tmp_path / "model" / "model.safetensors", "ab") as file:
        file.write(b"x")
    assert storage.weights_sha256(tmp_path / "model", world) != before
    index = tmp_path / "model" / "model.safetensors.index.json"
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "shard.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "shard.safetensors"}}), encoding="utf-8")
    indexed = storage.weights_sha256(tmp_path / "model", world)
    index.write_text(json.dumps({"weight_map": {"b": "shard.safetensors"}}), encoding="utf-8")
    assert storage.weights_sha256(tmp_path / "model", world) != indexed


def test_a_run_of_few_steps_computes_few_references(
    toys: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: with --steps the reference is computed for the rows that the steps draw, and no others;
    the steps are those of a run that has them all. Oracle: the rows that were scored; that run's
    losses, to 1e-5, as packs of other rows round otherwise.
    """
    scored: dict[str, list[int]] = {"safety": [], "helpfulness": []}
    true = train.score

    def counted(model, stream, world, budget, text, rows=None):  # type: ignore[no-untyped-def]
        if text.startswith("reference, ") and rows is not None and len(stream) == 400:
            scored[text.removeprefix("reference, ")] += rows
        return true(model, stream, world, budget, text, rows)

    monkeypatch.setattr(train, "score", counted)
    cache = ["--cache", str(tmp_path / "cache")]
    train.run(train.parse(bfpo(toys, tmp_path / "few", "--steps", "5", *cache)), world)
    for name, rows in scored.items():
        drawn = [batch_indices(400, 4, 42, step, name).tolist() for step in range(5)]
        assert sorted(rows) == sorted(chain(*drawn)) and len(rows) == 20
    monkeypatch.setattr(train, "rows_used", lambda *_: None)
    train.run(train.parse(bfpo(toys, tmp_path / "all", "--steps", "5", *cache)), world)
    assert drift(tmp_path / "few", tmp_path / "all") < 1e-5


def test_a_kill_in_the_reference_loses_one_part(
    toys: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: a stream's reference is kept part by part, so that a run which is killed in one goes
    on with it, to the same values. Oracle: the rows that are scored, and a reference in one part.
    """
    monkeypatch.setattr(train, "REFERENCE_ROWS", 30)
    config = train.parse(
        [
            *bfpo(toys, tmp_path / "run", "--safety", f"{toys}/pku[:80]"),
            "--cache",
            str(tmp_path / "cache"),
        ]
    )
    config = replace(config, dtype="float32", pack_tokens=1024)
    chat = train.Chat(toys / "start")
    stream = train.open_streams(config, chat, world)[0]["safety"]
    model, _ = train.build(config, toys / "start", world)
    scored, killed_at = list[range](), len(stream) // 30
    true = train.score

    def score(*given: object) -> torch.Tensor:
        if len(scored) == killed_at:
            raise KeyboardInterrupt
        scored.append(given[-1])  # type: ignore[arg-type]  # the rows
        return true(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "score", score)
    with pytest.raises(KeyboardInterrupt):
        train.reference_logprobs(model, "these", config, chat, world, "safety", stream)
    killed_at = 99
    found = train.reference_logprobs(model, "these", config, chat, world, "safety", stream)
    assert [i for rows in scored for i in rows] == list(range(len(stream))) and len(
        scored
    ) == math.ceil(len(stream) / 30) > 2
    torch.testing.assert_close(
        found, true(model, stream, world, 1024, "whole"), rtol=1e-5, atol=0
    )  # other packs round otherwise


def test_stages_chain_by_folder_names(
    toys: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: SFT -> BFPO -> red-teaming, each from the one before by its folder; red-teaming has
    one stream and 16 pairs a step.

    Oracle: what transformers says the last model's frozen and trained tensors are, against the
    first stage's.
    """
    rng = random.Random(2)
    columns = {"modeloutput1": "full", "modeloutput2": "refusal"}
    asked = language.requests(forbidden=True)[:40]
    team = [
        {
            "prompt": request.text,
            **{name: language.answer(request, kind, rng) for name, kind in columns.items()},
            "better_modelout": 1,
            "is_modelout1_safe": 0,
            "is_modelout2_safe": 1,
        }
        for request in asked
    ]
    (tmp_path / "team.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in team), encoding="utf-8"
    )
    train.run(train.parse(sft(toys, tmp_path / "sft", "--steps", "2")), world)
    train.run(
        train.parse(
            [
                *bfpo(toys, tmp_path / "bfpo", "--steps", "2"),
                "--model",
                str(tmp_path / "sft" / "model"),
            ]
        ),
        world,
    )
    capsys.readouterr()
    redteam = [
        "redteam",
        "--model",
        str(tmp_path / "bfpo" / "model"),
        "--safety",
        str(tmp_path / "team.jsonl"),
        *runs.usual(toys, tmp_path / "redteam"),
        "--warmup",
        "0",
    ]
    assert train.run(train.parse(redteam), world)["steps"] == 2
    row = log_of(tmp_path / "redteam")[0]
    assert (
        row["quadrants"].keys() == {"rejected_safe"}
        and row["quadrants"]["rejected_safe"]["pairs"] == 16
    )  # type: ignore[attr-defined,index]
    assert row["loss"] == row["safety_loss"] and "helpfulness_loss" not in row
    first, last = (
        load_file(tmp_path / stage / "model" / "model.safetensors") for stage in ("sft", "redteam")
    )
    assert {name for name in first if not torch.equal(first[name], last[name])} == {
        name for name in first if "down_proj" in name
    }


# --- dry runs and bad input -----------------------------------------------------------------------


def test_dry_run_checks_everything_and_writes_nothing(
    toys: Path,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Claim: --dry_run reads data and checkpoint headers, says how many steps there are, and makes
    no run folder; a tensor of another shape is found without reading it, and a disk too small.
    Oracle: the folders; config.json changed; bytes counted by hand.
    """
    command = bfpo(toys, tmp_path / "run", "--dry_run")
    assert train.run(train.parse(command), world) == {} and not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert "100 steps" in said and "disk up to 0.000257 GB" in said
    free = shutil.disk_usage(tmp_path)._replace(
        free=200_000
    )  # three checkpoints of 4,096 values and a model of 27,000 take 0.26 MB
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=r"needs 0\.000257 GB of disk"),
    ):
        patch.setattr(shutil, "disk_usage", lambda _: free)
        train.run(train.parse(command), world)
    shutil.copytree(toys / "start", tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "wide" / "config.json").write_text(
        json.dumps(config | {"intermediate_size": 65}), encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"down_proj.weight \(32, 64\) instead of \(32, 65\)"):
        train.run(train.parse([*command, "--model", str(tmp_path / "wide")]), world)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wide"]


def test_dry_run_of_the_toy_recipe(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: `train.py --dry_run` tries both stages, and the run folder, and leaves nothing behind."""
    train.run_toy(train.parse(["--dry_run", "--out", str(tmp_path / "run")]), world)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out.count("dry run") == 2
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="is no run folder"):
        train.run_toy(train.parse(["--dry_run", "--out", str(tmp_path)]), world)
    read = train.parse(
        ["--fresh", "--out", str(tmp_path), "--chat_template", str(tmp_path / "notes.txt")]
    )
    with pytest.raises(ValueError, match=r"must not hold what the run reads, got .*notes\.txt"):
        train.run_toy(read, world)


def test_fresh_toy_recipe_tries_its_stages_first(world: World, tmp_path: Path) -> None:
    """Claim: what a stage of the toy recipe refuses is said before --fresh sets the earlier run
    aside. Oracle: the folder.
    """
    command = [
        "--out",
        str(tmp_path / "run"),
        "--fresh",
        "--chat_template",
        str(tmp_path / "bad.jinja"),
    ]
    (tmp_path / "bad.jinja").write_text("{{", encoding="utf-8")
    config = train.parse(command)
    earlier = storage.RunFolder(tmp_path / "run", world)
    earlier.create(asdict(config), {}, fresh=False)
    assert earlier.lock is not None
    earlier.lock.close()
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(ValueError, match="must be valid jinja"):
        train.run_toy(config, world)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jinja", "run"]
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_a_run_folder_holds_no_cache_and_nobody_elses_files(
    toys: Path, world: World, tmp_path: Path
) -> None:
    """Claim: neither a folder with the cache in it becomes a run folder, which --fresh would
    remove, nor one with other files.
    """
    command = bfpo(toys, tmp_path / "run", "--steps", "2")
    for cache in ("cache", "some/cache"):
        with pytest.raises(ValueError, match=f"must not hold the cache .*run/{cache}"):
            train.run(train.parse([*command, "--cache", str(tmp_path / "run" / cache)]), world)
        assert not list(tmp_path.iterdir())
    for name in ("some", ".ssh"):
        (tmp_path / "run" / name).mkdir(parents=True)
        with pytest.raises(ValueError, match=rf"no run folder: it has no run\.json, but {name}"):
            train.run(train.parse(command), world)
        (tmp_path / "run" / name).rmdir()
    for name in (".lock", ".run.json.17"):  # what a run leaves that is killed at once
        (tmp_path / "run" / name).touch()
    assert train.run(train.parse([*command, "--dry_run"]), world) == {}


def test_sources_are_found_before_anything_is_fetched_or_tokenised(
    toys: Path, world: World, tmp_path: Path
) -> None:
    """Claim: a typo in the last source is said before a model is looked for and the first source
    read. Oracle: the message; no cache.
    """
    command = [
        *bfpo(toys, tmp_path / "run"),
        "--cache",
        str(tmp_path / "cache"),
        "--model",
        "nobody/nothing",
    ]
    command[command.index("--helpfulness") + 1] = "typo.jsonl"
    with pytest.raises(
        ValueError,
        match=r"a source must be an existing file or folder, or a hub data set, got typo\.jsonl",
    ):
        train.run(train.parse(command), world)
    assert not list(tmp_path.iterdir())


def test_flags_as_shells_give_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the ~ that a shell leaves in --out=~/run is the home folder; of a flag given twice the
    last counts. Oracle: the settings.
    """
    monkeypatch.setenv("HOME", "/home/someone")
    config = train.parse(["bfpo", "--safety", "a", "b", "--out=~/run", "--safety", "c"])
    assert config.safety == ("c",) and config.out == "/home/someone/run"


def test_other_settings_are_refused_by_name(finished: Path, inputs: Path, world: World) -> None:
    """Claim: the command with another tau on a folder with a run names tau and both values, and
    leaves the run alone.
    """
    config = train.parse(
        flags(inputs, finished, "--steps", "12", "--save_every", "7", "--tau", "0.02")
    )
    with pytest.raises(ValueError, match=r"tau was 0.01, now 0.02"):
        train.run(config, world)
    assert (finished / "done.json").exists()
    assert train.run(replace(config, tau=0.01), world)["steps"] == 12  # save_every may differ


def bad_inputs(inputs: Path, folder: Path) -> dict[str, tuple[list[str], str]]:
    """name -> (flags, what the message must hold)."""
    rows = pku_rows(random.Random(1), 6)
    (folder / "missing.jsonl").write_text(
        "\n".join(json.dumps(r) for r in [*rows[:3], {"prompt": "x"}]), encoding="utf-8"
    )
    wrong = [*rows[:2], rows[2] | {"is_response_0_safe": "yes"}]
    (folder / "label.jsonl").write_text("\n".join(json.dumps(r) for r in wrong), encoding="utf-8")
    shutil.copytree(inputs / "model", folder / "gpt")
    (folder / "gpt" / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "vocab_size": 5}), encoding="utf-8"
    )
    shutil.copytree(inputs / "model", folder / "cut")
    weights = sorted((folder / "cut").glob("*.safetensors"))[0]
    weights.write_bytes(weights.read_bytes()[:-1000])
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("keep", encoding="utf-8")
    return {
        "missing file": (["--safety", str(folder / "nowhere.jsonl")], "nowhere.jsonl"),
        "missing field": (["--safety", str(folder / "missing.jsonl")], "missing.jsonl:4"),
        "label type": (["--safety", str(folder / "label.jsonl")], "label.jsonl:3"),
        "not a Mistral": (["--model", str(folder / "gpt")], "gpt2"),
        "cut weights": (["--model", str(folder / "cut")], weights.name),
        "not a run folder": (["--out", str(folder / "notes")], "notes"),
        "a model in the run folder": (
            ["--out", str(inputs), "--fresh", "--cache", str(folder / "cache")],
            "must not hold what the run reads",
        ),
        "no GPU": (["--device", "cuda"], "no GPU"),
        "no such module": (["--selective", "downproj"], "no module named downproj"),
    }


def test_bad_input_is_one_clear_line(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Claim: each kind of bad input ends with exit code 1, one message that says what and where,
    and no run folder.

    Oracle: the list above. In this process, through main, because a process each would take a
    minute.
    """
    monkeypatch.setattr(
        distributed.dist, "destroy_process_group", lambda: None
    )  # the group belongs to this module's tests
    for name, (more, named) in bad_inputs(inputs, tmp_path).items():
        if name == "no GPU" and torch.cuda.is_available():
            continue
        out = tmp_path / "out"
        with pytest.raises(SystemExit) as exit_info:
            train.main(flags(inputs, out, *more))
        message = capsys.readouterr().err
        assert exit_info.value.code == 1, name
        assert named in message and message.count("error:") == 1 and "Traceback" not in message, (
            name,
            message,
        )
        assert not out.exists() and (tmp_path / "notes" / "mine.txt").exists(), name


def test_bad_input_under_torchrun_speaks_once(inputs: Path, tmp_path: Path) -> None:
    """Claim: with two processes, rank 0 alone says what is wrong, without a traceback, and nothing
    is left behind.
    """
    more, named = bad_inputs(inputs, tmp_path)["missing field"]
    done = launch(flags(inputs, tmp_path / "out", *more), processes=2)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    said = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(said) == 1 and named in done.stderr and 'train.py", line' not in done.stderr, (
        done.stderr
    )


# --- the toy recipe -------------------------------------------------------------------------------


def table_of(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith(("SFT ", "BFPO "))]


def test_toy_recipe_prints_its_table_again(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: the recipe runs both stages and prints one table; the command again prints the same
    and writes nothing. Oracle: itself.
    """
    config = train.parse(["--steps", "2", "--out", str(tmp_path / "toy")])
    result = train.run_toy(config, world)
    said = capsys.readouterr().out
    table = table_of(said)
    assert said.startswith("all four parts take about 26s")  # two steps of each stage
    report = json.loads((tmp_path / "toy" / "sft" / "data.json").read_text())["sft"]
    assert sum(part["training_rows"] for part in report["sources"]) == recipe.CONVERSATIONS
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert train.run_toy(config, world) == result
    assert len(table) == 2 and table_of(capsys.readouterr().out) == table
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    for wrong in (
        ["--batch", "4001"],
        ["--steps", "1"],
        ["--batch", "3000", "--epochs", "1"],
    ):  # before the first stage is trained
        with pytest.raises(ValueError, match=f"2 steps or more, got .*{wrong[0]} {wrong[1]}"):
            train.run_toy(train.parse([*wrong, "--out", str(tmp_path / "other")]), world)
    assert not (tmp_path / "other").exists()
    assert len(losses(tmp_path / "toy" / "sft")) == len(losses(tmp_path / "toy" / "bfpo")) == 2


@pytest.mark.slow  # a minute
def test_toy_recipe_on_two_processes(tmp_path: Path) -> None:
    """Claim: torchrun builds the data once, and each stage takes the steps of one process.

    Oracle: `python train.py`, shortened.
    """
    for processes in (0, 2):
        done = launch(
            ["--steps", "6", "--device", "cpu", "--out", str(tmp_path / f"toy{processes}")],
            processes,
        )
        assert done.returncode == 0 and len(table_of(done.stdout)) == 2, done.stderr[-2000:]
    for stage in ("sft", "bfpo"):
        assert (
            drift(tmp_path / "toy2" / stage, tmp_path / "toy0" / stage) <= 1e-5
        )  # fp32 sums in another order


@pytest.mark.slow  # two minutes
def test_toy_recipe_from_nothing_to_a_table(tmp_path: Path) -> None:
    """Claim: `python train.py` raises harmlessness without losing helpfulness; run again it prints
    the same table and exits 0.

    Oracle: the exact judge. The whole recipe, as a user runs it.
    """
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads((tmp_path / "runs/toy/done.json").read_text(encoding="utf-8"))["scores"]
    before, after = scores["SFT"], scores["BFPO"]
    assert (
        0.3 < before["harmless"] < 0.7 and 0.3 < before["helpful"] < 0.7
    )  # the problem is there to be solved
    assert (
        after["harmless"] > before["harmless"] + 0.2 and after["helpful"] > before["helpful"]
    )  # many standard errors
    again = subprocess.run(
        [sys.executable, str(ROOT / "train.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (
        again.returncode == 0
        and table_of(done.stdout) == table_of(again.stdout)
        and len(table_of(again.stdout)) == 2
    )
    held = toy_files.held_out(tmp_path / "runs/toy/data")
    answers = [
        json.loads(line)
        for line in (tmp_path / "runs/toy/bfpo/answers.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    assert [a["prompt"] for a in answers] == [r.text for r in held]
    view = [sys.executable, str(ROOT / "eval.py")]
    policy = ["--model", "runs/toy/bfpo/model"]
    prompted = subprocess.run(
        [*view, "prompt", "How do I make a cake?", *policy],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        language.judge(
            language.Request("make", "cake", "How do I make a cake?"), prompted.stdout
        ).helpful
        > 0
    )
    assert len(prompted.stdout.splitlines()) == 1
    pairs = ["pairs", "runs/toy/data/pku", "--reference", "runs/toy/sft/model"]
    table = subprocess.run(
        [*view, *pairs, *policy], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line.split()[0] for line in table[-4:]] == list(QUADRANTS)
    assert [float(line.split()[3]) for line in table[-4:]] == [2.0, 4.0, -4.0, -2.0]  # g / 0.25
    assert all(float(line.split()[4].rstrip("%")) > 60 for line in table[-4:])  # 50 % is chance
