"""Gradients of single samples from one backward pass over a batch, recorded by taps on every LoRA factor.

The gradient of sample i at a factor is a sum over tokens of outer products, ``sum_t left_t right_t^T``, of two tensors
that autograd has anyway: the gradient at the factor's output and its input. Its norm needs no backward pass per sample
and, where tokens are few, not even that sum (the ghost norm: Goodfellow, arXiv 1510.01799; Li et al., arXiv
2110.05679).
Shapes: b samples, t tokens, k and j the two sides of a factor, v vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llamafactory_adaptive.accelerator import widest_float
from llamafactory_adaptive.calibration.batches import IGNORE_INDEX
from llamafactory_adaptive.calibration.weight_gradients import squared_norms
from llamafactory_adaptive.errors import CalibrationError
from llamafactory_adaptive.seeding import seeded_index


# A and B of every adapted module, by module name.
Layers = Mapping[str, tuple[nn.Module, nn.Module]]
_FEWEST_SIGNS = 8  # random products per factor


@dataclass(frozen=True)
class TermSpec:
    """Selection of the terms to measure, and how to measure them.

    Attributes:
        step_size: eta of the loss drop.
        exact_drop: measure the loss drop by a second forward pass at the stepped weights, not to first order as
            ``eta |g_i|^2``.
        alignment: ``none`` (zeros), ``projected`` (random projection, same pass) or ``exact`` (a second pass).
        dimensions: number of dimensions of the projection.
        seed: seed of the projection, and of the clusters.
        clusters: number of clusters to sort samples into, by their projected gradients; 0 for none.
    """

    step_size: float
    exact_drop: bool
    alignment: str
    dimensions: int
    seed: int
    clusters: int = 0

    @property
    def projects(self) -> bool:
        """Tell whether gradients are projected."""
        return self.alignment == "projected" or self.clusters > 0


def sample_losses(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Compute each sample's mean next-token cross entropy over its labelled tokens, (b,); 0 for one without any.

    The model gets no labels, which turns fused losses (Liger) off. The output head runs from the first labelled token
    of the batch on, if the model has ``logits_to_keep``.
    """
    labels_bt = inputs["labels"]
    rest = {key: value for key, value in inputs.items() if key != "labels"}
    targets_bt = labels_bt[:, 1:]
    labelled = (targets_bt != IGNORE_INDEX).any(0).nonzero()
    first = int(labelled[0]) if len(labelled) else 0
    if "logits_to_keep" in _forward_arguments(model):
        rest["logits_to_keep"] = torch.arange(first, labels_bt.shape[1], device=labels_bt.device)
        targets_bt = targets_bt[:, first:]
    logits_btv = model(**rest, use_cache=False).logits[:, :-1]
    losses_bt = functional.cross_entropy(
        logits_btv.flatten(0, 1).float(), targets_bt.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view(targets_bt.shape)
    losses_b: Tensor = losses_bt.sum(1) / (targets_bt != IGNORE_INDEX).sum(1).clamp(min=1)
    return losses_b


def _forward_arguments(model: nn.Module) -> Collection[str]:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return signature(base.forward).parameters


class Tap(torch.autograd.Function):
    """Identity on a layer's output whose backward pass gives ``take`` the output's gradient and the layer's input.

    The input is saved by autograd itself, so that gradient checkpointing recomputes it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
        """Return the output as it is, and save the input."""
        ctx.save_for_backward(x)
        ctx.take = take
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        """Pass the output's gradient on, and show it to ``take``."""
        (x,) = ctx.saved_tensors
        ctx.take(grads[0], x)
        return None, grads[0], None


class SampleGradientRecorder:
    """Taps on every LoRA factor, and the sums of what they record.

    Args:
        layers: A and B by module name.
        spec: the terms to measure.
    """

    def __init__(self, layers: Layers, spec: TermSpec) -> None:
        self.layers, self.spec = layers, spec
        self.batch_size = 0
        self.phase = "score"
        self.squared_b = torch.empty(0)
        self.dots_b = torch.empty(0)
        self.kept: dict[str, Tensor] = {}  # per-sample gradients of the batch, (b, k, j), for the exact loss drop
        self.total: dict[str, Tensor] = {}  # over all samples, (k, j), for the exact alignment
        self.signs: dict[str, tuple[Tensor, Tensor]] = {}
        self.per_factor = max(_FEWEST_SIGNS, spec.dimensions // (2 * len(layers)))
        self.slots = max(1, spec.dimensions // self.per_factor)  # factors beyond the last slot share one
        self.projected_bD = torch.empty(0)
        self.projections: list[Tensor] = []  # of the batches so far, on the CPU

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Register hooks on A and B of every module for the time of the context."""
        with ExitStack() as stack:
            for index, (name, (a, b)) in enumerate(self.layers.items()):
                # The gradient at A is zero as long as B is: a new adapter needs no look at A.
                if bool(b.weight.any()):  # type: ignore[operator]
                    self._attach(stack, f"{name}.A", 2 * index, a)
                self._attach(stack, f"{name}.B", 2 * index + 1, b)
            yield

    def _attach(self, stack: ExitStack, key: str, index: int, factor: nn.Module) -> None:
        hook = self._hook(key, index, getattr(factor, "mask_r", None))
        stack.callback(factor.register_forward_hook(hook).remove)
        if self.spec.alignment == "exact":  # on a process without batches, too: sums are taken over all
            self.total[key] = torch.zeros_like(factor.weight, dtype=torch.float32)  # type: ignore[arg-type]

    def _hook(self, key: str, index: int, mask_r: Tensor | None) -> Callable[..., Tensor]:
        def take(gradient: Tensor, x: Tensor) -> None:
            left = gradient.float() if mask_r is None else gradient.float() * mask_r
            self._add(key, index, left, x.float())

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0]
            if self.phase == "stepped":
                change = x.float() @ self.kept[key].mT if key in self.kept else 0.0
                return (output - self.spec.step_size * change).to(output.dtype)
            if x.dim() != 3 or len(x) != self.batch_size:
                raise CalibrationError(
                    f"{key[:-2]} reads {tuple(x.shape)} where the batch has {self.batch_size} samples (a routed "
                    "expert or an image tower?), so its gradients belong to no sample; take it out of lora_target or "
                    "set tsq_sampling: false"
                )
            tapped: Tensor = Tap.apply(x, output, take)  # type: ignore[no-untyped-call]
            return tapped

        return hook

    def _add(self, key: str, index: int, left_btk: Tensor, right_btj: Tensor) -> None:
        if self.phase == "align":
            self.dots_b += ((left_btk @ self.total[key]) * right_btj).sum((1, 2))
            return
        if self.spec.exact_drop:
            self.kept[key] = left_btk.mT @ right_btj
            self.squared_b += self.kept[key].square().sum((1, 2))
        else:
            self.squared_b += squared_norms(left_btk, right_btj)
        if self.spec.alignment == "exact":
            self.total[key] += left_btk.flatten(0, 1).mT @ right_btj.flatten(0, 1)
        if self.spec.projects:
            self._project(key, index, left_btk, right_btj)

    def _backward(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        self.batch_size, device = len(inputs["labels"]), inputs["labels"].device
        self.squared_b = torch.zeros(self.batch_size, device=device)
        self.dots_b = torch.zeros(self.batch_size, device=device)
        self.projected_bD = torch.zeros(self.batch_size, self.slots * self.per_factor, device=device)
        losses_b = sample_losses(model, inputs)
        losses_b.sum().backward()  # type: ignore[no-untyped-call]
        return losses_b.detach()

    def score(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Measure losses, squared gradient norms and loss drops of one batch, (3, b)."""
        losses_b = self._backward(model, inputs)
        if self.spec.projects:
            self.projections.append(self.projected_bD.cpu())
        drops_b = self.spec.step_size * self.squared_b
        if self.spec.exact_drop:
            self.phase = "stepped"
            with torch.no_grad():
                drops_b = losses_b - sample_losses(model, inputs)
            self.phase = "score"
        return torch.stack([losses_b, self.squared_b, drops_b])

    # -- alignment ---------------------------------------------------------------------------------------------------

    def share_mean(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Convert the gradient sums of all processes to the unit vector along the mean gradient, for :meth:`align`."""
        self.total = {key: all_reduce_sum(total) for key, total in self.total.items()}
        norm = torch.stack([total.square().sum() for total in self.total.values()]).sum().sqrt()
        self.total = {key: total / norm.clamp(min=1e-30) for key, total in self.total.items()}
        self.phase = "align"

    def align(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Compute ``<g_i, mean g> / |mean g|`` for the samples of one batch, (b,)."""
        self._backward(model, inputs)
        return self.dots_b

    def _project(self, key: str, index: int, left_btk: Tensor, right_btj: Tensor) -> None:
        """Compute a factor's products with random signs ``u v^T``, for unbiased estimates of inner products."""
        if key not in self.signs:
            generator = torch.Generator().manual_seed(seeded_index(self.spec.seed, index, 0, 2**62))
            sides = (left_btk.shape[2], right_btj.shape[2])
            self.signs[key] = tuple(  # type: ignore[assignment]
                (torch.randint(0, 2, (side, self.per_factor), generator=generator) * 2.0 - 1.0).to(left_btk.device)
                for side in sides
            )
        u_kd, v_jd = self.signs[key]
        products_bd = ((left_btk @ u_kd) * (right_btj @ v_jd)).sum(1) / self.per_factor**0.5
        start = index % self.slots * self.per_factor
        self.projected_bD[:, start : start + self.per_factor] += products_bd

    def projected(self) -> Tensor:
        """Return the projected gradients of this process's samples, in scoring order, (n, D)."""
        return torch.cat([torch.zeros(0, self.slots * self.per_factor), *self.projections])

    def projected_alignment(
        self, samples: int, all_reduce_sum: Callable[[Tensor], Tensor], device: torch.device
    ) -> Tensor:
        """Compute the alignment of this process's samples in scoring order; the mean is over all ``samples``."""
        p_nD = self.projected()
        sum_D = p_nD.sum(0, dtype=torch.float64).to(device, widest_float(device))
        mean_D = all_reduce_sum(sum_D).cpu() / samples
        unit_D = (mean_D / mean_D.norm().clamp(min=1e-30)).float()
        alignment_n: Tensor = (p_nD @ unit_D).double()
        return alignment_n
