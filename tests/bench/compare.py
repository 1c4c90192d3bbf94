"""Ours beside open_clip's towers, and what each of our choices is worth.

    python tests/bench/compare.py --out data/results/comparison.json

Every row trains on the same pictures and captions (five styles, training
concepts), one thread, for a given CPU time, so that rows are comparable on
a machine that does other things too. The full time is ten CPU-minutes,
which is five minutes on two cores. The rows of open_clip use its own ViT
and ModifiedResNet beside its own text tower, of about the same number of
parameters, with texts padded to 77 tokens and the plain loss (equal to its
ClipLoss, see tests/test_loss.py); they get our pictures, captions,
augmentation, optimizer and schedule, and a quarter of our batch: with all
of it they would not come to 150 steps. Each is tried with two learning
rates for a quarter of the time, and goes the full time with the one that
scored better: on the exam itself, in their favour. Each of our choices is
then undone, one at a time, for a quarter of the time. Scores are on the
unseen style. Rows that the output file has are not run again.
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
from miniclip.model import CLIP, preprocess
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
SHORT = replace(PLAIN, concepts=16)  # a quarter of our pictures a step


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


class Padded(CLIP):
    """CLIP that does not cut its texts to the longest of the batch."""

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        end = ids.argmax(dim=-1)
        x = self.token_embedding(ids) + self.positional_embedding
        x = self.ln_final(self.transformer(x)[torch.arange(len(x)), end])
        return x @ self.text_projection


def padded(data):
    """Our model, reading 77 tokens for every caption."""
    like = ours(data)
    model = Padded(replace(like.config, context_length=77))
    model.tokenizer = like.tokenizer
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


NATIVE = {"resolution": 64, "last_resolution": 64}
THEIRS = {  # name -> (model, recipe)
    "open_clip ViT": (vit, SHORT),
    "open_clip ModifiedResNet": (
        modified_resnet,
        replace(SHORT, **NATIVE),
    ),
}
RATES = 5e-4, 2e-3
ABLATIONS = {
    "miniclip": (ours, OURS),
    "all texts padded to 77 tokens": (padded, OURS),
    "without the mask": (ours, PLAIN),
    "batches of whole concepts": (ours, replace(OURS, by_concept=True)),
    "without augmentation": (ours, replace(OURS, strength=0.0)),
    "without keywords": (ours, replace(OURS, keywords=0.0)),
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


def run(name: str, build, recipe: Recipe, minutes: float, data) -> dict:
    """Train one row within its CPU time and score it."""
    torch.manual_seed(0)
    model = build(data)
    steps = steps_within(60 * minutes, model, data, recipe)
    recipe = replace(recipe, steps=steps, warmup=min(100, steps // 10))
    start = time.process_time()
    history = train(model, data, recipe)
    spent = time.process_time() - start
    count = sum(p.numel() for p in model.parameters())
    return {
        "name": name,
        "parameters": count,
        "learning_rate": recipe.learning_rate,
        "steps": steps,
        "cpu_minutes": round(spent / 60, 2),
        "loss": round(sum(row["loss"] for row in history[-20:]) / 20, 3),
        **scores(model, recipe),
    }


class Table:
    """Rows in a JSON file; a row that is there is not made again."""

    def __init__(self, path: Path, minutes: float, data):
        self.path, self.minutes, self.data = path, minutes, data

    def read(self) -> dict:
        return json.loads(self.path.read_text())

    def row(self, part: str, name: str, build, recipe, share=1.0) -> dict:
        done = self.read() if self.path.exists() else {}
        for row in done.get(part, []):
            if row["name"] == name:
                return row
        row = run(name, build, recipe, share * self.minutes, self.data)
        print(f"{part}: {name} {row['all']['top1']:.1%}", flush=True)
        about = {
            "command": "python tests/bench/compare.py --out "
            "data/results/comparison.json",
            "cpu_minutes": self.minutes,
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
            "miniclip": miniclip.__version__,
            "processor": platform.processor() or platform.machine(),
        }
        done = {**done, **about, part: [*done.get(part, []), row]}
        self.path.write_text(json.dumps(done, indent=1) + "\n")
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu-minutes", type=float, default=10.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = EmojiDataset(SEEN_STYLES, "train")
    table = Table(args.out, args.cpu_minutes, data)
    table.row("full_time", "miniclip", ours, OURS)
    for name, (build, recipe) in THEIRS.items():
        tries = {}
        for rate in RATES:
            trial = replace(recipe, learning_rate=rate)
            row = table.row(
                "tries", f"{name}, rate {rate}", build, trial, share=0.25
            )
            tries[rate] = row["all"]["top1"]
        best = replace(recipe, learning_rate=max(tries, key=tries.get))
        table.row("full_time", name, build, best)
    for name, (build, recipe) in ABLATIONS.items():
        table.row("choices", name, build, recipe, share=0.25)


if __name__ == "__main__":
    main()
