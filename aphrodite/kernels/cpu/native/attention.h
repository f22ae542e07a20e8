// Attention over the paged cache. Included after a simd_*.h, lane_math.h and rows.h.
//
// Softmax runs over tiles of 128 positions, counted from position 0 of the sequence: each gives an unnormalised
// output, a maximum and a sum (the online softmax of arXiv 1805.02867), merged in the order of tiles. A query's
// arithmetic is thus the same in decode and prefill and under any split over workers or steps. Keys lie transposed in
// their block, so that a lane is a position in q.k and a dimension in p.v.
#pragma once
#include "attention_float.h"
#include "attention_int16.h"
#include "attention_latent.h"

namespace aph {
namespace {

// The parts of a worker's scratch, see attention_scratch.
struct AttentionScratch {
    AttentionScratch(float* memory, const AttentionShape& shape) : scores(memory) {
        const auto take = [&memory](int64_t count) { return memory += count, memory - count; };
        const auto take_ints = [&take](int64_t count) { return reinterpret_cast<int32_t*>(take(count)); };
        take(kMaxQueryRows * kKvTile);
        ints.queries = take_ints(kMaxQueryRows * (shape.head_dim + shape.turning) / 2);
        ints.query_units = take(2 * kMaxQueryRows);
        ints.weights = take_ints(kMaxQueryRows * kKvTile / 2);
        ints.weight_units = take(kMaxQueryRows);
        ints.query_pairs = take_ints(kMaxQueryRows);
        ints.weight_pairs = take_ints(kMaxQueryRows);
        ints.key_pairs = take_ints(kKvTile);
        ints.value_pairs = take_ints((kTileBlocks + 1) * shape.head_dim);
        partial = take(kMaxQueryRows * (shape.head_dim + 2));
        running = take(kMaxQueryRows * (shape.head_dim + 2));
        turned = reinterpret_cast<int16_t*>(memory);
    }
    float* scores;
    IntRows ints{};
    float* partial;
    float* running;
    int16_t* turned;  // of latents
};

// Whatever of a task does not change with the tile.
inline void start_task(const AttentionShape& shape, const AttentionTask& task, AttentionScratch& scratch) {
    if (shape.kv != KvType::Int16) return;
    if (shape.turning > 0) return quantize_latent_queries(shape, task, scratch.ints);
    if constexpr (kPairedDots) scratch.ints.paired = pairs_rows(task.count * (shape.heads / shape.kv_heads));
    quantize_queries(shape, task, scratch.ints);
}

inline void attend_latents(const AttentionShape& shape, const AttentionTask& task, int64_t tile,
                           const AttentionScratch& scratch, float* partial) {
    switch (shape.kv) {
        case KvType::Float32: return attend_latents_as<float>(shape, task, tile, scratch.scores, partial);
        case KvType::Float16: return attend_latents_as<uint16_t>(shape, task, tile, scratch.scores, partial);
        case KvType::Int16:
            return attend_latents_int16(shape, task, tile, scratch.ints, scratch.scores, scratch.turned, partial);
    }
}

inline void attend_started(const AttentionShape& shape, const AttentionTask& task, int64_t tile,
                           const AttentionScratch& scratch, float* partial) {
    if (shape.turning > 0) return attend_latents(shape, task, tile, scratch, partial);
    switch (shape.kv) {
        case KvType::Float32: return attend_tile_as<float>(shape, task, tile, scratch.scores, partial);
        case KvType::Float16: return attend_tile_as<uint16_t>(shape, task, tile, scratch.scores, partial);
        case KvType::Int16: return attend_tile_int16(shape, task, tile, scratch.ints, scratch.scores, partial);
    }
}

void attend_tile(const AttentionShape& shape, const AttentionTask& task, int64_t tile, float* memory, float* partial) {
    AttentionScratch scratch(memory, shape);
    start_task(shape, task, scratch);
    attend_started(shape, task, tile, scratch, partial);
}

// Merges a row's partial into the running one; a tile of which the row sees nothing changes no bit.
inline void merge_row(float* running, const float* partial, int head_dim) {
    const float top = partial[head_dim];
    if (top == -__builtin_inff()) return;
    const float old_top = running[head_dim];
    const bool grows = old_top < top;
    const Vec factor = exp2(splat(grows ? old_top - top : top - old_top)), one = splat(1.0f);
    const Vec keep = grows ? factor : one, gain = grows ? one : factor;
    for (int d = 0; d < head_dim; d += 16)
        store(running + d, fma(load(partial + d), gain, mul(load(running + d), keep)));
    float factors[16];
    store(factors, factor);
    running[head_dim + 1] = grows ? running[head_dim + 1] * factors[0] + partial[head_dim + 1]
                                  : running[head_dim + 1] + partial[head_dim + 1] * factors[0];
    if (grows) running[head_dim] = top;
}

inline void start_rows(float* running, int rows, int head_dim) {
    const int64_t stride = head_dim + 2;
    for (int64_t i = 0; i < rows * stride; ++i) running[i] = 0;
    for (int r = 0; r < rows; ++r) running[r * stride + head_dim] = -__builtin_inff();
}

// A row's sum of weights, together with that of its head's sink; both count from the row's maximum.
inline float sum_with_sink(const AttentionShape& shape, int64_t head, const float* row) {
    const float total = row[shape.head_dim + 1];
    if (shape.sinks == nullptr) return total;
    float sink[16];
    store(sink, exp2(splat(shape.sinks[head] * kLog2E - row[shape.head_dim])));
    return total + sink[0];
}

inline void finish_rows(const AttentionShape& shape, const AttentionTask& task, const float* running) {
    const int group = shape.heads / shape.kv_heads;
    for (int r = 0; r < task.count * group; ++r) {
        const float* row = running + r * (static_cast<int64_t>(shape.head_dim) + 2);
        const int64_t head = task.kv_head * group + r % group;
        float* out = task.out + r / group * shape.out_stride + head * shape.head_dim;
        const Vec inverse = splat(1.0f / sum_with_sink(shape, head, row));
        for (int d = 0; d < shape.head_dim; d += 16) store(out + d, mul(load(row + d), inverse));
    }
}

void attend(const AttentionShape& shape, const AttentionTask& task, float* memory) {
    AttentionScratch scratch(memory, shape);
    const int rows = task.count * (shape.heads / shape.kv_heads);
    const int64_t stride = shape.head_dim + 2;
    start_task(shape, task, scratch);
    start_rows(scratch.running, rows, shape.head_dim);
    for (int64_t tile = first_tile(shape, task); tile < end_tile(task); ++tile) {
        attend_started(shape, task, tile, scratch, scratch.partial);
        for (int r = 0; r < rows; ++r)
            merge_row(scratch.running + r * stride, scratch.partial + r * stride, shape.head_dim);
    }
    finish_rows(shape, task, scratch.running);
}

void merge_tiles(const AttentionShape& shape, const AttentionTask& task, const float* partials, int64_t stride,
                 int64_t tiles, float* running) {
    const int rows = task.count * (shape.heads / shape.kv_heads);
    const int64_t row_stride = shape.head_dim + 2;
    start_rows(running, rows, shape.head_dim);
    for (int64_t tile = 0; tile < tiles; ++tile)
        for (int r = 0; r < rows; ++r)
            merge_row(running + r * row_stride, partials + tile * stride + r * row_stride, shape.head_dim);
    finish_rows(shape, task, running);
}

}  // namespace
}  // namespace aph
