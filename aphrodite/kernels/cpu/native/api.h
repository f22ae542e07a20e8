// What the library exports: a plain C ABI for ctypes. Every function of it is `APH_API`, named `aph_*`.
#pragma once
#include <cstdint>

#if defined(_WIN32)
#define APH_API extern "C" __declspec(dllexport)
#else
#define APH_API extern "C" __attribute__((visibility("default")))
#endif

// Raised with every incompatible change, so that a stale library in a source tree is refused.
constexpr int32_t kAbiVersion = 15;
