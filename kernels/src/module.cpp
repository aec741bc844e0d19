// The Python module: checks every argument, then calls a kernel without the interpreter's lock.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <memory>

#include "gru.hpp"

namespace nb = nanobind;
using namespace steppe;

namespace {

using Cube = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Parameter = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<float, nb::c_contig, nb::device::cpu>;

constexpr int64_t alignment = 64, slack = alignment / sizeof(float);

// AMX-BF16 in the CPU, its registers saved by the system, and this process's permission to use them: Linux grants it
// on request, for the process and its children.
bool has_amx() {
#ifdef __linux__
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned tile_state = 3u << 17;
    if ((low & tile_state) != tile_state) return false;
    constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & amx_bf16) || !(d & amx_tile)) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

// The compiler's checks read cpuid and, for wide registers, whether the operating system saves them (xgetbv).
std::vector<const Kernel*> usable() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return {};
    std::vector<const Kernel*> kernels;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (wide && has_amx()) kernels.push_back(&amx);
    if (wide) kernels.push_back(&avx512);
    kernels.insert(kernels.end(), {&avx2, &avx512_emulated, &amx_emulated});
    return kernels;
}

const Kernel& find(const std::string& path) {
    for (const Kernel* kernel : usable())
        if (path == kernel->name) return *kernel;
    throw nb::value_error(("path '" + path + "' cannot run on this CPU; see paths()").c_str());
}

void check(bool holds, const char* what) {
    if (!holds) throw nb::value_error(what);
}

Shape checked(const Shape& s) {
    check(s.steps >= 1 && s.rows >= 1 && s.steps < (1 << 20) && s.rows < (1 << 28), "x must be [steps >= 1, rows >= 1, features]");
    check(s.features >= 1 && s.features <= max_features, "features must be 1 to 32");
    check(s.hidden >= min_hidden && s.hidden <= max_hidden && s.hidden % 16 == 0, "hidden must be 16 to 128 in steps of 16");
    check(s.layers >= 1 && s.layers <= max_layers, "layers must be 1 to 3");
    return s;
}

// weight_ih, weight_hh, bias_ih, bias_hh of each layer, as nn.GRU names them; their count and first shape give the rest.
template <class T, class Array>
void layers_of(const std::vector<Array>& arrays, const Shape& s, Layer<T> (&layers)[max_layers]) {
    check(arrays.size() == size_t(4 * s.layers), "four arrays per layer: weight_ih, weight_hh, bias_ih, bias_hh");
    for (int64_t l = 0; l < s.layers; ++l) {
        const Array* a = arrays.data() + 4 * l;
        const size_t gates = 3 * s.hidden, inputs = l == 0 ? s.features : s.hidden;
        check(a[0].ndim() == 2 && a[0].shape(0) == gates && a[0].shape(1) == inputs, "weight_ih must be [3 hidden, inputs]");
        check(a[1].ndim() == 2 && a[1].shape(0) == gates && a[1].shape(1) == size_t(s.hidden), "weight_hh must be [3 hidden, hidden]");
        for (int i : {2, 3}) check(a[i].ndim() == 1 && a[i].shape(0) == gates, "biases must be [3 hidden]");
        layers[l] = {a[0].data(), a[1].data(), a[2].data(), a[3].data()};
    }
}

Shape shape_of(const Cube& x, const std::vector<Parameter>& parameters) {
    check(!parameters.empty() && parameters.size() % 4 == 0 && parameters[0].ndim() == 2, "four arrays per layer, weight_ih first");
    check(x.stride(2) == 1 || x.shape(2) == 1, "x must be contiguous along its features");
    return checked({int64_t(x.shape(0)), int64_t(x.shape(1)), int64_t(x.shape(2)), int64_t(parameters[0].shape(0) / 3),
                    int64_t(parameters.size() / 4)});
}

float* aligned(float* p) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + alignment - 1) / alignment * alignment);
}

std::unique_ptr<float[]> scratch(int64_t floats) { return std::unique_ptr<float[]>(new float[floats + slack]); }

int64_t tape_size(const std::string& path, int64_t steps, int64_t rows, int64_t features, int64_t hidden, int64_t layers) {
    return find(path).tape_size(checked({steps, rows, features, hidden, layers})) + slack;
}

void forward(const std::string& path, const Cube& x, const std::vector<Parameter>& parameters, Result out, std::optional<Result> tape) {
    const Kernel& kernel = find(path);
    const Shape s = shape_of(x, parameters);
    Layer<const float> layers[max_layers];
    layers_of(parameters, s, layers);
    check(out.ndim() == 2 && int64_t(out.shape(0)) == s.rows && int64_t(out.shape(1)) == s.hidden, "out must be [rows, hidden]");
    check(!tape || int64_t(tape->size()) >= kernel.tape_size(s) + slack, "tape is smaller than tape_size()");
    const auto buffer = scratch(kernel.forward_scratch(s));
    const Input input{x.data(), x.stride(0), x.stride(1)};
    float *to = out.data(), *kept = tape ? aligned(tape->data()) : nullptr;
    nb::gil_scoped_release release;
    kernel.forward(s, input, layers, to, kept, aligned(buffer.get()));
}

void backward(const std::string& path, const Cube& x, const std::vector<Parameter>& parameters, Parameter tape, const Matrix& grad_out,
              const std::vector<Result>& grads, std::optional<Result> grad_x) {
    const Kernel& kernel = find(path);
    const Shape s = shape_of(x, parameters);
    Layer<const float> layers[max_layers];
    Layer<float> results[max_layers];
    layers_of(parameters, s, layers);
    layers_of(grads, s, results);
    check(int64_t(grad_out.shape(0)) == s.rows && int64_t(grad_out.shape(1)) == s.hidden, "grad_out must be [rows, hidden]");
    check(int64_t(tape.size()) >= kernel.tape_size(s) + slack, "tape is smaller than tape_size()");
    check(!grad_x || (grad_x->ndim() == 3 && int64_t(grad_x->size()) == s.steps * s.rows * s.features), "grad_x must have x's shape");
    const auto buffer = scratch(kernel.backward_scratch(s));
    const Input input{x.data(), x.stride(0), x.stride(1)};
    const float *kept = aligned(const_cast<float*>(tape.data())), *from = grad_out.data();
    float* to = grad_x ? grad_x->data() : nullptr;
    nb::gil_scoped_release release;
    kernel.backward(s, input, layers, kept, from, results, to, aligned(buffer.get()));
}

}  // namespace

NB_MODULE(_gru, m) {
    m.doc() = "A GRU's last state and its gradients; see steppe_kernels/README.";
    m.def("paths", [] {
        std::vector<std::string> names;
        for (const Kernel* kernel : usable()) names.push_back(kernel->name);
        return names;
    }, "The paths that this CPU runs, the fastest first.");
    m.def("tape_size", &tape_size, nb::arg("path"), nb::arg("steps"), nb::arg("rows"), nb::arg("features"), nb::arg("hidden"),
          nb::arg("layers"), "Floats that backward needs of forward.");
    m.def("forward", &forward, nb::arg("path"), nb::arg("x").noconvert(), nb::arg("parameters").noconvert(), nb::arg("out").noconvert(),
          nb::arg("tape").noconvert() = nb::none(), "x [steps, rows, features] -> out [rows, hidden], the top layer's last state.");
    m.def("backward", &backward, nb::arg("path"), nb::arg("x").noconvert(), nb::arg("parameters").noconvert(), nb::arg("tape").noconvert(),
          nb::arg("grad_out").noconvert(), nb::arg("grads").noconvert(), nb::arg("grad_x").noconvert() = nb::none(),
          "grad_out [rows, hidden] -> grads of the parameters, and of x where grad_x is given.");
}
