"""`lipdyn reproduce`: points of all chosen experiments run side by side, then tables, figures and a report."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lipdyn_torch.errors import LipdynError
from lipdyn_torch.experiments.cli import keep_freed_memory
from lipdyn_torch.experiments.demo import check_device, check_seed
from lipdyn_torch.experiments.registry import DATA, NAMES, PRESETS, Context, Experiment, Point, Row, Summary, find
from lipdyn_torch.experiments.store import RunFolder
from lipdyn_torch.integrations._extras import need

__all__ = ["Job", "PointFailedError", "ReproduceConfig", "processor", "reproduce", "run_point"]

Report = Callable[[int, int, Point], None]


class PointFailedError(LipdynError, RuntimeError):
    """Some points failed; all others are kept."""


@dataclass(frozen=True)
class ReproduceConfig:
    """Settings of the command."""

    name: str
    preset: str = "quick"
    data: str = "digits"
    root: str | None = None
    device: str = "cpu"
    jobs: int = 0
    out: Path | None = None
    seed: int = 0
    scheduler: str | None = None
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for label, value, known in (("a preset", self.preset, PRESETS), ("a data set", self.data, DATA)):
            if value not in known:
                raise ValueError(f"expected {label} of {', '.join(known)}, got {value!r}")
        if self.jobs < 0:
            raise ValueError(f"expected jobs of at least 1 (0: one per core), got {self.jobs}")
        check_seed(self.seed)
        if self.name != "all":
            find(self.name)

    @property
    def folder(self) -> Path:
        """Where results go."""
        return self.out or Path(f"lipdyn-{self.name}")

    @property
    def names(self) -> tuple[str, ...]:
        """The chosen experiments."""
        return NAMES if self.name == "all" else (self.name,)


@dataclass
class Job:
    """One experiment of the run: what to do, and what has been done."""

    experiment: Experiment
    context: Context
    folder: RunFolder
    points: list[Point]

    def missing(self) -> list[Point]:
        """Points that are still to be run."""
        return [point for point in self.points if point["id"] not in self.folder.finished]


def reproduce(config: ReproduceConfig) -> list[tuple[Job, Summary]]:
    """Run what is missing, write tables, figures and summaries, and return them.

    Raises
    ------
    RunFolderExistsError
        The folder belongs to something else.
    PointFailedError
        Some points failed. The others are recorded; running again tries only the failed ones.
    """
    from lipdyn_torch.experiments.data import load
    from lipdyn_torch.experiments.report import write_report, write_summary

    check_device(config.device)
    if config.scheduler is not None:
        check_scheduler(config.scheduler)  # before a folder is made
    load(config.data, config.root, progress=config.progress)  # once, before any worker asks; complains early
    if config.name == "all":
        RunFolder(config.folder, {"experiment": "all", **_settings(config)}, config.overwrite)
    jobs = [_job(find(name), config) for name in config.names]
    for job in jobs:
        if job.folder.set_aside is not None:
            print(
                f"{job.folder.path}: the end of the row file was damaged or unfinished; it is set aside as "
                f"{job.folder.set_aside.name}, {len(job.folder.finished)} finished points are kept",
                file=sys.stderr,
            )
    started = time.perf_counter()
    failures = _run_missing(jobs, config)
    elapsed = time.perf_counter() - started
    done = []
    for job in jobs:
        if not job.missing():
            summary = job.experiment.summarise(job.folder.rows([p["id"] for p in job.points]), job.context)
            job.folder.write("environment.json", json.dumps(environment(config, elapsed), indent=2) + "\n")
            write_summary(job, summary)
            done.append((job, summary))
    if config.name == "all" and done:
        write_report(config, done, environment(config, elapsed))
    if failures:
        lines = "\n".join(f"  {name}, point {point}: {reason}" for name, point, reason in failures)
        raise PointFailedError(f"{len(failures)} points failed; the others are kept, run again to retry:\n{lines}")
    return done


def run_point(name: str, point: Point, context: Context) -> list[Row]:
    """Run one point, here or on a worker: one thread, and random numbers that depend on nothing outside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            return find(name).run(point, context)
    finally:
        torch.set_num_threads(threads)


def environment(config: ReproduceConfig, elapsed: float) -> dict[str, Any]:
    """What the numbers were made with."""
    packages = ("specpert", "torch", "numpy", "scipy", "pandas", "matplotlib", "scikit-learn", "kornia", "dask")
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    machine = {"system": platform.platform(), "processor": processor(), "cores": _cores()}
    if config.device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name(config.device)
    run = {"device": config.device, "jobs": config.jobs or _cores(), "seconds_of_this_call": round(elapsed, 1)}
    return {"python": platform.python_version(), "packages": versions, **machine, **run}


def _settings(config: ReproduceConfig) -> dict[str, Any]:
    """What decides the rows; the number of workers and the place of the files do not."""
    return {"preset": config.preset, "data": config.data, "device": config.device, "seed": config.seed}


def _job(experiment: Experiment, config: ReproduceConfig) -> Job:
    settings, parameters = _settings(config), experiment.presets[config.preset]
    context = Context(**settings, root=config.root, parameters=parameters)
    path = config.folder / experiment.name if config.name == "all" else config.folder
    document = {"experiment": experiment.name, **settings, "parameters": parameters}
    points = experiment.points(context)
    assert len({point["id"] for point in points}) == len(points), "two points with one id"
    return Job(experiment, context, RunFolder(path, document, config.overwrite), points)


def _run_missing(jobs: list[Job], config: ReproduceConfig) -> list[tuple[str, str, str]]:
    """Run every missing point; those that measure time come last, one by one, in this process."""
    together = [(job, point) for job in jobs if not job.experiment.alone for point in job.missing()]
    alone = [(job, point) for job in jobs if job.experiment.alone for point in job.missing()]
    failures: list[tuple[str, str, str]] = []
    total = sum(point["cost"] for _, point in (*together, *alone))
    # The bar runs over estimated work, not points: otherwise the time left would be nonsense.
    form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
    bar = tqdm(total=total, desc=config.name, bar_format=form, disable=not config.progress or total == 0)
    done, count = 0, len(together) + len(alone)
    with bar:
        for tasks, workers in ((together, config.jobs or _cores()), (alone, 1)):
            scheduler = config.scheduler if tasks is together else None
            for job, point, outcome in _outcomes(tasks, workers, scheduler):
                if isinstance(outcome, Exception):
                    failures.append((job.experiment.name, point["id"], f"{type(outcome).__name__}: {outcome}"))
                else:
                    job.folder.add(point["id"], outcome)
                done += 1
                bar.set_postfix_str(f"points {done}/{count}", refresh=False)
                bar.update(min(point["cost"], total - bar.n))  # rounding must not pass the end
    return failures


def _outcomes(
    tasks: list[tuple[Job, Point]], workers: int, scheduler: str | None
) -> Iterator[tuple[Job, Point, list[Row] | Exception]]:
    """Rows, or the exception, of every task as it is finished."""
    if scheduler is None and min(workers, len(tasks)) <= 1:
        for job, point in tasks:
            yield job, point, _attempt(job, point)
        return
    with _client(min(workers, len(tasks)), scheduler) as client:
        from distributed import as_completed

        futures = {}
        for job, point in sorted(tasks, key=lambda task: -task[1]["cost"]):  # the long ones first: no idle tail
            future = client.submit(run_point, job.experiment.name, point, job.context, pure=False)
            futures[future] = (job, point)
        for future in as_completed(list(futures)):
            job, point = futures.pop(future)
            error = future.exception()
            yield job, point, error if isinstance(error, Exception) else future.result()
            future.release()


def _attempt(job: Job, point: Point) -> list[Row] | Exception:
    try:
        return run_point(job.experiment.name, point, job.context)
    except Exception as error:
        return error


def check_scheduler(address: str) -> None:
    """Raise unless a scheduler answers there."""
    distributed = need("distributed", "experiments")
    try:
        distributed.Client(address, timeout="10s").close()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected the address of a running dask scheduler, got {address!r} ({error}); "
            "start one with: dask scheduler"
        ) from error


@contextlib.contextmanager
def _client(workers: int, scheduler: str | None) -> Iterator[Any]:
    """A client of the given scheduler, or of a local cluster of single-threaded processes."""
    dask, distributed = need("dask", "experiments"), need("distributed", "experiments")
    if scheduler is not None:
        with distributed.Client(scheduler, timeout="10s") as client:
            yield client
        return
    quiet = {
        "distributed.worker.daemon": False,
        "distributed.admin.log-length": 0,
        "distributed.comm.timeouts.connect": "60s",
    }
    with dask.config.set(quiet), warnings.catch_warnings(), _one_thread():
        warnings.simplefilter("ignore")  # the dashboard's port may be taken; we do not need one
        with (
            distributed.LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                dashboard_address="127.0.0.1:0",
                memory_limit=0,
                silence_logs=50,
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            client.run(keep_freed_memory)
            yield client


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Worker processes inherit these: one thread each, whatever library counts them."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def processor() -> str:
    """The model's name where the system tells it."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def as_document(config: ReproduceConfig) -> dict[str, Any]:
    """The settings as plain values."""
    return {**asdict(config), "out": str(config.folder)}
