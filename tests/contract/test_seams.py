"""The start-up hook and the seams: there when wanted, invisible otherwise, loud when they do not fit."""

import os
import subprocess
import sys
import types

import pytest

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.bridge import seams
from llamafactory_adaptive.cli.doctor import _verdict
from llamafactory_adaptive.errors import SeamError


def python(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_hook_is_in_every_interpreter_and_can_be_switched_off():
    probe = "import sys; print(sum(type(f).__name__ == '_SeamFinder' for f in sys.meta_path))"
    assert python(probe) == "1"
    assert python(probe, LLAMAFACTORY_ADAPTIVE="0") == "0"


def test_the_hook_imports_nothing_heavy():
    loaded = python("import sys; print([m for m in sys.modules if m.split('.')[0] in "
                    "('llamafactory_adaptive', 'torch', 'llamafactory', 'typing', 'importlib.util')])")  # fmt: skip
    assert loaded == "['llamafactory_adaptive', 'llamafactory_adaptive._bootstrap']"


def test_the_hook_runs_a_few_lines_in_every_interpreter():
    """Counted, not timed: what is imported when Python starts must cost nobody anything (well under a millisecond)."""
    code = (
        "import sys\n"
        "for m in ('llamafactory_adaptive', 'llamafactory_adaptive._bootstrap'): sys.modules.pop(m)\n"
        "sys.meta_path.pop(0)\nlines, known = [], set(sys.modules)\n"
        "def trace(frame, event, argument):\n"
        "    if 'llamafactory_adaptive' in frame.f_code.co_filename and event == 'line': lines.append(1)\n"
        "    return trace\n"
        "sys.settrace(trace)\nimport llamafactory_adaptive._bootstrap\nsys.settrace(None)\n"
        "print(len(lines), sorted(set(sys.modules) - known))"
    )
    lines, _, modules = python(code).partition(" ")
    assert modules == "['llamafactory_adaptive', 'llamafactory_adaptive._bootstrap']"
    assert 10 < int(lines) < 80


def test_importing_other_packages_does_not_wake_the_bridge():
    assert python("import json, email, sys; print('llamafactory_adaptive.bridge' in sys.modules)") == "False"


def test_every_seam_fits_the_installed_version():
    assert set(seams.seam_states().values()) == {"fits"}
    seams.require_seams()


def test_seams_are_applied_once():
    from llamafactory.hparams import parser

    before = parser._TRAIN_ARGS
    seams.apply_seams(parser)
    assert parser._TRAIN_ARGS is before
    assert [c.__name__ for c in before].count("FinetuningArguments") == 1


@pytest.mark.parametrize(
    ("attributes", "state"), [({}, "does not exist"), ({"_training_function": 3, "run_exp": print}, "looks different")]
)
def test_a_seam_that_does_not_fit_changes_nothing_and_is_named_when_asked(attributes, state, monkeypatch):
    monkeypatch.setattr(seams, "_applied", set())
    monkeypatch.setattr(seams, "_misfits", {})
    module = types.ModuleType("llamafactory.train.tuner")
    vars(module).update(attributes)
    seams.apply_seams(module)
    assert vars(module).get("run_exp") is attributes.get("run_exp"), "all or none"
    assert seams._misfits["llamafactory.train.tuner._training_function"] == state
    monkeypatch.setattr(seams, "seam_states", lambda: {"fits.well": "fits", **seams._misfits})
    with pytest.raises(SeamError, match=rf"does not fit.*_training_function {state}.*tested with 0\.9\.5 \(PyPI\)"):
        seams.require_seams()


def test_a_patch_that_raises_does_not_break_a_plain_run(monkeypatch):
    monkeypatch.setattr(seams, "_applied", set())
    monkeypatch.setattr(seams, "_misfits", {})

    def broken(original):
        raise RuntimeError("entry point is broken")

    seam = seams.Seam("some.module", "name", lambda attribute: True, broken)
    monkeypatch.setattr(seams, "SEAMS", (seam,))
    module = types.ModuleType("some.module")
    module.name = "untouched"
    seams.apply_seams(module)
    assert module.name == "untouched"
    assert "entry point is broken" in seams._misfits["some.module.name"]


def test_finetuning_type_is_lora_for_upstream_and_adaptive_is_remembered():
    from llamafactory_adaptive.bridge.arguments import adaptive_finetuning_arguments

    made = adaptive_finetuning_arguments()(finetuning_type="adaptive", stage="dpo")
    assert (made.adaptive, made.finetuning_type, made.use_ref_model) == (True, "lora", True)
    assert adaptive_finetuning_arguments()().adaptive is False


def test_doctor_says_active(capsys):
    from llamafactory_adaptive.cli import main

    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "start-up hook   active" in text
    assert "seam            fits            llamafactory.model.adapter.LoraConfig" in text
    assert text.splitlines()[-1].startswith("verdict         ready: adaptive runs work")
    assert _bootstrap.active()


VERDICTS = [
    (True, {"a.b": "fits"}, True, "ready: "),
    (False, {"a.b": "fits"}, False, "llamafactory-cli lacks the hook: use `llamafactory-adaptive train`"),
    (
        True,
        {"a.b": "fits", "a.c": "looks different"},
        False,
        "adaptive runs are refused: a.c does not fit; tested with",
    ),
]


@pytest.mark.parametrize(("hooked", "states", "ready", "words"), VERDICTS, ids=["ready", "no hook", "misfit"])
def test_the_verdict_is_one_line_that_says_what_to_do(hooked, states, ready, words):
    verdict = _verdict(hooked, states)
    assert verdict[0] is ready
    assert verdict[1].startswith(words)
    assert "\n" not in verdict[1]


def test_the_verdict_where_the_plugin_is_switched_off(monkeypatch, capsys):
    from llamafactory_adaptive.cli import main

    monkeypatch.setenv("LLAMAFACTORY_ADAPTIVE", "0")
    assert main(["doctor"]) == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("verdict         switched off: ")


def test_a_host_that_cannot_be_imported_is_told_for_each_seam(tmp_path):
    (tmp_path / "llamafactory").mkdir()
    (tmp_path / "llamafactory" / "__init__.py").write_text("raise RuntimeError('half installed')")
    code = "from llamafactory_adaptive.bridge.seams import seam_states; print(set(seam_states().values()))"
    assert python(code, PYTHONPATH=str(tmp_path)) == "{'cannot be imported (RuntimeError: half installed)'}"
