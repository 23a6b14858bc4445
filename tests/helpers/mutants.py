"""A pytest plugin for `make mutants`: the first failing example is enough, nobody reads a smaller one.

What survives in ranks/allocation.py, and why no test can kill it:

* `floor(value - 1e-9)`: a share that falls short of its integer is the first to get the unit back.
* `score / top >= _LEAST_SCORE`: where exactly a score counts as 0 is arbitrary.
* another `strict` of a zip: the lengths of all lists are compared at several places, and one of them still refuses.
* `index <= len(points)`, `or any(slopes)`: after the last break point every module is capped, and between two break
  points whose costs differ some slope is not 0.
* the threshold of `rest` and its `and`: a rest within rounding leaves modules without a score where they are.
* `[2.0] * len(costs)`, `else 1.0`: a constant that all share cancels, or sorts nothing.
* `min(costs, default=...)`: without costs the heap is empty, and the value is not looked at.
* `gap + 2`: gaps lie between -1 and 0, so that units are handed out in the same order.
"""

from hypothesis import Phase, settings


settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None, derandomize=True)
settings.load_profile("mutants")
