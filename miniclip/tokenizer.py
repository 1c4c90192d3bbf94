"""Byte-level BPE: from text to token ids and back, as CLIP does it.

Written from book/chapters/02_tokenizer.md; edit that file.
"""

import gzip
import hashlib
import html
import math
import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain, islice

import ftfy
import numpy as np
import regex
import torch
from torch import Tensor

from miniclip.data import data_dir


def merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Join every occurrence of a pair of neighbours, from the left.

    Chapter: book/chapters/02_tokenizer.md
    """
    merged, i = [], 0
    while i < len(word):
        step = 2 if word[i : i + 2] == pair else 1
        merged.append("".join(word[i : i + step]))
        i += step
    return tuple(merged)


def best_pair(pairs: Counter[tuple[str, str]]) -> tuple[str, str]:
    """The most frequent pair; among equals the last in the alphabet.

    Chapter: book/chapters/02_tokenizer.md
    """
    most = max(pairs.values())
    return max(pair for pair, n in pairs.items() if n == most)


PATTERN = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


def clean(text: str) -> str:
    """Repair, unescape twice, collapse white space, lower the case.

    Raises TypeError if text is not a str. Source: basic_clean and
    whitespace_clean in openai/CLIP, in the same order.

    Chapter: book/chapters/02_tokenizer.md
    """
    if not isinstance(text, str):
        kind = type(text).__name__
        raise TypeError(f"expected a str, got {kind}: {text!r}")
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def bytes_to_unicode() -> dict[int, str]:
    """A visible character for each byte, in the order of CLIP's ids.

    Chapter: book/chapters/02_tokenizer.md
    """
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    table = {byte: chr(byte) for byte in seen}
    return table | {byte: chr(256 + i) for i, byte in enumerate(unseen)}


BYTE_TO_CHAR = bytes_to_unicode()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}
END = "</w>"  # marks the last symbol of a word


def split(text: str) -> list[str]:
    """The words of a text, cleaned; no merge will ever cross them.

    Chapter: book/chapters/02_tokenizer.md
    """
    return PATTERN.findall(clean(text))


def symbols(word: str) -> tuple[str, ...]:
    """A word as its bytes, each a visible character, the last with </w>.

    Chapter: book/chapters/02_tokenizer.md
    """
    chars = [BYTE_TO_CHAR[byte] for byte in word.encode()]
    return (*chars[:-1], chars[-1] + END)


def as_list(texts: str | Iterable[str]) -> list[str]:
    """One text or many, as a list; TypeError says which is not a str.

    Chapter: book/chapters/02_tokenizer.md
    """
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Iterable):
        raise TypeError(
            f"expected a str or a list of str, got {type(texts).__name__}"
        )
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise TypeError(f"caption {i} is no str but {kind}: {text!r}")
    return texts


def count_words(texts: Iterable[str]) -> Counter[tuple[str, ...]]:
    """How often each word occurs in the texts, keyed by its symbols.

    Chapter: book/chapters/02_tokenizer.md
    """
    words = Counter(word for text in as_list(texts) for word in split(text))
    return Counter({symbols(word): n for word, n in words.items()})


def enter(pairs: Counter, where: dict, i: int, word: tuple, n: int) -> None:
    """Add the pairs of word i to the books n times; n may be negative.

    Chapter: book/chapters/02_tokenizer.md
    """
    for pair in zip(word, word[1:]):
        pairs[pair] += n
        if pairs[pair]:
            where[pair].add(i)
        else:
            del pairs[pair], where[pair]


def train_bpe(texts: Iterable[str], merges: int) -> list[tuple[str, str]]:
    """Learn byte-pair merges from texts, the most frequent pair first.

    Returns fewer merges only when every word has become one token. The
    first k are what merges=k learns; ties go to the last in the alphabet.

    Source: Sennrich et al. 2016, algorithm 1, over bytes.

    Chapter: book/chapters/02_tokenizer.md
    """
    if merges < 0:
        raise ValueError(f"merges must be 0 or more, got {merges}")
    counted = count_words(texts)
    words, times = list(counted), list(counted.values())
    pairs, where = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        enter(pairs, where, i, word, times[i])
    learned = []
    while pairs and len(learned) < merges:
        pair = best_pair(pairs)
        learned.append(pair)
        for i in list(where[pair]):
            enter(pairs, where, i, words[i], -times[i])
            words[i] = merge(words[i], pair)
            enter(pairs, where, i, words[i], times[i])
    return learned


def bpe(word: str, ranks: dict[tuple[str, str], int]) -> tuple[str, ...]:
    """Cut one word into tokens: the merge learned first goes first.

    Chapter: book/chapters/02_tokenizer.md
    """
    parts = symbols(word)
    while len(parts) > 1:
        rank = {p: ranks.get(p, math.inf) for p in zip(parts, parts[1:])}
        pair = min(rank, key=rank.__getitem__)
        if pair not in ranks:
            break
        parts = merge(parts, pair)
    return parts


SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def vocabulary(merges: Iterable[Sequence[str]]) -> tuple[list, list[str]]:
    """The merges as tuples, and all tokens in the order of their ids.

    Raises ValueError for a merge that cannot stand where it stands.

    Chapter: book/chapters/02_tokenizer.md
    """
    chars = list(BYTE_TO_CHAR.values())
    tokens, pairs = [*chars, *(char + END for char in chars)], []
    known = {*tokens, *SPECIAL}
    for i, pair in enumerate(merges):
        tokens.append(check_merge(i, pair, known))
        known.add(tokens[-1])
        pairs.append(tuple(pair))
    return pairs, [*tokens, *SPECIAL]


def check_merge(i: int, pair: Sequence[str], known: set[str]) -> str:
    """The token that merge i makes; ValueError says what is wrong.

    Chapter: book/chapters/02_tokenizer.md
    """
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"merge {i} is {pair!r}, expected two tokens")
    for part in pair:
        if part not in known or part in SPECIAL:
            raise ValueError(
                f"merge {i} {pair} joins {part!r}, which is neither "
                "a byte nor made by a merge before it: is the list "
                "complete and in its order?"
            )
    left, right = pair
    if left.endswith(END):
        raise ValueError(f"merge {i} {pair} goes on after a word's end")
    if left + right in known:
        raise ValueError(f"merge {i} {pair} makes a token again")
    return left + right


def join(tokens: Iterable[str]) -> str:
    """Tokens back to text, a space after each word; U+FFFD for no UTF-8.

    Chapter: book/chapters/02_tokenizer.md
    """
    raw = b""
    for token in tokens:
        stem = token.removesuffix(END)
        raw += bytes(CHAR_TO_BYTE[char] for char in stem)
        raw += b" " if stem != token else b""
    return raw.decode(errors="replace")


def fill(flat: np.ndarray, n: np.ndarray, eot: int, length: int) -> Tensor:
    """Captions in one array, n tokens each, as rows with an end token.

    Args: flat: ids, a start token before each caption's; n: (N,) counts.
    Returns: (N, length) int64, zero padded; what is too long is cut.

    Chapter: book/chapters/02_tokenizer.md
    """
    if (n >= length).any():
        place = np.arange(len(flat)) - np.repeat(n.cumsum() - n, n)
        flat, n = flat[place < length - 1], np.minimum(n, length - 1)
    ids = np.zeros((len(n), length), dtype=np.int64)
    ids[np.arange(length) < n[:, None]] = flat
    ids[np.arange(len(n)), n] = eot
    return torch.from_numpy(ids)


def check_lengths(counts: np.ndarray, length: int, truncate: bool) -> None:
    """ValueError for a row that is too long, unless truncate is given.

    Chapter: book/chapters/02_tokenizer.md
    """
    if length < 2:
        raise ValueError(
            f"context_length is {length}, start and end alone need 2"
        )
    if (counts > length).any() and not truncate:
        i = int(np.argmax(counts > length))
        raise ValueError(
            f"caption {i} has {counts[i]} tokens (start and end "
            f"included), the model reads {length}; "
            "pass truncate=True to cut it"
        )


def between(ids: Iterable[int], sot: int, eot: int) -> list[int]:
    """The ids before the first end token, without start tokens.

    Chapter: book/chapters/02_tokenizer.md
    """
    found = []
    for i in map(operator.index, ids):
        if not 0 <= i <= eot:
            raise ValueError(f"id {i} is none of the ids 0 to {eot}")
        if i == eot:
            break
        if i != sot:
            found.append(i)
    return found


def prepare(text: str) -> str:
    """What `clean` gives, but for white space; quick if text is plain.

    Chapter: book/chapters/02_tokenizer.md
    """
    if text.isascii() and text.isprintable() and "&" not in text:
        return text.lower()
    return clean(text)


START = "START"  # in capitals, so no prepared text contains it


def pieces(texts: Iterable[str]) -> list[str]:
    """What stands between spaces in all texts, a START before each text.

    Chapter: book/chapters/02_tokenizer.md
    """
    joined = f" {START} ".join(["", *map(prepare, texts)])
    return joined.split()


BYTE_TO_ID = np.argsort(list(BYTE_TO_CHAR))  # id 0 is "!", see above


def lay_out(words: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """All words as one array of byte ids, and the word of each id.

    Chapter: book/chapters/02_tokenizer.md
    """
    raw = [word.encode() for word in words]
    lengths = np.array([len(word) for word in raw], dtype=np.int64)
    ids = BYTE_TO_ID[np.frombuffer(b"".join(raw), np.uint8)]
    ids[lengths.cumsum() - 1] += 256  # the last one carries </w>
    return ids, np.repeat(np.arange(len(raw)), lengths)


NONE = np.iinfo(np.int64).max  # the rank of a pair that is no merge


def merge_table(merges: list, encoder: dict) -> tuple[np.ndarray, ...]:
    """The merges as sorted numbers left * V + right, and their ranks.

    Chapter: book/chapters/02_tokenizer.md
    """
    pairs = [encoder[a] * len(encoder) + encoder[b] for a, b in merges]
    keys = np.array([*pairs, NONE], dtype=np.int64)  # NONE ends a search
    ranks = keys.argsort()
    return keys[ranks], ranks


def find_ranks(ids: np.ndarray, table: tuple, size: int) -> np.ndarray:
    """The rank of each id with its right neighbour; NONE for the last.

    Chapter: book/chapters/02_tokenizer.md
    """
    keys, ranks = table
    pairs = ids[:-1] * size + ids[1:]
    at = np.searchsorted(keys, pairs)
    found = np.where(keys[at] == pairs, ranks[at], NONE)
    return np.append(found, NONE)


def without_overlap(hits: np.ndarray) -> np.ndarray:
    """Of places in a row the first, third, fifth: those to be merged.

    Chapter: book/chapters/02_tokenizer.md
    """
    begins = np.diff(hits, prepend=-2) > 1
    count = np.arange(len(hits))
    run = np.maximum.accumulate(np.where(begins, count, 0))
    return hits[(count - run) % 2 == 0]


GONE = -1


def bpe_batch(
    words: list[str], table: tuple, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """What `bpe` does, for all words in step.

    Returns: the ids of all words in one array; how many each word has.

    Chapter: book/chapters/02_tokenizer.md
    """
    ids, word = lay_out(words)
    at = np.arange(len(ids))  # the places where something may change
    while len(at):
        rank = find_ranks(ids[at], table, size)
        first = np.flatnonzero(np.diff(word[at], prepend=-1))
        best = np.minimum.reduceat(rank, first)  # of each word
        best = np.repeat(best, np.diff(first, append=len(at)))
        hits = np.flatnonzero((rank == best) & (best < NONE))
        hits = without_overlap(hits)
        ids[at[hits]] = 512 + rank[hits]
        ids[at[hits + 1]] = GONE
        best[hits + 1] = NONE
        at = at[best < NONE]
    kept = ids != GONE
    return ids[kept], np.bincount(word[kept], minlength=len(words))


FEW = 50  # words; below, calling numpy costs more than looping


def pack(new: list[str], tokenizer: "Tokenizer") -> list[bytes]:
    """The ids of new pieces, each piece's as the bytes of int32 numbers.

    Chapter: book/chapters/02_tokenizer.md
    """
    words = [PATTERN.findall(piece) for piece in new]
    every, t = [*chain.from_iterable(words)], tokenizer
    if len(every) < FEW:
        cuts = [bpe(word, t.ranks) for word in every]
        ids = np.array([t.encoder[part] for cut in cuts for part in cut])
        n = [len(cut) for cut in cuts]
    else:
        ids, n = bpe_batch(every, t.table, t.vocab_size)
    ends = np.append(0, n).astype(np.int64).cumsum() * 4
    ends = ends[np.cumsum([0, *map(len, words)])].tolist()
    raw = ids.astype(np.int32).tobytes()
    return [raw[a:b] for a, b in zip(ends, ends[1:])]


CACHED = 131_072  # pieces, some 20 megabytes


def remember(cache: dict, fresh: dict[str, bytes]) -> dict[str, bytes]:
    """The cache with fresh pieces, or a new one where it would overflow.

    Chapter: book/chapters/02_tokenizer.md
    """
    short = {text: ids for text, ids in fresh.items() if len(text) <= 32}
    cache = cache if len(cache) + len(short) <= CACHED else {}
    cache.update(islice(short.items(), CACHED))
    return cache


def encode_batch(texts: list[str], t: "Tokenizer") -> np.ndarray:
    """All ids of many texts in one array, a start token before each text's.

    The same ids as those of t.encode, the fast way.

    Chapter: book/chapters/02_tokenizer.md
    """
    cache, found = t.cache, pieces(texts)
    try:
        raw = b"".join(map(cache.__getitem__, found))
    except KeyError:
        new = [p for p in dict.fromkeys(found) if p not in cache]
        fresh = dict(zip(new, pack(new, t)))
        fresh[START] = np.int32(t.sot).tobytes()
        t.cache = remember(cache, fresh)
        raw = b"".join(fresh[p] if p in fresh else cache[p] for p in found)
    return np.frombuffer(raw, np.int32)


BLOCK = 1024  # captions


def to_rows(
    texts: list[str], t: "Tokenizer", length: int, truncate: bool
) -> Tensor:
    """Start, ids, end and zeros for each text: (N, length) int64.

    Raises ValueError for a text that is too long, unless truncate is
    given, and for a length below 2.

    Chapter: book/chapters/02_tokenizer.md
    """
    blocks = [texts[i : i + BLOCK] for i in range(0, len(texts), BLOCK)]
    arrays = [encode_batch(block, t) for block in blocks]
    flat = np.concatenate([np.empty(0, np.int32), *arrays])
    n = np.diff(np.flatnonzero(flat == t.sot), append=len(flat))
    check_lengths(n + 1, length, truncate)
    return fill(flat, n, t.eot, length)


class Tokenizer:
    """Byte-level BPE with the merges given; ids laid out as in openai/CLIP.

    Of the vocab_size ids, sot starts a text and eot, the highest, ends it.

    Chapter: book/chapters/02_tokenizer.md
    """

    def __init__(self, merges: Iterable[Sequence[str]]):
        self.merges, tokens = vocabulary(merges)
        self.decoder = dict(enumerate(tokens))
        self.encoder = {token: i for i, token in enumerate(tokens)}
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.table = merge_table(self.merges, self.encoder)
        self.vocab_size, self.cache = len(tokens), {}
        self.sot, self.eot = (self.encoder[token] for token in SPECIAL)

    @classmethod
    def openai(cls) -> "Tokenizer":
        """CLIP's own: 49,408 entries, from the file OpenAI published."""
        return cls(openai_merges())

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without start and end: slow and readable."""
        cuts = (bpe(word, self.ranks) for word in split(text))
        return [self.encoder[token] for cut in cuts for token in cut]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of one row, up to its end token."""
        ids = between(ids, self.sot, self.eot)
        return join(self.decoder[i] for i in ids)

    def __call__(
        self,
        texts: str | Iterable[str],
        context_length: int = 77,
        truncate: bool = False,
    ) -> Tensor:
        """Texts to int64 ids (N, context_length), padded with zeros."""
        return to_rows(as_list(texts), self, context_length, truncate)


MERGES = "bpe_simple_vocab_16e6.txt.gz"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
RESTORE_MERGES = (
    "get it back with 'git checkout data/vocabulary' or install miniclip "
    "again"
)


def openai_merges() -> list[tuple[str, ...]]:
    """The 48,894 merges of CLIP, in their order.

    Raises FileNotFoundError; ValueError if the file has another sha256.

    Chapter: book/chapters/02_tokenizer.md
    """
    path = data_dir() / "vocabulary" / MERGES
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {RESTORE_MERGES}")
    packed = path.read_bytes()
    found = hashlib.sha256(packed).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{path} was altered: its sha256 is {found[:12]}..., expected "
            f"{SHA256[:12]}...; {RESTORE_MERGES}"
        )
    lines = gzip.decompress(packed).decode().split("\n")
    return [tuple(line.split()) for line in lines[1:48_895]]


@lru_cache(maxsize=1)
def openai_tokenizer() -> Tokenizer:
    """CLIP's own tokenizer, made once.

    Chapter: book/chapters/02_tokenizer.md
    """
    return Tokenizer.openai()


def tokenize(
    texts: str | Iterable[str],
    context_length: int = 77,
    truncate: bool = False,
) -> Tensor:
    """Texts to CLIP's ids: int64 (N, context_length), padded with zeros.

    As clip.tokenize in openai/CLIP, except that no text can become a
    special token. Raises ValueError for a text that is too long, unless
    truncate=True; it keeps the end token. TypeError for what is no str.

    Chapter: book/chapters/02_tokenizer.md
    """
    return openai_tokenizer()(texts, context_length, truncate)
