"""The main job on an embedded default: what ``make demo`` runs, step by step, with the commands a user would type.

Run: ``python run.py [--out demo_output]``. Builds SmolLM2-135M, generates word problems, trains a 4-bit adapter with
adaptive ranks through ``llamafactory-cli train``, merges it into the 16-bit base with the plugin switched off, and
asks the merged model a held-out question.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import smollm2
import word_problems

from llamafactory_adaptive.files import PLAN_FILE
from llamafactory_adaptive.ranks.plan import load_plan
from llamafactory_adaptive.reports.plots import HEATMAP_FILE
from llamafactory_adaptive.reports.tables import rank_table


EXAMPLES = Path(__file__).resolve().parents[1]


def command(name: str, *words: str, **environment: str) -> None:
    """Run one of the environment's commands, shown as typed; stop with its exit code if it fails."""
    print("\n$ " + " ".join([*(f"{k}={v}" for k, v in environment.items()), name, *words]), flush=True)
    program = Path(sys.executable).with_name(name)
    code = subprocess.run([str(program), *words], env={**os.environ, **environment}, check=False).returncode
    if code != 0:
        raise SystemExit(code)


def fast_in_bf16() -> bool:
    """Tell whether this machine multiplies in bf16 itself: emulated, as on CPUs with AVX2 alone, it takes hours."""
    import torch

    if torch.cuda.is_available():
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def held_out_losses(adapter: Path) -> tuple[float, float]:
    """First and last evaluation loss of the run."""
    state = json.loads((adapter / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    return losses[0], losses[-1]


def answer(model_folder: Path, question: str, bf16: bool) -> str:
    """Greedy answer of a merged model to one question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16 if bf16 else torch.float32)
    messages = [
        {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face."},
        {"role": "user", "content": question},
    ]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=96, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(output[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def main(out: Path) -> None:
    """Run every step and say where everything lies."""
    started = time.perf_counter()
    model = smollm2.build(smollm2.CACHE / "SmolLM2-135M-Instruct")
    data, adapter, merged = out / "data", out / "adapter", out / "merged"
    word_problems.write(data, train=320, held_out=48, seed=7)
    bf16 = fast_in_bf16()
    where = [f"model_name_or_path={model if bf16 else smollm2.in_fp32(model, out / model.name)}"]
    command(
        "llamafactory-cli",
        "train",
        str(EXAMPLES / "train_adaptive" / "smollm2_adaptive_sft_demo.yaml"),
        *where,
        f"dataset_dir={data}",
        f"output_dir={adapter}",
        *([] if bf16 else ["bf16=false"]),
    )
    command(
        "llamafactory-cli",
        "export",
        str(EXAMPLES / "merge_adaptive" / "smollm2_adaptive_sft_demo.yaml"),
        *where,
        f"adapter_name_or_path={adapter}",
        f"export_dir={merged}",
        LLAMAFACTORY_ADAPTIVE="0",
    )

    row = json.loads((data / "word_problems_held_out.jsonl").read_text(encoding="utf-8").splitlines()[0])
    before, after = held_out_losses(adapter)
    print("\n" + rank_table(load_plan(adapter / PLAN_FILE)))
    print(f"\nheld-out loss   {before:.3f} before training, {after:.3f} after")
    print(f"\nquestion        {row['instruction']}")
    print("merged model    " + answer(merged, row["instruction"], bf16).replace("\n", "\n                "))
    print("expected        " + row["output"].replace("\n", "\n                "))
    print(f"\nadapter         {adapter}  (plain PEFT LoRA, plan and log beside it)")
    print(f"heat-map        {adapter / HEATMAP_FILE}")
    print(f"merged model    {merged}  ({16 if bf16 else 32}-bit, needs no plugin)")
    print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    main(parser.parse_args().out)
