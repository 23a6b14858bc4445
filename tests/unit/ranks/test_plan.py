"""The artefact: it survives a round trip and a person's edits, and says where it does not fit."""

import dataclasses
import json

import pytest

from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.plans import make_plan


def test_round_trip(tmp_path):
    plan = make_plan()
    plan.save(tmp_path / "deep" / "plan.json")
    assert load_plan(tmp_path / "deep" / "plan.json") == plan
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["plan.json"]


def test_document_states_the_budget_and_the_parameters(tmp_path):
    document = make_plan().to_json()
    assert document["budget"] == {
        "unit": "params", "asked_parameters": 240, "used_parameters": 240, "left_parameters": 0,
        "asked_ranks": 8, "used_ranks": 8, "left_ranks": 0,
    }  # fmt: skip
    assert [entry["parameters"] for entry in document["modules"]] == [90, 150]
    assert len(document["digest"]) == 64


def test_digest_follows_ranks_and_scale_only():
    plan = make_plan()
    assert plan.digest() == dataclasses.replace(plan, provenance={}, method="random").digest()
    assert plan.digest() != make_plan((4, 4)).digest()
    assert plan.digest() != dataclasses.replace(plan, lora_alpha=16.0).digest()


def test_saving_over_a_different_plan_keeps_it(tmp_path):
    path = tmp_path / "plan.json"
    first = make_plan()
    first.save(path)
    first.save(path)
    assert len(list(tmp_path.iterdir())) == 1
    make_plan((4, 4)).save(path)
    assert load_plan(tmp_path / f"plan.{first.digest()[:12]}.json") == first
    path.write_text("not a plan")
    first.save(path)
    assert any(p.read_text() == "not a plan" for p in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(schema_version=9), "has plan schema 9; this version reads schema 1"),
        (lambda d: d.update(schema_version="9" * 500), "has plan schema '9{79}[.]{3}; this version"),
        (lambda d: d.pop("modules"), "is not a complete plan: modules is missing"),
        (lambda d: d["modules"][0].update(rank=2.5), r"up_proj has rank 2.5; it must be a whole number of at least 0"),
        (lambda d: d["modules"][0].update(rank=-1), "has rank -1"),
        (lambda d: d["modules"][0].update(rank=True), "has rank True"),
        (lambda d: d["modules"][0].update(in_features=-5), "up_proj has in_features -5; it must be a whole number of"),
        (
            lambda d: d["modules"][0].update(out_features=2**40),
            "has out_features 1099511627776; .* at most 2147483648",
        ),
        (lambda d: d["modules"][0].update(score=10**400), "up_proj has score 1000.*; it must be a finite number"),
        (lambda d: d["modules"][0].update(share="much"), "has share 'much'; it must be a finite number"),
        (lambda d: d["modules"][0].update(metrics=[1]), r"has metrics \[1\]; it must be a mapping"),
        (lambda d: d["modules"][0].update(metrics={"trace": None}), "has metrics trace None; it must be a finite"),
        (lambda d: d["modules"][0].update(name="a/../b"), "has name 'a/../b'; it must be the name of a module"),
        (lambda d: d["modules"][0].update(name="\x1b[2J"), "must be the name of a module"),
        (lambda d: d["modules"].append(3), "an entry of modules is no mapping but a int"),
        (lambda d: d.update(modules={"a": 1}), "has modules {'a': 1}; it must be a list"),
        (lambda d: d.update(lora_rank="eight"), "has lora_rank 'eight'; it must be a whole number of at least 1"),
        (lambda d: d.update(lora_rank=0), "has lora_rank 0"),
        (lambda d: d.update(lora_alpha=0), "has lora_alpha 0.0; it must be a positive number"),
        (lambda d: d.update(lora_alpha=float("nan")), "is not valid JSON: NaN is no JSON number"),
        (lambda d: d.update(lora_alpha=float("inf")), "is not valid JSON: Infinity is no JSON number"),
        (lambda d: d.update(method="<b>x</b>"), "has method '<b>x</b>'; it must be a name of letters, digits"),
        (lambda d: d.update(method="igu\n"), "has method 'igu.n'"),
        (lambda d: d["budget"].update(unit="bogus"), "budget has unit 'bogus'; it must be one of params, ranks"),
        (lambda d: d.update(budget=[]), "budget is no mapping but a list"),
        (lambda d: d.update(options=[]), r"has options \[\]; it must be a mapping"),
        (lambda d: d.update(provenance="me"), "has provenance 'me'; it must be a mapping"),
        (lambda d: d.update(provenance={"bounds": [1]}), r"provenance has bounds \[1\]; it must be a mapping"),
        (lambda d: d["modules"].append(d["modules"][0]), r"lists model.layers.0.mlp.up_proj twice"),
        (lambda d: [m.update(rank=0) for m in d["modules"]], "gives every module rank 0"),
    ],
)
def test_a_broken_plan_says_what_is_broken(edit, message, tmp_path):
    document = make_plan().to_json()
    edit(document)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=message):
        load_plan(path)


def test_a_plan_that_nests_too_deep_is_an_error_of_the_plan(tmp_path):
    (tmp_path / "plan.json").write_text('{"provenance": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(PlanError, match="is nested more than 64 levels deep"):
        load_plan(tmp_path / "plan.json")


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(PlanError, match="No such file"):
        load_plan(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PlanError, match="not valid JSON"):
        load_plan(tmp_path / "bad.json")
