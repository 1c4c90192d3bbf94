"""A small residual network: the image tower for a few thousand pictures.

Written from book/chapters/05_resnet.md; edit that file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
