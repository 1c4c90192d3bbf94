"""Ours beside open_clip's towers, and what each of our choices is worth.

    python tests/bench/compare.py --out data/results/comparison.json

Every row trains on the same pictures and captions (five styles, training
concepts) for the same CPU time, ten CPU-minutes by default: five minutes
on two cores. CPU time and one thread make the rows comparable on a machine
that does other things too. The rows of open_clip use its own ViT and
ModifiedResNet beside its own text tower, of about the same number of
parameters, with texts padded to 77 tokens and the plain loss (equal to its
ClipLoss, see tests/test_loss.py), in two learning rates each; they get our
pictures, captions, augmentation, optimizer and schedule. Scores are on the
unseen style. Rows that are already in the output file are not run again.
"""

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path

import open_clip
import torch

import miniclip
from miniclip.data import SEEN_STYLES, UNSEEN_STYLE, EmojiDataset
from miniclip.model import preprocess
from miniclip.train import (
    ConceptBatches,
    Recipe,
    make_batch,
    make_optimizer,
    new_model,
    train,
    train_step,
)
from miniclip.zeroshot import image_vectors, score, zeroshot_classifier

OURS = Recipe(resolution=32, last_resolution=32)
PLAIN = replace(OURS, mask=False)


def ours(data):
    """The shipped model, for pictures of 32 pixels all through."""
    return new_model(data, image_resolution=32)


def open_clip_model(data, vision: dict) -> torch.nn.Module:
    """open_clip's CLIP with a text tower of our size and our vocabulary."""
    like = ours(data)
    c = like.config
    model = open_clip.CLIP(
        embed_dim=c.embed_dim,
        vision_cfg=vision,
        text_cfg={
            "context_length": 77,
            "vocab_size": c.vocab_size,
            "width": c.transformer_width,
            "heads": c.transformer_heads,
            "layers": c.transformer_layers,
        },
        quick_gelu=True,
    )
    model.tokenizer, model.context_length = like.tokenizer, 77
    model.config = replace(c, image_resolution=vision["image_size"])
    return model


VIT = {
    "image_size": 32,
    "patch_size": 4,
    "width": 192,
    "layers": 3,
    "head_width": 64,
}
RESNET = {"image_size": 64, "width": 16, "layers": [1, 1, 2, 1]}


def vit(data):
    return open_clip_model(data, VIT)


def modified_resnet(data):
    return open_clip_model(data, RESNET)


def our_vit(data):
    """Our own ViT in the place of the ResNet."""
    return new_model(
        data,
        vision_layers=VIT["layers"],
        vision_width=VIT["width"],
        vision_patch_size=VIT["patch_size"],
        image_resolution=VIT["image_size"],
    )


NATIVE = {"resolution": 64, "last_resolution": 64}
RUNS = {  # name -> (model, recipe)
    "miniclip": (ours, OURS),
    "open_clip ViT, lr 5e-4": (vit, replace(PLAIN, learning_rate=5e-4)),
    "open_clip ViT, lr 2e-3": (vit, replace(PLAIN, learning_rate=2e-3)),
    "open_clip ModifiedResNet, lr 5e-4": (
        modified_resnet,
        replace(PLAIN, learning_rate=5e-4, **NATIVE),
    ),
    "open_clip ModifiedResNet, lr 2e-3": (
        modified_resnet,
        replace(PLAIN, learning_rate=2e-3, **NATIVE),
    ),
    "without the mask": (ours, PLAIN),
    "batches of whole concepts": (
        ours,
        replace(OURS, by_concept=True),
    ),
    "without augmentation": (ours, replace(OURS, strength=0.0)),
    "without keywords": (ours, replace(OURS, keywords=0.0)),
    "our ViT instead of the ResNet": (our_vit, OURS),
}


def steps_within(seconds: float, model, data, recipe: Recipe) -> int:
    """How many steps fit into so much CPU time, measured on five."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = make_optimizer(model, recipe)
    batches = ConceptBatches(data.records, recipe)
    for step in range(7):
        if step == 2:
            start = time.process_time()
        batch = make_batch(step, data, batches, recipe)
        train_step(model, optimizer, batch, recipe.mask)
    each = (time.process_time() - start) / 5
    model.load_state_dict(state)
    return max(10, int(seconds / each))


def scores(model, recipe: Recipe) -> dict:
    """Top-1 on the unseen style: of all its pictures; of held-out ones."""
    model.eval()
    data = EmojiDataset([UNSEEN_STYLE])
    known = {r["concept"] for r in EmojiDataset(["noto"]).records}
    names = sorted(known)
    keep = [i for i, r in enumerate(data.records) if r["concept"] in known]
    records = [data.records[i] for i in keep]
    ready = preprocess(recipe.last_resolution)
    u = image_vectors(model, ready, data.images[keep])
    v = zeroshot_classifier(model, names)
    labels = torch.tensor([names.index(r["concept"]) for r in records])
    held = [i for i, r in enumerate(records) if r["split"] == "test"]
    columns = sorted(set(labels[held].tolist()))
    among = torch.tensor([columns.index(k) for k in labels[held].tolist()])
    return {
        "all": score(u @ v.T, labels),
        "held_out": score(u[held] @ v[columns].T, among),
    }


def run(name: str, minutes: float, data) -> dict:
    """Train one row within its CPU time and score it."""
    torch.manual_seed(0)
    build, recipe = RUNS[name]
    model = build(data)
    steps = steps_within(60 * minutes, model, data, recipe)
    recipe = replace(recipe, steps=steps)
    start = time.process_time()
    train(model, data, recipe)
    spent = time.process_time() - start
    count = sum(p.numel() for p in model.parameters())
    return {
        "name": name,
        "parameters": count,
        "steps": steps,
        "cpu_minutes": round(spent / 60, 2),
        **scores(model, recipe),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu-minutes", type=float, default=10.0)
    parser.add_argument("--only", nargs="+", default=list(RUNS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = EmojiDataset(SEEN_STYLES, "train")
    for name in args.only:
        done = json.loads(args.out.read_text()) if args.out.exists() else {}
        rows = done.get("rows", [])
        if any(row["name"] == name for row in rows):
            continue
        row = run(name, args.cpu_minutes, data)
        print(name, f"{row['all']['top1']:.1%}", row["steps"], flush=True)
        done = json.loads(args.out.read_text()) if args.out.exists() else {}
        done = {
            "command": "python tests/bench/compare.py --out "
            "data/results/comparison.json",
            "cpu_minutes": args.cpu_minutes,
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
            "miniclip": miniclip.__version__,
            "processor": platform.processor() or platform.machine(),
            "rows": [*done.get("rows", []), row],
        }
        args.out.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
