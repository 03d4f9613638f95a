// Instruction sets per function, never per build: between POPCNT_BEGIN (or AVX2_BEGIN, AVX512_BEGIN, AMX_BEGIN) and
// TARGET_END
// every function, template and lambda is compiled for that set, by gcc and by clang, without any -m flag.
#pragma once

// Tests that replace the instructions by functions define BITORCH_QLINEAR_SIMDE, so that no region selects an
// instruction set.

#if defined(__clang__)
#define BITORCH_QLINEAR_POPCNT_BEGIN \
    _Pragma("clang attribute push(__attribute__((target(\"popcnt\"))), apply_to = function)")
#define BITORCH_QLINEAR_AVX2_BEGIN \
    _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c,bmi2\"))), apply_to = function)")
// _Pragma takes one string literal, which would be too long for a line here.
#define BITORCH_QLINEAR_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define BITORCH_QLINEAR_AVX512_BEGIN                                                                      \
    BITORCH_QLINEAR_PRAGMA(clang attribute push(                                                          \
        __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx2,fma,f16c,bmi2"))), \
        apply_to = function))
#define BITORCH_QLINEAR_AMX_BEGIN                                                                               \
    BITORCH_QLINEAR_PRAGMA(clang attribute push(                                                                \
        __attribute__((target("amx-int8,amx-tile,avx512vbmi,avx512f,avx512bw,avx512dq,avx512vl,avx2,popcnt"))), \
        apply_to = function))
#define BITORCH_QLINEAR_TARGET_END _Pragma("clang attribute pop")
#define BITORCH_QLINEAR_UNROLL _Pragma("clang loop unroll(full)")
#else
#define BITORCH_QLINEAR_POPCNT_BEGIN _Pragma("GCC push_options") _Pragma("GCC target(\"popcnt\")")
#define BITORCH_QLINEAR_AVX2_BEGIN _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c,bmi2\")")
#define BITORCH_QLINEAR_AVX512_BEGIN \
    _Pragma("GCC push_options")      \
        _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx2,fma,f16c,bmi2\")")
#define BITORCH_QLINEAR_AMX_BEGIN \
    _Pragma("GCC push_options")   \
        _Pragma("GCC target(\"amx-int8,amx-tile,avx512vbmi,avx512f,avx512bw,avx512dq,avx512vl,avx2,popcnt\")")
#define BITORCH_QLINEAR_TARGET_END _Pragma("GCC pop_options")
#define BITORCH_QLINEAR_UNROLL _Pragma("GCC unroll 8")
#endif

// AMX needs gcc 11 or clang 11, whose headers have these names, and a system call of Linux.
#if defined(__x86_64__) && defined(__linux__) && (__has_include(<amxint8intrin.h>) || __has_include(<amxintrin.h>))
#define BITORCH_QLINEAR_HAS_AMX
#endif

#if defined(BITORCH_QLINEAR_SIMDE)
#undef BITORCH_QLINEAR_AVX512_BEGIN
#undef BITORCH_QLINEAR_TARGET_END
#define BITORCH_QLINEAR_AVX512_BEGIN
#define BITORCH_QLINEAR_TARGET_END
#endif
