"""Lipschitz dynamics of neural networks in training: two lines added to a training script.

>>> from lipdyn_torch import LipschitzMonitor  # monitor = LipschitzMonitor(model, optimizer)
"""

from lipdyn_torch.errors import (
    FactorSizeError,
    LayerReplacedError,
    LipdynError,
    NoBackwardError,
    NoSupportedLayerError,
    RunFolderExistsError,
    SilentHookError,
    UnownedParametersError,
)
from lipdyn_torch.history import History, JsonLinesSink, read_history
from lipdyn_torch.layers import LayerRule, register_rule
from lipdyn_torch.low_rank import LowRankSumRule
from lipdyn_torch.monitor import LipschitzMonitor
from lipdyn_torch.noise import GradientNoise
from lipdyn_torch.predict import Moments, Prediction, forecast, increments, moments, pathwise, sde
from lipdyn_torch.reference import MeanGradient

__all__ = [
    "FactorSizeError",
    "GradientNoise",
    "History",
    "JsonLinesSink",
    "LayerReplacedError",
    "LayerRule",
    "LipdynError",
    "LipschitzMonitor",
    "LowRankSumRule",
    "MeanGradient",
    "Moments",
    "NoBackwardError",
    "NoSupportedLayerError",
    "Prediction",
    "RunFolderExistsError",
    "SilentHookError",
    "UnownedParametersError",
    "forecast",
    "increments",
    "moments",
    "pathwise",
    "read_history",
    "register_rule",
    "sde",
]
