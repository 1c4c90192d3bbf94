"""Tests of chapter 07_model: CLIP, its sizes, pictures and files."""

import json
import math
import os
import pickle
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import transforms as v1

from miniclip import model as module
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
    save,
    to_rgb,
)
from miniclip.tokenizer import Tokenizer, train_bpe

VIT = CLIPConfig(32, 32, 2, 128, 8, 16, 600, 64, 2, 2)
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


@pytest.mark.parametrize(
    "name, total, visual, tensors",
    [
        ("ViT-B/32", 151_277_313, 87_849_216, 302),
        ("ViT-B/16", 149_620_737, 86_192_640, 302),
        ("ViT-L/14", 427_616_513, 303_966_208, 446),
        ("ViT-L/14@336px", 427_944_193, 304_293_888, 446),
    ],
)
def test_parameters_of_openai_models(name, total, visual, tensors):
    with torch.device("meta"):
        model = CLIP(CONFIGS[name])
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.visual.parameters()) == visual
    assert len(model.state_dict()) == tensors


def test_configs_are_the_four_of_the_paper():
    assert list(CONFIGS) == [
        "ViT-B/32",
        "ViT-B/16",
        "ViT-L/14",
        "ViT-L/14@336px",
    ]
    heads = {n: c.transformer_heads for n, c in CONFIGS.items()}
    assert list(heads.values()) == [8, 8, 12, 12]
    assert CONFIGS["ViT-B/32"].vision_patch_size == 32
    assert {c.context_length for c in CONFIGS.values()} == {77}
    layers = [b for b in make().visual.transformer.resblocks]
    assert layers[0].attn.heads == 2  # one for every 64 of the width


def test_tuple_builds_a_resnet_and_int_a_vit():
    assert type(make(small_resnet()).visual).__name__ == "ResNet"
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
    ],
)
def test_impossible_config_names_the_field(change, words):
    with pytest.raises(ValueError, match=words):
        replace(VIT, **change)


def test_config_from_json_equals_the_original():
    config = small_resnet()
    again = CLIPConfig(**json.loads(json.dumps(asdict(config))))
    assert again == config and hash(again) == hash(config)


# --- the function


def open_clip_twin(config: CLIPConfig):
    from open_clip.model import CLIP as OpenCLIP

    vision = dict(
        image_size=config.image_resolution,
        patch_size=config.vision_patch_size,
        width=config.vision_width,
        layers=config.vision_layers,
    )
    text = dict(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.transformer_width,
        heads=config.transformer_heads,
        layers=config.transformer_layers,
    )
    return OpenCLIP(config.embed_dim, vision, text, quick_gelu=True).eval()


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4)]
)
def test_forward_and_every_gradient_equal_open_clip(dtype, tolerance):
    model = make().to(dtype)
    theirs = open_clip_twin(VIT).to(dtype)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)  # not what a fresh model has
    theirs.load_state_dict(model.state_dict(), strict=True)
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


def test_state_dict_of_open_clip_loads_into_ours():
    model = make()
    result = model.load_state_dict(open_clip_twin(VIT).state_dict())
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


@pytest.mark.parametrize("config", ["vit", "resnet"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_take_float32_pictures(config, dtype):
    config = VIT if config == "vit" else small_resnet()
    model = make(config)
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


@pytest.mark.parametrize("size", [(90, 61), (61, 90), (20, 33), (48, 48)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_preprocess_is_openais_bit_for_bit(size, mode):
    picture = noise(*size, mode)
    ours, theirs = preprocess(48)(picture), openai_transform(48)(picture)
    assert ours.shape == (3, 48, 48) and ours.dtype == torch.float32
    assert type(ours) is torch.Tensor and torch.equal(ours, theirs)


def test_preprocess_of_bytes_is_that_of_pictures():
    picture = noise(90, 61)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    ours = preprocess(48)(pixels)
    # torchvision may round a byte otherwise than PIL: one level, no more
    difference = (ours - preprocess(48)(picture)).abs().amax(dim=(1, 2))
    assert (difference <= 1.01 / 255 / torch.tensor(STD)).all()
    two = preprocess(48)(torch.stack([pixels, pixels]))
    assert torch.equal(two[0], ours) and torch.equal(two[1], ours)


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


@pytest.mark.parametrize("config", ["vit", "resnet"])
def test_round_trip_is_bit_exact(tmp_path, config):
    model = make(VIT) if config == "vit" else with_tokenizer()
    if config == "resnet":  # move the running statistics
        model.train()(*batch(model.config))
        model.eval()
    save(model, tmp_path / "new" / "folder")
    again, prepare = load(tmp_path / "new" / "folder")
    assert_same(model, again)
    image, ids = batch(model.config)
    with torch.no_grad():
        assert torch.equal(model(image, ids)[0], again(image, ids)[0])
    assert prepare(noise(50, 70)).shape == (3, 32, 32)
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


def test_checkpoint_is_plain(tmp_path):
    save(with_tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vision_layers"] == [1, 1, 1] and len(config) == 11
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.metadata()) == {"fingerprint"}
        assert "visual.proj" in file.keys()
