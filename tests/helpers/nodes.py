"""Nodes of one job that share no folder, each of one process: a home, a cache and an ``output_dir`` of their own."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from llamafactory_adaptive import files
from tests.helpers.workers import of_node


CHOSEN = "out/checkpoint-3"


def make_nodes(folder: Path) -> Path:
    for rank in range(2):
        (folder / f"node{rank}" / "out").mkdir(parents=True)
    return folder


def stand_on_node(rank: int, root: Path) -> None:
    """Be the only process of a node: its folder is home and working directory, and holds its cache."""
    node = root / f"node{rank}"
    os.environ.update(of_node(node))
    os.chdir(node)


def save_checkpoint(node: Path, step: int = 3) -> Path:
    """As much of a sealed checkpoint as is looked at before a model is loaded."""
    folder = node / "out" / f"checkpoint-{step}"
    folder.mkdir()
    (folder / files.PLAN_FILE).write_text("{}")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    save_file({"w": torch.ones(4)}, folder / "adapter_model.safetensors")
    files.write_digests(folder)
    return folder
