// PTX ISA, section "Parallel Synchronization and Communication Instructions: mbarrier": init, inval, arrive,
// arrive_drop, expect_tx, complete_tx, test_wait, try_wait, pending_count; and "griddepcontrol".
//
// An arrival publishes what its lane did before, and what is ordered before that, to those who see the phase end. A
// phase ends when arrivals and transactions are both zero. A waiter asks for a parity: it passes if the current phase
// has the other one, so a wait that is two phases late, or early, passes at once. A wait that does not pass either
// blocks its lanes until the phase ends or lets them go on without success. The hardware may do both, so the choice is
// random.
#pragma once
#include "async_copy.h"

namespace ptx {

inline constexpr u32 kMostArrivals = (1u << 20) - 1;

inline std::string state_text(const Machine& m, const Mbarrier& b) {
    return "the mbarrier at " + shared_text(m, b.at) + " (phase " + std::to_string(b.phase) + ", " +
           std::to_string(b.pending) + " of " + std::to_string(b.expected) + " arrivals and " +
           std::to_string(b.transactions) + " bytes pending)";
}

// Lets go on those lanes that are blocked for `reason` and for which goes(warp, lane) is true.
template <class F>
void let_go(Machine& m, Wait reason, F&& goes) {
    for (Warp& w : m.warps) {
        if (!w.at_wait) continue;
        for_lanes(w.at_wait, [&](int l) {
            if (w.reason[l] == reason && goes(w, l)) w.at_wait &= ~(1u << l);
        });
    }
}
inline void block_lane(Warp& w, int lane, Wait reason) {
    w.at_wait |= 1u << lane;
    w.reason[lane] = reason;
    w.blocked_pc[lane] = w.now;
}

inline void end_phase_if_complete(Machine& m, Mbarrier& b) {
    if (b.pending || b.transactions) return;
    ++b.phase;
    b.pending = b.expected;
    merge(b.completed, b.gathered);
    b.gathered = {m.block, {}, {}};
    let_go(m, Wait::kMbarrier, [&](const Warp& w, int l) { return w.waits_for[l] == b.at; });
}
inline void add_transactions(const Machine& m, Mbarrier& b, int lane, s64 bytes) {
    b.transactions += bytes;
    if (std::abs(b.transactions) > kMostArrivals)
        fault(lane, "mbarrier", state_text(m, b) + ": the transaction count leaves its range of 20 bits");
}

// Returns the place in Machine::shared that an mbarrier's address names.
inline u32 mbarrier_place(Machine& m, Warp& w, int lane, Space space, u64 address) {
    u64 at = address;
    if (space == Space::kGeneric) {
        if (address - kSharedWindow >= kWindowSize)
            fault(lane, "mbarrier", "an mbarrier's address " + hex(address) + " is not one of shared memory");
        at -= kSharedWindow;
    }
    if (at % 8) fault(lane, "misaligned", "the mbarrier at " + hex(address) + " is not aligned to 8");
    return static_cast<u32>(
        shared_range(m, w, lane, space == Space::kGeneric ? Space::kCluster : space, at, sizeof(u64)));
}
inline Mbarrier& mbarrier_at(Machine& m, Warp& w, int lane, u32 at) {
    const auto found = m.mbarriers.find(at);
    if (found == m.mbarriers.end())
        fault(lane, "mbarrier",
              "there is no mbarrier at " + shared_text(m, at) + ": mbarrier.init has not been executed");
    // A use is a strong access: it must be ordered after the initialization, but not after other uses.
    check_race(m, w, lane, m.shared_shadow.data(), at, 8, false, true, "race on shared memory",
               [&] { return "the mbarrier at " + shared_text(m, at); });
    Mbarrier& b = found->second;
    b.users.resize(m.warps.size());
    b.users[static_cast<size_t>(w.id)] = w.clock;
    return b;
}
inline Mbarrier& mbarrier(Machine& m, Warp& w, int lane, const Instr& i, size_t operand = 0) {
    const u64 address = m.in(w, i.s[operand])[lane] + static_cast<u64>(operand ? i.offset3 : i.offset);
    return mbarrier_at(m, w, lane, mbarrier_place(m, w, lane, i.space, address));
}

inline void mbarrier_init(Machine& m, Warp& w, const Instr& i, u32 mask) {
    for_lanes(mask, [&](int l) {
        const u32 at = mbarrier_place(m, w, l, i.space, m.in(w, i.s[0])[l] + static_cast<u64>(i.offset));
        const u32 count = static_cast<u32>(m.in(w, i.s[1])[l]);
        if (count < 1 || count > kMostArrivals)
            fault(l, "illegal", "mbarrier.init: the count " + std::to_string(count) + " is not between 1 and 2^20 - 1");
        if (m.mbarriers.count(at))
            fault(l, "mbarrier", "mbarrier.init: there is an mbarrier at " + shared_text(m, at) + " already");
        if (m.shared_state[at] & kPending) pending_copy(m, l, at, 8, true);
        check_asynchronous(m, l, at, 8, true);
        check_race(m, w, l, m.shared_shadow.data(), at, 8, true, false, "race on shared memory",
                   [&] { return shared_text(m, at); });
        const u32 agent = static_cast<u32>(m.grid_agent()) + 1 + m.agents_used++;
        if (agent >> kWarpBits) throw std::runtime_error("a cluster has too many mbarriers and warps");
        m.agents.resize(std::max<size_t>(m.agents.size(), m.agents_used));
        Mbarrier b{};
        b.at = at, b.agent = agent, b.pc = w.now;
        b.expected = b.pending = count;
        b.gathered = b.completed = {m.block, {}, {}};
        m.mbarriers.emplace(at, std::move(b));
        for (u32 k = 0; k < 8; ++k) m.shared_state[at + k] |= kBarrier;
    });
}
inline void mbarrier_inval(Machine& m, Warp& w, const Instr& i, u32 mask) {
    for_lanes(mask, [&](int l) {
        Mbarrier& b = mbarrier(m, w, l, i);
        for (size_t k = 0; k < b.users.size(); ++k)
            if (static_cast<int>(k) != w.id && b.users[k] && !w.reaches(l, k, b.users[k]))
                fault(l, "mbarrier",
                      state_text(m, b) + " is invalidated, but a use by " +
                          thread_text(m, m.block, static_cast<int>(k) * kLanes) + " or its warp is not ordered before");
        for (const BulkCopy& copy : m.bulk)
            if (copy.kind != BulkCopy::kStore && copy.mbarrier == b.at)
                fault(l, "mbarrier",
                      state_text(m, b) + " is invalidated while the copy at " + at_pc(copy.pc) + " is under way");
        for (u32 k = 0; k < 8; ++k) m.shared_state[b.at + k] = kAllocated;
        check_race(m, w, l, m.shared_shadow.data(), b.at, 8, true, false, "race on shared memory",
                   [&] { return shared_text(m, b.at); });
        m.mbarriers.erase(b.at);
    });
}

inline u64 token_of(const Mbarrier& b) { return b.phase << 24 | b.pending; }

// Each lane arrives and releases. i.a is 1 if the expected arrivals become fewer too (arrive_drop). i.b is 1 if s[1] is
// the number of arrivals, and 2 if it is a number of bytes that are expected before the arrival.
inline void mbarrier_arrive(Machine& m, Warp& w, const Instr& i, u32 mask) {
    // Lanes that arrive together in one phase are published together, and otherwise one by one.
    const Mbarrier& first = mbarrier(m, w, std::countr_zero(mask), i);
    bool together = i.b != 1 && first.pending >= static_cast<u32>(std::popcount(mask));
    const u64* address = m.in(w, i.s[0]);
    for_lanes(mask, [&](int l) { together = together && address[l] == address[std::countr_zero(mask)]; });
    Published published;
    if (!i.release && w.has_fenced) published = w.fenced;
    if (i.release && together) published = knowledge(w, mask);
    for_lanes(mask, [&](int l) {
        Mbarrier& b = mbarrier(m, w, l, i);
        if (i.release && !together) published = knowledge(w, 1u << l);
        const u64 token = token_of(b);
        if (i.b == 2) add_transactions(m, b, l, static_cast<s64>(m.in(w, i.s[1])[l]));
        const u32 count = i.b == 1 ? static_cast<u32>(m.in(w, i.s[1])[l]) : 1;
        if (count < 1 || count > b.pending)
            fault(l, "mbarrier", std::to_string(count) + " arrivals at " + state_text(m, b));
        b.pending -= count;
        if (i.a) b.expected -= count;
        if (published.block >= 0) merge(b.gathered, published);
        if (!i.d.empty() && i.d[0] != kNoRow) m.row(w, i.d[0])[l] = token;
        end_phase_if_complete(m, b);
    });
    if (i.release) ++w.clock;
}
inline void mbarrier_expect(Machine& m, Warp& w, const Instr& i, u32 mask) {  // i.a is set for complete_tx
    for_lanes(mask, [&](int l) {
        Mbarrier& b = mbarrier(m, w, l, i);
        const s64 bytes = static_cast<s64>(m.in(w, i.s[1])[l]);
        add_transactions(m, b, l, i.a ? -bytes : bytes);
        if (i.a) end_phase_if_complete(m, b);
    });
}

// i.a says whether it may block (try_wait), i.b whether s[1] is a parity and not a token.
inline void mbarrier_wait(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const bool gives_up = m.random.below(4) == 0;
    // The lanes that see the end of a phase of one barrier acquire together.
    const Mbarrier* ended = nullptr;
    u32 passed = 0;
    const auto pass = [&] {
        if (!passed) return;
        if (i.acquire) {
            acquire(w, passed, ended->completed);
        } else {
            w.seen.add(ended->completed, passed, w.living());
        }
        passed = 0;
    };
    for_lanes(mask, [&](int l) {
        Mbarrier& b = mbarrier(m, w, l, i);
        const u64 asked = m.in(w, i.s[1])[l];
        bool done;
        if (i.b) {
            if (asked > 1) fault(l, "illegal", "a phase's parity is " + std::to_string(asked));
            done = (b.phase & 1) != asked;
        } else {
            const u64 phase = asked >> 24;
            if (phase > b.phase || b.phase - phase > 1)
                fault(l, "mbarrier",
                      "a token of phase " + std::to_string(phase) + " is waited for at " + state_text(m, b) +
                          ": only the current phase and the one before may be");
            done = b.phase != phase;
        }
        if (done) {
            if (ended != &b) pass();
            ended = &b;
            passed |= 1u << l;
        } else if (i.a && !gives_up) {
            block_lane(w, l, Wait::kMbarrier);
            w.waits_for[l] = b.at;
            w.phase[l] = b.phase;
        } else {
            m.polls = true;
        }
        m.row(w, i.d[0])[l] = done;
        if (!done) m.yields = true;
    });
    pass();
    w.initialised[i.d[0]] |= mask;
}

inline void mbarrier_pending(Machine& m, Warp& w, const Instr& i, u32 mask) {
    for_lanes(mask, [&](int l) { m.row(w, i.d[0])[l] = m.in(w, i.s[0])[l] & kMostArrivals; });
}

inline Space take_mbarrier_space(Decoder& d) {
    if (d.take("shared::cluster")) return Space::kCluster;
    if (d.take("shared") || d.take("shared::cta")) return Space::kShared;
    return Space::kGeneric;
}
inline void decode_mbarrier(Decoder& d) {
    d.program.asynchronous = true;
    const int what = d.need_one({"init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx", "test_wait",
                                 "try_wait", "pending_count"});
    const bool expects = d.take("expect_tx");
    const bool parity = d.take("parity");
    const int order = d.take_one({"release", "acquire", "relaxed"});
    take_scope(d);
    d.i.space = take_mbarrier_space(d);
    if (d.take_type() != Type::b64) d.unsupported_type();
    switch (what) {
        case 0:
            d.expect(2);
            d.address(0), d.source(1, Type::u32);
            d.i.run = mbarrier_init;
            break;
        case 1:
            d.expect(1);
            d.address(0);
            d.i.run = mbarrier_inval;
            break;
        case 2:
        case 3: {
            d.i.release = order != 2;
            d.i.a = what == 3;
            const bool result = d.operand(0).kind != kAddress;
            if (result) d.destination(0);
            if (d.i.space == Space::kCluster && result && d.i.d[0] != kNoRow)
                d.error("an arrival in another block's barrier returns no state");
            const int first = result;
            d.address(first);
            if (d.count() > first + 1) {
                d.source(first + 1, Type::u32);
                d.i.b = expects ? 2 : 1;
            } else if (expects) {
                d.error("lacks the number of bytes");
            }
            d.expect(first + 1 + (d.i.b != 0));
            d.i.run = mbarrier_arrive;
            break;
        }
        case 4:
        case 5:
            d.expect(2);
            d.address(0), d.source(1, Type::u32);
            d.i.a = what == 5;
            d.i.run = mbarrier_expect;
            break;
        case 6:
        case 7:
            if (d.i.space == Space::kCluster) d.error("waits for a barrier of its own block only");
            d.destination(0), d.address(1), d.source(2, parity ? Type::u32 : Type::u64);
            if (what == 7 && d.count() == 4) d.source(3, Type::u32);  // the limit of the time that it waits
            d.expect(static_cast<int>(d.i.s.size()) + 1);
            d.i.a = what == 7;
            d.i.b = parity;
            d.i.acquire = order != 2;
            d.i.flow = Flow::kBranch;
            d.i.run = mbarrier_wait;
            break;
        default:
            d.expect(2);
            d.destination(0), d.source(1, Type::u64);
            d.i.run = mbarrier_pending;
    }
}

// PTX ISA, section "griddepcontrol". Buffers of the launch that are `dependent` may be touched after the wait only, or
// by threads that are ordered after one that has waited.
inline void grid_wait(Machine& m, Warp& w, const Instr&, u32 mask) {
    Published p{m.block, {}, {}};
    p.known.set(m.grid_agent(), 1);
    acquire(w, mask, p);
}
inline void decode_griddepcontrol(Decoder& d) {
    d.expect(0);
    d.i.run = d.need_one({"launch_dependents", "wait"}) ? grid_wait : nothing;
}

}  // namespace ptx
