"""The Trainer of a run: what it tells the run's callback, in which order, and what it leaves to the Trainer below."""

import errno
from types import SimpleNamespace

import pytest

from llamafactory_adaptive.errors import OutputError
from llamafactory_adaptive.training import trainer
from llamafactory_adaptive.training.current_run import current_run
from llamafactory_adaptive.training.trainer import adaptive_trainer


class Callback:
    """Notes what it is told."""

    def __init__(self, said):
        self.said, self.train_sampler, self.counts = said, None, True

    def see_loss(self, loss):
        self.said.append(f"saw {loss}")

    def bind_trainer(self, trainer):
        self.said.append(f"bound to {type(trainer).__name__}")

    def save_into(self, folder, *_):
        self.said.append(f"save_into {folder.name}")

    def counts_as_best(self):
        return self.counts


@pytest.fixture
def said(monkeypatch):
    lines = []
    for name in ("begin_checkpoint", "seal", "check_best"):
        monkeypatch.setattr(trainer, name, lambda folder, *_, name=name: lines.append(f"{name} {folder.name}"))
    monkeypatch.setattr(
        trainer, "restore_sharded", lambda model, folder: lines.append(f"restore_sharded {folder.name}")
    )
    return lines


@pytest.fixture
def plain(said, tmp_path):
    """A Trainer that notes what it does."""

    class Plain:
        failure = None

        def __init__(self, save_only_model=False):
            self.model = None
            self.args = SimpleNamespace(output_dir=str(tmp_path), save_only_model=save_only_model)
            self.state = SimpleNamespace(global_step=6, max_steps=9, best_model_checkpoint=str(tmp_path / "best"),
                                         best_metric=None, best_global_step=None)  # fmt: skip
            self.control = SimpleNamespace(should_training_stop=False)
            said.append("built")

        def training_step(self):
            return 1.5

        def _run_epoch(self):
            return "an epoch"

        def _get_train_sampler(self):
            return "the Trainer's sampler"

        def _save_checkpoint(self):
            said.append("saves")
            if self.failure:
                raise self.failure

        def _push_from_checkpoint(self, folder):
            said.append("pushes")

        def _determine_best_metric(self, metrics, trial):
            self.state.best_metric, self.state.best_global_step = metrics["eval_loss"], self.state.global_step
            return True

        def _load_best_model(self):
            said.append("loads the best")

        def _load_from_checkpoint(self, folder, model):
            said.append(f"loads {folder.rpartition('/')[2]}")

        def _save_rng_state(self, folder):
            said.append("saves random states")

    return Plain


@pytest.fixture
def made(plain, said):
    trainer = adaptive_trainer(plain, Callback(said))()
    said.clear()
    return trainer


def test_it_passes_itself_on_once_it_is_built_and_keeps_its_name(plain, said):
    cls = adaptive_trainer(plain, Callback(said))
    assert (cls.__name__, issubclass(cls, plain)) == ("Plain", True)
    cls()
    assert said == ["built", "bound to Plain"]


def test_the_callback_of_the_run_that_the_process_is_in_counts_where_none_is_given(plain, said):
    cls, callback = adaptive_trainer(plain), Callback(said)
    token = current_run.set(callback)
    try:
        assert cls().adaptive_callback is callback
    finally:
        current_run.reset(token)


def test_without_a_run_nothing_is_changed(plain, said):
    trainer = adaptive_trainer(plain)()
    assert trainer.training_step() == 1.5
    assert trainer._get_train_sampler() == "the Trainer's sampler"
    trainer._save_checkpoint()
    trainer._push_from_checkpoint("checkpoint-6")
    assert trainer._determine_best_metric(metrics={"eval_loss": 2.0}, trial=None) is True
    trainer._load_best_model()
    trainer._save_rng_state("checkpoint-6")
    assert said == ["built", "saves", "pushes", "loads the best", "saves random states"]
    trainer.failure = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        trainer._save_checkpoint()


def test_every_loss_is_watched(made, said):
    assert made.training_step() == 1.5
    assert said == ["saw 1.5"]


def test_samples_come_from_the_selection_where_there_is_one(made):
    assert made._get_train_sampler() == "the Trainer's sampler"
    made.adaptive_callback.train_sampler = "the selection's sampler"
    assert made._get_train_sampler() == "the selection's sampler"


def test_no_step_is_trained_after_the_last(made):
    assert made._run_epoch() == "an epoch"
    assert not made.control.should_training_stop
    made.state.global_step = 9
    assert made._run_epoch() is None
    assert made.control.should_training_stop


def test_a_checkpoint_is_sealed_when_it_is_whole(made, said):
    made._save_checkpoint()
    assert said == ["begin_checkpoint checkpoint-6", "saves", "seal checkpoint-6"]


def test_what_goes_on_into_a_checkpoint_comes_after_the_random_states(made, said):
    made._save_rng_state("out/checkpoint-6")
    assert said == ["saves random states", "save_into checkpoint-6"]


def test_a_checkpoint_is_sealed_before_it_is_pushed(made, said):
    made._push_from_checkpoint("out/checkpoint-6")
    assert said == ["seal checkpoint-6", "pushes"]


def test_a_checkpoint_without_optimizer_is_not_sealed(plain, said):
    trainer = adaptive_trainer(plain, Callback(said))(save_only_model=True)
    said.clear()
    trainer._save_checkpoint()
    trainer._push_from_checkpoint("out/checkpoint-6")
    assert said == ["begin_checkpoint checkpoint-6", "saves", "pushes"]


def test_the_best_checkpoint_is_checked_before_it_is_loaded_and_put_right_after(made, said):
    made._load_best_model()
    assert said == ["check_best best", "loads the best", "restore_sharded best"]


def test_a_checkpoint_that_is_resumed_from_is_put_right_after_it_was_loaded(made, said):
    made._load_from_checkpoint("out/checkpoint-6")
    assert said == ["loads checkpoint-6", "restore_sharded checkpoint-6"]


@pytest.mark.parametrize("counts", [True, False])
def test_an_evaluation_that_does_not_count_leaves_the_best_one_as_it_was(counts, made):
    made.adaptive_callback.counts = counts
    assert made._determine_best_metric(metrics={"eval_loss": 2.0}, trial=None) is counts
    assert (made.state.best_metric, made.state.best_global_step) == ((2.0, 6) if counts else (None, None))
    with pytest.raises(KeyError, match="eval_loss"):
        made._determine_best_metric(metrics={}, trial=None)


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:603]")],
    ids=["disk", "torch"],
)
def test_a_full_disk_is_one_message_and_nothing_is_sealed(failure, made, said):
    made.failure = failure
    with pytest.raises(OutputError, match="checkpoint-6 cannot be written"):
        made._save_checkpoint()
    assert said == ["begin_checkpoint checkpoint-6", "saves"]


@pytest.mark.parametrize("failure", [RuntimeError("CUDA error"), PermissionError(errno.EACCES, "denied")], ids=str)
def test_other_failures_of_a_save_are_left_as_they_are(failure, made):
    made.failure = failure
    with pytest.raises(type(failure)) as caught:
        made._save_checkpoint()
    assert caught.value is failure
