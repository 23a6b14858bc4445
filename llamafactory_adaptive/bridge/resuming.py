"""The checkpoint a run resumes from: the host's choice if it is undamaged, and one for all processes."""

import logging
import socket
from pathlib import Path
from typing import Any

from llamafactory_adaptive.adapter.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llamafactory_adaptive.bridge.arguments import Args, split_names
from llamafactory_adaptive.config.deepspeed_settings import settings_of_accelerate, zero_optimization
from llamafactory_adaptive.config.fsdp_settings import fsdp_version
from llamafactory_adaptive.errors import PlanError, refuse
from llamafactory_adaptive.files import (
    LOG_FILE,
    PLAN_FILE,
    STATE_JSON,
    STATE_TENSORS,
    TRAINER_STATE,
    file_digest,
    read_lines,
    read_mapping,
)
from llamafactory_adaptive.launcher import launched_number, launched_processes, local_rank
from llamafactory_adaptive.reports.rank_history import parsed_lines
from llamafactory_adaptive.training.checkpoint_files import check_layout, damage, is_sealed


_OF_AN_EPOCH = 1e-6  # which steps do not add up to exactly

logger = logging.getLogger("llamafactory.adaptive")


def checkpoint_to_resume(args: Args) -> Path | None:
    """Choose the checkpoint that all processes resume from: rank 0 finds it, the others check that they have it.

    Raises:
        AdaptiveError: the checkpoint is missing, damaged or another one, here or elsewhere; every process raises it,
            with one text.
    """
    from llamafactory_adaptive.engines.distributed import from_main, gather

    name = from_main("the choice of a checkpoint", lambda: _name(_choose(args)))
    chosen = Path(name) if name else None
    gather("the check of the checkpoint", lambda: _confirm(args, chosen))
    confirm_weights(chosen)
    return chosen


def confirm_weights(folder: Path | None) -> None:
    """Check that every node has rank 0's adapter in a folder, which the host loads on each of them.

    Raises:
        AdaptiveError: a node has other weights there, or none; every process raises it, with one text.
    """
    from llamafactory_adaptive.engines.distributed import from_main, gather

    if folder is None or launched_processes() == 1:
        return
    expected = from_main(f"the digests in {folder}", lambda: _weight_digests(folder))
    gather(f"the check of {folder}", lambda: _confirm_digests(folder, expected))


def _confirm_digests(folder: Path, expected: dict[str, str]) -> None:
    """Compare this node's copy once, in its first process."""
    if local_rank() == 0 and _weight_digests(folder) != expected:
        raise PlanError(
            f"{folder} holds another adapter on {socket.gethostname()} than for rank 0; copy that of rank 0 there, or "
            "use a folder all nodes share"
        )


def _weight_digests(folder: Path) -> dict[str, str]:
    """Return the digests of the adapter and of a search's state, by file name."""
    return {n: file_digest(folder / n) for n in (ADAPTER_WEIGHTS, STATE_TENSORS) if (folder / n).is_file()}


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _choose(args: Args) -> Path | None:
    asked, output = args.get("resume_from_checkpoint"), Path(str(args["output_dir"]))
    if isinstance(asked, str):
        chosen: Path | None = _given(Path(asked), output)
    else:
        last = _newest_for_the_host(args)
        ours = last is not None and ((output / LOG_FILE).is_file() or (last / PLAN_FILE).is_file())
        chosen = _newest_undamaged(output) if ours else last
        if asked is True and last is None:
            reason = f"there is no checkpoint in {output}"
            refuse("resume_from_checkpoint", True, reason, "leaving it out")
    if chosen is not None:
        if not is_sealed(chosen) and (chosen / PLAN_FILE).is_file():
            logger.warning(f"{chosen} has no digests: its files are there and readable, more is not known of them")
        if advice := check_layout(chosen, layout(args)):
            logger.warning(advice)
    return chosen


def _given(asked: Path, output: Path) -> Path:
    """Return the checkpoint that the settings name; refuse a missing or damaged one."""
    if not asked.is_dir():
        refuse("resume_from_checkpoint", str(asked), "there is no such folder", f"{output}/checkpoint-<step>")
    if (asked / PLAN_FILE).is_file() and (fault := damage(asked)):
        raise PlanError(f"{asked} is damaged or was not written to its end: {fault}; resume from another checkpoint")
    return asked


def _newest_undamaged(output: Path) -> Path | None:
    """Find the newest checkpoint without a fault; warn of newer ones that have one."""
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    folders = [path for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(path) >= 0]
    passed = []
    for folder in sorted(folders, key=_step, reverse=True):
        fault = damage(folder)
        if not fault:
            break
        passed.append(f"{folder} is damaged or was not written to its end ({fault})")
    else:
        folder = None
    if passed:
        logger.warning(f"{'; '.join(passed)}; {f'resuming from {folder.name}' if folder else 'starting afresh'}")
    return folder


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _confirm(args: Args, chosen: Path | None) -> None:
    """Check that this node has rank 0's checkpoint: without a shared output_dir it may hold others, or none."""
    if launched_number() == 0:
        return
    host, remedy = socket.gethostname(), "copy the checkpoints of rank 0 there, or use a folder all nodes share"
    if chosen is None:
        mine = _newest_for_the_host(args)
        if mine is not None and (mine / PLAN_FILE).is_file() and not damage(mine):
            raise PlanError(f"{host} has {mine} to resume from and rank 0 has nothing; {remedy}, or start afresh with "
                            "overwrite_output_dir: true")  # fmt: skip
    elif not chosen.is_dir():
        raise PlanError(f"rank 0 resumes from {chosen}, which {host} does not have; {remedy}")
    elif local_rank() == 0 and (chosen / PLAN_FILE).is_file() and (fault := damage(chosen)):
        raise PlanError(f"rank 0 resumes from {chosen}, which is damaged on {host} ({fault}); {remedy}")


def _newest_for_the_host(args: Args) -> Path | None:
    """Find the checkpoint in ``output_dir`` that the host resumes from when none is named, damaged or not."""
    from transformers.trainer_utils import get_last_checkpoint

    asked, output = args.get("resume_from_checkpoint"), Path(str(args["output_dir"]))
    if asked is False or not output.is_dir() or (asked is None and args.get("overwrite_output_dir")):
        return None
    last = get_last_checkpoint(str(output))
    return Path(last) if last else None


def what_the_host_resumes(args: Args, checkpoint: Path | None) -> Args:
    """Return the settings, with the checkpoint written out where the host by itself would take another."""
    last = None if isinstance(args.get("resume_from_checkpoint"), str) else _newest_for_the_host(args)
    if last is None or checkpoint == last:
        return args
    return {**args, "resume_from_checkpoint": str(checkpoint) if checkpoint else False}


def refuse_ranks_in_plain_run(args: Args) -> None:
    """Refuse a plain run that would resume from a checkpoint of P diag(lambda) Q or masked ranks, which do not fit it.

    Raises:
        AdaptiveConfigError: the checkpoint that would be resumed from is no plain LoRA; the message names it.
    """
    asked = args.get("resume_from_checkpoint")
    if not args.get("output_dir") or not args.get("do_train"):
        return
    checkpoint = Path(asked) if isinstance(asked, str) else _newest_for_the_host(args)
    if checkpoint is not None and (checkpoint / STATE_JSON).is_file():
        kind = args.get("finetuning_type", "lora")
        reason = f"{checkpoint} is of a run that trains no plain LoRA, and would be resumed from"
        refuse("finetuning_type", kind, reason, "finetuning_type: adaptive, or another output_dir")


def refuse_finished_run(args: Args, checkpoint: Path | None) -> None:
    """Refuse an ``output_dir`` with a finished run, by the host's own rule, before anything is scored.

    Raises:
        AdaptiveConfigError: a model or adapter lies there, and the run neither resumes nor may overwrite.
    """
    from llamafactory.extras.constants import CHECKPOINT_NAMES

    output = Path(str(args["output_dir"]))
    if args.get("resume_from_checkpoint") is not None or args.get("overwrite_output_dir"):
        return
    if any((output / name).is_file() for name in CHECKPOINT_NAMES) and checkpoint is None:
        refuse("output_dir", str(output), "it holds a finished run", "overwrite_output_dir: true")


def has_ended(args: Args, checkpoint: Path | None) -> bool:
    """Tell whether the run in ``output_dir`` ended at its last step, so that the host would train nothing more.

    The host would save the same adapter again, and its own records of the training with seconds and losses of none.
    A checkpoint that is named, and an evaluation after the training, are the host's business.
    """
    output, asked = Path(str(args["output_dir"])), args.get("resume_from_checkpoint")
    if checkpoint is None or asked is not None or args.get("do_eval") or args.get("do_predict"):
        return False
    saved = all((output / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    if not saved or (is_sealed(output) and damage(output)):
        return False
    try:
        lines = parsed_lines(read_lines(output / LOG_FILE))
        state = read_mapping(checkpoint / TRAINER_STATE, TRAINER_STATE, finite=False)
        steps, epochs = float(args.get("max_steps") or -1), float(args.get("num_train_epochs") or 3.0)
        done = state["global_step"] >= steps if steps > 0 else state["epoch"] >= epochs - _OF_AN_EPOCH
    except (PlanError, KeyError, TypeError, ValueError):
        return False
    return done and bool(lines) and lines[-1].get("event") == "end"


def named_paths(args: Args) -> list[Path]:
    """List every path that the settings may name: what lies there must not be moved."""
    words = [word for value in args.values() if isinstance(value, str) for word in split_names(value)]
    return [Path(word) for word in words if word != str(args.get("output_dir")) and "\0" not in word]


def layout(args: Args) -> dict[str, Any]:
    """Describe how this run spreads weights, optimizer states and batches over processes, by its settings."""
    config = args.get("deepspeed") or settings_of_accelerate()
    zero = zero_optimization(config) if config else {}
    stage = zero.get("stage")
    return {
        "deepspeed_stage": stage,
        # Stage 3 partitions in a way of its own, whatever is set.
        "round_robin_gradients": stage in (1, 2) and bool(zero.get("round_robin_gradients", False)),
        "fsdp_version": fsdp_version(args),
        "processes": launched_processes(),
        "global_batch": launched_processes()
        * int(args.get("per_device_train_batch_size") or 8)
        * int(args.get("gradient_accumulation_steps") or 1),
    }
