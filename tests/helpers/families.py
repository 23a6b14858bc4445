"""Tiny random models of every family of architectures that transformers has and users train."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.helpers.tiny import SIZES


_WITHOUT_HEAD = {key: value for key, value in SIZES.items() if key != "head_dim"}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16, **_EXPERTS,
}  # fmt: skip
_IMAGES = {
    "text_config": {**_WITHOUT_HEAD, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2],
                                                         "rope_theta": 1e4}},
    "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
                      "spatial_merge_size": 2, "temporal_patch_size": 2},
    "image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253,
    "tie_word_embeddings": False,
}  # fmt: skip

# Class of the model without its ending, and settings of its configuration.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "ForCausalLM", SIZES),
    "mistral": ("Mistral", "ForCausalLM", SIZES),
    "qwen2": ("Qwen2", "ForCausalLM", _WITHOUT_HEAD),
    "qwen3": ("Qwen3", "ForCausalLM", SIZES),
    "gemma": ("Gemma", "ForCausalLM", SIZES),
    "gemma2": ("Gemma2", "ForCausalLM", SIZES),
    "phi3": ("Phi3", "ForCausalLM", _WITHOUT_HEAD),
    "glm": ("Glm", "ForCausalLM", SIZES),
    "glm4": ("Glm4", "ForCausalLM", SIZES),
    "mixtral": ("Mixtral", "ForCausalLM", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", "ForCausalLM", {**SIZES, **_EXPERTS}),
    "qwen3_next": ("Qwen3Next", "ForCausalLM", {**SIZES, **_HYBRID}),
    "qwen2_vl": ("Qwen2VL", "ForConditionalGeneration", _IMAGES),
    "experts_as_modules": ("Llama", "ForCausalLM", SIZES),
}
# Their experts are held in one tensor for a whole layer.
PACKED_EXPERTS = ("mixtral", "qwen3_moe", "qwen3_next")


class ExpertModules(nn.Module):
    """Four experts, each a module of its own and called on its own tokens alone, as in older Mixtrals."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, 4, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the sum of the two likeliest experts of each token, weighted by their shares."""
        flat = hidden.flatten(0, -2)
        shares, chosen = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                out = out.index_add(0, token, expert(flat[token]) * shares[token, place, None])
        return out.view_as(hidden)


def family_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of two layers in fp32; the same at every call."""
    stem, ending, sizes = FAMILIES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{stem}Config")(**sizes)
    model = getattr(transformers, stem + ending)(config)
    if name == "experts_as_modules":
        for layer in model.model.layers:
            layer.mlp = ExpertModules(config)
    return model.float().eval()
