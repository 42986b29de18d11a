"""The monitor as a callback of Lightning's Trainer (extra ``lightning``)."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from lipdyn_torch.integrations._extras import need
from lipdyn_torch.integrations._state import load_monitor_state, monitor_state, plain_optimizer, submodule
from lipdyn_torch.monitor import LipschitzMonitor

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:  # Lightning comes under two names
    name = "lightning.pytorch" if importlib.util.find_spec("lightning") else "pytorch_lightning"
    Callback = need(name, "lightning").Callback

__all__ = ["LipschitzCallback"]


class LipschitzCallback(Callback):
    """Watches the Lipschitz bound during ``Trainer.fit``.

    Parameters
    ----------
    module : str, optional
        Name of the part of the LightningModule to watch, as in ``named_modules()``; by default all of it.
    optimizer : int
        Which optimiser, where the module has several.
    log : bool
        Log ``lipschitz_log_k`` with each step, to the Trainer's loggers and progress bar; the names of a part and of an
        optimiser but the first are put behind it, as in ``lipschitz_log_k_critic_1``.
    **settings
        Passed on to `LipschitzMonitor`: ``every``, ``noise``, ``sinks`` ...

    Attributes
    ----------
    monitor : LipschitzMonitor or None
        Made anew when training starts, closed when it ends or fails; its ``history`` stays.

    Notes
    -----
    Its state is in Lightning's checkpoints: training resumed with ``ckpt_path=`` continues history and step count.
    Several callbacks may watch several parts, or the parts of several optimisers.

    Examples
    --------
    >>> callback = LipschitzCallback(every=10)
    >>> callback.monitor is None  # until trainer.fit(module, data) with Trainer(callbacks=[callback])
    True
    """

    def __init__(self, module: str | None = None, *, optimizer: int = 0, log: bool = True, **settings: Any) -> None:
        super().__init__()
        self.monitor: LipschitzMonitor | None = None
        self._module, self._optimizer, self._log, self._settings = module, optimizer, log, settings
        self._restored: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """Tells the states of several callbacks in a checkpoint apart."""
        return self._generate_state_key(module=self._module, optimizer=self._optimizer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, now that the optimisers are there and checkpoints have been loaded."""
        optimizers = trainer.optimizers
        if not self._optimizer < len(optimizers):
            raise ValueError(
                f"expected optimizer below {len(optimizers)}, got {self._optimizer}; "
                "it is an index into what configure_optimizers returns"
            )
        optimizer = plain_optimizer(optimizers[self._optimizer])
        self.monitor = LipschitzMonitor(submodule(pl_module, self._module), optimizer, **self._settings)
        load_monitor_state(self.monitor, self._restored)
        self._restored = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the bound."""
        if self._log and self.monitor is not None:
            parts = [self._module, str(self._optimizer) if self._optimizer else None]
            name = "_".join(["lipschitz_log_k", *filter(None, parts)])
            pl_module.log(name, self.monitor.log_k, on_step=True, on_epoch=False, prog_bar=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning puts into checkpoints."""
        return monitor_state(self.monitor) or self._restored

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._restored = state_dict

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
