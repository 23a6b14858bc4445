"""Scores of all training samples of a run: measured, taken from a cache or a checkpoint, equal on every process."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from llamafactory_adaptive.accelerator import random_state_kept, widest_float
from llamafactory_adaptive.adapter.lora import factors, live_factors, live_layers
from llamafactory_adaptive.calibration.batches import length_sorted
from llamafactory_adaptive.engines.distributed import all_reduce_sum, from_main, process_number, world_size
from llamafactory_adaptive.errors import OutputError, PlanError
from llamafactory_adaptive.files import QUALITY_FILE, digest_of, note_checksum, usable_entry
from llamafactory_adaptive.methods import Sampling
from llamafactory_adaptive.sampling.pool import Pool, quality_of
from llamafactory_adaptive.sampling.quality import SampleTerms, measure
from llamafactory_adaptive.sampling.sample_gradients import TermSpec
from llamafactory_adaptive.training.sample_scores import ScoringBatches, read_terms, term_vectors, write_terms


_CLUSTER_DIMENSIONS = 128  # of the gradients' projection, where alignments ask for none
logger = logging.getLogger("llamafactory.adaptive")


@dataclass(frozen=True)
class SampleRequest:
    """Settings by which the training samples of a run are chosen.

    Attributes:
        sampling: settings of the method.
        seed: seed of every draw.
        identity: values that identify model and data, part of the cache key.
        cache: folder of scores that later runs re-use; None on all processes but rank 0, whose cache decides.
    """

    sampling: Sampling
    seed: int
    identity: Mapping[str, Any] = field(default_factory=dict)
    cache: Path | None = None


class SampleScorer:
    """Source of the quality terms of every sample of one run, and of the pools that they make.

    Args:
        request: how samples are chosen.
        trainer: Trainer of the run, with the live adapter.
        dataset: the rows, as samples are numbered.
        lengths: tokens of every row.
        rows: digest of the rows.
    """

    def __init__(self, request: SampleRequest, trainer: Any, dataset: Any, lengths: Sequence[int], rows: str) -> None:
        self.request, self.sampling, self.trainer = request, request.sampling, trainer
        self.dataset, self.lengths, self.rows = dataset, lengths, rows

    def pool(self, terms: SampleTerms) -> Pool:
        """Build the pool that samples are drawn from by these terms."""
        tail_N = getattr(terms, self.sampling.clip_term)
        return Pool(quality_of(terms, self.sampling), tail_N, self.sampling, self.request.seed, terms.clusters)

    def first(self) -> SampleTerms:
        """Score every sample before the first step, or take its scores from the cache."""
        spec = self._term_spec()
        if cached := self._of_rank_0("the look for scores of samples", lambda: self._cached(spec)):
            return cached[0]
        terms = self._measured(spec, "Scoring samples")
        if spec.clusters:  # processors of another kind may have rounded to other clusters
            terms = self._shared(terms if process_number() == 0 else None)
        self._keep(terms, spec)
        return terms

    def again(self, first: SampleTerms, refresh: int) -> SampleTerms:
        """Score every sample on the adapter as it is now; clusters stay those of the first scoring."""
        spec = replace(self._term_spec(), clusters=0)
        return replace(self._measured(spec, f"Scoring samples (refresh {refresh})"), cluster=first.cluster)

    def restored(self, checkpoint: Path) -> list[SampleTerms]:
        """Read the terms of every scoring so far from a checkpoint.

        Raises:
            PlanError: the checkpoint has none of these rows, or lacks what the settings need.
        """
        return self._of_rank_0(f"the scores in {checkpoint}", lambda: self._read_checkpoint(checkpoint))

    def _read_checkpoint(self, checkpoint: Path) -> list[SampleTerms]:
        scored = read_terms(checkpoint / QUALITY_FILE, self.rows)
        if not scored:
            raise PlanError(
                f"{checkpoint} holds no qualities of these training samples: the data set, template or cutoff_len has "
                "changed, or the file is damaged; change it back or use another output_dir"
            )
        if self.sampling.min_cluster_share and scored[0].clusters is None:
            raise PlanError(
                f"{checkpoint} holds no clusters of the samples, which tsq_min_cluster_share: "
                f"{self.sampling.min_cluster_share:g} needs; leave it out or use another output_dir"
            )
        return scored

    def _cached(self, spec: TermSpec) -> list[SampleTerms]:
        path = self._cache_path(spec)
        return read_terms(path, self.rows)[:1] if path is not None and usable_entry(path) else []

    def _keep(self, terms: SampleTerms, spec: TermSpec) -> None:
        """Write fresh terms into the cache of rank 0; warn where they cannot be written there."""
        path = self._cache_path(spec)
        if path is None:
            return
        try:
            write_terms(path, [terms], self.rows)
            note_checksum(path)
        except OutputError as error:
            logger.warning(f"the scores of samples are not kept for later runs: {error}")

    def _cache_path(self, spec: TermSpec) -> Path | None:
        cache = self.request.cache
        return None if cache is None or process_number() != 0 else cache / f"{self._cache_key(spec)}.safetensors"

    def _measured(self, spec: TermSpec, title: str) -> SampleTerms:
        """Measure the terms of every sample, each process a share of them."""
        args = self.trainer.args
        size = self.sampling.batch_size or args.train_batch_size
        groups = length_sorted(self.lengths, size)[process_number() :: world_size()]
        # A run whose scores came from the cache must train the same: random states stay as they were.
        with random_state_kept(args.device):
            return measure(
                self.trainer.model,
                live_factors(self.trainer.model),
                ScoringBatches(self.dataset, self.trainer.data_collator, groups, args.dataloader_num_workers),
                len(self.lengths),
                spec,
                all_reduce_sum,
                quiet=process_number() != 0,
                title=title,
            )

    def _of_rank_0(self, what: str, read: Callable[[], list[SampleTerms]]) -> list[SampleTerms]:
        """Read terms on rank 0 alone, since nodes may share no folder, and send them to every process."""
        mine: list[SampleTerms] = []

        def count() -> int:
            mine.extend(read())
            return len(mine)

        return [self._shared(mine[number] if mine else None) for number in range(from_main(what, count))]

    def _shared(self, terms: SampleTerms | None) -> SampleTerms:
        """Send the terms of the main process to every process; None on the others."""
        shape, device = (len(fields(SampleTerms)), len(self.dataset)), self.trainer.args.device
        mine = torch.zeros(shape, dtype=torch.float64) if terms is None else torch.stack(term_vectors(terms))
        return SampleTerms(*all_reduce_sum(mine.to(device, widest_float(device))).cpu())

    def _term_spec(self) -> TermSpec:
        """Build the specification of what to measure; settings without effect are left out, so that caches match."""
        s = self.sampling
        alignment = "none" if s.weights[2] == 0 else "projected" if s.projection else "exact"
        exact, projected = s.loss_drop == "exact", alignment == "projected"
        dimensions = s.projection if projected else _CLUSTER_DIMENSIONS if s.clusters else 1
        return TermSpec(
            step_size=s.step_size or self.trainer.args.learning_rate if exact else 1.0,
            exact_drop=exact,
            alignment=alignment,
            dimensions=dimensions,
            seed=self.request.seed if projected else 0,
            clusters=s.clusters,
        )

    def _cache_key(self, spec: TermSpec) -> str:
        weights = hashlib.sha256()
        for layer, adapter in live_layers(self.trainer.model).values():
            for factor in factors(layer, adapter):
                weights.update(factor.detach().float().cpu().numpy().tobytes())
        args = self.trainer.args
        facts = {
            "identity": self.request.identity,
            "rows": self.rows,
            "adapter": weights.hexdigest(),
            # Without clusters the key is that of earlier versions, which knew none.
            "wanted": {name: value for name, value in asdict(spec).items() if name != "clusters" or value},
            "precision": [args.bf16, args.fp16, bool(args.deepspeed)],
        }
        return digest_of(facts)
