"""The package that attaches the plugin to LLaMA-Factory and imports its modules.

* ``seam``, ``seams``: a place where the plugin attaches; their table, checked and applied as modules are imported.
* ``arguments``: the host's YAML or command line with the plugin's keys, as one flat mapping.
* ``validation``, ``host_texts``, ``host_check``: the validated configuration from that mapping, every problem at once.
* ``checked_run``: the settings of a run, read and validated once per process.
* ``target_shapes``, ``fingerprint``: the target modules, and what identifies model and data; no weights are read.
* ``scoring_job``, ``measure_process``, ``child``: a model scored in a process of its own, or where it trains.
* ``base_loading``, ``loaded_base``, ``random_state``: the base that was scored, handed to the host's load as it was.
* ``base_placing``: the base spread over devices in a process of its own.
* ``host_run``, ``plans``, ``resuming``: a run as planning reads it, its one plan, the checkpoint it resumes from.
* ``training_run``: one training run: plan its ranks before it, verify the result after it.
* ``board``: LLaMA Board, the host's web interface, which no run needs.
* ``launch``: launcher, exit codes, the end of a process.

Importing this package is cheap: it pulls in neither torch nor llamafactory.
"""

from llamafactory_adaptive.bridge.seams import apply_seams, seam_modules, train_worker


__all__ = ["apply_seams", "seam_modules", "train_worker"]
