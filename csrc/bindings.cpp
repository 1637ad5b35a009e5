// The Python module: integers in (addresses, sizes, codes), nothing out. Shapes, dtypes and strides
// are checked by the callers in kernels/cpp/.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <iterator>
#include <string>

#include "convolve.h"
#include "ops.h"
#include "parallel.h"

namespace py = pybind11;
using namespace stepfuse;

namespace {

// Work in elements from which letting other Python threads run is worth the two switches.
constexpr int64_t kReleaseFrom = 1 << 15;

template <class Function>
void run(int64_t work, const Function& f) {
  if (work < kReleaseFrom) return f();
  py::gil_scoped_release release;
  f();
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check_rows(int64_t row, int64_t rows) {
  if (row < 0 || row >= rows)
    throw py::index_error("step must be in 0 .. " + std::to_string(rows - 1) + "; got " +
                          std::to_string(row));
}

// What this processor can run, of the modules that may have been built.
py::list supported() {
  py::list names;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bf16"))
    names.append("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    names.append("avx2");
#endif
  names.append("baseline");
  return names;
}

void bind_noise(py::module_& m) {
  m.def("fill", [](uintptr_t out, int dtype, uintptr_t seed, uintptr_t sample, uintptr_t timestep,
                   int64_t count, int64_t elements, int threads) {
    const Fill a{pointer<void>(out),
                 static_cast<DType>(dtype),
                 pointer<int64_t>(seed),
                 pointer<int64_t>(sample),
                 pointer<int64_t>(timestep),
                 count,
                 elements};
    run(count * elements, [&] { fill(a, threads); });
  });
  m.def("integers", [](uintptr_t seed, uintptr_t sample, uintptr_t timestep, int64_t count,
                       int64_t elements, uintptr_t out, int threads) {
    run(count * elements, [&] {
      integers(pointer<int64_t>(seed), pointer<int64_t>(sample), pointer<int64_t>(timestep), count,
               elements, pointer<int64_t>(out), threads);
    });
  });
  m.def("add_noise",
        [](uintptr_t x0, uintptr_t noise, uintptr_t t, uintptr_t alphas_cumprod, int64_t timesteps,
           uintptr_t seed, uintptr_t sample, uintptr_t out, uintptr_t target, bool velocity,
           int dtype, int64_t count, int64_t elements, int threads) {
          const int64_t* indices = pointer<int64_t>(t);
          for (int64_t n = 0; n < count; ++n) check_rows(indices[n], timesteps);
          const AddNoise a{pointer<void>(x0),
                           pointer<void>(noise),
                           indices,
                           pointer<double>(alphas_cumprod),
                           pointer<int64_t>(seed),
                           pointer<int64_t>(sample),
                           pointer<void>(out),
                           pointer<void>(target),
                           velocity,
                           static_cast<DType>(dtype),
                           count,
                           elements};
          run(count * elements, [&] { add_noise(a, threads); });
        });
}

void bind_denoise_step(py::module_& m) {
  m.def("denoise_step",
        [](uintptr_t x, uintptr_t cond, uintptr_t uncond, uintptr_t table, int64_t rows,
           uintptr_t step, uintptr_t noise, uintptr_t seed, uintptr_t sample, uintptr_t out,
           uintptr_t x0, uintptr_t history, uintptr_t history_table, int slots, int dtype,
           int output_dtype, bool learned, int64_t count, int64_t elements, int64_t cond_stride,
           int64_t uncond_stride, int threads) {
          const int64_t row = *pointer<int64_t>(step);
          check_rows(row, rows);
          const DenoiseStep a{pointer<void>(x),
                              pointer<void>(cond),
                              pointer<void>(uncond),
                              pointer<void>(noise),
                              pointer<float>(table) + row * 16,
                              pointer<int64_t>(seed),
                              pointer<int64_t>(sample),
                              pointer<void>(out),
                              pointer<void>(x0),
                              static_cast<DType>(dtype),
                              static_cast<DType>(output_dtype),
                              learned,
                              count,
                              elements,
                              cond_stride,
                              uncond_stride,
                              pointer<float>(history),
                              history == 0 ? nullptr : pointer<float>(history_table) + row * 8,
                              slots};
          run(count * elements, [&] { denoise_step(a, threads); });
        });
}

// The arguments that forward and backward share, from a flat list:
//   x, dtype, channels_last, samples, channels, spatial, groups, silu,
//   then address (0 for none), dtype and stride over samples of weight, bias, scale, shift and add
GroupNorm group_norm(const py::list& values, float eps) {
  int64_t v[23];
  if (values.size() != std::size(v)) throw py::value_error("group_norm_silu takes 23 integers");
  for (size_t i = 0; i < std::size(v); ++i)
    v[i] = static_cast<int64_t>(PyLong_AsUnsignedLongLongMask(PyList_GET_ITEM(values.ptr(), i)));
  const auto parameter = [&](int i) {
    return Parameter{pointer<void>(static_cast<uintptr_t>(v[i])), static_cast<DType>(v[i + 1]),
                     v[i + 2]};
  };
  return {pointer<void>(static_cast<uintptr_t>(v[0])),
          static_cast<DType>(v[1]),
          v[2] != 0,
          v[3],
          v[4],
          v[5],
          v[6],
          eps,
          parameter(8),
          parameter(11),
          parameter(14),
          parameter(17),
          parameter(20),
          v[7] != 0};
}

void bind_group_norm_silu(py::module_& m) {
  m.def("group_norm_silu", [](const py::list& values, float eps, uintptr_t out, int threads) {
    const GroupNorm a = group_norm(values, eps);
    run(a.samples * a.channels * a.spatial,
        [&] { group_norm_silu(a, pointer<void>(out), threads); });
  });
  m.def("group_norm_silu_backward",
        [](const py::list& values, float eps, uintptr_t grad, uintptr_t dx, uintptr_t dweight,
           uintptr_t dbias, uintptr_t dscale, uintptr_t dshift, uintptr_t dadd, int threads) {
          const GroupNorm a = group_norm(values, eps);
          const GroupNormGradients g{pointer<void>(grad),     pointer<void>(dx),
                                     pointer<float>(dweight), pointer<float>(dbias),
                                     pointer<float>(dscale),  pointer<float>(dshift),
                                     pointer<float>(dadd)};
          run(a.samples * a.channels * a.spatial, [&] { group_norm_silu_backward(a, g, threads); });
        });
}

void bind_convolve(py::module_& m) {
  m.attr("wide") = kWide;
  m.attr("bfloat16_products") = kBFloat16Products;
  // What stays the same at one place of a network. `norm`: what group_norm_silu takes, or nothing;
  // its x and the addresses and strides of scale, shift and add are those of a run.
  struct Prepared {
    Convolution convolution;
    GroupNorm norm;
  };
  py::class_<Prepared>(m, "Convolution")
      .def(py::init([](uintptr_t u, bool plain, uintptr_t bias, int dtype, int form, int64_t stride,
                       const std::array<int64_t, 5>& sizes, int64_t split, const py::list& norm,
                       float eps) {
        Prepared p{};
        if (norm.size() > 0) p.norm = group_norm(norm, eps);
        Convolution& c = p.convolution;
        c.u = pointer<void>(u);
        c.bias = pointer<float>(bias);
        c.dtype = static_cast<DType>(dtype);
        c.form = static_cast<Form>(form);
        c.stride = stride;
        c.samples = sizes[0];
        c.height = sizes[1];
        c.width = sizes[2];
        c.channels = sizes[3];
        c.filters = sizes[4];
        c.plain = plain;
        c.split = p.norm.split = split;
        return p;
      }))
      .def("run", [](const Prepared& prepared, uintptr_t x, uintptr_t beside, uintptr_t residual,
                     uintptr_t out, uintptr_t scale, int64_t scale_stride, uintptr_t shift,
                     int64_t shift_stride, uintptr_t add, int64_t add_stride, int threads) {
        Convolution a = prepared.convolution;
        GroupNorm norm = prepared.norm;
        norm.x = a.x = pointer<void>(x);
        norm.beside = a.beside = pointer<void>(beside);
        a.residual = pointer<void>(residual);
        a.out = pointer<void>(out);
        norm.scale.data = pointer<void>(scale);
        norm.scale.stride = scale_stride;
        norm.shift.data = pointer<void>(shift);
        norm.shift.stride = shift_stride;
        norm.add.data = pointer<void>(add);
        norm.add.stride = add_stride;
        if (norm.groups > 0) a.norm = &norm;
        run(a.samples * a.height * a.width * a.channels * a.filters,
            [&] { convolve(a, threads); });
      });
}

void bind_concatenate(py::module_& m) {
  m.def("concatenate", [](const std::vector<std::pair<uintptr_t, int64_t>>& parts, uintptr_t out,
                          int64_t pixels, int threads) {
    Concatenate a{{}, pointer<void>(out), pixels};
    int64_t bytes = 0;
    for (const auto& [data, width] : parts) {
      a.parts.push_back({pointer<void>(data), width});
      bytes += width * pixels;
    }
    run(bytes, [&] { concatenate(a, threads); });
  });
}

void bind_attention(py::module_& m) {
  // an operand: its address and three strides; sizes: samples, heads, queries, keys, width, values
  m.def("attention", [](const std::array<int64_t, 4>& q, const std::array<int64_t, 4>& k,
                        const std::array<int64_t, 4>& v, const std::array<int64_t, 4>& out,
                        int dtype, const std::array<int64_t, 6>& sizes, float scale, int threads) {
    const auto operand = [](const std::array<int64_t, 4>& o) {
      return Attention::Operand{pointer<void>(static_cast<uintptr_t>(o[0])), o[1], o[2], o[3]};
    };
    const Attention a{operand(q), operand(k), operand(v), operand(out), static_cast<DType>(dtype),
                      sizes[0],   sizes[1],   sizes[2],   sizes[3],     sizes[4],
                      sizes[5],   scale};
    run(sizes[0] * sizes[1] * sizes[2] * sizes[3] * sizes[4], [&] { attention(a, threads); });
  });
}

}  // namespace

PYBIND11_MODULE(STEPFUSE_MODULE, m) {
  m.def("supported", &supported);
  m.attr("shares_torch_threads") = find_thread_pool();
  bind_noise(m);
  bind_denoise_step(m);
  bind_group_norm_silu(m);
  bind_convolve(m);
  bind_concatenate(m);
  bind_attention(m);
}
