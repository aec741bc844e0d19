// 32 registers of 16 floats: 8 rows x 3 gates and 12 rows x 2 vectors keep 24 sums.
#include "fp32.hpp"

constinit const steppe::Kernel steppe::avx512 = Gru<16, 8, 12>::kernel("avx512");
