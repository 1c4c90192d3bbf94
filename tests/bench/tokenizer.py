"""Captions per second: ours, open_clip's and Hugging Face's tokenizer.

    python tests/bench/tokenizer.py --out data/results/tokenizer.json

One process, one thread, CPU time. The tokenizers take turns, and the best
of all rounds counts. Every row is checked first: ours must equal
open_clip's, Hugging Face's is compared and its share of equal captions
written down, since it neither repairs text nor unescapes HTML.

The captions are synthetic: the whole words in CLIP's vocabulary, drawn
with a frequency of about one over their rank; one word in 25 has another
glued to it, so that it must be cut; some numbers, commas, endings and
capitals. In "mixed", 22 captions in a hundred have one to three pieces
beyond ASCII. "cold" is a tokenizer that has remembered nothing.
"""

import argparse
import datetime
import json
import os
import platform
import random
import time
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # Hugging Face's threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTokenizer

from miniclip.tokenizer import START, Tokenizer

BEYOND_ASCII = (
    "naïve café “quoted” Jerry’s 日本語 핵심 😀 👩‍🚀 — é München … "
    "ÅÄÖ привет"
).split()


def captions(number: int, beyond: float, seed: int) -> list[str]:
    """Captions of CLIP's words, a share of them with more than ASCII."""
    rng = random.Random(seed)
    tokens = (t.removesuffix("</w>") for t in Tokenizer.openai().encoder)
    words = [*dict.fromkeys(t for t in tokens if t.isascii())]
    words = [word for word in words if word.isalpha()]
    weights = [*accumulate(1 / (10 + i) for i in range(len(words)))]
    made = []
    for _ in range(number):
        row = rng.choices(words, cum_weights=weights, k=rng.randint(8, 18))
        row = [vary(word, words, rng) for word in row]
        if rng.random() < beyond:
            for _ in range(rng.randint(1, 3)):
                row[rng.randrange(len(row))] = rng.choice(BEYOND_ASCII)
        made.append(" ".join(row) + rng.choice(["", ".", "!"]))
    return made


def vary(word: str, words: list[str], rng: random.Random) -> str:
    """A word as captions have it: mostly as it is."""
    chance = rng.random()
    if chance < 0.04:
        return word + rng.choice(words)
    if chance < 0.08:
        return str(rng.randint(0, 2030))
    if chance < 0.14:
        return word + ","
    if chance < 0.16:
        return word + "'s"
    return word.title() if chance < 0.24 else word


def cpu_seconds(function, texts: list[str]) -> float:
    """The CPU time of one call."""
    start = time.process_time()
    function(texts)
    return time.process_time() - start


def forget(ours: Tokenizer, theirs: SimpleTokenizer) -> None:
    """Make both tokenizers cold; Hugging Face's is made anew instead."""
    ours.cache = {}
    specials = "<start_of_text>", "<end_of_text>"
    theirs.cache = {name: name for name in specials}


def hugging_face(ours: Tokenizer):
    """Hugging Face's tokenizer with the same merges, texts to a tensor."""
    theirs = CLIPTokenizer(vocab=ours.encoder, merges=ours.merges)

    def rows(texts: list[str]) -> torch.Tensor:
        options = {"padding": "max_length", "max_length": 77}
        found = theirs(texts, truncation=True, **options)["input_ids"]
        return torch.tensor(found)

    return rows


def compare(texts: list[str], rounds: int) -> dict[str, dict]:
    """Captions per second of the three, cold and warm."""
    ours, theirs = Tokenizer.openai(), SimpleTokenizer()
    peers = {
        "miniclip": ours,
        "open_clip": theirs,
        "Hugging Face": hugging_face(ours),
    }
    equal = share_of_equal_rows(peers, texts, ours.eot)
    best: dict = {"cold": {}, "warm": {}}
    for _ in range(rounds):
        forget(ours, theirs)
        peers["Hugging Face"] = hugging_face(ours)
        for state in "cold", "warm", "warm", "warm":
            for name, peer in peers.items():
                speed = len(texts) / cpu_seconds(peer, texts)
                best[state][name] = max(best[state].get(name, 0), speed)
    return {**best, "hugging_face_equal": equal}


def share_of_equal_rows(peers: dict, texts: list[str], eot: int) -> float:
    """Ours must equal open_clip's; how many of Hugging Face's do."""
    rows = {name: peer(texts) for name, peer in peers.items()}
    assert torch.equal(rows["miniclip"], rows["open_clip"])
    padded = rows["Hugging Face"]
    padded[(padded == eot).cumsum(1) > 1] = 0  # it pads with the end
    return (padded == rows["miniclip"]).all(1).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--captions", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, equal, about = {}, {}, {}
    for name, beyond in ("ASCII", 0.0), ("mixed", 0.22):
        texts = captions(args.captions, beyond, seed=0)
        assert not any(START in text for text in texts)
        about[name] = {
            "letters": sum(map(len, texts)) / len(texts),
            "beyond_ascii": sum(not t.isascii() for t in texts)
            / len(texts),
            "different_pieces": len(set(" ".join(texts).lower().split())),
        }
        found = compare(texts, args.rounds)
        equal[name] = found.pop("hugging_face_equal")
        for state, speeds in found.items():
            rows[f"{name}, {state}"] = speeds
    result = {
        "command": "python tests/bench/tokenizer.py --out "
        "data/results/tokenizer.json",
        "date": datetime.date.today().isoformat(),
        "unit": "captions per second of CPU time, best of "
        f"{args.rounds} rounds, warm three times a round; one thread, "
        f"{args.captions:,} captions",
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {
            name: version(name)
            for name in (
                "miniclip",
                "open_clip_torch",
                "transformers",
                "tokenizers",
                "ftfy",
                "regex",
                "numpy",
                "torch",
            )
        },
        "captions": about,
        "peers": ["miniclip", "open_clip", "Hugging Face"],
        "rows": rows,
        "hugging_face_equal": equal,
    }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    args.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
