// The 16-wide kernel in AVX2 instructions: slow, for testing its logic on machines without AVX-512.
#include "fp32.hpp"

constinit const steppe::Kernel steppe::avx512_emulated = Gru<16, 8, 12>::kernel("avx512-emulated");
