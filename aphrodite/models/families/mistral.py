"""Mistral (arXiv 2310.06825): Llama's decoder with a sliding window. Its GGUF files say "llama"."""

from __future__ import annotations

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.models.families.common import Family, decoder_from_config, layer_count
from aphrodite.models.families.llama import LLAMA
from aphrodite.models.spec import ModelSpec

_DEFAULT_WINDOW = 4096  # what transformers assumes when the key is absent; null means none


def _from_config(config: ConfigReader) -> ModelSpec:
    window = config.read("sliding_window", int, None, low=1)
    if not config.has("sliding_window"):
        window = _DEFAULT_WINDOW
    return decoder_from_config(config, family="mistral", windows=(window,) * layer_count(config))


MISTRAL = Family(
    name="mistral",
    title="Mistral 7B, Nemo, Small, Large; Ministral 8B",
    architectures=("MistralForCausalLM",),
    wrapped_by=("Mistral3ForConditionalGeneration",),
    from_config=_from_config,
    from_gguf=LLAMA.from_gguf,
)
