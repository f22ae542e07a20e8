// Runs a row's program: its stages in their order, then the draw. One copy is compiled for each instruction set.
#pragma once
#include "sampling_draw.h"
#include "sampling_stages.h"

namespace aph {
namespace {

int32_t sample(float* logits, int32_t vocab, const SamplerRow& params, const int32_t* history, int32_t position,
               const LogprobOut& out, const SamplerScratch& scratch) {
    const Stream stream{static_cast<uint32_t>(params.seed), static_cast<uint32_t>(params.seed >> 32),
                        static_cast<uint32_t>(position), kUseDraw};
    const bool raw = params.logprobs >= 0 && !params.processed, copied = raw && params.op_count + params.barred_count > 0;
    if (copied) std::memcpy(scratch.raw, logits, vocab * sizeof(float));
    Row row{logits, nullptr, vocab, vocab, scratch};
    mask_tokens(row, params.barred, params.barred_count);
    const Context context{history, position, params.num_prompt, stream};
    Selection selection;
    for (int32_t i = 0; i < params.op_count; ++i)
        if (!run(row, params.ops[i], context, selection)) break;
    if (!measure(row)) return row.bad ? kBadLogits : kNothingLeft;
    const int32_t token = params.greedy ? first_maximum(row) : draw(row, stream);
    observe(row, context, selection, token);
    if (params.logprobs < 0) return token;
    if (copied) {
        Row model{scratch.raw, nullptr, vocab, vocab, scratch};
        measure(model);
        report_logprobs(model, token, out);
    } else {
        report_logprobs(row, token, out);
    }
    return token;
}

void logprobs(float* logits, int32_t vocab, int32_t token, const LogprobOut& out, const SamplerScratch& scratch) {
    Row row{logits, nullptr, vocab, vocab, scratch};
    measure(row);
    report_logprobs(row, token, out);
}

void uniforms_out(uint64_t seed, uint32_t position, uint32_t use, int32_t count, float* out) {
    const Stream stream{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), position, use};
    for (int32_t first = 0; first < count; first += 4 * kLanes) {
        F32 values[4];
        uniforms(stream, static_cast<uint32_t>(first), values);
        std::memcpy(out + first, values, std::min(4 * kLanes, count - first) * sizeof(float));
    }
}

const SamplerKernels kSamplerKernels = {sample, logprobs, uniforms_out};

}  // namespace
}  // namespace aph
