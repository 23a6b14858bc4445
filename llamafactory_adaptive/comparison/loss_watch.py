"""Does a run diverge? Told by the loss of each optimizer step, so that it ends early."""

import math


_NON_FINITE = 3  # steps in a row
_WORSE, _WORSE_STEPS = 3.0, 10  # times the loss before the first step, and for how many steps in a row
_SKIPPED = 40  # steps in a row that a loss scaler skips: it starts at 2**16 and is halved each time


class LossWatch:
    """Counter of steps whose loss is not finite, or far above that of the first.

    A single one says nothing: a batch may be hard. Nor does a step that a loss scaler skips (fp16), which is usual
    while its scale is found; the loss of such a step is finite, the gradient alone is not.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self.non_finite = self.worse = self.skipped = 0  # in a row

    def see(self, loss: float, skipped: bool = False) -> str:
        """Count an optimizer step; return why the run diverges, empty where nothing says that it does.

        Args:
            loss: loss of the step's rows, before the step.
            skipped: whether the loss scaler left the step out.
        """
        self.non_finite = 0 if math.isfinite(loss) else self.non_finite + 1
        if self.first is None and math.isfinite(loss):
            self.first = loss
        far = self.first is not None and not loss <= _WORSE * self.first
        self.worse = self.worse + 1 if far else 0
        self.skipped = self.skipped + 1 if skipped else 0
        if self.non_finite >= _NON_FINITE:
            return f"the loss was not finite for {_NON_FINITE} steps in a row"
        if self.worse >= _WORSE_STEPS:
            return f"the loss was more than {_WORSE:g} times that of the first step for {_WORSE_STEPS} steps in a row"
        return f"the loss scaler skipped {_SKIPPED} steps in a row" if self.skipped >= _SKIPPED else ""
