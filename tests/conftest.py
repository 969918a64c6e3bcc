"""One thread a process, since two run beside each other; on the CPU; no look-ups on a hub."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # `make test-gpu` gives one
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import faulthandler

import pytest
from hypothesis import settings

from tests.progress import watched

settings.register_profile("any load", deadline=None)  # a busy machine is not a fault
settings.load_profile("any load")

SLOWEST = 0.25
"""Largest share of the suite's processor time that one test may take, with fixtures it is first to
ask for. A test over it holds back all that come after it in the last minutes of a run."""
WHOLE_SUITE = 1000
"""Tests, from which on shares are held."""
LONGEST_FIRST = ("study/test_demo", "distributed/test_ranks", "distributed/test_jobs", "study",
                 "training", "judging")  # fmt: skip
"""Modules that keep one process busy for long are not to be the last ones."""

running = ""


def pytest_collection_modifyitems(items):
    def place(item):
        found = [i for i, name in enumerate(LONGEST_FIRST) if f"tests/{name}" in item.nodeid]
        return found[0] if found else len(LONGEST_FIRST)

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """End this process where a test hangs; pytest or xdist then names the test."""

    def end(why: str) -> None:
        os.write(session.config.uncaptured, f"\n{why}\n".encode())
        faulthandler.dump_traceback(file=session.config.uncaptured)
        os._exit(1)

    with watched(lambda: running, end):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    global running
    running = item.nodeid
    yielded = yield
    running = ""
    return yielded


class Account:
    """Processor time by test, and failures said as they come."""

    def __init__(self, reporter) -> None:
        self.reporter, self.seconds, self.over = reporter, {}, []

    def pytest_runtest_logreport(self, report):
        spent = self.seconds.get(report.nodeid, 0.0) + getattr(report, "processor_seconds", 0.0)
        self.seconds[report.nodeid] = spent
        if report.failed:
            # A command's message is on its standard error; the traceback says SystemExit only.
            lasts = [
                part.strip().splitlines()[-1:] for part in (str(report.longrepr), report.capstderr)
            ]
            said = " | ".join(line for last in lasts for line in last)
            self.reporter.write_line(f"\nFAILED {report.nodeid} {said}", red=True)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        limit = SLOWEST * sum(self.seconds.values())
        if len(self.seconds) >= WHOLE_SUITE:
            self.over = [name for name, spent in self.seconds.items() if spent > limit]
        if self.over and session.exitstatus == 0:
            session.exitstatus = 1

    def pytest_terminal_summary(self, terminalreporter):
        whole = sum(self.seconds.values())
        terminalreporter.write_line(f"{whole:.0f} s of processor time")
        for name in self.over:
            terminalreporter.write_line(
                f"FAILED {name} takes {self.seconds[name]:.1f} s of processor time, over "
                f"{SLOWEST:.0%} of the suite's: split it, or share what it starts", red=True,
            )  # fmt: skip


@pytest.hookimpl(trylast=True)  # once there is a reporter
def pytest_configure(config):
    config.uncaptured = os.dup(2)
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Account(reporter), "account")


def pytest_sessionstart(session):
    session.processor_seconds = sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    now = sum(os.times()[:4])
    report.processor_seconds = now - item.session.processor_seconds
    item.session.processor_seconds = now
    return report
