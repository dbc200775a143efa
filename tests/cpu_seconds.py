"""A plugin of pytest: which tests and files take most CPU time, which other programs hardly change (`make slowest`)."""

import os
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

SHOWN = 30


def spent() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    return sum(os.times()[:4])


class CpuSeconds:
    """Adds to each report what its phase has taken: setting up, with fixtures, the test, or tearing down."""

    def __init__(self) -> None:
        self.before = spent()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        self.before = spent()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, Any, Any]:
        report = yield
        now = spent()
        report.cpu_seconds, self.before = now - self.before, now
        return report


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(CpuSeconds())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    tests: Counter[str] = Counter()
    for report in [report for reports in terminalreporter.stats.values() for report in reports]:
        if hasattr(report, "cpu_seconds"):
            tests[report.nodeid] += report.cpu_seconds
    files: Counter[str] = Counter()
    for name, seconds in tests.items():
        files[name.partition("::")[0]] += seconds
    for kind, found in (("tests", tests), ("files", files)):
        terminalreporter.section(f"{SHOWN} dearest {kind}, of {tests.total():.0f} CPU seconds")
        for name, seconds in found.most_common(SHOWN):
            terminalreporter.line(f"{seconds:8.2f}  {name}")
