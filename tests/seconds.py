"""CPU seconds of the suite: what each test took, which tests share a worker, and in which order.

A pytest plugin, loaded by tests/conftest.py. It counts CPU seconds, child processes included, which
other programs on the machine change less than wall-clock time. docs/testing.md has the budget.
"""

from __future__ import annotations

import re
import resource
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

SLOWEST = 20
LARGE = 60  # CPU seconds of a run that is worth a summary
BUDGET = 15  # CPU seconds of fast tests for each method, see docs/testing.md
CACHE = "vtp_jax/seconds"  # by unit, of the last run: .pytest_cache/v/vtp_jax/seconds
LAWS = "tests/methods/test_laws.py"
# What takes longest, for a checkout without a record of its own: a fresh clone, CI.
FIRST = (
    "tests/test_every_config.py",
    "tests/test_train.py",
    "tests/convert/test_convert.py",
    "tests/tasks/test_retrieve.py",
    "tests/tasks/test_classify.py",
    "tests/tasks/test_every_base.py",
    "tests/torch/test_pytorch_simvtp.py",
    "tests/nn/test_transformer.py",
    "tests/test_demo.py",
    "tests/test_every_tiny.py",
    "tests/test_old_runs.py",
    "tests/data/test_pipeline.py",
)


def clock() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(x.ru_utime + x.ru_stime for x in used)


def unit(nodeid: str) -> str:
    """What one worker runs as a whole, since its tests share what they compile: all tests of a
    method, or else a file."""
    name = method(nodeid)
    return f"tests/methods[{name}]" if name else nodeid.partition("::")[0]


def method(nodeid: str) -> str | None:
    """The method whose budget a test counts against; VideoMAE V2 has a case and shares VideoMAE's
    files."""
    file, _, test = nodeid.partition("::")
    if file == LAWS:
        found = re.search(r"\[(\w+)", test)
    else:
        found = re.match(r"tests/methods/test_(\w+?)(?:_golden)?\.py", file)
    return found[1] if found else None


class Seconds:
    """In a worker, measures; in the main process, adds up and prints."""

    def __init__(self) -> None:
        self.before = clock()
        self.tests: Counter[str] = Counter()
        self.whole = 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item):
        report = yield
        now = clock()
        report.user_properties.append(("cpu", now - self.before))
        self.before = now
        return report

    def pytest_runtest_logstart(self) -> None:
        self.before = clock()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests[report.nodeid] += dict(report.user_properties).get("cpu", 0.0)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        self.whole += getattr(node, "workeroutput", {}).get("cpu", 0.0)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["cpu"] = clock()
        elif whole_units(session.config) and (cache := getattr(session.config, "cache", None)):
            cache.set(CACHE, {**cache.get(CACHE, {}), **total(self.tests, unit)})

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.tests.total() < LARGE:
            return
        whole = self.whole or clock()
        write = terminalreporter.write_line
        terminalreporter.section("CPU seconds")
        for name, took in self.tests.most_common(SLOWEST):
            write(f"{took:7.1f}  {name}")
        for title, key in (("folder", folder), (f"method (budget {BUDGET})", method)):
            write(f"by {title}:")
            for name, took in total(self.tests, key).most_common():
                write(f"{took:7.1f}  {name}")
        tests = self.tests.total()
        write(f"in all {whole:.0f}, of which imports and collection {whole - tests:.0f}")


def whole_units(config: pytest.Config) -> bool:
    """Whether a run took all fast tests of the files that it was given: a part of a unit is no
    measure of it."""
    named = [arg for arg in config.args if "::" in arg]
    return not named and not config.option.keyword and "not slow" in config.option.markexpr


def total(tests: Counter[str], key) -> Counter[str]:
    found: Counter[str] = Counter()
    for nodeid, took in tests.items():
        if name := key(nodeid):
            found[name] += took
    return found


def folder(nodeid: str) -> str:
    return str(Path(nodeid.partition("::")[0]).parent)


def order(items: list[pytest.Item], known: dict[str, float]) -> Iterable[pytest.Item]:
    """Units that took longest in the last run first, so that workers end together; unknown ones
    before them. Without a record: those in FIRST, then the others as collected."""
    default = float("inf") if known else 0.0
    known = known or {name: len(FIRST) - place for place, name in enumerate(FIRST)}
    return sorted(items, key=lambda item: -known.get(unit(item.nodeid), default))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Seconds())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cache = getattr(config, "cache", None)  # absent with -p no:cacheprovider
    items[:] = order(items, cache.get(CACHE, {}) if cache else {})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler.loadfile import LoadFileScheduling

    class ByUnit(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit(nodeid)

    return ByUnit(config, log)
