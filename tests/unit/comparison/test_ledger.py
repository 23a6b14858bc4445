"""The ledger of a comparison."""

import json
import os

import pytest

from llamafactory_adaptive.comparison.ledger import Ledger
from llamafactory_adaptive.errors import AdaptiveConfigError


def test_results_are_kept_by_settings_whatever_their_order(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.result({"a": 1, "b": 2}, lambda: {"loss": 0.5}) == {"loss": 0.5}
    kept = Ledger(tmp_path / "ledger.jsonl")
    assert kept.result({"b": 2, "a": 1}, lambda: pytest.fail("it is known")) == {"loss": 0.5}
    assert ({"a": 1} in kept, {"a": 1, "b": 2} in kept) == (False, True)


def test_a_result_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    synced, ledger = [], Ledger(tmp_path / "ledger.jsonl")
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    ledger.add({"a": 1}, {"loss": 0.5})
    assert synced == [(tmp_path / "ledger.jsonl").stat().st_size]


@pytest.mark.parametrize("line", ["{", "[]", '"x"', '{"settings": {}}', '{"settings": 1, "result": {}}', "null"])
def test_lines_that_are_no_results_are_named_in_one_error(line, tmp_path):
    good = json.dumps({"settings": {"a": 1}, "result": {}})
    (tmp_path / "ledger.jsonl").write_text("\n".join([good, line, good, line, ""]))
    with pytest.raises(
        AdaptiveConfigError, match="something else than results of runs in line 2, line 4; try removing"
    ):
        Ledger(tmp_path / "ledger.jsonl")
