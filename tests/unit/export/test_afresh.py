"""The command that trains the ranks of a cut adapter afresh: at the adapter's own alpha/r, in whole numbers."""

import re

import pytest

from llamafactory_adaptive.export.shrink import shrinker
from llamafactory_adaptive.export.shrink.request import ShrinkRequest
from llamafactory_adaptive.export.shrink.shrinker import run_shrink
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.lora import save_adapter


@pytest.mark.parametrize(("rslora", "scale"), [(True, 4.0), (False, 2.0)])
def test_the_command_has_the_adapter_s_strength_and_switches_rslora_off(rslora, scale, base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["q_proj"], use_rslora=rslora)
    said = run_shrink(ShrinkRequest(adapter, tmp_path / "out", rank=2))
    assert (" use_rslora=false " in said) is rslora
    assert " adaptive_budget_unit=params " in said, "my.yaml may count in ranks"
    assert "differed" not in said
    alpha, rank = (int(re.search(rf" {key}=(\d+) ", said)[1]) for key in ("lora_alpha", "lora_rank"))
    assert alpha / rank == scale == load_plan(tmp_path / "out" / "adaptive_rank_plan.json").scale


def test_where_modules_differed_the_command_has_the_strength_of_one_in_the_middle_and_says_so(base, tmp_path):
    """PEFT's own default: one alpha over the rank of each module; q_proj has 2 * 64 parameters, down_proj 8 * 96."""
    targets = {"q_proj": 2, "k_proj": 1, "v_proj": 1, "o_proj": 1, "down_proj": 8}
    adapter = save_adapter(base, tmp_path / "adapter", r=1, lora_alpha=8, target_modules=list(targets),
                           rank_pattern={kind: rank for kind, rank in targets.items() if rank > 1})  # fmt: skip
    said = run_shrink(ShrinkRequest(adapter, tmp_path / "out", rank=1))
    assert "alpha/r differed by module, 1 to 8; " in said
    assert "trains all at 1\n" in said
    assert load_plan(tmp_path / "out" / "adaptive_rank_plan.json").scale == 1


@pytest.mark.parametrize(
    ("scale", "least", "expected"),
    [(2.0, 3, (3, 6)), (0.5, 3, (4, 2)), (0.1 * 3, 8, (10, 3)), (1 / 100, 8, (100, 1)), (2.5, 5, (6, 15))],
)
def test_alphas_are_whole_numbers_of_the_same_strength(scale, least, expected):
    assert shrinker._rank_and_whole_alpha(scale, least) == expected


def test_an_alpha_that_no_rank_makes_whole_is_nearly_of_the_same_strength():
    rank, alpha = shrinker._rank_and_whole_alpha(16 / 8**0.5, 8)
    assert alpha / rank == pytest.approx(16 / 8**0.5, rel=1e-4)
