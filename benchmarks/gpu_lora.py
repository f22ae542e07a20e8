"""What adapters cost a decode step on this GPU: the products of one layer of an 8B model with and without them.

    PYTHONPATH=. python benchmarks/gpu_lora.py

A case is a CUDA graph that runs a layer's four products over several copies of its weights, more than any cache holds,
first as they are, then with adapters of which every row has one. Cost: two kernels a product, and the norm and the
activation on their own, which are part of the product otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import torch

from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton.lora import adapter_tiles
from aphrodite.layers.linear import Linear, RmsNorm
from aphrodite.layers.lora import AdaptedProduct, AdapterRoom
from aphrodite.layers.triton_linear import TritonLinear
from aphrodite.layers.triton_lora import DeviceAdapters

HIDDEN, INNER, KV = 4096, 14336, 1024
COPIES, LAYERS = 6, 32
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
CHOICE = Choice("dense", ())
PRODUCTS = {
    "qkv": AdaptedProduct(("q", "k", "v"), (HIDDEN, KV, KV), HIDDEN),
    "o": AdaptedProduct(("o",), (HIDDEN,), HIDDEN),
    "gate_up": AdaptedProduct(("gate", "up"), (INNER, INNER), HIDDEN),
    "down": AdaptedProduct(("down",), (HIDDEN,), INNER),
}


def linears(wrap: Callable[[Linear, AdaptedProduct], Linear]) -> list[dict[str, Linear]]:
    def linear(name: str, product: AdaptedProduct, copy: int) -> Linear:
        weight = torch.randn(sum(product.rows), product.columns, device=DEVICE, dtype=DTYPE) * 0.01
        named = product._replace(modules=tuple(f"{copy}.{module}" for module in product.modules))
        return wrap(TritonLinear(weight, None, CHOICE, gated=name == "gate_up"), named)

    return [{name: linear(name, product, copy) for name, product in PRODUCTS.items()} for copy in range(COPIES)]


def layer(products: dict[str, Linear], x: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
    qkv = products["qkv"](x, norm=norm)
    residual = products["o"](qkv[:, :HIDDEN].contiguous(), residual=x.clone())
    gated = products["gate_up"](residual, norm=norm, activation="silu")
    return products["down"](gated, residual=residual)


def microseconds(run: Callable[[], object]) -> float:
    """Of one layer, in a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        run()
        graph.capture_end()
        times = []
        for _ in range(12):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended) * 1e3 / COPIES)
    return float(statistics.median(times[2:]))


def main() -> None:
    print(f"{torch.cuda.get_device_name()}: a layer of Llama 3.1 8B in bfloat16, us; and what {LAYERS} cost in ms")
    norm = RmsNorm(torch.ones(HIDDEN, device=DEVICE, dtype=DTYPE), 1e-5)
    for rank in (16, 64):
        adapters = DeviceAdapters(AdapterRoom(8, rank), DTYPE, DEVICE)
        layers = linears(adapters.wrap)
        for rows in (1, 8, 32, 128):
            x = torch.randn(rows, HIDDEN, device=DEVICE, dtype=DTYPE)

            def run(x: torch.Tensor = x, layers: list[dict[str, Linear]] = layers) -> None:
                for products in layers:
                    layer(products, x, norm)

            plain = microseconds(run)
            for count in (1, 4, 8):
                if count > rows:
                    continue
                slots = (np.arange(rows) % count).astype(np.int32)
                tiles = torch.from_numpy(adapter_tiles(slots, rows, 8)).to(DEVICE)
                with adapters.step(tiles):
                    adapted = microseconds(run)
                print(
                    f"rank {rank:3}  rows {rows:3}  adapters {count}: {plain:7.1f} -> {adapted:7.1f} us"
                    f"  +{100 * (adapted / plain - 1):5.1f} %   +{(adapted - plain) * LAYERS / 1e3:5.2f} ms",
                    flush=True,
                )
        del adapters, layers
        torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
