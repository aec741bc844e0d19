// The tiles in plain C++ and AVX2: slow, for testing the whole path on machines without AMX.
#include "bf16.hpp"

constinit const steppe::Kernel steppe::amx_emulated = Bf16::kernel("amx-emulated");
