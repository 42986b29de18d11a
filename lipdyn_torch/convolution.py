r"""A convolution as the linear operator it is: norm, certified bounds, derivatives (theory 3).

The monitor reads a convolution as its reshaped kernel R, as the literature does; ``||R||`` is a lower bound of the norm
of the operator on images, which is what a Lipschitz bound needs.

Legend: kernel (co, ci / g, \*k) with g groups; H input, out output, L torus size per axis; s stride; a a tap; W(w) the
kernel's discrete Fourier transform at frequency w, a complex matrix (co / g, ci / g).
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor, nn
from torch.nn import functional

from lipdyn_torch._bridge import (
    SigmaSeries,
    all_finite,
    degenerate,
    series_along,
    top_triplet,
)

__all__ = ["ConvolutionOperator", "NormBounds"]

#: One number for all axes, or one for each.
Sizes: TypeAlias = int | Sequence[int]

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_MODES = ("zeros", "circular", "reflect", "replicate")
#: What rounding may take from a bound, relative to it.
_SAFETY = 1e-12
#: How far derivatives may be apart, relative to their size, that count as the same.
_SAME = 1e-8


@dataclass(frozen=True)
class NormBounds:
    """Where the norm of a convolution lies.

    Attributes
    ----------
    lower : float
        `ConvolutionOperator.norm` rounded down: that of the images a vector was found for.
    upper : float
        The least of ``uppers``.
    uppers : dict of str to float
        Certified upper bounds, each by its name: "torus", "frequencies", "reshaped", "taps".
    """

    lower: float
    upper: float
    uppers: dict[str, float]


class ConvolutionOperator:
    r"""A convolution as a linear operator on images of one size, in float64.

    Parameters
    ----------
    kernel : Tensor, (co, ci / groups, \*k)
        As of `torch.nn.Conv1d`, ``Conv2d``, ``Conv3d``.
    size : int or sequence of int
        Pixels of the input along each axis.
    stride, dilation : int or sequence of int
    padding : int, sequence of int, "same" or "valid"
        Before and behind each axis; "same" for as many outputs as inputs, with stride one.
    padding_mode : {"zeros", "circular", "reflect", "replicate"}
    groups : int

    Attributes
    ----------
    kernel : Tensor
        A copy, in float64.
    size, out : list of int
        Pixels of the input and of the output along each axis.
    stride, dilation : list of int
    padding : list of (int, int)
        Before and behind each axis.

    Raises
    ------
    TypeError, ValueError
        An argument is not as described, or not finite.

    Examples
    --------
    All-ones 3 x 3: the reshaped kernel has norm 3, the operator nearly 9.

    >>> import torch
    >>> A = ConvolutionOperator(torch.ones(1, 1, 3, 3), 32, padding=1)
    >>> print(f"{A.reshaped_norm:.3f} <= {A.norm:.4f} <= {A.bounds().upper:.4f}")
    3.000 <= 8.9457 <= 9.0000
    >>> circular = ConvolutionOperator(torch.ones(1, 1, 3, 3), 32, padding=1, padding_mode="circular")
    >>> circular.singular_values().shape, f"{circular.singular_values()[0]:.4f}"
    (torch.Size([1024]), '9.0000')
    """

    def __init__(
        self,
        kernel: Tensor,
        size: Sizes,
        *,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
    ) -> None:
        if not isinstance(kernel, Tensor) or not kernel.is_floating_point():
            raise TypeError(f"expected kernel to be a real floating tensor, got {_kind(kernel)}")
        if kernel.ndim not in (3, 4, 5) or kernel.numel() == 0:
            raise ValueError(f"expected a kernel (co, ci / groups, *k) of 1 to 3 axes, got shape {tuple(kernel.shape)}")
        if not all_finite(kernel):
            raise ValueError("expected kernel to be finite, got NaN or inf in it")
        if not (isinstance(padding_mode, str) and padding_mode in _MODES):
            raise ValueError(f"expected padding_mode among {_MODES}, got {padding_mode!r}")
        if not isinstance(groups, int) or groups < 1 or kernel.shape[0] % groups:
            raise ValueError(f"expected groups to divide the {kernel.shape[0]} output channels, got {groups!r}")
        self.kernel = kernel.detach().to(torch.float64, copy=True)
        self.groups, self.padding_mode = groups, padding_mode
        self._scale = float(self.kernel.abs().amax()) or 1.0  # norms are those of the kernel of size one, times this
        dims = kernel.ndim - 2
        self.size = _sizes(size, dims, "size", 1)
        self.stride = _sizes(stride, dims, "stride", 1)
        self.dilation = _sizes(dilation, dims, "dilation", 1)
        reach = [d * (k - 1) for d, k in zip(self.dilation, kernel.shape[2:], strict=True)]
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f"expected padding 'same', 'valid' or a number, got {padding!r}")
        if isinstance(padding, str) and padding == "same" and any(s != 1 for s in self.stride):
            raise ValueError(f"expected stride 1 with padding='same', got {self.stride}")
        self.padding = sides(padding if isinstance(padding, str) else _sizes(padding, dims, "padding", 0), reach)
        most = {"reflect": [n - 1 for n in self.size], "circular": self.size}.get(padding_mode)
        if most is not None and any(max(p) > limit for p, limit in zip(self.padding, most, strict=True)):
            raise ValueError(f"expected padding of at most {most} for {padding_mode!r} padding, got {self.padding}")
        padded = [n + sum(p) for n, p in zip(self.size, self.padding, strict=True)]
        if any(n <= r for n, r in zip(padded, reach, strict=True)):
            raise ValueError(f"expected images larger than the kernel's reach {reach}, got {padded} with padding")
        self.out = [(n - r - 1) // s + 1 for n, r, s in zip(padded, reach, self.stride, strict=True)]
        self._reach, self._padded = reach, padded

    @classmethod
    def of(cls, module: nn.Module, size: Sizes) -> Self:
        """The operator of a ``torch.nn`` convolution on inputs of that size, its bias aside.

        A transposed convolution is read as the convolution of its *outputs* that it is the adjoint of, with the same
        singular values.

        Examples
        --------
        >>> import torch
        >>> ConvolutionOperator.of(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), 32)
        ConvolutionOperator(3 x 32 x 32 -> 8 x 16 x 16)
        >>> ConvolutionOperator.of(torch.nn.ConvTranspose1d(3, 8, 4, stride=2), 10)
        ConvolutionOperator(8 x 22 -> 3 x 10)
        """
        if not isinstance(module, nn.modules.conv._ConvNd):
            raise TypeError(f"expected a convolution of torch.nn, got {_kind(module)}")
        found = cls(module.weight, _input_size(module, size), **_options(module))
        if module.transposed and found.out != _sizes(size, len(module.kernel_size), "size", 1):
            raise ValueError(f"expected output_padding below stride {module.stride}, got {module.output_padding}")
        return found

    @classmethod
    def like(cls, module: nn.modules.conv._ConvNd, size: Sizes) -> Self:
        """As `of`, with all taps one and a single channel: the geometry alone."""
        ones = torch.ones(1, 1, *module.kernel_size, dtype=torch.float64, device="cpu")
        return cls(ones, _input_size(module, size), **{**_options(module), "groups": 1})

    def __repr__(self) -> str:
        ci, co = self.kernel.shape[1] * self.groups, self.kernel.shape[0]
        inputs, outputs = (" x ".join(map(str, sizes)) for sizes in ([ci, *self.size], [co, *self.out]))
        return f"{type(self).__name__}({inputs} -> {outputs})"

    # --- products ---

    def apply(self, x: Tensor) -> Tensor:
        """A x for images ``(N, ci, *size)``, in float64: ``(N, co, *out)``."""
        return self._applied(self.kernel, _images(x, self.kernel.shape[1] * self.groups, self.size))

    def apply_adjoint(self, y: Tensor) -> Tensor:
        """A^T y for images ``(N, co, *out)``, in float64: ``(N, ci, *size)``."""
        return self._adjoint(self.kernel, _images(y, len(self.kernel), self.out))

    def _adjoint(self, kernel: Tensor, y: Tensor) -> Tensor:
        x = y.new_zeros(len(y), kernel.shape[1] * self.groups, *self.size)
        with torch.enable_grad():  # whatever the padding: a linear map is its own derivative
            x.requires_grad_()
            (found,) = torch.autograd.grad(self._applied(kernel, x), x, y)
        return found

    def _applied(self, kernel: Tensor, x: Tensor) -> Tensor:
        x = padded(x, self.padding, self.padding_mode)
        return _CONV[len(self.size)](x, kernel, None, self.stride, 0, self.dilation, self.groups)

    # --- norms ---

    @property
    def reshaped_norm(self) -> float:
        """``||R||``, what the monitor calls sigma: a lower bound where some patch meets no padding (theory 3.1)."""
        return self._scale * float(torch.linalg.matrix_norm(self._grouped.flatten(2), 2).amax())

    @property
    def exact(self) -> bool:
        """Whether it is a convolution on a torus, whose singular values are known exactly."""
        if self.padding_mode != "circular":
            return False
        axes = zip(self.size, self.stride, self.out, strict=True)
        return all(n % s == 0 and o == n // s for n, s, o in axes)

    def singular_values(self) -> Tensor:
        """All min(inputs, outputs) singular values of a convolution on a torus, descending (theory 3.2).

        Raises ValueError unless `exact`: circular padding with one output for each stride.
        """
        if not self.exact:
            wanted = [f"{n / s:g}" for n, s in zip(self.size, self.stride, strict=True)]
            raise ValueError(
                f"expected circular padding with {' x '.join(wanted)} outputs, got {self.padding_mode!r} padding with "
                f"{' x '.join(map(str, self.out))}; for other operators there is bounds()"
            )
        return torch.linalg.svdvals(self._torus_blocks(self.kernel)).flatten().sort(descending=True).values

    def bounds(self, *, grid: int = 32, torus: bool = True) -> NormBounds:
        """Lower and certified upper bounds of the norm (theory 3.1, 3.3).

        Parameters
        ----------
        grid : int
            Frequencies along each axis for the bound "frequencies", which does not depend on the size of the images;
            more of them make it tighter.
        torus : bool
            Whether to decompose one matrix (co, ci) for each pixel for the tightest bound, "torus"; the norm itself
            for a convolution on a torus. For large images "frequencies" is cheaper.
        """
        spread = self._scale * self.spread
        uppers = {
            "reshaped": spread * self._reshaped_bound(),
            "taps": spread * float(sum(torch.linalg.matrix_norm(tap, 2).amax() for tap in self._taps())),
            "frequencies": spread * self._frequency_bound(grid),
        }
        if torus:
            on = self.torus, self.stride, self.dilation
            uppers["torus"] = self.norm if self.exact else spread * _torus_norm(self._grouped, *on)
        uppers = {name: bound * (1 + _SAFETY) for name, bound in sorted(uppers.items(), key=lambda pair: pair[1])}
        return NormBounds(self.norm * (1 - _SAFETY), min(uppers.values()), uppers)

    @cached_property
    def norm(self) -> float:
        """The norm: exact on a torus; else ``||A v||`` of the unit vector that Lanczos finds, most often to 8 digits.

        Examples
        --------
        >>> import torch
        >>> print(f"{ConvolutionOperator(torch.ones(1, 1, 3, 3), 32, padding=1).norm:.4f}")
        8.9457
        """
        if self.exact:
            return self._scale * _torus_norm(self._grouped, self.torus, self.stride, self.dilation)
        unit = self.kernel / self._scale
        A = self._linear(unit)
        if not bool(unit.any()):
            return 0.0
        if min(A.shape) <= 2:  # too small for Lanczos
            return self._scale * float(np.linalg.norm(A @ np.eye(A.shape[1]), 2))
        start = np.random.default_rng(0).standard_normal(min(A.shape))
        _, _, Vh = svds(A, k=1, v0=start, tol=1e-5)
        return self._scale * float(np.linalg.norm(A @ Vh[0]) / np.linalg.norm(Vh[0]))

    def _linear(self, kernel: Tensor) -> LinearOperator:
        """The operator of a kernel on NumPy's vectors."""
        if kernel.device.type != "cpu":
            raise TypeError(f"expected a kernel on the CPU for products with images, got {kernel.device}; use .cpu()")
        inputs, outputs = (kernel.shape[1] * self.groups, *self.size), (kernel.shape[0], *self.out)

        def products(x: np.ndarray) -> np.ndarray:
            images = torch.from_numpy(np.ascontiguousarray(x.T)).double().reshape(-1, *inputs)
            return self._applied(kernel, images).flatten(1).numpy().T

        def adjoint_products(y: np.ndarray) -> np.ndarray:
            images = torch.from_numpy(np.ascontiguousarray(y.T)).double().reshape(-1, *outputs)
            return self._adjoint(kernel, images).flatten(1).numpy().T

        return LinearOperator(
            (math.prod(outputs), math.prod(inputs)),
            matvec=lambda x: products(x.reshape(-1, 1)).ravel(),
            rmatvec=lambda y: adjoint_products(y.reshape(-1, 1)).ravel(),
            matmat=products,
            rmatmat=adjoint_products,
            dtype=np.float64,
        )

    @property
    def _grouped(self) -> Tensor:
        """The kernel of size one (g, co / g, ci / g, *k)."""
        return (self.kernel / self._scale).unflatten(0, (self.groups, -1))

    def _taps(self) -> list[Tensor]:
        """The matrices (g, co / g, ci / g) of the kernel's taps."""
        return list(self._grouped.flatten(3).unbind(-1))

    @property
    def spread(self) -> float:
        """Norm of the padding: the root of how often it shows one pixel. The bounds are those of what comes after."""
        return 1.0 if self.exact else self.repeats

    @property
    def repeats(self) -> float:
        """As `spread`, of a convolution that is not taken for one on a torus."""
        if self.padding_mode == "zeros":
            return 1.0
        most = 1
        for n, padding in zip(self.size, self.padding, strict=True):
            pixels = torch.arange(n, dtype=torch.float64, device="cpu")[None, None]
            shown = padded(pixels, [padding], self.padding_mode).flatten().tolist()
            most *= max(Counter(shown).values())
        return math.sqrt(most)

    def _reshaped_bound(self) -> float:
        """The least norm of the kernel reshaped, times the root of how many patches a pixel is in (theory 3.1)."""
        W, axes = self._grouped, list(zip(self.kernel.shape[2:], self.dilation, self.stride, strict=True))
        patches = math.prod(math.ceil(k * math.gcd(d, s) / s) for k, d, s in axes)
        bounds = [math.sqrt(patches) * float(torch.linalg.matrix_norm(W.flatten(2), 2).amax())]
        # as many taps on the rows as one likes, each a copy of the outputs: of a convolution with stride one
        taps = range(3, W.ndim)
        for count in range(1, len(taps) + 1):
            for rows in itertools.combinations(taps, count):
                columns = [i for i in taps if i not in rows]
                reshaped = W.permute(0, 1, *rows, 2, *columns).flatten(2 + count).flatten(1, 1 + count)
                bounds.append(math.sqrt(math.prod(W.shape[3:])) * float(torch.linalg.matrix_norm(reshaped, 2).amax()))
        return min(bounds)

    def _frequency_bound(self, grid: int) -> float:
        """Supremum of ||W(w)|| over all frequencies, from a grid (Pfister and Bresler; theory 3.3)."""
        if not isinstance(grid, int) or grid <= 2 * (max(self.kernel.shape[2:]) // 2):
            raise ValueError(f"expected grid to be more than twice half the kernel, got {grid!r}")
        slack = math.prod(1 - 2 * (k // 2) / grid for k in self.kernel.shape[2:])
        once = [1] * len(self.size)  # dilation only moves frequencies, a stride takes means over several
        return _torus_norm(self._grouped, [grid] * len(self.size), once, once) / math.sqrt(slack)

    @property
    def torus(self) -> list[int]:
        """Pixels of the least torus on which nothing that pads or is padded meets the other end (theory 3.3).

        It may be less than the H + d (k - 1) there, as the same zeros can pad both ends. The norm there is an upper
        bound, and the norm itself of a convolution that is one on a torus.

        Examples
        --------
        >>> import torch
        >>> ConvolutionOperator(torch.ones(1, 1, 3, 3), 32, padding=1).torus
        [33, 33]
        """
        return self.size if self.exact else self.covering

    @property
    def covering(self) -> list[int]:
        """As `torus`, of what there is when the padding is made."""
        sizes = []
        for i, s in enumerate(self.stride):
            # what other padding shows is a larger image without any
            n, before = (self.size[i], self.padding[i][0]) if self.padding_mode == "zeros" else (self._padded[i], 0)
            last = (self.out[i] - 1) * s + self._reach[i] - before
            sizes.append(-(-max(n + before, last + 1, s * self.out[i]) // s) * s)
        return sizes

    def _torus_blocks(self, kernel: Tensor) -> Tensor:
        """Its blocks, the operator being one on a torus."""
        return blocks(
            kernel.unflatten(0, (self.groups, -1)),
            phases(kernel.shape[2:], self.size, self.stride, self.dilation),
        )

    def _top_blocks(self, B: Tensor) -> list[tuple[int, int]]:
        """Frequency and group of the blocks that attain the norm: opposite ones at least, more by symmetries."""
        tops = _tops(B / self._scale)
        rounding = 10 * max(B.shape[-2:]) * torch.finfo(torch.float64).eps
        return [(int(i), int(j)) for i, j in (tops >= (1 - rounding) * tops.amax()).nonzero()]

    # --- derivatives ---

    def gradient(self) -> Tensor:
        """Gradient ``(co, ci / groups, *k)`` of the norm with respect to the kernel (theory 3.4), in float64.

        Raises
        ------
        specpert.DegenerateSingularValueError, specpert.ZeroSingularValueError
            The norm is not differentiable.

        Examples
        --------
        >>> import torch
        >>> A = ConvolutionOperator(torch.tensor([[[1.0, 2.0, 1.0]]]), 8, padding=1, padding_mode="circular")
        >>> A.gradient()  # the norm is the sum of the taps
        tensor([[[1., 1., 1.]]], dtype=torch.float64)
        """
        with torch.enable_grad():
            kernel = self.kernel.clone().requires_grad_()
            if self.exact:
                B = self._torus_blocks(kernel)
                triplets = {where: top_triplet(B.detach()[where]) for where in self._top_blocks(B.detach())}
                seen = [(t.u.conj() @ B[where] @ t.v).real for where, t in triplets.items()]
            else:
                triplet = top_triplet(self._linear(self.kernel))
                u, v = (torch.from_numpy(np.array(x)) for x in (triplet.u, triplet.v))
                seen = [(u * self._applied(kernel, v.reshape(1, -1, *self.size)).flatten()).sum()]
            first, *others = (torch.autograd.grad(x, kernel, retain_graph=True)[0] for x in seen)
        if not all(torch.allclose(first, other, rtol=0.0, atol=_SAME * float(first.norm())) for other in others):
            raise _tied(len(seen))
        return first

    def series(self, direction: Tensor, order: int = 3) -> SigmaSeries:
        """Taylor series of the norm along a direction in the space of kernels, with certificate (theory 3.4).

        On a torus it is that of the block that attains the norm, exact and cheap; where there are several, as opposite
        frequencies have them, all must agree. Else products with images do it, and take their time where the largest
        values lie close together, as they do for large images. The series goes on as that of the same value where
        another one becomes the largest.

        Parameters
        ----------
        direction : Tensor, shape of the kernel
        order : int

        Raises
        ------
        specpert.DegenerateSingularValueError, specpert.ZeroSingularValueError, specpert.ConvergenceError
            The norm has no derivatives, or the values lie too close.

        Examples
        --------
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> A = ConvolutionOperator(torch.randn(2, 2, 3, 3), 8, padding=1)
        >>> dT = torch.randn(2, 2, 3, 3)
        >>> series = A.series(dT, 4)
        >>> after = ConvolutionOperator(A.kernel + 1e-3 * dT, 8, padding=1).norm
        >>> abs(float(series(1e-3)) - after) < 1e-9
        True
        """
        if not isinstance(direction, Tensor) or direction.shape != self.kernel.shape:
            raise ValueError(f"expected direction to be a tensor {tuple(self.kernel.shape)}, got {_kind(direction)}")
        dT = direction.detach().to(self.kernel)
        if not self.exact:
            return series_along(top_triplet(self._linear(self.kernel)), self._linear(dT), order)
        B, H = map(self._torus_blocks, (self.kernel, dT))
        first, *others = (series_along(top_triplet(B[i]), H[i], order) for i in self._top_blocks(B))
        c = first.coefficients / first.coefficients[0]
        rate = max((abs(float(c[n])) ** (1 / n) for n in range(1, order + 1)), default=0.0)
        allowed = _SAME * torch.tensor([rate**n for n in range(order + 1)], dtype=c.dtype)
        for other in others:
            if bool(((other.coefficients / first.coefficients[0] - c).abs().cpu() > allowed).any()):
                raise _tied(1 + len(others))
        return first


def sides(padding: str | Sequence[int], reach: Sequence[int]) -> list[tuple[int, int]]:
    """Pixels added before and behind each axis for a kernel that reaches so far, as torch does it."""
    if padding == "valid":
        return [(0, 0)] * len(reach)
    if padding == "same":
        return [(r // 2, r - r // 2) for r in reach]
    return [(int(p), int(p)) for p in padding]


def padded(x: Tensor, padding: Sequence[tuple[int, int]], mode: str) -> Tensor:
    """Images with so many pixels more; a convolution then has no padding."""
    width = [p for both in reversed(padding) for p in both]  # F.pad wants the last axis first
    return functional.pad(x, width, mode="constant" if mode == "zeros" else mode) if any(width) else x


def _options(module: nn.modules.conv._ConvNd) -> dict[str, Any]:
    return {key: getattr(module, key) for key in ("stride", "padding", "dilation", "groups", "padding_mode")}


def _input_size(module: nn.modules.conv._ConvNd, size: Sizes) -> list[int]:
    """That of the convolution: of a transposed one the size of the outputs."""
    size = _sizes(size, len(module.kernel_size), "size", 1)
    if not module.transposed:
        return size
    assert not isinstance(module.padding, str)  # which torch refuses there
    axes = zip(
        *(size, module.stride, module.padding, module.dilation, module.kernel_size, module.output_padding), strict=True
    )
    return [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, s, p, d, k, e in axes]


def _tied(count: int) -> Exception:
    return degenerate(
        f"expected the norm to change alike at all frequencies that attain it, got {count} of which some differ: there "
        "is no derivative",
        count,
    )


def phases(
    taps: Sequence[int], size: Sequence[int], stride: Sequence[int], dilation: Sequence[int], distinct: bool = False
) -> Tensor:
    """What each tap of a kernel is multiplied by at each frequency of a torus: E, complex, (frequencies, taps, prod s).

    Frequencies i + a L / s for a = 0 ... s - 1 are one behind a stride s (theory 3.2). With `distinct` there is one of
    those that are bound to have the same singular values: where E E^* is the same, or the conjugate.
    """
    total, names = torch.ones(1, 1, 1, dtype=torch.complex128, device="cpu"), np.zeros((2, 1), dtype=np.int64)
    for k, n, s, d in zip(taps, size, stride, dilation, strict=True):
        coarse = np.arange(n // s)
        fine = coarse[:, None] + np.arange(s) * (n // s)
        turns = fine[:, None] * (np.arange(k) * d)[:, None] % n
        axis = torch.from_numpy(np.exp(-2j * math.pi / n * turns))
        total = torch.einsum("fka,glb->fgklab", total, axis).flatten(4).flatten(2, 3).flatten(0, 1)
        # taps b apart have s exp(2 pi i b d i / L) in common if s divides b d, else nothing
        name = coarse * (d // math.gcd(d, s) if overlaps(k, s, d) else 0)
        names = (names[:, :, None] * (n // s) + np.stack([name, -name])[:, None] % (n // s)).reshape(2, -1)
    if distinct:
        total = total[np.sort(np.unique(names.min(0), return_index=True)[1])]
    return total / math.sqrt(math.prod(stride))


def overlaps(taps: int, stride: int, dilation: int) -> bool:
    """Whether a pixel is in several patches along an axis; else the frequency there makes no difference."""
    return stride // math.gcd(dilation, stride) < taps


def blocks(W: Tensor, turned: Tensor) -> Tensor:
    """The matrices (frequencies, g, co / g, ci / g prod s) of a convolution W (g, co / g, ci / g, k...) by `phases`."""
    seen = W.flatten(3) @ torch.view_as_real(turned.to(W.device)).transpose(0, 1).flatten(1)  # one real product
    return torch.view_as_complex(seen.unflatten(-1, (len(turned), -1, 2))).permute(3, 0, 1, 2, 4).flatten(3)


def _tops(B: Tensor) -> Tensor:
    """The largest singular value of each matrix."""
    B = B if B.shape[-2] <= B.shape[-1] else B.mH
    return torch.linalg.eigvalsh(B @ B.mH)[..., -1].clamp_min(0).sqrt()


def _torus_norm(W: Tensor, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> float:
    """Norm of a convolution on a torus."""
    return float(_tops(blocks(W, phases(W.shape[3:], size, stride, dilation, distinct=True))).amax())


def _sizes(given: Any, dims: int, name: str, least: int) -> list[int]:
    """One number for each axis."""
    try:
        given_ = [given] * dims if isinstance(given, numbers.Integral) else list(given)
    except TypeError:  # nothing to go through
        given_ = []
    sizes = [int(x) for x in given_ if isinstance(x, numbers.Integral)]
    if not len(sizes) == len(given_) == dims or min(sizes) < least:
        raise ValueError(f"expected {name} to be one integer of at least {least}, or {dims}, got {given!r}")
    return sizes


def _images(x: Any, channels: int, size: list[int]) -> Tensor:
    """Images of that size, in float64."""
    shape = ", ".join(map(str, ("N", channels, *size)))
    if not isinstance(x, Tensor):
        raise TypeError(f"expected images as a tensor ({shape}), got {_kind(x)}")
    if x.ndim != 2 + len(size) or [*x.shape[1:]] != [channels, *size]:
        raise ValueError(f"expected images ({shape}), got {_kind(x)}; make an operator for images of that size")
    return x.double()


def _kind(x: object) -> str:
    return f"a tensor {tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
