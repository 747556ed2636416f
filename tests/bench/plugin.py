"""A pytest plugin that counts the cases of a row and writes them, one JSON object a line, to ``BENCH_CASES``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


class _Cases:
    def __init__(self, path: Path) -> None:
        self._path = path

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        reason = ""
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash is not None else report.longreprtext.strip()
            reason = " ".join(said.split())[:300]
        self._tell(name=report.nodeid, outcome=report.outcome, seconds=report.duration, reason=reason)

    @pytest.hookimpl
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._tell(name=report.nodeid, outcome="failed", seconds=0.0, reason=str(report.longrepr).splitlines()[-1])
        elif report.skipped and isinstance(report.longrepr, tuple):
            self._tell(name=report.nodeid, outcome="skipped", seconds=0.0, reason=report.longrepr[2])

    def _tell(self, **case: object) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(case) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if path := os.environ.get("BENCH_CASES"):
        config.pluginmanager.register(_Cases(Path(path)))
