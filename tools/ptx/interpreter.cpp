// Executes PTX: the table from opcode to family, the scheduler of lanes, warps and blocks, and the C interface that
// machine.py calls. What an instruction does stands in interpreter/, one header a family.
#include <cstdlib>

#include "interpreter/matrix.h"

namespace ptx {
namespace {

using namespace floating_point;  // decoders of names that integers and floats share

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
    {"st", decode_st},
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
    {"barrier", decode_barrier_cta},
    {"membar", decode_fence},
    {"fence", decode_fence},
    // Warp level
    {"vote", decode_vote},
    {"activemask", decode_activemask},
    {"shfl", decode_shfl},
    {"match", decode_match},
    {"redux", decode_redux},
    {"elect", decode_elect},
    // Matrices
    {"ldmatrix", decode_matrix_rows<false>},
    {"stmatrix", decode_matrix_rows<true>},
    {"mma", decode_mma},
};

// ---- Special registers: PTX ISA, section "Special Registers" --------------------------------------------------------
void fill_special(const Machine& m, Warp& w, s32 reg, const std::string& name) {
    u64* row = const_cast<Machine&>(m).row(w, reg);
    const u32 x = m.block_size[0], y = m.block_size[1];
    for (int l = 0; l < kLanes; ++l) {
        const u32 t = static_cast<u32>(w.thread(l));
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
            row[l] = m.ctaid[k];
        } else if (k = axis("%nctaid"); k >= 0) {
            row[l] = m.grid[k];
        } else if (name == "%laneid") {
            row[l] = static_cast<u64>(l);
        } else if (name == "%warpid") {
            row[l] = static_cast<u64>(w.id);
        } else if (name == "%nwarpid") {
            row[l] = m.warps.size();
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
        "%laneid",      "%warpid",      "%nwarpid",           "%lanemask_eq",     "%lanemask_lt", "%lanemask_le",
        "%lanemask_gt", "%lanemask_ge", "%dynamic_smem_size", "%total_smem_size", "%gridid"};
    for (const char* one : kPlain)
        if (name == one) return true;
    for (const char* base : {"%tid", "%ntid", "%ctaid", "%nctaid"})
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

// A .sync instruction reached by the lanes of `mask`. Those whose members are all here execute it, others wait.
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

// Runs up to `budget` instructions of a warp; fewer when its lanes block or exit. Of the lanes that can run, those with
// the least program counter do, so that lanes which parted meet again as soon as they can.
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
            } else if (taken) {
                for_lanes(taken, [&](int l) { w.pc[l] = pc; });
                collective(m, w, i, taken);
            }
            break;
        }
    }
}

void start_block(Machine& m) {
    std::fill(m.shared_state.begin(), m.shared_state.end(), u8{0});
    for (const Region& r : m.shared_regions)
        std::fill_n(m.shared_state.begin() + (r.offset - kSharedStart), r.size, kAllocated);
    std::fill(m.shared.begin(), m.shared.end(), u8{0xcd});
    for (Barrier& b : m.barriers) b.open = false;
    std::erase_if(m.released, [](const auto& entry) { return entry.first - kSharedWindow < kWindowSize; });
    m.pending_copies = 0;
    const int threads = static_cast<int>(m.block_size[0] * m.block_size[1] * m.block_size[2]);
    Clocks known;
    for (Warp& w : m.warps) known.push_back(w.clock++);
    for (Warp& w : m.warps) {
        const int left = threads - w.id * kLanes;
        w.lanes = left >= kLanes ? kAll : (1u << left) - 1;
        w.exited = w.at_barrier = w.at_members = w.carry = 0;
        w.pc.fill(0);
        w.order = Order{};
        w.order.known = known;
        w.order.all_lanes = known[static_cast<size_t>(w.id)];
        w.fenced = w.fenced_gpu = w.acquired = Published{};
        w.has_fenced = w.has_fenced_gpu = w.has_acquired = false;
        w.initialised.assign(m.program->bits.size(), 0);
        for (int l = 0; l < kLanes; ++l) w.copies[static_cast<size_t>(l)].clear();
        w.committed.fill(0);
        for (int l = 0; l < kLanes; ++l)
            std::copy(m.local_state.begin(), m.local_state.end(),
                      w.local_state.begin() + static_cast<s64>(m.local_state.size()) * l);
        std::fill(w.local.begin(), w.local.end(), u8{0xcd});
        for (const auto& [reg, name] : m.program->specials) fill_special(m, w, reg, name);
    }
}

[[noreturn]] void deadlock(const Machine& m, Warp*& current) {
    std::string message = "no thread can go on:";
    int shown = 0;
    for (const Warp& w : m.warps) {
        for (u32 left = w.lanes & ~w.exited; left;) {
            const int l = std::countr_zero(left);
            u32 same = 0;
            for_lanes(left, [&](int j) {
                same |= u32{w.blocked_pc[j] == w.blocked_pc[l] && ((w.at_barrier >> j ^ w.at_barrier >> l) & 1) == 0}
                        << j;
            });
            left &= ~same;
            if (++shown > 6) continue;
            const bool barrier = w.at_barrier >> l & 1;
            message +=
                " warp " + std::to_string(w.id) + ", lanes " + hex(same) +
                (barrier ? " wait at barrier " + std::to_string(w.barrier[l]) : std::string(" wait for other lanes")) +
                " at " + at_pc(w.blocked_pc[l]) + ";";
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

void run_block(Machine& m, Warp*& current) {
    start_block(m);
    // Some runs switch after every few instructions, some run a warp until it blocks: bugs show under either.
    static constexpr u32 kBursts[] = {3, 40, 1000000};
    const u32 longest = kBursts[m.random.below(3)];
    std::vector<Warp*> ready;
    for (;;) {
        ready.clear();
        bool living = false;
        for (Warp& w : m.warps) {
            if (w.runnable()) ready.push_back(&w);
            living = living || (w.lanes & ~w.exited);
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
    std::copy_n(a.grid, 3, m.grid);
    std::copy_n(a.block, 3, m.block_size);
    m.random.state = a.seed * 0x2545f4914f6cdd1dull + 1;
    m.limit = a.limit;
    m.collectives_order = a.collectives_order != 0;
    m.dynamic_shared = a.dynamic_shared;
    m.total_shared = a.total_shared;
    m.shared_regions.assign(a.shared, a.shared + a.shared_count);
    m.shared_state = states(a.shared, a.shared_count, kSharedStart, kAllocated);
    m.shared.resize(m.shared_state.size());
    m.shared_shadow.resize(m.shared.size() / 4 + 1);
    m.param_state = states(a.params, a.param_count, kParamStart, kAllocated | kInitialised);
    m.param.assign(a.param_bytes, a.param_bytes + a.param_size);
    m.param.resize(m.param_state.size());
    m.local_state = states(a.local, a.local_count, kLocalStart, kAllocated);
    m.buffers.assign(a.buffers, a.buffers + a.buffer_count);
    for (Buffer& b : m.buffers)
        if (b.writable) b.shadow = static_cast<Shadow*>(std::calloc(b.size / 4 + 1, sizeof(Shadow)));
    m.counts.resize(program.code.size());
    const u32 threads = a.block[0] * a.block[1] * a.block[2];
    m.warps.resize((threads + kLanes - 1) / kLanes);
    for (size_t k = 0; k < m.warps.size(); ++k) {
        Warp& w = m.warps[k];
        w.id = static_cast<int>(k);
        w.registers.resize(program.bits.size() * kLanes);
        w.local.resize(m.local_state.size() * kLanes);
        w.local_state.resize(m.local_state.size() * kLanes);
    }
    Warp* current = &m.warps[0];
    bool ok = true;
    try {
        std::vector<u32> blocks(static_cast<size_t>(a.grid[0]) * a.grid[1] * a.grid[2]);
        for (size_t k = 0; k < blocks.size(); ++k) blocks[k] = static_cast<u32>(k);
        if (a.shuffle_blocks)
            for (size_t k = blocks.size(); k > 1; --k)
                std::swap(blocks[k - 1], blocks[m.random.below(static_cast<u32>(k))]);
        for (const u32 b : blocks) {
            m.block = static_cast<s32>(b);
            m.ctaid[0] = b % a.grid[0], m.ctaid[1] = b / a.grid[0] % a.grid[1], m.ctaid[2] = b / a.grid[0] / a.grid[1];
            run_block(m, current);
        }
    } catch (const Fault& f) {
        ok = false;
        report(out, f.kind, f.message);
        std::copy_n(reinterpret_cast<const s32*>(m.ctaid), 3, out.block);
        const u32 t = static_cast<u32>(current->thread(std::max(f.lane, 0)));
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

// 0, or -1 with the reason in `error`.
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
