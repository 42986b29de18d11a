"""The monitor as a callback of the Trainer of Hugging Face transformers (extra ``huggingface``)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lipdyn_torch.integrations._extras import need
from lipdyn_torch.integrations._state import load_monitor_state, monitor_state, plain_optimizer, submodule
from lipdyn_torch.monitor import LipschitzMonitor

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
else:
    TrainerCallback = need("transformers", "huggingface").TrainerCallback

__all__ = ["LipschitzCallback"]

_LOG = logging.getLogger(__name__)


class LipschitzCallback(TrainerCallback):
    """Watches the Lipschitz bound during ``Trainer.train``.

    Parameters
    ----------
    module : str, optional
        Name of the part of the model to watch, as in ``named_modules()``; by default all of it.
    **settings
        Passed on to `LipschitzMonitor`: ``every``, ``noise``, ``sinks`` ...

    Attributes
    ----------
    monitor : LipschitzMonitor or None
        Made anew when training begins, closed when it ends; its ``history`` stays.

    Notes
    -----
    The Trainer clips gradients by their norm by default. The monitor finds the factor and takes it into account; the
    status of such a step names it.

    With each checkpoint its state is saved as ``lipdyn_monitor.pt``, that of a callback for a part of the model as
    ``lipdyn_monitor.PART.pt``; training resumed from a checkpoint in
    ``output_dir`` continues history and step count. The Trainer does not tell callbacks of exceptions: after one,
    call `close`.

    Examples
    --------
    >>> callback = LipschitzCallback(every=10)
    >>> callback.monitor is None  # until Trainer(model, args, callbacks=[callback], ...).train()
    True
    """

    def __init__(self, module: str | None = None, **settings: Any) -> None:
        super().__init__()
        self.monitor: LipschitzMonitor | None = None
        self._module, self._settings = module, settings

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach, now that the optimiser is there and a checkpoint has been loaded."""
        self.close()
        model, optimizer = submodule(kwargs["model"], self._module), plain_optimizer(kwargs["optimizer"])
        self.monitor = LipschitzMonitor(model, optimizer, **self._settings)
        if state.global_step:
            file = self._file(args, state)
            if file.exists():
                load_monitor_state(self.monitor, torch.load(file, weights_only=True))
            else:
                _LOG.warning("no %s: monitored steps are counted from 0 again", file)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the monitor's state into the checkpoint."""
        saved = monitor_state(self.monitor)
        if saved and state.is_world_process_zero:
            file = self._file(args, state)
            if file.parent.is_dir():
                torch.save(saved, file)
            else:
                _LOG.warning("no checkpoint %s: the monitor's state was not saved", file.parent)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach."""
        self.close()

    def close(self) -> None:
        """Take the hooks off the model; the history stays."""
        if self.monitor is not None:
            self.monitor.close()

    @property
    def file_name(self) -> str:
        """Of the state in a checkpoint."""
        return "lipdyn_monitor.pt" if self._module is None else f"lipdyn_monitor.{self._module}.pt"

    def _file(self, args: TrainingArguments, state: TrainerState) -> Path:
        name = f"checkpoint-{state.global_step}"
        folders = [Path(str(args.output_dir)) / name, *Path(str(args.output_dir)).glob(f"run-*/{name}")]  # of a search
        present = [folder for folder in folders if folder.is_dir()]
        return max(present, key=lambda folder: folder.stat().st_mtime, default=folders[0]) / self.file_name
