"""The run folder: resume, damage, other folders."""

from __future__ import annotations

import math

import pytest

from lipdyn_torch import RunFolderExistsError
from lipdyn_torch.experiments.store import ROWS, RunFolder

CONFIG = {"experiment": "jacobian", "seed": 0}


def filled(path):
    folder = RunFolder(path, CONFIG)
    folder.add("a", [{"x": 1.0}, {"x": math.nan}])
    folder.add("b", [{"x": 3.0}])
    return folder


def test_rows_come_back_in_the_order_of_the_points(tmp_path):
    filled(tmp_path / "run")
    again = RunFolder(tmp_path / "run", CONFIG)
    rows = again.rows(["b", "a"])
    assert [row["point"] for row in rows] == ["b", "a", "a"]
    assert rows[1]["x"] == 1.0
    assert math.isnan(rows[2]["x"])
    assert again.set_aside is None


def test_a_point_counts_once(tmp_path):
    folder = filled(tmp_path / "run")
    folder.add("a", [{"x": 9.0}])
    text = (tmp_path / "run" / ROWS).read_text()
    (tmp_path / "run" / ROWS).write_text(text + text)  # as two processes would leave it
    assert RunFolder(tmp_path / "run", CONFIG).rows(["a"])[0]["x"] == 1.0
    assert len(RunFolder(tmp_path / "run", CONFIG).rows(["a"])) == 2


@pytest.mark.parametrize("cut", [1, 5, 20, 45])
def test_a_torn_tail_is_set_aside_and_the_rest_kept(tmp_path, cut):
    filled(tmp_path / "run")
    file = tmp_path / "run" / ROWS
    content = file.read_bytes()
    file.write_bytes(content[:-cut])
    folder = RunFolder(tmp_path / "run", CONFIG)
    assert list(folder.finished) == ["a"]
    assert folder.set_aside.name == "rows.damaged-1.jsonl"
    assert content.startswith(file.read_bytes() + folder.set_aside.read_bytes())
    folder.add("b", [{"x": 3.0}])
    assert file.read_bytes() == content
    assert RunFolder(tmp_path / "run", CONFIG).set_aside is None


@pytest.mark.parametrize(
    "bad", [b"\0\0\0\n", b"[]\n", b'{"finished": "c", "rows": 2}\n', b'{"point": "c"}\n{"finished": "d", "rows": 1}\n']
)
def test_nonsense_is_set_aside(tmp_path, bad):
    filled(tmp_path / "run")
    with (tmp_path / "run" / ROWS).open("ab") as file:
        file.write(bad + b'{"finished": "e", "rows": 0}\n')
    folder = RunFolder(tmp_path / "run", CONFIG)
    assert list(folder.finished) == ["a", "b"]
    assert folder.set_aside.read_bytes().startswith(bad)


def test_another_run_is_refused_and_overwritten_on_demand(tmp_path):
    filled(tmp_path / "run")
    with pytest.raises(RunFolderExistsError, match=r"seed 1.*seed 0.*--overwrite"):
        RunFolder(tmp_path / "run", {**CONFIG, "seed": 1})
    with pytest.raises(RunFolderExistsError, match="experiment 'hessian'"):
        RunFolder(tmp_path / "run", {**CONFIG, "experiment": "hessian"})
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    assert RunFolder(tmp_path / "run", {**CONFIG, "seed": 1}, overwrite=True).finished == {}
    assert (tmp_path / "run" / "thesis.tex").read_text() == "mine"


def test_overwriting_takes_only_what_a_run_made(tmp_path):
    folder = RunFolder(tmp_path, CONFIG)
    folder.write("summary.md", "# jacobian\n\n![jacobian](jacobian.png)\n")
    for name in ("jacobian.png", "jacobian.svg", "poster.png", "notes.md"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    RunFolder(tmp_path, CONFIG, overwrite=True)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "poster.png", "notes.md"}
    (tmp_path / "config.json").write_text('{"experiment": "sweep 3", "lr": 0.1}', encoding="utf-8")
    with pytest.raises(RunFolderExistsError, match=r"without a config\.json of an experiment; choose another --out"):
        RunFolder(tmp_path, CONFIG, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"model_type": "bert"}'])
def test_a_folder_of_something_else_is_refused(tmp_path, content, overwrite):
    """Models of others keep a config.json too."""
    (tmp_path / "figure.png").write_text("mine")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunFolderExistsError, match=r"expected a run folder, .*; choose another --out$"):
        RunFolder(tmp_path, CONFIG, overwrite)
    assert (tmp_path / "figure.png").read_text() == "mine"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunFolderExistsError, match=r"expected a folder, got .*run, which is a file; choose another"):
        RunFolder(tmp_path / "run", CONFIG)
