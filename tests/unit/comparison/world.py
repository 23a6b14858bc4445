"""A comparison without training: losses of runs are known beforehand."""

import math

from llamafactory_adaptive.comparison.arms import Arm
from llamafactory_adaptive.comparison.experiment import Progress


ARMS = [Arm("lora", {"finetuning_type": "lora"}), Arm("igu", {"finetuning_type": "adaptive"})]
RATES = (1.0, 2.0, 4.0)


class World:
    """Losses by arm, rate and seed; what was run, in order."""

    def __init__(self, design, best=None, diverges=lambda run: False, parameters=None):
        self.results, self.made, self.best, self.diverges = {}, [], best or {"lora": 2.0, "igu": 2.0}, diverges
        self.parameters = parameters or {"lora": 1000, "igu": 990}
        self.progress = Progress(design, ARMS, self.results.get, lambda outcome, half: outcome[half])

    def make(self, run, device=None):
        self.made.append(run)
        if self.diverges(run):
            return {"status": "diverged"}
        loss = abs(math.log2(run.point.rate / self.best[run.arm])) + 0.001 * run.seed
        return {"status": "done", "dev": loss, "test": loss + 1, "parameters": self.parameters[run.arm]}

    def finish(self):
        while due := self.progress.due():
            self.results[due[0]] = self.make(due[0])
        return self
