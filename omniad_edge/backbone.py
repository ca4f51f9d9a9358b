"""ResNet up to `layer3`: the frozen teacher. Parameter names are those of torchvision and timm.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; Zagoruyko and Komodakis,
"Wide Residual Networks", BMVC 2016 (WideResNet50-2: the inner width of a bottleneck doubled).
"""

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a residual (ResNet18, ResNet34)."""

    def __init__(self, c_in: int, c_out: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = projection(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride), 1x1 around a residual (ResNet50, WideResNet50-2, the neck)."""

    def __init__(self, c_in: int, c_out: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.downsample = projection(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def projection(c_in: int, c_out: int, stride: int) -> nn.Sequential | None:
    """The residual's 1x1 projection, or None where its shape already fits."""
    if stride == 1 and c_in == c_out:
        return None
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


# name: (block, blocks per layer, output channels per layer, inner width per layer)
ARCHITECTURES = {
    "resnet18": (BasicBlock, (2, 2, 2), (64, 128, 256), (64, 128, 256)),
    "resnet34": (BasicBlock, (3, 4, 6), (64, 128, 256), (64, 128, 256)),
    "resnet50": (Bottleneck, (3, 4, 6), (256, 512, 1024), (64, 128, 256)),
    "wide_resnet50_2": (Bottleneck, (3, 4, 6), (256, 512, 1024), (128, 256, 512)),
}


class ResNet(nn.Module):
    """Image (N, 3, H, W), normalised RGB -> features of layer1, layer2, layer3 at strides 4, 8, 16.

    `name` is a key of ARCHITECTURES; `channels` are the three feature widths. H and W: multiples of 32.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        block, depths, self.channels, widths = ARCHITECTURES[name]
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        c_in = 64
        layers = []
        for index, (depth, c_out, width) in enumerate(zip(depths, self.channels, widths, strict=True)):
            first = block(c_in, c_out, width, stride=1 if index == 0 else 2)
            layers.append(nn.Sequential(first, *(block(c_out, c_out, width) for _ in range(depth - 1))))
            c_in = c_out
        self.layer1, self.layer2, self.layer3 = layers

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(image))), 3, 2, 1)
        f0 = self.layer1(x)
        f1 = self.layer2(f0)
        return f0, f1, self.layer3(f1)
