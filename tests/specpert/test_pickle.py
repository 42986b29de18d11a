"""Results cross process borders: pickled and copied they go on to give the very same numbers, in every library."""

import copy
import pickle
import subprocess
import sys

import array_api_strict
import numpy as np
import pytest
import scipy.sparse
import torch

from specpert import (
    SigmaHessian,
    SpectralFunction,
    kato_temple,
    leading_cluster,
    one_sided_derivatives,
    sigma_ito,
    sigma_series,
    singular_triplet,
    spectral_ito,
)

rng = np.random.default_rng(0)
SMALL, LARGE = [rng.standard_normal((2, *shape)) for shape in ((4, 6), (300, 280))]
SPARSE = [scipy.sparse.random_array((120, 90), density=0.1, rng=rng, format="csr") for _ in range(2)]
LIBRARIES = {"numpy": np.asarray, "torch": torch.as_tensor, "strict": array_api_strict.asarray}


def sharp(series):
    return [series.coefficients, series.derivatives, series.radius, series.remainder(1e-3), series(1e-3)]


def from_triplet(H):
    return lambda t: [t.sigma, t.u, t.gap, t.status.value, *sharp(sigma_series(t, H, 5, vectors=True))]


def of_cluster(series):
    return [series.effective_matrices, series.mean, series.radius, series.values(1e-3)]


def cases():
    """(name, object, what it still has to give)."""
    for name, asarray in LIBRARIES.items():
        A, H = map(asarray, SMALL)
        yield f"triplet-{name}", singular_triplet(A, 1), from_triplet(H)
        yield f"series-{name}", sigma_series(A, H, 6), sharp
        yield f"vectors-{name}", sigma_series(A, [H, H], 3, k=2, vectors=True), sharp
        yield f"cluster-{name}", sigma_series(A, H, 3, k=(0, 1)), of_cluster
        yield f"hessian-{name}", SigmaHessian(A), lambda h, H=H: [h.quadratic(H), h @ H, h.trace(), h.diagonal()]
        yield f"one-sided-{name}", one_sided_derivatives(A, H), lambda o: [o.derivatives, o.values(0.1)]
        zero = one_sided_derivatives(0 * A, H, k=1)
        yield f"of-zero-{name}", zero, lambda o: [o.derivatives, o.values(0.1)]
        yield f"enclosure-{name}", kato_temple(A, 1e-3 * H), lambda e: [e.value, e.bound]
        yield f"ito-{name}", sigma_ito(A, H, H[None, ...]), lambda i: [i.drift, i.diffusion]
    for dtype in (np.float64, np.float32):
        A, H = LARGE.astype(dtype)
        top = singular_triplet(A, rtol=1e-4 if dtype == np.float32 else 0.0, dtype=np.float64)
        yield f"gram-{dtype.__name__}", top, from_triplet(H)
        yield f"follow-{dtype.__name__}", top, lambda t, A=A, H=H: [t.follow(A + 1e-6 * H)]
        yield f"form-{dtype.__name__}", SigmaHessian(top), lambda h, H=H: [h.quadratic(H), h.diagonal()]
    t = singular_triplet(torch.as_tensor(LARGE[0]))
    yield "gram-torch", t, from_triplet(torch.as_tensor(LARGE[1]))
    sigma = float(singular_triplet(LARGE[0]).sigma)
    leading = leading_cluster(LARGE[0], 0.97 * sigma, 0.9 * sigma, 12)
    yield "leading", leading, lambda t: of_cluster(sigma_series(t, LARGE[1], 3))
    yield "sparse", singular_triplet(SPARSE[0]), from_triplet(SPARSE[1])
    yield "sparse-series", sigma_series(SPARSE[0], SPARSE[1], 3), sharp
    for name in ("nuclear_norm", "von_neumann_entropy", "effective_rank", "stable_rank", "log_condition"):
        made = getattr(SpectralFunction, name)()
        yield name, made, lambda f: [f.value(SMALL[0]), f.gradient(SMALL[0]), f.quadratic(*SMALL), repr(f)]
    yield "schatten", SpectralFunction.schatten_norm(3), lambda f: [f.gradient(SMALL[0]), f.quadratic(*SMALL)]
    yield "spectral-ito", spectral_ito(SpectralFunction.nuclear_norm(), SMALL[0], SMALL[1], [SMALL[1]]), vars


CASES = list(cases())


#: Made of views, which lose their strides in a pickle: some BLAS then round otherwise.
OF_VIEWS = {"leading": 1e-13}


def equal(x, y, rtol=0.0):
    if isinstance(x, dict):
        return all(equal(x[key], y[key], rtol) for key in x)
    if type(x) is not type(y):
        return False
    x, y = np.asarray(x), np.asarray(y)
    return np.array_equal(x, y) or (rtol > 0 and np.allclose(x, y, rtol=rtol, atol=rtol * np.abs(x).max()))


@pytest.mark.parametrize(("name", "made", "gives"), CASES, ids=[c[0] for c in CASES])
def test_pickled_and_copied(name, made, gives):
    rtol = OF_VIEWS.get(name, 0.0)
    before = gives(made)
    for other in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        after = gives(other)
        assert type(other) is type(made)
        if isinstance(before, dict):
            assert equal(before, after, rtol)
        else:
            assert [equal(x, y, rtol) for x, y in zip(before, after, strict=True)] == [True] * len(before)


def test_in_another_process(tmp_path):
    """Nothing that only this process has imported is needed to read it."""
    file = tmp_path / "pickled"
    series = sigma_series(singular_triplet(LARGE[0]), LARGE[1], 4)
    file.write_bytes(pickle.dumps([series, singular_triplet(torch.as_tensor(SMALL[0]))]))
    code = (
        "import pickle, sys; series, t = pickle.load(open(sys.argv[1], 'rb')); "
        "print(repr(float(series(1e-3))), repr(float(t.sigma)))"
    )
    out = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True).stdout
    triplet = singular_triplet(torch.as_tensor(SMALL[0]))
    assert [float(x) for x in out.split()] == [float(series(1e-3)), float(triplet.sigma)]
