"""Script for an environment with vLLM and without this package: ``python vllm_probe.py JOB ANSWER``.

JOB is a JSON file with model, adapter (or null), max_lora_rank, rows of token ids and top_k. The script writes to
ANSWER, for each row, log-probabilities of the first generated token's most likely candidates: with the adapter, and
without.

Standard input is a pipe whose other end the caller holds. When it closes, however the caller ended, the probe kills
its process group, of which it must be the leader.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def first_token(llm: Any, job: dict[str, Any], lora: Any) -> list[dict[str, float]]:
    """Generate one token per row and return its candidates: for each row, token id to log-probability."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=job["top_k"])
    prompts = [{"prompt_token_ids": row} for row in job["rows"]]
    outputs = llm.generate(prompts, sampling, lora_request=lora, use_tqdm=False)
    return [
        {str(token): entry.logprob for token, entry in output.outputs[0].logprobs[0].items()} for output in outputs
    ]


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Load the model once and generate the first token of each row, with the adapter and without."""
    import vllm
    from vllm import LLM
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    # The GPU kernels for LoRA take 16-bit inputs only.
    dtype = "float32" if on_cpu or not job["adapter"] else "bfloat16"
    adapter = {"enable_lora": True, "max_lora_rank": job["max_lora_rank"]} if job["adapter"] else {}
    llm = LLM(
        model=job["model"], dtype=dtype, enforce_eager=True, seed=0, enable_prefix_caching=False,
        max_model_len=2 * max(map(len, job["rows"])), **adapter,
    )  # fmt: skip
    request = LoRARequest("export", 1, job["adapter"]) if job["adapter"] else None
    plain = first_token(llm, job, None)
    return {
        "version": vllm.__version__,
        "device": "cpu" if on_cpu else current_platform.get_device_name(),
        "dtype": dtype,
        "plain": plain,
        "exported": first_token(llm, job, request) if request else plain,
    }


def end_with_caller() -> None:
    """Wait until standard input closes, then kill the process group."""
    while os.read(0, 4096):
        pass
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=end_with_caller, daemon=True).start()
    answer = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
