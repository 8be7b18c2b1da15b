"""Time and memory of tokenising preference pairs of real length: the first time, and when they are in the cache.

    python benchmarks/tokenise.py --model DIR [--pairs 120000]

The pairs are synthetic, with UltraFeedback's and PKU-SafeRLHF's mean lengths together (PERFORMANCE: 213 prompt, 173 and
160 answer tokens with Mistral's tokenizer); lengths are log-normal. RssAnon is the process's own memory: mapped files,
which the system can drop at any time, do not count.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from chat import Chat
from data import load_stream

MEAN_TOKENS = {"prompt": 180, "chosen": 172, "rejected": 159}  # the chat format adds 33 to a prompt, EOS 1 to an answer
SPREAD = 0.8  # sigma of log length


def write_pairs(path: Path, chat: Chat, pairs: int) -> None:
    """Texts of common words (one token each, nearly) with some punctuation, digits and non-Latin characters."""
    draw = np.random.default_rng(0)
    words = [word[1:] for word in sorted(chat.tokenizer.get_vocab()) if word.startswith("▁") and word[1:].isalpha() and len(word) > 3]
    words = np.array(words + [",", ".", "\n\n", "2024", "é漢", "(see", "it's"] * 200)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(pairs):
            lengths = {name: max(1, int(mean * draw.lognormal(-(SPREAD**2) / 2, SPREAD))) for name, mean in MEAN_TOKENS.items()}
            row = {name: " ".join(draw.choice(words, length)) for name, length in lengths.items()}
            print(json.dumps(row | {"chosen_safe": bool(i % 2), "rejected_safe": bool(i % 3)}, ensure_ascii=False), file=file)


def rss_anon_mib() -> float:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with tokenizer.json")
    parser.add_argument("--pairs", type=int, default=120_000)
    flags = parser.parse_args()
    peak, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            peak[0] = max(peak[0], rss_anon_mib())

    chat = Chat(flags.model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        write_pairs(path, chat, flags.pairs)
        print(f"{flags.pairs} pairs, {path.stat().st_size / 2**20:.0f} MB of JSON lines, {rss_anon_mib():.0f} MiB before")
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        for what in ("first time", "from the cache"):
            begun, processor = time.perf_counter(), time.process_time()
            stream, _ = load_stream([str(path)], chat, held_out=0, cache_dir=Path(folder) / "cache")
            print(f"{what}: {time.perf_counter() - begun:.1f} s ({time.process_time() - processor:.1f} s of processor time),"
                  f" peak RssAnon {peak[0]:.0f} MiB")  # fmt: skip
        stop.set()
        means = stream.lengths.mean(axis=0)
        print(f"mean tokens: prompt {means[0]:.0f}, chosen {means[1]:.0f}, rejected {means[2]:.0f}, pair {means.sum():.0f};"
              f" cache {stream.report['cache']['bytes'] / 2**20:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
