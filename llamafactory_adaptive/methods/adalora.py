"""AdaLoRA (arXiv 2303.10512), as a baseline: prunes components by the smoothed product of gradient and weight.

Element importance ``s = |w dL/dw|`` (Eq. 8), smoothed to S and U (Eq. 9-10), score ``S * U`` (Eq. 11); a component
adds its lambda's score and the means over its column of P and row of Q (Eq. 7). P, Q ~ N(0, 0.02), lambda starts at 0;
the regulariser is the Frobenius norm of Gram - I (Eq. 4), weight 0.5 as in PEFT. The scale is ``lora_alpha`` over the
rank that the run starts at, as in PEFT (which adds 1e-5 to that rank); ``scale: lora_rank`` divides by ``lora_rank``,
as all other methods do, which is twice as strong by default. Schedule, budgets, masks, engines, resume and export are
the ones of ``igu``; what ``igu`` says of masked components holds here too.

As lambda starts at 0, the first update of ``Delta W`` is 45 to 120 times smaller than plain LoRA's at the same
learning rate (``ranks/first_update.py``); lambda then grows by about the rate in each step. Use a higher rate than for
LoRA.

Cost: two numbers per adapter weight, fp32 unless ``statistics_dtype`` says otherwise, and a few element-wise passes
over the adapter per step.
"""

from dataclasses import dataclass
from typing import ClassVar

from llamafactory_adaptive.errors import Problem
from llamafactory_adaptive.methods import MethodTraits
from llamafactory_adaptive.methods._adalora_form import AdaloraForm
from llamafactory_adaptive.methods._running_stats import check_statistics_dtype, statistics_dtype
from llamafactory_adaptive.options import option


@dataclass(frozen=True)
class AdaloraOptions:
    """Options of AdaLoRA, the YAML keys ``adalora_*``."""

    beta1: float = option(
        0.85, "Decay rate of the running mean of the importance; a larger one smooths more.", low=0.0, high=0.9999
    )
    beta2: float = option(
        0.85, "Decay rate of the running deviation of the importance; a larger one smooths more.", low=0.0, high=0.9999
    )
    orthogonality_weight: float = option(
        0.5, "Weight of the orthogonality regulariser |Gram - I| in the loss.", low=0.0, high=1e6
    )
    statistics_dtype: str = statistics_dtype()
    scale: str = option(
        "init_rank",
        "Rank that lora_alpha is divided by: init_rank takes the rank that modules start at, as PEFT does; lora_rank "
        "takes that of the budget, as all other methods do, which is twice as strong by default.",
        choices=("init_rank", "lora_rank"),
        before="lora_rank",
    )

    def check(self) -> list[Problem]:
        """List decay rates that do not go with the type of the statistics."""
        return check_statistics_dtype("adalora", self.statistics_dtype, beta1=self.beta1, beta2=self.beta2)


class Adalora(AdaloraForm):
    """The method registered as ``adalora``."""

    Options: ClassVar[type[AdaloraOptions]] = AdaloraOptions

    def __init__(self, options: AdaloraOptions) -> None:
        super().__init__(options)
        self.options = options

    @property
    def traits(self) -> MethodTraits:
        return MethodTraits("prune", scales_by_start=self.options.scale == "init_rank")
