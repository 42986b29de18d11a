"""Tables as Markdown, figures as PNG and SVG, and one HTML page that needs no other file."""

from __future__ import annotations

import base64
import json
import math
from importlib import resources
from typing import TYPE_CHECKING, Any

from lipdyn_torch.experiments.registry import Claim, Summary, Table
from lipdyn_torch.integrations._extras import need

if TYPE_CHECKING:
    from lipdyn_torch.experiments.runner import Job, ReproduceConfig

__all__ = ["claims_table", "format_value", "markdown", "write_report", "write_summary"]


def format_value(value: Any) -> str:
    """Three significant digits for a float, everything else as it is.

    Examples
    --------
    >>> [format_value(x) for x in (1234.5, 0.123456, 1.5e-7, float("nan"), 12, "k")]
    ['1234', '0.123', '1.50e-07', '–', '12', 'k']
    """
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "–"
    size = abs(value)
    if size == 0 or 0.001 <= size < 1e5:
        return f"{value:.3g}" if size < 1000 else f"{value:.0f}"
    return f"{value:.2e}"


def markdown(job: Job, summary: Summary) -> str:
    """The summary of one experiment."""
    data = summary.data or job.context.data
    settings = f"preset {job.context.preset}, data {data}, device {job.context.device}, seed {job.context.seed}"
    parts = [f"# {job.experiment.name}: {job.experiment.title}", f"`{settings}`"]
    parts += [_markdown_table(table) for table in summary.tables]
    if summary.claims:
        parts.append(_markdown_table(claims_table(summary.claims)))
    parts += [f"*{note}*" for note in summary.notes]
    parts += [f"![{name}]({name}.png)" for name in summary.figures]
    return "\n\n".join(parts) + "\n"


def claims_table(claims: list[Claim]) -> Table:
    """Claims of the paper and what was measured."""
    return Table(
        "Claims of the paper", ["claim", "measured here", "verdict"], [[c.text, c.measured, c.verdict] for c in claims]
    )


def _markdown_table(table: Table) -> str:
    cells = [list(table.columns), *([format_value(v) for v in row] for row in table.rows)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(table.columns))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    note = f"\n\n{table.note}" if table.note else ""
    return f"**{table.title}**\n\n" + "\n".join(lines) + note


def write_summary(job: Job, summary: Summary) -> None:
    """``summary.md`` and every figure as PNG and SVG."""
    from lipdyn_torch.experiments.figures import style

    with style():
        for name, figure in summary.figures.items():
            figure.savefig(job.folder.path / f"{name}.png", dpi=160)
            figure.savefig(job.folder.path / f"{name}.svg", metadata={"Date": None})
    job.folder.write("summary.md", markdown(job, summary))


def write_report(config: ReproduceConfig, done: list[tuple[Job, Summary]], environment: dict[str, Any]) -> None:
    """``report.html`` and ``summary.md`` of a run of all experiments."""
    jinja2 = need("jinja2", "experiments")
    claims = [claim for _, summary in done for claim in summary.claims]
    source = resources.files("lipdyn_torch.experiments").joinpath("report.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    sections = []
    for job, summary in done:
        images = {
            name: base64.b64encode((job.folder.path / f"{name}.png").read_bytes()).decode() for name in summary.figures
        }
        sections.append({"job": job, "summary": summary, "images": images})
    page = template.render(
        sections=sections,
        claims=claims,
        claims_table=claims_table(claims),
        config=config,
        environment=json.dumps(environment, indent=2),
        show=format_value,
    )
    (config.folder / "report.html").write_text(page, encoding="utf-8")
    parts = [
        "# All experiments",
        _markdown_table(claims_table(claims)),
        *(markdown(job, s).replace("](", f"]({job.experiment.name}/") for job, s in done),
    ]
    (config.folder / "summary.md").write_text("\n\n".join(parts), encoding="utf-8")
