"""kill -9 at random moments; the same command again ends as if nothing had happened."""

import json
import random
import shutil
import time

import pytest

from tests.faults.scene import METHODS, Command, digests, kill_at, nothing_left_running, wait_for


pytestmark = pytest.mark.faults
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("moment", range(20))
def test_training(moment, scene, tell, tmp_path):
    """Even moments at any time of the run, odd ones while a checkpoint is being written."""
    method = METHODS[moment % len(METHODS)]
    reference, seconds = scene.reference(method)
    output = tmp_path / "out"
    config = scene.yaml(method, output)
    command = scene.train(config, tmp_path / "log")
    if moment % 2:
        step = random.Random(moment).choice((2, 4, 6, 8, 10))
        wait_for((output / f"checkpoint-{step}").is_dir, command)
        done = kill_at(command, moment, 0.15)
        fault = f"{method}: {done}, while the checkpoint of step {step} was written"
    else:
        fault = f"{method}: {kill_at(command, moment, seconds)}"
    there = sorted(path.name for path in output.glob("checkpoint-*"))
    again = scene.train(config, tmp_path / "log")
    if again.wait() == 2:  # it had ended, and the plugin does not train over a finished run
        assert "holds a finished run" in again.said()
    else:
        again.finish()
    assert digests(output, WEIGHTS)[WEIGHTS] == digests(reference, WEIGHTS)[WEIGHTS]
    assert not list(tmp_path.rglob("*.tmp"))
    tell("checkpointing" if moment % 2 else "training", fault,
         f"{len(there)} checkpoints lay there; the same command ended with the same adapter, bit for bit")  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lost", [False, True])
def test_nothing_is_trained_on_after_the_last_step(method, lost, scene, tell, tmp_path):
    """Killed between the last checkpoint and the final save, or not at all, and run again."""
    reference, _ = scene.reference(method)
    output = tmp_path / "out"
    shutil.copytree(reference, output)
    if lost:
        (output / WEIGHTS).unlink()
        (output / "adapter_config.json").unlink()
    scene.train(scene.yaml(method, output), tmp_path / "log").finish()
    assert digests(output, WEIGHTS) == digests(reference, WEIGHTS)
    when = "killed before the final save" if lost else "had ended"
    tell("training", f"{method}: {when}, run again", "trained no further step; same adapter, bit for bit")


@pytest.fixture(scope="module")
def planned(scene):
    """An uninterrupted plan, and the seconds it took."""
    config = scene.yaml("sensitivity", scene.root / "unused")
    command = _plan(scene, config, scene.root / "planned")
    command.finish()
    return config, json.loads((scene.root / "planned" / "adaptive_rank_plan.json").read_text()), _elapsed(command)


def _plan(scene, config, folder):
    cache = {"LLAMAFACTORY_ADAPTIVE_CACHE": str(folder / "cache")}
    folder.mkdir(exist_ok=True)
    words = ["llamafactory-adaptive", "plan", config, "--out", folder]
    return Command(words, folder / "log", environment=cache)


def _elapsed(command):
    return time.monotonic() - command.started


@pytest.mark.parametrize("moment", range(8))
def test_planning(moment, scene, planned, tell, tmp_path):
    config, expected, seconds = planned
    folder = tmp_path / "planned"
    fault = kill_at(_plan(scene, config, folder), moment, seconds)
    nothing_left_running("llamafactory_adaptive.cli measure")
    _plan(scene, config, folder).finish()
    document = json.loads((folder / "adaptive_rank_plan.json").read_text())
    assert document["modules"] == expected["modules"]
    assert document["digest"] == expected["digest"]
    tell("planning", fault, "no scoring process was left; the same command wrote the same plan")


@pytest.fixture(scope="module")
def exported(scene):
    """Uninterrupted exports by layout, with the seconds each took."""
    done = {}
    for server in ("vllm", "sglang", "merged"):
        for name in ("first", "timed"):  # the first one waits for imports
            folder = scene.root / f"{name}-{server}"
            command = _export(scene, server, folder, scene.root / "export.log")
            command.finish()
        done[server] = digests(folder, "*.safetensors"), _elapsed(command)
    return done


def _export(scene, server, out, log):
    words = ["llamafactory-adaptive", "export", scene.adapter, "--base", scene.base, "--for", server, "--out", out]
    return Command(words, log)


@pytest.mark.parametrize("moment", range(20))
def test_export(moment, scene, exported, tell, tmp_path):
    server = list(exported)[moment % len(exported)]
    expected, seconds = exported[server]
    out = tmp_path / "served"
    fault = f"{server}: {kill_at(_export(scene, server, out, tmp_path / 'log'), moment, seconds)}"
    if out.exists():  # killed after it had taken its name: then it is whole
        assert (out / "parity_certificate.json").is_file()
    else:
        _export(scene, server, out, tmp_path / "log").finish()
    assert digests(out, "*.safetensors") == expected
    assert not list(tmp_path.glob(".served.*")), "the scratch folder of the killed one is still there"
    tell("export", fault, "no half export took the name; the same command wrote the same files")
