"""Lists the configs that come with the package, and describes one.

vtp configs                 names, what each is for, and its switches
vtp configs demo            one, with all that its file says: settings, switches, numbers
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence

from vtp_jax.setup import cli, shipped

WIDTH = 100  # columns, where the terminal has as many, or there is none


def overview() -> Iterator[str]:
    """The lines of the list: a paragraph for each config."""
    width = min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH)
    wrap = textwrap.TextWrapper(width, initial_indent="    ", subsequent_indent="    ").wrap
    for name, path in shipped.names().items():
        yield name
        yield from wrap(shipped.about(path))
        if found := shipped.switches(path):
            yield from wrap(f"switches: {', '.join(found)}")
        yield ""
    use = "vtp train --config NAME, or with switches, NAME:a,b; vtp configs NAME says all of one"
    yield from textwrap.wrap(f"Use: {use}", width)


def main(argv: Sequence[str]) -> None:
    parser = cli.parser("configs", __doc__)
    parser.add_argument("name", nargs="?", help="of a config; without it, all are listed")
    args = cli.parse_alone(parser, argv)
    if args.name is None:
        return print("\n".join(overview()))
    path = cli.choose("vtp configs", "config", args.name.partition(":")[0], shipped.names())
    print(f"{shipped.docstring(path)}\n\nfile: {path}")


if __name__ == "__main__":
    cli.run(main)
