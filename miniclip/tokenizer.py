"""Byte-level BPE: from text to token ids and back, as CLIP does it.

Written from book/chapters/02_tokenizer.md; edit that file.
"""

import html
import math
import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import ftfy
import regex
import torch
from torch import Tensor


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


def stack(rows: list[list[int]], length: int, truncate: bool) -> Tensor:
    """Rows of ids, start and end included, as one (N, length) tensor.

    Raises ValueError for a row that is longer, unless truncate is given.

    Chapter: book/chapters/02_tokenizer.md
    """
    if length < 2:
        raise ValueError(
            f"context_length is {length}, start and end alone need 2"
        )
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        if len(row) > length and not truncate:
            raise ValueError(
                f"caption {i} has {len(row)} tokens (start and end "
                f"included), the model reads {length}; "
                "pass truncate=True to cut it"
            )
        row = row if len(row) <= length else [*row[: length - 1], row[-1]]
        ids[i, : len(row)] = torch.tensor(row)
    return ids


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


CACHED_WORDS = 65_536


def encode_word(word: str, ranks: dict, encoder: dict, cache: dict) -> list:
    """The ids of one word; a full cache is emptied before it takes more.

    Chapter: book/chapters/02_tokenizer.md
    """
    ids = cache.get(word)
    if ids is None:
        ids = [encoder[token] for token in bpe(word, ranks)]
        if len(cache) >= CACHED_WORDS:
            cache.clear()
        cache[word] = ids
    return ids


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
        self.vocab_size, self.cache = len(tokens), {}
        self.sot, self.eot = (self.encoder[token] for token in SPECIAL)

    def encode(self, text: str) -> list[int]:
        """The ids of any text, without start and end."""
        ids = []
        for word in split(text):
            ids += encode_word(word, self.ranks, self.encoder, self.cache)
        return ids

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
        rows = [self.encode(text) for text in as_list(texts)]
        rows = [[self.sot, *row, self.eot] for row in rows]
        return stack(rows, context_length, truncate)
