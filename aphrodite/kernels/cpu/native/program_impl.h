// A program as the library keeps it: its operations, the memory of a step, and what its operations share.
#pragma once
#include <algorithm>
#include <new>
#include <vector>

#include "column_order.h"
#include "experts.h"
#include "kernels.h"
#include "program.h"
#include "thread_pool.h"

namespace aph {

// Memory that grows and is not kept while growing.
class Scratch {
public:
    template <class T>
    T* get(int64_t count) {
        const size_t bytes = static_cast<size_t>(count) * sizeof(T) + kCacheLine;
        if (bytes > bytes_) {
            ::operator delete(memory_, std::align_val_t(kCacheLine));
            memory_ = nullptr;
            bytes_ = 0;
            memory_ = ::operator new(bytes, std::align_val_t(kCacheLine));
            bytes_ = bytes;
        }
        return static_cast<T*>(memory_);
    }
    ~Scratch() { ::operator delete(memory_, std::align_val_t(kCacheLine)); }
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

private:
    void* memory_ = nullptr;
    size_t bytes_ = 0;
};

// Query positions of one sequence that one worker handles, all heads of one kv head.
struct QueryTile {
    int64_t token, position;
    int32_t sequence, count, kv_head;
    int64_t work() const { return count * (position + count); }  // in (query, position) pairs, about
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Four-byte elements, rounded up to whole cache lines.
inline int64_t whole_lines(int64_t elements) { return ceil_div(elements, kCacheLine / 4) * (kCacheLine / 4); }

// Rows in spans of whole groups.
struct RowSpans {
    int64_t span, count, rows;
    Range range(int64_t index) const { return {index * span, std::min(rows, (index + 1) * span)}; }
};

class Program {
public:
    Program(const ProgramDesc& desc, const Kernels& kernels)
        : desc_(desc),
          kernels_(kernels),
          ops_(desc.ops, desc.ops + desc.op_count),
          weights_(desc.weights, desc.weights + desc.weight_count),
          pack_descs_(desc.packs, desc.packs + desc.pack_count),
          widths_(desc.buffers, desc.buffers + desc.buffer_count),
          vectors_(desc.vectors, desc.vectors + desc.vector_count),
          routings_(desc.routings, desc.routings + desc.routing_count),
          orders_(desc.orders, desc.orders + desc.order_count),
          buffer_memory_(desc.buffer_count),
          pack_memory_(2 * desc.pack_count),
          buffers_(desc.buffer_count),
          packs_(desc.pack_count),
          copied_(desc.pack_count),
          ordered_(desc.pack_count) {
        for (const Op& op : ops_)
            for (int i = 0; i < op.pack_count; ++i) {
                copied_[op.first_pack + i] = packs_rows(op);
                ordered_[op.first_pack + i] = takes_orders(op);
            }
    }

    StepError run(const StepDesc& step);
    const Kernels& kernels() const { return kernels_; }

private:
    StepError check(const StepDesc& step) const;
    void prepare();
    void plan_attention();
    void run_op(const Op& op, Team& team, int worker);
    void embed(const Op& op, Team& team, int worker);
    void norm(const Op& op, Team& team, int worker);
    void pack(const Op& op, Team& team, int worker);
    void linear(const Op& op, Team& team, int worker);
    void gated(const Op& op, Team& team, int worker);
    void rotary_kv(const Op& op, Team& team, int worker);
    void attention(const Op& op, Team& team, int worker);
    void gather(const Op& op, Team& team, int worker);
    void norm_add(const Op& op, Team& team, int worker);

    // Adapters: program_adapters.cpp.
    void plan_adapters();
    bool adapts(const Op& op) const;  // whether a row's adapter adds to one of its products
    void shrink_adapters(const Op& op, Team& team, int worker);
    AdapterRows adapter_rows(const Op& op, int i) const;  // of its i-th weight
    const LowRank& pair_of(int64_t slot, int64_t weight) const {
        return step_.adapter_pairs[slot * static_cast<int64_t>(weights_.size()) + weight];
    }
    void route(const Op& op, Team& team, int worker);
    void expert_gated(const Op& op, Team& team, int worker);
    void expert_linear(const Op& op, Team& team, int worker);
    void expert_sum(const Op& op, Team& team, int worker);

    // Latent attention: program_latent.cpp.
    void latent_kv(const Op& op, Team& team, int worker);
    void cache_latent(const Op& op, int64_t token, int worker);
    void head_linear(const Op& op, Team& team, int worker);

    template <class F>
    void for_experts(Team& team, int worker, int64_t parts, int64_t step, F&& f);
    void pack_expert_rows(const Op& op, int64_t group, int worker);
    void norm_row(const Op& op, const float* x, int64_t columns, float* out) const;
    void pack_group(const Op& op, int i, FloatRows rows, int64_t row, int64_t group, const PackedRows& out, int worker,
                    int64_t expert = 0);
    void norm_width(const Op& op, Team& team, int worker);
    RowSpans spans(int64_t rows, int threads) const;
    static bool packs_rows(const Op& op) {
        return op.kind == static_cast<int32_t>(OpKind::Norm) || op.kind == static_cast<int32_t>(OpKind::Pack);
    }
    // Whether packs of an operation that packs rows may have orders of columns of their own.
    static bool takes_orders(const Op& op) {
        return op.window > 0 && (packs_rows(op) || op.kind == static_cast<int32_t>(OpKind::Route));
    }
    // The order of columns in the i-th pack of such an operation, null: that of the input.
    const int32_t* order_of(const Op& op, int i) const {
        return takes_orders(op) ? orders_[op.window - 1 + i] : nullptr;
    }
    // Whether every worker packs all rows for itself: quicker than sharing one group of rows and waiting for it.
    bool each_for_itself(const Op& op) const { return packs_rows(op) && rows_of(op.rows) <= kGroupRows; }
    bool overwrites_input(const Op& next, const Op& op) const;
    template <class F>
    void row_groups(const Op& op, Team& team, int worker, F&& f);
    PackedRows pack_of(int64_t index, int worker) const;
    int64_t rows_of(int32_t set) const {
        if (set == static_cast<int32_t>(RowSet::Tokens)) return step_.tokens;
        if (set == static_cast<int32_t>(RowSet::Pairs)) return step_.tokens * desc_.choices;
        if (set == static_cast<int32_t>(RowSet::Heads)) return step_.threads * std::min(step_.tokens, kHeadRows);
        return set == static_cast<int32_t>(RowSet::Logits) ? step_.logits_rows : step_.hidden_rows;
    }
    TileWeight weight(int64_t index) const {
        const WeightDesc& w = weights_[index];
        return {static_cast<Type>(w.type), w.tiles, w.rows, w.columns, w.group, w.out_column, w.bias};
    }
    TileWeight expert_weight(int64_t index, int64_t expert) const {
        TileWeight found = weight(index);
        found.tiles += expert * tile_count(found.rows) * found.tile_bytes();
        if (found.bias != nullptr) found.bias += expert * tile_count(found.rows) * kTileRows;
        return found;
    }
    char* layer_cache(int layer) const {
        return static_cast<char*>(step_.cache) + layer * step_.num_blocks * block_bytes();
    }
    KvType kv_type() const { return static_cast<KvType>(desc_.kv_type); }
    int64_t head_bytes() const { return kv_head_bytes(kv_type(), desc_.head_dim); }  // of a block
    int64_t latent_dim() const { return desc_.head_dim + desc_.latent.turning; }
    int64_t block_bytes() const {
        return desc_.latent.turning > 0 ? latent_block_bytes(kv_type(), latent_dim()) : desc_.kv_heads * head_bytes();
    }
    // What a query at a token's position is multiplied by.
    float query_scale(int64_t token) const {
        return desc_.query_scales == nullptr ? 1.0f : desc_.query_scales[step_.positions[token]];
    }
    AttentionTask task(const Op& op, const QueryTile& tile) const;

    ProgramDesc desc_;
    const Kernels& kernels_;
    std::vector<Op> ops_;
    std::vector<WeightDesc> weights_;
    std::vector<PackDesc> pack_descs_;
    std::vector<int64_t> widths_;
    std::vector<const float*> vectors_;
    std::vector<RoutingDesc> routings_;
    std::vector<const int32_t*> orders_;
    Routing routing_;  // of the layer that is computed
    std::vector<Scratch> buffer_memory_, pack_memory_;
    std::vector<float*> buffers_;
    std::vector<PackedRows> packs_;
    std::vector<bool> copied_;  // packs written by Norm and Pack
    std::vector<bool> ordered_;  // packs of operations with orders of columns
    Scratch attention_memory_, partial_memory_, norm_memory_, ordered_memory_;
    float* attention_scratch_ = nullptr;
    float* partials_ = nullptr;
    float* norm_rows_ = nullptr;     // of each worker [kGroupRows][widest buffer]
    float* ordered_rows_ = nullptr;  // the same, in another order of columns
    static constexpr int64_t kHeadRows = 64;  // tokens of a HeadLinear's chunk
    static constexpr int kMostAdapted = 3;  // weights of an operation that adapters may add to: q, k and v
    Scratch low_memory_, adapter_memory_;
    std::vector<int32_t> token_slots_;
    std::vector<AdapterBlock> adapter_blocks_;
    float* low_ = nullptr;           // [weights of the operation][tokens][most_rank_]
    float* adapter_rows_ = nullptr;  // of each worker [kAdapterRows][adapter_columns_]
    int64_t most_rank_ = 0, adapter_columns_ = 0;
    std::vector<QueryTile> queries_;
    bool split_tiles_ = false;
    int64_t most_tiles_ = 0, partial_stride_ = 0;
    StepDesc step_{};
};

// Calls f for every group of rows of an operation that packs rows. Without a share there is nothing to wait for, unless
// the next operation would write what a slower worker still reads; the one after that comes behind a barrier.
template <class F>
void Program::row_groups(const Op& op, Team& team, int worker, F&& f) {
    const int64_t rows = rows_of(op.rows);
    if (!each_for_itself(op)) return team.phase(worker, group_count(rows), f);
    for (int64_t group = 0; group < group_count(rows); ++group) f(group);
    const Op* next = &op + 1;
    const bool last = next == ops_.data() + ops_.size();
    if (last || each_for_itself(*next) || overwrites_input(*next, op)) team.barrier();
}

}  // namespace aph
