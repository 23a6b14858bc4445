"""Checkpoints that another number of processes goes on from, at one global batch: the same ranks, the same weights."""

import shutil

import pytest
from safetensors.torch import load_file

from llamafactory_adaptive.files import PLAN_FILE
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.tiny import pruning_settings, settings, svd_settings, tsq_settings
from tests.helpers.training import train
from tests.helpers.workers import train_on_two


pytestmark = pytest.mark.slow
# A mean over processes is summed in another order, which the first steps of Adam make visible where gradients are near
# zero; a larger epsilon helps.
SAVING = {"save_strategy": "steps", "save_steps": 6, "overwrite_output_dir": False, "max_steps": 12, "seed": 3,
          "gradient_accumulation_steps": 2, "max_grad_norm": 0.01, "adam_epsilon": 1e-4}  # fmt: skip
METHODS = {
    "sensitivity": (settings, {}),
    "igu": (pruning_settings, {"igu_init": "gaussian"}),
    "adalora": (pruning_settings, {"adaptive_method": "adalora"}),
    "elalora": (pruning_settings, {"adaptive_method": "elalora", "elalora_exchanged_ranks": 4}),
    "svd": (svd_settings, {}),
    "tsq": (tsq_settings, {"tsq_alignment_weight": 0.5, "tsq_projection": 0}),
}
WHOLE_BATCH, HALF = ({"per_device_train_batch_size": rows} for rows in (4, 2))


def products(out):
    """The update of every module: components of nearly equal singular values may come in another mixture."""
    tensors = load_file(out / "adapter_model.safetensors")
    return {name: tensors[name.replace("lora_A", "lora_B")] @ a for name, a in tensors.items() if "lora_A" in name}


def check_same(again, out):
    plans = [load_plan(folder / PLAN_FILE) for folder in (again, out)]
    assert plans[0].ranks() == plans[1].ranks()
    assert len(set(plans[0].ranks().values())) > 1
    found, expected = products(again), products(out)
    for name, update in expected.items():
        assert (found[name] - update).norm() < 1e-3 * update.norm(), name


@pytest.fixture
def make(tiny_llama, data_dir, tmp_path):
    def make(method, name, **more):
        of_method, own = METHODS[method]
        return of_method(tiny_llama, data_dir, tmp_path / name, **{**SAVING, **own, **more})

    return make


def go_on(folder):
    """Copy the checkpoint of step 6 from ``out`` to ``again``."""
    shutil.copytree(folder / "out" / "checkpoint-6", folder / "again" / "checkpoint-6")


@pytest.mark.repeats
@pytest.mark.parametrize("method", METHODS)
def test_one_process_goes_on_from_two(method, make, tmp_path):
    train_on_two(make(method, "out", **HALF), tmp_path / "logs")
    go_on(tmp_path)
    train(make(method, "again", **WHOLE_BATCH))
    check_same(tmp_path / "again", tmp_path / "out")


@pytest.mark.parametrize(
    "method", [name if name == "adalora" else pytest.param(name, marks=pytest.mark.repeats) for name in METHODS]
)
def test_two_processes_go_on_from_one(method, make, tmp_path):
    train(make(method, "out", **WHOLE_BATCH))
    go_on(tmp_path)
    train_on_two(make(method, "again", **HALF), tmp_path / "logs")
    check_same(tmp_path / "again", tmp_path / "out")
