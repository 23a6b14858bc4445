"""The seams: which attribute of which LLaMA-Factory module is replaced, and by what.

A seam is applied once, right after its own module has been imported. One that does not fit is recorded, and raised as
an error only when a run asks for ``finetuning_type: adaptive``: a plain LLaMA-Factory run must never break over this
plugin.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from llamafactory_adaptive.bridge.board.seams import BOARD_SEAMS
from llamafactory_adaptive.bridge.seam import Seam, log_loss
from llamafactory_adaptive.bridge.upstream_names import name_states
from llamafactory_adaptive.errors import SeamError, first_of
from llamafactory_adaptive.versions import host_version, verified_versions


def _argument_list_fits(arguments: Any) -> bool:
    return isinstance(arguments, list) and [c.__name__ for c in arguments].count("FinetuningArguments") == 1


def _with_adaptive_arguments(arguments: list[type]) -> list[type]:
    from llamafactory_adaptive.bridge.arguments import adaptive_finetuning_arguments

    return [adaptive_finetuning_arguments() if c.__name__ == "FinetuningArguments" else c for c in arguments]


def _lora_config(original: Any) -> Any:
    from llamafactory_adaptive.bridge.training_run import inject_ranks

    return inject_ranks(original)


def _auto_model(original: Any) -> Any:
    from llamafactory_adaptive.bridge.base_loading import steerable

    return steerable(original)


def _trainer(original: Any) -> Any:
    from llamafactory_adaptive.training.trainer import adaptive_trainer

    return adaptive_trainer(original)


def _training_function(original: Any) -> Any:
    from llamafactory_adaptive.bridge.training_run import adaptive_training_function

    return adaptive_training_function(original, require_seams)


def _run_exp(original: Any) -> Any:
    from llamafactory_adaptive.bridge.launch import with_clean_exit

    return with_clean_exit(original)


def _launch(original: Any) -> Any:
    from llamafactory_adaptive.bridge.launch import checked_launch

    return checked_launch(original, require_seams)


def _v1_launch(original: Any) -> Any:
    from llamafactory_adaptive.bridge.v1 import refusing_launch

    return refusing_launch(original)


def _v1_plugin(plugin: Any) -> Any:
    from llamafactory_adaptive.bridge.v1 import register

    return register(plugin)


# Each stage's trainer, replaced where it is defined: before its workflow looks the name up.
_TRAINERS = {
    "pt": "CustomTrainer",
    "sft": "CustomSeq2SeqTrainer",
    "rm": "PairwiseTrainer",
    "dpo": "CustomDPOTrainer",
    "kto": "CustomKTOTrainer",
}

SEAMS = (
    Seam("llamafactory.hparams.parser", "_TRAIN_ARGS", _argument_list_fits, _with_adaptive_arguments),
    Seam("llamafactory.hparams.parser", "_INFER_ARGS", _argument_list_fits, _with_adaptive_arguments),
    Seam("llamafactory.hparams.parser", "_EVAL_ARGS", _argument_list_fits, _with_adaptive_arguments),
    Seam("llamafactory.model.adapter", "LoraConfig", lambda cls: cls.__name__ == "LoraConfig", _lora_config),
    *(
        Seam("llamafactory.model.loader", name, lambda cls: hasattr(cls, "from_pretrained"), _auto_model)
        for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText")
    ),
    *(
        Seam(f"llamafactory.train.{stage}.trainer", name, lambda cls: isinstance(cls, type), _trainer)
        for stage, name in _TRAINERS.items()
    ),
    Seam("llamafactory.train.tuner", "_training_function", callable, _training_function),
    Seam("llamafactory.train.tuner", "run_exp", callable, _run_exp),
    Seam("llamafactory.launcher", "launch", callable, _launch),
    # Experimental in the host itself, which moves it about.
    Seam("llamafactory.v1.launcher", "launch", callable, _v1_launch, optional=True),
    Seam(
        "llamafactory.v1.plugins.model_plugins.peft",
        "PeftPlugin",
        lambda cls: hasattr(cls, "register"),
        _v1_plugin,
        optional=True,
    ),
    *BOARD_SEAMS,
)

_applied: set[str] = set()
_misfits: dict[str, str] = {}


def seam_modules() -> set[str]:
    """Return the names of all modules whose import applies seams."""
    return {seam.trigger for seam in SEAMS}


def apply_seams(module: ModuleType) -> None:
    """Check all seams that a freshly imported module applies, then apply all of them or none."""
    seams = [seam for seam in SEAMS if seam.trigger == module.__name__ and seam.target not in _applied]
    patched = {}
    for seam in seams:
        try:
            attribute = getattr(_owner(seam, module), seam.attribute)
            if seam.fits(attribute):
                patched[seam] = seam.patch(attribute)
            else:
                _misfits[seam.target] = "looks different"
        except AttributeError:
            _misfits[seam.target] = "does not exist"
        except Exception as error:  # a broken method package, say: raised when adaptive is asked for
            _misfits[seam.target] = f"cannot be replaced ({type(error).__name__}: {error})"
    if len(patched) == len(seams):
        for seam, replacement in patched.items():
            setattr(_owner(seam, module), seam.attribute, replacement)
            _applied.add(seam.target)
    else:
        _log_loss([seam for seam in seams if seam not in patched])


def _owner(seam: Seam, module: ModuleType) -> ModuleType:
    """Return the module that has the seam's attribute, once ``module`` has been imported, which applies the seam."""
    if seam.module == module.__name__:
        return module
    if seam.module not in sys.modules:
        raise AttributeError(f"{module.__name__} does not import {seam.module}")
    return sys.modules[seam.module]


def _log_loss(unfit: list[Seam]) -> None:
    """Write one line to the log of what users have to do without, if the seams that do not fit say so."""
    if lost := unfit[0].without:
        log_loss(lost, first_of([f"{seam.target} {_misfits[seam.target]}" for seam in unfit]))


def seam_states(optional: bool = False) -> dict[str, str]:
    """Import every seam module, and return for each seam ``fits`` or what is wrong.

    Args:
        optional: whether to look at the seams that runs go on without, in place of all others.
    """
    broken: dict[str, str] = {}
    chosen = [seam for seam in SEAMS if seam.optional is optional]
    for name in sorted({seam.trigger for seam in chosen}):
        try:
            module = importlib.import_module(name)
        except Exception as error:  # whatever an installation that is not whole raises
            why = f"cannot be imported ({type(error).__name__}: {error})"
            broken |= {seam.target: why for seam in chosen if seam.trigger == name}
            continue
        apply_seams(module)  # a no-op where the hook was faster
    return {seam.target: broken.get(seam.target) or _misfits.get(seam.target, "fits") for seam in chosen}


def require_seams() -> None:
    """Refuse to go on unless every seam is in place, and every name is there that this plugin imports from the host.

    Raises:
        SeamError: seams do not fit, or names are missing; the message names them and the versions that are tested.
    """
    bad = {target: state for target, state in {**seam_states(), **name_states()}.items() if state != "fits"}
    if bad:
        details = "; ".join(f"{target} {state}" for target, state in bad.items())
        raise SeamError(
            f"LLaMA-Factory {host_version()} does not fit this plugin: {details}; tested with {verified_versions()}"
        )


def train_worker() -> None:
    """Run what torchrun starts for ``llamafactory-adaptive train``: the same as LLaMA-Factory's own launcher file."""
    from llamafactory.train.tuner import run_exp

    run_exp()
