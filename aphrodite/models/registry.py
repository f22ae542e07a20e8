"""Which family a checkpoint belongs to."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from aphrodite.errors import UnknownArchitectureError
from aphrodite.loading.config_reader import ConfigReader
from aphrodite.models.families.cohere import COHERE, COHERE2
from aphrodite.models.families.common import Family
from aphrodite.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE_LITE, MISTRAL4
from aphrodite.models.families.gemma2 import GEMMA2
from aphrodite.models.families.gemma3 import GEMMA3
from aphrodite.models.families.glm4 import GLM, GLM4
from aphrodite.models.families.glm4_moe import GLM4_MOE
from aphrodite.models.families.gpt_oss import GPT_OSS
from aphrodite.models.families.granite import GRANITE, GRANITE_HYBRID, GRANITE_MOE
from aphrodite.models.families.internlm2 import INTERNLM2
from aphrodite.models.families.llama import LLAMA
from aphrodite.models.families.mistral import MINISTRAL3, MISTRAL
from aphrodite.models.families.mixtral import MIXTRAL
from aphrodite.models.families.olmo2 import OLMO2, OLMO3
from aphrodite.models.families.olmoe import OLMOE
from aphrodite.models.families.phi3 import PHI3
from aphrodite.models.families.qwen2 import QWEN2
from aphrodite.models.families.qwen3 import QWEN3
from aphrodite.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from aphrodite.models.families.seed_oss import SEED_OSS
from aphrodite.models.families.smollm3 import SMOLLM3
from aphrodite.models.families.stablelm import STABLELM

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    MINISTRAL3,
    MISTRAL4,
    MIXTRAL,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    GEMMA2,
    GEMMA3,
    PHI3,
    COHERE,
    COHERE2,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GLM,
    GLM4,
    GLM4_MOE,
    GLM4_MOE_LITE,
    GPT_OSS,
    GRANITE,
    GRANITE_MOE,
    GRANITE_HYBRID,
    INTERNLM2,
    OLMO2,
    OLMO3,
    OLMOE,
    SEED_OSS,
    SMOLLM3,
    STABLELM,
)


def family_of_config(config: ConfigReader) -> Family:
    """The family that a config.json's `architectures` names, or its `model_type` where there are none.

    Models that see images may have text models of several families, which the text model's `model_type` tells apart.
    What is saved without an output head, as embedding models are, says `XModel` for `XForCausalLM`.

    Raises:
        UnknownArchitectureError: none is supported; the message lists those that are.
    """
    found = config.strings("architectures")
    for family in FAMILIES:
        if any(name in family.architectures for name in found):
            return family
        if any(name in family.wrapped_by for name in found):
            return _family_of_text(config, family)
    if not _sees_both_ways(config):
        whole = {name.removesuffix("Model") + "ForCausalLM" for name in found if name.endswith("Model")}
        bare = next((family for family in FAMILIES if not whole.isdisjoint(family.architectures)), None)
        if bare is not None:
            return bare
    if not found:
        found = [config.read("model_type", str, "")]
        family_of_type = family_named(found[0])
        if family_of_type is not None:
            return family_of_type
    known = [name for family in FAMILIES for name in family.architectures + family.wrapped_by]
    raise _unsupported(config.source, ", ".join(found), known)


def _family_of_text(config: ConfigReader, usual: Family) -> Family:
    """The family of the text part of a model that also sees images."""
    kind = (config.section("text_config") or config).read("model_type", str, "")
    own = config.read("model_type", str, "")
    found = family_named(kind)
    if found is None and kind not in ("", own, f"{own}_text"):
        known = [family.name for family in FAMILIES]
        raise _unsupported(config.source, f"{', '.join(config.strings('architectures'))} with {kind}", known)
    return found or usual


def _sees_both_ways(config: ConfigReader) -> bool:
    """Whether tokens attend to those behind them, as in some embedding models."""
    return config.is_set("use_bidirectional_attention") or not config.read("is_causal", bool, True)


def family_named(model_type: str) -> Family | None:
    """The family with this `name`, which is a config.json's `model_type` and a spec's `family`."""
    return next((family for family in FAMILIES if family.name == model_type), None)


def text_config(config: ConfigReader) -> ConfigReader:
    """What of a config.json describes the decoder: all, or `text_config` where the model also sees images.

    Raises:
        ModelFormatError: `text_config` is missing there.
    """
    if not is_wrapped(config):
        return config
    section = config.section("text_config")
    if section is not None:
        return section.with_defaults(family_of_config(config).text_defaults)
    if not config.has("hidden_size"):  # Qwen 2 VL's first files describe the text model beside the rest
        raise config.wrong("text_config", "an object (the text model)", None)
    return config


def is_wrapped(config: ConfigReader) -> bool:
    """Whether the model is a text model inside one that also sees images."""
    wrappers = {name for family in FAMILIES for name in family.wrapped_by}
    return not wrappers.isdisjoint(config.strings("architectures"))


def family_of_gguf(metadata: ConfigReader) -> Family:
    """The family that GGUF metadata's `general.architecture` names.

    Raises:
        UnknownArchitectureError: it is not supported; the message lists those that are.
    """
    found = metadata.read("general.architecture", str)
    for family in FAMILIES:
        if found == family.gguf_architecture or found in family.gguf_wrapped_by:
            return family
    if found == "clip":
        raise UnknownArchitectureError(
            f"{metadata.source}: this is only the part of a model that sees images, which is not served; "
            "name the GGUF file of its text model"
        )
    known = sorted(
        {name for family in FAMILIES for name in (family.gguf_architecture, *family.gguf_wrapped_by) if name}
    )
    raise UnknownArchitectureError(
        f"{metadata.source}: the architecture is {found[:200]!r}, which is not supported in GGUF files; supported: "
        f"{', '.join(known)}. A safetensors version of the model may run through transformers"
    )


def _unsupported(source: str, found: str, known: Iterable[str]) -> UnknownArchitectureError:
    known = sorted(set(known))
    shown = repr(found[:200]) if found else "not named"
    close = difflib.get_close_matches(found, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return UnknownArchitectureError(
        f"{source}: the architecture is {shown}, which is not supported{hint}; supported: {', '.join(known)}"
    )
