// Prints the layout of the structs of csrc/cuda/kernels.h: a line for each field, with its offset and its code in
// Python's module struct, and a line for each struct, with its size.
#include <cstddef>
#include <cstdio>
#include <type_traits>
#include <utility>

#include "fused_plan.h"
#include "kernels.h"

using namespace bitorch_qlinear;
using namespace bitorch_qlinear::cuda;

namespace {

template <class T>
constexpr char code() {
    if (std::is_pointer_v<T>) return 'Q';
    if (std::is_same_v<T, bool>) return '?';
    if (std::is_same_v<T, double>) return 'd';
    if (std::is_same_v<T, int64_t>) return 'q';
    constexpr bool kInt = (std::is_same_v<T, DType> || std::is_same_v<T, int>) && sizeof(T) == 4;
    static_assert(sizeof(T) == 8 || sizeof(T) == 1 || kInt);
    return 'i';
}

}  // namespace

#define FIELD(Struct, member)                                                 \
    std::printf("%s %s %zu %c\n", #Struct, #member, offsetof(Struct, member), \
                code<decltype(std::declval<Struct&>().member)>())
#define END(Struct) std::printf("%s end %zu x\n", #Struct, sizeof(Struct))

int main() {
    FIELD(Pack, x), FIELD(Pack, dtype), FIELD(Pack, m), FIELD(Pack, k), FIELD(Pack, stride), FIELD(Pack, strict);
    FIELD(Pack, threshold), FIELD(Pack, words), FIELD(Pack, word_stride), FIELD(Pack, in_range), FIELD(Pack, popcounts);
    END(Pack);

    FIELD(PackLimited, x), FIELD(PackLimited, dtype), FIELD(PackLimited, m), FIELD(PackLimited, k);
    FIELD(PackLimited, stride), FIELD(PackLimited, strict), FIELD(PackLimited, limits), FIELD(PackLimited, flips);
    FIELD(PackLimited, words);
    END(PackLimited);

    FIELD(Unpack, words), FIELD(Unpack, m), FIELD(Unpack, k), FIELD(Unpack, values), FIELD(Unpack, dtype);
    END(Unpack);

    FIELD(Align, words), FIELD(Align, m), FIELD(Align, k), FIELD(Align, aligned), FIELD(Align, popcounts);
    FIELD(Align, header);
    END(Align);

    FIELD(Product, x.words), FIELD(Product, x.stride), FIELD(Product, x.popcounts);
    FIELD(Product, weight.words), FIELD(Product, weight.stride), FIELD(Product, weight.popcounts);
    FIELD(Product, m), FIELD(Product, n), FIELD(Product, k), FIELD(Product, y.data), FIELD(Product, y.dtype);
    FIELD(Product, y.scale.data), FIELD(Product, y.scale.dtype), FIELD(Product, y.bias.data);
    FIELD(Product, y.bias.dtype), FIELD(Product, wrong_form);
    END(Product);

    FIELD(FusedProduct, product.x.words), FIELD(FusedProduct, product.x.stride);
    FIELD(FusedProduct, product.x.popcounts), FIELD(FusedProduct, product.weight.words);
    FIELD(FusedProduct, product.weight.stride), FIELD(FusedProduct, product.weight.popcounts);
    FIELD(FusedProduct, product.m), FIELD(FusedProduct, product.n), FIELD(FusedProduct, product.k);
    FIELD(FusedProduct, product.y.data), FIELD(FusedProduct, product.y.dtype);
    FIELD(FusedProduct, product.y.scale.data), FIELD(FusedProduct, product.y.scale.dtype);
    FIELD(FusedProduct, product.y.bias.data), FIELD(FusedProduct, product.y.bias.dtype);
    FIELD(FusedProduct, product.wrong_form), FIELD(FusedProduct, x.data), FIELD(FusedProduct, x.dtype);
    FIELD(FusedProduct, x.stride), FIELD(FusedProduct, x.strict), FIELD(FusedProduct, multiprocessors);
    END(FusedProduct);

    FIELD(FusedPlan, width), FIELD(FusedPlan, pitch), FIELD(FusedPlan, parts), FIELD(FusedPlan, chunk);
    FIELD(FusedPlan, rounds), FIELD(FusedPlan, whole);
    END(FusedPlan);
}
