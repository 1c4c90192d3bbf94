r"""A million strings that hurt: are our ids those of open_clip?

    python tests/bench/fuzz_tokenizer.py \
        --out data/results/tokenizer_fuzz.json

The fast way must equal open_clip's SimpleTokenizer.encode on every string,
and so must the readable way, on one string in ten. Strings that name one
of open_clip's special tokens are counted apart: open_clip makes them the
real token, for us they are text, which is checked instead.
"""

import argparse
import datetime
import html
import json
import platform
import random
import sys
import time
import unicodedata
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from open_clip.tokenizer import SimpleTokenizer

from miniclip.tokenizer import Tokenizer, clean, encode_batch

TROUBLE = (  # endings and their odd capitals, entities, ligatures, marks
    "'s 'LL 'ſ ’Ve 'd've don't &amp;lt; &amp; &#8217; &nbsp; &#0; "
    "&#x1F600; &notit; &Eacute &#xD800; ﬁ ß ẞ İ ı Σς ΟΔΟΣ K Å ² ½ "
    "\u0345 Ⅷ ٣ e\u0301 ﷽ ＡＢ ｶﾞ </w> <|endoftext|> <|startoftext|> "
    "<end_of_text> <start_of_text> START # ## \\n \x1b[31m \ud83d\ude00 "
    "\ud800 \udfff x\u200dy \ufeff \u200b \u202e ʼn ŉ ĳ ǆ “x” «y» "
    "„z‟ … — ´ `"
).split(" ")
SPACES = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\u00a0\u2003\u2028\u2029\u3000"
EMOJI = (
    "😀 👍🏽 👩‍🚀 👨‍👩‍👧‍👦 🏳️‍🌈 🇰🇷 🇰🇷🇯🇵 1️⃣ ❤️ ❤ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ☺ ☺️ 🧑🏿‍❤️‍💋‍🧑🏻"
).split(" ")
WORDS = (
    "a photo of THE cat sneezing antidisestablishmentarianism naïve "
    "café München 日本語 핵심 привет Ελλάδα العربية עברית हिन्दी ไทย "
    "O'Neill rock'n'roll 3.14 1,000 2021 C++ e-mail http://x.co @user"
).split(" ")
CODES = "latin-1 cp1252 cp1250 cp1251 cp1253 cp1254 mac-roman cp437".split()


def character(rng: random.Random) -> str:
    """Any code point, the lower planes oftener, surrogates too."""
    top = rng.choice([0x80, 0x100, 0x800, 0x3000, 0x10000, 0x20000])
    return chr(rng.randrange(rng.choice([top, top, sys.maxunicode + 1])))


def garbled(text: str, rng: random.Random) -> str:
    """What a wrong code page makes of text, once or twice."""
    for _ in range(rng.randint(1, 2)):
        raw = text.encode("utf-8", "replace")
        text = raw.decode(rng.choice(CODES), "replace")
    return text


def piece(rng: random.Random) -> str:
    """A small part of a string, of one of nine kinds."""
    kind = rng.randrange(9)
    if kind == 0:
        return "".join(character(rng) for _ in range(rng.randint(1, 8)))
    if kind == 1:
        return rng.choice(TROUBLE)
    if kind == 2:
        return rng.choice(EMOJI)
    if kind == 3:
        return rng.choice(SPACES)
    if kind == 4:
        return garbled(rng.choice(WORDS + EMOJI), rng)
    if kind == 5:
        return html.escape(rng.choice(TROUBLE + WORDS))
    if kind == 6:
        form = rng.choice(["NFC", "NFD", "NFKC", "NFKD"])
        return unicodedata.normalize(form, rng.choice(WORDS))
    if kind == 7:
        letters = "abcdefghijklmnopqrstuvwxyz'"
        return "".join(rng.choices(letters, k=rng.randint(1, 12)))
    return rng.choice(WORDS).swapcase() + rng.choice(" ,.!'\"")


def strings(number: int, seed: int) -> Iterator[str]:
    """Strings from 0 to a few pieces; one in 5,000 is very long."""
    rng = random.Random(seed)
    for _ in range(number):
        text = "".join(piece(rng) for _ in range(rng.randrange(7)))
        if rng.random() < 1 / 5000:
            text = text * rng.randint(50, 500)
        yield text


def reads_special(text: str) -> bool:
    """Whether open_clip takes a part of it for a special token."""
    cleaned = clean(text)
    return "<start_of_text>" in cleaned or "<end_of_text>" in cleaned


def check(
    texts: list[str], ours: Tokenizer, theirs: SimpleTokenizer
) -> tuple[list[str], int]:
    """The texts whose ids differ, and how many named a special token."""
    flat = encode_batch(texts, ours)
    rows = np.split(flat, np.flatnonzero(flat == ours.sot)[1:])
    assert len(rows) == len(texts), "a text has become a start token"
    different, special = [], 0
    for i, (text, row) in enumerate(zip(texts, rows)):
        ids = row[1:].tolist()
        if i % 10 == 0 and ids != ours.encode(text):
            different.append(text)
        if ids == theirs.encode(text):
            continue
        if reads_special(text):
            special += 1
            assert max(ids, default=0) < ours.sot
        else:
            different.append(text)
    return different, special


def report(found: dict, different: list[str], minutes: float) -> dict:
    """What is written down, with the versions that it holds for."""
    return {
        "command": "python tests/bench/fuzz_tokenizer.py --out "
        "data/results/tokenizer_fuzz.json",
        "date": datetime.date.today().isoformat(),
        **found,
        "differences": len(different),
        "different": [ascii(text)[:200] for text in different[:20]],
        "cpu_minutes": round(minutes, 1),
        "python": platform.python_version(),
        "unicode": unicodedata.unidata_version,
        "versions": {
            name: version(name)
            for name in ("miniclip", "open_clip_torch", "ftfy", "regex")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strings", type=int, default=1_000_000)
    args = parser.parse_args()
    ours, theirs = Tokenizer.openai(), SimpleTokenizer()
    found = {"strings": 0, "special": 0, "letters": 0, "longest": 0}
    different, start = [], time.process_time()
    for seed in range(-(-args.strings // 1000)):
        texts = [*strings(1000, seed)]
        wrong, special = check(texts, ours, theirs)
        different += wrong
        found["strings"] += len(texts)
        found["special"] += special
        found["letters"] += sum(map(len, texts))
        found["longest"] = max(found["longest"], *map(len, texts))
        if seed % 10 == 9 or found["strings"] >= args.strings:
            minutes = (time.process_time() - start) / 60
            result = report(found, different, minutes)
            text = json.dumps(result, indent=1)
            args.out.write_text(text + "\n", encoding="utf-8")
            print(
                f"{found['strings']:,}: {len(different)} differ, "
                f"{minutes:.1f} minutes",
                flush=True,
            )


if __name__ == "__main__":
    main()
