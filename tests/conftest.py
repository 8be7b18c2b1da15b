"""Shared fixtures: Mistral-7B-v0.1's own tokenizer, built offline out of the PyPI package mistral-common."""

import json
from pathlib import Path

import pytest


def sentencepiece_model() -> Path:
    """The sentencepiece model of Mistral-7B-v0.1, as mistral-common ships it."""
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


def build_mistral_tokenizer(folder: Path, legacy: bool = True, normalized: bool = False) -> Path:
    """Writes tokenizer.json and tokenizer_config.json as published with Mistral-7B-v0.1; returns the folder.

    Two tokenizer.json of this vocabulary are in circulation. legacy: a Prepend normaliser, which puts a space
    before every piece of text between special tokens. Otherwise a Metaspace pre-tokenizer, which puts one before
    the text's first piece alone: "\\n" after </s> is then one token. normalized: control tokens are looked for in the
    normalised text, as in some early conversions, which then miss them after anything but a space.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    source = SentencePieceProcessor(model_file=str(sentencepiece_model()))
    vocab = {source.id_to_piece(i): i for i in range(len(source))}
    merges = []  # a pair of pieces merges into a third one; the third one's id (its score) is the pair's rank
    for piece, rank in vocab.items():
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [(vocab[a], vocab[b], rank, a, b) for a, b in splits if a in vocab and b in vocab]
        merges += known
    merges.sort(key=lambda merge: (-source.get_score(merge[2]), merge[0], merge[1]))
    model = models.BPE(vocab, [merge[3:] for merge in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=normalized) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True,
              "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": True,
              "model_max_length": 1000000000000000019884624838656, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return folder


@pytest.fixture(scope="session")
def mistral_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Mistral-7B-v0.1's tokenizer files: 32,000 entries, <unk> 0, <s> 1, </s> 2. Do not write to it."""
    return build_mistral_tokenizer(tmp_path_factory.mktemp("mistral") / "tokenizer")
