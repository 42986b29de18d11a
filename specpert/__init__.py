"""Derivatives of any order of singular values of real and complex rectangular matrices, with certificates."""

from specpert.certificate import Enclosure, kato_temple
from specpert.cluster import leading_cluster
from specpert.derivative import sigma_derivative, sigma_gradient, sigma_hessian
from specpert.hessian import SigmaHessian
from specpert.ito import ItoCoefficients, sigma_ito, spectral_ito
from specpert.norm import spectral_norm
from specpert.onesided import OneSided, isolating_cluster, one_sided_derivatives
from specpert.prepare import singular_triplet
from specpert.result import (
    ConvergenceError,
    DegenerateSingularValueError,
    DenseSizeError,
    NonFiniteError,
    SpecpertError,
    Status,
    ZeroSingularValueError,
)
from specpert.series import ClusterSeries, SigmaSeries, sigma_series
from specpert.spectral import SpectralFunction
from specpert.triplet import SingularTriplet

__all__ = [
    "ClusterSeries",
    "ConvergenceError",
    "DegenerateSingularValueError",
    "DenseSizeError",
    "Enclosure",
    "ItoCoefficients",
    "NonFiniteError",
    "OneSided",
    "SigmaHessian",
    "SigmaSeries",
    "SingularTriplet",
    "SpecpertError",
    "SpectralFunction",
    "Status",
    "ZeroSingularValueError",
    "isolating_cluster",
    "kato_temple",
    "leading_cluster",
    "one_sided_derivatives",
    "sigma_derivative",
    "sigma_gradient",
    "sigma_hessian",
    "sigma_ito",
    "sigma_series",
    "singular_triplet",
    "spectral_ito",
    "spectral_norm",
]

__version__ = "0.1.0"
