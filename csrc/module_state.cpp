#include "module_state.h"

#include <cstring>
#include <stdexcept>
#include <utility>

#include "subnormals.h"

namespace bitorch_qlinear {
namespace {

// The parts of DLPack's C interface that are used here (dmlc.github.io/dlpack). Its layout does not change within
// version 1.
struct DLTensor {
    void* data;
    struct {
        int32_t type, index;
    } device;
    int32_t dims;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    const int64_t* sizes;
    const int64_t* strides;
    uint64_t byte_offset;
};

struct DLPackExchangeApi {
    struct {
        uint32_t major, minor;
    } version;
    void* previous;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*tensor_from_object)(void* object, void* out);
    void* current_stream;
};

constexpr size_t kLineBytes = 64;
constexpr int32_t kOnCpu = 1;
constexpr uint8_t kComplex = 5;
constexpr size_t kRecordUnit = sizeof(int64_t);

int32_t code_of(const DLTensor& tensor) {
    return tensor.dtype.code << 24 | tensor.dtype.bits << 16 | tensor.dtype.lanes;
}

const uint8_t* address_of(const DLTensor& tensor) {
    return static_cast<const uint8_t*>(tensor.data) + tensor.byte_offset;
}

// Returns whether two values of attributes cannot be told apart: 0.0 and -0.0 can, and 1 and True.
bool same_value(PyObject* a, PyObject* b) {
    if (a == b) return true;
    if (Py_TYPE(a) != Py_TYPE(b)) return false;
    if (PyFloat_CheckExact(a)) {
        const double x = PyFloat_AS_DOUBLE(a), y = PyFloat_AS_DOUBLE(b);
        return std::memcmp(&x, &y, sizeof x) == 0;
    }
    if (!PyLong_CheckExact(a) && !PyUnicode_CheckExact(a)) return false;
    return PyObject_RichCompareBool(a, b, Py_EQ) == 1;
}

}  // namespace

ModuleState::ModuleState(const py::list& modules, const py::list& pinned, const py::list& tensors,
                         const py::object& record, const py::object& exchange, const py::object& is_negative)
    : is_negative_(is_negative.ptr()) {
    if (!exchange.is_none()) {
        const auto* api =
            static_cast<const DLPackExchangeApi*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
        if (!api) throw py::error_already_set();
        if (api->version.major == 1) read_ = api->tensor_from_object;
    }
    if (!read_ && !tensors.empty()) throw std::runtime_error("exchange: expected DLPack's interface of version 1");
    if (!tensors.empty()) find_records(tensors, form_of(record));
    for (const py::handle& each : modules) {
        const py::tuple pair = py::reinterpret_borrow<py::tuple>(each);
        modules_.push_back({pair[0].ptr(), Py_TYPE(pair[0].ptr()), read_rules(pair[1])});
    }
    for (const Module& module : modules_) {
        lines_.push_back(module.module);
        const py::object dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.module, nullptr));
        if (!dict) throw py::error_already_set();
        note_lines(dict.ptr(), module.attributes);
    }
    for (const py::handle& each : pinned) {
        const py::tuple triple = py::reinterpret_borrow<py::tuple>(each);
        pinned_.push_back({triple[0].ptr(), triple[1].ptr(), triple[2].ptr()});
    }
}

void ModuleState::find_records(const py::list& tensors, const Form& record) {
    const auto *next = static_cast<const uint8_t*>(record.data), *end = next + record.bytes;
    for (const py::handle& tensor : tensors) {
        Form form = form_of(tensor);
        // A record has the dtype, the number of dimensions and the sizes before the values, and fills these up to 8.
        const size_t sizes_bytes = form.sizes.size() * kRecordUnit;
        const auto room = static_cast<size_t>(end - next), before = 2 * kRecordUnit + sizes_bytes;
        const size_t filled = (form.bytes + kRecordUnit - 1) / kRecordUnit * kRecordUnit;
        // Another thread may have exchanged a tensor since the values were recorded.
        if (room < before + filled ||
            (sizes_bytes && std::memcmp(next + 2 * kRecordUnit, form.sizes.data(), sizes_bytes) != 0)) {
            throw std::runtime_error("tensors: expected those of the record");
        }
        form.recorded = next + before;
        next = form.recorded + filled;
        forms_.push_back(std::move(form));
    }
}

void ModuleState::note_lines(PyObject* dict, const Table& table) {
    const auto note = [&](const void* address, size_t bytes) {
        const char* begin = static_cast<const char*>(address);
        for (size_t i = 0; i < bytes; i += kLineBytes) lines_.push_back(begin + i);
    };
    if (!PyDict_Check(dict)) return;
    note(dict, sizeof(PyDictObject));
    note(reinterpret_cast<PyDictObject*>(dict)->ma_keys, 64 + 32 * table.size());
    Py_ssize_t place = 0;
    PyObject *name = nullptr, *found = nullptr;
    for (const Entry& entry : table) {
        if (!PyDict_Next(dict, &place, &name, &found)) return;
        if (entry.rule == Rule::empty) note(found, 1);
        if (entry.rule == Rule::table) note_lines(found, tables_[entry.index]);
        if (entry.rule == Rule::tensor) {
            note(found, 1);
            note(forms_[entry.index].storage.ptr(), 1);
            note(forms_[entry.index].storage_begin.ptr(), 1);
            note(forms_[entry.index].data, 1);
            note(forms_[entry.index].recorded, 1);
        }
    }
}

ModuleState::Table ModuleState::read_rules(const py::handle& rules) {
    Table table;
    for (const py::handle& each : rules) {
        const py::tuple triple = py::reinterpret_borrow<py::tuple>(each);
        Entry entry{triple[0].ptr(), triple[2].ptr(), static_cast<Rule>(triple[1].cast<int>()), 0};
        if (entry.rule == Rule::tensor) {
            entry.index = triple[2].cast<size_t>();
            if (entry.index >= forms_.size()) throw std::out_of_range("rules: there is no such tensor");
        }
        if (entry.rule == Rule::table) {
            Table inner = read_rules(triple[2]);
            entry.index = tables_.size();
            tables_.push_back(std::move(inner));
        }
        table.push_back(std::move(entry));
    }
    return table;
}

ModuleState::Form ModuleState::form_of(const py::handle& tensor) const {
    const py::object storage = tensor.attr("untyped_storage")(), storage_begin = storage.attr("data_ptr");
    DLTensor read{};
    if (read_(tensor.ptr(), &read) != 0) throw py::error_already_set();
    if (read.device.type != kOnCpu || read.dtype.code == kComplex || read.dtype.bits % 8 != 0 ||
        read.dtype.lanes != 1 || !read.strides) {
        throw std::runtime_error("tensors: expected real tensors of whole bytes on the CPU");
    }
    Form form{Py_TYPE(tensor.ptr()),
              storage,
              storage_begin,
              PyLong_AsVoidPtr(storage_begin().ptr()),
              PyObject_Size(storage.ptr()),
              address_of(read),
              read.dtype.bits / 8,
              nullptr,
              code_of(read),
              {read.sizes, read.sizes + read.dims},
              {read.strides, read.strides + read.dims}};
    bool is_contiguous = true;
    int64_t stride = 1;
    for (size_t i = form.sizes.size(); i-- > 0; stride *= form.sizes[i]) {
        if (form.sizes[i] != 1 && form.strides[i] != stride) is_contiguous = false;
    }
    for (const int64_t size : form.sizes) form.bytes *= size;
    if (form.bytes && !is_contiguous) throw std::runtime_error("tensors: expected contiguous tensors");
    const uint8_t *begin = static_cast<const uint8_t*>(form.begin), *data = static_cast<const uint8_t*>(form.data);
    if (form.bytes && (data < begin || form.bytes > form.storage_bytes - (data - begin))) {
        throw std::runtime_error("tensors: expected tensors inside their storages");
    }
    return form;
}

void ModuleState::locate(const py::list& tensors) {
    if (tensors.size() != forms_.size()) throw std::invalid_argument("tensors: expected as many as before");
    for (size_t i = 0; i < forms_.size(); ++i) {
        Form form = form_of(tensors[i]);
        if (form.type != forms_[i].type || form.bytes != forms_[i].bytes || form.code != forms_[i].code ||
            form.sizes != forms_[i].sizes)
            return;
        form.recorded = forms_[i].recorded;
        forms_[i] = std::move(form);
    }
}

bool ModuleState::has_memory(const Form& form) const {
    const py::object begin = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(form.storage_begin.ptr()));
    const bool is_at_its_place = begin && PyLong_AsVoidPtr(begin.ptr()) == form.begin;
    const bool is_as_large = PyObject_Size(form.storage.ptr()) == form.storage_bytes;
    if (PyErr_Occurred()) PyErr_Clear();
    return is_at_its_place && is_as_large;
}

bool ModuleState::same_tensor(PyObject* tensor, const Form& form) const {
    if (Py_TYPE(tensor) != form.type) return false;
    DLTensor read{};
    if (read_(tensor, &read) != 0) {
        PyErr_Clear();
        return false;
    }
    // At another address, the caller first finds out how much memory there is.
    if (address_of(read) != form.data || code_of(read) != form.code || read.device.type != kOnCpu ||
        read.dims != static_cast<int32_t>(form.sizes.size()) || !read.strides) {
        return false;
    }
    const size_t sizes_bytes = form.sizes.size() * sizeof(int64_t);
    if (sizes_bytes && (std::memcmp(read.sizes, form.sizes.data(), sizes_bytes) != 0 ||
                        std::memcmp(read.strides, form.strides.data(), sizes_bytes) != 0)) {
        return false;
    }
    if (form.bytes && (!has_memory(form) || std::memcmp(form.data, form.recorded, form.bytes) != 0)) return false;
    // torch negates such a tensor only when it reads it, and DLPack does not tell. The call releases the GIL.
    const py::object negative = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_negative_, tensor));
    if (!negative) PyErr_Clear();
    return negative.ptr() == Py_False;
}

bool ModuleState::same_table(PyObject* dict, const Table& table) const {
    // A subclass such as OrderedDict may have another order than PyDict_Next.
    if (!PyDict_CheckExact(dict) || PyDict_Size(dict) != static_cast<Py_ssize_t>(table.size())) return false;
    Py_ssize_t place = 0;
    PyObject *name = nullptr, *borrowed = nullptr;
    for (const Entry& entry : table) {
        if (!PyDict_Next(dict, &place, &name, &borrowed) || name != entry.name) return false;
        // same_tensor lets other threads run, which may take the value out of the dict.
        const py::object value = py::reinterpret_borrow<py::object>(borrowed);
        PyObject* found = value.ptr();
        switch (entry.rule) {
            case Rule::anything: break;
            case Rule::same:
                if (!same_value(found, entry.value)) return false;
                break;
            case Rule::empty:
                if (!PyDict_Check(found) || PyDict_Size(found) != 0) return false;
                break;
            case Rule::table:
                if (!same_table(found, tables_[entry.index])) return false;
                break;
            case Rule::tensor:
                if (!same_tensor(found, forms_[entry.index])) return false;
                break;
        }
    }
    return true;
}

bool ModuleState::same() const {
    for (const void* line : lines_) __builtin_prefetch(line);
    if (!forms_.empty() && flushes_subnormals()) return false;
    for (const Pinned& pinned : pinned_) {
        const py::object found = py::reinterpret_steal<py::object>(PyObject_GetAttr(pinned.owner, pinned.name));
        if (!found) PyErr_Clear();
        if (found.ptr() != pinned.value) return false;
    }
    for (const Module& module : modules_) {
        if (Py_TYPE(module.module) != module.type) return false;
        const py::object dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.module, nullptr));
        if (!dict) PyErr_Clear();
        if (!dict || !same_table(dict.ptr(), module.attributes)) return false;
    }
    return true;
}

void define_module_state(py::module_& module) {
    py::class_<ModuleState>(module, "ModuleState")
        .def(py::init<const py::list&, const py::list&, const py::list&, const py::object&, const py::object&,
                      const py::object&>())
        .def("same", &ModuleState::same)
        .def("locate", &ModuleState::locate);
}

}  // namespace bitorch_qlinear
