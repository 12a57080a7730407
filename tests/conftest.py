"""What holds for all tests: markers that ask the machine, no skip unnoticed under QCOWFUSE_NO_SKIPS=1, and --part."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support import container, measured, qemu

# How long an example takes says something of the machine, and nothing of the code.
settings.register_profile("qcowfuse", deadline=None)
settings.load_profile("qcowfuse")

DECLARED_SKIPS = (container.LACKS, container.FORBIDS, container.OLDER_KERNEL, qemu.LACKS)
"""Parts of skip reasons that do not fail under QCOWFUSE_NO_SKIPS=1: what a container, an old kernel or an old
QEMU lacks, and what a system forbids."""

# A shell that starts the tests in the background has them ignore SIGINT, and what they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

NO_SKIPS = os.environ.get("QCOWFUSE_NO_SKIPS") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    choices = ("measured", "unmeasured")
    parser.addoption("--part", choices=choices, help="the tests that scripts/coverage measures, or all others")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.getoption("--part") != "unmeasured":
        return None
    return measured.is_measured_whole(collection_path.relative_to(config.rootpath).as_posix()) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (part := config.getoption("--part")) is None:
        return
    left_out = [item for item in items if measured.is_measured(item.nodeid) != (part == "measured")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if measured.is_measured(item.nodeid) == (part == "measured")]


def _missing_for_mounts() -> str:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "needs /dev/fuse, readable and writable"
    return "" if shutil.which("fusermount3") else "needs fusermount3"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs to be root")
    if item.get_closest_marker("mount") and (reason := _missing_for_mounts()):
        pytest.skip(reason)


def _refuse_undeclared_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not NO_SKIPS or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not any(part in reason for part in DECLARED_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"undeclared skip (QCOWFUSE_NO_SKIPS=1): {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_undeclared_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_undeclared_skip(report)
    return report
