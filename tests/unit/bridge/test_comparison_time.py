"""How long a comparison will take, from short runs whose seconds are known."""

import pytest

from llamafactory_adaptive.bridge import comparison_time
from llamafactory_adaptive.bridge.comparison_time import RunTime
from llamafactory_adaptive.comparison.arms import Arm
from llamafactory_adaptive.comparison.experiment import Design, Progress
from llamafactory_adaptive.errors import CalibrationError


MEASURED = {"sensitivity": "hessian", "by_type": "hessian", "fisher": "gradients", "gora_ranks": "sums"}
ARMS = ("lora", "igu", *MEASURED)
DESIGN = Design((1.0, 2.0), seeds=3)
PLAIN = RunTime(20.0, 0.4)


SLOWER = {"sensitivity": 0.1}  # seconds of a step more than plain LoRA, by chance or by the search


class Comparison:
    """Runs of plain LoRA take 100 s; what scores takes 60 s more, and one arm does not fit into memory."""

    def __init__(self, design=DESIGN):
        self.design, self.probed = design, []

    def settings(self, run):
        return {"arm": run.arm}

    def steps(self, run=None):
        return (run and run.steps) or 200

    def run_time(self, device, arm="lora"):
        self.probed.append(arm)
        if arm == "gora_ranks":
            raise CalibrationError("memory ran out")
        return RunTime(80.0, 0.4 + SLOWER.get(arm, 0.0))


@pytest.fixture
def progress(monkeypatch):
    monkeypatch.setattr(comparison_time, "measured_before_training", lambda settings: MEASURED.get(settings["arm"]))
    return Progress(DESIGN, [Arm(name) for name in ARMS], lambda run: None, lambda outcome, half: 0.0)


def test_scores_count_once_for_each_seed_and_once_for_arms_that_share_them(progress):
    made = Comparison()
    said = comparison_time.estimate(made, PLAIN, progress, [None])
    assert made.probed == ["sensitivity", "fisher", "gora_ranks"]
    scoring = 2 * 4 * 60.0
    assert scoring == 8 * 60
    minutes = (6 * 5 * 100 + scoring) / 60
    assert said.startswith(f", about {minutes:.0f} minutes, 8 minutes of it for scores before training")


def test_devices_share_the_work_and_an_arm_that_is_given_up_is_not_tried(progress):
    progress.failed |= {"fisher": "killed"}
    made = Comparison()
    said = comparison_time.estimate(made, PLAIN, progress, ["0", "1"])
    assert "fisher" not in made.probed
    assert said.startswith(f", about {(13 * 100 + 2 * 60) / 60:.0f} minutes on 2 devices, 2 minutes of it for scores")


def test_a_trial_that_diverged_tells_no_time(progress):
    assert comparison_time.estimate(Comparison(), None, progress, [None]).startswith(", of a length that a trial")


def test_short_runs_that_choose_count_as_short_ones():
    """Of each arm two runs of 50 steps (40 s) and three of 200 (100 s), in turn where a device is free."""
    design = Design((1.0, 2.0), seeds=3, steps_for_rates=50)
    progress = Progress(design, [Arm("lora"), Arm("dora")], lambda run: None, lambda outcome, half: 0.0)
    made = Comparison(design)
    made.settings = lambda run: {"finetuning_type": "lora"}
    alone, both = (comparison_time.estimate(made, PLAIN, progress, devices) for devices in ([None], ["0", "1"]))
    assert alone.startswith(f", about {2 * (80 + 300) / 60:.0f} minutes (")
    assert both.startswith(", about 7 minutes on 2 devices (")
