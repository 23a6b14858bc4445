"""The adapter while ranks are being found: ``Delta W = P diag(lambda * mask) Q`` inside PEFT's own LoRA layers.

``lora_A.weight`` (Q) is parametrised by lambda and mask, ``lora_B.weight`` is P. Shapes never change while training,
so that optimizers, DDP buckets and ZeRO partitions hold; what is saved is always plain LoRA with lambda folded into A,
at the full live shape in checkpoints and cut to the true ranks at the end. Shapes: rank r, d_in, d_out; P is (d_out,
r), Q is (r, d_in), lambda and mask are (r,).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llamafactory_adaptive.adapter import live_layers, lora_config_arguments
from llamafactory_adaptive.plan import RankPlan


_ORIGINAL = "parametrizations.weight.original"
_LAMBDA = "parametrizations.weight.0.lambda_r"
_FACTOR_STD = 0.02  # of P and Q at the start, in AdaLoRA and IGU-LoRA alike


class PathPosition:
    """Where on the path from "no adapter" to the current one the forward runs; one object for the whole model.

    Every factor times ``value`` means the product of the three times its cube.
    """

    def __init__(self) -> None:
        self.value = 1.0

    @property
    def cube(self) -> float:
        """Factor on the adapter's output."""
        return self.value**3


class _MaskedScale(torch.autograd.Function):
    """``diag(lambda * mask) Q * factor``, whose gradient for lambda passes as if nothing were masked.

    A masked component adds exactly nothing, yet its lambda learns what it would add: that is how it can come back.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, lambda_r: Tensor, mask_r: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(q, lambda_r, mask_r)
        ctx.factor = factor
        return q * (lambda_r * mask_r).mul_(factor).unsqueeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        q, lambda_r, mask_r = ctx.saved_tensors
        grad_q = grad * (lambda_r * mask_r).mul_(ctx.factor).unsqueeze(1)
        return grad_q, (grad * q).sum(1).mul_(ctx.factor), None, None


class MaskedDiagonal(nn.Module):
    """Parametrisation of ``lora_A.weight``."""

    def __init__(self, lambda_r: Tensor, position: PathPosition) -> None:
        super().__init__()
        self.lambda_r = nn.Parameter(lambda_r)
        self.position = position
        # No buffer: engines that cast or move buffers would cut the view into the one tensor that holds all masks.
        self.mask_r = torch.ones_like(lambda_r)

    def forward(self, q: Tensor) -> Tensor:
        """(r, d_in) to (r, d_in)."""
        masked: Tensor = _MaskedScale.apply(q, self.lambda_r, self.mask_r, self.position.cube)  # type: ignore[no-untyped-call]
        return masked


@dataclass(frozen=True)
class Triplet:
    """The trained tensors of one module."""

    name: str
    diagonal: MaskedDiagonal
    q: nn.Parameter
    p: nn.Parameter

    def parameters(self) -> dict[str, nn.Parameter]:
        """By kind."""
        return {"lambda": self.diagonal.lambda_r, "P": self.p, "Q": self.q}


class Triplets:
    """All modules of one model, in the order of its plan, and their masks.

    Args:
        model: with the LoRA adapter of ``plan`` in it.
        plan: the over-ranked start.
        initial_lambda: value lambda starts from.
        seed: of P and Q; equal on every process.
    """

    def __init__(self, model: nn.Module, plan: RankPlan, initial_lambda: float, seed: int) -> None:
        self.plan = plan
        self.position = PathPosition()
        layers, generator = live_layers(model), torch.Generator().manual_seed(seed)
        self.modules: list[Triplet] = []
        for planned in plan.active:
            layer, adapter = layers[planned.name]
            a, b = layer.lora_A[adapter], layer.lora_B[adapter]
            for factor in (a.weight, b.weight):
                noise = torch.empty(factor.shape).normal_(0.0, _FACTOR_STD, generator=generator)
                factor.data.copy_(noise)
            diagonal = MaskedDiagonal(torch.full_like(a.weight.data[:, 0], initial_lambda), self.position)
            # unsafe: PyTorch would otherwise run the parametrisation now, to see whether shapes stay.
            parametrize.register_parametrization(a, "weight", diagonal, unsafe=True)
            a.register_load_state_dict_pre_hook(_accept_plain_weight)
            self.modules.append(Triplet(planned.name, diagonal, a.parametrizations.weight.original, b.weight))
        self.masks = [[True] * planned.rank for planned in plan.active]
        self.compact: RankPlan | None = None
        self._save_plain(model)

    def mask(self, masks: list[list[bool]]) -> None:
        """Put masks in force, and where the weights now are: one copy to the device for all modules."""
        self.masks = [list(row) for row in masks]
        like = self.modules[0].diagonal.lambda_r
        flat = torch.tensor([flag for row in masks for flag in row], dtype=like.dtype).to(like.device)
        for module, view in zip(self.modules, torch.split(flat, [len(row) for row in masks]), strict=True):
            module.diagonal.mask_r = view

    def ranks(self) -> list[int]:
        """Components in use per module."""
        return [sum(row) for row in self.masks]

    def finish(self, model: nn.Module, plan: RankPlan) -> None:
        """From here on the adapter is saved cut to ``plan``, the ranks that were found."""
        self.compact = plan
        for module in model.modules():
            if isinstance(module, PeftModel):
                for key, value in lora_config_arguments(plan).items():
                    setattr(module.peft_config["default"], key, value)
                module.peft_config["default"].target_modules = {planned.name for planned in plan.active}

    def _save_plain(self, model: nn.Module) -> None:
        """Have PEFT write plain LoRA, whoever calls it and wherever the state dict comes from (ZeRO-3 gathers it)."""
        for module in model.modules():
            if isinstance(module, PeftModel):
                original = module.save_pretrained

                @wraps(original)
                def save(*args: Any, peft_model: PeftModel = module, original: Any = original, **kwargs: Any) -> Any:
                    state = kwargs.pop("state_dict", None)
                    state = peft_model.state_dict() if state is None else state
                    return original(*args, state_dict=self.plain(state), **kwargs)

                module.save_pretrained = save

    def plain(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with plain LoRA factors in place of triplets: lambda folded into A, masked rows zero or cut.

        Args:
            state: tensors by name, as ``model.state_dict()`` gives them; names without a triplet pass as they are.
        """
        masks = {module.name: torch.tensor(row) for module, row in zip(self.modules, self.masks, strict=True)}
        result: dict[str, Tensor] = {}
        for key, tensor in state.items():
            if key.endswith(_LAMBDA):
                continue
            stem, _, factor = key.partition(".lora_")
            mask_r = masks.get(stem.rpartition("base_model.model.")[2])
            if mask_r is None or not factor.startswith(("A.", "B.")):
                result[key] = tensor
                continue
            mask_r = mask_r.to(tensor.device)
            if factor.endswith(_ORIGINAL):
                lambda_r = state[key.removesuffix(_ORIGINAL) + _LAMBDA].to(tensor.device)
                tensor = tensor * (lambda_r * mask_r).unsqueeze(1)
                key = key.removesuffix(_ORIGINAL) + "weight"
            if self.compact is None:
                result[key] = tensor
            elif mask_r.any():
                result[key] = (tensor[mask_r] if factor.startswith("A.") else tensor[:, mask_r]).contiguous()
        return result


def _accept_plain_weight(module: nn.Module, state: dict[str, Tensor], prefix: str, *unused: Any) -> None:
    """Load a plain ``lora_A.weight`` as Q with lambda 1, the same function; exact factors follow from our state."""
    plain = state.pop(prefix + "weight", None)
    if plain is not None:
        state[prefix + _ORIGINAL] = plain
        state[prefix + _LAMBDA] = torch.ones(plain.shape[0], dtype=plain.dtype)
