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

from llamafactory_adaptive.adapter.effective_weights import EffectiveWeights
from llamafactory_adaptive.adapter.lora import live_layers, lora_config_arguments, name_targets_in_full, peft_models
from llamafactory_adaptive.adapter.masked_linear import LAMBDA, MaskedLinear, PathPosition, column
from llamafactory_adaptive.ranks.first_update import FACTOR_STD
from llamafactory_adaptive.ranks.plan import RankPlan


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
        self._start = initial_lambda, initial_factors, seed
        layers = live_layers(model)
        self.modules: list[Triplet] = []
        for planned in plan.active:
            layer, adapter = layers[planned.name]
            layer.lora_A[adapter] = MaskedLinear(layer.lora_A[adapter], initial_lambda, self.position)
            self.position.join(layer, adapter)
            self.modules.append(Triplet(planned.name, layer.lora_A[adapter], layer.lora_B[adapter]))
        self.draw()
        self.masks = [[True] * planned.rank for planned in plan.active]
        self.compact: RankPlan | None = None
        self.effective: EffectiveWeights | None = None
        self._save_plain(model)

    @torch.no_grad()
    def draw(self) -> None:
        """Set lambda, P and Q to their start, equal on every process."""
        initial_lambda, initial_factors, seed = self._start
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules:
            if initial_factors == "lora":
                module.q.copy_(fresh_rows(module.q.shape, generator))
                module.p.zero_()
            else:
                for factor in (module.q, module.p):
                    factor.copy_(torch.empty(factor.shape).normal_(0.0, FACTOR_STD, generator=generator))
            if initial_lambda is not None and module.a.lambda_r is not None:
                module.a.lambda_r.fill_(initial_lambda)

    def share_weights(self, model: nn.Module) -> None:
        """Compute the effective weights of all modules together from now on, before DDP wraps the model."""
        self.effective = EffectiveWeights(model, [module.a for module in self.modules], self.position)
        self.effective.remask(self.masks)

    def settle_gradients(self) -> None:
        """Make the gradients at hand those of P, Q and lambda, when those of a step are complete."""
        if self.effective is not None:
            self.effective.settle()

    def mask(self, masks: list[list[bool]]) -> None:
        """Apply new masks, on the device where the weights now are: one copy to it for all modules."""
        self.masks = [list(row) for row in masks]
        like = self.modules[0].q
        flat = torch.tensor([flag for row in masks for flag in row], dtype=like.dtype).to(like.device)
        for module, view in zip(self.modules, torch.split(flat, [len(row) for row in masks]), strict=True):
            module.a.mask_r = view
        if self.effective is not None:
            self.effective.remask(self.masks)

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
            if factor.endswith(LAMBDA):
                continue
            mask_r = mask_r.to(tensor.device)
            if factor.startswith("A."):
                lambda_r = state.get(key.removesuffix("weight") + LAMBDA)
                gate_r = mask_r if lambda_r is None else lambda_r.to(tensor.device) * mask_r
                tensor = tensor * column(gate_r, self.position.strength)
            if self.compact is None:
                result[key] = tensor
            elif mask_r.any():
                result[key] = (tensor[mask_r] if factor.startswith("A.") else tensor[:, mask_r]).contiguous()
        return result


def fresh_rows(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw rows of Q as PEFT initialises ``lora_A`` (Kaiming uniform with a = sqrt(5)): uniform in +-1/sqrt(d_in)."""
    bound = float(shape[-1]) ** -0.5
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)
