// The operations of latent attention (DeepSeek-V2's MLA, arXiv 2405.04434, section 2.1) around attention itself.
//
// Attention is always over the cached latents, in prompts too: expanding keys and values for them would be less work
// where contexts are long, but would round otherwise, and a token's result may not depend on how its prompt was cut.
#include <algorithm>
#include <cstring>

#include "program_impl.h"

namespace aph {

// A token's latent, normed, and the part of its key that turns.
void Program::cache_latent(const Op& op, int64_t token, int worker) {
    const LatentDesc& latent = desc_.latent;
    const int64_t rank = desc_.head_dim, angles = (op.window * desc_.max_len + step_.positions[token]) * desc_.rotary_half;
    const float* own = buffers_[latent.source] + token * widths_[latent.source] + latent.column;
    float* vector = norm_rows_ + worker * latent_dim();
    kernels_.rms_norm(own, vectors_[op.vector], op.value, rank, vector);
    std::memcpy(vector + rank, own + rank, latent.turning * sizeof(float));
    kernels_.rotate(vector + rank, desc_.cos + angles, desc_.sin + angles, desc_.rotary_half);
    const int64_t slot = step_.slots[token];
    kernels_.store_latent(vector, static_cast<int>(rank), latent.turning, kv_type(),
                          layer_cache(op.layer) + slot / kKvBlock * block_bytes(), static_cast<int>(slot % kKvBlock));
}

void Program::latent_kv(const Op& op, Team& team, int worker) {
    const LatentDesc& latent = desc_.latent;
    const int64_t span = step_.tokens < 64 ? 1 : 8, rank = desc_.head_dim, head_dim = latent.plain + latent.turning;
    team.phase(worker, ceil_div(step_.tokens, span), [&](int64_t chunk) {
        for (int64_t t = chunk * span; t < std::min((chunk + 1) * span, step_.tokens); ++t) {
            cache_latent(op, t, worker);
            const int64_t angles = (op.window * desc_.max_len + step_.positions[t]) * desc_.rotary_half;
            const float scale = query_scale(t);
            for (int64_t h = 0; h < desc_.heads; ++h) {
                float* query = buffers_[op.input] + t * widths_[op.input] + h * head_dim;
                float* turned = buffers_[op.output] + t * widths_[op.output] + h * latent_dim() + rank;
                for (int64_t i = 0; scale != 1.0f && i < head_dim; ++i) query[i] *= scale;
                std::memcpy(turned, query + latent.plain, latent.turning * sizeof(float));
                kernels_.rotate(turned, desc_.cos + angles, desc_.sin + angles, desc_.rotary_half);
            }
        }
    });
}

// A chunk is some tokens of a head, and of few tokens a part of its rows: its input is packed where it is used, which
// costs little beside a product with hundreds of rows, and needs no phase of its own.
void Program::head_linear(const Op& op, Team& team, int worker) {
    const WeightDesc& weight = weights_[op.first_weight];
    const int64_t tiles = tile_count(weight.rows), rows = std::min(step_.tokens, kHeadRows);
    const int64_t spans = ceil_div(step_.tokens, rows), pieces = desc_.heads * spans;
    const int64_t step = ceil_div(tiles, std::clamp<int64_t>(ceil_div(4 * team.size(), pieces), 1, tiles));
    const int64_t parts = ceil_div(tiles, step);
    team.phase(worker, pieces * parts, [&](int64_t chunk) {
        const int64_t part = chunk % parts, token = chunk / parts % spans * rows, head = chunk / parts / spans;
        const int64_t count = std::min(rows, step_.tokens - token);
        const PackedRows in = segment_rows(packs_[weight.pack], worker * rows, count);
        const float* x = buffers_[op.input] + token * widths_[op.input] + head * op.window;
        for (int64_t group = 0; group < group_count(count); ++group) kernels_.pack(x, widths_[op.input], group, in);
        const LinearOut out{buffers_[op.output] + token * widths_[op.output] + head * op.flag, widths_[op.output],
                            false, 0.0f};
        kernels_.linear(in, expert_weight(op.first_weight, head), {part * step, std::min(tiles, (part + 1) * step)},
                        {0, count}, out);
    });
}

}  // namespace aph
