// The operations of mixtures of experts.
//
// The chosen experts' products are one phase for gate and up and one for down, whatever the number of experts: a token's
// eight small matrices are shared out as one large one would be.
#include <algorithm>

#include "program_impl.h"

namespace aph {
namespace {

constexpr int kMostPacks = 2;  // forms of one input: floats and integers

}  // namespace

// One token's experts all read the same row, which is packed once, while another worker chooses, unless each expert has
// an order of columns of its own.
void Program::route(const Op& op, Team& team, int worker) {
    const RoutingDesc& layer = routings_[op.layer];
    const float* correction = layer.correction < 0 ? nullptr : vectors_[layer.correction];
    const auto choose = [&](int64_t token) {
        const float* logits = buffers_[layer.logits] + token * widths_[layer.logits];
        routing_.choose(layer, logits, correction, token, worker);
    };
    if (step_.tokens == 1 && !takes_orders(op)) {
        return team.phase(worker, 2, [&](int64_t part) {
            if (part == 1) return pack_expert_rows(op, 0, worker);
            choose(0);
            routing_.group(layer, 1);
        });
    }
    team.phase(worker, step_.tokens, choose);
    team.phase(worker, 1, [&](int64_t) { routing_.group(layer, step_.tokens); });
    team.phase(worker, routing_.group_total(), [&](int64_t group) { pack_expert_rows(op, group, worker); });
}

// Packs one group of rows of an expert.
void Program::pack_expert_rows(const Op& op, int64_t group, int worker) {
    const int64_t columns = pack_descs_[op.first_pack].columns, width = widths_[op.input];
    const bool alone = step_.tokens == 1 && !takes_orders(op);
    const ExpertSegment segment = alone ? ExpertSegment{0, 0, 1, 0} : routing_.segment_of_group(group);
    const int64_t own = group - segment.first_group, row = group_start(own, segment.count);
    float* normed = norm_rows_ + worker * kGroupRows * columns;
    for (int m = 0; m < group_width(row, segment.count); ++m) {
        const int64_t token = alone ? 0 : routing_.token_of(segment.first + row + m);
        norm_row(op, buffers_[op.input] + token * width, columns, normed + m * columns);
    }
    for (int i = 0; i < op.pack_count; ++i)
        pack_group(op, i, {normed, columns}, row, own,
                   segment_rows(packs_[op.first_pack + i], segment.first, segment.count), worker, segment.expert);
}

// Calls f(segment, range) for every expert that was chosen and `step` of `parts` parts of its work at a time: all in
// one phase, so that workers share experts. An expert's rows stay together, for its weights are then read once.
template <class F>
void Program::for_experts(Team& team, int worker, int64_t parts, int64_t step, F&& f) {
    const int64_t chunks = ceil_div(parts, step);
    const std::vector<ExpertSegment>& segments = routing_.segments();
    team.phase(worker, chunks * static_cast<int64_t>(segments.size()), [&](int64_t index) {
        const int64_t begin = index % chunks * step;
        f(segments[index / chunks], Range{begin, std::min(parts, begin + step)});
    });
}

void Program::expert_gated(const Op& op, Team& team, int worker) {
    const int64_t gate = op.first_weight, up = gate + 1;
    for_experts(team, worker, weights_[gate].rows / kBlock, 1, [&](const ExpertSegment& segment, Range blocks) {
        const auto input = [&](int64_t index) {
            // The one row of a step of one token is every expert's.
            const int64_t pack = weights_[index].pack, stride = step_.tokens == 1 && !ordered_[pack] ? 0 : 1;
            return segment_rows(packs_[pack], stride * segment.first, segment.count);
        };
        const GatedPair pair{expert_weight(gate, segment.expert), expert_weight(up, segment.expert), input(gate),
                             input(up), static_cast<GateKind>(op.flag)};
        PackedRows out[kMostPacks];
        for (int i = 0; i < op.pack_count; ++i)
            out[i] = segment_rows(packs_[op.first_pack + i], segment.first, segment.count);
        kernels_.gated(pair, blocks, {0, segment.count}, out, op.pack_count);
    });
}

void Program::expert_linear(const Op& op, Team& team, int worker) {
    constexpr int64_t kMostTiles = 8;
    const int64_t tiles = tile_count(weights_[op.first_weight].rows), width = widths_[op.output] / desc_.choices;
    const int64_t all = tiles * static_cast<int64_t>(routing_.segments().size());
    const int64_t step = std::clamp<int64_t>(all / (12 * team.size()), 1, kMostTiles);
    for_experts(team, worker, tiles, step, [&](const ExpertSegment& segment, Range range) {
        const LinearOut out{buffers_[op.output] + segment.first * width, width, false, 0.0f};
        const PackedRows in = segment_rows(packs_[weights_[op.first_weight].pack], segment.first, segment.count);
        kernels_.linear(in, expert_weight(op.first_weight, segment.expert), range, {0, segment.count}, out);
    });
}

void Program::expert_sum(const Op& op, Team& team, int worker) {
    constexpr int64_t kSpan = 512;  // columns
    const RoutingDesc& layer = routings_[op.layer];
    const int64_t width = widths_[op.output], spans = ceil_div(width, kSpan);
    team.phase(worker, step_.tokens * spans, [&](int64_t chunk) {
        const int64_t token = chunk / spans, first = chunk % spans * kSpan;
        const float* rows[kMostChoices + 1];
        float weights[kMostChoices + 1];
        int count = 0;
        for (; count < layer.choices; ++count) {
            const int64_t pair = token * layer.choices + count;
            rows[count] = buffers_[op.input] + routing_.row_of(pair) * width + first;
            weights[count] = routing_.weight_of(pair);
        }
        if (layer.shared >= 0) {
            rows[count] = buffers_[layer.shared] + token * width + first;
            weights[count++] = sigmoid(buffers_[layer.logits][token * widths_[layer.logits] + layer.gate]);
        }
        kernels_.add_weighted(rows, weights, count, std::min(kSpan, width - first),
                              buffers_[op.output] + token * width + first);
    });
}

}  // namespace aph
