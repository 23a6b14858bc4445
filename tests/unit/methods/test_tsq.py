"""TsqLoRA: sensitivities, ranks that grow and shrink, components that come back, contradicting options."""

import pytest
import torch

from llamafactory_adaptive.methods.tsq import Tsq, TsqOptions
from llamafactory_adaptive.ranks.allocation import Bounds, reallocate_components
from tests.helpers.dynamic import stream, triplet_model


@pytest.mark.parametrize("sensitivity", ["weight_gradient", "fisher"])
def test_component_scores_are_means_over_an_interval_of_elements_in_use(sensitivity):
    _, triplets, components = triplet_model(initial_lambda=None)
    masks = [[(i + j) % 3 != 0 for j in range(4)] for i in range(len(triplets.modules))]
    triplets.mask(masks)
    method = Tsq(TsqOptions(sensitivity=sensitivity))
    seen = {}
    for step, _ in enumerate(stream(triplets, 5)):
        for index, module in enumerate(triplets.modules):
            for kind, p in module.parameters().items():
                s = (p.data * p.grad).abs() if sensitivity == "weight_gradient" else p.grad.square()
                seen.setdefault((index, kind), []).append(s)
        components.update(method, None)
        if step == 2:
            method.allocated()
    means = {key: sum(parts[3:]) / 2 for key, parts in seen.items()}  # the last interval's two steps
    scores = components.scores(method, mean=True)
    for index in range(len(triplets.modules)):
        on = torch.tensor(masks[index])
        elements = torch.cat([means[index, "P"][:, on].flatten(), means[index, "Q"][on].flatten()])
        used = [score for score, flag in zip(scores[index], masks[index], strict=True) if flag]
        assert sum(used) / len(used) == pytest.approx(float(elements.mean()), rel=1e-5)


def test_one_noisy_batch_before_a_refresh_does_not_move_ranks():
    """An interval of 50 steps with a last batch whose gradients are 5 times as large in one module."""
    ranks = []
    for noise in (1.0, 5.0):
        _, triplets, components = triplet_model(initial_lambda=None)
        method = Tsq(TsqOptions())
        for step, _ in enumerate(stream(triplets, 50)):
            if step == 49:
                for p in triplets.modules[3].parameters().values():
                    p.grad.mul_(noise)
            components.update(method, None)
        n = len(triplets.modules)
        scores = components.scores(method, mean=True)
        kept = reallocate_components(
            [sum(row) for row in scores], scores, triplets.masks, Bounds([1] * n, 2 * n, [1] * n, [4] * n)
        )
        ranks.append([sum(row) for row in kept])
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, []),
        ({"phi": "quality"}, []),
        ({"sampling": False, "reallocation": False}, ["tsq_sampling"]),
        ({"sampling": False, "phi": "quality"}, ["tsq_phi"]),
        ({"reallocation": False, "phi": "quality"}, ["tsq_phi"]),
        ({"norm_weight": 0.0, "loss_drop_weight": 0.0}, ["tsq_norm_weight"]),
        ({"temperature": 5.0, "clip_quantile": 0.5, "sampling": False}, ["tsq_temperature", "tsq_clip_quantile"]),
        ({"sensitivity": "fisher", "beta": 0.1, "reallocation": False}, ["tsq_sensitivity", "tsq_beta"]),
        ({"projection": 0}, ["tsq_projection"]),
        ({"projection": 0, "alignment_weight": 1.0}, []),
        ({"step_size": 0.1}, ["tsq_step_size"]),
        ({"clip_term": "gradient_norm"}, ["tsq_clip_term"]),
        ({"clip_term": "gradient_norm", "clip_quantile": 0.9}, []),
        ({"gradient_term": "squared_norm", "draws": "quality", "min_cluster_share": 0.5}, []),
        ({"gradient_term": "squared_norm", "norm_weight": 0.0}, ["tsq_gradient_term"]),
        ({"min_cluster_share": 0.5, "clusters": 0}, ["tsq_min_cluster_share"]),
        ({"min_cluster_share": 0.5, "clusters": 1}, ["tsq_min_cluster_share"]),
        ({"sampling": False, "refresh_quality": True, "draws": "quality"}, ["tsq_draws", "tsq_refresh_quality"]),
        ({"sensitivity_over": "step", "reallocation": False}, ["tsq_sensitivity_over"]),
    ],
)
def test_options_that_contradict_each_other(options, keys):
    assert [problem.key for problem in TsqOptions(**options).check()] == keys


@pytest.mark.parametrize(
    ("options", "moment"),
    [
        ({}, 1),
        ({"sensitivity": "fisher"}, 2),
        ({"sensitivity_over": "step"}, 0),
        ({"sensitivity_over": "step", "sensitivity": "fisher"}, 0),
    ],
)
def test_sensitivities_are_means_over_samples_unless_steps_are_asked_for(options, moment):
    assert Tsq(TsqOptions(**options)).traits.sample_moment == moment
