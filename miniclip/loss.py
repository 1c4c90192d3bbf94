"""The contrastive losses: pairs in a batch, each the other's label.

Written from book/chapters/06_loss.md; edit that file.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _check(
    image_features: Tensor, text_features: Tensor, **scalars
) -> None:
    image, text = tuple(image_features.shape), tuple(text_features.shape)
    if image != text or len(image) != 2 or 0 in image:
        raise ValueError(
            f"image_features {image} and text_features {text} must have "
            "the same shape (B, E), B and E > 0: row i of both is pair i"
        )
    for name, value in scalars.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, "
                "expected one number"
            )


def _logits(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
) -> Tensor:
    """(B, B) logit_scale times cosine, in float32 or wider."""
    wide = torch.promote_types(image_features.dtype, text_features.dtype)
    wide = torch.promote_types(wide, torch.float32)
    with torch.autocast(image_features.device.type, enabled=False):
        image_features = F.normalize(image_features.to(wide), dim=-1)
        text_features = F.normalize(text_features.to(wide), dim=-1)
        return logit_scale * image_features @ text_features.T


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    concepts: Tensor | None = None,
) -> Tensor:
    """Symmetric cross-entropy over the cosine similarities of B pairs.

    Args:
        image_features, text_features: (B, E); row i of both is pair i.
            They need not be normalised.
        logit_scale: the factor s > 0 itself, not its logarithm.
        concepts: (B,) integers, optional. Two pairs with the same number
            are right answers to each other: neither counts as a mistake.

    Returns: the mean loss in nats, a scalar of at least float32; ln B for
        features that know nothing, 0 for B = 1 (nothing to confuse).

    Raises: ValueError for shapes that do not fit.

    Source: Radford et al. 2021, section 2.3 and figure 3; the mask is ours.

    Chapter: book/chapters/06_loss.md
    """
    _check(image_features, text_features, logit_scale=logit_scale)
    logits_per_image = _logits(image_features, text_features, logit_scale)
    if concepts is not None:
        rivals = _rivals(concepts, logits_per_image)
        logits_per_image = logits_per_image.masked_fill(rivals, -math.inf)
    labels = torch.arange(
        len(logits_per_image), device=logits_per_image.device
    )
    per_image = F.cross_entropy(logits_per_image, labels)
    per_text = F.cross_entropy(logits_per_image.T, labels)
    return (per_image + per_text) / 2


def _rivals(concepts: Tensor, logits: Tensor) -> Tensor:
    """(B, B) True where two different pairs share a concept."""
    concepts = torch.as_tensor(concepts, device=logits.device)
    if concepts.shape != (len(logits),):
        raise ValueError(
            f"concepts has shape {tuple(concepts.shape)}, expected "
            f"({len(logits)},): one number for each pair"
        )
    same = concepts[:, None] == concepts
    return same.fill_diagonal_(False)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
) -> Tensor:
    """Sigmoid loss: each of the B x B pairs is a yes-or-no question.

    Args:
        image_features, text_features: (B, E); row i of both is pair i.
            They need not be normalised.
        logit_scale: the factor t > 0 itself, not its logarithm.
        logit_bias: b, added to every logit; start it at -10.

    Returns: the sum over all pairs divided by B, in nats, a scalar of at
        least float32.

    Raises: ValueError for shapes that do not fit.

    Source: Zhai et al. 2023, section 3.2 and algorithm 1.

    Chapter: book/chapters/06_loss.md
    """
    _check(
        image_features,
        text_features,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
    )
    logits = (
        _logits(image_features, text_features, logit_scale) + logit_bias
    )
    signs = 2 * torch.eye(len(logits)).to(logits) - 1  # 1 on the diagonal
    return -F.logsigmoid(signs * logits).sum() / len(logits)
