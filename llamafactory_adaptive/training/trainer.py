"""The Trainer of an adaptive run: any Trainer class, which passes itself to the run's callback."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llamafactory_adaptive.adapter.sharded import restore_sharded
from llamafactory_adaptive.files import cannot_write, could_not_write
from llamafactory_adaptive.training.checkpoint_record import begin_checkpoint, check_best, seal
from llamafactory_adaptive.training.current_run import current_run


def adaptive_trainer(trainer_class: type, fixed_callback: Any = None) -> type:
    """Make a subclass of a Trainer class that passes itself to the run's callback once it is built.

    Callbacks do not receive the Trainer, whose accelerator is needed to see complete, unclipped gradients.

    Args:
        trainer_class: transformers' Trainer or any subclass.
        fixed_callback: the run's callback; None for that of :data:`current_run` when the Trainer is built.
    """

    class AdaptiveTrainer(trainer_class):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            callback = current_run.get() if fixed_callback is None else fixed_callback
            self.adaptive_callback = callback
            if callback is not None:
                callback.bind_trainer(self)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            if self.adaptive_callback is not None:
                self.adaptive_callback.see_loss(loss)
            return loss

        def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
            # Called once more, with smaller batches, when memory runs out and auto_find_batch_size is set.
            if self.adaptive_callback is not None:
                self.adaptive_callback.begin_attempt(kwargs.get("resume_from_checkpoint"))
            return super()._inner_training_loop(*args, **kwargs)

        def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
            # The Trainer looks at max_steps after a step alone: resumed from the last checkpoint, as after a kill
            # between it and the final save, or by running a finished command again, it would train one step too many.
            if self.state.global_step >= self.state.max_steps:
                self.control.should_training_stop = True
                return None
            return super()._run_epoch(*args, **kwargs)

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            sampler = None if self.adaptive_callback is None else self.adaptive_callback.train_sampler
            if sampler is not None:
                return sampler
            return super()._get_train_sampler(*args, **kwargs)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            if self.adaptive_callback is None:
                super()._save_checkpoint(*args, **kwargs)
                return
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            begin_checkpoint(folder, self.args)
            try:
                super()._save_checkpoint(*args, **kwargs)
            except (OSError, RuntimeError, SafetensorError) as error:
                if not could_not_write(error):
                    raise
                raise cannot_write(folder, error) from error
            if not self.args.save_only_model:
                seal(folder, self.args)

        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            if self.adaptive_callback is not None and not self.args.save_only_model:
                seal(Path(checkpoint_folder), self.args)
            super()._push_from_checkpoint(checkpoint_folder)

        def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
            # Below it is checked that the metric exists, so an evaluation that does not count goes there, too.
            kept = self.state.best_metric, self.state.best_global_step
            is_best = bool(super()._determine_best_metric(*args, **kwargs))
            if self.adaptive_callback is None or self.adaptive_callback.counts_as_best():
                return is_best
            # While there is no best one, transformers' early stopping does not count evaluations either.
            self.state.best_metric, self.state.best_global_step = kept
            return False

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self.adaptive_callback is not None:
                restore_sharded(self.model, Path(resume_from_checkpoint))

        def _load_best_model(self) -> None:
            if self.adaptive_callback is not None:
                check_best(Path(self.state.best_model_checkpoint))
            super()._load_best_model()
            if self.adaptive_callback is not None:
                restore_sharded(self.model, Path(self.state.best_model_checkpoint))

        def _save_rng_state(self, output_dir: str) -> None:
            # Before the Trainer writes its own state, pushes the checkpoint and deletes older ones.
            super()._save_rng_state(output_dir)
            if self.adaptive_callback is not None:
                self.adaptive_callback.save_into(Path(output_dir), self.args, self.state)

    AdaptiveTrainer.__name__, AdaptiveTrainer.__qualname__, AdaptiveTrainer.__module__ = (
        trainer_class.__name__,
        trainer_class.__qualname__,
        __name__,
    )
    return AdaptiveTrainer
