// 16 registers of 8 floats: 4 rows x 3 gates and 6 rows x 2 vectors keep 12 sums.
#include "fp32.hpp"

constinit const steppe::Kernel steppe::avx2 = Gru<8, 4, 6>::kernel("avx2");
