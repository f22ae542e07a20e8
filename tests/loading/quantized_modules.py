"""Modules as quantizers write them, packed here number by number from the formats' definitions, and their meaning.

Every function returns the tensors of one module by suffix and the matrix `[out, in]` that they stand for, float64.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

Module = tuple[dict[str, torch.Tensor], np.ndarray]

NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]  # fmt: skip


def random_scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(rng.uniform(0.005, 0.05, shape)).to(dtype)


def words_of(rows: list[list[int]], bits: int) -> torch.Tensor:
    """Each list of numbers as a stream of bits, the first number lowest, cut into words of 32 bits."""
    packed = []
    for row in rows:
        stream = sum(number << (bits * index) for index, number in enumerate(row))
        count = -(-len(row) * bits // 32)
        packed.append([stream >> (32 * word) & 0xFFFFFFFF for word in range(count)])
    return torch.from_numpy(np.array(packed, np.uint32).view(np.int32))


def awq(rng: np.random.Generator, out: int, columns: int, group: int) -> Module:
    codes, groups = rng.integers(0, 16, (columns, out)), columns // group
    zeros, scales = rng.integers(0, 16, (groups, out)), random_scales(rng, (groups, out), torch.float16)

    def packed(numbers: np.ndarray) -> torch.Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        rows = [[int(row[8 * (i // 8) + order[i % 8]]) for i in range(out)] for row in numbers]
        return words_of(rows, 4)

    meaning = np.empty((out, columns))
    for o in range(out):
        for i in range(columns):
            meaning[o, i] = (int(codes[i, o]) - int(zeros[i // group, o])) * float(scales[i // group, o])
    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}, meaning


def gptq(
    rng: np.random.Generator, out: int, columns: int, group: int, *, bits: int, version: int, act_order: bool
) -> Module:
    groups, largest = columns // group, 1 << bits
    codes = rng.integers(0, largest, (columns, out))
    zeros = rng.integers(0, largest, (groups, out))
    scales = random_scales(rng, (groups, out), torch.float16)
    order = np.arange(columns) // group
    if act_order:
        order = rng.permutation(order)
    stored_zeros = (zeros - 1) % largest if version == 1 else zeros
    tensors = {
        "qweight": words_of(codes.T.tolist(), bits).T.contiguous(),
        "qzeros": words_of(stored_zeros.tolist(), bits),
        "scales": scales,
        "g_idx": torch.from_numpy(order.astype(np.int32)),
    }
    meaning = (codes - zeros[order]) * scales.double().numpy()[order]
    return tensors, meaning.T


def float8(rng: np.random.Generator, out: int, columns: int, *, kind: str, dtype: torch.dtype) -> Module:
    """`kind`: tensor, channel, or block (24 x 40)."""
    values = torch.from_numpy(rng.normal(size=(out, columns)) * 50).to(dtype)
    shape = {"tensor": (), "channel": (out, 1), "block": (-(-out // 24), -(-columns // 40))}[kind]
    scales = random_scales(rng, shape, torch.float32)
    meaning = np.empty((out, columns))
    for o in range(out):
        for i in range(columns):
            scale = scales[o // 24, i // 40] if kind == "block" else scales[o, 0] if kind == "channel" else scales
            meaning[o, i] = values[o, i].double() * scale.double()
    name = "weight_scale_inv" if kind == "block" else "weight_scale"
    return {"weight": values, name: scales, "input_scale": torch.ones(())}, meaning


def pack_quantized(
    rng: np.random.Generator, out: int, columns: int, group: int, *, bits: int, symmetric: bool, act_order: bool = False
) -> Module:
    groups, half = columns // group, 1 << (bits - 1)
    codes = rng.integers(-half, half, (out, columns))
    zeros = np.zeros((out, groups), int) if symmetric else rng.integers(-half, half, (out, groups))
    scales = random_scales(rng, (out, groups), torch.bfloat16)
    order = rng.permutation(np.arange(columns) // group) if act_order else np.arange(columns) // group
    tensors = {
        "weight_packed": words_of((codes + half).tolist(), bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([out, columns]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words_of((zeros + half).T.tolist(), bits).T.contiguous()
    if act_order:
        tensors["weight_g_idx"] = torch.from_numpy(order.astype(np.int32))
    return tensors, (codes - zeros[:, order]) * scales.double().numpy()[:, order]


def pack_quantized_tensor(
    rng: np.random.Generator, out: int, columns: int, *, bits: int, words: bool = False
) -> Module:
    """One scale and one zero for all, the zero a signed byte or, with `words`, in a word."""
    half = 1 << (bits - 1)
    codes, zero = rng.integers(-half, half, (out, columns)), int(rng.integers(-half, half))
    scale = random_scales(rng, (1,), torch.bfloat16)
    stored_zero = words_of([[zero + half]], bits) if words else torch.tensor([zero], dtype=torch.int8)
    tensors = {
        "weight_packed": words_of((codes + half).tolist(), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([out, columns]),
        "weight_zero_point": stored_zero,
    }
    return tensors, (codes - zero) * float(scale)


def int8(rng: np.random.Generator, out: int, columns: int, *, per_channel: bool, symmetric: bool = True) -> Module:
    values = rng.integers(-128, 128, (out, columns)).astype(np.int8)
    shape = (out, 1) if per_channel else (1,)
    scales, zeros = random_scales(rng, shape, torch.bfloat16), np.zeros(shape, np.int8)
    tensors = {"weight": torch.from_numpy(values), "weight_scale": scales}
    if not symmetric:
        zeros = rng.integers(-20, 20, shape).astype(np.int8)
        tensors["weight_zero_point"] = torch.from_numpy(zeros)
    return tensors, (values.astype(np.float64) - zeros) * scales.double().numpy()


def bitsandbytes_4_bit(rng: np.random.Generator, out: int, columns: int, *, kind: str, nested: bool) -> Module:
    count, block, outer_block = out * columns, 64, 8
    codes, blocks = rng.integers(0, 16, count), -(-count // block)
    codebook = np.array(NF4, np.float32) if kind == "nf4" else np.linspace(-1, 1, 16, dtype=np.float32)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [out, columns]}
    tensors = {
        "weight": torch.from_numpy((codes[0::2] << 4 | codes[1::2]).astype(np.uint8))[:, None],
        "weight.quant_map": torch.from_numpy(codebook),
    }
    absmax = rng.uniform(0.05, 0.2, blocks).astype(np.float32)
    if nested:
        levels = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        inner = rng.integers(0, 256, blocks).astype(np.uint8)
        outer = rng.uniform(0.01, 0.02, -(-blocks // outer_block)).astype(np.float32)
        state |= {"nested_blocksize": outer_block, "nested_dtype": "float32", "nested_offset": 0.0625}
        tensors["weight.absmax"] = torch.from_numpy(inner)
        tensors["weight.nested_absmax"] = torch.from_numpy(outer)
        tensors["weight.nested_quant_map"] = torch.from_numpy(levels)
        absmax = np.array(
            [np.float32(levels[inner[b]] * outer[b // outer_block]) + np.float32(0.0625) for b in range(blocks)]
        )
    else:
        tensors["weight.absmax"] = torch.from_numpy(absmax)
    text = json.dumps(state).encode()
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    meaning = [float(codebook[code]) * float(absmax[index // block]) for index, code in enumerate(codes)]
    return tensors, np.array(meaning).reshape(out, columns)


def bitsandbytes_int8(rng: np.random.Generator, out: int, columns: int) -> Module:
    values = rng.integers(-127, 128, (out, columns)).astype(np.int8)
    largest = torch.from_numpy(rng.uniform(1, 4, out).astype(np.float32))
    tensors = {"weight": torch.from_numpy(values), "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, values * (largest.double().numpy()[:, None] / 127)
