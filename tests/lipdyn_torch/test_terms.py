"""Every number of the history against its literal definition: per-sample gradients, explicit Sigma, explicit H."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lipdyn_torch import LipschitzMonitor, layers

TOLERANCE = 1e-10


def largest_singular_value(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix)[0]


def per_sample_gradients(case, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """(M, ...) gradients of each sample's share of the loss, times M: their mean is the batch gradient."""
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return case.loss(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    scale = len(x) if case.reduction == "sum" else 1
    return {name: scale * g for name, g in gradients.items()}


def dense_terms(W: Tensor, G: Tensor) -> SimpleNamespace:
    """sigma, J, explicit H (mn, mn) by twice differentiating the decomposition, explicit Sigma (mn, mn)."""
    samples = len(G)
    J = torch.func.grad(largest_singular_value)(W).reshape(-1)
    H = torch.func.hessian(largest_singular_value)(W).reshape(W.numel(), W.numel())
    centred = (G - G.mean(0)).reshape(samples, -1)
    Sigma = centred.T @ centred / (samples * (samples - 1))
    return SimpleNamespace(sigma=largest_singular_value(W), J=J, H=H, Sigma=Sigma, g=G.mean(0).reshape(-1))


def isolation(W: Tensor) -> float:
    """Distance of sigma_1 to the rest of the spectrum of [[0, W], [W^T, 0]], built explicitly (theory 1.9)."""
    m, n = W.shape
    T0 = torch.zeros(m + n, m + n, dtype=W.dtype)
    T0[:m, m:], T0[m:, :m] = W, W.T
    eigenvalues = torch.linalg.eigvalsh(T0)
    return float(eigenvalues[-1] - eigenvalues[-2])


def taylor_changes(W: Tensor, D: Tensor) -> list[float]:
    """log1p of the Taylor sums of sigma along D, by repeated differentiation."""
    f = [lambda t: largest_singular_value(W + t * D)]
    for _ in range(3):
        f.append(torch.func.grad(f[-1]))
    values = [float(g(torch.zeros((), dtype=W.dtype))) for g in f]
    sums, total = [], 0.0
    for order in (1, 2, 3):
        total += values[order] / math.factorial(order)
        sums.append(math.log1p(total / values[0]))
    return sums


def check(name: str, got: float, expected: float | Tensor, scale: float | Tensor | None = None) -> None:
    expected = float(expected)
    scale = abs(expected) if scale is None else float(scale)
    assert abs(got - expected) <= TOLERANCE * scale, f"{name}: got {got}, expected {expected}"


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_every_term_is_its_dense_definition(case):
    model = case.model()
    optimizer = case.optimizer(model)
    lrs = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    monitor = LipschitzMonitor(model, optimizer, noise="split")
    joint: dict[str, tuple[float, Tensor, Tensor]] = {}
    for step in range(3):
        x, y = case.data(step)
        gradients = per_sample_gradients(case, model, x, y)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        case.step(model, optimizer, step)
        rows = {row["layer"]: row for row in monitor.history if row["step"] == step}
        for name in monitor.layers:
            row, parameter = rows[name], model.get_parameter(f"{name}.weight")
            W = before[f"{name}.weight"].flatten(1)
            G = gradients[f"{name}.weight"].flatten(2)
            D = parameter.detach().flatten(1) - W
            dense, lr = dense_terms(W, G), lrs[id(parameter)]
            check("sigma", row["sigma"], dense.sigma)
            check("z", row["z"], dense.sigma.log(), 1.0)
            check("gap", row["gap"], isolation(W))
            check("eps", row["eps"], 2 * torch.linalg.matrix_norm(D, 2) / isolation(W))
            check_path(row, W, D)
            observed = largest_singular_value(W + D).log() - dense.sigma.log()
            check("dz", row["dz"], observed, 1.0)
            check("gHg", row["gHg"], case.gain(step) ** 2 * dense.g @ dense.H @ dense.g)
            assert (row["lr"], row["batch"], row["status"]) == (lr, case.batch, "ok")
            check_forces(row, dense, W, lr, optimizer.defaults, case.gain(step))
            joint[name] = (lr * case.gain(step), dense.J / dense.sigma, (G - G.mean(0)).flatten(1))
        check_network(rows, joint, monitor.layers)


def cluster_changes(W: Tensor, D: Tensor, c: int) -> list[float]:
    """log of the largest eigenvalue of E_0 + ... + E_N over sigma: theory 1.8 as printed, on full bases."""
    m, n = W.shape
    U, s, Vh = torch.linalg.svd(W, full_matrices=True)
    V, e = Vh.T, s[:c]
    s = torch.cat([s, s.new_zeros(max(m, n) - len(s))])
    P, Q, E = [U[:, :c]], [V[:, :c]], [torch.diag(e)]
    sums, total, s_1 = [], E[0], e[0]
    for order in (1, 2, 3):
        f, g = D @ Q[-1], D.T @ P[-1]
        E.append((P[0].T @ f + Q[0].T @ g) / 2)
        f = f - sum(P[j] @ E[order - j] for j in range(1, order))
        g = g - sum(Q[j] @ E[order - j] for j in range(1, order))
        al, be = U.T @ f, V.T @ g
        x, y = torch.zeros_like(al), torch.zeros_like(be)
        for j in range(c):
            for i in range(max(m, n)):
                a, b = (al[i, j] if i < m else 0.0), (be[i, j] if i < n else 0.0)
                mu = (a - b) / (2 * (s[i] + e[j]))
                d = e[j] ** 2 - s[i] ** 2
                if i < m:
                    x[i, j] = mu if i < c else (e[j] * a + s[i] * b) / d
                if i < n:
                    y[i, j] = -mu if i < c else (s[i] * a + e[j] * b) / d
        P.append(U @ x)
        Q.append(V @ y)
        total = total + E[-1]
        sums.append(float(torch.linalg.eigvals(total).real.max().log() - s_1.log()))
    return sums


def check_path(row: dict, W: Tensor, D: Tensor) -> None:
    """Series below eps = 1; beyond it the cluster of all values within four to six step norms; else the truth."""
    h, s = torch.linalg.matrix_norm(D, 2), torch.linalg.svdvals(W)
    c, most = (int((s > s[0] - reach * h).sum()) for reach in (4, 6))
    distance = {end: float(s[end - 1] - (s[end] if end < len(s) else 0.0)) for end in range(c, min(most, 16) + 1)}
    if row["eps"] < 1:
        mode, expected = "series", taylor_changes(W, D)
    elif 4 * h < s[0] and c <= 16:
        mode, expected = "cluster", cluster_changes(W, D, max(distance, key=distance.__getitem__))
    else:
        mode, expected = "exact", [row["dz"]] * 3
    assert row["mode"] == mode
    for order, change in enumerate(expected, 1):
        check(f"dz{order}", row[f"dz{order}"], change)
    assert row["remainder"] == row["dz"] - row["dz2"]
    assert abs(row["remainder"]) <= row["bound"] + 1e-14


def check_forces(row: dict, dense: SimpleNamespace, W: Tensor, lr: float, settings: dict, gain: float) -> None:
    sign = -1 if settings["maximize"] else 1
    drift = sign * dense.g + settings["weight_decay"] * W.reshape(-1)
    Sigma = gain**2 * dense.Sigma
    noise, curvature = dense.J @ Sigma @ dense.J, (dense.H * Sigma).sum()
    diagonal = Sigma.diagonal()
    noise_var, curvature_var = (dense.J.square() * diagonal).sum(), (dense.H.diagonal() * diagonal).sum()
    check("mu", row["mu"], -gain * (dense.J @ drift) / dense.sigma, gain * dense.g.norm() / dense.sigma)
    check("kappa", row["kappa"], lr * curvature / (2 * dense.sigma))
    check("lambda_sq", row["lambda_sq"], lr * noise / dense.sigma**2)
    check("kappa_var", row["kappa_var"], lr * curvature_var / (2 * dense.sigma))
    check("kappa_cov", row["kappa_cov"], lr * (curvature - curvature_var) / (2 * dense.sigma), row["kappa_var"])
    check("lambda_sq_var", row["lambda_sq_var"], lr * noise_var / dense.sigma**2)
    scale = row["lambda_sq"] + row["lambda_sq_var"]
    check("lambda_sq_cov", row["lambda_sq_cov"], lr * (noise - noise_var) / dense.sigma**2, scale)


def check_network(rows: dict, joint: dict, layers: list[str]) -> None:
    """One covariance matrix of all layers together, paired with the gradient of Z."""
    network, lr = rows["network"], max(rows[name]["lr"] for name in layers)
    J = torch.cat([joint[name][0] * joint[name][1] for name in layers])
    centred = torch.cat([joint[name][2] for name in layers], dim=1)
    samples = len(centred)
    Sigma = centred.T @ centred / (samples * (samples - 1))
    variance = J @ Sigma @ J
    check("network lambda_sq", network["lr"] * network["lambda_sq"], variance)
    alone = sum(rows[name]["lr"] * rows[name]["lambda_sq"] for name in layers)
    assert abs(float(variance) - alone) > 1e-6 * alone  # the covariances between layers are really there
    for key in ("mu", "kappa"):
        total = sum(rows[name]["lr"] * rows[name][key] for name in layers)
        check(f"network {key}", network["lr"] * network[key], total)
    for key in ("z", "dz", "dz1", "dz2", "dz3"):
        check(f"network {key}", network[key], sum(rows[name][key] for name in layers))
    check("K", network["sigma"], math.prod(rows[name]["sigma"] for name in layers))
    assert network["lr"] == lr
    assert network["status"] == "ok"


def test_summed_and_averaged_losses_agree(mlp_case):
    """A summed loss is an averaged one with M times the gradient; forces per step agree when lr is M times less."""
    tables = []
    for reduction, lr in (("mean", 0.07), ("sum", 0.01)):
        model = mlp_case.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        x, y = mlp_case.data()
        with LipschitzMonitor(model, optimizer) as monitor:
            nn.functional.cross_entropy(model(x), y, reduction=reduction).backward()
            optimizer.step()
        tables.append(monitor.history.to_pandas())
    mean, total = tables
    for key in ("mu", "kappa", "lambda_sq"):
        assert (mean["lr"] * mean[key]).to_numpy() == pytest.approx((total["lr"] * total[key]).to_numpy(), rel=1e-12)


def test_accumulated_micro_batches_are_one_batch(mlp_case):
    tables = []
    for pieces in (1, 3):
        model = mlp_case.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        x, y = mlp_case.data()
        with LipschitzMonitor(model, optimizer, noise="split") as monitor:
            for part_x, part_y in zip(x.tensor_split(pieces), y.tensor_split(pieces), strict=True):
                (mlp_case.loss(model(part_x), part_y) * len(part_x) / len(x)).backward()
            optimizer.step()
        tables.append(monitor.history.to_pandas())
    whole, pieced = tables
    assert set(pieced["status"]) == {"ok"}
    assert set(pieced["batch"]) == {mlp_case.batch}
    numbers = whole.columns.drop(["layer", "mode", "status"])
    assert pieced[numbers].to_numpy(float) == pytest.approx(whole[numbers].to_numpy(float), rel=1e-9, nan_ok=True)


def test_float32_terms_are_close_to_float64(case):
    """The same run in both precisions: forces agree to 1e-4 of their size."""
    tables = []
    for dtype in (torch.float32, torch.float64):
        model = case.model(torch.float32).to(dtype)
        optimizer = case.optimizer(model)
        with LipschitzMonitor(model, optimizer) as monitor:
            case.step(model, optimizer)
        tables.append(monitor.history.to_pandas())
    single, double = tables
    assert set(single["status"]) == set(double["status"])
    for key in ("sigma", "gap", "kappa", "lambda_sq"):
        assert single[key].to_numpy() == pytest.approx(double[key].to_numpy(), rel=1e-4)
    scale = double["mu"].abs().max()
    assert single["mu"].to_numpy() == pytest.approx(double["mu"].to_numpy(), abs=1e-4 * scale)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_sums_of_squares_do_not_depend_on_the_chunks(case, monkeypatch):
    results = []
    for numbers in (1, 1 << 22):
        monkeypatch.setattr(layers, "CHUNK_NUMBERS", numbers)
        model = case.model()
        optimizer = case.optimizer(model)
        with LipschitzMonitor(model, optimizer, noise="split") as monitor:
            case.step(model, optimizer)
        results.append(monitor.history.to_pandas()[["kappa_var", "lambda_sq_var"]].to_numpy())
    assert results[0] == pytest.approx(results[1], rel=1e-12, nan_ok=True)
