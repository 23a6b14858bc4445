"""Report on the training data: qualities, best and worst samples, duplicates, how often each sample was used."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import digest_of, read_json, write_atomically
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.reports.cluster_shares import cluster_lines, cluster_summary
from llamafactory_adaptive.reports.plaintext import plain
from llamafactory_adaptive.reports.plots import new_figure, save_figure
from llamafactory_adaptive.reports.tables import align


DATA_REPORT_FILE = "adaptive_data_quality.json"
DATA_PLOT_FILE = "adaptive_data_quality.png"
SAMPLES_FILE = "adaptive_samples.jsonl"
REPORT_SCHEMA = 1
_SHOWN = 10  # best and worst samples, and groups of duplicates
_LONGEST_TEXT = 2000  # characters
_MOST_DOTS = 20_000
QUANTILES = {"lowest": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "highest": 1.0}


@dataclass(frozen=True)
class DataQuality:
    """Measured quality and use of every training sample; vectors of length N on the CPU.

    Attributes:
        terms: the measured terms by name: ``loss`` and ``gradient_norm`` at least.
        quality_N: the weighted sum of the terms; samples of higher quality are drawn more often.
        probability_N: probability of being drawn first.
        kept_N: False for samples that were clipped.
        usage_N: how often each sample was drawn.
        row_digests: a digest per sample; equal samples have equal ones.
        subset_size: samples drawn between two refreshes.
        effective_size: how many equally likely samples the probabilities amount to.
        cluster_N: cluster of each sample; None if samples were not clustered.
        min_cluster_share: part of its share of the samples that every cluster keeps.
        scorings: how often the samples were scored; terms, quality and probability are those of the last time.
    """

    terms: Mapping[str, Tensor]
    quality_N: Tensor
    probability_N: Tensor
    kept_N: Tensor
    usage_N: Tensor
    row_digests: Sequence[str]
    subset_size: int
    effective_size: float
    cluster_N: Tensor | None = None
    min_cluster_share: float = 0.0
    scorings: int = 1


def save_data_report(
    output: Path, plan: RankPlan, data: DataQuality, steps: int, text: Callable[[int], tuple[str, str]] | None
) -> None:
    """Write summary, plot and one line per sample into ``output``.

    Args:
        output: the run's ``output_dir``.
        plan: any plan of the run, for its identity.
        data: quality and use of the samples.
        steps: optimizer steps in which the samples were used.
        text: returns prompt and answer of a sample by number; None leaves the texts out.
    """
    output.mkdir(parents=True, exist_ok=True)
    groups = _duplicates(data.row_digests)
    samples = _sample_lines(data, groups)
    write_atomically(output / SAMPLES_FILE, "".join(json.dumps(sample) + "\n" for sample in samples))
    order = sorted(range(len(samples)), key=lambda index: -samples[index]["quality"])
    used = int((data.usage_N > 0).sum())
    places = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    document = {
        "schema_version": REPORT_SCHEMA,
        "run": run_identity(plan),
        "samples": len(samples),
        "clipped": int((~data.kept_N).sum()),
        "subset_size": data.subset_size,
        "effective_sample_size": data.effective_size,
        "scorings": data.scorings,
        "steps": steps,
        "samples_used": used,
        "share_used": used / len(samples),
        "most_used": int(data.usage_N.max()),
        "without_loss_tokens": int((data.terms["loss"] == 0).sum()),  # a loss of exactly 0 has no other cause
        "distribution": {
            name: dict(zip(QUANTILES, values.quantile(places).tolist(), strict=True))
            for name, values in {"quality": data.quality_N, **data.terms}.items()
        },
        "clusters": []
        if data.cluster_N is None
        else cluster_summary(data.cluster_N, data.kept_N, data.probability_N, data.usage_N),
        "min_cluster_share": data.min_cluster_share,
        "duplicates": {"groups": len(groups), "samples": sum(map(len, groups)), "largest": groups[:_SHOWN]},
        "best": [_shown(samples[index], text) for index in order[:_SHOWN]],
        "worst": [_shown(samples[index], text) for index in order[::-1][:_SHOWN]],
    }
    write_atomically(output / DATA_REPORT_FILE, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    _save_plot(data, output / DATA_PLOT_FILE)


def _sample_lines(data: DataQuality, groups: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    columns = {
        "quality": data.quality_N.tolist(),
        "probability": data.probability_N.tolist(),
        **{name: values.tolist() for name, values in data.terms.items()},
        "clipped": (~data.kept_N).tolist(),
        "used": data.usage_N.tolist(),
        **({} if data.cluster_N is None else {"cluster": data.cluster_N.tolist()}),
    }
    lines = [
        {"index": index, "digest": digest[:16], **{name: values[index] for name, values in columns.items()}}
        for index, digest in enumerate(data.row_digests)
    ]
    for original, *copies in groups:
        for index in copies:
            lines[index]["duplicate_of"] = original
    return lines


def _duplicates(row_digests: Sequence[str]) -> list[list[int]]:
    """Group the numbers of equal samples, largest group first."""
    groups: dict[str, list[int]] = {}
    for index, digest in enumerate(row_digests):
        groups.setdefault(digest, []).append(index)
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda group: -len(group))


def _shown(sample: Mapping[str, Any], text: Callable[[int], tuple[str, str]] | None) -> dict[str, Any]:
    prompt, answer = ("(left out: push_to_hub)",) * 2 if text is None else text(sample["index"])
    return {**sample, "prompt": prompt[:_LONGEST_TEXT], "answer": answer[:_LONGEST_TEXT]}


def _save_plot(data: DataQuality, path: Path) -> None:
    """Plot two panels: the distribution of qualities, all, used and clipped; and loss against gradient norm."""
    figure = new_figure(10.0, 3.8)
    left, right = figure.subplots(1, 2)
    # The tail is long: the axis ends at the 99.5 % quantile, and what lies beyond stands in the last bar.
    low, high = float(data.quality_N.min()), float(data.quality_N.quantile(0.995))
    bins = torch.linspace(low, max(high, low + 1e-9), 41).tolist()
    shown_N = data.quality_N.clamp(max=bins[-1])
    left.hist(shown_N.tolist(), bins=bins, color="0.8", label="all samples")
    if bool((data.usage_N > 0).any()):
        left.hist(shown_N[data.usage_N > 0].tolist(), bins=bins, histtype="step", color="C0", label="used so far")
    if not bool(data.kept_N.all()):
        left.hist(shown_N[~data.kept_N].tolist(), bins=bins, color="C3", alpha=0.6, label="clipped")
    left.set_xlabel("quality (sum of weighted z-scores; last bar: this and above)")
    left.set_ylabel("samples")
    left.legend(fontsize=8)
    some = torch.linspace(0, len(data.usage_N) - 1, min(len(data.usage_N), _MOST_DOTS)).long()
    x, y, c = (values[some].tolist() for values in (data.terms["loss"], data.terms["gradient_norm"], data.usage_N))
    dots = right.scatter(x, y, s=6, c=c, cmap="viridis")
    right.set_xlabel("loss")
    right.set_ylabel("gradient norm")
    figure.colorbar(dots, ax=right, label="times used")
    save_figure(figure, path)


def read_data_report(output: Path) -> dict[str, Any]:
    """Read the data summary of a run from its ``output_dir``.

    Raises:
        PlanError: there is no summary, or it has another schema.
    """
    path = output / DATA_REPORT_FILE
    document = read_json(path, str(path), "; runs with tsq_sampling write it")
    if not isinstance(document, dict) or document.get("schema_version") != REPORT_SCHEMA:
        raise PlanError(f"{path} is no data report of schema {REPORT_SCHEMA}")
    return document


def run_identity(plan: RankPlan) -> str:
    """Compute a digest of a run's settings, which is equal for all plans of one run, whatever their ranks."""
    shapes = [[module.name, module.in_features, module.out_features] for module in plan.modules]
    facts = [plan.method, dict(plan.options), plan.budget_unit, plan.lora_rank, plan.lora_alpha, shapes]
    return digest_of([*facts, {key: plan.provenance.get(key) for key in ("base_model", "seed", "course", "sampling")}])


def data_report_of(output: Path, plan: RankPlan) -> dict[str, Any] | None:
    """Read the data summary in ``output``; None if there is none or it is not of the run that ``plan`` belongs to."""
    if not (output / DATA_REPORT_FILE).is_file():
        return None
    report = read_data_report(output)
    # Older versions wrote no identity.
    return report if report.get("run") in (None, run_identity(plan)) else None


def data_table(report: Mapping[str, Any]) -> str:
    """Format the data summary as text.

    Raises:
        PlanError: ``report`` is not a summary as :func:`save_data_report` writes it.
    """
    try:
        return _table(report)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise PlanError(f"{DATA_REPORT_FILE} cannot be shown ({type(error).__name__}: {error})") from error


def _table(r: Mapping[str, Any]) -> str:
    lines = [
        f"samples                {r['samples']:,} ({r['clipped']:,} clipped, {r['without_loss_tokens']:,} without a "
        "token that takes loss)",
        f"subset                 {r['subset_size']:,}; weights amount to {r['effective_sample_size']:,.1f} equally "
        "likely samples" + (f"; samples were scored {n} times" if (n := r.get("scorings", 1)) > 1 else ""),
        f"used in {r['steps']:,} steps       {r['samples_used']:,} samples, {r['share_used']:.1%} of all; at most "
        f"{r['most_used']} times",
        f"exact duplicates       {r['duplicates']['samples']:,} samples in {r['duplicates']['groups']:,} groups",
        "",
    ]
    rows = [[name, *(f"{values[q]:.4g}" for q in QUANTILES)] for name, values in r["distribution"].items()]
    lines += align([["", *QUANTILES], *rows])
    if r.get("clusters"):  # older versions knew none
        lines += ["", *cluster_lines(r["clusters"], r["min_cluster_share"])]
    for kind in ("best", "worst"):
        lines += ["", f"{kind} samples"]
        lines += [_sample_text(sample) for sample in r[kind]]
    for group in r["duplicates"]["largest"]:
        lines.append(f"equal: {', '.join(map(str, group[:12]))}{' ...' if len(group) > 12 else ''}")
    return "\n".join(lines)


def _sample_text(sample: Mapping[str, Any]) -> str:
    flags = f", used {sample['used']} times" + (", clipped" if sample["clipped"] else "")
    return (
        f"  {sample['index']:>6}  quality {sample['quality']:.2f}, gradient norm {sample['gradient_norm']:.3g}, loss "
        f"{sample['loss']:.3f}{flags}\n          {_short(sample['prompt'], 160)}\n          -> "
        f"{_short(sample['answer'], 160)}"
    )


def _short(text: str, length: int) -> str:
    line = plain(" ".join(text.split()), len(text))  # of the training data, which may hold anything
    return line if len(line) <= length else line[: length - 4] + " ..."
