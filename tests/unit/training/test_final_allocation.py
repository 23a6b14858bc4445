"""What the search does to the adapter beside its masks: strength that moves into lambda, lambdas that start anew."""

import pytest
import torch

from llamafactory_adaptive.training.rank_search_driver import RankSearchDriver
from tests.helpers.dynamic import batch
from tests.helpers.searches import searching, trainer_of


def lambdas(driver):
    return [module.a.lambda_r.detach().clone() for module in driver.triplets.modules]


@pytest.fixture
def around(monkeypatch):
    """Has a method of the driver tell its state before and after each call."""

    def wrap(name, look):
        seen, original = [], getattr(RankSearchDriver, name)

        def watched(self, *args):
            before = look(self)
            original(self, *args)
            seen.append((before, look(self), *args))

        monkeypatch.setattr(RankSearchDriver, name, watched)
        return seen

    return wrap


def test_the_adapter_that_is_evaluated_does_not_change_as_its_strength_moves_into_lambda(around, tmp_path):
    search = searching(importance="shrink", mend_strength=True, final_ratio=0.5)

    def look(driver):
        position = driver.triplets.position
        position.leave()  # the adapter as it is evaluated
        with torch.no_grad():
            return search.model(**batch()).logits.clone(), lambdas(driver), position.strength

    seen = around("_end_shrinkage", look)
    trainer_of(search, tmp_path, max_steps=8, learning_rate=0.1).train()
    (((logits, old, weakened), (after, new, full)),) = seen
    assert weakened == pytest.approx(0.61, abs=0.01)
    assert full == 1.0
    assert torch.allclose(logits, after, atol=1e-5)
    assert all(torch.allclose(weakened * a, b) for a, b in zip(old, new, strict=True))
    with torch.no_grad(), search.model.disable_adapter():
        assert not torch.allclose(search.model(**batch()).logits, after, atol=1e-3), "the adapter matters"


@pytest.mark.parametrize(("returns", "from_zero"), [("zero", True), ("former", False)])
def test_lambdas_of_components_that_come_back_are_zero_or_what_they_were(returns, from_zero, around, tmp_path):
    seen = around("_restart_returned", lambda driver: (lambdas(driver), driver.state.fresh))
    search = searching(
        returns=returns, interval=1, warmup_ratio=0.1, final_ratio=0.1, uncertainty="product", beta1=0.1
    )
    trainer_of(search, tmp_path, max_steps=24, learning_rate=0.1).train()
    back = [(old[module][index], new[module][index])
            for (old, _), (new, fresh), _ in seen
            for module, row in enumerate(fresh) for index, flag in enumerate(row) if flag]  # fmt: skip
    assert back, "some come back"
    assert all(bool(old) for old, _ in back), "lambda was something before it was removed"
    assert all((float(new) == 0.0) if from_zero else torch.equal(new, old) for old, new in back)
