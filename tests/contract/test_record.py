"""What every result of a benchmark says of how it came about."""

import json
import subprocess
from pathlib import Path

from tests.helpers.benchmarks import import_benchmarks


ROOT = Path(__file__).resolve().parents[2]


def test_a_result_names_the_commit_that_it_was_made_with(tmp_path, monkeypatch):
    record = import_benchmarks("record")["record"]
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    held = json.loads(record.write_result("x", {}).read_text())["source"]
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", "HEAD"], check=False).returncode
    if head.returncode:  # no checkout, or no Git
        assert held is None
    else:
        assert head.stdout.startswith(held.removesuffix("-dirty"))
        assert held.endswith("-dirty") == bool(changed)
