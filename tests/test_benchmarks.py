"""The benchmarks' own logic. gpu.py without a GPU: what it holds a timing back for, what it counts,
and that no part takes the others with it; what step.py, growth.py and where.py put side by side;
what is written where.
"""

import copy
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_flops import CONFIG, LENGTHS, exact_pairs, minimum

from model import Config, Mistral
from support import memory_plan

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import common
import gpu
import growth
import step
import where

TREES = gpu.pairs_of(
    np.random.default_rng(0), [(40, 30, 12), (1, 1, 1), (7, 20, 33)], CONFIG.vocab_size
)


def sharp_model() -> Mistral:
    model = Mistral(CONFIG)
    model.init_weights(0)
    for p in model.parameters():  # as the check does: 0.02 leaves attention almost flat
        p.data = p.data.mul(4 if p.dim() == 2 else 1).bfloat16().float()
    return model


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.0), (torch.bfloat16, 1e-3)])
def test_check_finds_agreement(dtype: torch.dtype, least: float) -> None:
    """Claim: log-probabilities and gradients agree with an fp32 copy's, and with padded rows',
    within what the precision leaves. Oracle: that copy, and SDPA; a bfloat16 that was none would
    agree better than its 8 bits allow.
    """
    oracle = sharp_model()
    rows = gpu.agreement(copy.deepcopy(oracle).to(dtype), oracle, TREES)
    assert [row["against"].split(",")[0] for row in rows] == ["BlockedAttention", "padded SDPA"]
    assert all(
        least <= row["largest_error"] <= gpu.AGREE[row["dtype"]] and row["tokens"] == 145
        for row in rows
    )
    assert rows[1]["largest_error"] > 0  # two computations, not one twice
    assert gpu.disagreement(rows) == ""


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("wrong", [1.02, float("nan")])
def test_check_names_what_is_wrong(name: str, wrong: float) -> None:
    """Claim: one value of a weight that is 2 % off, or not a number, is a disagreement with words
    for it. Oracle: put in by hand.
    """
    oracle = sharp_model()
    model = copy.deepcopy(oracle)
    weight = model.get_parameter(name).data.view(-1)
    weight[weight.abs().argmax()] *= wrong
    rows = gpu.agreement(model, oracle, TREES)
    assert "float32, pack of 145 tokens" in gpu.disagreement(
        rows
    ) and "BlockedAttention" in gpu.disagreement(rows)


def test_a_missing_or_infinite_tensor_is_infinitely_off() -> None:
    """Claim: neither passes for agreement, whatever comes before or after it. Oracle: by hand."""
    ones = {name: torch.ones(2) for name in "abc"}
    assert gpu.difference(ones, ones)[0] == 0
    assert gpu.difference(ones | {"b": torch.tensor([1.0, float("nan")])}, ones) == (
        float("inf"),
        "b",
    )
    assert gpu.difference({name: ones[name] for name in "ac"}, ones) == (float("inf"), "b")
    assert gpu.difference(ones | {"c": 1.5 * ones["c"]}, ones) == (0.5, "c")


def test_useful_operations_are_the_arithmetic() -> None:
    """Claim: the count is that of a step, with no score computed twice. Oracle: test_flops' closed
    form, which the counter of torch agrees with.
    """
    assert gpu.useful(CONFIG, np.array(LENGTHS)) == minimum(LENGTHS, True, exact_pairs(LENGTHS))


def test_kernels_have_kinds() -> None:
    """Claim: kernels as a GPU's profile names them are told apart. Oracle: by hand."""
    names = {
        "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT": "matrix products",
        "triton_tem_fused_flex_attention_backward_3": "attention",
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90>": "attention",
        "Memcpy DtoD (Device -> Device)": "copies",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "matrix products",
        "ncclDevKernel_AllGather_RING_LL": "collectives",
        "void at::native::vectorized_elementwise_kernel<8, at::native::silu_backward>": "pointwise and other",
    }
    assert {name: gpu.kind_of(name) for name in names} == names


@pytest.mark.slow  # twenty seconds: a process a part
def test_parts_are_reported_each_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: a part that is killed and one that never ends are reported with what they had said,
    the others are measured, and each is merged into results.json beside what was there. Oracle: a
    worker that kills itself, one that sleeps; the real ones, tiny, on a CPU.
    """
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"step": {"kept": 1}}), encoding="utf-8")
    monkeypatch.setattr(common, "RESULTS", results)
    real = gpu.worker_command

    def command(part: str, tiny: bool, out: Path) -> list[str]:
        says = f'open({str(out)!r}, \'w\').write(\'{{"doing": "row 2", "rows": [1]}}\');'
        ends = {
            "train20": "import os; os.kill(os.getpid(), 9)",
            "attention": "import time; time.sleep(600)",
        }
        return [sys.executable, "-c", says + ends[part]] if part in ends else real(part, tiny, out)

    monkeypatch.setattr(gpu, "worker_command", command)
    monkeypatch.setitem(gpu.PARTS, "attention", (gpu.attention, 6))
    found = gpu.measure(
        ["step", "train20", "attention", "profile", "compiled"],
        True,
        300,
        partial(common.record_part, "gpu", "parts"),
    )
    assert list(found) == ["check", "step", "train20", "attention", "profile", "compiled"]
    assert found["check"]["disagreement"] == "" and len(found["check"]["rows"]) == 20
    assert found["train20"]["failed"] == "row 2: exit code -9" and found["train20"]["rows"] == [1]
    assert found["attention"]["failed"] == "row 2: stopped after 6 s"
    assert "not_measured" in found["compiled"]
    assert {(row["pack_tokens"], row["checkpoint_blocks"]) for row in found["step"]["rows"]} == {
        (tokens, again) for tokens in gpu.TINY.packs for again in (False, True)
    }
    for row in found["step"]["rows"]:
        pairs = 2 * gpu.TINY.batch * gpu.TINY.timed
        assert row["pairs_per_s"] * row["step_s"] * gpu.TINY.timed == pytest.approx(pairs)
        assert row["useful_share"] * row["step_s"] * gpu.TINY.timed * found["step"][
            "product_tflop_per_s"
        ] * 1e12 == pytest.approx(row["useful_operations"])
        assert (
            row["plan_bytes"] > 0 and "allocated_bytes" not in row
        )  # a CPU has no such count, and none is made up
    assert (
        sum(found["profile"]["milliseconds"].values())
        >= sum(row["milliseconds"] for row in found["profile"]["top"])
        > 0
    )
    written = json.loads(results.read_text(encoding="utf-8"))
    assert written["step"] == {"kept": 1} and set(written["gpu"]["parts"]) == set(found)
    assert written["gpu"]["parts"]["step"]["rows"] == found["step"]["rows"]
    text = gpu.table(found)
    assert (
        "failed: row 2: exit code -9" in text
        and "largest relative error" in text
        and "useful" in text
    )


def test_nothing_is_timed_after_a_check_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a check that disagrees, or dies, leaves every part unmeasured, with the reason.

    Oracle: both put in its place.
    """
    results: dict[str, dict[str, Any]] = {
        "disagreement": {"disagreement": "k_proj is off"},
        "failed": {"failed": "exit code 1"},
    }
    for key, found in results.items():
        monkeypatch.setattr(gpu, "run_part", lambda *_, found=found: found)
        parts = gpu.measure(["step", "trl_best"], True, 300, lambda *_: None)
        assert [list(parts[name]) for name in ("step", "trl_best")] == [["not_measured"]] * 2
        assert found[key] in parts["step"]["not_measured"]


def test_parts_of_other_hardware_leave_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: figures of one machine and its versions are never listed under another's.

    Oracle: a record whose GPU is another.
    """
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results.json")
    common.record_part("gpu", "parts", "step", {"a": 1})
    common.record_part("gpu", "parts", "trl_best", {"b": 2})
    written = json.loads(common.RESULTS.read_text(encoding="utf-8"))
    assert (
        set(written["gpu"]["parts"]) == {"step", "trl_best"}
        and written["gpu"]["parts"]["step"]["a"] == 1
    )
    written["gpu"]["hardware"]["gpu"] = "another"
    common.RESULTS.write_text(json.dumps(written), encoding="utf-8")
    common.record_part("gpu", "parts", "trl_best", {"b": 3})
    assert set(json.loads(common.RESULTS.read_text(encoding="utf-8"))["gpu"]["parts"]) == {
        "trl_best"
    }


@pytest.mark.parametrize("fits", [2, 1, 0])
def test_a_batch_that_does_not_fit_is_halved_and_said(
    fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: TRL's pairs at a time are halved until they fit, and the report has those that did
    not; none is not measured. Oracle: a trainer in its place that runs out of memory over so many.
    """
    pytest.importorskip("trl")
    said: dict[str, Any] = {}

    def steps(scale: Any, device: str, best: bool, at_once: int, say: Any) -> None:
        say(pairs_at_once=at_once, pairs_per_s=2.0)
        if at_once > fits:
            assert f"2 pairs/s, {at_once} pairs at a time" in gpu.table({"trl_best": said})
            raise torch.OutOfMemoryError
        say(pairs_per_s=3.0)

    monkeypatch.setattr(gpu, "trl_steps", steps)
    if fits == 0:
        with pytest.raises(gpu.NotMeasured, match="one pair at a time does not fit"):
            gpu.PARTS["trl_best"][0](gpu.TINY, "cpu", said.update)
        assert (
            said["pairs_per_s"] is None
        )  # what a step of more pairs took is not what the report ends with
    else:
        gpu.PARTS["trl_best"][0](gpu.TINY, "cpu", said.update)
        assert (
            said["pairs_at_once"] == fits
            and said["did_not_fit"] == [2][: 2 - fits]
            and said["pairs_per_s"] == 3.0
        )


def test_steps_are_said_as_they_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a part of many steps that is stopped has reported those it did.

    Oracle: tiny runs whose report ends them after two steps.
    """

    def stop_after(done: Any, said: dict[str, Any], **more: Any) -> None:
        said.update(more)
        if done(said) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(
        gpu.train, "load_weights", gpu.train.load_weights
    )  # gpu.py puts another in its place: undone at the end
    train20: dict[str, Any] = {}
    with pytest.raises(KeyboardInterrupt):
        gpu.train20(
            gpu.TINY, "cpu", partial(stop_after, lambda said: len(said.get("losses", ())), train20)
        )
    assert "2 of 3 steps" in gpu.table({"train20": train20}) and train20["plan_bytes"] > 0
    pytest.importorskip("trl")
    best: dict[str, Any] = {}
    with pytest.raises(KeyboardInterrupt):
        gpu.PARTS["trl_best"][0](
            gpu.TINY, "cpu", partial(stop_after, lambda said: said.get("timed_steps", 0), best)
        )
    assert (
        best["pairs_per_s"] * best["step_s"] == pytest.approx(2 * gpu.TINY.batch)
        and best["attention"] == "sdpa"
    )


# --- step, growth, where --------------------------------------------------------------------------


def test_products_of_a_step_are_the_plan_s_operations() -> None:
    """Claim: where.py times all the matrix products of a selective step, and no other.

    Oracle: plan.operations of the same pack.
    """
    config = Config(*step.SIZES["30M"], sliding_window=None)
    trained = frozenset(name for name in config.shapes() if "down_proj" in name)
    heads = config.num_attention_heads
    load = memory_plan.Load(
        config.shapes(), heads, trained, torch.float32, "cpu", tokens=900, scored=500
    )
    timed = sum(
        2.0 * n * a * b
        for shapes in where.products(config, 900, 500).values()
        for n, a, b in shapes
    )
    assert timed == sum(memory_plan.operations(load))


def test_growth_changes_one_thing_at_a_time() -> None:
    """Claim: pairs have the tokens that the axis says; the longest pair grows at the same real
    tokens of a step. Oracle: the axis.
    """
    points = growth.series()
    assert all(sum(pair) == 600 for pairs in points["share"].values() for pair in pairs)
    assert all(
        abs(pair[0] - 6 * place) <= 1 for place, pairs in points["share"].items() for pair in pairs
    )
    assert all(sum(pair) == place for place, pairs in points["length"].items() for pair in pairs)
    for place, pairs in points["longest"].items():
        assert abs(sum(map(sum, pairs)) - 2400) <= 3 and abs(max(map(sum, pairs)) - 24 * place) <= 1
    assert [len(pairs) for pairs in points["pairs"].values()] == list(growth.PAIRS)
    assert points["pairs"][4] == points["pairs"][16][:4]


@pytest.mark.slow  # half a minute: a group of processes
def test_a_sharded_step_is_measured(tmp_path: Path) -> None:
    """Claim: growth.py's own process group trains, and gives seconds on the clock and of all
    processors; the picture is drawn. Oracle: both are above zero.
    """
    common.write_model(tmp_path / "model", Config(*growth.MODEL))
    point = growth.sharded(tmp_path, 2)
    assert point["place"] == 2 and point["wall_s"] > 0 and point["cpu_s"] > 0
    growth.draw(
        [
            point,
            *(
                {"series": name, "place": place, "side": side, "cpu_s": 1.0, "memory_mib": 2.0}
                for name, places in growth.series().items()
                for place in places
                for side in growth.SIDES
            ),
        ],
        tmp_path / "growth.png",
    )
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_figures_of_one_script_leave_the_others_in_results_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: record replaces its own entry alone, with where it was measured. Oracle: the file."""
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results.json")
    common.record("load", {"rounds": [1]})
    common.record("step", {"runs": 1})
    common.record("step", {"runs": 2})
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["load"]["rounds"] == [1] and found["step"]["runs"] == 2
    assert found["step"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_table_of_fast_forms_is_its_record() -> None:
    """Claim: every time and every size in the table of fast forms is the one that kernels.py
    measured. Oracle: results.json.
    """
    results = json.loads(common.RESULTS.read_text(encoding="utf-8"))
    page = (common.RESULTS.parent.parent / "docs/performance.md").read_text(encoding="utf-8")
    forms = {
        "BlockedAttention": "attention of a pack",
        "SwiGLU": "feed-forward",
        "RMSNorm": "norm",
        "RowLogProbs": "log-probabilities",
    }
    for form, formula in forms.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{form}` |")]
        cells = [cell.strip() for cell in line.split("|")[3:-1]]
        expected = []
        for size in ("30M", "4M"):
            ratios = results[f"kernels {size} float32 down_proj"]["formulas"][formula]["ratios"]
            median = statistics.median(ratios)
            expected.append(f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        for kind in ("float32 down_proj", "bfloat16 down_proj", "bfloat16 all"):
            figures = results[f"kernels 30M {kind}"]["formulas"][formula]
            expected.append(f"{figures['kept_mib_of_formula']:.0f}")
        assert cells == expected, form


def test_table_of_scoring_is_its_record() -> None:
    """Claim: the table of score.py's figures is what it measured. Oracle: results.json."""
    record = json.loads(common.RESULTS.read_text(encoding="utf-8"))["score"]
    page = (common.RESULTS.parent.parent / "docs/performance.md").read_text(encoding="utf-8")
    for task, figures in record["tasks"].items():
        pairs = list(zip(figures["lm_eval_s"], figures["ours_s"], strict=True))
        ratios = sorted(theirs / ours for theirs, ours in pairs)
        theirs, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
        apart = f"{figures['most_nats_apart']:.0e}".replace("e-0", "e-")
        row = (
            f"| `{task}` | {figures['choices']} | {theirs:.1f} | {ours:.1f} | "
            f"{figures['times_faster']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {apart} |"
        )
        assert row in page, row
    assert f"| {record['times_faster']:.2f} | |" in page
