"""What holds for all tests."""

from __future__ import annotations

import signal
from collections.abc import Generator

import pytest

# A shell that starts the tests in the background has SIGINT and SIGQUIT ignored, and what the tests start would inherit
# that: runtimes hand ignored signals on to the container.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)

# With `--reruns` (as in .ci/run) a test that fails is tried again. That it passed then is no reason to look away: the
# summary shows each such failure in full, and more of them than this fail the run.
UNSTABLE = 5
_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note that a test failed."""
    report = yield
    item.stash[_FAILED] = report.failed or (report.when != "setup" and item.stash.get(_FAILED, False))
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """What a failed test left (in a daemon that tests share, say) is for no other one, nor for its second try."""
    if item.stash[_FAILED]:
        item.session._setupstate.teardown_exact(None)  # ends the fixtures of every scope; no public call does


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What failed at first."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.section(f"UNSTABLE: {report.nodeid} failed at first")
        terminalreporter.write_line(report.longreprtext)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Too many unstable tests are a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and len({report.nodeid for report in reporter.stats.get("rerun", [])}) > UNSTABLE:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
