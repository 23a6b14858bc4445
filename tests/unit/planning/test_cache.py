"""Plans and statistics that are kept, waited for, and lost."""

import pytest

from llamafactory_adaptive.errors import CalibrationError, OutputError
from llamafactory_adaptive.planning.cache import keep_plan, wait_for_plan
from tests.helpers.plans import make_plan


def test_waiting_for_a_plan_has_a_limit(tmp_path):
    with pytest.raises(CalibrationError, match=r"no plan appeared at .*never.json within 0.3 s"):
        wait_for_plan(tmp_path / "never.json", 0.3)


def test_a_full_cache_loses_no_plan_unless_others_wait_for_it(tmp_path, monkeypatch):
    def full(path, text):
        raise OutputError(f"{path} cannot be written (No space left on device)")

    monkeypatch.setattr("llamafactory_adaptive.ranks.plan.write_atomically", full)
    plan, path = make_plan(), tmp_path / "plans" / "plan.json"
    assert keep_plan(plan, path) is plan
    with pytest.raises(OutputError, match="No space left"):
        keep_plan(plan, path, others_wait=True)
