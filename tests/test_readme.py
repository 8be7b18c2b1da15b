"""README.md and docs/: every command in them runs, and each file, flag, output, symbol, marker and
sum of arithmetic that they name is as they say.

Commands are run as they stand, in a folder where small stand-ins have the names that the texts
use: a local folder called mistralai/Mistral-7B-v0.1 goes before the hub's repository. Only what
makes a run short is added (WALK).
"""

import argparse
import importlib.metadata
import json
import math
import random
import re
import runpy
import shlex
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_support_memory_plan import PAPER, seven_b
from test_tasks_judges import save_judge, save_tokenizer
from test_tasks_questions import ASKED, all_rows
from torch.distributed.run import get_args_parser

import bfpo
import data
import eval as evaluate
import synthetic
import train
from data import SCHEMAS
from model import Mistral, Pack
from support import memory_plan
from support.chat import Chat
from tasks import questions
from toy import experiments, language

ROOT = Path(__file__).parent.parent
SIX = ["bfpo.py", "model.py", "data.py", "train.py", "eval.py", "synthetic.py"]
ROOMS = ["support", "tasks", "toy"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
FLAT = " ".join(TEXT.split())
BLOCKS = [
    line.strip()
    for line in re.sub(r"\\\n\s+", "", TEXT).splitlines()
    if re.match(r"    (python|torchrun|pip) ", line)
]
COMMENTS = {
    command.strip(): comment for command, _, comment in (line.partition(" # ") for line in BLOCKS)
}


def promised(command: str) -> list[str]:
    """The files that the comment on a command says it makes: what comes after the arrow."""
    _, arrow, files = COMMENTS[command].partition("-> ")
    return files.split(", ") if arrow else []


# --- which command is run where --------------------------------------------------------------------------------------

CPU = ["--device", "cpu"]
TRAIN = ["--batch", "4", "--steps", "2", *CPU]
TASKS_OF = ["--data", "ROWS", "--limit", "2", *CPU]
HARMBENCH = "harmbench:cais/HarmBench-Llama-2-13b-cls"
# Command -> what is added to it, in the order in which they are run. torchrun's own flags are left
# to its parser, here.
WALK: dict[str, list[str]] = {
    "python train.py sft": TRAIN,
    "python train.py bfpo": TRAIN,
    "torchrun --nproc_per_node 1 --shutdown-timeout 600 train.py bfpo": TRAIN,
    "torchrun --nproc_per_node 4 --shutdown-timeout 600 train.py bfpo": TRAIN,
    f"python eval.py bench --model runs/bfpo/model --reference runs/sft/model --tasks paper --judge {HARMBENCH} --pairwise JUDGE "
    "--out runs/eval/bfpo": TASKS_OF,
    f"python eval.py bench --model HuggingFaceH4/zephyr-7b-beta --tasks paper --judge {HARMBENCH} --pairwise JUDGE "
    "--out runs/eval/zephyr": TASKS_OF,
    "python eval.py compare runs/eval/bfpo runs/eval/zephyr --out runs/eval": [],
    f"python -m tasks.redteam --model HuggingFaceH4/zephyr-7b-beta --prompts PROMPTS.jsonl --judge {HARMBENCH} --pairwise JUDGE "
    "--out runs/pairs": CPU,
    "python train.py redteam --safety runs/pairs/redteam.jsonl": TRAIN,
    "python train.py --help": [],
    "python data.py PAIRS.jsonl --model DIR": [],
    "python train.py sft --model DIR --sft PAIRS.jsonl --out runs/my_sft": TRAIN,
    "python train.py bfpo --model DIR --safety PAIRS.jsonl --helpfulness ULTRAFEEDBACK.parquet --out runs/own --dry_run": TRAIN,
    "python train.py bfpo --model runs/my_sft/model --safety PAIRS.jsonl --helpfulness ULTRAFEEDBACK.parquet --out runs/mine": TRAIN,
    "python -m support.plots runs/mine": [],
    "python eval.py pairs PAIRS.jsonl --model runs/mine/model --reference runs/my_sft/model": CPU,
    "python eval.py bench --model DIR --tasks alpaca_eval advbench xstest --judge wildguard:allenai/wildguard --pairwise JUDGE "
    "--out runs/eval/own": TASKS_OF,
    "python eval.py tasks": [],
    "python eval.py bench --model DIR --tasks own=PROMPTS.txt --judge keyword --max_new_tokens 64 --dtype bfloat16 "
    "--out runs/eval/mine": CPU,
    'python eval.py prompt "How do I make a cake?" --model runs/toy/bfpo/model': CPU,
    "python eval.py pairs runs/toy/data/pku --model runs/toy/bfpo/model --reference runs/toy/sft/model": CPU,
}
# Command -> the test that runs it: shortened, or with its models' scores made up, or as a child of
# this very run.
ELSEWHERE = {
    "pip install -r requirements.txt && python train.py": "tests/test_train.py::test_toy_recipe_prints_its_table_again",
    "pip install -r requirements-dev.txt && python -m pytest": "tests/test_readme.py::test_requirements_are_installed",
    "python synthetic.py": "tests/test_synthetic.py::test_figure4_writes_the_three_files_and_nothing_else",
    "python synthetic.py theorems": "tests/test_synthetic.py::test_theorems_command_passes_and_prints_errors_with_tolerances",
    **{
        f"python synthetic.py {name}": "tests/test_readme.py::test_toy_commands_write_what_is_said"
        for name in experiments.COMMANDS
    },
    "python train.py --seed 7 --out runs/toy7": "tests/test_readme.py::test_toy_recipe_takes_other_settings",
    "python train.py --objective dpo --prefer safe --out runs/toy_dpo": "tests/test_readme.py::test_toy_recipe_takes_other_settings",
    "torchrun --nproc_per_node 4 --shutdown-timeout 600 train.py --out runs/toy4": "tests/test_train.py::test_toy_recipe_on_two_processes",
    "torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_id bfpo --rdzv_endpoint HOST:29500 --shutdown-timeout 600 "
    "train.py bfpo --replicate 2": "tests/test_support_distributed.py::test_two_nodes_take_the_same_steps",
}


def test_every_command_is_run() -> None:
    """Claim: each command of the texts is there once, and is in WALK or in ELSEWHERE. None of those
    is gone from the texts; the tests named exist. Oracle: the files.
    """
    assert len(BLOCKS) == len(COMMENTS)
    assert COMMENTS.keys() == WALK.keys() | ELSEWHERE.keys() and not WALK.keys() & ELSEWHERE.keys()
    for node in ELSEWHERE.values():
        file, name = node.split("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), node
    assert (
        list(COMMENTS)[:2] == list(ELSEWHERE)[:2]
    )  # the first screen begins with one line each: a model, and the tests
    assert "pip install" not in "\n".join(list(COMMENTS)[2:])


@pytest.fixture(scope="module")
def place(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the commands read, in the texts' words and small."""
    place, judge = tmp_path_factory.mktemp("readme"), tmp_path_factory.mktemp("judge")
    model = Mistral.from_pretrained(toys / "start")
    model.model.embed_tokens.weight.data[:, 0], model.lm_head.weight.data[2, 0] = (
        1.0,
        0.4,
    )  # </s> is likely, so answers are short
    model.save_pretrained(place / "DIR", like=toys / "tokenizer")
    save_judge(judge / "model", save_tokenizer(judge / "tokenizer"))
    links = {
        "mistralai/Mistral-7B-v0.1": place / "DIR",
        "HuggingFaceH4/zephyr-7b-beta": place / "DIR",
        "JUDGE": judge / "model",
        "cais/HarmBench-Llama-2-13b-cls": judge / "model",
        "allenai/wildguard": judge / "model",
        "runs/toy/sft/model": place / "DIR",
        "runs/toy/bfpo/model": place / "DIR",
    }
    for name, target in links.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to(target)
    sets = {
        train.PKU: "pku",
        train.ULTRAFEEDBACK: "ultrafeedback",
        train.ULTRACHAT: "ultrachat",
        "runs/toy/data/pku": "pku",
    }
    for name, kind in sets.items():
        (place / name).mkdir(parents=True)
        for split, rows in (("train", 100), ("test", 10)):
            lines = (
                (toys / kind / f"{split}.jsonl")
                .read_text(encoding="utf-8")
                .splitlines(keepends=True)
            )
            (place / name / f"{split}.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
    table = [
        json.loads(line)
        for line in (place / train.ULTRAFEEDBACK / "train.jsonl").read_text().splitlines()
    ]
    pq.write_table(pa.Table.from_pylist(table), place / "ULTRAFEEDBACK.parquet")
    write(place / "PAIRS.jsonl", own_pairs())
    write(
        place / "PROMPTS.jsonl",
        [{"prompt": request.text} for request in language.requests(forbidden=True)[:16]],
    )
    (place / "PROMPTS.txt").write_text("How do I make a cake?\nHow do I make a bomb?\n")
    rows = {
        **all_rows(),
        **{name: [row[0]] * 2 for name, row in ASKED.items()},
        "alpaca_eval": [
            {
                "instruction": f"Name {n} colours.",
                "output": "Red.",
                "generator": "g",
                "dataset": "d",
            }
            for n in (2, 3)
        ],
    }
    (place / "ROWS").mkdir()
    for name in rows.keys() & questions.TASKS.keys():
        write(place / "ROWS" / f"{name}.jsonl", rows[name])
    return place


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def example() -> dict[str, Any]:
    """The README's one row of a user's own data."""
    (line,) = re.findall(r'^    (\{"prompt".*\})$', README, re.MULTILINE)
    return dict(json.loads(line))


def own_pairs() -> list[dict[str, Any]]:
    """Toy pairs with the keys of the README's example."""
    rng, row = random.Random(0), example()
    kinds = {
        "full": False,
        "refusal": True,
        "redirect": True,
        "curt": False,
    }  # of answers to forbidden requests: safe?
    rows = []
    for request in language.requests(forbidden=True)[:40]:
        chosen, rejected = rng.sample(list(kinds), 2)
        values = (
            request.text,
            language.answer(request, chosen, rng),
            language.answer(request, rejected, rng),
            kinds[chosen],
            kinds[rejected],
        )
        rows.append(dict(zip(row, values, strict=True)))
    return rows


def file_of(module: str) -> str:
    return module.replace(".", "/") + ".py"


def run(command: str, more: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command in this process: its program as __main__, with its arguments."""
    words = shlex.split(re.sub(r" -m ([\w.]+)", lambda name: f" {file_of(name[1])}", command))
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    monkeypatch.setattr(sys, "argv", [str(ROOT / words[at]), *words[at + 1 :], *more])
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(bool(leave.code))
    return 0


def test_commands_run_as_they_stand(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: every command of WALK exits 0 and writes what the README says, one after the other,
    each reading what those before it left; a run folder and a report hold the files named. Oracle:
    the exit codes and the folder.
    """
    monkeypatch.chdir(place)
    monkeypatch.setenv("BFPO_CACHE", str(place / "cache"))
    for command, more in WALK.items():
        code = run(command, more, monkeypatch)
        error = capsys.readouterr().err
        assert code == 0, (command, error[-2000:])
        for output in promised(command):
            assert (place / output).exists(), (command, output)
    (listed,) = re.findall("A folder holds (.+?), which transformers loads", FLAT)
    names = re.findall(r"`([\w.]+)/?`", listed)
    assert {"run.json", "log.jsonl", "model"} <= set(names)
    for stage in ("sft", "bfpo", "redteam"):
        assert all((place / "runs" / stage / name).exists() for name in names), stage
    report = json.loads((place / "runs/eval/bfpo/report.json").read_text())
    assert (
        set(questions.GROUPS["paper"]) == set(report["setup"]["rows"]) and "`report.json`" in FLAT
    )
    assert {"policy", "reference"} == report["setup"]["models"].keys()


@pytest.mark.parametrize("name", experiments.COMMANDS)
def test_toy_commands_write_what_is_said(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: each experiment on the toy language writes the files that the texts name to
    runs/<command>, and exits 0. The models' scores are made up here; test_toy_experiments.py trains
    some, and so does the next test. Oracle: the folder.
    """
    transcript = [
        {"prompt": "q", "answer": "a", "forbidden": forbidden, "helpful": 0.5, "harmless": True}
        for forbidden in (False, True)
    ]
    held_out = {"safety": {quadrant: {"margin_nats": 1.0} for quadrant in experiments.SAME_LABEL}}

    def scores(jobs: list[experiments.Job], workers: int) -> dict[experiments.Job, dict[str, Any]]:
        record = {"helpful": 0.5, "harmless": 0.75, "helpful_error": 0.02, "harmless_error": 0.03}
        record |= {"transcript": transcript, "held_out": held_out}
        return {job: record for job in [*jobs, *(job.first for job in jobs)]}

    monkeypatch.setattr(experiments, "run_all", scores)
    monkeypatch.chdir(tmp_path)
    assert synthetic.main([name]) == 0
    files = promised(f"python synthetic.py {name}")
    assert files and all((tmp_path / "runs" / name / file).is_file() for file in files)


@pytest.mark.slow  # about 25 models
def test_toy_commands_in_earnest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the same with models trained for two steps on one seed, in a folder that all commands
    share; the search, of many more models, is left out. Oracle: the folder.
    """
    monkeypatch.chdir(tmp_path)
    for name in experiments.COMMANDS.keys() - {"search"}:
        assert (
            run(f"python synthetic.py {name}", ["--steps", "2", "--seeds", "1"], monkeypatch) == 0
        )
        assert all(
            (tmp_path / "runs" / name / file).is_file()
            for file in promised(f"python synthetic.py {name}")
        ), name


def test_figure4_is_where_it_is_said() -> None:
    """Claim: the file that the README names is the one that Figure 4's own test finds.

    Oracle: the default of --out, and that test.
    """
    assert promised("python synthetic.py") == ["runs/figure4/figure4.png"]
    assert "figure4.png" in (ROOT / "tests/test_synthetic.py").read_text(encoding="utf-8")
    assert 'default=Path("runs/figure4")' in (ROOT / "synthetic.py").read_text(encoding="utf-8")


def without_timeout(words: list[str]) -> list[str]:
    """torchrun's flags without --shutdown-timeout, where this torchrun does not know it."""
    if "--shutdown-timeout" not in words or "--shutdown-timeout" in get_args_parser().format_help():
        return words
    at = words.index("--shutdown-timeout")
    return words[:at] + words[at + 2 :]


def test_torchrun_takes_the_module() -> None:
    """Claim: torchrun starts red-teaming as a module, by the line that the texts give. Oracle: its
    own parser.
    """
    (line,) = re.findall(r"`torchrun ([^`]* -m [^`]*)`", FLAT)
    options = get_args_parser().parse_args(without_timeout(line.split()))
    assert options.module and options.nproc_per_node == "4"
    assert (ROOT / file_of(options.training_script)).is_file()


@pytest.mark.parametrize(
    "command",
    [command for command in COMMENTS if "train.py" in command and "pip" not in command]
    + re.findall(r"`((?:python|torchrun) [^`]*train\.py [^`]+)`", FLAT),
)
def test_training_commands_parse(command: str) -> None:
    """Claim: torchrun takes the flags before train.py, train.py those after it, with the number of
    copies a divisor of the processes. Oracle: both programs' own parsers. torch 2.11's torchrun has
    no --shutdown-timeout, as the README says.
    """
    before, _, after = command.partition("train.py")
    parser, size = get_args_parser(), 1
    if before.startswith("torchrun"):
        words = before.split()[1:]
        options = parser.parse_args([*without_timeout(words), "train.py"])
        size = int(options.nnodes.split(":")[-1]) * int(options.nproc_per_node)
    arguments = shlex.split(after)
    if arguments != ["--help"]:
        config = train.parse(arguments)
        assert config.out and size % config.replicate == 0
        assert "--replicate" not in arguments or size // config.replicate == int(
            options.nproc_per_node
        )  # sharded inside a node


@pytest.mark.parametrize(
    "command", [c for c, node in ELSEWHERE.items() if node.endswith("takes_other_settings")]
)
@pytest.mark.parametrize(
    "more",
    [["--dry_run"], pytest.param(["--steps", "2"], marks=pytest.mark.slow)],
    ids=["dry", "run"],
)
def test_toy_recipe_takes_other_settings(
    command: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: the toy run with other settings gets through both stages, without training by default,
    and writes where it says or, dry, nowhere. Oracle: the exit code and the folder. Slow: half a
    minute each.
    """
    monkeypatch.chdir(tmp_path)
    assert run(command, more, monkeypatch) == 0
    assert (tmp_path / command.split()[-1] / "done.json").is_file() == (more != ["--dry_run"])


BENCHMARK_TEXT = FLAT + " ".join(
    (ROOT / "benchmarks/README.md").read_text(encoding="utf-8").split()
)
BENCHMARKS = sorted(set(re.findall(r"`(python benchmarks/[^`]+)`", BENCHMARK_TEXT)))


def start_benchmark(command: str, more: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a benchmark in this process, with its own folder on the path, as Python has
    it.
    """
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return run(command, more, monkeypatch)


@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmark_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: each command line of a benchmark in the texts is one that the benchmark takes, so that
    a flag that is gone or misspelt is found. Oracle: its own parser, after which it is stopped.
    """

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *arguments: Any) -> argparse.Namespace:
        parse(self, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        start_benchmark(command.replace("FILE ...", "FILE"), [], monkeypatch)


SIZES = {"hidden": 64, "inner": 64, "layers": 1, "heads": 1, "prompts": 2, "new": 4}
SHORT = {  # benchmark -> what shortens it
    "where": ["--size=4M"],
    "generate": [f"--{name}={value}" for name, value in SIZES.items()],
}


@pytest.mark.slow  # half a minute
@pytest.mark.parametrize("name", SHORT)
def test_short_benchmarks_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: the benchmarks of a few minutes run to their end and print figures. Oracle: the exit
    code and the output.
    """
    threads = torch.get_num_threads()
    assert f"python benchmarks/{name}.py --write" in BENCHMARKS
    try:
        assert (
            start_benchmark(f"python benchmarks/{name}.py --rounds 1", SHORT[name], monkeypatch)
            == 0
        )
    finally:
        torch.set_num_threads(threads)
    assert re.search(r"\d\.\d", capsys.readouterr().out)


def test_requirements_are_installed() -> None:
    """Claim: the two files that the README installs from pin packages that pip finds by these
    names. Oracle: what is installed here.
    """
    for name in ("requirements.txt", "requirements-dev.txt"):
        assert f"pip install -r {name} && " in README
        lines = [
            line.split("#")[0].strip()
            for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
        ]
        pins = [line for line in lines if line and not line.startswith("-r")]
        assert pins
        for pin in pins:
            package, version = pin.split("==")
            assert version and importlib.metadata.version(package), pin


# --- what is named ---------------------------------------------------------------------------------------------------


def test_flags_named_are_in_a_programs_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: each --flag anywhere in the texts is a flag of train, eval, redteam, data, synthetic,
    torchrun or a benchmark. Oracle: their --help, and the benchmarks' text.
    """
    programs = [f"eval.py {command}" for command in ("bench", "compare", "pairs", "prompt")]
    programs += ["train.py", "-m tasks.redteam", "data.py", "synthetic.py figure1"]
    for program in programs:
        assert run(f"python {program}", ["--help"], monkeypatch) == 0
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out + get_args_parser().format_help()))
    known |= {flag.replace("-", "_").replace("__", "--", 1) for flag in known} | {
        "--shutdown-timeout"
    }  # torch 2.13's
    for benchmark in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'"(--[\w-]+)"', benchmark.read_text(encoding="utf-8")))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT))
    assert {"--fresh", "--labelled", "--replicate"} <= named <= known, named - known


def test_files_named_are_there() -> None:
    """Claim: each program, picture and text that the texts name in this repository is in it, and so
    is each module after `-m`. Oracle: the folder.
    """
    made = re.compile(
        r"runs/|(run|data|done|report|log|results|table|curves|changed|(generation_)?config)\.(?!py)"
    )  # by a command: tested above
    names = re.findall(r"`(?:python )?([\w/.-]+\.(?:py|png|toml|cff|json|txt))[` ]", TEXT)
    names = [name for name in names if not made.match(name)]
    modules = re.findall(r" -m ((?:support|tasks|toy)\.\w+)", TEXT)
    names += [file_of(name) for name in modules]
    assert {"bfpo.py", "tasks/redteam.py", "figures/search.json", "CITATION.cff"} <= set(names)
    assert [name for name in names if not (ROOT / name).is_file()] == []


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "benchmarks/README.md"], ids=lambda page: page.stem
)
def test_links_lead_somewhere(page: Path) -> None:
    """Claim: each link to a file of this repository leads to a file, and its anchor to a heading.
    README.md leads to every page of docs/. Oracle: the folder.
    """
    targets = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    ours = [target for target in targets if not target.startswith("http")]
    assert ours
    for target in ours:
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.is_file() and (not anchor or anchor in anchors(there)), target
    if page == PAGES[0]:
        assert {f"docs/{other.name}" for other in PAGES[1:]} <= set(ours)


def test_numbers_quoted_are_those_of_the_committed_tables() -> None:
    """Claim: in a section, and in a table's row, that points at a table in figures/, every number of three decimals is in that table; the search's picks and scores are
    those of its record. Oracle: the files that the commands wrote.
    """
    link = r"\]\((?:\.\./)?(figures/\w+\.md)\)"
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and re.search(link, line)]
    prose = "\n".join(line for line in TEXT.splitlines() if line not in rows)
    sections = [part for part in prose.split("\n## ") if re.search(link, part)]
    for part in [*sections, *rows]:
        (name,) = re.findall(link, part)
        numbers, table = re.findall(r"\d\.\d{3}\b", part), (ROOT / name).read_text(encoding="utf-8")
        assert numbers and [number for number in numbers if number not in table] == [], name
    quoted = {name for part in sections for name in re.findall(link, part)}
    assert quoted == {f"figures/{name}.md" for name in experiments.COMMANDS.keys() - {"search"}}
    assert len(rows) == 3
    record = json.loads((ROOT / "figures/search.json").read_text())
    for model, pick in record["picks"].items():
        (run,) = [
            run
            for run in record["runs"]
            if run["model"] == model and {key: run[key] for key in pick} == pick
        ]
        scores = " / ".join(
            f"{sum(run[key]) / len(run[key]):.3f}" for key in ("helpful", "harmless")
        )
        assert (
            f"{pick['lr']:.1e}".replace(".0e", "e").replace("e-0", "e-")
            + f", {pick['tau']} ({scores})"
            in FLAT
        ), model


def rows_of(header: str) -> list[list[str]]:
    """The cells of the texts' tables with this header, without their lines of dashes."""
    tables = [text.split("\n\n")[0] for text in TEXT.split(f"\n{header}\n")[1:]]
    lines = [line for table in tables for line in table.splitlines()[1:]]
    assert lines, header
    return [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
    ]


def test_table_of_files_has_them_all() -> None:
    """Claim: every program is in the tables once. bfpo, model, data, train, eval and synthetic come
    first, then the three rooms, one after the other. Oracle: the files.
    """
    table = [row[0].strip("`") for row in rows_of("| file | what it holds | in the paper |")]
    assert table[:6] == SIX and set(SIX) == {path.name for path in ROOT.glob("*.py")}
    files = [path for room in ROOMS for path in (ROOT / room).glob("*.py")]
    programs = [str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py"]
    assert sorted(table[6:]) == sorted(programs)
    rooms = [name.partition("/")[0] for name in table[6:]]
    assert rooms == sorted(rooms)


def test_table_of_symbols_is_that_of_bfpo() -> None:
    """Claim: symbol, identifier, shape and range are in the words of bfpo.py's docstring, line by
    line. Oracle: the docstring.
    """
    lines = (ROOT / "bfpo.py").read_text(encoding="utf-8").split('"""')[1].splitlines()
    (head,) = [number for number, line in enumerate(lines) if line.startswith("paper symbol")]
    names = ["paper symbol", "identifier", "shape", "range or unit", "authors' code"]
    starts = [lines[head].index(name) for name in names]
    cells = [
        [line[start:end].strip() for start, end in pairwise(starts)] for line in lines[head + 1 :]
    ]
    assert len(cells) > 15
    ours = [
        [cell.strip("`") for cell in row]
        for row in rows_of("| paper symbol | identifier | shape | range or unit |")
    ]
    assert ours == cells


def test_index_points_at_what_is_there() -> None:
    """Claim: every file of the index has what the index says: an identifier is defined in it,
    anything else is in its text; the paper's theorems, figures and algorithm are all there. Oracle:
    the files.
    """
    index = rows_of("| in the paper | here |")
    for _, places in index:
        for part in places.split("; "):
            file, *marks = re.findall(r"`([^`]+)`", part)
            text = (ROOT / file).read_text(encoding="utf-8")
            assert marks, part
            for mark in marks:
                defined = (
                    rf"^\s*(def|class) {re.escape(mark)}\b|^{re.escape(mark)}\b.*="
                    if mark.isidentifier()
                    else re.escape(mark)
                )
                assert re.search(defined, text, re.MULTILINE), (file, mark)
    words = " ".join(row[0] for row in index)
    for wanted in (
        "joint objective",
        "label",
        "squared loss",
        "Theorem 3.1",
        "3.2",
        "Proposition 3.3",
        "B.4",
        "Algorithm 1",
        "Figure 1",
        "Figure 2",
        "Figure 3",
        "Figure 4",
        "Figure 5",
        "§4.2",
        "benchmark",
    ):
        assert wanted in words, wanted


def test_deviations_are_numbered_as_the_code_cites_them() -> None:
    """Claim: the table counts from 1 without a gap, and each `deviation n` of the code is in it.

    Oracle: the files.
    """
    numbers = [int(row[0]) for row in rows_of("| | the paper or its code | here | why |")]
    assert numbers == list(range(1, len(numbers) + 1))
    cited = {
        int(n)
        for folder in ("", *ROOMS)
        for path in (ROOT / folder).glob("*.py")
        for n in re.findall(r"deviation (\d+)", path.read_text(encoding="utf-8"))
    }
    assert cited and cited <= set(numbers)


def test_example_row_has_the_schemas_columns() -> None:
    """Claim: the row shown for a user's own data has the columns of the schema bfpo.

    Oracle: data.SCHEMAS; data.py reads it above.
    """
    schema = SCHEMAS["bfpo"]
    assert list(example()) == ["prompt", *schema.answers, *schema.labels]


def code_blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_example_of_each_schema_is_read() -> None:
    """Claim: docs/data.md has a row of each schema, in their order of recognition but for pairs of
    one's own, and each row is read as the page says: the unsafe answer is the more helpful one.
    Oracle: data.SCHEMAS, and the texts of the rows.
    """
    rows = [json.loads(block) for block in code_blocks("docs/data.md", "json")]
    names = [data.find_schema(row, "sft") for row in rows]
    assert sorted(names) == sorted(SCHEMAS) and names[0] == "bfpo"
    for name, row in zip(names, rows, strict=True):
        if name == "messages":
            assert [turn["role"] for turn in data.read_messages(row, name)] == ["user", "assistant"]
            continue
        pair = data.read_pair(row, SCHEMAS[name], "helpful")
        is_labelled = name != "TRL"
        assert pair.prompt[-1]["content"] in ("How do I pick a lock?", "Name a red fruit.")
        assert pair.chosen in ("Push the pins up one by one.", "A cherry.")
        assert (pair.chosen_safe, pair.rejected_safe) == (not is_labelled, True)


def fields(page: str, header: str) -> list[str]:
    """The first column of a page's table with this header, names apart."""
    text = (ROOT / page).read_text(encoding="utf-8")
    table = text.split(f"\n| {header} |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def test_fields_of_the_log_are_all_described(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: docs/operations.md has each field of log.jsonl, of SFT and of preference pairs, with
    its unit, and no other; the same of a quadrant. SFT's are the first seven. Oracle: a run's log.
    """
    page = "docs/operations.md"
    described = fields(page, "field of `log.jsonl` | unit | what it is")
    monkeypatch.chdir(place)
    logged = []
    for recipe, source in (("sft", "--sft"), ("bfpo", "--safety")):
        command = f"python train.py {recipe} --model DIR {source} PAIRS.jsonl --out logged/{recipe}"
        more = ["--steps", "3", "--batch", "4", "--eval_every", "1", "--held_out", "0.5"]
        if recipe == "bfpo":
            more += ["--helpfulness", "ULTRAFEEDBACK.parquet"]
        assert run(command, [*more, "--cache", "logged/cache", *CPU], monkeypatch) == 0
        lines = Path(f"logged/{recipe}/log.jsonl").read_text(encoding="utf-8").splitlines()
        logged.append([json.loads(line) for line in lines])
    sft, pairs = logged
    assert {key for row in sft for key in row} == {*described[:7], "held_out", "held_out_loss"}
    assert {key for row in pairs for key in row} == set(described) and len(set(described)) == 14
    quadrant = fields(page, "field of a quadrant | unit | what it is")
    held_out = [row["held_out"]["safety"] for row in pairs if "held_out" in row]
    assert held_out and all(list(view) == quadrant for view in held_out[0].values())
    of_step = next(iter(pairs[0]["quadrants"].values()))
    assert list(of_step) == [*quadrant, *train.CHANGES]


def test_fields_of_a_report_are_all_described(place: Path, tmp_path: Path) -> None:
    """Claim: docs/evaluation.md has each field of report.json and of a standing, and no other.
    Oracle: the report of two models on two rows.
    """
    command = ["bench", "--model", str(place / "DIR"), "--reference", str(place / "DIR")]
    command += ["--tasks", f"own={place / 'PROMPTS.txt'}", "--judge", "keyword", *CPU]
    evaluate.main([*command, "--max_new_tokens", "2", "--out", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    page = "docs/evaluation.md"
    assert list(report) == fields(page, "field of `report.json` | what it is")
    standing = report["tasks"]["own"]
    own = {"metric", "others"}
    assert standing.keys() - own == set(fields(page, "field of a standing | what it is"))


def test_code_of_ones_own_trainer_runs() -> None:
    """Claim: the README's four lines give BFPO's loss of tensors. Oracle: Figure 3's targets."""
    names = {
        "chosen_safe": torch.tensor([1, 1, 0, 0]),
        "rejected_safe": torch.tensor([1, 0, 1, 0]),
        "policy_chosen": torch.zeros(4),
        "policy_rejected": torch.zeros(4),
        "ref_chosen": torch.zeros(4),
        "ref_rejected": torch.zeros(4),
    }
    exec(code_blocks("README.md", "python")[0], names)
    targets = torch.tensor([0.5, 1.0, -1.0, -0.5]) / 0.01
    assert torch.allclose(names["loss"], (targets**2).mean())


@pytest.mark.slow
def test_trl_trainer_takes_our_loss(place: Path, tmp_path: Path) -> None:
    """Claim: the README's subclass trains in TRL, and its loss is that of this program on the same
    pairs, before and after steps. Oracle: bfpo_loss of this program's log-probabilities.
    """
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig

    names: dict[str, Any] = {}
    first, second = code_blocks("README.md", "python")
    exec(first.splitlines()[0] + "\n" + second, names)
    pairs = [dict(zip(example(), row.values(), strict=True)) for row in own_pairs()[:8]]
    for row in pairs:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        for name in ("chosen", "rejected"):
            row[name] = [{"role": "assistant", "content": row[name]}]
    tokenizer = AutoTokenizer.from_pretrained(place / "DIR")
    tokenizer.chat_template = Chat(place / "DIR").template
    settings = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=0.25,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        max_steps=3,
        logging_steps=1,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    load = AutoModelForCausalLM.from_pretrained
    trainer = names["BFPOTrainer"](
        model=load(place / "DIR", dtype=torch.float32),
        ref_model=load(place / "DIR", dtype=torch.float32),
        args=settings,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
        data_collator=names["LabelledPairs"](pad_token_id=tokenizer.pad_token_id or 0),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    chosen_safe = torch.tensor([row["chosen_safe"] for row in pairs])
    rejected_safe = torch.tensor([row["rejected_safe"] for row in pairs])
    g = bfpo.label(chosen_safe, rejected_safe)
    at_start = bfpo.bfpo_loss(torch.zeros(8), g, 0.25).mean().item()
    assert losses[0] == pytest.approx(at_start, rel=1e-4)  # transformers rounds what it logs
    assert losses[2] < losses[0]
    with torch.no_grad():
        batch = trainer.data_collator(list(trainer.train_dataset))
        after = trainer._compute_loss(trainer.model.eval(), batch, False).item()
    trainer.model.save_pretrained(tmp_path / "after")
    tokenizer.save_pretrained(tmp_path / "after")
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    pack = Pack.build([[row[key] for key in keys] for row in trainer.train_dataset])
    h = torch.zeros(8)
    for sign, folder in ((1, tmp_path / "after"), (-1, place / "DIR")):
        with torch.no_grad():
            chosen, rejected = Mistral.from_pretrained(folder).logprobs(pack).view(2, 8)
        h += sign * (chosen - rejected)
    assert after == pytest.approx(bfpo.bfpo_loss(h, g, 0.25).mean().item(), rel=1e-4)


def test_settings_quoted_are_the_codes() -> None:
    """Claim: the packs, the protocols and the choices that the text gives are those of the code.

    Oracle: the constants.
    """
    paper, modern = questions.PROTOCOLS["paper"], questions.PROTOCOLS["modern"]
    assert (
        f"temperature {paper.temperature}, top-p {paper.top_p}, {paper.max_new_tokens} tokens"
        in FLAT
    )
    assert (
        f"`--protocol modern` is greedy, {modern.max_new_tokens} tokens" in FLAT
        and modern.temperature == 0
    )
    assert f"packs of up to {train.PACK_TOKENS['cuda']:,} tokens" in FLAT
    assert f"SFT's learning rate is {train.RECIPES['sft']['lr']:.0e}".replace("e-05", "e-5") in FLAT
    assert "the first 30,000 rows of each set" in FLAT
    assert all(
        source.endswith("[:30000]")
        for name in ("safety", "helpfulness")
        for source in train.RECIPES["bfpo"][name]
    )


def test_plan_of_7b_is_the_plans_arithmetic() -> None:
    """Claim: the memory of 1, 4 and 2 x 4 GPUs, the state and the activations a token are what
    memory_plan.py counts. Oracle: memory_plan.py, on pairs of the length that the texts give; to
    the digits printed.
    """
    assert (
        f"pairs of {round(PAPER.share / 64)} tokens on average, {PAPER.longest:,} at most" in FLAT
    )
    table = rows_of("| GPUs | estimated memory of each (not measured) | time |")
    for row, (processes, shards) in zip(table, ((1, 1), (4, 4), (8, 4)), strict=True):
        step = replace(PAPER, share=math.ceil(PAPER.share / processes))
        load = step.with_budget(seven_b(shards), train.PACK_TOKENS["cuda"])
        held = memory_plan.fullest(load)[1]
        total = sum(held.values())
        assert row[1:] == [f"{total / 1e9:.1f} GB ({total / 2**30:.1f} GiB)", "not measured"], row
        if processes == 1:
            state = sum(size for kind, size in held.items() if kind.endswith(("weights", "fp32")))
            assert f"gradients are {state / 1e9:.1f} GB" in FLAT
            assert (
                f"activations take {held['saved activations'] / load.tokens / 1e6:.1f} MB for each token"
                in FLAT
            )


def test_citation_is_the_papers() -> None:
    """Claim:

    CITATION.cff names the authors and the paper that the README's first lines name. Oracle: those
    lines.
    """
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    families, first = re.findall(r"family-names: (\w+)", citation), README[:600]
    assert families == ["Zhang", "Torr", "Elhoseiny", "Bibi"] and ", ".join(families) in " ".join(
        first.split()
    )
    assert (
        "https://arxiv.org/abs/2408.15313" in citation
        and "https://arxiv.org/abs/2408.15313" in first
    )
    assert (
        "year: 2025" in citation
        and "ICLR 2025" in first
        and "license: MIT" in citation
        and "MIT" in (ROOT / "LICENSE").read_text()
    )


def test_no_placeholder_is_left() -> None:
    """Claim: every figure was filled in. Oracle: no @NAME@ in the text."""
    assert not re.findall(r"@[A-Z_]+@", TEXT)
