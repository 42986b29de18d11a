"""What the command says of itself, and of packages that are not there."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lipdyn_torch
import specpert
from lipdyn_torch.experiments import cli, registry

ROOT = Path(__file__).parents[2]
SCRIPT = "from lipdyn_torch.experiments.cli import command; sys.exit(command())"
MODULE = "import runpy; runpy.run_module('lipdyn_torch', run_name='__main__')"


def without(package: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter that does not find the package."""
    code = f"import sys; sys.modules[{package!r}] = None; {code}"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def advice(package: str, extra: str) -> str:
    what = f"expected the package {package} to be installed, got none"
    return f"{what}; install it with: pip install 'specpert[{extra}]'\n"


@pytest.mark.parametrize(
    ("package", "start"), [("torch", SCRIPT), ("torch", MODULE), ("tqdm", MODULE), ("matplotlib", SCRIPT)]
)
def test_a_missing_package_is_named_before_any_work(tmp_path, package, start):
    done = without(package, start, "demo", "--out", str(tmp_path / "run"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lipdyn: " + advice(package, "experiments")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["torch", "threadpoolctl"])
def test_the_package_says_what_it_needs(package):
    done = without(package, "from lipdyn_torch import read_history, LipschitzMonitor")
    assert done.stderr.endswith(f"MissingExtraError: {advice(package, 'torch')}")
    assert without(package, "import lipdyn_torch; lipdyn_torch.Monitor").stderr.endswith("no attribute 'Monitor'\n")


def test_a_package_broken_in_itself_is_not_called_missing():
    done = without("numpy", "import lipdyn_torch")
    assert "ModuleNotFoundError" in done.stderr
    assert "pip install" not in done.stderr


def test_help_and_version_need_no_extra():
    said = without("torch", SCRIPT, "--version")
    torch, numpy = (importlib.metadata.version(name) for name in ("torch", "numpy"))
    assert (said.returncode, said.stdout) == (0, f"lipdyn {lipdyn_torch.__version__}, torch {torch}, numpy {numpy}\n")
    assert without("torch", SCRIPT, "reproduce", "--help").returncode == 0


def test_there_is_one_version():
    written = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert lipdyn_torch.__version__ == specpert.__version__ == written


def test_help_says_what_the_tool_does_and_what_it_takes(capsys):
    for arguments in (["--help"], ["reproduce", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            cli.main(arguments)
    printed = capsys.readouterr().out
    assert "Lipschitz bound of a neural network" in printed
    assert "`" not in printed
    assert "None" not in printed
    for known in (registry.PRESETS, registry.DATA):
        assert f"{{{','.join(known)}}}" in printed


@pytest.mark.parametrize("option", ["--preset", "--data"])
def test_a_wrong_choice_names_the_right_ones(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["reproduce", "jacobian", option, "fast"])
    assert re.search(
        rf"argument {option}: invalid choice: 'fast' \(choose from '?(quick|digits)", capsys.readouterr().err
    )
