"""Short presets: the same experiments in seconds."""

from __future__ import annotations

import pytest

from lipdyn_torch.experiments import registry

TINY = {
    "hessian-errors": {"trials": 2, "chunk": 1, "series_trials": 1, "digits": 70},
    "initialisation": {
        "linear": [[10, 64]],
        "kernels": [[4, 3, 3, 1]],
        "samples": 4,
        "image": 8,
        "schemes": ["default"],
    },
    "validation": {"model": "convnet", "steps": 2, "batch": 8, "full_every": 2, "inset": 3},
    "near-convergence": {"model": "mlp", "steps": 30, "every": 5, "window": 4},
    "trajectories": {"model": "mlp", "steps": 8, "batch": 32, "orders": 3, "every": 2, "samples": 128},
    "batch-size": {"steps": 4, "batches": [16, 64], "replicates": 2, "every": 2, "samples": 128},
    "noisy-gradient": {"steps": 10, "rho": [1.0, 0.25], "every": 2},
    "label-noise": {"steps": 10, "eps": [0.0, 0.5, 1.0], "draws": 2, "samples": 128, "every": 5},
    "timing": {"rounds": 1, "steps": 1, "batch": 2, "shape": [1, 4, 4]},
}


@pytest.fixture
def tiny(monkeypatch):
    """Quick presets cut down; in this process only, so with one job."""
    for name, parameters in TINY.items():
        for key, value in parameters.items():
            monkeypatch.setitem(registry.find(name).presets["quick"], key, value)
