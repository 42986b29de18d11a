"""The `lipdyn` command, also ``python -m lipdyn_torch``."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

from lipdyn_torch import __version__
from lipdyn_torch.errors import LipdynError
from lipdyn_torch.integrations._extras import MissingExtraError, need

__all__ = ["command", "keep_freed_memory", "main"]

DESCRIPTION = (
    "Watch the Lipschitz bound of a neural network move in training, and see what moves it: a demonstration in a "
    "minute, and the experiments of the paper. Each writes a folder of rows, figures and tables."
)
#: What every command comes to need, asked for before the work begins; what only some need, they ask for themselves.
PACKAGES = ("torch", "threadpoolctl", "pandas", "matplotlib", "sklearn", "tqdm")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def command() -> int:
    """What the shell calls: `main` in a process of its own."""
    keep_freed_memory()
    return main()


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, for the rest of this process (glibc; elsewhere nothing happens).

    The buffers of a training step are freed and asked for again in every step. By default the large ones go back to the
    kernel, and fetching fresh pages takes a third of the time of a small network.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return
    # blocks of any size come from the heap (where that is refused, of 32 MiB), and the heap is not trimmed
    if mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 1 << 25):
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status.

    It is 0, 1 where training diverged or points failed, 2 for wrong use, 130 where interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        for package in PACKAGES:
            need(package, "experiments")
        return int(options.run(options))
    except MissingExtraError as error:
        print(f"lipdyn: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nlipdyn: interrupted; {options.kept}", file=sys.stderr)
        return 130


def _demo(options: argparse.Namespace) -> int:
    from lipdyn_torch.experiments.demo import FIGURE, HISTORY, DemoConfig, DivergedError, report, run_demo

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
    except DivergedError as error:
        print(f"lipdyn demo: {error}", file=sys.stderr)
        return 1
    except (LipdynError, ValueError, OSError) as error:
        print(f"lipdyn demo: {error}", file=sys.stderr)
        return 2
    print(report(result))
    print(f"\nfigure   {options.out / FIGURE}\nhistory  {options.out / HISTORY}")
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from lipdyn_torch.experiments.report import markdown
    from lipdyn_torch.experiments.runner import PointFailedError, ReproduceConfig, reproduce

    try:
        settings = {key: value for key, value in vars(options).items() if key not in ("run", "kept")}
        config = ReproduceConfig(**settings)
        done = reproduce(config)
    except PointFailedError as error:
        print(f"lipdyn reproduce: {error}", file=sys.stderr)
        return 1
    except (LipdynError, ValueError, OSError) as error:
        print(f"lipdyn reproduce: {error}", file=sys.stderr)
        return 2
    print("\n".join(markdown(job, summary) for job, summary in done))
    print(f"results  {config.folder}" + ("/report.html" if config.name == "all" else ""))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lipdyn", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=_versions())
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_demo(
        commands.add_parser(
            "demo",
            help="train a network on scanned digits and explain its Lipschitz bound",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    _add_reproduce(
        commands.add_parser(
            "reproduce",
            help="run an experiment of the paper again: figure, rows, and a table that says how well theory holds",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    return parser


def _versions() -> str:
    """Of this package and of what computes for it, without importing them."""
    found = [f"lipdyn {__version__}"]
    for package in ("torch", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def _add_demo(demo: argparse.ArgumentParser) -> None:
    demo.set_defaults(run=_demo, kept="the rows so far are in the output folder")
    demo.add_argument("--steps", type=int, default=500, help="optimiser steps")
    demo.add_argument("--batch-size", type=int, default=64, help="samples per step")
    demo.add_argument("--lr", type=float, default=0.02, help="learning rate of SGD")
    demo.add_argument("--seed", type=int, default=0, help="of the initial weights and of the order of samples")
    demo.add_argument("--out", type=Path, default=Path("lipdyn-demo"), help="folder to make for the results")
    demo.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    demo.add_argument("--overwrite", action="store_true", help="replace the results of an earlier demo in --out")


def _add_reproduce(command: argparse.ArgumentParser) -> None:
    from lipdyn_torch.experiments.registry import DATA, NAMES, PRESETS

    command.set_defaults(run=_reproduce, kept="finished points are kept: the same command goes on from there")
    unset = argparse.SUPPRESS  # the default of `ReproduceConfig` stands, and help does not call it None
    command.add_argument("name", help=f"all, or one of {', '.join(NAMES)}")
    command.add_argument(
        "--preset", choices=PRESETS, default="quick", help="quick takes minutes; paper: its steps, batches, replicates"
    )
    command.add_argument("--data", choices=DATA, default="digits", help="digits are bundled, the others are fetched")
    command.add_argument("--root", default=unset, help="folder with the data files, if they are there already")
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    command.add_argument("--jobs", type=int, default=0, help="points run side by side; 0: one per core")
    command.add_argument(
        "--out", type=Path, default=unset, help="run folder (default: lipdyn-NAME); continued if it is there"
    )
    command.add_argument("--seed", type=int, default=0, help="of everything random")
    command.add_argument("--scheduler", default=unset, metavar="ADDRESS", help="address of a running dask scheduler")
    command.add_argument("--overwrite", action="store_true", help="start again in a folder that holds another run")
