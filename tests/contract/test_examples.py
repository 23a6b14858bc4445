"""Every example is parsed by the program it is for, and every command of their README names a file."""

import json
import re
import runpy
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from transformers import HfArgumentParser

from llamafactory_adaptive import _bootstrap


_bootstrap.install()
from llamafactory.hparams import parser as host  # noqa: E402

from llamafactory_adaptive.bridge.validation import parse_config  # noqa: E402
from tests.helpers.data_tables import write_data_table  # noqa: E402


ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
README = (EXAMPLES / "README.md").read_text()


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def prepared_data(tmp_path_factory):
    """The tables of `examples/data` and of the demo in one folder, with the files their scripts write."""
    folder = tmp_path_factory.mktemp("prepared")
    sys.path.insert(0, str(EXAMPLES / "demo"))
    import word_problems

    word_problems.write(folder, train=3, held_out=2, seed=1)
    tables = (json.loads((each / "dataset_info.json").read_text()) for each in (folder, EXAMPLES / "data"))
    return write_data_table(folder, next(tables) | next(tables))


def names(folder):
    return sorted((EXAMPLES / folder).glob("*.yaml"))


@pytest.mark.parametrize("path", names("train_adaptive"), ids=lambda p: p.stem)
def test_training_examples_are_valid_and_complete(path, prepared_data):
    args = yaml.safe_load(path.read_text())
    given_dir = args["dataset_dir"]
    args["dataset_dir"] = str(prepared_data)
    config = parse_config(args)
    assert args["finetuning_type"] == "adaptive"
    assert config.lora_rank == args["lora_rank"]
    HfArgumentParser(host._TRAIN_ARGS[3]).parse_dict(args, allow_extra_keys=True)
    for key in ("deepspeed",):
        if key in args:
            json.loads(Path(args[key]).read_text())
    if given_dir == "examples/data":
        assert args["dataset"] in json.loads((EXAMPLES / "data" / "dataset_info.json").read_text())
    from llamafactory.data.template import TEMPLATES

    assert args["template"] in TEMPLATES
    assert not args.get("trust_remote_code")


@pytest.mark.parametrize(
    "path", names("merge_adaptive") + names("inference"), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_merge_and_inference_examples_parse_and_follow_a_training_example(path):
    args = yaml.safe_load(path.read_text())
    model_args, _, finetuning_args, *_ = HfArgumentParser(host._INFER_ARGS).parse_dict(args)
    assert finetuning_args.finetuning_type == "lora"
    assert model_args.quantization_bit is None
    trained = {yaml.safe_load(p.read_text())["output_dir"]: yaml.safe_load(p.read_text())
               for p in names("train_adaptive")}  # fmt: skip
    source = trained[args["adapter_name_or_path"]]
    assert source["model_name_or_path"] == args["model_name_or_path"]
    assert source["template"] == args["template"]


@pytest.mark.parametrize("path", names("accelerate"), ids=lambda p: p.stem)
def test_fsdp_examples_are_read_by_accelerate_and_save_whole_adapters(path, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file

    from llamafactory_adaptive.config.fsdp_settings import fsdp_version
    from llamafactory_adaptive.config.host_conflicts import check_conflicts

    config = load_config_from_file(str(path))
    version = 1 if "fsdp1" in path.stem else 2
    assert (config.distributed_type.value, config.fsdp_config["fsdp_version"]) == ("FSDP", version)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in config.fsdp_config.items():
        monkeypatch.setenv(name.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    bits = 4 if "qlora" in path.stem else None
    assert check_conflicts({"quantization_bit": bits}) == []
    assert fsdp_version({}) == version


def test_every_yaml_is_in_the_readme_and_every_command_names_a_file():
    named = set(re.findall(r"examples/[\w/.]+\.(?:yaml|py)", README))
    assert all((ROOT / name).is_file() for name in named), named
    folders = ("train_adaptive", "merge_adaptive", "inference", "papers", "accelerate")
    listed = {f"examples/{path.relative_to(EXAMPLES)}" for folder in folders for path in names(folder)}
    assert listed <= named


def test_the_serving_page_pins_what_was_tested_and_serves_the_base_of_the_demo():
    page = (EXAMPLES / "inference" / "README.md").read_text()
    pinned = set(re.findall(r"\bvllm(?:-cpu)?==[\d.]+", page))
    for kind in ("cpu", "cuda"):
        assert pinned & set((ROOT / "eval" / f"requirements-{kind}.txt").read_text().split())
    installs = re.findall(r"pip install .*\bvllm.*", page)
    assert len(installs) == 2
    assert all("==" in line and "--torch-backend" in line for line in installs)
    served = re.findall(r"--model (\S+)", page)
    assert served == ["served/problems-merged", '"$BASE"']
    assert 'BASE="$(python examples/demo/smollm2.py)"' in page  # what examples/demo/run.py trains on


class Completions(BaseHTTPRequestHandler):
    """As much of an OpenAI-compatible server as the client example asks for."""

    def answer(self, code, document):
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    def do_GET(self):
        self.answer(200, {"object": "list", "data": [{"id": "problems", "object": "model"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["model"] != "problems":
            self.answer(404, {"error": {"message": "no such model"}})
            return
        message = {"role": "assistant", "content": asked["messages"][0]["content"].upper()}
        self.answer(200, {"object": "chat.completion", "choices": [{"index": 0, "message": message}]})

    def log_message(self, *words):
        pass


def test_the_client_asks_lists_and_says_what_is_wrong(monkeypatch, capsys):
    pytest.importorskip("openai")
    server = HTTPServer(("127.0.0.1", 0), Completions)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"

    def client(*words):
        monkeypatch.setattr(sys, "argv", ["client.py", "--base-url", url, *words])
        runpy.run_path(str(EXAMPLES / "inference" / "client.py"), run_name="__main__")
        return capsys.readouterr().out.strip()

    assert client() == "problems"
    assert client("problems", "how many?") == "HOW MANY?"
    with pytest.raises(SystemExit, match="the server does not know other"):
        client("other", "how many?")
    server.shutdown()
    server.server_close()
    with pytest.raises(SystemExit, match="no server answers at http"):
        client()


def test_word_problems_are_right_and_splits_are_disjoint(tmp_path):
    sys.path.insert(0, str(EXAMPLES / "demo"))
    import word_problems

    word_problems.write(tmp_path, train=200, held_out=40, seed=3)
    rows = [json.loads(line) for f in sorted(tmp_path.glob("*.jsonl")) for line in f.read_text().splitlines()]
    assert len({row["instruction"] for row in rows}) == 240
    for row in rows:
        for left, right in re.findall(r"(\d+ [-+*/] \d+) = \$?(\d+)", row["output"]):
            assert eval(left) == int(right)
        assert row["output"].split()[-1].isdigit()
    assert word_problems.generate(5, 9) == word_problems.generate(5, 9)
