"""Settings are read and validated once a process; the scoring process gets them ready."""

import dataclasses
import json
import logging
import sys

import pytest
import yaml
from accelerate import PartialState
from omegaconf import OmegaConf

from llamafactory_adaptive import _bootstrap, cli
from tests.helpers.tiny import pruning_settings, settings, svd_settings, tsq_settings


_bootstrap.install()
from llamafactory_adaptive.bridge import checked_run, measure_process, validation  # noqa: E402
from llamafactory_adaptive.bridge.scoring_job import ScoringJob  # noqa: E402
from llamafactory_adaptive.config.run_config import AdaptiveConfig  # noqa: E402
from llamafactory_adaptive.methods import get_method, is_dynamic, methods  # noqa: E402


SECRET = "hf_of_nobody"


@pytest.fixture
def run(tiny_llama, data_dir, tmp_path, monkeypatch):
    """Run a command here, its scoring process too; returns how often settings were read and validated."""
    monkeypatch.setenv("LLAMAFACTORY_ADAPTIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli"])
    counts = {"read": 0, "validated": 0, "scored": 0}

    def counted(name, original):
        def call(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        return call

    def score_here(command, environment, log, job):
        counts["scored"] += 1
        assert SECRET in job
        assert SECRET not in "".join([*command, *environment.values()])
        measure_process.run_measurement_job(ScoringJob.from_json(json.loads(job)))
        return 0, ""

    monkeypatch.setattr(OmegaConf, "load", counted("read", OmegaConf.load))
    validate = counted("validated", validation.parse_config)
    for module in (validation, checked_run):
        monkeypatch.setattr(module, "parse_config", validate)
    monkeypatch.setattr(measure_process, "run_child", score_here)

    def call(command, **more):
        path = tmp_path / "x.yaml"
        path.write_text(yaml.safe_dump(settings(tiny_llama, data_dir, tmp_path / "out", hf_hub_token=SECRET, **more)))
        assert cli.main([command, str(path), "lora_rank=6"]) == 0
        path.unlink()
        return counts

    yield call
    PartialState._reset_state()
    logging.disable(logging.NOTSET)


OWN = {"adaptive_calibration_process": "own"}


@pytest.mark.parametrize(
    ("command", "more", "scored"),
    [("plan", {}, 1), ("train", OWN, 1), ("train", {}, 0)],
    ids=["plan", "train", "train, scored in the same process"],
)
def test_a_command_reads_and_validates_its_settings_once(command, more, scored, run, tmp_path):
    assert run(command, **more) == {"read": 1, "validated": 1, "scored": scored}
    assert json.loads((tmp_path / "out" / "adaptive_rank_plan.json").read_text())["lora_rank"] == 6
    texts = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not texts, "tokens of a hub reach no file"


def test_a_second_run_in_the_same_process_reads_its_own_settings(run):
    run("plan")
    assert run("train", seed=5, **OWN) == {"read": 2, "validated": 2, "scored": 2}


REQUIRED = {"by_type": {"by_type_ranks": "q_proj:4"}}  # options without which a method cannot run
MADE = {"svd": svd_settings, "tsq": tsq_settings}  # what they read differs from that of other dynamic methods


@pytest.mark.parametrize("method", methods())
def test_a_configuration_comes_back_from_json_as_it_was(method, tiny_llama, data_dir, tmp_path):
    make = MADE.get(method, pruning_settings if is_dynamic(get_method(method)) else settings)
    given = {"adaptive_method": method, **REQUIRED.get(method, {})}
    config = validation.parse_config(make(tiny_llama, data_dir, tmp_path / "out", **given))
    again = AdaptiveConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert type(again.search) is type(config.search)
    assert dataclasses.asdict(again) == dataclasses.asdict(config)
