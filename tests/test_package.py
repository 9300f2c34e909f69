"""The package as it is installed: the command `vtp`, and configs found by their names."""

import ast
import re
import subprocess
import sys
import zipfile
from shutil import copy, copytree

import pytest

from tests.configs import ROOT, config_files
from vtp_jax import __main__ as vtp
from vtp_jax.setup import config, shipped
from vtp_jax.types import UserError


def entries():
    """Every module that runs a `main` of its own."""
    for path in (ROOT / "vtp_jax").rglob("*.py"):
        if re.search(r"^    cli\.run\(main\)$", path.read_text(encoding="utf-8"), re.M):
            yield ".".join(path.relative_to(ROOT / "vtp_jax").with_suffix("").parts)


def test_every_entry_is_a_command():
    assert sorted(vtp.ENTRIES.values()) == sorted([*entries(), "launch.__main__"])


def test_the_overview_imports_no_jax():
    code = "import sys; sys.modules['jax'] = None; from vtp_jax import __main__ as m; m.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in vtp.ENTRIES:
        first = ast.get_docstring(ast.parse(vtp.source(name).read_text())).splitlines()[0]
        assert re.search(rf"^  {name} +{re.escape(first)}$", done.stdout, re.M)


def test_the_remaining_arguments_go_to_the_entry():
    with pytest.raises(UserError, match="vtp train: .*required: --config, --workdir"):
        vtp.dispatch(["train"])
    with pytest.raises(UserError, match="no command 'setp'; did you mean 'step'"):
        vtp.dispatch(["bench", "setp"])
    with pytest.raises(UserError, match="^vtp: no entry 'trian'; did you mean 'train'"):
        vtp.dispatch(["trian", "--config", "x"])


def test_a_mistake_ends_the_command_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vtp", "report", "--workdir", "no/run"])
    with pytest.raises(SystemExit) as done:
        vtp.main()
    assert done.value.code == 2
    assert re.fullmatch(r"error: .*no/run.*\n", capsys.readouterr().err)


def test_configs_have_names(tmp_path, monkeypatch):
    assert [f"configs/{name}.py" for name in shipped.names()] == config_files()
    by_path = config.read(str(ROOT / "configs/simvtp/pretrain_webvid.py:tiny"))
    monkeypatch.chdir(tmp_path)
    assert config.read("simvtp/pretrain_webvid:tiny").to_dict() == by_path.to_dict()
    with pytest.raises(UserError, match="did you mean 'simvtp/pretrain_webvid'"):
        config.read("configs/simvtp/pretrain_webvid.py")


def test_a_users_config_can_extend_a_shipped_one(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(
        "from vtp_jax.setup import shipped\n"
        "from vtp_jax.setup.recipes import parse_arg\n\n"
        "def get_config(arg):\n"
        "    c = shipped.module('simvtp/pretrain_webvid').get_config('tiny')\n"
        "    c.steps = 3 if 'short' in parse_arg(arg, 'short') else 30\n"
        "    return c\n"
    )
    monkeypatch.chdir(tmp_path)
    found = config.read("mine.py:short")
    assert found.steps == 3 and found.method.name == "simvtp"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, folder)
    for name in ("vtp_jax", "configs", "tests", "launch"):
        copytree(ROOT / name, folder / name, ignore=lambda _, names: {"__pycache__", "golden"})
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (made,) = (folder / "dist").glob("*.whl")
    return made


def test_a_wheel_holds_one_package_with_configs_and_launchers_in_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        (info,) = {name.split("/")[0] for name in files if ".dist-info/" in name}
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert {name.split("/")[0] for name in files} == {"vtp_jax", info}
    carried = {name for name in files if name.startswith("vtp_jax/configs/")}
    assert carried == {f"vtp_jax/{path}" for path in config_files()}
    launchers = {name for name in files if name.startswith("vtp_jax/launch/")}
    assert launchers == {f"vtp_jax/launch/{p.name}" for p in (ROOT / "launch").glob("*.py")}
    assert "vtp = vtp_jax.__main__:main" in scripts


def test_an_installed_wheel_finds_its_configs_and_launchers(wheel, tmp_path):
    """Unpacked to a folder, used from another, with the checkout out of reach."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        f"import vtp_jax; assert vtp_jax.__file__.startswith({str(site)!r})\n"
        "from vtp_jax.setup import config\n"
        "for name in ('simvtp/pretrain_webvid:tiny', 'videomae_v2/finetune'):\n"
        "    print(config.read(name).method.name)\n"
    )
    environ = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=environ, capture_output=True, text=True
    )
    assert done.stdout.split("\n")[:2] == ["simvtp", "videomae"], done.stderr
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); from vtp_jax.__main__ import main; main()"
    )
    asked = [
        "launch",
        "slurm",
        "--config",
        "demo",
        "--workdir",
        "runs/x",
        "--nodes",
        "2",
        "--dry-run",
    ]
    done = subprocess.run([sys.executable, "-c", code, *asked], cwd=elsewhere, env=environ,
                          capture_output=True, text=True)  # fmt: skip
    assert "#SBATCH" in done.stdout, done.stderr
