"""Writes a run's report: one HTML file of numbers, curves, pictures, timings and settings.

    vtp report --workdir RUN [--out FILE]

The file is self-contained: it opens from disk, without network or scripts. It is made of what a run
writes into its folder (evaluations.jsonl, metrics.jsonl, config.json, summary.json, parameters.txt
and pictures/index.json); what is absent is left out, and the report lists it. A number stands
beside the step, the set and the protocol that it is of; the head says how many steps are done.
"""

from __future__ import annotations

from collections.abc import Sequence

from etils import epath

from vtp_jax.run import paths
from vtp_jax.setup import cli
from vtp_jax.show import page, record


def write(
    workdir: paths.PathLike, out: paths.PathLike | None = None, label: str = ""
) -> epath.Path:
    """Writes the report of the run in `workdir` to `out` (WORKDIR/report.html); returns the path.

    label: a word or two shown next to the title, such as the name of an ablation. Raises UserError
    if there is no such folder, or a file in it is broken.
    """
    found = record.read(workdir)
    path = paths.path(out) if out else paths.path(workdir) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.page(found, label), encoding="utf-8")
    return path


def main(argv: Sequence[str]) -> None:
    parser = cli.parser("report", __doc__)
    parser.add_argument("--workdir", required=True, help="of the run")
    parser.add_argument("--out", help="the file to write; WORKDIR/report.html by default")
    args = cli.parse_alone(parser, argv)
    print(f"written to {write(args.workdir, args.out)}")


if __name__ == "__main__":
    cli.run(main)
