"""Lists the configs that come with the package, and describes one.

vtp configs                 names, what each is for, and its switches
vtp configs demo            one, with all that its file says: settings, switches, numbers
"""

from __future__ import annotations

from collections.abc import Sequence

from vtp_jax.run import metrics
from vtp_jax.setup import cli, shipped


def main(argv: Sequence[str]) -> None:
    parser = cli.parser("configs", __doc__)
    parser.add_argument("name", nargs="?", help="of a config; without it, all are listed")
    args = cli.parse_alone(parser, argv)
    known = shipped.names()
    if args.name:
        name = args.name.partition(":")[0]
        path = cli.choose("vtp configs", "config", name, known)
        return print(f"{shipped.docstring(path)}\n\nfile: {path}")
    rows = [
        (name, shipped.about(path), ", ".join(shipped.switches(path)))
        for name, path in known.items()
    ]
    metrics.print_table("configs", ("name", "what it is", "switches"), rows)
    print("Use one as `vtp train --config NAME`, or with switches, NAME:a,b; vtp configs NAME")


if __name__ == "__main__":
    cli.run(main)
