"""Readers of the IDX and the binary CIFAR formats: bytes in, arrays out, nothing unpickled, everything checked."""

from __future__ import annotations

import gzip
import io
import math
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lipdyn_torch.errors import LipdynError

__all__ = ["DataError", "read_cifar", "read_idx", "read_tar_members"]

_IDX_UINT8 = 8
CIFAR_SIDE, CIFAR_CHANNELS = 32, 3


class DataError(LipdynError, ValueError):
    """A data file is missing, cut short, altered, or of another kind."""


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of unsigned bytes in an IDX file, gzipped or not.

    Raises
    ------
    DataError
        The file is no IDX file of bytes, or its length is not what its header says.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"expected a whole gzip file, got {path}, which is cut short or damaged; fetch it again"
            ) from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _IDX_UINT8 or content[3] not in (1, 3):
        raise DataError(
            f"expected an IDX file of bytes, got {path} beginning with {content[:4].hex()!r}; is it the right file?"
        )
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"expected an IDX header of {start} bytes, got {len(content)} bytes in {path}; fetch it again")
    shape = tuple(int(x) for x in np.frombuffer(content, ">u4", content[3], offset=4))
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"expected {math.prod(shape)} bytes for shape {shape}, got {len(content) - start} in {path}; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_tar_members(path: Path, names: Sequence[str]) -> list[bytes]:
    """The content of some files of a tar archive, read in memory: nothing is written, no path is followed."""
    try:
        with tarfile.open(path) as archive:
            members = {member.name: member for member in archive.getmembers() if member.isfile()}
            missing = [name for name in names if name not in members]
            if missing:
                raise DataError(
                    f"expected {', '.join(missing)} in {path}, got an archive without; is it the right file?"
                )
            return [_content(archive, members[name]) for name in names]
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"expected a tar archive, got {path}, which is cut short or damaged ({error}); fetch it again"
        ) from error


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    content = file.read() if file is not None else b""
    if len(content) != member.size:
        raise EOFError(f"{member.name} is cut short")
    return content


def read_cifar(
    content: bytes, label_bytes: int, classes: int, name: str
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 3, 32, 32) and labels (N,) of a binary CIFAR file.

    Parameters
    ----------
    content : bytes
    label_bytes : int
        Before every image: 1 for CIFAR-10, 2 for CIFAR-100, whose second one is the fine label.
    classes : int
        Labels are below it.
    name : str
        For messages.

    Examples
    --------
    >>> x, y = read_cifar(bytes([7]) + bytes(3072), 1, 10, "a file")
    >>> x.shape, y.tolist()
    ((1, 3, 32, 32), [7])
    """
    record = label_bytes + CIFAR_CHANNELS * CIFAR_SIDE**2
    if len(content) == 0 or len(content) % record:
        raise DataError(
            f"expected records of {record} bytes, got {len(content)} bytes in {name}; it is cut short or another format"
        )
    records = np.frombuffer(io.BytesIO(content).getbuffer(), np.uint8).reshape(-1, record)
    labels = records[:, label_bytes - 1].astype(np.int64)
    if labels.max() >= classes:
        raise DataError(f"expected labels below {classes}, got {labels.max()} in {name}; is it the right data set?")
    return records[:, label_bytes:].reshape(-1, CIFAR_CHANNELS, CIFAR_SIDE, CIFAR_SIDE), labels
