"""Residual networks: a small one for few pictures, and CLIP's own.

Written from book/chapters/05_resnet.md; edit that file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.vit import check_image


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; a new one is its shortcut.

    (B, inplanes, H, W) to (B, planes, H // stride, W // stride). A stride
    above 1 averages squares of pixels before both branches.
    Source: He et al. 2016, section 4.1, with the zero gain of Goyal et al.
        2017, section 5.1; parameter names as in torchvision.

    Chapter: book/chapters/05_resnet.md
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1):
        super().__init__()
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        nn.init.zeros_(self.bn2.weight)  # each block starts as its shortcut
        self.downsample = nn.Sequential()  # hands on what it gets
        if inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, bias=False),
                nn.BatchNorm2d(planes),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inplanes, H, W) -> (B, planes, H // stride, W // stride)."""
        x = self.pool(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x))


def check_size(image: Tensor, stages: int) -> None:
    """Raise ValueError unless image can be halved once for each stage.

    The stem rounds up and the pools round down, so n stages need
    2**n - 1 pixels: 15 for four. One place is enough: where the map has
    less than 4 x 4, neighbouring cells of the tower share a place.

    Chapter: book/chapters/05_resnet.md
    """
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(
            f"image has shape {tuple(image.shape)}, expected (B, 3, H, W); "
            "give a single picture as image[None]"
        )
    if not image.is_floating_point():
        raise ValueError(
            f"image is {image.dtype}, expected floats from preprocess"
        )
    (H, W), least = image.shape[2:], 2**stages - 1
    if min(H, W) < least:
        raise ValueError(
            f"image has {H} x {W} pixels, a tower of {stages} stages needs "
            f"at least {least} x {least}; enlarge it or use fewer stages"
        )


class ResNet(nn.Module):
    """Pictures (B, 3, H, W) of any size to image_features (B, embed_dim).

    Args:
        layers: how many blocks each stage has, at least one; a stage has
            half the size of the one before and twice its channels.
        width: channels of the stem and of the first stage.

    Raises: ValueError for a stage without blocks.

    Source: He et al. 2016, with pooling before the blocks that halve, and
        with a mean for each of 4 x 4 cells in place of one for all.

    Chapter: book/chapters/05_resnet.md
    """

    def __init__(self, layers: tuple[int, ...], width: int, embed_dim: int):
        super().__init__()
        if not layers or min(layers) < 1:
            raise ValueError(f"layers={layers}, each stage needs a block")
        self.stages = len(layers)
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks, inplanes = [], width
        for stage, depth in enumerate(layers):
            planes = width * 2**stage
            for i in range(depth):
                stride = 2 if stage and i == 0 else 1
                blocks.append(BasicBlock(inplanes, planes, stride))
                inplanes = planes
        self.blocks = nn.Sequential(*blocks)
        rows = 16 * inplanes  # every channel of every cell
        self.proj = nn.Parameter(rows**-0.5 * torch.randn(rows, embed_dim))

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) floats, preprocessed -> (B, E), not normalised."""
        check_size(image, self.stages)
        x = image.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)))  # half the size
        x = F.adaptive_avg_pool2d(self.blocks(x), 4)  # where matters
        return x.flatten(1) @ self.proj


class Bottleneck(nn.Module):
    """Three convolutions, 1x1, 3x3, 1x1, beside a shortcut.

    (B, inplanes, H, W) to (B, 4 * planes, H // stride, W // stride). A
    stride above 1 is an average pool, after the second convolution and
    before that of the shortcut; a new block is its shortcut.
    Source: He et al. 2016, section 4.1; parameters as in openai/CLIP.

    Chapter: book/chapters/05_resnet.md
    """

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1):
        super().__init__()
        wide = self.expansion * planes
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        nn.init.zeros_(self.bn3.weight)  # each block starts as its shortcut
        self.downsample = nn.Sequential()  # hands on what it gets
        if stride > 1 or inplanes != wide:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, wide, 1, bias=False),
                nn.BatchNorm2d(wide),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inplanes, H, W) -> (B, wide, H // stride, W // stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.pool(F.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(self.pool(x)))


class AttentionPool2d(nn.Module):
    """A map (B, width, grid, grid) to one feature each, (B, embed_dim).

    The mean of all places asks, the places and the mean answer.
    Source: Radford et al. 2021, section 2.4; parameters as in openai/CLIP.

    Chapter: book/chapters/05_resnet.md
    """

    def __init__(self, grid: int, width: int, heads: int, embed_dim: int):
        super().__init__()
        self.heads = heads
        place = width**-0.5 * torch.randn(grid**2 + 1, width)
        self.positional_embedding = nn.Parameter(place)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        for layer in self.k_proj, self.q_proj, self.v_proj, self.c_proj:
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, grid, grid) -> (B, embed_dim)."""
        x = x.flatten(2).transpose(1, 2)  # (B, places, width)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        x = x + self.positional_embedding
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        q, k, v = (  # each (B, heads, 1 or 1 + places, d)
            t.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for t in (q, k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v)  # (B, heads, 1, d)
        return self.c_proj(y.flatten(1))


def check_modified(
    layers: tuple[int, ...], heads: int, image_resolution: int, width: int
) -> None:
    """Raise ValueError unless a ModifiedResNet can be built from these.

    Chapter: book/chapters/05_resnet.md
    """
    if len(layers) != 4 or min(layers) < 1:
        raise ValueError(
            f"layers={layers}, a ModifiedResNet has four stages with at "
            "least one block each"
        )
    if width < 2 or width % 2 or heads < 1 or 32 * width % heads:
        raise ValueError(
            f"width {width} and {heads} heads: width must be even, and the "
            f"heads must share 32 * width = {32 * width} evenly"
        )
    if image_resolution < 32 or image_resolution % 32:
        raise ValueError(
            f"image_resolution {image_resolution} is not a multiple of 32; "
            "the tower halves it five times"
        )


def _stage(inplanes: int, planes: int, depth: int, stride: int):
    """Some Bottlenecks in a row, of which the first may halve the map."""
    blocks = [Bottleneck(inplanes, planes, stride)]
    for _ in range(depth - 1):
        blocks.append(Bottleneck(4 * planes, planes))
    return nn.Sequential(*blocks)


class ModifiedResNet(nn.Module):
    """Pictures (B, 3, H, W) to image_features (B, embed_dim).

    H = W = side, a multiple of 32 (else ValueError); layers are the blocks
    of four stages, width the stem's; parameter names as in openai/CLIP.
    Source: Radford et al. 2021, section 2.4, and clip/model.py.

    Chapter: book/chapters/05_resnet.md
    """

    def __init__(
        self, layers, embed_dim: int, heads: int, side: int, width: int
    ):
        super().__init__()
        check_modified(layers, heads, side, width)
        self.image_resolution, w, half = side, width, width // 2
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, w, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(w)
        self.layer1 = _stage(w, w, layers[0], stride=1)
        self.layer2 = _stage(4 * w, 2 * w, layers[1], stride=2)
        self.layer3 = _stage(8 * w, 4 * w, layers[2], stride=2)
        self.layer4 = _stage(16 * w, 8 * w, layers[3], stride=2)
        self.attnpool = AttentionPool2d(
            side // 32, 32 * w, heads, embed_dim
        )

    def stem(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width, H // 4, W // 4)."""
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) floats, preprocessed -> (B, E), not normalised."""
        check_image(image, self.image_resolution)
        x = self.layer2(self.layer1(self.stem(image)))
        return self.attnpool(self.layer4(self.layer3(x)))
