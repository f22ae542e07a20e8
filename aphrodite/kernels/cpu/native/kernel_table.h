// All kernels over the lanes that were included before.
#pragma once
#include "lane_math.h"
// the order matters: each uses the ones above
#include "rows.h"
// what adapters add to products
#include "low_rank_rows.h"
// products pack their results
#include "attention.h"
#include "limits.h"
#include "linear.h"
// products of types that linear.h leaves to it
#include "decoded.h"

namespace aph {
namespace {

constexpr Kernels kernel_table(const char* isa) {
    return {isa,         linear,           gated,             shrink,           pack_group, rms_norm,         layer_norm,        rotate,  store_kv, store_latent,
            attend,      attend_tile,      merge_tiles,       add_weighted,     dot_chains<true>, dot_chains<false>, kChains, read_all};
}

}  // namespace
}  // namespace aph
