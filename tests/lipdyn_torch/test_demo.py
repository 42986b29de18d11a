"""The demonstration, shortened: same network, data and checks as the default run."""

from __future__ import annotations

import contextlib
import io
import json
import re

import pytest
import torch

from lipdyn_torch import History, pathwise, read_history, sde
from lipdyn_torch.experiments import cli, demo
from lipdyn_torch.experiments.data import digits

STEPS = 110


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run through the command line; a larger learning rate than the default trains in fewer steps."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    rng = torch.get_rng_state()
    arguments = ["demo", "--steps", str(STEPS), "--lr", "0.05", "--seed", "0", "--batch-size", "64"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main([*arguments, "--out", str(folder)]) == 0
    assert torch.equal(torch.get_rng_state(), rng)
    return folder, printed.getvalue()


def test_second_order_follows_the_observation_at_every_step(run):
    history = read_history(run[0] / demo.HISTORY)
    second = pathwise(history, 2)
    assert len(second.error) == STEPS + 1
    assert second.max_error < 5e-3
    assert second.observed[-1] - second.observed[0] > 0.1  # the bound did move
    assert pathwise(history, 1).max_error > 5 * second.max_error
    assert sde(history).max_error < 0.1
    assert {row["status"] for row in history} == {"ok"}


def test_the_network_learns(run):
    result = json.loads((run[0] / demo.SUMMARY).read_text())["result"]
    assert result["test_accuracy"] > 0.8


def test_the_summary_names_its_errors(run):
    errors = json.loads((run[0] / demo.SUMMARY).read_text())["result"]["errors"]
    for prediction in (sde(read_history(run[0] / demo.HISTORY)), pathwise(read_history(run[0] / demo.HISTORY), 2)):
        named = {"largest": prediction.max_error, "final": prediction.final_error}
        assert errors[prediction.name] == pytest.approx(named)


def test_the_table_holds_what_was_measured(run):
    folder, printed = run
    history = read_history(folder / demo.HISTORY)
    for prediction in (sde(history), pathwise(history, 1), pathwise(history, 2)):
        line = next(line for line in printed.splitlines() if line.strip().startswith(prediction.name + " "))
        numbers = [float(n) for n in re.findall(r"[-+]?\d\.\d+e[-+]\d+", line)]
        assert numbers == pytest.approx([prediction.max_error, prediction.final_error], rel=1e-3)
    k = [float(n) for n in re.findall(r"K at (?:start|end) +(\d+\.\d+)", printed)]
    observed = sde(history).observed
    assert k == pytest.approx([float(torch.tensor(z).exp()) for z in observed[[0, -1]]], abs=1e-3)
    shares = [float(n) for n in re.findall(r"([-+]\d+\.\d+) %", printed)]
    assert sum(shares) == pytest.approx(100.0, abs=0.01)
    assert re.search(r"test accuracy +\d+\.\d+ %", printed)
    assert "one channel" in printed


def test_the_run_folder(run):
    folder, printed = run
    assert sorted(path.name for path in folder.iterdir()) == ["figure.png", "history.jsonl", "summary.json"]
    assert (folder / demo.FIGURE).read_bytes().startswith(b"\x89PNG")
    assert str(folder / demo.FIGURE) in printed
    history = read_history(folder / demo.HISTORY)
    assert history.layers == ["conv1", "conv2", "conv3", "fc1", "fc2"]
    assert history.meta["dataset_size"] == len(digits().train_x)


def test_an_existing_folder_is_refused_unless_overwritten(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["demo", "--steps", "2", "--batch-size", "8", "--out", str(out)]
    assert cli.main(arguments) == 0
    (out / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(
        r"expected a new or empty output folder, got .*run, which holds an earlier run; choose .* or add", error
    )
    assert cli.main([*arguments, "--overwrite", "--seed", "1"]) == 0
    assert json.loads((out / demo.SUMMARY).read_text())["settings"]["seed"] == 1
    assert (out / "notes.txt").read_text() == "mine"
    assert read_history(out / demo.HISTORY).steps == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1"], "expected steps of at least 2, got 1"),
        (["--batch-size", "0"], "expected batch_size of at least 1, got 0"),
        (["--batch-size", "5000"], "expected batch_size up to 1438, got 5000"),
        (["--lr", "-1"], "expected a positive finite lr, got -1.0"),
        (["--device", "toaster"], "expected a device torch can use here, got 'toaster'"),
        (["--device", "meta"], "expected a device torch can use here, got 'meta'"),
        (["--seed", "-1"], "expected a seed from 0 to 4294967295, got -1"),
        (["--seed", "9" * 23], "expected a seed from 0 to 4294967295, got 99999999999999999999999"),
    ],
)
def test_wrong_options(tmp_path, capsys, arguments, message):
    out = tmp_path / "run"
    assert cli.main(["demo", "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {"history.jsonl": "mine", "summary.json": "[]"}])
def test_a_folder_of_something_else_is_never_overwritten(tmp_path, capsys, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    assert cli.main(["demo", "--out", str(tmp_path), "--overwrite"]) == 2
    assert capsys.readouterr().err.endswith("which holds something else; choose another --out\n")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == content


@pytest.mark.parametrize("lr", ["1000", "1e30"])
def test_a_diverged_run_says_so_and_stops(tmp_path, capsys, lr):
    out = tmp_path / "run"
    out.mkdir()  # an empty folder is as good as none
    assert cli.main(["demo", "--steps", "8", "--lr", lr, "--batch-size", "8", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    step = re.search(r"training diverged at step (\d): the (?:loss is|weights are) not finite; lower --lr", printed.err)
    assert step
    assert read_history(out / demo.HISTORY).steps == list(range(int(step[1]) + 1))
    assert json.loads((out / demo.SUMMARY).read_text())["result"] is None
    assert demo.prepare_folder(out, overwrite=True) == out
    assert list(out.iterdir()) == []


def test_remarks_are_counted_by_kind():
    statuses = {"a": ["ok", "3 of 8 lost", "5 of 8 lost", "clipped"], "b": ["ok", "ok", "5 of 8 lost", "clipped"]}
    history = History(
        {"step": step, "layer": layer, "status": status}
        for layer, column in statuses.items()
        for step, status in enumerate(column)
    )
    assert demo.remarks(history) == ["  2 steps, 2 layers: N of N lost", "  1 steps, 2 layers: clipped"]


def test_shares_of_no_change_at_all(tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path / "run"), "--steps", "2", "--lr", "1e-30"]) == 0
    printed = capsys.readouterr().out
    assert "inf" not in printed
    assert "nan" not in printed


@pytest.mark.parametrize("command", [["demo", "--out"], ["reproduce", "jacobian", "--out"]], ids=" ".join)
def test_an_interruption_is_no_failure(tmp_path, capsys, monkeypatch, command):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("lipdyn_torch.experiments.demo.run_demo", interrupted)
    monkeypatch.setattr("lipdyn_torch.experiments.runner.reproduce", interrupted)
    assert cli.main([*command, str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err.startswith("\nlipdyn: interrupted; ")


def test_batch_of_one_is_reported(tmp_path, capsys):
    assert cli.main(["demo", "--steps", "2", "--batch-size", "1", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "  2 steps, 5 layers: batch of one: noise terms undefined\n" in printed
    assert printed.count("batch of one") == 1
    assert re.search(r"noise curvature +\+?nan", printed)
    json.loads((tmp_path / "run" / demo.SUMMARY).read_text())
