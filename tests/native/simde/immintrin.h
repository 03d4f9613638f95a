// Replaces the compiler's header so that AVX-512 code runs on any processor. SIMDe implements its functions portably
// under the same names, and this file adds those that SIMDe 0.7.4 lacks, following Intel's Intrinsics Guide.
#pragma once

#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cstdint>
#include <cstring>

typedef uint8_t __mmask8;
typedef uint16_t __mmask16;

namespace simde_lacks {

// Sets bit i of the result if lane i of a is less than lane i of b.
template <class Lane>
inline uint64_t less(__m512i a, __m512i b) {
    constexpr int kLanes = 64 / sizeof(Lane);
    Lane left[kLanes], right[kLanes];
    std::memcpy(left, &a, sizeof left);
    std::memcpy(right, &b, sizeof right);
    uint64_t mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint64_t>(left[i] < right[i]) << i;
    return mask;
}

// Shifts each lane to the right and copies the sign into the free bits.
template <class Lane>
inline __m512i shift_right(__m512i a, unsigned count) {
    Lane lanes[64 / sizeof(Lane)];
    std::memcpy(lanes, &a, sizeof lanes);
    for (Lane& lane : lanes) lane = static_cast<Lane>(lane >> count);
    std::memcpy(&a, lanes, sizeof lanes);
    return a;
}

}  // namespace simde_lacks

#define _mm512_srai_epi32(a, count) simde_lacks::shift_right<int32_t>(a, count)
#define _mm512_srai_epi64(a, count) simde_lacks::shift_right<int64_t>(a, count)
#define _mm512_cmpgt_epi16_mask(a, b) static_cast<uint32_t>(simde_lacks::less<int16_t>(b, a))
#define _mm512_mask_cmp_ps_mask(mask, a, b, how) static_cast<__mmask16>((mask) & _mm512_cmp_ps_mask(a, b, how))
#define _mm512_mask_cmp_pd_mask(mask, a, b, how) static_cast<__mmask8>((mask) & _mm512_cmp_pd_mask(a, b, how))
#define _mm512_cmplt_epu16_mask(a, b) static_cast<uint32_t>(simde_lacks::less<uint16_t>(a, b))
#define _mm512_cmplt_epu32_mask(a, b) static_cast<__mmask16>(simde_lacks::less<uint32_t>(a, b))
#define _mm512_cmplt_epu64_mask(a, b) static_cast<uint8_t>(simde_lacks::less<uint64_t>(a, b))
#define _mm512_kunpackw(high, low) (static_cast<uint32_t>(high) << 16 | static_cast<uint16_t>(low))

inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    uint16_t from[16];
    uint32_t to[16];
    std::memcpy(from, &a, sizeof from);
    for (int i = 0; i < 16; ++i) to[i] = from[i];
    __m512i widened;
    std::memcpy(&widened, to, sizeof to);
    return widened;
}

inline __m512 _mm512_cvtph_ps(__m256i a) {
    __m128i halves[2];
    std::memcpy(halves, &a, sizeof halves);
    __m256 widened[2] = {simde_mm256_cvtph_ps(halves[0]), simde_mm256_cvtph_ps(halves[1])};
    __m512 both;
    std::memcpy(&both, widened, sizeof both);
    return both;
}

// Reads only the lanes of the mask.
inline __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void* from) {
    uint32_t lanes[16] = {};
    for (int i = 0; i < 16; ++i) {
        if (mask >> i & 1) std::memcpy(lanes + i, static_cast<const char*>(from) + 4 * i, 4);
    }
    __m512i loaded;
    std::memcpy(&loaded, lanes, sizeof loaded);
    return loaded;
}

inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const float* from) {
    const __m512i bits = _mm512_maskz_loadu_epi32(mask, from);
    __m512 loaded;
    std::memcpy(&loaded, &bits, sizeof loaded);
    return loaded;
}

// Writes only the lanes of the mask.
inline void _mm512_mask_storeu_ps(float* to, __mmask16 mask, __m512 a) {
    float lanes[16];
    std::memcpy(lanes, &a, sizeof lanes);
    for (int i = 0; i < 16; ++i) {
        if (mask >> i & 1) std::memcpy(to + i, lanes + i, sizeof *lanes);
    }
}

inline __m512 _mm512_cvtepi32_ps(__m512i a) {
    int32_t from[16];
    float to[16];
    std::memcpy(from, &a, sizeof from);
    for (int i = 0; i < 16; ++i) to[i] = static_cast<float>(from[i]);
    __m512 converted;
    std::memcpy(&converted, to, sizeof to);
    return converted;
}

inline __m512i _mm512_cvtepu32_epi64(__m256i a) {
    uint32_t from[8];
    uint64_t to[8];
    std::memcpy(from, &a, sizeof from);
    for (int i = 0; i < 8; ++i) to[i] = from[i];
    __m512i widened;
    std::memcpy(&widened, to, sizeof to);
    return widened;
}
