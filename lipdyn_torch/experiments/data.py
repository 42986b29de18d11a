"""Data sets: scikit-learn's digits come with the installation; MNIST and CIFAR are fetched once, and checked."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lipdyn_torch.experiments.formats import DataError, read_cifar, read_idx, read_tar_members
from lipdyn_torch.integrations._extras import need

__all__ = ["DATASETS", "Images", "digits", "load"]


@dataclass(frozen=True)
class Images:
    """Training and test images (N, channels, height, width) in float32 with integer labels (N,).

    ``mean`` and ``sd`` (channels,) turn pixels between 0 and 1 into the images.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: Tensor
    sd: Tensor

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.train_x.shape[1]

    @property
    def size(self) -> int:
        """Side of the square images in pixels."""
        return self.train_x.shape[2]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.train_y.max()) + 1

    def batches(self, batch_size: int, seed: int) -> DataLoader:
        """Shuffled training batches of equal size: every sample at most once per epoch."""
        order = torch.Generator().manual_seed(seed)
        pairs = TensorDataset(self.train_x, self.train_y)
        return DataLoader(pairs, batch_size=batch_size, shuffle=True, drop_last=True, generator=order)

    def first(self, count: int) -> Images:
        """The same with only the first ``count`` training images."""
        return Images(self.train_x[:count], self.train_y[:count], self.test_x, self.test_y, self.mean, self.sd)

    def to(self, device: str) -> Images:
        """The same on a device."""
        return Images(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class _Source:
    """Where a data set is published, and the checksums of the archives as published there."""

    base: str
    files: dict[str, str]  # name: checksum, as pooch writes them
    train: tuple[str, ...]
    test: tuple[str, ...]
    counts: tuple[int, int]
    classes: int
    label_bytes: int = 0  # of binary CIFAR


DATASETS = {
    "mnist": _Source(
        base="https://ossci-datasets.s3.amazonaws.com/mnist/",
        files={
            "train-images-idx3-ubyte.gz": "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
        train=("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        test=("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
        counts=(60_000, 10_000),
        classes=10,
    ),
    # The page of the data sets publishes MD5 sums, which protect against accidents, not against malice.
    "cifar10": _Source(
        base="https://www.cs.toronto.edu/~kriz/",
        files={"cifar-10-binary.tar.gz": "md5:c32a1d4ab5d03f1284b67883e8d87530"},
        train=tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)),
        test=("cifar-10-batches-bin/test_batch.bin",),
        counts=(50_000, 10_000),
        classes=10,
        label_bytes=1,
    ),
    "cifar100": _Source(
        base="https://www.cs.toronto.edu/~kriz/",
        files={"cifar-100-binary.tar.gz": "md5:03b5dce01913d631647c71ecec9e9cb8"},
        train=("cifar-100-binary/train.bin",),
        test=("cifar-100-binary/test.bin",),
        counts=(50_000, 10_000),
        classes=100,
        label_bytes=2,
    ),
}


@functools.lru_cache(maxsize=1)
def load(name: str, root: str | None = None, progress: bool = False) -> Images:
    """A data set by name.

    Parameters
    ----------
    name : {"digits", "mnist", "cifar10", "cifar100"}
    root : str, optional
        Folder that holds the archives as published; without it they are fetched once into the cache folder
        (``LIPDYN_DATA`` in the environment, or the user's cache).
    progress : bool
        Show a bar while fetching.

    Raises
    ------
    DataError
        Files are missing, cut short, altered or wrong, or cannot be fetched.
    """
    if name == "digits":
        return digits()
    if name not in DATASETS:
        raise ValueError(f"expected a data set of digits, {', '.join(DATASETS)}, got {name!r}")
    source = DATASETS[name]
    files = {
        file: _from_root(root, file, known) if root else _fetch(source, file, progress)
        for file, known in source.files.items()
    }
    (train_x, train_y), (test_x, test_y) = (
        _read_cifar(source, files) if source.label_bytes else _read_mnist(source, files)
    )
    for count, x, y in zip(source.counts, (train_x, test_x), (train_y, test_y), strict=True):
        if len(x) != count or len(y) != count:
            raise DataError(
                f"expected {count} images and labels of {name}, got {len(x)} and {len(y)}; is it the right data set?"
            )
        if y.max() >= source.classes:
            raise DataError(
                f"expected labels below {source.classes} in {name}, got {y.max()}; is it the right data set?"
            )
    return _normalise(train_x, train_y, test_x, test_y)


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
    scaled = ((train_x - mean) / sd).float(), y[order[test:]], ((test_x - mean) / sd).float(), y[order[:test]]
    darkest = 16.0
    return Images(*scaled, (mean / darkest).float().reshape(1), (sd / darkest).float().reshape(1))


def _normalise(
    train_x: NDArray[np.uint8], train_y: NDArray[np.integer], test_x: NDArray[np.uint8], test_y: NDArray[np.integer]
) -> Images:
    # Sums of integers: exact, and without a second copy in floating point.
    pixels = train_x.size / train_x.shape[1]
    mean = train_x.sum((0, 2, 3), dtype=np.int64) / pixels
    square = np.array([np.square(channel, dtype=np.int64).sum() for channel in np.moveaxis(train_x, 1, 0)]) / pixels
    centre, scale = (torch.from_numpy(a / 255).float() for a in (mean, np.sqrt(square - mean**2)))
    images = [
        torch.from_numpy(x.astype(np.float32)).div_(255).sub_(centre[:, None, None]).div_(scale[:, None, None])
        for x in (train_x, test_x)
    ]
    labels = [torch.from_numpy(y.astype(np.int64)) for y in (train_y, test_y)]
    return Images(images[0], labels[0], images[1], labels[1], centre, scale)


def _read_mnist(source: _Source, files: dict[str, Path]) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    out = []
    for images, labels in (source.train, source.test):
        x, y = read_idx(files[images]), read_idx(files[labels])
        if x.ndim != 3 or x.shape[1:] != (28, 28) or y.ndim != 1:
            raise DataError(
                f"expected images of 28 x 28 and a list of labels, got shapes {x.shape} and {y.shape}; swapped?"
            )
        out.append((x[:, None], y))
    return out


def _read_cifar(source: _Source, files: dict[str, Path]) -> list[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    (path,) = files.values()
    names = [*source.train, *source.test]
    contents = read_tar_members(path, names)
    parts = [
        read_cifar(c, source.label_bytes, source.classes, f"{n} of {path}")
        for c, n in zip(contents, names, strict=True)
    ]
    train, test = parts[: len(source.train)], parts[len(source.train) :]
    return [(np.concatenate([x for x, _ in split]), np.concatenate([y for _, y in split])) for split in (train, test)]


def _from_root(root: str, file: str, known: str) -> Path:
    path = Path(root) / file
    if not path.is_file():
        raise DataError(
            f"expected {file} in {root}, got no such file; put the archive as published there, or leave out --root"
        )
    algorithm, _, digest = known.partition(":")
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, algorithm).hexdigest()
    if found != digest:
        raise DataError(
            f"expected {path} as published ({known}), got {algorithm}:{found}; it is cut short, altered or another file"
        )
    return path


def _fetch(source: _Source, file: str, progress: bool) -> Path:
    pooch, requests = need("pooch", "experiments"), need("requests", "experiments")
    cache = Path(os.environ.get("LIPDYN_DATA") or pooch.os_cache("lipdyn"))
    pooch.get_logger().setLevel("WARNING")
    try:
        url = source.base + file
        return Path(pooch.retrieve(url, known_hash=source.files[file], fname=file, path=cache, progressbar=progress))
    except (requests.exceptions.RequestException, OSError) as error:
        raise DataError(
            f"expected to fetch {source.base}{file}, got {type(error).__name__}; without network put the archive "
            "into a folder and name it with --root"
        ) from error
    except ValueError as error:  # the checksum is wrong: pooch has thrown the file away
        raise DataError(
            f"expected {source.base}{file} as published, got another content ({error}); try again later"
        ) from error
