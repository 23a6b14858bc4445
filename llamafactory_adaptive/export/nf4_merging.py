"""Merging of an adapter that was trained on a 4-bit base (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

Such an adapter was trained beside W_q = dequantised(NF4(W)), not beside W. Merged into W it is served on weights that
differ by W - W_q from those in training. The ratio ||W - W_q|| / ||scale * B A|| of a layer compares that difference
with what was learned. On a CPU, bitsandbytes quantises some ten million weights per second.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamafactory_adaptive.export.merging import update
from llamafactory_adaptive.export.source_adapter import SourceAdapter


REPORT_FILE = "quantization_report.json"
BLOCK_SIZE = 64
# Of the median ratio: up to SMALL the two merges differ by little against what was learned, from LARGE on by more.
SMALL, LARGE = 0.25, 1.0


def quantised_weights(skeleton: nn.Module) -> set[str]:
    """List the weights that loading in 4-bit quantises: all linear layers but the output head, as in transformers."""
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = set(get_keys_to_not_convert(skeleton))
    linears = (name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear))
    return {f"{name}.weight" for name in linears if not any(name == key or name.startswith(f"{key}.") for key in kept)}


@dataclass(frozen=True)
class Nf4:
    """Settings of the base's quantisation: NF4 in blocks of 64, as LLaMA-Factory does by default.

    Attributes:
        double: whether the block maxima are quantised too (``double_quantization``, on by default).
    """

    double: bool

    def through(self, weight: Tensor) -> Tensor:
        """Quantise and dequantise a weight in its own type, as a 4-bit layer multiplies with it."""
        # Here, since the package is an extra: all other exports do without it.
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(
            weight.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=self.double, quant_type="nf4"
        )
        return dequantize_4bit(packed, state)

    def loading(self) -> Any:
        """Build the quantisation config with the same settings for ``from_pretrained``."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=torch.float32,
        )


@dataclass
class QuantisationReport:
    """Ratio of quantisation error to update for every adapted layer, collected while merging.

    Attributes:
        untrained: layers whose update is zero, which have no ratio.
    """

    nf4: Nf4
    ratios: dict[str, float] = field(default_factory=dict)
    untrained: list[str] = field(default_factory=list)

    def transform(self, adapter: SourceAdapter, quantised: set[str]) -> Callable[[str, Tensor], Tensor]:
        """Make the function that passes each weight through NF4 before merging, and notes ratios of adapted ones."""

        def prepare(name: str, weight: Tensor) -> Tensor:
            if name not in quantised:
                return weight
            seen = self.nf4.through(weight)
            if (module := name.removesuffix(".weight")) in adapter.by_name:
                self._note(module, (seen.float() - weight.float()).norm(), update(adapter, module).norm())
            return seen

        return prepare

    def _note(self, module: str, error: Tensor, learned: Tensor) -> None:
        if learned > 0:
            self.ratios[module] = float(error / learned)
        else:
            self.untrained.append(module)

    @property
    def median(self) -> float:
        """Return the median ratio; zero if no layer has one."""
        return statistics.median(self.ratios.values()) if self.ratios else 0.0

    def recommendation(self) -> str:
        """Recommend a merge by the median ratio. It compares sizes; only scores tell which merge answers better."""
        if self.median >= LARGE:
            return (
                "quantising moved the weights more than training did. For an adapter trained on the 4-bit base, serve "
                "this merge, which has the weights that training saw, or score it against a plain one"
            )
        if self.median > SMALL:
            return "quantising moved the weights about as much as training did: score this merge against a plain one"
        return "training moved the weights far more than quantising: prefer a plain merge, it keeps the 16-bit base"

    def table(self) -> str:
        """Format the report: a line per adapted layer, largest ratio first, then the recommendation."""
        width = max(map(len, self.ratios), default=5)
        ordered = sorted(self.ratios.items(), key=lambda item: -item[1])
        lines = [f"{'layer':<{width}}  quantisation error / update"]
        lines += [f"{name:<{width}}  {ratio:.3f}" for name, ratio in ordered]
        return "\n".join([*lines, f"median {self.median:.3f}: {self.recommendation()}"])

    def save(self, folder: Path) -> None:
        """Write the ratios to a JSON file beside the merged weights."""
        document = {**asdict(self), "block_size": BLOCK_SIZE, "median": self.median, "advice": self.recommendation()}
        (folder / REPORT_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
