"""Several processes train one model; the monitor's rows are those of the joint batch, on every process alike.

torchrun --standalone --nproc-per-node 2 examples/distributed_training.py
torchrun --standalone --nproc-per-node 2 examples/distributed_training.py --shard
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lipdyn_torch import JsonLinesSink, LipschitzMonitor


def main() -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--shard", action="store_true", help="shard the weights (FSDP2) instead of copying them (DDP)")
    parser.add_argument("--out", type=Path, default=Path("distributed-run"))
    options = parser.parse_args()

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", dist.get_rank()) if torch.cuda.is_available() else torch.device("cpu")
    first = dist.get_rank() == 0
    options.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(512, 20), torch.randint(5, (512,)))
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)).to(device)
    called: nn.Module = model
    if options.shard:
        fully_shard(model)
    else:
        called = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  # after sharding

    sampler: DistributedSampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=16, sampler=sampler)
    sinks = [JsonLinesSink(options.out / "history.jsonl", resume=True)] if first else []  # one process writes
    with LipschitzMonitor(model, optimizer, dataset_size=512, sinks=sinks) as monitor:
        for epoch in range(options.epochs):
            sampler.set_epoch(epoch)
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(called(x.to(device)), y.to(device)).backward()
                optimizer.step()

    if first:
        monitor.plot().savefig(options.out / "figure.png", dpi=200)
        batch = monitor.history.rows[-1]["batch"]
        print(f"log K moved to {monitor.log_k:.4f} with {batch} samples a step; see {options.out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
