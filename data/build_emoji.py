"""Build data/emoji/: python data/build_emoji.py [--cache DIR]

Six openly licensed emoji families (Iconify's npm packages) are joined with
Unicode's names and keywords (emojibase). Each picture becomes a 64 x 64
lossless WebP on white and a JSON record, side by side in a WebDataset tar.
The result is the same, byte for byte, whenever it is run with the versions
named here.

Needs npm, and `pip install "miniclip[dev]"` for resvg_py, Pillow and tqdm.
Takes about two minutes. What is written stands in data/emoji/manifest.json,
with its sha256.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from pathlib import Path

import resvg_py
from PIL import Image
from tqdm import tqdm

SIZE = 64  # pixels
EMOJIBASE = "emojibase-data@17.0.0"
STYLES = {  # style -> npm package, maker, licence
    "noto": ("@iconify-json/noto@1.2.9", "Google Noto", "Apache-2.0"),
    "openmoji": (
        "@iconify-json/openmoji@1.2.29",
        "OpenMoji",
        "CC-BY-SA-4.0",
    ),
    "fluent": (
        "@iconify-json/fluent-emoji@1.2.7",
        "Microsoft, 3D look",
        "MIT",
    ),
    "fluent-flat": (
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "Microsoft, flat",
        "MIT",
    ),
    "emojitwo": ("@iconify-json/emojione@1.2.3", "EmojiTwo", "CC-BY-4.0"),
    "twemoji": ("@iconify-json/twemoji@1.2.5", "Twitter", "CC-BY-4.0"),
}


def unpack(package: str, cache: Path) -> Path:
    """The folder of an npm package, fetched into cache if need be."""
    folder = cache / re.sub(r"[@/]+", "-", package).strip("-")
    if not folder.exists():
        print(f"fetching {package} with npm")
        done = subprocess.run(
            ["npm", "pack", "--silent", package],
            cwd=cache,
            check=True,
            capture_output=True,
            text=True,
        )
        with tarfile.open(cache / done.stdout.split()[-1]) as tar:
            tar.extractall(folder, filter="data")
    return folder / "package"


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def slug(name: str) -> str:
    """'flag: Côte d’Ivoire' -> 'flag-cote-divoire', as in Iconify."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore")
    return re.sub(r"[^a-z0-9]+", "-", plain.decode().lower()).strip("-")


def unicode_records(folder: Path) -> dict[str, dict]:
    """slug -> what Unicode says about that emoji, skin tones included."""
    meta = read_json(folder / "meta/groups.json")
    groups, subgroups = meta["groups"], meta["subgroups"]
    korean = {}
    for entry in read_json(folder / "ko/data.json"):
        for e in [entry, *entry.get("skins", [])]:
            korean[e["hexcode"]] = e
    records = {}
    for entry in read_json(folder / "en/data.json"):
        ko = korean[entry["hexcode"]]
        for e in [entry, *entry.get("skins", [])]:
            tone = e.get("tone", [])
            records[slug(e["label"])] = {
                "concept": entry["label"],
                "caption": e["label"],
                "keywords": entry.get("tags", []),
                "caption_ko": korean[e["hexcode"]]["label"],
                "keywords_ko": ko.get("tags", []),
                "group": groups.get(str(entry.get("group")), ""),
                "subgroup": subgroups.get(str(entry.get("subgroup")), ""),
                "code_points": e["hexcode"],
                "skin_tones": tone if isinstance(tone, list) else [tone],
            }
    return records


def render(icons: dict, name: str) -> bytes:
    """One icon as a 64 x 64 lossless WebP on white."""
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=SIZE, height=SIZE, background="white"
    )
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    square = Image.new("RGB", (SIZE, SIZE), "white")  # for icons not square
    w, h = drawn.size
    square.paste(drawn, ((SIZE - w) // 2, (SIZE - h) // 2))
    out = io.BytesIO()
    square.save(out, "WEBP", lossless=True, quality=80, method=4)
    return out.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a file; its header is the same in every run."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def build_style(
    style: str, records: dict, folder: Path, out: Path
) -> list[dict]:
    """Write a style's shards (plain, and tones); return their entries."""
    icons = read_json(folder / "icons.json")
    names = sorted(n for n in icons["icons"] if n in records)
    entries = []
    for suffix, wanted in ("", False), ("-tones", True):
        chosen = [n for n in names if ("skin-tone" in n) == wanted]
        if not chosen:
            continue
        path = out / f"{style}{suffix}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name in tqdm(chosen, desc=path.name, mininterval=1):
                record = {"style": style, **records[name]}
                text = json.dumps(
                    record, ensure_ascii=False, separators=(",", ":")
                )
                add(tar, f"{name}.json", text.encode())
                add(tar, f"{name}.webp", render(icons, name))
        entries.append(
            {
                "file": path.name,
                "style": style,
                "skin_tones": wanted,
                "pictures": len(chosen),
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        )
    return entries


def in_every_style(out: Path, shards: list[dict]) -> list[str]:
    """The concepts that each style draws, skin tones left aside."""
    drawn = []
    for shard in shards:
        if not shard["skin_tones"]:
            with tarfile.open(out / shard["file"]) as tar:
                drawn.append(
                    {
                        json.load(tar.extractfile(member))["concept"]
                        for member in tar
                        if member.name.endswith(".json")
                    }
                )
    return sorted(set.intersection(*drawn))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cache", type=Path, help="keep the npm packages here"
    )
    cache = parser.parse_args().cache
    out = Path(__file__).parent / "emoji"
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        cache = cache or Path(temporary)
        cache.mkdir(exist_ok=True, parents=True)
        records = unicode_records(unpack(EMOJIBASE, cache))
        shards = []
        for style, (package, _, _) in STYLES.items():
            shards += build_style(
                style, records, unpack(package, cache), out
            )
    manifest = {
        "built_by": "data/build_emoji.py",
        "names": EMOJIBASE,
        "styles": {
            style: dict(zip(("package", "maker", "licence"), source))
            for style, source in STYLES.items()
        },
        "shards": shards,
        "in_every_style": in_every_style(out, shards),
    }
    text = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
    (out / "manifest.json").write_text(text, encoding="utf-8", newline="\n")
    print(f"{sum(s['pictures'] for s in shards):,} pictures in {out}")


if __name__ == "__main__":
    main()
