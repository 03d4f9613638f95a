// Executes PTX. This file has the table from opcode to family, the scheduler of lanes, warps and blocks, and the C
// interface that machine.py calls. The instructions are implemented in interpreter/, one header for each family.
#include <cstdlib>

#include "interpreter/warpgroup.h"

namespace ptx {
namespace {

using namespace floating_point;  // it has the decoders of the names that integers and floats share

constexpr Family kFamilies[] = {
    // Integer, float and half arithmetic
    {"add", decode_add},
    {"addc", decode_addc},
    {"sub", decode_sub},
    {"subc", decode_subc},
    {"mul", floating_point::decode_mul},
    {"mad", floating_point::decode_mad},
    {"madc", decode_madc},
    {"mul24", integer::decode_mul24},
    {"fma", decode_fma},
    {"div", decode_div},
    {"rem", integer::decode_binary<Rem>},
    {"min", decode_min_max<false>},
    {"max", decode_min_max<true>},
    {"abs", decode_abs},
    {"neg", decode_neg},
    {"sad", integer::decode_sad},
    {"rcp", decode_function<FRcp>},
    {"sqrt", decode_function<FSqrt>},
    {"rsqrt", decode_function<FRsqrt>},
    {"ex2", decode_function<FEx2>},
    {"lg2", decode_function<FLg2>},
    {"sin", decode_function<FSin>},
    {"cos", decode_function<FCos>},
    {"tanh", decode_function<FTanh>},
    {"testp", decode_testp},
    {"copysign", decode_copysign},
    // Bits
    {"and", integer::decode_logic<And>},
    {"or", integer::decode_logic<Or>},
    {"xor", integer::decode_logic<Xor>},
    {"not", integer::decode_not},
    {"cnot", integer::decode_unary<Cnot>},
    {"lop3", integer::decode_lop3},
    {"shl", integer::decode_shift<Shl>},
    {"shr", integer::decode_shift<Shr>},
    {"shf", integer::decode_shf},
    {"prmt", integer::decode_prmt},
    {"bfe", integer::decode_bfe},
    {"bfi", integer::decode_bfi},
    {"brev", integer::decode_brev},
    {"popc", integer::decode_count<Popc>},
    {"clz", integer::decode_count<Clz>},
    {"bfind", integer::decode_bfind},
    {"szext", integer::decode_szext},
    {"dp4a", integer::decode_dp4a},
    // Comparison, selection, conversion
    {"setp", comparison::decode_setp},
    {"set", comparison::decode_set},
    {"selp", comparison::decode_selp},
    {"slct", comparison::decode_slct},
    {"cvt", decode_cvt},
    // Moves and memory
    {"mov", decode_mov},
    {"ld", decode_ld},
    {"ldu", decode_ldu},
    {"st", decode_st_or_async},
    {"prefetch", decode_prefetch},
    {"createpolicy", decode_createpolicy},
    {"cvta", decode_cvta},
    {"isspacep", decode_isspacep},
    {"atom", decode_atom<false>},
    {"red", decode_atom<true>},
    {"cp", decode_cp},
    // Control and synchronization
    {"bra", decode_bra},
    {"brx", decode_brx},
    {"ret", decode_exit},
    {"exit", decode_exit},
    {"trap", decode_trap},
    {"nanosleep", decode_nanosleep},
    {"bar", decode_bar},
    {"barrier", decode_barrier_of},
    {"membar", decode_fence},
    {"fence", decode_fence},
    // Warp level
    {"vote", decode_vote},
    {"activemask", decode_activemask},
    {"shfl", decode_shfl},
    {"match", decode_match},
    {"redux", decode_redux},
    {"elect", decode_elect},
    // The asynchronous machine, clusters
    {"mbarrier", decode_mbarrier},
    {"griddepcontrol", decode_griddepcontrol},
    {"mapa", decode_of_cluster<true>},
    {"getctarank", decode_of_cluster<false>},
    {"setmaxnreg", decode_setmaxnreg},
    // Matrices
    {"ldmatrix", decode_matrix_rows<false>},
    {"stmatrix", decode_matrix_rows<true>},
    {"mma", decode_mma},
    {"wgmma", decode_wgmma},
};

// ---- Special registers: PTX ISA, section "Special Registers" --------------------------------------------------------
void fill_special(const Machine& m, Warp& w, s32 reg, const std::string& name) {
    u64* row = const_cast<Machine&>(m).row(w, reg);
    const u32 x = m.block_size[0], y = m.block_size[1];
    for (int l = 0; l < kLanes; ++l) {
        const u32 t = static_cast<u32>(w.thread_of_block(l));
        const u32 tid[3] = {t % x, t / x % y, t / x / y};
        const auto axis = [&](const char* base) {
            const size_t n = std::strlen(base);
            return name.compare(0, n, base) == 0 && name.size() == n + 2 && name[n] == '.' ? name[n + 1] - 'x' : -1;
        };
        const u32 bit = 1u << l;
        if (int k = axis("%tid"); k >= 0) {
            row[l] = tid[k];
        } else if (k = axis("%ntid"); k >= 0) {
            row[l] = m.block_size[k];
        } else if (k = axis("%ctaid"); k >= 0) {
            row[l] = m.block_of(w).ctaid[k];
        } else if (k = axis("%nctaid"); k >= 0) {
            row[l] = m.grid[k];
        } else if (name == "%laneid") {
            row[l] = static_cast<u64>(l);
        } else if (name == "%warpid") {
            row[l] = static_cast<u64>(w.id - w.first);
        } else if (name == "%nwarpid") {
            row[l] = m.block_warps;
        } else if (name == "%lanemask_eq") {
            row[l] = bit;
        } else if (name == "%lanemask_lt") {
            row[l] = bit - 1;
        } else if (name == "%lanemask_le") {
            row[l] = bit | (bit - 1);
        } else if (name == "%lanemask_gt") {
            row[l] = ~(bit | (bit - 1));
        } else if (name == "%lanemask_ge") {
            row[l] = static_cast<u32>(~(bit - 1));
        } else if (name == "%dynamic_smem_size") {
            row[l] = m.dynamic_shared;
        } else if (name == "%total_smem_size") {
            row[l] = m.total_shared;
        } else if (int k = axis("%clusterid"); k >= 0) {
            row[l] = m.block_of(w).ctaid[k] / m.cluster[k];
        } else if (k = axis("%nclusterid"); k >= 0) {
            row[l] = m.grid[k] / m.cluster[k];
        } else if (k = axis("%cluster_ctaid"); k >= 0) {
            row[l] = m.block_of(w).ctaid[k] % m.cluster[k];
        } else if (k = axis("%cluster_nctaid"); k >= 0) {
            row[l] = m.cluster[k];
        } else if (name == "%cluster_ctarank") {
            row[l] = static_cast<u64>(w.block);
        } else if (name == "%cluster_nctarank") {
            row[l] = m.cluster_blocks;
        } else if (name == "%is_explicit_cluster") {
            row[l] = m.explicit_cluster;
        } else if (name == "%gridid") {
            row[l] = 0;
        } else {
            throw std::runtime_error("the special register " + name + " is not known");
        }
        row[l] &= name == "%gridid" ? ~u64{0} : 0xffffffffu;
    }
    w.initialised[reg] = kAll;
}
bool known_special(const std::string& name) {
    static const char* kPlain[] = {
        "%laneid",      "%warpid",          "%nwarpid",          "%lanemask_eq",        "%lanemask_lt",
        "%lanemask_le", "%lanemask_gt",     "%lanemask_ge",      "%dynamic_smem_size",  "%total_smem_size",
        "%gridid",      "%cluster_ctarank", "%cluster_nctarank", "%is_explicit_cluster"};
    for (const char* one : kPlain)
        if (name == one) return true;
    for (const char* base :
         {"%tid", "%ntid", "%ctaid", "%nctaid", "%clusterid", "%nclusterid", "%cluster_ctaid", "%cluster_nctaid"})
        for (const char* axis : {".x", ".y", ".z"})
            if (name == std::string(base) + axis) return true;
    return false;
}

// ---- Execution ------------------------------------------------------------------------------------------------------
inline void check_sources(const Warp& w, const Instr& i, u32 mask) {
    for (const s32 row : i.s) {
        if (row < 0) continue;
        if (const u32 missing = mask & ~w.initialised[row])
            fault(std::countr_zero(missing), "uninitialised register", "a source register was never written");
    }
}
inline void execute(Machine& m, Warp& w, const Instr& i, u32 mask) {
    Count& count = m.counts[w.now];
    ++count.warps;
    count.threads += static_cast<u64>(std::popcount(mask));
    if (!mask) return;
    if (m.warpgroups && i.run != wgmma) [[unlikely]]
        name_registers(w, i);
    if (i.copies) {
        i.run(m, w, i, mask);
        return;
    }
    check_sources(w, i, mask);
    i.run(m, w, i, mask);
    // A barrier.red writes its result when it completes.
    if (i.flow == Flow::kBranch) return;
    for (const s32 row : i.d)
        if (row != kNoRow) w.initialised[row] |= mask;
}
inline u32 guarded(const Machine& m, const Warp& w, const Instr& i, u32 mask) {
    if (i.guard < 0) return mask;
    if (const u32 missing = mask & ~w.initialised[i.guard])
        fault(std::countr_zero(missing), "uninitialised register", "the guard predicate was never written");
    const u64* p = m.in(w, i.guard);
    u32 taken = 0;
    for_lanes(mask, [&](int l) { taken |= u32{(p[l] != 0) != i.guard_negated} << l; });
    return taken;
}

// The lanes of `mask` have reached a .sync instruction. They execute it if all its members are here, else they wait.
void collective(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u32 living = w.lanes & ~w.exited;
    u32 here = mask;
    for_lanes(w.at_members, [&](int l) { here |= u32{w.blocked_pc[l] == w.now} << l; });
    if (!i.aligned && i.members >= 0)
        if (const u32 missing = here & ~w.initialised[i.members])
            fault(std::countr_zero(missing), "uninitialised register", "the member mask was never written");
    u32 left = here;
    while (left) {
        const int first = std::countr_zero(left);
        const u32 members = i.aligned ? kAll : static_cast<u32>(m.in(w, i.members)[first]);
        u32 same = 0;
        for_lanes(left,
                  [&](int l) { same |= u32{i.aligned || static_cast<u32>(m.in(w, i.members)[l]) == members} << l; });
        left &= ~same;
        if (const u32 outside = same & ~members)
            fault(std::countr_zero(outside), "warp synchronization",
                  "the executing thread is not in the member mask " + hex(members));
        if (i.aligned && living != kAll)
            fault(first, "warp synchronization",
                  "an .aligned instruction needs all 32 threads of the warp, of which some exited or do not exist");
        if (members & living & ~same) {
            for_lanes(same, [&](int l) { w.blocked_pc[l] = w.now; });
            w.at_members |= same;
            continue;
        }
        w.at_members &= ~same;
        execute(m, w, i, same);
        if (m.collectives_order && same) meet(w, same);
        for_lanes(same, [&](int l) { w.pc[l] = w.now + 1; });
    }
}

// Runs up to `budget` instructions of a warp; fewer if its lanes block or exit. The lanes with the lowest program
// counter run first, so that lanes that diverged meet again as soon as they can.
void run_warp(Machine& m, Warp& w, u64 budget) {
    const std::vector<Instr>& code = m.program->code;
    while (budget) {
        const u32 runnable = w.runnable();
        if (!runnable) return;
        u32 pc = kAll, next = kAll;
        for_lanes(runnable, [&](int l) { pc = std::min(pc, w.pc[l]); });
        u32 mask = 0;
        for_lanes(runnable, [&](int l) {
            if (w.pc[l] == pc) {
                mask |= 1u << l;
            } else {
                next = std::min(next, w.pc[l]);
            }
        });
        for (;;) {
            if (pc >= code.size()) throw std::runtime_error("execution runs past the end of the kernel");
            const Instr& i = code[pc];
            w.now = pc;
            --budget;
            if (++m.executed > m.limit)
                fault(std::countr_zero(mask), "limit",
                      "the kernel executed more instructions than allowed: a loop without end?");
            const u32 taken = guarded(m, w, i, mask);
            if (i.flow == Flow::kNext) {
                execute(m, w, i, taken);
                ++pc;
                if (budget && pc < next) continue;
                for_lanes(mask, [&](int l) { w.pc[l] = pc; });
                break;
            }
            for_lanes(i.flow == Flow::kBranch ? mask : mask & ~taken, [&](int l) { w.pc[l] = pc + 1; });
            if (i.flow == Flow::kBranch) {
                execute(m, w, i, taken);
                if (m.yields) {
                    m.yields = false;
                    return;
                }
            } else if (taken) {
                for_lanes(taken, [&](int l) { w.pc[l] = pc; });
                collective(m, w, i, taken);
            }
            break;
        }
    }
}

// Starts the blocks of a cluster.
void start_cluster(Machine& m) {
    for (u32 rank = 0; rank < m.cluster_blocks; ++rank) {
        u8* state = m.shared_state.data() + size_t{rank} * m.shared_stride;
        std::fill_n(state, m.shared_stride, u8{0});
        for (const Region& r : m.shared_regions) std::fill_n(state + (r.offset - kSharedStart), r.size, kAllocated);
        Block& block = m.blocks[rank];
        for (Barrier& b : block.barriers) b.open = false;
        const std::array<u32, 3> at = block_index(m, m.block, rank);
        std::copy(at.begin(), at.end(), block.ctaid);
        block.exited = false;
        block.visitors.clear();
        block.steps.clear();
        const u32 threads = m.block_size[0] * m.block_size[1] * m.block_size[2];
        block.free_registers = 0;
        for (size_t k = 0; k < m.block_warps; ++k)
            m.warps[rank * m.block_warps + k].lanes =
                threads - k * kLanes >= kLanes ? kAll : (1u << (threads - k * kLanes)) - 1;
    }
    std::fill(m.shared.begin(), m.shared.end(), u8{0xcd});
    std::erase_if(m.released, [](const auto& entry) { return entry.first - kSharedWindow < kWindowSize; });
    m.pending_copies = 0;
    Clocks known;
    for (Warp& w : m.warps) known.push_back(w.clock++);
    known.push_back(0);  // the grid before has not been waited for
    known.insert(known.end(), m.agents.begin(), m.agents.end());
    if (m.asynchronous) {
        m.mbarriers.clear();
        m.bulk.clear();
        m.agents_used = 0;
        std::fill(m.readers.begin(), m.readers.end(), u16{0});
        for (Proxied& p : m.proxied) p = {known, {}};
    }
    m.cluster_barrier = {};
    for (Warp& w : m.warps) {
        w.exited = w.at_barrier = w.at_members = w.at_wait = w.carry = 0;
        w.pc.fill(0);
        w.order = Order{};
        w.order.known.all = {m.block, {known, {}}, {}};
        w.order.all_lanes = known[static_cast<size_t>(w.id)];
        w.start = w.clock;
        w.fenced = w.fenced_gpu = Published{};
        w.has_fenced = w.has_fenced_gpu = false;
        w.seen = Known{};
        w.initialised.assign(m.program->bits.size(), 0);
        for (int l = 0; l < kLanes; ++l) w.copies[static_cast<size_t>(l)].clear();
        w.committed.fill(0);
        w.cluster_arrivals.fill(0);
        w.cluster_waits.fill(0);
        if (m.asynchronous) {
            w.bulk_committed.fill(0);
            w.per_thread = m.registers_at_entry;
        }
        if (m.warpgroups) {
            w.products.clear();
            w.products_committed = w.products_issued = 0;
            w.touched.assign(m.program->bits.size(), 1);
            w.flying.assign(m.program->bits.size(), 0);
            w.shapes.assign(m.program->bits.size(), 0);
        }
        for (int l = 0; l < kLanes; ++l)
            std::copy(m.local_state.begin(), m.local_state.end(),
                      w.local_state.begin() + static_cast<s64>(m.local_state.size()) * l);
        std::fill(w.local.begin(), w.local.end(), u8{0xcd});
        for (const auto& [reg, name] : m.program->specials) fill_special(m, w, reg, name);
    }
}

// Says what a blocked lane waits for.
std::string wait_text(const Machine& m, const Warp& w, u32 lane) {
    if (w.at_barrier >> lane & 1) return " wait at barrier " + std::to_string(w.barrier[lane]);
    if (!(w.at_wait >> lane & 1)) return " wait for other lanes";
    switch (w.reason[lane]) {
        case Wait::kMbarrier: {
            const auto found = m.mbarriers.find(w.waits_for[lane]);
            return " wait for the end of phase " + std::to_string(w.phase[lane]) + " of " +
                   (found == m.mbarriers.end() ? "an mbarrier that is gone" : state_text(m, found->second));
        }
        case Wait::kCluster: return " wait at barrier.cluster";
        default: return " wait for registers, of which " + std::to_string(m.block_of(w).free_registers) + " are free";
    }
}

[[noreturn]] void deadlock(const Machine& m, Warp*& current) {
    std::string message = "no thread can go on:";
    int shown = 0;
    for (const Warp& w : m.warps) {
        for (u32 left = w.lanes & ~w.exited; left;) {
            const int l = std::countr_zero(left);
            u32 same = 0;
            const std::string text = wait_text(m, w, static_cast<u32>(l));
            for_lanes(left, [&](int j) {
                same |= u32{w.blocked_pc[j] == w.blocked_pc[l] && wait_text(m, w, static_cast<u32>(j)) == text} << j;
            });
            left &= ~same;
            if (++shown > 6) continue;
            message +=
                m.cluster_blocks > 1 ? " " + block_text(block_index(m, m.block, static_cast<u32>(w.block))) + "," : "";
            message += " warp " + std::to_string(w.id - w.first) + ", lanes " + hex(same) + text + " at " +
                       at_pc(w.blocked_pc[l]) + ";";
        }
    }
    if (shown > 6) message += " ...";
    message.pop_back();
    for (const Warp& w : m.warps) {
        if (const u32 living = w.lanes & ~w.exited) {
            current = const_cast<Warp*>(&w);
            current->now = w.blocked_pc[std::countr_zero(living)];
            fault(std::countr_zero(living), "deadlock", message);
        }
    }
    fault(-1, "deadlock", message);
}

void run_cluster(Machine& m, Warp*& current) {
    start_cluster(m);
    // Some runs switch warps every few instructions, others run a warp until it blocks: each finds its own bugs.
    static constexpr u32 kBursts[] = {3, 40, 1000000};
    const u32 longest = kBursts[m.random.below(3)];
    // In some runs copies land soon, in others as late as they may.
    static constexpr u32 kPatience[] = {2, 20, 1000000};
    const u32 patience = m.asynchronous ? kPatience[m.random.below(3)] : 0;
    std::vector<Warp*> ready;
    for (;;) {
        ready.clear();
        bool living = false;
        for (Warp& w : m.warps) {
            if (w.runnable()) ready.push_back(&w);
            living = living || (w.lanes & ~w.exited);
        }
        if (!m.bulk.empty()) {
            const bool lands = ready.empty() || m.random.below(m.polls ? std::min(patience, 100u) : patience) == 0;
            m.polls = false;
            if (lands && land_one(m)) continue;
        }
        if (ready.empty()) {
            if (living) deadlock(m, current);
            return;
        }
        current = ready[m.random.below(static_cast<u32>(ready.size()))];
        run_warp(m, *current, 1 + m.random.below(longest));
    }
}

struct FaultOut {
    char kind[64];
    char message[1400];
    s32 block[3], thread[3];
    s32 pc;
};
void report(FaultOut& out, const std::string& kind, const std::string& message) {
    snprintf(out.kind, sizeof out.kind, "%s", kind.c_str());
    snprintf(out.message, sizeof out.message, "%s", message.c_str());
}

struct Launch {
    u32 grid[3], block[3];
    u64 seed, limit;
    u32 dynamic_shared, total_shared;
    const Region* shared;
    u64 shared_count;
    const Region* local;
    u64 local_count;
    const Region* params;
    u64 param_count;
    const u8* param_bytes;
    u64 param_size;
    Buffer* buffers;
    u64 buffer_count;
    Count* counts;
    u32 shuffle_blocks, collectives_order;
    u32 cluster[3], registers_at_entry, explicit_cluster, unused;
    const TensorMap* tensor_maps;
    u64 tensor_map_count;
};

std::vector<u8> states(const Region* regions, u64 count, u32 start, u8 state) {
    std::vector<u8> bytes;
    for (u64 k = 0; k < count; ++k) {
        const u64 from = regions[k].offset - start;
        bytes.resize(std::max<u64>(bytes.size(), from + regions[k].size));
        std::fill_n(bytes.begin() + static_cast<s64>(from), regions[k].size, state);
    }
    return bytes;
}

bool launch(const Program& program, const Launch& a, FaultOut& out) {
    Machine m;
    m.program = &program;
    m.asynchronous = program.asynchronous, m.warpgroups = program.warpgroups;
    std::copy_n(a.grid, 3, m.grid);
    std::copy_n(a.block, 3, m.block_size);
    m.random.state = a.seed * 0x2545f4914f6cdd1dull + 1;
    m.limit = a.limit;
    m.collectives_order = a.collectives_order != 0;
    m.dynamic_shared = a.dynamic_shared;
    m.total_shared = a.total_shared;
    m.shared_regions.assign(a.shared, a.shared + a.shared_count);
    m.shared_state = states(a.shared, a.shared_count, kSharedStart, kAllocated);
    std::copy_n(a.cluster, 3, m.cluster);
    m.cluster_blocks = a.cluster[0] * a.cluster[1] * a.cluster[2];
    m.explicit_cluster = a.explicit_cluster != 0;
    m.registers_at_entry = a.registers_at_entry;
    m.tensor_maps.assign(a.tensor_maps, a.tensor_maps + a.tensor_map_count);
    m.shared_stride = static_cast<u32>((m.shared_state.size() + 127) / 128 * 128);
    m.shared_state.resize(size_t{m.shared_stride} * m.cluster_blocks);
    m.shared.resize(m.shared_state.size());
    m.readers.resize(program.asynchronous ? m.shared.size() / 16 + 1 : 0);
    m.shared_shadow.resize(m.shared.size() / 4 + 1);
    m.param_state = states(a.params, a.param_count, kParamStart, kAllocated | kInitialised);
    m.param.assign(a.param_bytes, a.param_bytes + a.param_size);
    m.param.resize(m.param_state.size());
    m.local_state = states(a.local, a.local_count, kLocalStart, kAllocated);
    m.buffers.assign(a.buffers, a.buffers + a.buffer_count);
    for (Buffer& b : m.buffers) m.has_dependent = m.has_dependent || b.dependent;
    for (Buffer& b : m.buffers)
        if (b.writable) b.shadow = static_cast<Shadow*>(std::calloc(b.size / 4 + 1, sizeof(Shadow)));
    m.counts.resize(program.code.size());
    const u32 threads = a.block[0] * a.block[1] * a.block[2];
    m.block_warps = (threads + kLanes - 1) / kLanes;
    m.blocks.resize(m.cluster_blocks);
    m.warps.resize(m.block_warps * m.cluster_blocks);
    for (size_t k = 0; k < m.warps.size(); ++k) {
        Warp& w = m.warps[k];
        w.id = static_cast<int>(k);
        w.block = static_cast<int>(k / m.block_warps);
        w.first = w.block * static_cast<int>(m.block_warps);
        w.registers.resize(program.bits.size() * kLanes);
        w.local.resize(m.local_state.size() * kLanes);
        w.local_state.resize(m.local_state.size() * kLanes);
    }
    Warp* current = &m.warps[0];
    bool ok = true;
    try {
        std::vector<u32> blocks(static_cast<size_t>(a.grid[0]) * a.grid[1] * a.grid[2] / m.cluster_blocks);
        for (size_t k = 0; k < blocks.size(); ++k) blocks[k] = static_cast<u32>(k);
        if (a.shuffle_blocks)
            for (size_t k = blocks.size(); k > 1; --k)
                std::swap(blocks[k - 1], blocks[m.random.below(static_cast<u32>(k))]);
        for (const u32 b : blocks) {
            m.block = static_cast<s32>(b);
            run_cluster(m, current);
        }
    } catch (const Fault& f) {
        ok = false;
        report(out, f.kind, f.message);
        const std::array<u32, 3> at = block_index(m, m.block, static_cast<u32>(current->block));
        std::copy(at.begin(), at.end(), out.block);
        const u32 t = static_cast<u32>(current->thread_of_block(std::max(f.lane, 0)));
        out.thread[0] = static_cast<s32>(t % a.block[0]);
        out.thread[1] = static_cast<s32>(t / a.block[0] % a.block[1]);
        out.thread[2] = static_cast<s32>(t / a.block[0] / a.block[1]);
        out.pc = static_cast<s32>(current->now);
    } catch (const std::exception& e) {
        ok = false;
        report(out, "error", e.what());
        out.pc = static_cast<s32>(current->now);
    }
    const auto free_split = [](Shadow* shadow, size_t n) {
        for (size_t k = 0; k < n; ++k) delete[] shadow[k].bytes;
    };
    free_split(m.shared_shadow.data(), m.shared_shadow.size());
    for (Buffer& b : m.buffers) {
        if (!b.shadow) continue;
        free_split(b.shadow, b.size / 4 + 1);
        std::free(b.shadow);
    }
    std::copy(m.counts.begin(), m.counts.end(), a.counts);
    return ok;
}

}  // namespace
}  // namespace ptx

extern "C" {

__attribute__((visibility("default"))) void* ptx_program(const uint8_t* bits, uint64_t registers) {
    auto* program = new ptx::Program;
    program->bits.assign(bits, bits + registers);
    return program;
}
__attribute__((visibility("default"))) void ptx_free(void* program) { delete static_cast<ptx::Program*>(program); }

// Returns 0, or -1 with the reason in `error`.
__attribute__((visibility("default"))) int ptx_special(void* program, int32_t reg, const char* name, char* error,
                                                       uint64_t size) {
    if (!ptx::known_special(name)) {
        snprintf(error, size, "the special register %s is not known", name);
        return -1;
    }
    static_cast<ptx::Program*>(program)->specials.emplace_back(reg, name);
    return 0;
}
__attribute__((visibility("default"))) int ptx_instruction(void* handle, const char* opcode,
                                                           const ptx::Operand* operands, int32_t count, int32_t guard,
                                                           int32_t negated, char* error, uint64_t size) {
    auto& program = *static_cast<ptx::Program*>(handle);
    try {
        ptx::Instr instr;
        instr.guard = guard;
        instr.guard_negated = negated != 0;
        const std::string name(opcode);
        const std::string family = name.substr(0, name.find('.'));
        for (const ptx::Family& f : ptx::kFamilies) {
            if (family != f.name) continue;
            ptx::Decoder decoder(program, operands, count, instr, name);
            f.decode(decoder);
            decoder.done();
            program.code.push_back(std::move(instr));
            return 0;
        }
        throw std::runtime_error("'" + name + "': the instruction is not known");
    } catch (const std::exception& e) {
        snprintf(error, size, "%s", e.what());
        return -1;
    }
}
__attribute__((visibility("default"))) int ptx_launch(const void* program, const ptx::Launch* launch,
                                                      ptx::FaultOut* fault) {
    return ptx::launch(*static_cast<const ptx::Program*>(program), *launch, *fault) ? 0 : -1;
}

}  // extern "C"
