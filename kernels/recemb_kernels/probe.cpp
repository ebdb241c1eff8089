// What kernels need of a compiler, for `recemb doctor`: the standard library, OpenMP, a library for this machine.
#include <omp.h>

#include <vector>

extern "C" int recemb_probe() { return static_cast<int>(std::vector<float>(omp_get_max_threads()).size()); }
