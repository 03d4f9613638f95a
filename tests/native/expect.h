// Counts what holds and says what does not.
#pragma once

#include <cstdio>
#include <exception>
#include <string>

namespace expect {

inline int passed = 0, failed = 0;

inline void that(bool holds, const std::string& what) {
    ++(holds ? passed : failed);
    if (!holds) std::printf("not so: %s\n", what.c_str());
}

// That the call throws, with a message that begins so.
template <class Call>
void refused(const std::string& beginning, const Call& call) {
    std::string message = "nothing thrown";
    try {
        call();
    } catch (const std::exception& error) {
        message = error.what();
    }
    that(message.rfind(beginning, 0) == 0, "refused with \"" + beginning + "\", but: " + message);
}

// The exit status of main.
inline int summary(const char* name) {
    std::printf("%s: %d passed, %d failed\n", name, passed, failed);
    return failed > 0 || passed == 0;
}

}  // namespace expect
