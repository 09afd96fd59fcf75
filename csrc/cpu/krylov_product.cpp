// M V and M^T (M V): memory to work in, and chunks of rows shared among threads.
#include <new>
#include <stdexcept>

#include "balanced_rep/isa.h"
#include "balanced_rep/ops.h"
#include "reduction.h"

namespace balanced_rep {
namespace {

constexpr int64_t kLeastChunk = 480, kMostChunks = 16;  // rows; a multiple of every panel but the shortest matrices'

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
  task.chunk = std::max(kLeastChunk, (task.rows + kMostChunks - 1) / kMostChunks);
  task.chunk = (task.chunk + kLeastChunk - 1) / kLeastChunk * kLeastChunk;
  task.n_chunks = (task.rows + task.chunk - 1) / task.chunk;
  const int64_t n_items = task.batch * task.n_chunks, block = k.krylov_width(task.width) * task.columns;
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

}  // namespace balanced_rep
