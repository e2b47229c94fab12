// The kernels that ship, for both layers of the emulator: g++ with DBF_ON_CPU compiles their source, nvcc emits their PTX.

#include "dbf-kernels.cuh"

#ifdef ONLY  // one instance, named on the command line
template __global__ void ONLY(const dbf_args);
#else
DBF_INSTANTIATE_KERNELS
#endif
