"""One run inside the host: what the host is called with, and what is as it was afterwards."""

from types import SimpleNamespace

import pytest
from accelerate import PartialState
from peft import LoraConfig

from llamafactory_adaptive.bridge import training_run
from llamafactory_adaptive.bridge.host_callback import HostCallback
from llamafactory_adaptive.bridge.training_run import adaptive_training_function, inject_ranks
from llamafactory_adaptive.errors import AdaptiveConfigError, OutputError
from llamafactory_adaptive.files import LOCK_FILE, PLAN_FILE
from llamafactory_adaptive.folder_lock import locked
from llamafactory_adaptive.training.bound_run import RunRequest
from llamafactory_adaptive.training.current_run import current_run
from llamafactory_adaptive.training.guard import PlanGuard
from llamafactory_adaptive.training.run_log import RunLog
from tests.helpers.plans import found_plan
from tests.helpers.tiny import tsq_settings, unmeasured_settings


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    yield
    PartialState._reset_state()


class HostError(Exception):
    """The host fails, which ends a run before its proof."""


@pytest.fixture
def run(tmp_path):
    """Run the host's training function on settings; returns what it was called with, and what held meanwhile."""

    def start(args, **config):
        seen = SimpleNamespace(config=None)

        def host(config):
            seen.config, seen.callback = config, current_run.get()
            seen.locked = (tmp_path / "out" / LOCK_FILE).exists()
            raise HostError

        with pytest.raises(HostError):
            adaptive_training_function(host, lambda: None)({"args": args, **config})
        return seen

    return start


@pytest.fixture
def args(tiny_llama, data_dir, tmp_path):
    return lambda like=unmeasured_settings, **more: like(tiny_llama, data_dir, tmp_path / "out", **more)


def test_a_plain_run_reaches_the_host_untouched(run, args):
    plain = {key: value for key, value in args(finetuning_type="lora").items() if not key.startswith("adaptive_")}
    given = {"args": plain, "callbacks": ["theirs"]}
    seen = run(**given)
    assert (seen.config, seen.callback, seen.locked) == (given, None, False)


def test_keys_of_ours_in_a_plain_run_are_refused(args):
    with pytest.raises(AdaptiveConfigError, match="adaptive_method would have no effect"):
        adaptive_training_function(lambda config: None, lambda: None)({"args": args(finetuning_type="lora")})


def test_an_adaptive_run_has_its_callback_last_and_holds_its_folder(run, args, tmp_path):
    seen = run(args(), callbacks=["theirs"])
    assert seen.config["callbacks"] == ["theirs", seen.callback]
    assert seen.config["args"] == args()
    assert seen.locked
    assert sum(seen.callback.guard.plan.ranks().values()) > 0
    assert current_run.get() is None, "also after a failure"
    assert not (tmp_path / "out" / LOCK_FILE).exists()


def test_a_method_that_chooses_samples_gets_a_selection_with_the_seed_of_the_run(run, args):
    seen = run(args(tsq_settings, seed=17))
    assert seen.callback.request.samples.seed == 17
    assert run(args()).callback.request.samples is None


def test_without_training_nothing_is_planned(run, args, caplog):
    with caplog.at_level("WARNING", "llamafactory.adaptive"):
        seen = run(args(do_train=False))
    assert (seen.callback, seen.locked) == (None, False)
    assert "do_train is not set, so no ranks are planned" in caplog.text


def test_deepspeed_without_a_launcher_is_refused_before_the_host(args, monkeypatch):
    def host(config):
        raise HostError

    for more, environment, key in (
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "false", "deepspeed"),
        ({}, "true", "ACCELERATE_USE_DEEPSPEED"),
    ):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", environment)
        with pytest.raises(AdaptiveConfigError) as caught:
            adaptive_training_function(host, lambda: None)({"args": args(**more)})
        assert [problem.key for problem in caught.value.problems] == [key]


def test_a_folder_in_which_another_run_works_is_refused(args, tmp_path, monkeypatch):
    monkeypatch.setattr("llamafactory_adaptive.bridge.plans.locked", lambda folder: locked(folder, 0.1))
    with locked(tmp_path / "out"), pytest.raises(OutputError, match="another run works in"):
        adaptive_training_function(lambda config: None, lambda: None)({"args": args()})


def test_records_of_an_older_run_are_moved_aside_by_the_process_that_writes(args, tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("adaptive_log.jsonl", PLAN_FILE):
        (out / name).write_text("")
    monkeypatch.setattr(training_run, "launched_number", lambda: 1)
    training_run._begin_afresh(args())
    assert (out / PLAN_FILE).exists()
    monkeypatch.setattr(training_run, "launched_number", lambda: 0)
    with caplog.at_level("WARNING", "llamafactory.adaptive"):
        training_run._begin_afresh(args())
    assert (out / "_adaptive_previous" / "1" / PLAN_FILE).exists()
    assert "were moved to" in caplog.text


def test_ranks_reach_peft_in_an_adaptive_run_alone():
    make = inject_ranks(LoraConfig)
    assert (make(r=5).r, make.__name__) == (5, "LoraConfig")
    callback = HostCallback(PlanGuard(found_plan(), RunLog("igu", 0.0)), RunRequest(3))
    token = current_run.set(callback)
    try:
        config = make(r=5, lora_alpha=3, lora_dropout=0.1, target_modules=["k_proj"])
    finally:
        current_run.reset(token)
    assert config.rank_pattern == {m.name: m.rank for m in found_plan().active}
    assert (config.r, config.lora_alpha, config.lora_dropout) == (6, 12, 0.1)
    assert set(config.target_modules) == set(config.rank_pattern)
    assert callback.configs_injected == 1
