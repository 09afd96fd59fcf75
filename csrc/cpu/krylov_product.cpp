// M V and M^T (M V): memory to work in, and chunks of rows shared among threads.
#include <new>
#include <stdexcept>
#include <vector>

#include "balanced_rep/isa.h"
#include "balanced_rep/ops.h"
#include "reduction.h"

namespace balanced_rep {
namespace {

constexpr int64_t kLeastChunk = 480, kMostChunks = 16, kRowUnit = 12;  // rows; even numbers of chunks suit threads

class Floats {
 public:
  explicit Floats(int64_t n) : memory_(static_cast<float*>(::operator new(n * sizeof(float), std::align_val_t(64)))) {}
  ~Floats() { ::operator delete(memory_, std::align_val_t(64)); }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  float* get() const { return memory_; }

 private:
  float* memory_;
};

}  // namespace

void krylov_product(KrylovTask task, int n_threads) {
  if (task.row_stride != 1 && task.column_stride != 1) {
    throw std::invalid_argument("krylov_product: neither rows nor columns lie in one piece");
  }
  if (task.batch * task.rows * task.columns * task.width == 0) {
    throw std::invalid_argument("krylov_product: there is nothing to multiply");
  }
  const Kernels& k = kernels();
  int64_t chunks = std::clamp<int64_t>(task.rows / kLeastChunk, 1, kMostChunks);
  if (chunks > 1) chunks -= chunks % 2;
  task.chunk = ((task.rows + chunks - 1) / chunks + kRowUnit - 1) / kRowUnit * kRowUnit;
  task.n_chunks = (task.rows + task.chunk - 1) / task.chunk;
  const int64_t n_items = task.batch * task.n_chunks, block = k.krylov_block(task);
  const int threads = useful_threads(task.batch * task.rows * task.columns, n_items, n_threads);
  const int64_t private_floats = (k.krylov_workspace(task) + 15) / 16 * 16;
  const Floats packed(task.given ? 0 : task.batch * block), partial(task.adjoint ? n_items * block : 0);
  const Floats workspace(threads * private_floats);
  task.packed = packed.get();
  task.partial = partial.get();
  if (!task.given) {
    in_parallel(task.batch, useful_threads(task.batch * block, task.batch, threads),
                [&](int64_t first, int64_t last) { k.krylov_pack(task, first, last); });
  }
  in_parallel(threads, threads, [&](int64_t first_thread, int64_t last_thread) {
    for (int64_t t = first_thread; t < last_thread; ++t) {
      k.krylov_items(task, n_items * t / threads, n_items * (t + 1) / threads, workspace.get() + t * private_floats);
    }
  });
  if (task.adjoint) {
    in_parallel(task.batch, useful_threads(n_items * block, task.batch, threads),
                [&](int64_t first, int64_t last) { k.krylov_join(task, first, last); });
  }
}

void double_product(DoubleProductTask task, int n_threads) {
  constexpr int64_t kRowPiece = 24, kColumnPiece = 192;  // multiples of the tiles of every instruction set
  const Kernels& k = kernels();
  task.piece = task.transposed ? kRowPiece : kColumnPiece;
  task.n_pieces = ((task.transposed ? task.rows : task.columns) + task.piece - 1) / task.piece;
  const int64_t n_items = task.batch * task.n_pieces;
  if (n_items == 0) return;
  const int64_t work = task.batch * task.rows * task.inner * task.columns / 4;
  in_parallel(n_items, useful_threads(work, n_items, n_threads),
              [&](int64_t first, int64_t last) { k.double_products(task, first, last); });
}

void survey(SurveyTask task, double* out, int n_threads) {
  constexpr int64_t kChunk = 1 << 17;  // entries, about
  const Kernels& k = kernels();
  task.chunk = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, task.columns));
  task.n_chunks = (task.rows + task.chunk - 1) / task.chunk;
  const int64_t n_items = task.batch * task.n_chunks;
  std::vector<double> partial(2 * n_items);
  task.partial = partial.data();
  in_parallel(n_items, useful_threads(task.batch * task.rows * task.columns, n_items, n_threads),
              [&](int64_t first, int64_t last) { k.survey_items(task, first, last); });
  for (int64_t b = 0; b < task.batch; ++b) {
    out[2 * b] = out[2 * b + 1] = 0;
    for (int64_t c = b * task.n_chunks; c < (b + 1) * task.n_chunks; ++c) {
      out[2 * b] += partial[2 * c];
      out[2 * b + 1] = std::max(out[2 * b + 1], partial[2 * c + 1]);
    }
  }
}

}  // namespace balanced_rep
