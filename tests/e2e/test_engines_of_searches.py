"""Searches that change factors as a whole: cut by singular values, and exchanged, alike on every engine."""

import pytest
from safetensors.torch import load_file

from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.engines import HARD, check_same, engine_of
from tests.helpers.fsdp import FSDP2
from tests.helpers.tiny import pruning_settings, svd_settings, tsq_settings
from tests.helpers.training import train
from tests.helpers.workers import train_on_two


pytestmark = [pytest.mark.slow, pytest.mark.repeats]
# With two processes a mean is summed in another order, which the first steps of Adam make visible where gradients are
# near zero; a larger epsilon helps, as for TsqLoRA.
CUT = {"gradient_accumulation_steps": 2, "adam_epsilon": 1e-4, "save_strategy": "steps", "save_steps": 9}


@pytest.fixture(scope="module")
def cut_alone(tiny_llama, data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("cut") / "out"
    train(svd_settings(tiny_llama, data_dir, out, per_device_train_batch_size=4, **CUT))
    return out


def products(out):
    """The update of every module: components of nearly equal singular values may come in another mixture."""
    tensors = load_file(out / "adapter_model.safetensors")
    return {name: tensors[name.replace("lora_A", "lora_B")] @ a for name, a in tensors.items() if "lora_A" in name}


@pytest.mark.parametrize("engine", [0, 2, 3, "fsdp2"])
def test_a_cut_by_singular_values_is_the_same_on_every_engine(engine, cut_alone, tiny_llama, data_dir, tmp_path):
    more, environment = engine_of(engine, tmp_path)
    out = tmp_path / "out"
    train_on_two(svd_settings(tiny_llama, data_dir, out, **CUT, **more), tmp_path / "logs", **environment)
    assert (
        load_plan(out / "adaptive_rank_plan.json").ranks() == load_plan(cut_alone / "adaptive_rank_plan.json").ranks()
    )
    found, expected = products(out), products(cut_alone)
    for name, update in expected.items():
        assert (found[name] - update).norm() < 1e-3 * update.norm(), name


# Lambda of a new component starts at zero, and so do gradients of its factors.
EXCHANGE = {**HARD, "adaptive_method": "elalora", "elalora_exchanged_ranks": 4, "adam_epsilon": 1e-4}


@pytest.fixture(scope="module")
def exchanged_alone(tiny_llama, data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("exchanged") / "out"
    train(pruning_settings(tiny_llama, data_dir, out, per_device_train_batch_size=4, **EXCHANGE))
    assert len(set(load_plan(out / "adaptive_rank_plan.json").ranks().values())) > 1
    return out


@pytest.mark.parametrize("engine", [0, 2, 3, "fsdp2"])
def test_ranks_are_exchanged_alike_on_every_engine(engine, exchanged_alone, tiny_llama, data_dir, tmp_path):
    more, environment = engine_of(engine, tmp_path)
    given = pruning_settings(tiny_llama, data_dir, tmp_path / "out", **EXCHANGE, **more)
    train_on_two(given, tmp_path / "logs", **environment)
    check_same(tmp_path / "out", exchanged_alone, tolerance=1e-4)


# Triplets, and TsqLoRA's ranks alone: no process holds whole weights, which its samples need.
UNDER_FSDP2 = {
    "adalora": (pruning_settings, {**HARD, "adaptive_method": "adalora"}),
    "bf16 statistics": (
        pruning_settings,
        {**HARD, "adaptive_method": "adalora", "adalora_statistics_dtype": "bfloat16"},
    ),
    "tsq": (tsq_settings, {**HARD, "tsq_sampling": False, "adam_epsilon": 1e-4}),
}


@pytest.mark.parametrize("method", UNDER_FSDP2)
def test_further_searches_find_the_same_ranks_under_fsdp2(method, tiny_llama, data_dir, tmp_path):
    of_method, own = UNDER_FSDP2[method]
    alone, out = tmp_path / "alone", tmp_path / "out"
    train(of_method(tiny_llama, data_dir, alone, per_device_train_batch_size=4, **own))
    train_on_two(of_method(tiny_llama, data_dir, out, **own), tmp_path / "logs", **FSDP2)
    assert len(set(load_plan(out / "adaptive_rank_plan.json").ranks().values())) > 1
    check_same(out, alone, tolerance=1e-3)
