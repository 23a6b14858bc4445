"""What each fault test shares: a place with reference runs, and the table of what was done and what came of it."""

import sys
from pathlib import Path

import pytest

from tests.faults.scene import Scene


ROOT = Path(__file__).parents[2]
_reports = []


@pytest.fixture(scope="session")
def scene(tmp_path_factory):
    """Models, data and uninterrupted runs to compare with."""
    return Scene(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def tell(record_property):
    """Note what was done to the program and what came of it; it ends in the table and in the results file."""

    def note(area, fault, outcome):
        record_property("fault", {"area": area, "fault": fault, "outcome": outcome})

    return note


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        _reports.append(report)


def _rows():
    for report in _reports:
        told = [value for name, value in report.user_properties if name == "fault"]
        name = report.nodeid.partition("::")[2]
        for row in told or [{"area": "", "fault": name, "outcome": "it did not get as far as that"}]:
            yield {**row, "test": name, "result": report.outcome}


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, "workerinput") or not _reports:
        return
    rows = sorted(_rows(), key=lambda row: (row["area"], row["test"]))
    terminalreporter.section("faults: what was done, and what came of it")
    for row in rows:
        terminalreporter.line(f"{row['result']:<7} {row['area']:<14} {row['fault']}: {row['outcome']}")
    if target := config.getoption("--faults-record"):
        sys.path.insert(0, str(ROOT / "benchmarks"))
        import record

        counts = {kind: sum(row["result"] == kind for row in rows) for kind in ("passed", "failed", "skipped")}
        rows = [{key: row[key] for key in ("area", "fault", "outcome", "result")} for row in rows]
        record.write_result(target, {"counts": counts, "faults": rows}, command="make faults")


def pytest_addoption(parser):
    parser.addoption("--faults-record", help="write the table to benchmarks/results/NAME.json")
