"""Preparation of quality-based sampling before the first step: rows read, samples scored, the sampler set."""

import hashlib
import json
from pathlib import Path
from typing import Any

from llamafactory_adaptive.calibration.batches import holds_media
from llamafactory_adaptive.engines.distributed import gather_facts, process_number, refuse_differences
from llamafactory_adaptive.errors import CalibrationError, GuardError
from llamafactory_adaptive.files import digest_of
from llamafactory_adaptive.progress import progress
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.ranks.schedule import refresh_interval
from llamafactory_adaptive.sampling.sampler import SampleOrder, SubsetSampler, Timeline, steps_ahead
from llamafactory_adaptive.training.run_log import RunLog
from llamafactory_adaptive.training.sample_scoring import SampleRequest, SampleScorer
from llamafactory_adaptive.training.sample_selection import SampleSelection


class TrainingSamples:
    """The training set of one Trainer on one process, and the sampler for its data loader.

    Args:
        request: how samples are chosen.
        trainer: Trainer that has not made its data loader yet.
    """

    def __init__(self, request: SampleRequest, trainer: Any) -> None:
        self.request, self.trainer, self.dataset = request, trainer, trainer.train_dataset
        self.sampling = request.sampling
        if trainer.args.remove_unused_columns:
            self.dataset = trainer._remove_unused_columns(self.dataset, description="training")
        samples_per_batch = trainer.args.train_batch_size * trainer.args.world_size
        batches = -(-self.sampling.subset_size(len(self.dataset)) // samples_per_batch)
        self.sampler = SubsetSampler(batches * samples_per_batch)

    def prepare_samples(
        self, plan: RankPlan, max_steps: int, dataloader: Any, resumed: Path | None, log: RunLog
    ) -> SampleSelection:
        """Score every sample, or take scores from a checkpoint or the cache.

        Args:
            plan: plan that is trained.
            max_steps: optimizer steps of the run.
            dataloader: data loader of the Trainer, which draws from :attr:`sampler`.
            resumed: checkpoint that training resumes from; None for a fresh run.
            log: log of the run.

        Raises:
            GuardError: data loader and sampler differ in the steps of an epoch, or samples would be drawn before they
                are scored again.
            PlanError: the checkpoint holds no scores of these rows.
        """
        (timeline, lengths, digests), everyone = gather_facts(
            "the reading of training samples",
            lambda: (self._make_timeline(max_steps, dataloader), *self._read_rows()),
            lambda read: (len(read[1]), digest_of(read[2])),
        )
        sizes = [size for size, _ in everyone]
        refuse_differences(everyone, f"have other training samples than rank 0 (numbers by rank: {sizes})")
        scorer = SampleScorer(self.request, self.trainer, self.dataset, lengths, digest_of(digests))
        scored = [scorer.first()] if resumed is None else scorer.restored(resumed)
        order = SampleOrder(scorer.pool(scored[0]), timeline, self.sampling.refresh_quality)
        self.sampler.set_order(order)
        selection = SampleSelection(plan, self.sampler, scorer, scored, digests, self._lead(), log)
        if process_number() == 0:
            selection.warn_of_weights()
        return selection

    def _lead(self) -> int:
        """Count the steps before a refresh by which its samples are scored again."""
        args = self.trainer.args
        return steps_ahead(
            args.dataloader_num_workers, args.dataloader_prefetch_factor, args.gradient_accumulation_steps
        )

    def _read_rows(self) -> tuple[list[int], list[str]]:
        """Read every row, and return the lengths and the digests of tokens and labels."""
        lengths, digests = [], []
        quiet = process_number() != 0 or len(self.dataset) < 50_000
        with progress("reading samples", len(self.dataset), quiet) as advance:
            for row in self.dataset:
                if holds_media(row):
                    raise CalibrationError(
                        "training samples hold images, video or audio, whose quality is not measured; set "
                        "tsq_sampling: false"
                    )
                ids, labels = list(row["input_ids"]), row.get("labels")
                lengths.append(len(ids))
                text = json.dumps([ids, None if labels is None else list(labels)])
                digests.append(hashlib.sha256(text.encode()).hexdigest())
                advance()
        return lengths, digests

    def _make_timeline(self, max_steps: int, dataloader: Any) -> Timeline:
        args = self.trainer.args
        interval = refresh_interval(self.sampling.refresh_ratio, max_steps)
        per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        timeline = Timeline(len(self.sampler), per_step, interval, max(0, max_steps - 1) // interval)
        steps = -(-len(dataloader) // args.gradient_accumulation_steps)
        if steps != timeline.steps_per_epoch:
            raise GuardError(
                f"the data loader makes {steps} steps of an epoch, the sampler {timeline.steps_per_epoch}: leave "
                "accelerator_config (split_batches, even_batches) at its defaults or set tsq_sampling: false"
            )
        self._check_lead(timeline)
        return timeline

    def _check_lead(self, timeline: Timeline) -> None:
        """Refuse to score samples again at refreshes that follow each other faster than samples are fetched ahead."""
        lead, args = self._lead(), self.trainer.args
        if not self.sampling.refresh_quality or not timeline.last_refresh or lead < timeline.interval:
            return
        raise GuardError(
            f"tsq_refresh_quality: true is not possible: samples are fetched {lead} steps ahead, and with "
            f"tsq_refresh_ratio: {self.sampling.refresh_ratio:g} a refresh comes every {timeline.interval} steps, so "
            "that they would be drawn before they are scored again; set "
            + ("dataloader_num_workers: 0 or " if args.dataloader_num_workers else "train more steps, or ")
            + "a larger tsq_refresh_ratio"
        )
