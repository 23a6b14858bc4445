"""Observation of gradients by a dynamic method, between backward pass and optimizer step."""

import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from llamafactory_adaptive.accelerator import Stopwatch
from llamafactory_adaptive.adapter.lora import live_factors
from llamafactory_adaptive.engines.distributed import synchronize, world_size
from llamafactory_adaptive.engines.engine import full_shape
from llamafactory_adaptive.methods import DynamicMethod, ProbingMethod
from llamafactory_adaptive.sampling.sample_moments import SampleMoments
from llamafactory_adaptive.training.components import Components
from llamafactory_adaptive.training.path_probe import Prober
from llamafactory_adaptive.training.probe_budget import ProbeBudget
from llamafactory_adaptive.training.run_log import Counters


class Observer:
    """Source of a method's observations: the gradients of every step or of extra passes, until the ranks are final.

    Args:
        method: dynamic method that observes.
        components: components of the live adapter.
        trainer: Trainer of the run, for its model and arguments.
        counters: counters of the run, which are updated.
        seed: seed of the draws.
        max_overhead: most seconds of extra passes per second of training; None for no limit.
    """

    def __init__(
        self,
        method: DynamicMethod,
        components: Components,
        trainer: Any,
        counters: Counters,
        seed: int,
        max_overhead: float | None,
    ) -> None:
        self.method, self.components, self.trainer, self.counters = method, components, trainer, counters
        self.seed, self.probe_budget = seed, ProbeBudget(max_overhead)
        self.position = components.triplets.position
        self.step = self.micro_batch = 0
        self.stopwatch = Stopwatch(components.triplets.modules[0].a.mask_r.device)
        self.prober = Prober(trainer.model, components, seed) if method.traits.probes else None
        moment = method.traits.sample_moment
        self.moments = SampleMoments(live_factors(trainer.model), moment) if moment else None

    def close(self) -> None:
        """Remove what was hooked into the model; another observer takes this one's place."""
        for hooked in (self.prober, self.moments):
            if hooked is not None:
                hooked.close()

    def begin(self, step: int, final: bool) -> None:
        """Set the path position of a step's first micro-batch, and whether its batch is kept for extra passes."""
        self.step, self.micro_batch = step, 0
        self.probe_budget.begin()
        self._take_position(final)
        if self.prober is not None and self._path(final):
            self.prober.armed = True
        if self.moments is not None and not final:
            self.moments.begin()

    def next_micro_batch(self, final: bool) -> None:
        """Set the path position of the next micro-batch."""
        self.micro_batch += 1
        self._take_position(final)

    def _take_position(self, final: bool) -> None:
        self.position.take(1.0 if final else self.method.position(self.seed, self.step, self.micro_batch))

    def _path(self, final: bool) -> list[tuple[float, float]] | None:
        """Return the extra passes of this step; None for the training gradient instead, an empty list for nothing."""
        if final:
            return []
        if self.prober is None:
            return None
        path = cast(ProbingMethod, self.method).path(self.seed, self.step)
        return path if self.probe_budget.due(self.step) else []

    def before_step(self, final: bool) -> None:
        """Observe the unclipped gradients or extra passes, then adjust the gradients that the optimizer uses."""
        self.probe_budget.trained()
        with self.stopwatch.running():
            self._observe(final)

    def _observe(self, final: bool) -> None:
        path = self._path(final)
        if path:
            self._probe(path)
        if by_sample := self.moments is not None and self.moments.active:
            self._observe_samples()
        observes = path is None and not by_sample and not self.method.traits.spectral
        self.components.update(
            self.method if observes else None,
            self.method.orthogonality,
            overflow_is_possible=self.trainer.args.fp16,
        )
        self.counters.observations += path is None

    def _observe_samples(self) -> None:
        """Pass the moments of the step's samples to the method, loss scale taken out."""
        assert self.moments is not None
        moments = [[self._moment(parameter) for parameter in block.parameters] for block in self.components.blocks]
        overflow_is_possible = self.trainer.args.fp16
        self.components.observe_given(self.method, moments, self.moments.order, overflow_is_possible)

    def _moment(self, parameter: nn.Parameter) -> Tensor:
        """Return the moment of a parameter's gradient over this process's samples, loss scale taken out."""
        assert self.moments is not None
        moment = self.moments.take(parameter)
        if moment is None:
            return torch.zeros(full_shape(parameter), device=parameter.device)
        scale = self.components.engine.loss_scale()
        return moment if scale == 1.0 else moment.div_(scale**self.moments.order)

    def _probe(self, path: Sequence[tuple[float, float]]) -> None:
        assert self.prober is not None
        synchronize()
        started = time.perf_counter()
        # A loss divided by the tokens of the whole step, all micro-batches and processes, is that share of the mean.
        shares = self.trainer.current_gradient_accumulation_steps
        shares *= world_size() if self.trainer.args.average_tokens_across_devices else 1
        self.components.observe_given(self.method, self.prober.gradients(path, shares))
        synchronize()
        self.probe_budget.probed(self.step, time.perf_counter() - started, self.trainer.args.device)
        self.counters.observations += 1
        self.counters.probes += 1

    def take_seconds(self) -> float:
        """Return the seconds that observing took since the last call, as far as the device has done it by now."""
        return self.stopwatch.take()
