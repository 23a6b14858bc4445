"""Options of TsqLoRA. Without torch."""

from dataclasses import dataclass, fields

from llamafactory_adaptive.errors import Problem
from llamafactory_adaptive.options import option


@dataclass(frozen=True)
class TsqOptions:
    """Options of TsqLoRA, the YAML keys ``tsq_*``."""

    sampling: bool = option(True, "Choose training samples by quality; false trains on all of them.")
    reallocation: bool = option(
        True, "Move ranks between modules while training; false keeps every module at lora_rank."
    )
    gradient_term: str = option(
        "norm",
        "How the gradient enters the quality of a sample: norm takes |g|, squared_norm takes |g|^2 (to first order "
        "the expected loss drop over again).",
        choices=("norm", "squared_norm"),
    )
    norm_weight: float = option(1.0, "Weight of the gradient norm in the quality of a sample.", low=-100.0, high=100.0)
    loss_drop_weight: float = option(1.0, "Weight of the expected loss drop in the quality.", low=-100.0, high=100.0)
    alignment_weight: float = option(
        0.0,
        "Weight of the alignment with the mean gradient in the quality; alignments are measured only if it is not 0.",
        low=-100.0,
        high=100.0,
    )
    loss_drop: str = option(
        "first_order",
        "How the expected loss drop is computed: first_order takes eta |g|^2, exact measures it by one more forward "
        "pass.",
        choices=("first_order", "exact"),
    )
    step_size: float | None = option(
        None,
        "Step size eta with which tsq_loss_drop: exact measures the loss drop (default: learning_rate).",
        low=1e-12,
        high=1e3,
    )
    projection: int = option(
        1024,
        "Dimensions of the random projection by which alignments are estimated; 0 computes them exactly, by a "
        "second pass.",
        unit="dimensions",
        low=0,
        high=65_536,
    )
    temperature: float = option(0.7, "Temperature tau of the softmax over qualities.", low=1e-3, high=1e6)
    subset_ratio: float = option(
        0.7, "Share of the training set that is trained on between refreshes.", low=1e-6, high=1.0
    )
    draws: str = option(
        "uniform",
        "How batches are drawn from the subset: uniform takes every sample of it once a turn, quality draws samples "
        "in proportion to their weights, with replacement.",
        choices=("uniform", "quality"),
    )
    clip_term: str = option(
        "loss",
        "Measure by which tsq_clip_quantile leaves samples out. Samples with wrong answers stand out by their loss "
        "more than by their gradient_norm.",
        choices=("loss", "gradient_norm"),
    )
    clip_quantile: float = option(
        1.0,
        "Samples whose loss (or gradient norm, by tsq_clip_term) lies above this quantile are left out.",
        low=0.01,
        high=1.0,
    )
    batch_size: int | None = option(
        None,
        "Samples per batch while scoring (default: per_device_train_batch_size).",
        unit="samples",
        low=1,
        high=65_536,
    )
    refresh_ratio: float = option(
        0.25, "Share of all optimizer steps between refreshes of subset and ranks.", low=1e-4, high=0.5
    )
    refresh_quality: bool = option(
        False,
        "Score all samples again before every refresh, on the adapter as it is by then; each time costs one more "
        "scoring pass. false scores them once, before the first step.",
    )
    clusters: int = option(
        8,
        "Clusters that samples are sorted into by the direction of their gradients, to tell how each kind of data "
        "fares; 0 sorts into none.",
        unit="clusters",
        low=0,
        high=256,
    )
    min_cluster_share: float = option(
        0.0,
        "Part of its share of the training set that every cluster keeps in the subset and in the draws, however low "
        "its quality; 0 leaves all to quality, 1 keeps every share as it is.",
        low=0.0,
        high=1.0,
    )
    sensitivity: str = option(
        "weight_gradient",
        "How the sensitivity of a weight is measured: weight_gradient takes |w dL/dw|, fisher takes (dL/dw)^2.",
        choices=("weight_gradient", "fisher"),
    )
    sensitivity_over: str = option(
        "samples",
        "What sensitivities are means over: samples takes the gradient of every training sample by itself, step takes "
        "the mean gradient of each optimizer step, in which opposed samples cancel; step costs less.",
        choices=("samples", "step"),
        before="step",
    )
    beta: float = option(
        0.85,
        "Weight of each refresh interval in the sensitivity, relative to the interval after it; a larger value keeps "
        "ranks from jumping back and forth between refreshes.",
        low=0.0,
        high=1.0,
    )
    phi: str = option(
        "1",
        "Share of the budget that is spent: 1 spends all of it; quality spends between 0.5 and 1, more for a subset "
        "of higher mean quality.",
        choices=("1", "quality"),
    )

    def check(self) -> list[Problem]:
        """List options that leave nothing to do, have no effect, or contradict each other."""
        weights = (self.norm_weight, self.loss_drop_weight, self.alignment_weight)
        by_quality = self.phi == "quality"
        rules = [
            (not (self.sampling or self.reallocation), "sampling",
             "with tsq_reallocation: false nothing of the method is left", "adaptive_method: uniform"),
            (not self.sampling and by_quality, "phi", "without sampling no quality is known", "tsq_phi: 1"),
            (not self.reallocation and by_quality, "phi", "without reallocation ranks stay as they are", "tsq_phi: 1"),
            (self.sampling and not any(weights), "norm_weight",
             "all three weights are 0: every sample would be as good as any", "tsq_norm_weight: 1.0"),
            (self.min_cluster_share > 0 and self.clusters < 2, "min_cluster_share",
             f"tsq_clusters: {self.clusters} tells no kinds of samples apart", "tsq_clusters: 8"),
        ]  # fmt: skip
        broken = [(name, reason, remedy) for wrong, name, reason, remedy in rules if wrong]
        return self._idle() + [Problem(f"tsq_{name}", getattr(self, name), *said) for name, *said in broken]

    def _idle(self) -> list[Problem]:
        """List options that were set but have no effect because of others."""
        rules = [
            (not self.sampling, _OF_SAMPLING, "with tsq_sampling: false no sample is chosen"),
            (not self.reallocation, OF_REALLOCATION, "with tsq_reallocation: false ranks stay as they are"),
            (not self.norm_weight, ("gradient_term",), "with tsq_norm_weight: 0 the gradient norm does not count"),
            (self.clip_quantile == 1.0, ("clip_term",), "with tsq_clip_quantile: 1 nothing is left out"),
            (not self.alignment_weight, ("projection",), "with tsq_alignment_weight: 0 no alignment is measured"),
            (self.loss_drop != "exact", ("step_size",), "only tsq_loss_drop: exact takes a step"),
        ]
        return [
            Problem(f"tsq_{entry.name}", getattr(self, entry.name), reason, f"leaving tsq_{entry.name} out")
            for off, names, reason in rules
            for entry in fields(self)
            if off and entry.name in names and getattr(self, entry.name) != entry.default
        ]


_OF_SAMPLING = ("gradient_term", "norm_weight", "loss_drop_weight", "alignment_weight", "loss_drop", "temperature",
                "subset_ratio", "draws", "clip_term", "clip_quantile", "batch_size", "refresh_quality", "clusters",
                "min_cluster_share")  # fmt: skip
OF_REALLOCATION = ("sensitivity", "sensitivity_over", "beta")
OF_THE_SAMPLES = tuple(
    entry.name for entry in fields(TsqOptions) if entry.name not in ("reallocation", "phi", *OF_REALLOCATION)
)
