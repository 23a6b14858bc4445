"""The callback of a run in LLaMA-Factory, from whose plan the host makes its adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamafactory_adaptive.adapter.lora import lora_config_arguments
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.reports.tables import closing_words
from llamafactory_adaptive.training.callback import AdaptiveCallback


class HostCallback(AdaptiveCallback):
    """Callback that also passes the plan to the host, and ends the run with its checks and closing words.

    Attributes:
        configs_injected: number of LoRA configurations that the host has made from the plan.
    """

    configs_injected = 0

    def lora_arguments(self) -> dict[str, Any]:
        """Return the arguments of ``LoraConfig`` that the plan decides, and count that the host took them."""
        self.configs_injected += 1
        return lora_config_arguments(self.guard.plan)

    def finish(self, output: Path, loads_adapter: bool, chat: str, training: Mapping[str, Any]) -> None:
        """Check the saved adapter on the main process, log what the run cost, and print the closing words.

        Args:
            output: the run's ``output_dir``.
            loads_adapter: the host loaded a trained adapter, so no new LoRA configuration was due.
            chat: the command that talks to the adapter.
            training: settings of the training that a report shows: ``dataset``, ``learning_rate``, ``batch_size``.

        Raises:
            GuardError: the host made its adapter without the plan, or what it saved does not match the plan.
        """
        log, plan = self.guard.log, self.guard.plan
        if self.configs_injected == 0 and not loads_adapter:
            raise GuardError(
                "the run asked for adaptive ranks but no allocation reached the model: "
                f"configs_injected=0, {log.counters}"
            )
        self.guard.verify_saved(output)
        end = {"event": "end", "seconds": round(log.seconds, 3), "warnings": log.warnings, "training": training}
        log.write(output, end)
        print(closing_words(plan, output, log.overhead_seconds, log.seconds, log.warnings, chat), flush=True)
