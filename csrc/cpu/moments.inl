// The moments op: chooses by pooling, and by rows or columns as the driver planned.
#pragma once

#include "moments_columns.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

template <class T, Pool kPool>
inline void row_items(const MomentsTask& task, int64_t first_item, int64_t last_item) {
  const Reduction& r = task.r;
  int64_t segment = first_item % r.n_segments;
  Walker in(r.kept, 0, first_item / r.n_segments), out(r.kept, r.kept_out, 0, first_item / r.n_segments);
  Emitter emitter(task.out, task.field_stride);
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t first = segment * r.segment, last = first + r.segment < r.n_reduced ? first + r.segment : r.n_reduced;
    State s = empty_state();
    for_each_chunk<T, kPool, kRunChunk>(static_cast<const T*>(r.x) + in.offset, r, first, last,
                                        [&](const auto* p, int64_t n) { add_chunk(p, n, task, s); });
    emitter.add(s, segment * r.n_kept + out.offset);
    if (++segment == r.n_segments) {
      segment = 0;
      in.next();
      out.next();
    }
  }
}

template <class T, Pool kPool>
inline void pooled_items(const MomentsTask& task, int64_t first_item, int64_t last_item) {
  if (task.r.columns) {
    column_items<T, kPool>(task, first_item, last_item);
  } else {
    row_items<T, kPool>(task, first_item, last_item);
  }
}

template <class T>
void moments_items(const MomentsTask& task, int64_t first_item, int64_t last_item) {
  switch (task.r.pool) {
    case kPoolNone:
      return pooled_items<T, kPoolNone>(task, first_item, last_item);
    case kPoolMax:
      return pooled_items<T, kPoolMax>(task, first_item, last_item);
    case kPoolMean:
      return pooled_items<T, kPoolMean>(task, first_item, last_item);
  }
}

// Joins the segments of outputs [first, last), in order.
void merge_segments(const MomentsTask& task, double* out, int64_t first, int64_t last) {
  const int64_t n_kept = task.r.n_kept;
  Emitter emitter(out, n_kept);
  for (int64_t i = first; i < last; ++i) {
    State s = empty_state();
    for (int64_t segment = 0; segment < task.r.n_segments; ++segment) {
      const double* const p = task.out + segment * n_kept + i;
      const auto field = [&](int f) { return p[f * task.field_stride]; };
      const State next = {field(0), field(1), field(2), field(3), field(4),
                          field(5), field(6), field(7), field(8), field(9)};
      if (segment == 0) {
        s = next;
      } else {
        merge(s, next);
      }
    }
    emitter.add(s, i);
  }
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
