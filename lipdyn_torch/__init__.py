"""Lipschitz dynamics of neural networks in training: two lines added to a training script.

>>> from lipdyn_torch import LipschitzMonitor  # monitor = LipschitzMonitor(model, optimizer)
"""

from typing import TYPE_CHECKING, Any

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
from lipdyn_torch.integrations._extras import missing_extra

try:
    from lipdyn_torch.convolution import ConvolutionOperator, NormBounds
    from lipdyn_torch.layers import LayerRule, register_rule
    from lipdyn_torch.low_rank import LowRankSumRule
    from lipdyn_torch.monitor import LipschitzMonitor
    from lipdyn_torch.noise import GradientNoise
    from lipdyn_torch.predict import Moments, Prediction, forecast, increments, moments, pathwise, sde
    from lipdyn_torch.reference import MeanGradient
except ModuleNotFoundError as error:
    _missing = missing_extra(error, "torch", ("torch", "threadpoolctl"))

    if not TYPE_CHECKING:  # to type checkers every name is there, and no other

        def __getattr__(name: str) -> Any:
            """Say what to install; raised only now, so that the `lipdyn` command starts and can say it itself."""
            if name in __all__:
                raise _missing
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ConvolutionOperator",
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
    "NormBounds",
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

__version__ = "0.1.0"
