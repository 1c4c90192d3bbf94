"""The Vision Transformer: a picture cut into patches, read like a text.

Written from book/chapters/04_vit.md; edit that file.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.text import Transformer, noise


def check_grid(image_resolution: int, patch_size: int) -> None:
    """Raise ValueError unless patches cover the picture exactly.

    Chapter: book/chapters/04_vit.md
    """
    if image_resolution % patch_size:
        raise ValueError(
            f"image_resolution {image_resolution} is not a multiple of "
            f"patch_size {patch_size}; {image_resolution % patch_size} "
            "pixels of each row and column would be lost"
        )


def check_image(image: Tensor, image_resolution: int) -> None:
    """Raise ValueError, saying what is wrong, unless a ViT can read it.

    Chapter: book/chapters/04_vit.md
    """
    side = image_resolution
    if image.ndim != 4 or image.shape[1:] != (3, side, side):
        raise ValueError(
            f"image has shape {tuple(image.shape)}, expected "
            f"(B, 3, {side}, {side}); resize with preprocess, and give a "
            "single picture as image[None]"
        )
    if not image.is_floating_point():
        raise ValueError(
            f"image is {image.dtype}, expected floats from preprocess"
        )


class VisionTransformer(nn.Module):
    """Pictures (B, 3, H, W) to image_features (B, embed_dim).

    H = W = image_resolution, a multiple of patch_size (else ValueError).
    Names as in openai/CLIP. Source: Dosovitskiy et al. 2021.

    Chapter: book/chapters/04_vit.md
    """

    def __init__(
        self,
        image_resolution: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        activation: str = "quick_gelu",
    ):
        super().__init__()
        check_grid(image_resolution, patch_size)
        self.image_resolution = image_resolution
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        std, grid = width**-0.5, image_resolution // patch_size
        place = noise(std, grid**2 + 1, width)
        self.class_embedding = noise(std, width)
        self.positional_embedding = place
        self.ln_pre = nn.LayerNorm(width)
        sizes = width, layers, heads
        self.transformer = Transformer(*sizes, activation=activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = noise(std, width, embed_dim)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) floats, preprocessed -> (B, E), not normalised."""
        check_image(image, self.image_resolution)
        x = self.conv1(image).flatten(2).transpose(1, 2)  # (B, L - 1, D)
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))  # (B, L, D)
        return self.ln_post(x[:, 0]) @ self.proj


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Positions (1 + g * g, D) of one grid -> (1 + grid * grid, D).

    The first row, which belongs to no place, stays; the others are
    resized like a picture of g by g pixels, bicubic with antialiasing.

    Raises: ValueError if the places make no square.
    Source: resize_pos_embed of open_clip, to which it is equal.

    Chapter: book/chapters/04_vit.md
    """
    first, places = table[:1], table[1:]
    g = math.isqrt(len(places))
    if g < 1 or g * g != len(places):
        raise ValueError(
            f"a table of {len(table)} positions, expected 1 + g * g for a "
            "grid of g by g places"
        )
    if g == grid:
        return table
    picture = places.float().T.reshape(1, -1, g, g)  # (1, D, g, g)
    picture = F.interpolate(
        picture, (grid, grid), mode="bicubic", antialias=True
    )
    return torch.cat([first, picture[0].flatten(1).T.to(table.dtype)])
