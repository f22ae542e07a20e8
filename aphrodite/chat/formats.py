"""The names of the formats in which models call tools and mark what they think."""

from __future__ import annotations

from typing import Literal

ToolFormat = Literal[
    "hermes", "qwen3_coder", "llama3", "mistral", "deepseek", "deepseek_v32", "glm", "glm4", "command_r", "granite",
    "gpt_oss", "kimi_k2", "lfm2", "gemma4", "functiongemma", "minimax_m2", "seed_oss", "step3", "hunyuan", "nemotron",
    "phi4_mini", "internlm", "apertus", "olmo3", "minicpm5", "gigachat3", "json",
]  # fmt: skip
ReasoningName = Literal[
    "think", "mistral", "seed", "command_r", "granite", "gemma", "harmony", "apertus", "apriel", "ernie", "hunyuan"
]
