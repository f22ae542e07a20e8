"""Adapters on the GPU: kernels against float64 at the shapes of real models, and answers against the CPU's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gpu_engines import REFERENCE, TINY, Engines, write_model
from safetensors.numpy import save_file
from test_gpu_engine import PROMPTS

from aphrodite.engine.core import EngineCore
from aphrodite.engine.messages import AddRequest
from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton.lora import AdapterStack, adapter_tiles, add_adapters, gated_groups, result_blocks
from aphrodite.layers.triton_linear import TritonLinear
from aphrodite.sampling.params import SamplingParams

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
SLOTS = 5


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("tokens", [1, 32, 700])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [((4096, 1024, 1024), 4096, 16), ((4096,), 14336, 64), ((576, 192, 192), 576, 128)]
)
def test_rows_get_what_their_adapter_adds(
    device: torch.device, dtype: torch.dtype, tokens: int, rows: tuple[int, ...], columns: int, rank: int
) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": device}
    stack = AdapterStack(
        (torch.randn(SLOTS, len(rows) * rank, columns, **options) / columns**0.5).to(dtype),
        (torch.randn(SLOTS, sum(rows), rank, **options) / rank**0.5).to(dtype),
        torch.rand(SLOTS, len(rows), **options) + 0.5,
        torch.from_numpy(result_blocks(rows)).to(device),
        rank,
    )
    slots = np.random.default_rng(1).integers(-1, SLOTS, tokens).astype(np.int32)
    slots[0] = 3
    x, out = torch.randn(tokens, columns, **options).to(dtype), torch.randn(tokens, sum(rows), **options).to(dtype)
    expected = out.double()
    for slot in range(SLOTS):
        own = torch.from_numpy(np.flatnonzero(slots == slot)).to(device)
        low = (x[own].double() @ stack.a[slot].double().t()).view(len(own), len(rows), rank)
        low = low * stack.scales[slot].double()[None, :, None]
        parts = stack.b[slot].double().split(rows)
        expected[own] += torch.cat([low[:, number] @ part.t() for number, part in enumerate(parts)], dim=1)
    before = out.clone()
    add_adapters(x, out, torch.from_numpy(adapter_tiles(slots, tokens, SLOTS)).to(device), stack)
    torch.cuda.synchronize()
    assert distance(out, expected) < TOLERANCE[dtype]
    assert torch.equal(out[slots < 0], before[slots < 0])


@pytest.mark.parametrize("rows", [1, 8, 40, 700])
def test_products_without_their_activation(device: torch.device, rows: int) -> None:
    """Gate and up where the layer says they are."""
    torch.manual_seed(0)
    weight = torch.randn(1024, 512, device=device) / 512**0.5
    x = torch.randn(rows, 512, device=device).bfloat16()
    gate, up = (x.double() @ half.bfloat16().double().t() for half in weight.chunk(2))
    expected = torch.nn.functional.silu(gate) * up
    dense = TritonLinear(weight.bfloat16(), None, Choice("dense", ()), gated=True)
    product, group = dense.unactivated(x)
    assert distance(gated_groups(product, "silu", group), expected) < 1e-2


@pytest.fixture(scope="module")
def make_core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines of a model in a file, with adapters from beside it."""
    folder = write_model(tmp_path_factory.mktemp("lora"), TINY)
    shapes = {"self_attn.q_proj": (256, 256), "self_attn.v_proj": (128, 256), "mlp.gate_proj": (512, 256)}
    shapes |= {"mlp.up_proj": (512, 256), "mlp.down_proj": (256, 512), "self_attn.o_proj": (256, 256)}
    for number, rank in enumerate((4, 16, 24)):
        random = np.random.default_rng(number)
        tensors = {}
        for layer in range(TINY["num_hidden_layers"]):
            for module, (rows, columns) in list(shapes.items())[number:]:
                name = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{name}.lora_A.weight"] = random.standard_normal((rank, columns), np.float32)
                tensors[f"{name}.lora_B.weight"] = 0.02 * random.standard_normal((rows, rank), np.float32)
        adapter = folder / f"adapter{number}"
        adapter.mkdir()
        save_file(tensors, adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": rank}))
    engines = Engines(folder, lora=tuple(f"{number}={folder / f'adapter{number}'}" for number in range(3)))
    yield engines
    engines.close()


def answers(core: EngineCore, wanted: list[int | None]) -> dict[str, list[int]]:
    for number, adapter in enumerate(wanted):
        core.add(AddRequest([str(number)], [0], PROMPTS[number % len(PROMPTS)], GREEDY, 0, None, adapter=adapter))
    tokens: dict[str, list[int]] = {}
    while core.has_work():
        for update in core.step():
            assert update.error is None, update.error
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
    return tokens


WANTED = [0, None, 1, 2, 1, 0, None, 2]


@pytest.mark.parametrize("settings", [{}, {"max_loras": 1, "enable_graphs": False}], ids=str)
def test_answers_are_those_of_the_cpu(make_core: Engines, settings: dict[str, Any]) -> None:
    expected = answers(make_core(**REFERENCE), WANTED)
    assert expected["0"] != answers(make_core(**REFERENCE), [None])["0"]
    assert answers(make_core(**settings), WANTED) == expected


@pytest.mark.parametrize("quantization", ["none", "int4", "fp8"])
def test_sixteen_bits_and_packed_weights_serve_them_too(make_core: Engines, quantization: str) -> None:
    """Greedy answers in a batch and alone may part where logits tie; most of their tokens are the same."""
    core = make_core(dtype="bfloat16", quantization=quantization, enable_graphs=False)
    together = answers(core, WANTED)
    alone = {}
    for number, adapter in enumerate(WANTED):
        core.add(AddRequest(["alone"], [0], PROMPTS[number % len(PROMPTS)], GREEDY, 0, None, adapter=adapter))
        alone[str(number)] = []
        while core.has_work():
            for update in core.step():
                assert update.error is None, update.error
                alone[str(number)] += update.token_ids
    same = [a == b for name in together for a, b in zip(together[name], alone[name], strict=True)]
    assert sum(same) > 0.5 * len(same)
    assert together["0"] != answers(core, [None])["0"]
