"""Shared by all tests: one thread, so that sums have one order, and the same examples in every run.

With REDRAFTER_RECORD_SUITE=1 a whole default run that passed writes its time as the figure ``suite_seconds``.
"""

from __future__ import annotations

import os
import time

import hypothesis
import pytest
import torch

from tests.kernels import interpreted

torch.set_num_threads(1)
# A failure must come back when the test is run again; new examples come with every change of a test.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")

STARTED = pytest.StashKey[float]()


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[STARTED] = time.perf_counter()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_waits)
    if _whole(config) and any(map(_waits, items)):
        items[:] = [item for item in items if not any(map(item.path.is_relative_to, interpreted.OTHERS))]


def _waits(item: pytest.Item) -> bool:
    return item.path.name == interpreted.TEST


def _whole(config: pytest.Config) -> bool:
    """Whether all tests were asked for."""
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(map(_waits, session.items)) and not session.config.option.collectonly:
        folders = interpreted.OTHERS if _whole(session.config) else []
        session.config.stash[interpreted.Interpreted.KEY] = interpreted.Interpreted(folders)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What the process beside said last."""
    if beside := config.stash.get(interpreted.Interpreted.KEY, None):
        terminalreporter.write_line(
            f"beside: {beside.report.rstrip().splitlines()[-1] if beside.report else 'cut off'}"
        )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if beside := config.stash.get(interpreted.Interpreted.KEY, None):
        beside.end()
    if os.environ.get("REDRAFTER_RECORD_SUITE") == "1" and exitstatus == 0 and _whole(config):
        from tests.suite import record

        record(
            config.rootpath, time.perf_counter() - config.stash[STARTED], session.testscollected, config.option.markexpr
        )
