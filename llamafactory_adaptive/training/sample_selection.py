"""Quality-based sampling while a run trains: the subsets in use, the scores in checkpoints, and the report."""

import hashlib
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamafactory_adaptive.accelerator import peak_memory
from llamafactory_adaptive.engines.distributed import agree_across_ranks
from llamafactory_adaptive.files import QUALITY_FILE
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.reports.data_report import DataQuality, save_data_report
from llamafactory_adaptive.sampling.pool import Pool
from llamafactory_adaptive.sampling.quality import SampleTerms
from llamafactory_adaptive.sampling.sampler import SubsetSampler
from llamafactory_adaptive.training.run_log import RunLog
from llamafactory_adaptive.training.run_part import RunPart
from llamafactory_adaptive.training.sample_scores import write_terms
from llamafactory_adaptive.training.sample_scoring import SampleScorer


_LEAST_EFFECTIVE = 0.1  # of the subset; below it the user is warned
_FEWEST_EXPECTED = 5  # samples of a cluster in a subset; below it a small share may be chance
_CLUSTER_FIGURES = ("cluster_pool_shares", "cluster_draw_shares")
QUALITIES_DIFFER = (
    "hold other sample qualities than rank 0, so they would draw other subsets; this is a hardware fault or a bug, "
    "and the run stops here"
)
_SCORED_OTHERWISE = (
    "scored samples again with other results than rank 0, so they would draw other subsets; this is a hardware fault "
    "or a bug, and the run stops here (the last checkpoint is intact)"
)
logger = logging.getLogger("llamafactory.adaptive")


class SampleSelection(RunPart):
    """The training samples of one run with their scores.

    Args:
        plan: plan of the run, for the report.
        sampler: sampler of the data loader, with its order set to the pool of the first scores.
        scorer: source of scores.
        scored: quality terms of every sample, of each scoring so far.
        row_digests: digests of every row's tokens and labels.
        lead: optimizer steps before a refresh at which samples are scored again, where they are.
        log: log of the run, which takes the seconds of scoring again.
    """

    def __init__(
        self,
        plan: RankPlan,
        sampler: SubsetSampler,
        scorer: SampleScorer,
        scored: list[SampleTerms],
        row_digests: list[str],
        lead: int,
        log: RunLog,
    ) -> None:
        self.plan, self.sampler, self.scorer, self.log = plan, sampler, scorer, log
        self.scored, self.row_digests, self.lead = scored, row_digests, lead
        self.trainer, self.dataset, self.sampling = scorer.trainer, scorer.dataset, scorer.sampling
        self.order, self.timeline = sampler.order, sampler.order.timeline
        for terms in scored[1:]:
            self.order.add(scorer.pool(terms))

    @property
    def pool(self) -> Pool:
        """Return the pool of the latest scores."""
        return self.order.pools[-1]

    def after_step(self, args: Any, state: Any, model: nn.Module, optimizer: Any) -> None:
        """Score all samples again if the data loader is about to draw from the next refresh."""
        self.rescore(args, state.global_step)

    def rescore(self, args: Any, step: int) -> None:
        """Score all samples again, as far as they must be known after ``step`` optimizer steps."""
        while self.order.missing(step, self.lead):
            started, refresh = time.perf_counter(), len(self.scored)
            self.scored.append(self.scorer.again(self.scored[0], refresh))
            self.order.add(self.scorer.pool(self.scored[-1]))
            agree_across_ranks(self.digest(), _SCORED_OTHERWISE)
            seconds = time.perf_counter() - started
            self.log.spend("scoring_samples", seconds)
            self.log.hold("scoring_samples", peak_memory())
            if args.should_save:
                logger.info(f"adaptive: all samples were scored again for refresh {refresh}, in {seconds:.1f} s")
                line = {"step": step, "event": "scoring", "subset": refresh, "scoring_seconds": round(seconds, 3)}
                self.log.write(Path(args.output_dir), line)

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

    def warn_of_weights(self) -> None:
        """Warn where a few samples hold most of the weight, or a cluster gets few of the draws."""
        least = _LEAST_EFFECTIVE * self.pool.subset_size
        if self.pool.effective_size < least:
            logger.warning(
                f"sample weights have collapsed: they amount to {self.pool.effective_size:.1f} equally likely "
                f"samples, below {_LEAST_EFFECTIVE:.0%} of the subset of {self.pool.subset_size}, so that the same "
                f"few lead every draw; raise tsq_temperature from {self.sampling.temperature:g} to "
                f"{self.pool.temperature_for(least):.3g}"
                + (", or leave outliers out with tsq_clip_quantile: 0.95" if self.pool.kept_N.all() else "")
            )
        elif starved := starved_cluster(self.order.pool(0), 0):
            cluster, held, drawn = starved
            logger.warning(
                f"a kind of training data is nearly left out: cluster {cluster} of the samples' gradients holds "
                f"{held:.0%} of the samples and gets {drawn:.0%} of the first draws; set tsq_min_cluster_share: 0.5 "
                f"to hold at least half of its share, or raise tsq_temperature from {self.sampling.temperature:g}"
            )

    def begins_at(self, step: int) -> bool:
        """Tell whether a new subset begins after ``step`` optimizer steps."""
        return step > 0 and self.timeline.refresh(step) != self.timeline.refresh(step - 1)

    def budget_share(self, step: int) -> float:
        """Return phi, the share of the rank budget: 1, or 0.5 to 1 by the next subset's mean quality percentile."""
        if not self.sampling.scales_budget:
            return 1.0
        refresh = self.timeline.refresh(step)
        return 0.5 + 0.5 * self.order.pool(refresh).mean_percentile(refresh)

    def figures(self, step: int) -> dict[str, Any]:
        """Collect the log's figures of the samples in use from ``step`` on."""
        refresh = self.timeline.refresh(step)
        pool, shares = self.order.pool(refresh), self.order.pool(refresh).cluster_shares(refresh)
        now = set(pool.subset(refresh).tolist())
        before = set(self.order.pool(refresh - 1).subset(refresh - 1).tolist()) if refresh else set()
        return {
            "subset": refresh,
            "subset_size": pool.subset_size,
            "subset_new": len(now - before),
            "effective_sample_size": round(pool.effective_size, 2),
            "mean_quality": float(pool.quality_N[pool.subset(refresh)].mean()),
            **({} if shares is None else dict(zip(_CLUSTER_FIGURES, map(_rounded, shares), strict=True))),
        }

    def digest(self) -> str:
        """Compute a digest of the sampling weights and clusters, from which every draw follows."""
        facts = hashlib.sha256(self.pool.log_weights_N.numpy().tobytes())
        facts.update(self.scored[0].cluster.numpy().tobytes())
        return facts.hexdigest()

    def save(self, folder: Path, args: Any, state: Any) -> None:
        """Write the quality terms into a checkpoint, so that a resumed run draws the same samples."""
        if args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            write_terms(folder / QUALITY_FILE, self.scored, self.scorer.rows)

    def report(self, output: Path, steps: int) -> None:
        """Write the data report as of ``steps`` optimizer steps."""
        # What lies in output_dir is pushed with it: nobody's training text goes to a hub unasked.
        text = None if self.trainer.args.push_to_hub else self._text
        data = DataQuality(
            terms=self.scored[-1].measured,
            quality_N=self.pool.quality_N,
            probability_N=self.pool.probabilities,
            kept_N=self.pool.kept_N,
            usage_N=self.order.usage(steps),
            row_digests=self.row_digests,
            subset_size=self.pool.subset_size,
            effective_size=self.pool.effective_size,
            cluster_N=self.scored[0].clusters,
            min_cluster_share=self.sampling.min_cluster_share,
            scorings=len(self.scored),
        )
        save_data_report(output, self.plan, data, steps, text)

    def _text(self, index: int) -> tuple[str, str]:
        """Decode prompt and answer of a sample."""
        row, tokenizer = self.dataset[index], self.trainer.processing_class
        ids, labels = list(row["input_ids"]), list(row.get("labels") or row["input_ids"])
        start = next((position for position, label in enumerate(labels) if label >= 0), len(ids))
        return tuple(tokenizer.decode(part, skip_special_tokens=True).strip() for part in (ids[:start], ids[start:]))


def starved_cluster(pool: Pool, refresh: int) -> tuple[int, float, float] | None:
    """Find the cluster that gets the smallest part of its share of the pool, if that part is below half.

    Clusters of which a subset would hold fewer than :data:`_FEWEST_EXPECTED` samples are left to chance.

    Returns:
        Number of the cluster, its share of the pool and its share of the draws from the subset; None if there is none.
    """
    shares = pool.cluster_shares(refresh)
    if shares is None:
        return None
    held_C, drawn_C = shares
    part_C = torch.where(held_C * pool.subset_size >= _FEWEST_EXPECTED, drawn_C / held_C.clamp(min=1e-300), 1.0)
    worst = int(part_C.argmin())
    return (worst, float(held_C[worst]), float(drawn_C[worst])) if float(part_C[worst]) < 0.5 else None


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def figures_of(selection: SampleSelection | None, step: int) -> dict[str, Any]:
    """Collect a log line's figures of the samples in use from ``step`` on; empty without a selection."""
    return {} if selection is None else selection.figures(step)
