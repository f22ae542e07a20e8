"""The page of all models (`docs/models.md`), made from the registry; `python -m aphrodite.models.docs` prints it.

A test holds the committed page against it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from aphrodite.models.families.common import Family
from aphrodite.models.registry import FAMILIES

_INTRODUCTION = """\
# Models

A checkpoint's `config.json` (or a GGUF file's metadata) names its architecture, and the architecture decides which \
family of this table reads it. A fine-tune of a model that is listed needs nothing more. What is not listed runs \
through transformers where that is installed ([below](#anything-else)); nothing in a checkpoint is ever executed.

Every family is held to [transformers](https://github.com/huggingface/transformers) by tests that make a tiny random \
checkpoint with it: logits of three prompts within 1e-4 in float32, 32 greedy tokens equal, prompts cut into chunks \
and decoded token by token equal to whole ones, and the same through a GGUF file under llama.cpp's names where it has \
the family (`tests/runner/test_families.py`; InternLM 2, which transformers does not have, is held to Llama with its \
tensors renamed).

This page is made from the registry: `python -m aphrodite.models.docs > docs/models.md`."""

_NOTES = """\
## Where they run

- **CPU, native library**: all, in the sizes that published models have. Matrices need types that it knows \
([formats](formats.md)) and multiples of 32 columns; what it declines runs on torch operations, and the log says why.
- **CPU, torch** (`--executor torch`): all.
- **GPU**: all. Norms behind a layer's parts, LayerNorm, and norms of queries and keys other than per-head RMS are \
plain torch operations there and not yet fused.

## Anything else

A safetensors model of another architecture runs through transformers' own modelling code, with this engine's paged \
attention, prefix cache, scheduler and samplers, on a CPU and on a GPU: `pip install \
'aphrodite-engine[transformers]'`. It is the slower way, which the log says: nothing is fused, nothing of a GPU's \
step is a captured graph, and the weights are held in 16 bits or 32 (quantized checkpoints are expanded). It works \
where transformers routes a model's attention through its attention interface. The model is tried without weights, \
which checks every tensor's name and shape, and before it serves, two short texts are compared with transformers' own \
attention. GPT-NeoX (Pythia), GPT-2, StarCoder 2, OPT and Phi-3.5-MoE are held to transformers by \
`tests/runner/test_foreign_models.py` as the families above are; among others that came out right when tried are \
Apertus, Arcee, ERNIE 4.5, EXAONE 4, Gemma 1, Helium, Hunyuan, Ministral, MiniMax M2, Nemotron, OLMo 1, Phi 1 and 2.

Declined with the reason: code that a checkpoint brings (remote code), encoder-decoders, state-space and recurrent \
layers (Mamba, RWKV and hybrids), ALiBi (Bloom, MPT), attention sinks, chunked and index-picked sparse attention, \
layers whose attention differs in shape, "dynamic" and LongRoPE scaling, GGUF.

## Notes

- *Scaled contexts.* "dynamic" and LongRoPE scaling are chosen once, by the longest context that is served \
(`--max-model-len`), so that a request's tokens do not depend on how its prompt was cut: a Phi-3 model with 128k \
positions uses its long factors unless it is served with its original context or less.
- *Mixtures of experts.* A token reads the weights of its own experts only, on the CPU as on a GPU, where one token's \
products run expert by expert and those of many are put together by expert, inside graphs. The router computes in \
float32, and of experts with equal scores the first is chosen. On a GPU experts stay in the type in which they are \
stored, as other matrices do ([formats](formats.md)), and `--quantization` applies to them; so they do in the native \
library of a CPU, which shares the products of all chosen experts out among its threads at once. On torch operations \
4-bit ones of GGUF's Q4_0 and Q4_1 do, others are expanded. `--cpu-offload-gb` moves whole layers, not experts.
- *GPT-OSS* has its experts in MXFP4, from safetensors and from GGUF; versions in 16 bits load, too.
- *DeepSeek's latent attention* caches one vector a position and layer (576 values, a tenth or less of what their \
heads' keys and values would take), which `models inspect` and the memory plan count. Prefix cache, prompts in chunks, \
preemption, graphs and, on a GPU, `--kv-cache-dtype fp8` work as elsewhere. Decoding attends to the vectors as they \
are; on a GPU long prompts have keys and values expanded where that is less work. The native library of a CPU attends \
to the vectors in prompts, too, so that no bit depends on how a prompt is cut; it caches them as integers of 16 bits \
with a scale for the latent and one for the part that turns (1,160 bytes a position and layer). GGUF files of all its \
models are `deepseek2`. Its kernels are tested on an H100; a DeepSeek model of full size has not been served there yet.
- *Layers that predict further tokens* (DeepSeek V3, GLM 4.5) are not used. The log says so.
- *Models that see images* are served without their vision part. The log says so. Which text model is \
inside, `text_config` tells: LLaVA, InternVL and the like come with those of several families. Others (Gemma 3n, \
Llama 3.2 Vision, Llama 4, PaliGemma, Qwen 3.5) are not served.
- *Gemma's norms* are stored less one; the sum is kept in float32 whatever the compute type."""


def models_page() -> str:
    """The whole page."""
    rows = [_cells(family) for family in sorted(FAMILIES, key=lambda family: family.title.lower())]
    table = _table(("Models", "Architecture in config.json", "Architecture in GGUF"), rows)
    return "\n\n".join([_INTRODUCTION, "## Families", table, _NOTES]) + "\n"


def _cells(family: Family) -> tuple[str, str, str]:
    architectures = ", ".join(f"`{name}`" for name in family.architectures)
    if family.wrapped_by:
        architectures += "; text part of " + ", ".join(f"`{name}`" for name in family.wrapped_by)
    gguf = f"`{family.gguf_architecture}`" if family.gguf_architecture else "–"
    if family.gguf_wrapped_by:
        gguf += "; text part of " + ", ".join(f"`{name}`" for name in family.gguf_wrapped_by)
    return family.title, architectures, gguf


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(models_page())
