// The GRU with products of bfloat16 numbers summed in float32 by tiles (tiles.hpp); gates and the running state are
// float32, 16 to a vector. See fp32.hpp for the equations and the words.
//
// A tile product is C[16, 16] += A[16, 32] B[32, 16], B as pairs of rows: [16 pairs][16 columns][2]. So every matrix is
// kept in the form in which it is multiplied:
//
//   states and inputs   [row][columns], columns padded to 32        A of the forward product; kept on the tape
//                       [row / 32][column / 16][16 columns][32]     A of the weights' gradient, made from the first
//   gates' gradients    [gate][row][units padded to 32]             A of the product for the inputs' gradient
//                       [row / 32][unit / 16][gate][16 pairs][16][2]   B of the weights' gradient
#pragma once
#include <utility>

#include "fp32.hpp"
#include "tiles.hpp"

namespace {

struct Bf16 {
    typedef Gru<16, 8, 12> F;
    typedef F::V V;
    typedef F::U U;
    typedef uint16_t H __attribute__((vector_size(32)));  // 16 numbers
    static constexpr int64_t block = 128, granule = 32, tile = 512;  // rows, rows, uint16 of a tile

    // ---- numbers ----------------------------------------------------------------------------------------------

    // rounded to nearest even, in the upper half of each word
    STEPPE_INLINE U rounded(V x) {
        const U bits = (U)x, up = bits + (0x7fffu + ((bits >> 16) & 1u));
        return (x == x ? up : U{} + 0x7fc00000u) & 0xffff0000u;
    }
    STEPPE_INLINE void put(uint16_t* to, V x) {
        *reinterpret_cast<H*>(to) = __builtin_convertvector(rounded(x) >> 16, H);
    }
    STEPPE_INLINE V get(const uint16_t* from) {
        return (V)(__builtin_convertvector(*reinterpret_cast<const H*>(from), U) << 16);
    }
    static uint16_t half(float x) {
        uint32_t bits;
        __builtin_memcpy(&bits, &x, 4);
        return x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fc0u;
    }

    // ---- memory -----------------------------------------------------------------------------------------------

    static int64_t wide(int64_t columns) { return F::up(columns, 32); }
    static uint16_t* halves(F::Arena& arena, int64_t n) { return reinterpret_cast<uint16_t*>(arena.take((n + 1) / 2)); }

    // Per step and layer: gates [unit / 16][row][r z n g][16], state [row][wide(hidden)].
    struct Tape {
        uint16_t* data;
        int64_t hidden, layers, rows;
        Tape(float* tape, const Shape& s, int64_t first, int64_t rows_)
            : data(reinterpret_cast<uint16_t*>(tape) + first * s.steps * s.layers * (4 * s.hidden + wide(s.hidden))),
              hidden(s.hidden),
              layers(s.layers),
              rows(rows_) {}
        uint16_t* gates(int64_t step, int64_t layer) const {
            return data + (step * layers + layer) * (4 * hidden + wide(hidden)) * rows;
        }
        uint16_t* state(int64_t step, int64_t layer) const { return gates(step, layer) + 4 * hidden * rows; }
    };
    static int64_t tape_size(const Shape& s) {
        return F::up(s.rows, granule) * s.steps * s.layers * (4 * s.hidden + wide(s.hidden)) / 2;
    }

    // One step of a block's input [row][32]; missing rows and columns are 0.
    static void load_input(const Shape& s, const Input& x, int64_t step, int64_t first, int64_t rows, uint16_t* to) {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t k = 0; k < 32; ++k)
                to[row * 32 + k] = first + row < s.rows && k < s.features
                                       ? half(x.data[step * x.step + (first + row) * x.row + k])
                                       : 0;
    }

    // ---- forward ----------------------------------------------------------------------------------------------

    // Weights as B: [unit / 16][input / 32][3 gates] tiles.
    static void pack(const float* from, int64_t hidden, int64_t columns, const int64_t (&order)[3], uint16_t* to) {
        for (int64_t p = 0; p < hidden; p += 16)
            for (int64_t c = 0; c < columns; c += 32)
                for (int64_t gate : order)
                    for (int64_t pair = 0; pair < 16; ++pair)
                        for (int64_t j = 0; j < 16; ++j)
                            for (int64_t e = 0; e < 2; ++e) {
                                const int64_t k = c + 2 * pair + e;
                                *to++ = k < columns ? half(from[(gate * hidden + p + j) * columns + k]) : 0;
                            }
    }

    // C tiles a, b, c += in[16 rows, columns] * weights
    template <int A, int B, int C>
    STEPPE_INLINE void multiply(Tiles& tiles, const uint16_t* in, int64_t columns, const uint16_t* weight) {
        for (int64_t c = 0; c < columns; c += 32, weight += 3 * tile) {
            tiles.load<4>(in + c, wide(columns) * 2);
            tiles.load<5>(weight, 64);
            tiles.load<6>(weight + tile, 64);
            tiles.load<7>(weight + 2 * tile, 64);
            tiles.dot<A, 4, 5>();
            tiles.dot<B, 4, 6>();
            tiles.dot<C, 4, 7>();
        }
    }

    struct ForwardScratch {
        struct PerLayer {
            uint16_t *ih, *hh, *states[2];
            float *bias, *state;  // the running state [unit / 16][row][16]
        } layer[steppe::max_layers];
        uint16_t* input;
        ForwardScratch(F::Arena& arena, const Shape& s) {
            for (int64_t l = 0; l < s.layers; ++l) {
                PerLayer& to = layer[l];
                to.ih = halves(arena, 3 * s.hidden * wide(F::inputs(s, l)));
                to.hh = halves(arena, 3 * s.hidden * wide(s.hidden));
                for (auto& state : to.states) state = halves(arena, block * wide(s.hidden));
                to.bias = arena.take(4 * s.hidden);
                to.state = arena.take(block * s.hidden);
            }
            input = halves(arena, block * 32);
        }
    };
    static int64_t forward_scratch(const Shape& s) {
        F::Arena arena{nullptr};
        ForwardScratch measured(arena, s);
        return arena.used;
    }

    static void step(Tiles& tiles, int64_t rows, int64_t columns, int64_t hidden,
                     const ForwardScratch::PerLayer& layer, const uint16_t* in, const uint16_t* before,
                     uint16_t* state, uint16_t* gates) {
        alignas(64) float sums[4][16][16];  // r, z, the input's part of n, the state's part of n
        for (int64_t p = 0; p < hidden / 16; ++p) {
            const float* bias = layer.bias + p * 64;
            for (int64_t row = 0; row < rows; row += 16) {
                tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>(), tiles.zero<3>();
                multiply<2, 0, 1>(tiles, in + row * wide(columns), columns, layer.ih + p * wide(columns) * 48);
                if (before)
                    multiply<0, 1, 3>(tiles, before + row * wide(hidden), hidden, layer.hh + p * wide(hidden) * 48);
                tiles.store<0>(sums[0], 64), tiles.store<1>(sums[1], 64);
                tiles.store<2>(sums[2], 64), tiles.store<3>(sums[3], 64);
                for (int i = 0; i < 16; ++i) {
                    const V g = F::at(sums[3][i]) + F::at(bias + 48);
                    const V r = F::sigmoid(F::at(sums[0][i]) + F::at(bias + 16));
                    const V z = F::sigmoid(F::at(sums[1][i]) + F::at(bias + 32));
                    const V n = F::tanh(F::at(sums[2][i]) + F::at(bias) + r * g);
                    float* running = layer.state + (p * rows + row + i) * 16;
                    const V old = before ? F::at(running) : V{};
                    const V now = n + z * (old - n);
                    F::at(running) = now;
                    put(state + (row + i) * wide(hidden) + p * 16, now);
                    if (gates) {
                        uint16_t* to = gates + (p * rows + row + i) * 64;
                        put(to, r), put(to + 16, z), put(to + 32, n), put(to + 48, g);
                    }
                }
            }
        }
        if (hidden % 32)  // the padding is multiplied too
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t k = hidden; k < wide(hidden); ++k) state[row * wide(hidden) + k] = 0;
    }

    static void forward(const Shape& s, const Input& x, const Layer<const float>* layers, float* out, float* tape,
                        float* buffer) {
        F::Arena arena{buffer};
        ForwardScratch scratch(arena, s);
        for (int64_t l = 0; l < s.layers; ++l) {
            auto& to = scratch.layer[l];
            pack(layers[l].weight_ih, s.hidden, F::inputs(s, l), F::input_order, to.ih);
            pack(layers[l].weight_hh, s.hidden, s.hidden, F::state_order, to.hh);
            F::pack_bias(s.hidden, layers[l], to.bias);
        }
        Tiles tiles;
        for (int64_t first = 0; first < s.rows; first += block) {
            const int64_t real = s.rows - first < block ? s.rows - first : block, rows = F::up(real, granule);
            const Tape kept(tape, s, first, rows);
            for (int64_t t = 0; t < s.steps; ++t) {
                load_input(s, x, t, first, rows, scratch.input);
                const uint16_t* in = scratch.input;
                for (int64_t l = 0; l < s.layers; ++l) {
                    const auto& layer = scratch.layer[l];
                    uint16_t* state = tape ? kept.state(t, l) : layer.states[t % 2];
                    const uint16_t* before = t == 0 ? nullptr : tape ? kept.state(t - 1, l) : layer.states[(t - 1) % 2];
                    step(tiles, rows, F::inputs(s, l), s.hidden, layer, in, before, state,
                         tape ? kept.gates(t, l) : nullptr);
                    in = state;
                }
            }
            const float* top = scratch.layer[s.layers - 1].state;
            for (int64_t p = 0; p < s.hidden / 16; ++p)
                for (int64_t row = 0; row < real; ++row)
                    for (int j = 0; j < 16; ++j)
                        out[(first + row) * s.hidden + p * 16 + j] = top[(p * rows + row) * 16 + j];
        }
    }

    // ---- backward ---------------------------------------------------------------------------------------------

    // Gates in the order n, r, z, g: the input's three are the first, the state's the last.

    // Weights as B of d_in = d_gates W: [input / 16][3 gates][unit / 32] tiles.
    static void pack_back(const float* from, int64_t hidden, int64_t columns, const int64_t (&order)[3], uint16_t* to) {
        for (int64_t c = 0; c < columns; c += 16)
            for (int64_t gate : order)
                for (int64_t u = 0; u < hidden; u += 32)
                    for (int64_t pair = 0; pair < 16; ++pair)
                        for (int64_t j = 0; j < 16; ++j)
                            for (int64_t e = 0; e < 2; ++e) {
                                const int64_t unit = u + 2 * pair + e;
                                *to++ = unit < hidden && c + j < columns
                                            ? half(from[(gate * hidden + unit) * columns + c + j])
                                            : 0;
                            }
    }

    // 16 x 16 words: each stage exchanges the off-diagonal squares of one size
    template <int S, int... I>
    STEPPE_INLINE void exchange(U (&v)[16], std::integer_sequence<int, I...>) {
        for (int i = 0; i < 16; ++i)
            if (!(i & S)) {
                const U a = v[i], b = v[i + S];
                v[i] = __builtin_shufflevector(a, b, (I & S ? I - S + 16 : I)...);
                v[i + S] = __builtin_shufflevector(a, b, (I & S ? I + 16 : I + S)...);
            }
    }
    // [row][columns] -> [row / 32][column / 16][16 columns][32 rows]
    static void transpose(const uint16_t* from, int64_t rows, int64_t columns, uint16_t* to) {
        const std::make_integer_sequence<int, 16> lanes{};
        const int64_t stride = wide(columns);
        for (int64_t row = 0; row < rows; row += 32)
            for (int64_t c = 0; c < F::up(columns, 16); c += 16, to += tile) {
                U v[16];
                for (int i = 0; i < 16; ++i) {
                    const uint16_t* pair = from + (row + 2 * i) * stride + c;
                    v[i] = __builtin_convertvector(*reinterpret_cast<const H*>(pair), U) |
                           __builtin_convertvector(*reinterpret_cast<const H*>(pair + stride), U) << 16;
                }
                exchange<1>(v, lanes), exchange<2>(v, lanes), exchange<4>(v, lanes), exchange<8>(v, lanes);
                for (int i = 0; i < 16; ++i) reinterpret_cast<U*>(to)[i] = v[i];
            }
    }

    struct BackwardScratch {
        struct PerLayer {
            uint16_t *ih, *hh;             // weights as B
            float *d_ih, *d_hh, *d_bias;   // [unit / 16][input / 16][3 gates][16 inputs][16 units]
            float* d_state;                // [unit / 16][row][16]
            int64_t ih_size, hh_size;
        } layer[steppe::max_layers];
        uint16_t *input, *d_rows, *d_pairs, *turned_in, *turned_before;
        float* d_input;
        BackwardScratch(F::Arena& arena, const Shape& s) {
            for (int64_t l = 0; l < s.layers; ++l) {
                PerLayer& to = layer[l];
                const int64_t columns = F::up(F::inputs(s, l), 16);
                to.ih = halves(arena, 3 * wide(s.hidden) * columns);
                to.hh = halves(arena, 3 * wide(s.hidden) * s.hidden);
                to.ih_size = 3 * s.hidden * columns, to.hh_size = 3 * s.hidden * s.hidden;
                to.d_ih = arena.take(to.ih_size);
                to.d_hh = arena.take(to.hh_size);
                to.d_bias = arena.take(4 * s.hidden);
                to.d_state = arena.take(block * s.hidden);
            }
            const int64_t widest = wide(s.hidden);
            input = halves(arena, block * 32);
            d_rows = halves(arena, 4 * block * widest);
            d_pairs = halves(arena, 4 * block * s.hidden);
            turned_in = halves(arena, block * widest);
            turned_before = halves(arena, block * widest);
            d_input = arena.take(block * 32);
        }
    };
    static int64_t backward_scratch(const Shape& s) {
        F::Arena arena{nullptr};
        BackwardScratch measured(arena, s);
        return arena.used;
    }

    static void gate_gradients(int64_t rows, int64_t hidden, const uint16_t* gates, const uint16_t* before,
                               float* d_state, uint16_t* d_rows, uint16_t* d_pairs, float* d_bias) {
        const int64_t stride = wide(hidden);
        for (int64_t p = 0; p < hidden / 16; ++p) {
            V sum[4] = {};
            for (int64_t row = 0; row < rows; row += 2) {
                V d[2][4];
                for (int e = 0; e < 2; ++e) {
                    const int64_t where = p * rows + row + e;
                    const uint16_t* kept = gates + where * 64;
                    const V r = get(kept), z = get(kept + 16), n = get(kept + 32), g = get(kept + 48);
                    const V old = before ? get(before + (row + e) * stride + p * 16) : V{};
                    V& dh = F::at(d_state + where * 16);
                    d[e][0] = dh * (1.f - z) * (1.f - n * n);
                    d[e][1] = d[e][0] * g * (r * (1.f - r));
                    d[e][2] = dh * (old - n) * (z * (1.f - z));
                    d[e][3] = d[e][0] * r;
                    dh *= z;
                }
                for (int gate = 0; gate < 4; ++gate) {
                    sum[gate] += d[0][gate] + d[1][gate];
                    const U low = rounded(d[0][gate]), high = rounded(d[1][gate]);
                    uint16_t* to = d_rows + (gate * rows + row) * stride + p * 16;
                    *reinterpret_cast<H*>(to) = __builtin_convertvector(low >> 16, H);
                    *reinterpret_cast<H*>(to + stride) = __builtin_convertvector(high >> 16, H);
                    uint16_t* pairs = d_pairs + ((row / 32 * (hidden / 16) + p) * 4 + gate) * tile + row % 32 / 2 * 32;
                    *reinterpret_cast<U*>(pairs) = low >> 16 | high;
                }
            }
            for (int gate = 0; gate < 4; ++gate) F::at(d_bias + p * 64 + gate * 16) += sum[gate];
        }
    }

    // to[column / 16][row][16] += d_rows[3 gates][row][units] * weight
    static void input_gradients(Tiles& tiles, int64_t rows, int64_t hidden, int64_t columns, const uint16_t* d_rows,
                                const uint16_t* weight, float* to) {
        const int64_t stride = wide(hidden), size = 3 * stride * 16;
        for (int64_t c = 0; c < columns; c += 16, weight += size, to += rows * 16)
            for (int64_t row = 0; row < rows; row += 32) {
                tiles.load<0>(to + row * 16, 64), tiles.load<1>(to + (row + 16) * 16, 64);
                const uint16_t* w = weight;
                for (int64_t gate = 0; gate < 3; ++gate)
                    for (int64_t u = 0; u < hidden; u += 32, w += tile) {
                        const uint16_t* d = d_rows + (gate * rows + row) * stride + u;
                        tiles.load<2>(d, stride * 2), tiles.load<3>(d + 16 * stride, stride * 2), tiles.load<4>(w, 64);
                        tiles.dot<0, 2, 4>(), tiles.dot<1, 3, 4>();
                    }
                tiles.store<0>(to + row * 16, 64), tiles.store<1>(to + (row + 16) * 16, 64);
            }
    }

    // d_weight[unit / 16][input / 16][3 gates] tiles += turned^T d_pairs; `d_pairs` starts at the first of the three gates
    static void weight_gradients(Tiles& tiles, int64_t rows, int64_t hidden, int64_t columns, const uint16_t* turned,
                                 const uint16_t* d_pairs, float* d_weight) {
        const int64_t units = hidden / 16, inputs = F::up(columns, 16) / 16;
        for (int64_t p = 0; p < units; ++p)
            for (int64_t k = 0; k < inputs; ++k, d_weight += 768) {
                tiles.load<0>(d_weight, 64), tiles.load<1>(d_weight + 256, 64), tiles.load<2>(d_weight + 512, 64);
                for (int64_t chunk = 0; chunk < rows / 32; ++chunk) {
                    const uint16_t* d = d_pairs + (chunk * units + p) * 4 * tile;
                    tiles.load<4>(turned + (chunk * inputs + k) * tile, 64);
                    tiles.load<5>(d, 64), tiles.load<6>(d + tile, 64), tiles.load<7>(d + 2 * tile, 64);
                    tiles.dot<0, 4, 5>(), tiles.dot<1, 4, 6>(), tiles.dot<2, 4, 7>();
                }
                tiles.store<0>(d_weight, 64), tiles.store<1>(d_weight + 256, 64), tiles.store<2>(d_weight + 512, 64);
            }
    }

    static void unpack(const float* from, int64_t hidden, int64_t columns, const int64_t (&order)[3], float* to) {
        for (int64_t p = 0; p < hidden; p += 16)
            for (int64_t c = 0; c < columns; c += 16)
                for (int64_t gate : order)
                    for (int64_t k = c; k < c + 16; ++k)
                        for (int64_t j = 0; j < 16; ++j, ++from)
                            if (k < columns) to[(gate * hidden + p + j) * columns + k] = *from;
    }

    static void backward(const Shape& s, const Input& x, const Layer<const float>* layers, const float* tape,
                         const float* grad_out, const Layer<float>* grads, float* grad_x, float* buffer) {
        F::Arena arena{buffer};
        BackwardScratch scratch(arena, s);
        for (int64_t l = 0; l < s.layers; ++l) {
            auto& to = scratch.layer[l];
            pack_back(layers[l].weight_ih, s.hidden, F::inputs(s, l), F::input_order, to.ih);
            pack_back(layers[l].weight_hh, s.hidden, s.hidden, F::state_order, to.hh);
            F::zero(to.d_ih, to.ih_size), F::zero(to.d_hh, to.hh_size), F::zero(to.d_bias, 4 * s.hidden);
        }
        __builtin_memset(scratch.d_rows, 0, 4 * block * wide(s.hidden) * sizeof(uint16_t));  // the padding stays 0
        Tiles tiles;
        for (int64_t first = (s.rows - 1) / block * block; first >= 0; first -= block) {
            const int64_t real = s.rows - first < block ? s.rows - first : block, rows = F::up(real, granule);
            const Tape kept(const_cast<float*>(tape), s, first, rows);
            for (int64_t l = 0; l < s.layers; ++l) F::zero(scratch.layer[l].d_state, rows * s.hidden);
            float* top = scratch.layer[s.layers - 1].d_state;
            for (int64_t p = 0; p < s.hidden / 16; ++p)
                for (int64_t row = 0; row < real; ++row)
                    for (int j = 0; j < 16; ++j)
                        top[(p * rows + row) * 16 + j] = grad_out[(first + row) * s.hidden + p * 16 + j];

            for (int64_t t = s.steps - 1; t >= 0; --t) {
                load_input(s, x, t, first, rows, scratch.input);
                for (int64_t l = s.layers - 1; l >= 0; --l) {
                    auto& layer = scratch.layer[l];
                    const int64_t columns = F::inputs(s, l);
                    const uint16_t* before = t == 0 ? nullptr : kept.state(t - 1, l);
                    gate_gradients(rows, s.hidden, kept.gates(t, l), before, layer.d_state, scratch.d_rows,
                                   scratch.d_pairs, layer.d_bias);
                    transpose(l == 0 ? scratch.input : kept.state(t, l - 1), rows, columns, scratch.turned_in);
                    weight_gradients(tiles, rows, s.hidden, columns, scratch.turned_in, scratch.d_pairs, layer.d_ih);
                    const uint16_t* of_state = scratch.d_rows + rows * wide(s.hidden);
                    if (before) {
                        transpose(before, rows, s.hidden, scratch.turned_before);
                        weight_gradients(tiles, rows, s.hidden, s.hidden, scratch.turned_before,
                                         scratch.d_pairs + tile, layer.d_hh);
                        input_gradients(tiles, rows, s.hidden, s.hidden, of_state, layer.hh, layer.d_state);
                    }
                    if (l > 0) {
                        input_gradients(tiles, rows, s.hidden, columns, scratch.d_rows, layer.ih,
                                        scratch.layer[l - 1].d_state);
                    } else if (grad_x) {
                        F::zero(scratch.d_input, rows * 32);
                        input_gradients(tiles, rows, s.hidden, columns, scratch.d_rows, layer.ih, scratch.d_input);
                        for (int64_t row = 0; row < real; ++row)
                            for (int64_t k = 0; k < columns; ++k)
                                grad_x[(t * s.rows + first + row) * columns + k] =
                                    scratch.d_input[(k / 16 * rows + row) * 16 + k % 16];
                    }
                }
            }
        }
        for (int64_t l = 0; l < s.layers; ++l) {
            const auto& from = scratch.layer[l];
            unpack(from.d_ih, s.hidden, F::inputs(s, l), F::input_order, grads[l].weight_ih);
            unpack(from.d_hh, s.hidden, s.hidden, F::state_order, grads[l].weight_hh);
            F::unpack_bias(s.hidden, from.d_bias, grads[l]);
        }
    }

    static constexpr steppe::Kernel kernel(const char* name) {
        return {name, tape_size, forward_scratch, backward_scratch, forward, backward};
    }
};

}  // namespace
