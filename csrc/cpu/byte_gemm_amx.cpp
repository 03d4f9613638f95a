// Rows of bytes by packed weights, in the processor's tile registers (AMX): levels (level_gemm_amx.cpp) and signs
// (gemm_amx.cpp). Their slow twins are the planes' product (level_product.h) and gemm_scalar.cpp.
//
// A tile register holds 16 rows of 64 bytes. TDPBSSD multiplies a tile of 16 rows of x by 64 values with a tile of
// weights, 64 values by 16 outputs, and adds the products to a tile of 16 x 16 int32: 16,384 multiply-adds in 16
// cycles. Four such tiles of sums share two tiles of x and two of weights, so that every tile that is loaded serves
// twice.
//
// The weights come in the form of gemm_avx512.cpp. A bit becomes a byte b of 0 or 1 instead of a weight w of -1 or 1,
// because that takes one operation less, and
//
//     sum x w = 2 sum x b - sum x
//
// A tile of weights has four values of each output side by side. With the mask 2^r, VPANDD takes from the words of 16
// outputs the bits r, 8 + r, 16 + r and 24 + r, as bytes of 0 or 2^r. So no bit is moved except by one shift of four
// places. The bytes of x have these values' order and the other part of the factor 8 (ByteOrder).
//
// Blocks. For 32 outputs, the weights of up to 1024 values of K are unpacked into 32 KiB, which stay in L1, and are
// multiplied with a block of rows. x comes from L2 by TILELOADDT1, which leaves L1 to the weights. Sums wait in memory
// between parts of K. The first 32 rows unpack the weights two steps of 64 values before they are multiplied. If a
// block has no more than 32 rows, all of K is one part whose weights pass through 8 KiB. The outputs of a tile are
// written while the next one is multiplied.
//
// Measured on an Intel Xeon (family 6, model 167), one thread. While it multiplies tiles, this processor runs at 2.9
// GHz; otherwise it runs at 3.7 to 3.9 GHz. A loop of multiplying instructions alone takes 22.2 ns for a step of four
// tiles, which is 64 cycles at 2.9 GHz. With all tiles in L1 and one store of the sums for 1024 values it takes 1.08
// times as long, and with x from L2 1.17 times. The product of signs of 256 rows by 1024 x 1024 weights reaches 77 % of
// the loop's 1024 multiply-adds a cycle if its outputs are bits, and 62 % if they are float32. docs/history.md has what
// was tried and rejected.
#include "target.h"

#if defined(BITORCH_QLINEAR_HAS_AMX)
#include <algorithm>
#include <cstdint>

#include "intrinsics_avx512.h"

// Our own headers are compiled for AVX-512 here, too, and everything that they define has internal linkage.
BITORCH_QLINEAR_AMX_BEGIN
#include "byte_gemm_amx.h"
#include "level_epilogue.h"

namespace bitorch_qlinear {
namespace {

using Vector = __m512i;

constexpr int64_t kPanel = 64;    // outputs of a panel of the prepared form
constexpr int64_t kColumns = 32;  // outputs of two tiles
constexpr int64_t kRowPair = 32;  // rows of two tiles
constexpr int64_t kStepBytes = 2 * kTileBytes;
constexpr int64_t kPartSteps = 16;  // most steps of K whose weights are held as bytes: 32 KiB
constexpr int64_t kRingSteps = 4;   // the same if they are used once
constexpr int64_t kAhead = 2;       // how many steps weights are unpacked before they are multiplied
static_assert(kRingSteps > kAhead && kPartSteps > kAhead);
constexpr int64_t kWeightBytes = kPartSteps * kStepBytes;
constexpr int64_t kLineBytes = kColumns * sizeof(int32_t),
                  kSumBytes = kRowPair * kLineBytes;  // of a row of two tiles, and of 32

// The rows of a block have at most so many bytes, which stay in L2, unless 32 rows have more.
constexpr int64_t kBlockBytes = int64_t{512} << 10, kMostBlockRows = 128;
// Sums of so many values are written as numbers in blocks of more than 32 rows (byte_block_rows).
constexpr int64_t kManyValues = 4096;

int64_t steps_for(int64_t k) { return ceil_div(k, kStep); }

// ---- tile registers -------------------------------------------------------------------------------

// gcc's intrinsics for loading do not tell the compiler which memory they read. This keeps stores on their side of it.
inline void keep_order() { asm volatile("" ::: "memory"); }
inline void keep_order_of(const void* memory) { asm volatile("" ::"r"(memory) : "memory"); }

// The shapes of the tile registers, which belong to a thread. Other libraries use them, too, so they are set in each
// call, and are released at its end: the processor then need not save them.
struct TileRegisters {
    TileRegisters() {
        struct {
            uint8_t palette = 1, reserved[15] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shapes;
        static_assert(sizeof shapes == 64);
        keep_order_of(&shapes);
        _tile_loadconfig(&shapes);
    }
    ~TileRegisters() { _tile_release(); }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;
};

// ---- weights --------------------------------------------------------------------------------------

// Writes half a step of two tiles from a word of each of 32 outputs, as ByteOrder describes.
inline void unpack_words(const uint32_t* words, uint8_t* to) {
    BITORCH_QLINEAR_UNROLL
    for (int tile = 0; tile < 2; ++tile) {
        const Vector low = _mm512_loadu_si512(words + tile * 16), high = _mm512_srli_epi32(low, 4);
        BITORCH_QLINEAR_UNROLL
        for (int row = 0; row < 8; ++row) {
            const Vector mask = _mm512_set1_epi8(static_cast<char>(1 << row % 4));
            _mm512_store_si512(to + tile * kTileBytes + row * kStep, _mm512_and_si512(row < 4 ? low : high, mask));
        }
    }
}

// ---- outputs --------------------------------------------------------------------------------------

// What the next tile's multiplication does with the sums of this one.
enum class Form { none, sign_floats, level_floats, bits, any };

// The sums of a tile of up to 32 rows by 32 outputs: 8 times the products of values by bits, where a sign's bit is 0
// for -1.
struct Sums {
    const LevelBytes* x;
    const Output* y;
    const int32_t* values = nullptr;  // [32][32]
    int64_t row = 0, column = 0, rows = 0, columns = 0;

    Form form() const {
        if (rows == 0) return Form::none;
        if (y->limits) return Form::bits;
        if (y->dtype != DType::float32 || columns < kColumns) return Form::any;
        return x->nans || x->bits > 1 ? Form::level_floats : Form::sign_floats;
    }
};

// From the sum of a row's values by bits b to their product by weights w: sum x w = 2 sum x b - sum x.
inline int32_t product_of(int32_t sum, int32_t total) { return (sum >> 2) - total; }
inline Vector product_of(const int32_t* sums, int32_t total) {
    return _mm512_sub_epi32(_mm512_srai_epi32(_mm512_load_si512(sums), 2), _mm512_set1_epi32(total));
}

// Writes outputs row by row. What all rows share is in members, which the compiler keeps in registers: for this no
// function that is not inlined may get the writer's address.
template <Form kForm>
class Writer;

template <>
class Writer<Form::none> {
  public:
    explicit Writer(const Sums&) {}
    void write(int64_t, int64_t) const {}
};

template <>
class Writer<Form::any> {
  public:
    explicit Writer(const Sums& sums) : sums_(sums) {}
    // Writes the rows [begin, end), as far as they exist.
    void write(int64_t begin, int64_t end) const {
        for (int64_t i = begin; i < std::min(end, sums_.rows); ++i) write_row(sums_, i);
    }

  private:
    __attribute__((noinline)) static void write_row(const Sums& sums, int64_t i) {
        const LevelBytes& x = *sums.x;
        const Output& y = *sums.y;
        const int32_t* const line = sums.values + i * kColumns;
        const int64_t row = sums.row + i;
        const int32_t total = x.sums[row];
        if (y.dtype == DType::int32) {
            int32_t* out = static_cast<int32_t*>(y.data) + row * y.n + sums.column;
            for (int64_t j = 0; j < sums.columns; ++j) out[j] = product_of(line[j], total);
            return;
        }
        // A sign is a level with the step 1.
        write_levels({y, row, sums.column, sums.columns, x.bits}, x.nans && x.nans[row],
                     [=](int64_t j) { return product_of(line[j], total); });
    }
    const Sums& sums_;
};

// Writes 32 float32 outputs a row, with the bits of write_levels: factors of 1 and terms of -0.0 change nothing.
template <bool kLevels>
class FloatWriter {
  public:
    explicit FloatWriter(const Sums& sums)
        : values_(sums.values),
          totals_(sums.x->sums + sums.row),
          nans_(sums.x->nans ? sums.x->nans + sums.row : nullptr),
          rows_(sums.rows),
          width_(sums.y->n),
          out_(static_cast<float*>(sums.y->data) + sums.row * sums.y->n + sums.column),
          step_(_mm512_set1_ps(1.0f / static_cast<float>(steps_of(sums.x->bits)))) {
        const float* scale = static_cast<const float*>(sums.y->scale);
        const float* bias = static_cast<const float*>(sums.y->bias);
        BITORCH_QLINEAR_UNROLL
        for (int v = 0; v < 2; ++v) {
            scale_[v] = scale ? _mm512_loadu_ps(scale + sums.column + 16 * v) : _mm512_set1_ps(1.0f);
            bias_[v] = bias ? _mm512_loadu_ps(bias + sums.column + 16 * v) : _mm512_set1_ps(-0.0f);
        }
    }
    void write(int64_t begin, int64_t end) const {
        end = std::min(end, rows_);
        for (int64_t i = begin; i < end; ++i) {
            const int32_t total = totals_[i];
            BITORCH_QLINEAR_UNROLL
            for (int v = 0; v < 2; ++v) {
                __m512 value = _mm512_cvtepi32_ps(product_of(values_ + i * kColumns + 16 * v, total));
                if (kLevels) value = _mm512_mul_ps(value, step_);
                value = _mm512_add_ps(_mm512_mul_ps(value, scale_[v]), bias_[v]);
                if (kLevels && nans_ && nans_[i]) value = _mm512_set1_ps(__builtin_nanf(""));
                _mm512_storeu_ps(out_ + i * width_ + 16 * v, value);
            }
        }
    }

  private:
    const int32_t *values_, *totals_;
    const uint8_t* nans_;
    int64_t rows_, width_;
    float* out_;
    __m512 step_, scale_[2], bias_[2];
};

template <>
class Writer<Form::sign_floats> : public FloatWriter<false> {
    using FloatWriter::FloatWriter;
};
template <>
class Writer<Form::level_floats> : public FloatWriter<true> {
    using FloatWriter::FloatWriter;
};

// Writes a word of bits a row. A popcount is (K - product) / 2.
template <>
class Writer<Form::bits> {
  public:
    explicit Writer(const Sums& sums)
        : values_(sums.values),
          totals_(sums.x->sums + sums.row),
          rows_(sums.rows),
          width_(words_for(sums.y->n)),
          out_(static_cast<uint32_t*>(sums.y->data) + sums.row * width_ + sums.column / kWordBits),
          inside_(word_mask(0, sums.columns)),
          flips_(sums.y->flips ? sums.y->flips[sums.column / kWordBits] & inside_ : 0),
          k_(_mm512_set1_epi32(sums.y->k)) {
        const int32_t* const limits = sums.y->limits + sums.column;
        low_ = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(inside_), limits);
        high_ = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(inside_ >> 16), limits + 16);
    }
    void write(int64_t begin, int64_t end) const {
        end = std::min(end, rows_);
        for (int64_t i = begin; i < end; ++i) {
            const __mmask16 low = _mm512_cmple_epi32_mask(counts(i, 0), low_);
            const __mmask16 high = _mm512_cmple_epi32_mask(counts(i, 16), high_);
            out_[i * width_] = (_mm512_kunpackw(high, low) & inside_) ^ flips_;
        }
    }

  private:
    Vector counts(int64_t i, int64_t v) const {
        return _mm512_srli_epi32(_mm512_sub_epi32(k_, product_of(values_ + i * kColumns + v, totals_[i])), 1);
    }
    const int32_t *values_, *totals_;
    int64_t rows_, width_;
    uint32_t* out_;
    uint32_t inside_, flips_;
    Vector k_, low_, high_;
};

// ---- product --------------------------------------------------------------------------------------

// A part of K for 16 or 32 rows by 32 outputs.
struct Part {
    const uint8_t* bytes;  // of the first 16 rows
    int64_t group_bytes;   // from them to the next 16 rows
    int64_t steps;
    uint8_t* weights;
    int64_t ring;  // a power of 2: step s has the place s % ring
    int32_t* sums;
    bool first, two_groups;
    // If unpack, the weights are unpacked first. The 32 outputs' words for each word of K lie kPanel words apart.
    bool unpack;
    const uint32_t* panel;
    int64_t words;
};

// Multiplies a part, adds it to the sums or, if it is the first one, writes them, and meanwhile writes the outputs of
// the tile before. It copies neither struct, because the processor would have to wait until the stores that have just
// filled them, and the tiles' before these, are in the cache.
template <Form kForm>
__attribute__((noinline)) void multiply_part(const Part& part, const Sums& before) {
    const Writer<kForm> writer(before);
    const int64_t steps = part.steps, group_bytes = part.group_bytes, words = part.words, ring = part.ring - 1;
    const int64_t unpacked = part.unpack ? steps : 0, rows_per_step = ceil_div(kRowPair, steps);
    const bool two_groups = part.two_groups;
    const uint32_t* const panel = part.panel;
    uint8_t* const weights = part.weights;
    int32_t* const sums = part.sums;
    const auto unpack = [=](int64_t step) __attribute__((always_inline)) {
        if (step >= unpacked) return;
        const uint32_t* const from = panel + 2 * step * kPanel;
        uint8_t* const to = weights + (step & ring) * kStepBytes;
        unpack_words(from, to);
        // Without a second word the other half keeps its bytes, which are multiplied by bytes 0 of x.
        if (2 * step + 1 < words) unpack_words(from + kPanel, to + kTileBytes / 2);
    };
    for (int64_t step = 0; step < kAhead; ++step) unpack(step);
    keep_order();
    if (part.first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_stream_loadd(0, sums, kLineBytes);
        _tile_stream_loadd(1, sums + 16, kLineBytes);
        _tile_stream_loadd(2, sums + kTileRows * kColumns, kLineBytes);
        _tile_stream_loadd(3, sums + kTileRows * kColumns + 16, kLineBytes);
    }
    const uint8_t* bytes = part.bytes;
    for (int64_t step = 0; step < steps; ++step, bytes += kTileBytes) {
        unpack(step + kAhead);
        keep_order();
        const uint8_t* const tile = weights + (step & ring) * kStepBytes;
        _tile_stream_loadd(4, bytes, kStep);
        _tile_loadd(6, tile, kStep);
        _tile_loadd(7, tile + kTileBytes, kStep);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        if (two_groups) {
            _tile_stream_loadd(5, bytes + group_bytes, kStep);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
        keep_order();
        writer.write(step * rows_per_step, (step + 1) * rows_per_step);
    }
    _tile_stored(0, sums, kLineBytes);
    _tile_stored(1, sums + 16, kLineBytes);
    if (two_groups) {
        _tile_stored(2, sums + kTileRows * kColumns, kLineBytes);
        _tile_stored(3, sums + kTileRows * kColumns + 16, kLineBytes);
    }
    keep_order();
}

void multiply_part(Form form, const Part& part, const Sums& before) {
    switch (form) {
        case Form::none: return multiply_part<Form::none>(part, before);
        case Form::sign_floats: return multiply_part<Form::sign_floats>(part, before);
        case Form::level_floats: return multiply_part<Form::level_floats>(part, before);
        case Form::bits: return multiply_part<Form::bits>(part, before);
        default: return multiply_part<Form::any>(part, before);
    }
}

void write_all(const Sums& sums) {
    switch (sums.form()) {
        case Form::none: return;
        case Form::sign_floats: return Writer<Form::sign_floats>(sums).write(0, kRowPair);
        case Form::level_floats: return Writer<Form::level_floats>(sums).write(0, kRowPair);
        case Form::bits: return Writer<Form::bits>(sums).write(0, kRowPair);
        default: return Writer<Form::any>(sums).write(0, kRowPair);
    }
}

// Multiplies a block of rows.
void multiply_block(const LevelBytes& x, const uint8_t* panels, const Output& y, Range rows, Range columns,
                    uint8_t* workspace) {
    const int64_t words = words_for(y.k), steps = steps_for(y.k), group_bytes = steps * kTileBytes;
    const int64_t pairs = ceil_div(size(rows), kRowPair);
    const int64_t parts = pairs > 1 ? ceil_div(steps, kPartSteps) : 1;
    int32_t* const sums = reinterpret_cast<int32_t*>(workspace + kWeightBytes);
    Sums before{&x, &y};
    for (int64_t column = columns.begin; column < columns.end; column += kColumns) {
        const uint32_t* const panel =
            reinterpret_cast<const uint32_t*>(panels) + column / kPanel * words * kPanel + column % kPanel;
        for (int64_t p = 0; p < parts; ++p) {
            const int64_t begin = steps * p / parts, end = steps * (p + 1) / parts;
            for (int64_t pair = 0; pair < pairs; ++pair) {
                const int64_t row = rows.begin + pair * kRowPair, count = std::min(rows.end - row, kRowPair);
                // One place is enough if K is one part, because outputs are written before the next tile's sums are.
                const int64_t slot = parts > 1 ? pair : 0;
                const Part part{.bytes = x.bytes + row / kTileRows * group_bytes + begin * kTileBytes,
                                .group_bytes = group_bytes,
                                .steps = end - begin,
                                .weights = workspace,
                                .ring = pairs > 1 ? kPartSteps : kRingSteps,
                                .sums = sums + slot * kRowPair * kColumns,
                                .first = p == 0,
                                .two_groups = count > kTileRows,
                                .unpack = pair == 0,
                                .panel = panel + 2 * begin * kPanel,
                                .words = words - 2 * begin};
                multiply_part(before.form(), part, before);
                before.rows = 0;
                if (p + 1 < parts) continue;
                before.values = part.sums;
                before.row = row;
                before.column = column;
                before.rows = count;
                before.columns = std::min(columns.end - column, kColumns);
            }
        }
    }
    write_all(before);
}

void multiply(const LevelBytes& x, const uint8_t* panels, const Output& y, Range rows, Range columns,
              uint8_t* workspace) {
    const TileRegisters registers;
    const int64_t block = byte_block_rows(y.k, y.limits);
    for (int64_t row = rows.begin; row < rows.end; row += block) {
        multiply_block(x, panels, y, {row, std::min(row + block, rows.end)}, columns, workspace);
    }
}

}  // namespace
}  // namespace bitorch_qlinear
BITORCH_QLINEAR_TARGET_END

namespace bitorch_qlinear {

// Blocks of 32 rows write y in runs that the processor's prefetching follows. More rows unpack the weights less often,
// which is worth more if y is small: bits, or numbers that are sums of many values.
int64_t byte_block_rows(int64_t k, bool bits) {
    if (!bits && k < kManyValues) return kRowPair;
    return std::clamp(kBlockBytes / byte_row_bytes(k) / kRowPair * kRowPair, kRowPair, kMostBlockRows);
}

int64_t byte_workspace_bytes(int64_t k) {
    return kWeightBytes + byte_block_rows(k, true) / kRowPair * kSumBytes;  // no fewer rows than for numbers
}

void multiply_bytes(const LevelBytes& x, const uint8_t* panels, const Output& y, Range rows, Range columns,
                    uint8_t* workspace) {
    multiply(x, panels, y, rows, columns, workspace);
}

}  // namespace bitorch_qlinear
#endif
