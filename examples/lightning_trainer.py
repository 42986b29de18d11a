"""The monitor as a callback of Lightning's Trainer, with its numbers in TensorBoard.

pip install 'specpert[torch,lightning,tensorboard]'
python examples/lightning_trainer.py
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lipdyn_torch.integrations.lightning import LipschitzCallback
from lipdyn_torch.integrations.sinks import TensorBoardSink


class Classifier(pl.LightningModule):
    """A small network; nothing in it knows of the monitor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """The loss of one batch."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main() -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("lightning-run"))
    options = parser.parse_args()

    pl.seed_everything(0)
    data = TensorDataset(torch.randn(512, 20), torch.randint(5, (512,)))
    sink = TensorBoardSink(options.out / "tensorboard", columns=["z", "sigma", "mu", "kappa", "lambda_sq"])
    callback = LipschitzCallback(dataset_size=512, sinks=[sink])
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        default_root_dir=options.out,
        logger=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=32, shuffle=True))

    assert callback.monitor is not None
    callback.monitor.plot().savefig(options.out / "figure.png", dpi=200)
    print(f"log K moved to {callback.monitor.log_k:.4f}; see {options.out}")


if __name__ == "__main__":
    main()
