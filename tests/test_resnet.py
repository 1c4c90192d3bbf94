"""The ResNet: against torchvision, by hand, and at every size."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.resnet import BasicBlock as TorchvisionBlock

from miniclip.resnet import (
    AttentionPool2d,
    BasicBlock,
    Bottleneck,
    ModifiedResNet,
    ResNet,
    check_size,
)


def wake(net: nn.Module) -> nn.Module:
    """Give every norm gains, biases and running averages of its own."""
    torch.manual_seed(1)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, mean=1, std=0.2)
            nn.init.normal_(part.bias, std=0.2)
            nn.init.normal_(part.running_mean, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return net


def tower(*layers: int, width: int = 8, embed_dim: int = 5) -> ResNet:
    torch.manual_seed(0)
    return wake(ResNet(layers, width, embed_dim))


# The block


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("planes", [16, 24])
def test_a_block_without_stride_is_torchvisions(mode, planes):
    """In double precision, so that 1e-10 leaves room for rounding only."""
    torch.manual_seed(0)
    ours = wake(BasicBlock(16, planes)).double().train(mode)
    wider = None if planes == 16 else BasicBlock(16, planes).downsample
    theirs = TorchvisionBlock(16, planes, downsample=wider)
    theirs = theirs.double().train(mode)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 16, 9, 7, dtype=torch.double, requires_grad=True)
    seed = torch.randn(4, planes, 9, 7, dtype=torch.double)
    found = []
    for block in ours, theirs:
        y = block(x)
        names, weights = zip(*block.named_parameters())
        grads = torch.autograd.grad((y * seed).sum(), [x, *weights])
        found.append(
            (y, dict(zip(["x", *names], grads)), block.state_dict())
        )
    torch.testing.assert_close(*found, atol=1e-10, rtol=1e-10)


def norm_by_hand(x, bn, train):
    """Batch norm as its formula says it, in either mode."""
    mean, var = bn.running_mean, bn.running_var
    if train:
        mean = x.mean(dim=(0, 2, 3))
        var = x.var(dim=(0, 2, 3), correction=0)
    mean, var, gain, bias = (
        t[:, None, None] for t in (mean, var, bn.weight, bn.bias)
    )
    return (x - mean) / (var + 1e-5).sqrt() * gain + bias


def conv_by_hand(x, conv):
    """A 3x3 convolution with stride 1 as a sum of nine shifted products."""
    H, W = x.shape[2:]
    x, y = F.pad(x, (1, 1, 1, 1)), 0
    for i in range(3):
        for j in range(3):
            window = x[:, :, i : i + H, j : j + W]
            weight = conv.weight[:, :, i, j]
            y = y + torch.einsum("oc,bchw->bohw", weight, window)
    return y


@pytest.mark.parametrize("train", [True, False])
def test_a_block_that_halves_is_what_the_chapter_says(train):
    """Pool both branches, two convolutions, widen the shortcut: by hand."""
    torch.manual_seed(0)
    block = wake(BasicBlock(4, 6, stride=2)).double().train(train)
    x = torch.randn(3, 4, 8, 6, dtype=torch.double)
    running = {n: t.clone() for n, t in block.state_dict().items()}
    y = block(x)
    block.load_state_dict(running)

    x = x.reshape(3, 4, 4, 2, 3, 2).mean(dim=(3, 5))
    h = conv_by_hand(x, block.conv1)
    h = norm_by_hand(h, block.bn1, train).clamp(min=0)
    h = norm_by_hand(conv_by_hand(h, block.conv2), block.bn2, train)
    conv, bn = block.downsample
    shortcut = torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], x)
    by_hand = (h + norm_by_hand(shortcut, bn, train)).clamp(min=0)
    torch.testing.assert_close(y, by_hand, atol=1e-12, rtol=0)


def test_training_moves_the_running_averages_by_a_tenth():
    torch.manual_seed(0)
    block, x = BasicBlock(4, 4), torch.randn(3, 4, 5, 5)
    block(x)
    y = block.conv1(x)
    bn = block.bn1
    torch.testing.assert_close(bn.running_mean, 0.1 * y.mean(dim=(0, 2, 3)))
    var = 0.9 + 0.1 * y.var(dim=(0, 2, 3))
    torch.testing.assert_close(bn.running_var, var)
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize("train", [True, False])
def test_a_new_block_is_its_shortcut_to_the_last_bit(train):
    block = BasicBlock(8, 8).train(train)
    x = torch.randn(2, 8, 6, 6).relu()
    assert torch.equal(block(x), x)
    block = BasicBlock(8, 12, stride=2).train(train)
    shortcut = block.downsample(F.avg_pool2d(x, 2)).relu()
    assert torch.equal(block(x), shortcut)


def test_every_last_gain_and_no_other_starts_at_zero():
    net = ResNet((2, 1, 3), 8, 5)
    for name, p in net.named_parameters():
        if name.endswith("bn2.weight"):
            assert (p == 0).all()
        elif p.ndim == 1:  # the other gains, and the biases
            assert (p == float(name.endswith("weight"))).all(), name
        else:
            assert (p != 0).all(), name


# The tower


@pytest.mark.parametrize("side", [32, 48, 64])
@pytest.mark.parametrize(
    "layers, width, embed_dim",
    [
        ((1,), 4, 3),
        ((2, 1), 8, 16),
        ((1, 1, 1), 12, 5),
        ((1, 2, 1, 1), 6, 7),
    ],
)
def test_each_stage_has_half_the_size_and_twice_the_channels(
    layers, width, embed_dim, side
):
    net = tower(*layers, width=width, embed_dim=embed_dim)
    shapes = []
    for block in net.blocks:
        block.register_forward_hook(
            lambda m, i, y: shapes.append(tuple(y.shape))
        )
    assert net(torch.randn(2, 3, side, side)).shape == (2, embed_dim)
    expected = []
    for stage, depth in enumerate(layers):
        size = side // 2 ** (stage + 1)
        expected += [(2, width * 2**stage, size, size)] * depth
    assert shapes == expected


def last_map(net: ResNet, image: torch.Tensor) -> torch.Tensor:
    x = F.conv2d(image, net.conv1.weight, stride=2, padding=1)
    return net.blocks(net.bn1(x).clamp(min=0))


def cells_by_hand(x: torch.Tensor) -> torch.Tensor:
    """The mean of each of 4 x 4 windows: floor and ceiling of quarters."""
    H, W = x.shape[2:]
    y = torch.zeros(*x.shape[:2], 4, 4, dtype=x.dtype)
    for i in range(4):
        for j in range(4):
            rows = slice(i * H // 4, -(-(i + 1) * H // 4))
            columns = slice(j * W // 4, -(-(j + 1) * W // 4))
            y[..., i, j] = x[..., rows, columns].mean(dim=(2, 3))
    return y


@pytest.mark.parametrize(
    "H, W", [(32, 32), (16, 48), (20, 28), (9, 7), (3, 3)]
)
def test_the_feature_weighs_the_mean_of_each_of_sixteen_cells(H, W):
    """Maps of 8x8, 4x12, 5x7 (the cells overlap), 2x2 and 1x1 places."""
    net = tower(1, 1).eval()
    image = torch.randn(2, 3, H, W)
    proj = net.proj.view(16, 4, 4, 5)  # channel, row, column, E
    cells = cells_by_hand(last_map(net, image))
    expected = torch.einsum("bchw,chwe->be", cells, proj)
    torch.testing.assert_close(net(image), expected, atol=1e-5, rtol=1e-5)


def test_the_tower_knows_where_things_are():
    """A permutation of places across cells shows, one within does not."""
    net = tower(1).double().eval()
    x = torch.randn(1, 8, 16, 16, dtype=torch.double)
    seen = {}
    for name, y in {
        "as it is": x,
        "upside down": x.flip(2),
        "mirrored": x.flip(3),
        "transposed": x.transpose(2, 3),
        "within cells": x.unflatten(2, (4, 4)).flip(3).flatten(2, 3),
    }.items():
        net.blocks = nn.Sequential(Returns(y))
        seen[name] = net(torch.zeros(1, 3, 32, 32, dtype=torch.double))
    right = seen.pop("as it is")
    torch.testing.assert_close(seen.pop("within cells"), right)
    for name, f in seen.items():
        assert (f - right).norm() > 0.05 * right.norm(), name


class Returns(nn.Module):
    def __init__(self, y: torch.Tensor):
        super().__init__()
        self.y = y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.y


@settings(max_examples=30)
@given(
    st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.booleans()
)
def test_every_size_works_down_to_the_smallest(stages, H, W, train):
    net = ResNet((1,) * stages, 2, 3).train(train)
    image = torch.randn(2, 3, H, W)
    if min(H, W) < 2**stages - 1:
        with pytest.raises(ValueError, match=f"has {H} x {W} pixels"):
            net(image)
    else:
        assert net(image).isfinite().all()


def test_the_smallest_size_is_where_torch_would_give_up():
    for stages in 1, 2, 3, 4, 5:
        net = ResNet((1,) * stages, 2, 3)
        least = 2**stages - 1
        assert net(torch.randn(2, 3, least, least)).shape == (2, 3)
        if stages > 1:
            too_small = torch.randn(2, 2, least // 2, 99)  # after the stem
            with pytest.raises(RuntimeError):
                net.blocks(too_small)


@pytest.mark.parametrize(
    "shape",
    [(3, 64, 64), (1, 64, 64), (2, 1, 64, 64), (2, 64, 64, 3), (3,)],
)
def test_what_is_no_batch_of_pictures_is_refused(shape):
    with pytest.raises(ValueError) as error:
        tower(1)(torch.zeros(shape))
    assert f"{shape}, expected (B, 3, H, W)" in str(error.value)


def test_the_errors_say_what_to_do():
    with pytest.raises(ValueError, match="4 stages needs at least 15 x 15"):
        check_size(torch.zeros(1, 3, 64, 14), stages=4)
    with pytest.raises(ValueError, match="uint8, expected floats"):
        tower(1)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    for layers in (), (1, 0, 1), (-1,):
        with pytest.raises(ValueError, match="each stage needs a block"):
            ResNet(layers, 8, 5)


@pytest.mark.parametrize("layers", [(1,), (1, 1, 1, 1), (3, 4, 6, 3)])
@pytest.mark.parametrize("w, e", [(8, 5), (64, 512)])
def test_the_number_of_parameters(layers, w, e):
    with torch.device("meta"):
        net = ResNet(layers, w, e)
    total = 27 * w + 2 * w  # the stem
    for stage, depth in enumerate(layers):
        planes = w * 2**stage
        total += depth * (18 * planes**2 + 4 * planes)
        if stage:  # the first convolution reads half, the shortcut widens
            half = planes // 2
            total += 9 * half * planes - 9 * planes**2
            total += half * planes + 2 * planes
    total += 16 * planes * e  # sixteen cells
    assert sum(p.numel() for p in net.parameters()) == total


NORM = [
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "num_batches_tracked",
]


def names(block: str, wider: bool) -> list[str]:
    """What a block adds to the state dict, in order."""
    found = []
    for i in "12":
        found.append(f"{block}.conv{i}.weight")
        found += [f"{block}.bn{i}.{name}" for name in NORM]
    if wider:
        found.append(f"{block}.downsample.0.weight")
        found += [f"{block}.downsample.1.{name}" for name in NORM]
    return found


def test_the_names_in_a_checkpoint_never_change():
    state = ResNet((2, 1), 8, 5).state_dict()
    expected = ["proj", "conv1.weight", *(f"bn1.{name}" for name in NORM)]
    expected += names("blocks.0", wider=False)
    expected += names("blocks.1", wider=False)
    expected += names("blocks.2", wider=True)
    assert list(state) == expected
    shapes = {n: tuple(t.shape) for n, t in state.items() if t.ndim > 1}
    assert shapes == {
        "proj": (256, 5),
        "conv1.weight": (8, 3, 3, 3),
        "blocks.0.conv1.weight": (8, 8, 3, 3),
        "blocks.0.conv2.weight": (8, 8, 3, 3),
        "blocks.1.conv1.weight": (8, 8, 3, 3),
        "blocks.1.conv2.weight": (8, 8, 3, 3),
        "blocks.2.conv1.weight": (16, 8, 3, 3),
        "blocks.2.conv2.weight": (16, 16, 3, 3),
        "blocks.2.downsample.0.weight": (16, 8, 1, 1),
    }


def test_the_random_numbers_of_a_seed_never_change():
    """The projection is drawn last, so a seed builds one and only tower."""
    torch.manual_seed(3)
    net = ResNet((2, 1), 8, 5)
    torch.manual_seed(3)
    assert torch.equal(
        net.conv1.weight, nn.Conv2d(3, 8, 3, bias=False).weight
    )
    for inplanes, planes in (8, 8), (8, 8), (8, 16):
        block = BasicBlock(inplanes, planes)
    assert torch.equal(net.blocks[2].conv2.weight, block.conv2.weight)
    assert torch.equal(net.proj, 256**-0.5 * torch.randn(256, 5))


def test_the_starting_noise_keeps_the_size():
    torch.manual_seed(0)
    proj = ResNet((1, 1, 1), 64, 512).proj
    assert abs(proj.std() * 4096**0.5 - 1) < 0.02


# Order in memory, batches, shifts


def contiguous(net: ResNet, image: torch.Tensor) -> torch.Tensor:
    x = F.relu(net.bn1(net.conv1(image)))
    return cells_by_hand(net.blocks(x)).flatten(1) @ net.proj


def test_channels_last_computes_the_same():
    net = tower(1, 2, 1).double()
    image = torch.randn(4, 3, 30, 34, dtype=torch.double)
    found = []
    for forward in contiguous, lambda net, image: net(image):
        loss = forward(net, image).square().sum()
        grads = torch.autograd.grad(loss, list(net.parameters()))
        found.append((loss, *grads))
    torch.testing.assert_close(*found, atol=1e-9, rtol=1e-9)


def test_the_tower_works_in_channels_last_and_takes_both_orders():
    net = tower(1, 1).eval()
    seen = []
    for block in net.blocks:
        block.register_forward_hook(lambda m, i, y: seen.append(y))
    image = torch.randn(2, 3, 32, 32)
    y = net(image)
    last = torch.channels_last
    assert all(x.is_contiguous(memory_format=last) for x in seen)
    assert torch.equal(net(image.contiguous(memory_format=last)), y)
    assert image.is_contiguous()  # the caller's picture is left alone


def test_in_evaluation_a_picture_does_not_see_its_batch():
    net, image = tower(1, 1).double(), torch.randn(6, 3, 24, 24).double()
    alone = torch.cat([net.eval()(one[None]) for one in image])
    torch.testing.assert_close(net(image), alone, atol=1e-10, rtol=0)
    assert (net.train()(image)[:3] - net(image[:3])).abs().max() > 1e-3


def test_a_shift_by_all_the_halvings_changes_nothing_within_a_cell():
    """On white far from the border, where no padding is seen.

    The pattern reaches 8 + 2 * 34 pixels; the picture of 512 has cells of
    128, and the cell of row and column 1 begins at 128.
    """
    net = tower(1, 1, 1).double().eval()
    torch.manual_seed(0)
    sides = 180, 324, 180, 324  # left, right, top, bottom
    picture = F.pad(torch.randn(1, 3, 8, 8), sides, value=1.0).double()
    f = net(picture)
    for dim in -1, -2:
        torch.testing.assert_close(
            net(picture.roll(8, dim)), f, atol=1e-10, rtol=0
        )
        assert (net(picture.roll(1, dim)) - f).abs().max() > 1e-8
        assert (net(picture.roll(128, dim)) - f).abs().max() > 1e-6


def test_all_parameters_learn_and_the_tower_is_deterministic():
    net, image = tower(2, 1), torch.randn(4, 3, 32, 32)
    net(image).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad.abs().max() > 0, name
    net.eval()
    assert torch.equal(net(image), net(image))


def test_the_feature_does_not_depend_on_the_picture_size_of_flat_colour():
    """A mean, not a sum, over the places; borders fade as pictures grow."""
    net = tower(1, 1).double().eval()
    white = [torch.ones(1, 3, s, s).double() for s in (256, 512, 1024)]
    a, b, c = (net(x) for x in white)
    assert (c - b).norm() < 0.6 * (b - a).norm() < 0.1 * b.norm()


# CLIP's own ResNet

SIZES = dict(embed_dim=12, heads=8, side=96, width=6)


def modified(*layers: int, **changes) -> ModifiedResNet:
    torch.manual_seed(0)
    layers = layers or (2, 1, 2, 1)
    net = ModifiedResNet(layers, **{**SIZES, **changes})
    return wake(net).double()


def open_clips(net: ModifiedResNet, layers, **changes) -> nn.Module:
    theirs = pytest.importorskip("open_clip.modified_resnet")
    s = {**SIZES, **changes}
    twin = theirs.ModifiedResNet(
        layers,
        s["embed_dim"],
        s["heads"],
        s["side"],
        s["width"],
    ).double()
    twin.load_state_dict(net.state_dict(), strict=True)
    return twin.train(net.training)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "changes", [{}, dict(heads=1, side=32), dict(width=4)]
)
def test_modified_resnet_is_open_clips(train, changes):
    """Features, every gradient and the running averages."""
    layers = (2, 1, 2, 1)
    ours = modified(*layers, **changes).train(train)
    twin = open_clips(ours, layers, **changes)
    side = ours.image_resolution
    image = torch.randn(3, 3, side, side, dtype=torch.double)
    seed = torch.randn(3, 12, dtype=torch.double)
    found = []
    for net in ours, twin:
        y = net(image)
        (y * seed).sum().backward()
        grads = {n: p.grad for n, p in net.named_parameters()}
        found.append((y, grads, net.state_dict()))
    for name, grad in found[0][1].items():
        if name != "attnpool.k_proj.bias":  # a softmax does not see it
            assert grad.abs().max() > 1e-9, name
    torch.testing.assert_close(*found, atol=1e-9, rtol=1e-7)


def test_the_names_of_openais_checkpoints():
    net = ModifiedResNet((1, 2, 1, 1), **SIZES)
    state = net.state_dict()
    expected = []
    for i in "123":
        expected.append(f"conv{i}.weight")
        expected += [f"bn{i}.{name}" for name in NORM]
    for stage, depth in enumerate((1, 2, 1, 1), 1):
        for block in range(depth):
            start = f"layer{stage}.{block}."
            for i in "123":
                expected.append(f"{start}conv{i}.weight")
                expected += [f"{start}bn{i}.{name}" for name in NORM]
            if block == 0:
                expected.append(f"{start}downsample.0.weight")
                expected += [f"{start}downsample.1.{n}" for n in NORM]
    expected.append("attnpool.positional_embedding")
    for letter in "kqvc":
        for kind in "weight", "bias":
            expected.append(f"attnpool.{letter}_proj.{kind}")
    assert sorted(state) == sorted(expected)
    shapes = {n: tuple(state[n].shape) for n in state}
    assert shapes["conv1.weight"] == shapes["conv2.weight"][:1] + (3, 3, 3)
    assert shapes["conv3.weight"] == (6, 3, 3, 3)
    assert shapes["layer4.0.conv3.weight"] == (192, 48, 1, 1)
    assert shapes["attnpool.positional_embedding"] == (10, 192)
    assert shapes["attnpool.c_proj.weight"] == (12, 192)


@torch.no_grad()
def test_attention_pooling_by_hand():
    """One question, all places and the mean as answers, head by head."""
    torch.manual_seed(0)
    pool = AttentionPool2d(3, 8, 2, 5).double()
    for layer in pool.children():
        nn.init.normal_(layer.bias)
    x = torch.randn(4, 8, 3, 3, dtype=torch.double)
    expected = torch.zeros(4, 5, dtype=torch.double)
    for b in range(4):
        places = [x[b, :, i, j] for i in range(3) for j in range(3)]
        tokens = [sum(places) / 9, *places]
        tokens = [t + p for t, p in zip(tokens, pool.positional_embedding)]
        answer = []
        for head in slice(0, 4), slice(4, 8):
            q = pool.q_proj(tokens[0])[head]
            k = [pool.k_proj(t)[head] for t in tokens]
            v = [pool.v_proj(t)[head] for t in tokens]
            weights = torch.stack([q @ one / 4**0.5 for one in k]).exp()
            weights /= weights.sum()
            answer.append(sum(w * one for w, one in zip(weights, v)))
        expected[b] = pool.c_proj(torch.cat(answer))
    torch.testing.assert_close(pool(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_new_bottleneck_is_its_shortcut_to_the_last_bit(stride):
    block = Bottleneck(8, 2, stride).eval()
    assert len(block.downsample) == (2 if stride > 1 else 0)
    x = torch.randn(2, 8, 6, 6).relu()
    if stride == 1:
        assert torch.equal(block(x), x)
    else:
        shortcut = block.downsample(F.avg_pool2d(x, 2)).relu()
        assert torch.equal(block(x), shortcut)


def test_starting_noise_of_the_modified_resnet_is_openais():
    torch.manual_seed(0)
    net = ModifiedResNet((1, 1, 1, 1), 64, 4, 96, 8)  # 256 channels
    pool = net.attnpool
    for p in (
        pool.positional_embedding,
        *(layer.weight for layer in pool.children()),
    ):
        assert abs(p.std() * 256**0.5 - 1) < 0.05
    for name, p in net.named_parameters():
        if p.ndim == 1 and "bn" in name:
            zero = name.endswith("bias") or (
                name.endswith("bn3.weight") and name.startswith("layer")
            )
            assert (p == float(not zero)).all(), name


@torch.no_grad()
def test_every_place_of_a_map_has_a_say_when_it_is_halved():
    """A plain ResNet drops three of four at the shortcut."""
    block = wake(Bottleneck(8, 2, stride=2)).double().eval()
    x = torch.randn(1, 8, 4, 4, dtype=torch.double).relu()
    y = block(x)
    for i in range(4):
        for j in range(4):
            other = x.clone()
            other[..., i, j] += 1
            changed = (block(other) - y).abs().amax(dim=(0, 1)) > 1e-9
            assert changed[i // 2, j // 2]


@torch.no_grad()
def test_the_attention_pool_knows_where_things_are():
    torch.manual_seed(0)
    pool = AttentionPool2d(4, 16, 2, 8).double()
    x = torch.randn(2, 16, 4, 4, dtype=torch.double)
    moved = x.flip(3)
    far = (pool(x) - pool(moved)).norm() / pool(x).norm()
    assert far > 0.01
    pool.positional_embedding[1:] = pool.positional_embedding[1]
    torch.testing.assert_close(pool(x), pool(moved))


@pytest.mark.parametrize(
    "layers, changes, words",
    [
        ((1, 1, 1), {}, "four stages"),
        ((1, 1, 0, 1), {}, "four stages"),
        ((1, 1, 1, 1), dict(width=5), "width must be even"),
        ((1, 1, 1, 1), dict(heads=5), "5 heads"),
        ((1, 1, 1, 1), dict(heads=0), "0 heads"),
        ((1, 1, 1, 1), dict(side=100), "multiple of 32"),
        ((1, 1, 1, 1), dict(side=0), "multiple of 32"),
    ],
)
def test_modified_resnets_that_cannot_be(layers, changes, words):
    with pytest.raises(ValueError, match=words):
        ModifiedResNet(layers, **{**SIZES, **changes})


@pytest.mark.parametrize(
    "shape", [(3, 96, 96), (1, 3, 96, 64), (1, 3, 128, 128), (1, 1, 96, 96)]
)
def test_modified_resnet_refuses_other_pictures(shape):
    with pytest.raises(ValueError, match=r"expected \(B, 3, 96, 96\)"):
        modified()(torch.zeros(shape, dtype=torch.double))
    with pytest.raises(ValueError, match="uint8"):
        modified()(torch.zeros(1, 3, 96, 96, dtype=torch.uint8))
