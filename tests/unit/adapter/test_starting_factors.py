"""The start of the factors: GoRA's formula against least squares, and slices of one file for mixed ranks."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file

from llamafactory_adaptive.adapter.lora import PlannedLoraConfig, live_factors, lora_config_arguments
from llamafactory_adaptive.adapter.starting_factors import StartingFactors, compressed_gradient
from llamafactory_adaptive.adapter.verify import check_saved
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from tests.helpers.lora import mixed_ranks
from tests.helpers.tiny import tiny_model
from tests.helpers.workers import said_by_two


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start_of(a, gradient, scale=2.0, gamma=0.05):
    return compressed_gradient(torch.cat([a, a @ gradient.T], dim=1), a.shape[1], scale, gamma)


def test_the_product_is_the_least_squares_approximation_of_a_descent_step():
    a, gradient = drawn(3, 10), drawn(7, 10, seed=1)
    best = torch.linalg.lstsq(a.T, gradient.T).solution.T  # of B A = G
    b = start_of(a, gradient, scale=1.5, gamma=0.2)
    assert torch.allclose(b, -0.2 * (10 / 3) ** 0.5 / 1.5 * best)


def test_with_the_scale_of_the_paper_the_factor_is_the_papers():
    a, gradient, alpha, gamma = drawn(4, 25), drawn(6, 25, seed=1), 16.0, 0.05
    best = gradient @ torch.linalg.pinv(a)
    b = start_of(a, gradient, alpha / 4**0.5, gamma)
    assert torch.allclose(b, -gamma * 25**0.5 / alpha * best)


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("rank", [2, 16])
def test_the_first_update_is_as_large_as_a_step_at_the_rate_gamma(rank, scale):
    a, gradient = drawn(rank, 64), drawn(400, 64, seed=1)
    update = scale * start_of(a, gradient, scale, gamma=0.1) @ a
    assert float(update.norm() / gradient.norm()) == pytest.approx(0.1, rel=0.05)
    assert float((update * gradient).sum()) < 0, "downhill"


def planned_adapter():
    """A model with the adapter of a plan of mixed ranks, and that plan."""
    model = tiny_model()
    sizes = {name: model.get_submodule(name).weight.shape for name in mixed_ranks(model)}
    modules = tuple(ModulePlan(name, *sizes[name][::-1], rank=rank) for name, rank in mixed_ranks(model).items())
    plan = RankPlan("random", {}, "params", 4, 8.0, modules)
    return get_peft_model(model, PlannedLoraConfig(**lora_config_arguments(plan))), plan


@pytest.fixture
def planned():
    return planned_adapter()


def held(kind, plan):
    """What a start's file holds for the largest rank."""
    return {
        m.name: drawn(8, m.in_features + (m.out_features if kind == "gora" else 0), seed=number).float()
        for number, m in enumerate(plan.modules)
    }


@pytest.mark.parametrize("kind", ["eva", "gora"])
def test_each_module_takes_as_many_rows_as_its_rank(kind, planned, tmp_path):
    adapted, plan = planned
    save_file(tensors := held(kind, plan), path := tmp_path / "start.safetensors")
    slowdowns = StartingFactors(kind, path, 0.05).copy_into(adapted, plan.scale)
    live = live_factors(adapted)
    for module, slowdown in zip(plan.modules, slowdowns, strict=True):
        (a, b), rows = live[module.name], tensors[module.name][: module.rank]
        p, q = (float(f.weight.square().sum() / module.rank) for f in (b, a))
        of_lora = module.out_features / 3.0
        assert slowdown == pytest.approx((of_lora / (q * module.out_features + p * module.in_features)) ** 0.5)
        assert torch.equal(a.weight, rows[:, : module.in_features])
        compressed = compressed_gradient(rows, module.in_features, 2.0, 0.05).float() if kind == "gora" else None
        assert torch.equal(b.weight, torch.zeros_like(b.weight) if compressed is None else compressed)


@pytest.mark.parametrize("kind", ["eva", "gora"])
def test_a_module_saved_as_it_started_counts_as_untrained(kind, planned, tmp_path):
    adapted, plan = planned
    save_file(held(kind, plan), path := tmp_path / "start.safetensors")
    start = StartingFactors(kind, path, 0.05)
    start.copy_into(adapted, plan.scale)
    adapted.save_pretrained(tmp_path / "out")
    assert check_saved(tmp_path / "out", plan, start) == len(plan.modules)
    assert check_saved(tmp_path / "out", plan) == (len(plan.modules) if kind == "eva" else 0)
    _, b = live_factors(adapted)[plan.modules[1].name]
    b.weight.data[0, 0] += 1e-3
    adapted.save_pretrained(tmp_path / "out")
    assert check_saved(tmp_path / "out", plan, start) == len(plan.modules) - 1


def size_of_factors(model):
    return [float(f.weight.detach().double().square().sum()) for pair in live_factors(model).values() for f in pair]


def start_without_the_file(rank, kind, path):
    """Rank 0's node alone has the file; what each model starts from, and whether it is seen to be a start."""
    from torch import distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=2)
    adapted, plan = planned_adapter()
    start = StartingFactors(kind, path if rank == 0 else path / "of another node", 0.05)
    start.copy_into(adapted, plan.scale)
    pairs = live_factors(adapted).items()
    dist.destroy_process_group()
    return size_of_factors(adapted), all(start.is_start(name, b.weight) for name, (_, b) in pairs)


@pytest.mark.parametrize("kind", ["eva", "gora"])
def test_the_other_processes_get_the_start_from_rank_0s_model(kind, planned, tmp_path):
    adapted, plan = planned
    save_file(held(kind, plan), path := tmp_path / "start.safetensors")
    StartingFactors(kind, path, 0.05).copy_into(adapted, plan.scale)
    assert said_by_two(start_without_the_file, kind, path) == [str((size_of_factors(adapted), True))] * 2
