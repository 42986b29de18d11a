r"""Functions of the singular values, f(A) = F(s_1, ..., s_r), with gradient and Hessian, at ties too.

F is symmetric, and even in each s_i where it is smooth at zero. In coordinates a = U^* G V, split into its Hermitian
part S = (a + a^*) / 2 and skew part T = (a - a^*) / 2, x_i = Re a_ii,

    D^2 f[G, G] = sum_ij F_ij x_i x_j + sum_{i != j} minus_ij |S_ij|^2 + sum_ij plus_ij |T_ij|^2
                + sum_i plus_ii (||pr_i||^2 + ||qr_i||^2).

The first three terms are those of an eigenvalue function (Lewis & Sendov 2001) of [[0, A], [A^*, 0]], whose eigenvalues
are +-s_i and zero: a pair (s_i, s_j) sees S, a pair (s_i, -s_j) sees T, and (s_i, 0) the residuals.

Legend: A (..., m, n), r = min(m, n); U (..., m, r), s (..., r), V (..., n, r) thin SVD of A / (t 2^e); g_i = F_i first
and F_ij second derivatives of F; minus_ij = (F_i - F_j) / (s_i - s_j), at a tie F_ii - F_ij;
plus_ij = (F_i + F_j) / (s_i + s_j), at zero F_ii; pr, qr (..., m, r), (..., n, r) parts of G V and G^* U outside the
ranges of U and V.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from specpert._arrays import (
    Array,
    Namespace,
    adjoint,
    as_arrays,
    check_matrix,
    eps,
    exponent,
    eye,
    finite,
    is_complex,
    ldexp,
    magnitude,
    real,
    scalar,
    square,
)
from specpert._checks import check_callables, check_direction
from specpert._symmetric import (
    GRADIENT,
    HESSIAN,
    VALUE,
    Composite,
    Core,
    Difference,
    Elementwise,
    Entropy,
    ExpEntropy,
    Power,
    PowerLog,
    StableRank,
    Sum,
    Symmetric,
    UserTerm,
    schatten,
)
from specpert.result import DegenerateSingularValueError, NonFiniteError, ZeroSingularValueError
from specpert.triplet import SingularTriplet

_MATRICES = ("gradient", "Hessian product")


@dataclass(frozen=True, eq=False)
class SpectralFunction:
    r"""A function f(A) = F(s_1, ..., s_r) of the singular values, with its first two derivatives.

    Made by one of the class methods below. The gradient is :math:`U \mathrm{diag}(\partial_i F) V^*`; the Hessian
    is that of Lewis and Sendov through the Jordan-Wielandt matrix, with divided differences
    :math:`(F_i - F_j) / (s_i - s_j)` computed without cancellation. Ties of singular values therefore cost no digits
    where the function is smooth; where it is not, an error says why. Everything is computed for A / ||A||, but for user
    functions, which see the singular values as they are.

    Every method takes a matrix, a stack (..., m, n), or a :class:`SingularTriplet` with all singular values, and gives
    arrays of its library, device and dtype. For complex A derivatives are those of a function on a real vector space,
    with the inner product Re tr(X^* Y).

    Attributes
    ----------
    name : str
        What the function is called in messages.

    References
    ----------
    A. S. Lewis and H. S. Sendov, Twice differentiable spectral functions, SIAM J. Matrix Anal. Appl. 23 (2001) 368-386;
    Nonsmooth analysis of singular values, Set-Valued Analysis 13 (2005) 213-264.

    Examples
    --------
    The nuclear norm is smooth at a tie: that of I + x G is 2 sqrt(1 + x^2) for the G here.

    >>> import numpy as np
    >>> from specpert.spectral import SpectralFunction
    >>> f, G = SpectralFunction.nuclear_norm(), np.array([[0.0, 1.0], [-1.0, 0.0]])
    >>> print(f.value(np.eye(2)), f.quadratic(np.eye(2), G))
    2.0 2.0
    >>> print(f.hessian_product(np.eye(2), G))
    [[ 0.  1.]
     [-1.  0.]]
    """

    name: str
    _core: Core

    # --- the functions ---

    @classmethod
    def nuclear_norm(cls) -> SpectralFunction:
        r"""Nuclear norm :math:`\sum_i s_i`; differentiable where A has full rank.

        >>> print(SpectralFunction.nuclear_norm().value([[3.0, 0.0], [0.0, -4.0]]))
        7.0
        """
        return cls("nuclear norm", schatten(1.0))

    @classmethod
    def schatten_norm(cls, p: float) -> SpectralFunction:
        r"""Schatten norm :math:`(\sum_i s_i^p)^{1/p}`, 0 < p < inf (a quasi-norm for p < 1).

        Twice differentiable for p >= 2 at every A != 0, for 1 < p < 2 once; in all cases twice where A has full rank.

        Raises ValueError for other p; p = inf is the spectral norm, for which :class:`SigmaHessian` is made.

        >>> A = [[3.0, 0.0], [0.0, -4.0]]
        >>> print(SpectralFunction.schatten_norm(2).value(A))
        5.0
        >>> print(SpectralFunction.schatten_norm(2).gradient(A))
        [[ 0.6  0. ]
         [ 0.  -0.8]]
        """
        if not (isinstance(p, numbers.Real) and 0 < p < math.inf):
            raise ValueError(
                f"expected 0 < p < inf, got p = {p!r}; for p = inf, the spectral norm, use sigma_gradient and "
                "SigmaHessian"
            )
        return cls(f"Schatten-{p:g} norm", schatten(float(p)))

    @classmethod
    def log_det(cls) -> SpectralFunction:
        r"""Log-determinant :math:`\log |\det A| = \sum_i \log s_i` of a square matrix of full rank.

        For a rectangular matrix of full rank the same sum, which is :math:`\frac12 \log \det A^* A` (A A^* where
        m < n), the logarithm of the volume that A spans.

        >>> import numpy as np
        >>> f = SpectralFunction.log_det()
        >>> bool(np.isclose(f.value([[3.0, 1.0], [1.0, -4.0]]), np.log(13)))
        True
        """
        return cls("log-determinant", Composite((Power(0.0),), Sum(), log_degree=True))

    @classmethod
    def von_neumann_entropy(cls) -> SpectralFunction:
        r"""Von Neumann entropy :math:`-\sum_i p_i \log p_i`, :math:`p_i = s_i^2 / \sum_j s_j^2`, in nats.

        It is :math:`-\mathrm{tr}\, \rho \log \rho` of the density matrix :math:`\rho = A A^* / \|A\|_F^2`: the entropy
        of entanglement of the pure state with amplitudes A (Nielsen & Chuang 2010, 11.3). Once differentiable at
        rank-deficient A != 0, twice where A has full rank.

        >>> import numpy as np
        >>> bool(np.isclose(SpectralFunction.von_neumann_entropy().value(np.eye(3)), np.log(3)))
        True
        """
        return cls("von Neumann entropy", Composite((Power(2.0), PowerLog(2)), Entropy(), smooth=GRADIENT))

    @classmethod
    def effective_rank(cls) -> SpectralFunction:
        r"""Effective rank :math:`\exp(-\sum_i p_i \log p_i)`, :math:`p_i = s_i / \sum_j s_j` (Roy & Vetterli 2007).

        Between 1 and r; differentiable where A has full rank.

        >>> import numpy as np
        >>> bool(np.isclose(SpectralFunction.effective_rank().value(np.eye(3)), 3.0))
        True
        """
        return cls("effective rank", Composite((Power(1.0), PowerLog(1)), ExpEntropy(), smooth=VALUE))

    @classmethod
    def stable_rank(cls) -> SpectralFunction:
        r"""Stable rank :math:`\|A\|_F^2 / s_1^2` (Rudelson & Vershynin 2007); smooth where s_1 is simple.

        >>> print(SpectralFunction.stable_rank().value([[2.0, 0.0], [0.0, 1.0]]))
        1.25
        """
        return cls("stable rank", Composite((Power(2.0), Power(1.0, 0)), StableRank(), smooth=HESSIAN, simple=(0,)))

    @classmethod
    def log_condition(cls) -> SpectralFunction:
        r"""Logarithm of the condition number, :math:`\log (s_1 / s_r)`; smooth where both are simple and s_r > 0.

        >>> import numpy as np
        >>> bool(np.isclose(SpectralFunction.log_condition().value([[2.0, 0.0], [0.0, 1.0]]), np.log(2)))
        True
        """
        terms = (Power(0.0, 0), Power(0.0, -1))
        return cls("log condition number", Composite(terms, Difference(), simple=(0, -1)))

    @classmethod
    def separable(
        cls, f: Elementwise, df: Elementwise, d2f: Elementwise, name: str = "separable function"
    ) -> SpectralFunction:
        r"""User function :math:`\sum_i f(s_i)` from f, f' and f'', which act elementwise on an array of any shape.

        At a zero singular value it counts as differentiable where f'(0) = 0, and as twice differentiable where f''(0)
        is finite. f should be analytic and vary on no finer scale than s / 64, below which divided differences of f'
        are means of f''.

        >>> import numpy as np
        >>> f = SpectralFunction.separable(lambda s: s**4 / 4, lambda s: s**3, lambda s: 3 * s**2)
        >>> A, G = np.diag([2.0, 2.0]), np.array([[0.0, 1.0], [1.0, 0.0]])
        >>> print(f.value(A), f.quadratic(A, G))  # tr (A + x G)^4 / 4 = 8 + 12 x^2 + ...
        8.0 24.0
        """
        check_callables(f=f, df=df, d2f=d2f)
        return cls(name, Composite((UserTerm((f, df, d2f)),), Sum(), degree=None, smooth=None))

    @classmethod
    def symmetric(
        cls, value: Elementwise, gradient: Elementwise, hessian: Elementwise, name: str = "symmetric function"
    ) -> SpectralFunction:
        r"""User function F(s) of all singular values: symmetric under permutations, and even in each if smooth at zero.

        From stacks s (..., r) in descending order `value` makes F (...), `gradient` F_i (..., r), `hessian` F_ij
        (..., r, r). They are also called with s between a point and its images under the exchange of two close values,
        which may be out of order by less than 1 / 64 of them; each such pair costs four Hessians.

        >>> import numpy as np
        >>> f = SpectralFunction.symmetric(  # |det A| of a 2 x 2 matrix, smooth at the tie s = (1, 1)
        ...     lambda s: s[..., 0] * s[..., 1],
        ...     lambda s: s[..., ::-1],
        ...     lambda s: np.broadcast_to(np.array([[0.0, 1.0], [1.0, 0.0]]), (*s.shape, 2)),
        ... )
        >>> A, G = np.eye(2), np.array([[0.0, 1.0], [1.0, 0.0]])
        >>> print(f"{f.quadratic(A, G):.12f}")  # det (A + x G) = 1 - x^2
        -2.000000000000
        """
        check_callables(value=value, gradient=gradient, hessian=hessian)
        return cls(name, Symmetric((value, gradient, hessian)))

    # --- what they give ---

    def value(self, A: Any) -> Array:
        """Value f(A), shape (...).

        Parameters
        ----------
        A : array, shape (..., m, n), or SingularTriplet

        Raises
        ------
        ZeroSingularValueError
            f is not defined at A: a zero matrix, or a rank-deficient one for the logarithms.
        NonFiniteError, OverflowError, TypeError, ValueError
            A is not a finite matrix, or the result exceeds the range of its dtype.
        """
        return scalar(self._point(A).value())

    def gradient(self, A: Any) -> Array:
        r"""Gradient :math:`U \mathrm{diag}(\partial_i F) V^*`, shape (..., m, n).

        Parameters
        ----------
        A : array, shape (..., m, n), or SingularTriplet

        Raises
        ------
        ZeroSingularValueError
            f is not differentiable at A, because a singular value is zero.
        DegenerateSingularValueError
            f is not differentiable at A, because the largest or smallest value, of which it is a function, is tied.
        NonFiniteError, OverflowError, TypeError, ValueError
            A is not a finite matrix, or the result exceeds the range of its dtype.
        """
        return self._point(A).gradient()

    def hessian_product(self, A: Any, G: Any) -> Array:
        """The matrix H[G] (..., m, n) with <H[G], G'> = D^2 f[G, G'] for every G'.

        Parameters
        ----------
        A : array, shape (..., m, n), or SingularTriplet
        G : array, shape (..., m, n)
            A direction or a stack of them; leading axes broadcast with those of A.

        Raises
        ------
        ZeroSingularValueError, DegenerateSingularValueError
            f is not twice differentiable at A.
        NonFiniteError, OverflowError, TypeError, ValueError
            As :meth:`gradient`; G is not a finite matrix of the shape of A.
        """
        return self._point(A).hessian_product(G)

    def quadratic(self, A: Any, G: Any) -> Array:
        """Second derivative D^2 f[G, G] along G, shape (...).

        Parameters
        ----------
        A : array, shape (..., m, n), or SingularTriplet
        G : array, shape (..., m, n)
            A direction or a stack of them; leading axes broadcast with those of A.

        Raises
        ------
        ZeroSingularValueError, DegenerateSingularValueError, NonFiniteError, OverflowError, TypeError, ValueError
            As :meth:`hessian_product`.
        """
        return scalar(self._point(A).quadratic(G))

    def _point(self, A: Any) -> Point:
        """The function at A, with one SVD for everything asked there."""
        if isinstance(A, SingularTriplet):
            if A._svd is None:
                raise TypeError(
                    "expected a triplet with all singular values, got one with some of them; "
                    "prepare it with singular_triplet(A, k, method='svd')"
                )
            (U, s, V), e, xp = A._svd, A._e, A._xp
        else:
            xp, (A,) = as_arrays(A, names=["A"])
            size = check_matrix(A, "A", xp)
            e = exponent(size, xp)
            U, s, Vh = xp.linalg.svd(ldexp(A, -e[..., None, None], xp), full_matrices=False)
            V = adjoint(Vh, xp)
        return Point(self, xp, e, U, s, V)

    def __repr__(self) -> str:
        return f"SpectralFunction({self.name})"


@dataclass(frozen=True, eq=False)
class Point:
    """A spectral function at one matrix (or stack); `e` and `s` are those of A / 2^e."""

    function: SpectralFunction
    xp: Namespace
    e: Array
    U: Array
    s: Array
    V: Array

    @cached_property
    def _scale(self) -> tuple[Array, Array, Array]:
        """(s, t, e) with A = t 2^e U diag(s) V^*: the largest s is one, or t 2^e is one if f has no degree."""
        core, s = self.function._core, self.s
        if core.degree is None:
            return ldexp(s, self.e[..., None], self.xp), self.xp.ones_like(self.e), self.xp.zeros_like(self.e)
        t = self.xp.where(s[..., 0] > 0, s[..., 0], self.xp.ones_like(s[..., 0]))
        return s / t[..., None], t, self.e

    @cached_property
    def _clean(self) -> Array:
        """Singular values, with what is zero to rounding set to zero."""
        s = self._scale[0]
        tol = 10 * max(self.U.shape[-2], self.V.shape[-2]) * eps(s, self.xp)
        return self.xp.where(s <= tol * s[..., :1], self.xp.zeros_like(s), s)

    def value(self) -> Array:
        """f(A), shape (...)."""
        xp, core = self.xp, self.function._core
        self._check(VALUE)
        s, t, e = self._scale
        with np.errstate(all="ignore"):  # what is not finite is found below
            value = core.value(s)
        if core.degree is None:
            return self._finite(value)
        if core.log_degree:
            value = value + s.shape[-1] * (xp.log(t) + math.log(2.0) * e)
        elif core.degree:
            value = ldexp(value * t, e, xp)
        return finite(value, f"value of the {self.function.name}", xp)

    def gradient(self) -> Array:
        """(..., m, n)."""
        return self._rescaled((self.U * self._g[..., None, :]) @ adjoint(self.V, self.xp), 1, 0, "gradient")

    def derivative(self, G: Any, name: str = "G") -> Array:
        """D f[G], shape (...), without the gradient itself."""
        xp = self.xp
        g = self._g
        U, V, G, shift = self._direction(G, name)
        x = xp.sum(real(xp.conj(U) * (G @ V), xp) if is_complex(U, xp) else U * (G @ V), axis=-2)  # of U^* G V
        return self._rescaled(xp.sum(g * x, axis=-1), 1, shift, "derivative")

    def quadratic(self, G: Any, name: str = "G") -> Array:
        """D^2 f[G, G], shape (...)."""
        xp = self.xp
        hessian, minus, plus = self._hessian
        U, V, G, shift = self._direction(G, name)
        x, S, T, pr, qr = self._coordinates(U, V, G)
        hessian = xp.astype(hessian, x.dtype, copy=False)  # a product of matrices does not promote everywhere
        total = xp.sum(x * (hessian @ x[..., None])[..., 0], axis=-1)
        total = total + xp.sum(minus * square(S, xp) + plus * square(T, xp), axis=(-2, -1))
        weights = xp.linalg.diagonal(plus)
        for residual in (pr, qr):
            if residual is not None:
                total = total + xp.sum(weights * xp.sum(square(residual, xp), axis=-2), axis=-1)
        return self._rescaled(total, 2, 2 * shift, "second derivative")

    def hessian_product(self, G: Any) -> Array:
        """H[G], shape (..., m, n)."""
        xp = self.xp
        hessian, minus, plus = self._hessian
        U, V, G, shift = self._direction(G, "G")
        x, S, T, pr, qr = self._coordinates(U, V, G)
        diagonal = xp.astype(hessian, x.dtype, copy=False) @ x[..., None] * eye(x.shape[-1], x, xp)
        Va, weights = adjoint(V, xp), xp.linalg.diagonal(plus)[..., None, :]
        product = U @ (minus * S + plus * T + diagonal) @ Va
        if pr is not None:
            product = product + (pr * weights) @ Va
        if qr is not None:
            product = product + (U * weights) @ adjoint(qr, xp)
        return self._rescaled(product, 2, shift, "Hessian product")

    @cached_property
    def _g(self) -> Array:
        self._check(GRADIENT)
        with np.errstate(all="ignore"):
            g = self.function._core.gradient(self._clean)
        if self.function._core.smooth is None:
            self._check_even(g)
        return self._finite(g)

    @cached_property
    def _hessian(self) -> tuple[Array, Array, Array]:
        """F_ij, minus (zero on the diagonal) and plus, each (..., r, r)."""
        xp, s, g = self.xp, self._clean, self._g
        self._check(HESSIAN)
        with np.errstate(all="ignore"):
            hessian = self._finite(self.function._core.hessian(s))
        minus = self._finite(self.function._core.minus(s, g, hessian))
        identity = eye(s.shape[-1], s, xp)
        total = s[..., :, None] + s[..., None, :]
        second = xp.linalg.diagonal(hessian)[..., :, None] + xp.zeros_like(total)
        positive = total > 0
        plus = (g[..., :, None] + g[..., None, :]) / xp.where(positive, total, xp.ones_like(total))
        return hessian, minus * (1 - identity), xp.where(positive, plus, second)

    def _finite(self, x: Array) -> Array:
        """Return x, or raise where a function left the floats."""
        if bool(self.xp.all(self.xp.isfinite(x))):
            return x
        if bool(self.xp.any(self._clean == 0)):
            self._raise_zero(self._clean == 0)
        raise NonFiniteError(f"expected a finite {self.function.name} with finite derivatives, got NaN or inf")

    def _direction(self, G: Any, name: str) -> tuple[Array, Array, Array, Array]:
        """U, V and G / 2^shift of one dtype."""
        xp = self.xp
        _, (U, V, G) = as_arrays(self.U, self.V, G, names=["A", "A", name])
        check_direction(G, name, (*self.s.shape[:-1], U.shape[-2], V.shape[-2]), xp)
        shift = exponent(magnitude(G, xp), xp)
        return U, V, ldexp(G, -shift[..., None, None], xp), shift

    def _coordinates(self, U: Array, V: Array, G: Array) -> tuple[Array, Array, Array, Array | None, Array | None]:
        """x, S, T and the residuals pr, qr, None where U or V is square."""
        xp, (m, n) = self.xp, (U.shape[-2], V.shape[-2])
        pr = qr = None
        if m >= n:
            p = G @ V
            a = adjoint(U, xp) @ p
            pr = p - U @ a if m > n else None
        else:
            q = adjoint(G, xp) @ U
            a = adjoint(q, xp) @ V
            qr = q - V @ adjoint(a, xp)
        aa = adjoint(a, xp)
        return real(xp.linalg.diagonal(a), xp), (a + aa) / 2, (a - aa) / 2, pr, qr

    def _rescaled(self, x: Array, order: int, shift: Any, what: str) -> Array:
        """A derivative at A in place of A / (t 2^e): f of degree h scales with the power h - order."""
        xp, power = self.xp, (self.function._core.degree or 0) - order
        _, t, e = self._scale
        factor, exponents = t**power, power * e + shift
        if what in _MATRICES:
            factor, exponents = factor[..., None, None], exponents[..., None, None]
        x = x * factor
        return finite(ldexp(x, exponents, xp), f"{what} of the {self._name}", xp)

    @property
    def _name(self) -> str:
        return self.function.name

    # --- where the function is not smooth ---

    def _check(self, order: int) -> None:
        """Raise where f has no derivative of that order."""
        core, s = self.function._core, self._clean
        if core.smooth is not None:
            # at A = 0 a norm has a value, but a kink; functions of ratios have not even a value
            if order > VALUE or core.degree == 0:
                self._raise_zero(s[..., :1] == 0)
            if order > core.smooth:
                self._raise_zero(s == 0)
        if order > VALUE:
            for k in core.simple:
                self._check_simple(k)

    def _check_even(self, g: Array) -> None:
        """Raise where a user function of |s| has a kink at a zero singular value: a slope that is not zero."""
        xp, zero = self.xp, self._clean == 0
        size = xp.max(xp.where(zero, xp.zeros_like(g), xp.abs(g)), axis=-1, keepdims=True)
        self._raise_zero(zero & ~(xp.abs(g) <= 100 * eps(g, xp) * size))

    def _raise_zero(self, mask: Array) -> None:
        if not bool(self.xp.any(mask)):
            return
        i, where = _locate(mask, self.xp)
        value = float(self.s[(*where, i)]) / (float(self.s[(*where, 0)]) or 1.0)
        if self.function._core.degree is None:
            cause = "is not twice differentiable unless f'(0) = 0 with a finite f''(0)"
        else:
            cause = "is not smooth there (or has no value)"
        raise ZeroSingularValueError(
            f"expected singular values above zero for the {self._name}, got sigma_{i}{_of(where)} = {value:.3e} "
            f"sigma_0: it {cause}; take a function that is smooth at zero, such as the Schatten norm with p >= 2 or a "
            "regularised one by SpectralFunction.separable, or add to A what makes its rank full"
        )

    def _check_simple(self, k: int) -> None:
        """Raise unless the largest (k = 0) or smallest (k = -1) singular value is simple."""
        s, xp, r = self._scale[0], self.xp, self.s.shape[-1]
        if r == 1:
            return
        gaps = (s[..., 0] - s[..., 1]) if k == 0 else (s[..., -2] - s[..., -1])
        tol = 10 * max(self.U.shape[-2], self.V.shape[-2]) * eps(s, xp)
        mask = gaps <= tol * s[..., 0]
        if not bool(xp.any(mask)):
            return
        where = _locate(mask[..., None], xp)[1]
        index = k % r
        values = [float(s[(*where, i)]) for i in range(r)]
        cluster = tuple(i for i in range(r) if abs(values[i] - values[index]) <= tol * values[0])
        what, norm = ("largest", "Schatten norm with large p") if k == 0 else ("smallest", "log-determinant")
        gap = float(gaps[where])
        raise DegenerateSingularValueError(
            f"expected the {what} singular value to be simple for the {self._name}, got{_of(where)} a tie of {cluster} "
            f"(gap {gap:.3e} sigma_0): it has a kink there; take a smooth function in its place, such as the {norm}, "
            f"or the mean of the cluster by sigma_series(A, H, order, k={cluster})",
            k=index,
            cluster=cluster,
            gap=gap,
        )


def _locate(mask: Array, xp: Namespace) -> tuple[int, tuple[int, ...]]:
    """Last index and leading indices of the first element of the mask that holds."""
    *where, i = (int(index[0]) for index in xp.nonzero(mask))
    return i, tuple(where)


def _of(where: tuple[int, ...]) -> str:
    return f" of matrix {where}" if where else ""
