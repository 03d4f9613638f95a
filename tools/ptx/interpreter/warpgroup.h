// PTX ISA, section "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions": wgmma.fence, mma_async,
// commit_group, wait_group; and "setmaxnreg". A warpgroup is four warps of which the first is a multiple of four.
//
// Each warp executes a wgmma for its 16 rows, when it comes there; the warps of a warpgroup must execute the same ones.
// The sums are computed at once, but until a wait has covered the group, no other instruction may name the
// accumulators, and nobody may write what the wgmma reads. A register is "touched" at the start and when another
// instruction names it; wgmma.fence clears that, and a wgmma must not find a register touched.
#pragma once
#include "cluster.h"
#include "matrix.h"

namespace ptx {

inline void name_register(Warp& w, s32 row) {
    if (row < 0) return;
    if (w.flying[static_cast<size_t>(row)]) {
        for (const WarpgroupProduct& product : w.products)
            if (std::find(product.registers.begin(), product.registers.end(), row) != product.registers.end())
                fault(-1, "warpgroup",
                      "a register of the wgmma at " + at_pc(product.pc) + " is named before its group was waited for");
    }
    w.touched[static_cast<size_t>(row)] = 1;
}
// Every instruction but wgmma itself passes here, in a kernel that has wgmma.
PTX_OUT_OF_LINE inline void name_registers(Warp& w, const Instr& i) {
    for (const s32 row : i.s) name_register(w, row);
    for (const s32 row : i.d) name_register(w, row);
    name_register(w, i.guard);
}

inline void wgmma_fence(Machine&, Warp& w, const Instr&, u32) { std::fill(w.touched.begin(), w.touched.end(), u8{0}); }
inline void wgmma_commit(Machine&, Warp& w, const Instr&, u32) {
    for (WarpgroupProduct& product : w.products)
        if (product.group == kOpenGroup) product.group = w.products_committed;
    ++w.products_committed;
}
inline void wgmma_wait(Machine& m, Warp& w, const Instr& i, u32) {  // i.b groups may stay in flight
    while (!w.products.empty()) {
        const WarpgroupProduct& product = w.products.front();
        if (product.group == kOpenGroup || product.group + i.b >= w.products_committed) return;
        for (const s32 row : product.registers) --w.flying[static_cast<size_t>(row)];
        record_reads(m, w, kTogether, product.chunks);
        w.products.pop_front();
    }
}

// ---- Descriptors: PTX ISA, "Shared Memory Matrix Layout" and "Matrix Descriptor Format" -----------------------------
struct Descriptor {
    u32 start, leading, stride, base, swizzle;
    explicit Descriptor(u64 bits)
        : start(static_cast<u32>(bits & 0x3fff) << 4),
          leading(static_cast<u32>(bits >> 16 & 0x3fff) << 4),
          stride(static_cast<u32>(bits >> 32 & 0x3fff) << 4),
          base(static_cast<u32>(bits >> 49 & 7)),
          swizzle(static_cast<u32>(bits >> 62)) {
        static constexpr u32 kWidths[] = {0, 128, 64, 32};
        swizzle = kWidths[swizzle];
    }
    // Returns the shared address of chunk k of row r; a chunk is 16 bytes along K. The rows of a core matrix, 8 rows,
    // lie `swizzle` bytes apart (16 without one), core matrices `stride` bytes apart, and chunks `leading` bytes apart
    // if nothing is swizzled. The pattern of a swizzle begins at line `base` of 128 bytes after a multiple of 1024.
    u32 address(u32 r, u32 k) const {
        if (!swizzle) return start + r % 8 * 16 + r / 8 * stride + k * leading;
        const u32 linear = start + r % 8 * swizzle + r / 8 * stride + k * 16;
        const u32 mask = swizzle / 16 - 1;
        return linear ^ (((linear >> 7) - base) & mask) << 4;
    }
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("default", "popcnt")))
#endif
inline u32 and_popc(const u64* a, const u64* b) {
    u32 count = 0;
    for (int k = 0; k < 4; ++k) count += static_cast<u32>(__builtin_popcountll(a[k] & b[k]));
    return count;
}

// PTX ISA, "Canonical Layouts": the pattern of a swizzle repeats every 8 rows, from the first row on. "Matrix
// Descriptor Format": the base offset must be 0 if the pattern starts on a boundary of its size, and otherwise the
// number of the line of 128 bytes on which it starts. The text does not say what wgmma reads if it is another number.
inline void check_base_offset(const Descriptor& d, u32 rows) {
    if (!d.swizzle) return;
    const u32 size = 8 * d.swizzle;
    for (u32 group = 0; group < rows / 8; ++group) {
        const u32 start = (d.start + group * d.stride) / d.swizzle * d.swizzle;  // without a step along K
        if ((start - 128 * d.base) % size)
            fault(-1, "misaligned",
                  "rows " + std::to_string(8 * group) + " to " + std::to_string(8 * group + 7) +
                      " of a matrix begin at shared address " + hex(start) + ", which is " +
                      std::to_string(start % size) + " bytes after a multiple of " + std::to_string(size) +
                      ", but the descriptor says by its base offset " + std::to_string(d.base) +
                      " that the swizzle's pattern starts " + std::to_string(128 * d.base % size) + " bytes after one");
    }
}

// Reads `rows` rows of 32 bytes of a matrix into `data`, and appends their places to `chunks`.
inline void matrix_in_shared(Machine& m, Warp& w, const Descriptor& d, u32 rows, std::vector<u32>& chunks, u64* data) {
    check_base_offset(d, rows);
    for (u32 r = 0; r < rows; ++r)
        for (u32 k = 0; k < 2; ++k) {
            const u64 at = shared_range(m, w, -1, Space::kShared, d.address(r, k), 16);
            check_async_read(m, w, -1, at, 16, false);
            std::memcpy(data + 4 * r + 2 * k, m.shared.data() + at, 16);
            chunks.push_back(static_cast<u32>(at / 16));
        }
}
// i.a is the number of columns, i.b says whether A lies in registers. s holds A (a descriptor or four registers), B,
// and whether D is added. Register r of D lies at row 16 warp + lane / 4 + 8 (r / 2 % 2) and column 8 (r / 4) +
// 2 (lane % 4)
// + r % 2. A thread holds of A what it holds for mma.m16n8k256.
inline void wgmma(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const size_t b_at = i.b ? 4 : 1, add_at = b_at + 1;
    for (size_t k = i.b ? 4 : 0; k < i.s.size(); ++k) need(w, i.s[k], mask);
    const u64 b_bits = m.in(w, i.s[b_at])[0], a_bits = i.b ? 0 : m.in(w, i.s[0])[0];
    const bool adds = (m.in(w, i.s[add_at])[0] != 0) != (i.negated[add_at] != 0);
    for_lanes(mask, [&](int l) {
        if (m.in(w, i.s[b_at])[l] != b_bits || (!i.b && m.in(w, i.s[0])[l] != a_bits) ||
            ((m.in(w, i.s[add_at])[l] != 0) != (i.negated[add_at] != 0)) != adds)
            fault(l, "warpgroup", "the lanes of a warp name different descriptors, or add to D and do not");
    });
    const int warp = (w.id - w.first) % 4;
    // The warps of a warpgroup must do the same.
    Block& block = m.block_of(w);
    const size_t group = static_cast<size_t>(w.id - w.first) / 4;
    if (4 * group + 4 > m.block_warps) fault(-1, "warpgroup", "wgmma needs a warpgroup of four warps");
    block.steps.resize(std::max(block.steps.size(), group + 1));
    std::vector<Block::Step>& steps = block.steps[group];
    if (w.products_issued == steps.size()) steps.push_back({w.now, a_bits, b_bits, adds});
    const Block::Step& step = steps[w.products_issued++];
    if (step.pc != w.now || step.a != a_bits || step.b != b_bits || step.adds != adds)
        fault(-1, "warpgroup",
              "the warps of a warpgroup execute different wgmma: another one was at " + at_pc(step.pc) +
                  (step.pc == w.now ? ", with other descriptors" : ""));
    WarpgroupProduct product{kOpenGroup, w.now, {}, {}};
    const auto take_register = [&](s32 row, u8 shape) {
        const size_t r = static_cast<size_t>(row);
        if (w.touched[r])
            fault(-1, "warpgroup", "no wgmma.fence lies between this wgmma and another access to its registers");
        if (w.flying[r] && w.shapes[r] != shape)
            fault(-1, "warpgroup", "a register is in flight in a wgmma of another shape");
        ++w.flying[r];
        w.shapes[r] = shape;
        product.registers.push_back(row);
    };
    for (const s32 row : i.d) take_register(row, static_cast<u8>(i.a / 8));
    if (i.b)
        for (size_t k = 0; k < 4; ++k) {
            need(w, i.s[k], mask);
            take_register(i.s[k], 0);
        }
    std::vector<u64> a(64 * 4), b(size_t{i.a} * 4);
    if (i.b) {
        for (int l = 0; l < kLanes; ++l)
            for (int r = 0; r < 4; ++r) {
                const u32 word = static_cast<u32>(m.in(w, i.s[static_cast<size_t>(r)])[l]);
                u64& v = a[static_cast<size_t>(4 * (16 * warp + l / 4 + 8 * (r % 2)) + (l % 4 + 4 * (r / 2)) / 2)];
                v |= u64{word} << (l % 2 ? 32 : 0);
            }
    } else {
        matrix_in_shared(m, w, Descriptor(a_bits), 64, product.chunks, a.data());
    }
    matrix_in_shared(m, w, Descriptor(b_bits), i.a, product.chunks, b.data());
    for (const u32 chunk : product.chunks) ++m.readers[chunk];
    for (size_t r = 0; r < i.d.size(); ++r) {
        u64* d = m.row(w, i.d[r]);
        const u32 n = static_cast<u32>(r);
        if (adds) need(w, i.d[r], kAll);
        for (u32 l = 0; l < kLanes; ++l) {
            const u32 row = 16 * static_cast<u32>(warp) + l / 4 + 8 * (n / 2 % 2),
                      column = n / 4 * 8 + l % 4 * 2 + n % 2;
            d[l] = static_cast<u32>((adds ? d[l] : 0) + and_popc(&a[size_t{4} * row], &b[size_t{4} * column]));
        }
        w.initialised[i.d[r]] = kAll;
    }
    w.products.push_back(std::move(product));
}
inline void decode_wgmma(Decoder& d) {
    d.program.asynchronous = d.program.warpgroups = true;
    const int what = d.need_one({"fence", "commit_group", "wait_group", "mma_async"});
    aligned_collective(d);
    switch (what) {
        case 0: d.expect(0), d.i.run = wgmma_fence; return;
        case 1: d.expect(0), d.i.run = wgmma_commit; return;
        case 2:
            d.expect(1);
            d.i.b = static_cast<u32>(d.immediate(0));
            d.i.run = wgmma_wait;
            return;
        default: break;
    }
    for (u32 n = 8; n <= 256; n += n < 32 ? 8 : 16)
        if (d.take(("m64n" + std::to_string(n) + "k256").c_str())) d.i.a = n;
    if (!d.i.a) d.error("its shape is not known for .b1");
    d.take("row"), d.take("col");
    if (!d.take("s32") || !d.take("b1") || !d.take("b1") || !d.take("and") || !d.take("popc"))
        d.error("only .s32.b1.b1.and.popc is known");
    d.expect(4);
    if (d.vector_size(0) != static_cast<int>(d.i.a / 2)) d.error("the accumulators have a wrong number of registers");
    d.destinations(0);
    for (const s32 row : d.i.d)
        if (row == kNoRow) d.error("an accumulator is no register");
    d.i.b = d.is_vector(1);
    if (d.i.b && d.vector_size(1) != 4) d.error("A has a wrong number of registers");
    d.sources(1, d.i.b ? Type::b32 : Type::b64), d.source(2, Type::b64), d.source(3, Type::pred);
    if (d.i.b)
        for (size_t k = 0; k < 4; ++k)
            if (d.i.s[k] < 0) d.error("A is no register");
    d.i.copies = true;  // it checks its registers itself
    d.i.run = wgmma;
}

// ---- setmaxnreg -----------------------------------------------------------------------------------------------------
inline void grant(Machine& m, Warp& w, u32 registers) {
    m.block_of(w).free_registers -= static_cast<s64>(registers - w.per_thread) * kLanes;
    w.per_thread = registers;
}
inline void setmaxnreg(Machine& m, Warp& w, const Instr& i, u32) {  // i.a is set for .inc; i.b is the number
    if (i.a ? i.b < w.per_thread : i.b > w.per_thread)
        fault(-1, "registers",
              "setmaxnreg asks for " + std::to_string(i.b) + " registers from " + std::to_string(w.per_thread) +
                  (i.a ? " by .inc" : " by .dec"));
    if (!i.a) {
        m.block_of(w).free_registers += static_cast<s64>(w.per_thread - i.b) * kLanes;
        w.per_thread = i.b;
        // Those that wait take what they need, in any order.
        for (Warp& other : m.warps) {
            if (other.block != w.block || !other.at_wait) continue;
            const int lane = std::countr_zero(other.at_wait);
            if (other.reason[lane] != Wait::kRegisters) continue;
            const u32 wanted = m.program->code[other.blocked_pc[lane]].b;
            if (m.block_of(w).free_registers < static_cast<s64>(wanted - other.per_thread) * kLanes) continue;
            grant(m, other, wanted);
            other.at_wait = 0;
        }
    } else if (m.block_of(w).free_registers >= static_cast<s64>(i.b - w.per_thread) * kLanes) {
        grant(m, w, i.b);
    } else {
        for_lanes(w.lanes & ~w.exited, [&](int l) { block_lane(w, l, Wait::kRegisters); });
        m.yields = true;
    }
}
inline void decode_setmaxnreg(Decoder& d) {
    d.program.asynchronous = true;
    aligned_collective(d);
    d.i.a = d.need_one({"inc", "dec"}) == 0;
    if (d.take_type() != Type::u32) d.unsupported_type();
    d.expect(1);
    const s64 count = d.immediate(0);
    if (count < 24 || count > 256 || count % 8) d.error("the number of registers is none of 24, 32, ..., 256");
    d.i.b = static_cast<u32>(count);
    d.i.run = setmaxnreg;
}

}  // namespace ptx
