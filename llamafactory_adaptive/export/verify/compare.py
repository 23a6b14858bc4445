"""Comparison of two loaded models: PEFT with the original adapter, and the exported folder."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from torch import Tensor, nn

from llamafactory_adaptive.adapter.lora import keep_4bit_unpacked_on_cpu
from llamafactory_adaptive.errors import first_of
from llamafactory_adaptive.export.base_checkpoint import BaseCheckpoint
from llamafactory_adaptive.export.faults import ExportError, first_line, loading_fault
from llamafactory_adaptive.export.nf4_merging import Nf4
from llamafactory_adaptive.export.serve_command import max_lora_rank
from llamafactory_adaptive.export.source_adapter import SourceAdapter
from llamafactory_adaptive.export.verify.certificate import ROUNDING_FACTOR, Check, Comparison, update_check
from llamafactory_adaptive.export.verify.log_probabilities import largest_difference, log_probabilities
from llamafactory_adaptive.export.verify.module_updates import Update, compare_updates, updates_of_peft
from llamafactory_adaptive.export.verify.server_rules import applied, only_in, read_as
from llamafactory_adaptive.export.verify.vllm_check import ask_vllm, difference_of_first_tokens


PEFT_FP32 = "PEFT in float32"


@dataclass(frozen=True)
class Comparer:
    """Comparisons of exports of one adapter with PEFT.

    Attributes:
        rows: token ids of the fixed prompts.
        tolerance: largest difference in nats, for checks that compute the same weights in fp32.
        vllm_python: interpreter of an environment with vLLM, or None.
    """

    adapter: SourceAdapter
    base: BaseCheckpoint
    rows: list[list[int]]
    tolerance: float
    vllm_python: Path | None

    def layout(self, server: str, folder: Path) -> Comparison:
        """Check a LoRA layout by its server's rule: each module's update, then the whole model's log-probabilities."""
        live = load_peft(load(self.base.folder, self.base.widest), self.adapter)
        reference, expected = log_probabilities(live, self.rows), updates_of_peft(live)
        plain = live.unload()
        alone = log_probabilities(plain, self.rows)
        updates, exported = self._as_read(server, folder, plain)
        reader = "PEFT" if server == "peft" else f"the reading rule of {server}"
        checks = [
            update_check(compare_updates(expected, updates), reader),
            Check("parity", PEFT_FP32, reader, largest_difference(reference, exported), self.tolerance),
        ]
        if self.vllm_python:
            checks.append(self._layout_in_vllm(self.vllm_python, folder, reference, alone))
        return Comparison(tuple(checks), reference, exported, largest_difference(reference, alone))

    def _as_read(self, server: str, folder: Path, plain: Any) -> tuple[dict[str, Update], list[Tensor]]:
        """Read an exported folder's updates as its server does, and compute the base's log-probabilities with them."""
        if server == "peft":
            live = load_peft(plain, folder)
            return only_in(folder, updates_of_peft(live)), log_probabilities(live, self.rows)
        updates = read_as(server, folder)
        with applied(plain, updates):
            return updates, log_probabilities(plain, self.rows)

    def _layout_in_vllm(self, python: Path, folder: Path, reference: list[Tensor], alone: list[Tensor]) -> Check:
        rank = max_lora_rank(max(module.rank for module in self.adapter.modules))
        answer = ask_vllm(python, self.base.folder, folder, rank, self.rows)
        tolerance = self.tolerance
        if answer.dtype != "float32":
            tolerance = max(tolerance, ROUNDING_FACTOR * difference_of_first_tokens(alone, answer.plain))
        difference = difference_of_first_tokens(reference, answer.exported)
        return Check("vllm", PEFT_FP32, str(answer), difference, tolerance)

    def merged(self, folder: Path, dtype: torch.dtype, nf4: Nf4 | None) -> Comparison:
        """Check a merged model; ``nf4`` is how the base was quantised, None if the adapter is merged into it as it is.

        Raises:
            ExportError: a merged weight differs from that of PEFT's merge.
        """
        unmerged, effect = self._unmerged(nf4)
        by_peft, merge = self._merged_by_peft(folder, dtype, nf4)
        exported, rounding = self._merged_alone(folder)
        start = f"{PEFT_FP32} on the {'4-bit ' if nf4 else ''}base, not merged"
        own = "the merged weights, computed in float32"
        checks = [
            Check("weights", merge, "the merged files, bit for bit", 0.0, 0.0, "weights that differ"),
            Check("parity", merge, own, largest_difference(by_peft, exported), self.tolerance),
            Check("rounding", start, own, largest_difference(unmerged, exported), max(self.tolerance, rounding)),
        ]
        if self.vllm_python:
            answer = ask_vllm(self.vllm_python, folder, None, None, self.rows)
            difference = difference_of_first_tokens(by_peft, answer.exported)
            checks.append(Check("vllm", merge, str(answer), difference, self.tolerance))
        return Comparison(tuple(checks), unmerged, exported, effect)

    def _unmerged(self, nf4: Nf4 | None) -> tuple[list[Tensor], float]:
        """Compute PEFT's log-probabilities before merging, and how far the adapter moves them."""
        live = load_peft(load(self.base.folder, self.base.widest, nf4), self.adapter)
        reference = log_probabilities(live, self.rows)
        with live.disable_adapter():
            return reference, largest_difference(reference, log_probabilities(live, self.rows))

    def _merged_by_peft(self, folder: Path, dtype: torch.dtype, nf4: Nf4 | None) -> tuple[list[Tensor], str]:
        """Merge with PEFT and check that the files equal it; return its log-probabilities and its description.

        Raises:
            ExportError: a merged weight differs.
        """
        model = load(self.base.folder, dtype, nf4)
        if nf4:
            model = model.dequantize()
        model = load_peft(model, self.adapter).merge_and_unload()
        if unequal := self._unequal_weights(model, folder, dtype, nf4):
            raise ExportError(
                f"parity failed, nothing was written: {len(unequal)} of the merged weights are not those of PEFT's "
                f"merge: {first_of(unequal, joint=', ')}"
            )
        words = f"PEFT's merge in {str(dtype).removeprefix('torch.')} (the same weights), computed in float32"
        return log_probabilities(model, self.rows), words

    def _unequal_weights(self, model: nn.Module, folder: Path, dtype: torch.dtype, nf4: Nf4 | None) -> list[str]:
        """List the names of merged weights that differ from PEFT's or are missing.

        A weight that is neither adapted nor replaced must equal the base's own, in the type of the merge; if the base
        went through NF4, it must equal PEFT's. Tensors that are in the files but not in the model, such as buffers
        that are computed anew, must equal the base's, too.
        """
        weights, unequal, written = model.state_dict(), [], set()
        changed = {f"{module.name}.weight" for module in self.adapter.modules} | set(self.adapter.replaced)
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    written.add(name)
                    expected = weights.get(name)
                    if name in self.base.weights and name not in changed and (expected is None or not nf4):
                        expected = self.base.tensor(name)
                    if expected is None or not _same(expected, file.get_tensor(name), dtype):
                        unequal.append(name)
        return [*unequal, *sorted(self.base.weights.keys() - written)]

    def _merged_alone(self, folder: Path) -> tuple[list[Tensor], float]:
        """Compute the merged model's log-probabilities, and a bound on what rounding may have done to them."""
        model, adapted = load(folder), [module.name for module in self.adapter.modules]
        exported = log_probabilities(model, self.rows)
        return exported, ROUNDING_FACTOR * largest_difference(exported, log_probabilities(model, self.rows, adapted))


def _same(expected: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a weight equals ``expected`` bit for bit, floating-point ones in the type of the merge."""
    return torch.equal(expected.to(dtype) if expected.is_floating_point() else expected, weight) and (
        weight.dtype == (dtype if expected.is_floating_point() else expected.dtype)
    )


def load(folder: Path, dtype: torch.dtype | None = None, nf4: Nf4 | None = None) -> Any:
    """Load a causal language model on the CPU, in ``dtype`` or its config's type, or with its linear layers in NF4."""
    from transformers import AutoModelForCausalLM

    settings = {"quantization_config": nf4.loading(), "device_map": {"": "cpu"}} if nf4 else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", trust_remote_code=False, **settings
        ).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"transformers cannot load {folder} ({loading_fault(error)})") from error
    keep_4bit_unpacked_on_cpu(model)
    return model


def load_peft(model: Any, adapter: SourceAdapter | Path) -> Any:
    """Load an adapter with PEFT: an untrusted one by the checked values of its config, or an exported folder.

    Raises:
        ExportError: PEFT cannot load it.
    """
    settings = adapter.peft_settings if isinstance(adapter, SourceAdapter) else None
    folder = adapter.folder if isinstance(adapter, SourceAdapter) else adapter
    config = LoraConfig(**settings) if settings else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the model had an adapter before, which was unloaded
        try:
            return PeftModel.from_pretrained(model, str(folder), config=config).eval()
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            raise ExportError(f"parity failed: PEFT cannot load {folder} ({first_line(error)})") from error
