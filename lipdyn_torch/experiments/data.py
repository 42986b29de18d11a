"""Data sets that come with the installation: no download."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["Images", "digits"]


@dataclass(frozen=True)
class Images:
    """Training and test images (N, channels, height, width) in float32 with integer labels (N,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def batches(self, batch_size: int, seed: int) -> DataLoader:
        """Shuffled training batches of equal size: every sample at most once per epoch."""
        order = torch.Generator().manual_seed(seed)
        pairs = TensorDataset(self.train_x, self.train_y)
        return DataLoader(pairs, batch_size=batch_size, shuffle=True, drop_last=True, generator=order)


def digits(test_share: float = 0.2, seed: int = 0) -> Images:
    """scikit-learn's bundled 1,797 scanned digits, 8 x 8 pixels, one channel, zero mean and unit variance.

    Examples
    --------
    >>> images = digits()
    >>> tuple(images.train_x.shape), len(images.test_x)
    ((1438, 1, 8, 8), 359)
    """
    from sklearn.datasets import load_digits

    raw, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(raw).reshape(-1, 1, 8, 8)
    y = torch.from_numpy(labels).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test = round(test_share * len(x))
    test_x, train_x = x[order[:test]], x[order[test:]]
    mean, sd = train_x.mean(), train_x.std()  # of the training images only
    return Images(((train_x - mean) / sd).float(), y[order[test:]], ((test_x - mean) / sd).float(), y[order[:test]])
