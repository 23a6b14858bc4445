"""How the clusters of training samples fare: their shares of the data and of the draws, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from llamafactory_adaptive.reports.tables import align


def cluster_summary(cluster_N: Tensor, kept_N: Tensor, probability_N: Tensor, usage_N: Tensor) -> list[dict[str, Any]]:
    """Summarise every cluster of samples.

    Args:
        cluster_N: cluster of each sample, from 0 on.
        kept_N: False for samples that were clipped; they count nowhere.
        probability_N: probability of being drawn first; sums to 1.
        usage_N: how often each sample was drawn.

    Returns:
        For each cluster its number of samples, its shares of samples, of probability and of all draws so far, and its
        effective sample size, ``1 / sum p^2`` with p the probabilities within the cluster.
    """
    draws = max(int(usage_N.sum()), 1)
    lines = []
    for cluster in range(int(cluster_N.max()) + 1):
        mine_N = (cluster_N == cluster) & kept_N
        mass = float(probability_N[mine_N].sum())
        squares = float(probability_N[mine_N].square().sum())
        lines.append({
            "cluster": cluster,
            "samples": int(mine_N.sum()),
            "share_of_samples": int(mine_N.sum()) / max(int(kept_N.sum()), 1),
            "share_of_probability": mass,
            "share_of_draws": int(usage_N[mine_N].sum()) / draws,
            "effective_sample_size": mass**2 / squares if squares else 0.0,
        })  # fmt: skip
    return lines


def cluster_lines(clusters: Sequence[Mapping[str, Any]], least: float) -> list[str]:
    """Format the summary of clusters as lines of text.

    Args:
        clusters: what :func:`cluster_summary` returned.
        least: part of its share of the samples that every cluster keeps.
    """
    rows = [
        [
            str(line["cluster"]),
            f"{line['samples']:,}",
            *(f"{line[key]:.1%}" for key in ("share_of_samples", "share_of_probability", "share_of_draws")),
            f"{line['effective_sample_size']:,.1f}",
        ]
        for line in clusters
    ]
    floor = f", each held at {least:.0%} of its share of the samples" if least else ""
    title = f"clusters of samples by the direction of their gradients{floor}"
    head = ["cluster", "samples", "of samples", "of probability", "of draws so far", "equally likely"]
    return [title, *align([head, *rows])]
