"""Every name that this plugin imports from LLaMA-Factory without replacing it, for ``doctor`` and for runs to check.

A test compares this table with the imports in the code.
"""

import importlib
import importlib.util


UPSTREAM_NAMES = {
    "llamafactory": ("launcher",),
    "llamafactory.data": ("get_dataset", "get_template_and_fix_tokenizer"),
    "llamafactory.data.template": ("TEMPLATES",),
    "llamafactory.extras.constants": ("CHECKPOINT_NAMES",),
    "llamafactory.extras.misc": ("get_device_count", "is_env_enabled", "use_kt", "use_ray"),
    "llamafactory.hparams": (
        "DataArguments", "ModelArguments", "RayArguments", "get_train_args", "parser", "read_args",
    ),
    "llamafactory.hparams.finetuning_args": ("FinetuningArguments",),
    "llamafactory.model": ("load_config", "load_model", "load_tokenizer"),
    "llamafactory.model.model_utils.misc": ("find_all_linear_modules", "find_expanded_modules"),
    "llamafactory.model.model_utils.visual": ("patch_target_modules",),
    "llamafactory.train.tuner": ("run_exp",),
}  # fmt: skip


def name_states() -> dict[str, str]:
    """Import every module of the table, and return for each name ``fits`` or what is wrong."""
    states = {}
    for module, names in UPSTREAM_NAMES.items():
        try:
            found = importlib.import_module(module)
            broken = ""
        except Exception as error:  # whatever an installation that is not whole raises
            found, broken = None, f"cannot be imported ({type(error).__name__}: {error})"
        for name in names:
            there = hasattr(found, name) or (not broken and _is_module(f"{module}.{name}"))
            states[f"{module}.{name}"] = broken or ("fits" if there else "does not exist")
    return states


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
