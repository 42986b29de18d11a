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


def test_a_plot_says_what_it_needs():
    code = (
        "import torch; from lipdyn_torch import LipschitzMonitor; m = torch.nn.Linear(2, 2); "
        "LipschitzMonitor(m, torch.optim.SGD(m.parameters())).plot()"
    )
    assert without("matplotlib", code).stderr.endswith(f"MissingExtraError: {advice('matplotlib', 'torch')}")


def test_a_package_broken_in_itself_is_not_called_missing():
    done = without("numpy", "import lipdyn_torch")
    assert "ModuleNotFoundError" in done.stderr
    assert "pip install" not in done.stderr


def test_help_and_version_need_no_extra():
    said = without("torch", SCRIPT, "--version")
    torch, numpy = (importlib.metadata.version(name) for name in ("torch", "numpy"))
    assert (said.returncode, said.stdout) == (0, f"lipdyn {lipdyn_torch.__version__}, torch {torch}, numpy {numpy}\n")
    assert without("torch", SCRIPT, "reproduce", "--help").returncode == 0


@pytest.mark.parametrize("command", [["demo"], ["reproduce", "jacobian"]], ids=" ".join)
@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_named_with_the_reason(tmp_path, capsys, command, place):
    (tmp_path / "file").write_text("mine")
    assert cli.main([*command, "--overwrite", "--out", str(tmp_path / place)]) == 2
    reason = {"file": "file, which is a file", "file/run": r"run \(Not a directory\)"}[place]
    assert re.search(f"expected a folder.*, got .*{reason}; choose another --out\n", capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_scheduler_that_is_not_there_leaves_no_folder(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["reproduce", "jacobian", "--scheduler", "bogus://x", "--out", str(out)]) == 2
    assert "expected the address of a running dask scheduler, got 'bogus://x'" in capsys.readouterr().err
    assert not out.exists()


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
