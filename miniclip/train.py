"""Training: from nothing to a zero-shot model, with a doctor beside it."""

import argparse
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from miniclip.data import SEEN_STYLES, EmojiDataset
from miniclip.loss import clip_loss
from miniclip.model import CLIP, MEAN, STD, CLIPConfig, save
from miniclip.tokenizer import Tokenizer, train_bpe


@dataclass(frozen=True)
class Recipe:
    """What a training run is made of; every field is an option of main.

    Everything random in step t is a function of (seed, t), so a run that
    was interrupted goes on as if nothing had happened.
    """

    steps: int = 5000
    concepts: int = 64  # in a batch, each with all its pictures
    learning_rate: float = 2e-3
    warmup: int = 100  # steps
    weight_decay: float = 0.2
    resolution: int = 32  # pixels, early in training
    last_resolution: int = 48  # pixels, for the last part
    last_share: float = 0.2  # of the steps
    keywords: float = 0.5  # share of captions that use keywords
    strength: float = 1.0  # of the augmentation; 0 switches it off
    by_concept: bool = True  # False: pictures drawn at random
    mask: bool = True  # leave same-concept pairs out of the loss
    seed: int = 0


def new_model(data: EmojiDataset, merges: int = 2000, **changes) -> CLIP:
    """An untrained CLIP whose tokenizer was learned from the captions."""
    texts = [
        r["caption"] + " " + " ".join(r["keywords"]) for r in data.records
    ]
    tokenizer = Tokenizer(train_bpe(sorted(set(texts)), merges))
    config = dict(
        embed_dim=256,
        image_resolution=48,
        vision_layers=(1, 1, 1, 1),
        vision_width=48,
        vision_patch_size=None,
        context_length=48,
        vocab_size=tokenizer.vocab_size,
        transformer_width=192,
        transformer_heads=3,
        transformer_layers=3,
    )
    model = CLIP(CLIPConfig(**{**config, **changes}))
    model.tokenizer = tokenizer
    return model


def warp(
    images: Tensor, resolution: int, strength: float, rng: torch.Generator
) -> Tensor:
    """Turn, shear, stretch, zoom and shift each picture, and resize all.

    images: (B, 3, H, W) floats from 0 to 1 on white -> (B, 3, R, R).
    """
    if images.shape[-1] >= 2 * resolution:
        images = F.avg_pool2d(images, images.shape[-1] // resolution)
    u = strength * (2 * torch.rand(6, len(images), generator=rng) - 1)
    angle, shear = u[0] * math.pi / 12, 0.15 * u[1]
    zoom, stretch = (
        (0.2 * u[2] - 0.05 * strength).exp(),
        (0.12 * u[3]).exp(),
    )
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos * stretch, shear - sin, 0.15 * u[4] * zoom]),
        torch.stack([sin, cos / stretch, 0.15 * u[5] * zoom]),
    ]
    matrix = torch.stack(rows).permute(2, 0, 1) / zoom[:, None, None]
    size = (len(images), 3, resolution, resolution)
    grid = F.affine_grid(matrix, size, align_corners=False)
    ink = F.grid_sample(1 - images, grid, align_corners=False)
    return 1 - ink  # what comes in from outside is white


def recolour(
    images: Tensor, strength: float, rng: torch.Generator
) -> Tensor:
    """Mix the colours of each picture anew; white stays white."""
    B = len(images)
    mix = torch.eye(3) + 0.12 * strength * torch.randn(
        B, 3, 3, generator=rng
    )
    mix = mix / mix.sum(dim=2, keepdim=True)
    images = torch.einsum("bij,bjhw->bihw", mix, images).clamp(1e-3, 1)
    gamma = (0.3 * strength * torch.randn(B, 1, 1, 1, generator=rng)).exp()
    return images**gamma


def augment(
    images: Tensor, resolution: int, strength: float, rng: torch.Generator
) -> Tensor:
    """uint8 (B, 3, H, W) -> (B, 3, R, R), changed and normalised."""
    images = warp(images.float() / 255, resolution, strength, rng)
    images = recolour(images, strength, rng)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return (images - mean[:, None, None]) / std[:, None, None]


def random_caption(
    record: dict, keywords: float, rng: random.Random
) -> str:
    """The name; or, with probability `keywords`, some keywords too."""
    name, words = record["caption"], record["keywords"]
    if not words or rng.random() >= keywords:
        return name
    n = rng.randint(min(2, len(words)), min(5, len(words)))
    chosen = rng.sample(words, n)
    return " ".join(chosen if rng.random() < 0.5 else [name, *chosen])


class ConceptBatches:
    """Batches of whole concepts: step t -> the items of its pictures."""

    def __init__(self, records: list[dict], recipe: Recipe):
        groups = defaultdict(list)
        for i, record in enumerate(records):
            groups[record["caption"] if recipe.by_concept else i].append(i)
        self.groups = list(groups.values())
        self.size = recipe.concepts
        if not recipe.by_concept:  # as many pictures, drawn one by one
            self.size = round(
                self.size
                * len(records)
                / len({r["caption"] for r in records})
            )
        self.size = min(self.size, len(self.groups))
        self.seed = recipe.seed

    def __getitem__(self, step: int) -> list[list[int]]:
        per_epoch = len(self.groups) // self.size
        epoch, k = divmod(step, per_epoch)
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.groups), generator=rng).tolist()
        return [
            self.groups[i]
            for i in order[k * self.size : (k + 1) * self.size]
        ]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: CLIP, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices and spares gains, biases and the scale."""
    params = list(model.parameters())
    groups = [
        {
            "params": [p for p in params if p.ndim >= 2],
            "weight_decay": recipe.weight_decay,
        },
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)


def resolution_at(step: int, recipe: Recipe) -> int:
    late = step >= recipe.steps * (1 - recipe.last_share)
    return recipe.last_resolution if late else recipe.resolution


def make_batch(
    step: int, data: EmojiDataset, batches: ConceptBatches, recipe: Recipe
):
    """(images, captions, owners): picture i belongs to caption owners[i]."""
    seed = recipe.seed * 1_000_003 + step
    rng, words = torch.Generator().manual_seed(seed), random.Random(seed)
    groups = batches[step]
    items = [i for group in groups for i in group]
    owners = torch.tensor(
        [k for k, group in enumerate(groups) for _ in group]
    )
    captions = [
        random_caption(data.records[g[0]], recipe.keywords, words)
        for g in groups
    ]
    names = {
        name: k
        for k, name in enumerate(
            dict.fromkeys(data.records[i]["concept"] for i in items)
        )
    }
    concepts = torch.tensor(
        [names[data.records[i]["concept"]] for i in items]
    )
    size = resolution_at(step, recipe)
    return (
        augment(data.images[items], size, recipe.strength, rng),
        captions,
        owners,
        concepts,
    )


def train_step(model: CLIP, optimizer, batch, mask: bool = True) -> dict:
    """One step; returns its vital signs."""
    images, captions, owners, concepts = batch
    ids = model.tokenizer(captions, model.context_length)
    image_features = model.encode_image(images)
    text_features = model.encode_text(ids)[owners]
    loss = clip_loss(
        image_features,
        text_features,
        model.logit_scale.exp(),
        concepts if mask else None,
    )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))
    return vital_signs(
        loss, image_features, text_features, model.logit_scale, owners
    )


@torch.no_grad()
def vital_signs(
    loss, image_features, text_features, logit_scale, owners
) -> dict:
    u, v = (
        F.normalize(image_features, dim=-1),
        F.normalize(text_features, dim=-1),
    )
    right = owners[(u @ v.T).argmax(dim=1)] == owners
    return {
        "loss": loss.item(),
        "ln_B": math.log(len(u)),
        "scale": logit_scale.exp().item(),
        "accuracy": right.float().mean().item(),
        "spread": 1 - u.mean(dim=0).square().sum().item(),
    }


def save_run(
    path: Path,
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    history: list[dict],
) -> None:
    """Write all that a run needs to go on into one safetensors file."""
    tensors = {f"model.{k}": t for k, t in model.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": t for k, t in moments.items()}
    tensors = {
        k: t.clone(memory_format=torch.contiguous_format)
        for k, t in tensors.items()
    }
    notes = {
        "recipe": json.dumps(asdict(recipe)),
        "history": json.dumps(history),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part, notes)
    os.replace(part, path)  # the old file stays whole until now


def load_run(
    path: Path,
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
) -> list[dict]:
    """Put a saved run back where it was; return its history."""
    with safe_open(path, "pt") as file:
        notes = file.metadata()
        tensors = {k: file.get_tensor(k) for k in file.keys()}
    if json.loads(notes["recipe"]) != asdict(recipe):
        raise ValueError(
            f"{path} holds a run of another recipe: {notes['recipe']}; delete it or choose another folder"
        )
    state = defaultdict(dict)
    weights = {}
    for name, tensor in tensors.items():
        part, key = name.split(".", 1)
        if part == "model":
            weights[key] = tensor
        else:
            i, key = key.split(".")
            state[int(i)][key] = tensor
    model.load_state_dict(weights)
    optimizer.load_state_dict(
        {**optimizer.state_dict(), "state": dict(state)}
    )
    return json.loads(notes["history"])


def train(
    model: CLIP,
    data: EmojiDataset,
    recipe: Recipe,
    path: Path | None = None,
    save_every: int = 250,
) -> list[dict]:
    """Train a model in place; return the vital signs of each step."""
    optimizer = make_optimizer(model, recipe)
    batches = ConceptBatches(data.records, recipe)
    history = []
    if path and path.exists():
        history = load_run(path, model, optimizer, recipe)
        print(f"going on from step {len(history)} of {path}")
    model.train()
    bar = tqdm(
        range(len(history), recipe.steps),
        initial=len(history),
        total=recipe.steps,
        unit="step",
        mininterval=2,
    )
    for step in bar:
        start = time.perf_counter()
        batch = make_batch(step, data, batches, recipe)
        waited = time.perf_counter() - start
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        signs = train_step(model, optimizer, batch, recipe.mask)
        signs["waiting"] = waited / (time.perf_counter() - start)
        history.append(signs)
        bar.set_postfix(
            loss=f"{signs['loss']:.2f}",
            right=f"{signs['accuracy']:.0%}",
            scale=f"{signs['scale']:.0f}",
        )
        if path and (step + 1) % save_every == 0:
            save_run(path, model, optimizer, recipe, history)
    model.eval()
    return history


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--styles", nargs="+", default=SEEN_STYLES)
    parser.add_argument("--width", type=int, default=48)
    for field in fields(Recipe):
        kind = type(field.default)
        parser.add_argument(
            f"--{field.name}",
            type=(lambda s: s == "True") if kind is bool else kind,
            default=field.default,
        )
    args = vars(parser.parse_args())
    out, styles, width = (
        args.pop("out"),
        args.pop("styles"),
        args.pop("width"),
    )
    recipe = Recipe(**args)
    torch.manual_seed(recipe.seed)
    data = EmojiDataset(styles, "train")
    model = new_model(data, vision_width=width)
    start = time.time()
    history = train(model, data, recipe, out / "run.safetensors")
    save(model, out, half=True)
    (out / "training.json").write_text(
        json.dumps(
            {
                "recipe": asdict(recipe),
                "seconds": time.time() - start,
                "last": history[-1],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
