"""All elements of all rank-1 components as a few flat blocks: what is observed, summed and regularised together.

Hundreds of small factors are handled as one tensor per kind and shape. Under ZeRO a block holds this process's pieces,
and only sums per component cross processes. Shapes: M modules of one block, r rank, k width (d_in for Q, d_out for P).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llamafactory_adaptive.config import GuardError
from llamafactory_adaptive.gradients import Engine, add_up, full_shape, processes
from llamafactory_adaptive.methods import DynamicMethod, Orthogonality
from llamafactory_adaptive.triplet import Triplets


@dataclass(frozen=True)
class Block:
    """Parameters of one kind and shape.

    Attributes:
        name: ``<kind>/<shape>``.
        kind: ``lambda``, ``P`` or ``Q``.
        shape: of one parameter: (r,), (d_out, r) or (r, d_in).
        modules: index of each parameter's module.
        parameters: themselves.
        pieces: start and length of what this process owns of each, flattened.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    modules: tuple[int, ...]
    parameters: tuple[nn.Parameter, ...]
    pieces: tuple[tuple[int, int], ...]

    @property
    def rank(self) -> int:
        """r of its parameters."""
        return self.shape[1] if self.kind == "P" else self.shape[0]

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat block into its pieces."""
        return list(torch.split(flat, [length for _, length in self.pieces]))

    def by_component(self, x_MX: Tensor) -> Tensor:
        """Whole parameters, flat per module (M, numel), to their means per component (M, r)."""
        x = x_MX.view(-1, *self.shape)
        return x if self.kind == "lambda" else x.mean(1 if self.kind == "P" else 2)

    def spread(self, per_component_Mr: Tensor) -> Tensor:
        """One value per component to all its elements, (M, numel)."""
        x = per_component_Mr
        if self.kind == "Q":
            x = x.unsqueeze(2)
        elif self.kind == "P":
            x = x.unsqueeze(1)
        return x.expand(-1, *self.shape).reshape(len(self.modules), -1)


class Components:
    """Blocks of one model under one engine.

    Args:
        triplets: the adapter.
        engine: where its weights and gradients are.
    """

    def __init__(self, triplets: Triplets, engine: Engine) -> None:
        self.triplets, self.engine = triplets, engine
        found: dict[tuple[str, tuple[int, ...]], list[tuple[int, nn.Parameter]]] = {}
        for index, module in enumerate(triplets.modules):
            for kind, parameter in module.parameters().items():
                found.setdefault((kind, full_shape(parameter)), []).append((index, parameter))
        self.blocks = [
            Block(
                f"{kind}/{'x'.join(map(str, shape))}",
                kind,
                shape,
                tuple(index for index, _ in members),
                tuple(parameter for _, parameter in members),
                tuple(engine.piece(parameter) for _, parameter in members),
            )
            for (kind, shape), members in found.items()
        ]

    def weights(self, block: Block) -> Tensor:
        """Owned weights of a block, flat, fp32, a copy."""
        return self._to_device(torch.cat([self.engine.weight(parameter) for parameter in block.parameters]))

    def _to_device(self, flat: Tensor) -> Tensor:
        """To where the masks are, in fp32; engines with offload keep their pieces elsewhere."""
        return flat.to(self.triplets.modules[0].diagonal.mask_r.device, torch.float32)

    def gradients(self, block: Block) -> list[Tensor]:
        """Owned gradients, one flat tensor per parameter, to be edited in place.

        Raises:
            GuardError: no gradient arrived.
        """
        found = self.engine.gradients(block.parameters)
        lost = [self.triplets.modules[m].name for m, g in zip(block.modules, found, strict=True) if g is None]
        if lost:
            raise GuardError(f"{block.kind} of {len(lost)} modules has no gradient, for example of {lost[0]}")
        return [gradient for gradient in found if gradient is not None]

    def masks(self, block: Block) -> Tensor:
        """1.0 for components in use, (M, r)."""
        return torch.stack([self.triplets.modules[index].diagonal.mask_r for index in block.modules]).float()

    def live(self, block: Block) -> Tensor | None:
        """Per owned element, 1.0 where its gradient says something; None when every one does."""
        masked = any(not all(self.triplets.masks[index]) for index in block.modules)
        if block.kind == "lambda" or not masked:
            return None
        return self._owned(block, block.spread(self.masks(block)))

    def _owned(self, block: Block, x_MX: Tensor) -> Tensor:
        """Whole parameters, (M, numel), to this process's pieces, flat."""
        if not self.engine.partitioned:
            return x_MX.reshape(-1)
        return torch.cat(
            [row[start : start + length] for row, (start, length) in zip(x_MX, block.pieces, strict=True)]
        )

    def _whole(self, block: Block, flat: Tensor) -> Tensor:
        """This process's pieces, flat, to whole parameters (M, numel) with zeros where others own them."""
        if not self.engine.partitioned:
            return flat.view(len(block.modules), -1)
        whole_MX = flat.new_zeros(len(block.modules), math.prod(block.shape))
        for row, piece, (start, length) in zip(whole_MX, block.split(flat), block.pieces, strict=True):
            row[start : start + length] = piece
        return whole_MX

    def scores(self, method: DynamicMethod) -> list[list[float]]:
        """Score of every component by module: lambda's, plus the means over its column of P and its row of Q.

        One collective for all of them under ZeRO. The only place that waits for the device.
        """
        ranks = [len(row) for row in self.triplets.masks]
        like = self.triplets.modules[0].diagonal.mask_r
        totals = torch.zeros(len(ranks), max(ranks), dtype=torch.float32, device=like.device)
        for block in self.blocks:
            flat = method.element_scores(block.name, self.weights(block))
            totals[list(block.modules), : block.rank] += block.by_component(self._whole(block, flat))
        if self.engine.partitioned:
            add_up(totals)
        return [row[:rank] for row, rank in zip(totals.tolist(), ranks, strict=True)]

    def observe(self, method: DynamicMethod, overflow_is_possible: bool) -> None:
        """Show every block of training gradients to the method.

        Args:
            method: who looks.
            overflow_is_possible: fp16 gradients may be infinite at a step that the loss scaler will skip; such
                elements show a zero gradient then. Otherwise NaN is let through, to be found at the next allocation.
        """
        scale = self.engine.loss_scale()
        for block in self.blocks:
            flat = self._to_device(torch.cat(self.gradients(block)))
            if scale != 1.0:
                flat.div_(scale)
            if overflow_is_possible:
                flat.nan_to_num_(0.0, 0.0, 0.0)
            method.observe(block.name, self.weights(block), flat, self.live(block))

    def observe_given(self, method: DynamicMethod, gradients: Iterable[Sequence[Tensor]]) -> None:
        """The same for gradients from elsewhere: whole ones, a sequence per block, averaged over processes here."""
        for block, found in zip(self.blocks, gradients, strict=True):
            whole_MX = torch.stack([gradient.reshape(-1) for gradient in found]).float()
            add_up(whole_MX).div_(processes())
            method.observe(block.name, self.weights(block), self._owned(block, whole_MX), self.live(block))

    def regularise(self, orthogonality: Orthogonality) -> None:
        """Add the regulariser's gradient, in closed form, to the training gradient.

        For ``E`` the counted part of a Gram matrix, ``d|E|_F/dQ = 2 E Q / |E|_F`` and ``d|E|_F/dP = 2 P E / |E|_F``.
        """
        factors = [block for block in self.blocks if block.kind != "lambda"]
        count = sum(len(block.modules) for block in factors)
        scale = orthogonality.weight / count * self.engine.loss_scale()
        with self.engine.whole([parameter for block in factors for parameter in block.parameters]):
            for block in factors:
                x_Mrk = torch.stack([parameter.detach() for parameter in block.parameters]).float()
                x_Mrk = x_Mrk.transpose(1, 2) if block.kind == "P" else x_Mrk
                added_Mrk = gram_penalty_gradient(x_Mrk, orthogonality.form).mul_(scale)
                added_Mrk = added_Mrk.transpose(1, 2) if block.kind == "P" else added_Mrk
                gradients = self.gradients(block)
                added = block.split(self._owned(block, added_Mrk.reshape(len(block.modules), -1)))
                torch._foreach_add_(gradients, [piece.to(gradients[0]) for piece in added])
                self.engine.set_gradients(block.parameters, gradients)

    def hold_masked(self) -> None:
        """Take the training gradient from the lambda of masked components: it was only to be observed."""
        if all(all(row) for row in self.triplets.masks):
            return
        for block in self.blocks:
            if block.kind == "lambda":
                gradients = self.gradients(block)
                kept = block.split(self._owned(block, self.masks(block)).to(gradients[0]))
                torch._foreach_mul_(gradients, kept)
                self.engine.set_gradients(block.parameters, gradients)


def gram_penalty_gradient(x_Mrk: Tensor, form: str) -> Tensor:
    """Gradient of the sum over M of ``|E(X X^T)|_F``, E dropping the diagonal or the identity; zero where E is."""
    gram_Mrr = x_Mrk @ x_Mrk.transpose(1, 2)
    if form == "off_diagonal":
        gram_Mrr.diagonal(dim1=1, dim2=2).zero_()
    else:
        gram_Mrr.diagonal(dim1=1, dim2=2).sub_(1.0)
    norm_M = gram_Mrr.flatten(1).norm(dim=1)
    factor_M = torch.where(norm_M > 0, 2.0 / norm_M, torch.zeros_like(norm_M))
    gram_Mrr.mul_(factor_M.view(-1, 1, 1))
    return gram_Mrr @ x_Mrk
