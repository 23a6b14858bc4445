"""Load models and compare: PEFT with the original adapter on one side, the exported folder on the other."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn

from llamafactory_adaptive.adapter import keep_4bit_unpacked_on_cpu
from llamafactory_adaptive.export.base import BaseCheckpoint
from llamafactory_adaptive.export.certificate import ROUNDING_FACTOR, Check, Comparison
from llamafactory_adaptive.export.parity import largest_difference, log_probabilities
from llamafactory_adaptive.export.quantisation import Nf4
from llamafactory_adaptive.export.reading import applied, read_as
from llamafactory_adaptive.export.serving import max_lora_rank
from llamafactory_adaptive.export.source import ExportError, SourceAdapter
from llamafactory_adaptive.export.vllm_check import ask_vllm, difference_of_first_tokens


PEFT_FP32 = "PEFT in float32"


@dataclass(frozen=True)
class Comparer:
    """What every comparison needs.

    Attributes:
        rows: token ids of the fixed prompts.
        tolerance: in nats, for checks that compute the same weights in fp32.
        vllm_python: interpreter of an environment with vLLM, or None.
    """

    adapter: SourceAdapter
    base: BaseCheckpoint
    rows: list[list[int]]
    tolerance: float
    vllm_python: Path | None

    def layout(self, server: str, folder: Path) -> Comparison:
        """Check a LoRA layout by the rule of its server."""
        reference, alone, exported = self._three_forms(server, folder)
        reader = "PEFT" if server == "peft" else f"the reading rule of {server}"
        checks = [Check("parity", PEFT_FP32, reader, largest_difference(reference, exported), self.tolerance)]
        if self.vllm_python:
            checks.append(self._layout_in_vllm(self.vllm_python, folder, reference, alone))
        return Comparison(tuple(checks), reference, exported, largest_difference(reference, alone))

    def _three_forms(self, server: str, folder: Path) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Log-probabilities of PEFT, of the base alone, and of the export, on one loaded base."""
        live = _peft(load(self.base.folder, self.base.widest), self.adapter.folder)
        reference = log_probabilities(live, self.rows)
        plain = live.unload()
        alone = log_probabilities(plain, self.rows)
        if server == "peft":
            return reference, alone, log_probabilities(_peft(plain, folder), self.rows)
        with applied(plain, read_as(server, folder)):
            return reference, alone, log_probabilities(plain, self.rows)

    def _layout_in_vllm(self, python: Path, folder: Path, reference: list[Tensor], alone: list[Tensor]) -> Check:
        rank = max_lora_rank(max(module.rank for module in self.adapter.modules))
        answer = ask_vllm(python, self.base.folder, folder, rank, self.rows)
        tolerance = self.tolerance
        if answer.dtype != "float32":
            tolerance = max(tolerance, ROUNDING_FACTOR * difference_of_first_tokens(alone, answer.plain))
        difference = difference_of_first_tokens(reference, answer.exported)
        return Check("vllm", PEFT_FP32, str(answer), difference, tolerance)

    def merged(self, folder: Path, dtype: torch.dtype, nf4: Nf4 | None) -> Comparison:
        """Check a merged model; ``nf4`` says how the base was quantised where the merge went into that.

        Raises:
            ExportError: a merged weight is not PEFT's.
        """
        unmerged, effect = self._unmerged(nf4)
        by_peft, merge = self._merged_by_peft(folder, dtype, nf4)
        exported, rounding = self._merged_alone(folder)
        start = f"{PEFT_FP32} on the {'4-bit ' if nf4 else ''}base, not merged"
        own = "the merged weights, computed in float32"
        checks = [
            Check("parity", merge, own, largest_difference(by_peft, exported), self.tolerance),
            Check("rounding", start, own, largest_difference(unmerged, exported), max(self.tolerance, rounding)),
        ]
        if self.vllm_python:
            answer = ask_vllm(self.vllm_python, folder, None, None, self.rows)
            difference = difference_of_first_tokens(by_peft, answer.exported)
            checks.append(Check("vllm", merge, str(answer), difference, self.tolerance))
        return Comparison(tuple(checks), unmerged, exported, effect)

    def _unmerged(self, nf4: Nf4 | None) -> tuple[list[Tensor], float]:
        """PEFT's log-probabilities, and how far the adapter moves them."""
        live = _peft(load(self.base.folder, self.base.widest, nf4), self.adapter.folder)
        reference = log_probabilities(live, self.rows)
        with live.disable_adapter():
            return reference, largest_difference(reference, log_probabilities(live, self.rows))

    def _merged_by_peft(self, folder: Path, dtype: torch.dtype, nf4: Nf4 | None) -> tuple[list[Tensor], str]:
        """PEFT's own merge, which the files must equal: its log-probabilities, and what it is in words."""
        model = load(self.base.folder, dtype, nf4)
        if nf4:
            model = model.dequantize()
        model = _peft(model, self.adapter.folder).merge_and_unload()
        if unequal := self._unequal_weights(model, folder):
            more = f" and {len(unequal) - 3} more" if len(unequal) > 3 else ""
            raise ExportError(
                f"parity failed, nothing was written: {len(unequal)} of the merged weights are not those of PEFT's "
                f"merge: {', '.join(unequal[:3])}{more}"
            )
        words = f"PEFT's merge in {str(dtype).removeprefix('torch.')} (the same weights), computed in float32"
        return log_probabilities(model, self.rows), words

    def _unequal_weights(self, model: nn.Module, folder: Path) -> list[str]:
        """Names of weights that differ from PEFT's or are missing.

        What is in the files and no part of the model, such as buffers that are computed anew, must be the base's.
        """
        weights, unequal, found = model.state_dict(), [], set()
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    found.add(name)
                    expected, weight = weights.get(name), file.get_tensor(name)
                    if expected is None and name in self.base.weights:
                        expected = self.base.tensor(name)
                    if expected is None or not torch.equal(expected.to(weight.dtype), weight):
                        unequal.append(name)
        return [*unequal, *sorted(self.base.weights.keys() - found)]

    def _merged_alone(self, folder: Path) -> tuple[list[Tensor], float]:
        """The merged model's log-probabilities, and what rounding may have done to them."""
        model, adapted = load(folder), [module.name for module in self.adapter.modules]
        exported = log_probabilities(model, self.rows)
        return exported, ROUNDING_FACTOR * largest_difference(exported, log_probabilities(model, self.rows, adapted))


def load(folder: Path, dtype: torch.dtype | None = None, nf4: Nf4 | None = None) -> Any:
    """A causal language model on the CPU, in ``dtype`` or what its config says, or with its linear layers in NF4."""
    from transformers import AutoModelForCausalLM

    settings = {"quantization_config": nf4.loading(), "device_map": {"": "cpu"}} if nf4 else {}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", trust_remote_code=False, **settings
    ).eval()
    keep_4bit_unpacked_on_cpu(model)
    return model


def _peft(model: Any, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the model had an adapter before, which was unloaded
        return PeftModel.from_pretrained(model, str(adapter)).eval()
