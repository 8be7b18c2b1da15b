"""Small faults put into the code one at a time; each must make a test fail.

    python tests/mutants.py                all of them, one for each core at a time
    python tests/mutants.py schedule       those of one subject

A fault is (subject, file, text, its replacement); `text` occurs once in the file, so a fault whose
line has changed is an error, not a pass. Every fault is tried in a copy of the tracked files, by
its subject's tests. Exit code 1 when one survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 900
TESTS = {  # subject -> the tests that must notice
    "bfpo": ["tests/test_bfpo.py", "tests/test_quadrants.py"],
    "mask": ["tests/test_pack.py", "tests/test_model.py", "-k", "not compile"],
    "kernels": ["tests/test_model.py", "-k", "blocked or kept or swiglu or rms_norm"],
    "schedule": [
        "tests/test_train.py",
        "tests/test_data.py",
        "-k",
        "learning_rate or batch or moves or permutation",
    ],
    "resume": ["tests/test_runtime.py"],
    "guards": ["-k", "finite or json or gate or rounds_away or clipping", "tests/test_train.py"],
    "optimizer": ["-k", "adamw", "tests/test_train.py"],
    "reference": ["-k", "reused or at_once", "tests/test_train.py"],
    "ranks": ["-k", "processes", "tests/test_runtime.py"],
    "truncation": ["tests/test_chat.py", "tests/test_data.py", "-k", "truncat"],
    "chat": ["tests/test_chat.py", "-k", "exported or transformers or answered"],
    "tasks": ["tests/test_tasks.py"],
    "report": ["tests/test_eval.py"],
}
MUTANTS = [
    # the label, the losses, the metrics, the optimum
    (
        "bfpo",
        "bfpo.py",
        "(b1 * s_w.double() - s_l.double()) / (b1 - 1) - alpha",
        "(b1 * s_w.double() + s_l.double()) / (b1 - 1) - alpha",
    ),
    (
        "bfpo",
        "bfpo.py",
        "(b1 * s_w.double() - s_l.double()) / (b1 - 1) - alpha",
        "(b1 * s_l.double() - s_w.double()) / (b1 - 1) - alpha",
    ),
    (
        "bfpo",
        "bfpo.py",
        "(b1 * s_w.double() - s_l.double()) / (b1 - 1) - alpha",
        "(b1 * s_w.double() - s_l.double()) / 2 - alpha",
    ),
    (
        "bfpo",
        "bfpo.py",
        "(b1 * s_w.double() - s_l.double()) / (b1 - 1) - alpha",
        "(b1 * s_w.double() - s_l.double()) / (b1 - 1) + alpha",
    ),
    ("bfpo", "bfpo.py", "(b1 * s_w.double() - s_l.double())", "(b1 * s_w - s_l)"),
    (
        "bfpo",
        "bfpo.py",
        "(policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)",
        "(policy_chosen - ref_chosen) + (policy_rejected - ref_rejected)",
    ),
    (
        "bfpo",
        "bfpo.py",
        "(policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)",
        "(policy_chosen - ref_rejected) - (policy_rejected - ref_chosen)",
    ),
    ("bfpo", "bfpo.py", "return (h - g / tau) ** 2", "return (h - g * tau) ** 2"),
    ("bfpo", "bfpo.py", "return (h - g / tau) ** 2", "return (h - g / tau).abs()"),
    ("bfpo", "bfpo.py", "torch.full_like(h, 0.5)", "torch.full_like(h, 1.0)"),
    ("bfpo", "bfpo.py", "logsigmoid(tau * h)", "logsigmoid(h)"),
    (
        "bfpo",
        "bfpo.py",
        "-torch.nn.functional.logsigmoid(tau * h)",
        "-torch.nn.functional.logsigmoid(-tau * h)",
    ),
    ("bfpo", "quadrants.py", "h.sign() * g.sign() > 0", "h > 0"),
    ("bfpo", "quadrants.py", "h.sign() * g.sign() > 0", "h.sign() * g.sign() >= 0"),
    (
        "bfpo",
        "quadrants.py",
        "[s_w & s_l, s_w & ~s_l, ~s_w & s_l, ~s_w & ~s_l]",
        "[s_w & s_l, ~s_w & s_l, s_w & ~s_l, ~s_w & ~s_l]",
    ),
    (
        "bfpo",
        "bfpo.py",
        "if not (math.isfinite(tau) and tau > 0)",
        "if not (math.isfinite(tau) and tau >= 0)",
    ),
    (
        "bfpo",
        "bfpo.py",
        "if not (math.isfinite(b1) and b1 > 1)",
        "if not (math.isfinite(b1) and b1 >= 1)",
    ),
    ("bfpo", "bfpo.py", "- 2 * alpha * helpful_A", "- alpha * helpful_A"),
    (
        "bfpo",
        "bfpo.py",
        "preference_AA @ (reference_A * safe_A)",
        "preference_AA.T @ (reference_A * safe_A)",
    ),
    ("bfpo", "bfpo.py", "(safe_A + safe_share - 2 * alpha)", "(safe_A - safe_share - 2 * alpha)"),
    ("bfpo", "bfpo.py", "softmax(log_reference_A + reward_A / tau", "softmax(reward_A / tau"),
    # the learning rate, and which rows a step holds
    (
        "schedule",
        "train.py",
        "math.ceil(warmup * steps)\n    if",
        "math.floor(warmup * steps)\n    if",
    ),
    ("schedule", "train.py", "if step < rising:", "if step <= rising:"),
    ("schedule", "train.py", "return peak * step / rising", "return peak * (step + 1) / rising"),
    ("schedule", "train.py", "(step - rising) / max(1, steps - rising)", "step / max(1, steps)"),
    ("schedule", "train.py", "peak * 0.5 * (1 + math.cos(", "peak * 0.5 * (1 - math.cos("),
    ("schedule", "data.py", "range(step * batch, (step + 1) * batch)", "range(step, step + batch)"),
    (
        "schedule",
        "data.py",
        "_permutation(size, seed, name, place // size)[place % size]",
        "_permutation(size, seed, name, 0)[place % size]",
    ),
    # going on after a kill
    ("resume", "train.py", 'moments["step"].fill_(first)', 'moments["step"].fill_(0)'),
    ("resume", "train.py", "for step in range(first, steps):", "for step in range(0, steps):"),
    (
        "resume",
        "train.py",
        "if done % config.save_every == 0 or done == steps or",
        "if done == steps or",
    ),
    (
        "resume",
        "storage.py",
        'for path in reversed(world.from_main(lambda: sorted(folder.glob("step-*")))):',
        'for path in world.from_main(lambda: sorted(folder.glob("step-*"))):',
    ),
    (
        "resume",
        "storage.py",
        'for name in found["sha256"]], world) != found["sha256"]',
        'for name in found["sha256"]], world) == {}',
    ),
    ("resume", "storage.py", 'return int(found["step"])', 'return int(found["step"]) + 1'),
    ("resume", "storage.py", 'if row["step"] < step)', 'if row["step"] <= step)'),
    (
        "resume",
        "storage.py",
        'target, aside = folder / f"step-{step:08d}", folder / f".step-{step:08d}"',
        'target, aside = folder / f"step-{step:08d}", folder / f"step-{step:08d}"',
    ),
    (
        "resume",
        "storage.py",
        "    shutil.rmtree(aside, ignore_errors=True)\n    os.replace(path, aside)",
        "    os.replace(path, aside)",
    ),
    (
        "resume",
        "storage.py",
        "                self._refuse_other(settings, False)",
        "                pass",
    ),
    (
        "resume",
        "storage.py",
        'self.path / "run.json", self.path.resolve()  # the',
        'self.path / "run.json", self.path  # the',
    ),
    # what stops a run, and what it keeps
    (
        "guards",
        "train.py",
        'if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):',
        'if not math.isfinite(row["loss"]):',
    ),
    (
        "guards",
        "train.py",
        'if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):',
        "if False:",
    ),
    (
        "guards",
        "rows.py",
        "[x.max().item() if len(x) else 0.0 for x in (h / allowed, h)]",
        "[x[0].item() for x in (h / allowed, h)]",
    ),
    ("guards", "rows.py", "if not (ratio <= 1 and", "if not (True and"),
    ("guards", "train.py", "            if config.clip_norm:", "            if False:"),
    ("guards", "train.py", "if changed < 0.1 * total:", "if changed < 0:"),
    (
        "guards",
        "train.py",
        "changed += int((local.to(dtype) != before.to(local.device, dtype)).sum())",
        "changed += int((local != before.to(local.device)).sum())",
    ),
    (
        "guards",
        "train.py",
        "if bad := not_finite(logprobs, name, stream, chat, rows.start):",
        "if False:",
    ),
    ("guards", "train.py", "if losses and math.isfinite(loss)", "if losses"),
    ("guards", "quadrants.py", "masks_QN & h.isfinite()", "masks_QN"),
    ("guards", "eval.py", "if bad and budget > 1:", "if False:"),
    ("guards", "storage.py", "if whole and found.isfinite().all():", "if whole:"),
    ("guards", "storage.py", "json.dumps(row, allow_nan=False)", "json.dumps(row)"),
    # the optimizer
    ("optimizer", "train.py", "weight_decay=0.0)", "weight_decay=0.01)"),
    ("optimizer", "train.py", "betas=(0.9, 0.999)", "betas=(0.9, 0.99)"),
    ("optimizer", "train.py", "betas=(0.9, 0.999)", "betas=(0.95, 0.999)"),
    ("optimizer", "train.py", "eps=1e-8", "eps=1e-7"),
    ("optimizer", "train.py", "            optimizer.zero_grad()", "            pass"),
    # who sees whom in a pack, where its tokens stand, and which row predicts which
    (
        "mask",
        "model.py",
        "mine = (tree[i] == tree[j]) & ((branch[j] == 0) | (branch[j] == branch[i]))",
        "mine = tree[i] == tree[j]",
    ),
    ("mask", "model.py", "mine = (tree[i] == tree[j]) & (", "mine = ("),
    ("mask", "model.py", "(branch[j] == 0) | (branch[j] == branch[i])", "branch[j] == branch[i]"),
    ("mask", "model.py", "(positions[j] <= positions[i])", "(positions[j] < positions[i])"),
    ("mask", "model.py", "(positions[j] > oldest[i])", "(positions[j] >= oldest[i])"),
    ("mask", "model.py", "(j <= i) & (j > i - window)", "(j <= i) & (j >= i - window)"),
    ("mask", "model.py", "index - start + before", "index - start"),
    (
        "mask",
        "model.py",
        "rows = np.where(index == start, prompt_end, index - 1)[scored]",
        "rows = (index - 1)[scored]",
    ),
    ("mask", "kernels.py", "max(0, i + ahead + 1 - window)", "max(0, i + ahead + 2 - window)"),
    (
        "mask",
        "kernels.py",
        "cut = window is not None and end + ahead - window > first",
        "cut = False",
    ),
    # the autograd functions
    ("kernels", "kernels.py", "rotated(dq, cos, -sin)", "rotated(dq, cos, sin)"),
    ("kernels", "kernels.py", "rotated(dk, cos_keys, -sin_keys)", "dk"),
    (
        "kernels",
        "kernels.py",
        "torch.addcmul(b * cos, a, sin)",
        "torch.addcmul(b * cos, a, sin, value=-1)",
    ),
    (
        "kernels",
        "kernels.py",
        "                        x[:, span] = part",
        "                        x[:, span] += part",
    ),
    ("kernels", "kernels.py", "            if len(spans) > 1:", "            if False:"),
    ("kernels", "kernels.py", "p.shape[-1] <= limit", "p.shape[-1] < limit"),
    ("kernels", "kernels.py", "kept.append(p if", "kept.insert(0, p if"),
    ("kernels", "kernels.py", "alike: bool = False", "alike: bool = True"),
    (
        "kernels",
        "kernels.py",
        "((dgate, dgate_part), (dup, dup_part))",
        "((dgate, dup_part), (dup, dgate_part))",
    ),
    ("kernels", "kernels.py", "(dgate_part @ gate).addmm_(dup_part, up)", "dgate_part @ gate"),
    ("kernels", "kernels.py", ".div_(-x.shape[-1])", ".div_(x.shape[-1])"),
    ("kernels", "kernels.py", "mul_(scale**3)", "mul_(scale**2)"),
    ("kernels", "kernels.py", "(dout * exact).mul_(scale)", "dout * exact"),
    # what is cut from a pair that is too long
    (
        "truncation",
        "chat.py",
        "np.concatenate([prompt[:1], prompt[len(prompt) - max_prompt + 1:]])",
        "prompt[len(prompt) - max_prompt:]",
    ),
    (
        "truncation",
        "chat.py",
        "prompt[len(prompt) - max_prompt + 1:]",
        "prompt[len(prompt) - max_prompt:]",
    ),
    ("truncation", "chat.py", "prompt[len(prompt) - max_prompt + 1:]", "prompt[1:max_prompt]"),
    (
        "truncation",
        "chat.py",
        "> max_length and len(prompt) > max_prompt",
        ">= max_length and len(prompt) > max_prompt",
    ),
    ("truncation", "chat.py", "> max_length and len(prompt) > max_prompt", "> max_length"),
    (
        "truncation",
        "chat.py",
        "if len(prompt) + longest > max_length:",
        "if len(prompt) + longest >= max_length:",
    ),
    (
        "truncation",
        "chat.py",
        "longest = max(map(len, responses))",
        "longest = min(map(len, responses))",
    ),
    (
        "truncation",
        "chat.py",
        "response[:max_length - max_prompt]",
        "response[:max_length - len(prompt)]",
    ),
    (
        "truncation",
        "chat.py",
        "response[:max_length - max_prompt]",
        "response[max_prompt - max_length:]",
    ),
    # training's prompts are a server's
    ("chat", "chat.py", '"{{ bos_token }}" + unindented', '"{{ bos_token }}" + self.template'),
    (
        "chat",
        "chat.py",
        "return [ids[1:] if len(ids) and ids[0] == self.bos_id else ids for",
        "return [ids[ids != self.bos_id] for",
    ),
    ("chat", "chat.py", "text.startswith(header.rstrip()) for", "True for"),
    # when the reference's cache may be read
    (
        "reference",
        "train.py",
        "[weights, stream.fingerprint, config.dtype,",
        "[stream.fingerprint, config.dtype,",
    ),
    (
        "reference",
        "train.py",
        "[weights, stream.fingerprint, config.dtype,",
        "[weights, config.dtype,",
    ),
    (
        "reference",
        "train.py",
        "[weights, stream.fingerprint, config.dtype,",
        "[weights, stream.fingerprint,",
    ),
    (
        "reference",
        "train.py",
        "[weights, stream.fingerprint, config.dtype,",
        "[config.lr, weights, stream.fingerprint, config.dtype,",
    ),
    ("reference", "storage.py", 'sha256_of(found) == file.metadata()["sha256"]', "True"),
    (
        "reference",
        "storage.py",
        "            if (found := read()) is not None:",
        "            if False:",
    ),
    # several processes
    ("ranks", "train.py", "scale = world.size / ", "scale = 1 / "),
    # the benchmark: requests, metrics, rows kept, statistics
    (
        "tasks",
        "eval.py",
        "bare = [context.rstrip() for context, _ in requests]",
        "bare = [context for context, _ in requests]",
    ),
    ("tasks", "eval.py", "[chat.bos_id] * (bos or not context)", "[chat.bos_id] * bos"),
    (
        "tasks",
        "eval.py",
        "(front + tail)[-longest - 1 :][: -len(tail)]",
        "(front + tail)[: longest + 1][: -len(tail)]",
    ),
    (
        "tasks",
        "eval.py",
        "order = sorted((branch, t, slot) for",
        "order = list((branch, t, slot) for",
    ),
    (
        "tasks",
        "metrics.py",
        "int(np.argmax(row)) in question.right",
        "len(row) - 1 - int(np.argmax(row[::-1])) in question.right",
    ),
    ("tasks", "metrics.py", "value / len(choice) for", "value / len(choice.encode()) for"),
    (
        "tasks",
        "tasks.py",
        "random.Random(better).shuffle(order)",
        "random.Random(0).shuffle(order)",
    ),
    ("tasks", "metrics.py", "[(context, self.delimiter + choice)", "[(context, choice)"),
    ("tasks", "metrics.py", "        if not b.any():", "        if False:"),
    ("tasks", "metrics.py", "wrong.mean() * s + s.mean()", "s + s.mean()"),
    ("tasks", "tasks.py", "text(row, 'question').strip()", "text(row, 'question')"),
    ("tasks", "tasks.py", 'answer if answer.endswith(".") else', "answer if answer else"),
    (
        "report",
        "storage.py",
        "                if number < len(stored):  # no kill did that",
        "                if True:",
    ),
    ("report", "storage.py", "compute(range(len(rows), min(", "compute(range(0, min("),
    ("report", "eval.py", "seeds=[seed + i for i in mine]", "seeds=[seed for _ in mine]"),
    ("report", "eval.py", "seed=seed + numbers.start", "seed=seed"),
    ("report", "eval.py", '        self.__dict__.pop("model", None)', "        pass"),
    ("report", "eval.py", 'verdict["harm"] <= 0.5', 'verdict["harm"] > 0.5'),
    ("report", "report.py", "TASKS[name].averaged or first", "first"),
    ("report", "report.py", "1.0 if low <= 0.5 <= high else max(ends)", "max(ends)"),
    ("report", "report.py", "metric in SHARES and all(", "all("),
    ("report", "eval.py", "max(0, len(front) + len(rest) - longest)", "len(front) - longest"),
    ("report", "report.py", "more = [*terms, 1.0, -1.0]", "more = [*terms]"),
    ("report", "report.py", "math.hypot(*gaps) / len(parts)", "math.hypot(*gaps)"),
]


def survives(mutant: tuple[str, str, str, str]) -> bool:
    """Whether the subject's tests pass in spite of the fault."""
    subject, name, text, replacement = mutant
    with tempfile.TemporaryDirectory() as folder:
        for path in subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split():
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, Path(folder) / path)
        source = (ROOT / name).read_text(encoding="utf-8")
        if source.count(text) != 1:
            raise ValueError(
                f"{name} must hold {text!r} once, got {source.count(text)} times; bring this mutant up to date"
            )
        (Path(folder) / name).write_text(source.replace(text, replacement), encoding="utf-8")
        pytest = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            "--basetemp",
            f"{folder}/tmp",
        ]
        command = [*pytest, *TESTS[subject]]
        try:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            outcome = subprocess.run(
                command,
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return False  # a hang is noticed too
    if outcome.returncode not in (0, 1):
        raise ValueError(
            f"the tests of {subject} could not run:\n{outcome.stdout[-2000:]}{outcome.stderr[-2000:]}"
        )
    return outcome.returncode == 0


def main(subjects: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not subjects or mutant[0] in subjects]
    if not chosen:
        print(f"no such subject; there are {', '.join(TESTS)}")
        return 2
    alive = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for mutant, alive_now in zip(chosen, pool.map(survives, chosen), strict=True):
            alive += alive_now
            print(
                f"{'SURVIVES' if alive_now else 'caught  '}  {mutant[1]}: {mutant[2]} -> {mutant[3]}",
                flush=True,
            )
    print(f"{len(chosen) - alive} of {len(chosen)} faults caught")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
