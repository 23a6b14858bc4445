"""Where a run's plan comes from, through a host of a few lines: no LLaMA-Factory, no model."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from llamafactory_adaptive.config.run_config import AdaptiveConfig, CalibrationConfig
from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import PLAN_FILE, STATE_JSON
from llamafactory_adaptive.methods import get_method
from llamafactory_adaptive.planning.cache import CACHE_ENV
from llamafactory_adaptive.planning.sources import PlanSource, advice, fresh_plan, obtain_plan
from llamafactory_adaptive.ranks.plan import ModuleShape
from llamafactory_adaptive.ranks.search_config import GivenRanksConfig, PruningConfig


SHAPES = [ModuleShape(f"model.layers.{i}.mlp.{kind}", 16, 16) for i in range(3) for kind in ("up_proj", "down_proj")]


def configured(method="sensitivity", **more):
    options = dataclasses.asdict(get_method(method).Options())
    kept = AdaptiveConfig(method, options, "params", 4, 8.0, 1, 16, None, CalibrationConfig(None, 8, 2, 0))
    return dataclasses.replace(kept, **more)


IGU = configured("igu", search=PruningConfig(8, 0.1, 0.7, 2, None, 0))


class Host:
    """All that planning asks of a program that trains."""

    shapes, given_keys = SHAPES, ()
    checkpoint = adapter = None

    def __init__(self, base="models/a", **more):
        self.identity = {"model": base}
        self.provenance = {"base_model": base, "architecture": "Llama", "seed": 1}
        self.measured = 0
        vars(self).update(more)

    def measure(self, measurement, path):
        """Later modules have larger inputs, so that they are worth more."""
        self.measured += 1
        facts = {"seconds": "0.1", "tokens": "10", "samples": "2", "rows_sha256": "0"}
        save_file({shape.name: torch.full((16,), 1.0 + 3 * i) for i, shape in enumerate(SHAPES)}, path, metadata=facts)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def saved(folder, config=None, **more):
    """A folder with the plan that a run of ``config`` trained."""
    folder.mkdir()
    fresh_plan(config or configured(), Host(**more)).plan.save(folder / PLAN_FILE)
    return folder


def ranks(source):
    return [module.rank for module in source.plan.modules]


def test_a_run_is_scored_once_and_then_finds_its_plan():
    host = Host()
    first, second = fresh_plan(configured(), host), fresh_plan(configured(), host)
    assert (first.origin, second.origin, host.measured) == ("scored", "re-used", 1)
    assert ranks(first) == ranks(second)
    assert sum(ranks(first)) == 4 * len(SHAPES)
    assert ranks(first)[-1] > ranks(first)[0]


def test_another_model_or_budget_is_another_plan_but_scores_hold_for_every_budget():
    host = Host()
    fresh_plan(configured(), host)
    assert sum(ranks(fresh_plan(configured(lora_rank=6), host))) == 6 * len(SHAPES)
    assert host.measured == 1, "scores do not depend on the budget"
    other = Host(base="models/b")
    assert fresh_plan(configured(), other).origin == "scored"
    assert other.measured == 1


def test_a_search_starts_at_its_own_rank_and_measures_nothing():
    host = Host()
    source = fresh_plan(IGU, host)
    assert (source.origin, set(ranks(source)), host.measured) == ("started", {8}, 0)


def test_a_given_plan_is_used_as_it_is_and_says_what_it_was_made_for(tmp_path, caplog):
    path = saved(tmp_path / "given", base="models/a") / PLAN_FILE
    host = Host(base="models/b", given_keys=["adaptive_plan", "adaptive_min_rank"])
    host.provenance = {**host.provenance, "architecture": "Qwen2"}
    with caplog.at_level("WARNING", logger="llamafactory.adaptive"):
        source = fresh_plan(configured(plan_path=str(path)), host)
    assert source.origin == "given"
    assert ranks(source) == [module["rank"] for module in json.loads(path.read_text())["modules"]]
    assert source.plan.provenance["base_model"] == "models/b"
    assert source.plan.provenance["planned_for"]["base_model"] == "models/a"
    said = caplog.text
    assert "these keys are not used: adaptive_min_rank" in said
    assert "found on another architecture" in said


def test_resuming_takes_the_plan_of_the_checkpoint_whatever_lies_in_the_cache(tmp_path):
    checkpoint = saved(tmp_path / "checkpoint-2")
    assert obtain_plan(configured(), Host(checkpoint=checkpoint)).origin == "resumed"
    went_on = Host(checkpoint=checkpoint, adapter=tmp_path / "adapter")
    assert obtain_plan(configured(), went_on).origin == "resumed"
    assert obtain_plan(configured(), Host(base="elsewhere/a", checkpoint=checkpoint)).origin == "resumed"


def test_a_checkpoint_of_another_model_or_other_settings_is_refused_by_key(tmp_path):
    checkpoint = saved(tmp_path / "checkpoint-2")
    with pytest.raises(PlanError, match="model_name_or_path is models/a there and models/b here"):
        obtain_plan(configured(), Host(base="models/b", checkpoint=checkpoint))
    with pytest.raises(PlanError, match="lora_rank is 4 there and 6 here"):
        obtain_plan(configured(lora_rank=6), Host(checkpoint=checkpoint))
    with pytest.raises(PlanError, match="overwrite_output_dir: true to start afresh"):
        obtain_plan(configured(), Host(checkpoint=tmp_path / "checkpoint-4"))


def test_going_on_with_an_adapter_takes_its_ranks(tmp_path):
    adapter = saved(tmp_path / "adapter")
    source = obtain_plan(configured("uniform"), Host(adapter=adapter))
    assert source.origin == "continued"
    assert len(set(ranks(source))) > 1
    with pytest.raises(PlanError, match="create_new_adapter: true"):
        obtain_plan(configured(), Host(adapter=tmp_path / "none"))
    (adapter / STATE_JSON).write_text("{}")
    with pytest.raises(PlanError, match="resume it"):
        obtain_plan(configured(), Host(adapter=adapter))


def test_a_given_plan_does_not_stand_beside_another_adapter_unheard(tmp_path):
    adapter = saved(tmp_path / "adapter")
    same = configured(plan_path=str(adapter / PLAN_FILE))
    assert obtain_plan(same, Host(adapter=adapter)).origin == "continued"
    other = saved(tmp_path / "other", configured("uniform"))
    with pytest.raises(PlanError, match=r"other/.*\.json has other ranks than .*adapter, .*leave adaptive_plan out"):
        obtain_plan(configured(plan_path=str(other / PLAN_FILE)), Host(adapter=adapter))


@pytest.mark.parametrize("init", ["default", "eva"])
def test_what_one_process_found_reaches_another_whole(init):
    source = obtain_plan(configured("uniform", init=init), Host())
    sent = PlanSource.from_json(json.loads(json.dumps(source.to_json())))
    assert (sent.plan.to_json(), sent.origin, sent.start) == (source.plan.to_json(), source.origin, source.start)
    assert (sent.start is None) == (init == "default")


# -- a given plan ----------------------------------------------------------------------------------------------------


def test_a_given_plan_beside_sample_selection_leaves_only_the_keys_of_the_search_unused(tmp_path, caplog):
    path = saved(tmp_path / "given") / PLAN_FILE
    host = Host(given_keys=["adaptive_plan", "adaptive_method", "tsq_temperature", "tsq_beta", "adaptive_init_rank"])
    with caplog.at_level("WARNING", logger="llamafactory.adaptive"):
        source = fresh_plan(configured("tsq", plan_path=str(path)), host)
    assert "these keys are not used: tsq_beta, adaptive_init_rank" in caplog.text
    noted = source.plan.provenance["sampling"]
    assert (noted["adaptive_method"], noted["tsq_temperature"]) == ("tsq", configured("tsq").options["temperature"])


@pytest.mark.parametrize(
    ("second_stage", "idle"),
    [("triplet", "igu_beta1, adaptive_interval"), ("lora", "igu_init, igu_beta1, adaptive_interval")],
)
def test_a_second_stage_says_which_keys_it_does_not_read(second_stage, idle, tmp_path, caplog):
    path = saved(tmp_path / "given") / PLAN_FILE
    keys = ["adaptive_plan", "adaptive_method", "igu_second_stage", "igu_init", "igu_beta1", "adaptive_interval"]
    options = dataclasses.asdict(get_method("igu").Options(second_stage=second_stage, orthogonality_weight=0.5))
    given = GivenRanksConfig(3) if second_stage == "triplet" else None
    config = configured("igu", options=options, plan_path=str(path), given=given)
    with caplog.at_level("WARNING", logger="llamafactory.adaptive"):
        plan = fresh_plan(config, Host(given_keys=keys)).plan
    assert f"these keys are not used: {idle}\n" in caplog.text
    noted = plan.provenance.get("second_stage")
    if second_stage == "lora":
        assert noted is None
    else:
        assert noted == {"adaptive_method": "igu", "igu_second_stage": "triplet", "igu_variant": "corrected",
                         "igu_init": "lora", "igu_orthogonality": "off_diagonal", "igu_orthogonality_weight": 0.5,
                         "igu_orthogonality_scale": "relative"}  # fmt: skip


def test_what_the_run_of_a_given_plan_noted_of_itself_is_not_passed_on(tmp_path):
    path = saved(tmp_path / "given") / PLAN_FILE
    config = configured("igu", plan_path=str(path), given=GivenRanksConfig(3))
    second = tmp_path / "second.json"
    fresh_plan(config, Host()).plan.save(second)
    assert "second_stage" not in fresh_plan(configured(plan_path=str(second)), Host()).plan.provenance


def test_a_search_that_is_resumed_starts_from_its_own_live_ranks(tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    fresh_plan(IGU, Host()).plan.save(checkpoint / PLAN_FILE)
    source = obtain_plan(IGU, Host(checkpoint=checkpoint))
    assert (source.origin, set(ranks(source))) == ("resumed", {8})
    wider = [ModuleShape(shape.name, 32, 16) for shape in SHAPES]
    with pytest.raises(PlanError, match="up_proj is 16x16 in the plan, 32x16 in the model"):
        obtain_plan(IGU, Host(checkpoint=checkpoint, shapes=wider))


def test_a_checkpoint_of_a_version_that_noted_the_plans_model_is_resumed_with_a_word(tmp_path, caplog):
    checkpoint = saved(tmp_path / "checkpoint-2")
    document = json.loads((checkpoint / PLAN_FILE).read_text())
    given = tmp_path / "given.json"
    given.write_text(json.dumps(document))
    document["provenance"]["adaptive_plan"] = str(given)
    (checkpoint / PLAN_FILE).write_text(json.dumps(document))
    with caplog.at_level("WARNING", logger="llamafactory.adaptive"):
        source = obtain_plan(configured(plan_path=str(given)), Host(base="models/b", checkpoint=checkpoint))
    assert source.origin == "resumed"
    assert "noted models/a, the model its plan was made for" in caplog.text


def test_a_base_that_was_moved_is_the_same_by_its_name_and_a_link_by_where_it_leads(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    checkpoint = saved(tmp_path / "checkpoint-2", base=str(tmp_path / "real"))
    for base in (f"{tmp_path}/link", "elsewhere/real/"):
        assert obtain_plan(configured(), Host(base=base, checkpoint=checkpoint)).origin == "resumed"


def test_what_concentrates_ranks_is_told_with_the_methods_own_remedy():
    class Steep(Host):
        def measure(self, measurement, path):
            facts = {"seconds": "0.1", "tokens": "10", "samples": "2", "rows_sha256": "0"}
            tensors = {s.name: torch.full((16,), 1e6 if i == 0 else 1.0) for i, s in enumerate(self.shapes)}
            save_file(tensors, path, metadata=facts)

    shapes = [ModuleShape(f"model.layers.{i}.mlp.up_proj", 16, 16) for i in range(20)]
    as_published = {**configured().options, "transform": "none"}
    config = configured(lora_rank=2, options=as_published)
    plan = fresh_plan(config, Steep(shapes=shapes)).plan
    (said,) = advice(plan, config)
    assert get_method("sensitivity").concentration_advice in said
    assert advice(dataclasses.replace(plan, method="of a package that is gone"), config) == []
    assert advice(fresh_plan(configured("uniform"), Host()).plan, configured("uniform")) == []
