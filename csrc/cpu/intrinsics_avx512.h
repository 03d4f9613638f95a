// The intrinsics for files that use AVX-512. gcc 12 warns about its own ones, which begin with an undefined vector, so
// that warning is off in these files.
#pragma once

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
