"""Random tiny checkpoints in transformers' classes, the same weights for our executor, and a driver for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from aphrodite.models.spec import ModelSpec, RotarySpec
from aphrodite.quantization.types import QuantType, RawTensor
from aphrodite.runner.inputs import ForwardInputs
from aphrodite.runner.torch_executor import TorchExecutor

BLOCK_SIZE = 16
CANONICAL = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    **{f"self_attn.{x}_proj": x for x in "qkvo"},
    **{f"mlp.{x}_proj": x for x in ("gate", "up", "down")},
}


def tiny_model(model_class: Any, config_class: Any, **options: Any) -> Any:
    """A float32 model whose random weights are large enough for sharp attention and varied logits."""
    sizes: dict[str, Any] = {
        "vocab_size": 211,
        "hidden_size": 72,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "attn_implementation": "eager",
    }
    torch.manual_seed(5)
    model = model_class(config_class(**{**sizes, **options})).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def spec_of(model: Any) -> ModelSpec:
    config = model.config
    rope = dict(config.rope_parameters)
    kind = rope["rope_type"]
    window = getattr(config, "sliding_window", None)
    names = {"factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"}
    rotary = RotarySpec(
        dim=config.head_dim,
        theta=rope["rope_theta"],
        scaling="none" if kind == "default" else kind,
        original_max_position=rope.get("original_max_position_embeddings") or config.max_position_embeddings,
        **{name: value for name, value in rope.items() if name in names and value is not None},
    )
    state = model.state_dict()
    return ModelSpec(
        family=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        norm_eps=config.rms_norm_eps,
        max_position=config.max_position_embeddings,
        rotary=rotary,
        windows=(window,) * config.num_hidden_layers,
        activation="gelu_tanh" if config.hidden_act == "gelu_pytorch_tanh" else "silu",
        tied_head=config.tie_word_embeddings,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in state,
        output_bias="model.layers.0.self_attn.o_proj.bias" in state,
        mlp_bias="model.layers.0.mlp.up_proj.bias" in state,
    )


def raw_f32(name: str, values: np.ndarray) -> RawTensor:
    values = np.ascontiguousarray(values, dtype="<f4")
    return RawTensor(name, values.shape, QuantType.F32, values.reshape(-1, values.shape[-1]).view(np.uint8))


def weights_of(model: Any) -> dict[str, RawTensor]:
    weights = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        canonical = CANONICAL.get(name)
        if canonical is None:
            _, _, layer, *middle, kind = name.split(".")
            canonical = f"layers.{layer}.{PARTS['.'.join(middle)]}.{kind}"
        weights[canonical] = raw_f32(name, value.numpy())
    return weights


def executor_of(
    spec: ModelSpec,
    weights: Mapping[str, RawTensor],
    *,
    max_model_len: int = 512,
    num_blocks: int = 200,
    dtype: torch.dtype = torch.float32,
) -> TorchExecutor:
    executor = TorchExecutor(
        spec, weights, block_size=BLOCK_SIZE, max_model_len=max_model_len, dtype=dtype, device=torch.device("cpu")
    )
    executor.allocate_kv_cache(num_blocks)
    return executor


class Request:
    """Tokens of one request, how many are computed, and its scattered blocks."""

    def __init__(self, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self.blocks = list(blocks)
        self.computed = 0


class Driver:
    """Feeds an executor with steps and hands out blocks in random order."""

    def __init__(self, executor: TorchExecutor, num_blocks: int = 200, seed: int = 0) -> None:
        self.executor = executor
        self._free = np.random.default_rng(seed).permutation(num_blocks).tolist()

    def add(self, tokens: Sequence[int], capacity: int | None = None) -> Request:
        count = -(-(capacity or len(tokens)) // BLOCK_SIZE)
        return Request(tokens, [self._free.pop() for _ in range(count)])

    def step(self, work: Sequence[tuple[Request, int]]) -> list[torch.Tensor]:
        """Compute the next `count` tokens of each sequence: logits `[count, vocab]` of every one."""
        logits = self.executor.forward(self.inputs(work))
        return list(logits.clone().split([count for _, count in work]))

    def inputs(self, work: Sequence[tuple[Request, int]]) -> ForwardInputs:
        """One step's inputs, wanting logits of every token; the sequences move on."""
        ids, positions, slots, starts, contexts = [], [], [], [0], []
        for sequence, count in work:
            where = range(sequence.computed, sequence.computed + count)
            ids += [sequence.tokens[p] for p in where]
            positions += where
            slots += [sequence.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in where]
            sequence.computed += count
            starts.append(len(ids))
            contexts.append(sequence.computed)
        # Entries beyond a sequence's blocks are garbage on purpose.
        tables = torch.full((len(work), max(len(s.blocks) for s, _ in work) + 3), -7, dtype=torch.int32)
        for row, (sequence, _) in enumerate(work):
            tables[row, : len(sequence.blocks)] = torch.tensor(sequence.blocks)
        return ForwardInputs(
            token_ids=torch.tensor(ids, dtype=torch.int32),
            positions=torch.tensor(positions, dtype=torch.int32),
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=tables,
            logits_index=torch.arange(len(ids), dtype=torch.int32),
        )


def prompts(vocab_size: int, lengths: Sequence[int] = (5, 61, 300), seed: int = 1) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab_size, length).tolist() for length in lengths]
