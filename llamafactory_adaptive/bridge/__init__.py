"""The only room that imports LLaMA-Factory.

* ``seams``: the table of places where the plugin attaches, checked and applied as their modules are imported.
* ``arguments``: the host's YAML or command line with our keys, as one flat mapping.
* ``validation``, ``host_texts``, ``host_check``: that mapping to a validated configuration, every problem at once.
* ``checked_run``: both, once a process.
* ``target_shapes``, ``fingerprint``: the target modules, and what identifies model and data; no weights are read.
* ``scoring_job``, ``measure_process``, ``child``: the process of its own in which a model is scored.
* ``host_run``, ``plans``, ``resuming``: what planning asks of a run, its one plan, the checkpoint it resumes from.
* ``training_run``: one training run: hand over the plan, prove the result.
* ``launch``: launcher, exit codes, the end of a process.

Importing this package is cheap: it pulls in neither torch nor llamafactory.
"""

from llamafactory_adaptive.bridge.seams import apply_seams, seam_modules, train_worker


__all__ = ["apply_seams", "seam_modules", "train_worker"]
