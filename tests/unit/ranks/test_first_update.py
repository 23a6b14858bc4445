"""The size of the first update, against a real first step of AdamW."""

import math

import pytest
import torch

from llamafactory_adaptive.methods import InitialAdapter
from llamafactory_adaptive.ranks.first_update import median_slowdown, slowdown, slowdown_of_norms
from llamafactory_adaptive.ranks.plan import ModuleShape


STARTS = {
    "igu published": (0.1, "gaussian"),
    "adalora": (0.0, "gaussian"),
    "igu corrected": (1.0, "lora"),
    "tsq": (None, "lora"),
    "half of lambda": (0.5, "lora"),
}


def moved(lambda_value, factors, d_in, d_out, rank=16, rate=1e-5):
    """Root mean square over components of how far one step of AdamW moves them, on a random linear regression."""
    torch.manual_seed(0)
    if factors == "gaussian":
        p, q = torch.randn(d_out, rank) * 0.02, torch.randn(rank, d_in) * 0.02
    elif factors == "eva":
        p, q = torch.zeros(d_out, rank), torch.linalg.qr(torch.randn(d_in, rank)).Q.T
    elif factors == "gora":
        p, q = (
            torch.randn(d_out, rank) * 0.7 * d_out**-0.5,
            torch.empty(rank, d_in).uniform_(-(d_in**-0.5), d_in**-0.5),
        )
    else:
        p, q = torch.zeros(d_out, rank), torch.empty(rank, d_in).uniform_(-(d_in**-0.5), d_in**-0.5)
    size = torch.full((rank,), 1.0 if lambda_value is None else lambda_value)
    trained = [part.double().requires_grad_(part is not size or lambda_value is not None) for part in (p, size, q)]
    base, x, y = torch.randn(d_out, d_in).double(), torch.randn(64, d_in).double(), torch.randn(64, d_out).double()

    def components():
        p, size, q = (part.detach() for part in trained)
        return torch.einsum("or,r,ri->roi", p, size, q)

    before, (p, size, q) = components(), trained
    optimizer = torch.optim.AdamW([part for part in trained if part.requires_grad], lr=rate, weight_decay=0.0)
    (x @ (base + p @ torch.diag(size) @ q).T - y).square().mean().backward()
    optimizer.step()
    return float((components() - before).flatten(1).norm(dim=1).square().mean().sqrt())


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("d_in", "d_out"), [(64, 160), (256, 96)])
def test_a_real_first_step_of_adamw_is_that_much_smaller_than_loras(start, d_in, d_out):
    expected = slowdown(*STARTS[start], ModuleShape("m", d_in, d_out))
    measured = moved(None, "lora", d_in, d_out) / moved(*STARTS[start], d_in, d_out)
    assert measured == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize(("start", "p", "q"), [("eva", 0.0, 1.0), ("gora", 0.7, 3**-0.5)])
@pytest.mark.parametrize(("d_in", "d_out"), [(64, 160), (256, 96)])
def test_starts_from_data_move_more_than_lora(start, p, q, d_in, d_out):
    expected = slowdown_of_norms(p, q, ModuleShape("m", d_in, d_out))
    assert moved(None, "lora", d_in, d_out) / moved(None, start, d_in, d_out) == pytest.approx(expected, rel=0.12)
    assert expected < 1.0


def test_the_start_of_a_method_gives_the_median_over_modules():
    shapes = [ModuleShape(str(width), width, 7) for width in (100, 400, 900)]
    published = InitialAdapter(0.1, "gaussian")
    assert (
        published.slowdown(shapes) == median_slowdown(0.1, "gaussian", shapes) == slowdown(0.1, "gaussian", shapes[1])
    )
    assert published.slowdown(shapes) == pytest.approx(3**-0.5 / (0.02 * 20 * math.sqrt(0.0204)))
    assert InitialAdapter(1.0, "lora").slowdown(shapes) == InitialAdapter(None, "lora").slowdown(shapes) == 1.0
    assert slowdown(0.0, "lora", shapes[0]) == math.inf, "neither factor has a gradient"
