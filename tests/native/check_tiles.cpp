// Attention by tiles, in software, against attention by vectors: every extent around a tile, every set of operands.
//
// Each array has memory of its own, exactly as long as it has to be, so that sanitizers see what is read or written
// outside.
#define BR_ISA_NAMESPACE check
#define BR_TILES "tiles_in_software.inl"
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>

#include "attention_amx.inl"

namespace balanced_rep {
namespace check {
namespace {

std::mt19937 generator(1);

int64_t one_of(std::initializer_list<int64_t> values) { return values.begin()[generator() % values.size()]; }

template <class E>
std::unique_ptr<E[]> random(int64_t n) {
  std::unique_ptr<E[]> x(new E[n]);
  for (int64_t i = 0; i < n; ++i) {
    float sum = -6;  // nearly normal
    for (int k = 0; k < 12; ++k) sum += static_cast<float>(generator() >> 8) / (1 << 24);
    x[i] = from_real<E>(sum);
  }
  return x;
}

void set_strides(int64_t (&stride)[3], int64_t heads, int64_t rows, int64_t columns) {
  stride[0] = heads * rows * columns, stride[1] = rows * columns, stride[2] = columns;
}
void set_strides(int64_t (&stride)[4], int64_t batch, int64_t heads, int64_t rows, int64_t columns) {
  stride[0] = batch * heads * rows * columns, stride[1] = heads * rows * columns, stride[2] = rows * columns;
  stride[3] = columns;
}

// Returns whether the tangents are as far apart as the roundings to bfloat16 explain, and the outputs equal.
template <class T>
bool agree() {
  AttentionTask t = {};
  t.k = one_of({0, 1, 3}), t.b = one_of({1, 2}), t.g = one_of({1, 2}), t.h = t.g * one_of({1, 2});
  t.n = one_of({1, 15, 17, 33, 64, 65, 130}), t.m = one_of({0, 2, 31, 33, 95, 97, 200});
  t.d = one_of({1, 8, 31, 32, 33, 64}), t.c = one_of({0, 1, 15, 17, 33, 48});
  t.scale = 1 / std::sqrt(static_cast<double>(t.d)), t.causal = generator() % 2;
  const unsigned moving = generator() % 8;
  const int64_t of_q = t.b * t.h * t.n, of_key = t.b * t.g * t.m;
  const auto q = random<T>(of_q * t.d), key = random<T>(of_key * t.d), value = random<T>(of_key * t.c);
  const auto dq = random<BFloat>(t.k * of_q * t.d), dkey = random<BFloat>(t.k * of_key * t.d);
  const auto dvalue = random<BFloat>(t.k * of_key * t.c);
  const auto mask = random<float>(t.n * t.m);
  t.q = q.get(), t.key = key.get(), t.value = value.get();
  t.dq = moving & 1 ? dq.get() : nullptr, t.dkey = moving & 2 ? dkey.get() : nullptr;
  t.dvalue = moving & 4 ? dvalue.get() : nullptr;
  if (generator() % 2) {
    for (int64_t i = 0; i < t.n * t.m; ++i) mask[i] = generator() % 4 == 0 ? -INFINITY : mask[i];
    t.mask = mask.get(), t.mask_kind = kMaskReal, t.mask_stride[2] = t.m, t.mask_stride[3] = 1;
  }
  set_strides(t.q_stride, t.h, t.n, t.d), set_strides(t.dq_stride, t.b, t.h, t.n, t.d);
  set_strides(t.key_stride, t.g, t.m, t.d), set_strides(t.dkey_stride, t.b, t.g, t.m, t.d);
  set_strides(t.value_stride, t.g, t.m, t.c), set_strides(t.dvalue_stride, t.b, t.g, t.m, t.c);
  set_strides(t.y_stride, t.h, t.n, t.c), set_strides(t.dy_stride, t.b, t.h, t.n, t.c);

  const int64_t items = t.b * t.h * ((t.n + kQueryBlock - 1) / kQueryBlock), size = attention_workspace(t);
  std::unique_ptr<T[]> y[2];
  std::unique_ptr<BFloat[]> dy[2];
  for (int tiles = 0; tiles < 2; ++tiles) {
    y[tiles] = random<T>(of_q * t.c), dy[tiles] = random<BFloat>(t.k * of_q * t.c);
    t.y = y[tiles].get(), t.dy = dy[tiles].get();
    std::unique_ptr<float[]> workspace(new float[size]);
    for (int64_t i = 0; i < size; ++i) workspace[i] = NAN;
    if (tiles) {
      amx_attention_items<T>(t, 0, items, workspace.get());
    } else {
      attention_items<T, BFloat>(t, 0, items, workspace.get());
    }
  }
  bool same = configured == 0;
  for (int64_t i = 0; i < of_q * t.c; ++i) same = same && to_real(y[0][i]) == to_real(y[1][i]);
  double off = 0, norm = 0;
  for (int64_t i = 0; i < t.k * of_q * t.c; ++i) {
    const double a = to_real(dy[0][i]), b = to_real(dy[1][i]);
    off += (a - b) * (a - b), norm += a * a;
  }
  // As in tests/ops/test_attention_bfloat16.py. Of a query that sees few keys nearly all of h v cancels, its rounding
  // not.
  const double keys = static_cast<double>(t.causal && t.n < t.m ? t.n : t.m);
  const double cancelled = keys > 0 ? 0.25 / keys * static_cast<double>(t.k * of_q * t.c) : 0;
  const bool right = same && std::sqrt(off) <= 5.0 / 512 * std::sqrt(norm + cancelled);
  if (!right) {
    std::printf("k %d, n %d, m %d, d %d, c %d, operands %u, %zu bytes: off by %g of %g%s\n", static_cast<int>(t.k),
                static_cast<int>(t.n), static_cast<int>(t.m), static_cast<int>(t.d), static_cast<int>(t.c), moving,
                sizeof(T), std::sqrt(off), std::sqrt(norm), same ? "" : ", outputs differ");
  }
  return right;
}

}  // namespace
}  // namespace check
}  // namespace balanced_rep

int main() {
  int wrong = 0;
  for (int i = 0; i < 100; ++i) {
    wrong += !balanced_rep::check::agree<float>();
    wrong += !balanced_rep::check::agree<balanced_rep::check::BFloat>();
  }
  return wrong != 0;
}
