"""The Vision Transformer against loops, open_clip and transformers.

Towers are compared in float32, features and every gradient, to 1e-5.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from miniclip.vit import (
    VisionTransformer,
    check_grid,
    check_image,
    resize_positions,
)

SIZES = dict(  # small, and all different: 3 x 3 patches of 5 x 5 pixels
    image_resolution=15,
    patch_size=5,
    width=32,
    layers=3,
    heads=4,
    embed_dim=24,
)
PAPER = {  # image_resolution, patch_size, width, layers, heads, embed_dim
    "B/32": ((224, 32, 768, 12, 12, 512), 87_849_216),
    "B/16": ((224, 16, 768, 12, 12, 512), 86_192_640),
    "L/14": ((224, 14, 1024, 24, 16, 768), 303_966_208),
    "L/14@336": ((336, 14, 1024, 24, 16, 768), 304_293_888),
}


def tower():
    """A tower in which no bias is zero and no gain is one."""
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval()


def pictures(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 15, 15, generator=g)


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)


def gradients(model, features):
    """Gradients of a loss that asks for another amount of each number."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, features.numel()).view_as(features)
    (features * weights).sum().backward()
    return {n: p.grad for n, p in model.named_parameters()}


def tokens_of(model, image):
    """What the blocks read: one token for the class, then the patches."""
    seen = []
    hook = model.ln_pre.register_forward_hook(
        lambda _, args, out: seen.append(args[0])
    )
    model(image)
    hook.remove()
    return seen[0]


@torch.no_grad()
def test_patches_are_embedded_as_a_loop_says():
    model, image = tower(), pictures()
    tokens = tokens_of(model, image)
    rows = model.conv1.weight.flatten(1)
    for b in range(4):
        for i in range(9):
            y, x = 5 * (i // 3), 5 * (i % 3)  # in the order of reading
            patch = image[b, :, y : y + 5, x : x + 5].flatten()
            want = rows @ patch + model.positional_embedding[1 + i]
            close(tokens[b, 1 + i], want)
        first = model.class_embedding + model.positional_embedding[0]
        close(tokens[b, 0], first)


@torch.no_grad()
def test_one_patch_is_one_token():
    model, image = tower(), pictures(1)
    repainted = image.clone()
    repainted[..., 5:10, 10:15] = 7.0  # row 1, column 2: patch 5
    moved = tokens_of(model, image) != tokens_of(model, repainted)
    assert moved[0].any(dim=-1).nonzero().flatten().tolist() == [6]


# The oracle: open_clip and transformers, built from our own weights


@pytest.mark.parametrize("seed", [0, 1])
def test_open_clip_features_and_every_gradient(seed):
    open_clip = pytest.importorskip("open_clip.model")
    ours, image = tower(), pictures(seed=seed)
    theirs = open_clip.CLIP(
        24,
        open_clip.CLIPVisionCfg(
            layers=3, width=32, head_width=8, patch_size=5, image_size=15
        ),
        open_clip.CLIPTextCfg(
            context_length=4, vocab_size=8, width=64, heads=1, layers=1
        ),
        quick_gelu=True,
    ).visual.eval()
    theirs.load_state_dict(ours.state_dict())  # strict: the same names
    a, b = ours(image), theirs(image)
    close(a, b)
    ga, gb = gradients(ours, a), gradients(theirs, b)
    for name, grad in ga.items():
        assert grad.abs().max() > 0, name  # nothing is compared for free
        close(grad, gb[name])


def test_transformers_features():
    transformers = pytest.importorskip("transformers")
    ours, s = tower(), SIZES
    theirs = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=s["width"],
            intermediate_size=4 * s["width"],
            projection_dim=s["embed_dim"],
            num_hidden_layers=s["layers"],
            num_attention_heads=s["heads"],
            image_size=s["image_resolution"],
            patch_size=s["patch_size"],
            hidden_act="quick_gelu",
        )
    ).eval()
    missing = theirs.load_state_dict(
        hf_names(ours.state_dict()), strict=False
    )
    assert not missing.unexpected_keys
    assert all("position_ids" in k for k in missing.missing_keys)
    with torch.no_grad():
        close(ours(pictures()), theirs(pictures()).image_embeds)


def hf_names(state):
    """openai/CLIP's names of an image tower -> those of transformers."""
    ends = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "ln_pre": "pre_layrnorm",  # their spelling
        "ln_post": "post_layernorm",
    }
    out = {"visual_projection.weight": state["proj"].T}
    for key, value in state.items():
        for old, new in ends.items():
            if key.startswith(old):
                out["vision_model." + key.replace(old, new)] = value
        if not key.startswith("transformer.resblocks."):
            continue
        _, _, i, *rest = key.split(".")
        name, pre = ".".join(rest), f"vision_model.encoder.layers.{i}."
        if name.startswith("attn.in_proj"):
            kind = name.removeprefix("attn.in_proj_")
            for letter, part in zip("qkv", value.chunk(3)):
                out[f"{pre}self_attn.{letter}_proj.{kind}"] = part
            continue
        for old, new in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ):
            if name.startswith(old):
                out[pre + name.replace(old, new)] = value
    return out


# What matters and what does not


@torch.no_grad()
def test_a_puzzle_is_a_picture_only_without_positions():
    model, image = tower(), pictures()
    patches = nn.functional.unfold(image, 5, stride=5)[
        :, :, [4, 0, 8, 2, 1, 3, 7, 5, 6]
    ]
    puzzle = nn.functional.fold(patches, (15, 15), 5, stride=5)
    assert (model(image) - model(puzzle)).abs().max() > 1e-2
    model.positional_embedding.zero_()
    close(model(image), model(puzzle))


@torch.no_grad()
def test_every_patch_reaches_the_feature():
    model, image = tower(), pictures(1)
    feature = model(image)
    for i in range(9):
        y, x = 5 * (i // 3), 5 * (i % 3)
        other = image.clone()
        other[..., y : y + 5, x : x + 5] += 1
        assert (model(other) - feature).abs().max() > 1e-4, i


@torch.no_grad()
def test_pictures_do_not_see_each_other():
    model, image = tower(), pictures()
    alone = torch.cat([model(one[None]) for one in image])
    close(model(image), alone)
    assert model(image[:0]).shape == (0, 24)


# Size, work and start


@pytest.mark.parametrize("name", PAPER)
def test_parameters_and_work_of_the_paper(name):
    (side, p, w, layers, heads, e), total = PAPER[name]
    g = side // p
    with torch.device("meta"):
        model = VisionTransformer(side, p, w, layers, heads, e)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, side, side))
    n = sum(t.numel() for t in model.parameters())
    ends = 3 * p * p * w + w + (g * g + 1) * w + 4 * w + w * e
    assert n == total == ends + layers * (12 * w * w + 13 * w)
    L = g * g + 1
    blocks = layers * (24 * L * w * w + 4 * L * L * w)
    work = 2 * g * g * 3 * p * p * w + blocks + 2 * w * e
    assert counter.get_total_flops() == work


def test_starting_sizes_are_openais():
    torch.manual_seed(0)
    model = VisionTransformer(64, 4, 256, 1, 4, 128)
    for p in (
        model.class_embedding,
        model.positional_embedding,
        model.proj,
    ):
        assert abs(p.std() * 256**0.5 - 1) < 0.15
    assert model.conv1.bias is None


# Other resolutions


@pytest.mark.parametrize("grid", [1, 2, 5, 6, 7, 12, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_resized_positions_are_open_clips(grid, dtype):
    open_clip = pytest.importorskip("open_clip.model")
    torch.manual_seed(0)
    table = torch.randn(37, 16).to(dtype)
    ours = resize_positions(table, grid)
    state = {"visual.positional_embedding": table.float()}
    stub = SimpleNamespace(visual=SimpleNamespace(grid_size=grid))
    open_clip.resize_pos_embed(state, stub)
    theirs = state["visual.positional_embedding"].to(dtype)
    assert ours.shape == (grid * grid + 1, 16) and ours.dtype == dtype
    close(ours, theirs)
    assert torch.equal(ours[0], table[0])
    assert (grid == 6) == torch.equal(ours, table)


def test_resized_positions_keep_rows_and_columns_apart():
    table = torch.zeros(17, 2)
    for i in range(16):
        table[1 + i] = torch.tensor([i // 4, i % 4])
    finer = resize_positions(table, 12)[1:].view(12, 12, 2)
    assert (finer[1:, :, 0] > finer[:-1, :, 0] + 0.01).all()
    assert (finer[:, 1:, 1] > finer[:, :-1, 1] + 0.01).all()
    close(finer[..., 0], finer[..., 1].T)


def test_a_table_that_is_no_square_is_refused():
    for rows in 0, 1, 16, 18:
        with pytest.raises(ValueError, match=f"of {rows} positions"):
            resize_positions(torch.zeros(rows, 4), 8)


# Errors that say what to do


@pytest.mark.parametrize(
    "image, words",
    [
        (torch.zeros(2, 3, 15, 16), ["(2, 3, 15, 16)", "(B, 3, 15, 15)"]),
        (torch.zeros(2, 3, 20, 20), ["(2, 3, 20, 20)", "preprocess"]),
        (torch.zeros(2, 1, 15, 15), ["(2, 1, 15, 15)"]),
        (torch.zeros(3, 15, 15), ["(3, 15, 15)", "image[None]"]),
        (torch.zeros(2, 3, 15, 15).byte(), ["torch.uint8", "preprocess"]),
    ],
)
def test_bad_pictures_are_refused_in_words(image, words):
    with pytest.raises(ValueError) as error:
        tower()(image)
    for word in words:
        assert word in str(error.value)


def test_good_pictures_pass():
    check_image(pictures(), 15)
    check_image(pictures().half(), 15)
    check_grid(336, 14)


def test_patches_must_cover_the_picture():
    with pytest.raises(ValueError, match="64 .* 12; 4 pixels"):
        VisionTransformer(64, 12, 32, 1, 4, 8)
