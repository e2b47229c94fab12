// The kernels that ship, for both layers of the emulator: g++ with DBF_ON_CPU compiles their source, nvcc emits their PTX.

#include "dbf-kernels.cuh"

DBF_INSTANTIATE_KERNELS
