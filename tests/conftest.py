"""Shared fixtures: Mistral-7B-v0.1's own tokenizer, built offline out of the PyPI package mistral-common, and a hub on
this machine.
"""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import runs

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: the tests run side by side, and start processes of their own

ROOT = Path(__file__).parent.parent
CXX = (
    os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
)  # torch.compile needs one


def sentencepiece_model() -> Path:
    """The sentencepiece model of Mistral-7B-v0.1, as mistral-common ships it."""
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


def build_mistral_tokenizer(folder: Path, legacy: bool = True, normalized: bool = False) -> Path:
    """Writes tokenizer.json and tokenizer_config.json as published with Mistral-7B-v0.1; returns
    the folder.

    Two tokenizer.json of this vocabulary are in circulation. legacy: a Prepend normaliser, which
    puts a space before every piece of text between special tokens. Otherwise a Metaspace
    pre-tokenizer, which puts one before the text's first piece alone: "\\n" after </s> is then one
    token. normalized: control tokens are looked for in the normalised text, as in some early
    conversions, which then miss them after anything but a space.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    source = SentencePieceProcessor(model_file=str(sentencepiece_model()))
    vocab = {source.id_to_piece(i): i for i in range(len(source))}
    merges = []  # a pair of pieces merges into a third one; the third one's id (its score) is the pair's rank
    for piece, rank in vocab.items():
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [(vocab[a], vocab[b], rank, a, b) for a, b in splits if a in vocab and b in vocab]
        merges += known
    merges.sort(key=lambda merge: (-source.get_score(merge[2]), merge[0], merge[1]))
    model = models.BPE(
        vocab, [merge[3:] for merge in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=normalized) for name in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return folder


@pytest.fixture(scope="session")
def mistral_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Mistral-7B-v0.1's tokenizer files: 32,000 entries, <unk> 0, <s> 1, </s> 2.

    Do not write to it.
    """
    return build_mistral_tokenizer(tmp_path_factory.mktemp("mistral") / "tokenizer")


class Hub(http.server.ThreadingHTTPServer):
    """Answers like huggingface.co for the repositories under `root`, models/OWNER/NAME and
    datasets/OWNER/NAME, each with one commit and the revisions main and v1; those in `private` only
    to the bearer of TOKEN. `asked` lists what clients want; `run` starts such a client.
    """

    TOKEN = "hf_of_the_owner"
    COMMIT = "f" * 40

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.root, self.home = root / "hub", root / "hf"
        self.private: set[str] = set()
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def downloads(self) -> list[str]:
        """Names of the files whose content was sent since the last call, sorted."""
        sent = [
            line.partition(f"/resolve/{self.COMMIT}/")[2]
            for line in self.asked
            if line.startswith("GET") and "/resolve/" in line
        ]
        self.asked.clear()
        return sorted(sent)

    def run(self, script: str, *arguments: object, **environment: str) -> str:
        """What a Python script prints in a process of its own, with huggingface_hub's settings
        pointing here and a cache of this hub's.
        """
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING_FACE_"))
        }
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HOME": str(self.home),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            cwd=ROOT,
            env=inherited | settings | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


class HubRequest(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        parts = re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/([^/]+)()", path
        ) or re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path)
        kind, name, verb, revision, file = parts.groups() if parts else (None, "", "", "", "")
        folder = self.server.root / (kind or "models") / name
        bearer = self.headers.get("Authorization") == f"Bearer {self.server.TOKEN}"
        if not name or not folder.is_dir() or (name in self.server.private and not bearer):
            return self.reply(
                401, b"", {"X-Error-Code": "RepoNotFound"}
            )  # whether it exists is none of a stranger's business
        if unquote(revision) not in ("main", "v1", "refs/convert/parquet", self.server.COMMIT):
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = {
            str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }
        if verb == "revision":
            return self.reply_json(
                {
                    "id": name,
                    "sha": self.server.COMMIT,
                    "private": name in self.server.private,
                    "tags": [],
                    "siblings": [{"rfilename": file} for file in files],
                }
            )
        if verb == "tree":
            return self.reply_json(
                [
                    {
                        "type": "file",
                        "path": file,
                        "oid": hashlib.sha1(content).hexdigest(),
                        "size": len(content),
                    }
                    for file, content in files.items()
                ]
            )
        if file not in files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        self.reply(
            200,
            files[file],
            {
                "ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"',
                "Content-Type": "application/octet-stream",
            },
        )

    do_HEAD = do_GET

    def reply_json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (
            headers | {"X-Repo-Commit": self.server.COMMIT, "Content-Length": str(len(content))}
        ).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub without repositories: write files to hub.root / "models/owner/name" or
    "datasets/owner/name".
    """
    with Hub(tmp_path) as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy language's data and a tiny model, runs.toy_inputs.

    Runs of the tests go below it, each under a name of its own.
    """
    return runs.once(tmp_path_factory, "toys", runs.toy_inputs)


@pytest.fixture(scope="session")
def whole(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 steps of BFPO in one go on one process and one thread: what others are compared with."""
    return runs.once(
        tmp_path_factory,
        "whole",
        lambda out: runs.run_here(
            runs.bfpo(toys, out, "--steps", "200", "--save_every", "10", "--keep", "3")
        ),
    )
