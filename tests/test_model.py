"""Tests of chapter 07_model: CLIP, its sizes, pictures and files."""

import hashlib
import io
import json
import math
import os
import pickle
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from bench import parity
from bench.parity import (
    compare,
    name_in_open_clip,
    open_clip_twin,
    random_model,
)
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import transforms as v1

from miniclip import model as module
from miniclip.data import data_dir, decode
from miniclip.loss import clip_loss
from miniclip.model import (
    CLIP,
    CONFIGS,
    MEAN,
    STD,
    CLIPConfig,
    available_models,
    load,
    preprocess,
    resize,
    save,
    to_rgb,
)
from miniclip.tokenizer import Tokenizer, train_bpe

VIT = CLIPConfig(32, 32, 2, 128, 8, 16, 600, 64, 2, 2)
MODIFIED = CLIPConfig(
    24, 64, (1, 2, 1, 1), 8, None, 16, 600, 64, 2, 2, vision_heads=4
)
TEXTS = ["red apple", "green apple", "a dog face", "rocket", "dog"]


def tokenizer(merges: int = 8) -> Tokenizer:
    return Tokenizer(train_bpe(TEXTS, merges))


def small_resnet() -> CLIPConfig:
    size = tokenizer().vocab_size
    return CLIPConfig(24, 32, (1, 1, 1), 8, None, 16, size, 32, 2, 1)


def make(config: CLIPConfig = VIT, seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(config).eval()


def with_tokenizer(seed: int = 0) -> CLIP:
    model = make(small_resnet(), seed)
    model.tokenizer = tokenizer()
    return model


def batch(config: CLIPConfig, n: int = 4):
    pick = torch.Generator().manual_seed(1)
    H, V = config.image_resolution, config.vocab_size
    image = torch.randn(n, 3, H, H, generator=pick)
    ids = torch.randint(
        1, V - 1, (n, config.context_length), generator=pick
    )
    for i in range(n):
        ids[i, 2 + 3 * i % (config.context_length - 2)] = V - 1
    return image, ids


# --- sizes


PAPER = {  # total, image tower, text tower and scale, parameters, keys
    "RN50": (102_007_137, 38_316_896, 63_690_241, 324, 489),
    "RN101": (119_688_033, 56_259_936, 63_428_097, 477, 795),
    "RN50x4": (178_300_601, 87_137_080, 91_163_521, 414, 669),
    "RN50x16": (290_979_217, 167_328_912, 123_650_305, 540, 921),
    "RN50x64": (623_258_305, 420_380_352, 202_877_953, 756, 1353),
    "ViT-B/32": (151_277_313, 87_849_216, 63_428_097, 302, 302),
    "ViT-B/16": (149_620_737, 86_192_640, 63_428_097, 302, 302),
    "ViT-L/14": (427_616_513, 303_966_208, 123_650_305, 446, 446),
    "ViT-L/14@336px": (427_944_193, 304_293_888, 123_650_305, 446, 446),
}


@pytest.mark.parametrize("name", PAPER)
def test_parameters_of_openai_models(name):
    with torch.device("meta"):
        model = CLIP(CONFIGS[name])
    total, visual, text, tensors, keys = PAPER[name]
    counts = {n: p.numel() for n, p in model.named_parameters()}
    image = sum(n for name, n in counts.items() if "visual." in name)
    assert sum(counts.values()) == total and image == visual
    assert total - visual == text
    assert len(counts) == tensors and len(model.state_dict()) == keys


def test_configs_are_the_nine_of_the_paper():
    assert list(CONFIGS) == list(PAPER)
    table = [  # tables 19 and 20: embed, side, width, text width and heads
        (1024, 224, 2048, 512, 8),
        (512, 224, 2048, 512, 8),
        (640, 288, 2560, 640, 10),
        (768, 384, 3072, 768, 12),
        (1024, 448, 4096, 1024, 16),
        (512, 224, 768, 512, 8),
        (512, 224, 768, 512, 8),
        (768, 224, 1024, 768, 12),
        (768, 336, 1024, 768, 12),
    ]
    for c, (embed, side, width, text, heads) in zip(
        CONFIGS.values(), table
    ):
        is_resnet = isinstance(c.vision_layers, tuple)
        assert c.embed_dim == embed and c.image_resolution == side
        assert c.vision_width * (32 if is_resnet else 1) == width
        assert c.transformer_width == text and c.transformer_heads == heads
        assert c.transformer_layers == 12 and c.vocab_size == 49408
        assert c.context_length == 77
    patches = [c.vision_patch_size for c in CONFIGS.values()]
    assert patches == [None] * 5 + [32, 16, 14, 14]


@pytest.mark.parametrize("name", PAPER)
def test_configs_are_those_of_open_clip(name):
    """Heads and patches too, from its own files."""
    theirs = open_clip.get_model_config(name_in_open_clip(name))
    c, vision = CONFIGS[name], theirs["vision_cfg"]
    layers = vision["layers"]
    layers = tuple(layers) if isinstance(layers, list) else layers
    assert theirs["quick_gelu"] and theirs["embed_dim"] == c.embed_dim
    assert (c.image_resolution, c.vision_layers, c.vision_width) == (
        vision["image_size"],
        layers,
        vision["width"],
    )
    assert c.vision_patch_size == vision.get("patch_size")
    with torch.device("meta"):
        ours = CLIP(c).visual
        twin = open_clip.model.CLIP(
            c.embed_dim, vision, theirs["text_cfg"], quick_gelu=True
        ).visual
    if isinstance(layers, tuple):
        assert ours.attnpool.heads == twin.attnpool.num_heads
    else:
        block = twin.transformer.resblocks[0]
        ours = ours.transformer.resblocks[0].attn.heads
        assert ours == block.attn.num_heads


def test_heads_of_the_image_tower():
    layers = make().visual.transformer.resblocks
    assert layers[0].attn.heads == 2  # one for every 64 of the width
    layers = make(replace(VIT, vision_heads=4)).visual.transformer.resblocks
    assert layers[0].attn.heads == 4
    assert make(MODIFIED).visual.attnpool.heads == 4


def test_layers_and_heads_say_which_tower_is_built():
    assert type(make(small_resnet()).visual).__name__ == "ResNet"
    assert type(make(MODIFIED).visual).__name__ == "ModifiedResNet"
    assert type(make().visual).__name__ == "VisionTransformer"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"vision_width": "128"}, "vision_width is '128'"),
        ({"transformer_layers": True}, "transformer_layers is True"),
        ({"vocab_size": 600.0}, "vocab_size is 600.0"),
        ({"vision_layers": ()}, r"vision_layers is \(\)"),
        ({"vision_layers": (1, -1)}, "vision_layers"),
        ({"vision_patch_size": None}, "vision_patch_size is None"),
        ({"vision_layers": (1, 1)}, "a ResNet has no patches"),
        ({"vision_width": 100}, "multiple of 64"),
        ({"vision_heads": 0}, "vision_heads is 0"),
        ({"vision_heads": True}, "vision_heads is True"),
        ({"vision_heads": 3}, "is 128, expected a multiple of 3"),
    ],
)
def test_impossible_config_names_the_field(change, words):
    with pytest.raises(ValueError, match=words):
        replace(VIT, **change)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"vision_layers": (1, 1, 1)}, "four stages"),
        ({"vision_heads": 7}, "7 heads"),
        ({"vision_width": 9, "vision_heads": 3}, "even"),
        ({"image_resolution": 48}, "48 is not a multiple of 32"),
        ({"vision_patch_size": 8}, "a ResNet has no patches"),
    ],
)
def test_impossible_modified_resnet(change, words):
    with pytest.raises(ValueError, match=words):
        replace(MODIFIED, **change)


@pytest.mark.parametrize("which", ["small", "modified"])
def test_config_from_json_equals_the_original(which):
    config = small_resnet() if which == "small" else MODIFIED
    again = CLIPConfig(**json.loads(json.dumps(asdict(config))))
    assert again == config and hash(again) == hash(config)


# --- the function


def reduced(name: str) -> tuple[CLIPConfig, dict, dict]:
    """Full width, a block for each stage, little pictures and texts."""
    c = CONFIGS[name]
    layers = (1, 1, 1, 1) if isinstance(c.vision_layers, tuple) else 1
    side = 2 * (c.vision_patch_size or 32)
    small = replace(
        c,
        image_resolution=side,
        vision_layers=layers,
        context_length=9,
        vocab_size=600,
        transformer_layers=1,
    )
    vision = dict(image_size=side, layers=layers, width=c.vision_width)
    vision["patch_size"] = c.vision_patch_size
    text = dict(context_length=9, vocab_size=600, layers=1)
    text |= dict(width=c.transformer_width, heads=c.transformer_heads)
    return small, vision, text


@pytest.mark.parametrize("name", PAPER)
def test_parity_with_open_clip_in_full_width(name):
    """Features, logits and every gradient; see tests/bench/parity.py."""
    config, vision, text = reduced(name)
    model = random_model(config)
    row = compare(model, "open_clip", 3, vision=vision, text=text)
    gaps = {k: v for k, v in row.items() if not k.startswith("gradients_")}
    assert max(gaps.values()) < 1e-5, gaps
    assert row["gradients_compared"] == len(list(model.parameters()))


@pytest.mark.parametrize("name", [n for n in PAPER if "ViT" in n])
def test_parity_with_transformers_in_full_width(name):
    pytest.importorskip("transformers")
    model = random_model(reduced(name)[0])
    row = compare(model, "transformers", 3)
    gaps = {k: v for k, v in row.items() if not k.startswith("gradients_")}
    assert max(gaps.values()) < 1e-5, gaps


def test_parity_can_fail():
    """A difference of one in ten thousand in one weight is seen."""
    config, vision, text = reduced("RN50")
    model = random_model(config)

    def slightly_off(model, **changes):
        twin = open_clip_twin(model, **changes)
        proj = twin.visual.attnpool.c_proj
        proj.bias = torch.nn.Parameter(proj.bias * 1.0001)
        return twin

    with mock.patch.object(parity, "open_clip_twin", slightly_off):
        row = compare(model, "open_clip", 3, vision=vision, text=text)
    assert row["image_features"] > 1e-5


def test_recorded_parity():
    """What data/results/parity.json says of the full sizes."""
    path = data_dir() / "results" / "parity.json"
    rows = json.loads(path.read_text())["rows"]
    assert {r["model"] for r in rows} <= set(PAPER) and len(rows) > 6
    for row in rows:
        assert row["parameters"] == PAPER[row["model"]][0]
        for what in "image_features", "text_features", "logits":
            assert row[what] < 1e-5
        assert row["gradients"] < 1e-5


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4)]
)
def test_forward_and_every_gradient_equal_open_clip(dtype, tolerance):
    model = make().to(dtype)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)  # not what a fresh model has
    theirs = twin_of(model).to(dtype)
    image, ids = batch(VIT)
    image = image.to(dtype)
    u, v, scale = theirs(image, ids)
    clip_loss(u, v, scale).backward()
    logits_per_image, logits_per_text = model(image, ids)
    close = dict(rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(logits_per_image, scale * u @ v.T, **close)
    torch.testing.assert_close(logits_per_text, logits_per_image.T)
    labels = torch.arange(len(ids))
    loss = F.cross_entropy(logits_per_image, labels)
    ((loss + F.cross_entropy(logits_per_text, labels)) / 2).backward()
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in theirs.named_parameters()}
    for name, p in model.named_parameters():
        expected = theirs.get_parameter(name).grad
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(p.grad, expected, **close, msg=name)


def twin_of(model: CLIP):
    c = model.config
    vision = dict(image_size=c.image_resolution, layers=c.vision_layers)
    vision |= dict(width=c.vision_width, patch_size=c.vision_patch_size)
    text = dict(context_length=c.context_length, vocab_size=c.vocab_size)
    text |= dict(width=c.transformer_width, layers=c.transformer_layers)
    text |= dict(heads=c.transformer_heads)
    return open_clip_twin(model, vision=vision, text=text)


@pytest.mark.parametrize("config", ["vit", "modified"])
def test_state_dict_of_open_clip_loads_into_ours(config):
    model = make(VIT if config == "vit" else MODIFIED)
    result = model.load_state_dict(twin_of(model).state_dict())
    assert not result.missing_keys and not result.unexpected_keys


def test_scale_starts_at_openais_value_as_a_scalar():
    scale = make().logit_scale
    assert scale.shape == () and scale.requires_grad
    assert scale.item() == pytest.approx(math.log(1 / 0.07))


def test_forward_takes_unequal_numbers_and_normalises():
    model = make()
    image, ids = batch(VIT)
    with torch.no_grad():
        per_image, per_text = model(image[:3], ids[:2])
        u = F.normalize(model.encode_image(image[:3]), dim=-1)
        v = F.normalize(model.encode_text(ids[:2]), dim=-1)
        torch.testing.assert_close(per_image, u @ v.T / 0.07)
        assert per_image.shape == (3, 2) and per_text.shape == (2, 3)
        model.visual.proj *= 7  # lengths must not matter
        model.text_projection *= 0.1
        again, _ = model(image[:3], ids[:2])
    torch.testing.assert_close(again, per_image, rtol=1e-4, atol=1e-4)
    assert per_image.abs().max() <= model.logit_scale.exp() * 1.0001


def test_features_are_not_normalised():
    model = make()
    image, ids = batch(VIT)
    with torch.no_grad():
        before = model.encode_image(image), model.encode_text(ids)
        model.visual.proj *= 2
        model.text_projection *= 2
        after = model.encode_image(image), model.encode_text(ids)
    for a, b in zip(before, after):
        assert a.shape == (4, VIT.embed_dim)
        torch.testing.assert_close(b, 2 * a)


def of_kind(kind: str) -> CLIPConfig:
    return {"vit": VIT, "modified": MODIFIED}.get(kind) or small_resnet()


@pytest.mark.parametrize("config", ["vit", "resnet", "modified"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_take_float32_pictures(config, dtype, tmp_path):
    save(make(of_kind(config)), tmp_path)
    model, _ = load(tmp_path)
    config = model.config
    image, ids = batch(config)
    with torch.no_grad():
        full = model.encode_image(image), model.encode_text(ids)
        low = model.to(dtype)
        logits, _ = low(image, ids)
        half = low.encode_image(image), low.encode_text(ids)
    assert logits.dtype == dtype and logits.isfinite().all()
    limit = 0.05 if dtype == torch.bfloat16 else 0.01
    for a, b in zip(full, half):
        assert b.dtype == dtype
        assert (a - b.float()).norm() / a.norm() < limit


class Text(torch.nn.Module):
    """The text tower as a module of its own, as export wants it."""

    def __init__(self, model: CLIP):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model.encode_text(ids)


KINDS = ["vit", "resnet", "modified"]


@pytest.mark.parametrize("kind", KINDS)
def test_compile_makes_one_graph_of_each_tower(kind):
    """Backend "eager": the graph is torch's, the kernels are the same."""
    torch._dynamo.reset()
    model = make(of_kind(kind))
    image, ids = batch(model.config)
    options = dict(backend="eager", fullgraph=True)
    with torch.no_grad():
        for tower, x in (model.visual, image), (Text(model), ids):
            found = torch.compile(tower, **options)(x)
            torch.testing.assert_close(found, tower(x))
    compiled = torch.compile(model, **options)
    torch.testing.assert_close(compiled(image, ids), model(image, ids))
    grads = []
    for clip in model, compiled:
        model.zero_grad()
        clip(image, ids)[0].diagonal().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    largest = max(g.abs().max().item() for g in grads[0])
    for a, b in zip(*grads):
        assert parity.gradient_gap(b, a, largest) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_export_writes_each_tower_for_any_batch(kind, tmp_path):
    model = make(of_kind(kind))
    image, ids = batch(model.config)
    any_batch = ({0: torch.export.Dim("B", max=1000)},)
    for tower, x in (model.visual, image), (Text(model), ids):
        program = torch.export.export(tower, (x,), dynamic_shapes=any_batch)
        torch.export.save(program, tmp_path / "tower.pt2")
        again = torch.export.load(tmp_path / "tower.pt2").module()
        for n in 4, 3, 7:
            y = torch.cat([x, x])[:n]
            torch.testing.assert_close(
                again(y), tower(y), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("kind", ["vit", "modified"])
@pytest.mark.parametrize("side", [32, 96, 160])
def test_other_resolutions_are_open_clips(kind, side):
    """Its resize_pos_embed knows the ViT; for the pool we call it so."""
    model = make(of_kind(kind))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    larger = resize(model, side)
    path = "" if kind == "vit" else "attnpool."
    name = f"visual.{path}positional_embedding"
    cells = side // (8 if kind == "vit" else 32)
    state = {"visual.positional_embedding": before[name]}
    stub = SimpleNamespace(visual=SimpleNamespace(grid_size=cells))
    open_clip.model.resize_pos_embed(state, stub)
    expected = state["visual.positional_embedding"]
    found = larger.state_dict()
    torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=0)
    for other, tensor in before.items():
        assert torch.equal(model.state_dict()[other], tensor), other
        if other != name:
            assert torch.equal(found[other], tensor), other
    assert larger.config == replace(model.config, image_resolution=side)
    image, ids = batch(larger.config)
    per_image, _ = larger(image, ids)
    twin = twin_of(larger)
    with torch.no_grad():
        u, v, scale = twin(image, ids)
    torch.testing.assert_close(
        per_image, scale * u @ v.T, atol=1e-4, rtol=1e-4
    )
    per_image.sum().backward()
    assert model.logit_scale.grad is None
    with torch.no_grad():
        larger.logit_scale += 1
    assert torch.equal(model.logit_scale, before["logit_scale"])


def test_resize_keeps_mode_tokenizer_and_the_small_resnet():
    model = with_tokenizer().train()
    larger = resize(model, 48)
    assert larger.training and larger.tokenizer is model.tokenizer
    assert_same(resize(larger, 32), model)
    image, ids = batch(larger.config)
    assert larger(image, ids)[0].shape == (4, 4)
    assert not resize(make(), 64).training
    with pytest.raises(ValueError, match="not a multiple of patch_size"):
        resize(make(), 33)
    with pytest.raises(ValueError, match="not a multiple of 32"):
        resize(make(MODIFIED), 80)


def test_resized_model_can_be_saved_and_loaded(tmp_path):
    larger = resize(make(MODIFIED).half(), 96)
    assert larger.visual.attnpool.positional_embedding.dtype == torch.half
    save(larger, tmp_path)
    again, prepare = load(tmp_path)
    assert_same(again, larger.float())
    assert prepare(noise(50, 70)).shape == (3, 96, 96)


def test_wrong_pictures_say_what_to_do():
    model = make()
    with pytest.raises(ValueError, match=r"image\[None\]"):
        model.encode_image(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        model.encode_image(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match="uint8.*preprocess"):
        model.encode_image(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_fresh_loss_is_near_ln_b():
    model = make()
    image, ids = batch(VIT, 16)
    with torch.no_grad():
        model.logit_scale.zero_()  # a scale of 1: no firm opinions
        logits, _ = model(image, ids)
    loss = F.cross_entropy(logits, torch.arange(16)).item()
    assert loss == pytest.approx(math.log(16), abs=0.1)


# --- preprocessing


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pick = np.random.default_rng(0)
    pixels = pick.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def openai_transform(n_px: int):
    """_transform of openai/CLIP's clip.py, in torchvision's own words."""
    return v1.Compose(
        [
            v1.Resize(n_px, interpolation=v1.InterpolationMode.BICUBIC),
            v1.CenterCrop(n_px),
            lambda image: image.convert("RGB"),
            v1.ToTensor(),
            v1.Normalize(
                (0.48145466, 0.4578275, 0.40821073),
                (0.26862954, 0.26130258, 0.27577711),
            ),
        ]
    )


def equals_peers(picture, side=48, same_as=None) -> bool:
    """Ours, against OpenAI's and open_clip's, which must agree."""
    other = picture if same_as is None else same_as
    ours, theirs = preprocess(side)(picture), openai_transform(side)(other)
    assert ours.shape == (3, side, side) and ours.dtype == torch.float32
    assert type(ours) is torch.Tensor
    peer = open_clip.image_transform(side, is_train=False)
    assert torch.equal(peer(other), theirs)
    return torch.equal(ours, theirs)


SHAPES = [(90, 61), (61, 90), (20, 33), (48, 48), (49, 47), (1, 61), (7, 1)]


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("mode", ["RGB", "L", "opaque RGBA"])
def test_preprocess_is_openais_bit_for_bit(size, mode):
    picture = noise(*size, mode.split()[-1])
    assert equals_peers(picture) and equals_peers(picture, 31)


def test_preprocess_of_a_large_picture_is_openais():
    large = noise(90, 61).resize((4501, 3001), Image.Resampling.NEAREST)
    assert equals_peers(large, 224)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "CMYK"])
def test_where_preprocess_is_rgb_first_on_purpose(mode):
    """OpenAI's resizes first; on white and in RGB, the two are one."""
    picture = noise(90, 61, mode)
    if mode[-1] == "A":
        picture.putalpha(noise(61, 90, "L").resize((90, 61)))
    if mode != "CMYK":  # there it is a matter of rounding
        assert not equals_peers(picture)
    assert equals_peers(picture, same_as=to_rgb(picture))
    if mode[-1] == "A":
        white = Image.new("RGBA", picture.size, "white")
        laid = Image.alpha_composite(white, picture.convert("RGBA"))
        assert equals_peers(picture, same_as=laid.convert("RGB"))
    else:
        assert equals_peers(picture, same_as=picture.convert("RGB"))


def as_file(picture: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("turn", range(1, 9))
def test_files_of_turned_photographs(turn):
    """decode heeds the note; an opened picture is read as OpenAI's does."""
    picture, note = noise(90, 61), Image.Exif()
    note[0x0112] = turn
    file = as_file(picture, exif=note)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    assert upright.size == ((90, 61) if turn < 5 else (61, 90))
    assert equals_peers(decode(file), same_as=upright.convert("RGB"))
    assert equals_peers(Image.open(io.BytesIO(file)))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_files_of_16_bits_are_those_of_8(format):
    grey = noise(90, 61, "L")
    deep = np.asarray(grey).astype(np.uint16) * 257
    file = as_file(Image.fromarray(deep), format)
    assert equals_peers(decode(file), same_as=grey)


def test_bytes_get_the_pixels_of_pictures_alone_and_in_a_batch():
    picture = noise(90, 61)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    ours = preprocess(48)(pixels)
    assert torch.equal(ours, preprocess(48)(picture))
    other = pixels.flip(-1)
    two = preprocess(48)(torch.stack([pixels, other]))
    assert torch.equal(two[0], ours)
    assert torch.equal(two[1], preprocess(48)(other))
    five = preprocess(61)(pixels.expand(2, 5, 3, 61, 90))  # only cropped
    assert five.shape == (2, 5, 3, 61, 61)
    six = preprocess(24)(pixels.expand(2, 3, 3, 61, 90))
    assert torch.equal(six[1, 2], preprocess(24)(picture))


def test_preprocess_travels_to_the_workers_of_a_loader():
    again = pickle.loads(pickle.dumps(preprocess(8)))
    picture = noise(9, 20)
    assert torch.equal(again(picture), preprocess(8)(picture))


def test_bombs_are_refused_before_they_are_decoded():
    giant = Image.new("1", (8193, 8192))
    file = io.BytesIO(as_file(giant))
    with pytest.raises(ValueError, match="8,193 x 8,192.*67,108,864"):
        preprocess(8)(Image.open(file))
    decoded = mock.patch.object(
        Image.Image, "convert", side_effect=AssertionError("decoded")
    )
    with decoded, pytest.raises(ValueError, match="make it smaller"):
        preprocess(8)(Image.open(file))


def test_narrow_pictures_are_refused_before_they_are_resized():
    for size, words in ((1, 5000), "1 x 5,000"), ((5000, 1), "5,000 x 1 "):
        picture = Image.new("RGB", size)
        with pytest.raises(ValueError, match=f"{words}.*of 1,120,000"):
            preprocess(224)(picture)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        with pytest.raises(ValueError, match=words):
            preprocess(224)(pixels)
        assert preprocess(32)(picture).shape == (3, 32, 32)


def test_preprocess_normalises_with_clips_numbers():
    grey = preprocess(8)(Image.new("RGB", (8, 8), (255, 0, 51)))
    for c, value in enumerate((1.0, 0.0, 0.2)):
        expected = (value - MEAN[c]) / STD[c]
        assert grey[c].mean().item() == pytest.approx(expected, abs=1e-5)


def test_transparent_and_palette_pictures():
    clear = Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    assert to_rgb(clear).getpixel((4, 4)) == (255, 255, 255)
    veil = Image.new("LA", (9, 9), (0, 128))
    assert abs(to_rgb(veil).getpixel((4, 4))[0] - 127) <= 1
    red = Image.new("RGB", (9, 9), (255, 0, 0)).quantize(2)
    assert red.mode == "P" and to_rgb(red).getpixel((4, 4)) == (255, 0, 0)
    red.info["transparency"] = 0
    assert to_rgb(red).mode == "RGB"
    smooth = noise(90, 61)
    palette = smooth.quantize(256)
    ours = preprocess(24)(palette)
    assert torch.equal(ours, preprocess(24)(palette.convert("RGB")))


@pytest.mark.parametrize(
    "picture, error, words",
    [
        ("cat.png", TypeError, "str.*PIL.Image.open"),
        (np.zeros((9, 9, 3), np.uint8), TypeError, "uint8 tensor"),
        (torch.zeros(3, 9, 9), TypeError, "float32"),
        (
            torch.zeros(4, 9, 9, dtype=torch.uint8),
            ValueError,
            r"\(4, 9, 9\)",
        ),
        (torch.zeros(9, 9, dtype=torch.uint8), ValueError, r"\(9, 9\)"),
        (Image.new("I;16", (9, 9)), ValueError, "decode"),
    ],
)
def test_what_is_no_picture_is_refused(picture, error, words):
    with pytest.raises(error, match=words):
        preprocess(8)(picture)


# --- saving and loading


def assert_same(a: CLIP, b: CLIP) -> None:
    assert a.config == b.config
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("config", ["vit", "resnet", "modified"])
def test_round_trip_is_bit_exact(tmp_path, config):
    model = (
        make(of_kind(config)) if config != "resnet" else with_tokenizer()
    )
    if config == "resnet":  # move the running statistics
        model.train()(*batch(model.config))
        model.eval()
    save(model, tmp_path / "new" / "folder")
    again, prepare = load(tmp_path / "new" / "folder")
    assert_same(model, again)
    image, ids = batch(model.config)
    with torch.no_grad():
        assert torch.equal(model(image, ids)[0], again(image, ids)[0])
    side = model.config.image_resolution
    assert prepare(noise(50, 70)).shape == (3, side, side)
    assert all(p.requires_grad and p.is_leaf for p in again.parameters())
    again.train()(image, ids)[0].sum().backward()  # and it can be trained


def test_load_gives_evaluation_mode_and_leaves_random_numbers(tmp_path):
    save(make(), tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model, _ = load(str(tmp_path))
    assert torch.equal(before, torch.get_rng_state())
    assert not any(m.training for m in model.modules())
    assert not any(t.is_meta for t in model.state_dict().values())


def test_weights_do_not_depend_on_the_file_after_load(tmp_path):
    save(make(), tmp_path)
    model, _ = load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert_same(model, make())


def test_tokenizer_travels_with_the_weights(tmp_path):
    model = with_tokenizer()
    save(model, tmp_path)
    again, _ = load(tmp_path)
    assert again.tokenizer.merges == model.tokenizer.merges
    ids = model.tokenizer(TEXTS, 16)
    assert torch.equal(again.tokenizer(TEXTS, 16), ids)
    assert load_without_tokenizer(tmp_path).tokenizer is None


def load_without_tokenizer(folder):
    """Save a model that has none over one that had one."""
    save(make(), folder)
    assert not (folder / "merges.json").exists()
    return load(folder)[0]


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for name in "ab":
        save(with_tokenizer(), tmp_path / name, half=True)
    for file in (tmp_path / "a").iterdir():
        assert (
            file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
        )
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == ["config.json", "merges.json", "model.safetensors"]


def test_half_stores_16_bits_and_loads_32(tmp_path):
    model = with_tokenizer()
    save(model, tmp_path / "full")
    save(model, tmp_path / "half", half=True)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    kinds = {t.dtype for t in stored.values()}
    assert kinds <= {torch.float16, torch.int64}
    again, _ = load(tmp_path / "half")
    image, ids = batch(model.config)
    for name, tensor in again.state_dict().items():
        expected = model.state_dict()[name]
        assert tensor.dtype == expected.dtype
        if tensor.is_floating_point():
            expected = expected.half().float()
        assert torch.equal(tensor, expected)
    with torch.no_grad():
        a, b = model.encode_image(image), again.encode_image(image)
        assert 0 < (a - b).norm() / a.norm() < 2e-3
        a, b = model.encode_text(ids), again.encode_text(ids)
        assert 0 < (a - b).norm() / a.norm() < 2e-3
    assert next(model.parameters()).dtype == torch.float32  # untouched


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_half_refuses_what_does_not_fit(tmp_path, value):
    model = make()
    with torch.no_grad():
        model.visual.proj[0, 0] = value
    with pytest.raises(ValueError, match="visual.proj.*half=False"):
        save(model, tmp_path / "x", half=True)
    assert not (tmp_path / "x").exists()


def test_save_refuses_a_tokenizer_of_another_model(tmp_path):
    model = with_tokenizer()
    model.tokenizer = tokenizer(3)
    with pytest.raises(ValueError, match="517 entries.*522"):
        save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# --- interrupted saves


@pytest.mark.parametrize("where", ["save_file", "fsync", "replace"])
def test_interrupted_save_leaves_the_old_checkpoint(tmp_path, where):
    old = with_tokenizer(0)
    save(old, tmp_path)
    target = {
        "save_file": "miniclip.model.save_file",
        "fsync": "os.fsync",
        "replace": "os.replace",
    }[where]
    with mock.patch(target, side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            save(with_tokenizer(1), tmp_path)
    assert_same(load(tmp_path)[0], old)
    assert len(list(tmp_path.iterdir())) == 3  # nothing left behind


KILLED = """
import sys, os, torch
from miniclip import model as module
from miniclip.model import *
model, _ = module.load(sys.argv[1])
with torch.no_grad():
    model.logit_scale.fill_(0)
def write_half(state, path, metadata):
    real(state, path, metadata)
    with open(path, "r+b") as file:
        file.truncate(1000)
    os._exit(9)
real, module.save_file = module.save_file, write_half
module.save(model, sys.argv[1])
"""


def test_killed_process_leaves_the_old_checkpoint(tmp_path):
    old = with_tokenizer()
    save(old, tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert done.returncode == 9
    assert_same(load(tmp_path)[0], old)
    save(with_tokenizer(1), tmp_path)  # and the next save cleans up
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("done", [1, 2])
def test_save_cut_between_two_renames_is_noticed(tmp_path, done):
    save(with_tokenizer(), tmp_path)
    newer = with_tokenizer(1)
    other = train_bpe(["zebra", "zebras", "zero"], 8)
    newer.tokenizer = Tokenizer(other)
    assert newer.tokenizer.vocab_size == newer.config.vocab_size
    real, calls = os.replace, []

    def replace_some(a, b):
        if len(calls) == done:
            raise KeyboardInterrupt
        calls.append(b)
        real(a, b)

    with mock.patch("os.replace", replace_some):
        with pytest.raises(KeyboardInterrupt):
            save(newer, tmp_path)
    with pytest.raises(ValueError, match="cut short"):
        load(tmp_path)


# --- files that are not as they should be


def change(folder, **changes) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    config = {k: v for k, v in config.items() if v != "gone"}
    path.write_text(json.dumps(config))


def complaint(folder, kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        load(folder)
    return str(caught.value)


def test_unknown_name_lists_what_is_there():
    with mock.patch.object(module, "available_models", lambda: ["emoji"]):
        text = complaint("emojji", FileNotFoundError)
    assert "'emojji'" in text and "['emoji']" in text


def test_a_name_finds_the_shipped_folder(tmp_path, monkeypatch):
    save(make(), tmp_path / "checkpoints" / "tiny")
    (tmp_path / "checkpoints" / "README.md").write_text("no model")
    monkeypatch.setattr(module, "data_dir", lambda: tmp_path)
    assert available_models() == ["tiny"]
    save(make(seed=1), tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)  # where a folder has the same name
    assert_same(load("tiny")[0], make(seed=0))
    assert_same(load("./tiny")[0], make(seed=1))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_file_is_named(tmp_path, file):
    save(make(), tmp_path)
    (tmp_path / file).unlink()
    text = complaint(tmp_path, FileNotFoundError)
    assert f"has no {file}" in text and str(tmp_path) in text


def test_lost_merges_are_noticed(tmp_path):
    save(with_tokenizer(), tmp_path)
    (tmp_path / "merges.json").unlink()
    assert "merges.json" in complaint(tmp_path)


def test_wrong_shape_names_the_tensor(tmp_path):
    save(make(), tmp_path)
    change(tmp_path, embed_dim=48)
    text = complaint(tmp_path)
    assert "text_projection" in text and "visual.proj" in text
    assert "config.json" in text and str(tmp_path) in text


def test_missing_and_foreign_tensors_are_named(tmp_path):
    save(make(), tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["extra.weight"] = state.pop("ln_final.bias")
    save_file(state, path)
    text = complaint(tmp_path)
    assert "extra.weight" in text and "ln_final.bias" in text


def test_weights_from_elsewhere_need_no_fingerprint(tmp_path):
    model = make()
    save(model, tmp_path)
    state = {k: v.bfloat16() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    again, _ = load(tmp_path)
    assert next(again.parameters()).dtype == torch.float32


def test_number_that_changes_no_shape_is_noticed(tmp_path):
    save(make(), tmp_path)
    change(tmp_path, transformer_heads=4)
    assert "not of these weights" in complaint(tmp_path)


def test_activation_travels_and_is_guarded_by_the_fingerprint(tmp_path):
    model = make(replace(VIT, activation="gelu"))
    for tower in model, model.visual:
        for block in tower.transformer.resblocks:
            assert type(block.mlp.gelu) is nn.GELU
    save(model, tmp_path)
    assert_same(load(tmp_path)[0], model)
    change(tmp_path, activation="quick_gelu")
    assert "not of these weights" in complaint(tmp_path)


def test_checkpoints_without_activation_are_quick(tmp_path):
    """As all were that were written before there was a choice."""
    save(with_tokenizer(), tmp_path)
    change(tmp_path, activation="gone")
    assert_same(load(tmp_path)[0], with_tokenizer())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"colour": "blue"}, "unknown fields ['colour']"),
        ({"embed_dim": "gone"}, "lacks ['embed_dim']"),
        ({"embed_dim": "32"}, "embed_dim is '32'"),
        ({"vision_layers": None}, "vision_layers is None"),
        ({"activation": "relu"}, "activation is 'relu', expected one of"),
    ],
)
def test_wrong_config_names_file_and_field(tmp_path, changes, words):
    save(make(), tmp_path)
    change(tmp_path, **changes)
    text = complaint(tmp_path)
    assert words in text and str(tmp_path / "config.json") in text


@pytest.mark.parametrize("file", ["config.json", "merges.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe"]
)
def test_broken_json_names_the_file(tmp_path, file, content):
    save(with_tokenizer(), tmp_path)
    (tmp_path / file).write_bytes(content)
    assert file in complaint(tmp_path)


@pytest.mark.parametrize(
    "merges",
    [
        {"a": "b"},
        [["a"]],
        [["a", 1]],
        [["a", "b"]],
        ["ab"] * 8,
        [["xx", "y"]] * 8,
    ],
)
def test_wrong_merges_name_the_file(tmp_path, merges):
    save(with_tokenizer(), tmp_path)
    (tmp_path / "merges.json").write_text(json.dumps(merges))
    assert "merges.json" in complaint(tmp_path)


def test_merges_of_another_vocabulary_give_both_sizes(tmp_path):
    save(with_tokenizer(), tmp_path)
    merges = tokenizer(3).merges
    (tmp_path / "merges.json").write_text(json.dumps(merges))
    text = complaint(tmp_path)
    assert "517" in text and "522" in text and "merges.json" in text


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_truncated_weights_are_damaged(tmp_path, keep):
    save(make(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is damaged" in complaint(tmp_path)


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("file", ["model.safetensors", "merges.json"])
def test_nothing_in_a_checkpoint_is_executed(tmp_path, file):
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(marker))
    pickle.loads(bomb)  # the bomb is real
    marker.rmdir()
    folder = tmp_path / "x"
    save(with_tokenizer(), folder)
    (folder / file).write_bytes(bomb)
    complaint(folder)
    torch.save({"x": Bomb(marker)}, folder / "model.safetensors")
    complaint(folder)
    header = json.dumps({"x": {"dtype": "PKL", "shape": [len(bomb)]}})
    length = struct.pack("<Q", len(header))
    content = length + header.encode() + bomb
    (folder / "model.safetensors").write_bytes(content)
    complaint(folder)
    assert not marker.exists()


def test_no_pickle_in_the_module():
    source = open(module.__file__, encoding="utf-8").read()
    assert "pickle" not in source and "torch.load" not in source


def test_a_config_without_the_new_fields_still_loads(tmp_path):
    """Older files have ten fields and a hash of them."""
    model = with_tokenizer()
    save(model, tmp_path)
    change(tmp_path, activation="gone")
    stored = json.loads((tmp_path / "config.json").read_text())
    assert len(stored) == 10 and "vision_heads" not in stored
    merges = [list(pair) for pair in model.tokenizer.merges]
    old = hashlib.sha256(json.dumps([stored, merges]).encode()).hexdigest()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"fingerprint": old}
    assert load(tmp_path)[0].config.vision_heads is None


def test_the_shipped_checkpoint_is_a_small_resnet():
    model, _ = load("emoji")
    assert type(model.visual).__name__ == "ResNet"


def test_heads_are_stored_and_guarded(tmp_path):
    save(make(MODIFIED), tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["vision_heads"] == 4
    assert load(tmp_path)[0].config == MODIFIED
    change(tmp_path, vision_heads=8)  # changes no shape
    assert "not of these weights" in complaint(tmp_path)
    change(tmp_path, vision_heads="gone")  # a small ResNet
    assert "do not fit config.json" in complaint(tmp_path)


def test_checkpoint_is_plain(tmp_path):
    save(with_tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vision_layers"] == [1, 1, 1] and len(config) == 11
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.metadata()) == {"fingerprint"}
        assert "visual.proj" in file.keys()
