#include "reduction.h"

#include <array>
#include <stdexcept>
#include <string>

namespace balanced_rep {
namespace {

constexpr int64_t kRowSegment = 1 << 16;     // elements of a segment of rows
constexpr int64_t kColumnSegment = 1 << 19;  // elements of a segment of a column block
constexpr int64_t kMinColumns = 8;           // a narrower kept dim is not worth vectors across it

struct Dim {
  int64_t size, stride, out;
};

int64_t product(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}

void check(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, const char* what) {
  if (shape.size() != strides.size() || shape.size() > kMaxDims) {
    throw std::invalid_argument(std::string(what) + ": got " + std::to_string(shape.size()) + " sizes and " +
                                std::to_string(strides.size()) + " strides; both must be equal and at most " +
                                std::to_string(kMaxDims));
  }
  for (size_t k = 0; k < shape.size(); ++k) {
    if (shape[k] < 0 || strides[k] < 0) throw std::invalid_argument(std::string(what) + ": negative size or stride");
  }
}

// Sorted from outermost to innermost, joined where two dims walk like one. Dims that repeat (stride 0) come first.
// The order of a reduction is free, and kept dims carry their place in the output along.
std::vector<Dim> coalesce(std::vector<Dim> dims) {
  std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) {
    return (a.stride == 0) != (b.stride == 0) ? a.stride == 0 : a.stride > b.stride;
  });
  std::vector<Dim> joined;
  for (const Dim& d : dims) {
    if (!joined.empty() && joined.back().stride == d.size * d.stride && joined.back().out == d.size * d.out) {
      joined.back() = {joined.back().size * d.size, d.stride, d.out};
    } else {
      joined.push_back(d);
    }
  }
  return joined;
}

void store(const std::vector<Dim>& dims, Dims& to) {
  to.n = static_cast<int>(dims.size());
  for (int k = 0; k < to.n; ++k) {
    to.size[k] = dims[k].size;
    to.stride[k] = dims[k].stride;
  }
}

int64_t store_kept(const View& view, Reduction& r) {
  std::vector<Dim> dims;
  int64_t out = 1;
  for (size_t k = view.kept_shape.size(); k-- > 0;) {
    if (view.kept_shape[k] != 1) dims.push_back({view.kept_shape[k], view.kept_strides[k], out});
    out *= view.kept_shape[k];
  }
  dims = coalesce(std::move(dims));
  store(dims, r.kept);
  for (int k = 0; k < r.kept.n; ++k) r.kept_out[k] = dims[k].out;
  return out;
}

// Dims without their repetitions; returns the number of values left, never an empty list.
int64_t store_distinct(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, Dims& to) {
  std::vector<Dim> dims;
  int64_t n = 1;
  for (size_t k = 0; k < shape.size(); ++k) {
    if (shape[k] == 1 || strides[k] == 0) continue;
    dims.push_back({shape[k], strides[k], 0});
    n *= shape[k];
  }
  dims = coalesce(std::move(dims));
  if (dims.empty()) dims.push_back({1, 1, 0});
  store(dims, to);
  return n;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Near-equal segments of about `target` values, each a multiple of `unit`.
void cut(int64_t n, int64_t target, int64_t unit, Reduction& r) {
  const int64_t wanted = std::max<int64_t>(1, (n + target / 2) / std::max<int64_t>(1, target));
  r.segment = ceil_div(ceil_div(n, wanted), unit) * unit;
  r.n_segments = ceil_div(n, r.segment);
}

bool innermost_is_unit(const Dims& dims) { return dims.stride[dims.n - 1] == 1 && dims.size[dims.n - 1] > 1; }

}  // namespace

Plan plan_reduction(const View& view, bool allow_columns) {
  check(view.kept_shape, view.kept_strides, "kept dims");
  check(view.reduced_shape, view.reduced_strides, "reduced dims");
  check(view.pooled_shape, view.pooled_strides, "pooled dims");
  Plan plan;
  Reduction& r = plan.r;
  r.x = view.x;
  r.dtype = view.dtype;
  plan.n_kept = r.n_kept = store_kept(view, r);
  plan.n_reduced = product(view.reduced_shape);
  if (product(view.pooled_shape) == 0) throw std::invalid_argument("pooled dims: a size is 0");
  if (plan.n_kept == 0 || plan.n_reduced == 0) {
    plan.n_elements = 0;
    return plan;
  }
  r.n_reduced = store_distinct(view.reduced_shape, view.reduced_strides, r.reduced);
  plan.repeated = plan.n_reduced / r.n_reduced;
  r.n_pooled = store_distinct(view.pooled_shape, view.pooled_strides, r.pooled);
  r.pool = r.n_pooled == 1 ? kPoolNone : view.pool;
  plan.n_elements = r.n_kept * r.n_reduced * r.n_pooled;

  const int64_t width = r.kept.n > 0 && r.kept.stride[r.kept.n - 1] == 1 ? r.kept.size[r.kept.n - 1] : 0;
  const bool runs = innermost_is_unit(r.reduced) || innermost_is_unit(r.pooled);
  r.columns = allow_columns && width >= kMinColumns && !runs;
  if (r.columns) {
    const int64_t block = std::min(width, kColumnBlock);
    r.n_blocks = ceil_div(width, kColumnBlock);
    cut(r.n_reduced, ceil_div(kColumnSegment, block * r.n_pooled), kColumnPanel, r);
    r.n_items = r.n_kept / width * r.n_blocks * r.n_segments;
  } else {
    r.n_blocks = 1;
    cut(r.n_reduced, ceil_div(kRowSegment, r.n_pooled), r.pool == kPoolNone ? 8192 : 64, r);
    r.n_items = r.n_kept * r.n_segments;
  }
  return plan;
}

}  // namespace balanced_rep
