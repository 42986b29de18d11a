"""Lipschitz dynamics of neural networks in training: two lines added to a training script.

>>> from lipdyn_torch import LipschitzMonitor  # monitor = LipschitzMonitor(model, optimizer)
"""

from lipdyn_torch.errors import (
    LipdynError,
    NoBackwardError,
    NoSupportedLayerError,
    RunFolderExistsError,
    UnownedParametersError,
)
from lipdyn_torch.history import History, JsonLinesSink, read_history
from lipdyn_torch.monitor import LipschitzMonitor
from lipdyn_torch.noise import GradientNoise
from lipdyn_torch.predict import Prediction, pathwise, sde

__all__ = [
    "GradientNoise",
    "History",
    "JsonLinesSink",
    "LipdynError",
    "LipschitzMonitor",
    "NoBackwardError",
    "NoSupportedLayerError",
    "Prediction",
    "RunFolderExistsError",
    "UnownedParametersError",
    "pathwise",
    "read_history",
    "sde",
]
