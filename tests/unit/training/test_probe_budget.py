"""Probes take their share of the time and no more."""

import torch

from llamafactory_adaptive.training.probe_budget import ProbeBudget


def test_probes_keep_within_their_share_of_the_time(monkeypatch):
    """A clock of our own: a step trains 1 s, a probe takes 2 s, 10 % are allowed."""
    from llamafactory_adaptive.training import probe_budget

    now = [0.0]
    monkeypatch.setattr(probe_budget.time, "perf_counter", lambda: now[0])
    probe_budget, probed = ProbeBudget(0.1), []
    for step in range(400):
        probe_budget.begin()
        now[0] += 1.0
        probe_budget.trained()
        if probe_budget.due(step):
            now[0] += 2.0
            probe_budget.probed(step, 2.0, torch.device("cpu"))
            probed.append(step)
    assert probe_budget.probing / probe_budget.training <= 0.1
    assert 18 <= len(probed) <= 20
    assert ProbeBudget(None).due(0)
