// The float32 GRU, written once over the vector width and compiled once per instruction set.
//
// Rows (samples) go through all steps and layers in blocks that stay in the near caches. Matrices of a block are kept
// in panels of one vector width: [column / W][row][W], so that every inner loop, whichever operand it broadcasts and
// whichever it loads as a vector, walks contiguous memory. The three products of training share one shape of inner
// loop, a tile of sums that stay in registers:
//
//   forward   state[row, unit]    += in[row, k] * weight[k, unit]    R rows x 3 gates; gates follow in registers
//   backward  d_in[row, k]        += d_gate[row, unit] * weight      Q rows x 2 vectors
//   weights   d_weight[k, unit]   += in[row, k] * d_gate[row, unit]  R inputs x 3 gates, summed over a block's rows
//
// Equations, torch's: r, z = sigmoid(W_i x + b_i + W_h h + b_h), g = W_hn h + b_hn, n = tanh(W_in x + b_in + r g),
// h = n + z (h - n). Sums run in a fixed order: the same input gives the same bits.
#pragma once
#include "gru.hpp"

#define STEPPE_INLINE static inline __attribute__((always_inline))

namespace {

using steppe::Input;
using steppe::Layer;
using steppe::Shape;

// W floats per vector, R rows of a forward tile, Q rows of a backward tile; chosen by the number of registers.
template <int W, int R, int Q>
struct Gru {
    typedef float V __attribute__((vector_size(W * 4)));
    typedef uint32_t U __attribute__((vector_size(W * 4)));

    // rows of a block; a multiple of both tiles
    static constexpr int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }
    static constexpr int64_t block = 48, granule = R / gcd(R, Q) * Q;
    static_assert(block % granule == 0 && W % R == 0, "tiles must fit");

    // ---- elementwise ------------------------------------------------------------------------------------------

    STEPPE_INLINE V& at(float* p) { return *reinterpret_cast<V*>(p); }
    STEPPE_INLINE const V& at(const float* p) { return *reinterpret_cast<const V*>(p); }
    STEPPE_INLINE V all(float a) { return a - V{}; }  // not plus: -0 + 0 is 0, so that the addition would stay
    // comparisons with NaN are false, so NaN passes through
    STEPPE_INLINE V clamp(V x, float limit) {
        x = x > all(limit) ? all(limit) : x;
        return x < all(-limit) ? all(-limit) : x;
    }

    // exp(x) - 1 = scale * m + (scale - 1), with x = k ln 2 + f, scale = 2^k, m = exp(f) - 1; |x| < 87.
    // The polynomial interpolates (exp(f) - 1 - f) / f^2 on |f| <= ln 2 / 2 to 8e-9 of exp(f).
    STEPPE_INLINE void exponential(V x, V& scale, V& m) {
        const float round = 12582912.f;  // 1.5 * 2^23: adding it leaves k in the low bits
        const V shifted = x * 1.44269504f + round;
        const V k = shifted - round;
        const V f = (x - k * 0.693145752f) - k * 1.42860677e-6f;
        V q = f * 0.001392625f + 0.008363233f;
        q = q * f + 0.041666552f;
        q = q * f + 0.16666576f;
        q = q * f + 0.5f;
        m = (f * f) * q + f;
        scale = (V)(((U)shifted << 23) + 0x3f800000u);
    }
    STEPPE_INLINE V sigmoid(V x) {
        V scale, m;
        exponential(clamp(-x, 80.f), scale, m);
        return 1.f / (scale * m + (scale + 1.f));
    }
    STEPPE_INLINE V tanh(V x) {
        V scale, m;
        exponential(clamp(x + x, 20.f), scale, m);
        const V e = scale * m + (scale - 1.f);
        return e / (e + 2.f);
    }

    // ---- memory -----------------------------------------------------------------------------------------------

    // Hands out pieces of one buffer; with a null base it only measures.
    struct Arena {
        float* base;
        int64_t used = 0;
        float* take(int64_t floats) {
            float* piece = base ? base + used : nullptr;
            used += (floats + 15) / 16 * 16;
            return piece;
        }
    };

    static int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
    static int64_t inputs(const Shape& s, int64_t layer) { return layer == 0 ? s.features : s.hidden; }
    static int64_t panels(int64_t columns) { return (columns + W - 1) / W; }
    static void zero(float* to, int64_t n) {
        for (int64_t i = 0; i < n; ++i) to[i] = 0.f;
    }

    // A block's part of the tape: per step and layer the gates [panel][row][r z n g][W] and the states [panel][row][W].
    struct Tape {
        float* data;
        int64_t hidden, layers, rows;
        Tape(float* tape, const Shape& s, int64_t first, int64_t rows_)
            : data(tape + first * s.steps * s.layers * 5 * s.hidden), hidden(s.hidden), layers(s.layers), rows(rows_) {}
        float* gates(int64_t step, int64_t layer) const { return data + (step * layers + layer) * 5 * hidden * rows; }
        float* state(int64_t step, int64_t layer) const { return gates(step, layer) + 4 * hidden * rows; }
    };
    static int64_t tape_size(const Shape& s) { return up(s.rows, granule) * s.steps * s.layers * 5 * s.hidden; }

    // One step of a block's input as panels; missing rows and columns are 0.
    static void load_input(const Shape& s, const Input& x, int64_t step, int64_t first, int64_t rows, float* to) {
        const int64_t real = s.rows - first < rows ? s.rows - first : rows;
        zero(to, panels(s.features) * rows * W);
        for (int64_t row = 0; row < real; ++row) {
            const float* from = x.data + step * x.step + (first + row) * x.row;
            for (int64_t k = 0; k < s.features; ++k) to[(k / W * rows + row) * W + k % W] = from[k];
        }
    }

    // ---- forward ----------------------------------------------------------------------------------------------

    // Weights for the forward tile: [unit / W][input][3 gates][W]; gate order n r z for inputs, r z n for states.
    struct Packed {
        float *ih, *hh, *bias;  // bias: [unit / W][n of the input, r, z, n of the state][W]
        Packed(Arena& arena, const Shape& s, int64_t layer)
            : ih(arena.take(3 * s.hidden * inputs(s, layer))),
              hh(arena.take(3 * s.hidden * s.hidden)),
              bias(arena.take(4 * s.hidden)) {}
    };
    static void pack(const float* from, int64_t hidden, int64_t columns, const int64_t (&order)[3], float* to) {
        for (int64_t p = 0; p < hidden / W; ++p)
            for (int64_t k = 0; k < columns; ++k)
                for (int64_t gate : order)
                    for (int64_t j = 0; j < W; ++j) *to++ = from[(gate * hidden + p * W + j) * columns + k];
    }
    static constexpr int64_t input_order[3] = {2, 0, 1}, state_order[3] = {0, 1, 2};

    static void pack_bias(int64_t hidden, const Layer<const float>& from, float* to) {
        for (int64_t unit = 0; unit < hidden; ++unit) {
            const int64_t r = unit, z = r + hidden, n = z + hidden;
            float* bias = to + unit / W * 4 * W + unit % W;
            bias[0] = from.bias_ih[n];
            bias[W] = from.bias_ih[r] + from.bias_hh[r];
            bias[2 * W] = from.bias_ih[z] + from.bias_hh[z];
            bias[3 * W] = from.bias_hh[n];
        }
    }
    static void unpack_bias(int64_t hidden, const float* from, const Layer<float>& to) {
        for (int64_t unit = 0; unit < hidden; ++unit) {
            const int64_t r = unit, z = r + hidden, n = z + hidden;
            const float* bias = from + unit / W * 4 * W + unit % W;
            to.bias_ih[r] = to.bias_hh[r] = bias[W];
            to.bias_ih[z] = to.bias_hh[z] = bias[2 * W];
            to.bias_ih[n] = bias[0];
            to.bias_hh[n] = bias[3 * W];
        }
    }
    static void pack(const Shape& s, int64_t layer, const Layer<const float>& from, const Packed& to) {
        pack(from.weight_ih, s.hidden, inputs(s, layer), input_order, to.ih);
        pack(from.weight_hh, s.hidden, s.hidden, state_order, to.hh);
        pack_bias(s.hidden, from, to.bias);
    }

    // sums[0..2][R] += in[R rows, columns] * weight[columns, 3 vectors]
    STEPPE_INLINE void multiply(V (&a)[R], V (&b)[R], V (&c)[R], const float* in, int64_t panel, int64_t columns,
                                const float* weight) {
        for (; columns >= W; columns -= W, in += panel)
#pragma GCC unroll 4
            for (int k = 0; k < W; ++k, weight += 3 * W) {
                const V u = at(weight), v = at(weight + W), w = at(weight + 2 * W);
#pragma GCC unroll 16
                for (int i = 0; i < R; ++i) {
                    const V x = all(in[i * W + k]);
                    a[i] += x * u;
                    b[i] += x * v;
                    c[i] += x * w;
                }
            }
        for (int k = 0; k < columns; ++k, weight += 3 * W) {
            const V u = at(weight), v = at(weight + W), w = at(weight + 2 * W);
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) {
                const V x = all(in[i * W + k]);
                a[i] += x * u;
                b[i] += x * v;
                c[i] += x * w;
            }
        }
    }

    // One step of one layer over a block. `before` is null at the first step, where the state is 0.
    template <bool keep>
    static void step(int64_t rows, int64_t columns, int64_t hidden, const Packed& weights, const float* in,
                     const float* before, float* state, float* gates) {
        const int64_t panel = rows * W;
        for (int64_t p = 0; p < hidden / W; ++p) {
            const float* bias = weights.bias + p * 4 * W;
            const float* ih = weights.ih + p * columns * 3 * W;
            const float* hh = weights.hh + p * hidden * 3 * W;
            for (int64_t row = 0; row < rows; row += R) {
                V r[R], z[R], n[R], input[R];
#pragma GCC unroll 16
                for (int i = 0; i < R; ++i) n[i] = at(bias), r[i] = at(bias + W), z[i] = at(bias + 2 * W);
                multiply(n, r, z, in + row * W, panel, columns, ih);
#pragma GCC unroll 16
                for (int i = 0; i < R; ++i) input[i] = n[i], n[i] = at(bias + 3 * W);
                if (before) multiply(r, z, n, before + row * W, panel, hidden, hh);
                for (int i = 0; i < R; ++i) {
                    const V reset = sigmoid(r[i]), update = sigmoid(z[i]), fresh = tanh(input[i] + reset * n[i]);
                    const int64_t where = p * panel + (row + i) * W;
                    const V old = before ? at(before + where) : V{};
                    at(state + where) = fresh + update * (old - fresh);
                    if (keep) {
                        float* g = gates + 4 * where;
                        at(g) = reset, at(g + W) = update, at(g + 2 * W) = fresh, at(g + 3 * W) = n[i];
                    }
                }
            }
        }
    }

    struct ForwardScratch {
        Packed weights[steppe::max_layers];
        float *input, *states[2][steppe::max_layers];
        ForwardScratch(Arena& arena, const Shape& s)
            : weights{Packed(arena, s, 0), Packed(arena, s, 1), Packed(arena, s, 2)},
              input(arena.take(panels(s.features) * block * W)) {
            for (auto& side : states)
                for (auto& state : side) state = arena.take(block * s.hidden);
        }
    };
    static int64_t forward_scratch(const Shape& s) {
        Arena arena{nullptr};
        ForwardScratch measured(arena, s);
        return arena.used;
    }

    static void forward(const Shape& s, const Input& x, const Layer<const float>* layers, float* out, float* tape,
                        float* buffer) {
        Arena arena{buffer};
        ForwardScratch scratch(arena, s);
        for (int64_t l = 0; l < s.layers; ++l) pack(s, l, layers[l], scratch.weights[l]);
        for (int64_t first = 0; first < s.rows; first += block) {
            const int64_t real = s.rows - first < block ? s.rows - first : block, rows = up(real, granule);
            const Tape kept(tape, s, first, rows);
            const float* top = nullptr;
            for (int64_t t = 0; t < s.steps; ++t) {
                load_input(s, x, t, first, rows, scratch.input);
                const float* in = scratch.input;
                for (int64_t l = 0; l < s.layers; ++l) {
                    float* state = tape ? kept.state(t, l) : scratch.states[t % 2][l];
                    const float* before =
                        t == 0 ? nullptr : tape ? kept.state(t - 1, l) : scratch.states[(t - 1) % 2][l];
                    if (tape)
                        step<true>(rows, inputs(s, l), s.hidden, scratch.weights[l], in, before, state,
                                   kept.gates(t, l));
                    else
                        step<false>(rows, inputs(s, l), s.hidden, scratch.weights[l], in, before, state, nullptr);
                    in = state;
                }
                top = in;
            }
            for (int64_t p = 0; p < s.hidden / W; ++p)
                for (int64_t row = 0; row < real; ++row)
                    for (int j = 0; j < W; ++j)
                        out[(first + row) * s.hidden + p * W + j] = top[(p * rows + row) * W + j];
        }
    }

    // ---- backward ---------------------------------------------------------------------------------------------

    // Gradients at the gates are kept as [unit / W][row][n, r, z, g][W]: the input's three are the first, the
    // state's three (r, z, g) the last, so either is one run of memory.
    static constexpr int64_t of_input = 0, of_state = W;

    // Weights for the backward tile: [input / 2W][unit / W][3 gates][W][2 vectors of inputs]; a last single vector may stand alone.
    static void pack_back(const float* from, int64_t hidden, int64_t columns, const int64_t (&order)[3], float* to) {
        for (int64_t c = 0; c < columns; c += 2 * W) {
            const int64_t width = panels(columns) * W - c < 2 * W ? W : 2 * W;
            for (int64_t p = 0; p < hidden / W; ++p)
                for (int64_t gate : order)
                    for (int64_t j = 0; j < W; ++j)
                        for (int64_t k = c; k < c + width; ++k)
                            *to++ = k < columns ? from[(gate * hidden + p * W + j) * columns + k] : 0.f;
        }
    }

    // The gate's gradients of one layer at one step. `d_state` turns from dL/dh into the part z dL/dh of the step before.
    static void gate_gradients(int64_t rows, int64_t hidden, const float* gates, const float* before, float* d_state,
                               float* d_gates, float* d_bias) {
        for (int64_t p = 0; p < hidden / W; ++p) {
            V sum_n{}, sum_r{}, sum_z{}, sum_g{};
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t where = (p * rows + row) * W;
                const float* kept = gates + 4 * where;
                const V r = at(kept), z = at(kept + W), n = at(kept + 2 * W), g = at(kept + 3 * W), d = at(d_state + where);
                const V old = before ? at(before + where) : V{};
                const V dn = d * (1.f - z) * (1.f - n * n);
                const V dz = d * (old - n) * (z * (1.f - z));
                const V dr = dn * g * (r * (1.f - r));
                const V dg = dn * r;
                float* to = d_gates + 4 * where;
                at(to) = dn, at(to + W) = dr, at(to + 2 * W) = dz, at(to + 3 * W) = dg;
                at(d_state + where) = d * z;
                sum_n += dn, sum_r += dr, sum_z += dz, sum_g += dg;
            }
            float* to = d_bias + p * 4 * W;
            at(to) += sum_n, at(to + W) += sum_r, at(to + 2 * W) += sum_z, at(to + 3 * W) += sum_g;
        }
    }

    // to[row, input] += d_gates[row, 3 hidden] * weight
    template <int C>
    STEPPE_INLINE void input_tile(int64_t rows, int64_t hidden, const float* d_gates, const float* weight, float* to) {
        for (int64_t row = 0; row < rows; row += Q) {
            V sum[Q][C];
#pragma GCC unroll 16
            for (int i = 0; i < Q; ++i)
#pragma GCC unroll 2
                for (int c = 0; c < C; ++c) sum[i][c] = at(to + (c * rows + row + i) * W);
            const float* w = weight;
            const float* d = d_gates + row * 4 * W;
            for (int64_t p = 0; p < hidden / W; ++p, d += rows * 4 * W)
#pragma GCC unroll 4
                for (int k = 0; k < 3 * W; ++k, w += C * W) {
                    V v[C];
#pragma GCC unroll 2
                    for (int c = 0; c < C; ++c) v[c] = at(w + c * W);
#pragma GCC unroll 16
                    for (int i = 0; i < Q; ++i) {
                        const V x = all(d[i * 4 * W + k]);
#pragma GCC unroll 2
                        for (int c = 0; c < C; ++c) sum[i][c] += x * v[c];
                    }
                }
#pragma GCC unroll 16
            for (int i = 0; i < Q; ++i)
#pragma GCC unroll 2
                for (int c = 0; c < C; ++c) at(to + (c * rows + row + i) * W) = sum[i][c];
        }
    }
    static void input_gradients(int64_t rows, int64_t hidden, int64_t columns, const float* d_gates, const float* weight,
                                float* to) {
        int64_t left = panels(columns);
        for (; left >= 2; left -= 2, to += 2 * rows * W, weight += 3 * hidden * 2 * W)
            input_tile<2>(rows, hidden, d_gates, weight, to);
        if (left) input_tile<1>(rows, hidden, d_gates, weight, to);
    }

    // d_weight[unit / W][input][3 gates][W] += in[row, input] * d_gates[row, 3 gates]; inputs in steps of R.
    // A block's sum starts from 0 and is then added: two levels of summation, a smaller rounding error.
    static void weight_gradients(int64_t rows, int64_t hidden, int64_t columns, const float* in, const float* d_gates,
                                 float* d_weight) {
        for (int64_t p = 0; p < hidden / W; ++p)
            for (int64_t k = 0; k < columns; k += R, d_weight += R * 3 * W) {
                V a[R], b[R], c[R];
#pragma GCC unroll 16
                for (int i = 0; i < R; ++i) a[i] = b[i] = c[i] = V{};
                const float* x = in + k / W * rows * W + k % W;
                const float* d = d_gates + p * rows * 4 * W;
#pragma GCC unroll 2
                for (int64_t row = 0; row < rows; ++row, x += W, d += 4 * W) {
                    const V u = at(d), v = at(d + W), w = at(d + 2 * W);
#pragma GCC unroll 16
                    for (int i = 0; i < R; ++i) {
                        const V y = all(x[i]);
                        a[i] += y * u;
                        b[i] += y * v;
                        c[i] += y * w;
                    }
                }
#pragma GCC unroll 16
                for (int i = 0; i < R; ++i) {
                    float* to = d_weight + i * 3 * W;
                    at(to) += a[i], at(to + W) += b[i], at(to + 2 * W) += c[i];
                }
            }
    }

    struct BackwardScratch {
        struct PerLayer {
            float *ih, *hh;                      // weights for the backward tile
            float *d_ih, *d_hh, *d_bias;         // gradients as `weight_gradients` leaves them
            float* d_state;                      // dL/dh of a block
            int64_t ih_size, hh_size, bias_size;
        } layer[steppe::max_layers];
        float *input, *d_input, *d_gates;
        BackwardScratch(Arena& arena, const Shape& s) {
            for (int64_t l = 0; l < s.layers; ++l) {
                PerLayer& to = layer[l];
                to.ih = arena.take(3 * s.hidden * up(inputs(s, l), W));
                to.hh = arena.take(3 * s.hidden * s.hidden);
                to.ih_size = 3 * s.hidden * up(inputs(s, l), R);
                to.hh_size = 3 * s.hidden * s.hidden;
                to.bias_size = 4 * s.hidden;
                to.d_ih = arena.take(to.ih_size);
                to.d_hh = arena.take(to.hh_size);
                to.d_bias = arena.take(to.bias_size);
                to.d_state = arena.take(block * s.hidden);
            }
            input = arena.take(panels(s.features) * block * W);
            d_input = arena.take(panels(s.features) * block * W);
            d_gates = arena.take(4 * block * s.hidden);
        }
    };
    static int64_t backward_scratch(const Shape& s) {
        Arena arena{nullptr};
        BackwardScratch measured(arena, s);
        return arena.used;
    }

    static void unpack(const float* from, int64_t hidden, int64_t columns, const int64_t (&order)[3], float* to) {
        for (int64_t p = 0; p < hidden / W; ++p, from += up(columns, R) * 3 * W)
            for (int64_t k = 0; k < columns; ++k)
                for (int g = 0; g < 3; ++g)
                    for (int64_t j = 0; j < W; ++j)
                        to[(order[g] * hidden + p * W + j) * columns + k] = from[(k * 3 + g) * W + j];
    }

    static void backward(const Shape& s, const Input& x, const Layer<const float>* layers, const float* tape,
                         const float* grad_out, const Layer<float>* grads, float* grad_x, float* buffer) {
        Arena arena{buffer};
        BackwardScratch scratch(arena, s);
        for (int64_t l = 0; l < s.layers; ++l) {
            auto& to = scratch.layer[l];
            pack_back(layers[l].weight_ih, s.hidden, inputs(s, l), input_order, to.ih);
            pack_back(layers[l].weight_hh, s.hidden, s.hidden, state_order, to.hh);
            zero(to.d_ih, to.ih_size), zero(to.d_hh, to.hh_size), zero(to.d_bias, to.bias_size);
        }
        // the last block first: its tape was written last and may still be in a cache
        for (int64_t first = (s.rows - 1) / block * block; first >= 0; first -= block) {
            const int64_t real = s.rows - first < block ? s.rows - first : block, rows = up(real, granule);
            const Tape kept(const_cast<float*>(tape), s, first, rows);
            for (int64_t l = 0; l < s.layers; ++l) zero(scratch.layer[l].d_state, rows * s.hidden);
            float* top = scratch.layer[s.layers - 1].d_state;
            for (int64_t p = 0; p < s.hidden / W; ++p)
                for (int64_t row = 0; row < real; ++row)
                    for (int j = 0; j < W; ++j)
                        top[(p * rows + row) * W + j] = grad_out[(first + row) * s.hidden + p * W + j];

            for (int64_t t = s.steps - 1; t >= 0; --t) {
                load_input(s, x, t, first, rows, scratch.input);
                for (int64_t l = s.layers - 1; l >= 0; --l) {
                    auto& at_layer = scratch.layer[l];
                    const int64_t columns = inputs(s, l);
                    const float* in = l == 0 ? scratch.input : kept.state(t, l - 1);
                    const float* before = t == 0 ? nullptr : kept.state(t - 1, l);
                    gate_gradients(rows, s.hidden, kept.gates(t, l), before, at_layer.d_state, scratch.d_gates,
                                   at_layer.d_bias);
                    weight_gradients(rows, s.hidden, columns, in, scratch.d_gates + of_input, at_layer.d_ih);
                    if (before) {
                        weight_gradients(rows, s.hidden, s.hidden, before, scratch.d_gates + of_state, at_layer.d_hh);
                        input_gradients(rows, s.hidden, s.hidden, scratch.d_gates + of_state, at_layer.hh,
                                        at_layer.d_state);
                    }
                    if (l > 0) {
                        input_gradients(rows, s.hidden, columns, scratch.d_gates + of_input, at_layer.ih,
                                        scratch.layer[l - 1].d_state);
                    } else if (grad_x) {
                        zero(scratch.d_input, panels(columns) * rows * W);
                        input_gradients(rows, s.hidden, columns, scratch.d_gates + of_input, at_layer.ih,
                                        scratch.d_input);
                        for (int64_t row = 0; row < real; ++row)
                            for (int64_t k = 0; k < columns; ++k)
                                grad_x[(t * s.rows + first + row) * columns + k] =
                                    scratch.d_input[(k / W * rows + row) * W + k % W];
                    }
                }
            }
        }
        for (int64_t l = 0; l < s.layers; ++l) {
            const auto& from = scratch.layer[l];
            const Layer<float>& to = grads[l];
            unpack(from.d_ih, s.hidden, inputs(s, l), input_order, to.weight_ih);
            unpack(from.d_hh, s.hidden, s.hidden, state_order, to.weight_hh);
            unpack_bias(s.hidden, from.d_bias, to);
        }
    }

    static constexpr steppe::Kernel kernel(const char* name) {
        return {name, tape_size, forward_scratch, backward_scratch, forward, backward};
    }
};

}  // namespace
