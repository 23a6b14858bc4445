"""Where the start of the factors comes from: measured once, kept, recorded in the plan; not for trained factors."""

import dataclasses

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llamafactory_adaptive.adapter.eva import InputDirections
from llamafactory_adaptive.calibration.gradient_projections import GradientProjections
from llamafactory_adaptive.config.run_config import AdaptiveConfig, CalibrationConfig
from llamafactory_adaptive.errors import AdaptiveConfigError, CalibrationError, PlanError
from llamafactory_adaptive.files import PLAN_FILE
from llamafactory_adaptive.planning.cache import CACHE_ENV, PlanRequest
from llamafactory_adaptive.planning.sources import obtain_plan
from llamafactory_adaptive.planning.start_message import start_message
from llamafactory_adaptive.ranks.plan import ModuleShape, load_plan


SHAPES = [ModuleShape(f"model.layers.{i}.mlp.{kind}", 16, 16) for i in range(2) for kind in ("up_proj", "down_proj")]
FACTS = {"seconds": "0.1", "tokens": "10", "samples": "2", "rows_sha256": "0"}


def configured(init="eva", method="uniform", **more):
    kept = AdaptiveConfig(method, {}, "params", 4, 8.0, 1, 16, None, CalibrationConfig(None, 8, 2, 5), init=init)
    return dataclasses.replace(kept, **more)


class Host:
    """All that planning asks of a program that trains."""

    checkpoint, adapter, given_keys = None, None, ()

    def __init__(self, **more):
        self.shapes, self.identity = SHAPES, {"model": "a"}
        self.provenance = {"base_model": "a", "architecture": "Llama", "seed": 1}
        self.measured, self.value = [], 1.0
        vars(self).update(more)

    def measure(self, measurement, path):
        self.measured.append(measurement)
        rows = {shape.name: torch.full((measurement.rank, 16), self.value) for shape in self.shapes}
        save_file(rows, path, metadata=FACTS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize(
    ("init", "expected", "size"),
    [("eva", InputDirections(4), {}), ("gora", GradientProjections(4, 5), {"adaptive_init_gamma": 0.05})],
)
def test_a_start_is_measured_once_and_recorded_in_the_plan(init, expected, size):
    host = Host()
    first, second = obtain_plan(configured(init), host), obtain_plan(configured(init), host)
    assert host.measured == [expected]
    assert first.start.path == second.start.path
    with safe_open(first.start.path, framework="pt") as file:
        assert set(file.keys()) == {shape.name for shape in SHAPES}
    facts = first.plan.provenance["init"]
    assert facts == second.plan.provenance["init"]
    recorded = {"adaptive_init": init, "rank": 4, "calibration_samples": 2, "calibration_tokens": 10, **size}
    assert recorded.items() <= facts.items()
    assert facts["calibration"]["seed"] == 5


def test_without_one_nothing_is_measured_and_nothing_recorded():
    source = obtain_plan(configured("default"), host := Host())
    assert (source.start, host.measured) == (None, [])
    assert "init" not in source.plan.provenance
    assert start_message(configured("default")) == "uniform gives out the ranks at once; nothing is scored"


def test_what_changes_the_vectors_changes_the_file_and_ranks_are_planned_once_for_all_starts():
    def path(**change):
        return obtain_plan(configured(**change), Host(identity=change.pop("identity", {"model": "a"}))).start.path

    calibration = CalibrationConfig(None, 8, 2, 5)
    batches = dataclasses.replace(calibration, batch_size=3)
    seeds = dataclasses.replace(calibration, seed=6)
    paths = [path(), path(init="gora"), path(lora_rank=3), path(calibration=batches), path(calibration=seeds)]
    assert len(set(paths)) == 5
    assert path(init="gora", init_gamma=9.0) == paths[1], "the size is applied when the start is"
    digests = {PlanRequest(configured(init), {}, {}).digest() for init in ("default", "eva", "gora")}
    assert len(digests) == 1


def test_a_given_plan_has_the_start_of_its_run_not_of_its_making(tmp_path):
    source = obtain_plan(configured("eva"), Host())
    source.plan.save(path := tmp_path / "plan.json")
    given = obtain_plan(configured("default", plan_path=str(path)), Host())
    assert "init" not in given.plan.provenance
    again = obtain_plan(configured("gora", plan_path=str(path)), host := Host())
    assert again.plan.provenance["init"]["adaptive_init"] == "gora"
    assert host.measured == [GradientProjections(4, 5)]


def test_trained_factors_get_no_start_and_another_start_is_another_run(tmp_path):
    obtain_plan(configured("eva"), Host()).plan.save(tmp_path / "checkpoint-2" / PLAN_FILE)
    checkpoint, host = tmp_path / "checkpoint-2", Host(checkpoint=tmp_path / "checkpoint-2")
    resumed = obtain_plan(configured("eva"), host)
    assert (resumed.origin, resumed.start, host.measured) == ("resumed", None, [])
    for other in ("default", "gora"):
        with pytest.raises(PlanError, match=f"adaptive_init is eva there and {other} here"):
            obtain_plan(configured(other), host)
    on = obtain_plan(configured("default"), Host(adapter=checkpoint))
    assert (on.origin, on.start) == ("continued", None)
    assert "init" not in on.plan.provenance, "it starts from the adapter"


def test_runs_on_a_given_plan_are_compared_by_their_start_too(tmp_path):
    path = tmp_path / "plan.json"
    obtain_plan(configured("default"), Host()).plan.save(path)
    given = configured("gora", plan_path=str(path))
    obtain_plan(given, Host()).plan.save(tmp_path / "checkpoint-2" / PLAN_FILE)
    host = Host(checkpoint=tmp_path / "checkpoint-2")
    assert obtain_plan(given, host).origin == "resumed"
    with pytest.raises(PlanError, match=r"adaptive_init_gamma is 0\.05 there and 0\.1 here"):
        obtain_plan(dataclasses.replace(given, init_gamma=0.1), host)
    obtain_plan(
        dataclasses.replace(given, calibration=CalibrationConfig(None, 8, 4, 5)), host
    )  # a batch size may change
    with pytest.raises(PlanError, match="adaptive_calibration_samples is 8 there and 16 here"):
        obtain_plan(dataclasses.replace(given, calibration=CalibrationConfig(None, 16, 2, 5)), host)


def test_a_plan_of_before_starts_as_peft_does(tmp_path):
    plan = obtain_plan(configured("default"), Host()).plan
    plan.save(tmp_path / "checkpoint-2" / PLAN_FILE)
    assert "adaptive_init" not in str(load_plan(tmp_path / "checkpoint-2" / PLAN_FILE).to_json())
    assert obtain_plan(configured("default"), Host(checkpoint=tmp_path / "checkpoint-2")).origin == "resumed"


def test_keys_of_the_start_are_used_with_a_given_plan(tmp_path, caplog):
    obtain_plan(configured("default"), Host()).plan.save(path := tmp_path / "plan.json")
    keys = ["adaptive_plan", "adaptive_init", "adaptive_calibration_samples", "adaptive_min_rank"]
    with caplog.at_level("WARNING", "llamafactory.adaptive"):
        obtain_plan(configured("eva", plan_path=str(path)), Host(given_keys=keys))
    assert "these keys are not used: adaptive_min_rank" in caplog.text


def test_routed_experts_are_refused_before_anything_is_measured():
    experts = [ModuleShape(f"model.layers.0.mlp.experts.{i}.up_proj", 16, 16) for i in range(3)]
    host = Host(shapes=[*SHAPES, *experts])
    with pytest.raises(AdaptiveConfigError) as caught:
        obtain_plan(configured("eva"), host)
    said = "adaptive_init: 'eva' is invalid: lora_target has routed experts, model.layers.0.mlp.experts.0.up_proj"
    assert str(caught.value).startswith(f"{said} (and 2 more)")
    assert host.measured == []
    obtain_plan(configured("gora"), host)


def test_what_is_not_finite_is_not_kept():
    host = Host(value=float("nan"))
    with pytest.raises(CalibrationError, match="hold NaN or infinity"):
        obtain_plan(configured("eva"), host)
    host.value = 1.0
    assert obtain_plan(configured("eva"), host).start is not None


def test_the_message_says_what_the_start_takes():
    said = start_message(configured("gora"))
    assert said.startswith("uniform gives out the ranks at once; nothing is scored; what the factors start from "
                           "(adaptive_init: gora) is computed before training")  # fmt: skip
    assert "a backward pass over 8 rows" in said
