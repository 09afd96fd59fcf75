// The multi-tangent ops: memory to work in, and items shared among threads. What an item computes does not depend on
// which thread has it, nor on how many there are.
#include <new>

#include "balanced_rep/isa.h"
#include "balanced_rep/ops.h"
#include "reduction.h"

namespace balanced_rep {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory for each thread, on cache lines of its own.
class Workspace {
 public:
  Workspace(int threads, int64_t reals, DTypePair pair)
      : size_((reals * (pair == kPairF64 ? 8 : 4) + 63) / 64 * 64),
        memory_(static_cast<char*>(::operator new(threads * size_, std::align_val_t(64)))) {}
  ~Workspace() { ::operator delete(memory_, std::align_val_t(64)); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* of(int64_t thread) const { return memory_ + thread * size_; }

 private:
  int64_t size_;
  char* memory_;
};

template <class Kernel, class Task>
void run(Kernel kernel, const Task& task, DTypePair pair, int64_t n_items, int64_t work, int64_t reals, int n_threads) {
  const int threads = useful_threads(work, n_items, n_threads);
  const Workspace workspace(threads, reals, pair);
  in_parallel(threads, threads, [&](int64_t first_thread, int64_t last_thread) {
    for (int64_t t = first_thread; t < last_thread; ++t) {
      kernel(task, n_items * t / threads, n_items * (t + 1) / threads, workspace.of(t));
    }
  });
}

}  // namespace

void attention_jvp(const AttentionTask& task, DTypePair pair, int n_threads) {
  const int64_t n_items = task.b * task.h * ceil_div(task.n, kQueryBlock);
  if (n_items == 0) return;
  const int64_t work = task.b * task.h * task.n * (task.m + 1) * (1 + task.k);
  run(jvp_kernels().attention[pair], task, pair, n_items, work, attention_workspace(task), n_threads);
}

void group_norm_jvp(GroupNormTask task, DTypePair pair, int n_threads) {
  if (task.b * task.c * task.s == 0) return;
  constexpr int64_t kRun = 32;  // channels that lie side by side: two cache lines of float32
  task.block_groups = task.channels_last ? std::min(task.groups, ceil_div(kRun, task.c / task.groups)) : 1;
  const int64_t blocks = task.b * ceil_div(task.groups, task.block_groups);
  // Tangents are shared among threads only where there is not enough else: each share computes the statistics again.
  const int64_t shares = blocks >= 2 * n_threads ? 1 : std::min<int64_t>(task.k, ceil_div(2 * n_threads, blocks));
  task.tangents_per_item = shares > 1 ? ceil_div(task.k, shares) : std::max<int64_t>(task.k, 1);
  const int64_t n_items = blocks * std::max<int64_t>(1, ceil_div(task.k, task.tangents_per_item));
  const int64_t work = task.b * task.c * task.s * (1 + task.k);
  run(jvp_kernels().group_norm[pair], task, pair, n_items, work, group_norm_workspace(task), n_threads);
}

void row_jvp(const RowTask& task, DTypePair pair, int n_threads) {
  const int64_t n_items = task.b * task.r;
  if (n_items * task.d == 0) return;
  run(jvp_kernels().rows[pair], task, pair, n_items, n_items * task.d * (1 + task.k), row_workspace(task), n_threads);
}

void activation_jvp(const ActivationTask& task, DTypePair pair, int n_threads) {
  const int64_t n_items = task.r * ceil_div(task.n, kActivationChunk);
  if (n_items == 0) return;
  const int threads = useful_threads(task.r * task.n * (1 + task.k), n_items, n_threads);
  in_parallel(n_items, threads,
              [&](int64_t first, int64_t last) { jvp_kernels().activation[pair](task, first, last); });
}

}  // namespace balanced_rep
