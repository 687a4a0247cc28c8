// The table of the tiles of attention in float32.
#pragma once
#include "../../problem.h"
#include "../simt_tiles.h"

namespace localattn::cuda::simt {

// By width of the channels and size of the window: lanes that share a strip, places of a strip, columns a step, warps,
// blocks a multiprocessor. A lane's slices of its places stay in registers, so that wider channels take more lanes; the
// gradients hold three or four slices a place, so that their strips are shorter. A block of 4 rows leaves fewer warps
// without work at a row of keys than one of 8, but two of them must fit the shared memory.
template <int width, int rows>
struct Tiles {
    static constexpr int slices = width <= 64 ? 4 : width / 16, blocks = 8 / rows;
    struct Forward : SimtTile<width, slices, 4, 2, rows, blocks> {};
    struct GradQuery : SimtTile<width, slices, 2, 2, rows, blocks> {};
    struct GradKey : SimtTile<width, slices, 2, 1, rows, blocks> {};
};

template <int width, class Visit>
auto with_rows(const Problem &p, Visit visit) {
    if (p.axis[2].kernel * width <= 13 * 64) return visit(Tiles<width, 4>());
    return visit(Tiles<width, 8>());
}

template <class Visit>
auto with_tiles(const Problem &p, Visit visit) {
    const int64_t widest = p.channels > p.value_channels ? p.channels : p.value_channels;
    if (widest <= 32) return with_rows<32>(p, visit);
    if (widest <= 64) return with_rows<64>(p, visit);
    if (widest <= 128) return with_rows<128>(p, visit);
    return with_rows<256>(p, visit);
}

}  // namespace localattn::cuda::simt
