"""CLIP itself: two towers, one space; configurations, saving, loading.

Written from book/chapters/07_model.md; edit that file.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from miniclip.data import MAX_PIXELS, data_dir
from miniclip.resnet import ModifiedResNet, ResNet, check_modified
from miniclip.text import ACTIVATIONS, TextTransformer
from miniclip.tokenizer import Tokenizer
from miniclip.vit import VisionTransformer, resize_positions


@dataclass(frozen=True)
class CLIPConfig:
    """The ten numbers that make a CLIP, named as in openai/CLIP, and one.

    An int as vision_layers builds a VisionTransformer; its vision_heads
    are one for every 64 of vision_width, if None. A tuple builds a ResNet
    with so many blocks in each stage, and vision_patch_size is None: with
    vision_heads for its attention pool the paper's ModifiedResNet, without
    the small ResNet. The activation is that of the Transformers' blocks.

    Raises: ValueError for numbers that nothing can be built from.

    Chapter: book/chapters/07_model.md
    """

    embed_dim: int
    image_resolution: int  # pixels, height and width
    vision_layers: int | tuple[int, ...]
    vision_width: int
    vision_patch_size: int | None
    context_length: int  # tokens
    vocab_size: int
    transformer_width: int
    transformer_heads: int
    transformer_layers: int
    vision_heads: int | None = None
    activation: str = "quick_gelu"

    def __post_init__(self):
        if isinstance(self.vision_layers, list):  # as JSON has it
            object.__setattr__(
                self, "vision_layers", tuple(self.vision_layers)
            )
        _check_config(self)


def _check_config(config: CLIPConfig) -> None:
    """Raise ValueError unless a CLIP can be built from config."""
    is_resnet = isinstance(config.vision_layers, tuple)
    for name, value in asdict(config).items():
        if name == "activation":
            ok, expected = value in ACTIVATIONS, f"one of {[*ACTIVATIONS]}"
        elif name == "vision_patch_size" and is_resnet:
            ok, expected = value is None, "None: a ResNet has no patches"
        elif name == "vision_heads" and value is None:
            continue
        else:
            numbers = value if isinstance(value, tuple) else [value]
            ok = numbers and all(type(n) is int and n > 0 for n in numbers)
            expected = "a positive whole number"
        if not ok:
            raise ValueError(f"{name} is {value!r}, expected {expected}")
    _check_heads(config)


def _check_heads(config: CLIPConfig) -> None:
    """Raise ValueError unless the image tower's heads divide its width."""
    layers, width = config.vision_layers, config.vision_width
    heads = config.vision_heads
    if isinstance(layers, tuple):
        if heads is not None:
            check_modified(layers, heads, config.image_resolution, width)
    elif width % (heads or 64):
        share = f"{heads} heads" if heads else "64: each head takes 64"
        raise ValueError(
            f"vision_width is {width}, expected a multiple of {share}"
        )


def _image_tower(config: CLIPConfig) -> nn.Module:
    """The module that turns (B, 3, H, W) pictures into (B, E) features."""
    layers, width = config.vision_layers, config.vision_width
    embed_dim, side = config.embed_dim, config.image_resolution
    heads, act = config.vision_heads, config.activation
    if not isinstance(layers, tuple):
        p, heads = config.vision_patch_size, heads or width // 64
        sizes = side, p, width, layers, heads, embed_dim
        return VisionTransformer(*sizes, act)
    if heads is None:
        return ResNet(layers, width, embed_dim)
    return ModifiedResNet(layers, embed_dim, heads, side, width)


class CLIP(TextTransformer):
    """An image tower beside a text tower; both end in embed_dim numbers.

    It is a TextTransformer, so that the names in its state dict are those
    of openai/CLIP: the text tower's at the top, the other's in `visual`.
    `logit_scale` holds the logarithm of the scale, at first ln(1 / 0.07);
    `tokenizer` is None until one is set or loaded with the weights.

    Source: Radford et al. 2021, section 2.4 and figure 3.

    Chapter: book/chapters/07_model.md
    """

    def __init__(self, config: CLIPConfig):
        c = config
        width, heads = c.transformer_width, c.transformer_heads
        sizes = c.embed_dim, c.context_length, c.vocab_size, width, heads
        super().__init__(*sizes, c.transformer_layers, c.activation)
        self.config = config
        self.visual = _image_tower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.tokenizer: Tokenizer | None = None

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) pictures -> (B, E) image_features, not normalised.

        The pictures come from `preprocess`; they are cast to the precision
        of the weights. Raises: ValueError for bytes or another shape.
        """
        _check_image(image)
        return self.visual(image.to(self.text_projection.dtype))

    def forward(self, image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """N pictures and M captions -> logits_per_image (N, M), its .T."""
        image_features = F.normalize(self.encode_image(image), dim=-1)
        text_features = F.normalize(self.encode_text(ids), dim=-1)
        cosines = image_features @ text_features.T  # (N, M)
        logits_per_image = self.logit_scale.exp() * cosines
        return logits_per_image, logits_per_image.T


def _check_image(image: Tensor) -> None:
    """Raise ValueError unless image is a batch of normalised pictures."""
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(
            f"image has shape {tuple(image.shape)}, expected (B, 3, H, W); "
            "for a single picture pass image[None]"
        )
    if not image.is_floating_point():
        raise ValueError(
            f"image holds {image.dtype}, expected normalised floats; "
            "pass it through preprocess first"
        )


MEAN = (0.48145466, 0.4578275, 0.40821073)  # red, green, blue
STD = (0.26862954, 0.26130258, 0.27577711)


def _paper(embed_dim, side, layers, width, patch, text_width) -> CLIPConfig:
    """A configuration of the paper: 12 layers of text, heads of 64."""
    is_resnet = isinstance(layers, tuple)
    heads = 32 * width // 64 if is_resnet else None
    text = 77, 49408, text_width, text_width // 64, 12
    return CLIPConfig(embed_dim, side, layers, width, patch, *text, heads)


CONFIGS = {
    "RN50": _paper(1024, 224, (3, 4, 6, 3), 64, None, 512),
    "RN101": _paper(512, 224, (3, 4, 23, 3), 64, None, 512),
    "RN50x4": _paper(640, 288, (4, 6, 10, 6), 80, None, 640),
    "RN50x16": _paper(768, 384, (6, 8, 18, 8), 96, None, 768),
    "RN50x64": _paper(1024, 448, (3, 15, 36, 10), 128, None, 1024),
    "ViT-B/32": _paper(512, 224, 12, 768, 32, 512),
    "ViT-B/16": _paper(512, 224, 12, 768, 16, 512),
    "ViT-L/14": _paper(768, 224, 24, 1024, 14, 768),
    "ViT-L/14@336px": _paper(768, 336, 24, 1024, 14, 768),
}


def _pil_to_rgb(picture: Image.Image) -> Image.Image:
    """A PIL picture in RGB, its transparent parts white."""
    width, height = picture.size  # known before a pixel is decoded
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"a picture has {width:,} x {height:,} pixels, more than "
            f"{MAX_PIXELS:,}, and could fill the memory; make it smaller"
        )
    if picture.mode.startswith(("I", "F")):
        raise ValueError(
            f"a picture of mode {picture.mode} has more than 8 bits a "
            "pixel; read its file with miniclip.data.decode"
        )
    if "transparency" in picture.info or picture.mode[-1] in "Aa":
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def to_rgb(picture: Image.Image | Tensor) -> Image.Image | Tensor:
    """A PIL picture or bytes (..., 3, H, W) in RGB, transparency on white.

    Raises: TypeError for anything else; ValueError for other channels,
        for more than 8 bits, and for more than MAX_PIXELS pixels.

    Chapter: book/chapters/07_model.md
    """
    if isinstance(picture, Image.Image):
        return _pil_to_rgb(picture)
    if not isinstance(picture, Tensor) or picture.dtype != torch.uint8:
        kind = getattr(picture, "dtype", type(picture).__name__)
        raise TypeError(
            f"a picture is given as {kind}, expected a PIL picture or a "
            "uint8 tensor; open a file with PIL.Image.open"
        )
    if picture.ndim < 3 or picture.shape[-3] != 3:
        shape = tuple(picture.shape)
        raise ValueError(f"a picture has shape {shape}, expected (3, H, W)")
    return picture


def _check_growth(height: int, width: int, side: int) -> None:
    """Raise ValueError if resizing would fill the memory."""
    longer = side * max(height, width) // min(height, width)
    if side * longer > MAX_PIXELS:
        raise ValueError(
            f"a picture of {width:,} x {height:,} pixels, resized to a "
            f"shorter side of {side}, has a longer one of {longer:,}, and "
            "could fill the memory; cut out the part that matters first"
        )


def _resize(picture: Image.Image | Tensor, side: int):
    """Make the shorter side `side` pixels long, bicubic, as PIL does it."""
    H, W = TF.get_size(picture)
    _check_growth(H, W, side)
    if min(H, W) == side:
        return picture
    if not isinstance(picture, Tensor):
        return TF.resize(picture, side, v2.InterpolationMode.BICUBIC)
    many = [TF.to_pil_image(x) for x in picture.reshape(-1, 3, H, W).cpu()]
    many = [TF.pil_to_tensor(_resize(x, side)) for x in many]
    return torch.stack(many).view(*picture.shape[:-2], *many[0].shape[1:])


def _to_float(picture: Tensor) -> Tensor:
    """Bytes -> floats from 0 to 1."""
    return picture.float() / 255


def preprocess(image_resolution: int) -> v2.Compose:
    """The function that makes a picture ready for a model.

    It takes a PIL picture, or bytes (3, H, W) or (B, 3, H, W), and gives
    float32 of the same shape with H = W = image_resolution.

    Raises: TypeError and ValueError as `to_rgb`, and ValueError for a
        picture so narrow that resizing would fill the memory.
    Source: `_transform` of openai/CLIP; RGB first, transparency on white.

    Chapter: book/chapters/07_model.md
    """
    return v2.Compose(
        [
            to_rgb,
            partial(_resize, side=image_resolution),
            v2.CenterCrop(image_resolution),
            v2.ToImage(),
            _to_float,
            v2.Normalize(MEAN, STD),
        ]
    )


@contextmanager
def _replacing(paths: list[Path]) -> Iterator[list[Path]]:
    """Give a temporary path for each path; in the end, rename them all."""
    parts = [path.with_name(f".{path.name}.part") for path in paths]
    try:
        yield parts
        for part in parts:
            with part.open("rb+") as file:
                os.fsync(file.fileno())  # past all caches, onto the disk
        for part, path in zip(parts, paths):
            os.replace(part, path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _described(config: CLIPConfig) -> dict:
    """The fields that count; one at its default is left out."""
    values = ((f, getattr(config, f.name)) for f in fields(config))
    return {f.name: value for f, value in values if value != f.default}


def _fingerprint(config: CLIPConfig, tokenizer: Tokenizer | None) -> str:
    """A hash of what stands beside the weights."""
    merges = None if tokenizer is None else tokenizer.merges
    content = json.dumps([_described(config), merges])
    return hashlib.sha256(content.encode()).hexdigest()


def _state(model: CLIP, half: bool) -> dict[str, Tensor]:
    """The state dict on the CPU, its floats in half precision if asked."""
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        if half and tensor.is_floating_point():
            tensor = tensor.half()
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{name} has values that half precision cannot hold, "
                    "beyond 65504 or not finite; save with half=False"
                )
        state[name] = tensor
    return state


def _texts(model: CLIP) -> dict[str, str]:
    """The content of config.json, and of merges.json if there is one."""
    config = model.config
    content = _described(config) | {"activation": config.activation}
    content = json.dumps(content, indent=1)
    texts = {"config.json": content}
    if model.tokenizer is not None:
        found, wanted = model.tokenizer.vocab_size, model.config.vocab_size
        if found != wanted:
            raise ValueError(
                f"the tokenizer has {found} entries, the model {wanted}; "
                "set model.tokenizer to the one it was trained with"
            )
        merges = json.dumps(model.tokenizer.merges, ensure_ascii=False)
        texts["merges.json"] = merges
    return texts


def save(model: CLIP, folder: str | Path, half: bool = False) -> None:
    """Write model.safetensors, config.json and merges.json into folder.

    Nothing there is touched before all is written: a save that is cut
    short leaves the old checkpoint. half=True stores 16-bit floats.

    Raises: ValueError if the tokenizer does not fit the model, or half
        precision its weights.

    Chapter: book/chapters/07_model.md
    """
    folder, texts, state = Path(folder), _texts(model), _state(model, half)
    stamp = {"fingerprint": _fingerprint(model.config, model.tokenizer)}
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("model.safetensors", *texts)]
    with _replacing(paths) as parts:
        save_file(state, parts[0], stamp)
        for part, text in zip(parts[1:], texts.values()):
            part.write_text(text + "\n", encoding="utf-8")
    if model.tokenizer is None:  # none may stay from another model
        (folder / "merges.json").unlink(missing_ok=True)


def available_models() -> list[str]:
    """The names of the checkpoints that come with miniclip.

    Chapter: book/chapters/07_model.md
    """
    folder = data_dir() / "checkpoints"
    return sorted(file.parent.name for file in folder.glob("*/config.json"))


def _find(name: str | Path) -> Path:
    """The folder of a checkpoint, from its name or its path."""
    shipped = available_models()
    is_name = str(name) in shipped
    folder = data_dir() / "checkpoints" / name if is_name else Path(name)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no model {str(name)!r}; pass one of {shipped}, "
            "or a folder that save has written"
        )
    for file in "config.json", "model.safetensors":
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder} has no {file}, as a checkpoint must; "
                "copy it again, or save the model again"
            )
    return folder


def _read_json(path: Path):
    """What a JSON file holds; ValueError names a file that is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are not UTF-8
        raise ValueError(f"{path} is no JSON: {error}") from None


def _read_config(path: Path) -> CLIPConfig:
    """The configuration in a config.json; ValueError says what is wrong."""
    content = _read_json(path)
    known = {field.name: field.default for field in fields(CLIPConfig)}
    needed = {name for name in known if known[name] is MISSING}
    found = set(content) if isinstance(content, dict) else set()
    if not needed <= found <= set(known):
        raise ValueError(
            f"{path} has unknown fields {sorted(found - set(known))} and "
            f"lacks {sorted(needed - found)}; it must hold those of "
            "CLIPConfig"
        )
    try:
        return CLIPConfig(**content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_tokenizer(path: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer that a merges.json makes, None if there is no file."""
    if not path.exists():
        return None
    merges = _read_json(path)
    if not isinstance(merges, list) or not all(
        isinstance(pair, list) and [type(x) for x in pair] == [str, str]
        for pair in merges
    ):
        raise ValueError(f"{path} must hold a list of pairs of strings")
    try:
        tokenizer = Tokenizer([(a, b) for a, b in merges])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"{path} makes a vocabulary of {tokenizer.vocab_size}, "
            f"config.json says {vocab_size}; they are of different models"
        )
    return tokenizer


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a file, floats in float32, and the fingerprint."""
    state = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                is_float = tensor.is_floating_point()
                dtype = torch.float32 if is_float else tensor.dtype
                state[name] = tensor.to(dtype, copy=True)
            return state, (file.metadata() or {}).get("fingerprint")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}); copy or save it again"
        ) from None


def load(
    name: str | Path, device: str | torch.device = "cpu"
) -> tuple[CLIP, v2.Compose]:
    """A checkpoint as (model, preprocess), the model in evaluation mode.

    Args:
        name: one of available_models(), or a folder that `save` wrote.
        device: where the model goes; its floats are float32.

    Raises: FileNotFoundError for an unknown name or a missing file,
        ValueError for files that are damaged or do not fit each other.

    Chapter: book/chapters/07_model.md
    """
    folder = _find(name)
    config = _read_config(folder / "config.json")
    tokenizer = _read_tokenizer(folder / "merges.json", config.vocab_size)
    state, stamp = _read_weights(folder / "model.safetensors")
    with torch.device("meta"):
        model = CLIP(config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{folder}: the weights do not fit config.json: {error}"
        ) from None
    if stamp not in (None, _fingerprint(config, tokenizer)):
        raise ValueError(
            f"{folder}: config.json or merges.json is not of these "
            "weights; a save was cut short or a file changed: save again"
        )
    model.tokenizer = tokenizer
    return model.to(device).eval(), preprocess(config.image_resolution)


def resize(model: CLIP, image_resolution: int) -> CLIP:
    """A copy of model that reads pictures of another size.

    Its positions are interpolated, all other weights are the same; it
    wants `preprocess(image_resolution)`, and some training to be good.

    Raises: ValueError for a size that patches or halvings do not divide.
    Source: Radford et al. 2021, section 2.5; open_clip's resize_pos_embed.

    Chapter: book/chapters/07_model.md
    """
    config = replace(model.config, image_resolution=image_resolution)
    with torch.device("meta"):
        other = CLIP(config)
    shapes = {n: t.shape for n, t in other.state_dict().items()}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    for name, tensor in state.items():
        if tensor.shape != shapes[name]:  # the table of positions
            grid = math.isqrt(shapes[name][0] - 1)
            state[name] = resize_positions(tensor, grid)
    other.load_state_dict(state, assign=True)
    other.tokenizer = model.tokenizer
    return other.train(model.training)
