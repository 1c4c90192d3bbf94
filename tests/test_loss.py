"""The losses, against loops, open_clip and finite differences.

Tolerances: float64 agrees with open_clip to 1e-12, float32 to 1e-5
relative (1e-6 absolute), values and all gradients.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from miniclip.loss import clip_loss, siglip_loss

TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
}
DTYPES = list(TOLERANCE)


def features(B=8, E=16, dtype=torch.float64, seed=0):
    """Features far from length 1, as encoders give them."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, B, E, generator=g, dtype=torch.float64)
    return (3 * a).to(dtype), (0.5 * b + 0.1).to(dtype)


def with_gradients(loss_fn, *values):
    leaves = [x.clone().requires_grad_() for x in values]
    loss = loss_fn(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def unit(x):
    return F.normalize(x, dim=-1)


def loss_by_loops(a, b, s, concepts=None):
    """Equations of the chapter, one pair at a time, in Python numbers."""
    u, v = unit(a), unit(b)
    B = len(u)
    z = [[s * float(u[i] @ v[j]) for j in range(B)] for i in range(B)]
    ids = list(range(B)) if concepts is None else list(concepts)
    total = 0.0
    for i in range(B):
        keep = [j for j in range(B) if j == i or ids[j] != ids[i]]
        row = math.log(sum(math.exp(z[i][j] - z[i][i]) for j in keep))
        column = math.log(sum(math.exp(z[j][i] - z[i][i]) for j in keep))
        total += (row + column) / 2
    return total / B


# ------------------------------------------------------------ clip_loss


def test_hand_made_example():
    # logits [[0, 0], [ln 3, 0]]: rows pay ln 2 and ln 4, columns ln 4, ln 2
    a = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    a = F.pad(a, (0, 1))
    loss = clip_loss(a, b.double(), math.log(3))
    assert loss.item() == pytest.approx((math.log(2) + math.log(4)) / 2)


@pytest.mark.parametrize("concepts", [None, [0, 1, 0, 2, 2, 2, 3, 4]])
def test_equals_the_loops(concepts):
    a, b = features()
    ids = None if concepts is None else torch.tensor(concepts)
    ours = clip_loss(a, b, 7.0, concepts=ids).item()
    assert ours == pytest.approx(loss_by_loops(a, b, 7.0, concepts), 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("B", [2, 33])
def test_clip_loss_is_open_clips(dtype, scale, B):
    from open_clip.loss import ClipLoss

    values = *features(B, dtype=dtype), torch.tensor(scale, dtype=dtype)
    ours = with_gradients(clip_loss, *values)
    theirs = with_gradients(
        lambda a, b, s: ClipLoss()(unit(a), unit(b), s), *values
    )
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x, y, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale,bias", [(10.0, -10.0), (30.0, -4.0)])
@pytest.mark.parametrize("B", [2, 33])
def test_siglip_loss_is_open_clips(dtype, scale, bias, B):
    from open_clip.loss import SigLipLoss

    s, b = (torch.tensor(x, dtype=dtype) for x in (scale, bias))
    values = *features(B, dtype=dtype), s, b
    ours = with_gradients(siglip_loss, *values)
    theirs = with_gradients(
        lambda a, b, s, t: SigLipLoss()(unit(a), unit(b), s, t), *values
    )
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x, y, **TOLERANCE[dtype])


def test_gradients_against_finite_differences():
    a, b = (x.requires_grad_() for x in features(5, 4))
    s = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 0, 2, 1])
    torch.autograd.gradcheck(clip_loss, (a, b, s))
    torch.autograd.gradcheck(
        lambda a, b, s: clip_loss(a, b, s, concepts=ids), (a, b, s)
    )
    torch.autograd.gradcheck(siglip_loss, (a, b, s, bias))


def test_scale_gradient_by_hand():
    a, b = features()
    s = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    clip_loss(a, b, s).backward()
    cosine = unit(a) @ unit(b).T
    P, Q = (5 * cosine).softmax(1), (5 * cosine).softmax(0)
    expected = (P * cosine).sum(1).mean() + (Q * cosine).sum(0).mean()
    by_hand = expected / 2 - cosine.diagonal().mean()
    torch.testing.assert_close(s.grad, by_hand)


@pytest.mark.parametrize("B", [2, 64, 512])
def test_ignorance_costs_log_b(B):
    a, b = torch.ones(2, B, 4)  # all alike
    assert clip_loss(a, b, 14.3).item() == pytest.approx(math.log(B), 1e-5)


@given(seed=st.integers(0, 999), B=st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_symmetries(seed, B):
    a, b = features(B, 6, seed=seed)
    ids = torch.arange(B) // 3
    loss = clip_loss(a, b, 9.0, concepts=ids)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    shuffled = clip_loss(a[order], b[order], 9.0, concepts=ids[order])
    swapped = clip_loss(b, a, 9.0, concepts=ids)
    longer = clip_loss(7 * a, b / 5, 9.0, concepts=ids)
    renamed = clip_loss(a, b, 9.0, concepts=-17 * ids + 1000)
    for other in (shuffled, swapped, longer, renamed):
        torch.testing.assert_close(loss, other)
    assert loss >= 0


def test_one_pair_teaches_nothing():
    for ids in (None, torch.tensor([3])):
        loss, *gradients = with_gradients(
            lambda a, b, s, ids=ids: clip_loss(a, b, s, concepts=ids),
            *features(1),
            torch.tensor(10.0),
        )
        assert loss == 0
        assert all((g == 0).all() for g in gradients)


# ----------------------------------------------------- rivals in a batch


def test_different_concepts_change_nothing():
    a, b = features()
    same = clip_loss(a, b, 9.0, concepts=torch.randperm(8))
    assert torch.equal(same, clip_loss(a, b, 9.0))


def test_rivals_neither_pay_nor_get_gradient():
    a, b = features(4)
    ids = torch.tensor([5, 5, 5, 5])
    loss, *gradients = with_gradients(
        lambda a, b: clip_loss(a, b, 9.0, concepts=ids), a, b
    )
    assert loss == 0
    assert all((g == 0).all() for g in gradients)


def test_mask_lifts_the_floor():
    ids = torch.tensor([0, 0, 0, 1, 2, 2, 3])
    perfect = F.one_hot(ids).double()
    floor = (3 * math.log(3) + 2 * math.log(2)) / 7
    plain = clip_loss(perfect, perfect, 100.0).item()
    assert plain == pytest.approx(floor, 1e-9)
    assert clip_loss(perfect, perfect, 100.0, concepts=ids) < 1e-9


def test_no_model_beats_the_floor():
    ids = torch.tensor([0, 0, 0, 1, 2, 2, 3])
    floor = (3 * math.log(3) + 2 * math.log(2)) / 7
    for seed in range(20):
        a, b = features(7, seed=seed)
        assert clip_loss(a, b[ids], 30.0) > floor  # equal captions


def test_mask_never_pushes_a_picture_from_its_own_name():
    """The columns push the best of k drawings away; the mask stops it."""
    ids = torch.tensor([0, 0, 1])
    names = torch.eye(3, dtype=torch.float64)[ids]
    pictures = torch.tensor(
        [[0.99, 0.0, 0.14], [0.4, 0.0, 0.92], [0.0, 1.0, 0.0]]
    ).double()

    def towards_own_name(concepts):
        leaf = pictures.clone().requires_grad_()
        clip_loss(leaf, names, 14.3, concepts=concepts).backward()
        return -leaf.grad[0, 0]  # where descent moves the best picture

    assert towards_own_name(None) < 0 < towards_own_name(ids)


def test_concepts_may_be_a_list():
    a, b = features(3)
    ids = [1, 1, 2]
    assert torch.equal(
        clip_loss(a, b, 9.0, concepts=ids),
        clip_loss(a, b, 9.0, concepts=torch.tensor(ids)),
    )


# --------------------------------------------------------------- siglip


@pytest.mark.parametrize(
    "B,expected", [(32, 10.00145), (1024, 10.04649), (32768, 11.48763)]
)
def test_siglip_at_the_start(B, expected):
    """Cosine 0, t = 10, b = -10; the largest batch by the formula."""
    formula = math.log1p(math.e**10) + (B - 1) * math.log1p(math.e**-10)
    assert formula == pytest.approx(expected, abs=1e-5)
    if B <= 1024:
        a, b = torch.zeros(2, B, 2, dtype=torch.float64)
        a[:, 0] = b[:, 1] = 1  # every picture at right angles to all text
        loss = siglip_loss(a, b, 10.0, -10.0).item()
        assert loss == pytest.approx(expected, abs=1e-5)


def test_siglip_is_binary_cross_entropy():
    a, b = features()
    logits = 10 * unit(a) @ unit(b).T - 3
    expected = F.binary_cross_entropy_with_logits(
        logits, torch.eye(8, dtype=torch.float64), reduction="sum"
    )
    torch.testing.assert_close(siglip_loss(a, b, 10.0, -3.0), expected / 8)


# ------------------------------------------------- precision and errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss_fn", [clip_loss, siglip_loss])
def test_half_precision_is_widened(dtype, loss_fn):
    a, b = features(64, dtype=dtype)
    rest = [100.0] if loss_fn is clip_loss else [100.0, -10.0]
    ours, *gradients = with_gradients(
        lambda a, b: loss_fn(a, b, *rest), a, b
    )
    assert ours.dtype == torch.float32
    assert torch.equal(ours, loss_fn(a.float(), b.float(), *rest))
    for gradient in gradients:
        assert gradient.dtype == dtype and gradient.isfinite().all()


def test_autocast_does_not_narrow_the_logits():
    a, b = features(64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = clip_loss(a, b, 100.0), siglip_loss(a, b, 100.0, -10.0)
    outside = clip_loss(a, b, 100.0), siglip_loss(a, b, 100.0, -10.0)
    assert inside == outside
    assert all(x.dtype == torch.float32 for x in inside)


def test_a_scale_of_shape_one_is_fine():
    a, b = features()
    s = torch.tensor([9.0])
    assert clip_loss(a, b, s).shape == ()
    torch.testing.assert_close(clip_loss(a, b, s), clip_loss(a, b, 9.0))
    loss = siglip_loss(a, b, s, torch.tensor([-3.0]))
    torch.testing.assert_close(loss, siglip_loss(a, b, 9.0, -3.0))


@pytest.mark.parametrize("loss_fn", [clip_loss, siglip_loss])
@pytest.mark.parametrize(
    "image,text",
    [
        ((3, 4), (2, 4)),
        ((3, 4), (3, 5)),
        ((4,), (4,)),
        ((2, 3, 4), (2, 3, 4)),
        ((0, 4), (0, 4)),
        ((3, 0), (3, 0)),
    ],
)
def test_wrong_shapes_are_named(loss_fn, image, text):
    rest = [-10.0] if loss_fn is siglip_loss else []
    with pytest.raises(ValueError) as error:
        loss_fn(torch.ones(image), torch.ones(text), 1.0, *rest)
    assert str(image) in str(error.value) and str(text) in str(error.value)


def test_scalars_must_be_scalars():
    a, b = features(3)
    with pytest.raises(ValueError, match=r"logit_scale has shape \(3,\)"):
        clip_loss(a, b, torch.ones(3))
    with pytest.raises(ValueError, match=r"logit_bias has shape \(3,\)"):
        siglip_loss(a, b, 10.0, torch.ones(3))


@pytest.mark.parametrize("ids", [[0, 1], [[0, 1, 2]], 7])
def test_concepts_of_wrong_shape_are_named(ids):
    a, b = features(3)
    with pytest.raises(ValueError, match=r"expected \(3,\)"):
        clip_loss(a, b, 9.0, concepts=torch.tensor(ids))


def test_inputs_are_left_alone():
    a, b = features(3)
    ids = torch.tensor([0, 0, 1])
    before = a.clone(), b.clone(), ids.clone()
    clip_loss(a, b, 9.0, concepts=ids)
    siglip_loss(a, b, 9.0, -10.0)
    assert all(torch.equal(x, y) for x, y in zip((a, b, ids), before))
