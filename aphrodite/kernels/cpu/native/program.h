// A model as a list of operations over buffers, run for a whole step of T token rows in one call.
//
// The structures here are mirrored by ctypes in aphrodite/kernels/cpu/program.py; a change to one needs the other and
// a new kAbiVersion.
#pragma once
#include <cstdint>

#include "low_rank.h"

namespace aph {

enum class OpKind : int32_t {
    Embed = 0,      // output = rows of weight, dequantized, times value (0 for 1)
    Norm = 1,       // packs = norm(input), value = eps, flag = NormKind; window = order of columns
    Pack = 2,       // packs = input; window = order of columns
    Linear = 3,     // output (+)= weights x their packs, bounded if bound is not 0
    Gated = 4,      // packs = act(gate) * up, weights gate, up; flag = GateKind
    RotaryKv = 5,   // rotates q and k of input in place, writes k and v into the cache of layer; flag = HeadNorm, which
                    // norms q by vector and k by vector + 1 first, value = eps; window = rotary table
    Attention = 6,  // output = attention of input's q over the cache of layer, value = scale, bound of scores
    Gather = 7,     // output row i = input row index[i], by the index of its RowSet
    NormAdd = 8,    // output += norm(input), value = eps, flag = NormKind; hidden states are set, not added to
    // Mixtures of experts. layer = a RoutingDesc; weights are stacks, a matrix an expert; packs and results of experts
    // have the rows of all (token, choice) pairs, ordered by expert.
    Route = 9,          // chooses the experts of all tokens; packs = norm(input) of each one's tokens, as in Norm;
                        // orders are [experts][columns]
    ExpertGated = 10,   // packs = act(gate) * up of their experts, as in Gated
    ExpertLinear = 11,  // output = their expert's weight x packs; a row of output holds all pairs of a token
    ExpertSum = 12,     // output += results in input of a token's choices, weighed, and the shared experts'
    // Latent attention (LatentDesc); Attention is over what these leave.
    LatentKv = 13,      // writes what is cached of the latents into the cache of layer: normed by vector, value = eps,
                        // and rotated; output = the rotated parts of input's queries; window = rotary table
    HeadLinear = 14,    // output = each head's weight of a stack x its columns of input; window and flag = floats from
                        // head to head of input and of output
};
constexpr int kOpKinds = 15;

// Root mean square with the weight `vector`; LayerNorm with it, without or with the bias `vector + 1`.
enum class NormKind : int32_t { Rms = 0, Layer = 1, BiasedLayer = 2 };

// Norms of queries and keys: none; of each head by one weight for all; of all heads together; LayerNorm of each head
// by a weight of its own.
enum class HeadNorm : int32_t { None = 0, Rms = 1, Width = 2, Layer = 3 };

// All tokens, those whose logits are wanted, those whose hidden states are, tokens times `choices`; of packs of
// HeadLinear those that each worker packs for itself.
enum class RowSet : int32_t { Tokens = 0, Logits = 1, Hidden = 2, Pairs = 3, Heads = 4 };

constexpr int32_t kLogits = -1;  // as an output: the caller's logits
constexpr int32_t kHidden = -2;  // the caller's hidden states

struct Op {
    int32_t kind;
    int32_t rows;          // RowSet of what it writes
    int32_t input;         // buffer
    int32_t output;        // buffer, kLogits or kHidden
    int32_t first_pack, pack_count;
    int32_t first_weight, weight_count;
    int32_t vector;
    int32_t layer;
    int32_t window;        // where packs take columns in another order: 1 + the first of the orders, one a pack
    int32_t flag;          // Linear: accumulate; Gated: GateKind; RotaryKv: HeadNorm; norms: NormKind; Attention: has
                           // sinks, a vector
    float value;
    float bound;           // b where results become b * tanh(result / b); 0: none
};

struct WeightDesc {
    const uint8_t* tiles;  // of a stack: matrix behind matrix
    const float* bias;     // [rows padded to 16] or null, of a stack likewise
    int64_t rows, columns, group, out_column;
    int32_t type;
    int32_t pack;          // its input
};

struct PackDesc {
    int32_t kind;          // Activation
    int32_t rows;          // RowSet
    int64_t columns;
};

enum class Scoring : int32_t { Softmax = 0, Sigmoid = 1, SoftmaxOfChosen = 2 };

// How a layer's tokens choose their experts; the arithmetic is that of `MoeSpec` in aphrodite/models/spec.py.
struct RoutingDesc {
    int32_t experts, choices;
    int32_t scoring;       // Scoring
    int32_t normalize;     // scores of the chosen are divided by their sum
    int32_t groups, best_groups;  // experts of the best groups only can be chosen
    int32_t pair_score;    // a group is judged by the sum of its best two, not by its best
    int32_t correction;    // vector that is added to scores for the choice, or -1
    int32_t logits;        // buffer of the router's products
    int32_t shared;        // buffer of the shared experts' results, weighed by the sigmoid of the logit at column
                           // `gate`; -1: none
    int32_t gate;
    float scale;           // of the scores of the chosen
};

// Latent attention: a token's queries have heads of `plain + turning` columns; taken to the latent they have heads of
// `head_dim + turning`. `kv_heads` are groups of heads that one worker computes.
struct LatentDesc {
    int32_t turning;       // columns that are rotated; 0: attention is not latent
    int32_t plain;
    int32_t source, column;  // buffer of latents and turning parts, and where in its rows they begin
};

struct ProgramDesc {
    int64_t vocab_size, max_len, num_layers, heads, kv_heads, head_dim, rotary_half;
    int64_t kv_type;       // KvType
    LatentDesc latent;
    int64_t choices;       // experts a token, of all layers that have any
    const float* cos;      // [rotary tables, max_len, rotary_half]
    const float* sin;
    const float* query_scales;  // [max_len], of queries by their position; null: none
    const Op* ops;
    const WeightDesc* weights;
    const PackDesc* packs;
    const int64_t* buffers;  // widths in floats
    const float* const* vectors;
    const RoutingDesc* routings;
    const int32_t* const* orders;  // permutations of a pack's columns: of the input, in the pack's order; null: as it is
    int64_t op_count, weight_count, pack_count, buffer_count, vector_count, routing_count, order_count;
};

// One step: T tokens of R sequences, as in aphrodite/runner/inputs.py.
struct StepDesc {
    const int32_t* token_ids;
    const int32_t* positions;
    const int64_t* slots;
    const int32_t* query_start;
    const int32_t* context_lens;
    const int32_t* block_tables;
    const int32_t* logits_index;
    int64_t tokens, sequences, table_stride, max_blocks, logits_rows;
    float* logits;         // [logits_rows, vocab_size]
    void* cache;           // [num_layers][num_blocks][kv_heads] blocks of KvType; of latents one for all heads
    int64_t num_blocks;
    int64_t threads;
    int64_t* nanoseconds;  // [kOpKinds], added to; or null
    const int32_t* hidden_index;
    int64_t hidden_rows;
    float* hidden;         // [hidden_rows, width of the input of the operation that writes it]
    const int32_t* adapter_slots;   // [sequences], -1: none; null: no sequence has an adapter
    const LowRank* adapter_pairs;   // [adapter_count][weight_count]
    int64_t adapter_count;
};

enum class StepError : int32_t {
    None = 0,
    Tokens = 1,
    Queries = 2,
    Contexts = 3,
    Blocks = 4,
    Slots = 5,
    LogitsIndex = 6,
    Memory = 7,
    HiddenIndex = 8,
    Adapters = 9,
};

}  // namespace aph
