"""Quality terms of every training sample: its loss, gradient norm, loss drop and alignment.

They are measured in one or two passes over the data in whole batches. Weights get no gradients, so that the training
(``.grad``, hooks of DDP and ZeRO, optimizers) is not affected.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llamafactory_adaptive.accelerator import widest_float
from llamafactory_adaptive.calibration.measurement import evaluating
from llamafactory_adaptive.errors import CalibrationError
from llamafactory_adaptive.progress import watched
from llamafactory_adaptive.sampling.clusters import cluster_directions
from llamafactory_adaptive.sampling.sample_gradients import Layers, SampleGradientRecorder, TermSpec


class Batches(Protocol):
    """Batches of a data set: row numbers, and the model's inputs with labels; they can be iterated over twice."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Sequence[int], Mapping[str, Any]]]: ...


@dataclass(frozen=True)
class SampleTerms:
    """Measured terms of every sample, as fp64 vectors of length N on the CPU.

    Attributes:
        loss: mean cross entropy over the labelled tokens; 0 for a sample without any.
        gradient_norm: ``|g_i|`` of that loss over all LoRA factors.
        loss_drop: fall of the sample's own loss after one step on it, ``l(theta) - l(theta - eta g_i)``; to first
            order ``eta |g_i|^2``.
        alignment: ``<g_i, mean g> / |mean g|``: first-order fall of the mean loss, per unit of step, for a step on i.
        cluster: number of the sample's cluster, the largest being 0; -1 where samples were not clustered.
    """

    loss: Tensor
    gradient_norm: Tensor
    loss_drop: Tensor
    alignment: Tensor
    cluster: Tensor

    @property
    def clusters(self) -> Tensor | None:
        """Return the cluster of every sample as whole numbers; None if samples were not clustered."""
        return self.cluster.long() if bool((self.cluster >= 0).all()) else None

    @property
    def measured(self) -> dict[str, Tensor]:
        """Return the measured terms by name, without the clusters."""
        return {name: values for name, values in vars(self).items() if name != "cluster"}


def measure(
    model: nn.Module,
    layers: Layers,
    batches: Batches,
    samples: int,
    spec: TermSpec,
    all_reduce_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    quiet: bool = False,
    title: str = "Scoring samples",
) -> SampleTerms:
    """Measure the terms of every sample; the model is left unchanged.

    Args:
        model: a decoder that returns ``.logits``, with the adapter in it; not the wrapper of DDP or DeepSpeed.
        layers: the LoRA factors of the adapter.
        batches: this process's batches; samples in the batches of others stay zero until ``all_reduce_sum``.
        samples: N, the number of samples of all processes.
        spec: the terms to measure.
        all_reduce_sum: sums a tensor over processes, in place.
        quiet: show no progress bar.
        title: name of the progress bar.

    Raises:
        CalibrationError: a layer does not read whole sequences, a result is not finite, or memory is too small.
    """
    device = next(model.parameters()).device
    found_4N = torch.zeros(4, samples, dtype=torch.float64)
    recorder = SampleGradientRecorder(layers, spec)
    passes = _Passes(batches, device, quiet)
    with _scoring(model), recorder.attached(), _memory_advice(recorder):
        for indices, inputs in passes.named(title):
            found_4N[:3, indices] = _checked(recorder.score(model, inputs), indices)
        if spec.alignment == "exact":
            recorder.share_mean(all_reduce_sum)
            for indices, inputs in passes.named("Aligning samples"):
                found_4N[3, indices] = _checked(recorder.align(model, inputs), indices)
    if spec.alignment == "projected":
        found_4N[3, passes.order] = recorder.projected_alignment(samples, all_reduce_sum, device)
    found_4N = all_reduce_sum(found_4N.to(device, widest_float(device))).cpu()
    cluster_N = torch.full((samples,), -1.0, dtype=torch.float64)
    if spec.clusters:
        x_ND = torch.zeros(samples, recorder.slots * recorder.per_factor)
        x_ND[passes.order] = recorder.projected()
        cluster_N = cluster_directions(all_reduce_sum(x_ND.to(device)).cpu(), spec.clusters, spec.seed).double()
    return SampleTerms(found_4N[0], found_4N[1].sqrt(), found_4N[2], found_4N[3], cluster_N)


class _Passes:
    """One or two passes through the batches, on the device and with a progress bar, and the order of samples."""

    def __init__(self, batches: Batches, device: torch.device, quiet: bool) -> None:
        self.batches, self.device, self.quiet = batches, device, quiet
        self.order: list[int] = []

    def named(self, name: str) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Yield sample numbers and model inputs of every batch, under a progress bar of that name."""
        self.order = []
        for indices, inputs in watched(self.batches, name, self.quiet):
            self.order += indices
            placed = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
            yield list(indices), placed


@contextmanager
def _memory_advice(recorder: SampleGradientRecorder) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CalibrationError(
            f"out of memory while scoring {recorder.batch_size} samples at once: set a smaller tsq_batch_size "
            "(scoring holds the logits that fused losses such as Liger's avoid), or tsq_sampling: false"
        ) from error


def _checked(figures: Tensor, indices: Sequence[int]) -> Tensor:
    """Move the results of a batch, (..., b), to the CPU, and raise an error if one is not finite."""
    on_cpu = figures.double().cpu()
    finite_b = on_cpu.isfinite().reshape(-1, len(indices)).all(0)
    if not bool(finite_b.all()):
        worst = indices[int((~finite_b).nonzero()[0])]
        raise CalibrationError(
            f"the gradient of sample {worst} of the training set is not finite: check the base model and its dtype; "
            "where it happens during training, that has diverged: lower learning_rate"
        )
    return on_cpu


@contextmanager
def _scoring(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode without dropout; gradients flow from the embeddings on, to activations only.

    Gradient checkpointing stays on where it is on: its layers need their training flag (some apply dropout by that
    flag themselves), and LLaMA-Factory's version also requires a trainable parameter in them.
    """
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        stack.callback(embeddings.register_forward_hook(lambda module, args, output: _needing(output)).remove)
        for layer in layers:
            layer.training = True  # of this module alone, not of its children
            for name, rate in [(k, v) for k, v in vars(layer).items() if "dropout" in k and isinstance(v, float)]:
                setattr(layer, name, 0.0)
                stack.callback(setattr, layer, name, rate)
            layer.register_parameter("_scored", nn.Parameter(torch.empty(0, device=device)))
            stack.callback(layer._parameters.pop, "_scored")
        yield


def _needing(output: Tensor) -> Tensor:
    return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_(True)
