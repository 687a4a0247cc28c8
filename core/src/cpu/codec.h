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

// Numbers of a tile's lanes as [number][lane]: pack(first lane, stretch, out) writes those of one stretch, whose lanes
// begin there. Of joined phases all stretches but the first go through `scratch`, as large as `out`.
template <class V, class Pack>
LOCALATTN_INLINE void pack_stretches(const Plan &plan, const LaneTile &tile, int64_t numbers, typename V::T *out,
                                     typename V::T *scratch, const Pack &pack) {
    const auto body = [&](int64_t lane, const LaneAxis::Stretch &s) {
        pack(lane, s, lane == 0 ? out : scratch);
        if (lane == 0) return;
        typename V::mask before{};
        for (int64_t l = 0; l < lane; ++l) before[l] = -1;
        for (int64_t i = 0; i < numbers * V::lanes; i += V::lanes)
            V::store(out + i, V::choose(before, V::load(out + i), V::load(scratch + i)));
    };
    plan.lane_axis.each_stretch(plan.a, tile.phase, tile.lane, tile.count, body);
}

// A tile of one row of A as [channel][lane], words of channels where operands are words; `row` is the row's offset in
// the tensor.
template <class V>
LOCALATTN_INLINE void pack_tile(const Plan &plan, const Codec<V> &codec, const Tensor &t, int64_t row,
                                const LaneTile &tile, int64_t channels, typename V::T factor, typename V::T *out,
                                typename V::T *scratch) {
    const auto pack = [&](int64_t lane, const LaneAxis::Stretch &s, typename V::T *packed) {
        const int64_t step = s.step * t.axis[2];
        codec.pack(at(codec, t, row + s.position * t.axis[2] - lane * step), step, t.channel, lane, lane + s.lanes,
                   V::lanes, channels, factor, packed, V::lanes);
    };
    pack_stretches<V>(plan, tile, V::words(channels), out, scratch, pack);
}
// The other way, times factor[lane]. Reads up to a register beyond the last channel.
template <class V>
LOCALATTN_INLINE void unpack_tile(const Plan &plan, const Codec<V> &codec, const typename V::T *in, Side side,
                                  const LaneTile &tile, int64_t channels, typename V::reg factor, const Tensor &t,
                                  int64_t row) {
    alignas(64) typename V::T factors[2 * V::lanes];
    const auto body = [&](int64_t lane, const LaneAxis::Stretch &s) {
        if (lane > 0) {
            V::store(factors, factor);
            V::store(factors + V::lanes, factor);
        }
        codec.unpack(in + lane, static_cast<int>(s.lanes), channels, lane == 0 ? factor : V::load(factors + lane),
                     at(codec, t, row + s.position * t.axis[2]), s.step * t.axis[2], t.channel);
    };
    plan.lane_axis.each_stretch(side, tile.phase, tile.lane, tile.count, body);
}

}  // namespace localattn::cpu
