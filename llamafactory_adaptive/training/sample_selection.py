"""Quality-based sampling while a run trains: the subsets in use, the scores in checkpoints, and the report."""

import hashlib
import logging
from pathlib import Path
from typing import Any

from torch import nn

from llamafactory_adaptive.files import QUALITY_FILE, digest_of
from llamafactory_adaptive.methods import Sampling
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.reports.data_report import DataQuality, save_data_report
from llamafactory_adaptive.sampling.quality import SampleTerms
from llamafactory_adaptive.sampling.sampler import SubsetSampler
from llamafactory_adaptive.training.run_part import RunPart
from llamafactory_adaptive.training.sample_scores import write_terms


_LEAST_EFFECTIVE = 0.1  # of the subset; below it the user is warned
logger = logging.getLogger("llamafactory.adaptive")


class SampleSelection(RunPart):
    """The training samples of one run with their scores.

    Args:
        plan: plan of the run, for the report.
        trainer: Trainer of the run, for its tokenizer and arguments.
        dataset: the rows, as the sampler numbers them.
        sampler: sampler of the data loader, with its order set.
        sampling: how samples are chosen.
        terms: quality terms of every sample, as measured.
        row_digests: digests of every row's tokens and labels.
    """

    def __init__(
        self,
        plan: RankPlan,
        trainer: Any,
        dataset: Any,
        sampler: SubsetSampler,
        sampling: Sampling,
        terms: SampleTerms,
        row_digests: list[str],
    ) -> None:
        self.plan, self.trainer, self.dataset, self.sampler, self.sampling = plan, trainer, dataset, sampler, sampling
        self.terms, self.row_digests, self.rows_digest = terms, row_digests, digest_of(row_digests)
        self.pool, self.timeline = sampler.order.pool, sampler.order.timeline

    def announce(self, args: Any, state: Any) -> None:
        """Write the data report as of the first step."""
        if args.should_save:
            self.report(Path(args.output_dir), state.global_step)

    def begin_epoch(self, state: Any) -> None:
        """Set the sampler to the optimizer step at which the epoch begins."""
        self.sampler.begin_epoch(state.global_step)

    def end(self, args: Any, state: Any, model: nn.Module) -> None:
        """Write the data report, with how often each sample was used."""
        if args.should_save:
            self.report(Path(args.output_dir), state.global_step)

    def warn_if_collapsed(self) -> None:
        """Warn where a few samples hold most of the weight."""
        least = _LEAST_EFFECTIVE * self.pool.subset_size
        if self.pool.effective_size >= least:
            return
        logger.warning(
            f"sample weights have collapsed: they amount to {self.pool.effective_size:.1f} equally likely samples, "
            f"below {_LEAST_EFFECTIVE:.0%} of the subset of {self.pool.subset_size}, so that the same few lead every "
            f"draw; raise tsq_temperature from {self.sampling.temperature:g} to "
            f"{self.pool.temperature_for(least):.3g}"
            + (", or leave outliers out with tsq_clip_quantile: 0.95" if self.pool.kept_N.all() else "")
        )

    def begins_at(self, step: int) -> bool:
        """Tell whether a new subset begins after ``step`` optimizer steps."""
        return step > 0 and self.timeline.refresh(step) != self.timeline.refresh(step - 1)

    def budget_share(self, step: int) -> float:
        """Return phi, the share of the rank budget: 1, or 0.5 to 1 by the next subset's mean quality percentile."""
        if not self.sampling.scales_budget:
            return 1.0
        return 0.5 + 0.5 * self.pool.mean_percentile(self.timeline.refresh(step))

    def figures(self, step: int) -> dict[str, Any]:
        """Collect the log's figures of the samples in use from ``step`` on."""
        refresh = self.timeline.refresh(step)
        now = set(self.pool.subset(refresh).tolist())
        before = set(self.pool.subset(refresh - 1).tolist()) if refresh else set()
        return {
            "subset": refresh,
            "subset_size": self.pool.subset_size,
            "subset_new": len(now - before),
            "effective_sample_size": round(self.pool.effective_size, 2),
            "mean_quality": float(self.pool.quality_N[self.pool.subset(refresh)].mean()),
        }

    def digest(self) -> str:
        """Compute a digest of the sampling weights, from which every draw follows."""
        return hashlib.sha256(self.pool.log_weights_N.numpy().tobytes()).hexdigest()

    def save(self, folder: Path, args: Any, state: Any) -> None:
        """Write the quality terms into a checkpoint, so that a resumed run draws the same samples."""
        if args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            write_terms(folder / QUALITY_FILE, self.terms, self.rows_digest)

    def report(self, output: Path, steps: int) -> None:
        """Write the data report as of ``steps`` optimizer steps."""
        # What lies in output_dir is pushed with it: nobody's training text goes to a hub unasked.
        text = None if self.trainer.args.push_to_hub else self._text
        data = DataQuality(
            terms=vars(self.terms),
            quality_N=self.pool.quality_N,
            probability_N=self.pool.probabilities,
            kept_N=self.pool.kept_N,
            usage_N=self.sampler.order.usage(steps),
            row_digests=self.row_digests,
            subset_size=self.pool.subset_size,
            effective_size=self.pool.effective_size,
        )
        save_data_report(output, self.plan, data, steps, text)

    def _text(self, index: int) -> tuple[str, str]:
        """Decode prompt and answer of a sample."""
        row, tokenizer = self.dataset[index], self.trainer.processing_class
        ids, labels = list(row["input_ids"]), list(row.get("labels") or row["input_ids"])
        start = next((position for position, label in enumerate(labels) if label >= 0), len(ids))
        return tuple(tokenizer.decode(part, skip_special_tokens=True).strip() for part in (ids[:start], ids[start:]))


def figures_of(selection: SampleSelection | None, step: int) -> dict[str, Any]:
    """Collect a log line's figures of the samples in use from ``step`` on; empty without a selection."""
    return {} if selection is None else selection.figures(step)
