"""The text tower against loops, torch, open_clip and transformers.

Towers are compared in float32, features and every gradient, to 1e-5.
"""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miniclip.text import (
    Attention,
    QuickGELU,
    ResidualAttentionBlock,
    TextTransformer,
    Transformer,
    check_ids,
    init_blocks,
)

SIZES = dict(  # small, and all different
    embed_dim=24,
    context_length=17,
    vocab_size=50,
    width=32,
    heads=4,
    layers=3,
)
LENGTHS = [3, 9, 2, 12]  # with start and end; nobody fills the 17


def captions(lengths=LENGTHS, vocab_size=50, context_length=17, seed=0):
    """Random ids between start (V - 2) and end (V - 1), zeros after."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), context_length, dtype=torch.long)
    for row, n in zip(ids, lengths):
        row[:n] = torch.randint(1, vocab_size - 2, (n,), generator=g)
        row[0], row[n - 1] = vocab_size - 2, vocab_size - 1
    return ids


def tower(**changes):
    """A tower in which no bias is zero and no gain is one."""
    torch.manual_seed(0)
    model = TextTransformer(**{**SIZES, **changes})
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval()


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)


def gradients(model, features):
    """Gradients of a loss that asks for another amount of each number."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, features.numel()).view_as(features)
    (features * weights).sum().backward()
    return {n: p.grad for n, p in model.named_parameters()}


def attention_by_loops(layer, x, is_causal):
    """Vaswani et al. 2017, equation 1, a number at a time."""
    B, L, D = x.shape
    d = D // layer.heads
    q, k, v = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(
        3, dim=-1
    )
    y = torch.zeros_like(x)
    for b in range(B):
        for h in range(layer.heads):
            part = slice(h * d, (h + 1) * d)
            for i in range(L):
                seen = range(i + 1) if is_causal else range(L)
                e = [
                    math.exp(q[b, i, part] @ k[b, j, part] / d**0.5)
                    for j in seen
                ]
                for j in seen:
                    y[b, i, part] += e[j] / sum(e) * v[b, j, part]
    return layer.out_proj(y)


@pytest.mark.parametrize("is_causal", [False, True])
@torch.no_grad()
def test_attention_is_the_double_loop(is_causal):
    torch.manual_seed(0)
    layer, x = Attention(12, 3), torch.randn(2, 5, 12)
    nn.init.normal_(layer.in_proj_bias)
    nn.init.normal_(layer.out_proj.bias)
    close(layer(x, is_causal), attention_by_loops(layer, x, is_causal))


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_torchs_own_layer(is_causal):
    torch.manual_seed(0)
    ours, theirs = (
        Attention(32, 4),
        nn.MultiheadAttention(32, 4, batch_first=True),
    )
    nn.init.normal_(ours.in_proj_bias)
    nn.init.normal_(ours.out_proj.bias)
    theirs.load_state_dict(ours.state_dict())  # strict: the same names
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(3, 7, 32)
    mask = torch.full((7, 7), -math.inf).triu(1) if is_causal else None
    a = ours(x, is_causal)
    b = theirs(x, x, x, need_weights=False, attn_mask=mask)[0]
    close(a, b)
    ga, gb = gradients(ours, a), gradients(theirs, b)
    for name in ga:
        close(ga[name], gb[name])


def test_attention_starts_as_torchs_own_layer():
    torch.manual_seed(0)
    ours, theirs = Attention(64, 4), nn.MultiheadAttention(64, 4)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert a.shape == b.shape
        close(a.std(unbiased=False), b.std(unbiased=False), atol=5e-3)
        assert a.abs().max() <= 1.1 * b.abs().max()


def test_quickgelu_by_hand():
    x = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    want = [v / (1 + math.exp(-1.702 * v)) for v in (-2.0, 0.0, 1.0, 3.0)]
    close(QuickGELU()(x), torch.tensor(want))
    z = torch.linspace(-8, 8, 1001)
    assert 0.01 < (QuickGELU()(z) - F.gelu(z)).abs().max() < 0.021


def test_activation_is_chosen_by_name():
    torch.manual_seed(0)
    quick = ResidualAttentionBlock(8, 2)
    exact = ResidualAttentionBlock(8, 2, activation="gelu")
    exact.load_state_dict(quick.state_dict())
    assert type(quick.mlp.gelu) is QuickGELU
    x = torch.randn(2, 3, 8)
    exact.mlp.gelu, kept = quick.mlp.gelu, exact.mlp.gelu
    close(exact(x), quick(x))
    exact.mlp.gelu = kept
    assert (exact(x) - quick(x)).abs().max() > 1e-4
    with pytest.raises(ValueError, match="'relu', expected one of"):
        ResidualAttentionBlock(8, 2, activation="relu")


def test_a_causal_block_never_looks_ahead():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 32)
    changed = x.clone()
    changed[:, 4:] = torch.randn(2, 2, 32)
    causal = Transformer(32, 2, 4, is_causal=True)
    assert torch.equal(causal(x)[:, :4], causal(changed)[:, :4])
    assert (causal(x) != causal(changed))[:, 4:].any()
    open_eyes = Transformer(32, 2, 4)
    assert (open_eyes(x) != open_eyes(changed)).any(dim=-1).all()


def test_without_mask_order_means_nothing():
    torch.manual_seed(0)
    model, x = Transformer(32, 2, 4), torch.randn(2, 6, 32)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    close(model(x[:, order]), model(x)[:, order])


def test_block_normalises_what_a_layer_reads():
    """Pre-norm: with silent layers the stream passes untouched."""
    block, x = ResidualAttentionBlock(32, 4), 100 * torch.randn(1, 3, 32)
    for p in (
        *block.attn.out_proj.parameters(),
        *block.mlp.c_proj.parameters(),
    ):
        nn.init.zeros_(p)
    assert torch.equal(block(x), x)


# The oracle: open_clip and transformers, built from our own weights


def open_clip_tower(model, **sizes):
    open_clip = pytest.importorskip("open_clip.model")
    s = {**SIZES, **sizes}
    theirs = open_clip.CLIP(
        s["embed_dim"],
        open_clip.CLIPVisionCfg(
            layers=1, width=64, image_size=8, patch_size=8
        ),
        open_clip.CLIPTextCfg(
            context_length=s["context_length"],
            vocab_size=s["vocab_size"],
            width=s["width"],
            heads=s["heads"],
            layers=s["layers"],
        ),
        quick_gelu=True,
    ).eval()
    state = theirs.state_dict()
    text = [
        k
        for k in state
        if not k.startswith(("visual.", "logit_", "attn_mask"))
    ]
    assert sorted(text) == sorted(model.state_dict())
    theirs.load_state_dict({**state, **model.state_dict()})
    return theirs


@pytest.mark.parametrize("seed", [0, 1])
def test_open_clip_features_and_every_gradient(seed):
    ours = tower()
    theirs = open_clip_tower(ours)
    ids = captions(seed=seed)
    a, b = ours.encode_text(ids), theirs.encode_text(ids)
    close(a, b)
    ga, gb = gradients(ours, a), gradients(theirs, b)
    for name, grad in ga.items():
        assert grad.abs().max() > 0, name  # nothing is compared for free
        close(grad, gb[name])


def test_transformers_features():
    transformers = pytest.importorskip("transformers")
    ours, s = tower(), SIZES
    theirs = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=s["vocab_size"],
            hidden_size=s["width"],
            intermediate_size=4 * s["width"],
            projection_dim=s["embed_dim"],
            num_hidden_layers=s["layers"],
            num_attention_heads=s["heads"],
            max_position_embeddings=s["context_length"],
            hidden_act="quick_gelu",
            bos_token_id=s["vocab_size"] - 2,
            eos_token_id=s["vocab_size"] - 1,
        )
    ).eval()
    missing = theirs.load_state_dict(
        hf_names(ours.state_dict()), strict=False
    )
    assert not missing.unexpected_keys
    assert all("position_ids" in k for k in missing.missing_keys)
    with torch.no_grad():
        close(
            ours.encode_text(captions()),
            theirs(input_ids=captions()).text_embeds,
        )


def hf_names(state):
    """openai/CLIP's names of a text tower -> those of transformers."""
    out = {
        "text_model.embeddings.token_embedding.weight": state[
            "token_embedding.weight"
        ],
        "text_model.embeddings.position_embedding.weight": state[
            "positional_embedding"
        ],
        "text_projection.weight": state["text_projection"].T,
    }
    for kind in "weight", "bias":
        out[f"text_model.final_layer_norm.{kind}"] = state[
            f"ln_final.{kind}"
        ]
    for key, value in state.items():
        if not key.startswith("transformer.resblocks."):
            continue
        _, _, i, *rest = key.split(".")
        name = ".".join(rest)
        pre = f"text_model.encoder.layers.{i}."
        if name.startswith("attn.in_proj"):
            kind = name.removeprefix("attn.in_proj_")
            for letter, part in zip("qkv", value.chunk(3)):
                out[f"{pre}self_attn.{letter}_proj.{kind}"] = part
            continue
        for old, new in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ):
            if name.startswith(old):
                out[pre + name.replace(old, new)] = value
    return out


# Where the feature is read, and what does not matter


@torch.no_grad()
def test_junk_after_the_end_changes_no_bit():
    model, ids = tower(), captions()
    after = torch.arange(17) > ids.argmax(-1, keepdim=True)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        junk = torch.randint(0, 48, ids.shape, generator=g)
        noisy = torch.where(after, junk, ids)
        assert torch.equal(model.encode_text(ids), model.encode_text(noisy))


def test_the_cut_is_exact():
    """Padded to 12, to 17, or alone: the same feature and gradients."""
    model = tower().double()
    long, short = captions(), captions()[:, :12]
    a, b = model.encode_text(long), model.encode_text(short)
    close(a, b, atol=1e-12)
    alone = torch.cat([model.encode_text(row[None]) for row in long])
    close(a, alone, atol=1e-12)
    ga, gb = gradients(model, a), gradients(model, alone)
    for name in ga:
        close(ga[name], gb[name], atol=1e-12)


def test_the_cut_happens():
    model, seen = tower(), []
    model.transformer.register_forward_hook(
        lambda _, args, out: seen.append(args[0].shape)
    )
    model.encode_text(captions())
    assert seen == [(4, 12, 32)]  # the longest has 12 tokens


def test_a_traced_tower_neither_checks_nor_cuts():
    """While a graph is written there are no ids to look at."""
    model, ids = tower(), torch.zeros(2, 7, dtype=torch.long)
    ids[:, 2] = model.vocab_size - 1
    lengths = []
    model.transformer.register_forward_hook(
        lambda m, a, y: lengths.append(y.shape[1])
    )
    with torch.no_grad():
        usual = model.encode_text(ids)
        with mock.patch("torch.compiler.is_compiling", lambda: True):
            with mock.patch("miniclip.text.check_ids") as check:
                traced = model.encode_text(ids)
    assert lengths == [3, 7] and not check.called
    torch.testing.assert_close(traced, usual, atol=1e-5, rtol=1e-5)


def test_positions_after_the_longest_get_no_gradient():
    model = tower()
    grad = gradients(model, model.encode_text(captions()))[
        "positional_embedding"
    ]
    assert (grad[:12].norm(dim=1) > 0).all()
    assert not grad[12:].any()


@torch.no_grad()
def test_the_first_of_two_ends_counts():
    model, ids = tower(), captions([6])
    twice = ids.clone()
    twice[0, 9] = 49
    assert torch.equal(model.encode_text(twice), model.encode_text(ids))


@torch.no_grad()
def test_every_token_before_the_end_matters():
    model, ids = tower(), captions([9])
    feature = model.encode_text(ids)
    for i in range(9):
        other = ids.clone()
        other[0, i] = (ids[0, i] + 1) % 48 if i < 8 else 48
        assert not torch.equal(model.encode_text(other), feature), i


@torch.no_grad()
def test_order_matters():
    model, ids = tower(), captions([6])
    swapped = ids[:, [0, 2, 1, 3, 4, 5, *range(6, 17)]]
    gap = model.encode_text(ids) - model.encode_text(swapped)
    assert gap.abs().max() > 1e-3


@torch.no_grad()
def test_a_full_context_and_int32_ids():
    model, ids = tower(), captions([17, 17])
    assert model.encode_text(ids).shape == (2, 24)
    assert torch.equal(model.encode_text(ids.int()), model.encode_text(ids))


# Size and start


@pytest.mark.parametrize(
    "width, heads, layers, embed_dim, total",
    [  # clip-of-the-paper sizes; the totals without the scale
        (512, 8, 12, 512, 63_428_096),  # ViT-B/32 and ViT-B/16
        (768, 12, 12, 768, 123_650_304),  # ViT-L/14 and L/14@336
    ],
)
def test_parameters_of_the_paper(width, heads, layers, embed_dim, total):
    with torch.device("meta"):
        model = TextTransformer(embed_dim, 77, 49408, width, heads, layers)
    n = sum(p.numel() for p in model.parameters())
    w, e = width, embed_dim
    blocks = layers * (12 * w * w + 13 * w)
    assert n == total == 49408 * w + 77 * w + blocks + 2 * w + w * e


def test_starting_sizes_are_openais():
    torch.manual_seed(0)
    w, layers = 128, 8
    model = TextTransformer(64, 77, 500, w, 4, layers)
    added = w**-0.5 * (2 * layers) ** -0.5
    want = {
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection": w**-0.5,
        "attn.in_proj_weight": w**-0.5,
        "attn.out_proj.weight": added,
        "mlp.c_fc.weight": (2 * w) ** -0.5,
        "mlp.c_proj.weight": added,
    }
    found = set()
    for name, p in model.named_parameters():
        for end, std in want.items():
            if name.endswith(end):
                assert abs(p.std() / std - 1) < 0.05, name
                assert abs(p.mean()) < 0.1 * std, name
                found.add(end)
    assert found == set(want)


@torch.no_grad()
def test_the_stream_does_not_grow_with_depth():
    for layers in 2, 24:
        torch.manual_seed(0)
        model = Transformer(64, layers, 4, is_causal=True)
        init_blocks(model)
        assert 0.5 < model(0.02 * torch.randn(16, 12, 64)).std() < 1.5


# Errors that say what to do


@pytest.mark.parametrize(
    "ids, words",
    [
        (
            torch.zeros(2, 18, dtype=torch.long),
            ["18", "17", "truncate=True"],
        ),
        (torch.zeros(2, 17), ["torch.float32", "torch.int64"]),
        (torch.zeros(2, 17, dtype=torch.bool), ["torch.bool"]),
        (
            torch.zeros(17, dtype=torch.long),
            ["(17,)", "(B, L)", "ids[None]"],
        ),
        (torch.zeros(1, 2, 17, dtype=torch.long), ["(1, 2, 17)"]),
        (torch.zeros(0, 17, dtype=torch.long), ["(0, 17)"]),
        (torch.zeros(2, 0, dtype=torch.long), ["(2, 0)"]),
        (torch.full((1, 17), 50), ["50", "0 to 49", "tokenizer"]),
        (torch.full((1, 17), -1), ["-1", "0 to 49"]),
    ],
)
def test_bad_ids_are_refused_in_words(ids, words):
    with pytest.raises(ValueError) as error:
        tower().encode_text(ids)
    for word in words:
        assert word in str(error.value)


def test_good_ids_pass():
    check_ids(torch.tensor([[0, 49]]), 17, 50)
    check_ids(torch.zeros(1, 17, dtype=torch.int32), 17, 50)


def test_heads_must_divide_width():
    with pytest.raises(ValueError, match="width 30 .* 4 equal heads"):
        Attention(30, 4)
