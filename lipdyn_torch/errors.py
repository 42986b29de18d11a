"""What the monitor raises when it is used wrongly; numerical trouble never raises, it is written into the rows."""

__all__ = [
    *("FactorSizeError", "LayerReplacedError", "LipdynError", "NoBackwardError", "NoSupportedLayerError"),
    *("RunFolderExistsError", "SilentHookError", "UnownedParametersError"),
]


class LipdynError(Exception):
    """Base class of everything this package raises on its own account."""


class NoSupportedLayerError(LipdynError, ValueError):
    """The model has no layer the monitor can read as a matrix."""


class UnownedParametersError(LipdynError, ValueError):
    """The optimiser does not update the weights of any layer of the model that the monitor can read."""


class NoBackwardError(LipdynError, RuntimeError):
    """The optimiser was stepped though no gradient had reached any of its parameters."""


class SilentHookError(LipdynError, RuntimeError):
    """Gradients reached the weights, but no hook of the monitor was called, then or before."""


class LayerReplacedError(LipdynError, RuntimeError):
    """A monitored layer, or its weight, is not the object it was when the monitor was attached."""


class RunFolderExistsError(LipdynError, FileExistsError):
    """The folder a run would write to is there already."""


class FactorSizeError(LipdynError, ValueError):
    """The gradients of the samples are too many numbers to keep."""


def in_words(error: OSError, message: str) -> OSError:
    """The same kind of error with a message that helps; its number stays for programs that look at it.

    Examples
    --------
    >>> error = in_words(FileNotFoundError(2, "No such file or directory"), "expected a file, got none")
    >>> error, error.errno
    (FileNotFoundError('expected a file, got none'), 2)
    """
    said = type(error)(message)
    said.errno = error.errno
    return said
