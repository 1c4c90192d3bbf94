"""The data: what ships, what is refused, what is trained on."""

import hashlib
import io
import json
import shutil
import struct
import tarfile
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from miniclip import data
from miniclip.data import (
    SEEN_STYLES,
    STYLES,
    UNSEEN_STYLE,
    EmojiDataset,
    data_dir,
    decode,
    make_caption,
    read_emoji,
    read_manifest,
    read_shard,
    split_of,
)

ROOT = Path(__file__).parents[1]
MANIFEST = read_manifest()


@pytest.fixture(scope="module")
def pairs() -> list[tuple[dict, bytes]]:
    return list(read_emoji(skin_tones=True))


# What ships


def test_every_shard_is_as_the_manifest_says(pairs):
    read = Counter((r["style"], "skin-tone" in r["key"]) for r, _ in pairs)
    for shard in MANIFEST["shards"]:
        content = (data_dir() / "emoji" / shard["file"]).read_bytes()
        assert len(content) == shard["bytes"]
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        key = shard["style"], shard["skin_tones"]
        assert read.pop(key) == shard["pictures"]
    on_disk = {p.name for p in (data_dir() / "emoji").glob("*.tar")}
    assert on_disk == {s["file"] for s in MANIFEST["shards"]} and not read


def test_counts(pairs):
    plain = [r for r, _ in pairs if "skin-tone" not in r["key"]]
    assert len(plain) == 9_659 and len(pairs) == 9_659 + 6_335
    assert len({r["concept"] for r in plain}) == 1_928
    assert sum(1 for r in plain if r["keywords"]) == 9_659 - 26
    assert set(MANIFEST["styles"]) == set(STYLES)
    assert UNSEEN_STYLE not in SEEN_STYLES and len(set(STYLES)) == 6


def test_the_manifest_lists_what_is_drawn_in_every_style(pairs):
    drawn = {style: set() for style in STYLES}
    for r, _ in pairs:
        if "skin-tone" not in r["key"]:
            drawn[r["style"]].add(r["concept"])
    everywhere = MANIFEST["in_every_style"]
    assert everywhere == sorted(set.intersection(*drawn.values()))
    assert len(everywhere) == 1_033


def test_every_record_is_whole(pairs):
    texts = "style concept caption caption_ko group subgroup code_points"
    for r, _ in pairs:
        assert all(isinstance(r[field], str) for field in texts.split())
        assert r["caption"] and r["concept"] and r["caption_ko"]
        assert all(isinstance(k, str) for k in r["keywords"])
        assert r["caption"].startswith(r["concept"]) or r["skin_tones"]
        assert all(chr(int(p, 16)) for p in r["code_points"].split("-"))


def test_pictures_are_64_by_64_and_no_two_names_are_the_same(pairs):
    for _, picture in pairs[::97]:
        assert decode(picture).shape == (3, 64, 64)
    keys = [(r["style"], r["key"]) for r, _ in pairs]
    assert len(keys) == len(set(keys))


def test_readme_names_each_package_licence_and_count():
    readme = (ROOT / "data/README.md").read_text(encoding="utf-8")
    for style, about in MANIFEST["styles"].items():
        counts = [
            f"{s['pictures']:,}"
            for s in MANIFEST["shards"]
            if s["style"] == style
        ]
        row = next(x for x in readme.splitlines() if f"`{style}`" in x)
        for word in (about["package"], about["licence"], *counts):
            assert word in row, (style, word)
    assert MANIFEST["names"] in readme


# The split


def test_split_is_the_sha256_of_the_name_and_never_changes():
    for concept in "fox", "pizza", "person bowing", "côte d’ivoire", "":
        h = int(hashlib.sha256(concept.encode()).hexdigest(), 16)
        expected = {0: "test"}.get(h % 10) or {1: "val"}.get(h % 20)
        assert split_of(concept) == (expected or "train")
    assert split_of("pizza") == split_of("banana") == "test"
    assert split_of("rocket") == "train"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=8), min_size=1, unique=True), st.text())
def test_new_names_move_no_old_one(names, new):
    before = {c: split_of(c) for c in names}
    after = {c: split_of(c) for c in sorted([*names, new])}
    assert {c: after[c] for c in names} == before


def test_one_in_ten_is_held_out_and_one_in_twenty_is_for_choosing():
    n = 20_000
    count = Counter(split_of(f"concept {i}") for i in range(n))
    assert abs(count["test"] / n - 0.10) < 0.01
    assert abs(count["val"] / n - 0.05) < 0.01
    held_out = [
        c for c in MANIFEST["in_every_style"] if split_of(c) == "test"
    ]
    assert len(held_out) == 94
    chosen = [c for c in MANIFEST["in_every_style"] if split_of(c) == "val"]
    assert len(chosen) == 47


def test_a_concept_is_in_one_split_in_all_styles_and_skin_tones(pairs):
    splits = {}
    for r, _ in pairs:
        splits.setdefault(r["concept"], set()).add(r["split"])
    assert all(len(s) == 1 for s in splits.values())
    everywhere = set(MANIFEST["in_every_style"])
    for concept, (split,) in splits.items():
        expected = split_of(concept) if concept in everywhere else "train"
        assert split == expected, concept


def test_a_held_out_person_is_held_out_in_every_skin_tone(pairs):
    bowing = [r for r, _ in pairs if r["concept"] == "person bowing"]
    assert {r["split"] for r in bowing} == {"test"}
    assert {tuple(r["skin_tones"]) for r in bowing} == {
        (),
        *((i,) for i in range(1, 6)),
    }


def test_the_split_is_the_same_when_one_style_is_read(pairs):
    splits = {(r["concept"], r["style"]): r["split"] for r, _ in pairs}
    for r, _ in read_emoji(["emojitwo"]):
        assert r["split"] == splits[r["concept"], "emojitwo"]


def test_the_unseen_style_shows_no_concept_that_nobody_else_has_drawn(
    pairs,
):
    seen = {r["concept"] for r, _ in pairs if r["style"] in SEEN_STYLES}
    assert {r["concept"] for r, _ in pairs} == seen


# Bad pictures


def as_file(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def pixels(x: torch.Tensor) -> list:
    """(3, 1, W) -> W triples."""
    return x[:, 0].T.tolist()


def two(mode: str, a, b) -> Image.Image:
    image = Image.new(mode, (2, 1), a)
    image.putpixel((1, 0), b)
    return image


WHITE = [255, 255, 255]
HALF_RED = [255, 127, 127]


@pytest.mark.parametrize(
    "image, expected",
    [
        (two("RGB", (1, 2, 3), (255, 0, 9)), [[1, 2, 3], [255, 0, 9]]),
        (two("RGBA", (0, 0, 0, 0), (255, 0, 0, 128)), [WHITE, HALF_RED]),
        (two("RGBA", (9, 8, 7, 255), (0, 0, 0, 0)), [[9, 8, 7], WHITE]),
        (two("LA", (0, 0), (7, 255)), [WHITE, [7, 7, 7]]),
        (two("L", 0, 200), [[0, 0, 0], [200, 200, 200]]),
        (two("1", 0, 1), [[0, 0, 0], WHITE]),
    ],
    ids=["RGB", "RGBA", "RGBA opaque", "LA", "L", "1"],
)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_modes_become_rgb_on_white(image, expected, format):
    if format == "WEBP" and image.mode in ("L", "LA", "1"):
        pytest.skip("WebP has no grey")
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    found = decode(as_file(image, format, **options))
    assert found.dtype == torch.uint8 and found.shape == (3, 1, 2)
    assert pixels(found) == expected


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    return image


def test_palettes_with_and_without_a_transparent_entry():
    found = decode(as_file(palette()))
    assert pixels(found) == [[255, 0, 0], [0, 255, 0]]
    for format in "PNG", "GIF":
        found = decode(as_file(palette(), format, transparency=0))
        assert pixels(found) == [WHITE, [0, 255, 0]]
    several = bytes([128, 255])  # an alpha for each entry
    found = decode(as_file(palette(), transparency=several))
    assert pixels(found) == [HALF_RED, [0, 255, 0]]


def test_one_colour_may_be_transparent_in_png():
    found = decode(
        as_file(two("RGB", (1, 2, 3), (4, 5, 6)), transparency=(1, 2, 3))
    )
    assert pixels(found) == [WHITE, [4, 5, 6]]
    found = decode(as_file(two("L", 7, 8), transparency=7))
    assert pixels(found) == [WHITE, [8, 8, 8]]


def sixteen() -> Image.Image:
    return Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(format):
    found = decode(as_file(sixteen(), format))
    assert found[0, 0].tolist() == [0, 1, 128, 255]
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


def test_16_bits_with_a_transparent_grey():
    found = decode(as_file(sixteen(), transparency=257))
    assert found[0, 0].tolist() == [0, 255, 128, 255]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=20))
def test_16_bits_keep_their_order_and_ends(values):
    image = Image.fromarray(np.array([values], np.uint16))
    found = decode(as_file(image))[0, 0].tolist()
    assert found == [round(v / 257) for v in values]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_32_bits_are_refused(kind):
    image = Image.fromarray(np.zeros((1, 2), kind))
    with pytest.raises(ValueError, match="'x-ray' .* no agreed white"):
        decode(as_file(image, "TIFF"), "x-ray")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation(orientation, format):
    """What a camera stores comes back as what it saw."""
    seen = np.zeros((16, 32, 3), np.uint8)
    seen[:8, :8] = 255  # a white corner, top left
    store = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(store(seen)))
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}
    found = decode(
        as_file(image, format, exif=exif, **options.get(format, {}))
    )
    assert found.shape == (3, 16, 32)
    off = (found.int() - torch.tensor(seen).permute(2, 0, 1)).abs().max()
    assert off <= 8  # JPEG; a wrong turn is off by 255


def test_rotation_also_of_16_bit_and_transparent_pictures():
    exif = Image.Exif()
    exif[0x0112] = 6
    found = decode(as_file(sixteen(), "PNG", exif=exif))
    assert found.shape == (3, 4, 1)
    assert found[0, :, 0].tolist() == [0, 1, 128, 255]
    image = two("RGBA", (0, 0, 0, 0), (1, 2, 3, 255))
    found = decode(as_file(image, exif=exif))
    assert found[:, :, 0].T.tolist() == [WHITE, [1, 2, 3]]


def test_cmyk():
    cyan = as_file(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG")
    found = decode(cyan).float().mean(dim=(1, 2))
    assert found[0] < 10 and found[1] > 245 and found[2] > 245


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (2, 2), c) for c in ("red", "blue")]
    for format in "GIF", "WEBP":
        file = as_file(
            frames[0], format, save_all=True, append_images=frames[1:]
        )
        found = decode(file).float().mean(dim=(1, 2))
        assert found[0] > 245 and found[2] < 10


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"<html>404</html>", b"RIFF\0\0\0\0WEBPVP8L", b"\x89PNG"],
)
def test_what_is_no_picture_is_reported_with_its_key(content):
    with pytest.raises(ValueError, match="'noto/fox' cannot be decoded"):
        decode(content, "noto/fox")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_picture_cut_anywhere_never_comes_back_as_another(example):
    whole = as_file(Image.effect_mandelbrot((16, 16), (-2, -1, 1, 1), 9))
    cut = example.draw(st.integers(0, len(whole) - 1))
    expected = decode(whole)
    try:
        found = decode(whole[:cut], "a")
    except ValueError as error:
        assert str(error).startswith("'a' cannot be decoded: ")
    else:  # only the end mark was cut off
        assert torch.equal(found, expected)


def giant(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with nothing inside."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = (
        chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8193, 10_000, 100_000])
def test_decompression_bombs_are_refused(side):
    with pytest.raises(
        ValueError, match=r"'bomb' cannot.*(more than|exceeds)"
    ):
        decode(giant(side, side), "bomb")


# Shards


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def record(caption: str) -> bytes:
    return json.dumps({"caption": caption}).encode()


ENDINGS = st.permutations(["json", "jpg", "cls", "txt"])


@settings(max_examples=20, deadline=None)
@given(st.lists(ENDINGS, max_size=5))
def test_pairs_come_together_in_any_order(tmp_path_factory, orders):
    members = []
    for i, order in enumerate(orders):
        contents = {"json": record(f"this is {i}"), "jpg": b"%d" % i}
        members += [(f"{i}.{e}", contents.get(e, b"?")) for e in order]
    path = write_tar(tmp_path_factory.mktemp("shard") / "a.tar", members)
    assert list(read_shard(path)) == [
        ({"key": str(i), "caption": f"this is {i}"}, b"%d" % i)
        for i in range(len(orders))
    ]


def test_keys_end_at_the_first_point_and_keep_their_folder(tmp_path):
    members = [("x.y/a.webp", b"1"), ("x.y/a.json", record("one"))]
    members += [("z/a.JSON", record("two")), ("z/a.PNG", b"2")]
    path = write_tar(tmp_path / "a.tar", members)
    assert [(r["key"], b) for r, b in read_shard(path)] == [
        ("x.y/a", b"1"),
        ("z/a", b"2"),
    ]


@pytest.mark.parametrize(
    "members",
    [
        [("a.json", record("a"))],
        [("a.webp", b"a")],
        [("a.webp", b"a"), ("a.png", b"a"), ("a.json", record("a"))],
        [("a.seg.webp", b"a"), ("a.json", record("a"))],
        [("a.webp", b"a"), ("a.json", b"{")],
        [("a.webp", b"a"), ("a.json", b'{"caption": "\xff"}')],
    ],
    ids="picture record one ending json utf-8".split(),
)
def test_half_a_pair_is_reported_with_its_key(tmp_path, members):
    ok = [("ok.webp", b"ok"), ("ok.json", record("ok"))]
    path = write_tar(tmp_path / "half.tar", ok + members)
    reader = read_shard(path)
    assert next(reader)[1] == b"ok"
    with pytest.raises(
        ValueError, match=r"half\.tar.* key 'a' has .*(expected|valid)"
    ):
        next(reader)


def small_shard(folder: Path) -> Path:
    """The first 20 pairs of a real one."""
    full = islice(read_shard(data_dir() / "emoji" / "emojitwo.tar"), 20)
    members = []
    for r, b in full:
        members += [(f"{r['key']}.json", json.dumps(r).encode())]
        members += [(f"{r['key']}.webp", b)]
    return write_tar(folder / "small.tar", members)


RESTORE = r"git checkout data/emoji.*data/build_emoji\.py.*install miniclip"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_shard_cut_anywhere_is_reported(tmp_path_factory, example):
    folder = tmp_path_factory.mktemp("cut")
    whole = small_shard(folder).read_bytes()
    with tarfile.open(folder / "small.tar") as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    headers = st.sampled_from(range(0, end, 512))
    at = example.draw(st.one_of(headers, st.integers(0, end - 1)))
    (folder / "small.tar").write_bytes(whole[:at])
    sha256 = hashlib.sha256(whole).hexdigest()
    for check in None, sha256:
        with pytest.raises(
            ValueError, match="small.tar is damaged.*" + RESTORE
        ):
            list(read_shard(folder / "small.tar", check))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_one_wrong_bit_is_reported_before_the_first_pair(
    tmp_path_factory, example
):
    path = small_shard(tmp_path_factory.mktemp("bit"))
    content = bytearray(path.read_bytes())
    sha256 = hashlib.sha256(content).hexdigest()
    assert len(list(read_shard(path, sha256))) == 20
    at = example.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << example.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match="small.tar is damaged.*" + RESTORE
    ):
        next(read_shard(path, sha256))


def test_a_missing_shard_is_reported(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="gone.tar is missing.*" + RESTORE
    ):
        next(read_shard(tmp_path / "gone.tar"))


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 99])
def test_what_is_no_tar_is_reported(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match="a.tar is damaged"):
        list(read_shard(tmp_path / "a.tar"))


def test_a_path_may_be_a_string(tmp_path):
    path = write_tar(
        tmp_path / "a.tar", [("a.json", b"{}"), ("a.webp", b"")]
    )
    assert list(read_shard(str(path))) == [({"key": "a"}, b"")]


# Installed and not


def test_an_installed_package_reads_its_own_data(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "miniclip"
    emoji = package / "_data" / "emoji"
    emoji.mkdir(parents=True)
    (tmp_path / "site-packages" / "data").mkdir()  # somebody else's
    for name in "manifest.json", "emojitwo.tar":
        shutil.copy(data_dir() / "emoji" / name, emoji)
    monkeypatch.setattr(
        data, "files", lambda name: tmp_path / "site-packages" / name
    )
    assert data_dir() == package / "_data"
    assert len(EmojiDataset(["emojitwo"], split="test")) == 94
    with pytest.raises(FileNotFoundError, match="noto.tar is missing"):
        EmojiDataset(["noto"])
    (emoji / "manifest.json").unlink()
    with pytest.raises(
        FileNotFoundError, match="manifest.json.*" + RESTORE
    ):
        EmojiDataset(["emojitwo"])
    shutil.rmtree(package)
    shutil.rmtree(tmp_path / "site-packages" / "data")
    with pytest.raises(FileNotFoundError, match=RESTORE):
        data_dir()


def test_an_altered_shard_stops_the_dataset(tmp_path, monkeypatch):
    emoji = tmp_path / "data" / "emoji"
    emoji.mkdir(parents=True)
    for name in "manifest.json", "emojitwo.tar":
        shutil.copy(data_dir() / "emoji" / name, emoji)
    monkeypatch.setattr(data, "files", lambda name: tmp_path / name)
    content = bytearray((emoji / "emojitwo.tar").read_bytes())
    content[-1] ^= 1
    (emoji / "emojitwo.tar").write_bytes(content)
    with pytest.raises(ValueError, match="emojitwo.tar is damaged"):
        EmojiDataset(["emojitwo"])


def test_only_the_shards_that_are_asked_for_are_read(monkeypatch):
    opened = []

    def spy(path, sha256=None):
        opened.append(path.name)
        return read_shard(path, sha256)

    monkeypatch.setattr(data, "read_shard", spy)
    list(read_emoji(["emojitwo"]))
    assert opened == ["emojitwo.tar"]
    list(read_emoji(["emojitwo"], skin_tones=True))
    assert opened[1:] == ["emojitwo.tar", "emojitwo-tones.tar"]


def test_an_undecodable_picture_is_reported_by_style_and_key(monkeypatch):
    def broken(path, sha256=None):
        for i, (r, b) in enumerate(read_shard(path, sha256)):
            yield r, b if i != 7 else b[:30]

    monkeypatch.setattr(data, "read_shard", broken)
    with pytest.raises(
        ValueError, match=r"'emojitwo/[a-z-]+' cannot be decoded"
    ):
        EmojiDataset(["emojitwo"])


# Captions


APPLE = {
    "caption": "red apple",
    "concept": "red apple",
    "keywords": ["apple", "fruit"],
    "caption_ko": "빨간 사과",
    "style": "noto",
}


@pytest.mark.parametrize(
    "captions, expected",
    [
        ("name", "red apple"),
        ("keywords", "red apple, apple, fruit"),
        ("a photo of a {}.", "a photo of a red apple."),
        ("{caption_ko}", "빨간 사과"),
        ("{} as drawn by {style}", "red apple as drawn by noto"),
    ],
)
def test_captions(captions, expected):
    assert make_caption(APPLE, captions) == expected


def test_a_name_without_keywords_stands_alone():
    assert (
        make_caption({**APPLE, "keywords": []}, "keywords") == "red apple"
    )


@pytest.mark.parametrize(
    "captions",
    ["nmae", "", "a photo", "{", "{} {}", "{nobody}", "{keywords}"],
)
def test_other_captions_are_refused(captions):
    with pytest.raises(ValueError, match="neither 'name' nor 'keywords'"):
        make_caption(APPLE, captions)
    with pytest.raises(ValueError, match="neither 'name' nor 'keywords'"):
        EmojiDataset(["emojitwo"], "test", captions=captions)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_characters="{}")), st.text())
def test_a_template_keeps_any_name_as_it_is(around, name):
    caption = make_caption({**APPLE, "caption": name}, around + "{}")
    assert caption == around + name or (not around and name == "{}")


# The dataset


@pytest.fixture(scope="module")
def held_out() -> EmojiDataset:
    return EmojiDataset(split="test")


def test_records_and_images_belong_together(held_out, pairs):
    assert len(held_out) == len(held_out.records) == 5 * 94
    assert held_out.images.shape == (5 * 94, 3, 64, 64)
    assert held_out.images.dtype == torch.uint8
    by_key = {(r["style"], r["key"]): b for r, b in pairs}
    for i in range(0, len(held_out), 31):
        r = held_out.records[i]
        picture = decode(by_key[r["style"], r["key"]])
        assert torch.equal(held_out.images[i], picture)
        image, caption = held_out[i]
        assert torch.equal(image, picture) and caption == r["caption"]
        assert held_out.caption(i) == caption


def test_a_known_picture_looks_as_it_should():
    (apple,) = EmojiDataset(["twemoji"], concepts={"red apple"}).images
    red, green, _ = apple[:, 40, 32].tolist()
    assert red > 150 and green < 100
    assert apple[:, 0, 0].tolist() == [255, 255, 255]


def test_splits_make_up_the_whole():
    parts = [
        EmojiDataset(["emojitwo"], s, skin_tones=True)
        for s in ("train", "val", "test")
    ]
    whole = EmojiDataset(["emojitwo"], skin_tones=True)
    assert sum(map(len, parts)) == len(whole) == 1_061 + 410
    for part, split in zip(parts, ("train", "val", "test")):
        assert {r["split"] for r in part.records} == {split}
    names = [{r["concept"] for r in part.records} for part in parts]
    assert not names[0] & names[1] and not names[0] & names[2]


def test_styles_concepts_and_skin_tones_are_chosen():
    dataset = EmojiDataset(
        ["noto", "fluent"], concepts=["fox", "thumbs up"]
    )
    assert Counter((r["style"], r["concept"]) for r in dataset.records) == {
        (style, concept): 1
        for style in ("noto", "fluent")
        for concept in ("fox", "thumbs up")
    }
    toned = EmojiDataset(["noto"], concepts=["thumbs up"], skin_tones=True)
    assert len(toned) == 6
    assert {r["caption"].partition(": ")[0] for r in toned.records} == {
        "thumbs up"
    }


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"styles": ["apple"]}, "styles=.*expected some of"),
        ({"styles": "twemoji"}, "styles='twemoji', expected"),
        ({"styles": []}, "no picture"),
        ({"split": "dev"}, "split='dev', expected"),
        ({"styles": ["emojitwo"], "concepts": ["no such"]}, "no picture"),
    ],
)
def test_choices_that_do_not_exist_are_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        EmojiDataset(**choice)


def test_batches(held_out):
    loader = DataLoader(held_out, batch_size=32)
    batches = list(loader)
    assert [len(c) for _, c in batches] == [32] * 14 + [22]
    images = torch.cat([x for x, _ in batches])
    assert torch.equal(images, held_out.images)
    captions = [c for _, batch in batches for c in batch]
    assert captions == [r["caption"] for r in held_out.records]


def test_transforms_see_one_uint8_picture_and_do_not_change_the_data():
    seen = []

    def note(image):
        seen.append((tuple(image.shape), image.dtype))
        return image

    transform = v2.Compose(
        [
            note,
            v2.RandomHorizontalFlip(1.0),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    dataset = EmojiDataset(
        ["emojitwo"], "val", captions="a {}", transform=transform
    )
    before = dataset.images.clone()
    image, caption = dataset[3]
    assert seen == [((3, 64, 64), torch.uint8)]
    expected = before[3].flip(-1).float() / 255
    torch.testing.assert_close(image, expected)
    assert caption == "a " + dataset.records[3]["caption"]
    assert torch.equal(dataset.images, before)


def test_workers_give_the_same_batches(held_out):
    one = [c for _, c in DataLoader(held_out, batch_size=100)]
    two = [
        c for _, c in DataLoader(held_out, batch_size=100, num_workers=2)
    ]
    assert one == two
