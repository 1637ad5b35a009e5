// The operations as the bindings call them: raw pointers, sizes in elements, storage types by code.
#pragma once

#include <cstdint>
#include <vector>

#include "vec.h"

namespace stepfuse {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Calls f with a value of the storage type that `dtype` names.
template <class Function>
inline void with_type(DType dtype, const Function& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bfloat16{});
    case DType::f16:
      return f(float16{});
  }
}

// Standard normal noise of `count` samples of `elements` each; seed, sample, timestep: [count].
struct Fill {
  void* out;  // [count, elements]
  DType dtype;
  const int64_t *seed, *sample, *timestep;
  int64_t count, elements;
};
void fill(const Fill&, int threads);

// The words behind the noise, as integers in [0, 2^32): out [count, elements].
void integers(const int64_t* seed, const int64_t* sample, const int64_t* timestep, int64_t count,
              int64_t elements, int64_t* out, int threads);

// x_t = sqrt(abar) x0 + sqrt(1 - abar) eps; see kernels/reference/add_noise.py.
struct AddNoise {
  const void *x0, *noise;  // [count, elements]; noise null: drawn from seed and sample
  const int64_t* t;        // [count]
  const double* alphas_cumprod;
  const int64_t *seed, *sample;  // [count]
  void *out, *target;            // [count, elements]; out may be x0; target null: not wanted
  bool velocity;                 // target is v, not eps
  DType dtype;
  int64_t count, elements;
};
void add_noise(const AddNoise&, int threads);

// One row of the step table applied; see kernels/reference/denoise_step.py.
struct DenoiseStep {
  const void *x, *cond, *uncond, *noise;  // uncond, noise may be null
  const float* row;                       // [16], kernels/step_row.py
  const int64_t *seed, *sample;           // [count], or null for no drawn noise
  void *out, *x0;                         // out may be x; x0 null: not wanted
  DType dtype, output_dtype;              // of x, noise, out and x0; of cond and uncond
  bool learned;                           // cond + elements holds the variance
  int64_t count, elements;                // x: [count, elements]
  int64_t cond_stride, uncond_stride;     // elements from one sample to the next
  float* history = nullptr;               // [slots][count, elements], or null
  const float* memory = nullptr;          // [8], the second part of the row
  int slots = 0;
};
void denoise_step(const DenoiseStep&, int threads);

// A parameter [C] or [N, C] of any storage type, or null for its neutral value.
struct Parameter {
  const void* data;
  DType dtype;
  int64_t stride;  // elements from one sample to the next; 0 for [C]
};

// act((1 + scale) GroupNorm(x + add) + shift); see kernels/reference/group_norm_silu.py.
struct GroupNorm {
  const void* x;
  DType dtype;
  bool channels_last;  // x: [N, S, C], else [N, C, S]
  int64_t samples, channels, spatial, groups;
  float eps;
  Parameter weight, bias, scale, shift, add;
  bool silu;
  // channels-last statistics only: channels split .. C - 1 are those of an image of their own
  const void* beside = nullptr;
  int64_t split = 0;
};
void group_norm_silu(const GroupNorm&, void* out, int threads);  // out: like x, may be x

// Outputs of the backward; any may be null.
struct GroupNormGradients {
  const void* grad;               // like x
  void* dx;                       // like x
  float *dweight, *dbias;         // [C]
  float *dscale, *dshift, *dadd;  // [N, C]
};
void group_norm_silu_backward(const GroupNorm&, const GroupNormGradients&, int threads);

// softmax(scale q k^T) v for every sample and head; see kernels/reference/attention.py.
struct Attention {
  struct Operand {
    const void* data;                // [samples, heads, positions, width], last stride 1
    int64_t sample, head, position;  // strides, in elements
  };
  Operand q, k, v, out;
  DType dtype;  // f32 or bf16
  int64_t samples, heads, queries, keys;
  int64_t width, values;  // of q and k; of v and out. Even in bfloat16
  float scale;
};
void attention(const Attention&, int threads);

// Images side by side in their channels: pixel after pixel, the bytes of each part; see
// kernels/reference/concatenate.py.
struct Concatenate {
  struct Part {
    const void* data;  // [pixels][bytes]
    int64_t bytes;
  };
  std::vector<Part> parts;
  void* out;  // [pixels][sum of bytes]
  int64_t pixels;
};
void concatenate(const Concatenate&, int threads);

}  // namespace stepfuse
