"""Every sink against the real package: what comes back is what the history holds."""

from __future__ import annotations

import json
import math
import re
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from lipdyn_torch import History, LipschitzMonitor
from lipdyn_torch.history import ResumeError
from lipdyn_torch.integrations._extras import MissingExtraError
from lipdyn_torch.integrations.sinks import MLflowSink, ParquetSink, TensorBoardSink, WandbSink, scalars

STEPS = 4


def train(*sinks, steps: int = STEPS, batch_of_one: int | None = None) -> History:
    """A short run; one batch may be of one sample, which leaves the noise terms undefined."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer, sinks=sinks) as monitor:
        for step in range(steps):
            optimizer.zero_grad()
            x = torch.randn(1 if step == batch_of_one else 6, 4, dtype=torch.float64)
            model(x).square().mean().backward()
            optimizer.step()
    return monitor.history


def later_rows(history: History, step: int) -> list[dict]:
    """The rows of the last step, as if made at ``step`` by a resumed run."""
    last = history.steps[-1]
    return [{**row, "step": step, "z": 42.0} for row in history if row["step"] == last]


def expected_scalars(history: History) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in history:
        for name, value in scalars([row]).items():
            curves.setdefault(name, []).append((row["step"], value))
    for layer in ("0", "2", "network"):
        assert {f"lipschitz_{column}/{layer}" for column in ("sigma", "mu", "kappa", "lambda_sq", "z")} <= set(curves)
    return curves


# --- TensorBoard ---------------------------------------------------------------------------------------------


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def text(events, tag: str) -> list[tuple[int, str]]:
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(f"{tag}/text_summary")]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="extra tensorboard is not installed")
    history = train(TensorBoardSink(tmp_path), batch_of_one=2)
    events = read_events(tmp_path)
    curves = expected_scalars(history)
    assert set(events.Tags()["scalars"]) == set(curves)
    for name, points in curves.items():
        read = events.Scalars(name)
        assert [e.step for e in read] == [step for step, _ in points], name
        assert [e.value for e in read] == pytest.approx([value for _, value in points], rel=1e-6), name
    assert [e.step for e in events.Scalars("lipschitz_kappa/0")] == [0, 1, 3]  # undefined for one sample
    assert text(events, "lipschitz_status/0") == [(2, "batch of one: noise terms undefined"), (3, "ok")]
    assert '"layers": [' in text(events, "lipschitz_meta")[0][1]


def test_tensorboard_resumed_and_with_a_writer_of_ones_own(tmp_path):
    pytest.importorskip("tensorboard", reason="extra tensorboard is not installed")
    from torch.utils.tensorboard import SummaryWriter

    history = train(TensorBoardSink(tmp_path / "a", columns=["z"]))
    resumed = TensorBoardSink(tmp_path / "a", columns=["z"])
    resumed.start(history.meta)
    resumed.write(later_rows(history, step=2))
    resumed.close()
    read = read_events(tmp_path / "a").Scalars("lipschitz_z/network")
    assert [(e.step, e.value) for e in read[-1:]] == [(2, 42.0)]
    assert [e.step for e in read] == [0, 1, 2]  # steps 2 and 3 of the first run are hidden
    with SummaryWriter(str(tmp_path / "b")) as writer:
        train(TensorBoardSink(writer, columns=["z"]))
        writer.add_scalar("loss", 1.0, 0)  # still open
    assert set(read_events(tmp_path / "b").Tags()["scalars"]) == {
        "loss", "lipschitz_z/0", "lipschitz_z/2", "lipschitz_z/network"
    }  # fmt: skip


# --- Parquet -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_per_file", [1, 4, 10_000])
def test_parquet(tmp_path, rows_per_file):
    pytest.importorskip("pyarrow", reason="extra parquet is not installed")
    import pandas as pd
    import pyarrow.parquet as pq

    folder = tmp_path / "rows"
    history = train(ParquetSink(folder, rows_per_file=rows_per_file), batch_of_one=1)
    table = history.to_pandas()
    read = pd.read_parquet(folder)
    pd.testing.assert_frame_equal(read[table.columns], table, check_dtype=False, check_exact=True)
    assert read["step"].dtype == "int64"
    assert len(list(folder.iterdir())) == {1: 4, 4: 2, 10_000: 1}[rows_per_file]
    meta = json.loads(pq.read_schema(folder / "part-000000.parquet").metadata[b"lipdyn"])
    assert meta["layers"] == ["0", "2"]


def test_parquet_resumed(tmp_path):
    pytest.importorskip("pyarrow", reason="extra parquet is not installed")
    import pandas as pd

    folder = tmp_path / "rows"
    history = train(ParquetSink(folder, rows_per_file=6))  # two steps a file
    (folder / "_tmp-part-000002.parquet").write_bytes(b"torn")
    with pytest.raises(FileExistsError, match=r"expected an empty folder, got .*rows; choose another one or resume"):
        ParquetSink(folder)
    sink = ParquetSink(folder, resume=True)
    sink.start(history.meta)
    sink.write(later_rows(history, step=3))
    sink.close()
    read = pd.read_parquet(folder)
    assert sorted(set(read["step"])) == [0, 1, 2, 3]
    assert len(read) == 12
    assert (read[read["step"] == 3]["z"] == 42.0).all()
    old = list(folder.glob("_superseded-*"))
    assert [sorted(set(pd.read_parquet(path)["step"])) for path in old] == [[2, 3]]
    with pytest.raises(ResumeError, match=r"to have layers \['fc'\] as this run, got \['0', '2'\]"):
        ParquetSink(folder, resume=True).start({"layers": ["fc"]})
    with pytest.raises(ValueError, match="expected rows_per_file of at least 1, got 0"):
        ParquetSink(tmp_path / "other", rows_per_file=0)


# --- MLflow --------------------------------------------------------------------------------------------------


def test_mlflow(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    uri = (tmp_path / "runs").as_uri()
    client = mlflow.MlflowClient(tracking_uri=uri)
    run = client.create_run(client.create_experiment("test")).info.run_id
    monkeypatch.setattr(MLflowSink, "_LIMIT", 7)  # several requests a step
    history = train(MLflowSink(run, tracking_uri=uri), batch_of_one=2)
    curves = expected_scalars(history)
    assert set(client.get_run(run).data.metrics) == set(curves)
    for name, points in curves.items():
        read = client.get_metric_history(run, name)
        assert [(m.step, m.value) for m in read] == points, name
    assert client.get_run(run).data.tags["lipschitz_status/0"] == "step 3: ok"
    meta = Path(client.download_artifacts(run, "lipschitz_meta.json", str(tmp_path))).read_text()
    assert json.loads(meta)["layers"] == ["0", "2"]
    assert client.get_run(run).info.status == "RUNNING"
    with pytest.raises(ValueError, match=r"expected a run to log to, got none; pass run_id= or call mlflow"):
        MLflowSink()
    sink = MLflowSink(run, tracking_uri=uri)
    sink.write([{"step": 0, "layer": "größe+1", "z": 1.0}])
    (name,) = set(client.get_run(run).data.metrics) - set(curves)
    assert re.fullmatch("lipschitz_z/gr__e_1-[0-9a-f]{8}", name)


def test_names_that_mlflow_does_not_allow_stay_apart():
    names = ["a[0]", "a(0)", "a_0_", "слой", "блок", "____", "größe"]
    allowed = [MLflowSink._allowed(f"lipschitz_z/{name}") for name in names]
    assert len(set(allowed)) == len(names)
    assert allowed[2] == "lipschitz_z/a_0_"
    assert all(re.fullmatch(r"[\w\-. :/]+", name, flags=re.ASCII) for name in allowed)


# --- Weights & Biases ----------------------------------------------------------------------------------------


def read_wandb(file: Path) -> list:
    """The records of an offline run: protobuf messages in LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, records, pending = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + length > len(data):  # it is being written
            break
        pending += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            records.append(record)
            pending = b""
    return records


def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="extra wandb is not installed")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    with pytest.raises(ValueError, match=r"expected a run to log to, got none; pass run= or call wandb"):
        WandbSink()
    settings = wandb.Settings(silent=True, x_disable_stats=True, disable_git=True)
    with wandb.init(project="test", dir=tmp_path, mode="offline", settings=settings) as run:
        history = train(WandbSink(), batch_of_one=2)
        run.log({"loss": 1.0})  # the run goes on
    file = next(tmp_path.rglob("*.wandb"))
    for _ in range(100):  # the service writes on its own time
        records = read_wandb(file)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        time.sleep(0.1)
    lines = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("lipschitz_") and "status" not in name:
                curves.setdefault(name, []).append((line["optimizer_step"], value))
    assert curves == expected_scalars(history)
    statuses = [line["lipschitz_status/0"] for line in lines if "lipschitz_status/0" in line]
    assert statuses == ["batch of one: noise terms undefined", "ok"]
    assert any(line.get("loss") == 1.0 for line in lines)
    metrics = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    assert any(m.glob_name == "lipschitz_*" and m.step_metric == "optimizer_step" for m in metrics)
    configs = [u for r in records if r.WhichOneof("record_type") == "config" for u in r.config.update]
    assert any(u.key == "lipschitz" and json.loads(u.value_json)["layers"] == ["0", "2"] for u in configs)


# --- all -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("tensorboard", lambda folder: TensorBoardSink(folder)),
        ("pyarrow", lambda folder: ParquetSink(folder)),
        ("mlflow", lambda folder: MLflowSink("run")),
        ("wandb", lambda folder: WandbSink()),
    ],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package, make):
    for name in [n for n in sys.modules if n == "torch.utils.tensorboard" or n.startswith("torch.utils.tensorboard.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(sys, "meta_path", [Blocker(), *sys.meta_path])
    extra = {"pyarrow": "parquet"}.get(package, package)
    message = rf"expected the package {package} to be installed, got none; install it with: .*specpert\[{extra}\]"
    with pytest.raises(MissingExtraError, match=message):
        make(tmp_path / "x")


def test_scalars_leave_out_what_is_not_a_number():
    row = {"step": 1, "layer": "a", "batch": 3, "mu": math.inf, "z": math.nan, "gap": 0.5, "status": "ok"}
    assert scalars([row]) == {"lipschitz_batch/a": 3.0, "lipschitz_gap/a": 0.5}
    assert scalars([row], columns=["gap"]) == {"lipschitz_gap/a": 0.5}
