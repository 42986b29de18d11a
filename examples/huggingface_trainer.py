"""The monitor as a callback of the Trainer of Hugging Face transformers; nothing is downloaded.

pip install 'specpert[torch,huggingface]'
python examples/huggingface_trainer.py
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from lipdyn_torch import JsonLinesSink
from lipdyn_torch.integrations.huggingface import LipschitzCallback


class Sentences(Dataset):
    """Random sentences; the label says whether the first word is in the first half of the dictionary."""

    def __init__(self, size: int) -> None:
        self.ids = torch.randint(100, (size, 12))
        self.labels = (self.ids[:, 0] < 50).long()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def main() -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("huggingface-run"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    callback = LipschitzCallback(
        dataset_size=options.samples, sinks=[JsonLinesSink(options.out / "history.jsonl", resume=True)]
    )
    args = TrainingArguments(
        output_dir=str(options.out),
        per_device_train_batch_size=16,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0.0,  # a clipped gradient is not the mean of the samples' gradients
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    model = BertForSequenceClassification(config)
    Trainer(model, args, train_dataset=Sentences(options.samples), callbacks=[callback]).train()

    assert callback.monitor is not None
    callback.monitor.plot().savefig(options.out / "figure.png", dpi=200)
    print(f"log K moved to {callback.monitor.log_k:.4f}; see {options.out}")


if __name__ == "__main__":
    main()
