// The operators' schemas. Each device registers its implementations in its own file.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(bitorch_qlinear, library) {
    // limits and flips are no keywords, as they are in Python: torch hands keywords to a batching rule without saying
    // how they are batched.
    library.def("pack_bits(Tensor x, bool strict=False, Tensor? limits=None, Tensor? flips=None) -> Tensor");
    library.def("unpack_bits(Tensor words, SymInt k, ScalarType dtype) -> Tensor");
    library.def("prepare_weight(Tensor weight_words, SymInt k, *, int? layout=None) -> Tensor");
    library.def(
        "binary_linear(Tensor x_words, Tensor weight_words, SymInt k, Tensor? bias=None, *, "
        "Tensor? weight_prepared=None, Tensor? scale=None, ScalarType? out_dtype=None, Tensor? out_limits=None, "
        "Tensor? out_flips=None) -> Tensor");
    library.def(
        "linear(Tensor x, Tensor weight_words, SymInt k, Tensor? bias=None, *, Tensor? weight_prepared=None, "
        "Tensor? scale=None, ScalarType? out_dtype=None, bool strict=False, Tensor? out_limits=None, "
        "Tensor? out_flips=None) -> Tensor");
    library.def(
        "sign_linear(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor? scale=None, ScalarType? out_dtype=None, "
        "bool strict=False, bool strict_weight=False) -> Tensor");
    library.def(
        "linear_train(Tensor x, Tensor weight_words, SymInt k, Tensor? bias=None, *, "
        "Tensor? weight_prepared=None, Tensor? scale=None, ScalarType? out_dtype=None, bool strict=False, "
        "float? threshold=None) -> (Tensor, Tensor, Tensor)");
    library.def(
        "dorefa_linear(Tensor x, Tensor weight_words, SymInt k, Tensor? bias=None, *, int bits=1, "
        "Tensor? weight_prepared=None, Tensor? scale=None, ScalarType? out_dtype=None) -> Tensor");
    library.def("multiply_signs(Tensor reals, Tensor sign_words, SymInt k, bool transpose=False) -> Tensor");
    library.def(
        "linear_chain(Tensor x, Tensor[] weights, SymInt k, Tensor[] limits, Tensor[] flips, "
        "Tensor? bias=None, *, Tensor[]? prepared=None, Tensor? scale=None, ScalarType? out_dtype=None, "
        "bool strict=False, Tensor[]? toggles=None) -> Tensor");
    library.def("record_values(Tensor[] tensors) -> Tensor");
    library.def("same_values(Tensor[] tensors, Tensor record) -> bool");
}
