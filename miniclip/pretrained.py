"""Everybody's weights: read without running, carried over, written.

Written from book/chapters/18_pretrained.md; edit that file.
"""

import hashlib
import json
import math
import os
import pickletools
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms import v2

from miniclip.model import (
    CLIP,
    CONFIGS,
    MEAN,
    STD,
    CLIPConfig,
    _read_json,
    _replacing,
    preprocess,
)
from miniclip.model import available_models as shipped_models
from miniclip.model import load as load_folder
from miniclip.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Storage:
    """A file of numbers in an archive."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _View:
    """A tensor that is still in its storage, counted in numbers."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Record:
    """An object of a TorchScript class: the class's name, and fields."""

    def __init__(self, kind: str):
        self.kind, self.fields = kind, {}


_DTYPES = {
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch BoolStorage": torch.bool,
}


def _storage(pid: tuple) -> _Storage:
    """What ("storage", type, file, device, length) stands for."""
    _, kind, key, _, numel = pid
    if kind not in _DTYPES:
        raise ValueError(f"it has numbers of type {kind}, which is unknown")
    return _Storage(key, _DTYPES[kind], numel)


def _called(name: str, args: tuple):
    """What a call in the pickle stands for; nothing is called."""
    if name == "torch._utils _rebuild_tensor_v2":
        return _View(*args[:4])
    if name == "collections OrderedDict" and not args:
        return {}
    if name.startswith("torch.jit._pickle "):  # says a list's type
        return args[0]
    raise ValueError(f"it asks to call {name!r}, as no weights need")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_PLAIN = "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE GLOBAL".split()
_MARK = object()


def _push(op: str, arg, stack: list) -> bool:
    """Put the value that op stands for on the stack, if it is a value."""
    if op in _CONSTANTS:
        stack.append(_CONSTANTS[op])
    elif op in _EMPTY:
        stack.append(_EMPTY[op]())
    elif op in _PLAIN:
        stack.append(arg)  # of GLOBAL it is only the name
    elif op == "MARK":
        stack.append(_MARK)
    return op in _CONSTANTS or op in _EMPTY or op in (*_PLAIN, "MARK")


def _since_mark(stack: list) -> list:
    """Take everything off the stack that lies above the last mark."""
    items = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _step(op: str, arg, stack: list, memo: dict) -> None:
    """One instruction that works with the stack."""
    match op:
        case "BINPUT" | "LONG_BINPUT":
            memo[arg] = stack[-1]
        case "BINGET" | "LONG_BINGET":
            stack.append(memo[arg])
        case "TUPLE":
            stack.append(tuple(_since_mark(stack)))
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            n = int(op[-1])
            stack[-n:] = [tuple(stack[-n:])]
        case "SETITEMS":
            items = _since_mark(stack)
            stack[-1].update(zip(items[::2], items[1::2]))
        case "APPENDS":
            items = _since_mark(stack)
            stack[-1].extend(items)
        case "BINPERSID":
            stack.append(_storage(stack.pop()))
        case "NEWOBJ":
            stack.pop()  # arguments, always empty
            stack.append(_Record(stack.pop()))
        case "BUILD":
            fields = stack.pop()
            stack[-1].fields = fields
        case "REDUCE":
            args = stack.pop()
            stack.append(_called(stack.pop(), args))
        case _:
            raise ValueError(f"it has the instruction {op}, unexpected")


def read_pickle(data: bytes):
    """What the pickle of a TorchScript archive describes; it is not run.

    Objects become records with `kind` and `fields`, tensors become views.

    Raises: ValueError, or what a list raises, for anything unexpected.

    Chapter: book/chapters/18_pretrained.md
    """
    stack, memo = [], {}
    for op, arg, _ in pickletools.genops(data):
        if op.name in ("PROTO", "STOP") or _push(op.name, arg, stack):
            continue
        _step(op.name, arg, stack, memo)
    (result,) = stack
    return result


def _walk(root: _Record) -> Iterator[tuple[str, object]]:
    """The name and the value of every field below root, records once."""
    todo, seen = [("", root)], set()
    while todo:
        path, record = todo.pop()
        if id(record) in seen:
            continue
        seen.add(id(record))
        for name, value in record.fields.items():
            yield path + name, value
            if isinstance(value, _Record):
                todo.append((f"{path}{name}.", value))


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """The bytes of a file in an archive, which must not be compressed."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} in it is compressed, unexpected")
    return archive.read(info)


def _tensor(archive: zipfile.ZipFile, top: str, view: _View) -> Tensor:
    """The tensor that a view describes."""
    storage = view.storage
    data = bytearray(_entry(archive, f"{top}/data/{storage.key}"))
    numbers = torch.frombuffer(data, dtype=storage.dtype)
    if len(numbers) != storage.numel or math.prod(view.size) > len(numbers):
        raise ValueError(
            f"a tensor {view.size} lies in {len(numbers)} numbers, "
            f"expected {storage.numel}"
        )
    tensor = numbers.as_strided(view.size, view.stride, view.offset)
    return tensor.contiguous()


_KINDS = {"QuickGELU": "quick_gelu", "GELU": "gelu"}


def read_torchscript(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a TorchScript archive, and the activation it names.

    Nothing in the archive is run. The activation is None if there is no
    class QuickGELU or GELU in it, or if there are both.

    Raises: ValueError for a file that is damaged or no such archive.

    Chapter: book/chapters/18_pretrained.md
    """
    try:
        with zipfile.ZipFile(path) as archive:
            top = archive.namelist()[0].split("/")[0]
            root = read_pickle(_entry(archive, f"{top}/data.pkl"))
            found = dict(_walk(root))
            state = {
                name: _tensor(archive, top, value)
                for name, value in found.items()
                if isinstance(value, _View)
            }
    except _UNREADABLE as error:
        raise ValueError(
            f"{path} is damaged, or no archive of weights: {error}; "
            "nothing in it was run; download or save it again"
        ) from None
    records = [v for v in found.values() if isinstance(v, _Record)]
    kinds = {record.kind.split()[-1] for record in records} & _KINDS.keys()
    return state, _KINDS[kinds.pop()] if len(kinds) == 1 else None


_UNREADABLE = (  # what a damaged file may raise while it is read
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
)


def _count(state: dict[str, Tensor], prefix: str) -> int:
    """How many numbered parts stand under a prefix."""
    names = [name for name in state if name.startswith(prefix)]
    return len({name[len(prefix) :].split(".")[0] for name in names})


def _square(positions: int) -> int:
    """The side of a square grid, from its positions and one more."""
    side = math.isqrt(max(positions - 1, 0))
    if side * side + 1 != positions:
        raise ValueError(
            f"there are {positions} positions in the image tower, expected "
            "a square number and one more; the weights are not CLIP's"
        )
    return side


def _image_numbers(state: dict[str, Tensor]) -> dict:
    """The fields of CLIPConfig that the image tower's shapes tell."""
    if "visual.layer1.0.conv1.weight" in state:
        return _resnet_numbers(state)
    width, _, _, patch = state["visual.conv1.weight"].shape
    side = _square(len(state["visual.positional_embedding"]))
    return {
        "image_resolution": patch * side,
        "vision_layers": _count(state, "visual.transformer.resblocks."),
        "vision_width": width,
        "vision_patch_size": patch,
    }


def _resnet_numbers(state: dict[str, Tensor]) -> dict:
    """The same for CLIP's modified ResNets."""
    stages = [f"visual.layer{i}." for i in (1, 2, 3, 4)]
    width = len(state["visual.layer1.0.conv1.weight"])
    places = len(state["visual.attnpool.positional_embedding"])
    return {
        "image_resolution": 32 * _square(places),
        "vision_layers": tuple(_count(state, stage) for stage in stages),
        "vision_width": width,
        "vision_patch_size": None,
        "vision_heads": 32 * width // 64,
    }


def infer_config(state: dict[str, Tensor], activation: str) -> CLIPConfig:
    """The configuration that a state dict in OpenAI's names must have.

    All but the activation and the heads is in the shapes; there is a head
    for every 64 of a width. Raises: ValueError for other weights.

    Source: build_model of openai/CLIP, clip/model.py.

    Chapter: book/chapters/18_pretrained.md
    """
    try:
        vocab_size, width = state["token_embedding.weight"].shape
        numbers = {
            "embed_dim": state["text_projection"].shape[1],
            **_image_numbers(state),
            "context_length": len(state["positional_embedding"]),
            "vocab_size": vocab_size,
        }
    except KeyError as name:
        raise ValueError(
            f"there is no tensor {name}, as every CLIP has; give a file "
            "or folder with the weights of both towers"
        ) from None
    if width % 64:
        raise ValueError(
            f"the text tower has width {width}, no multiple of 64, so its "
            "heads cannot be told; load a format with a configuration"
        )
    return CLIPConfig(
        **numbers,
        transformer_width=width,
        transformer_heads=width // 64,
        transformer_layers=_count(state, "transformer.resblocks."),
        activation=activation,
    )


def _settle(said: str | None, asked: str | None, source) -> str:
    """The activation to use, from what a file says and a caller asks."""
    if said is None and asked is None:
        raise ValueError(
            f"{source} does not say which activation it was trained with; "
            "pass activation='quick_gelu' (OpenAI's weights, and models "
            "called -quickgelu by open_clip) or 'gelu' (most others)"
        )
    if None not in (said, asked) and said != asked:
        raise ValueError(
            f"{source} was trained with activation {said!r}, and {asked!r} "
            "was asked for; leave activation out: the file knows"
        )
    return said or asked


_STARTS = {  # ours: transformers'
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": (
        "vision_model.embeddings.position_embedding.weight"
    ),
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # so they spell it
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.proj": "visual_projection.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": (
        "text_model.embeddings.position_embedding.weight"
    ),
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
}
_PARTS = {
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def _renamed(name: str, back: bool) -> str:
    """A name of ours in transformers' words, or back."""
    for table in _STARTS, _PARTS:
        for ours, theirs in table.items():
            old, new = (theirs, ours) if back else (ours, theirs)
            if name.startswith(old) or (table is _PARTS and old in name):
                name = name.replace(old, new, 1)
                break
    return name


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ours, with a ViT, in the names of transformers.

    Chapter: book/chapters/18_pretrained.md
    """
    out = {}
    for name, tensor in state.items():
        new = _renamed(name, back=False)
        block, found, kind = new.partition(".attn.in_proj_")
        if found:
            for letter, part in zip("qkv", tensor.chunk(3)):
                key = f"{block}.self_attn.{letter}_proj.{kind}"
                out[key] = part.clone()
        else:
            turned = name in ("visual.proj", "text_projection")
            out[new] = tensor.T.contiguous() if turned else tensor
    return out


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' CLIPModel in our names.

    Chapter: book/chapters/18_pretrained.md
    """
    out = {}
    for name, tensor in state.items():
        block, found, kind = name.partition(".self_attn.q_proj.")
        new = _renamed(name, back=True)
        if found:
            names = [f"{block}.self_attn.{x}_proj.{kind}" for x in "qkv"]
            if all(part in state for part in names):
                head = _renamed(f"{block}.", back=True)
                parts = [state[part] for part in names]
                out[f"{head}attn.in_proj_{kind}"] = torch.cat(parts)
        elif re.search(r"\.self_attn\.[kv]_proj\.", name) is None:
            turned = name in ("visual_projection.weight", _TURNED)
            out[new] = tensor.T.contiguous() if turned else tensor
    return out


_TURNED = "text_projection.weight"


_EXTRAS = re.compile(  # constants that some programs keep as tensors
    r"input_resolution|context_length|vocab_size|(.*\.)?attn_mask|"
    r"(text|vision)_model\.embeddings\.position_ids"
)


def _clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict in float32, without what other programs leave."""
    if all(name.startswith("module.") for name in state):
        state = {name[7:]: tensor for name, tensor in state.items()}
    out = {}
    for name, tensor in state.items():
        if not _EXTRAS.fullmatch(name):
            is_float = tensor.is_floating_point()
            out[name] = tensor.float() if is_float else tensor
    if "logit_scale" in out and out["logit_scale"].numel() == 1:
        out["logit_scale"] = out["logit_scale"].reshape(())
    return out


def _some(names: list[str]) -> str:
    """The first three of some names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _check_fit(state: dict, wanted: dict, source) -> None:
    """Raise ValueError unless state has the names and shapes of wanted."""
    shared = state.keys() & wanted.keys()
    complaints = {
        "missing": sorted(wanted.keys() - shared),
        "unknown": sorted(state.keys() - shared),
        "of another shape": [
            f"{name} is {tuple(state[name].shape)}, expected "
            f"{tuple(wanted[name].shape)}"
            for name in sorted(shared)
            if state[name].shape != wanted[name].shape
        ],
    }
    found = [f"{k}: {_some(v)}" for k, v in complaints.items() if v]
    if found:
        raise ValueError(
            f"the tensors in {source} are not those of its model; "
            f"{'; '.join(found)}; it is incomplete or of another "
            "architecture: get it again, or another model"
        )


def _assemble(state: dict[str, Tensor], config: CLIPConfig, source) -> CLIP:
    """A model in evaluation mode that has taken the tensors over."""
    with torch.device("meta"):
        model = CLIP(config)
    _check_fit(state, model.state_dict(), source)
    model.load_state_dict(state, assign=True)
    if config.vocab_size == CLIP_VOCABULARY:
        model.tokenizer = Tokenizer.openai()
    return model.eval()


CLIP_VOCABULARY = 49408  # whoever has as many has OpenAI's tokenizer


def _refuse_others(found: dict, same: dict, known: str, where: str) -> None:
    """Raise ValueError for settings of another architecture than CLIP's."""
    for name, value in found.items():
        if name not in known.split() and same.get(name, _MARK) != value:
            raise ValueError(
                f"{where} has {name} = {value!r}, which a CLIP of this "
                "package cannot be; load another model"
            )


def _open_clip_config(content: dict) -> CLIPConfig:
    """The configuration in an open_clip_config.json."""
    c = content["model_cfg"]
    vision, text = c["vision_cfg"], c["text_cfg"]
    top = "embed_dim quick_gelu vision_cfg text_cfg"
    _refuse_others(c, {"custom_text": False}, top, "model_cfg")
    known = "image_size layers width patch_size head_width"
    _refuse_others(vision, {"mlp_ratio": 4.0}, known, "vision_cfg")
    known = "context_length vocab_size width heads layers hf_tokenizer_name"
    _refuse_others(text, {"mlp_ratio": 4.0}, known, "text_cfg")
    layers, width = vision["layers"], vision["width"]
    is_vit = isinstance(layers, int)
    heads = width * (1 if is_vit else 32) // vision.get("head_width", 64)
    return CLIPConfig(
        c["embed_dim"],
        vision["image_size"],
        layers,
        width,
        vision.get("patch_size") if is_vit else None,
        text["context_length"],
        text["vocab_size"],
        text["width"],
        text["heads"],
        text["layers"],
        None if is_vit and heads == width // 64 else heads,
        activation="quick_gelu" if c.get("quick_gelu") else "gelu",
    )


_VISION = {  # the defaults of CLIPVisionConfig
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


_TEXT = {  # and of CLIPTextConfig
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}


def _check_hugging_face(vision: dict, text: dict) -> None:
    """Raise ValueError for settings that our towers do not compute."""
    last, act = text["vocab_size"] - 1, text["hidden_act"]
    expected = {
        "vision hidden_act": (vision["hidden_act"], act),
        "num_channels": (vision["num_channels"], 3),
    }
    for name, part in ("vision", vision), ("text", text):
        width, eps = 4 * part["hidden_size"], part["layer_norm_eps"]
        expected[f"{name} layer_norm_eps"] = (eps, 1e-5)
        found = part["intermediate_size"]
        expected[f"{name} intermediate_size"] = (found, width)
    if text["eos_token_id"] != 2:  # 2 means: the highest
        expected["eos_token_id"] = (text["eos_token_id"], last)
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise ValueError(
                f"{name} is {found!r}, expected {wanted!r}, or a CLIP of "
                "this package computes something else; load another model"
            )


def _hugging_face_config(content: dict) -> CLIPConfig:
    """The configuration in the config.json of a CLIPModel."""
    if content.get("model_type") != "clip":
        raise ValueError(
            f"model_type is {content.get('model_type')!r}, expected 'clip'"
        )
    vision = _VISION | (content.get("vision_config") or {})
    text = _TEXT | (content.get("text_config") or {})
    _check_hugging_face(vision, text)
    heads = vision["num_attention_heads"]
    return CLIPConfig(
        content.get("projection_dim", 512),
        vision["image_size"],
        vision["num_hidden_layers"],
        vision["hidden_size"],
        vision["patch_size"],
        text["max_position_embeddings"],
        text["vocab_size"],
        text["hidden_size"],
        text["num_attention_heads"],
        text["num_hidden_layers"],
        None if heads == vision["hidden_size"] // 64 else heads,
        activation=text["hidden_act"],
    )


def _check_pictures(found: dict, where: Path) -> None:
    """Raise ValueError unless pictures are prepared as in preprocess."""
    wanted = {"mean": MEAN, "std": STD, "interpolation": "bicubic"}
    wanted |= {"resize_mode": "shortest", "resample": 3}
    for name, value in found.items():
        name = name.removeprefix("image_")
        if name not in wanted or value is None:
            continue
        if name in ("mean", "std"):
            pairs = zip(value, wanted[name])
            same = all(abs(a - b) < 1e-4 for a, b in pairs)
        else:
            same = value == wanted[name]
        if not same:
            raise ValueError(
                f"{where} wants pictures with {name} {value!r}, preprocess "
                f"makes them with {wanted[name]!r}; load the file of the "
                "weights alone and prepare the pictures yourself"
            )


def write_safetensors(model: CLIP, path: str | Path) -> None:
    """Write a model into one file, configuration and merges inside.

    Chapter: book/chapters/18_pretrained.md
    """
    merges = None if model.tokenizer is None else model.tokenizer.merges
    inside = {"config": asdict(model.config), "merges": merges}
    _write(model.state_dict(), Path(path), {"miniclip": json.dumps(inside)})


def _write(state: dict, path: Path, notes: dict[str, str]) -> None:
    """Write tensors so that a save cut short leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {n: t.detach().cpu().contiguous() for n, t in state.items()}
    with _replacing([path]) as (part,):
        save_file(state, part, {"format": "pt", **notes})


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a safetensors file, and what we wrote beside them."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            notes = (file.metadata() or {}).get("miniclip", "{}")
        inside = json.loads(notes)
        if inside.get("merges") is not None:
            pairs = [(a, b) for a, b in inside["merges"]]
            inside["tokenizer"] = Tokenizer(pairs)
        if "config" in inside:
            inside["config"] = CLIPConfig(**inside["config"])
        return state, inside
    except (SafetensorError, *_UNREADABLE) as error:
        raise ValueError(
            f"{path} is damaged ({error}); download or save it again"
        ) from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    """The state dict in a file that torch.save wrote, or a training run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, *_UNREADABLE) as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} is damaged, or holds more than tensors: {first} "
            "Nothing in it was run; get it again, as safetensors if you can"
        ) from None
    if isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        content = {"": content}
    if not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(
            f"{path} holds a {type(content).__name__} of other things than "
            "tensors, expected a state dict, or one called 'state_dict'"
        )
    return content


def _is_torchscript(path: Path) -> bool:
    """Whether a file is a zip archive with code in it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = [name.split("/", 1)[-1] for name in archive.namelist()]
    return any(n.startswith("code/") or n == "constants.pkl" for n in names)


def _read_file(path: Path, activation: str | None) -> CLIP:
    """The model in one file of any kind."""
    said, inside = None, {}
    if _is_torchscript(path):
        state, said = read_torchscript(path)
        if said is None and sha256_of(path) in OPENAI_SHA256.values():
            said = "quick_gelu"
    elif path.suffix == ".safetensors":
        state, inside = _read_safetensors(path)
    else:
        state = _read_torch(path)
    state = _clean(state)
    if any(name.startswith("text_model.") for name in state):
        state = from_hugging_face(state)
    config = inside.get("config")
    said = said if config is None else config.activation
    activation = _settle(said, activation, path)
    try:
        config = config or infer_config(state, activation)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    model = _assemble(state, config, path)
    model.tokenizer = inside.get("tokenizer", model.tokenizer)
    return model


LAYOUTS = {  # the configuration's file, and the weights', best first
    "open_clip_config.json": (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.bin",
    ),
    "config.json": ("model.safetensors", "pytorch_model.bin"),
}


def _weights_in(folder: Path) -> tuple[Path, Path]:
    """The files with the configuration and the weights in a folder."""
    for config, names in LAYOUTS.items():
        for name in names:
            if (folder / config).is_file() and (folder / name).is_file():
                return folder / config, folder / name
    raise FileNotFoundError(
        f"{folder} has {sorted(f.name for f in folder.iterdir())[:9]}, "
        f"expected one of {[*LAYOUTS]} with its weights, in one file; "
        "download it again, all of it"
    )


def _read_folder(folder: Path, activation: str | None) -> CLIP:
    """The model in a folder of open_clip's, Hugging Face's or ours."""
    config_path, path = _weights_in(folder)
    content = _read_json(config_path)
    if config_path.name == "config.json" and "embed_dim" in content:
        model = load_folder(folder)[0]
        _settle(model.config.activation, activation, folder)
        return model
    try:
        if config_path.name == "config.json":
            config = _hugging_face_config(content)
            pictures = folder / "preprocessor_config.json"
            found = _read_json(pictures) if pictures.is_file() else {}
        else:
            config = _open_clip_config(content)
            pictures, found = config_path, content.get("preprocess_cfg", {})
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{config_path} lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from None
    _check_pictures(found, pictures)
    _settle(config.activation, activation, folder)
    is_safe = path.suffix == ".safetensors"
    state = _read_safetensors(path)[0] if is_safe else _read_torch(path)
    state = _clean(state)
    if config_path.name == "config.json":
        state = from_hugging_face(state)
    return _assemble(state, config, path)


def export_open_clip(model: CLIP, folder: str | Path) -> None:
    """Write a folder that open_clip loads, as "local-dir:" + folder.

    Raises: ValueError for an image tower that open_clip does not have.

    Chapter: book/chapters/18_pretrained.md
    """
    c, folder = model.config, Path(folder)
    _check_known(c, "open_clip", resnets=True)
    vision = {"image_size": c.image_resolution, "layers": c.vision_layers}
    vision |= {"width": c.vision_width, "patch_size": c.vision_patch_size}
    if c.vision_heads is not None:
        whole = c.vision_width * (32 if c.vision_patch_size is None else 1)
        vision |= {"head_width": whole // c.vision_heads}
    text = {"context_length": c.context_length, "vocab_size": c.vocab_size}
    text |= {"width": c.transformer_width, "heads": c.transformer_heads}
    text |= {"layers": c.transformer_layers}
    content = {
        "model_cfg": {
            "embed_dim": c.embed_dim,
            "quick_gelu": c.activation == "quick_gelu",
            "vision_cfg": vision,
            "text_cfg": text,
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD}
        | {"interpolation": "bicubic", "resize_mode": "shortest"},
    }
    _write(model.state_dict(), folder / "open_clip_model.safetensors", {})
    _write_json(folder / "open_clip_config.json", content)


def _check_known(config: CLIPConfig, who: str, resnets: bool) -> None:
    """Raise ValueError for an image tower that others do not have."""
    is_small = config.vision_heads is None  # the ResNet of this package
    if isinstance(config.vision_layers, tuple) and (
        is_small or not resnets
    ):
        raise ValueError(
            f"the image tower is a ResNet {config.vision_layers}, which "
            f"{who} does not have; export a model with a ViT"
        )


def _write_json(path: Path, content: dict) -> None:
    """Write a JSON file, in place of the old one when it is complete."""
    with _replacing([path]) as (part,):
        part.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _hugging_face_configs(c: CLIPConfig) -> tuple[dict, dict]:
    """The vision_config and the text_config of a model."""
    towers, of_image = [], c.vision_heads or c.vision_width // 64
    for size, layers, heads in (
        (c.vision_width, c.vision_layers, of_image),
        (c.transformer_width, c.transformer_layers, c.transformer_heads),
    ):
        tower = {"hidden_size": size, "intermediate_size": 4 * size}
        tower |= {"num_hidden_layers": layers, "num_attention_heads": heads}
        tower |= {"hidden_act": c.activation, "layer_norm_eps": 1e-5}
        towers.append(tower | {"projection_dim": c.embed_dim})
    vision, text = towers
    vision |= {"image_size": c.image_resolution}
    vision |= {"patch_size": c.vision_patch_size}
    text |= {"max_position_embeddings": c.context_length}
    text |= {"vocab_size": c.vocab_size, "pad_token_id": 0}
    text |= {"bos_token_id": c.vocab_size - 2}
    text |= {"eos_token_id": c.vocab_size - 1}
    return vision, text


def _hugging_face_pictures(side: int) -> dict:
    """The preprocessor_config.json that says what preprocess does."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "do_convert_rgb": True,
    }


def export_hugging_face(model: CLIP, folder: str | Path) -> None:
    """Write a folder that transformers' CLIPModel.from_pretrained loads.

    Raises: ValueError for an image tower that transformers does not have.

    Chapter: book/chapters/18_pretrained.md
    """
    c, folder = model.config, Path(folder)
    _check_known(c, "transformers", resnets=False)
    vision, text = _hugging_face_configs(c)
    content = {"architectures": ["CLIPModel"], "model_type": "clip"}
    content |= {"projection_dim": c.embed_dim, "dtype": "float32"}
    content |= {"vision_config": vision, "text_config": text}
    state = to_hugging_face(model.state_dict())
    _write(state, folder / "model.safetensors", {})
    _write_json(folder / "config.json", content)
    pictures = _hugging_face_pictures(c.image_resolution)
    _write_json(folder / "preprocessor_config.json", pictures)
    if model.tokenizer is not None:
        _write_hugging_face_tokenizer(model, folder)


def _write_hugging_face_tokenizer(model: CLIP, folder: Path) -> None:
    """Write the tokenizer in the three files that CLIPTokenizer reads."""
    tokenizer, end = model.tokenizer, "<|endoftext|>"
    _write_json(folder / "vocab.json", tokenizer.encoder)
    lines = ["#version: 0.2", *(" ".join(m) for m in tokenizer.merges)]
    text = "\n".join(lines) + "\n"
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    content = {"tokenizer_class": "CLIPTokenizer", "unk_token": end}
    content |= {"bos_token": "<|startoftext|>", "eos_token": end}
    content |= {"pad_token": end, "errors": "replace"}
    content |= {"model_max_length": model.config.context_length}
    _write_json(folder / "tokenizer_config.json", content)


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Chapter: book/chapters/18_pretrained.md
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sha256(path: Path, sha256: str | None) -> None:
    """Raise ValueError unless a file has the hash, if there is one."""
    if sha256 is not None and (found := sha256_of(path)) != sha256.lower():
        raise ValueError(
            f"{path} has sha256 {found}, expected {sha256}; it is damaged "
            "or another file: delete it and download it again"
        )


def _check_etag(path: Path, etag: str) -> None:
    """Delete a download and raise ValueError if it is not as announced."""
    content = path.read_bytes()
    head = b"blob %d\0" % len(content)
    found = {64: hashlib.sha256(content), 40: hashlib.sha1(head + content)}
    if len(etag) in found and found[len(etag)].hexdigest() != etag:
        os.remove(os.path.realpath(path))
        path.unlink(missing_ok=True)
        raise ValueError(
            f"{path.name} has hash {found[len(etag)].hexdigest()}, "
            f"announced was {etag}; it was deleted: try again"
        )


def _hub():
    """The library huggingface_hub, or an error that says how to get it."""
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            "downloading needs huggingface_hub, which is not installed; "
            "run pip install 'miniclip[hub]', or pass the path of a file"
        ) from None
    return huggingface_hub


def fetch(
    repo: str, file: str, revision: str, cache_dir=None
) -> Path | None:
    """The path of a file of a repository on the hub; None if it has none.

    A copy in the cache is used as it is. What is downloaded is announced
    on stderr and compared with its hash. HF_ENDPOINT names another hub.

    Raises: FileNotFoundError for an unknown repository, ConnectionError
        without a network, ValueError for another content than announced.

    Chapter: book/chapters/18_pretrained.md
    """
    hub, endpoint = _hub(), os.environ.get("HF_ENDPOINT")
    options = {"revision": revision, "cache_dir": cache_dir}
    cached = hub.try_to_load_from_cache(repo, file, **options)
    if isinstance(cached, str):
        return Path(cached)
    url = hub.hf_hub_url(repo, file, revision=revision, endpoint=endpoint)
    try:
        facts = hub.get_hf_file_metadata(url)
        size = (facts.size or 0) / 1e6
        print(
            f"miniclip: downloading {file} ({size:.1f} MB) of {repo} at "
            f"commit {facts.commit_hash} from {url.split('/' + repo)[0]}",
            file=sys.stderr,
        )
        path = hub.hf_hub_download(repo, file, endpoint=endpoint, **options)
    except Exception as error:
        return _explain(error, repo, file, revision)
    _check_etag(Path(path), facts.etag or "")
    return Path(path)


def _explain(error: Exception, repo: str, file: str, revision: str) -> None:
    """Raise what a failed download means; None if there is no such file.

    By name, since the classes moved between versions of the hub's library.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "LocalEntryNotFoundError" not in kinds and (
        "EntryNotFoundError" in kinds
    ):
        return None
    if kinds & {"RepositoryNotFoundError", "RevisionNotFoundError"}:
        raise FileNotFoundError(
            f"the hub has no {repo} at revision {revision!r}, or hides it; "
            "look at the spelling, or log in with `hf auth login`"
        ) from error
    raise ConnectionError(
        f"{file} of {repo} is not in the cache, and the hub cannot be "
        f"reached ({type(error).__name__}: {error}); connect to the "
        "network (and unset HF_HUB_OFFLINE), or copy the model to a folder "
        "and pass its path"
    ) from error


def _cached_model(
    repo: str, revision: str | None, cache_dir
) -> Path | None:
    """The folder of a model that is in the cache, all of it, or None."""
    look = partial(_hub().try_to_load_from_cache, repo, cache_dir=cache_dir)
    for config, names in LAYOUTS.items():
        for name in names:
            found = look(config, revision=revision or "main")
            if isinstance(found, str):
                commit = Path(found).parent.name
                if isinstance(look(name, revision=commit), str):
                    return Path(found).parent
    return None


def _fetch_model(repo: str, revision: str | None, cache_dir) -> Path:
    """The folder, in the cache, of a model on the hub."""
    if folder := _cached_model(repo, revision, cache_dir):
        return folder
    for config, names in LAYOUTS.items():
        path = fetch(repo, config, revision or "main", cache_dir)
        if path is None:
            continue
        commit = path.parent.name
        fetch(repo, "preprocessor_config.json", commit, cache_dir)
        for name in names:
            if fetch(repo, name, commit, cache_dir):
                return path.parent
    raise FileNotFoundError(
        f"{repo} has no CLIP in a layout that is known here, which are "
        f"{LAYOUTS}; download its weights and pass the path of the file"
    )


HUB = {
    "RN50": "timm/resnet50_clip.openai",
    "RN101": "timm/resnet101_clip.openai",
    "RN50x4": "timm/resnet50x4_clip.openai",
    "RN50x16": "timm/resnet50x16_clip.openai",
    "RN50x64": "timm/resnet50x64_clip.openai",
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}
REVISIONS = {  # the commits of those that are pinned
    "ViT-B/32": "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
    "ViT-B/16": "57c216476eefef5ab752ec549e440a49ae4ae5f3",
    "ViT-L/14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "ViT-L/14@336px": "ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
}


_HASHES = """
afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762
8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599
7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd
52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa
be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c
40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af
5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f
b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836
3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02
"""
OPENAI_SHA256 = dict(zip(HUB, _HASHES.split()))  # of OpenAI's archives


def available_models() -> list[str]:
    """The names that load knows: the shipped models and OpenAI's nine.

    Chapter: book/chapters/18_pretrained.md
    """
    return [*shipped_models(), *HUB]


def _load_openai(name: str, revision: str | None, cache_dir) -> CLIP:
    """One of OpenAI's nine, from its own cache or from the hub."""
    file = re.sub("[/@]", "-", name) + ".pt"
    path = Path.home() / ".cache" / "clip" / file
    if path.is_file() and revision is None:
        _check_sha256(path, OPENAI_SHA256[name])
        model = _read_file(path, None)
    else:
        revision = revision or REVISIONS.get(name)
        folder = _fetch_model(HUB[name], revision, cache_dir)
        model = _read_folder(folder, None)
    if model.config != CONFIGS[name]:
        raise ValueError(
            f"what was found as {name} is {model.config}, expected "
            f"{CONFIGS[name]}; it is not OpenAI's: pass its path instead"
        )
    return model


_HUB_ID = re.compile(r"(hf-hub:)?([\w-][\w.-]*/[\w-][\w.-]*)")


def _load(name: str, activation, revision, sha256, cache_dir) -> CLIP:
    """The model that a name, a path or a hub id stands for."""
    path, hub_id = Path(name), _HUB_ID.fullmatch(name)
    if name in HUB and sha256 is None:
        model = _load_openai(name, revision, cache_dir)
        _settle(model.config.activation, activation, name)
        return model
    if name in shipped_models():
        model = load_folder(name)[0]
        _settle(model.config.activation, activation, name)
        return model
    if name in HUB or (hub_id and not path.exists()):
        repo = HUB.get(name) or hub_id[2]
        path = _fetch_model(repo, revision, cache_dir)
    if not path.exists():
        raise FileNotFoundError(
            f"no model {name!r}; pass one of {available_models()}, a file, "
            "a folder, or the id of a repository on the Hugging Face hub"
        )
    if path.is_file():
        _check_sha256(path, sha256)
        return _read_file(path, activation)
    _check_sha256(_weights_in(path)[1], sha256)
    return _read_folder(path, activation)


def load(
    name: str | Path,
    device: str | torch.device = "cpu",
    activation: str | None = None,
    revision: str | None = None,
    sha256: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[CLIP, v2.Compose]:
    """Anybody's CLIP as (model, preprocess), the model ready for use.

    Args:
        name: one of available_models(); a file or folder of OpenAI's,
            open_clip's, Hugging Face's or ours; or the id of a repository
            on the hub, such as "laion/CLIP-ViT-B-32-laion2B-s34B-b79K".
        device: where the model goes; its floats are float32.
        activation: "quick_gelu" or "gelu", for files that do not say.
        revision: a commit, branch or tag on the hub.
        sha256: what the file with the weights must have.
        cache_dir: where downloads are kept, if not where the hub's are.

    Nothing in a file is run. What is downloaded is announced on stderr.

    Raises: FileNotFoundError for an unknown name, ConnectionError if the
        hub is needed and cannot be reached, ValueError for files that are
        damaged, of another model, or of another activation.

    Chapter: book/chapters/18_pretrained.md
    """
    model = _load(str(name), activation, revision, sha256, cache_dir)
    return model.to(device), preprocess(model.config.image_resolution)
