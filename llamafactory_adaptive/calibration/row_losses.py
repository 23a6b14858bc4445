"""The next-token loss of single rows, for comparisons that are paired by row."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from llamafactory_adaptive.calibration.batches import IGNORE_INDEX, Batch
from llamafactory_adaptive.calibration.input_moments import decoder_forward
from llamafactory_adaptive.calibration.measurement import evaluating


def row_losses(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Compute the loss of each row, summed over its tokens, and the number of tokens that take a loss.

    Returns:
        (rows, 2) in fp64 on the CPU, in the order of the batches.
    """
    pairs = []
    with evaluating(model), torch.no_grad():
        for batch in batches:
            logits = decoder_forward(model, batch).logits[:, :-1]
            labels_BT = batch.labels[:, 1:].to(logits.device)
            # Row by row: logits of a whole batch in fp32 would take as much memory again as the model's own.
            pairs += [_loss(row, labels) for row, labels in zip(logits, labels_BT, strict=True)]
    return torch.tensor(pairs, dtype=torch.float64)


def _loss(logits_TV: Tensor, labels_T: Tensor) -> tuple[float, int]:
    loss = functional.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORE_INDEX, reduction="sum")
    return float(loss), int((labels_T != IGNORE_INDEX).sum())
