"""The callback under the real Lightning: same rows as a plain loop, same training as without it."""

from __future__ import annotations

import logging

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lipdyn_torch import LipschitzMonitor

pl = pytest.importorskip("lightning.pytorch", reason="extra lightning is not installed")
from lipdyn_torch.integrations.lightning import LipschitzCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),  # Lightning's advice on speed
    pytest.mark.filterwarnings("ignore:.*number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory.*exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before:UserWarning"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.losses: list[float] = []

    def training_step(self, batch, index):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.01)


@pytest.fixture
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(3, (24,), generator=generator))


def fit(data, folder, *callbacks, epochs=2, ckpt_path=None, module=None, **settings):
    module = module or Module()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=folder, logger=False, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, **settings
    )  # fmt: skip
    loader = DataLoader(data, batch_size=4)
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    return module, trainer


def plain(data, epochs=2, accumulate=1) -> pd.DataFrame:
    module = Module()
    optimizer = module.configure_optimizers()
    with LipschitzMonitor(module, optimizer) as monitor:
        for _ in range(epochs):
            for index, batch in enumerate(DataLoader(data, batch_size=4)):
                (module.training_step(batch, 0) / accumulate).backward()
                if (index + 1) % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
    return monitor.history.to_pandas()


def test_rows_are_those_of_a_plain_loop(data, tmp_path):
    callback = LipschitzCallback()
    _, trainer = fit(data, tmp_path, callback, enable_checkpointing=False)
    table = callback.monitor.history.to_pandas()
    pd.testing.assert_frame_equal(table, plain(data), rtol=1e-12, atol=1e-15)
    assert set(table["status"]) == {"ok"}
    assert set(table["layer"]) == {"net.0", "net.2", "network"}
    assert float(trainer.callback_metrics["lipschitz_log_k"]) == pytest.approx(callback.monitor.log_k)


def test_accumulated_batches_are_one_batch(data, tmp_path):
    callback = LipschitzCallback()
    fit(data, tmp_path, callback, enable_checkpointing=False, accumulate_grad_batches=3)
    table = callback.monitor.history.to_pandas()
    pd.testing.assert_frame_equal(table, plain(data, accumulate=3), rtol=1e-12, atol=1e-15)
    assert set(table["batch"]) == {12}


def test_training_is_bitwise_the_same_and_no_hook_is_left(data, tmp_path):
    bare, _ = fit(data, tmp_path, enable_checkpointing=False)
    watched, trainer = fit(data, tmp_path, LipschitzCallback(noise="split"), enable_checkpointing=False)
    assert watched.losses == bare.losses
    for p, q in zip(bare.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not any(module._forward_hooks for module in watched.modules())
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


def test_hooks_go_when_training_fails(data, tmp_path):
    class Failing(Module):
        def training_step(self, batch, index):
            if index == 2:
                raise RuntimeError("broken batch")
            return super().training_step(batch, index)

    module, callback = Failing(), LipschitzCallback()
    with pytest.raises(RuntimeError, match="broken batch"):
        fit(data, tmp_path, callback, enable_checkpointing=False, module=module)
    assert not any(part._forward_hooks for part in module.modules())
    assert callback.monitor.history.steps == [0, 1]


def test_a_part_of_the_module(data, tmp_path):
    callback = LipschitzCallback(module="net", log=False, every=5)
    _, trainer = fit(data, tmp_path, callback, enable_checkpointing=False)
    assert callback.monitor.history.layers == ["0", "2"]
    assert callback.monitor.history.steps == [0, 5, 10]
    assert "lipschitz_log_k" not in trainer.callback_metrics
    with pytest.raises(ValueError, match="expected the name of a module of Module, got 'head'; its children are net"):
        fit(data, tmp_path, LipschitzCallback(module="head"), enable_checkpointing=False)
    with pytest.raises(ValueError, match="expected optimizer below 1, got 1; it is an index into"):
        fit(data, tmp_path, LipschitzCallback(optimizer=1), enable_checkpointing=False)


@pytest.mark.skipif(not hasattr(LipschitzMonitor, "state_dict"), reason="the monitor keeps no state")
def test_resumed_training_continues_the_history(data, tmp_path):
    fit(data, tmp_path, LipschitzCallback(), epochs=1)
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    callback = LipschitzCallback()
    fit(data, tmp_path, callback, epochs=2, ckpt_path=checkpoint)
    pd.testing.assert_frame_equal(callback.monitor.history.to_pandas(), plain(data), rtol=1e-12, atol=1e-15)


def test_several_callbacks_have_states_of_their_own(data, tmp_path):
    def parts():
        return [LipschitzCallback(f"net.{index}") for index in (0, 2)]

    _, trainer = fit(data, tmp_path, *parts(), epochs=1)
    assert {"lipschitz_log_k_net.0", "lipschitz_log_k_net.2"} <= set(trainer.callback_metrics)
    both = parts()
    fit(data, tmp_path, *both, epochs=2, ckpt_path=next(tmp_path.rglob("*.ckpt")))
    for callback, layer in zip(both, ("net.0", "net.2"), strict=True):
        table, found = plain(data), callback.monitor.history.to_pandas()
        own = found[found["layer"] != "network"]
        for column in ("sigma", "mu", "kappa", "lambda_sq", "dz3"):
            expected = table[table["layer"] == layer][column].to_numpy()
            assert own[column].to_numpy() == pytest.approx(expected, rel=1e-9)
