"""Write docs/reproduction.md from runs of `lipdyn reproduce`: python docs/reproduction.py RUN [RUN ...]

Each RUN is the folder of one run, of all experiments or of one. Tables, verdicts and figures are copied as the run
wrote them; nothing is computed or typed in here. The words before them are in docs/reproduction.head.md.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

DOCS = Path(__file__).parent
IMAGES = DOCS / "images" / "reproduction"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    options = parser.parse_args()
    shutil.rmtree(IMAGES, ignore_errors=True)
    IMAGES.mkdir(parents=True)
    parts = [(DOCS / "reproduction.head.md").read_text().rstrip()]
    parts += [section(run) for run in options.runs]
    (DOCS / "reproduction.md").write_text("\n\n".join(parts) + "\n")


def section(run: Path) -> str:
    """One run: its command and machine, and its summary one heading level down."""
    environment = json.loads(next(run.glob("**/environment.json")).read_text())
    config = json.loads((run / "config.json").read_text())
    every = (run / "report.html").exists()
    name = "all" if every else config["experiment"]
    packages = ", ".join(f"{k} {v}" for k, v in environment["packages"].items())
    summary = re.sub(r"^# (.*)$", r"### \1", (run / "summary.md").read_text(), flags=re.MULTILINE)

    def copied(match: re.Match[str]) -> str:
        source = run / match[2]
        target = IMAGES / f"{run.name}-{match[2].replace('/', '-')}"
        shutil.copyfile(source, target)
        return f"![{match[1]}]({target.relative_to(DOCS)})"

    summary = re.sub(r"!\[(.*?)\]\((.*?)\)", copied, summary)
    minutes = environment["seconds_of_this_call"] / 60
    return "\n\n".join(
        [
            f"## `lipdyn reproduce {name} --preset {config['preset']}`",
            f"{minutes:.1f} minutes with up to {environment['jobs']} processes on {environment.get('processor', '')} "
            f"({environment.get('cores', '?')} cores), Python {environment['python']}, {packages}.",
            summary.strip(),
        ]
    )


if __name__ == "__main__":
    main()
