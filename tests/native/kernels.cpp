// Compares every CPU kernel that this processor, or its emulator, can run with the scalar one, bit for bit. It needs no
// torch, so it runs under qemu-user and under sanitizers. tests/operators/test_kernels.py compares with a reference.
#include <cmath>
#include <limits>
#include <numeric>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/fingerprint.h"
#include "../../csrc/cpu/level_epilogue.h"
#include "../../csrc/cpu/levels.h"
#include "check.h"

using namespace bitorch_qlinear;
using test::below;
using test::Buffer;
using test::expect;
using test::Use;

namespace {

template <class... Values>
std::string describe(const Kernel& kernel, const char* what, Values... values) {
    std::string text = std::string(kernel.name) + " " + what;
    ((text += " " + std::to_string(values)), ...);
    return text;
}

// Returns each bound and its two neighbours, sorted, without duplicates and negative numbers.
std::vector<int64_t> around(std::initializer_list<int64_t> bounds) {
    std::vector<int64_t> values;
    for (int64_t bound : bounds) {
        for (int64_t i = std::max<int64_t>(0, bound - 1); i <= bound + 1; ++i) values.push_back(i);
    }
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
    return values;
}

void fill(Buffer<uint32_t>& words, int64_t count) {
    for (int64_t i = 0; i < count; ++i) words[i] = static_cast<uint32_t>(test::generator());
}

// ---- hashes --------------------------------------------------------------------------------------

// Every kernel's copy of the hash function gives the scalar one's result, for any length and alignment, and every bit
// and the length change the result.
void check_hashes(const Kernel& kernel) {
    for (const int64_t count : {0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 127, 1000, 2048, 4099}) {
        for (const int64_t shift : {0, 1, 5}) {
            Buffer<uint32_t> words(Use::Input, count, shift);
            fill(words, count);
            const auto hash_of = [&](const Kernel& of, int64_t length, int64_t period) {
                return of.hash_words(words.data(), length, period);
            };
            for (const int64_t period : {1, 3, 5, 129}) {
                expect(hash_of(kernel, count, period) == hash_of(kScalarKernel, count, period),
                       describe(kernel, "hash", count, shift, period));
            }
            if (count == 0) continue;
            const uint64_t hash = hash_of(kernel, count, 1);
            for (const int64_t at : {int64_t{0}, count / 2, count - 1, below(count)}) {
                const uint32_t bit = uint32_t{1} << below(32);
                words[at] ^= bit;
                expect(hash_of(kernel, count, 1) != hash, describe(kernel, "hash: ignores a bit", count, at));
                words[at] ^= bit;
            }
            expect(hash_of(kernel, count - 1, 1) != hash, describe(kernel, "hash: ignores the length", count));
        }
    }
}

// A fingerprint's last level covers all words, and is the only one if the words are few.
void check_fingerprints(const Kernel& kernel) {
    for (const int64_t count : {int64_t{1}, kFewWords, kFewWords + 1, int64_t{3} * 513 * kLineWords + 5}) {
        Buffer<uint32_t> words(Use::Input, count);
        fill(words, count);
        const Fingerprint got = take_fingerprint(kernel, words.data(), count, words.data(), 7);
        const Fingerprint expected = take_fingerprint(kScalarKernel, words.data(), count, words.data(), 7);
        expect(std::memcmp(&got, &expected, sizeof got) == 0, describe(kernel, "fingerprint", count));
        // A changed word is noticed by exactly those levels whose share of the words includes it.
        for (int repetition = 0; repetition < 50; ++repetition) {
            const int64_t at = below(count), line = at / kLineWords;
            const uint32_t bit = uint32_t{1} << below(32);
            words[at] ^= bit;
            for (int level = count <= kFewWords ? kAll : 0; level <= kAll; ++level) {
                const bool inside = line % period_of(level) == 0;
                const bool seen = hash_level(kernel, words.data(), count, level) != got.levels[level];
                expect(seen == inside, describe(kernel, "level", count, at, level));
            }
            words[at] ^= bit;
        }
    }
    constexpr int64_t kMany = int64_t{1} << 20, kFew = kFewWords + 1;
    expect(level_for(0, kMany) == 0 && level_for(1, kMany) == 0 && level_for(2, kMany) == 1 &&
               level_for(3, kMany) == 1 && level_for(4, kMany) == 2 && level_for(511, kMany) == 8 &&
               level_for(512, kMany) == kAll && level_for(INT64_MAX, kMany) == kAll && level_for(1, kFew) == kAll &&
               level_for(1, 4 * kFew) == 7,
           "the level for a number of rows");
}

// ---- products ------------------------------------------------------------------------------------

struct Epilogue {
    DType dtype;
    bool bias, scale;
    bool limits = false, flips = false;  // if there are limits, the outputs are bits
};
constexpr Epilogue kEpilogues[] = {{DType::int32, false, false},
                                   {DType::float32, true, false},
                                   {DType::float16, true, true},
                                   {DType::bfloat16, false, true},
                                   {DType::float64, true, true},
                                   {DType::int32, false, false, true, true},
                                   {DType::int32, false, false, true, false}};

// Fills in n random values, as doubles if the output is float64 and otherwise as floats.
void fill_factors(Buffer<uint8_t>& values, int64_t n, DType dtype) {
    for (int64_t i = 0; i < n; ++i) {
        const double value = static_cast<double>(below(4001) - 2000) / 16;
        if (dtype == DType::float64) {
            reinterpret_cast<double*>(values.data())[i] = value;
        } else {
            reinterpret_cast<float*>(values.data())[i] = static_cast<float>(value);
        }
    }
}

// Fills in limits near the counts of random rows, and some that no count reaches or every count does.
void fill_limits(Buffer<int32_t>& limits, int64_t n, int64_t k) {
    constexpr int32_t kExtremes[] = {INT32_MIN, -1, 0, INT32_MAX};
    for (int64_t i = 0; i < n; ++i) {
        limits[i] = below(4) ? static_cast<int32_t>(k / 2 + below(7) - 3) : kExtremes[below(std::size(kExtremes))];
    }
}

struct Case {
    int64_t m, n, k;
    Epilogue epilogue;
    bool whole = false;  // y is one tile as high and as wide as the kernel allows, instead of a random one
};

// Returns a workspace with the alignment that kernels may expect, and with exactly the size that they ask for.
Buffer<uint8_t> make_workspace(int64_t bytes) { return {Use::Output, bytes, 0, 64}; }

// Multiplies with one kernel, in tiles like those of csrc/cpu/product.h, with at most so many rows and columns.
void multiply(const Kernel& kernel, Product product, int64_t most_rows, int64_t most_columns) {
    Buffer<uint8_t> prepared(Use::Output, prepared_bytes(kernel.layout, product.n, product.k));
    if (kernel.prepare && product.k > 0) {
        kernel.prepare(product.weight, product.n, product.k, {0, ceil_div(product.n, kernel.layout.panel)},
                       prepared.data() + kPanelsOffset);
        prepared.check_guards(describe(kernel, "prepare", product.n, product.k));
    }
    product.panels = prepared.data() + kPanelsOffset;
    const int64_t rows = std::min(most_rows, kernel.row_tile);
    const int64_t column_tile = product.y.limits ? std::lcm(kernel.column_tile, kWordBits) : kernel.column_tile;
    const int64_t columns = ceil_div(most_columns, column_tile) * column_tile;
    Buffer<uint8_t> workspace = make_workspace(kernel.workspace_bytes(std::min(rows, product.m), product.k));
    for (int64_t row = 0; row < product.m; row += rows) {
        for (int64_t column = 0; column < product.n; column += columns) {
            kernel.gemm(product, {row, std::min(row + rows, product.m)},
                        {column, std::min(column + columns, product.n)}, workspace.data());
        }
    }
    workspace.check_guards(describe(kernel, "workspace", product.m, product.n, product.k));
}

void check_product(const Kernel& kernel, const Case& at, Buffer<uint32_t>& x, Buffer<uint32_t>& weight) {
    const int64_t m = at.m, n = at.n, k = at.k;
    const Epilogue epilogue = at.epilogue;
    const int64_t factor_bytes = epilogue.dtype == DType::float64 ? 8 : 4;
    Buffer<uint8_t> bias(Use::Input, n * factor_bytes), scale(Use::Input, n * factor_bytes);
    fill_factors(bias, n, epilogue.dtype);
    fill_factors(scale, n, epilogue.dtype);
    Buffer<int32_t> limits(Use::Input, n);
    Buffer<uint32_t> flips(Use::Input, words_for(n));
    fill_limits(limits, n, k);
    fill(flips, words_for(n));  // sets bits past n, too
    const int64_t bytes = m * (epilogue.limits ? words_for(n) * kWordBytes : n * element_size(epilogue.dtype));
    Buffer<uint8_t> expected(Use::Output, bytes), got(Use::Output, bytes);
    const auto product = [&](Buffer<uint8_t>& y) {
        return Product{x.data(),
                       weight.data(),
                       nullptr,
                       m,
                       n,
                       k,
                       {y.data(), epilogue.dtype, n, static_cast<int32_t>(k), epilogue.bias ? bias.data() : nullptr,
                        epilogue.scale ? scale.data() : nullptr, epilogue.limits ? limits.data() : nullptr,
                        epilogue.flips ? flips.data() : nullptr}};
    };
    multiply(kScalarKernel, product(expected), m, n);
    const bool whole = at.whole || below(2) == 0;
    multiply(kernel, product(got), whole ? m : 1 + below(m), whole ? n : 1 + below(n));
    const std::string what =
        describe(kernel, "product", m, n, k, static_cast<int>(epilogue.dtype), epilogue.limits, epilogue.flips);
    got.check_guards(what);
    expect(std::memcmp(expected.data(), got.data(), got.bytes()) == 0, what);
}

void check_random_product(const Kernel& kernel, const Case& at) {
    Buffer<uint32_t> x(Use::Input, at.m * words_for(at.k)), weight(Use::Input, at.n * words_for(at.k));
    fill(x, at.m * words_for(at.k));  // sets bits past k, too
    fill(weight, at.n * words_for(at.k));
    check_product(kernel, at, x, weight);
}

// Checks rows that are equal or opposite, so that every count is 0 or the largest, next to counts of both kinds.
void check_extreme_product(const Kernel& kernel, const Case& at) {
    const int64_t words = words_for(at.k);
    Buffer<uint32_t> x(Use::Input, at.m * words), weight(Use::Input, at.n * words);
    std::vector<uint32_t> pattern(static_cast<size_t>(words));
    const bool same = below(2);  // then all bits of a row are equal, too
    for (uint32_t& word : pattern) word = same ? 0 : static_cast<uint32_t>(test::generator());
    const auto fill_rows = [&](Buffer<uint32_t>& rows, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t flip = below(2) ? ~uint32_t{0} : 0;
            for (int64_t w = 0; w < words; ++w) rows[i * words + w] = pattern[static_cast<size_t>(w)] ^ flip;
        }
    };
    fill_rows(x, at.m);
    fill_rows(weight, at.n);
    check_product(kernel, at, x, weight);
}

void check_products(const Kernel& kernel) {
    const auto epilogue = [] { return kEpilogues[below(std::size(kEpilogues))]; };
    // These sizes reach every part of a tile of rows and columns.
    for (int64_t m = 1; m <= 9; ++m) {
        for (int64_t n = 1; n <= 9; ++n) check_random_product(kernel, {m, n, 1 + below(300), epilogue()});
    }
    for (int64_t m : around({16, kernel.row_tile})) {
        for (int64_t n : around({kernel.column_tile, 64, 2 * 64 + 3})) {
            check_random_product(kernel, {m, std::max<int64_t>(n, 1), 1 + below(400), epilogue()});
        }
    }
    // These are all k up to a little over four words, and then k around the units, blocks and spans of
    // csrc/cpu/gemm_*.cpp.
    for (int64_t k = 0; k <= 130; ++k) check_random_product(kernel, {1 + below(6), 1 + below(70), k, epilogue()});
    for (int64_t k : around({240, 255, 256, 480, 1024, 31 * 128, 62 * 128, 16384, 65520, 65535, 2 * 65520})) {
        check_random_product(kernel, {1 + below(4), 1 + below(6), k, epilogue()});
        check_extreme_product(kernel, {1 + below(5), 1 + below(20), k, epilogue()});
    }
    // These lie around the fewest rows, outputs and values that csrc/cpu/gemm_tables_avx2.h accepts.
    for (int64_t m : around({58, 64, 122, 128})) {
        const int64_t k = 766 + below(300);
        check_random_product(kernel, {m, 511 + below(4), k, epilogue()});
        check_extreme_product(kernel, {m, 511 + below(4), k, epilogue()});
    }
    for (int64_t n : around({1024, 1024 + 128})) check_random_product(kernel, {64, n, 768 + below(200), epilogue()});
    for (int64_t k : around({840, 960, 16384})) check_extreme_product(kernel, {64, 512, k, epilogue()});
}

#if defined(BITORCH_QLINEAR_HAS_AMX)
// Returns whether the tile registers are in use: the processor then saves them at each change of threads.
bool tiles_in_use() {
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
    return low >> 18 & 1;
}
#endif

// These sizes lie around the bounds of csrc/cpu/gemm_amx.cpp and the tiles, groups and parts of byte_gemm_amx.cpp.
void check_tile_products(const Kernel& kernel) {
#if defined(BITORCH_QLINEAR_HAS_AMX)
    if (kernel.gemm != kAmxKernel.gemm) return;
    if (!tiles_granted()) {
        std::printf("%s: signs as bytes are not tested: the system does not grant tile registers\n", kernel.name);
        return;
    }
    size_t next = 0, taken = 0;  // every epilogue takes turns
    const auto check_sizes = [&](int64_t m, int64_t n, int64_t k) {
        const Case at{m, n, k, kEpilogues[next++ % std::size(kEpilogues)], true};
        const int32_t limit = 0;
        const Output y{nullptr,
                       at.epilogue.dtype,
                       n,
                       static_cast<int32_t>(k),
                       nullptr,
                       nullptr,
                       at.epilogue.limits ? &limit : nullptr};
        taken += amx_is_faster(y, std::min(m, kernel.row_tile), n, k);
        below(4) ? check_random_product(kernel, at) : check_extreme_product(kernel, at);
        expect(!tiles_in_use(), describe(kernel, "product: the tile registers were not released", m, n, k));
    };
    for (int64_t m = 24; m <= 66; ++m) check_sizes(m, 1400 + below(70), 1024 + below(200));
    for (int64_t m : around({84, 104, 128, 148, 161})) check_sizes(m, 512 + below(70), 1024 + below(200));
    for (int64_t n = 512; n <= 580; ++n) check_sizes(64 + below(40), n, 1100 + below(200));
    for (int64_t n : around({511})) check_sizes(64 + below(40), n, 1100 + below(200));
    for (int64_t k = 1020; k <= 1160; ++k) check_sizes(40 + below(30), 900 + below(40), k);
    for (int64_t k : around({512, 768, 1024, 2048, 3072, 4096, 8192})) {
        for (size_t i = 0; i < std::size(kEpilogues); ++i) check_sizes(27 + below(50), 1300 + below(40), k);
    }
    // Larger numbers of values leave fewer rows to a block, and at last take another method.
    for (int64_t k : {16385, 20000}) check_sizes(70, 512 + below(40), k);
    for (int64_t k : around({32768})) check_sizes(25 + below(20), 512 + below(40), k);
    // So many multiply-adds or fewer take another method, and so do wide rows of few values.
    for (int64_t n : around({(1 << 24) / 28 / 1024, (1 << 25) / 28 / 1024})) {
        for (size_t i = 0; i < std::size(kEpilogues); ++i) check_sizes(28, n, 1024);
    }
    for (int64_t n : around({4096})) {
        for (int64_t k : around({1536})) check_sizes(26 + below(20), n, k);
    }
    expect(taken > 3 * next / 4, "most products of this test must be large enough for tile registers");
    expect(taken < next, "some products of this test must be too small for them");
#else
    (void)kernel;
#endif
}

// ---- packing -------------------------------------------------------------------------------------

template <class T>
T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T>
uint64_t bits_of(T value) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

// Returns a random bit pattern, or often one that comparisons of floats treat specially.
template <class T>
T random_value(uint64_t infinity) {
    const uint64_t sign = uint64_t{1} << (8 * sizeof(T) - 1);
    const uint64_t special[] = {0, 1, 2, infinity - 1, infinity, infinity + 1, sign - 1, infinity / 2};
    const uint64_t bits = below(2) ? test::generator() & (2 * sign - 1) : special[below(std::size(special))];
    return from_bits<T>(bits ^ (below(2) ? sign : 0));
}

template <class T>
void check_packing(const Kernel& kernel, DType dtype, uint64_t infinity) {
    for (int64_t k = 0; k <= 300; ++k) {
        for (const double threshold : {0.0, 1.0, 0.099609375, std::numeric_limits<double>::infinity()}) {
            Buffer<T> x(Use::Input, k, below(4));
            for (int64_t i = 0; i < k; ++i) x[i] = random_value<T>(infinity);
            const bool strict = below(2), ranged = below(4) > 0;
            Buffer<uint32_t> words[2] = {{Use::Output, words_for(k)}, {Use::Output, words_for(k)}};
            Buffer<uint32_t> in_range[2] = {{Use::Output, words_for(k)}, {Use::Output, words_for(k)}};
            const Kernel* kernels[2] = {&kScalarKernel, &kernel};
            for (int i = 0; i < 2; ++i) {
                kernels[i]->pack_row[static_cast<int>(dtype)](x.data(), k, strict, threshold, words[i].data(),
                                                              ranged ? in_range[i].data() : nullptr);
            }
            const std::string what = describe(kernel, "pack", static_cast<int>(dtype), k, strict, threshold);
            words[1].check_guards(what);
            in_range[1].check_guards(what);
            expect(std::memcmp(words[0].data(), words[1].data(), words[0].bytes()) == 0, what);
            expect(std::memcmp(in_range[0].data(), in_range[1].data(), in_range[0].bytes()) == 0, what + " in range");
        }
    }
}

// Returns a random value around the limits of the levels, or one of those above.
template <class T>
T random_level_value(uint64_t infinity) {
    if (below(4) == 0) return random_value<T>(infinity);
    const double value = static_cast<double>(below(1001) - 100) / 800;
    if constexpr (sizeof(T) == 2) {
        T half;
        narrow(static_cast<float>(value), &half);
        return half;
    } else {
        return static_cast<T>(value);
    }
}

template <class T>
void check_levels(const Kernel& kernel, DType dtype, uint64_t infinity) {
    for (int64_t k = 0; k <= 300; ++k) {
        for (int bits = 1; bits <= kMostLevelBits; ++bits) {
            Buffer<T> x(Use::Input, k, below(4));
            for (int64_t i = 0; i < k; ++i) x[i] = random_level_value<T>(infinity);
            const int64_t stride = words_for(k) + below(3), words = (bits - 1) * stride + words_for(k);
            Buffer<uint32_t> planes[2] = {{Use::Output, words}, {Use::Output, words}};
            for (Buffer<uint32_t>& each : planes) std::fill_n(each.data(), words, 0);
            const Kernel* kernels[2] = {&kScalarKernel, &kernel};
            bool nan[2];
            for (int i = 0; i < 2; ++i) {
                nan[i] = kernels[i]->pack_levels[static_cast<int>(dtype)](x.data(), k, bits, planes[i].data(), stride);
            }
            const std::string what = describe(kernel, "levels", static_cast<int>(dtype), k, bits);
            planes[1].check_guards(what);
            expect(std::memcmp(planes[0].data(), planes[1].data(), planes[0].bytes()) == 0, what);
            expect(nan[0] == nan[1], what + " NaN");
        }
    }
}

// ---- levels as bytes ------------------------------------------------------------------------------

struct LevelCase {
    int64_t m, n, k;
    int bits;
    DType dtype;
    bool scale, bias;
};

void check_level_product(const Kernel& kernel, const LevelCase& at) {
    const int64_t m = at.m, n = at.n, k = at.k;
    const int bits = at.bits;
    const DType dtype = at.dtype;
    const LevelGemm& gemm = *kernel.level_gemm;
    const int64_t width = words_for(k), padded = ceil_div(m, gemm.row_group) * gemm.row_group;
    const int64_t factor_bytes = dtype == DType::float64 ? 8 : 4;
    Buffer<uint32_t> words(Use::Input, n * width);
    fill(words, n * width);  // sets bits past k, too
    Buffer<uint8_t> panels(Use::Output, prepared_bytes(kernel.layout, n, k) - kPanelsOffset, 0, 64);
    kernel.prepare(words.data(), n, k, {0, ceil_div(n, kernel.layout.panel)}, panels.data());
    Buffer<uint8_t> bias(Use::Input, n * factor_bytes), scale(Use::Input, n * factor_bytes);
    fill_factors(bias, n, dtype);
    fill_factors(scale, n, dtype);

    // Some rows have the highest level everywhere, and the others random ones.
    Buffer<uint8_t> bytes(Use::Output, padded * gemm.row_bytes(k), 0, 64), nans(Use::Input, m);
    Buffer<int32_t> sums(Use::Input, m);
    std::vector<std::vector<int>> levels(static_cast<size_t>(m));
    for (int64_t i = 0; i < padded; ++i) {
        const int64_t stride = width + below(3);
        Buffer<uint32_t> planes(Use::Input, (bits - 1) * stride + width);
        std::fill_n(planes.data(), (bits - 1) * stride + width, 0);
        const bool highest = below(5) == 0;
        int32_t sum = 0;
        for (int64_t j = 0; i < m && j < k; ++j) {
            const int level = highest ? steps_of(bits) : static_cast<int>(below(steps_of(bits) + 1));
            levels[static_cast<size_t>(i)].push_back(level);
            sum += level;
            for (int p = 0; p < bits; ++p) {
                planes[p * stride + j / kWordBits] |= static_cast<uint32_t>(level >> p & 1) << j % kWordBits;
            }
        }
        const int32_t got = gemm.write_row(planes.data(), stride, k, bits, i, bytes.data());
        expect(got == sum, describe(kernel, "sum of levels", m, k, bits, i));
        if (i >= m) continue;
        sums[i] = sum;
        nans[i] = below(8) == 0;
    }
    bytes.check_guards(describe(kernel, "levels as bytes", m, k, bits));

    const int64_t y_bytes = m * n * element_size(dtype);
    Buffer<uint8_t> expected(Use::Output, y_bytes), got(Use::Output, y_bytes);
    const auto output = [&](Buffer<uint8_t>& y) {
        return Output{y.data(),
                      dtype,
                      n,
                      static_cast<int32_t>(k),
                      at.bias ? bias.data() : nullptr,
                      at.scale ? scale.data() : nullptr};
    };
    const Output plain = output(expected);
    for (int64_t i = 0; i < m; ++i) {
        write_levels({plain, i, 0, n, bits}, nans[i], [&](int64_t column) {
            int32_t sum = 0;
            for (int64_t j = 0; j < k; ++j) {
                const int sign = words[column * width + j / kWordBits] >> j % kWordBits & 1 ? 1 : -1;
                sum += sign * levels[static_cast<size_t>(i)][static_cast<size_t>(j)];
            }
            return sum;
        });
    }

    const bool whole = below(2);
    const int64_t rows = whole ? gemm.row_tile : gemm.row_group * (1 + below(3));
    const int64_t columns = whole ? n : gemm.column_tile * (1 + below(2));
    Buffer<uint8_t> workspace = make_workspace(gemm.workspace_bytes(std::min(rows, m), k));
    for (int64_t row = 0; row < m; row += rows) {
        for (int64_t column = 0; column < n; column += columns) {
            gemm.multiply({bytes.data(), sums.data(), nans.data(), bits}, panels.data(), output(got),
                          {row, std::min(row + rows, m)}, {column, std::min(column + columns, n)}, workspace.data());
        }
    }
    const std::string what =
        describe(kernel, "levels as bytes", m, n, k, bits, static_cast<int>(dtype), at.scale, at.bias, rows, columns);
    workspace.check_guards(what);
    got.check_guards(what);
    expect(std::memcmp(expected.data(), got.data(), got.bytes()) == 0, what);
#if defined(BITORCH_QLINEAR_HAS_AMX)
    expect(!tiles_in_use(), what + ": the tile registers were not released");
#endif
}

// The sizes lie around those of tiles, of pairs of tiles, and of the steps that are unpacked ahead.
void check_level_products(const Kernel& kernel) {
    if (!kernel.level_gemm) return;
    if (!kernel.level_gemm->takes(64, 64, 64, 2)) {
        std::printf("%s: levels as bytes are not tested: the system does not grant tile registers\n", kernel.name);
        return;
    }
    constexpr DType kTypes[] = {DType::float32, DType::float32, DType::float64, DType::float16, DType::bfloat16};
    const auto check_sizes = [&](int64_t m, int64_t n, int64_t k) {
        check_level_product(kernel, {m, n, k, 1 + static_cast<int>(below(2)), kTypes[below(std::size(kTypes))],
                                     below(2) == 1, below(2) == 1});
    };
    for (int64_t m = 1; m <= 70; ++m) check_sizes(m, 1 + below(140), 1 + below(300));
    for (int64_t n = 1; n <= 140; ++n) check_sizes(1 + below(50), n, 1 + below(200));
    for (int64_t k = 1; k <= 400; ++k) check_sizes(1 + below(40), 1 + below(70), k);
    for (int64_t m : around({256, 300})) check_sizes(m, 1 + below(140), 1 + below(100));
    for (int64_t k : around({1024, 2048, 4096})) check_sizes(1 + below(40), 1 + below(70), k);
}

template <class T>
void check_packing_by_limits(const Kernel& kernel, DType dtype, uint64_t infinity) {
    for (int64_t k = 0; k <= 300; ++k) {
        const int64_t rows = below(10), stride = k + below(4), values = rows > 0 ? (rows - 1) * stride + k : 0;
        Buffer<T> x(Use::Input, values, below(4)), limits(Use::Input, k, below(4));
        for (int64_t i = 0; i < values; ++i) x[i] = random_value<T>(infinity);
        for (int64_t i = 0; i < k; ++i) limits[i] = random_value<T>(infinity);
        // Some limits lie at a value or next to it, and some rows have no NaN, which the kernels pack in another way.
        for (int64_t i = 0; i < k && rows > 0; i += 1 + below(3)) {
            limits[i] = from_bits<T>(bits_of(x[i]) + static_cast<uint64_t>(below(3) - 1));
        }
        if (below(2)) {
            for (int64_t i = 0; i < values; ++i) {
                const uint64_t behind_sign = bits_of(x[i]) & ((uint64_t{1} << (8 * sizeof(T) - 1)) - 1);
                if (behind_sign > infinity) x[i] = from_bits<T>(infinity);
            }
        }
        Buffer<uint32_t> flips(Use::Input, words_for(k));
        fill(flips, words_for(k));
        const bool strict = below(2), flipped = below(4) > 0;
        Buffer<uint32_t> expected(Use::Output, rows * words_for(k)), got(Use::Output, rows * words_for(k));
        const auto job = [&](Buffer<uint32_t>& words) {
            return LimitedRows{x.data(),    rows, k, stride, strict, limits.data(), flipped ? flips.data() : nullptr,
                               words.data()};
        };
        kScalarKernel.pack_limited_rows[static_cast<int>(dtype)](job(expected));
        kernel.pack_limited_rows[static_cast<int>(dtype)](job(got));
        const std::string what = describe(kernel, "pack by limits", static_cast<int>(dtype), rows, k, strict, flipped);
        got.check_guards(what);
        expect(std::memcmp(expected.data(), got.data(), got.bytes()) == 0, what);
    }
}

void check_unpacking(const Kernel& kernel) {
    for (int dtype = 0; dtype <= static_cast<int>(DType::boolean); ++dtype) {
        for (int64_t k = 0; k <= 100; ++k) {
            const int64_t bytes = k * element_size(static_cast<DType>(dtype));
            Buffer<uint32_t> words(Use::Input, words_for(k));
            fill(words, words_for(k));
            Buffer<uint8_t> expected(Use::Output, bytes), got(Use::Output, bytes);
            kScalarKernel.unpack_row(words.data(), k, expected.data(), static_cast<DType>(dtype));
            kernel.unpack_row(words.data(), k, got.data(), static_cast<DType>(dtype));
            const std::string what = describe(kernel, "unpack", dtype, k);
            got.check_guards(what);
            expect(std::memcmp(expected.data(), got.data(), got.bytes()) == 0, what);
        }
    }
}

// ---- real values by signs ------------------------------------------------------------------------

void multiply_by_signs(const SignGemm& kernel, const SignProduct& product) {
    const int64_t rows = row_tile(product.dtype);
    Buffer<uint32_t> codes(Use::Output, count_passes(product) * product.n);
    kernel.make_codes(product, {0, product.n}, codes.data());
    codes.check_guards("make_codes");
    Buffer<uint8_t> workspace = make_workspace(kernel.workspace_bytes(product, product.n));
    for (int64_t row = 0; row < product.m; row += rows) {
        kernel.multiply(product, codes.data(), {row, std::min(row + rows, product.m)}, {0, product.n},
                        workspace.data());
    }
    workspace.check_guards("workspace of multiply_signs");
}

// Multiplies with the function for few rows, in tiles of at most so many rows and columns.
void multiply_few_by_signs(const SignGemm& kernel, const SignProduct& product, int64_t rows, int64_t columns) {
    Buffer<uint8_t> workspace = make_workspace(kernel.few_workspace_bytes(product, rows, columns));
    for (int64_t row = 0; row < product.m; row += rows) {
        for (int64_t column = 0; column < product.n; column += columns) {
            kernel.multiply_few(product, {row, std::min(row + rows, product.m)},
                                {column, std::min(column + columns, product.n)}, workspace.data());
        }
    }
    workspace.check_guards("workspace of few rows");
}

template <class T>
void check_reals(const Kernel& kernel, DType dtype) {
    for (int i = 0; i < 60; ++i) {
        const int64_t m = 1 + below(40), n = 1 + below(150), k = 1 + below(i % 10 ? 200 : 4000);
        const bool by_columns = below(2), transposed = below(2);
        // The lines of x, which are its rows or its columns, have gaps between them or none.
        const int64_t lines = by_columns ? k : m, length = by_columns ? m : k, stride = length + below(3);
        const int64_t values = (lines - 1) * stride + length;
        Buffer<T> x(Use::Input, values);
        for (int64_t j = 0; j < values; ++j) {
            // The values are finite and of similar magnitude; those of half types are made from bits.
            if constexpr (sizeof(T) == 2) {
                x[j] = {
                    static_cast<uint16_t>((dtype == DType::float16 ? 0x3800 : 0x3F00) | (test::generator() & 0x83FF))};
            } else {
                x[j] = static_cast<T>(below(1 << 20) - (1 << 19)) / 4096;
            }
        }
        const int64_t sign_words = transposed ? n * words_for(k) : k * words_for(n);
        Buffer<uint32_t> words(Use::Input, sign_words);
        fill(words, sign_words);
        Buffer<T> expected(Use::Output, m * n), got(Use::Output, m * n);
        const auto product = [&](Buffer<T>& y) {
            return SignProduct{x.data(),     dtype,      m, k,       by_columns ? 1 : stride, by_columns ? stride : 1,
                               words.data(), transposed, n, y.data()};
        };
        multiply_by_signs(*kScalarKernel.sign_gemm, product(expected));
        multiply_by_signs(*kernel.sign_gemm, product(got));
        const std::string what = describe(kernel, "reals", m, n, k, by_columns, transposed, static_cast<int>(dtype));
        got.check_guards(what);
        expect(std::memcmp(expected.data(), got.data(), got.bytes()) == 0, what);
        if (!kernel.sign_gemm->multiply_few) continue;
        const int64_t rows = 1 + below(row_tile(dtype)), columns = kCodeColumns * (1 + below(5));
        Buffer<T> few(Use::Output, m * n);
        multiply_few_by_signs(*kernel.sign_gemm, product(few), rows, columns);
        few.check_guards(what);
        expect(std::memcmp(expected.data(), few.data(), few.bytes()) == 0,
               what + describe(kernel, ", few rows", rows, columns));
    }
}

void check(const Kernel& kernel) {
    check_products(kernel);
    check_tile_products(kernel);
    check_packing<double>(kernel, DType::float64, 0x7FF0000000000000);
    check_packing<float>(kernel, DType::float32, 0x7F800000);
    check_packing<Half>(kernel, DType::float16, 0x7C00);
    check_packing<BFloat16>(kernel, DType::bfloat16, 0x7F80);
    check_levels<double>(kernel, DType::float64, 0x7FF0000000000000);
    check_levels<float>(kernel, DType::float32, 0x7F800000);
    check_levels<Half>(kernel, DType::float16, 0x7C00);
    check_levels<BFloat16>(kernel, DType::bfloat16, 0x7F80);
    check_level_products(kernel);
    check_packing_by_limits<double>(kernel, DType::float64, 0x7FF0000000000000);
    check_packing_by_limits<float>(kernel, DType::float32, 0x7F800000);
    check_packing_by_limits<Half>(kernel, DType::float16, 0x7C00);
    check_packing_by_limits<BFloat16>(kernel, DType::bfloat16, 0x7F80);
    check_hashes(kernel);
    check_fingerprints(kernel);
    check_unpacking(kernel);
    check_reals<double>(kernel, DType::float64);
    check_reals<float>(kernel, DType::float32);
    check_reals<Half>(kernel, DType::float16);
    check_reals<BFloat16>(kernel, DType::bfloat16);
    std::printf("%s: equals the scalar kernel\n", kernel.name);
}

}  // namespace

// The arguments name kernels that must be available. All available kernels are checked.
int main(int count, char** names) {
#if defined(BITORCH_QLINEAR_SIMDE)
    // With SIMDe, instructions are functions, so this kernel runs on every processor.
    check(kAvx512Kernel);
    return 0;
#endif
    const std::string available = available_kernels() + ",";
    for (int i = 1; i < count; ++i) {
        expect(available.find(std::string(names[i]) + ",") != std::string::npos,
               std::string("no kernel ") + names[i] + " here: " + available);
    }
    for (size_t begin = 0; begin < available.size(); begin = available.find(',', begin) + 2) {
        force_kernel(available.substr(begin, available.find(',', begin) - begin));
        check(active_kernel());
    }
}
