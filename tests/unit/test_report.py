"""What people see: numbers in tables are the plan's numbers, warnings come when they should."""

import dataclasses

from test_plan import make_plan

from llamafactory_adaptive.plan import ModulePlan
from llamafactory_adaptive.report import concentration_warning, place, rank_table, save_heatmap, update_card


def test_place_reads_layer_and_type():
    assert place("model.layers.12.self_attn.q_proj") == (12, "q_proj")
    assert place("model.layers.3.mlp.experts.7.up_proj") == (3, "up_proj")
    assert place("score") == (None, "score")


def test_table_shows_ranks_totals_and_size():
    text = rank_table(make_plan())
    assert text.splitlines()[1:4] == ["layer  up_proj", "    0        3", "    1        5"]
    assert "trainable parameters  240 of 240 (uniform LoRA of rank 4): 100.000%" in text
    assert "adapter size          0.0 MB in fp32" in text
    assert "    up_proj        2        4.0    3-5  100.0%         240" in text


def test_experts_of_a_layer_share_a_cell():
    experts = tuple(ModulePlan(f"model.layers.0.mlp.experts.{i}.up_proj", 4, 4, rank=i) for i in (1, 2))
    assert "    0      1.5" in rank_table(dataclasses.replace(make_plan(), modules=experts))


def skewed(shares):
    modules = tuple(ModulePlan(f"m.{i}.w", 99, 99, rank=1, share=share) for i, share in enumerate(shares))
    return dataclasses.replace(make_plan(), modules=modules)


def test_warning_only_when_few_modules_hold_most():
    assert concentration_warning(skewed([1 / 40] * 40), upper=8) is None
    text = concentration_warning(skewed([0.4, 0.4, *[0.2 / 38] * 38]), upper=8)
    assert text == "2 of 40 modules hold 80% of the score, 0 sit at their largest rank"
    assert concentration_warning(skewed([1 / 40] * 40), upper=1)


def test_heatmap_is_a_picture(tmp_path):
    save_heatmap(make_plan(), tmp_path / "new" / "ranks.png")
    assert (tmp_path / "new" / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_model_card_section_is_replaced_not_repeated(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# my model\n\nkept text\n")
    update_card(card, make_plan())
    update_card(card, make_plan((4, 4)))
    text = card.read_text()
    assert text.startswith("# my model\n\nkept text\n")
    assert text.count("## Adaptive ranks") == 1
    assert "| up_proj | 2 | 4.0 | 4-4 |" in text
