// Helpers of the standalone tests: random numbers, buffers that detect accesses outside, failures with a message.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <random>
#include <string>
#include <vector>

namespace test {

inline std::mt19937_64 generator{1};

inline int64_t below(int64_t bound) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(bound)); }

[[noreturn]] inline void fail(const std::string& what) {
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    std::exit(1);
}

inline void expect(bool holds, const std::string& what) {
    if (!holds) fail(what);
}

// Fails unless the call throws an exception whose message begins with `beginning`.
template <class Call>
void expect_refused(const std::string& beginning, const Call& call) {
    std::string message = "nothing";
    try {
        call();
    } catch (const std::exception& error) {
        message = error.what();
    }
    expect(message.rfind(beginning, 0) == 0, "expected \"" + beginning + "\", got " + message);
}

// `count` values of T, shifted by `shift` values from an aligned address. Guard bytes precede them. They are followed
// by guard bytes (Output), or by the end of the allocation, which a sanitizer watches (Input).
enum class Use { Input, Output };

template <class T>
class Buffer {
  public:
    Buffer(Use use, int64_t count, int64_t shift = 0, size_t alignment = alignof(std::max_align_t))
        : begin_(kGuard + static_cast<size_t>(shift) * sizeof(T)),
          end_(begin_ + static_cast<size_t>(count) * sizeof(T)),
          size_(end_ + (use == Use::Output ? kGuard : 0)),
          memory_(allocate(alignment, size_)) {
        std::memset(memory_, kPattern, size_);
    }
    ~Buffer() { std::free(memory_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    T* data() { return reinterpret_cast<T*>(memory_ + begin_); }
    T& operator[](int64_t i) { return data()[i]; }
    size_t bytes() const { return end_ - begin_; }

    void check_guards(const std::string& what) const {
        const auto untouched = [](uint8_t byte) { return byte == kPattern; };
        expect(std::all_of(memory_, memory_ + begin_, untouched), what + ": written before the beginning");
        expect(std::all_of(memory_ + end_, memory_ + size_, untouched), what + ": written past the end");
    }

  private:
    static uint8_t* allocate(size_t alignment, size_t bytes) {
        void* memory = nullptr;
        expect(posix_memalign(&memory, alignment, bytes) == 0, "no memory");
        return static_cast<uint8_t*>(memory);
    }

    static constexpr size_t kGuard = 64;
    static constexpr uint8_t kPattern = 0xA5;
    size_t begin_, end_, size_;
    uint8_t* memory_;
};

}  // namespace test
