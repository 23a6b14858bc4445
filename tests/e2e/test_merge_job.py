"""An adapter that no server takes beside its base, merged for the tasks of a comparison."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from llamafactory_adaptive.bridge.comparison_jobs import decode_job, encode_job
from llamafactory_adaptive.bridge.merge_job import MergeJob


pytestmark = pytest.mark.slow


def test_a_merged_model_answers_as_the_adapter_does_and_has_its_tokenizer(yaml_settings, tiny_llama, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(tmp_path / "dora")
    (tmp_path / "dora" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    target = tmp_path / "merged"
    job = MergeJob(
        {**yaml_settings, "quantization_bit": 4}, str(tmp_path / "dora"), str(tmp_path / "dora"), str(target)
    )
    assert decode_job(encode_job(job)).run() == {"folder": str(target)}
    base, merged = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tiny_llama, target))
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        plain = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "dora")).eval()(tokens).logits
        found = merged(tokens).logits
    assert (plain - adapted).abs().max() > 0.05
    torch.testing.assert_close(found, adapted, atol=2e-2, rtol=2e-2)
    assert (target / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert (target / "tokenizer_config.json").is_file()
