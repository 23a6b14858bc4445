"""Arguments of ``llamafactory-adaptive export``; standard library only, so that the command line starts quickly."""

import argparse
import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from llamafactory_adaptive.errors import Problem, refuse_all
from llamafactory_adaptive.paths import path_argument


SERVERS = {
    "peft": "PEFT, LLaMA-Factory's chat and api, transformers",
    "vllm": "vLLM 0.32 or newer",
    "vllm-legacy": "vLLM 0.31 or older",
    "sglang": "SGLang",
    "llamacpp": "llama.cpp and Ollama",
    "merged": "any server, which reads the adapter merged into its base model",
}
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class ExportRequest:
    """An export as the user asked for it.

    Attributes:
        base: folder or hub name; None for the one in the adapter's config.
        dtype: type of merged weights, one of DTYPES.
        tolerance: largest difference of log-probabilities, in nats.
    """

    adapter: Path
    server: str
    out: Path
    base: str | None = None
    dtype: str = "auto"
    quantization_aware: bool = False
    double_quantization: bool = True
    tolerance: float = 1e-3
    vllm_python: Path | None = None


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the export command to a parser."""
    parser.add_argument(
        "adapter", type=path_argument, metavar="ADAPTER", help="folder of a saved LoRA adapter, e.g. saves/igu"
    )
    servers = "; ".join(f"{name}: {what}" for name, what in SERVERS.items())
    parser.add_argument(
        "--for",
        dest="server",
        choices=SERVERS,
        required=True,
        help=f"server that will read the export, e.g. vllm ({servers})",
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="new folder for the export, e.g. served/igu"
    )
    parser.add_argument(
        "--base", metavar="MODEL",
        help="folder or hub name of the base model, e.g. Qwen/Qwen3-8B (default: the name in the adapter's config)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto",
        help="data type of merged weights, e.g. bfloat16 (default: that of the base model)",
    )  # fmt: skip
    parser.add_argument(
        "--quantization-aware", action="store_true",
        help="merge into the base model as it is after NF4 quantisation, for adapters that were trained on a 4-bit "
        "base; a report compares quantisation error and update for each layer; e.g. --for merged --quantization-aware",
    )  # fmt: skip
    parser.add_argument(
        "--no-double-quantization", dest="double_quantization", action="store_false",
        help="needed where the run had double_quantization: false; e.g. --quantization-aware --no-double-quantization",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, metavar="X",
        help="largest allowed difference between the log-probabilities of PEFT and of the export, in nats, e.g. 0.01 "
        "(default: 0.001)",
    )  # fmt: skip
    parser.add_argument(
        "--vllm-python", type=path_argument, metavar="PATH",
        help="Python of an environment with vLLM, in which the export is checked as well (for vllm, vllm-legacy and "
        "merged), e.g. ~/vllm/bin/python",
    )  # fmt: skip


def export_request(arguments: argparse.Namespace) -> ExportRequest:
    """Convert parsed arguments to a checked request.

    Raises:
        AdaptiveConfigError: options do not fit together, or a value is not allowed.
    """
    request = ExportRequest(**{name: getattr(arguments, name) for name in ExportRequest.__dataclass_fields__})
    refuse_all(*_problems(request))
    return request


def out_problems(out: Path, suggestion: str) -> list[Problem]:
    """Find what is wrong with the name of an output folder, which has to be one of a new folder."""
    return [Problem("out", str(out), "it names no new folder", suggestion)] if out.name in ("", "..") else []


def _problems(request: ExportRequest) -> list[Problem]:
    problems = out_problems(request.out, f"--out served/{request.adapter.resolve().name}")
    if request.server != "merged":
        for key, given in (("dtype", request.dtype != "auto"), ("quantization_aware", request.quantization_aware)):
            if given:
                why = "only merged weights have a type and a base of their own"
                problems.append(Problem(key, getattr(request, key), why, "--for merged, or leaving it out"))
    if request.quantization_aware and find_spec("bitsandbytes") is None:
        why = "it needs the package bitsandbytes, which is not installed"
        problems.append(Problem("quantization_aware", True, why, "pip install bitsandbytes, or leaving it out"))
    if not request.double_quantization and not request.quantization_aware:
        why = "it says how the base was quantised"
        problems.append(Problem("double_quantization", False, why, "--quantization-aware with it"))
    if request.vllm_python and request.server not in ("vllm", "vllm-legacy", "merged"):
        why = f"vLLM cannot check what is laid out for {request.server}"
        problems.append(Problem("vllm_python", str(request.vllm_python), why, "leaving it out"))
    if not (math.isfinite(request.tolerance) and request.tolerance > 0):
        problems.append(Problem("tolerance", request.tolerance, "must be a positive number", "--tolerance 0.001"))
    return problems
