"""Training samples chosen by quality, while a run trains: what it draws, keeps for a resume, and reports."""

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
    """The samples of one run, scored.

    Args:
        plan: that is trained, for the report.
        trainer: for its tokenizer and arguments.
        dataset: the rows, as the sampler numbers them.
        sampler: with pool and timeline, of which the data loader draws.
        sampling: how samples are chosen.
        terms: what was measured of every sample.
        row_digests: of every row's tokens and labels.
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
        self.pool, self.timeline = sampler.pool, sampler.timeline

    def begin_epoch(self, state: Any) -> None:
        """Have the sampler begin where the step counter is."""
        self.sampler.begin_epoch(state.global_step)

    def end(self, args: Any, state: Any, model: nn.Module) -> None:
        """Say how often each sample was used."""
        if args.should_save:
            self.report(Path(args.output_dir), state.global_step)

    def warn_if_collapsed(self) -> None:
        """Warn where a few samples hold most of the weight."""
        wanted = _LEAST_EFFECTIVE * self.pool.subset_size
        if self.pool.effective_size >= wanted:
            return
        logger.warning(
            f"sample weights have collapsed: they amount to {self.pool.effective_size:.1f} equally likely samples, "
            f"below {_LEAST_EFFECTIVE:.0%} of the subset of {self.pool.subset_size}, so that the same few lead every "
            f"draw; raise tsq_temperature from {self.sampling.temperature:g} to "
            f"{self.pool.temperature_for(wanted):.3g}"
            + (", or leave outliers out with tsq_clip_quantile: 0.95" if self.pool.kept_N.all() else "")
        )

    def begins_at(self, step: int) -> bool:
        """Whether another subset is drawn from after ``step`` optimizer steps."""
        return step > 0 and self.timeline.refresh(step) != self.timeline.refresh(step - 1)

    def budget_share(self, step: int) -> float:
        """phi: 1, or 0.5 to 1 by the mean place of the next subset in the quality order."""
        if not self.sampling.scales_budget:
            return 1.0
        return 0.5 + 0.5 * self.pool.mean_percentile(self.timeline.refresh(step))

    def figures(self, step: int) -> dict[str, Any]:
        """What the log says of the samples in use from ``step`` on."""
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
        """Of what every draw follows from."""
        return hashlib.sha256(self.pool.log_weights_N.numpy().tobytes()).hexdigest()

    def save(self, folder: Path, args: Any, state: Any) -> None:
        """Keep what was measured, so that a resumed run draws the same."""
        if args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            write_terms(folder / QUALITY_FILE, self.terms, self.rows_digest)

    def report(self, output: Path, steps: int) -> None:
        """Write what a person wants to see of the data, ``steps`` optimizer steps into the run."""
        # What lies in output_dir is pushed with it: nobody's training text goes to a hub unasked.
        text = None if self.trainer.args.push_to_hub else self._text
        data = DataQuality(
            terms=vars(self.terms),
            quality_N=self.pool.quality_N,
            probability_N=self.pool.probabilities,
            kept_N=self.pool.kept_N,
            usage_N=self.sampler.usage(steps),
            row_digests=self.row_digests,
            subset_size=self.pool.subset_size,
            effective_size=self.pool.effective_size,
        )
        save_data_report(output, self.plan, data, steps, text)

    def _text(self, index: int) -> tuple[str, str]:
        """Prompt and answer of a sample."""
        row, tokenizer = self.dataset[index], self.trainer.processing_class
        ids, labels = list(row["input_ids"]), list(row.get("labels") or row["input_ids"])
        start = next((place for place, label in enumerate(labels) if label >= 0), len(ids))
        return tuple(tokenizer.decode(part, skip_special_tokens=True).strip() for part in (ids[:start], ids[start:]))


def figures_of(selection: SampleSelection | None, step: int) -> dict[str, Any]:
    """Give what log lines say of the samples in use from ``step`` on; nothing where none are chosen."""
    return {} if selection is None else selection.figures(step)
