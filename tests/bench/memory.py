"""The tiled losses beside open_clip's, and ways to train in less memory.

    python tests/bench/memory.py --out data/results/memory.json

Every measurement runs in a process of its own, so that its peak of resident
memory (Linux: VmHWM, reset before the run) is its own too; what the process
held before the run, features included, is subtracted unless said otherwise.
Losses: forward and backward, features not normalised, one thread; runs of
ours and theirs take turns, the best of all rounds counts, CPU time and wall
time separately. Before that, both must give the same gradients. Training:
the small model of the chapter, the same steps and batches for every row.
A few CPU-minutes, but for the largest batch, which takes five more; what is
in the output file already is not run again.
"""

import argparse
import json
import math
import multiprocessing
import platform
import time
from functools import partial
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

import miniclip
from miniclip.data import SEEN_STYLES, UNSEEN_STYLE, EmojiDataset
from miniclip.memory import (
    Precision,
    cached_backward,
    checkpoint_blocks,
    patch_dropout,
    tiled_clip_loss,
    tiled_siglip_loss,
)
from miniclip.model import preprocess
from miniclip.train import (
    ConceptBatches,
    Recipe,
    learning_rate,
    make_batch,
    make_optimizer,
    new_model,
)
from miniclip.zeroshot import image_vectors, score, zeroshot_classifier

LOSSES = [  # loss, B, rounds; E = 512
    ("softmax", 1024, 3),
    ("softmax", 2048, 3),
    ("softmax", 4096, 2),
    ("softmax", 8192, 2),
    ("softmax", 16384, 1),
    ("sigmoid", 4096, 2),
]
STEPS, BATCH, MICRO = 40, 128, 32
TRAINING = [
    "nothing",
    "texts not cut",
    "checkpointed blocks",
    "cached gradients",
    "bfloat16",
    "patch dropout 0.5",
]


def memory(field: str) -> float:
    """VmRSS or VmHWM of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure(function) -> dict:
    """Wall time, CPU time, and how far the memory rose above the start."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the old peak
    before = memory("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = memory("VmHWM")
    return {
        "seconds": round(wall, 3),
        "cpu_seconds": round(cpu, 3),
        "peak_mib": round(peak - before, 1),
        "with_features_mib": round(peak, 1),
    }


def loss_function(who: str, loss: str):
    if who == "miniclip":
        softmax = loss == "softmax"
        return tiled_clip_loss if softmax else tiled_siglip_loss
    theirs = ClipLoss() if loss == "softmax" else SigLipLoss()
    unit = partial(F.normalize, dim=-1)
    return lambda a, b, *rest: theirs(unit(a), unit(b), *rest)


def inputs(loss: str, B: int, E: int) -> list[torch.Tensor]:
    """Features, scale and bias, all of which want gradients."""
    rng = torch.Generator().manual_seed(B)
    pair = [torch.randn(B, E, generator=rng) for _ in range(2)]
    rest = [14.3] if loss == "softmax" else [10.0, -10.0]
    return [x.requires_grad_() for x in [*pair, *map(torch.tensor, rest)]]


def run_loss(who: str, loss: str, B: int, E: int, times: int) -> dict:
    """The best of several runs; the peak is that of the first."""
    function = loss_function(who, loss)

    def once(values):
        function(*values).backward()

    once(inputs(loss, 256, E))
    values, found = inputs(loss, B, E), []
    for _ in range(times):
        for x in values:
            x.grad = None
        found.append(measure(lambda: once(values)))
    best = {k: min(f[k] for f in found) for k in ("seconds", "cpu_seconds")}
    return found[0] | best


def check_equal() -> dict:
    """Raise unless ours and theirs agree, gradients included."""
    for loss in "softmax", "sigmoid":
        for dtype, close in (torch.float32, 1e-4), (torch.float64, 1e-10):
            results = []
            for who in "open_clip", "miniclip":
                values = [
                    x.detach().to(dtype) for x in inputs(loss, 1500, 64)
                ]
                values = [x.requires_grad_() for x in values]
                loss_function(who, loss)(*values).backward()
                results.append([x.grad for x in values])
            for x, y in zip(*results):
                assert (x - y).norm() <= close * y.norm(), (loss, dtype)
    return {}


def encode_uncut(model, ids):
    """All 77 positions, as open_clip's text tower computes them."""
    x = model.token_embedding(ids) + model.positional_embedding
    x = model.ln_final(model.transformer(x))
    return x[torch.arange(len(x)), ids.argmax(-1)] @ model.text_projection


def run_training(name: str) -> dict:
    """Train the chapter's model in one of the ways; memory, time, score."""
    everything = EmojiDataset(SEEN_STYLES, "train")
    groups = "animals-nature", "food-drink"
    concepts = {
        r["concept"] for r in everything.records if r["group"] in groups
    }
    data = EmojiDataset(SEEN_STYLES, "train", concepts=concepts)
    torch.manual_seed(0)
    model = new_model(
        data,
        500,
        embed_dim=64,
        image_resolution=32,
        vision_layers=3,
        vision_width=64,
        vision_patch_size=4,
        context_length=77,
        transformer_width=64,
        transformer_heads=2,
        transformer_layers=2,
    ).train()
    recipe = Recipe(
        steps=STEPS, warmup=20, last_resolution=32, strength=0.3
    )
    batches = ConceptBatches(data.records, recipe)
    batches.size = BATCH
    optimizer = make_optimizer(model, recipe)
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    precision = Precision(dtype)
    if name == "checkpointed blocks":
        checkpoint_blocks(model)
    if name == "patch dropout 0.5":
        patch_dropout(model.visual, 0.5)
    read = (
        partial(encode_uncut, model) if "cut" in name else model.encode_text
    )

    def step(t: int) -> None:
        batch = make_batch(t, data, batches, recipe)
        ids = model.tokenizer(batch.captions, 77)

        def loss_fn(u, v):
            s = model.logit_scale.exp()
            return tiled_clip_loss(u, v[batch.owners], s, batch.concepts)

        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(t, recipe)
        if name == "cached gradients":
            cached_backward(model, batch.images, ids, loss_fn, MICRO)
        else:
            with precision.autocast():
                u, v = model.encode_image(batch.images), read(ids)
            precision.backward(loss_fn(u, v))
        precision.step(optimizer)
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    def train():
        for t in range(1, STEPS):
            step(t)

    batch = make_batch(0, data, batches, recipe)  # to have its memory
    del batch
    before = memory("VmRSS")
    step(0)
    found = measure(train)
    exam = EmojiDataset([UNSEEN_STYLE], concepts=concepts)
    names = sorted(concepts)
    model.eval()
    kept = [
        i for i, r in enumerate(exam.records) if r["concept"] in concepts
    ]
    u = image_vectors(model, preprocess(32), exam.images[kept])
    v = zeroshot_classifier(model, names)
    labels = [names.index(exam.records[i]["concept"]) for i in kept]
    return {
        "peak_mib": round(found["with_features_mib"] - before, 1),
        "cpu_seconds": round(found["cpu_seconds"] / (STEPS - 1), 3),
        "top1": score(u @ v.T, torch.tensor(labels))["top1"],
    }


def child(*args) -> dict:
    """Run one measurement in a forked process, which then ends."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(run_child, args)


def run_child(who: str, *args) -> dict:
    if who == "equal":
        return check_equal()
    if who == "training":
        return run_training(*args)
    loss, B, E, times, threads = args
    torch.set_num_threads(threads)
    return run_loss(who, loss, B, E, times)


def compare(loss: str, B: int, rounds: int) -> dict:
    """Ours and theirs in turns: the best of each."""
    runs = {"open_clip": [], "miniclip": []}
    for _ in range(rounds):
        for who, found in runs.items():
            found.append(child(who, loss, B, 512, 2 if B < 8192 else 1, 1))
    return {
        who: {k: min(r[k] for r in found) for k in found[0]}
        for who, found in runs.items()
    }


def largest(B: int, E: int, threads: int) -> dict:
    """One run of ours alone."""
    sizes = {"B": B, "E": E, "threads": threads}
    return sizes | child("miniclip", "softmax", B, E, 1, threads)


def versions() -> dict:
    return {
        "command": "python tests/bench/memory.py --out "
        "data/results/memory.json",
        "date": time.strftime("%Y-%m-%d"),
        "steps": STEPS,
        "batch": BATCH,
        "micro_batch": MICRO,
        "machine": "one thread of a two-core Xeon that did other work too",
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "miniclip": miniclip.__version__,
    }


JOBS = {
    "losses": {f"{x[0]} {x[1]}": partial(compare, *x) for x in LOSSES},
    "training": {
        name: partial(child, "training", name) for name in TRAINING
    },
    "largest": {"softmax": partial(largest, 131072, 256, 2)},
}


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", default=list(JOBS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    child("equal")
    for part in args.parts:
        for name, job in JOBS[part].items():
            if name in read(args.out).get(part, {}):
                continue
            found = job()
            print(part, name, found, flush=True)
            done = read(args.out) | versions()
            done[part] = done.get(part, {}) | {name: found}
            args.out.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
