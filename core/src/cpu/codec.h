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

// A tile of one row of A as [channel][lane], words of channels where operands are words; `row` is the row's offset in
// the tensor.
template <class V>
LOCALATTN_INLINE void pack_tile(const Plan &plan, const Codec<V> &codec, const Tensor &t, int64_t row,
                                const LaneTile &tile, int64_t channels, typename V::T factor, typename V::T *out) {
    const LaneAxis &lane = plan.lane_axis;
    codec.pack(at(codec, t, row + lane.position(plan.a, tile.phase, tile.lane) * t.axis[2]),
               lane.period(plan.a) * t.axis[2], t.channel, 0, tile.count, V::lanes, channels, factor, out, V::lanes);
}
// The other way, times factor[lane].
template <class V>
LOCALATTN_INLINE void unpack_tile(const Plan &plan, const Codec<V> &codec, const typename V::T *in, Side side,
                                  const LaneTile &tile, int64_t channels, typename V::reg factor, const Tensor &t,
                                  int64_t row) {
    const LaneAxis &lane = plan.lane_axis;
    codec.unpack(in, tile.count, channels, factor,
                 at(codec, t, row + lane.position(side, tile.phase, tile.lane) * t.axis[2]),
                 lane.period(side) * t.axis[2], t.channel);
}

}  // namespace localattn::cpu
