"""A small residual network: the image tower for a laptop."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; halves the picture if asked."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1):
        super().__init__()
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        nn.init.zeros_(self.bn2.weight)  # each block starts as its shortcut
        self.downsample = nn.Sequential()
        if inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """stem, four stages at half the size and twice the width each, mean, projection."""

    def __init__(self, layers: tuple[int, ...], width: int, embed_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks, inplanes = [], width
        for stage, depth in enumerate(layers):
            for i in range(depth):
                stride = 2 if stage and i == 0 else 1
                blocks.append(BasicBlock(inplanes, width * 2**stage, stride))
                inplanes = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.proj = nn.Parameter(inplanes**-0.5 * torch.randn(inplanes, embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)))
        return self.blocks(x).mean(dim=(2, 3)) @ self.proj
