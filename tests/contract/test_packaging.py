"""What a wheel brings, and the examples that `init` copies."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import yaml

from llamafactory_adaptive import __version__
from llamafactory_adaptive.cli import app as cli


ROOT = Path(__file__).resolve().parents[2]


def test_a_wheel_brings_the_start_up_file_the_examples_and_the_harness(tmp_path):
    """Built without isolation, so that no network is needed."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "demo_output", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, source, ignore=ignore)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read("llamafactory_adaptive_hook.pth").startswith(b"import sys; exec(")
    assert {"llamafactory_adaptive/methods/sensitivity.py", "llamafactory_adaptive/py.typed"} <= set(names)
    assert "llamafactory_adaptive/reports/templates/report.html.j2" in names
    assert "llamafactory_adaptive/bridge/board/labels.toml" in names
    for shared in ("examples/README.md", "eval/README.md", "eval/run.py", "eval/tasks/lm_eval/boolq.yaml"):
        assert any(name.endswith(f"share/llamafactory-adaptive/{shared}") for name in names), shared


def test_one_version_stands_in_the_package_the_citation_and_the_changes():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest[1] == __version__


def test_init_copies_examples_whose_paths_hold(tmp_path, monkeypatch, capsys):
    assert cli.main(["init", str(tmp_path)]) == 0
    monkeypatch.chdir(tmp_path)
    for path in Path("examples/train_adaptive").glob("*_ds*.yaml"):
        args = yaml.safe_load(path.read_text())
        assert json.loads(Path(args["deepspeed"]).read_text())["zero_optimization"]
        assert (Path(args["dataset_dir"]) / "dataset_info.json").is_file()
    assert cli.main(["init", str(tmp_path)]) == 2
    assert "nothing was overwritten" in capsys.readouterr().err


@contextmanager
def without_rights():
    """Within the context the superuser, whom no permission stops, is somebody else."""
    before = os.geteuid()
    try:
        if before == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(before)


@contextmanager
def file_limit(size):
    """Within the context no file can grow beyond ``size`` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("target", "condition", "why"),
    [
        ("file", nullcontext(), "Not a directory"),
        ("file/below", nullcontext(), "Not a directory"),
        ("closed", without_rights(), "Permission denied"),
        ("open", file_limit(1000), "File too large"),
    ],
    ids=["a file", "below a file", "no rights", "no room"],
)
def test_init_says_in_one_line_why_it_cannot_copy_and_leaves_nothing(target, condition, why, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir()
    (tmp_path / "closed").mkdir(mode=0o500)
    with condition:
        code = cli.main(["init", str(tmp_path / target)])
    said = capsys.readouterr().err
    assert code == 2
    assert len(said.splitlines()) == 1
    assert re.search(
        rf"error: {re.escape(str(tmp_path / target / 'examples'))} cannot be written \((\[Errno \d+\] )?{why}", said
    )
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["closed", "file", "open"]


def test_init_leaves_a_link_alone(tmp_path, capsys):
    (tmp_path / "examples").symlink_to(tmp_path / "nowhere")
    assert cli.main(["init", str(tmp_path)]) == 2
    assert "it exists already, nothing was overwritten" in capsys.readouterr().err
    assert (tmp_path / "examples").is_symlink()


@pytest.mark.parametrize("words", [["plan", "a.yaml", "--out", "x", "lora_rank=2"], ["plan", "a.yaml", "lora_rank=2",
                                                                                 "--out", "x"]])  # fmt: skip
def test_overrides_stand_on_either_side_of_options(words):
    arguments = cli.parse_command_line(words)
    assert (arguments.config, arguments.overrides, arguments.out) == (Path("a.yaml"), ["lora_rank=2"], Path("x"))


def test_stray_words_are_usage_errors(capsys):
    with pytest.raises(SystemExit):
        cli.parse_command_line(["plan", "a.yaml", "--nope"])
    assert "unrecognised: --nope; overrides are written key=value" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.parse_command_line(["plan", "a.yaml", "lora_rank", "16"])
    assert "lora_rank 16: overrides are written key=value, e.g. lora_rank=16" in capsys.readouterr().err
