"""Small faults put into the code one at a time; each must make a test fail.

    python tests/mutants.py                all of them, one for each core at a time
    python tests/mutants.py schedule       those of one subject
    python tests/mutants.py --check        none; whether each still has its place and its tests

A fault is (subject, file, text, its replacement); `text` occurs once in the file, so a fault whose
line has changed is an error, not a pass. Every fault is tried in a copy of the tracked files, by
its subject's tests. Exit code 1 when one survives, 2 when this list is out of date.
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
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
TESTS = {  # subject -> the tests that must notice
    "bfpo": ["tests/test_bfpo.py", "tests/test_bfpo_quadrants.py"],
    "mask": ["tests/test_pack.py", "tests/test_model.py", "-k", "not compile"],
    "kernels": ["tests/test_model.py", "-k", "blocked or swiglu or rms_norm"],
    "families": ["tests/test_model.py", "-k", "transformers and not absent"],
    "generation": ["tests/test_generate.py"],
    "schedule": [
        "tests/test_train.py",
        "tests/test_data.py",
        "-k",
        "learning_rate or batch or moves or permutation",
    ],
    "resume": ["tests/test_support_distributed.py"],
    "guards": ["-k", "finite or json or gate or rounds_away or clipping", "tests/test_train.py"],
    "optimizer": ["-k", "adamw", "tests/test_train.py"],
    "reference": ["-k", "reused", "tests/test_train.py"],
    "kept": [
        "tests/test_support_storage.py",
        "tests/test_data.py",
        "-k",
        "kept or part or cache",
        "-m",
        "",  # slow ones too
    ],
    "ranks": ["-k", "processes", "tests/test_support_distributed.py"],
    "truncation": ["tests/test_support_chat.py", "tests/test_data.py", "-k", "truncat"],
    "chat": [
        "tests/test_support_chat.py",
        "-k",
        "exported or transformers or answered or thinking or without_bos or served or spell"
        " or recorded",
    ],
    "tasks": ["tests/test_tasks_questions.py"],
    "report": ["tests/test_eval.py", "-m", ""],
}
MUTANTS = [
    # the label, the losses, the metrics, the optimum
    ("bfpo", "bfpo.py", "s_w.double() - s_l.double()", "s_w.double() + s_l.double()"),
    ("bfpo", "bfpo.py", "b1 * s_w.double() - s_l.double()", "b1 * s_l.double() - s_w.double()"),
    ("bfpo", "bfpo.py", "(b1 * s_w.double()", "(b1 - 1) / 2 * (b1 * s_w.double()"),
    ("bfpo", "bfpo.py", "return g.to(", "return (g + 2 * alpha).to("),
    ("bfpo", "bfpo.py", "(b1 * s_w.double() - s_l.double())", "(b1 * s_w - s_l)"),
    ("bfpo", "bfpo.py", "- (policy_rejected - ref_rejected)", "+ (policy_rejected - ref_rejected)"),
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
    ("bfpo", "bfpo.py", "logsigmoid(tau * h)", "logsigmoid(-tau * h)"),
    ("bfpo", "bfpo.py", "h.sign() * g.sign() > 0", "h > 0"),
    ("bfpo", "bfpo.py", "h.sign() * g.sign() > 0", "h.sign() * g.sign() >= 0"),
    ("bfpo", "bfpo.py", "s_w & ~s_l, ~s_w & s_l,", "~s_w & s_l, s_w & ~s_l,"),
    ("bfpo", "bfpo.py", "math.isfinite(tau) and tau > 0", "math.isfinite(tau) and tau >= 0"),
    ("bfpo", "bfpo.py", "math.isfinite(b1) and b1 > 1", "math.isfinite(b1) and b1 >= 1"),
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
    ("schedule", "train.py", "math.ceil(warmup * steps)", "math.floor(warmup * steps)"),
    ("schedule", "train.py", "if step < rising:", "if step <= rising:"),
    ("schedule", "train.py", "return peak * step / rising", "return peak * (step + 1) / rising"),
    ("schedule", "train.py", "(step - rising) / max(1, steps - rising)", "step / max(1, steps)"),
    ("schedule", "train.py", "peak * 0.5 * (1 + math.cos(", "peak * 0.5 * (1 - math.cos("),
    ("schedule", "data.py", "range(step * batch, (step + 1) * batch)", "range(step, step + batch)"),
    ("schedule", "data.py", "place // size)[place % size]", "0)[place % size]"),
    # going on after a kill
    ("resume", "train.py", 'moments["step"].fill_(first)', 'moments["step"].fill_(0)'),
    ("resume", "train.py", "for step in range(first, steps):", "for step in range(0, steps):"),
    ("resume", "train.py", "done % config.save_every == 0 or ", ""),
    ("resume", "support/storage.py", "reversed(world.from_main(", "list(world.from_main("),
    ("resume", "support/storage.py", "range(world.size)) != sums:", "range(world.size)) == {}:"),
    ("resume", "support/storage.py", 'int(manifest["step"])', 'int(manifest["step"]) + 1'),
    ("resume", "support/storage.py", 'row["step"] < step', 'row["step"] <= step'),
    (
        "resume",
        "support/storage.py",
        "enter_context(whole(target))",
        "enter_context(whole(folder))",
    ),
    ("resume", "support/storage.py", "    discard(aside)\n    path.rename(", "    path.rename("),
    ("resume", "support/storage.py", "settings, inputs, False", "settings, inputs, True"),
    ("resume", "support/storage.py", "self.whole = path.resolve()", "self.whole = path.absolute()"),
    # what stops a run, and what it keeps
    ("guards", "train.py", ' and math.isfinite(row["grad_norm"])', ""),
    (
        "guards",
        "train.py",
        'if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):',
        "if False:",
    ),
    ("guards", "train.py", "(h / root).square().sum()", "torch.zeros(())"),
    ("guards", "train.py", "if not (equal_share <= 1 and", "if not (True and"),
    ("guards", "train.py", "if config.clip_norm:", "if False:"),
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
        "if bad := not_finite(logprobs, name, stream, chat, rows):",
        "if False:",
    ),
    ("guards", "train.py", "if losses and math.isfinite(loss)", "if losses"),
    ("guards", "bfpo.py", "masks_QN & h.isfinite()", "masks_QN"),
    ("guards", "data.py", "budget > 1 and not logprobs.isfinite().all()", "False"),
    ("guards", "support/storage.py", "json.dumps(row, allow_nan=False)", "json.dumps(row)"),
    # the optimizer
    ("optimizer", "train.py", "weight_decay=0.0", "weight_decay=0.01"),
    ("optimizer", "train.py", "betas=(0.9, 0.999)", "betas=(0.9, 0.99)"),
    ("optimizer", "train.py", "betas=(0.9, 0.999)", "betas=(0.95, 0.999)"),
    ("optimizer", "train.py", "eps=1e-8", "eps=1e-7"),
    ("optimizer", "train.py", "optimizer.zero_grad()", "pass"),
    # who sees whom in a pack, where its tokens stand, and which row predicts which
    ("mask", "model.py", " & ((branch[j] == 0) | (branch[j] == branch[i]))", ""),
    ("mask", "model.py", "(tree[i] == tree[j]) & (", "("),
    ("mask", "model.py", "(branch[j] == 0) | (branch[j] == branch[i])", "branch[j] == branch[i]"),
    ("mask", "model.py", "(positions[j] <= positions[i])", "(positions[j] < positions[i])"),
    ("mask", "model.py", "(positions[j] > oldest[i])", "(positions[j] >= oldest[i])"),
    ("mask", "model.py", "(j <= i) & (j > i - window)", "(j <= i) & (j >= i - window)"),
    ("mask", "model.py", "before = len(tree[0]) if b else 0", "before = 0"),
    ("mask", "model.py", "rows[0] = prompt_end - 1", "pass"),
    (
        "mask",
        "support/kernels.py",
        "max(0, own + i + 1 - window)",
        "max(0, own + i + 2 - window)",
    ),
    ("mask", "support/kernels.py", "window is not None and own + end - window > first", "False"),
    # the autograd functions
    ("kernels", "support/kernels.py", "(dq, ctx.T), cos, -sin)", "(dq, ctx.T), cos, sin)"),
    ("kernels", "support/kernels.py", "cos_keys, -sin_keys)", "cos_keys, sin_keys)"),
    (
        "kernels",
        "support/kernels.py",
        "torch.addcmul(b * cos, a, sin)",
        "torch.addcmul(b * cos, a, sin, value=-1)",
    ),
    ("kernels", "support/kernels.py", "dk[:, tokens] = dkeys", "dk[:, tokens] += dkeys"),
    ("kernels", "support/kernels.py", "dv[:, tokens] = dvalues", "pass"),
    ("kernels", "support/kernels.py", "-math.inf).triu()", "-math.inf).triu(1)"),
    ("kernels", "support/kernels.py", "keys if b else slice(", "keys if False else slice("),
    ("kernels", "support/kernels.py", "dgate.addmm_(dgate_part.mT", "dgate.addmm_(dup_part.mT"),
    ("kernels", "support/kernels.py", "dup.addmm_(dup_part.mT", "dup.addmm_(dgate_part.mT"),
    (
        "kernels",
        "support/kernels.py",
        "(dgate_part @ gate).addmm_(dup_part, up)",
        "dgate_part @ gate",
    ),
    ("kernels", "support/kernels.py", ".div_(-x.shape[-1])", ".div_(x.shape[-1])"),
    ("kernels", "support/kernels.py", "mul_(scale**3)", "mul_(scale**2)"),
    ("kernels", "support/kernels.py", "(dout * exact).mul_(scale)", "dout * exact"),
    # what the families differ in
    ("families", "model.py", "bias = config.family.qkv_bias", "bias = False"),
    ("families", "model.py", "if config.family.qk_norm:", "if False:"),
    ("families", "model.py", "self.q_norm(q), self.k_norm(k), v", "self.q_norm(q), k, v"),
    ("families", "model.py", ".clamp(0, 1)", ".clamp(0, 2)"),
    ("families", "model.py", "(1 - blend) * frequency / factor", "(1 - blend) * frequency"),
    # generation
    ("generation", "model.py", "counts - 1]", "-1]"),
    ("generation", "model.py", "self.lengths[rows] += counts", "self.lengths[rows] += n"),
    ("generation", "model.py", "draws = draws[kept]", "pass"),
    ("generation", "model.py", "self.lengths = self.lengths[rows]", "pass"),
    ("generation", "model.py", "answer.pop()", "pass"),
    ("generation", "model.py", "mass - p < top_p", "mass < top_p"),
    ("generation", "model.py", "repeat_interleave(group, 1)", "repeat(1, group, 1)"),
    # what is cut from a pair that is too long
    (
        "truncation",
        "support/chat.py",
        "np.concatenate([prompt[:front], prompt[len(prompt) - max_prompt + front :]])",
        "prompt[len(prompt) - max_prompt :]",
    ),
    ("truncation", "support/chat.py", "max_prompt + front :]", "max_prompt :]"),
    ("truncation", "support/chat.py", "max_prompt + front :]", "max_prompt + 1 :]"),
    (
        "truncation",
        "support/chat.py",
        "prompt[len(prompt) - max_prompt + front :]",
        "prompt[front:max_prompt]",
    ),
    ("truncation", "data.py", "len(chat.front)", "1"),
    (
        "truncation",
        "support/chat.py",
        "> max_length and len(prompt) > max_prompt",
        ">= max_length and len(prompt) > max_prompt",
    ),
    ("truncation", "support/chat.py", "> max_length and len(prompt) > max_prompt", "> max_length"),
    (
        "truncation",
        "support/chat.py",
        "if len(prompt) + longest > max_length:",
        "if len(prompt) + longest >= max_length:",
    ),
    ("truncation", "support/chat.py", "max(map(len, responses))", "min(map(len, responses))"),
    ("truncation", "support/chat.py", "max_length - max_prompt]", "max_length - len(prompt)]"),
    ("truncation", "support/chat.py", "[: max_length - max_prompt]", "[max_prompt - max_length :]"),
    # training's prompts are a server's
    (
        "chat",
        "support/chat.py",
        'front + re.sub(r"^[ \\t]+(?=\\{[%#])", "", self.template)',
        "front + self.template",
    ),
    ("chat", "support/chat.py", "front = NO_THINKING", 'front = ""'),
    ("chat", "support/chat.py", "and NO_THINKING not in self.template", ""),
    ("chat", "support/chat.py", "else [self.bos_id]", "else [self.eos_id]"),
    (
        "chat",
        "support/chat.py",
        "[] if self.bos_id is None",
        "[self.eos_id] if self.bos_id is None",
    ),
    ("chat", "support/chat.py", "token.special or used or", "token.special or"),
    ("chat", "support/chat.py", "return [[ids[:1], ids[1:]]", "return [[bos, ids]"),
    ("chat", "support/chat.py", "if not {a, b, a + b} & spelling.keys()", ""),
    ("chat", "support/chat.py", "self._seam = self._seal", "pass"),
    ("chat", "support/chat.py", "header[:end], *(text[start:]", "header[:end], *(text[end:]"),
    ("chat", "support/chat.py", "return front + end if end", "return text if end"),
    (
        "chat",
        "support/chat.py",
        "ids[1:] if len(ids) and ids[0] == self.bos_id else ids",
        "ids[ids != self.bos_id]",
    ),
    ("chat", "support/chat.py", "text.startswith(header.rstrip())", "True"),
    # when the reference's cache may be read
    (
        "reference",
        "train.py",
        "weights, stream.fingerprint, config.dtype,",
        "stream.fingerprint, config.dtype,",
    ),
    (
        "reference",
        "train.py",
        "weights, stream.fingerprint, config.dtype,",
        "weights, config.dtype,",
    ),
    (
        "reference",
        "train.py",
        "weights, stream.fingerprint, config.dtype,",
        "weights, stream.fingerprint,",
    ),
    (
        "reference",
        "train.py",
        "weights, stream.fingerprint, config.dtype,",
        "config.lr, weights, stream.fingerprint, config.dtype,",
    ),
    ("kept", "support/storage.py", 'part["sha256"] == digest(part["rows"])', "True"),
    ("kept", "support/storage.py", "if others is not None:", "if False:"),
    ("kept", "support/storage.py", ".stat().st_size != size", ".stat().st_size == 0"),
    ("kept", "support/storage.py", "range(len(rows), min(", "range(0, min("),
    # several processes
    ("ranks", "train.py", "scale = world.size / ", "scale = 1 / "),
    # the benchmark: requests, metrics, rows kept, statistics
    ("tasks", "eval.py", "[context.rstrip() for", "[context for"),
    ("tasks", "eval.py", "front = [chat.prefix_id]", "front = chat.front if bos else []"),
    ("tasks", "eval.py", "front = [chat.prefix_id]", "front = chat.front"),
    ("tasks", "eval.py", "ids[-longest - 1 :]", "ids[: longest + 1]"),
    ("tasks", "data.py", "range(1, most):", "reversed(range(1, most)):"),
    (
        "tasks",
        "tasks/metrics.py",
        "int(np.argmax(row)) in question.right",
        "len(row) - 1 - int(np.argmax(row[::-1])) in question.right",
    ),
    ("tasks", "tasks/metrics.py", "value / len(choice)", "value / len(choice.encode())"),
    (
        "tasks",
        "tasks/questions.py",
        "random.Random(better).shuffle(order)",
        "random.Random(0).shuffle(order)",
    ),
    ("tasks", "tasks/metrics.py", "self.delimiter + choice)", "choice)"),
    ("tasks", "tasks/metrics.py", "if not b.any():", "if False:"),
    ("tasks", "tasks/metrics.py", "wrong.mean() * s + s.mean()", "s + s.mean()"),
    ("tasks", "tasks/questions.py", "text(row, 'question').strip()", "text(row, 'question')"),
    ("tasks", "tasks/questions.py", 'answer if answer.endswith(".") else', "answer if answer else"),
    ("report", "data.py", "seeds=[seed + i for i in numbers]", "seeds=[seed for _ in numbers]"),
    ("report", "eval.py", "part, seed + numbers.start", "part, seed"),
    ("report", "tasks/judges.py", 'self.__dict__.pop("model", None)', "pass"),
    ("report", "eval.py", 'verdict["harm"] <= 0.5', 'verdict["harm"] > 0.5'),
    ("report", "tasks/report.py", "task.averaged or next(iter(every))", "next(iter(every))"),
    (
        "report",
        "tasks/report.py",
        '1.0 if p["low"] <= 0.5 <= p["high"] else max(ends)',
        "max(ends)",
    ),
    ("report", "tasks/metrics.py", "metric in SHARES and all(", "all("),
    ("report", "eval.py", "longest + len(front) :]", "longest :]"),
    ("report", "eval.py", "for name in TARGETS} | given", "for name in TARGETS}"),
    ("report", "eval.py", "if not all(map(math.isfinite, row)):", "if False:"),
    ("tasks", "tasks/questions.py", 'return row.keys() == {"text"}', "return False"),
    ("report", "tasks/report.py", "more = [*terms, 1.0, -1.0]", "more = [*terms]"),
    ("report", "tasks/report.py", "math.hypot(*gaps) / len(parts)", "math.hypot(*gaps)"),
]


def misplaced() -> list[str]:
    """The faults whose text is not once in their file, in words."""
    found = []
    for subject, name, text, _ in MUTANTS:
        path = ROOT / name
        count = path.read_text(encoding="utf-8").count(text) if path.exists() else 0
        if count != 1:
            found.append(f"{subject}: {name} must hold {text!r} once, got {count} times")
    return found


def untested() -> list[str]:
    """The subjects whose tests cannot be collected, in words."""
    found = []
    for subject, tests in TESTS.items():
        command = [*PYTEST, "--collect-only", *tests]
        if subprocess.run(command, cwd=ROOT, capture_output=True).returncode:
            found.append(f"{subject}: pytest finds no tests with {' '.join(tests)}")
    return found


def survives(mutant: tuple[str, str, str, str]) -> bool:
    """Whether the subject's tests pass in spite of the fault."""
    subject, name, text, replacement = mutant
    with tempfile.TemporaryDirectory() as folder:
        tracked = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for path in tracked.stdout.split():
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, Path(folder) / path)
        source = (ROOT / name).read_text(encoding="utf-8")
        (Path(folder) / name).write_text(source.replace(text, replacement), encoding="utf-8")
        try:
            outcome = subprocess.run(
                [*PYTEST, "--basetemp", f"{folder}/tmp", *TESTS[subject]],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        except subprocess.TimeoutExpired:
            return False  # a hang is noticed too
    if outcome.returncode not in (0, 1):
        said = outcome.stdout[-2000:] + outcome.stderr[-2000:]
        raise ValueError(f"the tests of {subject} could not run:\n{said}")
    return outcome.returncode == 0


def main(subjects: list[str]) -> int:
    checks_only = subjects == ["--check"]
    chosen = [mutant for mutant in MUTANTS if not subjects or mutant[0] in subjects]
    if not chosen and not checks_only:
        print(f"no such subject; there are {', '.join(TESTS)}")
        return 2
    wrong = misplaced() + (untested() if checks_only else [])
    if wrong or checks_only:
        print("\n".join([*wrong, f"{len(wrong)} places to bring up to date"]))
        return 2 if wrong else 0
    alive = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for mutant, alive_now in zip(chosen, pool.map(survives, chosen), strict=True):
            _, name, text, replacement = mutant
            alive += alive_now
            verdict = "SURVIVES" if alive_now else "caught  "
            print(f"{verdict}  {name}: {text} -> {replacement}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} faults caught")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
