"""The exact state of a search in a checkpoint, beside the plain adapter: how it is written and restored."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamafactory_adaptive.engines.distributed import from_main, gather, gather_facts
from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.training.checkpoint import read_state, write_state
from llamafactory_adaptive.training.masked_search import MaskedSearch
from llamafactory_adaptive.training.observer import Observer
from llamafactory_adaptive.training.run_log import RunLog
from llamafactory_adaptive.training.whole_state import component_state, owned_state, whole_state


_RESUMED_COUNTERS = ("observations", "probes", "allocations", "steps")


class SearchCheckpoint:
    """Reader and writer of one search's state in checkpoints.

    Args:
        search: the search, with masks, factors and decisions.
        observer: observer of the search, with the engine and the times of extra passes.
        log: log of the run, whose counters and seconds a resume restores.
        holds_factors: whether the factors are stored here; DeepSpeed stores them itself, with their fp32 copies.
        interval: optimizer steps between two allocations; None where ranks are given.
    """

    def __init__(
        self, search: MaskedSearch, observer: Observer, log: RunLog, holds_factors: bool, interval: int | None
    ) -> None:
        self.search, self.observer, self.log, self.holds_factors = search, observer, log, holds_factors
        self.interval = interval
        self.triplets, self.method = search.triplets, search.request.method
        self.partitioned = observer.components.engine.partitioned

    def write(self, folder: Path, args: Any, state: Any) -> None:
        """Write the state, whole, and wait until it is written; every process must call this."""
        document = {
            "step": state.global_step,
            "total_steps": state.max_steps,
            "interval": self.interval,
            **self.search.state.state(),
            "masks": {
                module.name: "".join("1" if flag else "0" for flag in row)
                for module, row in zip(self.triplets.modules, self.triplets.masks, strict=True)
            },
            "counters": asdict(self.log.counters),
            "thinner": self.observer.probe_budget.state(),
            "seconds": self.log.seconds,
            "overhead_seconds": self.log.overhead_seconds,
            "overhead": self.log.overhead,
        }
        whole = whole_state(self.observer.components, self.method.state(), args.should_save)
        tensors = {f"method.{key}": value for key, value in whole.items()}
        if self.holds_factors:
            tensors |= self._whole_factors(args.should_save)
        gather(
            f"the adaptive state of {folder.name}",
            lambda: write_state(folder, tensors, document) if args.should_save else None,
        )

    def _factors(self) -> dict[str, nn.Parameter]:
        """Return the exact factors by ``<kind>.<module>``."""
        return {
            f"{kind}.{module.name}": parameter
            for module in self.triplets.modules
            for kind, parameter in module.parameters().items()
        }

    def _whole_factors(self, keep: bool) -> dict[str, Tensor]:
        """Join the exact factors over all processes, which all must call this; on the CPU where they are kept."""
        factors = self._factors()
        with self.observer.components.engine.whole(list(factors.values())) as whole:
            return {key: tensor.cpu() for key, tensor in zip(factors, whole, strict=True)} if keep else {}

    @torch.no_grad()
    def _load_factors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what this process owns of whole factors into the adapter."""
        factors, engine = self._factors(), self.observer.components.engine
        for key, piece in zip(factors, engine.weights(list(factors.values())), strict=True):
            start, length = engine.piece(factors[key])
            piece.view(-1).copy_(tensors[key].view(-1)[start:][:length])

    def resume(self, folder: Path, total_steps: int) -> None:
        """Restore a run from a checkpoint: its adapter, the decisions of its search, counters and seconds.

        Raises:
            PlanError: as :meth:`restore`.
        """
        document = self.restore(folder, total_steps)
        self.observer.probe_budget.load(document["thinner"])
        self.log.seconds_before = document.get("seconds", 0.0)
        for work, seconds in document.get("overhead", {"before": document["overhead_seconds"]}).items():
            self.log.spend(work, seconds)
        for name in _RESUMED_COUNTERS:
            setattr(self.log.counters, name, document["counters"][name])

    def restore(self, folder: Path, total_steps: int) -> Mapping[str, Any]:
        """Restore adapter, masks and method from a checkpoint, and return the JSON document that :meth:`write` stored.

        Raises:
            PlanError: the state is missing, of other modules, or of a run of another length or other epochs.
        """
        (tensors, mine), _ = gather_facts(
            f"the state in {folder}", lambda: read_state(folder, self.partitioned), lambda _: None
        )
        document: Mapping[str, Any] = from_main(f"the decisions in {folder}", lambda: mine)
        names = [module.name for module in self.triplets.modules]
        if list(document["masks"]) != names:
            raise PlanError(f"{folder} holds the state of other modules; use another output_dir")
        if document["total_steps"] != total_steps and not document["final"]:
            raise PlanError(
                f"{folder} belongs to a run of {document['total_steps']} steps and this one has {total_steps}: the "
                "schedule is a share of them; set max_steps or num_train_epochs back, or use another output_dir"
            )
        self._check_interval(folder, document)
        masks = [[flag == "1" for flag in document["masks"][name]] for name in names]
        method = {k.removeprefix("method."): value for k, value in tensors.items() if k.startswith("method.")}
        components, whole = self.observer.components, not document["partitioned"]
        device = self.triplets.modules[0].q.device
        if not whole:  # pieces of earlier versions, which may have to be joined on the device
            method = {key: value.to(device) for key, value in method.items()}
        if self.method.traits.componentwise:
            method = component_state(components, method, whole)
        elif whole:
            method = owned_state(components, method)
        self.method.load({key: value.to(device) for key, value in method.items()})
        if self.holds_factors:
            self._load_factors(tensors)
        self.triplets.mask(masks)
        self.search.state.load(document)
        self.search.set_strength()
        return document

    def _check_interval(self, folder: Path, document: Mapping[str, Any]) -> None:
        """Refuse a checkpoint whose run chose ranks at other steps, since an epoch had another number of them."""
        there = document.get("interval", self.interval)  # earlier versions had no distances that depend on the data
        if there != self.interval and not document["final"]:
            raise PlanError(
                f"{folder} belongs to a run that chooses ranks every {there} steps and this one does every "
                f"{self.interval}: adaptive_interval_epochs is a share of an epoch, which has another number of steps "
                "now; set batch size, gradient_accumulation_steps, number of processes and data back, or use another "
                "output_dir"
            )
