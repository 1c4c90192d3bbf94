"""On a machine with a GPU: does it compute what the processor computes?

    make gpu-check            # or: python tests/bench/gpu.py --device cuda

Prints a line a check, writes data/results/gpu.json, and ends with exit
code 1 if one has failed. Its authors had no GPU: they have run it with
`--device cpu --small` only. A Colab T4 (float16, 15 GB) is enough.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import miniclip
from miniclip.data import UNSEEN_STYLE
from miniclip.loss import clip_loss
from miniclip.memory import Precision, best_dtype, tiled_clip_loss
from miniclip.zeroshot import emoji_exam


def check_shipped_model(device: str) -> dict:
    """The model that ships, in float32 and in the fastest precision."""
    model, ready = miniclip.load("emoji")
    data, expected = emoji_exam(model, ready, [UNSEEN_STYLE])
    images = ready(data.images[:512]).to(device)
    model.to(device)
    with torch.no_grad():
        exact = F.normalize(model.encode_image(images), dim=-1).cpu()
        with Precision(device=device).autocast():
            fast = model.encode_image(images).float()
    fast = F.normalize(fast, dim=-1).cpu()
    difference = (exact - expected[:512]).abs().max().item()
    cosine = (fast * expected[:512]).sum(dim=-1).min().item()
    return {
        "what": "features of the shipped model",
        "largest_difference": difference,
        "least_cosine": cosine,
        "ok": difference < 1e-4 and cosine > 0.999,
    }


def check_tiled_loss(device: str, B: int) -> dict:
    """Value and gradient of the tiled loss against float64 on the CPU."""
    rng = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, B, 64, generator=rng, dtype=torch.float64)
    grads, values = [], []
    for where, dtype in ("cpu", torch.float64), (device, torch.float32):
        a = u.to(where, dtype, copy=True).requires_grad_()
        b = v.to(where, dtype, copy=True).requires_grad_()
        loss_fn = clip_loss if dtype == torch.float64 else tiled_clip_loss
        loss = loss_fn(a, b, torch.tensor(30.0, dtype=dtype).to(where))
        loss.backward()
        values.append(loss.item())
        grads.append(a.grad.double().cpu())
    error = (grads[1] - grads[0]).norm() / grads[0].norm()
    return {
        "what": f"tiled loss, B={B:,}",
        "value_error": abs(values[1] - values[0]),
        "gradient_error": error.item(),
        "ok": error.item() < 1e-4,
    }


def loss_memory(device: str, B: int) -> dict:
    """Peak bytes of both losses, forward and backward, on CUDA."""
    peaks = {}
    for loss_fn in tiled_clip_loss, clip_loss:
        u = torch.randn(B, 512, device=device, requires_grad=True)
        v = torch.randn(B, 512, device=device, requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_fn(u, v, 14.3).backward()
        peaks[loss_fn.__name__] = torch.cuda.max_memory_allocated() - before
    tiled, naive = peaks.values()
    what = f"memory of the loss, B={B:,}"
    return {"what": what, **peaks, "ok": naive > 5 * tiled}


def throughput(device: str, name: str, B: int, steps: int) -> dict:
    """Training steps of a CLIP with random weights: samples a second."""
    model = miniclip.CLIP(miniclip.CONFIGS[name]).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    precision = Precision(device=device)
    side = model.config.image_resolution
    images = torch.randn(B, 3, side, side, device=device)
    ids = miniclip.tokenize(["a photo of a cat"] * B).to(device)
    losses = []
    for step in range(steps + 1):
        if step == 1:  # the first one also fetches memory
            start = time.perf_counter()
        with precision.autocast():
            u, v = model.encode_image(images), model.encode_text(ids)
        loss = tiled_clip_loss(
            u.float(), v.float(), model.logit_scale.exp()
        )
        optimizer.zero_grad()
        precision.backward(loss)
        precision.step(optimizer)
        losses.append(loss.item())  # waits for the device
    seconds = time.perf_counter() - start
    return {
        "what": f"training steps of {name}, {B} pairs",
        "precision": str(precision.dtype),
        "samples_per_second": round(steps * B / seconds, 1),
        "ok": all(x == x for x in losses),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a quick try")
    parser.add_argument("--out", type=Path, help="where the rows are kept")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; try it with --device cpu --small")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    cuda, small = args.device.startswith("cuda"), args.small
    B, steps = (4, 1) if small else (128, 20)
    rows = [
        check_shipped_model(args.device),
        check_tiled_loss(args.device, 300 if small else 4096),
        throughput(args.device, "ViT-B/32", B, steps),
    ]
    if cuda and not small:
        rows.append(loss_memory(args.device, 16_384))
    for row in rows:
        print("ok    " if row["ok"] else "FAILED", row)
    name = torch.cuda.get_device_name() if cuda else "cpu"
    dtype = str(best_dtype(args.device))
    about = {"device": name, "dtype": dtype, "torch": torch.__version__}
    if args.out:
        text = json.dumps({**about, "rows": rows}, indent=1)
        args.out.write_text(text + "\n", encoding="utf-8")
    raise SystemExit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
