"""The networks of the demonstration: a small one for a CPU, a usual one for a GPU."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BasicBlock", "digits_net", "num_parameters", "resnet18"]


def digits_net() -> nn.Sequential:
    """Build a convolutional network for 8 x 8 grey images in ten classes.

    Two convolutions with BatchNorm, then two linear layers, which hold nine tenths of the
    parameters: wide enough that 1 % of them is still hundreds of entries.

    Returns:
        From ``(batch, 1, 8, 8)`` to ``(batch, 10)``.

    Example:
        >>> num_parameters(digits_net())
        63434
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 112),
        nn.ReLU(),
        nn.Linear(112, 10),
    )


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, as in ResNet-18 and ResNet-34.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        stride: of the first convolution; the shortcut follows with a 1 x 1 convolution where the
            shape changes.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        """Make the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, channels_in, h, w)`` to ``(batch, channels_out, h/stride, w/stride)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18() -> nn.Sequential:
    """Build ResNet-18 for 32 x 32 colour images in ten classes.

    The variant for CIFAR: the first convolution is 3 x 3 with stride 1, and no pooling follows it.

    Returns:
        From ``(batch, 3, 32, 32)`` to ``(batch, 10)``.

    References:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.

    Example:
        >>> num_parameters(resnet18())
        11173962
    """
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
    ]
    channels = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [BasicBlock(channels, width, stride), BasicBlock(width, width, 1)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def num_parameters(model: nn.Module) -> int:
    """Count the trained entries of a model; buffers are not among them."""
    return sum(p.numel() for p in model.parameters())
