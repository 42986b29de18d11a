"""The callback under the real Trainer: same rows as a plain loop, same training as without it."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lipdyn_torch import LipschitzMonitor

transformers = pytest.importorskip("transformers", reason="extra huggingface is not installed")
pytest.importorskip("accelerate", reason="extra huggingface is not installed")
from lipdyn_torch.integrations.huggingface import LipschitzCallback  # noqa: E402

BATCH, STEPS = 4, 6


class Sentences(Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.ids = torch.randint(20, (BATCH * STEPS, 6), generator=generator)
        self.labels = torch.randint(3, (BATCH * STEPS,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def make_model():
    torch.manual_seed(4)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=8, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).double()


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(folder, *callbacks, resume=None, **settings):
    model = make_model()
    given = {
        "output_dir": str(folder), "per_device_train_batch_size": BATCH, "num_train_epochs": 1, "optim": "sgd",
        "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "logging_strategy": "no", "dataloader_pin_memory": False,
    }  # fmt: skip
    args = transformers.TrainingArguments(**(given | settings))
    trainer = InOrder(model, args, train_dataset=Sentences(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return model


def plain(accumulate=1, module="", weight=1) -> pd.DataFrame:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model.get_submodule(module), optimizer) as monitor:
        for batch in DataLoader(Sentences(), batch_size=BATCH * accumulate):
            optimizer.zero_grad()
            (weight * model(**batch).loss).backward()
            optimizer.step()
    return monitor.history.to_pandas()


@pytest.fixture(scope="module")
def reference() -> pd.DataFrame:
    return plain()


def test_rows_are_those_of_a_plain_loop(tmp_path, reference):
    callback = LipschitzCallback()
    model = train(tmp_path, callback)
    table = callback.monitor.history.to_pandas()
    pd.testing.assert_frame_equal(table, reference, rtol=1e-9, atol=1e-13)
    assert table["step"].nunique() == STEPS
    assert set(table[table["layer"] == "classifier"]["status"]) == {"ok"}
    assert not any(module._forward_hooks for module in model.modules())
    assert callback.monitor.history.meta["skipped"]  # the embeddings, and normalisations, are told


def test_accumulated_batches_are_one_batch(tmp_path):
    callback = LipschitzCallback("bert.encoder")  # the input of position embeddings has no sample axis
    train(tmp_path, callback, gradient_accumulation_steps=2)
    table = callback.monitor.history.to_pandas()
    assert set(table["batch"]) == {2 * BATCH}
    # The mean losses of the micro-batches are added up or averaged, by the version of transformers.
    either = [plain(2, "bert.encoder", weight) for weight in (1, 2)]
    nearest = min(either, key=lambda x: (x["sigma"] - table["sigma"]).abs().max())
    pd.testing.assert_frame_equal(table, nearest, rtol=1e-9, atol=1e-13)


def test_training_is_bitwise_the_same(tmp_path):
    bare = train(tmp_path)
    watched = train(tmp_path, LipschitzCallback(noise="split"))
    for p, q in zip(bare.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_part_of_the_model_and_the_default_optimiser(tmp_path):
    """AdamW, clipping and decay as the Trainer has them: the path is right, and the rest says why it is not."""
    callback = LipschitzCallback("bert.encoder", every=4)
    train(tmp_path, callback, optim="adamw_torch", max_grad_norm=1e-3, learning_rate=1e-4)
    table = callback.monitor.history.to_pandas()
    assert all(name.startswith("layer.0.") for name in callback.monitor.layers)
    assert sorted(set(table["step"])) == [0, 4]
    network = table[table["layer"] == "network"]
    assert network["dz3"].to_numpy() == pytest.approx(network["dz"].to_numpy(), abs=1e-4)


def test_close_after_an_exception(tmp_path):
    class Failing(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("out of patience")

    callback = LipschitzCallback()
    with pytest.raises(RuntimeError, match="out of patience"):
        train(tmp_path, callback, Failing())
    callback.close()
    assert callback.monitor.history.steps == [0]
    assert repr(callback.monitor).endswith("closed)")


@pytest.mark.skipif(not hasattr(LipschitzMonitor, "state_dict"), reason="the monitor keeps no state")
def test_resumed_training_continues_the_history(tmp_path, reference):
    saving = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path, LipschitzCallback(), **saving)
    callback = LipschitzCallback()
    train(tmp_path, callback, resume=str(tmp_path / "checkpoint-3"), **saving)
    pd.testing.assert_frame_equal(callback.monitor.history.to_pandas(), reference, rtol=1e-9, atol=1e-13)


def test_a_checkpoint_without_the_monitor(tmp_path, caplog):
    train(tmp_path, save_strategy="steps", save_steps=3)
    callback = LipschitzCallback()
    train(tmp_path, callback, resume=str(tmp_path / "checkpoint-3"), save_strategy="no")
    assert callback.monitor.history.steps == [0, 1, 2]
    assert "lipdyn_monitor.pt: monitored steps are counted from 0 again" in caplog.text


def test_several_callbacks_have_states_of_their_own(tmp_path, reference):
    def parts():
        return [LipschitzCallback(name) for name in ("bert.pooler", "classifier")]

    saving = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path, *parts(), **saving)
    both = parts()
    train(tmp_path, *both, resume=str(tmp_path / "checkpoint-3"), **saving)
    for callback, layer in zip(both, ("bert.pooler.dense", "classifier"), strict=True):
        found = callback.monitor.history.to_pandas()
        own, expected = found[found["layer"] != "network"], reference[reference["layer"] == layer]
        assert own["step"].tolist() == list(range(STEPS))
        assert own["mu"].to_numpy() == pytest.approx(expected["mu"].to_numpy(), rel=1e-9)
