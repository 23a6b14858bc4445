"""Adapters and bases from strangers: one message each, nothing followed out of a folder, nothing evaluated."""

import json
import os
import re
import stat
import struct
import time
from functools import partial

import pytest
from safetensors.torch import load_file, save_file

from llamafactory_adaptive.errors import AdaptiveConfigError, AdaptiveError
from llamafactory_adaptive.export import exporter
from llamafactory_adaptive.export.faults import ExportError
from llamafactory_adaptive.export.folder_links import OutsideError, inside
from llamafactory_adaptive.export.request import ExportRequest
from llamafactory_adaptive.export.scratch import remove_left_behind
from llamafactory_adaptive.export.verify.server_rules import RULES, read_as
from llamafactory_adaptive.files import LOCK_FILE
from llamafactory_adaptive.folder_lock import locked
from llamafactory_adaptive.ranks.module_names import NamePattern, is_plain_key
from llamafactory_adaptive.reports.plaintext import plain_lines
from tests.helpers.exports import refusal
from tests.helpers.lora import edit_config, save_adapter
from tests.helpers.planting import edit_json
from tests.helpers.tiny import save_tiny


refused = partial(refusal, server="vllm", error=AdaptiveError)
EXPLODES = "((([a-z_.0-9]*)*)*)*X"


CONFIGS = [
    ({"rank_pattern": {"(": 4}}, "rank_pattern: '(' is invalid: a key must be the name of a module"),
    ({"alpha_pattern": {EXPLODES: 4}}, "expressions are not evaluated, one could run for ever"),
    ({"rank_pattern": {f"layer{i}": 4 for i in range(300)}}, "has many more patterns than the 11 modules it is for"),
    ({"rank_pattern": [1]}, "rank_pattern: [1] is invalid: it maps module names to numbers"),
    ({"rank_pattern": {"q_proj": {"a": 1}}}, "q_proj: {'a': 1} is invalid: ranks are whole numbers"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path: 3 is invalid: must be the name of a model"),
    ({"base_model_name_or_path": "x" * 5000}, "is invalid: must be the name of a model"),
    ({"base_model_name_or_path": "x\0y"}, "is invalid: must be the name of a model"),
    ({"modules_to_save": "lm_head"}, "modules_to_save: 'lm_head' is invalid: must be a list of module names"),
    ({"modules_to_save": 3}, "modules_to_save: 3 is invalid"),
    ({"modules_to_save": [EXPLODES]}, "must be a list of module names"),
    ({"task_type": "NONSENSE"}, "task_type: 'NONSENSE' is invalid: only adapters of causal language models"),
    ({"task_type": ["CAUSAL_LM"]}, "task_type: ['CAUSAL_LM'] is invalid"),
    ({"target_modules": {"a": 1}}, "target_modules: {'a': 1} is invalid"),
    ({"r": True}, "r: True is invalid"),
    ({"r": 8.0}, "r: 8.0 is invalid"),
    ({"r": 10**30}, "is invalid: ranks are whole numbers from 1 on"),
    ({"lora_alpha": 10**400}, "is invalid: ranks are whole numbers"),
    ({"lora_alpha": float("nan")}, "NaN is no JSON number"),
    ({"use_rslora": "yes"}, "use_rslora: 'yes' is invalid"),
    ({"init_lora_weights": ["pissa"]}, "init_lora_weights: ['pissa'] is invalid"),
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("change", "message"), CONFIGS, ids=[str(change)[:40] for change, _ in CONFIGS])
def test_malformed_configs_are_one_message(change, message, adapter, tmp_path):
    assert message in refused(edit_config(adapter, **change), tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "[]", "{", '{"r": 1e999}'])
def test_configs_that_are_no_mapping(text, adapter, base, tmp_path):
    other = save_tiny(tmp_path / "other")
    (other / "config.json").write_text(text)
    assert "base: " in refused(adapter, tmp_path, base=str(other))
    (adapter / "adapter_config.json").write_text(text)
    assert "adapter: " in refused(adapter, tmp_path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("targets", [EXPLODES, "^(?!.*vision).*(q_proj|v_proj)$"])
def test_targets_that_are_an_expression_are_never_evaluated(targets, adapter, tmp_path):
    said = exporter.run_export(ExportRequest(edit_config(adapter, target_modules=targets), "vllm", tmp_path / "out"))
    assert "modules   passed" in said


@pytest.mark.timeout(30)
@pytest.mark.parametrize("server", RULES)
def test_a_reading_rule_evaluates_nothing(server, adapter):
    with pytest.raises(ExportError, match="a pattern whose keys are not all names of modules"):
        read_as(server, edit_config(adapter, rank_pattern={EXPLODES: 8}))


def header(document, claimed=None, rest=b""):
    text = json.dumps(document).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + rest


def entry(shape, start, end):
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


KEYS = ["base_model.model.model.layers.0.self_attn.q_proj.lora_%s.weight" % side for side in "AB"]  # noqa: UP031
DAMAGED = {
    "empty": b"",
    "truncated": header({KEYS[0]: entry([1, 2], 0, 8)}, rest=b"\0" * 4),
    "absurd header": header({}, claimed=2**62),
    "overlapping": header({KEYS[0]: entry([2], 0, 8), KEYS[1]: entry([2], 4, 12)}, rest=b"\0" * 12),
    "10^12 elements": header({KEYS[0]: entry([10**6, 10**6], 0, 4 * 10**12)}, rest=b"\0" * 16),
    "overflow": header({KEYS[0]: entry([2**40, 2**40], 0, 8)}, rest=b"\0" * 8),
    "no dimensions": header({KEYS[0]: entry([], 0, 4), KEYS[1]: entry([], 4, 8)}, rest=b"\0" * 8),
    "another type": header({KEYS[0]: {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]},
                            KEYS[1]: {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [2, 4]}}, rest=b"\0" * 4),
}  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damaged_weights_of_adapter_and_base(data, adapter, tmp_path):
    other = save_tiny(tmp_path / "other")
    (other / "model.safetensors").write_bytes(data)
    assert "base: " in refused(adapter, tmp_path, base=str(other))
    (adapter / "adapter_model.safetensors").write_bytes(data)
    assert "adapter: " in refused(adapter, tmp_path)


BASES = [
    ("config.json", {"num_hidden_layers": 10**9}, "config.json has num_hidden_layers 1000000000, there are"),
    ("config.json", {"hidden_size": "wide"}, "it is no causal language model that transformers loads"),
    ("config.json", {"num_attention_heads": 0}, "it is no causal language model that transformers loads"),
    ("tokenizer.json", {"model": 3}, "its tokenizer cannot be loaded"),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "change", "message"), BASES)
def test_bases_that_make_no_sense(name, change, message, adapter, tmp_path):
    other = save_tiny(tmp_path / "other")
    edit_json(other / name, **change)
    assert message in refused(adapter, tmp_path, base=str(other))


INDICES = [
    ({"a": "../elsewhere/x.safetensors"}, "is no name inside the folder"),
    ({"a": "/etc/hostname"}, "is no name inside the folder"),
    ({"a": 3}, "has no weight_map of file names"),
    ([], "has no weight_map of file names"),
]


@pytest.mark.parametrize(("weight_map", "message"), INDICES)
def test_an_index_names_files_of_its_folder_only(weight_map, message, adapter, tmp_path):
    other = save_tiny(tmp_path / "other")
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert message in refused(adapter, tmp_path, base=str(other))


@pytest.mark.parametrize("side", ["adapter", "base"])
@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer_config.json", "additional_chat_templates"])
def test_links_out_of_a_folder_are_refused_by_name(side, name, adapter, tmp_path):
    folder = {"adapter": adapter, "base": save_tiny(tmp_path / "other")}[side]
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.jinja").write_text("PRIVATE KEY")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "private" if "templates" in name else tmp_path / "private" / "key.jinja")
    said = refused(adapter, tmp_path, server="merged", base=str(tmp_path / "other") if side == "base" else None)
    assert f"{name} is a link that leads out of the folder" in said


def test_pipes_are_not_waited_for(adapter, tmp_path):
    os.mkfifo(adapter / "tokenizer.json")
    assert "tokenizer.json is no ordinary file" in refused(adapter, tmp_path)


def test_the_hub_cache_is_read_through_its_links(base, tmp_path):
    entry_ = tmp_path / "models--me--tiny"
    snapshot = entry_ / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    (entry_ / "blobs").mkdir()
    for number, path in enumerate(sorted(base.iterdir())):
        blob = entry_ / "blobs" / f"{number:040x}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    adapter = save_adapter(base, tmp_path / "adapter")
    (adapter / "link.txt").symlink_to("adapter_config.json")  # stays inside
    exporter.run_export(ExportRequest(adapter, "merged", tmp_path / "out", base=str(snapshot)))
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    (entry_ / "notes").write_text("x")
    (snapshot / "vocab.txt").symlink_to("../../notes")
    with pytest.raises(OutsideError, match=r"vocab\.txt is a link that leads out"):
        inside(snapshot, "vocab.txt")
    (snapshot / "merges.txt").symlink_to(tmp_path / ("cd" * 20))
    with pytest.raises(OutsideError):
        inside(snapshot, "merges.txt")


@pytest.mark.parametrize("name", ["", "/x", "../x", "a/../../x", "a\\b", "a\0b"])
def test_names_that_leave_a_folder(name, tmp_path):
    with pytest.raises(OutsideError, match="is no name inside the folder"):
        inside(tmp_path, name)


def test_a_folder_that_is_called_like_a_tokenizer_is_passed_over(adapter, base, tmp_path):
    for path in base.glob("tokenizer*"):
        (adapter / path.name).write_bytes(path.read_bytes())
    (adapter / "tokenizer.model").mkdir()
    exporter.run_export(ExportRequest(adapter, "merged", tmp_path / "out"))
    assert not (tmp_path / "out" / "tokenizer.model").exists()


def test_a_link_as_output_is_refused_before_the_work(adapter, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(AdaptiveConfigError, match="it is a link, nothing was overwritten"):
        exporter.run_export(ExportRequest(adapter, "vllm", tmp_path / "link"))


def test_weights_under_other_names_send_to_the_other_command(adapter, tmp_path):
    other = save_tiny(tmp_path / "other")
    path = other / "model.safetensors"
    save_file({f"model.{name}": t for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    assert "is saved there under another name" in (said := refused(adapter, tmp_path, base=str(other)))
    assert "try `llamafactory-cli export`" in said


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_exported_files_have_the_mode_of_any_new_file(mask, adapter, tmp_path):
    before = os.umask(mask)
    try:
        exporter.run_export(ExportRequest(adapter, "vllm", tmp_path / "out"))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o666 & ~mask}


def test_what_killed_exports_left_goes_and_what_is_in_use_stays(tmp_path):
    out, names = tmp_path / "out", [f".out.{letter * 32}.tmp" for letter in "abcde"]
    for name in [*names, ".other." + "f" * 32 + ".tmp"]:
        (tmp_path / name).mkdir()
    for name in names[:2]:
        (tmp_path / name / LOCK_FILE).touch()
    old = time.time() - 7200
    os.utime(tmp_path / names[2], (old, old))
    with locked(tmp_path / names[1], 0):
        remove_left_behind(out)
    # a: its process has ended; b: in use; c: old and never locked; d, e: perhaps about to be locked
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [names[1], *names[3:], ".other." + "f" * 32 + ".tmp"]
    )


def test_an_export_that_came_second_leaves_the_first(adapter, tmp_path, monkeypatch):
    honest = exporter.certify

    def meanwhile(export, folder):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "first").touch()
        return honest(export, folder)

    monkeypatch.setattr(exporter, "certify", meanwhile)
    with pytest.raises(ExportError, match="has come into being meanwhile"):
        exporter.run_export(ExportRequest(adapter, "vllm", tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first"]


NAMES = ["model.layers.1.q_proj", "model.layers.11.q_proj", "model.layers.1.v_proj", "q_proj", "my_q_proj"]
KEYS_TO_TRY = ["q_proj", "layers.1.q_proj", "^model.layers.1.q_proj", "1.q_proj", r"layers\.11\.q_proj", "v_proj$"]


def test_plain_keys_mean_what_they_mean_to_peft():
    for first in KEYS_TO_TRY:
        for second in KEYS_TO_TRY:
            for name in NAMES:
                keys = [first, second]
                assert all(map(is_plain_key, keys))
                by_peft = next((key for key in keys if re.match(rf"(.*\.)?({key})$", name)), None)
                assert NamePattern(keys).key_of(name) == by_peft


def test_messages_show_what_does_not_print():
    assert plain_lines("a\x1b[2J\nb\u202ec") == "a\\x1b[2J\nb\\u202ec"
