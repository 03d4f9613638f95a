// Decodes an opcode with its modifiers and operands into an Instr. A modifier that no family takes is an error.
#pragma once
#include <initializer_list>

#include "memory.h"

namespace ptx {

struct Decoder {
    Program& program;
    const Operand* operands;
    Instr& i;
    std::string name;               // the opcode as written
    std::vector<std::string> mods;  // the modifiers after the family's name; those that were taken are removed
    std::vector<int> at;            // at[k] is the index at which operand k begins

    Decoder(Program& program, const Operand* operands, int count, Instr& i, const std::string& opcode)
        : program(program), operands(operands), i(i), name(opcode) {
        for (int k = 0; k < count; ++k) {
            at.push_back(k);
            if (operands[k].kind == kVector || operands[k].kind == kTargets || operands[k].kind == kTensor)
                k += operands[k].count;
        }
        for (size_t from = 0; from <= opcode.size();) {  // "L1::no_allocate" is one modifier
            const size_t to = std::min(opcode.find('.', from), opcode.size());
            mods.push_back(opcode.substr(from, to - from));
            from = to + 1;
        }
        mods.erase(mods.begin());
    }

    [[noreturn]] void error(const std::string& what) const { throw std::runtime_error("'" + name + "': " + what); }
    [[noreturn]] void unsupported_type() const { error("not known for this type"); }

    int count() const { return static_cast<int>(at.size()); }
    const Operand& operand(int k) const {
        if (k >= count()) error("too few operands");
        return operands[at[k]];
    }

    bool take(const char* mod) {
        for (size_t k = 0; k < mods.size(); ++k) {
            if (mods[k] == mod) {
                mods.erase(mods.begin() + static_cast<s64>(k));
                return true;
            }
        }
        return false;
    }
    // Returns the index of the name that is present, and takes it; -1 if none is.
    int take_one(std::initializer_list<const char*> names) {
        int index = 0;
        for (const char* one : names) {
            if (take(one)) return index;
            ++index;
        }
        return -1;
    }
    int need_one(std::initializer_list<const char*> names) {
        const int index = take_one(names);
        if (index < 0) error(std::string("lacks one of .") + *names.begin() + ", ...");
        return index;
    }
    // Returns the first type among the modifiers, and takes it.
    Type take_type() {
        for (size_t k = 0; k < mods.size(); ++k) {
            const Type type = type_named(mods[k]);
            if (type != Type::kNone) {
                mods.erase(mods.begin() + static_cast<s64>(k));
                return type;
            }
        }
        error("lacks a type");
    }
    void done() const {
        if (!mods.empty()) error("the modifier '." + mods[0] + "' is not known here");
        if (!i.run) error("not known");
    }
    void expect(int operands) const {
        if (count() != operands) error("has " + std::to_string(count()) + " operands, not " + std::to_string(operands));
    }

    static u64 convert(const Operand& o, Type type) {
        if (o.kind == kImmediate) {
            if (type == Type::f32) return put(static_cast<float>(o.value));
            if (type == Type::f64) return put(static_cast<double>(o.value));
            return static_cast<u64>(o.value) &
                   mask_of(type == Type::kNone || type == Type::b128 ? 64 : info(type).bytes * 8);
        }
        const double value =
            o.kind == kFloat32 ? get<float>(static_cast<u64>(o.value)) : get<double>(static_cast<u64>(o.value));
        switch (type) {
            case Type::f64: return put(value);
            case Type::f16: return put(from_double<f16>(value));
            case Type::bf16: return put(from_double<bf16>(value));
            // A literal of 32 bits keeps its bits (a .b32 move of 0f...); another one is rounded.
            default:
                return o.kind == kFloat32 ? static_cast<u64>(o.value) & 0xffffffffu : put(static_cast<float>(value));
        }
    }
    s32 row_of(const Operand& o, Type type) {
        switch (o.kind) {
            case kRegister: return o.reg;
            case kImmediate:
                if (type == Type::pred) return program.constant(o.value != 0);
                return program.constant(convert(o, type));
            case kFloat32:
            case kFloat64: return program.constant(convert(o, type));
            default: error("an operand is neither a register nor a number");
        }
    }
    void push_source(const Operand& o, Type type) {
        i.s.push_back(row_of(o, type));
        i.negated.push_back(o.kind == kRegister && o.count == 1);
    }
    void source(int k, Type type) { push_source(operand(k), type); }
    void push_destination(const Operand& o) {
        if (o.kind == kSink) {
            i.d.push_back(kNoRow);
        } else if (o.kind == kRegister) {
            if (i.d.empty()) i.d_mask = mask_of(program.bits[o.reg]);
            i.d.push_back(o.reg);
        } else {
            error("the destination is not a register");
        }
    }
    void destination(int k) { push_destination(operand(k)); }
    bool is_vector(int k) const { return operand(k).kind == kVector; }
    int vector_size(int k) const { return is_vector(k) ? operand(k).count : 1; }
    const Operand& element(int k, int e) const { return is_vector(k) ? operands[at[k] + 1 + e] : operand(k); }
    void destinations(int k) {
        for (int e = 0; e < vector_size(k); ++e) push_destination(element(k, e));
    }
    void sources(int k, Type type) {
        for (int e = 0; e < vector_size(k); ++e) push_source(element(k, e), type);
    }
    void address(int k) {
        const Operand& o = operand(k);
        if (o.kind != kAddress) error("an operand is not an address");
        i.s.push_back(o.reg >= 0 ? o.reg : program.constant(0));
        i.negated.push_back(0);
        i.offset = o.value;
    }
    s64 immediate(int k) const {
        const Operand& o = operand(k);
        if (o.kind != kImmediate) error("an operand is not a number");
        return o.value;
    }
    Round rounding(const char* const (&names)[4] = {"rn", "rz", "rm", "rp"}) {
        for (int k = 0; k < 4; ++k)
            if (take(names[k])) return static_cast<Round>(k);
        return Round::kNearest;
    }
};

using Decode = void (*)(Decoder&);
struct Family {
    const char* name;
    Decode decode;
};

// ---- Lane by lane ---------------------------------------------------------------------------------------------------
template <class R, class A, class F>
void unary(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64* a = m.in(w, i.s[0]);
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) { d[l] = put<R>(F::template of<A>(get<A>(a[l]))); });
}
template <class R, class A, class B, class F>
void binary(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64 *a = m.in(w, i.s[0]), *b = m.in(w, i.s[1]);
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) { d[l] = put<R>(F::template of<A>(get<A>(a[l]), get<B>(b[l]))); });
}
template <class R, class A, class B, class C, class F>
void ternary(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64 *a = m.in(w, i.s[0]), *b = m.in(w, i.s[1]), *c = m.in(w, i.s[2]);
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) { d[l] = put<R>(F::template of<A>(get<A>(a[l]), get<B>(b[l]), get<C>(c[l]))); });
}

// Calls f.operator()<T>() for the C++ type of an integer or untyped PTX type; returns false for any other type.
template <class F>
bool with_integer(Type type, F&& f) {
    switch (type) {
        case Type::u8:
        case Type::b8: f.template operator()<u8>(); return true;
        case Type::s8: f.template operator()<s8>(); return true;
        case Type::u16:
        case Type::b16: f.template operator()<u16>(); return true;
        case Type::u32:
        case Type::b32: f.template operator()<u32>(); return true;
        case Type::u64:
        case Type::b64: f.template operator()<u64>(); return true;
        case Type::s16: f.template operator()<s16>(); return true;
        case Type::s32: f.template operator()<s32>(); return true;
        case Type::s64: f.template operator()<s64>(); return true;
        default: return false;
    }
}
template <class F>
bool with_float(Type type, F&& f) {
    switch (type) {
        case Type::f16: f.template operator()<f16>(); return true;
        case Type::bf16: f.template operator()<bf16>(); return true;
        case Type::f32: f.template operator()<float>(); return true;
        case Type::f64: f.template operator()<double>(); return true;
        default: return false;
    }
}
template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
using Wide = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, s128, u128>,
                                std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, s64, u64>,
                                                   std::conditional_t<std::is_signed_v<T>, s32, u32>>>;

}  // namespace ptx
