"""The exact state of a search beside a checkpoint's plain adapter, and the way back from it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llamafactory_adaptive.engines.distributed import wait_for_all
from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.training.checkpoint import read_state, write_state
from llamafactory_adaptive.training.masked_search import MaskedSearch
from llamafactory_adaptive.training.observer import Observer
from llamafactory_adaptive.training.run_log import RunLog


class SearchCheckpoint:
    """Writes the state of one search into checkpoints, and takes it back.

    Args:
        search: masks, factors and what was decided.
        observer: with the engine that holds the factors, and what probing cost.
        log: whose counters and seconds go on.
        holds_factors: whether checkpoints keep the factors here; DeepSpeed's own keep them, with their fp32 copies.
    """

    def __init__(self, search: MaskedSearch, observer: Observer, log: RunLog, holds_factors: bool) -> None:
        self.search, self.observer, self.log, self.holds_factors = search, observer, log, holds_factors
        self.triplets, self.method = search.triplets, search.request.method
        self.partitioned = observer.components.engine.partitioned

    def write(self, folder: Path, args: Any, state: Any) -> None:
        """Write the state, and wait until every process has."""
        document = {
            "step": state.global_step,
            "total_steps": state.max_steps,
            **self.search.state.state(),
            "masks": {
                module.name: "".join("1" if flag else "0" for flag in row)
                for module, row in zip(self.triplets.modules, self.triplets.masks, strict=True)
            },
            "counters": asdict(self.log.counters),
            "thinner": self.observer.probe_budget.state(),
            "overhead_seconds": self.log.overhead_seconds,
        }
        tensors = {f"method.{key}": value for key, value in self.method.state().items()}
        if self.holds_factors:
            tensors |= {
                f"{kind}.{module.name}": parameter.detach()
                for module in self.triplets.modules
                for kind, parameter in module.parameters().items()
            }
        write_state(folder, tensors, document, self.partitioned, args.should_save)
        wait_for_all(f"the adaptive state of {folder.name}")

    def resume(self, folder: Path, total_steps: int) -> None:
        """Go on with a run: its adapter, and its counters and seconds.

        Raises:
            PlanError: as :meth:`restore`.
        """
        document = self.restore(folder, total_steps)
        self.observer.probe_budget.load(document["thinner"])
        self.log.overhead_seconds += document["overhead_seconds"]
        for name in ("observations", "probes", "allocations", "steps"):
            setattr(self.log.counters, name, document["counters"][name])

    def restore(self, folder: Path, total_steps: int) -> Mapping[str, Any]:
        """Take back the adapter that :meth:`write` kept; returns the rest of what it wrote.

        Raises:
            PlanError: the state is missing, of other modules, or of a run of another length.
        """
        tensors, document = read_state(folder, self.partitioned)
        names = [module.name for module in self.triplets.modules]
        if list(document["masks"]) != names:
            raise PlanError(f"{folder} holds the state of other modules; use another output_dir")
        if document["total_steps"] != total_steps and not document["final"]:
            raise PlanError(
                f"{folder} belongs to a run of {document['total_steps']} steps and this one has {total_steps}: the "
                "schedule is a share of them; set max_steps or num_train_epochs back, or use another output_dir"
            )
        masks = [[flag == "1" for flag in document["masks"][name]] for name in names]
        device = self.triplets.modules[0].q.device
        method = {k.removeprefix("method."): v.to(device) for k, v in tensors.items() if k.startswith("method.")}
        self.method.load(method)
        if self.holds_factors:
            for module in self.triplets.modules:
                for kind, parameter in module.parameters().items():
                    parameter.data.copy_(tensors[f"{kind}.{module.name}"])
        self.triplets.mask(masks)
        self.search.state.load(document)
        return document
