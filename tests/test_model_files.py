"""What model.py writes, transformers reads, and the other way round; what is damaged is refused by
name.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Hub
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import model as model_file
from model import Config, Mistral, find_model, load_weights
from support import distributed

CONFIG = Config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=5,
    rope_theta=500.0,
    eos_token_id=7,
)


def random_model(config: Config = CONFIG, dtype: torch.dtype = torch.float32) -> Mistral:
    model = Mistral(config)
    model.init_weights(0)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            p.data.mul_(10)
        elif name.endswith("bias"):
            p.data.copy_(torch.linspace(-1, 1, len(p)))
    return model.to(dtype)


def same_weights(a: Mistral, b: Mistral) -> bool:
    return all(
        torch.equal(x, y) and x.dtype == y.dtype
        for x, y in zip(a.parameters(), b.parameters(), strict=True)
    )


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("kind", ["mistral", "llama", "qwen2", "qwen3", "tied", "sharded"])
def test_transformers_loads_what_we_save(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: config.json, weights, index and generation_config.json are the ecosystem's. Oracle:
    transformers' logits on the folder, within 1e-4 of their scale; our own reload, to the bit.
    """
    changes = {
        "tied": {"tie_word_embeddings": True},
        "llama": {"model_type": "llama", "sliding_window": None, "rope_scaling": LLAMA3},
        "qwen2": {"model_type": "qwen2", "sliding_window": None},
        "qwen3": {"model_type": "qwen3", "sliding_window": None, "head_dim": 10},
    }
    model = random_model(dataclasses.replace(CONFIG, **changes.get(kind, {})))
    if kind == "sharded":
        monkeypatch.setattr(model_file, "SHARD_BYTES", 20_000)
    model.save_pretrained(tmp_path / "out")
    index = tmp_path / "out/model.safetensors.index.json"
    assert index.is_file() == (kind == "sharded")
    if kind == "sharded":
        shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
        assert len(shards) > 2 and {s.name for s in shards} == set(
            json.loads(index.read_text())["weight_map"].values()
        )
        assert all(s.stat().st_size < 22_000 for s in shards)  # a file's header comes on top
        assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert type(reference).__name__ == model.config.family.architecture
    assert reference.config.model_type == model.config.model_type
    assert reference.dtype == torch.float32
    assert (
        reference.config.tie_word_embeddings == (kind == "tied")
        and reference.generation_config.eos_token_id == 7
    )
    tokens = torch.randint(0, 61, (2, 20))
    with torch.no_grad():
        expected, got = reference(tokens).logits, model(tokens)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    again = Mistral.from_pretrained(tmp_path / "out")
    assert same_weights(model, again) and again.config == model.config
    again.save_pretrained(tmp_path / "again")
    for file in (tmp_path / "out").iterdir():  # a round trip is exact, byte for byte
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saving_in_another_dtype_rounds_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """Claim: `dtype` is the files' dtype and is announced.

    Oracle: the weights rounded by torch; transformers' dtype.
    """
    model = random_model()
    model.save_pretrained(tmp_path / "out", dtype=dtype)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(stored[name], p.to(dtype)) for name, p in model.named_parameters())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == dtype
    assert same_weights(
        Mistral.from_pretrained(tmp_path / "out", dtype=torch.float32), model.to(dtype).float()
    )


def test_mixed_storage_keeps_every_dtype(tmp_path: Path) -> None:
    """Claim: bf16 frozen weights beside fp32 trained ones are saved as stored and read back into
    either. Oracle: bit-equality.
    """
    model = random_model(dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        if "down_proj" in name:
            p.data = p.data.float() + 1e-4
    model.save_pretrained(tmp_path / "out")
    other = random_model(dtype=torch.bfloat16)
    for name, p in other.named_parameters():
        if "down_proj" in name:
            p.data = p.data.float()
    load_weights(other, tmp_path / "out")
    assert (
        same_weights(model, other)
        and json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float32"
    )


def source_folder(folder: Path) -> Path:
    """A tokenizer folder with all that servers read."""
    folder.mkdir()
    Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")).save(
        str(folder / "tokenizer.json")
    )
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    entries = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "chat_template": "old",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(entries))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 5], "temperature": 0.5, "do_sample": True})
    )
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "secrets.txt").write_text("not ours to copy")
    return folder


def test_companion_files_come_along(tmp_path: Path) -> None:
    """Claim: tokenizer files, generation_config.json and the chat template reach the folder;
    nothing else does. Oracle: transformers.
    """
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    random_model().save_pretrained(
        tmp_path / "out", like=source_folder(tmp_path / "source"), chat_template=template
    )
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == template
    assert (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
        )
        == "hi>"
    )
    assert (
        json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"]
        == template
    )
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [1, 5]
    assert (
        json.loads((tmp_path / "source/tokenizer_config.json").read_text())["chat_template"]
        == "old"
    )


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a save that fails leaves the older model untouched, one that succeeds replaces it, one
    into foreign files is refused. Oracle: the folder's contents.
    """
    old, new = random_model(), random_model()
    old.save_pretrained(tmp_path / "out")
    new.model.norm.weight.data.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(
            "support.storage.write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
        )
        with pytest.raises(OSError, match="disk full"):
            new.save_pretrained(tmp_path / "out")
    assert same_weights(Mistral.from_pretrained(tmp_path / "out"), old)
    new.save_pretrained(tmp_path / "out", like=tmp_path / "out")
    assert same_weights(Mistral.from_pretrained(tmp_path / "out"), new) and [
        p.name for p in tmp_path.iterdir()
    ] == ["out"]
    for files in (
        ["thesis.txt"],
        ["config.json"],
        ["config.json", "model.safetensors", "thesis.txt"],
        ["model.safetensors"],
    ):
        shutil.rmtree(tmp_path / "notes", ignore_errors=True)
        (tmp_path / "notes").mkdir()
        for file in files:
            (tmp_path / "notes" / file).write_text("years of work")
        with pytest.raises(
            ValueError, match=f"a model's alone, to replace it, got .*notes with {max(files)} in it"
        ):
            new.save_pretrained(tmp_path / "notes")
        assert sorted(path.name for path in (tmp_path / "notes").iterdir()) == sorted(files)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for model in (old, new):  # a link stays one, and what it points to is replaced
        model.save_pretrained(tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and same_weights(
            Mistral.from_pretrained(tmp_path / "disk"), model
        )
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match=r"like must be a folder that is there, got .*nowhere"):
        old.save_pretrained(tmp_path / "out", like=tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(ValueError, match="cannot be made anew from inside it"):
        old.save_pretrained(".")
    assert same_weights(Mistral.from_pretrained(tmp_path / "out"), new)


def test_saving_over_a_model_keeps_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: a model saved in another's place keeps the files that servers need, also after a kill
    between the two renames; an adapter beside it is not removed. Oracle: the folder's contents.
    """
    old, new, out = random_model(), random_model(), tmp_path / "out"
    new.model.norm.weight.data.add_(1)
    old.save_pretrained(out, like=source_folder(tmp_path / "source"))
    names = {path.name for path in out.iterdir()}
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name == ".out.partial":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(out)
    assert not out.exists()
    new.save_pretrained(out)
    assert {path.name for path in out.iterdir()} == names and same_weights(
        Mistral.from_pretrained(out), new
    )
    assert (out / "tokenizer.model").read_bytes() == b"sentencepiece" and not list(
        tmp_path.glob(".*")
    )
    (out / "adapter_model.safetensors").write_text("years of work")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors in it"):
        new.save_pretrained(out)


def test_one_file_goes_before_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: of model.safetensors and an index beside it the file counts, with or without the
    index's shards. Oracle: transformers.
    """
    sharded, whole, out = random_model(), random_model(), tmp_path / "out"
    whole.model.norm.weight.data.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(model_file, "SHARD_BYTES", 20_000)
        sharded.save_pretrained(out)
    whole.save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole/model.safetensors", out)
    for _ in range(2):
        theirs = AutoModelForCausalLM.from_pretrained(out).model.norm.weight
        assert torch.equal(theirs, whole.model.norm.weight) and same_weights(
            Mistral.from_pretrained(out), whole
        )
        for shard in out.glob("model-*"):
            shard.unlink()


def test_the_index_says_which_copy_of_a_tensor_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: of two copies in indexed files the one that the index names is read, whichever name
    sorts last. Oracle: the model that the index describes; the index's own names.
    """
    monkeypatch.setattr(model_file, "SHARD_BYTES", 20_000)
    out, name = tmp_path / "out", "model.layers.0.input_layernorm.weight"
    model = random_model()
    right = model.model.layers[0].input_layernorm.weight.detach()
    model.save_pretrained(out)
    index = out / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    first, last = min(entries["weight_map"].values()), max(entries["weight_map"].values())
    for file in (first, last):  # right values where the index points, older ones in the other
        for other in (first, last):
            tensors = load_file(out / other) | {name: right if other == file else right + 1}
            save_file(tensors, out / other, metadata={"format": "pt"})
        entries["weight_map"][name] = file
        index.write_text(json.dumps(entries))
        assert same_weights(Mistral.from_pretrained(out), model), file


def test_a_root_that_a_forward_left_gathered_is_saved_from_its_masters(tmp_path: Path) -> None:
    """Claim: under FSDP2 as it comes, whose root stays gathered, in bfloat16, after a forward, the
    fp32 weights are what is saved. Oracle: the weights before sharding.
    """
    distributed.start("cpu")
    model = random_model()
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert model.lm_head.weight.dtype == torch.bfloat16  # else this shows nothing
    model.save_pretrained(tmp_path / "out", dtype=torch.float32)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == whole.keys() and all(
        torch.equal(saved[name], whole[name]) for name in whole
    )


def test_every_wrong_tensor_is_listed_at_once(tmp_path: Path) -> None:
    """Claim: missing, unexpected, mis-shaped and wrongly typed tensors share one error.

    Oracle: their names in it.
    """
    random_model().save_pretrained(tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors |= {
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(32),
        "lm_head.weight": torch.zeros(60, 32),
        "model.embed_tokens.weight": torch.zeros(61, 32, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "out/model.safetensors")
    with pytest.raises(ValueError) as error:
        Mistral.from_pretrained(tmp_path / "out")
    for words in (
        "missing model.norm.weight",
        "missing model.layers.1.mlp.up_proj.weight",
        "unexpected model.layers.0.self_attn.q_proj.bias",
        "lm_head.weight (60, 32) instead of (61, 32)",
        "model.embed_tokens.weight of type I8",
    ):
        assert words in str(error.value)


def test_tied_heads_and_rotary_tables_in_old_files(tmp_path: Path) -> None:
    """Claim: a tied checkpoint may repeat the embedding as lm_head, but not contradict it; stored
    rotary tables are redundant. Oracle: the same model.
    """
    model = random_model(dataclasses.replace(CONFIG, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    head, table = tensors["model.embed_tokens.weight"].clone(), torch.ones(4)
    redundant = {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": table}
    save_file(tensors | redundant, path)
    assert same_weights(Mistral.from_pretrained(tmp_path / "out"), model)
    other = {name: x for name, x in tensors.items() if name != "model.embed_tokens.weight"} | {
        "lm_head.weight": head
    }
    save_file(other, path)  # the one tensor under its other name
    assert same_weights(Mistral.from_pretrained(tmp_path / "out"), model)
    save_file(tensors | {"lm_head.weight": torch.zeros(61, 32)}, path)
    with pytest.raises(ValueError, match=r"lm_head.weight must equal model.embed_tokens.weight"):
        Mistral.from_pretrained(tmp_path / "out")


def test_damaged_folders_are_refused_by_file_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: truncation, garbage, missing shards, pickles and broken JSON name their
    file. Oracle: the name.
    """
    monkeypatch.setattr(model_file, "SHARD_BYTES", 20_000)
    whole = tmp_path / "whole"
    random_model().save_pretrained(whole)
    index, shard = "model.safetensors.index.json", "model-00002-of-"

    def refused(name: str, spoil: object) -> None:
        folder = tmp_path / "spoiled"
        shutil.copytree(whole, folder)
        spoil(folder)  # type: ignore[operator]
        with pytest.raises(ValueError, match=name):
            Mistral.from_pretrained(folder)
        shutil.rmtree(folder)

    def second(folder: Path) -> Path:
        return next(folder.glob(shard + "*"))

    refused(shard, lambda f: second(f).write_bytes(second(f).read_bytes()[:-100]))
    refused(shard, lambda f: second(f).write_bytes(b"\xff" * 5000))
    refused(shard, lambda f: second(f).write_bytes(b""))
    refused(shard, lambda f: second(f).unlink())
    refused(index, lambda f: (f / index).write_text("{"))
    refused("must hold a JSON object with weight_map", lambda f: (f / index).write_text("{}"))
    refused("config.json", lambda f: (f / "config.json").unlink())
    refused("config.json", lambda f: (f / "config.json").write_text("[]"))
    refused("config.json must be JSON", lambda f: (f / "config.json").write_text("[" * 100_000))
    refused("NaN is not JSON", lambda f: (f / "config.json").write_text('{"rope_theta": NaN}'))

    def change(folder: Path, **entries: object) -> None:
        config = json.loads((folder / "config.json").read_text())
        text = json.dumps(config | entries).replace('"1e999"', "1e999")  # more than a float holds
        (folder / "config.json").write_text(text)

    began = time.monotonic()
    refused(
        "must hold the 1000000000 layers that config.json describes",
        lambda f: change(f, num_hidden_layers=10**9),
    )
    assert time.monotonic() - began < 5, "as many layers were built, or named"
    refused(
        "max_position_embeddings must be an integer >= 1, got '2048'",
        lambda f: change(f, max_position_embeddings="2048"),
    )
    refused(
        "tie_word_embeddings must be true or false, got 'false'",
        lambda f: change(f, tie_word_embeddings="false"),
    )
    refused(
        "sliding_window must be null, or for a mistral an integer >= 1, got 8.5",
        lambda f: change(f, sliding_window=8.5),
    )
    refused(
        "rope_theta must be a number > 0, got inf",
        lambda f: change(f, rope_theta="1e999"),
    )

    def pickled(folder: Path) -> None:
        for file in folder.glob("model*"):
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"")

    refused("only whole safetensors are read", pickled)


HUB_SCRIPT = """
import sys
from model import Mistral, find_model

tokenizer_of, *names = sys.argv[1:]
if tokenizer_of:
    find_model(tokenizer_of, weights=False)
for name in names:
    try:
        print(sum(p.double().sum().item() for p in Mistral.from_pretrained(name).parameters()))
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow  # five fresh processes
def test_models_come_from_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: by hub name a private model comes with the user's token, by huggingface_hub, without a
    file that nobody reads, once; then from its cache, offline or with the server gone. What cannot
    be had is one line with the name. For a tokenizer alone, and for a model that is refused, no
    weights are fetched. Oracle: the hub's own record of what it sent; the weights' sum.
    """
    monkeypatch.setattr(model_file, "SHARD_BYTES", 20_000)
    model, models = random_model(), hub.root / "models/owner"
    model.save_pretrained(models / "tiny", like=source_folder(tmp_path / "source"))
    shutil.copytree(models / "tiny", models / "public")
    needed = sorted(file.name for file in (models / "tiny").iterdir())
    weights = [name for name in needed if "safetensors" in name]
    assert len(weights) > 3
    for name in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "README.md",
        "onnx/model.safetensors",
        "onnx/config.json",
    ):
        (models / "tiny" / name).parent.mkdir(exist_ok=True)
        (models / "tiny" / name).write_text("{}")
    hub.private.add("owner/tiny")
    total = str(sum(p.double().sum().item() for p in model.parameters()))
    assert hub.run(HUB_SCRIPT, "", "owner/tiny@v1", "owner/tiny", HF_TOKEN=hub.TOKEN).split(
        "\n"
    ) == [total, total]
    assert hub.downloads() == needed
    offline, unknown = hub.run(
        HUB_SCRIPT, "", "owner/tiny@v1", "owner/unknown", HF_HUB_OFFLINE="1"
    ).split("\n")
    assert offline == total and "owner/unknown must be" in unknown and "HF_HUB_OFFLINE" in unknown
    assert (
        hub.run(HUB_SCRIPT, "", "owner/tiny", HF_ENDPOINT="http://127.0.0.1:9") == total
    )  # a port where nothing answers
    assert hub.asked == []
    shutil.copytree(
        models / "public", models / "named"
    )  # shards may have any name, which the index says
    for shard in (models / "named").glob("model-*"):
        shard.rename(shard.with_name(shard.name.replace("model-", "pytorch_model-")))
    index = models / "named/model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"pytorch_model-'))
    assert hub.run(HUB_SCRIPT, "", "owner/named") == total
    assert sum(name.startswith("pytorch_model-") for name in hub.downloads()) == len(weights) - 1

    for name, file in (("foreign", "model.safetensors"), ("pickled", "pytorch_model.bin")):
        (models / name).mkdir()
        shutil.copy(models / "public/config.json", models / name)
        (models / name / file).write_text("gigabytes")
    (models / "foreign/config.json").write_text(json.dumps({"model_type": "gemma2"}))
    wrong = {
        "owner/tiny": "private",
        "owner/none": "Repository Not Found",
        "owner/foreign@v9": "Revision Not Found",
        "owner/foreign": "model_type = 'gemma2'",
        "owner/pickled": "only whole safetensors",
        "no/such/model": "namespace/repo_name",
        "./runs/model": "namespace/repo_name",
    }
    lines = hub.run(
        HUB_SCRIPT, "owner/public", *wrong, HF_HOME=str(tmp_path / "a stranger's")
    ).split("\n")
    for (name, words), line in zip(wrong.items(), lines, strict=True):
        assert name.partition("@")[0].rpartition("/")[2] in line and words in line, line
    assert hub.downloads() == sorted(
        [*(name for name in needed if name not in weights), "config.json", "config.json"]
    )


def test_find_model_takes_a_folder_as_it_is(tmp_path: Path) -> None:
    """Claim: a folder is itself, whatever its name would be on the hub. Oracle: the path."""
    assert find_model(tmp_path) == tmp_path == find_model(str(tmp_path))


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from model import Config, Mistral, load_weights

def anonymous_mb():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024

folder, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
peak, done = 0.0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_mb())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
with torch.device("meta"):
    model = Mistral(Config.read(Path(folder))).bfloat16()
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}.{world}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    before = anonymous_mb()
    watcher.start()
    model.to_empty(device="cpu")
    load_weights(model, folder)
    dist.barrier()
else:
    before = anonymous_mb()
    watcher.start()
    model = Mistral.from_pretrained(folder, dtype=torch.bfloat16)
done = True
watcher.join()
held = sum((p.to_local() if world > 1 else p).numel() * p.element_size() for p in model.parameters()) / 2**20
print(held, max(p.numel() for p in model.parameters()) * 4 / 2**20, peak - before, flush=True)
__import__("os")._exit(0)  # past Python's own shutdown, where gloo's threads may abort a process that is done
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """260 MB of fp32 in shards of at most 100 MB."""
    folder = tmp_path_factory.mktemp("large") / "model"
    with torch.device("meta"):
        model = Mistral(
            Config(
                vocab_size=4000,
                hidden_size=768,
                intermediate_size=2048,
                num_hidden_layers=10,
                num_attention_heads=8,
                num_key_value_heads=2,
                head_dim=96,
            )
        )
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.zero_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_file, "SHARD_BYTES", 100 * 10**6)
        model.save_pretrained(folder)
    return folder


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs RssAnon of /proc/self/status"
)
@pytest.mark.parametrize(
    "processes", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))]
)
def test_loading_takes_the_shard_and_one_tensor(processes: int, large_checkpoint: Path) -> None:
    """Claim: host memory while loading is the process's own parameters (all, or its FSDP2 shard)
    plus one tensor of the file. Oracle: anonymous memory of fresh processes (pages of the mapped
    files do not count), fp32 on disk into bf16; 8 MB are left to the allocator and the interpreter.
    """
    command = [sys.executable, "-c", MEASURE, str(large_checkpoint)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(model_file.__file__).parent),
    }
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(processes)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    for rank in ranks:
        out, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
        held, tensor, used = map(float, out.split())
        assert 125 / processes < held < 145 / processes and used < held + tensor + 8
