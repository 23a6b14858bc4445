"""The parity certificate: what was compared, the differences, the tolerances, and the files and versions used.

The reference is always PEFT with the original adapter. There are five kinds of checks:

modules    LoRA layouts only: the update of every single module, scale * B A, as the server reads the exported files,
           against the one PEFT computes with. It is relative to the module's own size, so that neither a weak adapter
           nor the number of modules hides a fault.
weights    merged models only: every weight against PEFT's merge, bit for bit.
parity     the exported files, read as the server reads them, against PEFT in fp32. For a merged model PEFT merges too,
           in the same type, and both merged models compute in fp32.
rounding   merged models only: against PEFT before merging. A 16-bit weight cannot hold base plus update exactly. What
           that may cost is measured each time: log-probabilities of the merged model are taken again with random
           parts of the last place added to the adapted weights, and the merge may differ by ROUNDING_FACTOR times as
           much.
vllm       the same comparison in a real vLLM, when its Python is given: the first generated token of each prompt. On
           GPUs vLLM's LoRA kernels take 16 bits only; there the distance of the base alone, times ROUNDING_FACTOR, is
           allowed.

The certificate also holds how much the adapter changes at all (``adapter_effect``): a check of log-probabilities only
detects what is larger than its tolerance.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llamafactory_adaptive.export.verify.log_probabilities import PROMPTS, TOP_K
from llamafactory_adaptive.export.verify.module_updates import TOLERANCE as TOLERANCE_OF_UPDATES
from llamafactory_adaptive.export.verify.module_updates import UpdateComparison
from llamafactory_adaptive.files import CERTIFICATE_FILE, LOCK_FILE, file_digest
from llamafactory_adaptive.versions import installed_versions


SCHEMA_VERSION = 1
TOLERANCE = 1e-3  # nats; fp32 on two programs differs by some 1e-5 on small models
ROUNDING_FACTOR = 3.0
PACKAGES = ("llamafactory-adaptive", "torch", "transformers", "peft", "safetensors", "bitsandbytes")


@dataclass(frozen=True)
class Check:
    """Result of one comparison with its tolerance.

    Attributes:
        unit: unit of difference and tolerance; nats are of natural log-probabilities of the reference's top-k tokens.
        worst: the module with the largest difference, where the comparison is by module.
    """

    name: str
    reference: str
    exported: str
    max_difference: float
    tolerance: float
    unit: str = "nats"
    worst: str | None = None

    @property
    def passed(self) -> bool:
        """Tell whether the difference is within the tolerance; it is not if it is NaN or the tolerance is infinite."""
        return self.max_difference <= self.tolerance < math.inf

    def __str__(self) -> str:
        state = "passed" if self.passed else "FAILED"
        return (
            f"{self.name:<9} {state}  largest difference {self.max_difference:.2e} (tolerance {self.tolerance:.2e}): "
            f"{self.exported} against {self.reference}" + (f", worst in {self.worst}" if self.worst else "")
        )


def update_check(comparison: UpdateComparison, reader: str) -> Check:
    """Convert a comparison by module to a check; ``reader`` names what read the exported files."""
    words = f"the update of each of {comparison.compared} modules in PEFT"
    return Check("modules", words, reader, comparison.difference, TOLERANCE_OF_UPDATES, "relative", comparison.worst)


@dataclass(frozen=True)
class Comparison:
    """The checks of one export.

    Attributes:
        reference: log-probabilities of PEFT with the original adapter, not merged.
        exported: log-probabilities of the export.
        adapter_effect: largest difference that the adapter makes, against the base alone.
    """

    checks: tuple[Check, ...]
    reference: list[Tensor]
    exported: list[Tensor]
    adapter_effect: float

    @property
    def passed(self) -> bool:
        """Tell whether every check passed."""
        return all(check.passed for check in self.checks)

    def warnings(self) -> list[str]:
        """Return a warning if the adapter changes too little for a check of log-probabilities to show anything."""
        loosest = max((check for check in self.checks if check.unit == "nats"), key=lambda check: check.tolerance)
        if self.adapter_effect > loosest.tolerance:
            return []
        return [
            f"warning: the adapter moves log-probabilities by {self.adapter_effect:.2e} at most, less than the "
            f"tolerance of {loosest.name} ({loosest.tolerance:.2e}): that check says nothing about it"
        ]


def certificate(
    comparison: Comparison, rows: list[list[int]], folder: Path, adapter: Path, **facts: Any
) -> dict[str, Any]:
    """Build the certificate's document; ``facts`` are entries of the export itself (server, base, ranks)."""
    return {
        "schema_version": SCHEMA_VERSION,
        "passed": comparison.passed,
        **facts,
        "date": time.strftime("%Y-%m-%d"),
        "unit": "nats (differences of natural log-probabilities), where a check has no other",
        "top_k": TOP_K,
        "places": sum(map(len, rows)),
        "adapter_effect": comparison.adapter_effect,
        "checks": [{**asdict(check), "passed": check.passed} for check in comparison.checks],
        "prompts": _last_places(comparison, rows),
        "versions": installed_versions(PACKAGES),
        "adapter_files": digests(adapter, adapter.glob("adapter_*")),
        "export_files": digests(folder, folder.rglob("*")),
    }


def _last_places(comparison: Comparison, rows: list[list[int]]) -> list[dict[str, Any]]:
    """List each prompt with the next token's most likely candidates, by PEFT and by the export."""
    entries = []
    for text, row, reference, exported in zip(PROMPTS, rows, comparison.reference, comparison.exported, strict=True):
        best = reference[-1].topk(min(TOP_K, reference.shape[-1])).indices
        columns = {"tokens": best, "peft": reference[-1][best], "exported": exported[-1][best]}
        entries.append(
            {"text": text, "token_ids": row, "next": {key: value.tolist() for key, value in columns.items()}}
        )
    return entries


def digests(folder: Path, paths: Any) -> dict[str, str]:
    """Compute the SHA-256 of files, by their name inside ``folder``."""
    files = (path for path in sorted(paths) if path.is_file() and path.name != LOCK_FILE)
    return {str(path.relative_to(folder)): file_digest(path) for path in files}


def write_certificate(document: dict[str, Any], folder: Path, name: str = CERTIFICATE_FILE) -> None:
    """Write the certificate beside the files that it is about; its digests do not include it."""
    (folder / name).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def failures(checks: Sequence[Check]) -> str:
    """Format the failed checks, a line each."""
    return "\n  ".join(str(check) for check in checks if not check.passed)
