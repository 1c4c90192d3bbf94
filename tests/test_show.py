"""The figures of the book: what is drawn, where, and what is refused."""

import io
import warnings

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch

from miniclip.show import grid, matrix


def pictures(n: int, size: int = 4) -> torch.Tensor:
    g = torch.Generator().manual_seed(n)
    shape = n, 3, size, size
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)


def drawn(ax) -> torch.Tensor:
    """What an axes shows, (3, H, W) bytes."""
    return torch.tensor(ax.images[0].get_array()).permute(2, 0, 1)


def png(fig) -> bytes:
    out = io.BytesIO()
    fig.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def test_grid_draws_the_pictures_in_order_unchanged():
    x = pictures(10)
    fig = grid(x, titles=[f"t{i}" for i in range(10)], columns=4)
    assert len(fig.axes) == 10
    for i, ax in enumerate(fig.axes):
        assert torch.equal(drawn(ax), x[i])
        assert ax.get_title() == f"t{i}"


def test_grid_fills_rows_from_the_left_and_top():
    axes = grid(pictures(5), columns=3).axes
    at = [ax.get_position().bounds[:2] for ax in axes]
    x, y = [[round(v, 6) for v in xy] for xy in zip(*at)]
    assert x[0] < x[1] < x[2] and x[3:] == x[:2]
    assert y[0] == y[1] == y[2] > y[3] == y[4]


@pytest.mark.parametrize(
    "n, columns, lines", [(1, 8, 0), (9, 4, 0), (7, 3, 1), (10, 8, 3)]
)
def test_nothing_overlaps_and_nothing_is_cut(n, columns, lines):
    titles = ["\n".join(["seven"] * lines)] * n if lines else None
    fig = grid(pictures(n), titles=titles, columns=columns)
    boxes = [ax.get_position().padded(-1e-9) for ax in fig.axes]
    for i, a in enumerate(boxes):
        assert 0 <= a.x0 < a.x1 <= 1 and 0 <= a.y0 < a.y1 <= 1
        assert not any(a.overlaps(b) for b in boxes[:i])
    assert min(box.y0 for box in boxes) < 1e-6  # no room left below
    text = fig.axes[0].title.get_window_extent()
    assert fig.axes[0].bbox.y1 <= text.y0 + 2 and text.y1 <= fig.bbox.y1 + 1


def test_grid_takes_bytes_floats_grey_and_several_sizes():
    half = torch.full((3, 2, 2), 0.5)
    grey = torch.full((1, 5, 3), 7, dtype=torch.uint8)
    fig = grid([half, grey, half.double()])
    assert drawn(fig.axes[0]).unique().tolist() == [128]
    assert drawn(fig.axes[1]).shape == (3, 5, 3)
    assert drawn(fig.axes[1]).unique().tolist() == [7]


def test_a_small_overshoot_is_clamped_and_more_is_refused():
    ax = grid([torch.tensor([-0.2, 0.0, 1.2])[:, None, None]]).axes[0]
    assert drawn(ax).flatten().tolist() == [0, 0, 255]
    with pytest.raises(ValueError, match=r"-2.00 to 2.00.*normalisation"):
        grid([torch.tensor([-2.0, 0.0, 2.0])[:, None, None]])
    with pytest.raises(ValueError, match="nan"):
        grid([torch.full((3, 2, 2), float("nan"))])


@pytest.mark.parametrize("shape", [(4, 2, 2), (2, 2, 3), (2, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="cannot be shown"):
        grid([torch.zeros(shape)])


def test_the_number_of_titles_must_fit():
    with pytest.raises(ValueError, match="3 pictures with 2 titles"):
        grid(pictures(3), titles=["a", "b"])
    with pytest.raises(ValueError, match="0 pictures"):
        grid([])


def test_long_titles_are_wrapped():
    title = grid(pictures(1), titles=["woman and man holding hands"])
    assert all(len(x) <= 14 for x in title.axes[0].get_title().split("\n"))


def test_figures_are_closed_white_and_always_the_same():
    x = pictures(3)
    before = plt.get_fignums()
    first = png(grid(x, titles=["a", "b", "c"]))
    m = png(matrix(torch.eye(3), rows=x, columns=["a", "b", "c"]))
    with plt.style.context("dark_background"):
        fig = grid(x, titles=["a", "b", "c"])
        assert fig.get_facecolor() == (1, 1, 1, 1)
        assert png(fig) == first
        assert png(matrix(torch.eye(3), x, ["a", "b", "c"])) == m
    assert plt.get_fignums() == before


def test_matrix_writes_every_value_in_its_cell():
    values = torch.tensor([[0.0, 0.25, 1.0], [-1.0, 0.5, 0.125]])
    fig = matrix(
        values, rows=["p", "q"], columns=["x", "y", "z"], label="cos"
    )
    ax, bar = fig.axes
    at = {t.get_position(): t.get_text() for t in ax.texts}
    assert at[(2, 0)] == "1.00" and at[(0, 1)] == "-1.00"
    assert at[(1, 1)] == "0.50" and len(at) == 6
    assert [t.get_text() for t in ax.get_yticklabels()] == ["p", "q"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["x", "y", "z"]
    assert bar.get_ylabel() == "cos"


def test_numbers_are_white_on_dark_cells_only():
    ax = matrix(torch.tensor([[0.0, 1.0]])).axes[0]
    assert [t.get_color() for t in ax.texts] == ["black", "white"]


def test_matrix_heads_may_be_pictures_beside_their_row_and_column():
    x = pictures(3)
    fig = matrix(torch.rand(3, 2), rows=x, columns=x[:2])
    ax, _, *heads = fig.axes
    box = ax.get_position()
    for i, head in enumerate(heads[:3]):
        assert torch.equal(drawn(head), x[i])
        at = head.get_position()
        assert at.x1 <= box.x0
        middle = box.y1 - (i + 0.5) * box.height / 3
        assert abs((at.y0 + at.y1) / 2 - middle) < 1e-6
    for j, head in enumerate(heads[3:]):
        assert torch.equal(drawn(head), x[j])
        at = head.get_position()
        assert at.y0 >= box.y1
        middle = box.x0 + (j + 0.5) * box.width / 2
        assert abs((at.x0 + at.x1) / 2 - middle) < 1e-6


def test_a_large_matrix_fits_the_page_and_has_no_numbers():
    fig = matrix(torch.rand(64, 64))
    assert fig.get_size_inches().max() <= 7.5 and not fig.axes[0].texts


def test_matrix_says_what_does_not_fit():
    with pytest.raises(ValueError, match="2 heads for 3 rows"):
        matrix(torch.eye(3), rows=["a", "b"])
    with pytest.raises(ValueError, match="4 heads for 3 columns"):
        matrix(torch.eye(3), columns=pictures(4))
    with pytest.raises(ValueError, match="no matrix"):
        matrix(torch.ones(3))


def test_matrix_takes_gradients_and_colour_limits_silently():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = torch.eye(2, requires_grad=True).bfloat16()
        fig = matrix(values, cmap="RdBu", vmin=-1, vmax=1)
    assert fig.axes[0].images[0].get_clim() == (-1, 1)
