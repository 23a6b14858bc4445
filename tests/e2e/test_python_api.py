"""The Python API under plain Trainers, where LLaMA-Factory cannot be imported: what is trained is what was planned."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from llamafactory_adaptive import (
    attach_adapter,
    calibration_batches,
    check_adapter,
    lora_config,
    plan_ranks,
    rank_search,
    score_modules,
)
from llamafactory_adaptive.adapter.lora import keep_4bit_unpacked_on_cpu, live_layers
from llamafactory_adaptive.errors import AdaptiveConfigError, GuardError, PlanError
from llamafactory_adaptive.ranks.allocation import Bounds, allocate
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers import search_job
from tests.helpers.commands import BIN, run
from tests.helpers.lora import saved_parameters
from tests.helpers.tiny import rows, save_tiny, tiny_model, tiny_tokenizer


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_host(monkeypatch):
    monkeypatch.setitem(sys.modules, "llamafactory", None)
    with pytest.raises(ImportError):
        import llamafactory  # noqa: F401


def arguments(folder, **more):
    return TrainingArguments(
        str(folder), **{"max_steps": 12, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none",
                        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, **more}
    )  # fmt: skip


def trained(trainer_class, model, folder, resume=None, **more):
    trainer = trainer_class(model=model, args=arguments(folder, **more), train_dataset=rows(24),
                            data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()))  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder))
    return trainer


def logits(model):
    (batch,) = calibration_batches(rows(3, seed=7))
    with torch.no_grad():
        return model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def assert_equal_in_plain_peft(live, folder, **sizes):
    plain = PeftModel.from_pretrained(tiny_model(**sizes), folder)
    assert torch.allclose(logits(plain), logits(live), atol=1e-5)
    assert not torch.allclose(logits(plain), logits(tiny_model(**sizes)), atol=1e-3), "the adapter has an effect"


# -- before training -------------------------------------------------------------------------------------------------


def test_a_static_plan_is_what_a_plain_trainer_trains_and_saves(tmp_path):
    batches = calibration_batches(rows(8), batch_size=3)
    scores = score_modules(tiny_model(), batches, transform="log")
    plan = plan_ranks(scores, lora_rank=4)
    values = scores.score().values
    costs = [shape.parameters_per_rank for shape in scores.shapes]
    bounds = Bounds(costs, 4 * sum(costs), [1] * 14, [16] * 14)
    expected = allocate([values[s.name] for s in scores.shapes], bounds).ranks
    assert tuple(plan.ranks().values()) == expected

    model = attach_adapter(tiny_model(), plan)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == plan.budget()["used_parameters"] <= plan.budget()["asked_parameters"] == 4 * sum(costs)
    trained(Trainer, model, tmp_path, max_steps=4)
    assert check_adapter(tmp_path, plan) == 0
    assert saved_parameters(tmp_path) == trainable
    assert_equal_in_plain_peft(model, tmp_path)
    plan.save(str(tmp_path / "plan.json"))
    assert check_adapter(str(tmp_path), tmp_path / "plan.json") == 0
    assert f"{trainable:,} of {4 * sum(costs):,}" in plan.table()


def test_other_ranks_than_planned_are_refused(tmp_path):
    scores = score_modules(tiny_model(), calibration_batches(rows(4)))
    attach_adapter(tiny_model(), plan_ranks(scores, 4)).save_pretrained(tmp_path)
    with pytest.raises(GuardError, match="does not match the plan"):
        check_adapter(tmp_path, plan_ranks(scores, 5))
    with pytest.raises(AdaptiveConfigError, match="the plan does not fit it"):
        attach_adapter(nn.Sequential(nn.Linear(2, 2)), plan_ranks(scores, 4))
    with pytest.raises(GuardError, match="is planned but has no adapter"):
        attach_adapter(tiny_model(num_hidden_layers=1), plan_ranks(scores, 4))


def test_names_are_complete_also_where_a_trainer_attaches_the_adapter(tmp_path):
    """21 targets, all of them: PEFT shortens them to seven suffixes in its own config."""
    model = tiny_model(num_hidden_layers=3)
    plan = plan_ranks(score_modules(model, [], method="random", seed=3), lora_rank=4)
    peft_model = get_peft_model(model, lora_config(plan, lora_dropout=0.1))
    assert len(peft_model.peft_config["default"].target_modules) == 7
    peft_model.save_pretrained(tmp_path)
    assert check_adapter(tmp_path, plan) == 21
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (sorted(saved["target_modules"]), saved["lora_dropout"]) == (sorted(plan.ranks()), 0.1)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_all_linear_means_what_it_means_to_peft(architecture):
    theirs = get_peft_model(tiny_model(architecture), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    ours = score_modules(tiny_model(architecture), [], method="uniform").shapes
    assert {shape.name for shape in ours} == set(live_layers(theirs))


def test_targets_by_suffix_and_by_full_name_keep_the_order_of_the_model():
    names = ["v_proj", "model.layers.1.self_attn.q_proj"]
    shapes = score_modules(tiny_model(), [], method="uniform", target_modules=names).shapes
    assert [shape.name for shape in shapes] == [
        "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
    ]  # fmt: skip


class Odd(nn.Module):
    """A decoder with a signature of its own."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_model()

    def forward(self, tokens, visible):
        return self.inner(input_ids=tokens, attention_mask=visible).logits


@pytest.mark.parametrize("weighting", ["none", "gradient"])
def test_a_given_forward_runs_models_of_another_signature(weighting):
    batches, chosen = calibration_batches(rows(6), batch_size=2), {"weighting": weighting}
    targets = {"target_modules": ["q_proj", "down_proj"]}
    plain = score_modules(tiny_model(), batches, **targets, **chosen)
    odd = score_modules(Odd(), batches, forward=lambda model, batch: model(batch.input_ids, batch.attention_mask),
                        **targets, **chosen)  # fmt: skip
    assert [f"inner.{name}" for name in plain.statistics] == list(odd.statistics)
    for name, value in plain.statistics.items():
        assert torch.allclose(odd.statistics[f"inner.{name}"], value, rtol=1e-6)


# -- while training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [("igu", {"interval": 2}), ("igu", {"interval": 2, "importance": "integrated"}), ("adalora", {"interval": 2}),
     ("tsq", {"sampling": False})],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_a_search_ends_within_budget_in_plain_lora(method, options, tmp_path):
    search = rank_search(tiny_model(), method=method, lora_rank=4, **options)
    start = search.plan.ranks()
    trained(search.trainer(Trainer), search.model, tmp_path)
    plan = search.finalize(tmp_path)
    budget = plan.budget()
    assert 0.9 * budget["asked_parameters"] < budget["used_parameters"] <= budget["asked_parameters"]
    assert plan.ranks() != start
    assert saved_parameters(tmp_path) == budget["used_parameters"]
    assert check_adapter(tmp_path, plan) == 0
    assert load_plan(tmp_path / "adaptive_rank_plan.json").ranks() == plan.ranks()
    assert_equal_in_plain_peft(search.model, tmp_path)
    assert search.callback.guard.counters.allocations > 1


def test_folder_of_the_adapter_may_be_another_than_that_of_the_run(tmp_path):
    search = rank_search(tiny_model(), lora_rank=4, interval=2)
    trainer = trained(search.trainer(Trainer), search.model, tmp_path / "run")
    trainer.save_model(str(tmp_path / "kept"))
    search.finalize(tmp_path / "kept")
    assert {"adaptive_rank_plan.json", "adaptive_ranks.png", "README.md"} <= set(os.listdir(tmp_path / "kept"))
    with pytest.raises(GuardError, match="no adapter was saved"):
        search.finalize(tmp_path / "nowhere")


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 5


def test_a_resumed_search_ends_as_one_that_was_never_stopped(tmp_path):
    settings = {"lora_rank": 4, "interval": 2, "seed": 3}
    uninterrupted = rank_search(tiny_model(), **settings)
    trained(uninterrupted.trainer(Trainer), uninterrupted.model, tmp_path / "uninterrupted")

    stopped = rank_search(tiny_model(), **settings)
    trainer = stopped.trainer(Trainer)(
        model=stopped.model, args=arguments(tmp_path / "run", save_strategy="steps", save_steps=5),
        train_dataset=rows(24), data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()), callbacks=[StopAt()],
    )  # fmt: skip
    trainer.train()
    resumed = rank_search(tiny_model(), **settings)
    trained(resumed.trainer(Trainer), resumed.model, tmp_path / "run", resume=True)
    assert resumed.finalize(tmp_path / "run").ranks() == uninterrupted.finalize(tmp_path / "uninterrupted").ranks()
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("uninterrupted", "run"))
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)

    other = rank_search(tiny_model(), **{**settings, "lora_rank": 3})
    with pytest.raises(PlanError, match="lora_rank is 4 there and 3 here"):
        trained(other.trainer(Trainer), other.model, tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-5"))


def test_what_a_search_cannot_go_along_with_is_refused_before_training(tmp_path):
    def refused(**given):
        search = rank_search(tiny_model(), lora_rank=4)
        model = given.pop("model", search.model)
        with pytest.raises(AdaptiveConfigError) as caught:
            search.trainer(Trainer)(model=model, args=arguments(tmp_path, **given))
        return {problem.key: problem.suggestion for problem in caught.value.problems}

    assert refused(model=tiny_model()) == {"model": "model=search.model"}
    assert refused(torch_compile=True) == {"torch_compile": "torch_compile=False"}

    search = rank_search(tiny_model(), lora_rank=4)
    with pytest.raises(GuardError, match="the search has not ended"):
        search.finalize(tmp_path)
    search.trainer(Trainer)(model=search.model, args=arguments(tmp_path))
    with pytest.raises(GuardError, match="the search has not ended"):
        search.finalize(tmp_path)
    with pytest.raises(AdaptiveConfigError, match="this search has a Trainer already"):
        search.trainer(Trainer)(model=search.model, args=arguments(tmp_path))


# -- several processes, and a 4-bit base -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.repeats
def test_two_processes_of_torchrun_end_with_the_same_checked_adapter(tmp_path):
    """DDP on gloo, each process with half of every batch."""
    out, script = tmp_path / "out", search_job.__file__
    run(BIN / "torchrun", "--nproc-per-node", "2", "--master-port", "29551", script, out, 2, PYTHONPATH=str(ROOT))
    first, second = (json.loads((out / f"process_{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert (first["untrained"], first["processes"]) == (0, 2)
    assert len(set(first["ranks"].values())) > 1
    assert check_adapter(out, out / "adaptive_rank_plan.json") == 0


def four_bit_model(folder):
    loading = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=loading, dtype=torch.float32)


def test_a_4bit_base_is_scored_planned_and_searched(tmp_path):
    base = save_tiny(tmp_path / "base")
    plan = plan_ranks(score_modules(four_bit_model(base), calibration_batches(rows(8))), lora_rank=4)
    model = attach_adapter(four_bit_model(base), plan)
    trained(Trainer, model, tmp_path / "planned", max_steps=4)
    search = rank_search(four_bit_model(base), lora_rank=4, interval=2)
    trained(search.trainer(Trainer), search.model, tmp_path / "searched")
    found = search.finalize(tmp_path / "searched")
    for live, folder, ranks in ((model, "planned", plan), (search.model, "searched", found)):
        assert check_adapter(tmp_path / folder, ranks) == 0
        assert len(set(ranks.ranks().values())) > 1
        plain = PeftModel.from_pretrained(four_bit_model(base), tmp_path / folder)
        keep_4bit_unpacked_on_cpu(plain)
        assert torch.allclose(logits(plain), logits(live), atol=1e-5)
