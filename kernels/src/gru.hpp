// What the module and the kernels agree on. No templates and no standard containers: the kernels are compiled for
// instruction sets that the machine may lack, and code shared by the linker must never come from those files.
#pragma once
#include <cstdint>

namespace steppe {

struct Shape {
    int64_t steps, rows, features, hidden, layers;
};

// x[step, row, feature] float32; features are contiguous, the other two strides are in floats.
struct Input {
    const float* data;
    int64_t step, row;
};

// One layer's parameters in torch's layout: gates r, z, n stacked along the first dimension.
template <class T>
struct Layer {
    T *weight_ih, *weight_hh, *bias_ih, *bias_hh;
};

constexpr int64_t max_features = 32, min_hidden = 16, max_hidden = 128, max_layers = 3;

// One way of computing. Sizes are in floats; `tape` holds what backward needs of forward and belongs to the kernel
// that wrote it. All buffers are aligned to 64 bytes. A call touches nothing but its arguments.
struct Kernel {
    const char* name;
    int64_t (*tape_size)(const Shape&);
    int64_t (*forward_scratch)(const Shape&);
    int64_t (*backward_scratch)(const Shape&);
    // out[rows, hidden]: the top layer's last state. Without a tape: inference.
    void (*forward)(const Shape&, const Input&, const Layer<const float>*, float* out, float* tape, float* scratch);
    // grad_out[rows, hidden] -> the gradients of the parameters, and of x[step, row, feature] (contiguous) unless null.
    void (*backward)(const Shape&, const Input&, const Layer<const float>*, const float* tape, const float* grad_out,
                     const Layer<float>*, float* grad_x, float* scratch);
};

extern const Kernel avx2, avx512, avx512_emulated, amx, amx_emulated;

}  // namespace steppe
