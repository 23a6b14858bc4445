"""The rank plan: the rank of every module, the score behind it, its cost, and the provenance of them all.

Plans are stored as JSON, never pickled. A person may edit the ranks; everything derived from them is recomputed on
load.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import PLAN_FILE, digest_of, file_digest, read_json, write_atomically
from llamafactory_adaptive.ranks.allocation import Allocation
from llamafactory_adaptive.ranks.plan_values import Values, shortened


SCHEMA_VERSION = 1
ASKED_ALPHA = "asked_lora_alpha"  # in the provenance, where a run divides lora_alpha by another rank than lora_rank

GRANULARITY = "granularity"  # in the provenance, where scores were pooled before ranks were chosen
INIT = "init"  # in the provenance, where the factors start from what was computed from data


@dataclass(frozen=True)
class ModuleShape:
    """A target module: its full name in the base model and the sizes of its frozen linear map."""

    name: str
    in_features: int
    out_features: int

    @property
    def parameters_per_rank(self) -> int:
        """Count the trainable parameters of one rank: a row of A and a column of B."""
        return self.in_features + self.out_features

    @property
    def largest_rank(self) -> int:
        """Return the largest rank the update can have: the smaller of the two sizes."""
        return min(self.in_features, self.out_features)

    def cost(self, unit: str) -> int:
        """Return the budget units that one rank costs: its parameters, or 1 when the budget counts ranks."""
        return self.parameters_per_rank if unit == "params" else 1


@dataclass(frozen=True)
class ModulePlan(ModuleShape):
    """A target module with its rank, the score behind it and the method's own figures."""

    rank: int = 0
    score: float = 0.0
    share: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Count the trainable parameters of the module's adapter."""
        return self.rank * self.parameters_per_rank


@dataclass(frozen=True)
class RankPlan:
    """Ranks for every target module of one model.

    Attributes:
        method: registered name of the method that scored.
        options: the method's options as used.
        budget_unit: ``params`` or ``ranks``.
        lora_rank: the budget, as the rank of a uniform LoRA.
        lora_alpha: alpha of that uniform LoRA; alpha/r is the same for every module.
        modules: the target modules in model order; rank 0 means that the module gets no adapter.
        provenance: base model, data, seed, package versions, digest of the request.
    """

    method: str
    options: Mapping[str, Any]
    budget_unit: str
    lora_rank: int
    lora_alpha: float
    modules: tuple[ModulePlan, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """Return the scale alpha/r, which is the same for every module."""
        return self.lora_alpha / self.lora_rank

    @property
    def active(self) -> tuple[ModulePlan, ...]:
        """Return the modules that get an adapter: those of rank 1 and more."""
        return tuple(module for module in self.modules if module.rank > 0)

    @property
    def largest_rank(self) -> int:
        """Return the largest rank in use, which is ``r`` of the saved adapter."""
        return max((module.rank for module in self.modules), default=0)

    @property
    def budget_kind(self) -> str:
        """Return what the budget counts, as in the keys of :meth:`budget`: ``parameters`` or ``ranks``."""
        return "parameters" if self.budget_unit == "params" else "ranks"

    def ranks(self) -> dict[str, int]:
        """Map the name of every module to its rank."""
        return {module.name: module.rank for module in self.modules}

    def budget(self) -> dict[str, int]:
        """Compute the budget in parameters and in ranks: what was asked for, what is used, what is left over."""
        asked_parameters = sum(self.lora_rank * module.parameters_per_rank for module in self.modules)
        used_parameters = sum(module.parameters for module in self.modules)
        asked_ranks = self.lora_rank * len(self.modules)
        used_ranks = sum(module.rank for module in self.modules)
        return {
            "asked_parameters": asked_parameters,
            "used_parameters": used_parameters,
            "left_parameters": asked_parameters - used_parameters,
            "asked_ranks": asked_ranks,
            "used_ranks": used_ranks,
            "left_ranks": asked_ranks - used_ranks,
        }

    def digest(self) -> str:
        """Compute a SHA-256 over what determines the adapter: names, shapes, ranks and scale."""
        body = [[m.name, m.in_features, m.out_features, m.rank] for m in self.modules]
        return digest_of({"modules": body, "scale": self.scale})

    def to_json(self) -> dict[str, Any]:
        """Build the JSON document that is written to disk."""
        return {
            "schema_version": SCHEMA_VERSION,
            "method": self.method,
            "options": dict(self.options),
            "lora_rank": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "budget": {"unit": self.budget_unit, **self.budget()},
            "modules": [{**asdict(module), "parameters": module.parameters} for module in self.modules],
            "provenance": dict(self.provenance),
            "digest": self.digest(),
        }

    def write(self, path: Path) -> None:
        """Write the plan atomically, over whatever is at ``path``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(self.to_json(), indent=1) + "\n")

    def save(self, path: str | Path) -> None:
        """Write the plan atomically; a different plan that is already there is kept beside it, named by its digest."""
        path = Path(path)
        keep_previous(path, self.digest())
        self.write(path)

    def differences(self, shapes: "tuple[ModuleShape, ...] | list[ModuleShape]") -> list[str]:
        """List in words where the plan does not fit a model's target modules; the list is empty if it fits."""
        mine = {module.name: (module.in_features, module.out_features) for module in self.modules}
        live = {shape.name: (shape.in_features, shape.out_features) for shape in shapes}
        return (
            [f"{name} is in the plan but no target of this model" for name in mine if name not in live]
            + [f"{name} is a target of this model but not in the plan" for name in live if name not in mine]
            + [
                f"{name} is {mine[name][0]}x{mine[name][1]} in the plan, {live[name][0]}x{live[name][1]} in the model"
                for name in mine
                if name in live and mine[name] != live[name]
            ]
            + [
                f"{m.name} has rank {m.rank}, more than its smaller side {m.largest_rank}"
                for m in self.modules
                if m.rank > m.largest_rank
            ]
        )


def plan_from_allocation(
    shapes: "list[ModuleShape]",
    scores: Mapping[str, float],
    metrics: Mapping[str, Mapping[str, float]],
    allocation: Allocation,
    **header: Any,
) -> RankPlan:
    """Build a plan from a method's scores and their allocation; ``header`` holds the other fields of RankPlan."""
    total = sum(scores.values()) or 1.0
    modules = tuple(
        ModulePlan(
            name=shape.name,
            in_features=shape.in_features,
            out_features=shape.out_features,
            rank=rank,
            score=scores[shape.name],
            share=scores[shape.name] / total,
            metrics={column: values[shape.name] for column, values in metrics.items()},
        )
        for shape, rank in zip(shapes, allocation.ranks, strict=True)
    )
    return RankPlan(modules=modules, **header)


def sufficient_rank(plan: RankPlan) -> int:
    """Compute the smallest ``lora_rank`` whose budget pays for the ranks of a plan."""
    budget = plan.budget()
    used, asked = budget[f"used_{plan.budget_kind}"], budget[f"asked_{plan.budget_kind}"]
    return -(-used * plan.lora_rank // asked)


def load_plan(path: Path) -> RankPlan:
    """Read and validate a plan.

    Raises:
        PlanError: the file is missing, is not JSON, has another schema version, or an entry of it is wrong.
    """
    return parse_plan(read_json(path, f"the plan {path}"), str(path))


def recorded_provenance(folder: Path) -> dict[str, Any]:
    """Read the provenance in the plan beside an adapter; return nothing where there is no plan of this version."""
    try:
        return dict(load_plan(folder / PLAN_FILE).provenance)
    except PlanError:
        return {}


def parse_plan(document: Any, source: str) -> RankPlan:
    """Convert a plan document to a RankPlan; ``source`` names the document in error messages."""
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        schema = document.get("schema_version") if isinstance(document, dict) else None
        raise PlanError(f"{source} has plan schema {shortened(schema)}; this version reads schema {SCHEMA_VERSION}")
    values = Values(document, source)
    modules = tuple(_parse_module(entry, source) for entry in values.sequence("modules"))
    plan = RankPlan(
        method=values.method("method"),
        options=values.mapping("options"),
        budget_unit=values.part("budget").unit("unit"),
        lora_rank=values.integer("lora_rank", 1),
        lora_alpha=values.positive("lora_alpha"),
        modules=modules,
        provenance=_provenance(values),
    )
    names = [module.name for module in modules]
    if len(set(names)) != len(names):
        raise PlanError(f"{source} lists {Counter(names).most_common(1)[0][0]} twice")
    if not plan.active:
        raise PlanError(f"{source} gives every module rank 0: there is nothing to train")
    return plan


def _provenance(values: Values) -> dict[str, Any]:
    """Read the provenance of a plan, and check that the parts a resumed run is compared with are mappings."""
    provenance = values.mapping("provenance")
    parts = Values(provenance, f"{values.where}: provenance")
    for key in ("bounds", "calibration", "course", "sampling", "second_stage", INIT):
        if provenance.get(key) is not None:
            parts.mapping(key)
    if ASKED_ALPHA in provenance:
        parts.positive(ASKED_ALPHA)
    return provenance


def _parse_module(entry: Any, source: str) -> ModulePlan:
    name = Values(entry, f"{source}: an entry of modules").module_name("name")
    values = Values(entry, f"{source}: {name}")
    return ModulePlan(
        name=name,
        in_features=values.integer("in_features", 1),
        out_features=values.integer("out_features", 1),
        rank=values.integer("rank", 0),
        score=values.number("score", 0.0),
        share=values.number("share", 0.0),
        metrics=values.numbers("metrics"),
    )


def keep_previous(path: Path, new_digest: str) -> None:
    """Rename a different plan at ``path`` to a name with its digest, so that it is not overwritten."""
    if not path.exists():
        return
    try:
        old_digest = load_plan(path).digest()
    except PlanError:
        old_digest = "unreadable-" + file_digest(path)
    if old_digest != new_digest:
        path.rename(path.with_name(f"{path.stem}.{old_digest[:12]}{path.suffix}"))
