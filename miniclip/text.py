"""The text tower: a causal Transformer, read at the end-of-text token.

Written from book/chapters/03_text.md; edit that file.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention, (B, L, D) to (B, L, D).

    Its parameters have the names, shapes and starting values of those in
    nn.MultiheadAttention; heads must divide width (else ValueError).
    Source: Vaswani et al. 2017, section 3.2.

    Chapter: book/chapters/03_text.md
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(
                f"width {width} does not split into {heads} equal heads; "
                f"choose a multiple of {heads}"
            )
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, is_causal: bool = False) -> Tensor:
        """Let each position ask all others, or only those before it."""
        B, L, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.view(B, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, d)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return self.out_proj(y.transpose(1, 2).reshape(B, L, D))


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), a GELU without the error function.

    Source: Hendrycks and Gimpel 2016, section 2.

    Chapter: book/chapters/03_text.md
    """

    def forward(self, x: Tensor) -> Tensor:
        """Bend each number of x; the shape stays."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


def make_activation(name: str) -> nn.Module:
    """The bend of a tower; ValueError for a name not in ACTIVATIONS.

    Chapter: book/chapters/03_text.md
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"activation is {name!r}, expected one of {[*ACTIVATIONS]}"
        )
    return ACTIVATIONS[name]()


class ResidualAttentionBlock(nn.Module):
    """Attention, then an MLP, each added to the stream (B, L, D).

    Source: Vaswani et al. 2017, with the layer norms before the layers
        as in GPT-2 (Radford et al. 2019, section 2.3).

    Chapter: book/chapters/03_text.md
    """

    def __init__(
        self,
        width: int,
        heads: int,
        is_causal: bool = False,
        activation: str = "quick_gelu",
    ):
        super().__init__()
        self.is_causal = is_causal
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=make_activation(activation),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.attn(self.ln_1(x), self.is_causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks, (B, L, D) to (B, L, D).

    Chapter: book/chapters/03_text.md
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        is_causal: bool = False,
        activation: str = "quick_gelu",
    ):
        super().__init__()
        self.width, self.layers = width, layers
        sizes = width, heads, is_causal, activation
        self.resblocks = nn.Sequential(
            *[ResidualAttentionBlock(*sizes) for _ in range(layers)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.resblocks(x)


def init_blocks(transformer: Transformer) -> None:
    """Draw the blocks' weights as CLIP does; biases and norms stay.

    The 2 * layers additions to the stream sum to a size near one,
    however many layers there are.
    Source: initialize_parameters in openai/CLIP, clip/model.py.

    Chapter: book/chapters/03_text.md
    """
    width, layers = transformer.width, transformer.layers
    added = width**-0.5 * (2 * layers) ** -0.5
    for block in transformer.resblocks:
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=added)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=added)


def check_ids(ids: Tensor, context_length: int, vocab_size: int) -> None:
    """Raise ValueError, saying what is wrong, unless a tower can read ids.

    ids: (B, L) int64 or int32, L at most context_length, each id at
        least 0 and below vocab_size.

    Chapter: book/chapters/03_text.md
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids are {ids.dtype}, expected torch.int64")
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(
            f"ids have shape {tuple(ids.shape)}, expected (B, L) with at "
            "least one caption; a single caption needs ids[None]"
        )
    if ids.shape[1] > context_length:
        raise ValueError(
            f"ids have {ids.shape[1]} tokens a caption, the model reads "
            f"{context_length}; tokenize with context_length="
            f"{context_length} and truncate=True"
        )
    low, high = (int(i) for i in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"ids run from {low} to {high}, the model knows 0 to "
            f"{vocab_size - 1}; use the tokenizer it was trained with"
        )


def noise(std: float, *shape: int) -> nn.Parameter:
    """A parameter of random numbers with a standard deviation.

    Chapter: book/chapters/03_text.md
    """
    return nn.Parameter(std * torch.randn(shape))


class TextTransformer(nn.Module):
    """Token ids (B, L) to text_features (B, embed_dim).

    Names as in openai/CLIP. Source: Radford et al. 2021, section 2.4.

    Chapter: book/chapters/03_text.md
    """

    def __init__(
        self,
        embed_dim: int,
        context_length: int,
        vocab_size: int,
        width: int,
        heads: int,
        layers: int,
        activation: str = "quick_gelu",
    ):
        super().__init__()
        self.context_length, self.vocab_size = context_length, vocab_size
        self.token_embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = noise(0.01, context_length, width)
        sizes = width, layers, heads
        self.transformer = Transformer(*sizes, True, activation)
        init_blocks(self.transformer)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = noise(width**-0.5, width, embed_dim)

    def encode_text(self, ids: Tensor) -> Tensor:
        """(B, L) ids, ends marked by the highest -> (B, E), any length."""
        if not torch.compiler.is_compiling():  # a graph has no values yet
            check_ids(ids, self.context_length, self.vocab_size)
            ids = ids[:, : int(ids.argmax(dim=-1).max()) + 1]  # the longest
        end = ids.argmax(dim=-1)  # (B,), the first end-of-text token
        place = self.positional_embedding[: ids.shape[1]]  # (L, D)
        x = self.transformer(self.token_embedding(ids) + place)
        rows = torch.arange(x.shape[0], device=x.device)
        return self.ln_final(x[rows, end]) @ self.text_projection

    forward = encode_text
