"""The training data of a run as rows of a page: how good samples are, and the best and worst of them."""

from collections.abc import Mapping
from typing import Any

from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.reports.data_report import DATA_REPORT_FILE, QUANTILES


def data_page(report: Mapping[str, Any]) -> dict[str, Any]:
    """Build what a page shows of the training data, from the summary of a run.

    Raises:
        PlanError: ``report`` is not a summary as :func:`~.data_report.save_data_report` writes it.
    """
    try:
        return {
            "facts": _facts(report),
            "quantiles": list(QUANTILES),
            "distribution": [
                [name, *(f"{values[q]:.4g}" for q in QUANTILES)] for name, values in report["distribution"].items()
            ],
            "clusters": [_cluster(line) for line in report.get("clusters") or ()],  # older versions knew none
            "samples": {kind: [_sample(sample) for sample in report[kind]] for kind in ("best", "worst")},
            "equal": [", ".join(map(str, group[:12])) for group in report["duplicates"]["largest"]],
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise PlanError(f"{DATA_REPORT_FILE} cannot be shown ({type(error).__name__}: {error})") from error


def _facts(r: Mapping[str, Any]) -> list[tuple[str, str]]:
    twice = r["duplicates"]
    return [
        ("samples", f"{r['samples']:,}"),
        ("clipped", f"{r['clipped']:,}"),
        ("without a token that takes loss", f"{r['without_loss_tokens']:,}"),
        ("exact duplicates", f"{twice['samples']:,} samples in {twice['groups']:,} groups"),
        ("subset drawn at a time", f"{r['subset_size']:,}"),
        ("weights amount to", f"{r['effective_sample_size']:,.1f} equally likely samples"),
        (f"used in {r['steps']:,} steps", f"{r['samples_used']:,} samples, {r['share_used']:.1%} of all"),
        ("most often used", f"{r['most_used']:,} times"),
    ]


def _cluster(line: Mapping[str, Any]) -> list[str]:
    shares = (f"{line[key]:.1%}" for key in ("share_of_samples", "share_of_probability", "share_of_draws"))
    return [str(line["cluster"]), f"{line['samples']:,}", *shares, f"{line['effective_sample_size']:,.1f}"]


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    flags = f", used {sample['used']} times" + (", clipped" if sample["clipped"] else "")
    return {
        "name": str(sample["index"]),
        "figures": f"quality {sample['quality']:.2f}, gradient norm {sample['gradient_norm']:.3g}, loss "
        f"{sample['loss']:.3f}{flags}",
        "prompt": str(sample["prompt"]),
        "answer": str(sample["answer"]),
    }
