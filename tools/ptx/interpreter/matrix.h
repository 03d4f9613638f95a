// PTX ISA, section "Warp Level Matrix Multiply-Accumulate Instructions": ldmatrix, stmatrix, mma.sync.
// Lane l is thread l % 4 of group l / 4 in the tables of fragments.
#pragma once
#include "async_copy.h"

namespace ptx {

inline void aligned_collective(Decoder& d) {
    if (!d.take("sync") || !d.take("aligned")) d.error("lacks .sync.aligned");
    d.i.flow = Flow::kCollective;
    d.i.aligned = true;
}

// "ldmatrix", "stmatrix": 8 x 8 matrices of 16-bit elements. Lane 8j + r holds the address of row r of matrix j; lane l
// gets elements 2(l % 4), 2(l % 4) + 1 of row l / 4, or of column l / 4 with .trans. i.a: matrices, i.b: .trans.
template <bool kStore>
void matrix_rows(Machine& m, Warp& w, const Instr& i, u32) {
    const u32 addressing = i.a == 4 ? kAll : (1u << (8 * i.a)) - 1;
    need(w, i.s[0], addressing);
    const u64* base = m.in(w, i.s[0]);
    u64 address[kLanes] = {};
    u8* rows[kLanes] = {};
    for_lanes(addressing, [&](int l) {
        address[l] = base[l] + static_cast<u64>(i.offset);
        // All lanes read all rows: whoever wrote them must be ordered before every lane.
        rows[l] = access(m, w, l, i.space, address[l], 16, {.write = kStore, .read = !kStore, .whole_warp = true}).data;
    });
    for (u32 j = 0; j < i.a; ++j) {
        for (int l = 0; l < kLanes; ++l) {
            for (int e = 0; e < 2; ++e) {
                const int row = i.b ? l % 4 * 2 + e : l / 4, column = i.b ? l / 4 : l % 4 * 2 + e;
                u8* element = rows[8 * j + static_cast<u32>(row)] + 2 * column;
                if constexpr (kStore) {
                    need(w, i.s[1 + j], kAll);
                    const u16 v = static_cast<u16>(m.in(w, i.s[1 + j])[l] >> (16 * e));
                    std::memcpy(element, &v, 2);
                } else {
                    u16 v;
                    std::memcpy(&v, element, 2);
                    u64& d = m.row(w, i.d[j])[l];
                    d = e ? d | u64{v} << 16 : v;
                }
            }
        }
        if (!kStore) w.initialised[i.d[j]] = kAll;
    }
    count_banks(m.counts[w.now], address, addressing, 16);
}
template <bool kStore>
void decode_matrix_rows(Decoder& d) {
    aligned_collective(d);
    if (!d.take("m8n8")) d.error("only .m8n8 is known");
    d.i.a = 1u << d.need_one({"x1", "x2", "x4"});
    d.i.b = d.take("trans");
    d.i.space = take_space(d);
    if (d.take_type() != Type::b16) d.unsupported_type();
    d.expect(2);
    d.address(kStore ? 0 : 1);
    if (d.vector_size(kStore ? 1 : 0) != static_cast<int>(d.i.a))
        d.error("the vector's size differs from the number of matrices");
    if (kStore) {
        d.sources(1, Type::b32);
    } else {
        d.destinations(0);
    }
    d.i.copies = true;  // checks its registers itself: not all lanes' addresses are used
    d.i.run = matrix_rows<kStore>;
}

// "mma.sync": D = A B + C. A lane holds 32-bit registers; where they lie in A (rows x 32-bit words of a row) and B:
//   A of register r: row group + 8 (r % 2) [m16; m8: row group], word thread + 4 (r / 2);
//   B of register r: column group, word thread + 4 r;
//   C, D of register r: row group + 8 (r / 2), column 2 thread + r % 2.
// This holds for .b1 (m8n8k128, m16n8k128, m16n8k256) and for 8-bit integers (m16n8k16, m16n8k32).
enum class Product : u32 { kXorPopc, kAndPopc, kBytes };
struct Shape {
    const char* name;
    int rows, a_registers, b_registers, c_registers;
    bool bits;
};
inline constexpr Shape kShapes[] = {
    {"m8n8k128", 8, 1, 1, 2, true},   {"m16n8k128", 16, 2, 1, 4, true}, {"m16n8k256", 16, 4, 2, 4, true},
    {"m16n8k16", 16, 2, 1, 4, false}, {"m16n8k32", 16, 4, 2, 4, false},
};
inline u32 multiply_word(Product product, u32 a, u32 b, bool a_signed, bool b_signed) {
    if (product == Product::kXorPopc) return static_cast<u32>(std::popcount(a ^ b));
    if (product == Product::kAndPopc) return static_cast<u32>(std::popcount(a & b));
    u32 sum = 0;
    for (int shift = 0; shift < 32; shift += 8) {
        const u8 x = static_cast<u8>(a >> shift), y = static_cast<u8>(b >> shift);
        sum += static_cast<u32>((a_signed ? s8(x) : s32{x}) * (b_signed ? s8(y) : s32{y}));
    }
    return sum;
}
inline void mma(Machine& m, Warp& w, const Instr& i, u32) {
    const Shape& shape = kShapes[i.a];
    const Product product = static_cast<Product>(i.b);
    const int words = 4 * shape.b_registers;
    u32 a[16][8], b[8][8], c[16][8];
    const int a_at = 0, b_at = a_at + shape.a_registers, c_at = b_at + shape.b_registers;
    const int halves = shape.rows / 8;
    for (int l = 0; l < kLanes; ++l) {
        const int group = l / 4, thread = l % 4;
        for (int r = 0; r < shape.a_registers; ++r)
            a[group + 8 * (r % halves)][thread + 4 * (r / halves)] = static_cast<u32>(m.in(w, i.s[a_at + r])[l]);
        for (int r = 0; r < shape.b_registers; ++r)
            b[group][thread + 4 * r] = static_cast<u32>(m.in(w, i.s[b_at + r])[l]);
        for (int r = 0; r < shape.c_registers; ++r)
            c[group + 8 * (r / 2)][2 * thread + r % 2] = static_cast<u32>(m.in(w, i.s[c_at + r])[l]);
    }
    for (int row = 0; row < shape.rows; ++row)
        for (int column = 0; column < 8; ++column)
            for (int word = 0; word < words; ++word)
                c[row][column] += multiply_word(product, a[row][word], b[column][word], i.is_signed, i.sat);
    for (int l = 0; l < kLanes; ++l)
        for (int r = 0; r < shape.c_registers; ++r) m.row(w, i.d[r])[l] = c[l / 4 + 8 * (r / 2)][2 * (l % 4) + r % 2];
}
inline void decode_mma(Decoder& d) {
    aligned_collective(d);
    if (!d.take("row") || !d.take("col")) d.error("lacks .row.col");
    size_t shape = 0;
    while (shape < std::size(kShapes) && !d.take(kShapes[shape].name)) ++shape;
    if (shape == std::size(kShapes)) d.error("its shape is not known");
    d.i.a = static_cast<u32>(shape);
    if (kShapes[shape].bits) {
        if (!d.take("popc") || !d.take("b1") || !d.take("b1")) d.error("lacks .b1.b1 or .popc");
        d.i.b = static_cast<u32>(d.need_one({"xor", "and"}));
    } else {
        d.i.b = static_cast<u32>(Product::kBytes);
    }
    if (!d.take("s32") || !d.take("s32")) d.error("accumulates in .s32 only");
    if (!kShapes[shape].bits) {
        const Type a = d.take_type(), b = d.take_type();
        if (info(a).bytes != 1 || info(b).bytes != 1) d.unsupported_type();
        d.i.is_signed = is_signed(a), d.i.sat = is_signed(b);
    }
    d.expect(4);
    const int sizes[] = {kShapes[shape].c_registers, kShapes[shape].a_registers, kShapes[shape].b_registers,
                         kShapes[shape].c_registers};
    for (int k = 0; k < 4; ++k)
        if (d.vector_size(k) != sizes[k]) d.error("operand " + std::to_string(k) + " has a wrong number of registers");
    d.destinations(0), d.sources(1, Type::b32), d.sources(2, Type::b32), d.sources(3, Type::b32);
    d.i.run = mma;
}

}  // namespace ptx
