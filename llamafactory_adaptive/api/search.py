"""Ranks found while training, under any transformers Trainer."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftModel
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from llamafactory_adaptive.adapter.lora import peft_models
from llamafactory_adaptive.api.adapters import attach_adapter
from llamafactory_adaptive.api.plans import PrintablePlan
from llamafactory_adaptive.api.settings import (
    budget_settings,
    chosen_method,
    common_settings,
    in_python,
    provenance,
    python_errors,
    python_words,
)
from llamafactory_adaptive.api.targets import find_targets
from llamafactory_adaptive.config.host_conflicts import check_conflicts
from llamafactory_adaptive.config.key_checks import check_kind, check_search
from llamafactory_adaptive.config.run_config import AdaptiveConfig, CalibrationConfig
from llamafactory_adaptive.config.search_conflicts import check_search_conflicts
from llamafactory_adaptive.engines.distributed import from_main
from llamafactory_adaptive.errors import GuardError, PlanError, Problem, refuse, refuse_all
from llamafactory_adaptive.files import PLAN_FILE
from llamafactory_adaptive.methods import make_method
from llamafactory_adaptive.planning.earlier_plans import check_resumed_run
from llamafactory_adaptive.planning.planner import start_plan
from llamafactory_adaptive.ranks.plan import ModuleShape, load_plan
from llamafactory_adaptive.ranks.search_config import SearchConfig
from llamafactory_adaptive.reports.plots import HEATMAP_FILE, save_heatmap
from llamafactory_adaptive.training.bound_run import RunRequest
from llamafactory_adaptive.training.callback import AdaptiveCallback
from llamafactory_adaptive.training.checkpoint_files import damage
from llamafactory_adaptive.training.guard import PlanGuard
from llamafactory_adaptive.training.masked_search import SearchRequest
from llamafactory_adaptive.training.run_log import RunLog
from llamafactory_adaptive.training.trainer import adaptive_trainer


AnyTrainer = TypeVar("AnyTrainer")
# Modules of Trainers that train on the model's own loss: SFTTrainer's compute_loss adds metrics, and where it has
# another loss, that is its compute_loss_func.
_ON_MODEL_LOSS = ("transformers.trainer", "transformers.trainer_seq2seq", "trl.trainer.sft_trainer")


def rank_search(
    model: nn.Module,
    method: str = "igu",
    lora_rank: int = 16,
    lora_alpha: int | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    task_type: str = "CAUSAL_LM",
    budget_unit: str = "params",
    min_rank: int = 1,
    max_rank: int | None = None,
    init_rank: int | None = None,
    warmup_ratio: float | None = None,
    final_ratio: float | None = None,
    interval: int | None = None,
    interval_epochs: float | None = None,
    max_overhead: float | None = None,
    best_model_from: str = "final",
    max_nonfinite_steps: int = 3,
    lora_settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> "RankSearch":
    """Attach an over-ranked adapter whose components are chosen while it trains.

    At the end the adapter costs at most what a uniform LoRA of rank ``lora_rank`` costs, and is plain LoRA when saved.

    Args:
        model: any decoder without an adapter; its target modules are replaced in place, as PEFT does.
        method: ``"igu"``, ``"adalora"``, ``"elalora"``, ``"svd"`` or ``"tsq"`` (with ``sampling=False``).
        lora_rank: the budget.
        lora_alpha: alpha of that uniform LoRA (default: 2 x ``lora_rank``). ``adalora`` divides it by ``init_rank``,
            as PEFT does, unless ``scale="lora_rank"`` is given.
        target_modules: as in :func:`score_modules`.
        task_type: PEFT's name of the model's task.
        budget_unit: ``"params"`` counts trainable parameters, ``"ranks"`` the sum of ranks.
        min_rank: lowest rank of a module; 0 lets a module go without an adapter.
        max_rank: highest rank of a module (default: 4 x ``lora_rank``).
        init_rank: rank that every module starts with, in methods that prune (default: 2 x ``lora_rank``, and
            ``max_rank`` at most).
        warmup_ratio: share of the optimizer steps before ranks first change (default: 0.1).
        final_ratio: share of the optimizer steps, at the end, that train the final ranks (default: 0.3).
        interval: optimizer steps between two allocations (default: 10).
        interval_epochs: the same as a share of an epoch; one of both.
        max_overhead: largest share of training time that extra passes may add, for ``importance="integrated"``.
        best_model_from: evaluations that count for ``load_best_model_at_end`` and early stopping: ``"final"`` for
            those after the ranks are final, ``"start"`` for all.
        max_nonfinite_steps: optimizer steps in a row whose loss may be NaN or infinite before the run is ended.
        lora_settings: further arguments of ``peft.LoraConfig``, as in :func:`lora_config`.
        seed: seed of the factors and of every draw.
        **options: of the method, the YAML keys without ``igu_``: ``importance="integrated"``. ``init_rank`` to
            ``interval_epochs`` hold for methods that prune (``igu``, ``adalora``); ``svd`` reads ``init_rank`` and
            ``final_ratio``, where it cuts, and ``elalora`` those from ``warmup_ratio`` on.

    Returns:
        The search: its ``model``, its ``callback``, ``trainer(cls)`` and ``finalize(folder)``.

    Raises:
        AdaptiveConfigError: an unknown method or option, a value out of range, or targets that the model lacks.
        InfeasibleBudgetError: bounds and budget do not fit each other for these modules.
    """
    pruning = {"init_rank": init_rank, "warmup_ratio": warmup_ratio, "final_ratio": final_ratio,
               "interval": interval, "interval_epochs": interval_epochs, "max_overhead": max_overhead}  # fmt: skip
    bounds = {"budget_unit": budget_unit, "min_rank": min_rank, "max_rank": max_rank,
              "best_model_from": best_model_from, "max_nonfinite_steps": max_nonfinite_steps}  # fmt: skip
    _, values = chosen_method(method, options, dynamic=True)
    made = make_method(method, values)
    for name in made.traits.only_with_plan:
        if options.get(name) is not None:
            refuse(name, options[name], "only runs of LLaMA-Factory on given ranks read it", f"leaving {name} out")
    if made.traits.samples:
        refuse("sampling", True, "samples are chosen in runs of LLaMA-Factory alone", "sampling=False")
    common, faults = common_settings(method, **bounds, **pruning)
    rank, alpha, high, more = budget_settings(method, lora_rank, lora_alpha, common)
    search, idle = _search(method, made, common, pruning, rank, high, seed)
    refuse_all(*faults, *more, *idle)
    budget, by_start = (rank, alpha, high), made.traits.scales_by_start
    calibration = CalibrationConfig(None, 0, 0, seed)
    config = AdaptiveConfig.from_checked(common, method, values, budget, calibration, search, by_start)
    shapes = [ModuleShape(n, m.in_features, m.out_features) for n, m in find_targets(model, target_modules).items()]
    with python_errors(method):
        start = start_plan(config, shapes, provenance(model, seed))
    adapted = attach_adapter(model, start, task_type, **(lora_settings or {}))
    return RankSearch(adapted, SearchRequest(start, config, made))


def _search(
    method: str, made: Any, common: Mapping[str, Any], pruning: Mapping[str, Any], rank: int, high: int, seed: int
) -> tuple[SearchConfig, list[Problem]]:
    """Build the settings by which the method changes ranks, and list the arguments that it cannot use."""
    flat = {f"adaptive_{name}": value for name, value in pruning.items()}
    problems = check_kind(flat, method, True, made.traits.strategy, made.traits.spectral)
    search, faults = check_search(flat, common, method, made, rank, high, seed)
    return search, [in_python(problem, method) for problem in problems + faults]


class RankSearch:
    """A search for ranks that a Trainer carries out.

    Attributes:
        model: the PEFT model to give to the Trainer.
        callback: drives the search; the Trainer of :meth:`trainer` adds it by itself where it was not given.
    """

    def __init__(self, model: PeftModel, request: SearchRequest) -> None:
        self.model, self._request = model, request
        log = RunLog(request.start.method, 0.0, partial(python_words, method=request.start.method))
        self._guard = PlanGuard(request.start, log, is_final=False)
        run = RunRequest(request.config.max_nonfinite_steps, request)
        remedy = "build the Trainer with search.trainer(TrainerClass)"
        self.callback = AdaptiveCallback(self._guard, run, remedy=remedy)

    @property
    def plan(self) -> PrintablePlan:
        """Return the plan of the ranks in use: at first those of the start, in the end those found."""
        return PrintablePlan.from_plan(self.callback.current_plan())

    def trainer(self, trainer_class: type[AnyTrainer]) -> type[AnyTrainer]:
        """Make a subclass of a Trainer class that carries out the search; all else stays as it is.

        Args:
            trainer_class: ``transformers.Trainer``, ``trl.SFTTrainer`` or any other subclass.

        Returns:
            The subclass. Use it for one Trainer, with ``model=search.model``; resuming works as always
            (``train(resume_from_checkpoint=...)``).
        """
        admit, resume_from, method = self._admit, self._resume_from, self._request.start.method

        class Searching(trainer_class):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                admit(self)

            def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
                with python_errors(method):
                    resume_from(_checkpoint(resume_from_checkpoint, self.args.output_dir))
                    return super().train(resume_from_checkpoint, *args, **kwargs)

        Searching.__name__, Searching.__qualname__ = trainer_class.__name__, trainer_class.__qualname__
        return adaptive_trainer(Searching, self.callback)

    def finalize(self, folder: str | Path) -> PrintablePlan:
        """Check the saved adapter against the ranks found, and write plan, heat-map and model card beside it.

        Args:
            folder: folder that was given to ``trainer.save_model``.

        Returns:
            The ranks that were found. Under several processes all must call it: the first one checks and writes, and
            every one of them returns after that, or raises an error if a check failed.

        Raises:
            GuardError: training has not ended, no components were chosen, or the saved adapter differs from the plan.
        """
        if not self._guard.is_final:
            raise GuardError("the search has not ended: finalize comes after trainer.train() and trainer.save_model()")
        from_main(f"the check of the adapter in {folder}", lambda: self._check_and_write(Path(folder)))
        return self.plan

    def _check_and_write(self, folder: Path) -> None:
        self._guard.verify_saved(folder)
        self._guard.plan.save(folder / PLAN_FILE)
        save_heatmap(self._guard.plan, folder / HEATMAP_FILE)

    def _admit(self, trainer: Any) -> None:
        """Refuse a Trainer that the search does not support, before anything is changed; else add the callback."""
        method = self._request.start.method
        if self.callback.bound is not None:
            refuse("trainer", type(trainer).__name__, "this search has a Trainer already", "rank_search anew")
        if not any(part is self.model for part in peft_models(trainer.model)):
            given = type(trainer.model).__name__
            refuse("model", given, "it is not the model of this search", "model=search.model")
        flat = {**trainer.args.to_dict(), "fsdp": trainer.args.fsdp or None}
        rules = check_search_conflicts(flat, self._request.method)
        faults = [*check_conflicts({key: flat[key] for key in ("fsdp", "fsdp_config")}), *rules]
        if self._request.method.traits.probes and (fault := _own_loss(trainer)):
            faults.append(fault)
        if trainer.args.n_gpu > 1:
            reason = "copies of the model in one process (DataParallel) hide its gradients"
            faults.append(Problem("n_gpu", trainer.args.n_gpu, reason, "torchrun, or CUDA_VISIBLE_DEVICES=0"))
        refuse_all(*(in_python(fault, method) for fault in faults))
        if self.callback not in trainer.callback_handler.callbacks:
            trainer.add_callback(self.callback)

    def _resume_from(self, checkpoint: Path | None) -> None:
        """Check and store the checkpoint that training resumes from.

        Raises:
            PlanError: the checkpoint is damaged, or of a search with other settings.
        """
        self.callback.resume_from(checkpoint)
        if checkpoint is None:
            return
        if fault := damage(checkpoint):
            raise PlanError(f"{checkpoint} cannot be resumed from: {fault}")
        check_resumed_run(load_plan(checkpoint / PLAN_FILE), self._request.config, str(checkpoint))


def _own_loss(trainer: Any) -> Problem | None:
    """Find what makes a Trainer's loss another than the model's own, which extra passes use."""
    owner = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    key, given = "compute_loss", owner
    if trainer.compute_loss_func is not None:
        key, given = "compute_loss_func", trainer.compute_loss_func
    elif owner.__module__ in _ON_MODEL_LOSS:
        return None
    reason = "extra passes use the loss that the model itself returns"
    return Problem(key, getattr(given, "__qualname__", type(given).__name__), reason, "igu_importance: shrink")


def _checkpoint(asked: Any, output: str) -> Path | None:
    """Find the checkpoint that a Trainer resumes from: True means the newest one.

    Raises:
        AdaptiveConfigError: the newest one is asked for where there is none.
    """
    if asked is not True:
        return Path(str(asked)) if asked else None
    newest = get_last_checkpoint(output) if Path(output).is_dir() else None
    if newest is None:
        remedy = "leaving it out, or resume_from_checkpoint='path/of/a/checkpoint'"
        refuse("resume_from_checkpoint", True, f"output_dir ({output}) holds no checkpoint", remedy)
    return Path(newest)
