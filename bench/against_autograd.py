"""specpert against nested automatic differentiation of the singular value: time, and error against mpmath."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from oracles import taylor_mpmath

from bench.harness import Row, compare
from specpert import sigma_derivative, sigma_series

rng = np.random.default_rng(0)


def nested_jvp(A: torch.Tensor, H: torch.Tensor, order: int) -> torch.Tensor:
    """D^n sigma_0[H, ..., H] by forward mode nested n times."""

    def along(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(A + x * H)[..., 0]

    f = along
    for _ in range(order):
        f = partial(lambda g, x: torch.func.jvp(g, (x,), (torch.ones_like(x),))[1], f)
    return f(torch.zeros((), dtype=A.dtype))


def nested_grad(A: torch.Tensor, H: torch.Tensor, order: int) -> torch.Tensor:
    """The same by reverse mode, differentiated n times through torch.autograd.grad."""
    x = torch.zeros((), dtype=A.dtype, requires_grad=True)
    value = torch.linalg.svdvals(A + x * H)[0]
    for _ in range(order):
        (value,) = torch.autograd.grad(value, x, create_graph=True)
    return value.detach()


def order_row(order: int, method: Callable, name: str, compiled: bool = False) -> Row:
    A, H = rng.standard_normal((2, 6, 10))
    a, h = torch.as_tensor(A), torch.as_tensor(H)
    truth = taylor_mpmath(A, H, 0, order)[order] * math.factorial(order)
    start = time.perf_counter()
    values = sigma_derivative(A, order, directions=H), method(a, h, order)
    first = time.perf_counter() - start
    errors = [abs(float(value) / truth - 1) for value in values]
    note = f"relative error {errors[0]:.0e} against {errors[1]:.0e}"
    if compiled:
        note += f"; theirs was compiled for this shape and order beforehand, in {first:.1f} s"
    return compare(
        f"order {order}, 6 x 10, one direction, to {name}",
        lambda: sigma_derivative(A, order, directions=H),
        lambda: method(a, h, order),
        limit=1.0,
        note=note,
    )


def batched() -> Row:
    A, H = rng.standard_normal((2, 10_000, 6, 10))
    a, h = torch.as_tensor(A), torch.as_tensor(H)
    order = 4

    def theirs() -> torch.Tensor:
        return torch.func.vmap(partial(nested_jvp, order=order))(a, h)

    return compare(
        "order 4, 10,000 matrices 6 x 10, to nested torch.func.jvp under vmap",
        lambda: sigma_series(A, H, order),
        theirs,
        limit=0.2,
        seconds=20.0,
    )


def jobs() -> list[Callable[[], Row]]:
    rows = [partial(order_row, n, nested_jvp, "nested torch.func.jvp") for n in range(2, 7)]
    rows += [partial(order_row, n, nested_grad, "nested torch.autograd.grad") for n in range(2, 7)]
    return [*rows, *_jax_rows(), batched]


def _jax_rows() -> list[Callable[[], Row]]:
    try:
        import jax
    except ImportError:
        return []
    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp

    def jax_jvp(a: torch.Tensor, h: torch.Tensor, order: int) -> float:
        if order not in compiled:

            def along(x: object, A: object, H: object) -> object:
                return jnp.linalg.svd(A + x * H, compute_uv=False)[0]

            f = along
            for _ in range(order):
                f = partial(lambda g, x, A, H: jax.jvp(lambda y: g(y, A, H), (x,), (1.0,))[1], f)
            compiled[order] = jax.jit(f)
        return compiled[order](0.0, a.numpy(), h.numpy())

    compiled: dict[int, Callable] = {}
    return [partial(order_row, n, jax_jvp, "nested jax.jvp under jit", compiled=True) for n in range(2, 7)]
