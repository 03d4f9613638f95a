// Tests how work is shared among threads (csrc/cpu/threads.h), with std::thread, because a race detector does not
// understand the synchronization in torch's pool. Every kernel that the processor can run is compared with simple
// loops.
#include <atomic>
#include <bit>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/level_product.h"
#include "../../csrc/cpu/pack_portable.h"
#include "check.h"

namespace bitorch_qlinear {
namespace {

using test::expect, test::expect_refused;

struct StdThreads {
    int64_t workers;

    int64_t count() const { return workers; }
    template <class Function>
    void for_each(int64_t count, int64_t grain, const Function& function) const {
        const int64_t parts = std::min(workers, ceil_div(count, grain));
        std::vector<std::thread> threads;
        for (int64_t i = 0; i < parts; ++i) {
            threads.emplace_back([&, i] { function(count * i / parts, count * (i + 1) / parts); });
        }
        for (std::thread& thread : threads) thread.join();
    }
};

std::vector<uint32_t> random_words(int64_t rows, int64_t k) {
    std::mt19937 random(static_cast<uint32_t>(rows * 7919 + k));
    std::vector<uint32_t> words(static_cast<size_t>(rows * words_for(k)));
    for (uint32_t& word : words) word = random();
    return words;
}

template <class Threads>
std::vector<uint8_t> prepare(const Threads& threads, const Kernel& kernel, const std::vector<uint32_t>& words,
                             int64_t n, int64_t k) {
    std::vector<uint8_t> prepared(static_cast<size_t>(prepared_bytes(kernel.layout, n, k)));
    const Fingerprint fingerprint =
        take_fingerprint(kernel, words.data(), static_cast<int64_t>(words.size()), nullptr, 0);
    write_prepared(threads, kernel, words.data(), n, k, fingerprint, prepared.data());
    return prepared;
}

// Returns the kernels that the processor can run.
std::vector<const Kernel*> kernels() {
    std::vector<const Kernel*> found;
    std::istringstream names(available_kernels());
    for (std::string name; std::getline(names >> std::ws, name, ',');) {
        force_kernel(name);
        found.push_back(&active_kernel());
    }
    return found;
}

struct Problem {
    int64_t m, n, k;
};

// Computes y, which is bits if there are limits.
template <class Threads>
std::vector<int32_t> multiply_words(const Threads& threads, const Kernel& kernel, const Problem& p,
                                    const int32_t* limits = nullptr) {
    const std::vector<uint32_t> x = random_words(p.m, p.k), w = random_words(p.n, p.k);
    const std::vector<uint8_t> prepared = prepare(threads, kernel, w, p.n, p.k);
    std::vector<int32_t> y(static_cast<size_t>(p.m * (limits ? words_for(p.n) : p.n)), INT32_MIN);
    multiply(threads, kernel,
             {x.data(),
              w.data(),
              prepared.data() + kPanelsOffset,
              p.m,
              p.n,
              p.k,
              {y.data(), DType::int32, p.n, static_cast<int32_t>(p.k), nullptr, nullptr, limits}});
    return y;
}

std::vector<int32_t> plain_product(const Problem& p) {
    const std::vector<uint32_t> x = random_words(p.m, p.k), w = random_words(p.n, p.k);
    const int64_t words = words_for(p.k);
    std::vector<int32_t> y;
    for (int64_t i = 0; i < p.m * p.n; ++i) {
        const uint32_t *a = x.data() + i / p.n * words, *b = w.data() + i % p.n * words;
        int32_t count = 0;
        for (int64_t j = 0; j < words; ++j) count += std::popcount((a[j] ^ b[j]) & word_mask(j, p.k));
        y.push_back(static_cast<int32_t>(p.k) - 2 * count);
    }
    return y;
}

// Packs the bits popcount <= limit of a plain product k - 2 popcount.
std::vector<int32_t> pack_bits(const Problem& p, const std::vector<int32_t>& product, const int32_t* limits) {
    const int64_t width = words_for(p.n);
    std::vector<int32_t> words(static_cast<size_t>(p.m * width));
    for (int64_t i = 0; i < p.m * p.n; ++i) {
        const int64_t row = i / p.n, column = i % p.n;
        const uint32_t bit = (p.k - product[static_cast<size_t>(i)]) / 2 <= limits[column];
        words[static_cast<size_t>(row * width + column / kWordBits)] |= static_cast<int32_t>(bit << column % kWordBits);
    }
    return words;
}

// Returns small integers, so that every sum is exact.
std::vector<float> some_reals(const Problem& p) {
    std::vector<float> x(static_cast<size_t>(p.m * p.k));
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7) - 3;
    return x;
}

std::vector<float> multiply_signs(const StdThreads& threads, const Kernel& kernel, const Problem& p, bool transposed) {
    const std::vector<float> x = some_reals(p);
    const std::vector<uint32_t> words = transposed ? random_words(p.n, p.k) : random_words(p.k, p.n);
    std::vector<float> y(static_cast<size_t>(p.m * p.n), -0.5f);
    multiply_by_signs(threads, *kernel.sign_gemm,
                      {x.data(), DType::float32, p.m, p.k, p.k, 1, words.data(), transposed, p.n, y.data()});
    return y;
}

std::vector<float> plain_sign_product(const Problem& p, bool transposed) {
    const std::vector<float> x = some_reals(p);
    const int64_t rows = transposed ? p.n : p.k, row_values = transposed ? p.k : p.n;
    const std::vector<uint32_t> words = random_words(rows, row_values);
    std::vector<float> y(static_cast<size_t>(p.m * p.n));
    for (int64_t j = 0; j < p.k; ++j) {
        for (int64_t column = 0; column < p.n; ++column) {
            const int64_t row = transposed ? column : j, bit = transposed ? j : column;
            const uint32_t word = words[static_cast<size_t>(row * words_for(row_values) + bit / kWordBits)];
            const float sign = word >> bit % kWordBits & 1 ? 1.0f : -1.0f;
            for (int64_t i = 0; i < p.m; ++i) y[i * p.n + column] += sign * x[i * p.k + j];
        }
    }
    return y;
}

// Returns values that lie near levels of two bits.
std::vector<float> some_levels(const Problem& p) {
    std::vector<float> x(static_cast<size_t>(p.m * p.k));
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * i % 7) / 3 - 0.5f;
    return x;
}

std::vector<float> multiply_levels(const StdThreads& threads, const Kernel& kernel, const Problem& p, int bits) {
    const std::vector<float> x = some_levels(p);
    const std::vector<uint32_t> w = random_words(p.n, p.k);
    std::vector<float> y(static_cast<size_t>(p.m * p.n), -0.5f);
    const Rows rows{reinterpret_cast<const uint8_t*>(x.data()), DType::float32, p.m, p.k, p.k};
    const Channels none{nullptr, DType::float32, 1};
    bitorch_qlinear::multiply_levels(threads, kernel, rows, bits, Weights{w.data(), nullptr, p.n, p.k},
                                     Outputs{y.data(), DType::float32, none, none});
    return y;
}

std::vector<float> plain_level_product(const Problem& p, int bits) {
    const std::vector<float> x = some_levels(p);
    const std::vector<uint32_t> w = random_words(p.n, p.k);
    std::vector<int> levels;
    for (const float& value : x) {
        const LevelWords words = level_words_portable(&value, 1, bits);
        levels.push_back(static_cast<int>(words.low | words.high << 1));
    }
    std::vector<float> y;
    for (int64_t i = 0; i < p.m * p.n; ++i) {
        int sum = 0;
        for (int64_t j = 0; j < p.k; ++j) {
            const int level = levels[static_cast<size_t>(i / p.n * p.k + j)];
            const uint32_t word = w[static_cast<size_t>(i % p.n * words_for(p.k) + j / kWordBits)];
            sum += word >> j % kWordBits & 1 ? level : -level;
        }
        y.push_back(bits == 1 ? static_cast<float>(sum) : static_cast<float>(sum) * (1.0f / 3));
    }
    return y;
}

std::string name(const Kernel& kernel, const Problem& p, int64_t workers) {
    std::ostringstream text;
    text << kernel.name << ", m " << p.m << ", n " << p.n << ", k " << p.k << ", threads " << workers;
    return text.str();
}

constexpr int64_t kWorkers[] = {1, 2, 3, 7};

void check_products() {
    for (const Problem& p :
         {Problem{131, 400, 500}, {1, 9001, 2049}, {300, 65, 1111}, {515, 7, 11003}, {70, 2200, 1100}}) {
        expect(p.m * p.n * p.k > kSerialProducts && p.n * p.k > kSerialValues, "shared among threads");
        const std::vector<int32_t> expected = plain_product(p);
        std::vector<int32_t> limits(static_cast<size_t>(p.n));
        for (size_t i = 0; i < limits.size(); ++i)
            limits[i] = static_cast<int32_t>(p.k / 2 + static_cast<int64_t>(i % 7) - 3);
        const std::vector<int32_t> expected_bits = pack_bits(p, expected, limits.data());
        const std::vector<uint32_t> w = random_words(p.n, p.k);
        for (const Kernel* kernel : kernels()) {
            const std::vector<uint8_t> prepared = prepare(StdThreads{1}, *kernel, w, p.n, p.k);
            for (const int64_t workers : kWorkers) {
                expect(prepare(StdThreads{workers}, *kernel, w, p.n, p.k) == prepared, name(*kernel, p, workers));
                expect(multiply_words(StdThreads{workers}, *kernel, p) == expected, name(*kernel, p, workers));
                expect(multiply_words(StdThreads{workers}, *kernel, p, limits.data()) == expected_bits,
                       name(*kernel, p, workers) + ", bits");
            }
        }
    }
}

void check_sign_products() {
    for (const Problem& p : {Problem{33, 700, 300}, {3, 2100, 700}, {1, 9001, 500}}) {
        expect(p.m * p.n * p.k > kSerialSignProducts, "shared among threads");
        for (const bool transposed : {false, true}) {
            const std::vector<float> expected = plain_sign_product(p, transposed);
            for (const Kernel* kernel : kernels()) {
                for (const int64_t workers : kWorkers) {
                    expect(multiply_signs({workers}, *kernel, p, transposed) == expected,
                           name(*kernel, p, workers) + (transposed ? ", signs transposed" : ", signs"));
                }
            }
        }
    }
}

void check_level_products() {
    for (const Problem& p : {Problem{131, 400, 500}, {1, 3001, 7000}, {150, 1030, 333}}) {
        expect(p.m * p.n * p.k > kSerialProducts && p.n * p.k > kSerialValues, "shared among threads");
        for (const int bits : {1, 2}) {
            const std::vector<float> expected = plain_level_product(p, bits);
            for (const Kernel* kernel : kernels()) {
                for (const int64_t workers : kWorkers) {
                    expect(multiply_levels({workers}, *kernel, p, bits) == expected,
                           name(*kernel, p, workers) + ", levels");
                }
            }
        }
    }
}

// If threads get no workspace, the call reports that memory is exhausted.
void check_workspace_beyond_memory() {
    for (Kernel kernel : {*kernels().front(), kScalarKernel}) {
        kernel.workspace_bytes = [](int64_t, int64_t) { return INT64_MAX; };
        expect_refused("bitorch_qlinear: out of memory",
                       [&] { multiply_words(StdThreads{7}, kernel, {131, 400, 500}); });
    }
}

// Several threads call at the same time, and each shares its work. As the first calls in the process, they also choose
// the kernel.
void check_calls_at_once() {
    const Problem p{131, 400, 500};
    std::vector<std::vector<int32_t>> results(4);
    StdThreads{4}.for_each(4, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            results[static_cast<size_t>(i)] = multiply_words(StdThreads{2}, active_kernel(), p);
        }
    });
    const std::vector<int32_t> expected = plain_product(p);
    for (const std::vector<int32_t>& result : results) expect(result == expected, "calls at once");
}

// A pool of two threads that counts the calls, in total and at the same time, that share their work through it.
struct CountedThreads : StdThreads {
    std::atomic<int>* calls;
    std::atomic<int>* shared;

    template <class Function>
    void for_each(int64_t count, int64_t grain, const Function& function) const {
        expect(++*calls == 1, "two calls have the threads at the same time");
        ++*shared;
        StdThreads::for_each(count, grain, function);
        --*calls;
    }
};

// Of four callers, only one at a time gets the threads, the others compute alone, and all results are the same.
void check_one_call_at_a_time_is_shared() {
    const Problem p{131, 400, 500};
    const std::vector<int32_t> expected = plain_product(p);
    std::atomic<int> calls{0}, shared{0};
    const CountedThreads threads{{2}, &calls, &shared};
    StdThreads{4}.for_each(4, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            for (int repetition = 0; repetition < 3; ++repetition) {
                const OneAtATime<CountedThreads> turn(threads);
                expect(multiply_words(turn, active_kernel(), p) == expected, "while others compute");
            }
        }
    });
    expect(shared > 0, "no call had the threads");
    // The threads are free after these calls, and then held as long as an object lives that has asked for them.
    const OneAtATime<CountedThreads> holder(threads);
    expect(holder.count() == 2, "the threads are not free again");
    const OneAtATime<CountedThreads> other(threads);
    expect(other.count() == 1, "a second caller got the threads");
    const int before = shared;
    expect(multiply_words(other, active_kernel(), p) == expected, "alone");
    expect(shared == before, "a caller without threads shared its work");
}

}  // namespace
}  // namespace bitorch_qlinear

int main() {
    bitorch_qlinear::check_calls_at_once();
    bitorch_qlinear::check_one_call_at_a_time_is_shared();
    bitorch_qlinear::check_products();
    bitorch_qlinear::check_sign_products();
    bitorch_qlinear::check_level_products();
    bitorch_qlinear::check_workspace_beyond_memory();
    std::puts("threads: all passed");
}
