"""The elements of all rank-1 components in a few flat blocks, which are observed, summed and regularised as a whole.

Hundreds of small factors are handled as one tensor per kind and shape. Under ZeRO a block holds this process's pieces,
and only sums per component are exchanged. Shapes: M modules of one block, r rank, k width (d_in for Q, d_out for P).
"""

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import cast

import torch
from torch import Tensor, nn

from llamafactory_adaptive.adapter.masked_lora import Triplets
from llamafactory_adaptive.engines.distributed import all_reduce_sum, world_size
from llamafactory_adaptive.engines.engine import Engine, full_shape
from llamafactory_adaptive.methods import ComponentwiseMethod, DynamicMethod, Orthogonality, RelativeMethod
from llamafactory_adaptive.training.arrival import Arrival
from llamafactory_adaptive.training.component_blocks import Block, share_of_component
from llamafactory_adaptive.training.observation import Observation
from llamafactory_adaptive.training.regulariser import gram_penalty_gradient


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
        self.arrival = Arrival(triplets, engine.partitioned)

    def weights(self, block: Block) -> Tensor:
        """Copy this process's weights of a block into a flat fp32 tensor."""
        return self._flat(self.engine.weights(block.parameters))

    def whole_weights(self, block: Block) -> Tensor:
        """Copy the whole weights of a block, fp32: (M, *shape). Under ZeRO all processes must call it."""
        return self.whole(block, self.weights(block)).view(-1, *block.shape)

    def whole(self, block: Block, flat: Tensor) -> Tensor:
        """Join this process's numbers of a block, flat, with those of all others, (M, numel); all must call it."""
        whole_MX = self._scatter_to_full(block, flat)
        if not self.engine.partitioned:
            return whole_MX
        return all_reduce_sum(whole_MX.float()).to(flat.dtype)  # exact: each number comes from one process

    @torch.no_grad()
    def _flat(self, pieces: Sequence[Tensor]) -> Tensor:
        """Copy the pieces of a block into one flat fp32 tensor on the device of the masks."""
        return self._to_device(torch.cat(list(pieces)).view(-1))

    def _to_device(self, flat: Tensor) -> Tensor:
        """Convert a tensor to fp32 on the device of the masks; engines with offload keep pieces elsewhere."""
        return flat.to(self.triplets.modules[0].a.mask_r.device, torch.float32)

    def masks(self, block: Block) -> Tensor:
        """Return the masks of a block's modules, (M, r): 1.0 for components in use."""
        return torch.stack([self.triplets.modules[index].a.mask_r for index in block.modules]).float()

    def live(self, block: Block) -> Tensor | None:
        """Return 1.0 per owned element in use, 0.0 for masked elements of P and Q; None if all are in use."""
        live_Mr = self.live_components(block)
        return None if live_Mr is None else self.owned(block, block.spread(live_Mr))

    def live_components(self, block: Block) -> Tensor | None:
        """Return 1.0 per component in use, 0.0 per masked one of P and Q, (M, r); None if all are in use."""
        return None if block.kind == "lambda" or not self._is_masked(block) else self.masks(block)

    def marked(self, block: Block, flags: Sequence[Sequence[bool]]) -> Tensor:
        """Return 1.0 per owned element of the components that ``flags`` marks, by module, and 0.0 for all others."""
        flags_Mr = torch.tensor([flags[index] for index in block.modules], dtype=torch.float32)
        return self._to_device(self.owned(block, block.spread(flags_Mr)))

    def _is_masked(self, block: Block) -> bool:
        """Tell whether any component of the block is masked."""
        return any(not all(self.triplets.masks[index]) for index in block.modules)

    def owned(self, block: Block, x_MX: Tensor) -> Tensor:
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

    def by_component(self, block: Block, flat: Tensor) -> Tensor:
        """Average this process's numbers of a block, flat, over each component, (M, r); others hold the rest of it."""
        return block.by_component(self._scatter_to_full(block, flat))

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
        componentwise = cast(ComponentwiseMethod, method) if method.traits.componentwise else None
        if method.traits.relative:
            self._set_typical(cast(RelativeMethod, method))
        for block in self.blocks:
            if componentwise is None:
                per_component_Mr = self.by_component(block, method.element_scores(block.name, self.weights(block)))
            else:
                per_component_Mr = componentwise.component_scores(block.name)
            if mean:
                per_component_Mr = per_component_Mr * share_of_component(block, self.triplets).to(like.device)[:, None]
            totals[list(block.modules), : block.rank] += per_component_Mr
        if self.engine.partitioned and componentwise is None:
            all_reduce_sum(totals)
        return [row[:rank] for row, rank in zip(totals.tolist(), ranks, strict=True)]

    def _set_typical(self, method: RelativeMethod) -> None:
        """Give a method the geometric mean of each kind's importances, over all modules and processes."""
        kinds = list(dict.fromkeys(block.kind for block in self.blocks))
        sums_K2 = torch.zeros(len(kinds), 2, device=self.triplets.modules[0].a.mask_r.device)
        for block in self.blocks:
            sums_K2[kinds.index(block.kind)] += method.log_importance(block.name)
        if self.engine.partitioned:
            all_reduce_sum(sums_K2)
        means = (sums_K2[:, 0] / sums_K2[:, 1].clamp(min=1.0)).exp().tolist()
        method.set_typical(dict(zip(kinds, means, strict=True)))

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
            GuardError: at the first step that is observed, or that trains all components, a module has no gradient.
        """
        self.triplets.settle_gradients()
        masked = not all(all(row) for row in self.triplets.masks)
        idle = method is None and orthogonality is None and not masked
        if idle and self.arrival.done:
            return
        gradients = self.engine.gradients(self.parameters)
        if method is not None or not masked:
            self._check_arrival(self._flat(own) for own in self._by_block(gradients))
        if idle:
            return
        factors = [block for block in self.blocks if block.kind != "lambda"] if orthogonality is not None else []
        relative = orthogonality is not None and orthogonality.relative
        task_norms = self._norms(gradients) if relative else {}
        count = sum(len(block.modules) for block in factors)
        observation = None if method is None else Observation(self, method)
        with self.engine.whole([parameter for block in factors for parameter in block.parameters]) as whole:
            rest = iter(whole)
            for block, own in zip(self.blocks, self._by_block(gradients), strict=True):
                weights = None if observation is None else self._observe(block, own, observation, overflow_is_possible)
                if block.kind == "lambda":
                    self._hold_masked(block, own)
                elif orthogonality is not None:
                    read = list(islice(rest, len(block.parameters)))
                    known = torch.stack(read).float() if weights is None or self.engine.partitioned else weights
                    self._regularise(block, own, known, orthogonality, task_norms.get(block.name), count)
        if observation is not None:
            observation.end()
        self.engine.set_gradients(self.parameters, gradients)

    def _observe(
        self, block: Block, own: list[Tensor], observation: Observation, overflow_is_possible: bool
    ) -> Tensor:
        """Pass a block's weights and unscaled gradients to the method, and return the weights."""
        flat, scale = self._flat(own), self.engine.loss_scale()
        if scale != 1.0:
            flat.div_(scale)
        if overflow_is_possible:
            flat.nan_to_num_(0.0, 0.0, 0.0)
        weights = self.weights(block)
        observation.add(block, weights, flat)
        return weights

    def _regularise(
        self,
        block: Block,
        own: list[Tensor],
        weights: Tensor,
        orthogonality: Orthogonality,
        task_norm: Tensor | None,
        count: int,
    ) -> None:
        """Add the regulariser's gradient to ``own``: of a share of ``task_norm``, or a mean over ``count`` factors."""
        factor = 1.0 if orthogonality.relative else orthogonality.weight / count * self.engine.loss_scale()
        added_MX = self._penalty_gradient(block, weights, orthogonality, factor)
        if task_norm is not None:
            added_MX.mul_(orthogonality.weight * task_norm / added_MX.norm().clamp(min=1e-30))
        self._add(block, own, added_MX)

    def _by_block(self, gradients: list[Tensor]) -> list[list[Tensor]]:
        rest = iter(gradients)
        return [list(islice(rest, len(block.parameters))) for block in self.blocks]

    def _check_arrival(self, gradients: Iterable[Tensor]) -> None:
        """Check at the first call that gradients arrive; ``gradients`` are this process's of each block, flat."""
        blocks = zip(self.blocks, gradients, strict=True)
        self.arrival.check((block, self._scatter_to_full(block, flat)) for block, flat in blocks)

    def _norms(self, gradients: list[Tensor]) -> dict[str, Tensor]:
        """Compute the norm of every block's gradients over all processes."""
        rows = self._by_block(gradients)
        squares = torch.stack([torch.stack([self._to_device(g).square().sum() for g in own]).sum() for own in rows])
        if self.engine.partitioned:
            all_reduce_sum(squares)
        return {block.name: square.sqrt() for block, square in zip(self.blocks, squares, strict=True)}

    def _penalty_gradient(self, block: Block, weights: Tensor, orthogonality: Orthogonality, scale: float) -> Tensor:
        """Compute the gradient of ``scale`` times the regulariser's sum over the modules of a block, (M, numel).

        In closed form: for E the counted part of a Gram matrix, ``d|E|_F/dQ = 2 E Q / |E|_F``; likewise for P.
        ``weights`` are the block's whole weights.
        """
        x_M = weights.view(-1, *block.shape)
        used = self.masks(block) if orthogonality.in_use and self._is_masked(block) else None
        gradient_M = gram_penalty_gradient(x_M, block.kind, orthogonality.form, scale, used)
        return gradient_M.view(len(block.modules), -1)

    def _add(self, block: Block, own: list[Tensor], added_MX: Tensor) -> None:
        """Add to ``own``, this process's gradients of a block, its pieces of ``added_MX``."""
        if self.engine.partitioned:
            pieces = block.split(self.owned(block, added_MX))
        else:
            pieces = list(added_MX.view(-1, *block.shape).unbind())
        torch._foreach_add_(own, [piece.to(own[0]) for piece in pieces])

    def _hold_masked(self, block: Block, own: list[Tensor]) -> None:
        """Set the gradients of masked components' lambdas to zero: they are observed, but not trained."""
        if self._is_masked(block):
            torch._foreach_mul_(own, block.split(self.owned(block, self.masks(block)).to(own[0])))

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
        averaged = [self._averaged(block, given, order) for block, given in zip(self.blocks, gradients, strict=True)]
        self._check_arrival(averaged)
        observation = Observation(self, method)
        for block, flat in zip(self.blocks, averaged, strict=True):
            if overflow_is_possible:
                flat.nan_to_num_(0.0, 0.0, 0.0)
            observation.add(block, self.weights(block), flat)
        observation.end()

    def _averaged(self, block: Block, given: Sequence[Tensor], order: int) -> Tensor:
        """Average whole gradients of a block over processes, and select this process's pieces, flat."""
        full_MX = torch.stack([gradient.reshape(-1) for gradient in given]).float()
        all_reduce_sum(full_MX).div_(world_size())
        return self.owned(block, full_MX if order == 1 else full_MX.pow_(1.0 / order))
