// Exports csrc/cuda/heuristics.h from a shared library, so that tests/operators/test_heuristics.py can call it.

#include "cuda/heuristics.h"
#include <cstring>
using namespace bitorch_qlinear::cuda;

namespace {

// `capability` is that of the device, such as 86, plus 1000 times that of its code if this is another one.
Gpu gpu_of(int64_t capability, int64_t multiprocessors) {
    const int code = static_cast<int>(capability / 1000);
    return {static_cast<int>(capability % 1000), static_cast<int>(multiprocessors), code ? code : kNewest};
}

}  // namespace

extern "C" {
void choose_all(int64_t count, const int64_t (*queries)[5], int32_t* kernels, int32_t* tiles, int32_t* warpgroup_tiles,
                const char** reasons) {
    for (int64_t i = 0; i < count; ++i) {
        const auto& [capability, multiprocessors, m, n, k] = queries[i];
        const Gpu gpu = gpu_of(capability, multiprocessors);
        const Choice choice = choose(gpu, m, n, k);
        kernels[i] = static_cast<int>(choice.kernel);
        tiles[i] = static_cast<int>(choice.tile);
        warpgroup_tiles[i] = static_cast<int>(choice.warpgroup_tile);
        reasons[i] = choice.reason;
    }
}
void estimate_all(int64_t count, const int64_t (*queries)[5], double (*clocks)[kTiles]) {
    for (int64_t i = 0; i < count; ++i) {
        const auto& [capability, multiprocessors, m, n, k] = queries[i];
        const Gpu gpu = gpu_of(capability, multiprocessors);
        for (int tile = 0; tile < kTiles; ++tile) {
            clocks[i][tile] = estimated_clocks(static_cast<Tile>(tile), gpu, m, n, k);
        }
    }
}
void estimate_fragments(int64_t count, const int64_t (*queries)[5], double (*clocks)[2]) {
    for (int64_t i = 0; i < count; ++i) {
        const auto& [capability, multiprocessors, m, n, k] = queries[i];
        const Gpu gpu{static_cast<int>(capability), static_cast<int>(multiprocessors)};
        clocks[i][0] = estimated_fragment_clocks(gpu, m, n, k);
        clocks[i][1] = estimated_tile_clocks(gpu, m, n, k);
    }
}
void estimate_warpgroups(int64_t count, const int64_t (*queries)[5], double (*clocks)[kWarpgroupTiles]) {
    for (int64_t i = 0; i < count; ++i) {
        const auto& [capability, multiprocessors, m, n, k] = queries[i];
        for (int tile = 0; tile < kWarpgroupTiles; ++tile) {
            clocks[i][tile] = warpgroup_clocks(static_cast<WarpgroupTile>(tile), multiprocessors, m, n, k);
        }
    }
}
void read_warpgroup_tiles(int64_t* figures) {
    const int64_t all[] = {kWarpgroupRows,      kWarpgroupStageBits,  kWarpgroupColumns[0],
                           kWarpgroupStages[0], kWarpgroupColumns[1], kWarpgroupStages[1]};
    std::memcpy(figures, all, sizeof all);
}
const char* decide_in_words(const char* name, int capability, int multiprocessors, int64_t m, int64_t n, int64_t k,
                            int64_t value_bytes, bool float64) {
    static std::string text;
    const auto kernel = find_kernel(name);
    if (const auto* error = std::get_if<std::string>(&kernel)) return (text = "error: " + *error).c_str();
    const auto choice = decide(std::get<const KernelRecord*>(kernel), gpu_of(capability, multiprocessors), m, n, k,
                               value_bytes, float64);
    if (const auto* error = std::get_if<std::string>(&choice)) return (text = "error: " + *error).c_str();
    return (text = describe(std::get<Choice>(choice))).c_str();
}
void choose_for_real_x(int64_t count, const int64_t (*queries)[5], int64_t value_bytes, bool aligns, int32_t* kernels) {
    for (int64_t i = 0; i < count; ++i) {
        const auto& [capability, multiprocessors, m, n, k] = queries[i];
        const Gpu gpu = gpu_of(capability, multiprocessors);
        kernels[i] = static_cast<int>(choose(gpu, m, n, k, value_bytes, false, aligns).kernel);
    }
}
int fits(int64_t m, int64_t k) { return fits_fused(m, k); }
// The same with a forced tile.
const char* decide_tile_in_words(const char* tile, const char* name, int capability, int64_t m, int64_t n, int64_t k,
                                 bool float64) {
    static std::string text;
    const auto forced = find_tile(tile);
    if (const auto* error = std::get_if<std::string>(&forced)) return (text = "error: " + *error).c_str();
    const auto kernel = std::get<const KernelRecord*>(find_kernel(name));
    const auto choice = std::get<Choice>(decide(kernel, gpu_of(capability, 100), m, n, k, 0, float64));
    return (text = describe(with_tile(choice, std::get<TileSize>(forced), float64))).c_str();
}
// Returns whether launches depend on a device if BITORCH_QLINEAR_CUDA_EARLY_START has this value, or the error.
const char* depends_in_words(const char* early, int capability) {
    static std::string text;
    const auto found = find_early(early);
    if (const auto* error = std::get_if<std::string>(&found)) return (text = "error: " + *error).c_str();
    Gpu gpu = gpu_of(capability, 100);
    gpu.early = std::get<bool>(found);
    return launches_depend(gpu) ? "yes" : "no";
}
const char* names_of(int capability) {
    static std::string text;
    return (text = kernel_names(gpu_of(capability, 1))).c_str();
}
int is_legal(int kernel, int capability, int64_t m, int64_t k, int64_t value_bytes) {
    return legal(static_cast<GemmKernel>(kernel), gpu_of(capability, 1), m, k, value_bytes);
}
int is_supported(int capability) { return supported(capability); }
void read_record(int i, const char** name, int64_t* values) {
    const KernelRecord& kernel = record(static_cast<GemmKernel>(i));
    *name = kernel.name;
    const int64_t all[] = {static_cast<int>(kernel.kernel),
                           kernel.lowest,
                           kernel.highest,
                           kernel.aligned,
                           kernel.popcounts,
                           kernel.most_rows,
                           kernel.fused};
    std::memcpy(values, all, sizeof all);
}
void read_tile(int i, int capability, int64_t* shape, double* clocks, int64_t* blocks) {
    const Tile tile = static_cast<Tile>(i);
    const int64_t all[] = {kTileRows[i], kTileColumns[i], kTileSide[i], kTileBlocks[i], kTileStageBits, kTileStages};
    std::memcpy(shape, all, sizeof all);
    *clocks = stage_clocks(tile, multiprocessor(capability));
    *blocks = resident_blocks(tile, multiprocessor(capability));
}
}
