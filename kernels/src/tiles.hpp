// Eight tiles of 16 rows x 64 bytes, twice: the instructions of AMX, and plain C++ that does what they do.
#pragma once
#include <cstring>

#include "gru.hpp"

namespace {

#ifdef STEPPE_AMX
// May only be entered where the CPU has AMX-BF16 and the system has given this process its registers (module.cpp).
struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        asm volatile("ldtilecfg %0" : : "m"(config));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    // assembly, since a compiler's own functions take a tile's number only as a literal
    template <int T>
    void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
    template <int T>
    void load(const void* from, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
    }
    template <int T>
    void store(void* to, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
    }
    template <int C, int A, int B>
    void dot() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B)); }
};
#else
// As Intel's manual describes TDPBF16PS, but for denormal numbers, which the instruction takes as 0.
struct Tiles {
    alignas(64) char data[8][16][64];
    template <int T>
    void zero() { std::memset(data[T], 0, sizeof data[T]); }
    template <int T>
    void load(const void* from, int64_t stride) {
        for (int i = 0; i < 16; ++i) std::memcpy(data[T][i], static_cast<const char*>(from) + i * stride, 64);
    }
    template <int T>
    void store(void* to, int64_t stride) {
        for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, data[T][i], 64);
    }
    // C[m, n] += A[m, 2k] B[k, 2n] + A[m, 2k+1] B[k, 2n+1], the even and the odd products summed apart
    template <int C, int A, int B>
    void dot() {
        for (int m = 0; m < 16; ++m) {
            float even[16] = {}, odd[16] = {}, sum[16];
            for (int k = 0; k < 16; ++k) {
                const uint32_t a = word(data[A][m] + 4 * k);
                for (int n = 0; n < 16; ++n) {
                    const uint32_t b = word(data[B][k] + 4 * n);
                    even[n] += number(a << 16) * number(b << 16);
                    odd[n] += number(a & 0xffff0000u) * number(b & 0xffff0000u);
                }
            }
            std::memcpy(sum, data[C][m], 64);
            for (int n = 0; n < 16; ++n) sum[n] += even[n] + odd[n];
            std::memcpy(data[C][m], sum, 64);
        }
    }

  private:
    static uint32_t word(const char* from) {
        uint32_t w;
        std::memcpy(&w, from, 4);
        return w;
    }
    static float number(uint32_t bits) {
        float f;
        std::memcpy(&f, &bits, 4);
        return f;
    }
};
#endif

}  // namespace
