// Compares modules of torch with what they were: attributes, hooks, and the values of their tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace bitorch_qlinear {

namespace py = pybind11;

// What an attribute of a module, or an entry of one of its tables, is compared with. fused.py names these numbers.
enum class Rule {
    anything = 0,  // its value does not matter, but its name and its place do
    same = 1,      // the same object, or an equal number or string of the same type
    empty = 2,     // an empty dict
    table = 3,     // a dict whose entries are compared by rules of their own
    tensor = 4,    // a tensor with the same type, shape, dtype and values at the same address
};

// The state of some modules, as far as rules say what matters.
//
// same() only returns true if nothing has changed. It may return false for other reasons, such as a tensor that was
// moved, so the caller then compares in another way. A call takes 6 us for 11 modules with 64 KB of values. Python and
// an operator took 11 us for the same.
class ModuleState {
  public:
    // Takes (module, rules) pairs, where rules are (name, number of the Rule, value) for each attribute in the order of
    // the module's __dict__. The value is the object for `same`, rules for `table`, and an index for `tensor`.
    // `pinned` are (owner, name, value), for attributes of classes. `tensors` are the tensors in the order of
    // `record`, which is the result of record_values (csrc/torch/record.cpp) for them. `exchange` is
    // torch.Tensor.__dlpack_c_exchange_api__ or None, with which there can be no tensors, and `is_negative` is
    // torch.Tensor.is_neg.
    //
    // The caller keeps `modules`, `pinned`, the types of modules and tensors, the record and the last two alive. This
    // object only has their addresses, so that Python's garbage collector sees every reference.
    ModuleState(const py::list& modules, const py::list& pinned, const py::list& tensors, const py::object& record,
                const py::object& exchange, const py::object& is_negative);

    // Returns whether nothing has changed, also not this thread's way to compute with subnormal numbers.
    bool same() const;

    // Looks up where the tensors are now. The caller has found that they have the recorded values.
    void locate(const py::list& tensors);

  private:
    struct Entry {
        PyObject *name, *value;
        Rule rule;
        size_t index;  // among the tables, or the tensors
    };
    using Table = std::vector<Entry>;
    struct Module {
        PyObject* module;
        PyTypeObject* type;
        Table attributes;
    };
    struct Pinned {
        PyObject *owner, *name, *value;
    };
    struct Form {  // of a tensor
        PyTypeObject* type;
        // As long as the storage has its address and its size, the memory is allocated, also if the tensor has another
        // storage by now. The storage refers to no other object, so the garbage collector need not know of it.
        py::object storage, storage_begin;  // the second is the storage's method data_ptr
        const void* begin;
        int64_t storage_bytes;
        const void* data;
        int64_t bytes;
        const uint8_t* recorded;
        int32_t code;  // DLPack's code and size of the dtype
        std::vector<int64_t> sizes, strides;
    };

    void note_lines(PyObject* dict, const Table& table);
    Table read_rules(const py::handle& rules);
    void find_records(const py::list& tensors, const Form& record);
    bool has_memory(const Form& form) const;
    bool same_table(PyObject* dict, const Table& table) const;
    bool same_tensor(PyObject* tensor, const Form& form) const;
    Form form_of(const py::handle& tensor) const;

    // The cache lines that same() reads, as far as they are known. They are fetched at once, because the last product
    // may have put them all out of the caches, and each of them leads to the next one. An address may be out of date.
    std::vector<const void*> lines_;
    std::vector<Module> modules_;
    std::vector<Pinned> pinned_;
    std::vector<Table> tables_;
    std::vector<Form> forms_;
    int (*read_)(void* object, void* out) = nullptr;  // DLPack's function
    PyObject* is_negative_;
};

void define_module_state(py::module_& module);

}  // namespace bitorch_qlinear
