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
    void (*add_query_bias)(const Plan &, const LaneTile &, const BiasRow &, int64_t, T, T *, T *);
    void (*add_key_bias)(const Plan &, const LaneTile &, const BiasRow &, T, T *);
    int64_t element_size;
};

// The address of an element of a tensor.
template <class V>
LOCALATTN_INLINE char *at(const Codec<V> &codec, const Tensor &t, int64_t offset) {
    return static_cast<char *>(t.data) + offset * codec.element_size;
}

}  // namespace localattn::cpu
