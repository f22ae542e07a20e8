"""Adapters on the CPU in torch operations, against PEFT."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
import transformers
from adapter_cases import add_adapter, peft_logits, read_back
from family_cases import Case
from torch_executor_cases import BLOCK_SIZE, Driver, prompts, tiny_model

from aphrodite.layers.lora import AdapterRoom
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.runner.torch_executor import TorchExecutor

NAMES = ("attention", "everything", "rooted")


class Served:
    """A model of transformers with adapters, and an executor of it that has them in slots of the same numbers."""

    def __init__(self, model: Any, adapters: dict[str, dict[str, Any]]) -> None:
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            checkpoint = open_checkpoint(directory)
            self.executor = TorchExecutor(
                checkpoint.spec,
                checkpoint.weights,
                block_size=BLOCK_SIZE,
                max_model_len=512,
                dtype=torch.float32,
                device=torch.device("cpu"),
                adapters=AdapterRoom(len(adapters), 32),
            )
        self.executor.allocate_kv_cache(200)
        self.peft = model
        for number, (name, config) in enumerate(adapters.items()):
            self.peft = add_adapter(self.peft, name, number, **config)
        for number, name in enumerate(adapters):
            self.executor.adapters.add(number + 10, read_back(self.peft, name, checkpoint.spec))
            self.executor.adapters.place(number, number + 10)

    def logits(self, texts: list[list[int]], slots: list[int], chunk: int = 1000) -> list[torch.Tensor]:
        """Of every token of texts that are computed together, `chunk` tokens of each in a step."""
        driver = Driver(self.executor)
        requests = [driver.add(text) for text in texts]
        parts: list[list[torch.Tensor]] = [[] for _ in texts]
        while any(request.computed < len(request.tokens) for request in requests):
            live = [n for n, request in enumerate(requests) if request.computed < len(request.tokens)]
            work = [(requests[n], min(chunk, len(requests[n].tokens) - requests[n].computed)) for n in live]
            own = torch.tensor([slots[n] for n in live], dtype=torch.int32)
            inputs = driver.inputs(work)._replace(adapters=own if (own >= 0).any() else None)
            for n, logits in zip(live, self.executor.forward(inputs).split([count for _, count in work]), strict=True):
                parts[n].append(logits.clone())
        return [torch.cat(part) for part in parts]


@pytest.fixture(scope="module")
def llama() -> Served:
    model = tiny_model(transformers.LlamaForCausalLM, transformers.LlamaConfig)
    return Served(
        model,
        {
            "attention": {"target_modules": ["q_proj", "v_proj"], "r": 4},
            "everything": {"r": 16, "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 40}},
            "rooted": {"use_rslora": True, "target_modules": r".*\.[02]\..*(o|gate)_proj"},
        },
    )


@pytest.mark.parametrize("number", range(3))
def test_logits_are_pefts(llama: Served, number: int) -> None:
    (text,) = prompts(211, [70])
    expected = peft_logits(llama.peft, NAMES[number], text)
    plain = peft_logits(llama.peft, None, text)
    (found,) = llama.logits([text], [number])
    assert (expected - plain).abs().mean() > 0.2
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.equal(llama.logits([text], [-1])[0], llama.logits([text], [-1])[0])


def test_a_mixed_batch_and_chunks_give_every_row_what_it_gets_alone(llama: Served) -> None:
    texts, slots = prompts(211, [23, 40, 9, 31, 17]), [1, -1, 0, 2, 1]
    together = llama.logits(texts, slots)
    pieces = llama.logits(texts, slots, chunk=7)
    for text, slot, found, chunked in zip(texts, slots, together, pieces, strict=True):
        (alone,) = llama.logits([text], [slot])
        assert torch.equal(found, alone)
        assert torch.equal(chunked, alone)


def test_a_slot_takes_another_adapter_and_loses_one(llama: Served) -> None:
    (text,) = prompts(211, [20])
    first, second = (llama.logits([text], [slot])[0] for slot in (0, 1))
    try:
        llama.executor.adapters.place(0, 11)
        assert torch.equal(llama.logits([text], [0])[0], second)
    finally:
        llama.executor.adapters.place(0, 10)
    assert torch.equal(llama.logits([text], [0])[0], first)


@pytest.mark.parametrize(
    ("case", "targets"),
    [
        (Case("Phi3"), ["qkv_proj", "gate_up_proj", "o_proj"]),
        (Case("Gemma2"), "all-linear"),
        (Case("Glm4"), ["q_proj", "k_proj", "gate_up_proj"]),
        (Case("Cohere"), "all-linear"),
        (Case("Olmo2"), "all-linear"),
        (Case("Mixtral", {"num_local_experts": 4}), ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_adapters_of_other_families(case: Case, targets: Any) -> None:
    """Stacked modules, rows in another order, norms behind products, blocks side by side."""
    served = Served(case.model(), {"one": {"target_modules": targets}})
    (text,) = prompts(211, [33])
    expected = peft_logits(served.peft, "one", text)
    (found,) = served.logits([text], [0])
    assert (expected - peft_logits(served.peft, None, text)).abs().mean() > 0.02 * expected.abs().mean()
    assert (found - expected).abs().max() < 2e-4 * expected.abs().max()
