// What depends on the tensors' element type, as addresses, so that kernels are instantiated per compute type only.
#pragma once
#include "pack.h"
#include "plan.h"

namespace localattn::cpu {

struct BiasRow;

template <class V>
struct Codec {
    using T = typename V::T;
    void (*pack)(const void *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, T, T *, int64_t);
    void (*unpack)(const T *, int, int64_t, typename V::reg, void *, int64_t, int64_t);
    decltype(unpack) unpack_past_cache;  // what is not read soon, as it would not stay in a cache
    void (*add_query_bias)(const Plan &, const LaneTile &, const BiasRow &, int64_t, T, T *, T *);
    void (*add_key_bias)(const Plan &, const LaneTile &, const BiasRow &, T, T *);
    int64_t element_size;
};

// The address of an element of a tensor.
template <class V>
LOCALATTN_INLINE char *at(const Codec<V> &codec, const Tensor &t, int64_t offset) {
    return static_cast<char *>(t.data) + offset * codec.element_size;
}

// The offset of one head's row, the row0-th and row-th of the side's lists.
LOCALATTN_INLINE int64_t row_offset(const Plan &plan, const Tensor &t, int64_t batch, int64_t head, Side side,
                                    int64_t row0, int64_t row) {
    return batch * t.batch + head * t.head + plan.rows0(side).position[row0] * t.axis[0] +
           plan.rows1(side).position[row] * t.axis[1];
}
// From a row to the first lane of a tile, and from lane to lane.
LOCALATTN_INLINE int64_t lane_offset(const Plan &plan, const Tensor &t, Side side, const LaneTile &tile) {
    return plan.lane_axis.position(side, tile.phase, tile.lane) * t.axis[2];
}
LOCALATTN_INLINE int64_t lane_step(const Plan &plan, const Tensor &t, Side side) {
    return plan.lane_axis.period(side) * t.axis[2];
}

// A tile of one row of A as [channel][lane], words of channels where operands are words; `row` is the row's offset in
// the tensor.
template <class V>
LOCALATTN_INLINE void pack_tile(const Plan &plan, const Codec<V> &codec, const Tensor &t, int64_t row,
                                const LaneTile &tile, int64_t channels, typename V::T factor, typename V::T *out) {
    codec.pack(at(codec, t, row + lane_offset(plan, t, plan.a, tile)), lane_step(plan, t, plan.a), t.channel, 0,
               tile.count, V::lanes, channels, factor, out, V::lanes);
}
// The other way, times factor[lane], for a tile of either side.
template <class V>
LOCALATTN_INLINE void unpack_tile(const Plan &plan, const Codec<V> &codec, const typename V::T *in, Side side,
                                  const LaneTile &tile, int64_t channels, typename V::reg factor, const Tensor &t,
                                  int64_t row) {
    codec.unpack(in, tile.count, channels, factor, at(codec, t, row + lane_offset(plan, t, side, tile)),
                 lane_step(plan, t, side), t.channel);
}

}  // namespace localattn::cpu
