"""Write docs/benchmarks.md, the figures with their baselines, from what was recorded: run this file.

README quotes some of the rows; ``tests/contract/test_figures.py`` holds it to this page.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


PAGE = Path(__file__).with_name("benchmarks.md")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
Results = dict[str, dict[str, Any]]


class Figure(NamedTuple):
    """One row: what was measured, where it was recorded, how it is written, and what was aimed at."""

    what: str
    result: str
    key: str
    written: str
    target: str = "none"


HEAD = """# Benchmarks

Made by `docs/make_benchmarks_page.py` from `benchmarks/results`; a test keeps it fresh.

Measured on a CPU with 2 cores; every ratio is against a baseline in the same run. On a GPU the code paths are the
same, but the ratios will differ: `make gpu-check` measures there. What was found of the methods themselves stands in
[what was measured of the methods](methods.md).

## Figures
"""
NOTES = """
## How to read them

* **Steps and memory**: variants take their steps in turn; read them beside the row of plain LoRA over itself. `tsq`
  pays for sensitivities of single samples; `tsq_sensitivity_over: step` does without.
* **The rows of engines** (modules at the same rank) were measured at the defaults of then:
  `igu_variant: published`, `tsq_sensitivity_over: step`. In bf16 rounding decides between components that score
  alike, and ranks differ from run to run ([footguns](footguns.md)).
* **Scoring runs the decoder without its output head**, whose logits are not needed: that is why it is no slower than
  a whole forward pass and takes less memory. Against a pass that skips the head too, the hooks themselves cost a
  fifth on this small model; the share falls as layers grow wider.
* **Scoring in whole batches** saves little where one sample alone keeps the device busy, as GSM8K's long rows do on
  this CPU.
* **Held-out loss**: WORTH_IT, each arm at its own
  best rate. Intervals, all arms and all recorded comparisons: [what we found](worth-it.md).
  [Comparing](comparing.md) tells how to ask your own data.
* **Many modules** is CPU time of one process, the base on the meta device. PEFT alone takes NAMES s to build an
  adapter of 500 targets, and time by their square beyond.

## Where each figure comes from

One file of `benchmarks/results` for each; it also names the versions and the machine. `make bench` runs most of them
on SmolLM2-135M.

| result | made by | on |
| --- | --- | --- |
"""


def page() -> str:
    """Give the page's text."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    alone = results["many_modules"]["build_by_peft_alone"]["500"]
    notes = NOTES.replace("WORTH_IT", _conditions(results[_COMPARED])).replace("NAMES", f"{alone:.1f}")
    sources = (line for name, held in results.items() for line in _sources(name, held))
    return "\n".join([HEAD, *table(results), notes.rstrip("\n"), *sources, ""])


def _sources(name: str, held: dict[str, Any]) -> Iterator[str]:
    """List the command that made a result, and those by which parts of it were made later."""
    yield f"| `{name}` | `{held['command']}` | {held['date']} |"
    for key in held:
        if key.startswith("command_of_"):
            part = key.removeprefix("command_of_")
            yield f"| of it: {part} | `{held[key]}` | {held.get(f'date_of_{part}', held['date'])} |"


def table(results: Results) -> Iterator[str]:
    """Tabulate all figures."""
    yield "| what | figure | target |"
    yield "| --- | --- | --- |"
    for figure in FIGURES:
        held = results[figure.result]
        value = _at(held, figure.key if "/" in figure.key else f"results/{figure.key}")
        what = figure.what.format(verdict=_verdict(held, figure.key))
        yield f"| {what} | {figure.written.format(value)} | {figure.target} |"
    yield "| logits, live model against the saved adapter in plain PEFT, fp32 | at most 1e-4 (tested) | 1e-4 |"


def _at(held: Any, key: str) -> Any:
    """Follow a key into a result; of a list of arms, each part names one."""
    for part in key.split("/"):
        held = next(arm for arm in held if arm["name"] == part) if isinstance(held, list) else held[part]
    return held


def _verdict(held: dict[str, Any], key: str) -> str:
    """Give the word in which a comparison judged an arm; empty for a key that leads to no difference of one."""
    of_arm, found, _ = key.partition("/difference/")
    return str(_at(held, of_arm)["verdict"]) if found else ""


def _conditions(held: dict[str, Any]) -> str:
    """Describe what the arms of a comparison had in common."""
    made = held["comparison"]
    return (
        f"SmolLM2-135M, rank {held['rank']}, {held['steps']} steps of {held['batch_size']} GSM8K rows, "
        f"{made['design']['seeds']} seeds, {made['held_out_rows']['test']} held-out rows that judge"
    )


_COMPARED = "worth_it_data_limited"
_OVER_LORA = "comparison/arms/{}/verdicts/lora/difference/relative/value"
_SCORING = "the same, over a forward pass that also skips the output head"
_ENGINES = "as in one process (`igu`, SmolLM2-135M in fp32)"
_SHUFFLED = "share_in_subsets/by loss, subset_ratio 0.7, clip_quantile"
FIGURES = (
    Figure("scoring over one forward pass of the same tokens (SmolLM2-135M, 128 GSM8K rows)",
           "calibration", "time_ratio", "{:.2f} x", "1.10 x"),
    Figure(_SCORING, "calibration", "time_ratio_without_head", "{:.2f} x"),
    Figure("peak memory of scoring over a forward pass", "calibration", "memory_ratio", "{:.2f} x", "1.05 x"),
    Figure("peak memory of scoring over a forward pass that also skips the output head",
           "calibration", "memory_ratio_without_head", "{:.2f} x"),
    Figure("Kendall's tau of scores by the paper's formula, 10 % against 100 % of the calibration set",
           "calibration", "tau", "{:.3f}", "0.98"),
    Figure("scores against a recomputation in NumPy (210 modules, 64 GSM8K rows), largest difference",
           "recomputation", "theta_largest_relative_difference", "{:.1%}", "1%"),
    Figure("Kendall's tau between scores and ranks, same run", "recomputation", "tau_theta_ranks", "{:.2f}", "0.9"),
    Figure("rank against its water-filled share, largest distance",
           "recomputation", "largest_distance_from_water_filled_share", "{:.2f} ranks", "1.5 ranks"),
    Figure("start of a run that plans in its own process, over plain LoRA's start (SmolLM2-135M, 32 GSM8K rows)",
           "planning", "start/here/seconds_over_host", "{:.2f} x"),
    Figure("what planning adds to the start beyond the pass over these rows",
           "planning", "start/here/seconds_beyond_calibration", "{:.1f} s", "3 s"),
    Figure("the same, planned in a process apart, which loads the base a second time",
           "planning", "start/own/seconds_beyond_calibration", "{:.1f} s"),
    Figure("step of `igu` over plain LoRA of its starting rank (4 x 256 tokens, rank 16)",
           "overhead", "variants/igu/time_ratio", "{:.3f} x", "1.05 x"),
    Figure("step of `adalora` over plain LoRA of its starting rank",
           "overhead", "variants/adalora/time_ratio", "{:.3f} x", "1.05 x"),
    Figure("step of `tsq` with ranks alone over plain LoRA of its largest rank (sensitivities over samples)",
           "overhead", "variants/tsq ranks alone/time_ratio", "{:.3f} x", "1.05 x"),
    Figure("step of PEFT's own AdaLoRA over plain LoRA of its starting rank",
           "overhead", "variants/peft adalora/time_ratio", "{:.3f} x"),
    Figure("step of `igu` with `integrated` and `adaptive_max_overhead: 0.2`",
           "overhead", "variants/igu integrated at most 20 %/time_ratio", "{:.3f} x", "1.2 x"),
    Figure("step of plain LoRA over itself (what noise does to these five)",
           "overhead", "variants/uniform again/time_ratio", "{:.3f} x", "1 x"),
    Figure("peak memory of `igu` over plain LoRA of its starting rank",
           "overhead", "variants/igu/memory_ratio", "{:.3f} x", "1.03 x"),
    Figure("peak memory of plain LoRA over itself (noise)",
           "overhead", "variants/uniform again/memory_ratio", "{:.3f} x", "1 x"),
    *(Figure(f"modules at the same rank under {engine} (2 processes) {_ENGINES}",
             "engines", f"runs/{engine}, 2 processes/same_rank", "{:.1%}", "97%")
      for engine in ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")),
    Figure("modules at the same rank, killed with SIGKILL and resumed (the same)",
           "engines", "runs/killed and resumed/same_rank", "{:.1%}", "100%"),
    Figure("scoring all samples over an epoch of plain LoRA (`tsq`, 256 BoolQ rows, batch 32)",
           "quality_pass", "over_epoch", "{:.2f} x", "1.25 x"),
    Figure("the same, over an epoch sorted by length", "quality_pass", "over_sorted_epoch", "{:.2f} x"),
    Figure("one backward pass per sample over scoring, the same rows and adapter",
           "quality_pass", "per_sample_over_scoring", "{:.1f} x", "3 x"),
    Figure("the same, with backward passes on plain LoRA of rank 8, which has the same norms",
           "quality_pass", "plain_per_sample_over_scoring", "{:.1f} x"),
    Figure("one backward pass per sample over scoring, long rows (64 of GSM8K, batch 4)",
           "quality_pass_gsm8k", "per_sample_over_scoring", "{:.1f} x"),
    Figure("gradient norms against one backward pass per sample, largest difference (fp32)",
           "quality_pass", "largest_norm_error", "{:.0e}", "1e-04"),
    Figure("shuffled answers by quality, against right ones (30 % of 256 GSM8K rows shuffled)",
           "planted", "order/quality/AUC", "AUC {:.2f}"),
    Figure("shuffled answers by loss, against right ones", "planted", "order/loss/AUC", "AUC {:.2f}"),
    Figure("shuffled answers in subsets, nothing clipped", "planted", f"{_SHUFFLED} 1", "{:.1%}"),
    Figure("shuffled answers in subsets, `tsq_clip_quantile: 0.9`", "planted", f"{_SHUFFLED} 0.9", "{:.1%}", "less"),
    Figure("shuffled answers in subsets, `tsq_clip_quantile: 0.8`", "planted", f"{_SHUFFLED} 0.8", "{:.1%}", "less"),
    Figure("held-out loss, `sensitivity` over plain LoRA (few rows, 80 steps, 3 seeds; {verdict})",
           _COMPARED, _OVER_LORA.format("sensitivity"), "{:+.2%}", "below 0"),
    Figure("the same, `igu` ({verdict})", _COMPARED, _OVER_LORA.format("igu"), "{:+.2%}", "below 0"),
    Figure("the same, `tsq` with ranks alone ({verdict})",
           _COMPARED, _OVER_LORA.format("tsq_ranks"), "{:+.2%}", "below 0"),
    Figure("the same, `random` ({verdict})", _COMPARED, _OVER_LORA.format("random"), "{:+.2%}"),
    Figure("log-probabilities in vLLM 0.32 against PEFT (mixed ranks 1 to 32, fp32), largest difference",
           "export_parity", "vllm_vllm", "{:.0e} nats", "1e-3 nats"),
    Figure("log-probabilities in vLLM 0.31 against PEFT (the same)",
           "export_parity", "vllm_vllm_legacy", "{:.0e} nats", "1e-3 nats"),
    Figure("peak memory of merging over the base, programs not counted",
           "export_parity", "merging_over_base", "{:.2f} x", "2 x"),
    Figure("building, checking, saving and loading an adapter of 20,000 targets (128 experts in a layer)",
           "many_modules", "seconds/20000/all", "{:.0f} s"),
    Figure("a target of these over one of 500 (1 is linear)", "many_modules", "over_linear/all", "{:.2f} x", "2 x"),
    Figure("`shrink` of an adapter of Llama-3-8B's shapes, rank 64, to a quarter, checks included",
           "shrink", "results/seconds", "{:.0f} s", "minutes"),
    Figure("its peak memory beside what is imported",
           "shrink", "results/memory_over_starting_mb", "{:.0f} MB"),
    Figure("questions per second of the harness over vLLM's own offline batch (SmolLM2-135M, CPU)",
           "eval_throughput", "throughput_ratio", "{:.2f} x", "0.9 x"),
)  # fmt: skip


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
