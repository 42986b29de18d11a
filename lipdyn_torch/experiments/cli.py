"""The `lipdyn` command, also ``python -m lipdyn_torch``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lipdyn_torch.errors import LipdynError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for wrong use."""
    options = _parser().parse_args(arguments)
    from lipdyn_torch.experiments.demo import FIGURE, HISTORY, DemoConfig, report, run_demo

    try:
        config = DemoConfig(
            steps=options.steps,
            batch_size=options.batch_size,
            lr=options.lr,
            seed=options.seed,
            out=options.out,
            device=options.device,
            overwrite=options.overwrite,
        )
        result = run_demo(config)
    except (LipdynError, ValueError) as error:
        print(f"lipdyn demo: {error}", file=sys.stderr)
        return 2
    print(report(result))
    print(f"\nfigure   {options.out / FIGURE}\nhistory  {options.out / HISTORY}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lipdyn", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train a network on scanned digits and explain its Lipschitz bound",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--steps", type=int, default=500, help="optimiser steps")
    demo.add_argument("--batch-size", type=int, default=64, help="samples per step")
    demo.add_argument("--lr", type=float, default=0.02, help="learning rate of SGD")
    demo.add_argument("--seed", type=int, default=0, help="of the initial weights and of the order of samples")
    demo.add_argument("--out", type=Path, default=Path("lipdyn-demo"), help="folder to make for the results")
    demo.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    demo.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in --out")
    return parser
