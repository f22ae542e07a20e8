"""A decode layer as a whole, kernel behind kernel: what launches, gaps and tails cost beside the kernels alone.

    PYTHONPATH=. python benchmarks/gpu_layer.py                     # both models at the mixed workload's batches
    PYTHONPATH=. python benchmarks/gpu_layer.py --model 8b --steps 50 300

A case is a CUDA graph over eight layers with weights and caches of their own, all of a decoder but its first and last
products: norm and qkv, rotation, attention, o, norm and gate_up with its activation, down. Contexts are those of the
mixed workload of benchmarks/gpu.py after so many steps. The floor is what is read, at 3.17 TB/s.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from typing import NamedTuple

import torch
from gpu_attention import BLOCK, READ, graph_seconds, mixed_contexts

from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton.decode_attention import decode_attention, decode_config, plan_decode
from aphrodite.kernels.triton.dense_cuts import dense_cut
from aphrodite.kernels.triton.paged import card_of
from aphrodite.kernels.triton.rotary import rotary_to_cache
from aphrodite.layers import triton_linear
from aphrodite.layers.linear import RmsNorm
from aphrodite.layers.triton_linear import TritonLinear

LAYERS = 8
DIM, KV_HEADS = 128, 8
BF16 = torch.bfloat16


class Model(NamedTuple):
    hidden: int
    heads: int
    inner: int


MODELS = {"8b": Model(4096, 32, 14336), "0.6b": Model(1024, 16, 3072)}


# What multiplies: as shipped, or never the kernel for many rows that loads ahead.
WAYS = {"as shipped": dense_cut, "without dense_wgmma": lambda *shape: None}


class Layer:
    """One layer's weights and cache on the device."""

    def __init__(self, model: Model, blocks: int) -> None:
        def linear(out: int, inputs: int, *, gated: bool = False) -> TritonLinear:
            weight = torch.randn((out, inputs), dtype=BF16, device="cuda").mul_(inputs**-0.5)
            return TritonLinear(weight, None, Choice("dense", ()), gated=gated)

        self.norm = RmsNorm(torch.ones(model.hidden, dtype=BF16, device="cuda"), 1e-5)
        self.qkv = linear((model.heads + 2 * KV_HEADS) * DIM, model.hidden)
        self.o = linear(model.hidden, model.heads * DIM)
        self.gate_up = linear(2 * model.inner, model.hidden, gated=True)
        self.down = linear(model.hidden, model.inner)
        shape = (2, blocks, KV_HEADS, BLOCK, DIM)
        self.keys, self.values = torch.empty(shape, dtype=BF16, device="cuda").normal_().unbind(0)

    @property
    def nbytes(self) -> int:
        return sum(linear.weight.nbytes for linear in (self.qkv, self.o, self.gate_up, self.down))


class Step:
    """A batch in the middle of its answers."""

    def __init__(self, model: Model, contexts: list[int]) -> None:
        self.model = model
        self.contexts = contexts
        counts = [-(-context // BLOCK) for context in contexts]
        self.blocks = sum(counts)
        order = torch.randperm(self.blocks, dtype=torch.int32, device="cuda")
        self.tables = torch.zeros((len(contexts) + 1, -(-max(counts) // 16) * 16), dtype=torch.int32, device="cuda")
        for row, (end, count) in enumerate(zip(itertools.accumulate(counts), counts, strict=True)):
            self.tables[row, :count] = order[end - count : end]
        self.lengths = torch.tensor(contexts, dtype=torch.int32, device="cuda")
        self.rows = torch.arange(len(contexts), dtype=torch.int32, device="cuda")
        self.starts = torch.arange(len(contexts) + 1, dtype=torch.int32, device="cuda")
        self.positions = self.lengths - 1
        newest = self.positions.long()
        self.slots = self.tables[self.rows.long(), newest // BLOCK].long() * BLOCK + newest % BLOCK
        self.cos, self.sin = torch.rand((2, max(contexts), DIM // 2), device="cuda").unbind(0)
        self.hidden = torch.randn((len(contexts), model.hidden), dtype=BF16, device="cuda")

    def run(self, layers: list[Layer]) -> torch.Tensor:
        config = decode_config(DIM, BF16, card_of(self.hidden.device), len(self.contexts))
        plan = plan_decode(
            query_start=self.starts,
            context_lens=self.lengths,
            rows=self.rows,
            num_kv_heads=KV_HEADS,
            window=None,
            config=config,
        )
        hidden = self.hidden.clone()
        for layer in layers:
            qkv = layer.qkv(hidden, norm=layer.norm)
            rotary_to_cache(
                qkv,
                layer.keys,
                layer.values,
                positions=self.positions,
                slot_mapping=self.slots,
                cos=self.cos,
                sin=self.sin,
                num_heads=self.model.heads,
            )
            attended = torch.empty((len(self.contexts), self.model.heads * DIM), dtype=BF16, device="cuda")
            decode_attention(
                qkv,
                layer.keys,
                layer.values,
                attended,
                plan=plan,
                block_tables=self.tables,
                num_heads=self.model.heads,
                scale=DIM**-0.5,
            )
            hidden = layer.o(attended, residual=hidden)
            hidden = layer.down(layer.gate_up(hidden, norm=layer.norm, activation="silu"), residual=hidden)
        return hidden


def measure(name: str, steps: list[int]) -> None:
    """Microseconds a layer, of each way."""
    for after in steps:
        step = Step(MODELS[name], mixed_contexts(after))
        layers = [Layer(step.model, step.blocks) for _ in range(LAYERS)]
        read = layers[0].nbytes + 4 * KV_HEADS * DIM * sum(step.contexts)
        print(
            f"{name}, {len(step.contexts)} sequences, mean context {sum(step.contexts) // len(step.contexts)}: ", end=""
        )
        print(f"floor {read / READ * 1e6:.1f} us a layer", flush=True)
        for way, cut in WAYS.items():
            triton_linear.dense_cut = cut  # type: ignore[assignment,attr-defined]
            try:
                seconds = graph_seconds(functools.partial(run_once, step, layers)) / LAYERS
                print(f"    {seconds * 1e6:8.1f} us {read / READ / seconds:6.1%}  {way}", flush=True)
            except Exception as failure:
                print(f"    {way}: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
        del layers, step
        torch.cuda.empty_cache()


def run_once(step: Step, layers: list[Layer]) -> None:
    step.run(layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), help="only this one")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 300, 500, 800], help="after so many steps")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    for name in MODELS:
        if options.model in (None, name):
            measure(name, options.steps)


if __name__ == "__main__":
    main()
