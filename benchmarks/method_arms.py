"""The arms that the benchmark of methods compares: IGU-LoRA, its parts and its rivals."""

from typing import Any


PUBLISHED_OFF = {"variant": "published", "importance": "off"}
SHRINK = {"importance": "shrink"}
PRODUCT = {"uncertainty": "product"}
# Arm: its method, and its options; those of igu are of the corrected variant where none is named. The letters are the
# hypotheses that an arm tests. Parts of corrected are tried with the product of S and U, the score that it had first.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "corrected": ("igu", {}),
    "published": ("igu", {"variant": "published"}),
    "adalora": ("adalora", {}),
    "adalora, alpha over lora_rank": ("adalora", {"scale": "lora_rank"}),
    # H9: no schedule and no score, twice the rank to the end and a cut by the norms of components
    "lora of twice the rank, cut by norm": ("cut", {}),
    # H4, H1: without shrinkage; the product in place of the ratio
    "published, off": ("igu", PUBLISHED_OFF),
    "published, off, product": ("igu", {**PUBLISHED_OFF, "uncertainty": "product"}),
    "published, product": ("igu", {"variant": "published", "uncertainty": "product"}),
    # H2, H3: positions taken out of scores; strength mended
    "published, descaled": ("igu", {"variant": "published", "descale": True}),
    "published, mended": ("igu", {"variant": "published", "mend_strength": True}),
    "published, descaled, mended": ("igu", {"variant": "published", "descale": True, "mend_strength": True}),
    # H5, H10: the start
    "published, off, LoRA's start": ("igu", {**PUBLISHED_OFF, "init": "lora"}),
    # H6: returns
    "published, off, hysteresis": ("igu", {**PUBLISHED_OFF, "hysteresis": 0.1}),
    "published, off, no returns": ("igu", {**PUBLISHED_OFF, "returns": "none"}),
    # H7: the regulariser
    "published, off, no regulariser": ("igu", {**PUBLISHED_OFF, "orthogonality_weight": 0.0}),
    # H8: epsilon
    "published, off, relative epsilon": ("igu", {**PUBLISHED_OFF, "epsilon_scale": "relative", "epsilon": 1.0}),
    # a module may lose its adapter: at a budget of rank 1 nothing can move otherwise
    "corrected, ranks from 0": ("igu", {"min_rank": 0}),
    "product, ranks from 0": ("igu", {**PRODUCT, "min_rank": 0}),
    # over-ranked and cut like it, but every module to the same rank: what allocation adds
    "product, uniform ranks": ("igu", {**PRODUCT, "min_rank": 4}),
    # corrected with another score; its own is a mean of nearly all steps, these are of the last seven
    "product": ("igu", PRODUCT),
    "snr": ("igu", {"uncertainty": "snr"}),
    "discounted": ("igu", {"uncertainty": "discounted"}),
    # corrected without another of its parts
    "product, gaussian start": ("igu", {**PRODUCT, "init": "gaussian"}),
    "product, returns": ("igu", {**PRODUCT, "returns": "former"}),
    "product, returns with hysteresis 0.1": ("igu", {**PRODUCT, "returns": "former", "hysteresis": 0.1}),
    "product, returns with hysteresis 1": ("igu", {**PRODUCT, "returns": "former", "hysteresis": 1.0}),
    "product, returns from lambda zero, hysteresis 0.1": ("igu", {**PRODUCT, "returns": "zero", "hysteresis": 0.1}),
    "product, regulariser 0.1": ("igu", {**PRODUCT, "orthogonality_weight": 0.1}),
    "product, shrink": ("igu", {**PRODUCT, **SHRINK}),
    "product, shrink, not descaled": ("igu", {**PRODUCT, **SHRINK, "descale": False}),
    "product, shrink, not mended": ("igu", {**PRODUCT, **SHRINK, "mend_strength": False}),
    "product, integrated": ("igu", {**PRODUCT, "importance": "integrated", "probe_interval": 5}),
}
# the arms of every budget but the first
FEWER = ("lora", "corrected", "corrected, ranks from 0", "product", "product, ranks from 0")
ON_SMOLLM2 = ("lora", "corrected", "published", "published, off, product")  # unless others are asked for
