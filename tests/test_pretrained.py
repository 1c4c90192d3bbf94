"""Tests of chapter 18_pretrained: files of others, read, written, fetched.

The other libraries are the judges: what they wrote must give their outputs
in our model, and what we wrote must give ours in theirs. The hub is a
server on this machine; nothing here needs a network.
"""

import builtins
import hashlib
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from copy import deepcopy
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import miniclip
from miniclip import pretrained as module
from miniclip.model import CLIP, CONFIGS, CLIPConfig, save
from miniclip.model import load as load_folder
from miniclip.pretrained import (
    HUB,
    OPENAI_SHA256,
    REVISIONS,
    available_models,
    export_hugging_face,
    export_open_clip,
    fetch,
    from_hugging_face,
    infer_config,
    load,
    read_pickle,
    read_torchscript,
    sha256_of,
    to_hugging_face,
    write_safetensors,
)
from miniclip.tokenizer import Tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[1]
VIT = CLIPConfig(32, 24, 2, 128, 8, 10, 600, 64, 1, 3)  # nothing is equal
ACTIVATIONS = "quick_gelu", "gelu"


def make(config: CLIPConfig = VIT, seed: int = 0) -> CLIP:
    """A model without a bias of 0 or a gain of 1; all fit 16 bits."""
    torch.manual_seed(seed)
    model = CLIP(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + 0.05 * torch.randn_like(p)).half())
        for name, b in model.named_buffers():
            if "running" in name:  # statistics that matter
                b.copy_((0.5 + torch.rand_like(b)).half())
    return model


def batch(config: CLIPConfig = VIT) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    side, last = config.image_resolution, config.vocab_size - 1
    image = torch.randn(4, 3, side, side, generator=g)
    ids = torch.randint(
        1, last - 1, (4, config.context_length), generator=g
    )
    ids[torch.arange(4), torch.tensor([3, 9, 5, 2])] = last
    return image, ids


def outputs(model, config: CLIPConfig = VIT) -> tuple:
    """(image_features, text_features) of any library's model."""
    image, ids = batch(config)
    with torch.no_grad():
        if not hasattr(model, "get_image_features"):
            return model.encode_image(image), model.encode_text(ids)
        out = model(input_ids=ids, pixel_values=image)
        a = model.vision_model(pixel_values=image).pooler_output
        b = model.text_model(input_ids=ids).pooler_output
        u, v = model.visual_projection(a), model.text_projection(b)
        norm = nn.functional.normalize
        close(out.image_embeds, norm(u, dim=-1))
        close(out.text_embeds, norm(v, dim=-1))
        return u, v


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


def agree(ours, theirs, config: CLIPConfig = VIT):
    for a, b in zip(outputs(ours, config), outputs(theirs, config)):
        close(a, b)
    close(ours.logit_scale.detach(), theirs.logit_scale.detach())


def same(a: CLIP, b: CLIP) -> None:
    assert a.config == b.config
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.dtype == theirs[name].dtype, name


def complaint(path, kind=ValueError, **options) -> str:
    with pytest.raises(kind) as caught:
        load(path, **options)
    return str(caught.value)


# --- other libraries' models


def open_clip_model(activation="quick_gelu", config=VIT):
    open_clip = pytest.importorskip("open_clip.model")
    c = config
    vision = {"image_size": c.image_resolution, "layers": c.vision_layers}
    vision |= {"width": c.vision_width, "patch_size": c.vision_patch_size}
    text = {"context_length": c.context_length, "vocab_size": c.vocab_size}
    text |= {"width": c.transformer_width, "heads": c.transformer_heads}
    text |= {"layers": c.transformer_layers}
    quick = activation == "quick_gelu"
    model = open_clip.CLIP(c.embed_dim, vision, text, quick_gelu=quick)
    model.load_state_dict(make(config).state_dict())
    return model.eval()


def hugging_face_model(activation="quick_gelu", **changes):
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    shared = {"projection_dim": 32, "hidden_act": activation}
    vision = dict(hidden_size=128, intermediate_size=512, image_size=24)
    vision |= dict(num_hidden_layers=2, num_attention_heads=2, patch_size=8)
    text = dict(hidden_size=64, intermediate_size=256, vocab_size=600)
    text |= dict(num_hidden_layers=3, num_attention_heads=1)
    text |= dict(max_position_embeddings=10, eos_token_id=599)
    config = transformers.CLIPConfig(
        projection_dim=32,
        vision_config=vision | shared,
        text_config=text | shared | changes,
    )
    torch.manual_seed(2)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def archive(model, path: Path, config: CLIPConfig = VIT) -> Path:
    """Save a model as OpenAI did: TorchScript, in half precision."""
    image, ids = batch(config)
    calls = {"encode_image": image[:1], "encode_text": ids[:1]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy = deepcopy(model)
        for name in "input_resolution", "context_length", "vocab_size":
            if not hasattr(copy, name):
                copy.register_buffer(name, torch.tensor(1))
        traced = torch.jit.trace_module(copy, calls, check_trace=False)
        traced.half().save(str(path))
    return path


@pytest.fixture(scope="module")
def openai(tmp_path_factory):
    """An archive as OpenAI's, made once."""
    return archive(make(), tmp_path_factory.mktemp("openai") / "a.pt")


def swapped(source: Path, target: Path, changes: dict) -> Path:
    """A copy of an archive with other content in some of its files."""
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(target, "w") as new,
    ):
        top = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            data = changes.get(name.removeprefix(f"{top}/"), old.read(name))
            new.writestr(name, data)
    return target


# --- TorchScript archives


def test_archive_gives_the_weights_of_torch_jit_load(openai):
    state, activation = read_torchscript(openai)
    theirs = torch.jit.load(str(openai)).state_dict()
    assert activation == "quick_gelu" and theirs.keys() == state.keys()
    for name, tensor in theirs.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def test_archive_is_loaded_in_float32(openai):
    model, prepare = load(openai)
    same(model, make())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(m.training for m in model.modules())
    assert prepare(torch.zeros(3, 40, 30).byte()).shape == (3, 24, 24)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_archive_of_open_clip(tmp_path, activation):
    theirs = open_clip_model(activation)
    model, _ = load(archive(theirs, tmp_path / "x.pt"))
    assert model.config == replace(VIT, activation=activation)
    agree(model, theirs)


def test_scripted_archive(tmp_path):
    """Scripting keeps other attributes than tracing does."""

    class Part(nn.Module):
        sizes: list[int]

        def __init__(self):
            super().__init__()
            self.sizes, self.rate, self.name = [1, 2], 0.5, "part"
            self.names = ["a", "b"]
            self.weight = nn.Parameter(torch.randn(2, 3).T)
            self.halves = nn.Parameter(torch.randn(4).bfloat16())
            self.register_buffer("count", torch.tensor(7))
            self.register_buffer("flags", torch.tensor([True, False]))

        def forward(self, x):
            return x * self.rate + self.sizes[0]

    part = nn.Sequential(Part(), Part())
    torch.jit.script(part).save(str(tmp_path / "x.pt"))
    state, activation = read_torchscript(tmp_path / "x.pt")
    assert activation is None
    assert state.keys() == part.state_dict().keys()
    for name, tensor in part.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_archive_does_not_need_torch_jit(openai, monkeypatch):
    def forbidden(*args, **options):
        raise AssertionError("the archive was executed")

    monkeypatch.setattr(torch.jit, "load", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(pickle, "loads", forbidden)
    monkeypatch.setattr(pickle, "load", forbidden)
    monkeypatch.setattr(pickle, "Unpickler", forbidden)
    same(load(openai)[0], make())


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


class SlowBomb(Bomb):
    def __reduce__(self):  # hides the call inside of what is allowed
        return OrderedDict, ([("a", Bomb(self.marker))],)


@pytest.mark.parametrize("bomb", [Bomb, SlowBomb])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_malicious_archive_is_not_executed(
    openai, tmp_path, bomb, protocol
):
    marker = tmp_path / "executed"
    data = pickle.dumps(bomb(marker), protocol=protocol)
    pickle.loads(data)  # the bomb is real
    marker.rmdir()
    path = swapped(openai, tmp_path / "x.pt", {"data.pkl": data})
    text = complaint(path, activation="quick_gelu")
    assert "nothing in it was run" in text and str(path) in text
    assert not marker.exists()


def test_bomb_among_the_weights_is_not_executed(openai, tmp_path):
    """A pickle that is right up to one call in the middle."""
    marker = tmp_path / "executed"
    with zipfile.ZipFile(openai) as zipped:
        data = zipped.read("a/data.pkl")
    place = data.index(b"X")  # the first name of a field
    call = b"cos\nmkdir\n(X" + struct.pack("<I", len(str(marker)))
    call += str(marker).encode() + b"tR0"  # and pop what it returned
    data = data[:place] + call + data[place:]
    path = swapped(openai, tmp_path / "x.pt", {"data.pkl": data})
    assert "'os mkdir'" in complaint(path)
    assert not marker.exists()


def test_reading_imports_nothing(monkeypatch):
    real, seen = builtins.__import__, []

    def watch(name, *args, **options):
        seen.append(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", watch)
    with pytest.raises(ValueError, match="antigravity"):
        read_pickle(b"\x80\x02cantigravity\nfly\n)R.")
    assert "antigravity" not in seen and "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "exhausted"),
        (b"\x80\x02.", "unpack"),
        (b"\x80\x02K\x01K\x02.", "unpack"),
        (b"\x80\x02K\x01)R.", "int"),
        (b"\x80\x02cbuiltins\neval\n.\x80", None),
        (b"\x80\x02t.", "pop"),
        (b"\x80\x02h\x07.", "7"),
        (b"\x80\x02K\x01}b.", "fields"),
        (b"\x80\x02K\x01(K\x02K\x03u.", "update"),
        (b"\x80\x02ctorch\nOddStorage\n(X\x00\x00\x00\x00h\x00tQ.", None),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02(cos\nsystem\nX\x02\x00\x00\x00lso.", "OBJ"),
        (b"(S'ls'\nios\nsystem\n.", "STRING|INST"),
        (b"\xff\xff", "opcode|at position"),
    ],
)
def test_strange_pickles(openai, tmp_path, data, words):
    path = swapped(openai, tmp_path / "x.pt", {"data.pkl": data})
    text = complaint(path)
    assert "damaged" in text and "nothing in it was run" in text
    assert words is None or re.search(words, text), text


def test_archive_that_contains_itself(openai, tmp_path):
    name = b"X\x01\x00\x00\x00a"
    loop = b"\x80\x02c__torch__\nA\nq\x00)\x81q\x01}(" + name + b"h\x01ub."
    path = swapped(openai, tmp_path / "x.pt", {"data.pkl": loop})
    assert "no tensor" in complaint(path, activation="gelu")


def view(size, stride, offset=0, numel=6) -> bytes:
    """A pickle of a record with one tensor, "w", in storage 0."""

    def numbers(values):
        return b"(" + b"".join(b"K" + bytes([v]) for v in values) + b"t"

    text = b"X\x07\x00\x00\x00storage"
    pid = b"(" + text + b"ctorch\nFloatStorage\nX\x01\x00\x00\x000"
    pid += b"X\x03\x00\x00\x00cpuK" + bytes([numel]) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid
    call += b"K" + bytes([offset]) + numbers(size) + numbers(stride)
    call += b"\x89ccollections\nOrderedDict\n)RtR"
    start = b"\x80\x02c__torch__\nA\n)\x81}(X\x01\x00\x00\x00w"
    return start + call + b"ub."


def test_views_into_storages(openai, tmp_path):
    numbers = torch.arange(6.0)
    data = {"data/0": numbers.numpy().tobytes()}
    data |= {"data.pkl": view((2, 2), (1, 2), 1)}
    path = swapped(openai, tmp_path / "x.pt", data)
    state, _ = read_torchscript(path)
    assert state["w"].tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize(
    "size, stride, offset, numel",
    [
        ((2, 3), (3, 1), 1, 6),  # beyond the end
        ((200, 200), (0, 0), 0, 6),  # larger than what it lies in
        ((6,), (1,), 0, 7),  # a storage that is too short
        ((5,), (1,), 0, 5),  # and one that is too long
    ],
)
def test_views_outside_of_their_storage(
    openai, tmp_path, size, stride, offset, numel
):
    data = {"data/0": bytes(24)}
    data |= {"data.pkl": view(size, stride, offset, numel)}
    path = swapped(openai, tmp_path / "x.pt", data)
    with pytest.raises(ValueError, match="damaged"):
        read_torchscript(path)


def test_flipped_bit_in_an_archive(openai, tmp_path):
    data = bytearray(openai.read_bytes())
    with zipfile.ZipFile(openai) as zipped:
        info = max(zipped.infolist(), key=lambda i: i.file_size)
    data[info.header_offset + 500] ^= 1
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    assert "CRC" in complaint(path)


def test_compressed_archive_is_refused(openai, tmp_path):
    path = tmp_path / "x.pt"
    deflated = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(openai) as old:
        with zipfile.ZipFile(path, "w", deflated) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    assert "compressed" in complaint(path)


def test_archive_without_classes_must_be_told(openai, tmp_path):
    with zipfile.ZipFile(openai) as zipped:
        data = zipped.read("a/data.pkl").replace(b"QuickGELU", b"SomeGELUs")
    path = swapped(openai, tmp_path / "x.pt", {"data.pkl": data})
    assert "does not say which activation" in complaint(path)
    same(load(path, activation="quick_gelu")[0], make())
    for name in OPENAI_SHA256:  # unless it is one of OpenAI's nine
        hashes = OPENAI_SHA256 | {name: sha256_of(path)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "OPENAI_SHA256", hashes)
            same(load(path)[0], make())


# --- state dicts, safetensors, training runs


def test_plain_state_dict(tmp_path):
    path = tmp_path / "state.pt"
    torch.save(make().state_dict(), path)
    assert "pass activation='quick_gelu'" in complaint(path)
    same(load(path, activation="quick_gelu")[0], make())
    model, _ = load(path, activation="gelu")
    assert model.config == replace(VIT, activation="gelu")


def test_half_precision_and_extras(tmp_path):
    state = {k: v.half() for k, v in make().state_dict().items()}
    state["logit_scale"] = state["logit_scale"][None]
    for name in "input_resolution", "context_length", "vocab_size":
        state[name] = torch.tensor(5)
    state["attn_mask"] = state["visual.attn_mask"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "x.pt")
    same(load(tmp_path / "x.pt", activation="quick_gelu")[0], make())


def test_training_run_of_open_clip(tmp_path):
    theirs = open_clip_model("gelu")
    optimizer = torch.optim.AdamW(theirs.parameters())
    image, ids = batch()
    theirs.encode_image(image).sum().backward()
    optimizer.step()
    state = {f"module.{k}": v for k, v in theirs.state_dict().items()}
    run = {"epoch": 3, "name": "x", "optimizer": optimizer.state_dict()}
    torch.save(run | {"state_dict": state}, tmp_path / "epoch_3.pt")
    agree(load(tmp_path / "epoch_3.pt", activation="gelu")[0], theirs)


def test_bare_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(make().state_dict(), path)
    assert "does not say" in complaint(path)
    same(load(path, activation="quick_gelu")[0], make())


def test_bare_file_of_hugging_face(tmp_path):
    theirs = hugging_face_model("gelu")
    save_file(theirs.state_dict(), tmp_path / "x.safetensors")
    agree(load(tmp_path / "x.safetensors", activation="gelu")[0], theirs)


def test_malicious_torch_file_is_not_executed(tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "x.pt"
    for content in Bomb(marker), {"state_dict": {"a": Bomb(marker)}}:
        torch.save(content, path)
        text = complaint(path, activation="gelu")
        assert "more than tensors" in text and str(path) in text
        path.write_bytes(pickle.dumps(content))
        complaint(path, activation="gelu")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [{"a": 1}, [1], {}, 3, {"state_dict": 1}]
)
def test_torch_file_of_other_things(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    text = complaint(tmp_path / "x.pt", activation="gelu")
    assert "expected a state dict" in text


# --- a file of ours


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_file_with_everything(tmp_path, activation):
    merges = train_bpe(["red apple", "green apple", "a dog"], 8)
    tokenizer = Tokenizer(merges)
    size, path = tokenizer.vocab_size, tmp_path / "new" / "x.safetensors"
    # heads that no rule would find
    config = replace(VIT, vocab_size=size, transformer_heads=4)
    model = make(replace(config, activation=activation))
    model.tokenizer = tokenizer
    write_safetensors(model, path)
    again, _ = load(path)
    same(again, model)
    assert again.tokenizer.merges == merges
    assert [f.name for f in path.parent.iterdir()] == [path.name]
    with safe_open(path, "pt") as file:
        inside = json.loads(file.metadata()["miniclip"])
    assert inside["config"]["activation"] == activation
    other = ACTIVATIONS[activation == "quick_gelu"]
    assert f"activation {activation!r}" in complaint(path, activation=other)


def test_small_resnet_in_one_file(tmp_path):
    model, _ = load("emoji")
    write_safetensors(model, tmp_path / "x.safetensors")
    again, _ = load(tmp_path / "x.safetensors")
    same(again, model)
    assert again.tokenizer.merges == model.tokenizer.merges


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_safetensors(make(), path)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(make(seed=1), path)
    same(load(path)[0], make())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("notes", ["{", "[]", '{"config": {"a": 1}}', "1"])
def test_broken_notes_in_a_file(tmp_path, notes):
    path = tmp_path / "x.safetensors"
    save_file(make().state_dict(), path, {"miniclip": notes})
    assert f"{path} is damaged" in complaint(path)


# --- the activation


def test_swapping_the_activation_moves_the_features():
    quick = make()
    exact = make(replace(VIT, activation="gelu"))
    for a, b in zip(outputs(quick), outputs(exact)):
        assert 1e-3 < (a - b).norm() / a.norm() < 0.1
    agree(exact, open_clip_model("gelu"))
    agree(quick, open_clip_model("quick_gelu"))


def test_mismatch_is_an_error_for_every_kind(tmp_path, openai):
    save(make(), tmp_path / "ours")
    export_open_clip(make(), tmp_path / "open_clip")
    export_hugging_face(make(), tmp_path / "hugging_face")
    write_safetensors(make(), tmp_path / "one.safetensors")
    for path in *tmp_path.iterdir(), openai, "emoji":
        text = complaint(path, activation="gelu")
        assert "trained with activation 'quick_gelu', and 'gelu'" in text
        model, _ = load(path, activation="quick_gelu")
        assert model.config.activation == "quick_gelu"


def test_unknown_activation(tmp_path):
    torch.save(make().state_dict(), tmp_path / "x.pt")
    text = complaint(tmp_path / "x.pt", activation="relu")
    assert "'relu', expected one of" in text


# --- shapes


@pytest.mark.parametrize("name", CONFIGS)
def test_config_from_the_shapes_of_all_sizes(name):
    with torch.device("meta"):
        state = CLIP(CONFIGS[name]).state_dict()
    assert infer_config(state, "quick_gelu") == CONFIGS[name]


@pytest.mark.parametrize(
    "name",
    [
        "token_embedding.weight",
        "text_projection",
        "positional_embedding",
        "visual.conv1.weight",
        "visual.positional_embedding",
    ],
)
def test_config_needs_both_towers(name):
    state = make().state_dict()
    del state[name]
    with pytest.raises(ValueError, match=f"no tensor '{name}'"):
        infer_config(state, "gelu")


def test_config_of_odd_shapes():
    state = make().state_dict()
    state["visual.positional_embedding"] = torch.zeros(9, 128)
    with pytest.raises(ValueError, match="there are 9 positions"):
        infer_config(state, "gelu")
    state = make(replace(VIT, transformer_width=96)).state_dict()
    with pytest.raises(ValueError, match="width 96, no multiple of 64"):
        infer_config(state, "gelu")


def test_tensors_that_do_not_fit_are_named(tmp_path):
    path, state = tmp_path / "x.pt", make().state_dict()
    state["extra"] = state.pop("ln_final.bias")
    state["visual.ln_pre.bias"] = torch.zeros(3)
    for i in range(4):
        state[f"more.{i}"] = torch.zeros(1)
    torch.save(state, path)
    text = complaint(path, activation="gelu")
    assert "missing: ln_final.bias;" in text and str(path) in text
    assert "unknown: extra, more.0, more.1 and 2 more;" in text
    assert "visual.ln_pre.bias is (3,), expected (128,)" in text


# --- open_clip


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_export_to_open_clip(tmp_path, activation):
    open_clip = pytest.importorskip("open_clip")
    config = replace(VIT, transformer_heads=2, activation=activation)
    model = make(config)
    export_open_clip(model, tmp_path)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    agree(model, theirs)
    same(load(tmp_path)[0], model)
    _, _, prepare = open_clip.create_model_and_transforms(
        f"local-dir:{tmp_path}"
    )
    from PIL import Image

    noise = torch.randint(0, 256, (40, 33, 3), dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy())
    close(prepare(picture), load(tmp_path)[1](picture))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_folder_that_open_clip_wrote(tmp_path, kind):
    pytest.importorskip("open_clip")
    from open_clip.push_to_hf_hub import save_for_hf

    class NoTokenizer:
        def save_pretrained(self, folder): ...

    theirs = open_clip_model("gelu")
    theirs.visual.image_mean, theirs.visual.image_std = (
        module.MEAN,
        module.STD,
    )
    config = {
        "embed_dim": 32,
        "vision_cfg": dict(
            image_size=24, layers=2, width=128, patch_size=8
        ),
        "text_cfg": dict(
            context_length=10, vocab_size=600, width=64, heads=1, layers=3
        ),
    }
    safe = kind == "safetensors"
    save_for_hf(theirs, NoTokenizer(), config, tmp_path, safe)
    model, _ = load(tmp_path)
    assert model.config == replace(VIT, activation="gelu")
    agree(model, theirs)


def edit(path: Path, *keys, value="gone") -> None:
    """Set or delete one entry of a JSON file."""
    content = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    if value == "gone":
        del inner[keys[-1]]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "keys, value, words",
    [
        (("model_cfg", "custom_text"), True, "custom_text = True"),
        (("model_cfg", "vision_cfg", "mlp_ratio"), 4.5, "mlp_ratio = 4.5"),
        (("model_cfg", "text_cfg", "no_causal_mask"), True, "no_causal"),
        (("model_cfg", "text_cfg"), "gone", "lacks 'text_cfg'"),
        (("model_cfg", "text_cfg", "heads"), "gone", "lacks 'heads'"),
        (("model_cfg", "embed_dim"), 48, "expected (64, 48)"),
        (("model_cfg", "embed_dim"), "x", "embed_dim is 'x'"),
        (("preprocess_cfg", "mean"), [0.5, 0.5, 0.5], "mean [0.5, 0.5"),
        (("preprocess_cfg", "resize_mode"), "squash", "'squash'"),
        (("preprocess_cfg", "interpolation"), "bilinear", "'bilinear'"),
    ],
)
def test_open_clip_configuration_of_another_model(
    tmp_path, keys, value, words
):
    export_open_clip(make(), tmp_path)
    edit(tmp_path / "open_clip_config.json", *keys, value=value)
    text = complaint(tmp_path)
    assert words in text and str(tmp_path) in text


def test_open_clip_settings_that_change_nothing(tmp_path):
    export_open_clip(make(), tmp_path)
    path = tmp_path / "open_clip_config.json"
    edit(path, "model_cfg", "vision_cfg", "head_width", value=64)
    edit(path, "model_cfg", "vision_cfg", "mlp_ratio", value=4.0)
    edit(path, "model_cfg", "text_cfg", "hf_tokenizer_name", value="a/b")
    edit(path, "preprocess_cfg")
    same(load(tmp_path)[0], make())


# --- modified ResNets

RESNET = CLIPConfig(
    32, 64, (1, 2, 1, 1), 8, None, 10, 600, 64, 1, 2, vision_heads=4
)


@pytest.fixture(scope="module")
def resnet():
    """open_clip's ModifiedResNet with statistics that matter."""
    return open_clip_model("quick_gelu", RESNET)


def test_archive_of_a_resnet(tmp_path, resnet):
    path = archive(resnet, tmp_path / "x.pt", RESNET)
    model, _ = load(path)
    assert model.config == RESNET
    agree(model, resnet, RESNET)
    same(model, make(RESNET))
    state, activation = read_torchscript(path)
    assert activation == "quick_gelu"
    assert state["visual.bn1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("heads", [4, 8])
def test_resnet_to_open_clip_and_back(tmp_path, heads):
    open_clip = pytest.importorskip("open_clip")
    config = replace(RESNET, vision_heads=heads, activation="gelu")
    model = make(config)
    export_open_clip(model, tmp_path)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    agree(model, theirs, config)
    same(load(tmp_path)[0], model)


def test_resnet_is_not_for_transformers(tmp_path):
    with pytest.raises(ValueError, match="transformers does not have"):
        export_hugging_face(make(RESNET), tmp_path)


@pytest.mark.parametrize("heads", [1, 4])
def test_other_heads_of_a_vit_go_both_ways(tmp_path, heads):
    open_clip = pytest.importorskip("open_clip")
    transformers = pytest.importorskip("transformers")
    model = make(replace(VIT, vision_heads=heads))
    export_open_clip(model, tmp_path / "a")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'a'}").eval()
    agree(model, theirs)
    export_hugging_face(model, tmp_path / "b")
    kind = transformers.CLIPModel
    agree(model, kind.from_pretrained(tmp_path / "b").eval())
    for folder in "ab":
        same(load(tmp_path / folder)[0], model)


# --- Hugging Face


def test_names_there_and_back():
    state = make().state_dict()
    theirs = to_hugging_face(state)
    assert theirs.keys() == hugging_face_model().state_dict().keys()
    again = from_hugging_face(theirs)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_folder_that_transformers_wrote(tmp_path, activation, kind):
    theirs = hugging_face_model(activation)
    theirs.save_pretrained(tmp_path)
    if kind == "bin":
        state = load_file(tmp_path / "model.safetensors")
        ids = torch.arange(10)[None]  # as old versions stored
        state["text_model.embeddings.position_ids"] = ids
        torch.save(state, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    model, _ = load(tmp_path)
    assert model.config == replace(VIT, activation=activation)
    agree(model, theirs)


def test_old_end_token_means_the_highest(tmp_path):
    theirs = hugging_face_model(eos_token_id=2)
    theirs.save_pretrained(tmp_path)
    agree(load(tmp_path)[0], theirs)


def test_defaults_of_transformers_are_ours():
    transformers = pytest.importorskip("transformers")
    vision = transformers.CLIPVisionConfig().to_dict()
    text = transformers.CLIPTextConfig().to_dict()
    assert module._VISION.items() <= vision.items()
    assert module._TEXT.items() <= text.items()
    assert transformers.CLIPConfig().projection_dim == 512
    empty = module._hugging_face_config({"model_type": "clip"})
    assert empty == CONFIGS["ViT-B/32"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_export_to_transformers(tmp_path, activation):
    transformers = pytest.importorskip("transformers")
    config = replace(VIT, transformer_heads=2, activation=activation)
    model = make(config)
    export_hugging_face(model, tmp_path)
    kind = transformers.CLIPModel
    theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys"))
    assert theirs.dtype == torch.float32
    agree(model, theirs.eval())
    same(load(tmp_path)[0], model)


def test_export_to_transformers_with_pictures_and_words(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer(
        train_bpe(["red apple", "green apple", "dogs"], 8)
    )
    model = make(replace(VIT, vocab_size=tokenizer.vocab_size))
    model.tokenizer = tokenizer
    export_hugging_face(model, tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    for text in "red apples", "a Dog, a rocket!", "":
        row = tokenizer.encode(text)
        wanted = [tokenizer.sot, *row, tokenizer.eot]
        assert theirs(text)["input_ids"] == wanted
    from PIL import Image

    noise = torch.randint(0, 256, (40, 33, 3), dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy())
    prepare = transformers.CLIPImageProcessor.from_pretrained(tmp_path)
    theirs = prepare(picture, return_tensors="pt")["pixel_values"][0]
    ours = load(tmp_path)[1](picture)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 0.02  # one level of a byte


@pytest.mark.parametrize(
    "keys, value, words",
    [
        (("model_type",), "siglip", "model_type is 'siglip'"),
        (("model_type",), "gone", "model_type is None"),
        (("vision_config", "hidden_act"), "gelu", "vision hidden_act"),
        (("text_config", "layer_norm_eps"), 1e-6, "text layer_norm_eps"),
        (("text_config", "intermediate_size"), 99, "is 99, expected 256"),
        (("vision_config", "num_channels"), 1, "num_channels"),
        (("text_config", "eos_token_id"), 7, "eos_token_id is 7"),
        (("text_config", "num_hidden_layers"), 4, "missing: transformer."),
        (("text_config", "num_hidden_layers"), 2, "unknown: transformer."),
        (("projection_dim",), "gone", "expected (64, 512)"),
    ],
)
def test_configuration_of_another_model(tmp_path, keys, value, words):
    export_hugging_face(make(), tmp_path)
    edit(tmp_path / "config.json", *keys, value=value)
    text = complaint(tmp_path)
    assert words in text and str(tmp_path) in text


def test_activation_that_nobody_has(tmp_path):
    export_hugging_face(make(), tmp_path)
    for part in "vision_config", "text_config":
        edit(tmp_path / "config.json", part, "hidden_act", value="gelu_new")
    assert "activation is 'gelu_new'" in complaint(tmp_path)


def test_pictures_of_another_model(tmp_path):
    export_hugging_face(make(), tmp_path)
    path = tmp_path / "preprocessor_config.json"
    edit(path, "image_std", value=[0.5, 0.5, 0.5])
    assert "std [0.5, 0.5, 0.5]" in complaint(tmp_path)
    edit(path, "image_std")
    edit(path, "resample", value=2)
    assert "resample 2" in complaint(tmp_path)


def test_half_of_the_attention_is_missing(tmp_path):
    export_hugging_face(make(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    save_file(state, tmp_path / "model.safetensors")
    name = "missing: transformer.resblocks.1.attn.in_proj_bias"
    assert name in complaint(tmp_path)


def test_small_resnets_stay_at_home(tmp_path):
    model, _ = load("emoji")
    for export in export_open_clip, export_hugging_face:
        with pytest.raises(ValueError, match="ResNet.*does not have"):
            export(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# --- names, paths, hashes


def test_shipped_models_load_as_before():
    ours, prepare = miniclip.load("emoji")
    before, _ = load_folder("emoji")
    same(ours, before)
    assert ours.tokenizer.merges == before.tokenizer.merges
    assert ours.config.activation == "quick_gelu"
    assert prepare(torch.zeros(3, 9, 9).byte()).shape == (3, 48, 48)


def test_names():
    nine = "RN50 RN101 RN50x4 RN50x16 RN50x64 ViT-B/32 ViT-B/16 ViT-L/14"
    names = ["emoji", *nine.split(), "ViT-L/14@336px"]
    assert miniclip.available_models() == available_models() == names
    assert miniclip.load is load
    assert HUB.keys() == OPENAI_SHA256.keys() >= REVISIONS.keys()
    assert all(len(sha) == 64 for sha in OPENAI_SHA256.values())
    assert all(len(commit) == 40 for commit in REVISIONS.values())


def test_hashes_and_repositories_are_those_that_open_clip_knows():
    known = pytest.importorskip("open_clip.pretrained")
    for name, sha256 in OPENAI_SHA256.items():
        theirs = re.sub("[/@]", "-", name).removesuffix("px")
        facts = known.get_pretrained_cfg(theirs, "openai")
        assert facts["url"].split("/")[-2] == sha256
        assert facts["quick_gelu"]
        if name.startswith("RN"):
            assert facts["hf_hub"].strip("/") == HUB[name]


def test_unknown_name_says_what_there_is(tmp_path):
    for name in "emojji", str(tmp_path / "no.pt"):
        text = complaint(name, FileNotFoundError)
        assert repr(name) in text and "ViT-B/32" in text and "hub" in text


def test_folder_without_a_model(tmp_path):
    (tmp_path / "README.md").write_text("nothing here")
    text = complaint(tmp_path, FileNotFoundError)
    assert "README.md" in text and "open_clip_config.json" in text


def test_hash_of_a_file(tmp_path, openai):
    good = hashlib.sha256(openai.read_bytes()).hexdigest()
    same(load(openai, sha256=good.upper())[0], make())
    text = complaint(openai, sha256=64 * "0")
    assert good in text and 64 * "0" in text and "download it again" in text
    export_open_clip(make(), tmp_path)
    text = complaint(tmp_path, sha256=good)
    assert "open_clip_model.safetensors has sha256" in text


@pytest.mark.parametrize("kind", ["a.pt", "x.safetensors", "state.pt"])
@pytest.mark.parametrize("keep", [0, 7, 3000, -1, -3000])
def test_truncated_files(tmp_path, openai, kind, keep):
    path = tmp_path / kind
    if kind == "a.pt":
        path.write_bytes(openai.read_bytes())
    elif kind == "state.pt":
        torch.save(make().state_dict(), path)
    else:
        write_safetensors(make(), path)
    path.write_bytes(path.read_bytes()[:keep])
    text = complaint(path, activation="quick_gelu")
    assert f"{path} is damaged" in text


def test_broken_json(tmp_path):
    export_hugging_face(make(), tmp_path)
    for content in b"", b"{", b"\xff", b"[1]", b'"text"':
        (tmp_path / "config.json").write_bytes(content)
        assert "config.json" in complaint(tmp_path)


def test_openais_cache_is_used_if_its_hash_is_right(
    tmp_path, openai, monkeypatch
):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(module, "fetch", None)  # nothing is downloaded
    path = tmp_path / ".cache" / "clip" / "ViT-L-14-336px.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(openai.read_bytes())
    text = complaint("ViT-L/14@336px")
    assert OPENAI_SHA256["ViT-L/14@336px"] in text and str(path) in text
    hashes = {"ViT-L/14@336px": sha256_of(openai)}
    monkeypatch.setattr(module, "OPENAI_SHA256", hashes)
    assert "it is not OpenAI's" in complaint("ViT-L/14@336px")
    monkeypatch.setattr(module, "CONFIGS", {"ViT-L/14@336px": VIT})
    same(load("ViT-L/14@336px")[0], make())
    assert "'gelu'" in complaint("ViT-L/14@336px", activation="gelu")


# --- the hub


class Handler(BaseHTTPRequestHandler):
    """What the hub says about files, as huggingface_hub reads it."""

    def log_message(self, *args): ...

    def do_HEAD(self, body=False):
        hub = self.server.hub
        found = re.fullmatch(r"/(.+)/resolve/([^/]+)/([^/]+)", self.path)
        repo, revision, file = found.groups()
        start = int((self.headers["Range"] or "bytes=0-")[6:].split("-")[0])
        hub.log.append((self.command, file, revision, start))
        if repo not in hub.repos:
            return self.refuse("RepoNotFound")
        if revision not in ("main", hub.commit):
            return self.refuse("RevisionNotFound")
        if file not in hub.repos[repo]:
            return self.refuse("EntryNotFound")
        content = hub.repos[repo][file]
        self.send_response(206 if start else 200)
        etag = hub.etags.get(file, hashlib.sha256(content).hexdigest())
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", hub.commit)
        self.send_header("Accept-Ranges", "bytes")
        total, rest = len(content), content[start:]
        if start:
            span = f"bytes {start}-{total - 1}/{total}"
            self.send_header("Content-Range", span)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if body:
            if cut := hub.cuts.pop(file, None):
                rest, self.close_connection = rest[:cut], True
            self.wfile.write(rest)

    def do_GET(self):
        self.do_HEAD(body=True)

    def refuse(self, code):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


class Hub:
    """A hub on this machine: repos, what was asked for, and mischief."""

    def __init__(self):
        self.repos, self.log, self.etags, self.cuts = {}, [], {}, {}
        self.commit = 40 * "a"
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, repo, folder):
        files = {f.name: f.read_bytes() for f in folder.iterdir()}
        self.repos[repo] = files

    def got(self):
        return [file for command, file, *_ in self.log if command == "GET"]

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    export_open_clip(make(), tmp_path / "a")
    hub.add("me/open-clip", tmp_path / "a")
    export_hugging_face(make(seed=1), tmp_path / "b")
    hub.add("me/hugging-face", tmp_path / "b")
    yield hub
    hub.stop()


def test_download_is_announced_cached_and_right(hub, tmp_path, capfd):
    cache = {"cache_dir": tmp_path / "cache"}
    for repo, seed in ("me/open-clip", 0), ("hf-hub:me/hugging-face", 1):
        same(load(repo, **cache)[0], make(seed=seed))
        told = capfd.readouterr().err
        for file in hub.repos[repo.removeprefix("hf-hub:")]:
            assert f"downloading {file} (" in told
        assert hub.commit in told and hub.url in told
    asked = len(hub.log)
    for repo, seed in ("me/open-clip", 0), ("me/hugging-face", 1):
        same(load(repo, **cache)[0], make(seed=seed))
    assert len(hub.log) == asked  # nobody asked the hub again
    assert "downloading" not in capfd.readouterr().err
    hub.stop()
    same(load("me/open-clip", **cache)[0], make())


def test_everything_comes_from_one_commit(hub, tmp_path):
    load("me/hugging-face", cache_dir=tmp_path / "cache")
    asked = {file: revision for _, file, revision, _ in hub.log}
    assert asked["config.json"] == "main"
    assert asked["model.safetensors"] == hub.commit


def test_revision_is_passed_on(hub, tmp_path):
    cache = {"cache_dir": tmp_path / "cache"}
    load("me/open-clip", revision=hub.commit, **cache)
    assert {revision for _, _, revision, _ in hub.log} == {hub.commit}
    text = complaint(
        "me/open-clip", FileNotFoundError, revision="v9", **cache
    )
    assert "no me/open-clip at revision 'v9'" in text


def test_name_goes_to_its_pinned_repository(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(module, "CONFIGS", {"ViT-B/16": VIT})
    hub.commit = REVISIONS["ViT-B/16"]
    hub.repos[HUB["ViT-B/16"]] = hub.repos["me/hugging-face"]
    model, _ = load("ViT-B/16", cache_dir=tmp_path / "cache")
    same(model, make(seed=1))
    assert {revision for _, _, revision, _ in hub.log} == {hub.commit}


def test_name_is_checked_against_its_configuration(
    hub, tmp_path, monkeypatch
):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    hub.commit = REVISIONS["ViT-B/16"]
    hub.repos[HUB["ViT-B/16"]] = hub.repos["me/hugging-face"]
    text = complaint("ViT-B/16", cache_dir=tmp_path / "cache")
    assert "expected CLIPConfig" in text and "not OpenAI's" in text


def test_other_content_than_announced_is_deleted(hub, tmp_path):
    cache = {"cache_dir": tmp_path / "cache"}
    name = "open_clip_model.safetensors"
    for bad in 64 * "0", 40 * "0":
        hub.etags[name] = bad
        text = complaint("me/open-clip", **cache)
        assert f"announced was {bad}" in text and "try again" in text
        assert not list((tmp_path / "cache").rglob(name))
    content = hub.repos["me/open-clip"][name]
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    hub.etags[name] = git
    same(load("me/open-clip", **cache)[0], make())


def test_download_that_breaks_off_is_resumed(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)
    name = "open_clip_model.safetensors"
    hub.cuts[name] = 100_000
    cache = {"cache_dir": tmp_path / "cache"}
    try:
        model, _ = load("me/open-clip", **cache)
    except ConnectionError as error:  # some versions leave it to us
        assert "again" in str(error) or "network" in str(error)
        model, _ = load("me/open-clip", **cache)
    same(model, make())
    starts = [log[3] for log in hub.log if log[:2] == ("GET", name)]
    assert len(starts) == 2 and starts[0] == 0 < starts[1]


def test_hash_of_a_download(hub, tmp_path):
    cache = {"cache_dir": tmp_path / "cache"}
    content = hub.repos["me/open-clip"]["open_clip_model.safetensors"]
    good = hashlib.sha256(content).hexdigest()
    load("me/open-clip", sha256=good, **cache)
    assert good in complaint("me/open-clip", sha256=64 * "1", **cache)


def test_unknown_repository(hub, tmp_path):
    text = complaint(
        "me/nothing", FileNotFoundError, cache_dir=tmp_path / "cache"
    )
    assert "no me/nothing" in text and "spelling" in text


def test_repository_without_a_clip(hub, tmp_path):
    hub.repos["me/words"] = {"README.md": b"words"}
    hub.repos["me/half"] = {"config.json": b"{}"}
    for repo in "me/words", "me/half":
        text = complaint(
            repo, FileNotFoundError, cache_dir=tmp_path / "cache"
        )
        assert f"{repo} has no CLIP in a layout" in text


def test_a_path_comes_before_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_open_clip(make(seed=3), tmp_path / "me" / "open-clip")
    same(load("me/open-clip")[0], make(seed=3))
    assert not hub.log


def test_offline_with_an_empty_cache_says_what_to_do(hub, tmp_path):
    hub.stop()
    cache = tmp_path / "cache"
    text = complaint("me/open-clip", ConnectionError, cache_dir=cache)
    for words in "me/open-clip", "not in the cache", "network", "its path":
        assert words in text


OFFLINE = """
import sys, miniclip
assert "huggingface_hub" not in sys.modules  # not before it is needed
try:
    miniclip.load("me/open-clip")
except ConnectionError as error:
    print(error)
"""


def test_settings_of_the_environment(hub, tmp_path):
    """HF_HOME and HF_HUB_OFFLINE, in a process of its own."""
    settings = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    settings |= {"HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env={**os.environ, **settings},
        capture_output=True,
    )
    assert b"OfflineModeIsEnabled" in done.stdout, done.stderr
    assert b"unset HF_HUB_OFFLINE" in done.stdout and not hub.log


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install 'miniclip.hub.'"):
        fetch("me/open-clip", "config.json", "main")


def test_no_unpickler_in_the_module():
    source = Path(module.__file__).read_text(encoding="utf-8")
    for word in "pickle.load", "Unpickler(", "jit.load", " eval(", "exec(":
        assert word not in source
    assert source.count("torch.load") == 1 == source.count("weights_only=T")


# --- the documented numbers are those of the sources


def test_expected_values_of_make_pretrained():
    text = (ROOT / "tests/bench/pretrained.py").read_text(encoding="utf-8")
    chapter = ROOT / "book/chapters/18_pretrained.md"
    told = chapter.read_text(encoding="utf-8")
    for value in "0.9927937", "0.00421068", "0.00299572", "24.5701":
        assert value in text and value in told
    assert "not run here" in told
    assert math.isclose(
        0.9927937 + 0.00421068 + 0.00299572, 1, abs_tol=1e-6
    )
