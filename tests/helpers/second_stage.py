"""The second stage of a method, on given ranks of a tiny model under a plain Trainer."""

import dataclasses

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from llamafactory_adaptive import attach_adapter
from llamafactory_adaptive.config.run_config import AdaptiveConfig, CalibrationConfig
from llamafactory_adaptive.methods import get_method, make_method
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from llamafactory_adaptive.ranks.search_config import GivenRanksConfig
from llamafactory_adaptive.training.bound_run import RunRequest
from llamafactory_adaptive.training.callback import AdaptiveCallback
from llamafactory_adaptive.training.guard import PlanGuard
from llamafactory_adaptive.training.masked_search import SearchRequest
from llamafactory_adaptive.training.run_log import RunLog
from llamafactory_adaptive.training.trainer import adaptive_trainer
from tests.helpers.tiny import TARGETS, rows, tiny_model, tiny_tokenizer


SEED = 7


def given_plan() -> RankPlan:
    """Ranks for the tiny model: 2 to 4, and no adapter in the first module."""
    targets = {name: m for name, m in tiny_model().named_modules() if name.rpartition(".")[2] in TARGETS}
    modules = tuple(
        ModulePlan(name, module.in_features, module.out_features, rank=2 + index % 3 if index else 0)
        for index, (name, module) in enumerate(targets.items())
    )
    return RankPlan("sensitivity", {}, "params", 4, 8.0, modules)


def second_stage(folder, resumed=None, options=None, **more):
    """A Trainer of given ranks in the form of ``igu``; ``more`` are training arguments."""
    plan, given = given_plan(), dataclasses.asdict(get_method("igu").Options(**(options or {})))
    config = AdaptiveConfig("igu", given, "params", 4, 8.0, 1, 16, "plan.json", CalibrationConfig(None, 0, 0, 0),
                            given=GivenRanksConfig(SEED))  # fmt: skip
    request = SearchRequest(plan, config, make_method("igu", given))
    callback = AdaptiveCallback(PlanGuard(plan, RunLog(plan.method, 0.0)), RunRequest(3, request), resumed)
    arguments = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none",
                 "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, **more}  # fmt: skip
    return adaptive_trainer(Trainer, callback)(
        model=attach_adapter(tiny_model(), plan),
        args=TrainingArguments(str(folder), **arguments),
        train_dataset=rows(12),
        eval_dataset=rows(12),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
        callbacks=[callback],
    )


def factors(trainer):
    """The trained tensors by kind and module, as they are now."""
    return {f"{kind}.{module.name}": parameter.detach().clone()
            for module in trainer.adaptive_callback.bound.search.triplets.modules
            for kind, parameter in module.parameters().items()}  # fmt: skip
