"""Every example runs as its head says, and leaves what it promises."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lipdyn_torch import read_history

pytestmark = pytest.mark.slow  # each starts Python anew
EXAMPLES = Path(__file__).parents[2] / "examples"


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "package", "folder", "files"),
    [
        ("plain_loop.py", ["--steps", "4"], "torch", "plain-loop", ["history.jsonl"]),
        ("lightning_trainer.py", ["--epochs", "1"], "lightning", "lightning-run", ["tensorboard"]),
        ("huggingface_trainer.py", ["--samples", "48"], "transformers", "huggingface-run", ["history.jsonl"]),
    ],
)
def test_example(tmp_path, script, arguments, package, folder, files):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    printed = run([sys.executable, str(EXAMPLES / script), *arguments], tmp_path)
    assert re.search(rf"log K moved to -?\d+\.\d+.*; see {folder}", printed)
    assert (tmp_path / folder / "figure.png").stat().st_size > 10_000
    for name in files:
        assert (tmp_path / folder / name).exists()


@pytest.mark.parametrize("arguments", [[], ["--shard"]], ids=["copied", "sharded"])
def test_example_under_torchrun(tmp_path, arguments):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(EXAMPLES / "distributed_training.py")
    printed = run([*torchrun, script, "--epochs", "1", *arguments], tmp_path)
    assert re.search(r"log K moved to -?\d+\.\d+ with 32 samples a step; see distributed-run", printed)
    history = read_history(tmp_path / "distributed-run" / "history.jsonl")
    assert {row["status"] for row in history} == {"ok"}
    assert history.steps == list(range(16))
