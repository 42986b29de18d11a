"""The networks of the paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ConvNet"]


class ConvNet(nn.Sequential):
    """The five-layer network of the paper (theory 3.1): 3 x 3 convolutions to 32, 64 and 128 channels, the last
    with stride 2, then linear layers to 256 and to the classes; ReLU between them.

    The paper feeds it 3 x 32 x 32 images; the input is a parameter here, and everything behind it follows.

    Parameters
    ----------
    channels, size : int
        Channels and side of the square input images.
    classes : int

    Examples
    --------
    >>> import torch
    >>> net = ConvNet(channels=1, size=8)
    >>> tuple(net(torch.zeros(2, 1, 8, 8)).shape)
    (2, 10)
    >>> tuple(net.fc1.weight.shape)
    (256, 2048)
    """

    def __init__(self, channels: int = 3, size: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(64, 128, 3, stride=2, padding=1)
        self.relu3 = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(128 * ((size + 1) // 2) ** 2, 256)
        self.relu4 = nn.ReLU()
        self.fc2 = nn.Linear(256, classes)

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Share of correctly classified images."""
        return float((self(x).argmax(1) == y).double().mean())
