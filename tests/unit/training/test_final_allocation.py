"""What the search does to the adapter beside its masks: strength that moves into lambda, lambdas that start anew."""

import pytest
import torch
from transformers import TrainerCallback

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


@pytest.mark.parametrize("options", [{"mend_strength": True, "final_ratio": 0.5}, {"final_ratio": 0.0}], ids=str)
def test_the_adapter_that_is_evaluated_does_not_change_as_its_strength_moves_into_lambda(options, around, tmp_path):
    search = searching(importance="shrink", **options)

    def look(driver):
        position = driver.triplets.position
        position.leave()  # the adapter as it is evaluated
        with torch.no_grad():
            return search.model(**batch()).logits.clone(), lambdas(driver), position.strength

    seen = around("_end_shrinkage", look)
    trainer_of(search, tmp_path, max_steps=8, learning_rate=0.1).train()
    (((logits, old, weakened), (after, new, full), trains_on),) = seen
    assert trains_on is (options["final_ratio"] > 0)
    assert weakened == pytest.approx(0.61, abs=0.01)
    assert full == 1.0
    assert torch.allclose(logits, after, atol=1e-5)
    assert all(torch.allclose(weakened * a, b) for a, b in zip(old, new, strict=True))
    with torch.no_grad(), search.model.disable_adapter():
        assert not torch.allclose(search.model(**batch()).logits, after, atol=1e-3), "the adapter matters"


def test_a_run_that_ends_before_its_ranks_are_final_saves_the_mended_strength(around, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    search = searching(importance="shrink", warmup_ratio=0.5, final_ratio=0.25)
    seen = around("_end_shrinkage", lambda driver: (lambdas(driver), driver.triplets.position.strength))
    trainer = trainer_of(search, tmp_path, max_steps=8, learning_rate=0.1)
    trainer.add_callback(Stop())
    trainer.train()
    (((old, weakened), (new, full), trains_on),) = seen
    assert (weakened, full, trains_on) == (pytest.approx(0.61, abs=0.01), 1.0, False)
    assert all(torch.allclose(weakened * a, b) for a, b in zip(old, new, strict=True))


def test_training_that_goes_on_finds_the_strength_by_itself(around, tmp_path):
    search = searching(importance="shrink", final_ratio=0.5)
    seen = around("_end_shrinkage", lambda driver: (lambdas(driver), driver.triplets.position.strength))
    trainer_of(search, tmp_path, max_steps=8, learning_rate=0.1).train()
    (((old, weakened), (new, full), trains_on),) = seen
    assert (weakened, full, trains_on) == (pytest.approx(0.61, abs=0.01), 1.0, True)
    assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


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
