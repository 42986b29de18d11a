"""Files of the IDX and binary CIFAR formats made here, whole and damaged."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import struct
import tarfile

import numpy as np
import pytest
import torch

from lipdyn_torch.experiments import data
from lipdyn_torch.experiments.formats import DataError, read_cifar, read_idx, read_tar_members

RNG = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def cifar(images: np.ndarray, labels: np.ndarray, label_bytes: int) -> bytes:
    before = np.zeros((len(images), label_bytes), np.uint8)
    before[:, -1] = labels
    return np.concatenate([before, images.reshape(len(images), -1)], axis=1).tobytes()


def pixels(count: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, *shape), dtype=np.uint8)


def labels(count: int, classes: int) -> np.ndarray:
    return (np.arange(count) % classes).astype(np.uint8)


def tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def publish(monkeypatch, root, name: str, counts: tuple[int, int]) -> None:
    """Take the files in `root` for the published ones."""
    source = data.DATASETS[name]
    sums = {file: "sha256:" + hashlib.sha256((root / file).read_bytes()).hexdigest() for file in source.files}
    monkeypatch.setitem(data.DATASETS, name, dataclasses.replace(source, files=sums, counts=counts))
    data.load.cache_clear()


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    content = {
        "train-images": pixels(30, 28, 28),
        "train-labels": labels(30, 10),
        "t10k-images": pixels(10, 28, 28),
        "t10k-labels": labels(10, 10),
    }
    for key, array in content.items():
        kind = "idx3" if "images" in key else "idx1"
        (tmp_path / f"{key}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    publish(monkeypatch, tmp_path, "mnist", (30, 10))
    return tmp_path, content


@pytest.fixture(params=[("cifar10", 1, 10), ("cifar100", 2, 100)], ids=lambda p: p[0])
def cifar_archive(request, tmp_path, monkeypatch):
    name, label_bytes, classes = request.param
    source = data.DATASETS[name]
    parts = {member: (pixels(4, 3, 32, 32), labels(4, classes)) for member in (*source.train, *source.test)}
    (file,) = source.files
    tar(tmp_path / file, {member: cifar(x, y, label_bytes) for member, (x, y) in parts.items()})
    publish(monkeypatch, tmp_path, name, (4 * len(source.train), 4))
    return name, tmp_path, parts, tmp_path / file


def test_mnist_from_files(mnist):
    root, content = mnist
    images = data.load("mnist", str(root))
    assert tuple(images.train_x.shape) == (30, 1, 28, 28)
    assert images.train_y.tolist() == content["train-labels"].tolist()
    back = (images.train_x * images.sd[:, None, None] + images.mean[:, None, None]) * 255
    assert torch.allclose(back[:, 0], torch.from_numpy(content["train-images"]).float(), atol=1e-3)
    assert images.train_x.mean() == pytest.approx(0, abs=1e-5)
    assert images.train_x.std() == pytest.approx(1, abs=1e-4)


def test_cifar_from_an_archive(cifar_archive):
    name, root, parts, _ = cifar_archive
    images = data.load(name, str(root))
    x = np.concatenate([x for member, (x, _) in parts.items() if member in data.DATASETS[name].train])
    assert images.train_x.shape == x.shape
    for channel in range(3):
        assert images.train_x[:, channel].mean() == pytest.approx(0, abs=1e-5)
    back = (images.train_x * images.sd[:, None, None] + images.mean[:, None, None]) * 255
    assert np.allclose(back.numpy(), x, atol=1e-3)


def test_an_altered_file_is_refused(cifar_archive):
    name, root, _, file = cifar_archive
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match="altered"):
        data.load(name, str(root))


def test_a_missing_file_is_named(mnist):
    root, _ = mnist
    (root / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz .*--root"):
        data.load("mnist", str(root))


def test_wrong_counts_are_refused(mnist, monkeypatch):
    root, _ = mnist
    publish(monkeypatch, root, "mnist", (31, 10))
    with pytest.raises(DataError, match="expected 31 images"):
        data.load("mnist", str(root))


def test_without_network_the_message_says_what_to_do(monkeypatch, tmp_path):
    import pooch
    import requests

    def fail(*args, **kwargs):
        raise requests.exceptions.ConnectionError("no route")

    monkeypatch.setenv("LIPDYN_DATA", str(tmp_path))
    monkeypatch.setattr(pooch, "retrieve", fail)
    data.load.cache_clear()
    with pytest.raises(DataError, match=r"without network.*--root"):
        data.load("cifar10")


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="digits, mnist, cifar10, cifar100"):
        data.load("imagenet")


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_idx_round_trip(tmp_path, compress):
    array = pixels(3, 5, 7)
    (tmp_path / "x").write_bytes(compress(idx(array)))
    assert np.array_equal(read_idx(tmp_path / "x"), array)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0",
        idx(pixels(3, 5, 7))[:-1],
        idx(pixels(3, 5, 7)) + b"\0",
        idx(pixels(3, 5, 7))[:9],
        b"\0\0\x0d\x03" + idx(pixels(3, 5, 7))[4:],
        b"PK\x03\x04" + bytes(100),
        gzip.compress(idx(pixels(3, 5, 7)))[:-9],
        gzip.compress(idx(pixels(3, 5, 7)))[:-20] + bytes(20),
    ],
    ids=["empty", "short", "cut", "long", "header", "floats", "zip", "gzip-cut", "gzip-damaged"],
)
def test_damaged_idx_files_are_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError):
        read_idx(tmp_path / "x")


@pytest.mark.parametrize(
    "content", [b"", bytes(3072), bytes([10]) + bytes(3072), bytes(3074)], ids=["empty", "cut", "label", "long"]
)
def test_damaged_cifar_files_are_refused(content):
    with pytest.raises(DataError):
        read_cifar(content, 1, 10, "a file")


def test_damaged_archives_are_refused(tmp_path):
    tar(tmp_path / "a.tar.gz", {"x/data.bin": RNG.bytes(5000)})
    with pytest.raises(DataError, match=r"x/other\.bin"):
        read_tar_members(tmp_path / "a.tar.gz", ["x/other.bin"])
    (tmp_path / "b.tar.gz").write_bytes((tmp_path / "a.tar.gz").read_bytes()[:-2000])
    with pytest.raises(DataError, match="cut short"):
        read_tar_members(tmp_path / "b.tar.gz", ["x/data.bin"])
    (tmp_path / "c.tar.gz").write_text("<html>404</html>")
    with pytest.raises(DataError, match="cut short or damaged"):
        read_tar_members(tmp_path / "c.tar.gz", ["x/data.bin"])
