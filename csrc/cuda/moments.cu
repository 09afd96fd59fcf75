// Moments of a strided activation in one launch: n, mean, m2, m3, m4, sum |v|, min, max, active and non-finite count of
// every row of pooled values v, with m_k = sum (v - mean)^k.
//
// A block of 256 threads holds one tile of a row (or of several neighbouring rows) in registers and reduces it twice:
//   1. sum, min, max and active count give the pivot (the rounded mean) and a power of two u <= max |v|;
//   2. d = (v - pivot) / u, exact up to one rounding, gives sum |v| / u and sum d^k, which neither overflow nor underflow.
// Sums are in float32 (float64 for float64 input), tiles are merged in float64 (Chan et al. 1979, Pebay 2008) by one
// thread per row, because float64 is slow on many devices.
// Where a row is cut into segments, the block that draws the last ticket of the row merges them in index order, so the
// bits of the result do not depend on the order in which blocks finish.
//
// Device code only: compiles under NVRTC, which instantiates the kernels that it is asked for, and as host C++.

namespace balanced_rep {

using int64 = long long;
using float32 = float;
using float64 = double;
struct float16 {
    unsigned short bits;
};
struct bfloat16 {
    unsigned short bits;
};

// Where the elements are. x has dims (kept2, kept1, kept0, red2, red1, red0, pool1, pool0), innermost last. A tile takes
// 2^inner_shift indices of red0 and fills up with indices of red1; red2, kept1 and kept2 are enumerated. Element offsets
// are 64 bits; what counts tiles is 32, because the launcher refuses more of them.
struct Layout {
    int64 n_kept;  // rows in all
    int64 n_kept0;
    int64 n_red0;
    int64 n_red1;
    int64 n_pool0;
    int64 n_pool1;
    int64 stride_kept0;
    int64 stride_kept1;
    int64 stride_kept2;
    int64 stride_red0;
    int64 stride_red1;
    int64 stride_red2;
    int64 stride_pool0;
    int64 stride_pool1;
    unsigned n_kept1;
    unsigned inner_shift;
    unsigned tiles_kept0;  // tiles along kept0
    unsigned tiles_red0;   // tiles along red0
    unsigned tiles_red1;   // tiles along red1
    unsigned n_tiles;      // tiles of a row, the indices of red2 included
    unsigned tiles_per_segment;
    unsigned n_segments;
};

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kFields = 10;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxFields = 5;  // of one reduction

__device__ __forceinline__ int lane() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp() { return threadIdx.x >> 5; }

// --- numbers ----------------------------------------------------------------------------------------------------------

template <class T>
struct Accumulator {
    using type = float;
};
template <>
struct Accumulator<float64> {
    using type = double;
};

__device__ __forceinline__ float widen(float32 value) { return value; }
__device__ __forceinline__ double widen(float64 value) { return value; }
__device__ __forceinline__ float widen(bfloat16 value) {
    return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
__device__ __forceinline__ float widen(float16 value) {
#ifdef __CUDA_ARCH__
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    const unsigned sign = (value.bits & 0x8000u) << 16, rest = (value.bits & 0x7fffu) << 13;
    const bool finite = rest < 0x0f800000u;
    // The exponent is rebiased by an exact product, which also normalises subnormal numbers.
    const unsigned magnitude = finite ? __float_as_uint(__uint_as_float(rest) * 0x1p112f) : rest | 0x7f800000u;
    return __uint_as_float(sign | magnitude);
#endif
}

// The larger and smaller of two numbers; NaN loses against a number.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ double smaller(double a, double b) { return fmin(a, b); }
__device__ __forceinline__ float magnitude(float a) { return fabsf(a); }
__device__ __forceinline__ double magnitude(double a) { return fabs(a); }
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <class A>
__device__ __forceinline__ A infinity();
template <>
__device__ __forceinline__ float infinity<float>() {
    return __int_as_float(0x7f800000);
}
template <>
__device__ __forceinline__ double infinity<double>() {
    return __longlong_as_double(0x7ff0000000000000ll);
}
__device__ __forceinline__ double not_a_number() { return __longlong_as_double(0x7ff8000000000000ll); }

// The largest power of two <= magnitude, kept where its inverse is a normal number too, and that inverse.
__device__ __forceinline__ void power_of_two(float magnitude, float& unit, float& scale) {
    const int bits = min(max(__float_as_int(magnitude) & 0x7f800000, 0x00800000), 0x7e800000);
    unit = __int_as_float(bits);
    scale = __int_as_float(0x7f000000 - bits);
}
__device__ __forceinline__ void power_of_two(double magnitude, double& unit, double& scale) {
    const int64 bits =
        min(max(__double_as_longlong(magnitude) & 0x7ff0000000000000ll, 0x0010000000000000ll), 0x7fd0000000000000ll);
    unit = __longlong_as_double(bits);
    scale = __longlong_as_double(0x7fe0000000000000ll - bits);
}

// --- the result and its merge, in float64 -----------------------------------------------------------------------------

struct State {
    double n, mean, m2, m3, m4, l1, low, high, n_active, n_nonfinite;
};

__device__ __forceinline__ State empty_state() {
    const double inf = infinity<double>();
    return {0, 0, 0, 0, 0, 0, inf, -inf, 0, 0};
}

// What holds whatever the rounding: constant values have zero moments, non-finite ones have none.
__device__ __forceinline__ void settle(State& s) {
    if (s.n_nonfinite > 0) {
        s.m2 = s.m3 = s.m4 = not_a_number();
    } else if (s.low == s.high) {
        s.mean = s.low;
        s.m2 = s.m3 = s.m4 = 0;
    } else {
        s.m2 = fmax(s.m2, 0.0);
        s.m4 = fmax(s.m4, 0.0);
    }
}

// Moments of the union; b may be empty. With d = mean_b - mean_a, p = n_a / n, q = n_b / n:
//   mean = mean_a + d q,  m2 = m2_a + m2_b + d^2 n_a q,
//   m3 = m3_a + m3_b + d^3 n_a q (p - q) + 3 d (p m2_b - q m2_a),
//   m4 = m4_a + m4_b + d^4 n_a q (p^2 - p q + q^2) + 6 d^2 (p^2 m2_b + q^2 m2_a) + 4 d (p m3_b - q m3_a).
__device__ __forceinline__ State merge(const State& a, const State& b) {
    if (b.n == 0) return a;
    State s;
    s.n = a.n + b.n;
    s.n_active = a.n_active + b.n_active;
    s.n_nonfinite = a.n_nonfinite + b.n_nonfinite;
    s.l1 = a.l1 + b.l1;
    const bool number = a.low == a.low && b.low == b.low;  // low and high are NaN together
    s.low = number ? fmin(a.low, b.low) : not_a_number();
    s.high = number ? fmax(a.high, b.high) : not_a_number();
    const double inverse = 1 / s.n, p = a.n * inverse, q = b.n * inverse, d = b.mean - a.mean, dd = d * d, nq = a.n * q;
    s.mean = s.n_nonfinite > 0 ? (a.n * a.mean + b.n * b.mean) * inverse : a.mean + d * q;
    s.m2 = a.m2 + b.m2 + dd * nq;
    s.m3 = a.m3 + b.m3 + dd * d * nq * (p - q) + 3 * d * (p * b.m2 - q * a.m2);
    s.m4 = a.m4 + b.m4 + dd * dd * nq * (p * p - p * q + q * q) + 6 * dd * (p * p * b.m2 + q * q * a.m2) +
           4 * d * (p * b.m3 - q * a.m3);
    return s;
}

__device__ __forceinline__ void store(double* target, int64 field_stride, State s) {
    settle(s);
    const double fields[kFields] = {s.n, s.mean, s.m2, s.m3, s.m4, s.l1, s.low, s.high, s.n_active, s.n_nonfinite};
#pragma unroll
    for (int f = 0; f < kFields; ++f) target[f * field_stride] = fields[f];
}

// Past the first-level cache, which does not see what other blocks have written.
__device__ __forceinline__ State fetch(const double* source, int64 field_stride) {
    double fields[kFields];
#pragma unroll
    for (int f = 0; f < kFields; ++f) fields[f] = __ldcg(source + f * field_stride);
    return {fields[0], fields[1], fields[2], fields[3], fields[4], fields[5], fields[6], fields[7], fields[8], fields[9]};
}

// --- how a block shares a tile ----------------------------------------------------------------------------------------

// A column is a row of x here seen from a thread: `kColumns` of them per thread, `kItems` values of each, and
// kLanes * kReduceWarps threads that share a column, each reading kVector neighbouring elements at a time.
template <int kLanes_, int kReduceWarps_, int kColumns_, int kItems_, int kVector_>
struct Geometry {
    static constexpr int kLanes = kLanes_, kReduceWarps = kReduceWarps_, kColumns = kColumns_, kItems = kItems_;
    static constexpr int kVector = kVector_;
    static constexpr int kReducers = kLanes * kReduceWarps;
    static constexpr int kBlockColumns = kThreads / kReducers * kColumns;
    static constexpr int kTile = kReducers * kItems;
    static constexpr bool kKeptFirst = kLanes == 1;  // lanes are neighbouring rows, so neighbouring blocks are too
    static_assert(kItems <= 32, "one bit per value");

    // Of this thread: its place among those that share its columns, and its first column.
    static __device__ __forceinline__ int reducer() {
        return kLanes == 1 ? warp() : kReduceWarps == 1 ? lane() : threadIdx.x;
    }
    static __device__ __forceinline__ int column() { return kLanes == 1 ? lane() * kColumns : threadIdx.x / kReducers; }
};

template <class T, bool kWide>
__device__ constexpr int vector_size() {
    return kWide ? 16 / static_cast<int>(sizeof(T)) : 1;
}
__device__ constexpr int items(int bytes) { return bytes == 2 ? 32 : 16; }

// A block per segment of a row; 128-bit loads if wide.
template <class T, bool kWide>
using RowGeometry = Geometry<32, kWarps, 1, kWide ? items(sizeof(T)) : 16, vector_size<T, kWide>()>;
// A warp per row.
template <class T, bool kWide>
using WarpGeometry = Geometry<32, 1, 1, kWide ? items(sizeof(T)) : 16, vector_size<T, kWide>()>;
// Lanes take neighbouring rows, warps share them. More columns per thread would cost more in the reductions than wider
// loads gain, so 32 bits are the widest load; a warp still reads whole 128-byte lines.
template <class T, bool kWide>
using ColumnGeometry = Geometry<1, kWarps, kWide ? 2 : 1, 16, kWide ? 2 : 1>;
// One pooled value per thread.
using PoolGeometry = Geometry<32, kWarps, 1, 1, 1>;

// Combines the fields of all threads that share a column and hands the total to each of them. The first kMaxima fields
// are maxima, the others sums. Always in the same order: lanes as a butterfly, then warps by index.
template <class G, int kMaxima, int kCount, class A>
__device__ __forceinline__ void all_reduce(A (&field)[G::kColumns][kCount], A* scratch) {
    if (G::kLanes == 32) {
#pragma unroll
        for (int offset = 16; offset > 0; offset >>= 1) {
#pragma unroll
            for (int f = 0; f < kCount; ++f) {
                const A other = __shfl_xor_sync(kAllLanes, field[0][f], offset);
                field[0][f] = f < kMaxima ? larger(field[0][f], other) : field[0][f] + other;
            }
        }
    }
    if (G::kReduceWarps == 1) return;
    constexpr int n = kCount * G::kBlockColumns;
    A* const totals = scratch;  // in front, so that it lies in the same place whatever kCount is
    A* const parts = scratch + kMaxFields * G::kBlockColumns;
    A* const mine = parts + warp() * n + G::column();
    if (G::kLanes == 1 || lane() == 0) {
#pragma unroll
        for (int c = 0; c < G::kColumns; ++c)
#pragma unroll
            for (int f = 0; f < kCount; ++f) mine[f * G::kBlockColumns + c] = field[c][f];
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += kThreads) {
        A total = parts[i];
#pragma unroll
        for (int w = 1; w < kWarps; ++w)
            total = i < kMaxima * G::kBlockColumns ? larger(total, parts[w * n + i]) : total + parts[w * n + i];
        totals[i] = total;
    }
    // From here on `parts` is free again; `totals` is after the first barrier of the next call.
    __syncthreads();
#pragma unroll
    for (int c = 0; c < G::kColumns; ++c)
#pragma unroll
        for (int f = 0; f < kCount; ++f) field[c][f] = totals[f * G::kBlockColumns + G::column() + c];
}

// --- values -----------------------------------------------------------------------------------------------------------

// The part of a tile that one thread holds; bit i of `live` says that item i exists. Others are zero.
template <class G, class A>
struct Values {
    A v[G::kColumns][G::kItems];
    unsigned live;
};

// The part of the reduced indices that a tile covers.
struct Window {
    int64 offset;  // of its first element
    int n0, n1;    // sizes along red0 and red1
};

template <class G>
__device__ __forceinline__ Window window_of(unsigned tile, const Layout& at) {
    const int inner = 1 << at.inner_shift, outer = G::kTile >> at.inner_shift;
    const unsigned rest = tile / at.tiles_red0, red2 = rest / at.tiles_red1;
    const int64 red0 = static_cast<int64>(tile - rest * at.tiles_red0) * inner;
    const int64 red1 = static_cast<int64>(rest - red2 * at.tiles_red1) * outer;
    return {red0 * at.stride_red0 + red1 * at.stride_red1 + red2 * at.stride_red2,
            static_cast<int>(min(static_cast<int64>(inner), at.n_red0 - red0)),
            static_cast<int>(min(static_cast<int64>(outer), at.n_red1 - red1))};
}

// Walks the elements of a thread, kStride apart in the tile. Both kStride and the inner size of the tile are powers of
// two, so a step goes along red0, or every `period` steps back to where it began and on along red1.
template <class T, int kStride>
struct Cursor {
    const T* address;
    int red0, red1;  // in the window
    int period, rise;
    int64 step, turn;

    __device__ __forceinline__ Cursor(const T* origin, int element, const Layout& at) {
        const int inner = 1 << at.inner_shift;
        red0 = element & (inner - 1);
        red1 = element >> at.inner_shift;
        period = max(inner / kStride, 1);
        rise = max(kStride / inner, 1);
        step = kStride * at.stride_red0;
        turn = rise * at.stride_red1 - (period - 1) * step;
        address = origin + red0 * at.stride_red0 + red1 * at.stride_red1;
    }
    __device__ __forceinline__ void advance(int round) {
        const bool wraps = ((round + 1) & (period - 1)) == 0;
        address += wraps ? turn : step;
        red0 += wraps ? -(period - 1) * kStride : kStride;
        red1 += wraps ? rise : 0;
    }
};

// kCount neighbouring elements in one load.
template <int kCount, class T, class A>
__device__ __forceinline__ void load(const T* address, A (&value)[kCount]) {
    struct __align__(sizeof(T) * kCount) Pack {
        T element[kCount];
    };
    const Pack pack = *reinterpret_cast<const Pack*>(address);
#pragma unroll
    for (int j = 0; j < kCount; ++j) value[j] = widen(pack.element[j]);
}

// Elements as they are.
struct Unpooled {
    // kVector neighbours along red0 at a time.
    template <class G, class T, class A>
    static __device__ __forceinline__ void along_reduced(const T* row, bool inside, const Window& w, const Layout& at,
                                                         Values<G, A>& values) {
        constexpr int kVector = G::kVector;
        Cursor<T, G::kReducers * kVector> cursor(row, G::reducer() * kVector, at);
        values.live = 0;
#pragma unroll
        for (int round = 0; round < G::kItems / kVector; ++round, cursor.advance(round - 1)) {
            const int left = inside && cursor.red1 < w.n1 ? w.n0 - cursor.red0 : 0;
            A part[kVector];
#pragma unroll
            for (int j = 0; j < kVector; ++j) part[j] = 0;
            if (left >= kVector) {
                load(cursor.address, part);
                values.live |= ((1u << kVector) - 1) << (round * kVector);
            } else {
#pragma unroll
                for (int j = 0; j < kVector - 1; ++j)
                    if (j < left) {
                        part[j] = widen(cursor.address[j]);
                        values.live |= 1u << (round * kVector + j);
                    }
            }
#pragma unroll
            for (int j = 0; j < kVector; ++j) values.v[0][round * kVector + j] = part[j];
        }
    }

    // kColumns neighbours along kept0 at a time; `columns` of them exist.
    template <class G, class T, class A>
    static __device__ __forceinline__ void along_kept(const T* row, int64 columns, const Window& w, const Layout& at,
                                                      Values<G, A>& values) {
        Cursor<T, G::kReducers> cursor(row, G::reducer(), at);
        values.live = 0;
#pragma unroll
        for (int round = 0; round < G::kItems; ++round, cursor.advance(round - 1)) {
            const bool inside = cursor.red0 < w.n0 && cursor.red1 < w.n1;
            A part[G::kColumns];
#pragma unroll
            for (int c = 0; c < G::kColumns; ++c) part[c] = 0;
            if (inside && columns >= G::kColumns) {
                load(cursor.address, part);
            } else if (inside && columns > 0) {
                part[0] = widen(cursor.address[0]);
            }
            values.live |= static_cast<unsigned>(inside) << round;
#pragma unroll
            for (int c = 0; c < G::kColumns; ++c) values.v[c][round] = part[c];
        }
    }

    template <class G, class T, class A>
    static __device__ __forceinline__ void read(const T* row, int64 columns, const Window& w, const Layout& at,
                                                Values<G, A>& values) {
        if (G::kLanes == 1) {
            along_kept(row, columns, w, at, values);
        } else {
            along_reduced(row, columns > 0, w, at, values);
        }
    }
};

// Maximum of a window; NaN wins.
struct Maximum {
    template <class T>
    using Sum = typename Accumulator<T>::type;
    template <class A>
    static __device__ __forceinline__ A start() {
        return -infinity<A>();
    }
    template <class A>
    static __device__ __forceinline__ A combine(A a, A b) {
        return b > a || b != b ? b : a;
    }
    template <class A>
    static __device__ __forceinline__ A finish(A total, const Layout&) {
        return total;
    }
};

struct Mean {
    template <class T>
    using Sum = double;
    template <class A>
    static __device__ __forceinline__ A start() {
        return 0;
    }
    template <class A>
    static __device__ __forceinline__ A combine(A a, A b) {
        return a + b;
    }
    template <class A>
    static __device__ __forceinline__ A finish(A total, const Layout& at) {
        return total / (static_cast<A>(at.n_pool0) * static_cast<A>(at.n_pool1));
    }
};

// The pool of a window is one value. Where windows lie along memory a warp reads one after the other, all lanes side by
// side; else every thread walks its own window, and neighbouring lanes read neighbouring values.
template <class Pool, bool kWarpPerWindow>
struct Pooled {
    template <class T, class A>
    static __device__ __forceinline__ A walk(const T* window, int64 first, int64 step, const Layout& at) {
        A total = Pool::template start<A>();
        for (int64 outer = 0; outer < at.n_pool1; ++outer)
            for (int64 inner = first; inner < at.n_pool0; inner += step)
                total = Pool::combine(total, A(widen(window[inner * at.stride_pool0 + outer * at.stride_pool1])));
        return total;
    }

    template <class G, class T, class A>
    static __device__ __forceinline__ void read(const T* row, int64, const Window& w, const Layout& at,
                                                Values<G, A>& values) {
        const int red0 = G::reducer() & ((1 << at.inner_shift) - 1), red1 = G::reducer() >> at.inner_shift;
        const bool inside = red0 < w.n0 && red1 < w.n1;
        const int64 offset = red0 * at.stride_red0 + red1 * at.stride_red1;
        A value = 0;
        if (kWarpPerWindow) {
#pragma unroll 2
            for (int source = 0; source < 32; ++source) {
                const int64 start = __shfl_sync(kAllLanes, offset, source);
                if (!__shfl_sync(kAllLanes, static_cast<int>(inside), source)) continue;  // the same in all lanes
                A total = walk<T, A>(row + start, lane(), 32, at);
#pragma unroll
                for (int step = 16; step > 0; step >>= 1)
                    total = Pool::combine(total, __shfl_xor_sync(kAllLanes, total, step));
                if (source == lane()) value = total;
            }
        } else if (inside) {
            value = walk<T, A>(row + offset, 0, 1, at);
        }
        values.v[0][0] = inside ? Pool::finish(value, at) : A(0);
        values.live = inside;
    }
};

// --- one tile ---------------------------------------------------------------------------------------------------------

// Sums of a tile of the largest float stay finite.
constexpr float kSmall = 1.0f / 65536;

// -min, max, active count, sum / 65536
template <bool kFull, class G, class A>
__device__ __forceinline__ void extremes(const Values<G, A>& values, A threshold, A (&field)[G::kColumns][4]) {
#pragma unroll
    for (int c = 0; c < G::kColumns; ++c) {
        A low = infinity<A>(), high = -low, sum = 0;
        int active = 0;
#pragma unroll
        for (int i = 0; i < G::kItems; ++i) {
            if (!kFull && !(values.live >> i & 1)) continue;
            const A v = values.v[c][i];
            low = smaller(low, v);
            high = larger(high, v);
            active += v > threshold;
            sum = multiply_add(v, A(kSmall), sum);
        }
        field[c][0] = -low;
        field[c][1] = high;
        field[c][2] = static_cast<A>(active);
        field[c][3] = sum;
    }
}

// sum |v| / u, then sum d^k, k = 1 .. 4
template <bool kFull, class G, class A>
__device__ __forceinline__ void powers(const Values<G, A>& values, const A (&pivot)[G::kColumns],
                                       const A (&scale)[G::kColumns], A (&field)[G::kColumns][5]) {
#pragma unroll
    for (int c = 0; c < G::kColumns; ++c) {
        const A shift = -pivot[c] * scale[c];
        A l1 = 0, d1 = 0, d2 = 0, d3 = 0, d4 = 0;
#pragma unroll
        for (int i = 0; i < G::kItems; ++i) {
            if (!kFull && !(values.live >> i & 1)) continue;
            const A v = values.v[c][i], d = multiply_add(v, scale[c], shift), square = d * d;
            l1 = multiply_add(magnitude(v), scale[c], l1);
            d1 += d;
            d2 += square;
            d3 = multiply_add(square, d, d3);
            d4 = multiply_add(square, square, d4);
        }
        field[c][0] = l1;
        field[c][1] = d1;
        field[c][2] = d2;
        field[c][3] = d3;
        field[c][4] = d4;
    }
}

template <class G, class A>
__device__ __forceinline__ void count_nonfinite(const Values<G, A>& values, A (&field)[G::kColumns][1]) {
#pragma unroll
    for (int c = 0; c < G::kColumns; ++c) {
        int count = 0;
#pragma unroll
        for (int i = 0; i < G::kItems; ++i)
            count += (values.live >> i & 1) && !(magnitude(values.v[c][i]) < infinity<A>());
        field[c][0] = static_cast<A>(count);
    }
}

// What a tile leaves behind, in the units of d: |v| and d^k are multiplied by u^k later.
enum Raw { kPivot, kError, kM2, kM3, kM4, kL1, kLow, kHigh, kActive, kNonfinite, kUnit, kRaw };

// Reduces a tile. With e = sum d / n, which is what the pivot lacks of being the mean,
//   m2 = sum d^2 - n e^2,  m3 = sum d^3 - 3 e sum d^2 + 2 n e^3,
//   m4 = sum d^4 - 4 e sum d^3 + 6 e^2 sum d^2 - 3 n e^4.
template <class G, class A>
__device__ __forceinline__ void reduce_tile(const Values<G, A>& values, A n, A threshold, A* scratch,
                                            A (&raw)[G::kColumns][kRaw]) {
    const bool full = values.live == (kAllLanes >> (32 - G::kItems));
    A first[G::kColumns][4], second[G::kColumns][5], nonfinite[G::kColumns][1];
    if (full)
        extremes<true>(values, threshold, first);
    else
        extremes<false>(values, threshold, first);
    all_reduce<G, 2>(first, scratch);

    A pivot[G::kColumns], unit[G::kColumns], scale[G::kColumns];
#pragma unroll
    for (int c = 0; c < G::kColumns; ++c) {
        pivot[c] = smaller(larger(first[c][3] / n * A(65536), -first[c][0]), first[c][1]);
        power_of_two(larger(first[c][0], first[c][1]), unit[c], scale[c]);
    }
    if (full)
        powers<true>(values, pivot, scale, second);
    else
        powers<false>(values, pivot, scale, second);
    all_reduce<G, 0>(second, scratch);

    bool finite = true;
#pragma unroll
    for (int c = 0; c < G::kColumns; ++c) {
        nonfinite[c][0] = 0;
        finite = finite && second[c][0] < infinity<A>();
    }
    // Warps that share columns hold the same totals, so they agree here and meet at the barriers inside.
    if (!__all_sync(kAllLanes, finite)) {
        count_nonfinite(values, nonfinite);
        all_reduce<G, 0>(nonfinite, scratch);
    }
#pragma unroll
    for (int c = 0; c < G::kColumns; ++c) {
        const A l1 = second[c][0], d2 = second[c][2], d3 = second[c][3], d4 = second[c][4];
        const A e = second[c][1] / n, ne2 = n * e * e;
        const bool bad = nonfinite[c][0] > 0, number = l1 == l1;  // min and max drop NaN, the sum of |v| cannot
        raw[c][kPivot] = bad ? first[c][3] / n : pivot[c];        // inf or NaN, as a plain sum has it
        raw[c][kError] = bad ? A(0) : e;
        raw[c][kM2] = d2 - ne2;
        raw[c][kM3] = d3 - 3 * e * d2 + 2 * ne2 * e;
        raw[c][kM4] = d4 - 4 * e * d3 + 6 * e * e * d2 - 3 * ne2 * e * e;
        raw[c][kL1] = l1;
        raw[c][kLow] = number ? -first[c][0] : l1;
        raw[c][kHigh] = number ? first[c][1] : l1;
        raw[c][kActive] = first[c][2];
        raw[c][kNonfinite] = nonfinite[c][0];
        raw[c][kUnit] = unit[c];
    }
}

// The moments of a tile; `raw` points to one column of kRaw rows.
template <class A>
__device__ __forceinline__ State tile_state(double n, const A* raw, int stride) {
    const double u = raw[kUnit * stride], uu = u * u;
    State s;
    s.n = n;
    s.mean = raw[kPivot * stride] + raw[kError * stride] * u;
    s.m2 = raw[kM2 * stride] * uu;
    s.m3 = raw[kM3 * stride] * uu * u;
    s.m4 = raw[kM4 * stride] * uu * uu;
    s.l1 = raw[kL1 * stride] * u;
    s.low = raw[kLow * stride];
    s.high = raw[kHigh * stride];
    s.n_active = raw[kActive * stride];
    s.n_nonfinite = raw[kNonfinite * stride];
    return s;
}

// --- the kernel -------------------------------------------------------------------------------------------------------

template <class G, class A>
__device__ constexpr int scratch_doubles() {
    constexpr int reduction = G::kReduceWarps > 1 ? (kWarps + 1) * kMaxFields * G::kBlockColumns * sizeof(A) / 8 + 1 : 1;
    constexpr int merging = G::kReduceWarps > 1 ? kThreads / 2 * kFields : 1;
    return reduction > merging ? reduction : merging;
}

// The block's rows: kept0 = first + column, and the index of the outer kept dims, which they share.
struct Rows {
    int64 first;
    unsigned kept;
    __device__ __forceinline__ int64 index(int column, const Layout& at) const {
        return kept * at.n_kept0 + first + column;
    }
    __device__ __forceinline__ bool inside(int column, const Layout& at) const { return first + column < at.n_kept0; }
};

// Merges the segments of the block's rows: every thread takes each kShares-th one of a row, then halves meet.
template <class G>
__device__ __forceinline__ void merge_segments(const double* parts, double* out, const Rows& rows, const Layout& at,
                                               State* buffer) {
    constexpr unsigned kShares = kThreads / G::kBlockColumns;
    const int column = threadIdx.x % G::kBlockColumns;
    const unsigned share = threadIdx.x / G::kBlockColumns, rounds = (at.n_segments + kShares - 1) / kShares;
    const unsigned n = rows.inside(column, at) ? at.n_segments : 0;
    const double* const row = parts + rows.index(column, at) * at.n_segments;
    const int64 field_stride = at.n_kept * at.n_segments;
    State state = share < n ? fetch(row + share, field_stride) : empty_state();
    unsigned half = kShares / 2;
#pragma unroll 1
    for (unsigned round = 1; round < rounds || half > 0; ++round) {
        State other = empty_state();
        if (round < rounds) {
            const unsigned segment = share + round * kShares;
            if (segment < n) other = fetch(row + segment, field_stride);
        } else {
            __syncthreads();  // the previous round has read the buffer
            if (share >= half && share < 2 * half) buffer[threadIdx.x - half * G::kBlockColumns] = state;
            __syncthreads();
            if (share < half) other = buffer[threadIdx.x];
            half >>= 1;
        }
        state = merge(state, other);
    }
    if (share == 0 && n > 0) store(out + rows.index(column, at), at.n_kept, state);
}

// True in the block that is the last of n to come here, which then sees what the others have written before.
__device__ __forceinline__ bool last_to_arrive(unsigned* ticket, unsigned n, bool* shared) {
    __syncthreads();  // the block has written
    if (threadIdx.x == 0) {
        __threadfence();  // release: what the block has written, before the ticket
        *shared = atomicAdd(ticket, 1u) == n - 1;
        if (*shared) *ticket = 0;  // for the next launch; nobody else comes here in this one
        __threadfence();           // acquire: the ticket, before what other blocks have written
    }
    __syncthreads();
    return *shared;
}

template <class G, class A, class Read, class T>
__device__ __forceinline__ void moments(const T* __restrict__ x, double* parts, double* out, unsigned* tickets,
                                        double threshold, const Layout& at) {
    __shared__ double scratch[scratch_doubles<G, A>()];
    __shared__ A raw[kRaw][G::kBlockColumns];
    __shared__ State running[G::kBlockColumns];

    const unsigned row_tiles = gridDim.x / at.n_segments;
    const unsigned quotient = blockIdx.x / (G::kKeptFirst ? row_tiles : at.n_segments);
    const unsigned remainder = blockIdx.x - quotient * (G::kKeptFirst ? row_tiles : at.n_segments);
    const unsigned row_tile = G::kKeptFirst ? remainder : quotient, segment = G::kKeptFirst ? quotient : remainder;
    const unsigned kept = row_tile / at.tiles_kept0, kept2 = kept / at.n_kept1;
    const Rows rows = {static_cast<int64>(row_tile - kept * at.tiles_kept0) * G::kBlockColumns, kept};
    const int64 columns = at.n_kept0 - rows.first - G::column();  // that exist, from the first of this thread on
    const T* const row = x + (rows.first + G::column()) * at.stride_kept0 +
                         (kept - kept2 * at.n_kept1) * at.stride_kept1 + kept2 * at.stride_kept2;
    const int mine = threadIdx.x;  // the column whose moments this thread keeps, if there are as many

    const unsigned begin = segment * at.tiles_per_segment, end = min(begin + at.tiles_per_segment, at.n_tiles);
#pragma unroll 1
    for (unsigned tile = begin; tile < end; ++tile) {
        const Window window = window_of<G>(tile, at);
        const int n = window.n0 * window.n1;
        Values<G, A> values;
        Read::read(row + window.offset, columns, window, at, values);
        A fields[G::kColumns][kRaw];
        reduce_tile(values, static_cast<A>(n), static_cast<A>(threshold), reinterpret_cast<A*>(scratch), fields);
        __syncthreads();  // the previous tile's fields are read
        if (G::reducer() == 0) {
#pragma unroll
            for (int c = 0; c < G::kColumns; ++c)
#pragma unroll
                for (int f = 0; f < kRaw; ++f) raw[f][G::column() + c] = fields[c][f];
        }
        __syncthreads();
        if (mine < G::kBlockColumns) {
            const State state = tile_state(n, &raw[0][mine], G::kBlockColumns);
            running[mine] = tile == begin ? state : merge(running[mine], state);
        }
    }
    double* const target = at.n_segments == 1 ? out : parts;
    if (mine < G::kBlockColumns && rows.inside(mine, at))
        store(target + rows.index(mine, at) * at.n_segments + segment, at.n_kept * at.n_segments, running[mine]);
    if constexpr (G::kReduceWarps > 1) {
        __shared__ bool is_last;
        if (at.n_segments > 1 && last_to_arrive(tickets + row_tile, at.n_segments, &is_last))
            merge_segments<G>(parts, out, rows, at, reinterpret_cast<State*>(scratch));
    }
}

// --- entry points -----------------------------------------------------------------------------------------------------

// x: activation, see Layout            parts: (10, n_kept, n_segments), not used if n_segments is 1
// out: (10, n_kept)                    tickets: one per tile of rows, zero before and after
// threshold: for float32 sums rounded toward -inf, so that its conversion is exact
// grid: tiles of rows times segments

template <class T>
using Sum = typename Accumulator<T>::type;

// Blocks that the registers of a processor have to hold, chosen so that nothing spills: what decides is the number of
// values a thread keeps, their size, and whether each load needs an address of its own.
template <class T, bool kWide>
__device__ constexpr int resident_blocks() {
    return sizeof(T) == 8 ? 2 : sizeof(T) == 4 && kWide ? 4 : 3;
}

// A block per segment of a row. kWide: 128-bit loads, for which red0 is contiguous and everything else aligned.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads, resident_blocks<T, kWide>())
    moments_rows(const T* x, double* parts, double* out, unsigned* tickets, double threshold, Layout layout) {
    moments<RowGeometry<T, kWide>, Sum<T>, Unpooled>(x, parts, out, tickets, threshold, layout);
}

// A warp per row, for rows of a few hundred elements; n_segments is 1.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads, resident_blocks<T, kWide>())
    moments_warps(const T* x, double* parts, double* out, unsigned* tickets, double threshold, Layout layout) {
    moments<WarpGeometry<T, kWide>, Sum<T>, Unpooled>(x, parts, out, tickets, threshold, layout);
}

// A lane per row, for rows that are neighbours in memory. kWide, of 16-bit types only: two rows in a load of 32 bits.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads, 2)
    moments_columns(const T* x, double* parts, double* out, unsigned* tickets, double threshold, Layout layout) {
    moments<ColumnGeometry<T, kWide>, Sum<T>, Unpooled>(x, parts, out, tickets, threshold, layout);
}

// A thread, or with kWindows a warp, per pooled value. Means are summed in float64, and so is what follows.
template <class T, class Pool, bool kWindows>
__global__ void __launch_bounds__(kThreads, 2)
    moments_pooled(const T* x, double* parts, double* out, unsigned* tickets, double threshold, Layout layout) {
    using A = typename Pool::template Sum<T>;
    moments<PoolGeometry, A, Pooled<Pool, kWindows>>(x, parts, out, tickets, threshold, layout);
}

}  // namespace balanced_rep
