"""Figures for the book: grids of pictures, and matrices with heads.

Written from book/chapters/90_show.md; edit that file.
"""

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor


def _for_matplotlib(picture: Tensor) -> np.ndarray:
    """(3, H, W) or (1, H, W), bytes or floats -> (H, W, 3), bytes."""
    picture = torch.as_tensor(picture).detach().cpu()
    if picture.ndim != 3 or len(picture) not in (1, 3):
        raise ValueError(
            f"a picture of shape {tuple(picture.shape)} cannot be shown; "
            "pass (3, H, W) or (1, H, W), or (N, 3, H, W) for several"
        )
    if picture.is_floating_point():
        low, high = picture.min().item(), picture.max().item()
        if not (-0.25 <= low and high <= 1.25):  # also catches nan
            raise ValueError(
                f"a picture with values from {low:.2f} to {high:.2f} can't "
                "be shown; undo its normalisation to get values from 0 to 1"
            )
        picture = (picture.clamp(0, 1) * 255).round()
    picture = picture.to(torch.uint8).expand(3, -1, -1)
    return picture.permute(1, 2, 0).numpy()  # (H, W, 3)


def _thumbnail(
    fig: Figure, picture: Tensor, box: Sequence[float], title: str = ""
) -> Axes:
    """Draw a picture into box: left, top, width, height in inches."""
    left, top, width, height = box
    W, H = fig.get_size_inches()
    ax = fig.add_axes(
        (left / W, 1 - (top + height) / H, width / W, height / H)
    )
    ax.imshow(_for_matplotlib(picture))
    ax.set_xticks([])
    ax.set_yticks([])
    for edge in ax.spines.values():
        edge.set_color("0.85")
    ax.set_title(title, fontsize=9, pad=2)
    return ax


def _card(width: float, height: float) -> Figure:
    """An empty white figure, width by height inches, not yet shown."""
    fig = plt.figure(figsize=(width, height), dpi=80, facecolor="white")
    plt.close(fig)
    return fig


def _head(titles: Sequence[str]) -> float:
    """The height in inches of a row of titles, given their lines."""
    lines = max((t.count("\n") + 1 for t in titles if t), default=0)
    return 0.16 * lines + 0.06


@plt.style.context("default")
def grid(
    pictures: Tensor | Sequence[Tensor],
    titles: Sequence[str] | None = None,
    columns: int = 8,
    size: float = 0.9,
) -> Figure:
    """Show pictures row by row, with or without titles.

    Write it as a notebook cell's last line: it returns the figure.

    Args:
        pictures: (N, 3, H, W), or a list of (3, H, W) or (1, H, W); bytes
            or floats from 0 to 1.
        titles: one a picture, wrapped to its width.
        size: width and height of a picture in inches.

    Raises: ValueError for a wrong number, shape or range of values.

    Chapter: book/chapters/90_show.md
    """
    pictures, titles = list(pictures), list(titles or [])
    if not pictures or len(titles) not in (0, len(pictures)):
        raise ValueError(
            f"{len(pictures)} pictures with {len(titles)} titles; "
            "pass at least one picture, and no title or one for each"
        )
    titles = [textwrap.fill(str(t), max(8, int(size * 14))) for t in titles]
    rows = range(0, len(pictures), columns)
    heads = [_head(titles[i : i + columns]) for i in rows]
    across, top = size + 0.08, 0.0
    width = across * min(columns, len(pictures))
    fig = _card(width, len(rows) * size + sum(heads))
    for first, head in zip(rows, heads):
        for i, picture in enumerate(pictures[first : first + columns]):
            box = i * across, top + head, size, size
            title = titles[first + i] if titles else ""
            _thumbnail(fig, picture, box, title)
        top += head + size
    return fig


def _write_values(ax: Axes, values: np.ndarray, digits: int) -> None:
    """Write each value into its cell, in the colour that can be read."""
    image = ax.images[0]
    for (i, j), value in np.ndenumerate(values):
        r, g, b, _ = image.cmap(image.norm(value))
        dark = 0.299 * r + 0.587 * g + 0.114 * b < 0.5  # luminance
        ax.text(
            j,
            i,
            f"{value:.{digits}f}",
            ha="center",
            va="center",
            fontsize=9,
            color="white" if dark else "black",
        )


def _heads(ax: Axes, heads, axis: str, cell: float) -> None:
    """Put heads, texts or pictures, at the left ("y") or on top ("x")."""
    ticks = getattr(ax, f"set_{axis}ticks")
    if heads is None:
        return ticks([])
    if isinstance(heads[0], str):
        long = axis == "x" and max(map(len, heads)) * 0.08 > cell
        ticks(range(len(heads)), heads, rotation=40 if long else 0)
        if long:
            plt.setp(
                ax.get_xticklabels(), ha="left", rotation_mode="anchor"
            )
        return None
    ticks([])
    fig, box = ax.figure, ax.get_position()
    W, H = fig.get_size_inches()
    left, top = box.x0 * W, (1 - box.y1) * H
    for i, picture in enumerate(heads):
        x, y = (i * cell, -cell) if axis == "x" else (-cell, i * cell)
        inner = left + x + 0.03, top + y + 0.03, cell - 0.06, cell - 0.06
        _thumbnail(fig, picture, inner)


def _check_heads(values: np.ndarray, rows, columns) -> None:
    """Raise ValueError unless the heads fit the values."""
    if values.ndim != 2 or not values.size:
        raise ValueError(
            f"values of shape {values.shape} are no matrix; pass (R, C)"
        )
    for name, heads, n in zip(
        ("rows", "columns"), (rows, columns), values.shape
    ):
        if heads is not None and len(heads) != n:
            raise ValueError(
                f"{len(heads)} heads for {n} {name}; pass one for each"
            )


def _matrix_axes(R: int, C: int, cell: float) -> tuple[Axes, Axes]:
    """A card with axes for R x C cells and, at the right, a colour bar."""
    width, height = cell * C, cell * R
    W, H = width + 2.3, height + 1.3
    fig = _card(W, H)
    ax = fig.add_axes((1.5 / W, 0.1 / H, width / W, height / H))
    ax.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    ax.tick_params(length=0, labelsize=9)
    bar = fig.add_axes(((1.6 + width) / W, 0.1 / H, 0.12 / W, height / H))
    return ax, bar


@plt.style.context("default")
def matrix(
    values: Tensor,
    rows: Tensor | Sequence | None = None,
    columns: Tensor | Sequence | None = None,
    label: str = "",
    *,
    digits: int = 2,
    size: float = 0.6,
    **colours,
) -> Figure:
    """Show an R x C matrix in colour, with texts or pictures as heads.

    Write it as a notebook cell's last line: it returns the figure.

    Args:
        rows, columns: heads at the left and on top: texts, pictures as
            `grid` takes them, or None.
        label: what the numbers are, written beside the colour bar.
        digits: digits after the point, where the cells have room for them.
        size: width and height of a cell in inches, less if there are many.
        colours: cmap, vmin, vmax, norm as in matplotlib's imshow.

    Raises: ValueError if values is no matrix or has not as many heads.

    Chapter: book/chapters/90_show.md
    """
    values = torch.as_tensor(values).detach().float().cpu().numpy()
    _check_heads(values, rows, columns)
    R, C = values.shape
    size = min(size, 5.2 / C, 3.6 / R)
    ax, bar = _matrix_axes(R, C, size)
    colours = {"cmap": "Blues", "aspect": "auto", **colours}
    image = ax.imshow(values, **colours)
    ax.figure.colorbar(image, cax=bar, label=label)
    _heads(ax, rows, "y", size)
    _heads(ax, columns, "x", size)
    if size >= 0.1 * (digits + 2):
        _write_values(ax, values, digits)
    return ax.figure
