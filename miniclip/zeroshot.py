"""A classifier made of words, and how far to trust its score.

Written from book/chapters/14_zeroshot.md; edit that file.
"""

import argparse
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import miniclip
from miniclip.data import (
    STYLES,
    UNSEEN_STYLE,
    EmojiDataset,
    data_dir,
    read_emoji,
)
from miniclip.model import CLIP, available_models, load
from miniclip.tokenizer import clean


def _check_names(names: Sequence[str]) -> None:
    """Raise ValueError unless names are some, different, and not blank."""
    if isinstance(names, str) or not len(names):
        raise ValueError(f"names={names!r}, expected a list of names")
    count = Counter(map(clean, names))
    if "" in count:
        raise ValueError("a name is blank; there is nothing to encode")
    twice = sorted({name for name in names if count[clean(name)] > 1})
    if twice:
        raise ValueError(
            f"{twice} are there twice, as the model reads them; "
            "pass each name once, as equal names cannot be told apart"
        )


def _check_templates(templates: Sequence[str]) -> None:
    """Raise ValueError unless each template has a place for the name."""
    if isinstance(templates, str) or not len(templates):
        raise ValueError(
            f"templates={templates!r}, expected a list such as ['{{}}']"
        )
    for template in templates:
        try:
            filled = template.format("\0")
        except (KeyError, IndexError, ValueError):
            filled = ""
        if "\0" not in filled:
            raise ValueError(
                f"template {template!r} has no place for the name; "
                "write {} where it goes, once, and no other braces"
            )


@torch.no_grad()
def zeroshot_classifier(
    model: CLIP,
    names: Sequence[str],
    templates: Sequence[str] = ("{}",),
    batch: int = 1024,
) -> Tensor:
    """The weights of a classifier made of words: (N, E), rows of length 1.

    Each row is the mean over the templates of the name's normalised text
    features, normalised again.

    Args:
        model: a CLIP with its tokenizer.
        templates: texts with {} where the name goes.
        batch: how many texts are encoded at once.

    Raises: ValueError for a model without tokenizer, no name, a blank one,
        names that the tokenizer reads as equal, a template without {}, or
        a text that is too long for the model.

    Source: Radford et al. 2021, sections 3.1.2 and 3.1.4.

    Chapter: book/chapters/14_zeroshot.md
    """
    _check_names(names)
    _check_templates(templates)
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer; set model.tokenizer")
    mean = 0.0
    for template in templates:
        texts = [template.format(name) for name in names]
        ids = model.tokenizer(texts, model.context_length)
        ids = ids.to(model.logit_scale.device)
        parts = [model.encode_text(b) for b in ids.split(batch)]
        mean = mean + F.normalize(torch.cat(parts), dim=-1) / len(templates)
    return F.normalize(mean, dim=-1)


@torch.no_grad()
def image_vectors(
    model: CLIP, preprocess, images: Tensor, batch: int = 256
) -> Tensor:
    """Features of many pictures, batch by batch: (N, E), rows of length 1.

    Args:
        model: a CLIP in evaluation mode.
        preprocess: what `miniclip.load` returned beside the model.
        images: (N, 3, H, W) uint8.

    Raises: ValueError for a model in training mode, or no pictures.

    Chapter: book/chapters/14_zeroshot.md
    """
    if model.training:
        raise ValueError(
            "the model is in training mode, where batch norm mixes the "
            "pictures of a batch; call model.eval() first"
        )
    if images.ndim != 4 or not len(images):
        raise ValueError(
            f"images has shape {tuple(images.shape)}, expected "
            "(N, 3, H, W) with N > 0; for a single picture pass image[None]"
        )
    device = model.logit_scale.device
    parts = [
        model.encode_image(preprocess(b).to(device))
        for b in images.split(batch)
    ]
    return F.normalize(torch.cat(parts), dim=-1)


def wilson_interval(
    right: int, total: int, z: float = 1.96
) -> tuple[float, float]:
    """Where the true share of right answers lies, 95 times in 100.

    Args:
        right: how many of total answers are right; the answers must be
            independent of each other.
        z: 1.96 for 95 %, 2.576 for 99 %.

    Returns: (low, high), with 0 <= low <= right / total <= high <= 1.

    Raises: ValueError unless 0 <= right <= total and total > 0.

    Source: Wilson 1927, Journal of the American Statistical Association.

    Chapter: book/chapters/14_zeroshot.md
    """
    if not 0 <= right <= total or total == 0:
        raise ValueError(
            f"{right} right of {total}, expected 0 <= right <= total "
            "and at least one answer"
        )
    p, n = right / total, total
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    whole = 1 + z * z / n
    low, high = (centre - half) / whole, (centre + half) / whole
    return max(0.0, min(low, p)), min(1.0, max(high, p))


def _check_score(similarity: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless each picture has a name among the columns."""
    shape = tuple(similarity.shape)
    if len(shape) != 2 or 0 in shape or labels.shape != shape[:1]:
        raise ValueError(
            f"similarity {shape} and labels {tuple(labels.shape)}, "
            "expected (B, N) and (B,), B and N > 0"
        )
    low, high = labels.min().item(), labels.max().item()
    if labels.is_floating_point() or low < 0 or high >= shape[1]:
        raise ValueError(
            f"labels of {labels.dtype} from {low} to {high}, expected "
            f"whole numbers from 0 to {shape[1] - 1}, the columns"
        )
    if not similarity.isfinite().all():
        raise ValueError("similarity has values that are not finite")


def score(similarity: Tensor, labels: Tensor) -> dict:
    """Top-1 and top-5 of B pictures among N names, chance and intervals.

    A tie is lost: the right name must fit better than all others to be
    the first, and better than all but four to be among five.

    Args:
        similarity: (B, N), larger is better.
        labels: (B,) the column of each picture's right name.

    Returns: pictures, names, chance (of top-1), top1, its Wilson interval
        low and high, top5, and low5 and high5; shares from 0 to 1.

    Raises: ValueError for shapes or labels that do not fit, or nan.

    Chapter: book/chapters/14_zeroshot.md
    """
    _check_score(similarity, labels)
    B, N = similarity.shape
    own = similarity.gather(1, labels[:, None])  # (B, 1)
    rank = (similarity >= own).sum(dim=1) - 1  # 0 is the best
    scores = {"pictures": B, "names": N, "chance": 1 / N}
    for k, end in (1, ""), (5, "5"):
        right = int((rank < k).sum())
        low, high = wilson_interval(right, B)
        scores |= {f"top{k}": right / B, f"low{end}": low}
        scores[f"high{end}"] = high
    return scores


def emoji_names() -> dict[str, str]:
    """The names to choose from, sorted, each with its split.

    They are the concepts that Noto draws: all but the flags of countries.

    Chapter: book/chapters/14_zeroshot.md
    """
    found = read_emoji(["noto"])
    return dict(sorted((r["concept"], r["split"]) for r, _ in found))


TEST_SETS = (  # concepts, style, names to choose from
    ("seen", "seen", "all"),
    ("seen", "unseen", "all"),
    ("held-out", "seen", "held-out"),
    ("held-out", "seen", "all"),
    ("held-out", "unseen", "held-out"),
    ("held-out", "unseen", "all"),
    ("any", "unseen", "all"),
)


SPLITS = {
    "seen": ["train"],
    "held-out": ["test"],
    "any": ["train", "val", "test"],
}


def emoji_exam(
    model: CLIP, preprocess, styles: Sequence[str] = STYLES
) -> tuple[EmojiDataset, Tensor]:
    """All pictures of the four test sets, and their vectors (N, E).

    Chapter: book/chapters/14_zeroshot.md
    """
    data = EmojiDataset(styles, concepts=emoji_names().keys())
    return data, image_vectors(model, preprocess, data.images)


def _part(data: EmojiDataset, concepts: str, style: str) -> list[int]:
    """Which pictures belong to a test set."""
    return [
        i
        for i, r in enumerate(data.records)
        if r["split"] in SPLITS[concepts]
        and (r["style"] == UNSEEN_STYLE) == (style == "unseen")
    ]


def four_test_sets(
    model: CLIP,
    preprocess,
    exam: tuple[EmojiDataset, Tensor] | None = None,
) -> list[dict]:
    """Score a model on seen and held-out concepts, seen and unseen style.

    Args:
        exam: what `emoji_exam` returned for this model, if it is there.

    Returns: one dict for each line of TEST_SETS: concepts, style, among,
        and what `score` returns. "seen" in "seen" are training pictures.

    Chapter: book/chapters/14_zeroshot.md
    """
    data, u = exam or emoji_exam(model, preprocess)
    splits, rows = emoji_names(), []
    for concepts, style, among in TEST_SETS:
        wanted = SPLITS["any" if among == "all" else among]
        names = [name for name, split in splits.items() if split in wanted]
        v = zeroshot_classifier(model, names)
        part = _part(data, concepts, style)
        column = {name: j for j, name in enumerate(names)}
        labels = [column[data.records[i]["concept"]] for i in part]
        scores = score(u[part] @ v.T, torch.tensor(labels).to(u.device))
        about = {"concepts": concepts, "style": style, "among": among}
        rows.append({**about, **scores})
    return rows


def table(rows: list[dict]) -> str:
    """The result of `four_test_sets` as text.

    Chapter: book/chapters/14_zeroshot.md
    """
    lines = ["concepts style  pictures names chance  top-1  (95 %)   top-5"]
    for r in rows:
        lines.append(
            f"{r['concepts']:8} {r['style']:6} {r['pictures']:8,} "
            f"{r['names']:5,} {r['chance']:6.2%} {r['top1']:6.1%} "
            f"({r['low']:.0%}-{r['high']:.0%}) {r['top5']:6.1%}"
        )
    return "\n".join(lines)


def _sha256(model: str) -> str:
    """The fingerprint of a checkpoint's weights."""
    folder = Path(model)
    if model in available_models():
        folder = data_dir() / "checkpoints" / model
    weights = (folder / "model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m miniclip.zeroshot",
        description="Score a model on the four test sets.",
    )
    parser.add_argument("model", help="a name such as emoji, or a folder")
    parser.add_argument("--out", type=Path, help="write JSON to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the four test sets of a model, and write them as JSON.

    Chapter: book/chapters/14_zeroshot.md
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        model, preprocess = load(args.model)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    rows = four_test_sets(model, preprocess)
    print(table(rows))
    if args.out is None:
        return
    command = f"python -m miniclip.zeroshot {args.model} --out {args.out}"
    result = {
        "command": command,
        "model": args.model,
        "sha256": _sha256(args.model),
        "miniclip": miniclip.__version__,
        "torch": torch.__version__,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__" and __spec__ is not None:  # not in a notebook
    main()
