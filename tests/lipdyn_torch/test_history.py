"""Records: what is written can be read, continued after a crash, and handed on."""

from __future__ import annotations

import io
import json
import math
import os
import re
import tracemalloc

import pytest
import torch

from lipdyn_torch import History, JsonLinesSink, LipschitzMonitor, read_history
from lipdyn_torch.history import NETWORK, ResumeError

META = {"layers": ["fc"], "noise": "full", "conv": "matrix", "every": 1}


def step_rows(step: int, value: float = 0.5) -> list[dict]:
    return [{"step": step, "layer": name, "z": value + step, "mu": math.nan} for name in ("fc", NETWORK)]


def write(path, steps, *, meta=META, value=0.5, **settings) -> JsonLinesSink:
    sink = JsonLinesSink(path, **settings)
    sink.start(meta)
    for step in steps:
        sink.write(step_rows(step, value))
    sink.close()
    return sink


def same(rows: list[dict], other: list[dict]) -> bool:
    return History(rows).to_pandas().equals(History(other).to_pandas())


# --- JSON lines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [0, 1, 40, 100])
def test_a_write_that_fails_leaves_nothing_behind(tmp_path, taken, monkeypatch):
    """Half a line would damage the file as soon as there is space again."""
    path = tmp_path / "history.jsonl"
    sink = JsonLinesSink(path)
    sink.start(META)
    sink.write(step_rows(0))
    file = sink._file

    class Full:
        left = taken

        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, data):
            if not self.left:
                raise OSError(28, "No space left on device")
            some, self.left = data[: self.left], 0
            return file.write(some)

    monkeypatch.setattr(sink, "_file", Full())
    with pytest.raises(OSError, match="No space left"):
        sink.write(step_rows(1))
    monkeypatch.setattr(sink, "_file", file)
    sink.write(step_rows(2))
    sink.close()
    assert read_history(path).steps == [0, 2]
    write(path, [3], resume=True)
    assert read_history(path).steps == [0, 2, 3]


def test_one_writer_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "history.jsonl"
    sink = JsonLinesSink(path)
    sink.start(META)
    sink.write(step_rows(0))
    before = path.read_bytes()
    with pytest.raises(BlockingIOError, match=r"expected a file that nobody else writes, got .*history.jsonl"):
        JsonLinesSink(path, resume=True)
    assert path.read_bytes() == before
    forked = os.dup(sink._file.fileno())  # as workers of a data loader have it
    sink.close()
    write(path, [1], resume=True)
    os.close(forked)
    assert read_history(path).steps == [0, 1]


def test_a_reference_is_part_of_what_rows_mean(tmp_path):
    path = tmp_path / "history.jsonl"
    write(path, [0], meta={**META, "reference": "full"})
    with pytest.raises(ResumeError, match="to have reference None as this run, got 'full'"):
        write(path, [1], meta={**META, "reference": None}, resume=True)


def test_a_long_record_is_continued_in_little_memory(tmp_path):
    """The file is read line by line."""
    path, status = tmp_path / "history.jsonl", "x" * 20_000
    sink = JsonLinesSink(path)
    sink.start(META)
    for step in range(500):
        sink.write([{**row, "status": status} for row in step_rows(step)])
    sink.close()
    tracemalloc.start()
    try:
        write(path, [500], resume=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 20
    assert read_history(path).steps == list(range(501))


@pytest.mark.parametrize("lost", [1, 2, 30, 60, 61, 62, 63, 64])
def test_a_crash_at_any_byte_loses_the_step_being_written_only(tmp_path, lost, caplog):
    """Also when one of the step's rows is whole: a step is kept as a whole or not at all."""
    path = tmp_path / "history.jsonl"
    write(path, range(3))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert lost < len(lines[-1] + lines[-2])
    path.write_bytes(whole[:-lost])
    assert read_history(path).steps == [0, 1]
    assert read_history(path).meta == META
    sink = JsonLinesSink(path, resume=True)
    assert path.read_bytes() == b"".join(lines[:-2])
    assert sink.set_aside == [tmp_path / "history.jsonl.aside-1"]
    assert sink.set_aside[0].read_bytes() == (lines[-2] + lines[-1])[:-lost]
    assert caplog.messages == [f"{path}: the last step was cut short; what there was of it is kept in {path}.aside-1"]
    sink.start(META)
    for step in (2, 3):
        sink.write(step_rows(step))
    sink.close()
    assert path.read_bytes()[: len(whole)] == whole
    assert read_history(path).steps == [0, 1, 2, 3]


def test_a_crash_anywhere_in_the_very_first_line(tmp_path):
    path = tmp_path / "history.jsonl"
    write(path, [], meta={**META, "skipped": {}})
    whole = path.read_bytes()
    for left in (*(whole[:size] for size in range(len(whole))), bytes(9)):
        path.write_bytes(left)
        assert len(read_history(path)) == 0
    path.write_bytes(whole[:9])
    write(path, [0], resume=True)
    assert read_history(path).meta == META
    assert read_history(path).steps == [0]


def test_bytes_that_are_no_text_at_the_end(tmp_path):
    """File systems may leave zeros after a loss of power."""
    path = tmp_path / "history.jsonl"
    write(path, range(2))
    whole = path.read_bytes()
    path.write_bytes(whole + b"\x00\xff\x00")
    assert read_history(path).steps == [0, 1]
    sink = write(path, [2], resume=True)
    assert sink.set_aside[0].read_bytes() == b"\x00\xff\x00"
    assert path.read_bytes().startswith(whole)


def test_repeated_steps_replace_the_old_ones_which_are_kept_aside(tmp_path, caplog):
    """The checkpoint is older than the record: the run repeats steps 2 and 3."""
    path = tmp_path / "history.jsonl"
    write(path, range(4), value=0.5)
    sink = write(path, [2, 3, 4], value=0.75, resume=True)
    history = read_history(path)
    assert history.steps == [0, 1, 2, 3, 4]
    assert [row["z"] for row in history if row["layer"] == "fc"] == [0.5, 1.5, 2.75, 3.75, 4.75]
    aside = read_history(sink.set_aside[0])
    assert [(row["step"], row["z"]) for row in aside if row["layer"] == "fc"] == [(2, 2.5), (3, 3.5)]
    told = (
        f"{path}: this run begins at step 2; what an earlier run wrote from that step on is kept in {sink.set_aside[0]}"
    )
    assert caplog.messages == [told]
    again = write(path, [1], resume=True)
    assert [p.name for p in again.set_aside] == ["history.jsonl.aside-2"]
    assert read_history(path).steps == [0, 1]


def test_resuming_a_clean_record_sets_nothing_aside(tmp_path):
    path = tmp_path / "history.jsonl"
    write(path, range(2), resume=True)  # nothing there yet: a new file
    sink = write(path, [2], resume=True)
    assert sink.set_aside == []
    assert [p.name for p in tmp_path.iterdir()] == ["history.jsonl"]
    assert path.read_text().count('"meta"') == 1
    write(path, [3], meta={**META, "every": 5}, resume=True)
    assert path.read_text().count('"meta"') == 2
    assert read_history(path).meta["every"] == 5
    assert same(read_history(path).rows, [row for step in range(4) for row in step_rows(step)])


def test_the_record_of_another_model_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "history.jsonl"
    write(path, range(2))
    before = path.read_bytes()
    message = r"expected .*history.jsonl to have layers \['head'\] as this run, got \['fc'\]; resume with the same"
    with pytest.raises(ResumeError, match=message):
        write(path, [2], meta={**META, "layers": ["head"]}, resume=True)
    with pytest.raises(ResumeError, match="to have noise 'split' as this run, got 'full'"):
        write(path, [2], meta={**META, "noise": "split"}, resume=True)
    assert path.read_bytes() == before
    with pytest.raises(FileExistsError):
        JsonLinesSink(path)


@pytest.mark.parametrize("damage", ['{"step": 1, "lay', "[1, 2]", "\x00"])
def test_damage_before_the_end_is_refused_and_left_alone(tmp_path, damage):
    path = tmp_path / "history.jsonl"
    write(path, range(2))
    lines = path.read_text().splitlines()
    lines[2] = damage
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    message = rf"expected one JSON object per line in .*, got {re.escape(repr(damage + chr(10)))} in line 3; restore"
    for read in (read_history, lambda path: JsonLinesSink(path, resume=True)):
        with pytest.raises(ResumeError, match=message):
            read(path)
    assert path.read_bytes() == before


def test_every_line_is_strict_json(tmp_path):
    path = tmp_path / "history.jsonl"
    write(path, range(2))
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_a_killed_process_leaves_whole_steps(tmp_path):
    """The real thing: no close, no flush, no interpreter shutdown."""
    import subprocess
    import sys

    path = tmp_path / "history.jsonl"
    code = (
        "import os, sys; from lipdyn_torch.history import JsonLinesSink\n"
        "sink = JsonLinesSink(sys.argv[1]); sink.start({})\n"
        "for k in range(50): sink.write([{'step': k, 'layer': 'network', 'z': 1.0}])\n"
        "os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    assert read_history(path).steps == list(range(50))


# --- state ---------------------------------------------------------------------------------------------------


def run(case, steps: int, **settings) -> LipschitzMonitor:
    model = case.model()
    optimizer = case.optimizer(model)
    with LipschitzMonitor(model, optimizer, **settings) as monitor:
        for step in range(steps):
            case.step(model, optimizer, step)
    return monitor


def test_state_survives_a_checkpoint(mlp_case):
    history = run(mlp_case, 3).history
    buffer = io.BytesIO()
    torch.save(history.state_dict(), buffer)
    buffer.seek(0)
    twin = run(mlp_case, 0).history
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    assert twin.to_pandas().equals(history.to_pandas())
    assert twin.meta == history.meta


def test_the_state_is_a_snapshot(mlp_case):
    history = run(mlp_case, 1).history
    state = history.state_dict()
    rows = len(state["rows"])
    history.extend(step_rows(1))
    history.rows[0]["z"] = 0.0
    assert len(state["rows"]) == rows
    assert state["rows"][0]["z"] != 0.0


def test_states_that_do_not_fit(mlp_case):
    history = run(mlp_case, 1).history
    rows = list(history.rows)
    state = history.state_dict()
    with pytest.raises(ResumeError, match=r"expected the state to have layers \['0', '2', '4'\] as this run"):
        history.load_state_dict({**state, "meta": {**state["meta"], "layers": ["0"]}})
    with pytest.raises(ResumeError, match=r"expected the state_dict of a History, got \['model'\]; pass what"):
        history.load_state_dict({"model": 1})
    with pytest.raises(ResumeError, match="expected the state_dict of a History, got list"):
        history.load_state_dict([])
    with pytest.raises(ResumeError, match="expected version 1 of the state, got 7; update"):
        history.load_state_dict({**state, "version": 7})
    assert history.rows == rows


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"hello\n",
        b'{"a": 1}',
        b'{"a": 1}\n{"b": 2}\n',
        b'{"step": 0}\n{"step": 1, "layer": "network"}\n',
        b'{"meta": 5}\n',
        b"{\n",
        b"# A page\n\nof text\n",
        b"\x89PNG\r\n\x1a\n\0",
    ],
)
def test_another_file_is_no_history_and_is_left_alone(tmp_path, content):
    path = tmp_path / "other"
    path.write_bytes(content)
    message = (
        "expected a history written by JsonLinesSink, got .*other, whose first line is neither a head .* right file"
    )
    for read in (read_history, lambda path: JsonLinesSink(path, resume=True)):
        with pytest.raises(ResumeError, match=message):
            read(path)
    assert path.read_bytes() == content


def test_an_object_that_is_no_row_is_told_by_its_keys(tmp_path):
    path = tmp_path / "history.jsonl"
    write(path, [0])
    path.write_text(path.read_text() + '{"a": 1}\n{"step": 1, "layer": "fc"}\n')
    with pytest.raises(
        ResumeError, match=r"got '{\"a\": 1}\\n' without the keys step and layer in line 4; restore the"
    ):
        read_history(path)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda folder: read_history(folder / "no.jsonl"),
            FileNotFoundError,
            r"by JsonLinesSink, got .*no.jsonl \(No su",
        ),
        (lambda folder: read_history(folder), IsADirectoryError, r"expected a history .*, got .* \(Is a directory\)"),
        (
            lambda folder: JsonLinesSink(folder / "no" / "x"),
            FileNotFoundError,
            "expected a file that .* make its folder",
        ),
        (lambda folder: JsonLinesSink(folder), FileExistsError, "expected a new file, got .* with resume=True or name"),
    ],
)
def test_a_path_that_cannot_be_read_or_written_is_told_in_words(tmp_path, call, kind, message):
    with pytest.raises(kind, match=message) as caught:
        call(tmp_path)
    assert caught.value.errno == caught.value.__cause__.errno
    assert "Errno" not in str(caught.value)


def test_a_closed_sink_is_not_used_again(tmp_path):
    sink = JsonLinesSink(tmp_path / "history.jsonl")
    sink.start({"layers": []})
    sink.close()
    with pytest.raises(ValueError, match=r"expected an open sink, got that of .* make a new one"):
        sink.start({"layers": []})
