"""What adapters of many modules cost to build, check, save and load: seconds of CPU time by the number of targets.

Run: ``python benchmarks/many_modules.py [--targets 500,1000,2000,5000,20000] [--plain 500,1000]``.

The base is a mixture of experts on the meta device, 128 experts in a layer, each with three target modules, so that
only names and the factors of the adapter cost anything. ``over_linear`` is the time of the most targets over that of
the fewest, divided by the ratio of their numbers: 1.0 is linear, and from 500 to 20,000 targets 40 is quadratic.
Between neighbouring numbers the noise of one measurement would decide. ``plain`` is PEFT alone on the same
configuration, which is quadratic.
"""

import argparse
import gc
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import record
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from torch import nn

from llamafactory_adaptive import attach_adapter
from llamafactory_adaptive.adapter.lora import lora_config_arguments
from llamafactory_adaptive.adapter.name_lookup import look_names_up_once
from llamafactory_adaptive.adapter.verify import check_live, check_saved
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan, load_plan


EXPERTS, WIDTH = 128, 16
KINDS = ("gate_proj", "up_proj", "down_proj")
MOST_OVER_LINEAR = 2.0  # caches hold less of what is larger, and names grow longer; twice is no other power


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in KINDS)


class Model(nn.Module):
    def __init__(self, targets: int) -> None:
        super().__init__()
        experts = -(-targets // len(KINDS))
        counts = [min(EXPERTS, experts - start) for start in range(0, experts, EXPERTS)]
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"experts": nn.ModuleList(Expert() for _ in range(count)), "router": nn.Linear(WIDTH, count)}
            )
            for count in counts
        )


def base(targets: int) -> nn.Module:
    with torch.device("meta"):
        return Model(targets)


def plan_of(model: nn.Module) -> RankPlan:
    """Ranks 1 to 8, and none for one module of 50."""
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in KINDS]
    modules = (ModulePlan(name, WIDTH, WIDTH, rank=0 if index % 50 == 7 else 1 + index % 8)
               for index, name in enumerate(names))  # fmt: skip
    return RankPlan("random", {}, "params", 4, 8.0, tuple(modules))


def timed(seconds: dict[str, float], name: str, action: Callable[[], Any]) -> Any:
    gc.collect()
    started = time.process_time()
    result = action()
    seconds[name] = time.process_time() - started
    return result


def measured(targets: int) -> dict[str, float]:
    """Seconds of every part."""
    seconds: dict[str, float] = {}
    model, again = base(targets), base(targets)
    plan = plan_of(model)
    look_names_up_once()
    adapted = timed(seconds, "build", lambda: attach_adapter(model, plan, "FEATURE_EXTRACTION"))
    timed(seconds, "check", lambda: check_live(adapted, plan))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        to_host(adapted)
        timed(seconds, "save", lambda: adapted.save_pretrained(folder))
        timed(seconds, "check what is saved", lambda: check_saved(folder, plan))
        timed(seconds, "load", lambda: PeftModel.from_pretrained(again, folder))
        plan.save(folder / "plan.json")
        assert timed(seconds, "read the plan", lambda: load_plan(folder / "plan.json")) == plan
    return {**seconds, "all": sum(seconds.values())}


def to_host(model: nn.Module) -> None:
    """Give factors that PEFT left on the meta device their values."""
    for module in model.modules():
        for name in ("lora_A", "lora_B"):
            for factor in getattr(module, name, {}).values():
                if factor.weight.is_meta:
                    factor.weight = nn.Parameter(torch.zeros(factor.weight.shape))


def plain(targets: int) -> float:
    """Seconds of PEFT alone to build the adapter."""
    model, seconds = base(targets), dict[str, float]()
    config = LoraConfig(**lora_config_arguments(plan_of(model)))
    LoraModel.inject_adapter = getattr(LoraModel.inject_adapter, "__wrapped__", LoraModel.inject_adapter)
    timed(seconds, "build", lambda: get_peft_model(model, config))
    return seconds["build"]


def over_linear(rows: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Time of the most targets over that of the fewest, in units of the ratio of their numbers, by part."""
    few, many = min(rows), max(rows)
    return {part: seconds / max(rows[few][part], 1e-3) * few / many for part, seconds in rows[many].items()}


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", type=numbers, default=[500, 1000, 2000, 5000, 20000])
    parser.add_argument("--plain", type=numbers, default=[500, 1000], help="numbers of targets for PEFT alone")
    options = parser.parse_args()
    # What is loaded into shapes alone is not kept, which torch tells of at every tensor.
    warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
    alone = {count: plain(count) for count in options.plain}
    rows: dict[int, dict[str, float]] = {}
    measured(64)  # what is done once in a process
    for count in options.targets:
        rows[count] = measured(count)
        print(count, {part: round(value, 2) for part, value in rows[count].items()}, flush=True)
        path = record.write_result("many_modules", {
            "seconds": {str(count): row for count, row in rows.items()}, "over_linear": over_linear(rows),
            "build_by_peft_alone": {str(count): value for count, value in alone.items()},
            "most_over_linear": MOST_OVER_LINEAR,
        })  # fmt: skip
    for part, value in over_linear(rows).items():
        print(f"{part}: {'linear' if value <= MOST_OVER_LINEAR else 'NOT LINEAR'} ({value:.2f})")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
