"""What the Gluon kernels over `int4_words` share: register layouts, unpacking, the end of a sum.

Gluon (`triton.experimental.gluon`) gives a kernel explicit register layouts, without which the unpacked values take a
trip through shared memory. It is marked experimental: kernels run only with the versions that they were checked with.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# word >> 4 e & 0x000F000F is a pair of codes; with the exponent of 128 (bfloat16) or 1024 (float16) in front it is
# that number plus the code, and subtracting that number plus the zero is exact. Operands: $0 to $3 are the results, two
# values each; $4 to $11 eight copies of the word, as a broadcast has them, $12 to $19 of zeros.
_UNPACK = """
{{
.reg .b32 w;
lop3.b32 w, $4, 0x000F000F, {magic}, 0xEA;
sub.rn.{dtype}x2 $0, w, $12;
shr.b32 w, $4, 4;
lop3.b32 w, w, 0x000F000F, {magic}, 0xEA;
sub.rn.{dtype}x2 $1, w, $12;
shr.b32 w, $4, 8;
lop3.b32 w, w, 0x000F000F, {magic}, 0xEA;
sub.rn.{dtype}x2 $2, w, $12;
shr.b32 w, $4, 12;
lop3.b32 w, w, 0x000F000F, {magic}, 0xEA;
sub.rn.{dtype}x2 $3, w, $12;
}}
"""
UNPACK_BF16 = gl.constexpr(_UNPACK.format(dtype="bf16", magic="0x43004300"))
UNPACK_F16 = gl.constexpr(_UNPACK.format(dtype="f16", magic="0x64006400"))
TWO_INPUTS = gl.constexpr("=r,=r,=r,=r" + ",r" * 16)


@gluon.jit
def wait_for_producer(PDL: gl.constexpr):
    """launch.wait_for_producer for Gluon."""
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def launch_dependents(PDL: gl.constexpr):
    """launch.launch_dependents for Gluon."""
    if PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.constexpr_function
def word_layout(k_warps, n_warps, subgroups):
    """Layout of unpacked chunks `[k_warps, rows, 4 (t), subgroups, 4 / subgroups, 8]`: a strip for each warp."""

    def basis(dimension, value):
        return [value if d == dimension else 0 for d in range(6)]

    registers = [basis(5, 1), basis(5, 2), basis(5, 4)]
    inner = 4 // subgroups
    registers += [basis(4, 1 << i) for i in range(inner.bit_length() - 1)]
    registers += [basis(3, 1 << i) for i in range(subgroups.bit_length() - 1)]
    registers.append(basis(1, 8))
    lanes = [basis(2, 1), basis(2, 2), basis(1, 1), basis(1, 2), basis(1, 4)]
    warps = [basis(1, 16 << i) for i in range(n_warps.bit_length() - 1)]
    warps += [basis(0, 1 << i) for i in range(k_warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [k_warps, 16 * n_warps, 4, subgroups, inner, 8])


@gluon.jit
def pair_of_zeros(scale_words, dtype: gl.constexpr):
    """Two of 128 + zero (bfloat16) or 1024 + zero (float16) in an int32."""
    base: gl.constexpr = 0x43004300 if dtype == gl.bfloat16 else 0x64006400
    return (scale_words & 0xFF) * 0x10001 + base


@gluon.jit
def scale_of(scale_words):
    """The scale in float32."""
    return (scale_words & -256).to(gl.float32, bitcast=True)


@gluon.jit
def unpack(words, zeros, dtype: gl.constexpr):
    """`[..., 8]` codes less their zero from words and zeros that were broadcast to that shape."""
    if dtype == gl.bfloat16:
        values = gl.inline_asm_elementwise(UNPACK_BF16, TWO_INPUTS, [words, zeros], gl.bfloat16, True, 8)
    else:
        values = gl.inline_asm_elementwise(UNPACK_F16, TWO_INPUTS, [words, zeros], gl.float16, True, 8)
    return values


@gluon.jit
def word_offsets(
    chunk, strip, strips, chunks: gl.constexpr, N_WARPS: gl.constexpr, K_WARPS: gl.constexpr, S: gl.constexpr
):
    """Where the words `[K, R, 4, S, J]` of a step lie."""
    row = gl.arange(0, 16 * N_WARPS)[None, :, None, None, None]
    q = gl.minimum(chunk + gl.arange(0, K_WARPS), chunks - 1)[:, None, None, None, None]
    t = gl.arange(0, 4)[None, None, :, None, None]
    j = gl.arange(0, S)[None, None, None, :, None] * (4 // S) + gl.arange(0, 4 // S)[None, None, None, None, :]
    return (gl.minimum(strip + row // 16, strips - 1) * chunks + q) * 256 + row % 16 * 16 + t * 4 + j


@gluon.jit
def group_offsets(
    chunk,
    strip,
    strips,
    chunks: gl.constexpr,
    GROUP: gl.constexpr,
    N_WARPS: gl.constexpr,
    K_WARPS: gl.constexpr,
    S: gl.constexpr,
):
    """Where the scales `[K, R, S]` of a step lie."""
    groups: gl.constexpr = (chunks * 128 + GROUP - 1) // GROUP
    row = gl.arange(0, 16 * N_WARPS)[None, :, None]
    q = gl.minimum(chunk + gl.arange(0, K_WARPS), chunks - 1)[:, None, None]
    # Groups share a chunk, or chunks a group.
    group = (
        q * S + gl.arange(0, S)[None, None, :] if GROUP <= 128 else q // (GROUP // 128) + gl.arange(0, S)[None, None, :]
    )
    return (gl.minimum(strip + row // 16, strips - 1) * groups + group) * 16 + row % 16


@gluon.jit
def load_chunk(words, scales, chunk, strip, strips, chunks: gl.constexpr, GROUP: gl.constexpr, WARPS: gl.constexpr):
    """(words `[1, R, 4, S, J]`, scales `[1, R, S]`) of a chunk."""
    S: gl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    L: gl.constexpr = gl.SliceLayout(5, word_layout(1, WARPS, S))
    offsets = gl.set_auto_layout(word_offsets(chunk, strip, strips, chunks, WARPS, 1, S), L)
    loaded = gl.load(words + offsets, eviction_policy="evict_first")
    g_layout: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, L))
    g_offsets = gl.set_auto_layout(group_offsets(chunk, strip, strips, chunks, GROUP, WARPS, 1, S), g_layout)
    return loaded, gl.load(scales + g_offsets)


@gluon.jit
def gated(gate, up, ACTIVATION: gl.constexpr):
    """activation.gated for Gluon."""
    if ACTIVATION == "silu":
        slope = gate
    elif ACTIVATION == "swiglu_oai":
        gate = gl.minimum(gate, 7.0)
        up = gl.minimum(gl.maximum(up, -7.0), 7.0) + 1.0
        slope = 1.702 * gate
    else:
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + gl.exp(-slope)) * up


@gluon.jit
def residual_tile(residual, M, out_features, strip, N_WARPS: gl.constexpr, layout: gl.constexpr):
    """What `finish` would add to `[R, 8]` sums in `layout` without an activation, to be requested early."""
    index = strip * 16 + gl.arange(0, 16 * N_WARPS)[:, None]
    column = gl.arange(0, 8)[None, :]
    inside = gl.set_auto_layout((index < out_features) & (column < M), layout)
    at = gl.set_auto_layout(column * out_features + index, layout)
    return gl.load(residual + at, mask=inside, other=0.0)


@gluon.jit
def finish(
    total,
    bias,
    residual,
    out,
    out_stride,
    M,
    out_features,
    strip,
    first_column,
    N_WARPS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
):
    """Bias, activation and residual of `total` `[R, columns]`, and the store."""
    C: gl.constexpr = total.shape[1]
    row = gl.arange(0, 16 * N_WARPS)
    if ACTIVATION is None:
        index = strip * 16 + row
        width = out_features
        result = total
        if HAS_BIAS:
            result += gl.load(bias + index, mask=index < out_features, other=0.0).to(gl.float32)[:, None]
    else:
        # Pairs (gate, up) are rows g and g + 8 of a strip.
        width = out_features // 2
        if HAS_BIAS:
            pair = strip * 16 + row // 16 * 16 + row % 8 * 2 + row // 8 % 2
            total += gl.load(bias + pair, mask=pair < out_features, other=0.0).to(gl.float32)[:, None]
        gate, up = total.reshape(N_WARPS, 2, 8, C).permute(0, 2, 3, 1).split()
        result = gated(gate, up, ACTIVATION).reshape(N_WARPS * 8, C)
        index = strip * 8 + gl.arange(0, 8 * N_WARPS)
    column = first_column + gl.arange(0, C)
    layout: gl.constexpr = result.type.layout
    inside = gl.set_auto_layout((index < width)[:, None] & (column < M)[None, :], layout)
    at = gl.set_auto_layout(column[None, :] * out_stride + index[:, None], layout)
    if HAS_RESIDUAL:
        result += gl.load(residual + at, mask=inside, other=0.0).to(gl.float32)
    gl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def sum_of_splits(partial, workspace, counters, tile, split, SPLITS: gl.constexpr):
    """Leave `partial`; the last block of a tile gets (True, the sum of all in the order of the splits)."""
    R: gl.constexpr = partial.shape[0]
    C: gl.constexpr = partial.shape[1]
    layout: gl.constexpr = partial.type.layout
    # A warp's rows g make neighbours of 8 values.
    offsets = gl.set_auto_layout(gl.arange(0, R)[:, None] + gl.arange(0, C)[None, :] * R, layout)
    base = workspace + tile * (SPLITS * R * C)
    gl.store(base + split * (R * C) + offsets, partial)
    gl.thread_barrier()
    last = gl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    total = gl.zeros([R, C], gl.float32, layout)
    if last:
        for other in range(SPLITS):
            total += gl.load(base + other * (R * C) + offsets, cache_modifier=".cg")
        gl.store(counters + tile, 0)
    return last, total
