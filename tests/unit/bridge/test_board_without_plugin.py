"""Settings that a board with the plugin saved, in a board without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


pytest.importorskip("gradio")
from llamafactory_adaptive.bridge.board.option_fields import option_fields
from llamafactory_adaptive.bridge.board.saved_settings import elem_id, saving


# In a process of its own, since this one has the seams: what its board makes of the file, and of its method on Start.
LOADS = """
import json, sys
from gradio import Error
from llamafactory.webui.interface import create_ui

built = create_ui()
(engine,) = {fn.fn.__self__ for fn in built.fns.values() if getattr(fn.fn, "__name__", "") == "change_lang"}
shown = engine.runner.load_args("en", "mine.yaml")
loaded = {engine.manager.get_id_by_elem(element): value for element, value in shown.items()}
kind = engine.manager.get_elem_by_id("top.finetuning_type")
try:
    refused = kind.preprocess(kind.postprocess(loaded["top.finetuning_type"]))
except Error as error:
    refused = error.message
seams = [name for name in sys.modules if name.startswith("llamafactory_adaptive.bridge")]
print(json.dumps({"loaded": loaded, "refused": refused, "seams": seams}))
"""


def test_a_board_without_the_plugin_loads_the_file_and_names_the_method_it_has_not(tmp_path):
    folder = tmp_path / "llamaboard_config"
    folder.mkdir()
    held = {elem_id(field.key): field.blank for field in option_fields()} | {elem_id("adaptive_method"): "igu"}
    host = {"top.finetuning_type": "adaptive", "top.model_name": "Custom", "train.lora_rank": 4}
    saving(lambda path, settings: Path(path).write_text(yaml.safe_dump(settings)))(
        str(folder / "mine.yaml"), {**host, **held}
    )
    environment = {**os.environ, "LLAMAFACTORY_ADAPTIVE": "0", "GRADIO_ANALYTICS_ENABLED": "False"}
    done = subprocess.run(
        [sys.executable, "-c", LOADS], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["seams"] == []
    assert {key: told["loaded"][key] for key in host} == host
    assert not any(key.startswith("adaptive.") for key in told["loaded"])
    assert told["refused"] == "Value: adaptive is not in the list of choices: ['full', 'freeze', 'lora', 'oft']"
