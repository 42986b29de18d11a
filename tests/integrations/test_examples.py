"""Every example runs as its head says, word for word, and leaves what it promises."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lipdyn_torch import read_history

pytestmark = pytest.mark.slow  # each starts Python anew
ROOT = Path(__file__).parents[2]
NEEDS = {"lightning_trainer.py": "lightning", "huggingface_trainer.py": "transformers"}
RUNNERS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}


def commands() -> list[str]:
    """The command lines in the heads of the examples."""
    heads = [ast.get_docstring(ast.parse(path.read_text())) for path in sorted(ROOT.glob("examples/*.py"))]
    return [line for head in heads for line in head.splitlines() if line.split(" ")[0] in RUNNERS]


def test_every_example_says_how_to_run_it():
    shown = {Path(word).name for line in commands() for word in line.split() if word.endswith(".py")}
    assert shown == {path.name for path in ROOT.glob("examples/*.py")}
    page = (ROOT / "docs" / "training-jobs.md").read_text()
    assert all(line in page for line in commands())


def test_the_examples_are_shipped_and_what_they_write_is_not():
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["sdist"]
    assert {"/examples", "/tests", "/docs", "/bench"} <= set(built["include"])
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    written = re.findall(r'default=Path\("(.+)"\)', "".join(p.read_text() for p in ROOT.glob("examples/*.py")))
    assert len(written) == 4
    assert all(f"/{folder}/" in ignored for folder in written)


@pytest.mark.parametrize("line", commands())
def test_example_runs_as_written(tmp_path, line):
    program, *arguments = shlex.split(line)
    script = next(word for word in arguments if word.endswith(".py"))
    if Path(script).name in NEEDS:
        pytest.importorskip(NEEDS[Path(script).name])
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [*RUNNERS[program], *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said = re.search(r"log K moved to -?\d+\.\d+.*; see (\S+)", done.stdout)
    assert said, done.stdout
    folder = tmp_path / said[1]
    assert (folder / "figure.png").stat().st_size > 10_000
    record = folder / "history.jsonl"
    if record.exists():
        history = read_history(record)
        assert history.steps == list(range(len(history.steps)))
        if program == "torchrun":  # every step is of the joint batch of both processes
            assert {row["status"] for row in history} == {"ok"}
            assert {row["batch"] for row in history} == {32}
    else:
        assert (folder / "tensorboard").exists()
