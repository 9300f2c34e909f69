"""Every config of the project, for tests that hold for all of them."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def config_files() -> list[str]:
    """All files of configs/ that define get_config, relative to the root."""
    files = sorted((ROOT / "configs").rglob("*.py"))
    return [
        str(f.relative_to(ROOT)) for f in files if "def get_config" in f.read_text(encoding="utf-8")
    ]


def switches(path: str) -> list[str]:
    """The switches a config knows: what it passes to parse_arg."""
    text = (ROOT / path).read_text(encoding="utf-8")
    found = re.search(r"parse_arg\(\s*arg, ([^)]*)\)", text)
    return re.findall(r'"(\w+)"', found[1]) if found else []


def tiny_configs() -> list[str]:
    return [f"{path}:tiny" for path in config_files()]
