// Python module balanced_rep._C: raw addresses in, nothing of torch. balanced_rep/ops/_cpp.py is its only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "balanced_rep/isa.h"
#include "balanced_rep/ops.h"

namespace py = pybind11;
void bind_jvp(py::module_& m);  // bindings_jvp.cpp

namespace br = balanced_rep;

namespace {

typedef std::vector<int64_t> Ints;

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

br::View view_of(std::uintptr_t x, int dtype, Ints& kept_shape, Ints& kept_strides, Ints& reduced_shape,
                 Ints& reduced_strides, Ints& pooled_shape, Ints& pooled_strides, int pool) {
  if (dtype < 0 || dtype >= br::kDTypes) {
    throw std::invalid_argument("dtype code must be 0 (f32), 1 (f16), 2 (bf16) or 3 (f64), got " +
                                std::to_string(dtype));
  }
  if (pool < br::kPoolNone || pool > br::kPoolMean) {
    throw std::invalid_argument("pool must be 0 (none), 1 (max) or 2 (mean), got " + std::to_string(pool));
  }
  if (pool == br::kPoolNone && !pooled_shape.empty()) throw std::invalid_argument("pooled dims are given with pool 0");
  return {at<const void>(x),       static_cast<br::DType>(dtype), std::move(kept_shape),
          std::move(kept_strides), std::move(reduced_shape),      std::move(reduced_strides),
          std::move(pooled_shape), std::move(pooled_strides),     static_cast<br::Pool>(pool)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of balanced_rep over raw addresses; call them through balanced_rep.ops.";
  try {
    br::choose_isa();
  } catch (const std::invalid_argument& e) {
    throw py::import_error(e.what());
  }

  m.def("isa", &br::isa, "The instruction set in use.");
  m.def("isas", &br::usable_isas, "Instruction sets that this processor runs, slowest first.");
  m.def("compiled_isas", &br::compiled_isas, "Instruction sets that this extension was compiled for.");
  m.def("set_isa", &br::set_isa, py::arg("name"), "Switches the instruction set of the whole process.");

  m.def(
      "moments",
      [](std::uintptr_t x, int dtype, Ints kept_shape, Ints kept_strides, Ints reduced_shape, Ints reduced_strides,
         Ints pooled_shape, Ints pooled_strides, int pool, double threshold, std::uintptr_t out, int n_threads) {
        const br::View view = view_of(x, dtype, kept_shape, kept_strides, reduced_shape, reduced_strides, pooled_shape,
                                      pooled_strides, pool);
        py::gil_scoped_release nogil;
        br::moments(view, threshold, at<double>(out), n_threads);
      },
      "Ten float64 sums (10, *kept) of a view whose dims are (kept..., reduced..., pooled...).");

  m.def(
      "log_histogram",
      [](std::uintptr_t x, int dtype, Ints kept_shape, Ints kept_strides, Ints reduced_shape, Ints reduced_strides,
         Ints pooled_shape, Ints pooled_strides, int pool, std::uintptr_t top, std::uintptr_t out, int n_threads) {
        const br::View view = view_of(x, dtype, kept_shape, kept_strides, reduced_shape, reduced_strides, pooled_shape,
                                      pooled_strides, pool);
        py::gil_scoped_release nogil;
        br::log_histogram(view, at<const int64_t>(top), at<int64_t>(out), n_threads);
      },
      "int64 table (3, *kept, bins) of a view whose dims are (kept..., reduced..., pooled...).");
  m.def(
      "energy_entropy",
      [](std::uintptr_t x, int dtype, Ints kept_shape, Ints kept_strides, Ints reduced_shape, Ints reduced_strides,
         Ints pooled_shape, Ints pooled_strides, int pool, std::uintptr_t out, int n_threads) {
        const br::View view = view_of(x, dtype, kept_shape, kept_strides, reduced_shape, reduced_strides, pooled_shape,
                                      pooled_strides, pool);
        py::gil_scoped_release nogil;
        br::energy_entropy(view, at<double>(out), n_threads);
      },
      "float64 (*kept), sums of v^2 ln v^2, of a view whose dims are (kept..., reduced..., pooled...).");

  m.def(
      "philox_bits",
      [](std::uintptr_t items, int64_t n_items, int64_t seed, int64_t n, std::uintptr_t out, int n_threads) {
        py::gil_scoped_release nogil;
        br::philox_bits(at<const int64_t>(items), n_items, seed, n, at<int64_t>(out), n_threads);
      },
      "Philox4x32-10 words of int64 items, int64 (n_items, n).");
  m.def(
      "philox_normal",
      [](std::uintptr_t items, int64_t n_items, int64_t seed, int64_t n, std::uintptr_t out, int n_threads) {
        py::gil_scoped_release nogil;
        br::philox_normal(at<const int64_t>(items), n_items, seed, n, at<float>(out), n_threads);
      },
      "Standard normals of int64 items, float32 (n_items, n).");

  m.def(
      "krylov_product",
      [](std::uintptr_t matrix, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, int64_t width,
         std::uintptr_t v, std::uintptr_t z, const std::vector<int64_t>& z_strides, bool given, std::uintptr_t w,
         int n_threads) {
        if (shape.size() != 3 || strides.size() != 3 || z_strides.size() != 2) {
          throw std::invalid_argument("krylov_product: three sizes, three strides and two of Z are needed");
        }
        br::KrylovTask task = {};
        task.m = at<const float>(matrix);
        task.batch = shape[0], task.rows = shape[1], task.columns = shape[2];
        task.batch_stride = strides[0], task.row_stride = strides[1], task.column_stride = strides[2];
        task.width = width;
        task.v = at<const double>(v);
        task.z = at<double>(z);
        task.z_batch_stride = z_strides[0], task.z_row_stride = z_strides[1];
        task.given = given;
        task.adjoint = w != 0;
        task.w = at<double>(w);
        py::gil_scoped_release nogil;
        br::krylov_product(task, n_threads);
      },
      "Z = M V and W = M^T Z, float64 (batch, width, rows) and (batch, width, columns), of float32 (batch, rows, "
      "columns).");

  m.def(
      "double_product",
      [](std::uintptr_t x, const std::vector<int64_t>& x_strides, std::uintptr_t y,
         const std::vector<int64_t>& y_strides, std::uintptr_t out, const std::vector<int64_t>& out_strides,
         const std::vector<int64_t>& sizes, bool transposed, bool add, int n_threads) {
        if (x_strides.size() != 2 || y_strides.size() != 2 || out_strides.size() != 2 || sizes.size() != 4) {
          throw std::invalid_argument("double_product: two strides of each matrix and four sizes are needed");
        }
        br::DoubleProductTask task = {};
        task.x = at<const double>(x), task.y = at<const double>(y), task.out = at<double>(out);
        task.x_batch_stride = x_strides[0], task.x_row_stride = x_strides[1];
        task.y_batch_stride = y_strides[0], task.y_row_stride = y_strides[1];
        task.out_batch_stride = out_strides[0], task.out_row_stride = out_strides[1];
        task.batch = sizes[0], task.rows = sizes[1], task.inner = sizes[2], task.columns = sizes[3];
        task.transposed = transposed, task.add = add && !transposed;
        py::gil_scoped_release nogil;
        br::double_product(task, n_threads);
      },
      "x y^T or x y of float64 matrices (batch, rows, inner), into out (batch, rows, columns).");

  m.def(
      "krylov_space",
      [](std::uintptr_t matrix, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, int64_t width,
         int64_t rounds, std::uintptr_t basis, const std::vector<int64_t>& basis_strides, std::uintptr_t images,
         const std::vector<int64_t>& images_strides, std::uintptr_t done, int n_threads) {
        if (shape.size() != 3 || strides.size() != 3 || basis_strides.size() != 2 || images_strides.size() != 2) {
          throw std::invalid_argument(
              "krylov_space: three sizes, three strides and two of basis and images are needed");
        }
        br::KrylovSpaceTask task = {};
        task.m = at<const float>(matrix);
        task.batch = shape[0], task.rows = shape[1], task.columns = shape[2];
        task.batch_stride = strides[0], task.row_stride = strides[1], task.column_stride = strides[2];
        task.width = width, task.rounds = rounds;
        task.basis = at<double>(basis), task.images = at<double>(images);
        task.basis_batch_stride = basis_strides[0], task.basis_row_stride = basis_strides[1];
        task.images_batch_stride = images_strides[0], task.images_row_stride = images_strides[1];
        task.done = at<bool>(done);
        py::gil_scoped_release nogil;
        br::krylov_space(task, n_threads);
      },
      "All blocks of the Krylov spaces of float32 (batch, rows, columns) behind the first, and their images.");

  m.def(
      "orthonormalise",
      [](std::uintptr_t w, const std::vector<int64_t>& shape, std::uintptr_t basis, int64_t held,
         const std::vector<int64_t>& basis_strides, std::uintptr_t out, std::uintptr_t done, int n_threads) {
        if (shape.size() != 3 || basis_strides.size() != 2) {
          throw std::invalid_argument("orthonormalise: three sizes and two strides of the basis are needed");
        }
        br::OrthonormaliseTask task = {};
        task.w = at<const double>(w), task.basis = at<const double>(basis);
        task.basis_batch_stride = basis_strides[0], task.basis_row_stride = basis_strides[1];
        task.batch = shape[0], task.width = shape[1], task.held = held, task.n = shape[2];
        task.out = at<double>(out), task.done = at<bool>(done);
        py::gil_scoped_release nogil;
        br::orthonormalise(task, n_threads);
      },
      "Orthonormal rows beside a basis, float64 (batch, width, n), and whether they came out, bool (batch).");

  m.def(
      "survey",
      [](std::uintptr_t matrix, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
         std::uintptr_t out, int n_threads) {
        if (shape.size() != 3 || strides.size() != 3 || strides[2] != 1) {
          throw std::invalid_argument("survey: a stack of matrices whose rows lie in one piece is needed");
        }
        br::SurveyTask task = {};
        task.m = at<const float>(matrix);
        task.batch = shape[0], task.rows = shape[1], task.columns = shape[2];
        task.batch_stride = strides[0], task.row_stride = strides[1];
        py::gil_scoped_release nogil;
        br::survey(task, at<double>(out), n_threads);
      },
      "Sum of squares, which is finite where all entries are, and largest magnitude, float64 (batch, 2).");

  m.def(
      "read_test",
      [](std::uintptr_t x, int64_t n_bytes, int n_threads) {
        py::gil_scoped_release nogil;
        return br::read_test(at<const float>(x), n_bytes / 4, n_threads);
      },
      py::arg("x"), py::arg("n_bytes"), py::arg("n_threads"),
      "Sums floats and does nothing else: how fast this processor reads memory, for the benchmarks.");

  bind_jvp(m);
}
