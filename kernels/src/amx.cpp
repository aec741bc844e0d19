#define STEPPE_AMX
#include "bf16.hpp"

constinit const steppe::Kernel steppe::amx = Bf16::kernel("amx");
