"""The adapter during a rank search: ``Delta W = P diag(lambda * mask) Q`` inside PEFT's own LoRA layers.

``lora_A`` holds Q and, where the method has it, lambda, and applies the mask; ``lora_B.weight`` is P. Without lambda
it is plain LoRA with a mask. Shapes never change while training, so that optimizers, DDP buckets and ZeRO partitions
stay valid; what is saved is always plain LoRA with lambda folded into A, at the full live shape in checkpoints and cut
to the final ranks at the end. Shapes: rank r, d_in, d_out; P is (d_out, r), Q is (r, d_in), lambda and mask are (r,).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from llamafactory_adaptive.adapter.lora import live_layers, lora_config_arguments, name_targets_in_full, peft_models
from llamafactory_adaptive.ranks.first_update import FACTOR_STD
from llamafactory_adaptive.ranks.plan import RankPlan


_LAMBDA = "lambda_r"


class PathPosition:
    """Position of the forward pass on the path from no adapter (0) to the current one (1), shared by the whole model.

    Scaling each of the three factors by the position scales their product by its cube.

    Attributes:
        strength: factor on the adapter outside of training steps: in evaluation, and in what is saved.
        factor: factor on the adapter in the next forward pass.
    """

    def __init__(self) -> None:
        self.strength = self.factor = 1.0

    def take(self, value: float) -> None:
        """Set the position of the next forward passes of training."""
        self.factor = value**3

    def leave(self) -> None:
        """End a training step: the next forward passes see the adapter as it would be saved."""
        self.factor = self.strength


class _MaskedScale(torch.autograd.Function):
    """Autograd function ``diag(lambda * mask) Q * factor`` whose gradient for lambda ignores the mask.

    A masked component adds exactly zero to the output, yet its lambda still gets the gradient that it would have
    unmasked, so that it can be switched on again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, lambda_r: Tensor, mask_r: Tensor, factor: float) -> Tensor:
        gate_r1 = _column(lambda_r * mask_r, factor)
        ctx.save_for_backward(q, gate_r1)
        ctx.factor = factor
        return q * gate_r1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        q, gate_r1 = ctx.saved_tensors
        # A dot product per row: no (r, d_in) tensor is made for lambda.
        grad_lambda = torch.linalg.vecdot(grad, q)
        return grad * gate_r1, grad_lambda if ctx.factor == 1.0 else grad_lambda * ctx.factor, None, None


def _column(gate_r: Tensor, factor: float) -> Tensor:
    """Compute the factors that the rows of Q are multiplied by, (r, 1)."""
    return (gate_r if factor == 1.0 else gate_r * factor).unsqueeze(1)


class MaskedLinear(nn.Linear):
    """Replacement of a layer's ``lora_A``: ``weight`` is Q, and the layer applies ``diag(lambda * mask) Q``.

    A parametrisation of ``weight`` would do the same at more cost: PEFT reads ``weight`` twice in each forward. Code
    that reads ``weight`` directly (PEFT's merge) gets Q alone; it should work on a saved adapter instead.

    Args:
        plain: the ``lora_A`` to replace; its parameter is reused.
        initial_lambda: initial value of lambda; None for a layer without lambda.
        position: the position that the whole model shares.
    """

    def __init__(self, plain: nn.Linear, initial_lambda: float | None, position: PathPosition) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = plain.weight
        self.position = position
        # No buffer: engines that cast or move buffers would cut the view into the one tensor that holds all masks.
        self.mask_r = torch.ones_like(plain.weight.data[:, 0])
        self.lambda_r: nn.Parameter | None = None
        if initial_lambda is not None:
            self.lambda_r = nn.Parameter(torch.full_like(self.mask_r, initial_lambda))
            self.register_load_state_dict_pre_hook(_accept_plain_weight)  # type: ignore[no-untyped-call]

    def effective_weight(self) -> Tensor:
        """Compute ``diag(lambda * mask) Q`` at the current position, (r, d_in), bit for bit as ``lora_A`` is saved."""
        factor = self.position.factor
        mask_r = self.mask_r.to(self.weight.dtype)  # FSDP computes with copies of another type than the optimizer's
        if self.lambda_r is None:
            return self.weight * _column(mask_r, factor)
        if not torch.is_grad_enabled():  # the first pass of gradient checkpointing, and evaluation
            return self.weight * _column(self.lambda_r * mask_r, factor)
        masked: Tensor = _MaskedScale.apply(self.weight, self.lambda_r, mask_r, factor)  # type: ignore[no-untyped-call]
        return masked

    def forward(self, x: Tensor) -> Tensor:
        """Apply the masked factor to ``x``: (..., d_in) becomes (..., r)."""
        return functional.linear(x, self.effective_weight())


@dataclass(frozen=True)
class Triplet:
    """The trained tensors of one module."""

    name: str
    a: MaskedLinear
    b: nn.Linear

    @property
    def p(self) -> nn.Parameter:
        """Return P, the weight of the second factor, (d_out, r): read anew, since FSDP puts another in its place."""
        return cast(nn.Parameter, self.b.weight)

    @property
    def q(self) -> nn.Parameter:
        """Return Q, the weight of the first factor, (r, d_in)."""
        return cast(nn.Parameter, self.a.weight)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by kind: P, Q and, if the module has one, lambda."""
        lambda_r = {} if self.a.lambda_r is None else {"lambda": self.a.lambda_r}
        return {**lambda_r, "P": self.p, "Q": self.q}


class Triplets:
    """Triplets of all adapted modules of one model, in the order of its plan, and their masks.

    Args:
        model: a model with the LoRA adapter of ``plan`` in it.
        plan: the plan with the live ranks.
        initial_lambda: initial value of lambda; None for an adapter without lambda.
        initial_factors: ``gaussian`` draws P and Q from N(0, 0.02); ``lora`` sets P to 0 and draws Q as LoRA draws A.
        seed: seed of the initial P and Q; equal on every process.
    """

    def __init__(
        self, model: nn.Module, plan: RankPlan, initial_lambda: float | None, initial_factors: str, seed: int
    ) -> None:
        self.position = PathPosition()
        layers, generator = live_layers(model), torch.Generator().manual_seed(seed)
        self.modules: list[Triplet] = []
        for planned in plan.active:
            layer, adapter = layers[planned.name]
            a, b = layer.lora_A[adapter], layer.lora_B[adapter]
            if initial_factors == "lora":
                a.weight.data.copy_(fresh_rows(a.weight.shape, generator))
                b.weight.data.zero_()
            else:
                for factor in (a.weight, b.weight):
                    factor.data.copy_(torch.empty(factor.shape).normal_(0.0, FACTOR_STD, generator=generator))
            layer.lora_A[adapter] = MaskedLinear(a, initial_lambda, self.position)
            self.modules.append(Triplet(planned.name, layer.lora_A[adapter], b))
        self.masks = [[True] * planned.rank for planned in plan.active]
        self.compact: RankPlan | None = None
        self._save_plain(model)

    def mask(self, masks: list[list[bool]]) -> None:
        """Apply new masks, on the device where the weights now are: one copy to it for all modules."""
        self.masks = [list(row) for row in masks]
        like = self.modules[0].q
        flat = torch.tensor([flag for row in masks for flag in row], dtype=like.dtype).to(like.device)
        for module, view in zip(self.modules, torch.split(flat, [len(row) for row in masks]), strict=True):
            module.a.mask_r = view

    def finalize(self, model: nn.Module, plan: RankPlan) -> None:
        """Cut all adapters saved from now on to ``plan``, the ranks that were found."""
        self.compact = plan
        for peft_model in peft_models(model):
            for key, value in lora_config_arguments(plan).items():
                setattr(peft_model.peft_config["default"], key, value)
        name_targets_in_full(model, plan)

    def _save_plain(self, model: nn.Module) -> None:
        """Make PEFT save plain LoRA, whatever calls it and wherever the state dict comes from (ZeRO-3 gathers it)."""
        for peft_model in peft_models(model):
            peft_model.save_pretrained = self._plain_save(peft_model)

    def _plain_save(self, peft_model: PeftModel) -> Callable[..., Any]:
        original = peft_model.save_pretrained

        @wraps(original)
        def save(*args: Any, **kwargs: Any) -> Any:
            state = kwargs.pop("state_dict", None)
            state = peft_model.state_dict() if state is None else state
            return original(*args, state_dict=self.plain(state), **kwargs)

        return save

    def plain(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replace triplets in a state dict by plain LoRA factors: lambda folded into A, masked rows set to 0 or cut.

        What is saved is what an evaluation sees, the strength outside of training included.

        Args:
            state: tensors by name, as ``model.state_dict()`` gives them; names without a triplet pass as they are.
        """
        masks = {module.name: torch.tensor(row) for module, row in zip(self.modules, self.masks, strict=True)}
        result: dict[str, Tensor] = {}
        for key, tensor in state.items():
            stem, _, factor = key.partition(".lora_")
            mask_r = masks.get(stem.rpartition("base_model.model.")[2])
            if mask_r is None or not factor.startswith(("A.", "B.")):
                result[key] = tensor
                continue
            if factor.endswith(_LAMBDA):
                continue
            mask_r = mask_r.to(tensor.device)
            if factor.startswith("A."):
                lambda_r = state.get(key.removesuffix("weight") + _LAMBDA)
                gate_r = mask_r if lambda_r is None else lambda_r.to(tensor.device) * mask_r
                tensor = tensor * _column(gate_r, self.position.strength)
            if self.compact is None:
                result[key] = tensor
            elif mask_r.any():
                result[key] = (tensor[mask_r] if factor.startswith("A.") else tensor[:, mask_r]).contiguous()
        return result


def fresh_rows(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw rows of Q as PEFT initialises ``lora_A`` (Kaiming uniform with a = sqrt(5)): uniform in +-1/sqrt(d_in)."""
    bound = float(shape[-1]) ** -0.5
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


def _accept_plain_weight(module: nn.Module, state: dict[str, Tensor], prefix: str, *unused: Any) -> None:
    """Load a plain ``lora_A.weight`` as Q with lambda 1, the same function; exact factors follow from our state."""
    weight = state.get(prefix + "weight")
    if weight is not None and prefix + _LAMBDA not in state:
        state[prefix + _LAMBDA] = torch.ones_like(weight[:, 0])
