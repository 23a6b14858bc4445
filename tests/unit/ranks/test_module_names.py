"""Names of modules: which are accepted, and the layer and type that are read from them."""

import pytest

from llamafactory_adaptive.ranks.module_names import is_module_name, layer_and_type, layer_order, module_type


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.12.self_attn.q_proj", 12, "q_proj"),
        ("model.layers.3.mlp.experts.7.up_proj", 3, "up_proj"),
        ("score", None, "score"),
    ],
)
def test_layer_and_type_are_read_from_a_modules_name(name, layer, kind):
    assert layer_and_type(name) == (layer, kind)
    assert module_type(name) == kind


def test_layers_are_sorted_by_number():
    names = ["layers.10.up", "layers.2.up", "lm_head", "layers.2.down.0", "3", "layers.x"]
    assert sorted(names, key=layer_order) == [
        "layers.x", "layers.2.down.0", "layers.2.up", "layers.10.up", "lm_head", "3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "valid"),
    [("q_proj", True), ("a-b.0.c_d", True), ("", False), ("a..b", False), ("a.", False), ("a b", False),
     ("a.*", False), ("a\n", False), ("a" * 512, True), ("a" * 513, False), (3, False), (None, False)],
)  # fmt: skip
def test_only_words_with_dots_between_them_name_a_module(name, valid):
    assert is_module_name(name) is valid
