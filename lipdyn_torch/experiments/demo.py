"""The demonstration: a real network trained on real images, with its Lipschitz bound explained."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from lipdyn_torch.errors import LipdynError, RunFolderExistsError
from lipdyn_torch.experiments.data import Images, digits
from lipdyn_torch.experiments.models import ConvNet
from lipdyn_torch.experiments.store import make_folder, read_document
from lipdyn_torch.history import NETWORK, History, JsonLinesSink, Row, json_ready
from lipdyn_torch.monitor import LipschitzMonitor
from lipdyn_torch.predict import pathwise, sde

__all__ = ["DemoConfig", "DemoResult", "DivergedError", "report", "run_demo"]

HISTORY, FIGURE, SUMMARY = "history.jsonl", "figure.png", "summary.json"
ABOUT = (
    "The paper's five-layer ConvNet, fitted to one channel and 8 x 8 pixels,\n"
    "on scikit-learn's 1,797 scanned digits, by plain SGD. K is the product of the layers' matrix norms,\n"
    "a convolution counting as its reshaped kernel."
)


class DivergedError(LipdynError, ArithmeticError):
    """Training left the finite numbers; the rows up to there are kept."""


@dataclass(frozen=True)
class DemoConfig:
    """Settings of a run; the defaults take about a minute on two CPU cores."""

    steps: int = 500
    batch_size: int = 64
    lr: float = 0.02
    seed: int = 0
    out: Path = Path("lipdyn-demo")
    device: str = "cpu"
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name, low in (("steps", 2), ("batch_size", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"expected {name} of at least {low}, got {getattr(self, name)}")
        if not (self.lr > 0 and np.isfinite(self.lr)):
            raise ValueError(f"expected a positive finite lr, got {self.lr}")
        check_seed(self.seed)


@dataclass(frozen=True)
class DemoResult:
    """What a run measured. Logarithms are natural; errors are of log K.

    ``drift``, ``curvature`` and ``noise`` are what mu, kappa and -lambda^2/2 add to log K over the run, and
    ``remainder`` is what is left of the observed change.
    """

    test_accuracy: float
    k_start: float
    k_end: float
    drift: float
    curvature: float
    noise: float
    remainder: float
    errors: dict[str, dict[str, float]]  # predictor: {"largest": absolute, "final": signed}
    flagged_steps: int
    history: History


def run_demo(config: DemoConfig) -> DemoResult:
    """Train, write the run folder, and return what was measured.

    Raises
    ------
    RunFolderExistsError
        ``config.out`` holds an earlier run and ``config.overwrite`` is off, or it holds something else.
    DivergedError
        The loss or the weights are not finite.
    """
    check_device(config.device)
    images = digits()
    if config.batch_size > len(images.train_x):
        raise ValueError(f"expected batch_size up to {len(images.train_x)}, got {config.batch_size}")
    folder = prepare_folder(config.out, config.overwrite)
    save_summary(folder, config)  # the mark of a folder of this command, also of a run that is not finished
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = ConvNet(channels=1, size=8).to(config.device)
    history = train(model, images, config, JsonLinesSink(folder / HISTORY))
    accuracy = model.accuracy(images.test_x.to(config.device), images.test_y.to(config.device))
    result = summarise(history, accuracy)
    save(result, config, folder)
    return result


def train(model: ConvNet, images: Images, config: DemoConfig, sink: JsonLinesSink) -> History:
    """Plain SGD on the cross-entropy, monitored in every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    loader = images.batches(config.batch_size, config.seed)
    bar = tqdm(total=config.steps, desc="training", unit="step", disable=not config.progress)
    size = len(images.train_x)
    with bar, LipschitzMonitor(model, optimizer, dataset_size=size, sinks=[sink]) as monitor:
        for step, (x, y) in enumerate(itertools.islice(_endless(loader), config.steps)):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x.to(config.device)), y.to(config.device))
            loss.backward()
            optimizer.step()
            check_finite(step, loss, model, config)
            bar.set_postfix(K=f"{np.exp(monitor.log_k):.3f}", loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    return monitor.history


def _endless(loader: DataLoader) -> Iterator[list[torch.Tensor]]:
    while True:
        yield from loader


def summarise(history: History, accuracy: float) -> DemoResult:
    """The numbers of the table."""
    rows = history.to_pandas()
    network = rows[rows["layer"] == NETWORK]
    layers = rows[rows["layer"] != NETWORK]
    z = network["z"].iloc[0], network["z"].iloc[-1] + network["dz"].iloc[-1]
    drift = float((network["lr"] * network["mu"]).sum(skipna=False))
    curvature = float((network["lr"] * network["kappa"]).sum(skipna=False))
    noise = -float((layers["lr"] * layers["lambda_sq"]).sum(skipna=False)) / 2
    predictions = [sde(history), *(pathwise(history, order) for order in (1, 2, 3))]
    return DemoResult(
        test_accuracy=accuracy,
        k_start=float(np.exp(z[0])),
        k_end=float(np.exp(z[1])),
        drift=drift,
        curvature=curvature,
        noise=noise,
        remainder=float(z[1] - z[0]) - drift - curvature - noise,
        errors={p.name: {"largest": p.max_error, "final": p.final_error} for p in predictions},
        flagged_steps=int((network["status"] != "ok").sum()),
        history=history,
    )


def report(result: DemoResult) -> str:
    """The table the command prints."""
    change = np.log(result.k_end / result.k_start)
    lines = [
        ABOUT,
        "",
        f"test accuracy           {100 * result.test_accuracy:8.2f} %",
        f"K at start              {result.k_start:8.4f}",
        f"K at end                {result.k_end:8.4f}   (log K changed by {change:+.4f})",
        "",
        "what moved log K           sum      share of the change",
    ]
    names = {"drift": "drift", "curvature": "noise curvature", "noise": "noise, -lambda^2/2"}
    for key, name in {**names, "remainder": "not in the SDE"}.items():
        value = getattr(result, key)
        share = f"{100 * value / change:+8.3f} %" if abs(change) > 1e-12 else "       -"
        lines.append(f"  {name:<20} {value:+9.5f}   {share}")
    lines += ["", "error of log K            largest        final"]
    for name, error in result.errors.items():
        lines.append(f"  {name:<20} {error['largest']:10.3e}   {error['final']:+10.3e}")
    if result.flagged_steps:
        lines += ["", f"steps with a remark   {result.flagged_steps}", *remarks(result.history)]
    return "\n".join(lines)


def remarks(history: History) -> list[str]:
    """A line for every kind of remark, the most frequent first; remarks that differ in numbers only are of one kind."""
    kinds: dict[str, list[Row]] = {}
    for row in history:
        if row["layer"] != NETWORK and row["status"] != "ok":
            kinds.setdefault(re.sub(r"\d[\d.e+-]*", "N", row["status"]), []).append(row)
    lines = []
    for kind, rows in sorted(kinds.items(), key=lambda item: -len(item[1])):
        steps, layers = ({row[key] for row in rows} for key in ("step", "layer"))
        lines.append(f"  {len(steps)} steps, {len(layers)} layers: {kind}")
    return lines


def prepare_folder(path: Path, overwrite: bool) -> Path:
    """Make the run folder; with ``overwrite`` only the files of an earlier run are removed from it."""
    if not make_folder(path):
        if not _is_run(path):
            raise RunFolderExistsError(
                f"expected a new or empty output folder, got {path}, which holds something else; choose another --out"
            )
        if not overwrite:
            raise RunFolderExistsError(
                f"expected a new or empty output folder, got {path}, which holds an earlier run; "
                "choose another --out or add --overwrite"
            )
        for name in (HISTORY, FIGURE, SUMMARY):
            (path / name).unlink(missing_ok=True)
    return path


def _is_run(folder: Path) -> bool:
    """Whether the demo made it: histories and figures are in folders of one's own training runs too."""
    return read_document(folder / SUMMARY).keys() == {"settings", "result"}


def save(result: DemoResult, config: DemoConfig, folder: Path) -> None:
    """Figure and summary; the history has been written during the run."""
    from lipdyn_torch.plots import summary_figure

    summary_figure(result.history).savefig(folder / FIGURE, dpi=200)
    save_summary(folder, config, {key: value for key, value in vars(result).items() if key != "history"})


def save_summary(folder: Path, config: DemoConfig, result: dict[str, Any] | None = None) -> None:
    """The settings, and the numbers of the table once they are there."""
    document = {"settings": {**asdict(config), "out": str(config.out)}, "result": json_ready(result)}
    (folder / SUMMARY).write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def check_finite(step: int, loss: torch.Tensor, model: ConvNet, config: DemoConfig) -> None:
    """Raise as soon as training cannot come back."""
    if not math.isfinite(loss.item()):
        what = "the loss is"
    elif not all(bool(p.isfinite().all()) for p in model.parameters()):
        what = "the weights are"
    else:
        return
    raise DivergedError(
        f"training diverged at step {step}: {what} not finite; lower --lr, now {config.lr:g} "
        f"(the rows up to there are in {config.out / HISTORY})"
    )


def check_device(name: str) -> None:
    try:
        float(torch.ones(1, device=name).sum())
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"expected a device torch can use here, got {name!r} ({reason}); try cpu") from error


def check_seed(seed: int) -> None:
    """Raise unless all the libraries take it."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"expected a seed from 0 to {2**32 - 1}, got {seed}")
