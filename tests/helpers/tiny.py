"""Tiny models, a tokenizer and data made in memory: nothing is downloaded, everything trains in seconds on a CPU."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 260,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
ARCHITECTURES: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_model(architecture: str = "llama", seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A random model of two layers in fp32."""
    torch.manual_seed(seed)
    config, model = ARCHITECTURES[architecture]
    return model(config(**{**SIZES, **sizes})).float().eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus begin, end, padding and unknown."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)} | {
        "<s>": 256, "</s>": 257, "<pad>": 258, "<unk>": 259,
    }  # fmt: skip
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_tiny(folder: Path, architecture: str = "llama", **sizes: Any) -> Path:
    """A checkpoint on disk, as a user would have one."""
    tiny_model(architecture, **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0, longest: int = 24) -> list[dict[str, list[int]]]:
    """Random token rows of different lengths; the first third of each takes no loss."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        ids = [rng.randrange(256) for _ in range(rng.randint(5, longest))]
        prompt = len(ids) // 3
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def write_datasets(folder: Path) -> Path:
    """One small dataset per stage and the ``dataset_info.json`` that names them."""
    rng = random.Random(1)

    def text() -> str:
        return " ".join(rng.choice(("red", "blue", "one", "two", "sun", "sea")) for _ in range(rng.randint(2, 6)))

    plain = [{"instruction": text(), "input": "", "output": text()} for _ in range(24)]
    pairs = [{"instruction": text(), "input": "", "chosen": text(), "rejected": text()} for _ in range(24)]
    kto = [{"instruction": text(), "output": text(), "kto_tag": index % 2 == 0} for index in range(24)]
    raw = [{"text": " ".join(text() for _ in range(12))} for _ in range(24)]
    info: dict[str, Any] = {
        "tiny_sft": {"file_name": "sft.json"},
        "tiny_eval": {"file_name": "eval.json", "split": "train"},
        "tiny_lost": {"file_name": "lost.json"},
        "tiny_test_split": {"hf_hub_url": "nowhere/nothing", "split": "test"},
        "tiny_pairs": {
            "file_name": "pairs.json", "ranking": True,
            "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"},
        },
        "tiny_kto": {
            "file_name": "kto.json",
            "columns": {"prompt": "instruction", "response": "output", "kto_tag": "kto_tag"},
        },
        "tiny_raw": {"file_name": "raw.json", "columns": {"prompt": "text"}},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    files = {"sft": plain, "eval": plain[:6], "pairs": pairs, "kto": kto, "raw": raw, "dataset_info": info}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def settings(model: Path, data: Path, output: Path, **more: Any) -> dict[str, Any]:
    """An ordinary LoRA YAML for the tiny model, with ``finetuning_type`` changed to ``adaptive``."""
    return {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "adaptive",
        "lora_rank": 4,
        "dataset": "tiny_sft",
        "dataset_dir": str(data),
        "template": "default",
        "cutoff_len": 48,
        "output_dir": str(output),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1.0e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "overwrite_output_dir": True,
        "adaptive_calibration_samples": 8,
        "adaptive_calibration_batch_size": 3,
        **more,
    }


def unmeasured_settings(model: Path, data: Path, output: Path, **more: Any) -> dict[str, Any]:
    """The same for ranks drawn at random: nothing is measured."""
    plain = settings(model, data, output, adaptive_method="random", **more)
    return {key: value for key, value in plain.items() if not key.startswith("adaptive_calibration")}


def pruning_settings(model: Path, data: Path, output: Path, **more: Any) -> dict[str, Any]:
    """The same for a method that prunes during training: twelve steps, allocations at 2, 4, 6 and, final, 8."""
    plain = settings(model, data, output)
    kept = {key: value for key, value in plain.items() if not key.startswith("adaptive_calibration")}
    return {**kept, "adaptive_method": "igu", "max_steps": 12, "adaptive_interval": 2, "seed": 3, **more}


def svd_settings(model: Path, data: Path, output: Path, **more: Any) -> dict[str, Any]:
    """The same for a cut by singular values, after step 8."""
    plain = pruning_settings(model, data, output, adaptive_method="svd")
    return {**{key: value for key, value in plain.items() if key != "adaptive_interval"}, **more}


def tsq_settings(model: Path, data: Path, output: Path, **more: Any) -> dict[str, Any]:
    """The same for TsqLoRA: refreshes at 3, 6 and 9, in the middle of epochs of nine steps."""
    plain = pruning_settings(model, data, output, adaptive_method="tsq")
    kept = {key: value for key, value in plain.items() if key != "adaptive_interval"}
    temperature = {"tsq_temperature": 3.0} if more.get("tsq_sampling", True) else {}
    return {**kept, **temperature, **more}
