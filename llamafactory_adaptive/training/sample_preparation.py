"""Preparation of quality-based sampling before the first step: scores of all samples, and the sampler by them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llamafactory_adaptive.adapter.lora import factors, live_layers
from llamafactory_adaptive.calibration.batches import holds_media, length_sorted
from llamafactory_adaptive.engines.distributed import (
    all_reduce_sum,
    gather_facts,
    process_number,
    refuse_differences,
    world_size,
)
from llamafactory_adaptive.errors import CalibrationError, GuardError, PlanError
from llamafactory_adaptive.files import QUALITY_FILE, digest_of, note_checksum, usable_entry
from llamafactory_adaptive.methods import Sampling
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.ranks.schedule import refresh_interval
from llamafactory_adaptive.sampling.pool import Pool, combine_terms
from llamafactory_adaptive.sampling.quality import SampleTerms, measure
from llamafactory_adaptive.sampling.sample_gradients import TermSpec
from llamafactory_adaptive.sampling.sampler import SampleOrder, SubsetSampler, Timeline
from llamafactory_adaptive.training.sample_scores import ScoringBatches, read_terms, term_vectors, write_terms
from llamafactory_adaptive.training.sample_selection import SampleSelection


@dataclass(frozen=True)
class SampleRequest:
    """Settings by which the training samples of a run are chosen.

    Attributes:
        sampling: settings of the method.
        seed: seed of every draw.
        identity: values that identify model and data, part of the cache key.
        cache: folder of scores that later runs re-use.
    """

    sampling: Sampling
    seed: int
    identity: Mapping[str, Any]
    cache: Path


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
        self, plan: RankPlan, max_steps: int, dataloader: Any, resumed: Path | None
    ) -> SampleSelection:
        """Score every sample, or take scores from a checkpoint or the cache.

        Args:
            plan: plan that is trained.
            max_steps: optimizer steps of the run.
            dataloader: data loader of the Trainer, which draws from :attr:`sampler`.
            resumed: checkpoint that training resumes from; None for a fresh run.

        Raises:
            GuardError: data loader and sampler differ in the steps of an epoch.
            PlanError: the checkpoint holds no scores of these rows.
        """
        (timeline, lengths, digests), everyone = gather_facts(
            "the reading of training samples",
            lambda: (self._make_timeline(max_steps, dataloader), *self._read_rows()),
            lambda read: (len(read[1]), digest_of(read[2])),
        )
        sizes = [size for size, _ in everyone]
        refuse_differences(everyone, f"have other training samples than rank 0 (numbers by rank: {sizes})")
        rows = digest_of(digests)
        terms = self._measured(lengths, rows) if resumed is None else self._restored(resumed, rows)
        quality = combine_terms((terms.gradient_norm, terms.loss_drop, terms.alignment), self.sampling.weights)
        pool = Pool(quality, getattr(terms, self.sampling.clip_term), self.sampling, self.request.seed)
        self.sampler.set_order(SampleOrder(pool, timeline))
        selection = SampleSelection(plan, self.trainer, self.dataset, self.sampler, self.sampling, terms, digests)
        if process_number() == 0:
            selection.warn_if_collapsed()
        return selection

    def _read_rows(self) -> tuple[list[int], list[str]]:
        """Read every row, and return the lengths and the digests of tokens and labels."""
        lengths, digests = [], []
        quiet = process_number() != 0 or len(self.dataset) < 50_000
        for row in tqdm(self.dataset, desc="Reading samples", unit="row", disable=quiet):
            if holds_media(row):
                raise CalibrationError(
                    "training samples hold images, video or audio, whose quality is not measured; set "
                    "tsq_sampling: false"
                )
            ids, labels = list(row["input_ids"]), row.get("labels")
            lengths.append(len(ids))
            text = json.dumps([ids, None if labels is None else list(labels)])
            digests.append(hashlib.sha256(text.encode()).hexdigest())
        return lengths, digests

    def _measured(self, lengths: Sequence[int], rows: str) -> SampleTerms:
        spec, args = self._term_spec(), self.trainer.args
        # The main process's cache decides: other nodes may have none.
        path = self.request.cache / f"{self._cache_key(spec, rows)}.safetensors" if process_number() == 0 else None
        cached = read_terms(path, rows) if path is not None and usable_entry(path) else None
        if int(all_reduce_sum(torch.tensor(int(cached is not None), device=args.device))):
            return self._shared(cached)
        size = self.sampling.batch_size or args.train_batch_size
        groups = length_sorted(lengths, size)[process_number() :: world_size()]
        layers = live_layers(self.trainer.model)
        # A run whose scores came from the cache must train the same: random states stay as they were.
        with torch.random.fork_rng(devices=[args.device] if args.device.type == "cuda" else []):
            terms = measure(
                self.trainer.model,
                {name: (layer.lora_A[adapter], layer.lora_B[adapter]) for name, (layer, adapter) in layers.items()},
                ScoringBatches(self.dataset, self.trainer.data_collator, groups, args.dataloader_num_workers),
                len(lengths),
                spec,
                all_reduce_sum,
                quiet=path is None,
            )
        if path is not None:
            write_terms(path, terms, rows)
            note_checksum(path)
        return terms

    def _shared(self, cached: SampleTerms | None) -> SampleTerms:
        """Send the scores that the main process has read to every process."""
        shape, device = (len(fields(SampleTerms)), len(self.dataset)), self.trainer.args.device
        mine = torch.zeros(shape, dtype=torch.float64) if cached is None else torch.stack(term_vectors(cached))
        return SampleTerms(*all_reduce_sum(mine.to(device)).cpu())

    def _term_spec(self) -> TermSpec:
        """Build the specification of what to measure; settings without effect are left out, so that caches match."""
        s = self.sampling
        alignment = "none" if s.weights[2] == 0 else "projected" if s.projection else "exact"
        exact = s.loss_drop == "exact"
        projected = alignment == "projected"
        return TermSpec(
            step_size=s.step_size or self.trainer.args.learning_rate if exact else 1.0,
            exact_drop=exact,
            alignment=alignment,
            dimensions=s.projection if projected else 1,
            seed=self.request.seed if projected else 0,
        )

    def _cache_key(self, spec: TermSpec, rows: str) -> str:
        weights = hashlib.sha256()
        for layer, adapter in live_layers(self.trainer.model).values():
            for factor in factors(layer, adapter):
                weights.update(factor.detach().float().cpu().numpy().tobytes())
        args = self.trainer.args
        facts = {
            "identity": self.request.identity,
            "rows": rows,
            "adapter": weights.hexdigest(),
            "wanted": asdict(spec),
            "precision": [args.bf16, args.fp16, bool(args.deepspeed)],
        }
        return digest_of(facts)

    def _restored(self, checkpoint: Path, rows: str) -> SampleTerms:
        terms = read_terms(checkpoint / QUALITY_FILE, rows)
        if terms is None:
            raise PlanError(
                f"{checkpoint} holds no qualities of these training samples: the data set, template or cutoff_len has "
                "changed, or the file is damaged; change it back or use another output_dir"
            )
        return terms

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
        return timeline
