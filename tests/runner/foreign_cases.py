"""Tiny random checkpoints of architectures that are not built in, saved by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {
    "vocab_size": 211,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}


class ForeignCase(NamedTuple):
    """An architecture and the options of its configuration."""

    name: str  # without Config, ForCausalLM and LMHeadModel
    options: dict[str, Any]
    head: str = "ForCausalLM"

    def config(self, **options: Any) -> Any:
        return getattr(transformers, f"{self.name}Config")(**{**self.options, **options})

    def model(self, **options: Any) -> Any:
        """A float32 model with random weights."""
        torch.manual_seed(5)
        model = getattr(transformers, self.name + self.head)(self.config(**options)).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0.0, 0.2)
        return model

    def save(self, folder: Path, **options: Any) -> Path:
        """`folder` with a checkpoint."""
        self.model(**options).save_pretrained(folder)
        return folder


GPT_NEOX = ForeignCase("GPTNeoX", SIZES)
CASES = {
    "gpt_neox": GPT_NEOX,  # parallel blocks, stacked qkv, partial rotary embedding
    "gpt2": ForeignCase(
        "GPT2", {**_GPT2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, "LMHeadModel"
    ),  # learned positions
    "starcoder2": ForeignCase("Starcoder2", {**SIZES, "num_key_value_heads": 2, "sliding_window": 40}),
    "opt": ForeignCase("OPT", {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.15}),
    "phimoe": ForeignCase(
        "Phimoe", {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),  # experts that transformers stacks
}
