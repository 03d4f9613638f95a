#include "wrong_form.h"

#include <atomic>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include "relaxed_capture.h"

namespace bitorch_qlinear::cuda {
namespace {

constexpr int kMostDevices = 128;  // torch's index of a device is a signed byte

// The records of all devices, or null until the first call of wrong_form_of.
std::atomic<WrongForm*> records{nullptr};

WrongForm* make_records(AllocateForDevices allocate) {
    constexpr size_t bytes = kMostDevices * sizeof(WrongForm);
    const RelaxedCapture relaxed;
    return static_cast<WrongForm*>(std::memset(allocate(bytes), 0, bytes));
}

}  // namespace

WrongForm* wrong_form_of(int32_t device_index, AllocateForDevices allocate) {
    static std::mutex mutex;
    if (device_index < 0 || device_index >= kMostDevices) {
        throw std::runtime_error("bitorch_qlinear: weight_prepared: expected None on device " +
                                 std::to_string(device_index) + ": prepared forms are used on the first " +
                                 std::to_string(kMostDevices) + " devices");
    }
    if (!records.load(std::memory_order_acquire)) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!records.load(std::memory_order_relaxed)) records.store(make_records(allocate), std::memory_order_release);
    }
    return records.load(std::memory_order_acquire) + device_index;
}

void report_wrong_form(int32_t device_index) {
    WrongForm* all = records.load(std::memory_order_acquire);
    if (!all || device_index < 0 || device_index >= kMostDevices) return;
    WrongForm& record = all[device_index];
    std::atomic_ref<uint32_t> seen(record.seen);
    if (seen.load(std::memory_order_relaxed) == 0 || seen.exchange(0, std::memory_order_acquire) == 0) return;
    const auto sizes = [](int64_t n, int64_t k) {
        return "n = " + std::to_string(n) + " and k = " + std::to_string(k);
    };
    const std::string got = record.form_n < 0 ? "a vector that prepare_weight did not make on CUDA"
                                              : "weights prepared for " + sizes(record.form_n, record.form_k);
    throw std::runtime_error("bitorch_qlinear: weight_prepared: expected weights prepared for " +
                             sizes(record.n, record.k) + ", got " + got +
                             "; this was an earlier call on the same device, whose outputs are NaN (-2147483648 in "
                             "int32, 0 in packed words)");
}

}  // namespace bitorch_qlinear::cuda
