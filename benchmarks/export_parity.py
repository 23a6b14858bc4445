"""Every export layout of a mixed-rank SmolLM2-135M adapter: what PEFT, the layout and real servers answer.

Run: ``python benchmarks/export_parity.py [--vllm-python PATH] [--vllm-legacy-python PATH]``.

Two random adapters of ranks 1 to 32: one as this package saves them (alpha/r the same everywhere), one with an
alpha of its own in every module, as other programs may write it. The first goes through ``llamafactory-adaptive
export`` for every server, the second where that rewrites it, with the check in vLLM where its Python is given: 0.32
or newer for ``vllm`` and ``merged``, 0.31 or older for ``vllm-legacy``. SGLang and llama.cpp are checked by their
documented reading rules only. Then a scale that is 2 % off is planted in each layout, and the peak memory of
``merged`` is set against the size of a base of 1.1 GB in four shards. Targets: differences in vLLM below 1e-3 nats
in fp32; each planted fault found; peak memory below two copies.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record


SERVERS = ("peft", "vllm", "vllm-legacy", "sglang", "llamacpp", "merged")
REWRITTEN = ("vllm", "vllm-legacy", "sglang", "llamacpp")  # where an alpha per module is multiplied into B
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# Runs the command line, or only its parts that prepare and merge, and prints the process's peak memory in KiB.
PEAK = """
import sys
from pathlib import Path
from llamafactory_adaptive import cli
from llamafactory_adaptive.export import run
from llamafactory_adaptive.export.command import ExportRequest
if sys.argv[1] == "export":
    code = cli.main(sys.argv[1:])
else:
    code, out = 0, Path(sys.argv[3])
    job = run.prepare(ExportRequest(Path(sys.argv[2]), "merged", out))
    if sys.argv[1] == "merge":
        out.mkdir()
        run.write(job, out)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(status["VmHWM"].split()[0])
sys.exit(code)
"""


def make_adapter(base: Path, folder: Path, own_alphas: bool) -> Path:
    """Random factors of ranks 1 to 32; one module in twenty has none."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from llamafactory_adaptive.adapter import contract_arguments

    model, draw = AutoModelForCausalLM.from_pretrained(base, dtype="auto"), random.Random(7)
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in TARGETS]
    settings = contract_arguments({name: draw.randint(1, 32) for name in names if draw.random() > 0.05}, 2.0)
    if own_alphas:
        settings["alpha_pattern"] = {name: draw.randint(1, 64) for name in settings["rank_pattern"]}
    live = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(7)
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.004)
    live.save_pretrained(folder)
    return folder


def measured(words: list[str]) -> tuple[float, int]:
    """Run ``python words``; seconds, and its peak memory in bytes.

    The program tells its own peak: what the system keeps for a finished child begins with its parent's.
    """
    started = time.perf_counter()
    answer = subprocess.run([sys.executable, "-c", PEAK, *words], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{answer.stderr[-2000:]}")
    return time.perf_counter() - started, int(answer.stdout.split()[-1]) * 1024


def export(adapter: Path, server: str, out: Path, python: str | None, *more: str) -> dict[str, Any]:
    """One export by its command; the certificate's checks and what they cost."""
    vllm = ["--vllm-python", python] if python else []
    seconds, _ = measured(["export", str(adapter), "--for", server, "--out", str(out), *vllm, *more])
    certificate = json.loads((out / "parity_certificate.json").read_text())
    for check in certificate["checks"]:
        print(
            f"{server:<12} {check['name']:<9} {check['max_difference']:.2e} (tolerance {check['tolerance']:.2e})",
            flush=True,
        )
    return {
        "checks": certificate["checks"], "adapter_effect": certificate["adapter_effect"], "seconds": round(seconds, 1)
    }  # fmt: skip


def planted(adapter: Path, server: str, scratch: Path) -> str:
    """The message of an export whose layout is tampered with by 2 %; an empty text if it passed."""
    from llamafactory_adaptive.adapter import ADAPTER_CONFIG
    from llamafactory_adaptive.export import merging, run
    from llamafactory_adaptive.export.command import ExportRequest
    from llamafactory_adaptive.export.faults import ExportError

    job, folder, honest = (
        run.prepare(ExportRequest(adapter, server, scratch / "never")),
        scratch / server,
        merging.update,
    )
    folder.mkdir()
    merging.update = lambda *arguments: honest(*arguments) * 1.02
    run.write(job, folder)
    merging.update = honest
    if server != "merged":
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        config["lora_alpha"] *= 1.02
        config["alpha_pattern"] = {name: alpha * 1.02 for name, alpha in config["alpha_pattern"].items()}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    try:
        run.certify(job, folder)
    except ExportError as error:
        return str(error).splitlines()[1].strip()
    return ""


def make_wide_base(tokenizer: Path, folder: Path) -> Path:
    """A random Llama of 0.6 billion parameters in bf16, four shards."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=49152, tie_word_embeddings=False, max_position_embeddings=512,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="320MB")
    torch.set_default_dtype(torch.float32)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def memory(smollm2: Path, scratch: Path) -> dict[str, Any]:
    """Peak memory of merging, and of the whole command, over the size of the base's weights."""
    base = make_wide_base(smollm2, scratch / "wide")
    adapter = make_adapter(base, scratch / "wide_adapter", own_alphas=False)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    _, idle = measured(["prepare", str(adapter), str(scratch / "idle")])
    seconds, merging = measured(["merge", str(adapter), str(scratch / "merging")])
    whole_seconds, whole = measured(["export", str(adapter), "--for", "merged", "--out", str(scratch / "big")])
    return {
        "base_bytes": size,
        "shards": len(list(base.glob("*.safetensors"))),
        "programs_alone_bytes": idle,
        "merging_bytes": merging,
        "merging_over_base": (merging - idle) / size,
        "merging_seconds": round(seconds, 1),
        "with_certificate_bytes": whole,
        "with_certificate_over_base": (whole - idle) / size,
        "with_certificate_seconds": round(whole_seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", help="python of an environment with vLLM 0.32 or newer")
    parser.add_argument("--vllm-legacy-python", help="python of an environment with vLLM 0.31 or older")
    arguments = parser.parse_args()
    pythons = {
        "vllm": arguments.vllm_python, "merged": arguments.vllm_python, "vllm-legacy": arguments.vllm_legacy_python
    }  # fmt: skip
    base = record.smollm2()
    figures: dict[str, Any] = {"adapters": {}, "planted_wrong_scale": {}}
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        for name, own_alphas, servers in (("one scale", False, SERVERS), ("an alpha per module", True, REWRITTEN)):
            adapter = make_adapter(base, scratch / name.replace(" ", "_"), own_alphas)
            figures["adapters"][name] = {
                server: export(adapter, server, scratch / f"{adapter.name}-{server}", pythons.get(server))
                for server in servers
            }
        adapter = scratch / "one_scale"
        quantised = export(adapter, "merged", scratch / "nf4", None, "--quantization-aware")
        report = json.loads((scratch / "nf4" / "quantization_report.json").read_text())
        figures["quantization_aware"] = {**quantised, "median_ratio": report["median"]}
        for server in SERVERS:
            figures["planted_wrong_scale"][server] = planted(adapter, server, scratch)
            print(f"planted, {server}: {figures['planted_wrong_scale'][server] or 'NOT FOUND'}")
        figures["memory"] = memory(base, scratch)
        print(json.dumps(figures["memory"], indent=2))
    figures["results"] = summary(figures)
    print(f"written to {record.write_result('export_parity', figures)}")


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """The largest differences by kind of check, and whether every planted fault was found."""
    found: dict[str, float] = {}
    for exports in figures["adapters"].values():
        for server, entry in exports.items():
            for check in entry["checks"]:
                key = f"{check['name']}_{server.replace('-', '_')}"
                found[key] = max(found.get(key, 0.0), check["max_difference"])
    return {
        **found,
        "planted_found": sum(bool(message) for message in figures["planted_wrong_scale"].values()),
        "planted": len(figures["planted_wrong_scale"]),
        "merging_over_base": figures["memory"]["merging_over_base"],
        "with_certificate_over_base": figures["memory"]["with_certificate_over_base"],
    }


if __name__ == "__main__":
    main()
