"""What the API says in errors and warnings: by the names of its arguments, whoever raises them."""

import logging

import pytest
from transformers import Trainer

from llamafactory_adaptive import calibration_batches, plan_ranks, score_modules
from llamafactory_adaptive.api.settings import python_errors, python_words
from llamafactory_adaptive.errors import (
    AdaptiveConfigError,
    CalibrationError,
    GuardError,
    InfeasibleBudgetError,
    Problem,
)
from tests.helpers.searches import given_to, searching, trainer_of
from tests.helpers.tiny import rows, tiny_model


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("lower adaptive_min_rank or raise lora_rank", "lower min_rank or raise lora_rank"),
        ("adaptive_max_rank is 8 there; igu_intervals is 3", "max_rank is 8 there; intervals is 3"),
        ("set igu_importance: shrink, or bf16: true", "set importance='shrink', or bf16=True"),
        ("(adaptive_max_nonfinite_steps: 3 can be raised)", "(max_nonfinite_steps=3 can be raised)"),
        ("raise adaptive_calibration_samples.", "raise the number of rows."),
        ("out/adaptive_plan/adaptive_plan.json is no adaptive_rank_plan.json", None),
        ("adalora_beta1 is no option of this method", None),
    ],
)
def test_keys_become_arguments_and_names_of_files_stay(said, expected):
    assert python_words(said, "igu") == (said if expected is None else expected)


def test_errors_keep_their_type_and_place():
    with pytest.raises(CalibrationError, match=r"^lower min_rank$") as caught, python_errors("igu"):
        raise CalibrationError("lower adaptive_min_rank")
    assert caught.traceback[-1].name == "test_errors_keep_their_type_and_place"
    with pytest.raises(AdaptiveConfigError) as caught, python_errors("igu"):
        raise AdaptiveConfigError([Problem("igu_intervals", 0, "too few", "igu_intervals: 3")])
    assert str(caught.value) == "intervals: 0 is invalid: too few; try intervals=3"


def test_bounds_above_the_budget_are_told_by_argument():
    given = {"lora_rank": 1, "budget_unit": "ranks", "min_rank": 1, "max_rank": 1}
    scores = score_modules(tiny_model(), [], "uniform")
    assert set(plan_ranks(scores, **given).ranks().values()) == {1}
    with pytest.raises((InfeasibleBudgetError, AdaptiveConfigError)) as caught:
        plan_ranks(scores, **{**given, "min_rank": 2, "max_rank": 2})
    assert "min_rank" in str(caught.value)
    assert "adaptive_" not in str(caught.value)


def test_a_run_that_diverges_names_the_argument_that_bears_more(tmp_path):
    class Diverging(Trainer):
        def compute_loss(self, *given, **named):
            return super().compute_loss(*given, **named) * float("nan")

    search = searching(max_nonfinite_steps=1)
    with pytest.raises(GuardError, match=r"\(max_nonfinite_steps=1 can be raised to bear more\)"):
        trainer_of(search, tmp_path, trainer_class=Diverging).train()


def test_a_short_run_is_warned_of_by_argument(tmp_path, caplog):
    search = searching(warmup_ratio=0.0, final_ratio=0.0, interval=6)
    with caplog.at_level(logging.WARNING, logger="llamafactory.adaptive"):
        trainer_of(search, tmp_path, max_steps=12).train()
    assert "set interval=1" in caplog.text
    assert "adaptive_" not in caplog.text


def test_a_trainer_of_another_class_is_told_how_to_build_it(tmp_path):
    search = searching()
    plain = Trainer(**given_to(search, tmp_path), callbacks=[search.callback])
    with pytest.raises(GuardError, match=r"build the Trainer with search\.trainer\(TrainerClass\)"):
        plain.train()


@pytest.mark.parametrize("there", [True, False])
def test_resuming_from_nowhere_is_refused_in_one_message(tmp_path, there):
    folder = tmp_path / "out"
    trainer = trainer_of(searching(), folder)
    if not there:
        folder.rmdir()  # the Trainer has made it
    with pytest.raises(AdaptiveConfigError, match=r"out\) holds no checkpoint; try leaving it out"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("setting", "suggestion"),
    [
        ({"fp16": True}, "bf16=True"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "importance='shrink'"),
        ({"label_smoothing_factor": 0.1}, "importance='shrink'"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_extra_passes_refuse_what_they_cannot_go_with(tmp_path, setting, suggestion):
    class WithSetting(Trainer):  # after the Trainer has begun: no GPU, no DeepSpeed
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            vars(self.args).update(setting)

    with pytest.raises(AdaptiveConfigError) as caught:
        trainer_of(searching(importance="integrated"), tmp_path, trainer_class=WithSetting)
    assert {problem.key: problem.suggestion for problem in caught.value.problems} == {next(iter(setting)): suggestion}
    trainer_of(searching(), tmp_path, trainer_class=WithSetting)


def test_batches_are_looked_at_even_by_methods_that_measure_nothing():
    assert score_modules(tiny_model(), [], "uniform").statistics == {}
    assert score_modules(tiny_model(), calibration_batches(rows(2)), "random").facts["calibration_samples"] == 2
    assert len(score_modules(tiny_model(), [], "srlora").statistics) == 14, "weights alone are looked at"
    with pytest.raises(AdaptiveConfigError, match="calibration_batches"):
        score_modules(tiny_model(), [{"input_ids": [1]}], "uniform")


def test_an_option_of_given_ranks_is_refused_where_ranks_are_searched_for():
    with pytest.raises(AdaptiveConfigError) as caught:
        searching(second_stage="lora")
    said = "only runs of LLaMA-Factory on given ranks read it; try leaving second_stage out"
    assert str(caught.value) == f"second_stage: 'lora' is invalid: {said}"
