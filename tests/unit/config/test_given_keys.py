"""Keys that cannot go with ranks of a plan that train in a method's own form."""

from llamafactory_adaptive.config.key_checks import check_given
from llamafactory_adaptive.methods import make_method
from llamafactory_adaptive.ranks.search_config import GivenRanksConfig


def test_given_ranks_train_in_their_own_form_only_where_that_is_possible():
    flat = {"torch_compile": True, "adapter_name_or_path": "x"}
    found = [str(problem) for problem in check_given(flat, make_method("igu", {}), 3)[1]]
    assert found == [
        "adapter_name_or_path: 'x' is invalid: P diag(lambda) Q begins as a new adapter; try create_new_adapter: true "
        "(or igu_second_stage: lora)",
        "torch_compile: True is invalid: the backward pass of P diag(lambda) Q is not compiled; try torch_compile: "
        "false (or igu_second_stage: lora)",
    ]
    assert check_given({}, make_method("igu", {}), 3) == (GivenRanksConfig(3), [])
    for name, options in (("igu", {"second_stage": "lora"}), ("adalora", {}), ("tsq", {}), ("sensitivity", {})):
        assert check_given(flat, make_method(name, options), 3) == (None, [])
