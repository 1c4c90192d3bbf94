"""Less memory, same gradient: against chapter 6, one graph, and open_clip.

Tolerances: float64 to 1e-12 (1e-11 of large values), float32 as stated.
"""

import copy
import logging
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from miniclip import memory
from miniclip.loss import clip_loss, siglip_loss
from miniclip.memory import (
    Precision,
    best_dtype,
    cached_backward,
    check_master_weights,
    checkpoint_blocks,
    length_buckets,
    log_sums,
    patch_dropout,
    tiled_clip_loss,
    tiled_siglip_loss,
)
from miniclip.model import CLIP, CLIPConfig

EXACT = {"rtol": 1e-11, "atol": 1e-12}
TILED = {"clip": tiled_clip_loss, "siglip": tiled_siglip_loss}
PLAIN = {"clip": clip_loss, "siglip": siglip_loss}
both = pytest.mark.parametrize("kind", TILED)


def features(B=8, E=16, dtype=torch.float64, seed=0):
    """Features far from length 1, as encoders give them."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, B, E, generator=g, dtype=torch.float64)
    return (3 * a).to(dtype), (0.5 * b + 0.1).to(dtype)


def with_gradients(loss_fn, *values, **options):
    leaves = [x.clone().requires_grad_() for x in values]
    loss = loss_fn(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def scalars(kind, scale=14.3, bias=-5.0, dtype=torch.float64):
    numbers = [scale] if kind == "clip" else [scale, bias]
    return [torch.tensor(x, dtype=dtype) for x in numbers]


def check_same(kind, values, tile, tolerance=EXACT, **options):
    ours = with_gradients(TILED[kind], *values, tile=tile, **options)
    theirs = with_gradients(PLAIN[kind], *values, **options)
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        torch.testing.assert_close(x, y, **tolerance)


# ---------------------------------------------------------- tiled losses


@both
@pytest.mark.parametrize("scale", [1.0, 14.3, 50.0, 100.0, 400.0])
@pytest.mark.parametrize("B,tile", [(1, 4), (2, 1), (33, 7), (33, 64)])
def test_equals_the_loss_with_a_matrix(kind, scale, B, tile):
    check_same(kind, [*features(B), *scalars(kind, scale)], tile)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("tile", [5, 10, 64])
def test_equals_with_concepts(scale, tile):
    ids = torch.tensor([0, 1, 0, 2, 7, 2, 2, 3, 5, 5] * 3 + [4, -9, 99])
    values = [*features(33), *scalars("clip", scale)]
    check_same("clip", values, tile, concepts=ids)
    check_same("clip", values, tile, concepts=torch.zeros(33))
    check_same("clip", values, tile, concepts=ids.tolist())


@both
def test_equals_for_duplicates_and_opposites(kind):
    """Equal captions, and pairs whose picture is minus the caption."""
    a, b = features(12)
    b[3:7] = b[3]
    b[8] = -a[8]
    a[9] = a[10]
    for scale in 1.0, 100.0:
        check_same(kind, [a, b, *scalars(kind, scale)], 5)


@given(
    seed=st.integers(0, 999),
    B=st.integers(1, 14),
    tile=st.integers(1, 16),
    scale=st.floats(0.5, 100),
)
@settings(max_examples=30)
def test_equals_for_any_tile(seed, B, tile, scale):
    for kind in TILED:
        values = [*features(B, 6, seed=seed), *scalars(kind, scale)]
        check_same(kind, values, tile)


@both
@pytest.mark.parametrize("tile", [2, 3, 99])
def test_gradcheck(kind, tile):
    values = [*features(5, 4), *scalars(kind, 3.0, -2.0)]
    leaves = [x.requires_grad_() for x in values]
    torch.autograd.gradcheck(lambda *x: TILED[kind](*x, tile=tile), leaves)
    if kind == "clip":
        ids = torch.tensor([0, 1, 0, 2, 1])
        torch.autograd.gradcheck(
            lambda *x: tiled_clip_loss(*x, ids, tile), leaves
        )


@both
def test_no_gradient_of_the_gradient(kind):
    a, b = (x.requires_grad_() for x in features())
    loss = TILED[kind](a, b, *scalars(kind))
    (g,) = torch.autograd.grad(loss, a, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        g.sum().backward()
    loss = TILED[kind](a, b, *scalars(kind)) * a.sum()
    (g,) = torch.autograd.grad(loss, a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


@both
def test_backward_twice_and_scaled(kind):
    """retain_graph, and a loss that is multiplied before."""
    a, b = (x.requires_grad_() for x in features())
    loss = TILED[kind](a, b, *scalars(kind), tile=3)
    once = torch.autograd.grad(loss, a, retain_graph=True)[0]
    again = torch.autograd.grad(-7 * loss, a)[0]
    torch.testing.assert_close(again, -7 * once)


def saved_bytes(function):
    found = {}

    def keep(x):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = function()
    return sum(found.values()) if result is not None else 0


@both
def test_saved_bytes_grow_with_the_batch(kind):
    """The slope test: a loss that keeps strips or tiles fails it."""
    kept = []
    for B in 256, 512, 1024:
        a, b = (x.requires_grad_() for x in features(B, 32, torch.float32))
        rest = scalars(kind, dtype=torch.float32)
        loss = partial(TILED[kind], a, b, *rest, tile=64)
        kept.append(saved_bytes(loss))
        assert kept[-1] < 4 * B * (2 * 32 + 16)
    assert kept[1] < 2.01 * kept[0] and kept[2] < 2.01 * kept[1]


@pytest.mark.parametrize(
    "scale,close", [(15, 1e-5), (50, 1e-5), (100, 1e-4)]
)
def test_float32_is_right_where_the_difference_is_noise(scale, close):
    """A model that is nearly perfect: the loss is far below rounding."""
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(300, 64, generator=rng, dtype=torch.float64)
    noise = torch.randn(300, 64, generator=rng, dtype=torch.float64)
    a = F.normalize(a, dim=1)
    values = [a, a + 0.03 * noise, torch.tensor(float(scale)).double()]
    true = with_gradients(tiled_clip_loss, *values, tile=128)
    values = [x.float() for x in values]
    ours = with_gradients(tiled_clip_loss, *values, tile=128)
    for x, y in zip(ours[:3], true):
        assert (x.double() - y).norm() < close * y.norm()
    naive = clip_loss(*values).double()
    if scale == 100:
        assert true[0] < 1e-12 < (naive - true[0]).abs() or naive == 0


def test_float32_does_not_overflow():
    """Wrong pairs at the largest logit, rows at the smallest."""
    a, b = features(40, 8, torch.float32)
    b[1::2] = b[::2]  # each caption twice
    a[5] = -b.mean(dim=0) * 50
    b[30:] = -a[30:]
    for scale in 100.0, 1000.0:
        values = [a, b, torch.tensor(scale)]
        ours = with_gradients(tiled_clip_loss, *values, tile=16)
        wide = [x.double() for x in values]
        true = with_gradients(clip_loss, *wide)
        for x, y in zip(ours, true):
            assert x.isfinite().all()
            torch.testing.assert_close(
                x.double(), y, rtol=2e-3, atol=1e-4 * y.abs().max().item()
            )


def test_safe_paths_are_taken_and_equal(monkeypatch):
    """Rows far below the rest: no row sum may underflow to nothing."""
    g = torch.Generator().manual_seed(1)
    u = F.normalize(torch.randn(6, 3, generator=g), dim=1)
    v = F.normalize(
        -u.mean(0) + 0.01 * torch.randn(6, 3, generator=g), dim=1
    )
    u[:3] = -v[:3]
    ids = torch.arange(6)
    for scale in 100.0, 500.0:
        z = (scale * u @ v.T).fill_diagonal_(-math.inf)
        rows, columns = log_sums(u, v, ids, ids, scale, 4)
        torch.testing.assert_close(rows, z.logsumexp(1), rtol=1e-5, atol=0)
        torch.testing.assert_close(
            columns, z.logsumexp(0), rtol=1e-5, atol=0
        )


def test_strips_are_allowed():
    """Rows 3 to 5 of 8 against all columns: what one of many ranks has."""
    a, b = (F.normalize(x, dim=1) for x in features(8))
    ids = torch.arange(8)
    z = (20 * a @ b.T).fill_diagonal_(-math.inf)[3:6]
    rows, columns = log_sums(a[3:6], b, ids[3:6], ids, 20.0, 2)
    torch.testing.assert_close(rows, z.logsumexp(1))
    torch.testing.assert_close(columns, z.logsumexp(0))
    p = (z - rows[:, None]).exp() + (z - columns).exp()
    parts = a[3:6], b, ids[3:6], ids, rows, columns
    on_rows, on_columns = memory.pushes(*parts, 20.0, 2)
    torch.testing.assert_close(on_rows, p @ b)
    torch.testing.assert_close(on_columns, p.T @ a[3:6])


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(kind, dtype):
    a, b = features(20, dtype=dtype)
    rest = scalars(kind, 100.0, dtype=torch.float32)
    loss, ga, gb, *_ = with_gradients(TILED[kind], a, b, *rest, tile=8)
    wide = with_gradients(PLAIN[kind], a.float(), b.float(), *rest)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wide[0], rtol=1e-5, atol=1e-5)
    for g, w in (ga, wide[1]), (gb, wide[2]):
        assert g.dtype == dtype
        torch.testing.assert_close(
            g.float(), w, rtol=1e-2, atol=1e-2 * w.abs().max().item()
        )


@both
def test_autocast_does_not_narrow(kind):
    a, b = features(20, dtype=torch.float32)
    rest = scalars(kind, 100.0, dtype=torch.float32)
    outside = with_gradients(TILED[kind], a, b, *rest, tile=8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = with_gradients(TILED[kind], a, b, *rest, tile=8)
    assert all(torch.equal(x, y) for x, y in zip(inside, outside))


@both
def test_shapes_of_scalars_and_no_grad(kind):
    a, b = features(9)
    plain = TILED[kind](a, b, *scalars(kind), tile=4)
    assert plain.shape == ()
    rest = [x[None].requires_grad_() for x in scalars(kind)]
    loss = TILED[kind](a, b, *rest, tile=4)
    loss.backward()
    assert all(x.grad.shape == (1,) for x in rest)
    with torch.no_grad():
        quiet = TILED[kind](a.requires_grad_(), b, *rest, tile=4)
    assert loss == plain == quiet and not quiet.requires_grad
    numbers = [x.item() for x in rest]
    assert TILED[kind](a, b, *numbers, tile=4) == plain


@both
def test_zero_features_do_no_harm(kind):
    a, b = features(5)
    a[2] = 0
    for x in with_gradients(TILED[kind], a, b, *scalars(kind), tile=2):
        assert x.isfinite().all()


@both
def test_inputs_are_left_alone(kind):
    a, b = features(9)
    before = a.clone(), b.clone()
    with_gradients(TILED[kind], a, b, *scalars(kind), tile=4)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


@both
def test_errors(kind):
    a, b = features(3)
    rest = scalars(kind)
    with pytest.raises(ValueError, match=r"\(3, 16\) and .*\(2, 16\)"):
        TILED[kind](a, b[:2], *rest)
    with pytest.raises(ValueError, match="tile is 0, expected 1"):
        TILED[kind](a, b, *rest, tile=0)
    with pytest.raises(ValueError, match="logit_scale has shape"):
        TILED[kind](a, b, torch.ones(3), *rest[1:])
    for ids in [0, 1], [[0, 1, 2]], 7:
        with pytest.raises(ValueError, match=r"expected \(3,\)"):
            tiled_clip_loss(a, b, 9.0, concepts=ids)


# ------------------------------------------------------ cached gradients


def tiny(resnet=False, dropout=0.0, seed=0):
    """A CLIP in float64, in training."""
    torch.manual_seed(seed)
    layers = (1, 1) if resnet else 2
    sizes = 8, 16, layers, 64, None if resnet else 4
    model = CLIP(CLIPConfig(*sizes, 12, 40, 16, 2, 2)).double().train()
    model.logit_bias = nn.Parameter(torch.tensor(-3.0).double())
    if dropout:
        for block in model.modules():
            if isinstance(getattr(block, "mlp", None), nn.Sequential):
                block.mlp.append(nn.Dropout(dropout))
    return model


def batch(B=10):
    g = torch.Generator().manual_seed(3)
    images = torch.randn(B, 3, 16, 16, generator=g, dtype=torch.float64)
    ids = torch.randint(1, 38, (B, 12), generator=g)
    ids[:, 0] = 38
    ends = torch.randint(2, 12, (B,), generator=g)
    ids[torch.arange(B), ends] = 39
    after = torch.arange(12) > ends[:, None]
    return images, ids.masked_fill(after, 0)


def loss_of(model, kind):
    s, b = model.logit_scale, model.logit_bias
    if kind == "clip":
        return lambda u, v: tiled_clip_loss(u, v, s.exp(), tile=4)
    return lambda u, v: tiled_siglip_loss(u, v, s.exp(), b, tile=4)


def take_gradients(model):
    found = {
        k: p.grad for k, p in model.named_parameters() if p.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return found


def one_graph(model, images, ids, loss_fn, size):
    """Micro-batches in the order of cached_backward, all in one graph."""
    u = torch.cat([model.encode_image(x) for x in images.split(size)])
    order = length_buckets(ids, size)
    v = torch.cat([model.encode_text(ids[i]) for i in order])
    loss = loss_fn(u, v[torch.cat(order).argsort()])
    loss.backward()
    return loss.detach(), take_gradients(model)


@both
@pytest.mark.parametrize("micro", [1, 3, 5, 64])
@pytest.mark.parametrize("random", [False, True])
def test_cached_gradient_is_that_of_one_graph(kind, micro, random):
    """Scale and bias too; with dropout and patch dropout."""
    model = tiny(dropout=0.3 if random else 0)
    if random:
        patch_dropout(model.visual, 0.5)
    images, ids = batch()
    loss_fn = loss_of(model, kind)
    torch.manual_seed(7)
    loss, expected = one_graph(model, images, ids, loss_fn, micro)
    torch.manual_seed(7)
    found = cached_backward(model, images, ids, loss_fn, micro)
    ours = take_gradients(model)
    torch.testing.assert_close(found, loss, rtol=0, atol=1e-12)
    assert ours.keys() == expected.keys() and "logit_scale" in ours
    assert ("logit_bias" in ours) == (kind == "siglip")
    for name in ours:
        torch.testing.assert_close(
            ours[name], expected[name], rtol=0, atol=1e-12
        )


def test_dropout_matters_in_that_test():
    """Two seeds give two gradients, else the test above shows nothing."""
    model = tiny()
    patch_dropout(model.visual, 0.5)
    norms = set()
    for seed in 1, 2:
        torch.manual_seed(seed)
        cached_backward(model, *batch(), loss_of(model, "clip"), 4)
        g = take_gradients(model)["visual.proj"]
        norms.add(round(g.norm().item(), 6))
    assert len(norms) == 2


def test_generator_goes_on_as_if_encoded_once():
    model = tiny()
    patch_dropout(model.visual, 0.5)
    images, ids = batch()
    torch.manual_seed(7)
    one_graph(model, images, ids, loss_of(model, "clip"), 4)
    expected = torch.rand(3)
    torch.manual_seed(7)
    cached_backward(model, images, ids, loss_of(model, "clip"), 4)
    assert torch.equal(torch.rand(3), expected)


def test_gradients_are_added():
    model = tiny()
    for _ in range(2):
        cached_backward(model, *batch(), loss_of(model, "clip"), 4)
    twice = take_gradients(model)
    cached_backward(model, *batch(), loss_of(model, "clip"), 4)
    for name, g in take_gradients(model).items():
        torch.testing.assert_close(twice[name], 2 * g)


def test_captions_may_be_shared():
    """Six captions for ten pictures: loss_fn knows whose they are."""
    model = tiny()
    images, ids = batch()
    ids, owners = ids[:6], torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5])

    def loss_fn(u, v):
        return clip_loss(u, v[owners], model.logit_scale.exp(), owners)

    _, expected = one_graph(model, images, ids, loss_fn, 10)
    cached_backward(model, images, ids, loss_fn, 4)
    for name, g in take_gradients(model).items():
        torch.testing.assert_close(g, expected[name], **EXACT)


def test_batch_norm_is_refused_unless_frozen():
    model = tiny(resnet=True)
    images, ids = batch()
    loss_fn = loss_of(model, "clip")
    with pytest.raises(ValueError, match=r"visual\..*bn1 is a batch norm"):
        cached_backward(model, images, ids, loss_fn, 4)
    model.eval()
    _, expected = one_graph(model, images, ids, loss_fn, 10)
    before = copy.deepcopy(model.state_dict())
    cached_backward(model, images, ids, loss_fn, 4)
    for name, g in take_gradients(model).items():
        torch.testing.assert_close(g, expected[name], **EXACT)
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])


def test_cached_backward_refuses():
    model = tiny()
    with pytest.raises(ValueError, match="micro_batch is 0"):
        cached_backward(model, *batch(), loss_of(model, "clip"), 0)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="pass precision="):
            cached_backward(model, *batch(), loss_of(model, "clip"), 4)


def test_only_a_micro_batch_is_kept():
    model = tiny()
    images, ids = batch(32)
    kept = {}
    for micro in 4, 16, 32:
        largest = []

        def counted(u, v):
            return loss_of(model, "clip")(u, v)

        def spy(x, largest=largest):
            largest.append(x.shape[0] if x.ndim == 3 else 0)
            return x

        with torch.autograd.graph.saved_tensors_hooks(spy, lambda x: x):
            cached_backward(model, images, ids, counted, micro)
        kept[micro] = max(largest)
    assert kept[4] <= 4 < kept[16] <= 16 < kept[32]


class TheirModel(nn.Module):
    """Our towers behind the interface that open_clip's training expects."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.logit_scale = model.logit_scale

    def forward(self, images, ids):
        return {
            "image_features": F.normalize(
                self.model.encode_image(images), dim=-1
            ),
            "text_features": F.normalize(
                self.model.encode_text(ids), dim=-1
            ),
            "logit_scale": self.logit_scale.exp(),
        }


def train_as_open_clip(model, images, ids, k):
    """The gradient after one epoch of one step of open_clip's own loop."""
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    micro = len(images) // k
    loader = list(zip(images.split(micro), ids.split(micro)))
    loader = type("Loader", (list,), {})(loader)
    loader.num_batches, loader.num_samples = k, len(images)
    data = SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)
    args = SimpleNamespace(
        device="cpu",
        precision="fp32",
        distill=False,
        accum_freq=k,
        skip_scheduler=True,
        horovod=False,
        grad_clip_norm=None,
        rank=1,  # not the master, so that nothing is logged
        local_rank=1,
        log_local=False,
        world_size=1,
        batch_size=micro,
    )
    theirs = TheirModel(model)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.0)
    logging.disable()
    parts = theirs, {"train": data}, ClipLoss(), 0, optimizer
    train_one_epoch(*parts, None, None, None, args)
    logging.disable(logging.NOTSET)
    return take_gradients(model)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_open_clip_multiplies_the_gradient_of_the_scale(k):
    """Its own train_one_epoch: towers right, temperature k-fold."""
    images, ids = batch()
    model = tiny()
    cached_backward(model, images, ids, loss_of(model, "clip"), 2)
    ours = take_gradients(model)
    theirs = train_as_open_clip(model, images, ids, k)
    for name, g in ours.items():
        if name != "logit_scale":
            torch.testing.assert_close(
                g, theirs[name], rtol=1e-5, atol=1e-9
            )
    ratio = theirs["logit_scale"] / ours["logit_scale"]
    assert ratio.item() == pytest.approx(k, rel=1e-5)


# ------------------------- checkpoints, patches, buckets, half precision


@pytest.mark.parametrize("random", [False, True])
def test_checkpointing_changes_no_gradient(random):
    model = tiny(dropout=0.3 if random else 0)
    images, ids = batch()
    loss_fn = loss_of(model, "clip")
    torch.manual_seed(7)
    _, expected = one_graph(model, images, ids, loss_fn, 4)
    names = list(model.state_dict())
    assert checkpoint_blocks(model) == 4
    assert list(model.state_dict()) == names
    torch.manual_seed(7)
    _, found = one_graph(model, images, ids, loss_fn, 4)
    for name, g in found.items():
        torch.testing.assert_close(g, expected[name], rtol=0, atol=1e-12)


def test_checkpointing_keeps_less():
    plain, model = tiny(), tiny()
    checkpoint_blocks(model)
    images, _ = batch()
    kept = [
        saved_bytes(lambda m=m: m.encode_image(images))
        for m in (plain, model)
    ]
    weights = sum(p.nbytes for p in plain.visual.parameters())
    assert (
        kept[1] - weights < (kept[0] - weights) / 3 or kept[1] < kept[0] / 3
    )
    model.eval()
    torch.testing.assert_close(
        model.encode_image(images), plain.eval().encode_image(images)
    )


def test_a_copy_of_a_checkpointed_model_is_its_own():
    model = tiny()
    checkpoint_blocks(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    images, ids = batch()
    assert copied.encode_image(images).abs().max() > 0
    assert copied.encode_text(ids).abs().max() > 0


def test_nothing_to_checkpoint():
    with pytest.raises(ValueError, match="Linear has no Residual"):
        checkpoint_blocks(nn.Linear(2, 2))


def test_checkpoints_leave_batch_norms_alone():
    """Running means move once a step, not twice."""
    plain, model = tiny(resnet=True), tiny(resnet=True)
    assert checkpoint_blocks(model) == 2  # those of the text tower
    images, _ = batch()
    for m in plain, model:
        m.encode_image(images).sum().backward()
    for (name, x), y in zip(
        plain.state_dict().items(), model.state_dict().values()
    ):
        assert torch.equal(x, y), name


def seen_by_transformer(model):
    """What goes into the Transformer of the image tower."""
    seen = []
    model.visual.transformer.resblocks[0].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].detach())
    )
    return seen


@pytest.mark.parametrize("share,kept", [(0.0, 16), (0.5, 8), (0.99, 1)])
def test_patch_dropout_keeps_whole_patches(share, kept):
    model = tiny()
    seen = seen_by_transformer(model)
    images, _ = batch()
    model.encode_image(images)
    handle = patch_dropout(model.visual, share)
    model.encode_image(images)
    whole, part = seen
    assert part.shape == (10, kept + 1, 64)
    assert torch.equal(part[:, 0], whole[:, 0])  # the class token
    for x, y in zip(part[:, 1:], whole[:, 1:]):
        where = (x[:, None] == y[None]).all(dim=-1)
        assert (where.sum(dim=1) == 1).all()  # each is one of the patches
        assert where.sum(dim=0).max() == 1  # and none comes twice
    handle.remove()
    model.encode_image(images)
    assert torch.equal(seen[-1], whole)


def test_patch_dropout_is_fair_and_off_in_evaluation():
    model = tiny()
    model.visual.positional_embedding.data.normal_()
    seen = seen_by_transformer(model)
    image = batch()[0][:1].expand(400, -1, -1, -1)
    patch_dropout(model.visual, 0.75)
    model.eval().encode_image(image[:1])
    (whole,) = seen
    assert whole.shape[1] == 17
    torch.manual_seed(0)
    model.train().encode_image(image)
    where = (seen[1][:, 1:, None] == whole[:, None, 1:]).all(dim=-1)
    share = where.any(dim=1).double().mean(dim=0)  # of each place
    assert share.shape == (16,)
    assert (share > 0.15).all() and (share < 0.36).all()


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_patch_dropout_refuses(share):
    with pytest.raises(ValueError, match="share from 0 to below 1"):
        patch_dropout(tiny().visual, share)
    with pytest.raises(ValueError, match="of a ResNet"):
        patch_dropout(tiny(resnet=True).visual, 0.5)


def test_length_buckets():
    _, ids = batch(30)
    buckets = length_buckets(ids, 8)
    assert [len(b) for b in buckets] == [8, 8, 8, 6]
    order = torch.cat(buckets)
    assert sorted(order.tolist()) == list(range(30))
    ends = ids.argmax(dim=1)[order]
    assert (ends.diff() >= 0).all()


def test_buckets_change_no_feature():
    model = tiny().eval()
    _, ids = batch(30)
    whole = model.encode_text(ids)
    for rows in length_buckets(ids, 8):
        part = model.encode_text(ids[rows])
        torch.testing.assert_close(part, whole[rows], **EXACT)


@pytest.mark.parametrize(
    "generation,expected",
    [
        ((6, 1), torch.float32),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),  # a T4, whatever is_bf16_supported says
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_precision_by_generation(monkeypatch, generation, expected):
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device=None: generation
    )
    assert best_dtype("cuda") == best_dtype("cuda:1") == expected
    assert best_dtype() == best_dtype("mps") == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_refused(dtype):
    model = tiny().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=f"weights in {dtype}: steps"):
        check_master_weights(optimizer)
    with pytest.raises(ValueError, match="model.float"):
        Precision().step(optimizer)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16]
)
@pytest.mark.parametrize("cached", [False, True])
def test_training_in_each_precision(dtype, cached):
    """128 pairs by heart: the loss falls, the weights stay float32."""
    model = tiny().float()
    images, ids = batch()
    images, loss_fn = images.float(), loss_of(model, "clip")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    precision, losses, seen = Precision(dtype), [], []
    hook = model.visual.transformer.resblocks[0].mlp.c_fc
    hook.register_forward_hook(lambda m, i, y: seen.append(y.dtype))
    for _ in range(12):
        optimizer.zero_grad()
        if cached:
            parts = model, images, ids, loss_fn, 4, precision
            losses.append(cached_backward(*parts).item())
        else:
            with precision.autocast():
                u, v = model.encode_image(images), model.encode_text(ids)
            loss = loss_fn(u, v)
            precision.backward(loss)
            losses.append(loss.item())
        norm = precision.step(optimizer)
        skipped = dtype == torch.float16 and not norm.isfinite()
        assert skipped or norm < 1000  # and not 65,536 times that
    assert losses[-1] < losses[0] - 0.5
    assert set(seen) == {dtype}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_step_clips_and_refuses_what_is_not_finite():
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=1.0)
    w.grad = torch.tensor([30.0, 40.0])
    assert Precision().step(optimizer, most=0.5) == 50
    torch.testing.assert_close(w.detach(), torch.tensor([0.7, 0.6]))
    w.grad = torch.tensor([math.nan, 1.0])
    with pytest.raises(FloatingPointError, match="no weight was changed"):
        Precision().step(optimizer)
    torch.testing.assert_close(w.detach(), torch.tensor([0.7, 0.6]))


def test_float16_skips_a_step_that_overflows():
    w = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([w], lr=1.0)
    precision = Precision(torch.float16)
    precision.backward((w * math.inf).sum())
    precision.step(optimizer)
    assert w.item() == 1 and precision.scaler.get_scale() == 2**15
