// The kernels of one instruction set, and the choice between the sets.
//
// A row's result never depends on the other rows: every kernel does a row's arithmetic in one fixed order, whatever
// the number of rows, the split over workers or the shape of its register tile.
#pragma once
#include <cstdint>

#include "formats.h"
#include "low_rank.h"

namespace aph {

// How a matrix product reads its input.
enum class Activation : int32_t { Float = 0, Int16 = 1, Int8 = 2 };

// Rows of activations, packed for matrix products: groups of 8, then 4, 2 and 1 rows, so that a group's words are
// contiguous. A group of M rows holds words [columns / per_word][M] and, if quantized, meta [columns / 32][kMeta][M]:
// scale, scale * sum, and as int32 -sum, -sum of the first 16 and of the last 16, where sums are those of quants, and
// what paired dots add for the row alone, negated (paired_dots.h).
constexpr int kMeta = 6;

// Largest magnitudes of quants: a weight's quant of at most 255, or at most 15, may be added to one.
constexpr int kLargestInt16 = 32767 - 255, kLargestInt8 = 120;

// Which dots of a block are paired: of int16 the two words of each of the first 16 columns' groups, of int8 each of the
// first words with the one 16 columns behind it.
constexpr int kPairedBytes = 2;

// Largest quants of attention: a query's may be added to a key's, a softmax weight to a value's.
constexpr int kLargestKey = 16383, kLargestValue = 8191, kLargestWeight = 32767 - kLargestValue;

struct PackedRows {
    Activation kind;
    int64_t columns;
    int64_t rows;
    int32_t* words;
    float* meta;
    int64_t row_words() const {
        return kind == Activation::Float ? columns : kind == Activation::Int16 ? columns / 2 : columns / 4;
    }
    int64_t row_meta() const { return columns / kBlock * kMeta; }
};

constexpr int kGroupRows = 8;

// Width of the group that starts at `row` of `rows`.
inline int group_width(int64_t row, int64_t rows) {
    const int64_t left = rows - row;
    return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// Groups of `rows` rows: 8 rows each and one for every set bit of the rest.
inline int64_t group_count(int64_t rows) { return rows / 8 + (rows >> 2 & 1) + (rows >> 1 & 1) + (rows & 1); }

// First row of group `index`.
inline int64_t group_start(int64_t index, int64_t rows) {
    const int64_t full = rows / 8;
    if (index <= full) return index * 8;
    int64_t row = full * 8;
    for (int64_t i = full; i < index; ++i) row += group_width(row, rows);
    return row;
}

// A weight in tiles, with the columns of the output that it makes.
struct TileWeight {
    Type type;
    const uint8_t* tiles;
    int64_t rows, columns;
    int64_t group;      // columns of integer groups
    int64_t out_column;
    const float* bias;  // [rows] or null
    const AdapterRows* adapters = nullptr;  // that add to its products; null: none
    int64_t tile_bytes() const { return type_info(type).tile_bytes(columns, group); }
};

// A rectangle of a product: whole tiles by whole groups of rows.
struct Range {
    int64_t begin, end;
};

enum class GateKind : int32_t { Silu = 0, GeluTanh = 1, BoundedSwiglu = 2 };

// Two weights of one shape whose results are combined.
struct GatedPair {
    TileWeight gate, up;
    PackedRows gate_in, up_in;
    GateKind kind;
};

struct LinearOut {
    float* data;
    int64_t stride;
    bool accumulate;
    float bound;  // results become bound * tanh(result / bound); 0: none
};

constexpr int kKvBlock = 16;       // positions in a cache block
constexpr int kKvTile = 128;       // positions that one softmax partial covers
constexpr int kMaxQueryRows = 48;  // (position, head) pairs of a task

// Storage of the cache: of each layer [block][kv_head] a
//   float block  K: head_dim x 16 positions | V: 16 x head_dim
//   int16 block  units of K: 16 x f32 | units of V: 16 x f32 | K: head_dim / 2 x 16 words of two dimensions
//                | V: 8 x head_dim words of two positions
// An integer times its unit is the value. Units are such that sums of products fit 32 bits (attention_int16.h).
// Of latents (attention_latent.h) each layer is [block], with `dim` values a position, those of the latent first:
//   float block  16 positions x dim
//   int16 block  units of latents: 16 x f32 | of turning parts: 16 x f32 | dim / 2 x 16 words of two dims
enum class KvType : int32_t { Float32 = 0, Float16 = 1, Int16 = 2 };

// Bytes of one kv head in a block.
inline int64_t kv_head_bytes(KvType type, int64_t head_dim) {
    const int64_t elements = 2 * head_dim * kKvBlock;
    return type == KvType::Float32 ? 4 * elements : type == KvType::Float16 ? 2 * elements
                                                                            : 2 * elements + 8 * kKvBlock;
}

inline int64_t latent_block_bytes(KvType type, int64_t dim) {
    const int64_t elements = dim * kKvBlock;
    return type == KvType::Float32 ? 4 * elements : type == KvType::Float16 ? 2 * elements
                                                                            : 2 * elements + 8 * kKvBlock;
}

// One attention layer's view of the cache. Latents have no heads: there kv_heads are groups of query heads that one
// task computes, and head_dim is that of latents.
struct AttentionShape {
    int heads, kv_heads, head_dim;
    int turning;                   // dimensions of keys behind those of latents; 0: keys and values of their own
    int64_t q_stride, out_stride;  // in floats, between tokens
    KvType kv;
    int window;                    // 0: none
    float scale;                   // of q.k
    float bound;                   // scores become bound * tanh(score / bound); 0: none
    const float* sinks;            // [heads], scores that take part in the softmax without a value; null: none
};

// Consecutive query positions of one sequence, for all query heads of one kv head.
struct AttentionTask {
    const float* q;      // first query token's row
    float* out;          // first query token's row
    const void* cache;   // the layer's
    const int32_t* blocks;
    int64_t position;    // of the first query
    int count;           // query positions
    int kv_head;
    const AttentionTask* next = nullptr;  // of this worker, if known, so that its first blocks can be brought
};

struct Kernels {
    const char* isa;
    // out[row][column] for the given tiles of one weight; rows begin and end with a group.
    void (*linear)(const PackedRows& in, const TileWeight& weight, Range tiles, Range rows, const LinearOut& out);
    // act(in * gate) * (in * up), packed: blocks of 32 columns, that is, of two tiles.
    void (*gated)(const GatedPair& pair, Range blocks, Range rows, const PackedRows* packs, int pack_count);
    // low[row][rank] = scale * A x for the given ranks of a block's rows; `scratch` is [kAdapterRows][columns].
    void (*shrink)(const PackedRows& in, const LowRank& pair, Range ranks, const AdapterBlock& block, float* scratch,
                   float* low, int64_t width);
    // Packs the rows of group `group`: columns of x, row r at x + r * stride.
    void (*pack)(const float* x, int64_t stride, int64_t group, const PackedRows& out);
    // out = x / sqrt(mean(x^2) + eps) * weight; columns are a multiple of 16, out may be x
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t columns, float* out);
    // out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias; bias may be null, out may be x
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t columns, float* out);
    // Rotates the first 2 * half_dim values of a head by the angles of one position, rotate-half pairing.
    void (*rotate)(float* head, const float* cos, const float* sin, int64_t half_dim);
    // Writes one position's key and value of one kv head into its block.
    void (*store_kv)(const float* key, const float* value, int64_t head_dim, KvType type, void* block, int offset);
    // Writes one position's latent of `rank` dimensions and the turning part behind it into its block.
    void (*store_latent)(const float* vector, int rank, int turning, KvType type, void* block, int offset);
    // A task over the tiles of its context, result in task.out.
    void (*attend)(const AttentionShape& shape, const AttentionTask& task, float* scratch);
    // One tile of a task: unnormalised output, maximum and sum of each (position, head): partial[row][head_dim + 2].
    void (*attend_tile)(const AttentionShape& shape, const AttentionTask& task, int64_t tile, float* scratch,
                        float* partial);
    // Merges the partials of `tiles` tiles, in order, into task.out; partial of tile t at partials + t * stride.
    void (*merge_tiles)(const AttentionShape& shape, const AttentionTask& task, const float* partials, int64_t stride,
                        int64_t tiles, float* scratch);
    // out += sum of weights[i] * rows[i], in order; columns are a multiple of 16
    void (*add_weighted)(const float* const* rows, const float* weights, int count, int64_t columns, float* out);
    // Limits of the machine, for benchmarks (limits.h).
    int32_t (*dot_shorts)(int64_t iterations);
    int32_t (*dot_bytes)(int64_t iterations);
    int dot_chains;
    int32_t (*read_all)(const uint8_t* data, int64_t bytes);
};

// Floats of scratch that the attention kernels need: of each row scores, integer weights and query with what belongs to
// them, and two results with their maximum and sum; what paired dots add for keys and values alone; of latents, those
// of a tile that are turned around at once.
constexpr int kTurnedColumns = 64;
inline int64_t attention_scratch(int head_dim, int turning) {
    const int64_t row = kKvTile + kKvTile / 2 + (head_dim + turning) / 2 + 5 + 2 * (static_cast<int64_t>(head_dim) + 2);
    const int64_t pairs = kKvTile + (kKvTile / kKvBlock + 1) * static_cast<int64_t>(head_dim);
    return kMaxQueryRows * row + pairs + (turning > 0 ? kKvTile * kTurnedColumns / 2 : 0);
}

// Brings a line into the second cache. A core keeps twice as many lines on their way there as to the first one, and so
// reads what the processor does not foresee at nearly twice the speed.
inline void bring(const void* line) { __builtin_prefetch(line, 0, 2); }

// First tile that the earliest query of a task sees, and one past the last tile of its last query.
inline int64_t first_tile(const AttentionShape& shape, const AttentionTask& task) {
    if (shape.window == 0 || task.position < shape.window) return 0;
    return (task.position - shape.window + 1) / kKvTile;
}
inline int64_t end_tile(const AttentionTask& task) { return (task.position + task.count - 1) / kKvTile + 1; }

void tile_row(const TileWeight& weight, int64_t row, float* out);

// Null where the compiler or the processor family lacks the instruction set.
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_portable();

// The best set that this processor runs, or the named one; null if the name is unknown or it cannot run here.
const Kernels* select_kernels(const char* name);

}  // namespace aph
