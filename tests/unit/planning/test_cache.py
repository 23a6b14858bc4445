"""Plans and statistics that are kept, and lost."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from llamafactory_adaptive.calibration.input_moments import InputSecondMoments
from llamafactory_adaptive.config.placement import Placement
from llamafactory_adaptive.config.run_config import AdaptiveConfig, CalibrationConfig
from llamafactory_adaptive.errors import CalibrationError, OutputError
from llamafactory_adaptive.files import usable_entry
from llamafactory_adaptive.planning.cache import (
    PlanRequest,
    keep_plan,
    keep_statistics,
    read_statistics,
    statistics_path,
)
from llamafactory_adaptive.ranks.plan import ModuleShape
from tests.helpers.plans import make_plan


def test_a_full_cache_loses_no_plan(tmp_path, monkeypatch, caplog):
    def full(path, text):
        raise OutputError(f"{path} cannot be written (No space left on device)")

    monkeypatch.setattr("llamafactory_adaptive.ranks.plan.write_atomically", full)
    with caplog.at_level("WARNING", "llamafactory.adaptive"):
        keep_plan(make_plan(), tmp_path / "plans" / "plan.json")
    assert "the plan is not kept for later runs" in caplog.text


SHAPES = [ModuleShape(f"m{i}", 4, 4) for i in range(3)]


def save(path, **tensors):
    named = {shape.name: torch.ones(4) for shape in SHAPES} | tensors
    save_file(
        named,
        path,
        metadata={
            "tokens": "12",
            "samples": "3",
            "rows_sha256": "abc",
            "seconds": "1.5",
            "peak_memory": '{"host": 7}',
        },
    )
    return path


def test_statistics_come_back_with_what_was_noted_of_them(tmp_path):
    tensors, facts = read_statistics(save(tmp_path / "x", m1=torch.arange(4.0)), SHAPES)
    assert tensors["m1"].tolist() == [0, 1, 2, 3]
    assert facts == {"calibration_tokens": 12, "calibration_samples": 3, "calibration_rows_sha256": "abc",
                     "calibration_seconds": 1.5, "calibration_peak_memory": {"host": 7}}  # fmt: skip


def test_statistics_of_another_model_or_with_what_is_no_number_are_refused(tmp_path):
    with pytest.raises(CalibrationError, match=r"do not fit this model .*; delete the file"):
        read_statistics(save(tmp_path / "x"), [*SHAPES, ModuleShape("m9", 4, 4)])
    spoiled = torch.tensor([1.0, float("inf")])
    with pytest.raises(CalibrationError, match=r"hold NaN or infinity for m0 \(and 1 more\); delete the file"):
        read_statistics(save(tmp_path / "y", m0=spoiled, m2=spoiled.clone()), SHAPES)


def test_a_full_cache_loses_no_statistics(tmp_path, caplog):
    fresh = save(tmp_path / "fresh")
    with caplog.at_level("WARNING", "llamafactory.adaptive"):
        keep_statistics(fresh, tmp_path / "no folder" / "kept")
    assert "the scores are not kept for later runs" in caplog.text
    (tmp_path / "cache").mkdir()
    keep_statistics(fresh, tmp_path / "cache" / "kept")
    assert usable_entry(tmp_path / "cache" / "kept")
    assert (tmp_path / "cache" / "kept").read_bytes() == fresh.read_bytes()


def test_requests_that_measure_the_same_share_statistics_and_those_that_ask_the_same_a_plan():
    calibration = CalibrationConfig(None, 8, 2, 0)
    config = AdaptiveConfig("sensitivity", {}, "params", 4, 8.0, 1, 16, None, calibration)

    def paths(identity="a", **change):
        request = PlanRequest(dataclasses.replace(config, **change), {"model": identity}, {})
        return request.plan_path(), statistics_path(request, InputSecondMoments())

    plan, statistics = paths()
    for change in ({"max_nonfinite_steps": 9}, {"placement": Placement("own", "sequential", "cpu=1GB", "x")}):
        assert paths(**change) == (plan, statistics), "it changes no rank"
    for change in ({"lora_rank": 8}, {"calibration": dataclasses.replace(calibration, batch_size=4)}):
        other_plan, same_statistics = paths(**change)
        assert other_plan != plan
        assert same_statistics == statistics
    for change in ({"identity": "b"}, {"calibration": dataclasses.replace(calibration, samples=9)}):
        assert not set(paths(**change)) & {plan, statistics}


def test_plans_of_earlier_versions_are_found():
    calibration = CalibrationConfig("alpaca", 128, 8, 42)
    options = {"mode": "sra", "transform": "none"}
    config = AdaptiveConfig("sensitivity", options, "params", 4, 8.0, 1, 16, None, calibration)
    # Recorded from the version before asked_alpha, best_model_from and given were fields.
    recorded = "0d69cf634060c0609c1e591877e67b6b5bd2d267b47d3472d1f29f96d81b8612"
    assert PlanRequest(config, {"model": "m"}, {}).digest() == recorded
    assert PlanRequest(dataclasses.replace(config, best_model_from="start"), {"model": "m"}, {}).digest() == recorded
