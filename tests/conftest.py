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
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_waits)


def _waits(item: pytest.Item) -> bool:
    return item.path.name == interpreted.TEST


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(map(_waits, session.items)) and not session.config.option.collectonly:
        session.config.stash[interpreted.Interpreted.KEY] = interpreted.Interpreted()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if beside := config.stash.get(interpreted.Interpreted.KEY, None):
        beside.end()
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    if os.environ.get("REDRAFTER_RECORD_SUITE") == "1" and exitstatus == 0 and whole:
        from tests.suite import record

        record(
            config.rootpath, time.perf_counter() - config.stash[STARTED], session.testscollected, config.option.markexpr
        )
