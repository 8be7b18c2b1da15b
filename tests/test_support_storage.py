"""support/storage.py: files that are whole or absent, and work that is kept for later runs."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import bfpo

import data
import train
from model import Config, Mistral
from support import distributed, storage
from support.chat import Chat
from support.distributed import World
from toy import files as toy_files


@pytest.fixture(scope="module")
def world() -> World:
    torch.set_num_threads(1)
    return distributed.start("cpu")


# --- whole or absent ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_written_is_whole_or_absent(kind: str, tmp_path: Path) -> None:
    """Claim: until a file or folder is written in full, its name has what it had before; a kill
    between two renames is mended; nothing is left beside it. Oracle: the names and contents.
    """
    path = tmp_path / "below" / "it"
    inside = Path(".") if kind == "file" else Path("part")

    def write(text: str, fails: bool = False) -> None:
        with storage.whole(path) as aside:
            if kind == "folder":
                aside.mkdir()
            (aside / inside).write_text(text)
            if fails:
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write("one", fails=True)
    assert not list(path.parent.iterdir())
    write("one")
    with pytest.raises(OSError, match="disk full"):
        write("two", fails=True)
    assert (path / inside).read_text() == "one"
    write("two")
    assert (path / inside).read_text() == "two"
    assert list(path.parent.iterdir()) == [path]

    path.rename(path.parent / ".it.earlier")
    (path.parent / ".it.partial").mkdir()
    with pytest.raises(OSError, match="disk full"):
        write("three", fails=True)
    assert (path / inside).read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


# --- kept work ------------------------------------------------------------------------------------


def test_a_part_that_two_runs_compute_at_once_is_one_part(world: World, tmp_path: Path) -> None:
    """Claim: of two runs that compute a part at the same time, in other bits, both use the first
    one's, and so do later ones. Others may read it. Oracle: the values.
    """
    store = tmp_path / "cache" / "reference"

    def slow(_: range) -> list[float]:
        other = storage.kept_parts(store, "it", 1, 8, lambda _: [1.0], world, "another run's")
        assert other == [1.0]
        return [1.0 + 2**-20]

    assert storage.kept_parts(store, "it", 1, 8, slow, world, "ours") == [1.0]
    later = storage.kept_parts(store, "it", 1, 8, lambda _: [2.0], world, "a later run's")
    assert later == [1.0]
    (tmp_path / "plain").touch()
    (part,) = store.glob("*.json")
    assert part.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(OSError, match="plain"):  # said before the work
        storage.kept_parts(tmp_path / "plain", "it", 1, 8, pytest.fail, world, "in vain")


def test_rows_are_computed_once_and_a_damaged_part_again(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: a stopped run loses one part, and the next one may use another size; a part that is
    cut, altered, of another program or lost is made again and the damaged ones are named; other
    identities share nothing. Oracle: the rows, by hand, and the numbers that were asked for.
    """
    asked: list[int] = []

    def kept(identity: Any, size: int, stop: int = 99) -> list[Any]:
        def make(numbers: range) -> list[Any]:
            if numbers.stop > stop:
                raise KeyboardInterrupt
            asked.extend(numbers)
            return [{"number": i, "third": (i / 3, "é")} for i in numbers]

        return storage.kept_parts(tmp_path, identity, 10, size, make, world, "rows")

    with pytest.raises(KeyboardInterrupt):
        kept("a", 4, stop=9)
    assert asked == [*range(8)]
    rows = [{"number": i, "third": [i / 3, "é"]} for i in range(10)]
    assert kept("a", 3) == rows
    assert asked == [*range(10)]
    assert kept("a", 7) == rows and asked == [*range(10)]
    assert kept("b", 10) == rows and asked == [*range(10), *range(10)]

    asked.clear()
    part = tmp_path / f"{storage.key_of('a')}-4.json"
    content = part.read_text()
    for damage in (
        content[:-20],
        content.replace('"number": 5', '"number": 6'),
        "[]",
        "{}",
        "",
        None,
    ):
        part.unlink()
        if damage is not None:
            part.write_text(damage)
        assert kept("a", 4) == rows and asked == [4, 5, 6, 7]
        said = f"{part} is damaged; computing it again" in capsys.readouterr().out
        assert said == (damage is not None)
        asked.clear()


def test_kept_rows_are_lines_for_people_too(world: World, tmp_path: Path) -> None:
    """Claim: rows of an evaluation are a file of JSON lines, and two files with one identity do not
    share their rows. Oracle: the files.
    """
    for name in ("a.jsonl", "b.jsonl"):
        storage.kept_rows(
            tmp_path / "policy" / name,
            {"version": 1},
            3,
            2,
            lambda numbers, name=name: [{"row": f"{name}:{i}"} for i in numbers],
            world,
            name,
        )
        lines = (tmp_path / "policy" / name).read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"row": f"{name}:{i}"} for i in range(3)]


# --- what is kept has a version --------------------------------------------------------------------


def fixed_model(folder: Path) -> Path:
    """A small Mistral whose weights are arithmetic, not drawn: the same with every torch."""
    toy_files.build(folder / "data", 0)
    model = Mistral(
        Config(
            vocab_size=Chat(folder / "data" / "tokenizer").vocabulary,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
        )
    )
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            numbers = torch.arange(parameter.numel()) * 7919 + 104729 * n
            values = (numbers % 1009).float() / 1009 - 0.5
            values = 2 * values if parameter.dim() > 1 else 1 + 0.2 * values
            parameter.copy_(values.view(parameter.shape))
    model.save_pretrained(folder / "start", like=folder / "data" / "tokenizer")
    return folder / "start"


PINNED = {  # version -> what is kept of the fixed rows
    "tokens": {10: "493788b8c69ca273"},
    "reference": {
        1: [[-44.956386, -92.034615], [-85.918999, -92.034615], [-94.209877, -92.034615]]
    },
}


def test_kept_values_change_only_with_their_version(world: World, tmp_path: Path) -> None:
    """Claim: what the token cache and the reference keep of fixed rows and weights is what their
    versions stand for. If this fails, count up data.FORMAT or train.REFERENCE_VERSION, and pin the
    new values. Oracle: the values of the version; log-probabilities to 1e-3, as other machines round
    otherwise.
    """
    start = fixed_model(tmp_path)
    rows = [
        {
            "prompt": "How do I make a cake?",
            "chosen": "Gather the flour. " * (i + 1),
            "rejected": "I cannot help with that request.",
            "chosen_safe": i % 2 == 0,
            "rejected_safe": True,
        }
        for i in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = Chat(start)
    arguments = {"held_out": 0.0, "max_length": 40, "max_prompt": 16, "cache_dir": tmp_path}
    stream, _ = data.load_stream([str(tmp_path / "rows.jsonl")], chat, **arguments)
    folder = Path(stream.report["cache"]["folder"])
    kept = np.fromfile(folder / "tokens", stream.report["token_type"]).tolist()
    kept += [str(row) for row in np.load(folder / "rows.npy").tolist()]
    tokens = hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]
    assert PINNED["tokens"] == {data.FORMAT: tokens}

    command = [*bfpo(tmp_path, tmp_path / "run"), "--dtype", "float32", "--cache", str(tmp_path)]
    config = train.settled(train.parse(command), world)
    model, _ = train.build(config, start, world)
    logprobs = train.reference_logprobs(model, "these", config, chat, world, "safety", stream)
    assert list(PINNED["reference"]) == [train.REFERENCE_VERSION]
    pinned = torch.tensor(PINNED["reference"][train.REFERENCE_VERSION])
    torch.testing.assert_close(logprobs, pinned, rtol=0, atol=1e-3)
