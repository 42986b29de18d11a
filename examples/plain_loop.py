"""Two lines in a training loop of one's own, a record that survives a crash, and a figure.

python examples/plain_loop.py
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from lipdyn_torch import JsonLinesSink, LipschitzMonitor


def main() -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("plain-loop"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    x, y = torch.randn(512, 20), torch.randint(5, (512,))
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    sink = JsonLinesSink(options.out / "history.jsonl", resume=True)
    monitor = LipschitzMonitor(model, optimizer, dataset_size=512, sinks=[sink])
    for step in range(options.steps):
        batch = slice(32 * step % 512, 32 * step % 512 + 32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    monitor.close()

    monitor.plot().savefig(options.out / "figure.png", dpi=200)
    print(f"log K moved to {monitor.log_k:.4f} in {options.steps} steps; see {options.out}")


if __name__ == "__main__":
    main()
