"""What a run says it is about to do agrees with what it then does."""

import dataclasses
from pathlib import Path

import pytest

from llamafactory_adaptive.calibration.measurement import needs_rows
from llamafactory_adaptive.config.run_config import AdaptiveConfig, CalibrationConfig
from llamafactory_adaptive.methods import get_method, is_dynamic, methods
from llamafactory_adaptive.planning.start_message import start_message
from llamafactory_adaptive.ranks.search_config import ExchangeConfig, GivenRanksConfig, PruningConfig


CONFIG = AdaptiveConfig("sensitivity", {}, "params", 4, 8.0, 1, 16, None, CalibrationConfig(None, 77, 2, 0))


@pytest.mark.parametrize("name", methods())
def test_only_methods_that_measure_are_said_to_score(name):
    method = get_method(name)
    if is_dynamic(method):
        pytest.skip("has a search")
    said = start_message(dataclasses.replace(CONFIG, method=name))
    measurement = method(method.Options()).measurement()
    assert ("scores the modules" in said) == (measurement is not None)
    assert ("on 77 rows" in said) == needs_rows(measurement)


def test_weights_alone_are_said_to_be_scored_without_rows():
    said = start_message(dataclasses.replace(CONFIG, method="srlora"))
    assert said.startswith("srlora scores the modules by the base weights alone before training, without any rows")
    assert "77" not in said


def test_a_given_plan_and_a_search_score_nothing():
    given = dataclasses.replace(CONFIG, plan_path="p.json")
    assert start_message(given) == "the ranks are those of p.json; nothing is scored"
    stage = dataclasses.replace(given, method="igu", given=GivenRanksConfig(0))
    said = "the ranks are those of p.json and train as P diag(lambda) Q, the second stage of igu; nothing is scored"
    assert start_message(stage) == said
    search = dataclasses.replace(CONFIG, method="igu", search=PruningConfig(9, 0.1, 0.7, 2, None, 0))
    assert start_message(search).startswith(
        "igu finds the ranks while it trains, from rank 9 to the cost of uniform rank 4;"
    )
    search = dataclasses.replace(CONFIG, method="elalora", search=ExchangeConfig(16, 0.1, 0.3, 10, 0))
    assert start_message(search).startswith(
        "elalora finds the ranks while it trains, at most rank 16 a module, at the cost of uniform rank 4;"
    )


def test_an_adapter_to_go_on_with_is_named_and_not_scored():
    said = start_message(CONFIG, Path("saves/first"))
    assert said == "training goes on with the adapter saves/first and its ranks; nothing is scored"
