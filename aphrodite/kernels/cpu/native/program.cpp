#include "program_impl.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "api.h"

namespace aph {

StepError Program::check(const StepDesc& step) const {
    if (step.tokens < 1 || step.sequences < 1 || step.logits_rows < 0 || step.hidden_rows < 0 ||
        step.hidden_rows > step.tokens)
        return StepError::Queries;
    for (int64_t t = 0; t < step.tokens; ++t)
        if (step.token_ids[t] < 0 || step.token_ids[t] >= desc_.vocab_size) return StepError::Tokens;
    if (step.query_start[0] != 0 || step.query_start[step.sequences] != step.tokens) return StepError::Queries;
    for (int64_t r = 0; r < step.sequences; ++r) {
        const int64_t begin = step.query_start[r], count = step.query_start[r + 1] - begin;
        const int64_t context = step.context_lens[r];
        if (count < 1 || begin + count > step.tokens) return StepError::Queries;
        if (context < count || context > desc_.max_len || ceil_div(context, kKvBlock) > step.max_blocks)
            return StepError::Contexts;
        for (int64_t i = 0; i < count; ++i)
            if (step.positions[begin + i] != context - count + i) return StepError::Contexts;
        const int32_t* table = step.block_tables + r * step.table_stride;
        for (int64_t b = 0; b < ceil_div(context, kKvBlock); ++b)
            if (table[b] < 0 || table[b] >= step.num_blocks) return StepError::Blocks;
    }
    for (int64_t t = 0; t < step.tokens; ++t)
        if (step.slots[t] < 0 || step.slots[t] >= step.num_blocks * kKvBlock) return StepError::Slots;
    for (int64_t i = 0; i < step.logits_rows; ++i)
        if (step.logits_index[i] < 0 || step.logits_index[i] >= step.tokens) return StepError::LogitsIndex;
    for (int64_t i = 0; i < step.hidden_rows; ++i)
        if (step.hidden_index[i] < 0 || step.hidden_index[i] >= step.tokens) return StepError::HiddenIndex;
    for (int64_t r = 0; step.adapter_slots != nullptr && r < step.sequences; ++r)
        if (step.adapter_slots[r] < -1 || step.adapter_slots[r] >= step.adapter_count) return StepError::Adapters;
    return StepError::None;
}

void Program::prepare() {
    for (size_t i = 0; i < buffers_.size(); ++i) buffers_[i] = buffer_memory_[i].get<float>(step_.tokens * widths_[i]);
    for (size_t i = 0; i < packs_.size(); ++i) {
        PackedRows& pack = packs_[i];
        pack = {static_cast<Activation>(pack_descs_[i].kind), pack_descs_[i].columns, rows_of(pack_descs_[i].rows),
                nullptr, nullptr};
        const int64_t copies = copied_[i] && pack.rows <= kGroupRows ? step_.threads : 1;
        pack.words = pack_memory_[2 * i].get<int32_t>(copies * whole_lines(pack.rows * pack.row_words()));
        pack.meta = pack_memory_[2 * i + 1].get<float>(copies * whole_lines(pack.rows * pack.row_meta()));
    }
    if (!routings_.empty()) routing_.prepare(routings_, step_.tokens, step_.threads);
    const int64_t widest = *std::max_element(widths_.begin(), widths_.end());
    norm_rows_ = norm_memory_.get<float>(step_.threads * kGroupRows * widest);
    if (!orders_.empty()) ordered_rows_ = ordered_memory_.get<float>(step_.threads * kGroupRows * widest);
    attention_scratch_ = attention_memory_.get<float>(
        step_.threads * attention_scratch(static_cast<int>(desc_.head_dim), desc_.latent.turning));
}

// Where query tiles are few or one is much of the work, the tiles of their contexts are spread over the workers too.
void Program::plan_attention() {
    constexpr int64_t kMostPartials = int64_t{1} << 24;  // floats
    queries_.clear();
    const int64_t group = desc_.heads / desc_.kv_heads, most = std::max<int64_t>(1, kMaxQueryRows / group);
    int64_t total = 0, largest = 0, widest = 0;
    most_tiles_ = 0;
    for (int64_t r = 0; r < step_.sequences; ++r) {
        const int64_t begin = step_.query_start[r], end = step_.query_start[r + 1];
        const int64_t start = step_.context_lens[r] - (end - begin);
        most_tiles_ = std::max<int64_t>(most_tiles_, ceil_div(step_.context_lens[r], kKvTile));
        for (int64_t token = begin; token < end; token += most) {
            const QueryTile tile{token, start + token - begin, static_cast<int32_t>(r),
                                 static_cast<int32_t>(std::min(most, end - token)), 0};
            for (int32_t head = 0; head < desc_.kv_heads; ++head) queries_.push_back(tile), queries_.back().kv_head = head;
            total += tile.work() * desc_.kv_heads;
            largest = std::max(largest, tile.work());
            widest = std::max<int64_t>(widest, tile.count);
        }
    }
    const int64_t count = static_cast<int64_t>(queries_.size());
    partial_stride_ = widest * group * (desc_.head_dim + 2);
    const int64_t partials = count * most_tiles_ * partial_stride_;
    split_tiles_ = step_.threads > 1 && most_tiles_ > 1 && partials <= kMostPartials &&
                   (count < 6 * step_.threads || largest > total / (6 * step_.threads));
    if (split_tiles_) partials_ = partial_memory_.get<float>(partials);
}

StepError Program::run(const StepDesc& step) {
    const StepError error = check(step);
    if (error != StepError::None) return error;
    step_ = step;
    step_.threads = std::max<int64_t>(1, std::min<int64_t>(step.threads, kMaxThreads));
    prepare();
    plan_attention();
    plan_adapters();
    run_region(
        static_cast<int>(step_.threads),
        [](void* context, Team& team, int worker) {
            Program& program = *static_cast<Program*>(context);
            using Clock = std::chrono::steady_clock;
            int64_t* const nanoseconds = worker == 0 ? program.step_.nanoseconds : nullptr;
            for (const Op& op : program.ops_) {
                if (program.rows_of(op.rows) == 0) continue;
                const Clock::time_point began = nanoseconds != nullptr ? Clock::now() : Clock::time_point();
                program.run_op(op, team, worker);
                if (nanoseconds != nullptr) nanoseconds[op.kind] += (Clock::now() - began).count();
            }
        },
        this);
    return StepError::None;
}

void Program::run_op(const Op& op, Team& team, int worker) {
    switch (static_cast<OpKind>(op.kind)) {
        case OpKind::Embed: return embed(op, team, worker);
        case OpKind::Norm: return norm(op, team, worker);
        case OpKind::Pack: return pack(op, team, worker);
        case OpKind::Linear: return linear(op, team, worker);
        case OpKind::Gated: return gated(op, team, worker);
        case OpKind::RotaryKv: return rotary_kv(op, team, worker);
        case OpKind::Attention: return attention(op, team, worker);
        case OpKind::Gather: return gather(op, team, worker);
        case OpKind::NormAdd: return norm_add(op, team, worker);
        case OpKind::Route: return route(op, team, worker);
        case OpKind::ExpertGated: return expert_gated(op, team, worker);
        case OpKind::ExpertLinear: return expert_linear(op, team, worker);
        case OpKind::ExpertSum: return expert_sum(op, team, worker);
        case OpKind::LatentKv: return latent_kv(op, team, worker);
        case OpKind::HeadLinear: return head_linear(op, team, worker);
    }
}

void Program::embed(const Op& op, Team& team, int worker) {
    const TileWeight table = weight(op.first_weight);
    team.phase(worker, step_.tokens, [&](int64_t t) {
        float* row = buffers_[op.output] + t * widths_[op.output];
        tile_row(table, step_.token_ids[t], row);
        if (op.value != 0.0f)
            for (int64_t i = 0; i < table.columns; ++i) row[i] *= op.value;
    });
}

// A pack as one worker sees it: its own copy, where there are copies.
PackedRows Program::pack_of(int64_t index, int worker) const {
    PackedRows pack = packs_[index];
    if (copied_[index] && pack.rows <= kGroupRows) {
        pack.words += worker * whole_lines(pack.rows * pack.row_words());
        pack.meta += worker * whole_lines(pack.rows * pack.row_meta());
    }
    return pack;
}

bool Program::overwrites_input(const Op& next, const Op& op) const {
    const bool writes_buffer = !packs_rows(next) && next.kind != static_cast<int32_t>(OpKind::Gated);
    const bool in_place = next.kind == static_cast<int32_t>(OpKind::RotaryKv);
    return writes_buffer && (in_place ? next.input : next.output) == op.input;
}

void Program::norm_row(const Op& op, const float* x, int64_t columns, float* out) const {
    const NormKind kind = static_cast<NormKind>(op.flag);
    if (kind == NormKind::Rms) return kernels_.rms_norm(x, vectors_[op.vector], op.value, columns, out);
    const float* bias = kind == NormKind::BiasedLayer ? vectors_[op.vector + 1] : nullptr;
    kernels_.layer_norm(x, vectors_[op.vector], bias, op.value, columns, out);
}

// Packs group `group` of rows, whose first one `row` lies at the beginning of `rows`, into the i-th pack of an operation.
void Program::pack_group(const Op& op, int i, FloatRows rows, int64_t row, int64_t group, const PackedRows& out,
                         int worker, int64_t expert) {
    const int32_t* order = order_of(op, i);
    if (order != nullptr) {
        float* ordered = ordered_rows_ + worker * kGroupRows * out.columns;
        gather_columns(rows, group_width(row, out.rows), order + expert * out.columns, out.columns, ordered);
        rows = {ordered, out.columns};
    }
    // pack expects row 0 of the whole at its pointer
    kernels_.pack(rows.data - row * rows.stride, rows.stride, group, out);
}

void Program::norm(const Op& op, Team& team, int worker) {
    const int64_t columns = pack_descs_[op.first_pack].columns, width = widths_[op.input], rows = rows_of(op.rows);
    float* normed = norm_rows_ + worker * kGroupRows * columns;
    row_groups(op, team, worker, [&](int64_t group) {
        const int64_t row = group_start(group, rows);
        for (int m = 0; m < group_width(row, rows); ++m)
            norm_row(op, buffers_[op.input] + (row + m) * width, columns, normed + m * columns);
        for (int i = 0; i < op.pack_count; ++i)
            pack_group(op, i, {normed, columns}, row, group, pack_of(op.first_pack + i, worker), worker);
    });
}

void Program::norm_add(const Op& op, Team& team, int worker) {
    const int64_t width = widths_[op.input];
    float* normed = norm_rows_ + worker * kGroupRows * width;
    team.phase(worker, rows_of(op.rows), [&](int64_t t) {
        const float* row = buffers_[op.input] + t * width;
        if (op.output == kHidden) return norm_row(op, row, width, step_.hidden + t * width);
        norm_row(op, row, width, normed);
        float* sum = buffers_[op.output] + t * width;
        for (int64_t i = 0; i < width; ++i) sum[i] += normed[i];
    });
}

void Program::pack(const Op& op, Team& team, int worker) {
    const int64_t width = widths_[op.input], rows = rows_of(op.rows);
    row_groups(op, team, worker, [&](int64_t group) {
        const int64_t row = group_start(group, rows);
        for (int i = 0; i < op.pack_count; ++i)
            pack_group(op, i, {buffers_[op.input] + row * width, width}, row, group, pack_of(op.first_pack + i, worker),
                       worker);
    });
}

// Workers start with rows of their own where there are many: what a row's next operation reads is then in the cache of
// the core that wrote it. Few rows are not divided, so that weights are read once.
RowSpans Program::spans(int64_t rows, int threads) const {
    constexpr int64_t kSpanRows = 64;
    const int64_t span = rows < 2 * kSpanRows * threads ? (rows < 16 * threads ? rows : ceil_div(rows, 8 * threads) * 8)
                                                        : kSpanRows;
    return {span, ceil_div(rows, span), rows};
}

// Weights that share an input are one run of tiles; a chunk lies within one weight.
void Program::linear(const Op& op, Team& team, int worker) {
    constexpr int64_t kMostTiles = 8;
    int64_t tiles = 0;
    for (int i = 0; i < op.weight_count; ++i) tiles += tile_count(weights_[op.first_weight + i].rows);
    AdapterRows adapters[kMostAdapted];
    const bool adapting = adapts(op);
    if (adapting) {
        shrink_adapters(op, team, worker);
        for (int i = 0; i < op.weight_count; ++i) adapters[i] = adapter_rows(op, i);
    }
    const RowSpans spans = this->spans(rows_of(op.rows), team.size());
    const int64_t step = std::clamp<int64_t>(tiles * spans.count / (12 * team.size()), 1, kMostTiles);
    int64_t chunks = 0;
    for (int i = 0; i < op.weight_count; ++i)
        chunks += ceil_div(tile_count(weights_[op.first_weight + i].rows), step);
    const bool logits = op.output == kLogits;
    const LinearOut out{logits ? step_.logits : buffers_[op.output],
                        logits ? desc_.vocab_size : widths_[op.output], op.flag != 0, op.bound};
    team.phase(worker, chunks * spans.count, [&](int64_t index) {
        int64_t chunk = index % chunks;
        for (int i = 0; i < op.weight_count; ++i) {
            TileWeight w = weight(op.first_weight + i);
            if (adapting) w.adapters = &adapters[i];
            const int64_t count = tile_count(w.rows), own = ceil_div(count, step);
            if (chunk < own) {
                const PackedRows in = pack_of(weights_[op.first_weight + i].pack, worker);
                const Range range{chunk * step, std::min(count, (chunk + 1) * step)};
                return kernels_.linear(in, w, range, spans.range(index / chunks), out);
            }
            chunk -= own;
        }
    });
}

void Program::gated(const Op& op, Team& team, int worker) {
    constexpr int64_t kMostBlocks = 2;
    GatedPair pair{weight(op.first_weight), weight(op.first_weight + 1),
                   pack_of(weights_[op.first_weight].pack, worker),
                   pack_of(weights_[op.first_weight + 1].pack, worker), static_cast<GateKind>(op.flag)};
    AdapterRows adapters[2];
    if (adapts(op)) {
        shrink_adapters(op, team, worker);
        for (int i = 0; i < 2; ++i) adapters[i] = adapter_rows(op, i);
        pair.gate.adapters = &adapters[0];
        pair.up.adapters = &adapters[1];
    }
    const RowSpans spans = this->spans(rows_of(op.rows), team.size());
    const int64_t blocks = pair.gate.rows / kBlock, step = spans.count > 1 ? kMostBlocks : 1;
    const int64_t chunks = ceil_div(blocks, step);
    team.phase(worker, chunks * spans.count, [&](int64_t index) {
        const int64_t chunk = index % chunks;
        kernels_.gated(pair, {chunk * step, std::min(blocks, (chunk + 1) * step)}, spans.range(index / chunks),
                       &packs_[op.first_pack], op.pack_count);
    });
}

// Norms queries and keys of a token over all their heads.
void Program::norm_width(const Op& op, Team& team, int worker) {
    const int64_t queries = desc_.heads * desc_.head_dim, keys = desc_.kv_heads * desc_.head_dim;
    team.phase(worker, step_.tokens, [&](int64_t t) {
        float* row = buffers_[op.input] + t * widths_[op.input];
        kernels_.rms_norm(row, vectors_[op.vector], op.value, queries, row);
        kernels_.rms_norm(row + queries, vectors_[op.vector + 1], op.value, keys, row + queries);
    });
}

void Program::rotary_kv(const Op& op, Team& team, int worker) {
    const HeadNorm kind = static_cast<HeadNorm>(op.flag);
    if (kind == HeadNorm::Width) norm_width(op, team, worker);
    const int64_t span = step_.tokens < 64 ? 1 : 8, spans = ceil_div(step_.tokens, span);
    const int64_t head_dim = desc_.head_dim, group = desc_.heads / desc_.kv_heads, half = desc_.rotary_half;
    team.phase(worker, spans * desc_.kv_heads, [&](int64_t chunk) {
        const int64_t kv_head = chunk % desc_.kv_heads, begin = chunk / desc_.kv_heads * span;
        for (int64_t t = begin; t < std::min(begin + span, step_.tokens); ++t) {
            float* row = buffers_[op.input] + t * widths_[op.input];
            const int64_t angles = (op.window * desc_.max_len + step_.positions[t]) * half;
            const float *cos = desc_.cos + angles, *sin = desc_.sin + angles;
            const auto turn = [&](float* head, int32_t norm, int64_t index) {
                if (kind == HeadNorm::Rms) kernels_.rms_norm(head, vectors_[norm], op.value, head_dim, head);
                if (kind == HeadNorm::Layer)
                    kernels_.layer_norm(head, vectors_[norm] + index * head_dim, nullptr, op.value, head_dim, head);
                kernels_.rotate(head, cos, sin, half);
            };
            const float scale = query_scale(t);
            for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
                turn(row + h * head_dim, op.vector, h);
                for (int64_t i = 0; scale != 1.0f && i < head_dim; ++i) row[h * head_dim + i] *= scale;
            }
            float* key = row + (desc_.heads + kv_head) * head_dim;
            turn(key, op.vector + 1, kv_head);
            const int64_t block = step_.slots[t] / kKvBlock;
            char* target = layer_cache(op.layer) + (block * desc_.kv_heads + kv_head) * head_bytes();
            kernels_.store_kv(key, key + desc_.kv_heads * head_dim, head_dim, kv_type(), target,
                              static_cast<int>(step_.slots[t] % kKvBlock));
        }
    });
}

AttentionTask Program::task(const Op& op, const QueryTile& tile) const {
    return {buffers_[op.input] + tile.token * widths_[op.input],
            buffers_[op.output] + tile.token * widths_[op.output],
            layer_cache(op.layer),
            step_.block_tables + tile.sequence * step_.table_stride,
            tile.position,
            tile.count,
            tile.kv_head};
}

void Program::attention(const Op& op, Team& team, int worker) {
    const AttentionShape shape{static_cast<int>(desc_.heads), static_cast<int>(desc_.kv_heads),
                               static_cast<int>(desc_.head_dim), desc_.latent.turning, widths_[op.input],
                               widths_[op.output],
                               kv_type(), op.window, op.value, op.bound,
                               op.flag != 0 ? vectors_[op.vector] : nullptr};
    float* scratch = attention_scratch_ + worker * attention_scratch(shape.head_dim, shape.turning);
    const int64_t count = static_cast<int64_t>(queries_.size());
    if (!split_tiles_) {
        team.phase(worker, count, [&](int64_t i) {
            const AttentionTask next = task(op, queries_[std::min(i + 1, count - 1)]);
            AttentionTask query = task(op, queries_[i]);
            query.next = &next;
            kernels_.attend(shape, query, scratch);
        });
        return;
    }
    const int64_t stride = partial_stride_;
    team.phase(worker, count * most_tiles_, [&](int64_t chunk) {
        const AttentionTask query = task(op, queries_[chunk / most_tiles_]);
        const int64_t tile = chunk % most_tiles_;
        if (tile < first_tile(shape, query) || tile >= end_tile(query)) return;
        kernels_.attend_tile(shape, query, tile, scratch, partials_ + chunk * stride);
    });
    team.phase(worker, count, [&](int64_t i) {
        const AttentionTask query = task(op, queries_[i]);
        const int64_t first = first_tile(shape, query);
        kernels_.merge_tiles(shape, query, partials_ + (i * most_tiles_ + first) * stride, stride,
                             end_tile(query) - first, scratch);
    });
}

void Program::gather(const Op& op, Team& team, int worker) {
    const int64_t width = widths_[op.input];
    const int32_t* index =
        op.rows == static_cast<int32_t>(RowSet::Hidden) ? step_.hidden_index : step_.logits_index;
    team.phase(worker, rows_of(op.rows), [&](int64_t i) {
        std::memcpy(buffers_[op.output] + i * width, buffers_[op.input] + index[i] * width, width * sizeof(float));
    });
}

}  // namespace aph

// A program for the named instruction set (null: the best); null if that cannot run or memory is short. Everything
// that the description points at must outlive it, the description's own arrays excepted.
APH_API void* aph_program_create(const aph::ProgramDesc* desc, const char* isa) {
    const aph::Kernels* kernels = aph::select_kernels(isa);
    if (kernels == nullptr) return nullptr;
    try {
        return new aph::Program(*desc, *kernels);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

APH_API void aph_program_destroy(void* program) { delete static_cast<aph::Program*>(program); }

// Runs one step, from one thread at a time; returns a StepError, and nothing has happened unless it is None.
APH_API int32_t aph_program_run(void* program, const aph::StepDesc* step) {
    try {
        return static_cast<int32_t>(static_cast<aph::Program*>(program)->run(*step));
    } catch (const std::bad_alloc&) {
        return static_cast<int32_t>(aph::StepError::Memory);
    }
}
