"""The only room that imports LLaMA-Factory.

* ``seams``: the table of places where the plugin attaches, checked and applied as their modules are imported.
* ``arguments``: the host's YAML or command line with our keys, as one flat mapping.
* ``validation``: that mapping to a validated configuration, with every problem at once.
* ``loading``: target shapes and what identifies model and data; no weights are read.
* ``measuring``: the process of its own in which a model is scored.
* ``plans``: where a run's plan comes from.
* ``runs``: one training run: hand over the plan, prove the result.
* ``entry``: launcher, exit codes, the end of a process.

Importing this package is cheap: it pulls in neither torch nor llamafactory.
"""

from llamafactory_adaptive.bridge.seams import apply_seams, seam_modules, train_worker


__all__ = ["apply_seams", "seam_modules", "train_worker"]
