"""The arms that the benchmark of methods compares: IGU-LoRA, its parts and its rivals."""

from typing import Any


PUBLISHED = {"variant": "published"}
OFF = {**PUBLISHED, "importance": "off"}
SHRINK = {"importance": "shrink"}
PRODUCT = {"uncertainty": "product"}
UNDESCALED, MENDED, UNMENDED = {"descale": False}, {"mend_strength": True}, {"mend_strength": False}
BUDGET = "the budget"  # in the place of a value that is the budget's
TO_THE_END = {"final_ratio": 0.0}  # no step follows the last allocation
# Arm: its method, and its options; those of igu are of the corrected variant where none is named. The letters are the
# hypotheses that an arm tests.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "random ranks": ("random", {}),
    "corrected": ("igu", {}),
    "published": ("igu", PUBLISHED),
    "adalora": ("adalora", {}),
    "adalora, alpha over lora_rank": ("adalora", {"scale": "lora_rank"}),
    # H9: no schedule and no score, twice the rank to the end and a cut by the norms of components
    "lora of twice the rank, cut by norm": ("cut", {}),
    # H4, H1: without shrinkage; the product in place of the ratio
    "published, off": ("igu", OFF),
    "published, off, product": ("igu", {**OFF, **PRODUCT}),
    "published, product": ("igu", {**PUBLISHED, **PRODUCT}),
    # H2, H3: positions taken out of scores; strength mended, which is for adapters that are used as shrinkage ends
    "published, descaled": ("igu", {**PUBLISHED, "descale": True}),
    "published, mended": ("igu", {**PUBLISHED, **MENDED}),
    "published, descaled, mended": ("igu", {**PUBLISHED, "descale": True, **MENDED}),
    "published, shrunk to the end": ("igu", {**PUBLISHED, **TO_THE_END}),
    "published, shrunk to the end, mended": ("igu", {**PUBLISHED, **TO_THE_END, **MENDED}),
    # H5, H10: the start
    "published, off, LoRA's start": ("igu", {**OFF, "init": "lora"}),
    # H6: returns
    "published, off, hysteresis": ("igu", {**OFF, "hysteresis": 0.1}),
    "published, off, no returns": ("igu", {**OFF, "returns": "none"}),
    # H7: the regulariser
    "published, off, no regulariser": ("igu", {**OFF, "orthogonality_weight": 0.0}),
    # H8: epsilon
    "published, off, relative epsilon": ("igu", {**OFF, "epsilon_scale": "relative", "epsilon": 1.0}),
    # a module may lose its adapter: at a budget of rank 1 nothing can move otherwise
    "published, ranks from 0": ("igu", {**PUBLISHED, "min_rank": 0}),
    "corrected, ranks from 0": ("igu", {"min_rank": 0}),
    "product, ranks from 0": ("igu", {**PRODUCT, "min_rank": 0}),
    # corrected with another score: of S and U with the beta1 of each, and the one with the other's
    "product": ("igu", PRODUCT),
    "snr": ("igu", {"uncertainty": "snr"}),
    "discounted": ("igu", {"uncertainty": "discounted"}),
    "product, beta1 0.999": ("igu", {**PRODUCT, "beta1": 0.999}),
    "corrected, beta1 0.85": ("igu", {"beta1": 0.85}),
    # corrected without another of its parts, or with what it does without
    "corrected, gaussian start": ("igu", {"init": "gaussian"}),
    "corrected, returns": ("igu", {"returns": "former"}),
    "corrected, returns with hysteresis 0.1": ("igu", {"returns": "former", "hysteresis": 0.1}),
    "corrected, returns with hysteresis 1": ("igu", {"returns": "former", "hysteresis": 1.0}),
    "corrected, returns from lambda zero": ("igu", {"returns": "zero"}),
    "corrected, returns from lambda zero, hysteresis 0.1": ("igu", {"returns": "zero", "hysteresis": 0.1}),
    "corrected, regulariser 0.1": ("igu", {"orthogonality_weight": 0.1}),
    "corrected, published regulariser": ("igu", {"orthogonality_weight": 1.0, "orthogonality_scale": "absolute"}),
    "corrected, shrink": ("igu", SHRINK),
    "corrected, shrink, mended": ("igu", {**SHRINK, **MENDED}),
    "corrected, shrink, mended, not descaled": ("igu", {**SHRINK, **MENDED, **UNDESCALED}),
    "corrected, shrunk to the end": ("igu", {**SHRINK, **TO_THE_END}),
    "corrected, shrunk to the end, not mended": ("igu", {**SHRINK, **TO_THE_END, **UNMENDED}),
    "corrected, integrated": ("igu", {"importance": "integrated", "probe_interval": 5}),
    # corrected with other shares of the steps before ranks change, and after: by default 0.1 and 0.3; the paper's
    # epochs 2 and 5 are 0.2 and 0.5 of 10
    "corrected, warm-up 0": ("igu", {"warmup_ratio": 0.0}),
    "corrected, warm-up 0.2": ("igu", {"warmup_ratio": 0.2}),
    "corrected, final phase 0.1": ("igu", {"final_ratio": 0.1}),
    "corrected, final phase 0.5": ("igu", {"final_ratio": 0.5}),
    # over-ranked and cut like corrected, but every module to the rank of the budget: what allocation adds
    "corrected, uniform ranks": ("igu", {"min_rank": BUDGET}),
}
# What a part adds: an arm, and the one that lacks it or has another in its place. All other arms of corrected lack a
# part of it.
BASES = {
    "corrected": "published",
    "lora of twice the rank, cut by norm": "corrected",
    "published, off": "published",
    "published, off, product": "published, off",
    "published, product": "published",
    "published, descaled": "published",
    "published, mended": "published",
    "published, descaled, mended": "published, descaled",
    "published, shrunk to the end, mended": "published, shrunk to the end",
    "published, off, LoRA's start": "published, off",
    "published, off, hysteresis": "published, off",
    "published, off, no returns": "published, off",
    "published, off, no regulariser": "published, off",
    "published, off, relative epsilon": "published, off",
    "published, ranks from 0": "published",
    "product, ranks from 0": "corrected, ranks from 0",
    "product": "corrected",
    "snr": "corrected",
    "discounted": "corrected",
    "product, beta1 0.999": "product",
    "corrected, returns with hysteresis 0.1": "corrected, returns",
    "corrected, returns with hysteresis 1": "corrected, returns",
    "corrected, returns from lambda zero": "corrected, returns",
    "corrected, returns from lambda zero, hysteresis 0.1": "corrected, returns",
    "corrected, shrink, mended": "corrected, shrink",
    "corrected, shrink, mended, not descaled": "corrected, shrink, mended",
    "corrected, shrunk to the end": "corrected, shrink, mended",
    "corrected, shrunk to the end, not mended": "corrected, shrunk to the end",
}
# the arms of every budget but the first
FEWER = ("lora", "random ranks", "corrected", "published", "corrected, uniform ranks",
         "corrected, ranks from 0", "product", "product, ranks from 0")  # fmt: skip
ON_SMOLLM2 = ("lora", "corrected", "published", "published, off", "published, off, product")  # unless others are asked


def base_of(arm: str) -> str | None:
    """Give the arm that tells what a part of this one adds, or takes."""
    return BASES.get(arm, "corrected" if arm.startswith("corrected, ") else None)


def of_budget(arm: str, rank: int) -> tuple[str, dict[str, Any]]:
    """Give method and options of an arm at a budget."""
    method, options = ARMS[arm]
    return method, {key: rank if value == BUDGET else value for key, value in options.items()}
