"""The one file that knows array libraries: namespace, dtype, device, scale.

Legend: A (..., m, n) matrices; xp the array namespace; e integer exponents of two, one for each matrix.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from specpert.result import NonFiniteError

Array = Any  # an array of any library that follows the array API standard
Namespace = Any

_FLOATING = {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}
_WORKING = {"float16": "float32", "bfloat16": "float32"}
_NUMPY = array_api_compat.array_namespace(np.empty(0))
_NUMPY_FLOATING = tuple(map(np.dtype, ("float32", "float64", "complex64", "complex128")))


class _Module(NamedTuple):
    """What a pickle holds in the place of a module."""

    name: str


class Portable:
    """Can be pickled and copied though it holds an array namespace: modules go by their names."""

    def __getstate__(self) -> dict[str, Any]:
        return {key: _Module(x.__name__) if isinstance(x, ModuleType) else x for key, x in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        modules = {key: importlib.import_module(x.name) for key, x in state.items() if isinstance(x, _Module)}
        vars(self).update(state | modules)


def as_arrays(*objects: Any, names: Sequence[str], promote: bool = True) -> tuple[Namespace, list[Array]]:
    """Arrays of one library, device and floating dtype from the caller's objects; never copied to the host.

    Without `promote` each keeps its own floating dtype.
    """
    if all(type(x) is np.ndarray and x.dtype in _NUMPY_FLOATING for x in objects):  # nothing to look into
        common = np.result_type(*objects) if promote else None
        return _NUMPY, [x if common is None else x.astype(common, copy=False) for x in objects]
    arrays = [_as_array(x, name) for x, name in zip(objects, names, strict=True)]
    xp = array_api_compat.array_namespace(arrays[0])
    for x, name in zip(arrays[1:], names[1:], strict=True):
        if array_api_compat.array_namespace(x) is not xp:
            given = objects[list(names).index(name)]
            got = f"a {type(given).__name__}" if isinstance(given, list | tuple) else _library(x)
            raise TypeError(
                f"expected {name} to be of the same array library as {names[0]} ({_library(arrays[0])}), "
                f"got {got}; convert one of them first"
            )
        here, there = array_api_compat.device(arrays[0]), array_api_compat.device(x)
        if here != there:
            raise TypeError(
                f"expected {name} on the device of {names[0]} ({here}), got {there}; move one of them first"
            )
    arrays = [_floating(x, name, xp) for x, name in zip(arrays, names, strict=True)]
    if not promote:
        return xp, arrays
    dtype = xp.result_type(*arrays)
    return xp, [xp.astype(x, dtype, copy=False) for x in arrays]


def _as_array(x: Any, name: str) -> Array:
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"expected {name} without a mask, got a masked array; fill it first, e.g. {name}.filled(0)")
    if array_api_compat.is_array_api_obj(x) and not isinstance(x, np.ndarray | np.generic):
        if array_api_compat.is_torch_array(x) and str(x.layout) != "torch.strided":
            raise TypeError(f"expected {name} to be a dense tensor, got {x.layout}; convert it, e.g. {name}.to_dense()")
        if array_api_compat.is_torch_array(x) and x.is_meta:
            raise TypeError(f"expected {name} to hold numbers, got a tensor on the meta device; give it values first")
        if any(base.__name__ == "Tracer" for base in type(x).__mro__):
            raise TypeError(f"expected {name} to hold numbers, got a tracer; call it outside of jax.jit, vmap and grad")
        return _plain(x)
    if hasattr(x, "toarray") or hasattr(x, "matvec"):
        raise TypeError(
            f"expected {name} to be a dense array, got {type(x).__name__}; convert it, e.g. {name}.toarray()"
        )
    try:
        array = np.asarray(x)
        if array.dtype == object and array.ndim == 0:
            hint = f"; give {name}.weight" if hasattr(x, "weight") else ""
            raise TypeError(f"expected {name} to be an array of numbers, got {type(x).__name__}{hint}")
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    except ValueError as error:
        raise ValueError(f"expected {name} to be a rectangular array, got rows of different length") from error
    except RuntimeError as error:  # of a list of tensors
        raise TypeError(f"expected {name} to be an array of numbers, got a {type(x).__name__}: {error}") from error


def _plain(x: Any) -> Any:
    """A torch tensor off its graph, and with the conjugations and signs that its views put off; others as they are."""
    return x.detach().resolve_conj().resolve_neg() if array_api_compat.is_torch_array(x) else x


def as_argument(x: Any, like: Array, xp: Namespace, dtype: Any) -> Array:
    """A real number or array of any library as an array of that of `like`, in the precision `dtype` at least.

    Among torch tensors it stays in its graph.
    """
    given = _as_array(x, "x")
    x = x if array_api_compat.is_torch_array(x) and array_api_compat.is_torch_namespace(xp) else given
    own = namespace(x)
    if not own.isdtype(x.dtype, ("bool", "integral", "real floating")):
        raise TypeError(f"expected x to be real, got {dtype_name(x)}")
    argument, floating = _floating(x, "x", own), own.isdtype(x.dtype, "real floating")
    if own is not xp:  # what is not NumPy's stays on its device
        argument = xp.asarray(argument, device=array_api_compat.device(like) if is_numpy(x) else None)
    return xp.astype(argument, xp.result_type(argument, dtype) if floating else dtype)


def namespace(x: Array) -> Namespace:
    """The array API namespace of x."""
    return array_api_compat.array_namespace(x)


def _library(x: Array) -> str:
    return array_api_compat.array_namespace(x).__name__.removeprefix("array_api_compat.")


_small_calls = 0


def kernels(matrices: int, hurried: bool = True) -> Any:
    """The module of kernels for so many small NumPy matrices in one call.

    Loading the compiled ones takes longer than many a short script: they are used from the ninth small call on, at
    once for a stack that pays for it, and wherever they are loaded. Only hurried calls count, of which the kernel is
    the greater part.
    """
    global _small_calls
    _small_calls += hurried
    if _small_calls > 8 or matrices >= 512 or "specpert._kernels.cpu" in sys.modules:
        from specpert._kernels import cpu

        return cpu
    from specpert._kernels import agnostic

    return agnostic


def dtype_name(x: Array) -> str:
    """Name of the dtype without its library: 'float32' for numpy.float32 and torch.float32 alike."""
    return str(x.dtype).rsplit(".", 1)[-1].strip("'>)")


def _floating(x: Array, name: str, xp: Namespace) -> Array:
    dtype = dtype_name(x)
    if dtype in _FLOATING:
        return xp.astype(x, getattr(xp, _WORKING[dtype])) if dtype in _WORKING else x
    if dtype == "bool" or dtype.startswith(("int", "uint")):
        # JAX without x64 has no float64; its default is the widest it has
        return xp.astype(x, xp.asarray(0.0).dtype if array_api_compat.is_jax_namespace(xp) else xp.float64)
    raise TypeError(f"expected {name} with a dtype among {', '.join(sorted(_FLOATING))} or integers, got {dtype}")


def check_ndim(A: Array, name: str) -> None:
    """Raise unless A has at least two axes."""
    if A.ndim < 2:
        raise ValueError(f"expected {name} to be a matrix (m, n) or a stack (..., m, n), got shape {tuple(A.shape)}")


def check_matrix(A: Array, name: str, xp: Namespace) -> Array:
    """Raise unless A is a non-empty stack of matrices with finite entries; returns their `magnitude`."""
    check_ndim(A, name)
    if 0 in A.shape:
        raise ValueError(f"expected {name} to have at least one row, column and matrix, got shape {tuple(A.shape)}")
    size = magnitude(A, xp)
    if not bool(xp.all(xp.isfinite(size))):
        bad = [int(i[0]) for i in xp.nonzero(~xp.isfinite(A))]
        raise NonFiniteError(f"expected {name} to be finite, got {A[tuple(bad)]} at index {tuple(bad)}")
    return size


def magnitude(A: Array, xp: Namespace) -> Array:
    """Largest modulus of a real or imaginary part in each matrix, shape (...); NaN where there is one.

    Two reductions and no temporary of the size of A.
    """
    if is_complex(A, xp):
        return xp.maximum(magnitude(xp.real(A), xp), magnitude(xp.imag(A), xp))
    # one long axis: many times faster for stacks of small matrices
    flat = xp.reshape(A, (*A.shape[:-2], math.prod(A.shape[-2:])))
    if is_numpy(A):  # without the layers around them
        return np.asarray(np.maximum(flat.max(axis=-1), -flat.min(axis=-1)))
    return xp.maximum(xp.max(flat, axis=-1), -xp.min(flat, axis=-1))


def eps(A: Array, xp: Namespace) -> float:
    """Unit of rounding (distance from 1 to the next number) of A's dtype."""
    return float(xp.finfo(A.dtype).eps)


def is_numpy(x: Any) -> bool:
    """Whether x is a NumPy array."""
    return isinstance(x, np.ndarray)


def array_device(x: Array) -> Any:
    """The device of x."""
    return array_api_compat.device(x)


def host_view(x: Array) -> np.ndarray | None:
    """The same memory as a NumPy array where x is on the CPU, without a copy; None elsewhere."""
    if isinstance(x, np.ndarray):
        return x
    if not (array_api_compat.is_torch_array(x) or array_api_compat.is_jax_array(x)):
        return None
    if "cpu" not in str(array_api_compat.device(x)).lower():
        return None
    view: np.ndarray = np.from_dlpack(_plain(x))
    return view


def from_host(x: np.ndarray, like: Array, xp: Namespace) -> Array:
    """A NumPy array as one of the library of `like`, without a copy."""
    return x if isinstance(like, np.ndarray) else xp.from_dlpack(np.asarray(x, order="C"))


def to_precision(x: Array, dtype: Any, xp: Namespace) -> Array:
    """Return x with the given real dtype, or the complex one of the same precision."""
    if is_complex(x, xp):
        dtype = xp.complex64 if dtype == xp.float32 else xp.complex128
    return xp.astype(x, dtype, copy=False)


def has_double(xp: Namespace) -> bool:
    """Whether there is a float64: JAX has one only where it is told so."""
    return not array_api_compat.is_jax_namespace(xp) or bool(xp.asarray(0.0).dtype == np.float64)


def widened(A: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A x (..., r, c) in the better precision of the two, without a copy of A in it."""
    dtype = np.result_type(A, x)
    if A.dtype == dtype or A.size < 2**16:
        return np.asarray(A @ x)
    out = np.zeros((*x.shape[:-2], len(A), x.shape[-1]), dtype)
    kernels(1).add_product(A, x, out)
    return out


def by_columns(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """A function of columns (r, c) on a stack of them (..., r, c): all columns beside one another."""
    if x.ndim == 2:
        return function(x)
    columns = np.moveaxis(x, -2, 0)
    y = function(columns.reshape(len(columns), -1))
    return np.asarray(np.moveaxis(y.reshape(len(y), *columns.shape[1:]), 0, -2))


def real_dtype(dtype: Any, xp: Namespace) -> Any:
    """The real dtype of the same precision."""
    return xp.float32 if dtype in (xp.float32, xp.complex64) else xp.float64


def is_complex(A: Array, xp: Namespace) -> bool:
    """Whether A has a complex dtype."""
    return _is_complex_dtype(A.dtype, xp)


@cache
def _is_complex_dtype(dtype: Any, xp: Namespace) -> bool:
    return bool(xp.isdtype(dtype, "complex floating"))


def real(A: Array, xp: Namespace) -> Array:
    """Real part; A itself if it is real."""
    return xp.real(A) if is_complex(A, xp) else A


def square(x: Array, xp: Namespace) -> Array:
    """|x|^2 elementwise."""
    return xp.real(x) ** 2 + xp.imag(x) ** 2 if is_complex(x, xp) else x * x


def adjoint(A: Array, xp: Namespace) -> Array:
    """Conjugate transpose A^* (..., n, m)."""
    At = xp.matrix_transpose(A)
    return xp.conj(At) if is_complex(A, xp) else At


def exponent(size: Array, xp: Namespace, always: bool = False) -> Array:
    """Floor of log2 of sizes (...), as floats; 0 for a zero and where the size is near one.

    Everything is computed for A / 2^e, so that powers neither overflow nor underflow; dividing by a power of two is
    exact. Sizes within 2^16 (2^4 in float32) of one need no such care, and spare the copy, but for `always`.
    """
    if is_numpy(size):
        _, e = np.frexp(size)
        e = np.maximum(e - 1.0, float(np.finfo(size.dtype).minexp))  # so that 2^-e is a number, too
        near = 0.0 if always else 16.0 if size.dtype == np.float64 else 4.0
        return np.where((np.abs(e) <= near) | (size == 0), 0.0, e).astype(size.dtype)
    info = xp.finfo(size.dtype)
    safe = xp.where(size > 0, xp.clip(size, float(info.smallest_normal), None), xp.ones_like(size))
    e = xp.floor(xp.log2(safe))
    near = 0.0 if always else 16.0 if info.bits > 32 else 4.0
    return xp.where(xp.abs(e) <= near, xp.zeros_like(e), e)


def ldexp(x: Array, e: Array, xp: Namespace) -> Array:
    """Return x * 2^e, with e broadcast against x; no intermediate result overflows or becomes NaN."""
    if not (e.any() if is_numpy(e) else bool(xp.any(e != 0))):
        return x
    top = float(math.floor(math.log2(float(xp.finfo(x.dtype).max))) - 1)
    if is_numpy(e) and is_numpy(x) and np.abs(e).max() <= top:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return x * np.ldexp(real(x, xp).dtype.type(1), e.astype(np.int32))
    two = array(2.0, e, xp)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # callers look for infinities themselves
        for _ in range(3):  # three factors span more than the range of the floats, so the rest of e cannot matter
            part = xp.clip(e, -top, top)
            x = x * xp.astype(xp.asarray(xp.pow(two, part)), x.dtype)  # NumPy gives scalars
            e = e - part
            if not bool(xp.any(e != 0)):
                break
    return x


_OF_DIRECTIONS = "scale the directions down (order n scales with the n-th power), or the matrix up, or use float64"
NEARER = "evaluate the series nearer to 0"
OF_MATRIX = "scale the matrix and the direction down by the same factor"


def finite(x: Array, what: str, xp: Namespace, advice: str = _OF_DIRECTIONS) -> Array:
    """Return x, or raise OverflowError where it left the range of its dtype."""
    if bool(xp.all(xp.isfinite(x))):
        return x
    raise OverflowError(f"expected the {what} within the range of {dtype_name(x)}, got an overflow; {advice}")


def scalar(x: Array) -> Any:
    """A NumPy scalar for a zero-dimensional NumPy array; any other array as it is."""
    return x[()] if isinstance(x, np.ndarray) else x


def eye(n: int, like: Array, xp: Namespace) -> Array:
    """Identity of order n on the device and with the dtype of `like`."""
    return xp.eye(n, dtype=like.dtype, device=array_api_compat.device(like))


def array(values: Any, like: Array, xp: Namespace, dtype: Any = None) -> Array:
    """An array from Python numbers on the device (and, unless said otherwise, with the dtype) of `like`."""
    return xp.asarray(values, dtype=like.dtype if dtype is None else dtype, device=array_api_compat.device(like))
