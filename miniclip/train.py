"""Training: from nothing to a model that names pictures, and a doctor.

Written from book/chapters/08_train.md; edit that file.
"""

import argparse
import hashlib
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from miniclip.data import (
    SEEN_STYLES,
    EmojiDataset,
)
from miniclip.loss import clip_loss
from miniclip.model import CLIP, MEAN, STD, CLIPConfig, save
from miniclip.tokenizer import Tokenizer, train_bpe


def new_model(data: EmojiDataset, merges: int = 2000, **changes) -> CLIP:
    """An untrained CLIP whose tokenizer was learned from the captions.

    Its weights are drawn from torch's global generator: seed it before.

    Args:
        data: whose names and keywords the tokenizer learns.
        merges: entries of the vocabulary besides bytes and specials.
        changes: fields of CLIPConfig, such as vision_width=24.

    Chapter: book/chapters/08_train.md
    """
    texts = [
        r["caption"] + " " + " ".join(r["keywords"]) for r in data.records
    ]
    tokenizer = Tokenizer(train_bpe(sorted(set(texts)), merges))
    config = dict(
        embed_dim=256,
        image_resolution=48,
        vision_layers=(1, 1, 1),
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


def _option(default, low, high, text: str):
    """A field of the recipe: default, range, and what it means."""
    return field(
        default=default, metadata=dict(range=(low, high), help=text)
    )


def _check_option(name: str, value, default, low, high) -> None:
    """Raise ValueError unless value is of default's kind and in range."""
    kind = type(default)
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or not low <= value <= high:
        wanted = {bool: "True or False", int: "a whole number"}.get(
            kind, "a number"
        )
        between = "" if kind is bool else f" from {low:,} to {high:,}"
        raise ValueError(f"{name} is {value!r}, expected {wanted}{between}")


@dataclass(frozen=True)
class Recipe:
    """What a training run is made of; every field is an option of main.

    Everything random in step t is a function of (seed, t), so a run that
    was interrupted goes on as if nothing had happened.

    Raises: ValueError for a value out of range.

    Chapter: book/chapters/08_train.md
    """

    steps: int = _option(4600, 1, 1_000_000, "batches to learn from")
    concepts: int = _option(
        64, 2, 1_000_000, "a batch has as many pictures as these have"
    )
    learning_rate: float = _option(2e-3, 0, 1000, "at its highest")
    warmup: int = _option(
        100, 0, 1_000_000, "steps until the learning rate is reached"
    )
    weight_decay: float = _option(0.2, 0, 1000, "of matrices, as in AdamW")
    resolution: int = _option(32, 16, 1024, "pixels, at first")
    last_resolution: int = _option(48, 16, 1024, "pixels, in the last part")
    last_share: float = _option(0.4, 0, 1, "how much the last part is")
    keywords: float = _option(0.5, 0, 1, "share of captions with keywords")
    strength: float = _option(1.0, 0, 4, "of the augmentation, at its full")
    by_concept: bool = _option(
        False, False, True, "draw whole concepts, not single pictures"
    )
    mask: bool = _option(
        True, False, True, "spare pairs of one concept in the loss"
    )
    seed: int = _option(0, 0, 10**9, "of everything random")

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            _check_option(f.name, value, f.default, *f.metadata["range"])


def make_optimizer(model: CLIP, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices and spares gains, biases and the scale.

    Source: Radford et al. 2021, section 2.5; betas and eps of its ViTs.

    Chapter: book/chapters/08_train.md
    """
    params = list(model.parameters())
    groups = [
        {
            "params": [p for p in params if p.ndim >= 2],
            "weight_decay": recipe.weight_decay,
        },
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    lr = recipe.learning_rate
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to zero.

    Chapter: book/chapters/08_train.md
    """
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class ConceptBatches:
    """Step t -> its items, in groups that share a caption.

    A group is one picture, or with recipe.by_concept all pictures of one
    caption. What comes in step t depends on t and the seed alone; each
    group comes once in an epoch, but for a rest too small for a batch.

    Chapter: book/chapters/08_train.md
    """

    def __init__(self, records: list[dict], recipe: Recipe):
        groups = defaultdict(list)
        for i, record in enumerate(records):
            groups[record["caption"] if recipe.by_concept else i].append(i)
        self.groups = list(groups.values())
        self.size = recipe.concepts
        if not recipe.by_concept:
            names = {record["caption"] for record in records}
            self.size = round(self.size * len(records) / len(names))
        self.size = min(self.size, len(self.groups))
        self.seed = recipe.seed

    def __getitem__(self, step: int) -> list[list[int]]:
        per_epoch = len(self.groups) // self.size
        epoch, k = divmod(step, per_epoch)
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.groups), generator=rng).tolist()
        chosen = order[k * self.size : (k + 1) * self.size]
        return [self.groups[i] for i in chosen]


def _affine(strength: float, u: Tensor) -> Tensor:
    """(6, B) numbers from -1 to 1 -> (B, 2, 3) maps, of coordinates."""
    u = strength * u
    angle, shear = u[0] * math.pi / 12, 0.15 * u[1]
    zoom = (0.2 * u[2] - 0.05 * strength).exp()
    stretch = (0.12 * u[3]).exp()
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos * stretch, shear - sin, 0.15 * u[4] * zoom]),
        torch.stack([sin, cos / stretch, 0.15 * u[5] * zoom]),
    ]
    return torch.stack(rows).permute(2, 0, 1) / zoom[:, None, None]


def warp(
    images: Tensor, resolution: int, strength: float, rng: torch.Generator
) -> Tensor:
    """Turn, shear, stretch, zoom and shift each picture, and resize all.

    images: (B, 3, H, W) floats from 0 to 1 on white -> (B, 3, R, R).

    Chapter: book/chapters/08_train.md
    """
    if images.shape[-1] >= 2 * resolution:
        images = F.avg_pool2d(images, images.shape[-1] // resolution)
    u = 2 * torch.rand(6, len(images), generator=rng) - 1
    size = (len(images), 3, resolution, resolution)
    grid = F.affine_grid(_affine(strength, u), size, align_corners=False)
    ink = F.grid_sample(1 - images, grid, align_corners=False)
    return 1 - ink  # what comes in from outside is white


def recolour(
    images: Tensor, strength: float, rng: torch.Generator
) -> Tensor:
    """Mix the colours of each picture anew; white stays white.

    images: (B, 3, H, W) floats from 0 to 1 -> the same.

    Chapter: book/chapters/08_train.md
    """
    B = len(images)
    noise = torch.randn(B, 3, 3, generator=rng)
    mix = torch.eye(3) + 0.12 * strength * noise
    mix = mix / mix.sum(dim=2, keepdim=True)
    images = torch.einsum("bij,bjhw->bihw", mix, images).clamp(1e-3, 1)
    gamma = (0.3 * strength * torch.randn(B, 1, 1, 1, generator=rng)).exp()
    return images**gamma


def augment(
    images: Tensor, resolution: int, strength: float, rng: torch.Generator
) -> Tensor:
    """uint8 (B, 3, H, W) -> (B, 3, R, R), changed and normalised.

    Chapter: book/chapters/08_train.md
    """
    images = warp(images.float() / 255, resolution, strength, rng)
    images = recolour(images, strength, rng)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return (images - mean[:, None, None]) / std[:, None, None]


def strength_at(step: int, recipe: Recipe) -> float:
    """The strength of the augmentation: it grows until half time.

    Chapter: book/chapters/08_train.md
    """
    return recipe.strength * min(1.0, step / (recipe.steps / 2))


def random_caption(
    record: dict, keywords: float, rng: random.Random
) -> str:
    """The name; or, with probability `keywords`, some keywords too.

    Chapter: book/chapters/08_train.md
    """
    name, words = record["caption"], record["keywords"]
    if not words or rng.random() >= keywords:
        return name
    n = rng.randint(min(2, len(words)), min(5, len(words)))
    chosen = rng.sample(words, n)
    return " ".join(chosen if rng.random() < 0.5 else [name, *chosen])


def resolution_at(step: int, recipe: Recipe) -> int:
    """Pixels, height and width, of the pictures in a step.

    Chapter: book/chapters/08_train.md
    """
    late = step >= recipe.steps * (1 - recipe.last_share)
    return recipe.last_resolution if late else recipe.resolution


class Batch(NamedTuple):
    """B pictures and the K captions that they share.

    Chapter: book/chapters/08_train.md
    """

    images: Tensor  # (B, 3, R, R), normalised
    captions: list[str]  # K of them
    owners: Tensor  # (B,), caption owners[i] belongs to picture i
    concepts: Tensor  # (B,), the same number for the same concept


def make_batch(
    step: int, data: EmojiDataset, batches: ConceptBatches, recipe: Recipe
) -> Batch:
    """The batch of a step: a function of its arguments and nothing else.

    Chapter: book/chapters/08_train.md
    """
    seed = recipe.seed * 1_000_003 + step
    rng, words = torch.Generator().manual_seed(seed), random.Random(seed)
    groups = batches[step]
    records = [data.records[i] for group in groups for i in group]
    captions = [
        random_caption(data.records[group[0]], recipe.keywords, words)
        for group in groups
    ]
    owners = [k for k, group in enumerate(groups) for _ in group]
    names = dict.fromkeys(record["concept"] for record in records)
    number = {name: k for k, name in enumerate(names)}
    concepts = torch.tensor([number[r["concept"]] for r in records])
    images = data.images[[i for group in groups for i in group]]
    size, strength = resolution_at(step, recipe), strength_at(step, recipe)
    images = augment(images, size, strength, rng)
    return Batch(images, captions, torch.tensor(owners), concepts)


def train_step(
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    mask: bool = True,
    loss_fn: Callable = clip_loss,
) -> dict:
    """One step of training; returns its vital signs.

    Raises: FloatingPointError, before any weight is touched, if the loss
        or a gradient is not finite.

    Chapter: book/chapters/08_train.md
    """
    images, captions, owners, concepts = batch
    ids = model.tokenizer(captions, model.context_length)
    image_features = model.encode_image(images)
    text_features = model.encode_text(ids)[owners]  # (B, E)
    scale = model.logit_scale.exp()
    rivals = concepts if mask else None
    loss = loss_fn(image_features, text_features, scale, rivals)
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    _check_finite(loss, norm, images)
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))
    return vital_signs(
        loss, image_features, text_features, model.logit_scale, owners
    )


def _check_finite(loss: Tensor, norm: Tensor, images: Tensor) -> None:
    """Raise FloatingPointError unless loss and gradient are finite."""
    if loss.isfinite() and norm.isfinite():
        return
    bad = (~images.isfinite().flatten(1).all(dim=1)).nonzero().flatten()
    where = (
        f"pictures {bad.tolist()} of the batch have such values: look at "
        "how they were made"
        if len(bad)
        else "the pictures are fine: lower the learning rate"
    )
    raise FloatingPointError(
        f"the loss is {loss.item():.3g}, the norm of its gradient "
        f"{norm.item():.3g}; no weight was changed. {where}"
    )


@torch.no_grad()
def vital_signs(
    loss: Tensor,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    owners: Tensor,
) -> dict:
    """The numbers that tell how a step went; the doctor reads them.

    Args:
        image_features, text_features: (B, E), row i of both is pair i.
        logit_scale: the logarithm of the scale.
        owners: (B,), the number of each picture's caption.

    Chapter: book/chapters/08_train.md
    """
    u = F.normalize(image_features, dim=-1)
    v = F.normalize(text_features, dim=-1)
    right = owners[(u @ v.T).argmax(dim=1)] == owners
    return {
        "loss": loss.item(),
        "ln_B": math.log(len(u)),
        "scale": logit_scale.exp().item(),
        "accuracy": right.float().mean().item(),
        "spread": 1 - u.mean(dim=0).square().sum().item(),
    }


def _stuck(signs: dict) -> tuple[str, str] | None:
    """What is wrong with a run whose loss is not below ln B, if it is."""
    loss, guess = signs["loss"], signs["ln_B"]
    if loss < guess - 0.1:
        return None
    says = f"the loss is {loss:.2f}, guessing would cost {guess:.2f} (ln B)"
    if loss > guess + 0.5:
        return "worse than guessing", (
            f"{says}: the model is sure of wrong answers. Lower the "
            "learning rate; are the features normalised, and is the scale "
            f"exp(ln s), {signs['scale']:.1f}?"
        )
    says += f", and {signs['accuracy']:.0%} find their caption"
    advice = (
        "Try 128 pairs by heart: if that works, look at the data, whether "
        "pictures and captions belong together; if not, at the loss and "
        "the learning rate"
    )
    if signs["spread"] < 0.05:
        return "collapse", (
            f"{says}; all pictures have nearly the same feature (spread "
            f"{signs['spread']:.3f}). {advice}"
        )
    return "knows nothing", f"{says}. {advice}"


def _other_troubles(signs: dict, fall: float) -> dict[str, str]:
    """What can be wrong although the loss is below ln B."""
    found, scale = {}, signs["scale"]
    if fall < 0.8:
        found["scale falls"] = (
            f"the scale fell to {fall:.0%} of its start, {scale:.1f}: the "
            "model trusts its similarities less and less; do pictures and "
            "captions belong together, and is ln s free of weight decay?"
        )
    if scale > 99:
        found["scale at its limit"] = (
            "the scale is clamped at 100: usual late in a long training, "
            "early it means that the batches are too easy or too few"
        )
    if signs["accuracy"] > 0.99:
        found["too easy"] = (
            f"{signs['accuracy']:.1%} of the pictures find their caption: "
            "nothing is left to learn from such batches; make them larger, "
            "take more data or stronger augmentation, or stop"
        )
    if signs.get("waiting", 0) > 0.5:
        found["waiting"] = (
            f"{signs['waiting']:.0%} of the time goes into making batches: "
            "make the pictures smaller beforehand, or keep them in memory"
        )
    return found


def doctor(history: Sequence[dict], window: int = 50) -> dict[str, str]:
    """Say in words what is wrong with a training run.

    Args:
        history: the vital signs of each step, as `train` returns them.
        window: how many steps, the last ones, to look at.

    Returns: {name of the trouble: what was seen and what to do}, the worst
        first; empty for a healthy run, and for one without any step.

    Chapter: book/chapters/08_train.md
    """
    rows = list(history[-window:])
    if not rows:
        return {}
    keys = set.intersection(*map(set, rows))
    signs = {k: sum(row[k] for row in rows) / len(rows) for k in keys}
    if not math.isfinite(signs["loss"]):
        return {
            "not a number": "the loss is not finite: the weights are lost; "
            "go back to the last checkpoint and lower the learning rate"
        }
    stuck = _stuck(signs)
    found = {} if stuck is None else dict([stuck])
    fall = rows[-1]["scale"] / history[0]["scale"]
    return found | _other_troubles(signs, fall)


def save_run(
    path: Path,
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    history: list[dict],
    data: str = "",
) -> None:
    """Write all that a run needs to go on into one safetensors file.

    The old file stays whole until the new one is. data: a fingerprint of
    what the run learns from, not checked if empty.

    Chapter: book/chapters/08_train.md
    """
    tensors = {f"model.{k}": t for k, t in model.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": t for k, t in moments.items()}
    tensors = {
        k: t.clone(memory_format=torch.contiguous_format)
        for k, t in tensors.items()
    }
    notes = {"recipe": asdict(recipe), "history": history, "data": data}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, {k: json.dumps(v) for k, v in notes.items()})
    os.replace(part, path)


def _read_run(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The notes and the tensors of a run; ValueError if it is none."""
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete it to begin anew"
        ) from None
    if not {"recipe", "history"} <= set(notes):
        raise ValueError(f"{path} holds no run; choose another path")
    return {k: json.loads(v) for k, v in notes.items()}, tensors


def _check_notes(
    path: Path, notes: dict, recipe: Recipe, data: str
) -> None:
    """Raise ValueError unless the notes are those of this run."""
    theirs, ours = notes["recipe"], asdict(recipe)
    differ = [
        f"{k} {theirs.get(k)!r} and not {ours.get(k)!r}"
        for k in sorted(set(theirs) | set(ours))
        if theirs.get(k) != ours.get(k)
    ]
    if data and notes.get("data") != data:
        differ.append("other data")
    if differ:
        raise ValueError(
            f"{path} holds another run, with {', '.join(differ)}; "
            "delete it or choose another path"
        )


def load_run(
    path: Path,
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    data: str = "",
) -> list[dict]:
    """Put a saved run back where it was; return its history.

    Raises: ValueError, before anything is changed, for a file that is
        damaged or belongs to another recipe, other data or another model.

    Chapter: book/chapters/08_train.md
    """
    notes, tensors = _read_run(path)
    _check_notes(path, notes, recipe, data)
    state, weights = defaultdict(dict), {}
    for name, tensor in tensors.items():
        part, key = name.split(".", 1)
        if part == "model":
            weights[key] = tensor
        else:
            i, key = key.split(".")
            state[int(i)][key] = tensor
    theirs = {k: t.shape for k, t in weights.items()}
    if theirs != {k: t.shape for k, t in model.state_dict().items()}:
        raise ValueError(f"{path} holds a run of a model of another size")
    model.load_state_dict(weights)
    optimizer.load_state_dict(
        {**optimizer.state_dict(), "state": dict(state)}
    )
    return notes["history"]


def _check_before(model: CLIP, data: EmojiDataset, recipe: Recipe) -> None:
    """Raise ValueError for what would go wrong late, or silently."""
    size = resolution_at(recipe.steps - 1, recipe)
    if size != model.config.image_resolution:
        raise ValueError(
            f"the training ends with pictures of {size} pixels, the model "
            f"is made for {model.config.image_resolution}; build it with "
            f"image_resolution={size}"
        )
    for record in data.records:
        count = len(model.tokenizer.encode(record["caption"])) + 2
        if recipe.keywords:
            words = map(model.tokenizer.encode, record["keywords"])
            count += sum(sorted(map(len, words))[-5:])
        if count > model.context_length:
            raise ValueError(
                f"captions of {record['caption']!r} have up to {count} "
                f"tokens, the model reads {model.context_length}; build it "
                f"with context_length={count} or more"
            )


def _fingerprint(data: EmojiDataset) -> str:
    """A hash of what there is to learn from, in its order."""
    known = [(r["style"], r["key"], r["caption"]) for r in data.records]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _timed_step(
    step: int, model: CLIP, optimizer, make: Callable, recipe, loss_fn
) -> dict:
    """Make the batch of a step and train on it; its vital signs."""
    start = time.perf_counter()
    batch = make(step)
    waited = time.perf_counter() - start
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, recipe)
    model.train()
    signs = train_step(model, optimizer, batch, recipe.mask, loss_fn)
    signs["seconds"] = time.perf_counter() - start
    signs["waiting"] = waited / signs["seconds"]
    return signs


def _progress(done: int, steps: int, quiet: bool) -> tqdm:
    """A progress bar, which stays hidden if quiet."""
    look = dict(unit="step", mininterval=2, disable=quiet)
    if done and not quiet:
        tqdm.write(f"going on from step {done:,}")
    return tqdm(initial=done, total=steps, **look)


def _report(bar: tqdm, history: list[dict], warmup: int) -> None:
    """Show how it goes; every 50 steps, what the doctor newly found."""
    signs, step = history[-1], len(history)
    bar.set_postfix(
        {
            "loss": f"{signs['loss']:.2f}",
            "right": f"{signs['accuracy']:.0%}",
        },
        scale=f"{signs['scale']:.0f}",
        refresh=False,
    )
    bar.update()
    if bar.disable or step % 50 or step < warmup + 50:
        return
    before = doctor(history[:-50]) if step >= warmup + 100 else {}
    for trouble, words in doctor(history).items():
        if trouble not in before:
            bar.write(f"step {step}, {trouble}: {words}")


def train(
    model: CLIP,
    data: EmojiDataset,
    recipe: Recipe,
    path: Path | None = None,
    save_every: int = 250,
    *,
    loss_fn: Callable = clip_loss,
    watch: Callable[[int], None] | None = None,
    quiet: bool = False,
) -> list[dict]:
    """Train a model in place; return the vital signs of each step.

    Args:
        path: where the run is saved every save_every steps and at the
            end, and from where it goes on if the file exists.
        loss_fn: called as clip_loss is.
        watch: called after each step with the number of steps done.
        quiet: show no progress, and let the doctor be silent.

    Raises: ValueError for a recipe that does not fit the model, or a file
        of another run; FloatingPointError if the loss is not finite.

    Chapter: book/chapters/08_train.md
    """
    _check_before(model, data, recipe)
    optimizer, label = make_optimizer(model, recipe), _fingerprint(data)
    batches, history = ConceptBatches(data.records, recipe), []
    if path and Path(path).exists():
        history = load_run(path, model, optimizer, recipe, label)
    parts = model, optimizer, lambda i: make_batch(i, data, batches, recipe)
    with _progress(len(history), recipe.steps, quiet) as bar:
        for done in range(len(history) + 1, recipe.steps + 1):
            history.append(_timed_step(done - 1, *parts, recipe, loss_fn))
            _report(bar, history, recipe.warmup)
            if path and (done % save_every == 0 or done == recipe.steps):
                save_run(path, model, optimizer, recipe, history, label)
            if watch:
                watch(done)
    model.eval()
    return history


def _parser() -> argparse.ArgumentParser:
    """The command line: a few options, and one for each recipe field."""
    parser = argparse.ArgumentParser(
        prog="python -m miniclip.train",
        description="Train a CLIP from nothing on the emoji of data/. Run "
        "the same command again to go on after an interruption.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    text = "folder for the model, and for the run while it lasts"
    add("--out", type=Path, required=True, help=text)
    text = "whose drawings to learn from"
    styles = dict(nargs="+", default=SEEN_STYLES, choices=SEEN_STYLES)
    add("--styles", metavar="STYLE", **styles, help=text)
    text = "of the image tower's first stage"
    add("--width", type=int, default=48, help=text)
    for f in fields(Recipe):
        name, kind = f"--{f.name.replace('_', '-')}", type(f.default)
        how = {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        add(name, default=f.default, help=f.metadata["help"], **how)
    return parser


def _account(recipe: Recipe, history: list[dict], styles) -> dict:
    """What training.json tells about a run."""
    every = max(1, recipe.steps // 100)
    return {
        "recipe": asdict(recipe),
        "styles": list(styles),
        "torch": torch.__version__,
        "seconds": round(sum(signs["seconds"] for signs in history)),
        "last": history[-1],
        "history": history[::every],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Train and save a model as the command line says.

    Chapter: book/chapters/08_train.md
    """
    parser = _parser()
    args = vars(parser.parse_args(argv))
    out, styles, width = (args.pop(k) for k in ("out", "styles", "width"))
    try:
        recipe = Recipe(**args)
        size = resolution_at(recipe.steps - 1, recipe)
        data = EmojiDataset(styles, "train")
        torch.manual_seed(recipe.seed)
        model = new_model(data, vision_width=width, image_resolution=size)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    numbers = sum(p.numel() for p in model.parameters())
    run = out / "run.safetensors"
    print(f"{recipe}\n{len(data):,} pictures, {numbers:,} parameters")
    print(f"The run is kept in {run}; to go on after an interruption,")
    print("give the same command again.", flush=True)
    history = train(model, data, recipe, run)
    save(model, out, half=True)
    account = json.dumps(_account(recipe, history, styles), indent=1)
    (out / "training.json").write_text(account + "\n", encoding="utf-8")
    run.unlink(missing_ok=True)
    print(f"saved in {out}: miniclip.load({str(out)!r})")


if __name__ == "__main__" and __spec__ is not None:  # not in a notebook
    main()
