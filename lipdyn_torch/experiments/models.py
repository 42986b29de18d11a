"""The networks of the paper."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from lipdyn_torch.experiments.data import Images

__all__ = ["MLP", "ConvNet", "make_model"]


class _Classifier(nn.Sequential):
    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Share of correctly classified images."""
        training = self.training
        self.eval()
        right = sum(
            int((self(part).argmax(1) == labels).sum())
            for part, labels in zip(x.split(1000), y.split(1000), strict=True)
        )
        self.train(training)
        return right / len(x)


class ConvNet(_Classifier):
    """The five-layer network of the paper (theory 3.1): 3 x 3 convolutions to 32, 64 and 128 channels, the last
    with stride 2, then linear layers to 256 and to the classes; ReLU between them.

    The paper feeds it 3 x 32 x 32 images; the input is a parameter here, and everything behind it follows.

    Parameters
    ----------
    channels, size : int
        Channels and side of the square input images.
    classes : int
    batch_norm : bool
        Batch normalisation before each ReLU.
    dropout : tuple of float
        After each convolution's ReLU, and after that of the first linear layer; 0 adds no module.

    Examples
    --------
    >>> import torch
    >>> net = ConvNet(channels=1, size=8)
    >>> tuple(net(torch.zeros(2, 1, 8, 8)).shape)
    (2, 10)
    >>> tuple(net.fc1.weight.shape)
    (256, 2048)
    """

    def __init__(
        self,
        channels: int = 3,
        size: int = 32,
        classes: int = 10,
        *,
        batch_norm: bool = False,
        dropout: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        widths, strides = (channels, 32, 64, 128), (1, 1, 2)
        for i, stride in enumerate(strides, 1):
            layers[f"conv{i}"] = nn.Conv2d(widths[i - 1], widths[i], 3, stride=stride, padding=1)
            if batch_norm:
                layers[f"norm{i}"] = nn.BatchNorm2d(widths[i])
            layers[f"relu{i}"] = nn.ReLU()
            if dropout[0]:
                layers[f"dropout{i}"] = nn.Dropout(dropout[0])
        layers["flatten"] = nn.Flatten()
        layers["fc1"] = nn.Linear(128 * ((size + 1) // 2) ** 2, 256)
        if batch_norm:
            layers["norm4"] = nn.BatchNorm1d(256)
        layers["relu4"] = nn.ReLU()
        if dropout[1]:
            layers["dropout4"] = nn.Dropout(dropout[1])
        layers["fc2"] = nn.Linear(256, classes)
        super().__init__(layers)


class MLP(_Classifier):
    """The paper's three-layer perceptron: inputs, 512, 256, classes; ReLU between them.

    Examples
    --------
    >>> [tuple(p.shape) for p in MLP(1, 28).parameters() if p.ndim == 2]
    [(512, 784), (256, 512), (10, 256)]
    """

    def __init__(self, channels: int = 1, size: int = 28, classes: int = 10) -> None:
        widths = (channels * size**2, 512, 256, classes)
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for i in range(1, 4):
            layers[f"fc{i}"] = nn.Linear(widths[i - 1], widths[i])
            if i < 3:
                layers[f"relu{i}"] = nn.ReLU()
        super().__init__(layers)


def make_model(kind: str, images: Images, seed: int, **options: object) -> ConvNet | MLP:
    """A network for these images with weights that depend on the seed only.

    Examples
    --------
    >>> from lipdyn_torch.experiments.data import digits
    >>> type(make_model("mlp", digits(), seed=0)).__name__
    'MLP'
    """
    kinds: dict[str, type] = {"convnet": ConvNet, "mlp": MLP}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kinds[kind](images.channels, images.size, images.classes, **options)


def note(kind: str, images: Images) -> str:
    """One sentence on how the paper's network was fitted to the images; empty if it was not.

    Examples
    --------
    >>> from lipdyn_torch.experiments.data import digits
    >>> note("mlp", digits())
    'The perceptron takes 64 inputs here, 784 in the paper.'
    """
    if kind == "mlp":
        inputs = images.channels * images.size**2
        return "" if inputs == 784 else f"The perceptron takes {inputs} inputs here, 784 in the paper."
    if (images.channels, images.size) == (3, 32):
        return ""
    width = 128 * ((images.size + 1) // 2) ** 2
    return (
        f"The ConvNet is fitted to {images.channels} x {images.size} x {images.size} images: its first linear layer "
        f"takes {width} inputs, 32768 with the paper's 3 x 32 x 32 images; every other layer is the same"
        + (" but for the input channels." if images.channels != 3 else ".")
    )
