"""Memory: the gradient of a large batch in the memory of a small one.

Written from book/chapters/09_memory.md; edit that file.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from miniclip.loss import _check
from miniclip.model import CLIP
from miniclip.text import ResidualAttentionBlock
from miniclip.vit import VisionTransformer


def _tiles(
    rows: Tensor,
    columns: Tensor,
    row_ids: Tensor,
    column_ids: Tensor,
    scale: float,
    tile: int,
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Each tile (I, J) of the logits, and room for another of its shape.

    Where the ids are equal the logits are -inf: those are no mistakes.
    """
    size = min(tile, len(rows)) * min(tile, len(columns))
    room = rows.new_empty(2, size)
    for i in range(0, len(rows), tile):
        for j in range(0, len(columns), tile):
            I, J = slice(i, i + tile), slice(j, j + tile)
            a, b = rows[I], columns[J]
            z, spare = room[:, : len(a) * len(b)].view(2, len(a), len(b))
            torch.addmm(z, a, b.T, beta=0, alpha=scale, out=z)
            m, n = row_ids[I], column_ids[J]
            if m.min() <= n.max() and n.min() <= m.max():
                z.masked_fill_(m[:, None] == n, -math.inf)
            yield I, J, z, spare


def _shift(scale: float) -> float:
    """What to subtract from logits of at most |scale| before the exp."""
    return max(0.0, abs(scale) - 60)


def log_sums(
    rows: Tensor,
    columns: Tensor,
    row_ids: Tensor,
    column_ids: Tensor,
    scale: float,
    tile: int,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the logits of wrong pairs, by row and by column.

    Args:
        rows: (N, E) and columns: (M, E), of length 1.
        row_ids: (N,) and column_ids: (M,); pairs with equal ids are right.

    Returns: (N,) and (M,); -inf where no pair is wrong.

    Chapter: book/chapters/09_memory.md
    """
    shift = _shift(scale)
    by_row = rows.new_full((len(rows),), -math.inf)
    by_column = rows.new_full((len(columns),), -math.inf)
    parts = rows, columns, row_ids, column_ids, scale, tile
    for I, J, z, spare in _tiles(*parts):
        e = torch.sub(z, shift, out=spare).exp_()
        r, c = e.sum(dim=1), e.sum(dim=0)
        if min(r.min(), c.min()) > 1e-20:
            r, c = r.log() + shift, c.log() + shift
        else:  # some row or column lies far below the others
            r, c = z.logsumexp(dim=1), z.logsumexp(dim=0)
        by_row[I] = by_row[I].logaddexp(r)
        by_column[J] = by_column[J].logaddexp(c)
    return by_row, by_column


def pushes(
    rows: Tensor,
    columns: Tensor,
    row_ids: Tensor,
    column_ids: Tensor,
    by_row: Tensor,
    by_column: Tensor,
    scale: float,
    tile: int,
) -> tuple[Tensor, Tensor]:
    """What wrong pairs add to 2 B / scale times the gradient of the rows.

    by_row (N,), by_column (M,): log-sum-exp of the logits of all pairs, of
    wrong and right ones. Returns: (N, E), and (M, E) for the columns.

    Chapter: book/chapters/09_memory.md
    """
    shift = _shift(scale)
    alpha, beta = (shift - by_row).exp(), (shift - by_column).exp()
    near = shift - min(by_row.min(), by_column.min()) < 40
    on_rows, on_columns = torch.zeros_like(rows), torch.zeros_like(columns)
    parts = rows, columns, row_ids, column_ids, scale, tile
    for I, J, z, spare in _tiles(*parts):
        if near:  # one exp for both softmaxes
            torch.add(alpha[I, None], beta[J], out=spare)
            p = z.sub_(shift).exp_().mul_(spare)
        else:
            torch.sub(z, by_row[I, None], out=spare).exp_()
            p = z.sub_(by_column[J]).exp_().add_(spare)
        on_rows[I].addmm_(p, columns[J])
        on_columns[J].addmm_(p.T, rows[I])
    return on_rows, on_columns


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1, and the lengths (B, 1) that they had."""
    length = x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return x / length, length


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(B, E) and (B, E) -> (B, 1) row by row, with no third (B, E)."""
    return torch.einsum("be,be->b", a, b)[:, None]


def _through_unit(g: Tensor, u: Tensor, length: Tensor) -> Tensor:
    """Turn the gradient of u = x / length into that of x, in place."""
    return g.addcmul_(u, _dot(g, u), value=-1).div_(length)


def _no_autocast(x: Tensor) -> torch.autocast:
    """Logits are never rounded to half precision."""
    return torch.autocast(x.device.type, enabled=False)


class _TiledClip(torch.autograd.Function):
    """clip_loss without its matrix: saves O(B E) numbers."""

    @staticmethod
    def forward(ctx, x, y, s, ids, tile):
        with _no_autocast(x):
            (u, x_length), (v, y_length) = _unit(x), _unit(y)
            right = s.view(()) * _dot(u, v)[:, 0]
            logs = log_sums(u, v, ids, ids, float(s), tile)
        kept = u, v, x_length, y_length, s, ids, right, *logs
        ctx.save_for_backward(*kept)
        ctx.tile = tile
        margins = torch.stack(logs) - right  # (2, B)
        return margins.logaddexp(torch.zeros_like(margins)).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        u, v, x_length, y_length, s, ids, right, *logs = ctx.saved_tensors
        pull = -sum((log - right).sigmoid() for log in logs)[:, None]
        logs = [log.logaddexp(right) for log in logs]
        with _no_autocast(u):
            du, dv = pushes(u, v, ids, ids, *logs, float(s), ctx.tile)
            du.addcmul_(v, pull)
            dv.addcmul_(u, pull)
            k = gradient / (2 * len(u))
            ds = (k * _dot(u, du).sum()).view(s.shape)
            du = _through_unit(du.mul_(k * s), u, x_length)
            dv = _through_unit(dv.mul_(k * s), v, y_length)
        return du, dv, ds, None, None


def _prepare(
    image_features: Tensor,
    text_features: Tensor,
    concepts: Tensor | None,
    tile: int,
    **scalars: Tensor | float,
) -> list[Tensor]:
    """Features and scalars, checked and widened, and the pairs' ids."""
    _check(image_features, text_features, **scalars)
    if tile < 1:
        raise ValueError(f"tile is {tile}, expected 1 or more, say 1024")
    B, device = len(image_features), image_features.device
    if concepts is None:
        concepts = torch.arange(B)
    ids = torch.as_tensor(concepts, device=device)
    if ids.shape != (B,):
        raise ValueError(
            f"concepts has shape {tuple(ids.shape)}, expected ({B},): one "
            "number for each pair"
        )
    wide = torch.promote_types(image_features.dtype, text_features.dtype)
    wide = torch.promote_types(wide, torch.float32)
    values = image_features, text_features, *scalars.values()
    return [
        torch.as_tensor(x, dtype=wide, device=device) for x in values
    ] + [ids]


def tiled_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    concepts: Tensor | None = None,
    tile: int = 1024,
) -> Tensor:
    """clip_loss, value and gradients, in memory O(B E + tile**2).

    Args:
        image_features, text_features: (B, E); row i of both is pair i.
        logit_scale: the factor s > 0 itself, not its logarithm.
        concepts: (B,) integers, optional, as in clip_loss.
        tile: rows and columns computed at once, 1024 on a CPU.

    Raises: ValueError for shapes that do not fit.

    Source: the idea is that of Cheng et al. 2024 (Inf-CL); the formulas,
        with wrong pairs only and one exp for both directions, are ours.

    Chapter: book/chapters/09_memory.md
    """
    parts = image_features, text_features, concepts, tile
    *values, ids = _prepare(*parts, logit_scale=logit_scale)
    return _TiledClip.apply(*values, ids, tile)


class _TiledSiglip(torch.autograd.Function):
    """siglip_loss without its matrix: gradients in the forward pass."""

    @staticmethod
    def forward(ctx, x, y, s, b, ids, tile, wanted):
        scale, bias, B = float(s), float(b), len(x)
        with _no_autocast(x):
            (u, x_length), (v, y_length) = _unit(x), _unit(y)
            right = scale * _dot(u, v) + bias  # (B, 1)
            loss, pull = -F.logsigmoid(right).sum(), -(-right).sigmoid()
            du, dv, db = v * pull, u * pull, pull.sum()
            for I, J, z, spare in _tiles(u, v, ids, ids, scale, tile):
                loss += F.softplus(z.add_(bias), threshold=50).sum()
                if wanted:
                    p = torch.sigmoid(z, out=spare)
                    du[I].addmm_(p, v[J])
                    dv[J].addmm_(p.T, u[I])
                    db += p.sum()
            ds = _dot(u, du).sum().view(s.shape) / B
            du = _through_unit(du.mul_(scale / B), u, x_length)
            dv = _through_unit(dv.mul_(scale / B), v, y_length)
        ctx.save_for_backward(du, dv, ds, db.view(b.shape) / B)
        return loss / B

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return *[gradient * g for g in ctx.saved_tensors], None, None, None


def tiled_siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    tile: int = 1024,
) -> Tensor:
    """siglip_loss, value and gradients, in memory O(B E + tile**2).

    Arguments and errors: those of siglip_loss; tile as in tiled_clip_loss.

    Chapter: book/chapters/09_memory.md
    """
    scalars = {"logit_scale": logit_scale, "logit_bias": logit_bias}
    parts = image_features, text_features, None, tile
    *values, ids = _prepare(*parts, **scalars)
    wanted = torch.is_grad_enabled()
    return _TiledSiglip.apply(*values, ids, tile, wanted)


def _random_state(device: torch.device) -> list[Tensor]:
    """The state of the generators that a tower on device draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _check_cached(model: nn.Module, images: Tensor, micro: int) -> None:
    """Raise ValueError where micro-batches are not the same as a batch."""
    if micro < 1:
        raise ValueError(f"micro_batch is {micro}, expected 1 or more")
    if torch.is_autocast_enabled(images.device.type):
        raise ValueError(
            "cached_backward inside autocast would run the backward pass "
            "in half precision too; call it outside, pass precision="
        )
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"{name} is a batch norm: it would normalise by micro-"
                "batches, and the features would not be those of the "
                "batch. Take a ViT, or freeze the norms with .eval()"
            )


def length_buckets(ids: Tensor, size: int) -> list[Tensor]:
    """(B, L) token ids -> the rows, short captions first, size at a time.

    Encoding bucket by bucket is exact, and cheap, for towers that cut a
    batch to its longest caption, as encode_text does.

    Chapter: book/chapters/09_memory.md
    """
    return list(ids.argmax(dim=-1).argsort(stable=True).split(size))


def _micro_batches(model: CLIP, images: Tensor, ids: Tensor, size: int):
    """What there is to encode: 0 or 1, rows, tower, what it reads."""
    for i in torch.arange(len(images), device=images.device).split(size):
        yield 0, i, model.encode_image, images
    for i in length_buckets(ids, size):
        yield 1, i, model.encode_text, ids


@torch.no_grad()
def _encode_all(parts: list, autocast: Callable) -> tuple[list, list]:
    """The features of both sides, as leaves, and the random states."""
    features, rows, states = ([], []), ([], []), []
    for side, i, encode, inputs in parts:
        states.append(_random_state(inputs.device))
        with autocast():
            features[side].append(encode(inputs[i]))
        rows[side].append(i)
    leaves = [
        torch.cat(f)[torch.cat(r).argsort()].requires_grad_()
        for f, r in zip(features, rows)
    ]
    return leaves, states


def cached_backward(
    model: CLIP,
    images: Tensor,
    ids: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    micro_batch: int,
    precision: "Precision | None" = None,
) -> Tensor:
    """Do what loss.backward() does, for a batch that would not fit.

    Args:
        images: (B, 3, H, W), preprocessed. ids: (K, L); K may differ from
            B if loss_fn knows which caption is whose.
        loss_fn: all image_features and all text_features -> the loss. The
            scale and the bias that it uses get their gradient too.
        micro_batch: how many pictures, or captions, are encoded at once.
        precision: in which the towers run; float32 if None.

    Returns: the loss, detached; gradients are added to each .grad.

    Raises: ValueError for batch norms in training, or inside autocast.

    Source: Gao et al. 2021 (GradCache), section 3.

    Chapter: book/chapters/09_memory.md
    """
    _check_cached(model, images, micro_batch)
    autocast = precision.autocast if precision else nullcontext
    parts = list(_micro_batches(model, images, ids, micro_batch))
    leaves, states = _encode_all(parts, autocast)
    loss = loss_fn(*leaves)
    (precision.backward if precision else Tensor.backward)(loss)
    after = _random_state(images.device)
    for (side, i, encode, inputs), state in zip(parts, states):
        _set_random_state(inputs.device, state)
        with autocast():
            y = encode(inputs[i])
        y.backward(leaves[side].grad[i])
    _set_random_state(images.device, after)
    return loss.detach()


def patch_dropout(visual: nn.Module, share: float) -> RemovableHandle:
    """Let the tower see, in training, only a part of each picture.

    A `share` of the patches, drawn anew for each picture, is dropped
    before the Transformer; never the class token. Undo it with .remove().

    Raises: ValueError for a tower without patches, or a share outside
        0 <= share < 1.

    Source: Li et al. 2023 (FLIP), section 3.

    Chapter: book/chapters/09_memory.md
    """
    if not isinstance(visual, VisionTransformer) or not 0 <= share < 1:
        raise ValueError(
            f"cannot drop {share} of the patches of a "
            f"{type(visual).__name__}; expected a VisionTransformer, and a "
            "share from 0 to below 1"
        )

    def drop(module: nn.Module, inputs: tuple[Tensor]):
        (x,) = inputs  # (B, L, D), the class token first
        if not module.training or not share:
            return None
        B, patches = len(x), x.shape[1] - 1
        keep = max(1, round(patches * (1 - share)))
        chance = torch.rand(B, patches, device=x.device)
        kept = 1 + chance.argsort(dim=1)[:, :keep]
        kept = F.pad(kept, (1, 0))  # and number 0, the class token
        return x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))

    return visual.transformer.register_forward_pre_hook(drop)


def checkpoint_blocks(model: nn.Module) -> int:
    """Keep only the inputs of Transformer blocks for the backward pass.

    Gradients stay the same; each block is computed twice. Blocks with
    batch norms are left alone: twice would move their running means twice.

    Returns: the number of blocks. Raises: ValueError if there is none.

    Source: Chen et al. 2016, section 4.

    Chapter: book/chapters/09_memory.md
    """
    blocks = [
        m for m in model.modules() if isinstance(m, ResidualAttentionBlock)
    ]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no ResidualAttentionBlock; "
            "use smaller batches with cached_backward instead"
        )
    for block in blocks:
        forward = partial(type(block).forward, block)
        block.forward = partial(checkpoint, forward, use_reentrant=False)
    return len(blocks)


def best_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """The fastest precision that a device has and training survives.

    bfloat16 on NVIDIA GPUs from Ampere on (A100, RTX 30), float16 on
    Volta and Turing (V100, T4), float32 on all others and on CPUs.

    Chapter: book/chapters/09_memory.md
    """
    device = torch.device(device)
    if device.type != "cuda":
        return torch.float32
    generation = torch.cuda.get_device_capability(device)
    if generation >= (8, 0):
        return torch.bfloat16
    return torch.float16 if generation >= (7, 0) else torch.float32


def _check_norm(norm: Tensor) -> None:
    """Raise FloatingPointError for a norm that is not finite."""
    if not norm.isfinite():
        raise FloatingPointError(
            f"the gradient's norm is {norm:.3g}; no weight was changed"
        )


class Precision:
    """Towers in half precision, weights and loss in float32.

    Args:
        dtype: torch.float32, bfloat16 or float16; best_dtype if None.
        device: where the model is.

    Chapter: book/chapters/09_memory.md
    """

    def __init__(self, dtype: torch.dtype | None = None, device="cpu"):
        self.device = torch.device(device)
        self.dtype = dtype or best_dtype(device)
        half = self.dtype == torch.float16  # the one with too small a range
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)

    def autocast(self) -> torch.autocast:
        """The context in which the towers encode."""
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=half)

    def backward(self, loss: Tensor) -> None:
        """loss.backward(), its gradients scaled if they could vanish."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, most=1.0) -> Tensor:
        """Clip the gradient's norm at `most`, take a step, return the norm.

        Raises: ValueError for weights in half precision;
            FloatingPointError, before any weight is touched, if the norm
            is not finite (in float16 the step is skipped instead).
        """
        check_master_weights(optimizer)
        weights = [p for g in optimizer.param_groups for p in g["params"]]
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(weights, most)
        if not self.scaler.is_enabled():
            _check_norm(norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm


def check_master_weights(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError, with the reason, if weights are half precision.

    Chapter: book/chapters/09_memory.md
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"the optimizer holds weights in {p.dtype}: steps "
                    "smaller than its rounding are lost, and Adam's eps is "
                    "0 in float16, which makes NaN. Train model.float() "
                    "with Precision(torch.bfloat16 or torch.float16), and "
                    "save in half precision at the end"
                )
