"""Training samples chosen by quality, under the Trainer: score once, share, sample, keep for a resume, report."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llamafactory_adaptive.adapter.lora import factors, live_layers
from llamafactory_adaptive.calibration.batches import holds_media, length_sorted
from llamafactory_adaptive.engines.distributed import (
    all_reduce_sum,
    gather,
    process_number,
    refuse_differences,
    world_size,
)
from llamafactory_adaptive.errors import CalibrationError, GuardError, PlanError
from llamafactory_adaptive.files import QUALITY_FILE, digest_of, note_checksum, usable_entry
from llamafactory_adaptive.methods import Sampling
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.ranks.schedule import refresh_interval
from llamafactory_adaptive.reports.data_report import DataQuality, save_data_report
from llamafactory_adaptive.sampling.pool import Pool, combine_terms
from llamafactory_adaptive.sampling.quality import SampleTerms, measure
from llamafactory_adaptive.sampling.sample_gradients import TermSpec
from llamafactory_adaptive.sampling.sampler import SubsetSampler, Timeline
from llamafactory_adaptive.training.sample_scores import ScoringBatches, read_terms, term_vectors, write_terms


_LEAST_EFFECTIVE = 0.1  # of the subset; below it the user is warned
logger = logging.getLogger("llamafactory.adaptive")


class Selection:
    """The data side of one run on one process.

    Args:
        sampling: what the method wants.
        seed: of every draw.
        identity: what identifies model and data, for the cache.
        cache: folder in which scores are re-used.
    """

    def __init__(self, sampling: Sampling, seed: int, identity: Mapping[str, Any], cache: Path) -> None:
        self.sampling, self.seed, self.identity, self.cache = sampling, seed, identity, cache
        self.trainer: Any = None
        self.sampler: SubsetSampler
        self.dataset: Any = None
        self.row_digests: list[str] = []
        self.rows_digest = ""
        self.terms: SampleTerms
        self.pool: Pool
        self.timeline: Timeline

    def attach(self, trainer: Any) -> None:
        """Meet the Trainer; from now on :attr:`sampler` is what its data loader is to draw from."""
        self.trainer, self.dataset = trainer, trainer.train_dataset
        if trainer.args.remove_unused_columns:
            self.dataset = trainer._remove_unused_columns(self.dataset, description="training")
        whole = trainer.args.train_batch_size * trainer.args.world_size
        self.sampler = SubsetSampler(-(-self.sampling.subset_size(len(self.dataset)) // whole) * whole)

    # -- before the first step ---------------------------------------------------------------------------------------

    def begin(self, max_steps: int, dataloader: Any, resumed: Path | None) -> float:
        """Score every sample, or take scores from a checkpoint or the cache; returns the seconds it took.

        Raises:
            GuardError: the data loader batches otherwise than the sampler counts.
            PlanError: the checkpoint was trained on other rows.
        """
        started = time.perf_counter()
        lengths: list[int] = []

        def read() -> tuple[int, str]:
            self.timeline = self._make_timeline(max_steps, dataloader)
            lengths[:] = self._read_rows()
            return len(lengths), self.rows_digest

        everyone = gather("the reading of training samples", read)
        sizes = [size for size, _ in everyone]
        refuse_differences(everyone, f"have other training samples than rank 0 (numbers by rank: {sizes})")
        self.terms = self._measured(lengths) if resumed is None else self._restored(resumed)
        quality = combine_terms(
            (self.terms.gradient_norm, self.terms.loss_drop, self.terms.alignment), self.sampling.weights
        )
        self.pool = Pool(quality, getattr(self.terms, self.sampling.clip_term), self.sampling, self.seed)
        self.sampler.pool, self.sampler.timeline = self.pool, self.timeline
        if process_number() == 0:
            self._warn_if_collapsed()
        return time.perf_counter() - started

    def _read_rows(self) -> list[int]:
        """Identify every row by its tokens and labels; returns their lengths."""
        lengths, self.row_digests = [], []
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
            self.row_digests.append(hashlib.sha256(text.encode()).hexdigest())
        self.rows_digest = digest_of(self.row_digests)
        return lengths

    def _measured(self, lengths: Sequence[int]) -> SampleTerms:
        wanted, args = self._wanted(), self.trainer.args
        # The main process's cache decides: other nodes may have none.
        path = self.cache / f"{self._cache_key(wanted)}.safetensors" if process_number() == 0 else None
        cached = read_terms(path, self.rows_digest) if path is not None and usable_entry(path) else None
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
                wanted,
                all_reduce_sum,
                quiet=path is None,
            )
        if path is not None:
            write_terms(path, terms, self.rows_digest)
            note_checksum(path)
        return terms

    def _shared(self, terms: SampleTerms | None) -> SampleTerms:
        """What the main process read, on every process."""
        shape, device = (len(fields(SampleTerms)), len(self.dataset)), self.trainer.args.device
        mine = torch.zeros(shape, dtype=torch.float64) if terms is None else torch.stack(term_vectors(terms))
        return SampleTerms(*all_reduce_sum(mine.to(device)).cpu())

    def _wanted(self) -> TermSpec:
        """What to measure; settings that make no difference do not show, so that the cache fits."""
        s = self.sampling
        alignment = "none" if s.weights[2] == 0 else "projected" if s.projection else "exact"
        exact = s.loss_drop == "exact"
        projected = alignment == "projected"
        return TermSpec(
            step_size=s.step_size or self.trainer.args.learning_rate if exact else 1.0,
            exact_drop=exact,
            alignment=alignment,
            dimensions=s.projection if projected else 1,
            seed=self.seed if projected else 0,
        )

    def _cache_key(self, wanted: TermSpec) -> str:
        weights = hashlib.sha256()
        for layer, adapter in live_layers(self.trainer.model).values():
            for factor in factors(layer, adapter):
                weights.update(factor.detach().float().cpu().numpy().tobytes())
        args = self.trainer.args
        facts = {
            "identity": self.identity,
            "rows": self.rows_digest,
            "adapter": weights.hexdigest(),
            "wanted": asdict(wanted),
            "precision": [args.bf16, args.fp16, bool(args.deepspeed)],
        }
        return digest_of(facts)

    def _restored(self, checkpoint: Path) -> SampleTerms:
        terms = read_terms(checkpoint / QUALITY_FILE, self.rows_digest)
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

    def _warn_if_collapsed(self) -> None:
        """One line when a few samples hold most of the weight."""
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

    # -- while training ----------------------------------------------------------------------------------------------

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

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Keep what was measured, so that a resumed run draws the same."""
        folder.mkdir(parents=True, exist_ok=True)
        write_terms(folder / QUALITY_FILE, self.terms, self.rows_digest)

    def report(self, output: Path, steps: int, plan: RankPlan) -> None:
        """Write what a person wants to see of the data, ``steps`` optimizer steps into the run of ``plan``."""
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
        save_data_report(output, plan, data, steps, text)

    def _text(self, index: int) -> tuple[str, str]:
        """Prompt and answer of a sample."""
        row, tokenizer = self.dataset[index], self.trainer.processing_class
        ids, labels = list(row["input_ids"]), list(row.get("labels") or row["input_ids"])
        start = next((place for place, label in enumerate(labels) if label >= 0), len(ids))
        return tuple(tokenizer.decode(part, skip_special_tokens=True).strip() for part in (ids[:start], ids[start:]))
