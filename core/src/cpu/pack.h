// Between tensors of any element type and strides, and packed [channel][position] blocks of the kernel's type.
//
// Bytes: every element is read or written once; a block of lanes x lanes is transposed in registers when channels are
// contiguous (channels-last), copied when positions are (channels-first), gathered one by one otherwise.
#pragma once
#include <type_traits>
#include <utility>

#include "dot_vector.h"

namespace localattn::cpu {

// In place: row i, lane j  ->  row j, lane i. log2(lanes) rounds, each exchanging blocks of half the size.
template <class V>
LOCALATTN_INLINE void transpose(typename V::reg (&row)[V::lanes]) {
    V::Isa::transpose(row);
}

// Lanes [from, to) of a register, the others zero. What lies outside is not touched.
template <class V, class Element>
LOCALATTN_INLINE typename V::reg load_some(const Element *p, int from, int to) {
    using T = typename V::T;
    if constexpr (V::Isa::masks && std::is_same_v<Element, T>) return V::Isa::load_some(p, from, to);
    alignas(64) T t[V::lanes] = {};
    for (int i = from; i < to; ++i) t[i] = load_as<T>(p + i);
    return V::load(t);
}
template <class V, class Element>
LOCALATTN_INLINE void store_some(Element *p, typename V::reg x, int count) {
    using T = typename V::T;
    if (count == V::lanes) return V::store_as(p, x);
    if constexpr (V::Isa::masks && std::is_same_v<Element, T>) return V::Isa::store_some(p, x, count);
    alignas(64) T t[V::lanes];
    V::store(t, x);
    for (int i = 0; i < count; ++i) store_from(t[i], p + i);
}

// Up to lanes positions x lanes channels, transposed; positions outside [from, to) count as zeros. The loops over
// registers are unrolled: an index that is not a constant would put them into memory.
template <class V, bool Whole, class Element>
LOCALATTN_INLINE void pack_block(const Element *in, int64_t position, int from, int to, int channels,
                                 typename V::reg factor, typename V::T *out, int64_t out_channel) {
    typename V::reg row[V::lanes];
    LOCALATTN_UNROLL
    for (int l = 0; l < V::lanes; ++l) {
        if constexpr (Whole)
            row[l] = V::load_as(in + l * position);
        else
            row[l] = l >= from && l < to ? load_some<V>(in + l * position, 0, channels) : typename V::reg{};
        V::hold(row[l]);
    }
    transpose<V>(row);
    LOCALATTN_UNROLL
    for (int l = 0; l < V::lanes; ++l)
        if (Whole || l < channels) V::store(out + l * out_channel, factor * row[l]);
}
template <class V, class Element>
__attribute__((noinline)) static void pack_part(const Element *in, int64_t position, int from, int to, int channels,
                                                typename V::reg factor, typename V::T *out, int64_t out_channel) {
    pack_block<V, false>(in, position, from, to, channels, factor, out, out_channel);
}

// out[c * out_channel + x] = factor * in[x * position + c * channel] for x in [from, to), 0 for the other x of
// [0, columns); columns is a multiple of lanes. `in` is the address of x = 0, which need not exist.
template <class V, class Element>
static void pack(const void *source, int64_t position, int64_t channel, int64_t from, int64_t to, int64_t columns,
                 int64_t channels, typename V::T factor, typename V::T *out, int64_t out_channel) {
    using T = typename V::T;
    using reg = typename V::reg;
    const Element *in = static_cast<const Element *>(source);
    constexpr int L = V::lanes;
    const reg f = V::all(factor);
    if (position == 1 && channel != 1) {
        // One channel after the other: each lies in pages of its own.
        const int64_t whole_from = from <= 0 ? 0 : (from + L - 1) / L * L,
                      whole_to = to / L * L < columns ? to / L * L : columns;
        for (int64_t c = 0; c < channels; ++c) {
            const Element *p = in + c * channel;
            T *o = out + c * out_channel;
            for (int64_t x = 0; x < columns; x += L) {
                if (x >= whole_from && x < whole_to) {
                    V::store(o + x, f * V::load_as(p + x));
                    continue;
                }
                const int64_t lo = from > x ? from - x : 0, hi = to < x + L ? to - x : L;
                V::store(o + x, lo < hi ? f * load_some<V>(p + x, static_cast<int>(lo), static_cast<int>(hi)) : reg{});
            }
        }
        return;
    }
    for (int64_t x = 0; x < columns; x += L) {
        const int64_t lo = from > x ? from - x : 0, hi = to < x + L ? to - x : L;
        T *o = out + x;
        if (lo >= hi) {
            for (int64_t c = 0; c < channels; ++c) V::store(o + c * out_channel, reg{});
        } else if (channel == 1) {
            const int from_lane = static_cast<int>(lo), to_lane = static_cast<int>(hi);
            const Element *p = in + x * position;
            for (int64_t c = 0; c < channels; c += L) {
                const int some = static_cast<int>(channels - c < L ? channels - c : L);
                if (lo == 0 && hi == L && some == L)
                    pack_block<V, true>(p + c, position, 0, L, L, f, o + c * out_channel, out_channel);
                else
                    pack_part<V>(p + c, position, from_lane, to_lane, some, f, o + c * out_channel, out_channel);
            }
        } else {
            for (int64_t c = 0; c < channels; ++c) {
                alignas(64) T t[L] = {};
                const Element *p = in + x * position + c * channel;
                for (int64_t l = lo; l < hi; ++l) t[l] = load_as<T>(p + l * position);
                V::store(o + c * out_channel, f * V::load(t));
            }
        }
    }
}

// The same to words of channels (c, c + 1), for vectors whose operands are words: out[c / 2 * out_channel + x]. An odd
// number of channels ends with a word whose high half is 0. Nothing is multiplied: that would be rounded.
template <class V, bool Whole>
LOCALATTN_INLINE void pack_words_block(const bfloat16 *in, int64_t position, int from, int to, int channels,
                                       typename V::T *out, int64_t out_channel) {
    typename V::reg row[V::lanes];
    LOCALATTN_UNROLL
    for (int l = 0; l < V::lanes; ++l) {
        // What is left out is not touched.
        row[l] = V::Isa::load_some(in + l * position, Whole ? 2 * V::lanes : l >= from && l < to ? channels : 0);
        V::hold(row[l]);
    }
    transpose<V>(row);
    LOCALATTN_UNROLL
    for (int l = 0; l < V::lanes; ++l)
        if (Whole || 2 * l < channels) V::store(out + l * out_channel, row[l]);
}
template <class V>
static void pack_words(const void *source, int64_t position, int64_t channel, int64_t from, int64_t to, int64_t columns,
                       int64_t channels, typename V::T, typename V::T *out, int64_t out_channel) {
    using T = typename V::T;
    using reg = typename V::reg;
    const bfloat16 *in = static_cast<const bfloat16 *>(source);
    constexpr int L = V::lanes;
    for (int64_t x = 0; x < columns; x += L) {
        const int lo = static_cast<int>(from > x ? (from - x < L ? from - x : L) : 0);
        const int hi = static_cast<int>(to < x + L ? (to > x ? to - x : 0) : L);
        const bfloat16 *p = in + x * position;
        T *o = out + x;
        if (lo >= hi) {
            for (int64_t w = 0; w < V::words(channels); ++w) V::store(o + w * out_channel, reg{});
        } else if (channel == 1) {
            for (int64_t c = 0; c < channels; c += 2 * L, o += L * out_channel) {
                const int some = static_cast<int>(channels - c < 2 * L ? channels - c : 2 * L);
                if (lo == 0 && hi == L && some == 2 * L)
                    pack_words_block<V, true>(p + c, position, 0, L, some, o, out_channel);
                else
                    pack_words_block<V, false>(p + c, position, lo, hi, some, o, out_channel);
            }
        } else {
            const auto load = [&](int64_t c) {
                if (c >= channels) return reg{};
                if (position == 1 && lo == 0 && hi == L) return V::load_as(p + c * channel);
                alignas(64) T t[L] = {};
                for (int l = lo; l < hi; ++l) t[l] = load_as<T>(p + l * position + c * channel);
                return V::load(t);
            };
            for (int64_t c = 0; c < channels; c += 2, o += out_channel) V::store(o, V::join(load(c), load(c + 1)));
        }
    }
}

// From words of channels to words of positions: out[c * row + x] holds positions x and x + step. After the last channel
// come `zeros`. `in` has a register and a step more than its last row, which come into no word that a window has.
template <class V>
static void words_of_positions(const typename V::T *in, int64_t channels, int64_t row, int64_t step, int64_t zeros,
                               typename V::T *out) {
    for (int64_t c = 0; c < channels; c += 2, in += row, out += 2 * row) {
        const bool pair = c + 1 < channels;
        for (int64_t x = 0; x < row; x += V::lanes) {
            const typename V::reg here = V::load(in + x), after = V::load(in + x + step);
            V::store(out + x, V::low_halves(here, after));
            if (pair) V::store(out + row + x, V::high_halves(here, after));
        }
    }
    if (channels % 2) out -= row;
    for (int64_t x = 0; x < zeros; x += V::lanes) V::store(out + x, typename V::reg{});
}

template <class V, bool Whole, class Element>
LOCALATTN_INLINE void unpack_block(const typename V::T *in, typename V::reg factor, int count, int channels,
                                   Element *out, int64_t position) {
    typename V::reg row[V::lanes];
    LOCALATTN_UNROLL
    for (int l = 0; l < V::lanes; ++l)
        row[l] = Whole || l < channels ? factor * V::load(in + l * V::lanes) : typename V::reg{};
    transpose<V>(row);
    LOCALATTN_UNROLL
    for (int l = 0; l < V::lanes; ++l) {
        if constexpr (Whole)
            V::store_as(out + l * position, row[l]);
        else if (l < count)
            store_some<V>(out + l * position, row[l], channels);
    }
}
template <class V, class Element>
__attribute__((noinline)) static void unpack_part(const typename V::T *in, typename V::reg factor, int count,
                                                  int channels, Element *out, int64_t position) {
    unpack_block<V, false>(in, factor, count, channels, out, position);
}

// Whether whole registers at p and `step` elements further on are cache lines.
template <class Element>
LOCALATTN_INLINE bool begin_lines(const Element *p, int64_t step) {
    return (reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(step) * sizeof(Element)) % 64 == 0;
}
// To be called by each thread that wrote lines past the caches, before others may read them.
LOCALATTN_INLINE void publish_lines() {
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#endif
}

// `count` positions of whole registers of channels, past the caches.
template <class V>
__attribute__((noinline)) static void unpack_lines(const typename V::T *in, typename V::reg factor, int count,
                                                   typename V::T *out, int64_t position) {
    typename V::reg row[V::lanes];
    LOCALATTN_UNROLL
    for (int l = 0; l < V::lanes; ++l) row[l] = factor * V::load(in + l * V::lanes);
    transpose<V>(row);
    LOCALATTN_UNROLL
    for (int l = 0; l < V::lanes; ++l)
        if (l < count) V::Isa::store_line(out + l * position, row[l]);
}

// out[x * position + c * channel] = factor[x] * in[c * lanes + x] for x in [0, count), count <= lanes. With PastCache
// whole lines go past the caches.
template <class V, class Element, bool PastCache>
static void unpack(const typename V::T *in, int count, int64_t channels, typename V::reg factor, void *destination,
                   int64_t position, int64_t channel) {
    using T = typename V::T;
    Element *out = static_cast<Element *>(destination);
    constexpr int L = V::lanes;
    if constexpr (PastCache) {
        if (channel == 1 && channels % L == 0 && begin_lines(out, position)) {
            for (int64_t c = 0; c < channels; c += L) unpack_lines<V>(in + c * L, factor, count, out + c, position);
            return;
        }
        if (position == 1 && count == L && begin_lines(out, channel)) {
            for (int64_t c = 0; c < channels; ++c) V::Isa::store_line(out + c * channel, factor * V::load(in + c * L));
            return;
        }
    }
    if (channel == 1) {
        for (int64_t c = 0; c < channels; c += L) {
            const int some = static_cast<int>(channels - c < L ? channels - c : L);
            if (count == L && some == L)
                unpack_block<V, true>(in + c * L, factor, L, L, out + c, position);
            else
                unpack_part<V>(in + c * L, factor, count, some, out + c, position);
        }
    } else if (position == 1) {
        for (int64_t c = 0; c < channels; ++c) store_some<V>(out + c * channel, factor * V::load(in + c * L), count);
    } else {
        alignas(64) T t[L];
        for (int64_t c = 0; c < channels; ++c) {
            V::store(t, factor * V::load(in + c * L));
            for (int l = 0; l < count; ++l) store_from(t[l], out + l * position + c * channel);
        }
    }
}

// The same to bfloat16 through words of channels, for vectors that have them: one transpose for twice the channels.
template <class V, bool PastCache>
static void unpack_words(const typename V::T *in, int count, int64_t channels, typename V::reg factor,
                         void *destination, int64_t position, int64_t channel) {
    constexpr int L = V::lanes;
    if (channel != 1) return unpack<V, bfloat16, false>(in, count, channels, factor, destination, position, channel);
    bfloat16 *out = static_cast<bfloat16 *>(destination);
    const bool lines = PastCache && begin_lines(out, position);
    for (int64_t c = 0; c < channels; c += 2 * L, in += 2 * L * L, out += 2 * L) {
        const int some = static_cast<int>(channels - c < 2 * L ? channels - c : 2 * L);
        const auto load = [&](int i) { return i < some ? factor * V::load(in + i * L) : typename V::reg{}; };
        typename V::reg row[L];
        LOCALATTN_UNROLL
        for (int w = 0; w < L; ++w) row[w] = V::round(load(2 * w), load(2 * w + 1));
        transpose<V>(row);
        LOCALATTN_UNROLL
        for (int l = 0; l < L; ++l)
            if (l < count) {
                if (lines && some == 2 * L)
                    V::Isa::store_line(out + l * position, row[l]);
                else
                    V::Isa::store_some(out + l * position, row[l], some);
            }
    }
}

// One element per lane, as one expression: written to memory one by one and loaded as a register they would wait for
// the stores.
template <class V, class Element, size_t... Lane>
LOCALATTN_INLINE typename V::reg gather_all(const Element *p, int64_t position, std::index_sequence<Lane...>) {
    return typename V::reg{load_as<typename V::T>(p + static_cast<int64_t>(Lane) * position)...};
}

// One vector of `count` scalars at a stride; the other lanes are `rest`.
template <class V, class Element>
LOCALATTN_INLINE typename V::reg gather(const Element *p, int64_t position, int count, typename V::T rest) {
    using T = typename V::T;
    if (count == V::lanes) return gather_all<V>(p, position, std::make_index_sequence<V::lanes>());
    alignas(64) T t[V::lanes];
    for (int l = 0; l < V::lanes; ++l) t[l] = l < count ? load_as<T>(p + l * position) : rest;
    return V::load(t);
}

}  // namespace localattn::cpu
