"""Every export layout of a mixed-rank SmolLM2-135M adapter: what PEFT, the layout and real servers answer.

Run: ``python benchmarks/export_parity.py [--vllm-python PATH] [--vllm-legacy-python PATH]``.

Two random adapters of ranks 1 to 32: one as this package saves them (alpha/r the same everywhere), one with an
alpha of its own in every module, as other programs may write it. The first goes through ``llamafactory-adaptive
export`` for every server, the second where that rewrites it, with the check in vLLM where its Python is given: 0.32
or newer for ``vllm`` and ``merged``, 0.31 or older for ``vllm-legacy``. SGLang and llama.cpp are checked by their
documented reading rules only. Then the peak memory of ``merged`` is set against the size of a base of 1.1 GB in four
shards. Targets: differences in vLLM below 1e-3 nats in fp32; peak memory below two copies.

``--faults`` plants faults in the files of single modules instead, in each layout, and writes ``export_faults.json``;
target: each of them found.
"""

import argparse
import json
import random
import shutil
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
    job = exporter.prepare(ExportRequest(Path(sys.argv[2]), "merged", out))
    if sys.argv[1] == "merge":
        out.mkdir()
        exporter.write(job, out)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(status["VmHWM"].split()[0])
sys.exit(code)
"""


def make_adapter(base: Path, folder: Path, own_alphas: bool) -> Path:
    """Random factors of ranks 1 to 32; one module in twenty has none."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from llamafactory_adaptive.adapter.lora import contract_arguments

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


# A weak update of 1 % more may round to the same weight in 16 bits, and then there is no fault in the files.
DTYPE_OF = {"merged": "float32"}
FAULTS = ("one_per_cent", "negated", "dropped", "half_dropped", "transposed", "swapped")


def weakened(adapter: Path, folder: Path, strength: float) -> Path:
    """A copy of an adapter whose updates are ``strength`` times as strong."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, folder)
    path = folder / "adapter_model.safetensors"
    factors = load_file(path)
    save_file({k: t * strength if "lora_B" in k else t for k, t in factors.items()}, path, metadata={"format": "pt"})
    return folder


def planted(adapter: Path, base: Path, server: str, scratch: Path) -> dict[str, str]:
    """For each fault in one module's files, what the certificate says; an empty text if it passed."""
    from llamafactory_adaptive.export import exporter
    from llamafactory_adaptive.export.faults import ExportError
    from llamafactory_adaptive.export.request import ExportRequest
    from tests.helpers.planting import planter

    job = exporter.prepare(ExportRequest(adapter, server, scratch / "never", dtype=DTYPE_OF.get(server, "auto")))
    good = scratch / f"{adapter.name}-{server}-good"
    good.mkdir()
    exporter.write(job, good)
    square = [m.name for m in job.adapter.modules if m.in_features == m.out_features]
    rank = {m.name: m.rank for m in job.adapter.modules}
    module, other = next((a, b) for a in square for b in square if a != b and rank[a] == rank[b])
    said = {}
    for fault in FAULTS:
        bad = scratch / "bad"
        shutil.copytree(good, bad)
        plant = planter(server, bad, base, module)
        plant.swapped(other) if fault == "swapped" else getattr(plant, fault)()
        try:
            exporter.certify(job, bad)
            said[fault] = ""
        except ExportError as error:
            said[fault] = str(error).splitlines()[-1].strip().replace(str(scratch), "")
        shutil.rmtree(bad)
        print(f"{server:<12} {fault:<13} {said[fault] or 'NOT FOUND'}", flush=True)
    shutil.rmtree(good)
    return said


def faults(base: Path, scratch: Path) -> dict[str, Any]:
    """Every fault in every layout, with the adapter as it is and a thousand times weaker."""
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.helpers
    strong = make_adapter(base, scratch / "strong", own_alphas=False)
    by_strength = {}
    for strength in (1.0, 1e-3):
        adapter = strong if strength == 1.0 else weakened(strong, scratch / "weak", strength)
        by_strength[f"{strength:g}"] = {server: planted(adapter, base, server, scratch) for server in SERVERS}
    messages = [text for layouts in by_strength.values() for said in layouts.values() for text in said.values()]
    return {"planted": by_strength, "results": {"planted": len(messages), "planted_found": sum(map(bool, messages))}}


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
    parser.add_argument("--faults", action="store_true", help="plant faults in single modules instead")
    arguments = parser.parse_args()
    if arguments.faults:
        with tempfile.TemporaryDirectory() as place:
            figures = faults(record.smollm2(), Path(place))
        print(f"written to {record.write_result('export_faults', figures)}")
        return
    pythons = {
        "vllm": arguments.vllm_python, "merged": arguments.vllm_python, "vllm-legacy": arguments.vllm_legacy_python
    }  # fmt: skip
    base = record.smollm2()
    figures = {"adapters": {}}
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
        figures["memory"] = memory(base, scratch)
        print(json.dumps(figures["memory"], indent=2))
    figures["results"] = summary(figures)
    print(f"written to {record.write_result('export_parity', figures)}")


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """The largest differences by kind of check, and what merging takes."""
    largest: dict[str, float] = {}
    for exports in figures["adapters"].values():
        for server, entry in exports.items():
            for check in entry["checks"]:
                key = f"{check['name']}_{server.replace('-', '_')}"
                largest[key] = max(largest.get(key, 0.0), check["max_difference"])
    return {
        **largest,
        "merging_over_base": figures["memory"]["merging_over_base"],
        "with_certificate_over_base": figures["memory"]["with_certificate_over_base"],
    }


if __name__ == "__main__":
    main()
