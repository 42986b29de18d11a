"""The command: every experiment shortened, resumed, refused; the report."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess

import pytest

from lipdyn_torch.experiments import cli, registry, runner
from lipdyn_torch.experiments.registry import NAMES, Context, find
from lipdyn_torch.experiments.runner import PointFailedError, ReproduceConfig, reproduce
from lipdyn_torch.experiments.store import ROWS

VERDICTS = {registry.CONFIRMED, registry.WITHIN_LIMITS, registry.CONTRADICTED, registry.NOT_DECIDED}


@pytest.fixture
def one_run(tmp_path, tiny):
    """`reproduce` in this process."""

    def run(name, **settings):
        return reproduce(
            ReproduceConfig(**{"name": name, "out": tmp_path / name, "jobs": 1, "progress": False} | settings)
        )

    return run


def test_all_experiments_make_one_report(tmp_path, tiny, capsys):
    out = tmp_path / "all"
    assert cli.main(["reproduce", "all", "--jobs", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    page = (out / "report.html").read_text()
    # Nothing is fetched from elsewhere: no address in it but the data of its own pictures.
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:image/png;base64,|#)""", page)
    for name in NAMES:
        assert {f.name for f in (out / name).iterdir()} >= {"config.json", ROWS, "environment.json", "summary.md"}
        assert len(list((out / name).glob("*.png"))) == len(list((out / name).glob("*.svg"))) >= 1
        assert f'id="{name}"' in page
        assert f"# {name}: " in printed
    _render(out / "report.html", tmp_path)


def _render(report, folder):
    """Every picture of the page shows in headless Chromium, where that is installed."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return
    count = "[...document.images].filter(i => i.complete && i.naturalWidth > 100).length"
    script = f"<script>onload = () => {{ document.title = {count} + ' of ' + document.images.length }}</script>"
    (folder / "counted.html").write_text(report.read_text() + script)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    command = [browser, *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run([*command, str(folder / "counted.html")], capture_output=True, text=True, timeout=120)
    shown = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert shown, done.stderr[-1000:]
    assert shown[1] == shown[2] == str(len(NAMES))


@pytest.mark.parametrize("name", ["jacobian", "hessian"])
def test_derivatives_agree_with_autograd(one_run, name):
    ((_, summary),) = one_run(name)
    (table,) = summary.tables
    assert [row[0] for row in table.rows] == list("123456")
    assert "k from 1, as in the paper" in table.title
    assert "k from 1, as in the paper" in summary.figures[name].get_suptitle()
    assert max(value for row in table.rows for value in row[1:]) < 1e-11
    assert summary.claims[0].verdict == registry.CONFIRMED


def test_the_published_formula_fails_where_ours_does_not(one_run):
    ((_, summary),) = one_run("hessian-errors")
    for order, _, _, ours, published, _ in summary.tables[1].rows:
        assert ours < 1e-7, order
        assert published > 1e-3, order
    assert [claim.verdict for claim in summary.claims] == [registry.CONFIRMED, registry.CONTRADICTED]


def test_the_same_seed_gives_the_same_rows(tiny):
    for name, point in (
        ("validation", "autoaugment"),
        ("validation", "dropout"),
        ("batch-size", "iid-16-1"),
        ("noisy-gradient", "normal-0.25"),
    ):
        experiment = find(name)
        context = Context("quick", "digits", None, "cpu", 3, experiment.presets["quick"])
        chosen = next(p for p in experiment.points(context) if p["id"] == point)
        first, second = (json.dumps(runner.run_point(name, chosen, context)) for _ in range(2))
        assert first == second, point
        other = Context("quick", "digits", None, "cpu", 4, experiment.presets["quick"])
        assert json.dumps(runner.run_point(name, chosen, other)) != first


def test_every_claim_gets_a_verdict_and_second_order_is_close(one_run):
    ((_, summary),) = one_run("validation")
    assert {claim.verdict for claim in summary.claims} <= VERDICTS
    largest = summary.tables[0].rows
    assert len(largest) == 8
    assert all(math.isfinite(v) for row in largest for v in row[1:])
    assert max(row[5] for row in largest) < 1e-3


def test_the_errors_of_the_validation_are_drawn(one_run):
    ((job, summary),) = one_run("validation")
    panels = summary.figures["validation"].get_axes()
    titles = [axes.get_title() for axes in panels]
    rows = job.folder.rows(["none"])
    want = [abs(row["path2"] - row["observed"]) for row in rows[1:]]
    below = panels[titles.index("no regulariser") + 2]  # two configurations side by side
    assert below.get_lines()[2].get_ydata() == pytest.approx(want, abs=1e-15)
    insets = [inset for axes in panels for inset in axes.child_axes]
    assert len(insets) == 8
    assert all(len(inset.get_yticks()) for inset in insets)


def test_panels_near_convergence_have_one_start_and_labels(one_run):
    ((_, summary),) = one_run("near-convergence")
    for axes in summary.figures["near-convergence"].get_axes():
        assert axes.get_ylabel()
        assert {line.get_xdata()[0] for line in axes.get_lines()} == {0}
    assert all("lambda_sq" not in text.get_text() for text in axes.get_legend().get_texts())


@pytest.mark.parametrize(("name", "made_from"), [("timing", "random pixels"), ("jacobian", "random matrices")])
def test_the_summary_names_the_data_it_was_made_from(one_run, tmp_path, name, made_from):
    one_run(name)
    assert f"`preset quick, data {made_from}, device cpu, seed 0`" in (tmp_path / name / "summary.md").read_text()


def test_exact_mixture_of_labels(one_run):
    ((_, summary),) = one_run("label-noise")
    for _, eps, observed, mixture, *_ in summary.tables[0].rows:
        assert observed == pytest.approx(mixture, rel=0.15), eps
        if eps == 0:
            assert observed == pytest.approx(1, rel=1e-9)


def test_a_killed_sweep_continues(one_run, tmp_path, monkeypatch):
    seen = []
    original = runner.run_point

    def fragile(name, point, context):
        seen.append(point["id"])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return original(name, point, context)

    monkeypatch.setattr(runner, "run_point", fragile)
    with pytest.raises(KeyboardInterrupt):
        one_run("jacobian")
    one_run("jacobian")
    one_run("jacobian")  # nothing is left to do
    assert seen == ["normal", "uniform", "uniform", "beta"]
    rows = [json.loads(line) for line in (tmp_path / "jacobian" / ROWS).read_text().splitlines()]
    assert [row["finished"] for row in rows if "finished" in row] == ["normal", "uniform", "beta"]


def test_a_failing_point_does_not_take_the_others_with_it(one_run, tmp_path, monkeypatch):
    original = runner.run_point

    def fragile(name, point, context):
        if point["id"] == "uniform":
            raise RuntimeError("out of luck")
        return original(name, point, context)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_point", fragile)
        with pytest.raises(PointFailedError, match="jacobian, point uniform: RuntimeError: out of luck"):
            one_run("jacobian")
    assert not (tmp_path / "jacobian" / "summary.md").exists()
    assert len(one_run("jacobian")) == 1


def test_workers_of_a_scheduler_give_the_same_rows(one_run, tmp_path):
    import dask
    from distributed import LocalCluster

    one_run("jacobian", out=tmp_path / "here")
    quiet = {"distributed.worker.daemon": False}
    with (
        dask.config.set(quiet),
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
    ):
        one_run("jacobian", out=tmp_path / "there", scheduler=cluster.scheduler_address)
    rows = [sorted((tmp_path / where / ROWS).read_text().splitlines()) for where in ("here", "there")]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["jakobian"], "jacobian, hessian"),
        (["jacobian", "--jobs", "-1"], "jobs of at least 1"),
        (["jacobian", "--device", "abacus"], "device"),
        (["validation", "--data", "mnist", "--root", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_use_names_what_is_known(arguments, known, capsys, tmp_path):
    assert cli.main(["reproduce", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert known in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "known"), [({"preset": "fast"}, "quick, paper"), ({"data": "imagenet"}, "digits, mnist, cifar10, cif")]
)
def test_wrong_settings_name_what_is_known(setting, known):
    with pytest.raises(ValueError, match=known):
        ReproduceConfig("jacobian", **setting)


def test_a_folder_of_another_experiment_is_refused(one_run, tmp_path, capsys):
    one_run("jacobian")
    assert cli.main(["reproduce", "hessian", "--out", str(tmp_path / "jacobian")]) == 2
    error = capsys.readouterr().err
    assert "experiment 'hessian'" in error
    assert "--overwrite" in error


def test_a_damaged_row_file_is_named(one_run, tmp_path, capsys):
    one_run("jacobian")
    with (tmp_path / "jacobian" / ROWS).open("a") as file:
        file.write('{"point": "no')
    one_run("jacobian")
    assert "rows.damaged-1.jsonl, 3 finished points are kept" in capsys.readouterr().err
