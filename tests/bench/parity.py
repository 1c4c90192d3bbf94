"""The nine models of the paper beside open_clip and transformers.

    python tests/bench/parity.py --out data/results/parity.json

Full width, depth and resolution, random weights, float32 on the CPU. Both
sides get the same weights (strictly, by name), pictures and token ids, and
compute the same weighted sum of their logits backwards. A row says how far
they are apart: the largest difference of two numbers, divided by the
largest number of the other library (for gradients: in the same parameter,
see `gradient_gap`). Zero means equal to the last bit. Two pairs for each
model, one for those above 500 million parameters, so that 8 GB of memory
are enough. Rows that are already in the output file are not run again, so
that the nine need not be compared in one go: name some with --models.
tests/test_model.py does the same with few blocks and small pictures.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import miniclip
from miniclip.model import CLIP, CONFIGS, CLIPConfig
from miniclip.resnet import ModifiedResNet

FLOOR = 1e-2  # of the largest gradient; below it rounding is all


def name_in_open_clip(name: str) -> str:
    """ViT-L/14@336px -> ViT-L-14-336-quickgelu."""
    name = name.replace("/", "-").replace("@336px", "-336")
    return f"{name}-quickgelu"


def random_model(config: CLIPConfig, seed: int = 0) -> CLIP:
    """A CLIP in which no gain is zero or one, and no bias is zero."""
    torch.manual_seed(seed)
    model = CLIP(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.1 * torch.randn_like(p)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if isinstance(model.visual, ModifiedResNet):  # settle the averages
        with torch.no_grad():
            model.train().encode_image(batch(config, 2)[0])
    return model.eval()


def batch(config: CLIPConfig, n: int, seed: int = 1):
    """Pictures, ids with one caption of full length and junk after ends."""
    g = torch.Generator().manual_seed(seed)
    H, V, L = (
        config.image_resolution,
        config.vocab_size,
        config.context_length,
    )
    image = torch.randn(n, 3, H, H, generator=g)
    ids = torch.randint(1, V - 1, (n, L), generator=g)
    for i in range(n):
        ids[i, L - 1 - 7 * i % (L - 2)] = V - 1
    return image, ids


def open_clip_twin(model: CLIP, vision=(), text=()) -> nn.Module:
    """open_clip's model of that name or these changes, with our weights."""
    name = next((n for n, c in CONFIGS.items() if c == model.config), None)
    if name:
        preset = open_clip.get_model_config(name_in_open_clip(name))
    else:
        preset = dict(vision_cfg={}, text_cfg={}, quick_gelu=True)
    with torch.device("meta"):
        twin = open_clip.model.CLIP(
            model.config.embed_dim,
            {**preset["vision_cfg"], **dict(vision)},
            {**preset["text_cfg"], **dict(text)},
            quick_gelu=preset["quick_gelu"],
        )
    state = {n: t.detach() for n, t in model.state_dict().items()}
    twin.load_state_dict(state, strict=True, assign=True)
    length = model.config.context_length
    mask = torch.full((length, length), float("-inf")).triu_(1)
    twin.register_buffer("attn_mask", mask, persistent=False)
    return twin.eval()


def hf_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of openai/CLIP -> under transformers'."""
    whole = {
        "logit_scale": "logit_scale",
        "token_embedding.weight": "text_model.embeddings.token_embedding.",
        "positional_embedding": "text_model.embeddings.position_embedding.",
        "ln_final": "text_model.final_layer_norm",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": (
            "vision_model.embeddings.position_embedding."
        ),
        "visual.conv1": "vision_model.embeddings.patch_embedding",
        "visual.ln_pre": "vision_model.pre_layrnorm",  # their spelling
        "visual.ln_post": "vision_model.post_layernorm",
    }
    out = {
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
    }
    for name, tensor in state.items():
        if "resblocks" in name:
            out.update(_hf_block(name, tensor))
            continue
        for ours, theirs in whole.items():
            if name.startswith(ours):
                ending = "weight" if theirs.endswith(".") else ""
                rest = "" if ending else name[len(ours) :]
                out[theirs + ending + rest] = tensor
    return out


def _hf_block(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of a block; q, k and v are three of theirs."""
    tower = "vision_model" if name.startswith("visual.") else "text_model"
    i, rest = name.split("resblocks.")[1].split(".", 1)
    start = f"{tower}.encoder.layers.{i}."
    if "in_proj_" in rest:
        kind = rest.split("in_proj_")[1]
        return {
            f"{start}self_attn.{letter}_proj.{kind}": part
            for letter, part in zip("qkv", tensor.chunk(3))
        }
    for ours, theirs in (
        ("attn.", "self_attn."),
        ("ln_", "layer_norm"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
    ):
        rest = rest.replace(ours, theirs)
    return {start + rest: tensor}


def transformers_twin(model: CLIP) -> nn.Module:
    """Hugging Face's CLIPModel with the weights of our ViT."""
    c = model.config
    vision = dict(
        hidden_size=c.vision_width,
        intermediate_size=4 * c.vision_width,
        num_hidden_layers=c.vision_layers,
        num_attention_heads=c.vision_heads or c.vision_width // 64,
        image_size=c.image_resolution,
        patch_size=c.vision_patch_size,
    )
    text = dict(
        hidden_size=c.transformer_width,
        intermediate_size=4 * c.transformer_width,
        num_hidden_layers=c.transformer_layers,
        num_attention_heads=c.transformer_heads,
        max_position_embeddings=c.context_length,
        vocab_size=c.vocab_size,
        eos_token_id=c.vocab_size - 1,
        bos_token_id=c.vocab_size - 2,
        pad_token_id=0,
    )
    config = transformers.CLIPConfig(
        vision_config=vision, text_config=text, projection_dim=c.embed_dim
    )
    with torch.device("meta"):
        twin = transformers.CLIPModel(config)
    state = {n: t.detach() for n, t in model.state_dict().items()}
    twin.load_state_dict(hf_names(state), strict=True, assign=True)
    for part in twin.modules():  # the buffers that no file holds
        ids = getattr(part, "position_ids", None)
        if isinstance(ids, Tensor) and ids.is_meta:
            ids = torch.arange(ids.shape[-1])[None]
            part.register_buffer("position_ids", ids, persistent=False)
    return twin.eval()


def run_ours(model, image, ids):
    """image_features, text_features, logits; with gradients."""
    u, v = model.encode_image(image), model.encode_text(ids)
    cosines = F.normalize(u, dim=-1) @ F.normalize(v, dim=-1).T
    return u, v, model.logit_scale.exp() * cosines


def run_transformers(model, image, ids):
    """The same of a CLIPModel."""
    u = model.get_image_features(pixel_values=image)
    v = model.get_text_features(input_ids=ids)
    u, v = (getattr(f, "pooler_output", f) for f in (u, v))
    out = F.normalize(u, dim=-1) @ F.normalize(v, dim=-1).T
    return u, v, model.logit_scale.exp() * out


def gap(ours: Tensor, theirs: Tensor, floor: float = 0.0) -> float:
    """The largest difference as a share of the largest number."""
    size = max(theirs.abs().max().item(), floor)
    return (ours - theirs).abs().max().item() / size if size else 0.0


def gradient_gap(ours: Tensor, theirs: Tensor, largest: float) -> float:
    """As gap; a gradient that is all rounding counts as FLOOR * largest.

    The key biases of an attention are an example: they add the same to
    all products of a query, which a softmax does not notice, so that
    their true gradient is zero.
    """
    return gap(ours, theirs, FLOOR * largest)


def compare(model: CLIP, library: str, n: int, **changes) -> dict:
    """One row: how far model and its twin are apart."""
    image, ids = batch(model.config, n)
    seed = torch.randn(n, n, generator=torch.Generator().manual_seed(2))
    mine = run_ours(model, image, ids)
    model.zero_grad()
    (mine[2] * seed).sum().backward()
    grads = {k: p.grad for k, p in model.named_parameters()}
    model.zero_grad()
    mine = [t.detach() for t in mine]
    largest = max(g.abs().max().item() for g in grads.values())
    if library == "transformers":
        twin, run = transformers_twin(model), run_transformers
        grads = hf_names(grads)
    else:
        twin, run = open_clip_twin(model, **changes), run_ours
    found = {}

    def check(name):
        def look(p):  # and forget, so that no second set fills the memory
            found[name] = gradient_gap(grads.pop(name), p.grad, largest)
            p.grad = None

        return look

    for name, p in twin.named_parameters():
        p.register_post_accumulate_grad_hook(check(name))
    theirs = run(twin, image, ids)
    (theirs[2] * seed).sum().backward()
    assert not grads, f"not compared: {sorted(grads)}"
    names = "image_features", "text_features", "logits"
    row = {k: gap(a, b.detach()) for k, a, b in zip(names, mine, theirs)}
    row["gradients"] = max(found.values())
    row["gradients_compared"] = len(found)
    row["gradients_bit_exact"] = sum(g == 0 for g in found.values())
    return row


def rows_of(name: str, done: set) -> Iterator[dict]:
    """The rows of one model, without those that are done."""
    libraries = ["open_clip"]
    if isinstance(CONFIGS[name].vision_layers, int):
        libraries.append("transformers")  # which has no ResNet
    libraries = [x for x in libraries if (name, x) not in done]
    if not libraries:
        return
    model = random_model(CONFIGS[name])
    count = sum(p.numel() for p in model.parameters())
    n = 1 if count > 5e8 else 2
    for library in libraries:
        row = dict(model=name, library=library, parameters=count, pairs=n)
        yield row | compare(model, library, n)


def main() -> None:
    """Compare what is asked for and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=list(CONFIGS))
    args = parser.parse_args()
    result = {
        "command": "python tests/bench/parity.py --out "
        "data/results/parity.json",
        "what": "largest difference / largest number, float32, CPU",
        "miniclip": miniclip.__version__,
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, threads: "
        f"{torch.get_num_threads()}",
        "date": time.strftime("%Y-%m-%d"),
        "rows": [],
    }
    if args.out.exists():
        result["rows"] = json.loads(args.out.read_text())["rows"]
    done = {(r["model"], r["library"]) for r in result["rows"]}
    for name in args.models:
        for row in rows_of(name, done):
            print(row, flush=True)
            result["rows"].append(row)
            order = list(CONFIGS)
            result["rows"].sort(
                key=lambda r: (order.index(r["model"]), r["library"])
            )
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
