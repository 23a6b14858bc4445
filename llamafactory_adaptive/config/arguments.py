"""The YAML keys that hold for every method, with their help. Standard library only."""

from dataclasses import dataclass

from llamafactory_adaptive.options import option


@dataclass
class AdaptiveArguments:
    """Keys of ``finetuning_type: adaptive`` that hold for every method. ``lora_rank`` is the budget."""

    adaptive_method: str = option(
        "sensitivity",
        "How ranks are found: sensitivity, fisher, gora_ranks, srlora and prilora find them before training; igu, "
        "adalora, elalora, svd and tsq find them during training; by_type takes them by hand; uniform and random are "
        "controls that measure nothing.",
    )
    adaptive_budget_unit: str = option(
        "params",
        "Unit of the budget: params allows as many trainable parameters as a uniform LoRA of rank lora_rank has, "
        "ranks the same sum of ranks.",
        choices=("params", "ranks"),
    )
    adaptive_min_rank: int = option(
        1, "Lowest rank of a module; 0 lets a module go without an adapter.", unit="rank", low=0
    )
    adaptive_max_rank: int | None = option(
        None, "Highest rank of a module (default: 4 x lora_rank).", unit="rank", low=1
    )
    adaptive_granularity: str = option(
        "module",
        "Modules that share one score, in methods that fix ranks before training: each module has its own, or all of "
        "a type (q_proj, up_proj, ...) or of a layer get their mean, weighted by cost. The ranks of such a group then "
        "differ by one at most, which spends the budget exactly; bounds aside.",
        choices=("module", "type", "layer"),
    )
    adaptive_init_rank: int | None = option(
        None,
        "Rank that every module starts with, in methods that prune: igu, adalora and svd (default: 2 x lora_rank, and "
        "adaptive_max_rank at most). elalora starts at the ranks of the budget.",
        unit="rank",
        low=2,
    )
    adaptive_warmup_ratio: float = option(
        0.1,
        "Share of the optimizer steps before ranks first change. The default is ours; IGU-LoRA's paper begins at "
        "epoch 2, which is 0.2 of 10 epochs.",
        low=0.0,
        high=0.99,
    )
    adaptive_final_ratio: float = option(
        0.3,
        "Share of the optimizer steps, at the end, that train the final ranks. The default is ours; IGU-LoRA's paper "
        "prunes until epoch 5, which leaves 0.5 of 10 epochs.",
        low=0.0,
        high=0.99,
    )
    adaptive_interval: int = option(
        10,
        "Optimizer steps between two allocations. The default is ours; IGU-LoRA's paper has a fifth of an epoch "
        "(adaptive_interval_epochs: 0.2).",
        unit="steps",
        low=1,
    )
    adaptive_interval_epochs: float | None = option(
        None,
        "The distance between two allocations as a share of an epoch, in place of adaptive_interval; it is rounded to "
        "whole optimizer steps, at least one.",
        unit="epochs",
        low=0.001,
        high=100.0,
    )
    adaptive_max_overhead: float | None = option(
        None,
        "Largest share of training time that the extra passes of igu_importance: integrated may add; they are thinned "
        "out to fit (default: no limit, which keeps runs reproducible). No other method makes extra passes.",
        low=0.001,
        high=10.0,
    )
    adaptive_best_model_from: str = option(
        "final",
        "Evaluations that count for load_best_model_at_end, early stopping and save_strategy: best, in methods that "
        "find ranks while training: final counts those after the ranks are final, start counts all of them.",
        choices=("final", "start"),
    )
    adaptive_max_nonfinite_steps: int = option(
        3,
        "Optimizer steps in a row whose loss may be NaN or infinite before the run is ended; a large number never "
        "ends it.",
        unit="steps",
        low=1,
    )
    adaptive_init: str = option(
        "default",
        "What the factors of LoRA start from, in methods that fix ranks before training: default as PEFT starts them "
        "(A random, B zero); eva takes for A the directions in which each module's inputs vary most (EVA); gora takes "
        "for B the gradient of the base weights, compressed by a random A (GoRA). Both need one more pass over the "
        "calibration rows, before training.",
        choices=("default", "eva", "gora"),
    )
    adaptive_init_gamma: float = option(
        0.05,
        "Size of the first update with adaptive_init: gora, as the learning rate of a step of gradient descent whose "
        "update has this norm, for gradients without preferred directions.",
        low=0.0,
        high=100.0,
    )
    adaptive_plan: str | None = option(
        None, "Path of a saved adaptive_rank_plan.json whose ranks are trained; no ranks are computed then."
    )
    adaptive_calibration_dataset: str | None = option(
        None,
        "Data sets for scoring, as names in dataset_info.json separated by commas (default: the training set). "
        "Only training splits are accepted.",
    )
    adaptive_calibration_samples: int = option(
        128, "Number of samples drawn for scoring.", unit="samples", low=1, high=1_000_000
    )
    adaptive_calibration_batch_size: int = option(
        8, "Samples per forward pass while scoring.", unit="samples", low=1, high=65_536
    )
    adaptive_calibration_seed: int | None = option(
        None, "Seed of the calibration draw and of the random method (default: the run's seed).", low=0
    )
    adaptive_calibration_process: str = option(
        "auto",
        "Process that measures the base: auto takes the training process where it trains alone on one device, so that "
        "the base is loaded once, and otherwise a process of its own; own always takes that, which loads the base a "
        "second time and leaves nothing behind. The ranks are the same.",
        choices=("auto", "own"),
    )
    adaptive_calibration_device_map: str = option(
        "auto",
        "How a process of its own spreads the base, as accelerate's device_map: auto and balanced over all visible "
        "GPUs, then CPU memory, then disk; balanced_low_0 leaves room on the first GPU; sequential fills one after "
        "the other; single loads it onto one device, as the host does.",
        choices=("auto", "balanced", "balanced_low_0", "sequential", "single"),
    )
    adaptive_calibration_max_memory: str | None = option(
        None,
        "Most memory that the spread base takes of each device, as in 0=20GiB,1=20GiB,cpu=60GiB; what is left out "
        "gets none (default: what is free).",
    )
    adaptive_calibration_offload_folder: str | None = option(
        None, "Folder for weights of the spread base that fit into no memory (default: a scratch folder)."
    )


# Keys that only methods which score before training read.
SCORING_KEYS = ("adaptive_granularity",)
# Keys that only methods which find ranks during training read.
SEARCH_KEYS = ("adaptive_best_model_from",)
# Keys that only methods which prune during training read, and those that exchange ranks, but for START_KEYS.
PRUNING_KEYS = (
    "adaptive_init_rank",
    "adaptive_warmup_ratio",
    "adaptive_final_ratio",
    "adaptive_interval",
    "adaptive_interval_epochs",
    "adaptive_max_overhead",
)
# That of them which says where pruning starts.
START_KEYS = ("adaptive_init_rank",)
# Those of them that say when else ranks are chosen than where they become final.
COURSE_KEYS = ("adaptive_warmup_ratio", "adaptive_interval", "adaptive_interval_epochs")
