"""Losses of single rows are the model's own, whatever they are padded with."""

import pytest
import torch

from llamafactory_adaptive.calibration.batches import make_batches
from llamafactory_adaptive.calibration.row_losses import row_losses
from tests.helpers.tiny import rows, tiny_model


def test_each_row_has_the_models_own_loss_and_neither_padding_nor_batches_matter():
    model, data = tiny_model().train(), rows(7)
    found = row_losses(model, make_batches(data, 3, pad_id=258))
    assert model.training
    alone = sorted(data, key=lambda row: -len(row["input_ids"]))
    torch.testing.assert_close(found, row_losses(model, make_batches(alone, 1, pad_id=0)), rtol=1e-5, atol=1e-5)
    model.eval()
    for row, (loss, tokens) in zip(alone, found.tolist(), strict=True):
        batch = {key: torch.tensor([value]) for key, value in row.items()}
        assert tokens == sum(label != -100 for label in row["labels"][1:])
        assert loss / tokens == pytest.approx(model(**batch).loss.item(), rel=1e-5)
