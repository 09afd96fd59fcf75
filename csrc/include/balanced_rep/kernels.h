// The table of CPU kernels that every instruction set fills, and the plain structs they read.
//
// Included by the instruction-set translation units, so C headers only and nothing with external inline linkage: a
// function emitted from an AVX-512 unit must never be the one the linker keeps for the base program.
#pragma once

#include <stdint.h>

namespace balanced_rep {

constexpr int kMaxDims = 64;  // torch's own limit
constexpr int kFields = 10;   // n, mean, m2, m3, m4, l1, min, max, n_active, n_nonfinite

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3, kDTypes = 4 };
enum Pool : int { kPoolNone = 0, kPoolMax = 1, kPoolMean = 2 };

// Sizes and strides, outermost first; strides in elements, not negative.
struct Dims {
  int n;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];
};

// A reduction after planning: dims of size 1 are gone, each group is sorted by stride and coalesced, and repeated
// (stride 0) dims of the reduced and pooled groups are gone too; the driver accounts for them.
struct Reduction {
  const void* x;
  DType dtype;
  Pool pool;
  Dims kept;
  int64_t kept_out[kMaxDims];  // stride of each kept dim in the contiguous output
  Dims reduced;
  Dims pooled;
  int64_t n_kept;     // products of the sizes
  int64_t n_reduced;  // > 0
  int64_t n_pooled;

  // How the work is cut, from shapes alone, so that results do not depend on the number of threads. A row item is
  // (kept index, segment); a column item is (outer kept index, block of columns, segment), the segment running
  // fastest.
  bool columns;
  int64_t segment;     // reduced elements (columns: reduced rows) of a segment
  int64_t n_segments;  // segments that cover n_reduced
  int64_t n_blocks;    // column blocks that cover the innermost kept dim
  int64_t n_items;
};

constexpr int64_t kColumnBlock = 1024;  // columns of a block: the sums of a block stay in L1
constexpr int64_t kColumnPanel = 256;   // rows summed in float32 before they are merged in float64

// Segment s of output index i writes field f to out[f * field_stride + s * n_kept + i].
struct MomentsTask {
  Reduction r;
  double threshold;
  float threshold_f32;  // x > threshold_f32 in float32 is exactly x > threshold in float64
  double* out;
  int64_t field_stride;
};

constexpr int kHistogramBins = 2 * 32 * 32 + 1;  // negative bins, the centre, positive bins

// Field f of bin b of output index i is out[f * field_stride + i * kHistogramBins + b].
struct HistogramTask {
  Reduction r;
  int64_t repeated;    // factor of repeated reduced dims
  const int64_t* top;  // per output index: the window ends at 2^top
  int64_t* out;
  int64_t field_stride;
};

struct EntropyTask {
  Reduction r;
  int64_t repeated;
  double* out;
};

// Products of a tall matrix with a thin block, M V and M^T (M V). A chunk is a number of rows of M, cut by the shape
// alone; chunk c of matrix b of the batch is item b * n_chunks + c.
struct KrylovTask {
  const float* m;  // (batch, rows, columns); one of row_stride and column_stride is 1
  int64_t batch, rows, columns;
  int64_t batch_stride, row_stride, column_stride;
  int64_t width;    // columns of V
  const double* v;  // (batch, width, columns), rows one behind the other as are matrices
  double* z;        // (batch, width, rows): M V, transposed; read where `given`
  int64_t z_batch_stride, z_row_stride;
  bool given;    // M V is there already
  bool adjoint;  // M^T (M V) is wanted
  int64_t chunk, n_chunks;
  float* packed;   // (batch, block): V in the layout of the kernel
  float* partial;  // (batch, n_chunks, block): sums over the rows of a chunk
  double* w;       // (batch, width, columns), as v
};

// Products of thin matrices of doubles, out = x y^T or out (+)= x y: (rows, inner) with (columns, inner), or with
// (inner, columns). Rows lie in one piece. A product is cut into pieces, of rows or of columns of out, none of a sum.
struct DoubleProductTask {
  const double* x;
  const double* y;
  double* out;
  int64_t x_batch_stride, x_row_stride, y_batch_stride, y_row_stride, out_batch_stride, out_row_stride;
  int64_t batch, rows, inner, columns;
  bool transposed, add;  // no sum where transposed
  int64_t piece, n_pieces;
};

// Sums of squares and largest magnitudes; chunk c of matrix b is item b * n_chunks + c.
struct SurveyTask {
  const float* m;  // (batch, rows, columns), rows in one piece
  int64_t batch, rows, columns, batch_stride, row_stride, chunk, n_chunks;
  double* partial;  // (items, 2)
};

typedef void (*HistogramKernel)(const HistogramTask& task, int64_t first_kept, int64_t last_kept);
typedef void (*EntropyKernel)(const EntropyTask& task, int64_t first_kept, int64_t last_kept);
typedef void (*MomentsKernel)(const MomentsTask& task, int64_t first_item, int64_t last_item);

struct Kernels {
  int vector_bytes;
  MomentsKernel moments[kDTypes];
  // Joins the segments of outputs [first, last) of task.out into the fields at out, n_kept apart.
  void (*merge_segments)(const MomentsTask& task, double* out, int64_t first, int64_t last);
  HistogramKernel log_histogram[kDTypes];
  EntropyKernel energy_entropy[kDTypes];
  // V into the kernel's layout, for matrices [first, last); items [first, last); W of matrices [first, last).
  int64_t (*krylov_block)(const KrylovTask& task);      // floats of V of a matrix
  int64_t (*krylov_workspace)(const KrylovTask& task);  // floats of a thread
  void (*krylov_pack)(const KrylovTask& task, int64_t first, int64_t last);
  void (*krylov_items)(const KrylovTask& task, int64_t first, int64_t last, float* workspace);
  void (*krylov_join)(const KrylovTask& task, int64_t first, int64_t last);
  void (*double_products)(const DoubleProductTask& task, int64_t first, int64_t last);  // pieces of the whole batch
  void (*survey_items)(const SurveyTask& task, int64_t first, int64_t last);
  // Sum of n floats: as fast as this processor reads memory. The yardstick of the benchmarks.
  float (*read_test)(const float* x, int64_t n);
};

}  // namespace balanced_rep
