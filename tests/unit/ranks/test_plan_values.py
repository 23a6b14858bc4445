"""Every reader of a plan's values: what it takes, and what it refuses by type and by range."""

import pytest

from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.ranks.plan_values import LARGEST, Values, shortened


HUGE = 10**400  # JSON's whole numbers have no largest one
GOOD = [
    (lambda v: v.integer("x", 1), 1, 1),
    (lambda v: v.integer("x", 0), 0, 0),
    (lambda v: v.integer("x", 1), LARGEST, LARGEST),
    (lambda v: v.number("x"), -2, -2.0),
    (lambda v: v.number("x"), 1e300, 1e300),
    (lambda v: v.number("x", 0.5), 3, 3.0),
    (lambda v: v.positive("x"), 1e-9, 1e-9),
    (lambda v: v.numbers("x"), {"a": 1, "b": -2.5}, {"a": 1.0, "b": -2.5}),
    (lambda v: v.method("x"), "my-method_2.0", "my-method_2.0"),
    (lambda v: v.method("x"), "m" * 100, "m" * 100),
    (lambda v: v.unit("x"), "params", "params"),
    (lambda v: v.unit("x"), "ranks", "ranks"),
    (lambda v: v.module_name("x"), "model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
    (lambda v: v.mapping("x"), {"a": [1]}, {"a": [1]}),
    (lambda v: v.sequence("x"), [1, "b"], [1, "b"]),
    (lambda v: v.part("x").integer("rank", 1), {"rank": 4}, 4),
]


@pytest.mark.parametrize(("read", "value", "expected"), GOOD)
def test_good_values_are_read(read, value, expected):
    answer = read(Values({"x": value}, "plan.json"))
    assert (answer, type(answer)) == (expected, type(expected))


INTEGER = f"a whole number of at least 1 and at most {LARGEST}"
MODULE = "the name of a module, words with dots between them"
METHOD = "a name of letters, digits, _ . and -"
WRONG = [
    *((lambda v: v.integer("x", 1), value, INTEGER) for value in (0, LARGEST + 1, HUGE, True, 2.0, "2", None, [2])),
    *((lambda v: v.number("x"), value, "a finite number")
      for value in (float("nan"), float("inf"), 1e301, -HUGE, False, "1", None)),
    (lambda v: v.number("x", 0.5), None, "a finite number"),
    *((lambda v: v.positive("x"), value, "a positive number") for value in (0.0, -1.5)),
    (lambda v: v.positive("x"), "1", "a finite number"),
    (lambda v: v.numbers("x"), [1.0], "a mapping"),
    *((lambda v: v.method("x"), value, METHOD) for value in ("", "m" * 101, "a b", "a/b", "é", "a\n", 3, None)),
    *((lambda v: v.unit("x"), value, "one of params, ranks") for value in ("bytes", "", None, 1)),
    *((lambda v: v.module_name("x"), value, MODULE) for value in ("", "a..b", "a b", ".a", 3, None)),
    *((lambda v: v.mapping("x"), value, "a mapping") for value in ([], "a", None, {1: 2})),
    *((lambda v: v.sequence("x"), value, "a list of at most 1,000,000 entries") for value in ({}, "a", (1,), None)),
]  # fmt: skip


@pytest.mark.parametrize(("read", "value", "allowed"), WRONG)
def test_wrong_types_and_values_out_of_range_are_refused(read, value, allowed):
    with pytest.raises(PlanError) as caught:
        read(Values({"x": value}, "plan.json"))
    assert str(caught.value) == f"plan.json has x {shortened(value)}; it must be {allowed}"


def test_a_wrong_number_of_many_is_named():
    with pytest.raises(PlanError, match=r"^plan.json has x trace 'high'; it must be a finite number$"):
        Values({"x": {"norm": 1, "trace": "high"}}, "plan.json").numbers("x")


def test_a_list_of_too_many_entries_is_refused(monkeypatch):
    monkeypatch.setattr("llamafactory_adaptive.ranks.plan_values.MOST_MODULES", 3)
    assert Values({"x": [1, 2, 3]}, "p").sequence("x") == [1, 2, 3]
    with pytest.raises(PlanError, match="it must be a list of at most 3 entries"):
        Values({"x": [1, 2, 3, 4]}, "p").sequence("x")


@pytest.mark.parametrize(
    "read",
    [
        lambda v: v.integer("x", 0),
        lambda v: v.number("x"),
        lambda v: v.positive("x"),
        lambda v: v.method("x"),
        lambda v: v.unit("x"),
        lambda v: v.module_name("x"),
        lambda v: v.sequence("x"),
        lambda v: v.part("x"),
    ],
)
def test_what_must_be_there_and_is_missing_is_named(read):
    with pytest.raises(PlanError, match=r"^plan.json is not a complete plan: x is missing$"):
        read(Values({"y": 1}, "plan.json"))


def test_what_may_be_missing_reads_as_its_default():
    values = Values({}, "plan.json")
    assert (values.number("x", 0.5), values.numbers("x"), values.mapping("x")) == (0.5, {}, {})


def test_parts_are_named_by_where_they_stand():
    with pytest.raises(PlanError, match=r"^plan.json: budget has unit 'bytes'; it must be one of params, ranks$"):
        Values({"budget": {"unit": "bytes"}}, "plan.json").part("budget").unit("unit")
    with pytest.raises(PlanError, match=r"^plan.json: budget is no mapping but a list$"):
        Values({"budget": []}, "plan.json").part("budget")


def test_long_values_are_cut_in_messages():
    assert shortened("a") == "'a'"
    assert shortened("a" * 200) == "'" + "a" * 79 + "..."
