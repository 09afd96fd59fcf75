// The table of multi-tangent kernels that every instruction set fills. C headers only, as kernels.h says.
//
// A task holds K tangents beside the primal; strides are in elements. "Real" is float, or double for float64.
#pragma once

#include "balanced_rep/kernels.h"

// Compilers whose assembler knows the tile instructions.
#if defined(__x86_64__) && !defined(BR_BASE_ONLY)
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11)
#define BR_AMX 1
#endif
#endif

namespace balanced_rep {

// Which pair of dtypes: of the primal and of the tangents.
enum DTypePair : int {
  kPairF32 = 0,      // float32, float32
  kPairF64 = 1,      // float64, float64
  kPairF16 = 2,      // float16, float16
  kPairBF16 = 3,     // bfloat16, bfloat16
  kPairF32BF16 = 4,  // float32 with bfloat16 tangents
  kPairs = 5
};

enum MaskKind : int { kMaskNone = 0, kMaskBool = 1, kMaskReal = 2 };

constexpr int64_t kQueryBlock = 64;  // queries of an item: keys and values are read once for them
constexpr int64_t kKeyBlock = 96;    // keys whose scores exist at a time

// B batch, H query heads, G heads of keys and values, N queries, M keys, d and c channels. Channels have unit stride.
struct AttentionTask {
  int64_t k, b, h, g, n, m, d, c;
  const void *q, *key, *value;     // (B, H, N, d), (B, G, M, d), (B, G, M, c)
  const void *dq, *dkey, *dvalue;  // the same with K in front; null where there are none
  int64_t q_stride[3], key_stride[3], value_stride[3];
  int64_t dq_stride[4], dkey_stride[4], dvalue_stride[4];
  MaskKind mask_kind;
  const void* mask;  // bytes, or Real; broadcast dims have stride 0
  int64_t mask_stride[4];
  bool causal;
  double scale;
  void *y, *dy;  // (B, H, N, c), (K, B, H, N, c)
  int64_t y_stride[3], dy_stride[4];
};

// Queries and their tangents, output and its tangents, one block of scores and one strip of their tangents (of up to
// 128 bytes), maxima, sums, and a block of keys, values and their tangents in Real. With tiles, whose extents are up to
// 31 larger: queries, keys, values, scores and their tangents once more, in half the bytes.
inline int64_t attention_workspace(const AttentionTask& t) {
  const int64_t d = t.d + 31, c = t.c + 31, channels = (1 + t.k) * (t.d + c);
  const int64_t plain = kQueryBlock * (channels + kKeyBlock + t.k + 2) + kKeyBlock * (32 + 2 * (t.d + t.c));
  const int64_t halves = kQueryBlock * (d * (1 + t.k) + kKeyBlock) + kKeyBlock * (3 * (d + c) + 32);
  return plain + halves / 2 + 32 * 32 + 16 * 32;
}

// (B, C, S) in groups of channels; one of C and S has unit stride.
struct GroupNormTask {
  int64_t k, b, c, s, groups;
  const void *x, *dx;
  void *y, *dy;
  int64_t x_stride[3], dx_stride[4], y_stride[3], dy_stride[4];
  const void *weight, *bias;  // Real (C,) or null
  double eps;
  bool silu;
  bool channels_last;         // C has unit stride
  int64_t block_groups;       // groups of an item; 1 unless channels_last
  int64_t tangents_per_item;  // tangents of an item
};

// Unit values and slopes of an item, and per channel: factors, means and sums in double.
inline int64_t group_norm_workspace(const GroupNormTask& t) {
  const int64_t channels = t.c / t.groups * t.block_groups;
  return 2 * channels * t.s + 8 * channels + 16 * 4;
}

enum RowOp : int { kLayerNorm = 0, kRmsNorm = 1, kSoftmax = 2 };

// (B, R, D), D with unit stride.
struct RowTask {
  RowOp op;
  int64_t k, b, r, d;
  const void *x, *dx;
  void *y, *dy;
  int64_t x_stride[2], dx_stride[3], y_stride[2], dy_stride[3];
  const void *weight, *bias;           // Real, rows of D, or null
  int64_t weight_stride, bias_stride;  // 0: one row for all samples
  double eps;
};

inline int64_t row_workspace(const RowTask& t) { return 2 * t.d + 16 * 2; }

enum Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kActivations = 3 };

// (R, n), n with unit stride; gated: y = x f(g).
struct ActivationTask {
  Activation kind;
  int64_t k, r, n;
  const void *x, *dx, *g, *dg;  // g and dg are null without a gate
  void *y, *dy;
  int64_t x_stride, dx_stride[2], g_stride, dg_stride[2], y_stride, dy_stride[2];
};

constexpr int64_t kActivationChunk = 1024;  // elements of an item of a row

// workspace: 64-byte aligned, of attention_workspace(task) numbers of type Real; so for the others.
typedef void (*AttentionKernel)(const AttentionTask& task, int64_t first_item, int64_t last_item, void* workspace);
typedef void (*GroupNormKernel)(const GroupNormTask& task, int64_t first_item, int64_t last_item, void* workspace);
typedef void (*RowKernel)(const RowTask& task, int64_t first_item, int64_t last_item, void* workspace);
typedef void (*ActivationKernel)(const ActivationTask& task, int64_t first_item, int64_t last_item);

struct JvpKernels {
  AttentionKernel attention[kPairs];    // item: (batch, head, block of queries), the block running fastest
  GroupNormKernel group_norm[kPairs];   // item: (batch, block of channels, block of tangents)
  RowKernel rows[kPairs];               // item: row of (B, R)
  ActivationKernel activation[kPairs];  // item: (row, chunk)
};

}  // namespace balanced_rep
