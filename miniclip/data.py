"""Real pictures with real captions: shards, decoder, split, dataset.

Written from book/chapters/01_data.md; edit that file.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Collection, Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

UNSEEN_STYLE = "twemoji"  # Twitter's pictures are never trained on
SEEN_STYLES = ("noto", "openmoji", "fluent", "fluent-flat", "emojitwo")
STYLES = (*SEEN_STYLES, UNSEEN_STYLE)

RESTORE = (
    "get it back with 'git checkout data/emoji', build it with "
    "'python data/build_emoji.py', or install miniclip again"
)


def data_dir() -> Path:
    """The folder of emoji/ and checkpoints/, in the package or beside it.

    Raises: FileNotFoundError where there is neither.

    Chapter: book/chapters/01_data.md
    """
    package = Path(str(files("miniclip")))
    for folder in package / "_data", package.parent / "data":
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{folder} is missing; {RESTORE}")


def read_manifest() -> dict:
    """What data/emoji/ holds: its shards with their sha256, and styles.

    Raises: FileNotFoundError.

    Chapter: book/chapters/01_data.md
    """
    path = data_dir() / "emoji" / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {RESTORE}")
    return json.loads(path.read_text(encoding="utf-8"))


def check_shard(path: Path, sha256: str | None = None) -> None:
    """Raise an error that says what to do if a shard is not as it was.

    Raises: FileNotFoundError; ValueError if the file has another sha256.

    Chapter: book/chapters/01_data.md
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {RESTORE}")
    if sha256 is None:
        return
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    if found.hexdigest() != sha256:
        raise ValueError(
            f"{path} is damaged or cut short: its {path.stat().st_size:,} "
            f"bytes have sha256 {found.hexdigest()[:12]}..., expected "
            f"{sha256[:12]}...; {RESTORE}"
        )


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Walk through a tar: (key, {ending: content}) for each key."""
    key, sample = None, {}
    with path.open("rb") as file, tarfile.open(None, "r:", file) as tar:
        for member in tar:
            if not member.isfile():
                continue
            folder, _, name = member.name.rpartition("/")
            name, _, ending = name.partition(".")
            if f"{folder}/{name}" != key:
                if sample:
                    yield key.lstrip("/"), sample
                key, sample = f"{folder}/{name}", {}
            sample[ending.lower()] = tar.extractfile(member).read()
        file.seek(tar.offset)
        if file.read(512) != bytes(512):  # tarfile stops without a word
            raise tarfile.ReadError("it does not end like a tar archive")
    if sample:
        yield key.lstrip("/"), sample


PICTURES = ("webp", "png", "jpg", "jpeg", "gif", "bmp", "tif", "tiff")


def _pair(key: str, sample: dict[str, bytes]) -> tuple[dict, bytes]:
    """The record and the picture of a key, which must have one of each."""
    pictures = [ending for ending in sample if ending in PICTURES]
    if "json" not in sample or len(pictures) != 1:
        raise ValueError(
            f"key {key!r} has the files {sorted(sample)}, expected one "
            ".json and one picture"
        )
    try:
        record = json.loads(sample["json"])
    except ValueError as error:
        raise ValueError(
            f"key {key!r} has no valid .json: {error}"
        ) from None
    return {**record, "key": key}, sample[pictures[0]]


def read_shard(
    path: Path | str, sha256: str | None = None
) -> Iterator[tuple[dict, bytes]]:
    """Stream the pairs of a WebDataset tar (not compressed).

    Args:
        sha256: if given, the whole file is checked before the first pair.

    Yields: (record, picture): what the .json says, with the pair's key
        added as record["key"]; the bytes of the picture, not decoded.

    Raises: FileNotFoundError; ValueError for a damaged or truncated file,
        or a key that has not one record and one picture.

    Chapter: book/chapters/01_data.md
    """
    path = Path(path)
    check_shard(path, sha256)
    try:
        for key, sample in _samples(path):
            yield _pair(key, sample)
    except (tarfile.ReadError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: {error}; {RESTORE}"
        ) from error


def _on_white(image: Image.Image) -> Image.Image:
    """Lay a picture with transparent parts on white."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey values of 16 bits, 0 to 65,535, to bytes."""
    if image.mode in ("I", "F") and image.format != "PNG":
        raise ValueError(
            f"mode {image.mode} has no agreed white; save 8 or 16 bits"
        )
    values = np.asarray(image).astype(np.float64)
    values[values == image.info.get("transparency")] = 65535  # on white
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


MAX_PIXELS = 1 << 26  # 67 million, 200 MB once decoded


def _open(picture: bytes) -> Image.Image:
    """Open a file, look at its size, then decode and turn it upright."""
    try:
        image = Image.open(io.BytesIO(picture))
    except UnidentifiedImageError:
        raise ValueError(f"no picture begins with {picture[:16]}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{width:,} x {height:,} pixels are more than {MAX_PIXELS:,}, "
            "and a small file can fill the memory; make it smaller"
        )
    ImageOps.exif_transpose(image, in_place=True)
    return image


def decode(picture: bytes, key: str = "picture") -> Tensor:
    """Decode a picture file of any common kind.

    Transparent parts become white, 16-bit grey is scaled, EXIF rotation is
    applied; of an animation the first frame is taken.

    Args:
        key: what to call the picture in an error.

    Returns: (3, H, W) uint8, red, green, blue.

    Raises: ValueError naming the key, if it cannot be decoded or has more
        than MAX_PIXELS pixels.

    Chapter: book/chapters/01_data.md
    """
    try:
        image = _open(picture)
        if image.mode.startswith(("I", "F")):
            image = _to_8_bits(image)
        elif "transparency" in image.info or image.mode[-1] in "Aa":
            image = _on_white(image)
        return TF.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # decoders raise errors of every kind
        raise ValueError(f"{key!r} cannot be decoded: {error}") from error


def split_of(concept: str) -> str:
    """Where a concept belongs: "train", "val" or "test".

    A function of the name alone (its sha256): one name in ten is "test",
    one in twenty "val", the rest "train".

    Chapter: book/chapters/01_data.md
    """
    h = int(hashlib.sha256(concept.encode()).hexdigest(), 16)
    return "test" if h % 10 == 0 else "val" if h % 20 == 1 else "train"


def read_emoji(
    styles: Collection[str] = STYLES, skin_tones: bool = False
) -> Iterator[tuple[dict, bytes]]:
    """Stream the emoji pairs of some styles; no other file is touched.

    Yields: (record, picture) as `read_shard` does, with record["split"]:
        that of the concept if it is drawn in every style, else "train".

    Chapter: book/chapters/01_data.md
    """
    manifest = read_manifest()
    in_every_style = set(manifest["in_every_style"])
    for shard in manifest["shards"]:
        if shard["style"] not in styles:
            continue
        if shard["skin_tones"] and not skin_tones:
            continue
        path = data_dir() / "emoji" / shard["file"]
        for record, picture in read_shard(path, shard["sha256"]):
            whole = record["concept"] in in_every_style
            record["split"] = (
                split_of(record["concept"]) if whole else "train"
            )
            yield record, picture


def make_caption(record: dict, captions: str = "name") -> str:
    """Write the caption of a record.

    Args:
        captions: "name"; "keywords" for the name and the keywords after
            it; or a template such as "a drawing of {}", where {} is the
            name and {group}, {style}, {caption_ko} are what they say.

    Raises: ValueError for anything else.

    Chapter: book/chapters/01_data.md
    """
    if captions == "name":
        return record["caption"]
    if captions == "keywords":
        return ", ".join([record["caption"], *record["keywords"]])
    fields = {k: v for k, v in record.items() if isinstance(v, str)}
    try:
        caption = captions.format(record["caption"], **fields)
    except (KeyError, IndexError, ValueError):
        caption = captions
    if caption == captions:
        raise ValueError(
            f"{captions=} is neither 'name' nor 'keywords', nor a template "
            f"with {{}} for the name, or {{x}} with x in {sorted(fields)}"
        )
    return caption


def _load(styles, split, skin_tones, concepts) -> tuple[list[dict], Tensor]:
    """Read and decode what is asked for: N records, (N, 3, H, W) uint8."""
    if split not in (None, "train", "val", "test"):
        raise ValueError(
            f"split={split!r}, expected train, val, test or None"
        )
    if isinstance(styles, str) or not set(styles) <= set(STYLES):
        raise ValueError(f"styles={styles!r}, expected some of {STYLES}")
    records, images = [], []
    for record, picture in read_emoji(styles, skin_tones):
        if split not in (None, record["split"]):
            continue
        if concepts is not None and record["concept"] not in concepts:
            continue
        records.append(record)
        images.append(decode(picture, f"{record['style']}/{record['key']}"))
    if not images:
        raise ValueError(
            f"no picture with {styles=}, {split=} and these concepts; "
            "read_manifest() lists those that are in every style"
        )
    return records, torch.stack(images)


class EmojiDataset(Dataset):
    """Emoji pictures and captions in memory; item i is (image, caption).

    Args:
        styles, skin_tones: which drawings, see `read_emoji`.
        split: "train", "val", "test", or None for all three.
        captions: "name", "keywords" or a template, see `make_caption`.
        transform: from torchvision.transforms.v2, applied to an image.
        concepts: only these, if given.

    Attributes: images, (N, 3, 64, 64) uint8; records, N dicts.
    Raises: ValueError for a choice that does not exist or leaves nothing.

    Chapter: book/chapters/01_data.md
    """

    def __init__(
        self,
        styles: Collection[str] = SEEN_STYLES,
        split: str | None = None,
        captions: str = "name",
        transform: Callable | None = None,
        skin_tones: bool = False,
        concepts: Collection[str] | None = None,
    ):
        wanted = styles, split, skin_tones, concepts
        self.records, self.images = _load(*wanted)
        self.captions, self.transform = captions, transform
        self.caption(0)  # a wrong template shows now, not in an hour

    def __len__(self) -> int:
        return len(self.records)

    def caption(self, i: int) -> str:
        """The caption of item i, as `captions` asks for."""
        return make_caption(self.records[i], self.captions)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        image = self.images[i]
        image = self.transform(image) if self.transform else image
        return image, self.caption(i)
