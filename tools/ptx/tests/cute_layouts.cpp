// Prints what CuTe, NVIDIA's algebra of layouts, says about the matrices of wgmma and mma.sync: where their elements
// lie in shared memory, the descriptors, and which element each register of each thread holds. test_vendor.py reads it.
#include <cstdint>
#include <cstdio>

#include <cute/algorithm/functional.hpp>
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;

alignas(1024) uint8_t memory[256 * 1024];

// Lines "descriptor ROW_BYTES STEP BITS" for each 32 bytes of K, and "chunk ROW INDEX PLACE" for each 16 bytes.
template <class Atom, int Rows, int RowBytes>
void matrix(const char* name) {
    const auto layout = tile_to_shape(Atom{}, Shape<Int<Rows>, Int<RowBytes>>{});
    const auto whole = make_tensor(make_smem_ptr(memory), layout);
    std::printf("matrix %s %d %d\n", name, Rows, RowBytes);
    for (int step = 0; step < RowBytes / 32; ++step) {
        const auto tile = local_tile(whole, Shape<Int<Rows>, _32>{}, make_coord(0, step));
        const auto moved = static_cast<const uint8_t*>(raw_pointer_cast(tile.data())) - memory;
        // On the host CuTe takes 0 for the address, to which the tile's offset is added as to an iterator.
        const uint64_t bits =
            SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::K>(tile).desc_ + static_cast<uint64_t>(moved) / 16;
        std::printf("descriptor %d %llx\n", step, static_cast<unsigned long long>(bits));
    }
    for (int row = 0; row < Rows; ++row)
        for (int chunk = 0; chunk < RowBytes / 16; ++chunk) {
            const auto at = [&](int byte) { return &whole(row, 16 * chunk + byte) - memory; };
            for (int byte = 0; byte < 16; ++byte)
                if (at(byte) != at(0) + byte) std::printf("broken %d %d\n", row, chunk);
            std::printf("chunk %d %d %lld\n", row, chunk, static_cast<long long>(at(0)));
        }
}

// Lines "element THREAD VALUE INDEX": the index counts rows first.
template <class Layout>
void fragment(const char* name, Layout layout) {
    std::printf("fragment %s\n", name);
    for (int thread = 0; thread < size<0>(layout); ++thread)
        for (int value = 0; value < size<1>(layout); ++value)
            std::printf("element %d %d %d\n", thread, value, static_cast<int>(layout(thread, value)));
}
template <class Traits>
void fragments(const char* name) {
    char text[64];
    std::snprintf(text, sizeof text, "%s.a", name), fragment(text, typename Traits::ALayout{});
    std::snprintf(text, sizeof text, "%s.b", name), fragment(text, typename Traits::BLayout{});
    std::snprintf(text, sizeof text, "%s.c", name), fragment(text, typename Traits::CLayout{});
}

template <int Rows>
void matrices() {
    using namespace SM90::GMMA;
    matrix<Layout_K_INTER_Atom<uint8_t>, Rows, 32>("0");
    matrix<Layout_K_INTER_Atom<uint8_t>, Rows, 64>("0");
    matrix<Layout_K_SW32_Atom<uint8_t>, Rows, 32>("32");
    matrix<Layout_K_SW32_Atom<uint8_t>, Rows, 64>("32");
    matrix<Layout_K_SW64_Atom<uint8_t>, Rows, 64>("64");
    matrix<Layout_K_SW128_Atom<uint8_t>, Rows, 128>("128");
    matrix<Layout_K_SW128_Atom<uint8_t>, Rows, 256>("128");
}

int main() {
    matrices<64>();
    matrices<96>();
    fragment("wgmma.d8", SM90::GMMA::CLayout_64xN<8>{});
    fragment("wgmma.d24", SM90::GMMA::CLayout_64xN<24>{});
    fragment("wgmma.d256", SM90::GMMA::CLayout_64xN<256>{});
    fragment("wgmma.a", SM90::GMMA::ALayout_64x32{});  // of bytes; the bits of a byte lie where the byte does
    fragments<MMA_Traits<SM80_8x8x128_S32U1U1S32_TN_XORPOPC>>("m8n8k128");
    // CuTe's layout of A for m16n8k128 does not compile.
    fragment("m16n8k128.b", MMA_Traits<SM80_16x8x128_S32U1U1S32_TN_XORPOPC>::BLayout{});
    fragment("m16n8k128.c", MMA_Traits<SM80_16x8x128_S32U1U1S32_TN_XORPOPC>::CLayout{});
    fragments<MMA_Traits<SM80_16x8x256_S32U1U1S32_TN_XORPOPC>>("m16n8k256");
    fragments<MMA_Traits<SM80_16x8x16_S32S8S8S32_TN>>("m16n8k16");
    fragments<MMA_Traits<SM80_16x8x32_S32S8S8S32_TN>>("m16n8k32");
}
