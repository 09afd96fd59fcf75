// The multi-tangent ops of balanced_rep._C. A tensor is (address, strides in elements); balanced_rep/ops/_cpp_jvp.py is
// the only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>

#include "balanced_rep/ops.h"

namespace py = pybind11;
namespace br = balanced_rep;

namespace {

typedef std::vector<int64_t> Ints;
typedef std::pair<std::uintptr_t, Ints> Strided;

void* address(std::uintptr_t a) { return reinterpret_cast<void*>(a); }

// Copies the strides of all dims but the last, whose stride is known.
template <size_t N>
void* read(const Strided& x, int64_t (&stride)[N], const char* name) {
  if (x.first != 0 && x.second.size() != N) {
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(x.second.size()) + " strides, expected " +
                                std::to_string(N));
  }
  for (size_t i = 0; i < N; ++i) stride[i] = x.first == 0 ? 0 : x.second[i];
  return address(x.first);
}

template <size_t N>
void sizes(const Ints& given, int64_t* (&&to)[N]) {
  if (given.size() != N) throw std::invalid_argument("expected " + std::to_string(N) + " sizes");
  for (size_t i = 0; i < N; ++i) {
    if (given[i] < 0) throw std::invalid_argument("a size is negative");
    *to[i] = given[i];
  }
}

br::DTypePair pair_of(int code) {
  if (code < 0 || code >= br::kPairs) throw std::invalid_argument("dtype pair " + std::to_string(code) + " is unknown");
  return static_cast<br::DTypePair>(code);
}

void attention(int pair, const Ints& shape, const Strided& q, const Strided& k, const Strided& v, const Strided& dq,
               const Strided& dk, const Strided& dv, int mask_kind, const Strided& mask, bool causal, double scale,
               const Strided& y, const Strided& dy, int n_threads) {
  br::AttentionTask t;
  sizes(shape, {&t.k, &t.b, &t.h, &t.g, &t.n, &t.m, &t.d, &t.c});
  if (t.g == 0 ? t.h != 0 : t.h % t.g != 0) throw std::invalid_argument("heads are not a multiple of the groups");
  if (mask_kind < br::kMaskNone || mask_kind > br::kMaskReal) throw std::invalid_argument("mask kind is unknown");
  t.q = read(q, t.q_stride, "q");
  t.key = read(k, t.key_stride, "k");
  t.value = read(v, t.value_stride, "v");
  t.dq = read(dq, t.dq_stride, "dq");
  t.dkey = read(dk, t.dkey_stride, "dk");
  t.dvalue = read(dv, t.dvalue_stride, "dv");
  t.mask_kind = static_cast<br::MaskKind>(mask_kind);
  t.mask = read(mask, t.mask_stride, "mask");
  t.causal = causal;
  t.scale = scale;
  t.y = read(y, t.y_stride, "y");
  t.dy = read(dy, t.dy_stride, "dy");
  const br::DTypePair dtypes = pair_of(pair);
  py::gil_scoped_release nogil;
  br::attention_jvp(t, dtypes, n_threads);
}

void group_norm(int pair, const Ints& shape, bool channels_last, const Strided& x, const Strided& dx,
                std::uintptr_t weight, std::uintptr_t bias, double eps, bool silu, const Strided& y, const Strided& dy,
                int n_threads) {
  br::GroupNormTask t{};
  sizes(shape, {&t.k, &t.b, &t.c, &t.s, &t.groups});
  if (t.groups < 1 || t.c % t.groups != 0) throw std::invalid_argument("channels are not a multiple of the groups");
  t.channels_last = channels_last;
  t.x = read(x, t.x_stride, "x");
  t.dx = read(dx, t.dx_stride, "dx");
  t.weight = address(weight);
  t.bias = address(bias);
  t.eps = eps;
  t.silu = silu;
  t.y = read(y, t.y_stride, "y");
  t.dy = read(dy, t.dy_stride, "dy");
  const br::DTypePair dtypes = pair_of(pair);
  py::gil_scoped_release nogil;
  br::group_norm_jvp(t, dtypes, n_threads);
}

void rows(int op, int pair, const Ints& shape, const Strided& x, const Strided& dx, std::uintptr_t weight,
          int64_t weight_stride, std::uintptr_t bias, int64_t bias_stride, double eps, const Strided& y,
          const Strided& dy, int n_threads) {
  br::RowTask t;
  if (op < br::kLayerNorm || op > br::kSoftmax) throw std::invalid_argument("row op is unknown");
  t.op = static_cast<br::RowOp>(op);
  sizes(shape, {&t.k, &t.b, &t.r, &t.d});
  t.x = read(x, t.x_stride, "x");
  t.dx = read(dx, t.dx_stride, "dx");
  t.weight = address(weight);
  t.weight_stride = weight_stride;
  t.bias = address(bias);
  t.bias_stride = bias_stride;
  t.eps = eps;
  t.y = read(y, t.y_stride, "y");
  t.dy = read(dy, t.dy_stride, "dy");
  const br::DTypePair dtypes = pair_of(pair);
  py::gil_scoped_release nogil;
  br::row_jvp(t, dtypes, n_threads);
}

void activation(int kind, int pair, const Ints& shape, const Strided& x, const Strided& dx, const Strided& g,
                const Strided& dg, const Strided& y, const Strided& dy, int n_threads) {
  br::ActivationTask t;
  if (kind < 0 || kind >= br::kActivations) throw std::invalid_argument("activation is unknown");
  t.kind = static_cast<br::Activation>(kind);
  sizes(shape, {&t.k, &t.r, &t.n});
  int64_t one[1];
  t.x = read(x, one, "x");
  t.x_stride = one[0];
  t.dx = read(dx, t.dx_stride, "dx");
  t.g = read(g, one, "g");
  t.g_stride = one[0];
  t.dg = read(dg, t.dg_stride, "dg");
  t.y = read(y, one, "y");
  t.y_stride = one[0];
  t.dy = read(dy, t.dy_stride, "dy");
  const br::DTypePair dtypes = pair_of(pair);
  py::gil_scoped_release nogil;
  br::activation_jvp(t, dtypes, n_threads);
}

}  // namespace

void bind_jvp(py::module_& m) {
  m.def("attention_jvp", &attention, "Attention (B, H, N, c) and its tangents.");
  m.def("group_norm_jvp", &group_norm, "Group norm of (B, C, S), with SiLU or not, and its tangents.");
  m.def("row_jvp", &rows, "Layer norm, RMS norm or softmax of rows (B, R, D), and its tangents.");
  m.def("activation_jvp", &activation, "An activation of (R, n), gated or not, and its tangents.");
}
