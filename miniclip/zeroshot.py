"""A classifier made of words, and how far to trust its score."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.data import SEEN_STYLES, UNSEEN_STYLE, EmojiDataset
from miniclip.model import CLIP, load


@torch.no_grad()
def zeroshot_classifier(
    model: CLIP, names: Sequence[str], templates: Sequence[str] = ("{}",)
) -> Tensor:
    """One unit vector for each name, the mean over its templates: (N, E)."""
    total = torch.zeros(())
    for template in templates:
        texts = [template.format(name) for name in names]
        ids = model.tokenizer(texts, model.context_length)
        total = total + F.normalize(model.encode_text(ids), dim=-1)
    return F.normalize(total, dim=-1)


@torch.no_grad()
def image_vectors(model: CLIP, preprocess, images: Tensor, batch: int = 256) -> Tensor:
    """Unit vectors of many pictures, batch by batch: (N, E)."""
    parts = [model.encode_image(preprocess(b)) for b in images.split(batch)]
    return F.normalize(torch.cat(parts), dim=-1)


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Where the true share of right answers lies, 95 times in 100."""
    p, n = right / total, total
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def score(similarity: Tensor, labels: Tensor) -> dict:
    """Top-1 and top-5 of (B, N) similarities, with chance and interval."""
    total, N = similarity.shape
    best = similarity.topk(min(5, N), dim=1).indices == labels[:, None]
    right = int(best[:, 0].sum())
    low, high = wilson_interval(right, total)
    return {
        "pictures": total,
        "names": N,
        "chance": 1 / N,
        "top1": right / total,
        "low": low,
        "high": high,
        "top5": int(best.any(dim=1).sum()) / total,
    }
