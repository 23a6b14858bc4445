"""The elements of all rank-1 components in a few flat blocks, which are observed, summed and regularised as a whole.

Hundreds of small factors are handled as one tensor per kind and shape. Under ZeRO a block holds this process's pieces,
and only sums per component are exchanged. Shapes: M modules of one block, r rank, k width (d_in for Q, d_out for P).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from llamafactory_adaptive.adapter.masked_lora import Triplets, fresh_rows
from llamafactory_adaptive.engines.distributed import all_reduce_sum, world_size
from llamafactory_adaptive.engines.engine import Engine, full_shape
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.methods import DynamicMethod, Orthogonality
from llamafactory_adaptive.training.regulariser import gram_penalty_gradient


@dataclass(frozen=True)
class Block:
    """Parameters of one kind and shape.

    Attributes:
        name: ``<kind>/<shape>``.
        kind: ``lambda``, ``P`` or ``Q``.
        shape: of one parameter: (r,), (d_out, r) or (r, d_in).
        modules: index of each parameter's module.
        parameters: the parameters.
        pieces: start and length of this process's part of each flattened parameter.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    modules: tuple[int, ...]
    parameters: tuple[nn.Parameter, ...]
    pieces: tuple[tuple[int, int], ...]

    @property
    def rank(self) -> int:
        """Return r, the rank of the block's parameters."""
        return self.shape[1] if self.kind == "P" else self.shape[0]

    def split(self, flat: Tensor) -> list[Tensor]:
        """Split a flat block into the pieces of its parameters."""
        return list(torch.split(flat, [length for _, length in self.pieces]))

    def by_component(self, x_MX: Tensor) -> Tensor:
        """Average whole parameters, flat per module (M, numel), over each component: (M, r)."""
        x = x_MX.view(-1, *self.shape)
        return x if self.kind == "lambda" else x.mean(1 if self.kind == "P" else 2)

    def spread(self, per_component_Mr: Tensor) -> Tensor:
        """Copy each component's value to all its elements, (M, numel)."""
        x = per_component_Mr
        if self.kind == "Q":
            x = x.unsqueeze(2)
        elif self.kind == "P":
            x = x.unsqueeze(1)
        return x.expand(-1, *self.shape).reshape(len(self.modules), -1)


class Components:
    """The adapter of one model in blocks, which an engine reads and writes.

    Args:
        triplets: adapter as masked triplets.
        engine: access to its weights, gradients and optimizer states.
    """

    def __init__(self, triplets: Triplets, engine: Engine) -> None:
        self.triplets, self.engine = triplets, engine
        groups: dict[tuple[str, tuple[int, ...]], list[tuple[int, nn.Parameter]]] = {}
        for index, module in enumerate(triplets.modules):
            for kind, parameter in module.parameters().items():
                groups.setdefault((kind, full_shape(parameter)), []).append((index, parameter))
        self.blocks = [
            Block(
                f"{kind}/{'x'.join(map(str, shape))}",
                kind,
                shape,
                tuple(index for index, _ in members),
                tuple(parameter for _, parameter in members),
                tuple(engine.piece(parameter) for _, parameter in members),
            )
            for (kind, shape), members in groups.items()
        ]
        self.parameters = [parameter for block in self.blocks for parameter in block.parameters]
        self.first_kind = next(iter(triplets.modules[0].parameters()))
        self.arrived = False

    def weights(self, block: Block) -> Tensor:
        """Copy this process's weights of a block into a flat fp32 tensor."""
        return self._to_device(torch.cat(self.engine.weights(block.parameters)))

    def _to_device(self, flat: Tensor) -> Tensor:
        """Convert a tensor to fp32 on the device of the masks; engines with offload keep pieces elsewhere."""
        return flat.to(self.triplets.modules[0].a.mask_r.device, torch.float32)

    def masks(self, block: Block) -> Tensor:
        """Return the masks of a block's modules, (M, r): 1.0 for components in use."""
        return torch.stack([self.triplets.modules[index].a.mask_r for index in block.modules]).float()

    def live(self, block: Block) -> Tensor | None:
        """Return 1.0 per owned element in use, 0.0 for masked elements of P and Q; None if all are in use."""
        if block.kind == "lambda" or not self._is_masked(block):
            return None
        return self._owned(block, block.spread(self.masks(block)))

    def _is_masked(self, block: Block) -> bool:
        """Tell whether any component of the block is masked."""
        return any(not all(self.triplets.masks[index]) for index in block.modules)

    def _owned(self, block: Block, x_MX: Tensor) -> Tensor:
        """Select this process's pieces of whole parameters, (M, numel), as a flat tensor."""
        if not self.engine.partitioned:
            return x_MX.reshape(-1)
        return torch.cat(
            [row[start : start + length] for row, (start, length) in zip(x_MX, block.pieces, strict=True)]
        )

    def _scatter_to_full(self, block: Block, flat: Tensor) -> Tensor:
        """Put this process's flat pieces into whole parameters, (M, numel), with zeros where others own them."""
        if not self.engine.partitioned:
            return flat.view(len(block.modules), -1)
        full_MX = flat.new_zeros(len(block.modules), math.prod(block.shape))
        for row, piece, (start, length) in zip(full_MX, block.split(flat), block.pieces, strict=True):
            row[start : start + length] = piece
        return full_MX

    def scores(self, method: DynamicMethod, mean: bool = False) -> list[list[float]]:
        """Score every component by module: lambda's score, plus the means over its column of P and its row of Q.

        Under ZeRO this is one collective for all; the call waits for the device.

        Args:
            method: method that scores the elements.
            mean: whether to take the mean over all elements of the component instead.
        """
        ranks = [len(row) for row in self.triplets.masks]
        like = self.triplets.modules[0].a.mask_r
        totals = torch.zeros(len(ranks), max(ranks), dtype=torch.float32, device=like.device)
        for block in self.blocks:
            flat = method.element_scores(block.name, self.weights(block))
            per_component_Mr = block.by_component(self._scatter_to_full(block, flat))
            if mean:
                per_component_Mr = per_component_Mr * self._share_of_component(block)[:, None]
            totals[list(block.modules), : block.rank] += per_component_Mr
        if self.engine.partitioned:
            all_reduce_sum(totals)
        return [row[:rank] for row, rank in zip(totals.tolist(), ranks, strict=True)]

    def _share_of_component(self, block: Block) -> Tensor:
        """Compute the share of a component's elements that a block holds, per module (M,)."""
        held = math.prod(block.shape) // block.rank
        every = [
            sum(math.prod(full_shape(p)) for p in self.triplets.modules[index].parameters().values()) // block.rank
            for index in block.modules
        ]
        return torch.tensor([held / count for count in every], device=self.triplets.modules[0].a.mask_r.device)

    def restart(self, fresh: Sequence[Sequence[bool]], seed: int) -> None:
        """Reset components that were masked: no effect on the output, no optimizer history.

        Their column of P becomes zero, their row of Q is drawn as for a new LoRA, their momenta become zero. The
        optimizer's squared gradients start from the mean over the components of the same factor that were in use.

        Args:
            fresh: flags of the components to reset, per module.
            seed: seed of the new rows; equal on every process.
        """
        generator = torch.Generator().manual_seed(seed)
        for block in self.blocks:
            fresh_Mr = torch.tensor([list(fresh[index]) for index in block.modules])
            if not bool(fresh_Mr.any()):
                continue
            flags_MX = block.spread(fresh_Mr)
            squares_M = self._mean_squares(block)
            for parameter, flags_X, square in zip(block.parameters, flags_MX, squares_M, strict=True):
                if bool(flags_X.any()):
                    new = fresh_rows(block.shape, generator) if block.kind == "Q" else torch.zeros(block.shape)
                    self.engine.overwrite(parameter, flags_X, new.view(-1), square)

    def _mean_squares(self, block: Block) -> list[float]:
        """Average the optimizer's running squared gradients per parameter, over elements in use of all processes."""
        used_MX = block.spread(torch.tensor([list(self.triplets.masks[index]) for index in block.modules]))
        pairs = zip(block.parameters, used_MX, strict=True)
        sums_M2 = torch.stack([self.engine.square_sums(parameter, used_X) for parameter, used_X in pairs])
        if self.engine.partitioned:
            sums_M2 = all_reduce_sum(sums_M2.to(self.triplets.modules[0].a.mask_r.device)).cpu()
        mean_M: list[float] = (sums_M2[:, 0] / sums_M2[:, 1].clamp(min=1.0)).tolist()
        return mean_M

    def update(
        self, method: DynamicMethod | None, orthogonality: Orthogonality | None, overflow_is_possible: bool = False
    ) -> None:
        """Pass the step's unclipped gradients to the method, add the regulariser's, and zero those of masked lambdas.

        Args:
            method: receives every block of gradients; None to observe nothing.
            orthogonality: regulariser, whose gradient is added after the method received the training gradient.
            overflow_is_possible: fp16 gradients may be infinite at a step that the loss scaler will skip; the
                method receives zero for such elements. Otherwise NaN is passed on, and found at the next allocation.

        Raises:
            GuardError: at the first observed step, a module has no gradient.
        """
        gradients = self.engine.gradients(self.parameters)
        scale = self.engine.loss_scale()
        factors = [block for block in self.blocks if block.kind != "lambda"] if orthogonality is not None else []
        count = sum(len(block.modules) for block in factors)
        with self.engine.gathered([parameter for block in factors for parameter in block.parameters]):
            for block, own in zip(self.blocks, self._by_block(gradients), strict=True):
                if method is not None:
                    flat = self._to_device(torch.cat(own))  # a copy
                    if scale != 1.0:
                        flat.div_(scale)
                    self._check_arrival(block, flat)
                    if overflow_is_possible:
                        flat.nan_to_num_(0.0, 0.0, 0.0)
                    weights = self.weights(block)
                    method.observe(block.name, weights, flat, self.live(block))
                if block.kind == "lambda":
                    self._hold_masked(block, own)
                elif orthogonality is not None:
                    known = weights if method is not None and not self.engine.partitioned else None
                    self._regularise(block, own, known, orthogonality.form, orthogonality.weight / count * scale)
        self.arrived = self.arrived or method is not None
        self.engine.set_gradients(self.parameters, gradients)

    def _by_block(self, gradients: list[Tensor]) -> list[list[Tensor]]:
        rest = iter(gradients)
        return [list(islice(rest, len(block.parameters))) for block in self.blocks]

    def _check_arrival(self, block: Block, flat: Tensor) -> None:
        """Raise an error if a module has no gradient when it is first observed.

        The gradient of lambda is checked; without lambda that of P, since Q's is zero as long as P is zero.
        """
        if self.arrived or block.kind != self.first_kind:
            return
        strength_M = self._scatter_to_full(block, flat).abs().sum(1)
        if self.engine.partitioned:
            all_reduce_sum(strength_M)
        pairs = zip(block.modules, strength_M.tolist(), strict=True)
        lost = [self.triplets.modules[index].name for index, strength in pairs if strength == 0.0]
        if lost:
            raise GuardError(f"no gradient arrived at {len(lost)} modules at the first step, for example at {lost[0]}")

    def _regularise(self, block: Block, own: list[Tensor], known: Tensor | None, form: str, scale: float) -> None:
        """Add the regulariser's gradient to ``own``, this process's gradients of a block.

        In closed form: for E the counted part of a Gram matrix, ``d|E|_F/dQ = 2 E Q / |E|_F``; likewise for P.
        ``known`` are the block's whole weights, flat, if they have been read already.
        """
        x_M = torch.stack([p.detach() for p in block.parameters]).float() if known is None else known
        added_M = gram_penalty_gradient(x_M.view(-1, *block.shape), block.kind, form, scale)
        added = block.split(self._owned(block, added_M.view(len(block.modules), -1)))
        torch._foreach_add_(own, [piece.to(own[0]) for piece in added])

    def _hold_masked(self, block: Block, own: list[Tensor]) -> None:
        """Set the gradients of masked components' lambdas to zero: they are observed, but not trained."""
        if self._is_masked(block):
            torch._foreach_mul_(own, block.split(self._owned(block, self.masks(block)).to(own[0])))

    def observe_given(
        self,
        method: DynamicMethod,
        gradients: Iterable[Sequence[Tensor]],
        order: int = 1,
        overflow_is_possible: bool = False,
    ) -> None:
        """Average gradients that were taken beside the training's over processes, and pass them to a method.

        Args:
            method: receives every block.
            gradients: one sequence per block, a tensor for each of its parameters.
            order: the tensors are this power of gradients; the root of their average is passed on.
            overflow_is_possible: as in :meth:`update`.
        """
        for block, given in zip(self.blocks, gradients, strict=True):
            full_MX = torch.stack([gradient.reshape(-1) for gradient in given]).float()
            all_reduce_sum(full_MX).div_(world_size())
            flat = self._owned(block, full_MX if order == 1 else full_MX.pow_(1.0 / order))
            self._check_arrival(block, flat)
            if overflow_is_possible:
                flat.nan_to_num_(0.0, 0.0, 0.0)
            method.observe(block.name, self.weights(block), flat, self.live(block))
        self.arrived = True
