"""``llamafactory-adaptive compare``: does it pay, on the user's own data."""

import argparse
import sys

from llamafactory_adaptive.cli.host import require_enabled
from llamafactory_adaptive.reports.plaintext import tell


def compare(arguments: argparse.Namespace) -> int:
    """Run all arms at their own best learning rates, and write what came of it."""
    require_enabled()
    tell(f"comparing ways to train {arguments.config}; LLaMA-Factory starts first, which takes 10 to 30 seconds")
    from llamafactory_adaptive.bridge.arguments import check_config_file, command_line_settings
    from llamafactory_adaptive.bridge.comparison import Comparison
    from llamafactory_adaptive.bridge.host_check import check_folder
    from llamafactory_adaptive.bridge.seams import require_seams
    from llamafactory_adaptive.comparison.arms import choose_arms
    from llamafactory_adaptive.comparison.pages import sentences, text_table, write_pages
    from llamafactory_adaptive.comparison.request import design_of, devices_of, effect_of
    from llamafactory_adaptive.folder_lock import locked

    require_seams()
    check_config_file(arguments.config)
    sys.argv = ["llamafactory-adaptive", str(arguments.config), *arguments.overrides]
    given = command_line_settings()
    assert isinstance(given, dict)
    design, effect = design_of(arguments, given.get("learning_rate")), effect_of(arguments.effect)
    names = [name.strip() for name in arguments.arms.split(",") if name.strip()]
    arms, devices = choose_arms(names, arguments.arm, given), devices_of(arguments.devices)
    check_folder("--out", arguments.out)
    comparison = Comparison(given, arms, design, arguments.out, arguments.held_out)
    comparison.check()
    tell(f"{len(arms)} arms, {design.fewest_runs(len(arms))} runs: {', '.join(arm.name for arm in arms)}")
    if arguments.dry_run:
        return 0
    with locked(arguments.out):
        progress = comparison.run(devices, tell)
        document = comparison.document(progress, effect, " ".join(["llamafactory-adaptive", *arguments.words]))
        files = write_pages(document, arguments.out)
    print("\n".join([*text_table(document), "", *sentences(document), "", *(f"written: {path}" for path in files)]))
    return 0
