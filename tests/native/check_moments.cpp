// Checks the CPU moments against long double, without Python: run under sanitizers, with vectors wider than the machine
// has, and under an emulator of another processor. Prints what failed and exits 1. The argument k, for slow places,
// runs every k-th check only.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "balanced_rep/isa.h"
#include "balanced_rep/ops.h"

using namespace balanced_rep;

namespace {

typedef long double Wide;
typedef std::vector<int64_t> Ints;

constexpr double kInf = INFINITY;
const char* const kNames[kFields] = {"n", "mean", "m2", "m3", "m4", "l1", "min", "max", "n_active", "n_nonfinite"};
int failures = 0, checks = 0;

uint64_t random_state = 1;
double uniform() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(random_state >> 11) * 0x1p-53;
}
double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }

size_t element_size(DType t) { return t == kFloat64 ? 8 : t == kFloat32 ? 4 : 2; }

float from_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

double decode_half(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const double sign = h >> 15 ? -1 : 1;
  if (exponent == 31) return mantissa ? NAN : sign * kInf;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

// Stores about v; the value is what load_value reads back.
void store_value(void* p, DType t, double v) {
  const float f = static_cast<float>(v);
  uint32_t bits;
  memcpy(&bits, &f, 4);
  uint16_t h = static_cast<uint16_t>(bits >> 16);
  if (t == kFloat16) {
    const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
    const uint32_t sign = bits >> 16 & 0x8000;
    if (f != f) {
      h = 0x7e01;
    } else if (exponent >= 31) {
      h = static_cast<uint16_t>(sign | (std::isinf(f) ? 0x7c00 : 0x7bff));
    } else if (exponent <= 0) {
      h = static_cast<uint16_t>(sign | static_cast<uint32_t>(std::fabs(f) * 0x1p24f));
    } else {
      h = static_cast<uint16_t>(sign | static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 1023));
    }
  }
  if (t == kBFloat16 && f != f) h = 0x7fc1;
  if (t == kFloat64) memcpy(p, &v, 8);
  if (t == kFloat32) memcpy(p, &f, 4);
  if (t == kFloat16 || t == kBFloat16) memcpy(p, &h, 2);
}

double load_value(const void* p, DType t) {
  double d;
  float f;
  uint16_t h;
  if (t == kFloat64) return memcpy(&d, p, 8), d;
  if (t == kFloat32) return memcpy(&f, p, 4), f;
  memcpy(&h, p, 2);
  return t == kBFloat16 ? from_bits(static_cast<uint32_t>(h) << 16) : decode_half(h);
}

int64_t product(const Ints& shape) {
  int64_t n = 1;
  for (int64_t s : shape) n *= s;
  return n;
}

int64_t offset_of(int64_t linear, const Ints& shape, const Ints& strides) {
  int64_t offset = 0;
  for (size_t k = shape.size(); k-- > 0;) {
    offset += linear % shape[k] * strides[k];
    linear /= shape[k];
  }
  return offset;
}

double pooled_value(const View& v, const char* base) {
  const int64_t n = product(v.pooled_shape);
  const auto at = [&](int64_t k) {
    return load_value(
        base + offset_of(k, v.pooled_shape, v.pooled_strides) * static_cast<int64_t>(element_size(v.dtype)), v.dtype);
  };
  if (v.pool == kPoolNone) return at(0);
  Wide sum = 0;
  double most = -kInf;
  for (int64_t k = 0; k < n; ++k) {
    sum += at(k);
    most = most != most || !(at(k) <= most) ? (most != most ? most : at(k)) : most;
  }
  return v.pool == kPoolMax ? most : static_cast<double>(sum / n);
}

void definition(const std::vector<double>& x, double threshold, Wide* f) {
  const Wide n = static_cast<Wide>(x.size());
  for (int k = 0; k < kFields; ++k) f[k] = 0;
  f[0] = n, f[6] = kInf, f[7] = -kInf;
  if (x.empty()) return;
  Wide sum = 0;
  for (double v : x) {
    sum += v;
    f[5] += std::fabs(v);
    f[6] = f[6] != f[6] || v != v ? NAN : v < f[6] ? v : f[6];
    f[7] = f[7] != f[7] || v != v ? NAN : v > f[7] ? v : f[7];
    f[8] += v > threshold;
    f[9] += !std::isfinite(v);
  }
  f[1] = f[6] == f[7] && f[9] == 0 ? f[6] : sum / n;
  for (double v : x) {
    const Wide d = v - f[1], d2 = d * d;
    f[2] += d2, f[3] += d2 * d, f[4] += d2 * d2;
  }
  if (f[9] > 0) f[2] = f[3] = f[4] = NAN;
}

bool within(Wide got, Wide want, Wide allowed) {
  return got == want || (got != got && want != want) || std::fabs(got - want) <= allowed;
}

void compare(const double* out, int64_t n_kept, int64_t i, const std::vector<double>& x, const View& v,
             double threshold, const std::string& what) {
  Wide want[kFields];
  definition(x, threshold, want);
  const bool narrow = v.dtype != kFloat64;
  const Wide eps = narrow ? 1e-6 : 1e-13, loose = narrow ? 1e-5 : 1e-12, std = std::sqrt(want[2] / want[0]);
  const Wide size = std::fabs(want[1]) > std || std != std ? std::fabs(want[1]) : std, n = want[0];
  // Float64 itself leaves (eps |mean|)^k in the k-th power of a deviation, and so does the mean of a pooling.
  const Wide noise = 0x1p-52L * (std::fabs(want[6]) > std::fabs(want[7]) ? std::fabs(want[6]) : std::fabs(want[7]));
  const Wide slack = n * noise * (std + noise);
  const Wide ends = v.pool == kPoolMean ? noise * 4 : 0;
  const Wide allowed[kFields] = {0,
                                 eps * size,
                                 2 * eps * want[2] + slack,
                                 loose * (std::fabs(want[3]) + want[2] * std) + 3 * slack * (std + noise),
                                 loose * want[4] + 4 * slack * (std + noise) * (std + noise),
                                 eps * want[5],
                                 ends,
                                 ends,
                                 0,
                                 0};
  for (int f = 0; f < kFields; ++f) {
    ++checks;
    const Wide got = out[f * n_kept + i];
    if (within(got, want[f], allowed[f])) continue;
    if (++failures < 20) {
      std::printf("%s, output %lld: %s is %.17Lg, not %.17Lg (allowed %.3Lg)\n", what.c_str(),
                  static_cast<long long>(i), kNames[f], got, want[f], allowed[f]);
    }
  }
}

// A random strided view of a buffer that ends exactly where the view does, so that a sanitizer sees every overrun.
struct Case {
  Ints kept, reduced, pooled;
  Pool pool;
  Ints order;   // dims (kept, reduced, pooled) from outermost to innermost in memory
  int64_t gap;  // extra elements between the rows of the innermost dim but one
};

const char* const kKinds[] = {"normal", "offset", "tiny", "huge", "relu", "constant", "step", "sparse", "nan", "inf"};

double draw(const std::string& kind, int64_t i, int64_t n, DType t) {
  const bool half = t == kFloat16, brief = half || t == kBFloat16;
  const double z = normal();
  if (kind == "offset") return z + (brief ? 10 : 1000);
  if (kind == "tiny") return z * (half ? 1e-6 : 1e-20);
  if (kind == "huge") return (z > 0 ? 1 : -1) * (half ? 6e4 : 3e38) * (1 - 0.1 * uniform());
  if (kind == "relu") return z > 0 ? z : 0;
  if (kind == "constant") return 0.1;
  if (kind == "step") return z + (2 * i > n ? 50 : 0);
  if (kind == "sparse") return uniform() < 0.01 ? z : 0;
  if (kind == "nan" && i == n / 2) return NAN;
  if (kind == "inf" && i == n / 2) return kInf;
  return z;
}

void run(const Case& c, DType dtype, const std::string& kind, const std::string& name) {
  Ints shape = c.kept;
  shape.insert(shape.end(), c.reduced.begin(), c.reduced.end());
  shape.insert(shape.end(), c.pooled.begin(), c.pooled.end());
  Ints strides(shape.size());
  int64_t step = 1, last = 0;
  for (size_t k = c.order.size(); k-- > 0;) {
    const size_t dim = static_cast<size_t>(c.order[k]);
    strides[dim] = step;
    step *= shape[dim];
    if (k + 1 == c.order.size()) step += c.gap;
  }
  for (size_t k = 0; k < shape.size(); ++k) last += (shape[k] - 1) * strides[k];
  const size_t bytes = element_size(dtype);
  const int64_t n = product(shape) == 0 ? 0 : last + 1;
  std::vector<char> memory(static_cast<size_t>(n) * bytes);
  for (int64_t i = 0; i < n; ++i)
    store_value(memory.data() + static_cast<size_t>(i) * bytes, dtype, draw(kind, i, n, dtype));

  const size_t a = c.kept.size(), b = a + c.reduced.size();
  const auto part = [](const Ints& v, size_t from, size_t to) {
    return Ints(v.begin() + static_cast<std::ptrdiff_t>(from), v.begin() + static_cast<std::ptrdiff_t>(to));
  };
  const View view = {memory.data(), dtype,
                     c.kept,        part(strides, 0, a),
                     c.reduced,     part(strides, a, b),
                     c.pooled,      part(strides, b, shape.size()),
                     c.pool};
  const int64_t n_kept = product(c.kept), n_reduced = product(c.reduced);
  std::vector<double> out(static_cast<size_t>(kFields * n_kept), NAN);
  const double threshold = 0.07;  // no value and no mean of a pooling is as near as rounding
  moments(view, threshold, out.data(), 1);
  for (int64_t i = 0; i < n_kept; ++i) {
    std::vector<double> x;
    for (int64_t j = 0; j < n_reduced; ++j) {
      const int64_t at =
          offset_of(i, view.kept_shape, view.kept_strides) + offset_of(j, view.reduced_shape, view.reduced_strides);
      x.push_back(pooled_value(view, memory.data() + static_cast<size_t>(at) * bytes));
    }
    compare(out.data(), n_kept, i, x, view, threshold, name + " dtype " + std::to_string(dtype) + " " + kind);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int every = argc > 1 ? std::atoi(argv[1]) : 1;
  int turn = 0;
  choose_isa();
  const DType dtypes[] = {kFloat32, kFloat16, kBFloat16, kFloat64};
  std::vector<std::pair<std::string, Case>> cases;
  for (int64_t n : {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 515, 4096, 4097, 4103, 9000}) {
    cases.push_back({"row of " + std::to_string(n), {{2}, {n}, {}, kPoolNone, {0, 1}, 0}});
    cases.push_back({"strided row of " + std::to_string(n), {{3}, {n}, {}, kPoolNone, {1, 0}, 2}});
  }
  for (int64_t columns : {8, 9, 15, 16, 17, 31, 33, 64, 511, 513, 545}) {
    for (int64_t rows : {1, 2, 7, 8, 9, 64, 65, 257}) {
      const std::string size = std::to_string(rows) + " rows of " + std::to_string(columns) + " columns";
      cases.push_back({size, {{columns}, {rows}, {}, kPoolNone, {1, 0}, 1}});
    }
  }
  for (Pool pool : {kPoolMax, kPoolMean}) {
    const std::string name = pool == kPoolMax ? "max of " : "mean of ";
    cases.push_back({name + "runs", {{2}, {37}, {5, 7}, pool, {0, 1, 2, 3}, 0}});
    cases.push_back({name + "cropped runs", {{2}, {11}, {5, 67}, pool, {0, 1, 2, 3}, 3}});
    cases.push_back({name + "neighbours", {{2}, {70}, {5}, pool, {0, 2, 1}, 0}});
    cases.push_back({name + "columns", {{45}, {19}, {3}, pool, {1, 2, 0}, 0}});
    cases.push_back({name + "nothing contiguous", {{3}, {4}, {9}, pool, {2, 1, 0}, 1}});
  }
  cases.push_back({"short runs", {{5}, {3, 4, 6}, {}, kPoolNone, {1, 2, 0, 3}, 0}});
  cases.push_back({"long runs", {{2}, {3, 2500}, {}, kPoolNone, {1, 0, 2}, 0}});
  cases.push_back({"no kept dim", {{}, {70000}, {}, kPoolNone, {0}, 0}});
  cases.push_back({"nothing to reduce", {{0}, {5}, {}, kPoolNone, {0, 1}, 0}});
  cases.push_back({"empty reduction", {{5}, {0}, {}, kPoolNone, {0, 1}, 0}});
  for (const auto& [name, c] : cases) {
    for (DType dtype : dtypes) {
      for (const char* kind : kKinds) {
        if (turn++ % every == 0) run(c, dtype, kind, name);
      }
    }
  }
  std::printf("%s, %d-byte vectors: %d checks, %d failures\n", isa().c_str(), kernels().vector_bytes, checks, failures);
  return failures ? 1 : 0;
}
