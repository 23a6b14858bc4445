"""The only room that imports LLaMA-Factory.

* ``seams``: the table of places where the plugin attaches, checked and applied as their modules are imported.
* ``arguments``: the host's YAML or command line, with our keys, to a validated configuration.
* ``loading``: the host's model and data, for shapes and for measurements.
* ``runs``: one training run: obtain the plan, hand over, prove the result.

Importing this package is cheap: it pulls in neither torch nor llamafactory.
"""

from llamafactory_adaptive.bridge.seams import apply_seams, seam_modules, train_worker


__all__ = ["apply_seams", "seam_modules", "train_worker"]
