"""How refusals and lists of faults read."""

import pytest

from llamafactory_adaptive.errors import AdaptiveConfigError, Problem, first_of, refuse, refuse_all


def test_a_refusal_names_key_value_rule_and_a_value_to_try_and_keeps_its_cause():
    cause = ValueError("no number")
    with pytest.raises(AdaptiveConfigError) as caught:
        refuse("max_steps", "many", "must be a whole number", "max_steps: 100", cause=cause)
    assert str(caught.value) == "max_steps: 'many' is invalid: must be a whole number; try max_steps: 100"
    assert caught.value.__cause__ is cause


def test_all_problems_are_refused_at_once_and_none_is_no_refusal():
    refuse_all()
    problems = [Problem(key, 0, "must be above 0", f"{key}: 1") for key in ("a", "b")]
    with pytest.raises(AdaptiveConfigError) as caught:
        refuse_all(*problems)
    assert caught.value.problems == tuple(problems)
    assert str(caught.value).startswith("2 problems in the configuration:\n  1. a: 0 is invalid")


@pytest.mark.parametrize(
    ("count", "options", "text"),
    [
        (1, {}, "0"),
        (3, {}, "0; 1; 2"),
        (5, {}, "0; 1; 2 (and 2 more)"),
        (4, {"joint": ", "}, "0, 1, 2 (and 1 more)"),
        (3, {"most": 1}, "0 (and 2 more)"),
    ],
)
def test_a_list_of_faults_is_cut_with_the_number_of_the_rest(count, options, text):
    assert first_of([str(number) for number in range(count)], **options) == text
