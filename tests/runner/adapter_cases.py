"""Adapters that PEFT saved for tiny models of transformers, and PEFT's own logits."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import peft
import torch

from aphrodite.loading.lora import Adapter, read_adapter
from aphrodite.models.spec import ModelSpec


def add_adapter(model: Any, name: str, seed: int, *, size: float = 0.4, **config: Any) -> Any:
    """`model` of transformers, or one that PEFT has wrapped already, with another adapter of random matrices."""
    options: dict[str, Any] = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear", **config}
    lora = peft.LoraConfig(**options)
    if not isinstance(model, peft.PeftModel):
        model = peft.get_peft_model(model, lora, adapter_name=name)
    else:
        model.add_adapter(name, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key and ".lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size / parameter.shape[1] ** 0.5)
    return model.eval()


def saved_adapter(model: Any, name: str, folder: Path) -> Path:
    """The folder in which PEFT saved the adapter `name`."""
    model.save_pretrained(folder, selected_adapters=[name])
    return folder / name if name != "default" else folder


def read_back(model: Any, name: str, spec: ModelSpec) -> Adapter:
    """The adapter as it is read from what PEFT saved."""
    with tempfile.TemporaryDirectory() as directory:
        return read_adapter(saved_adapter(model, name, Path(directory)), spec).copied()


def peft_logits(model: Any, name: str | None, tokens: list[int]) -> torch.Tensor:
    """`[len(tokens), vocab]` of PEFT; None: of the model alone."""
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        if name is None:
            with model.disable_adapter():
                return model(input_ids=ids, use_cache=False).logits[0]
        model.set_adapter(name)
        return model(input_ids=ids, use_cache=False).logits[0]
