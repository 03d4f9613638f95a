// Support for the operator libraries' plain C functions, which Python calls by ctypes.
#pragma once

#include <exception>
#include <string>

#define BITORCH_QLINEAR_EXPORT extern "C" __attribute__((visibility("default")))

namespace bitorch_qlinear {
namespace {

// Returns the string that `function` makes, or the message of the exception that it throws, because no exception may
// leave a C function. The memory belongs to the thread and lasts until its next call.
template <class Function>
const char* hold(const Function& function) {
    static thread_local std::string held;
    try {
        held = function();
    } catch (const std::exception& error) {
        held = error.what();
    }
    return held.c_str();
}

}  // namespace
}  // namespace bitorch_qlinear
