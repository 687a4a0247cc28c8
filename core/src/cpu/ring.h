// Packed rows of the walked side B, kept while neighbouring blocks need them; which rows of a block pair with which.
#pragma once
#include "codec.h"

namespace localattn::cpu {

inline constexpr double log2_e = 1.44269504088896340736, ln_2 = 0.693147180559945309417;

LOCALATTN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
LOCALATTN_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// A range of B's rows: every row [begin, end) of axis 1 for every row [begin0, end0) of axis 0.
struct Chunk {
    int64_t begin0, end0, begin, end;
    int64_t rows() const { return end - begin; }
    int64_t index(int64_t b0, int64_t b) const { return (b0 - begin0) * rows() + b - begin; }
};

// A block: `rows` neighbouring rows of A along axis 1, for one row of axis 0.
struct Block {
    int64_t row0, row;
    int rows;
};
// The offset of row `r` of a block.
LOCALATTN_INLINE int64_t row_of(const Plan &plan, const Tensor &t, const Job &job, const Block &block, int r) {
    return row_offset(plan, t, job.batch, job.head, plan.a, block.row0, block.row + r);
}

// The rows of a block that pair with one row of B: [begin, end), of which [partial_begin, partial_end) only up to the
// centre of the window (raster causal).
struct PairedRows {
    int begin, end, partial_begin, partial_end;
};
LOCALATTN_INLINE PairedRows paired_rows(const Plan &plan, const Block &block, int64_t b0, int64_t b) {
    const RowList &rows = plan.rows1();
    PairedRows paired{0, 0, 0, 0};
    const RowList &rows0 = plan.rows0();
    if (b0 < rows0.begin[block.row0] || b0 >= rows0.end[block.row0]) return paired;
    int r = 0;
    while (r < block.rows && (b < rows.begin[block.row + r] || b >= rows.end[block.row + r])) ++r;
    paired.begin = r;
    while (r < block.rows && b >= rows.begin[block.row + r] && b < rows.end[block.row + r]) ++r;
    paired.end = r;
    if (plan.problem->raster) {
        const bool from_queries = plan.a == Side::query;
        const int64_t query0 = from_queries ? block.row0 : b0, key0 = from_queries ? b0 : block.row0;
        const int64_t beyond = key0 - plan.axis0.centre[query0];
        if (beyond > 0) paired.end = paired.begin;
        if (beyond == 0) {
            const int64_t *centre = plan.axis1.centre;
            // Keys after the query's own row drop out; the key row that is its own takes part up to the centre.
            if (from_queries) {
                while (paired.begin < paired.end && centre[block.row + paired.begin] < b) ++paired.begin;
                paired.partial_begin = paired.partial_end = paired.begin;
                while (paired.partial_end < paired.end && centre[block.row + paired.partial_end] == b)
                    ++paired.partial_end;
            } else {
                while (paired.begin < paired.end && block.row + paired.end - 1 > centre[b]) --paired.end;
                paired.partial_begin = paired.partial_end = paired.end;
                if (paired.begin < paired.end && block.row + paired.end - 1 == centre[b]) --paired.partial_begin;
            }
        }
    }
    return paired;
}

// Rows of B that may pair with a block. With `outside`, rows outside the map that stay in the softmax are included.
LOCALATTN_INLINE Chunk reach(const Plan &plan, const Block &block, bool outside) {
    const RowList &rows0 = plan.rows0(), &rows1 = plan.rows1();
    const bool present = outside && plan.a == Side::query;
    const int64_t *begin0 = present ? plan.axis0.present_begin : rows0.begin;
    const int64_t *end0 = present ? plan.axis0.present_end : rows0.end;
    const int64_t *begin1 = present ? plan.axis1.present_begin : rows1.begin;
    const int64_t *end1 = present ? plan.axis1.present_end : rows1.end;
    Chunk all{begin0[block.row0], end0[block.row0], INT64_MAX, INT64_MIN};
    for (int r = 0; r < block.rows; ++r) {
        if (begin1[block.row + r] >= end1[block.row + r]) continue;
        all.begin = least(all.begin, begin1[block.row + r]);
        all.end = most(all.end, end1[block.row + r]);
    }
    if (all.begin > all.end) all.begin = all.end = 0;
    return all;
}

// Cuts a reach into chunks whose scores and packed rows fit. Boundaries do not depend on the block, so that a row's
// sums do not depend on how rows were grouped.
struct Chunks {
    Chunk all;
    Chunk now;
    int64_t size;  // 0: everything at once
};
LOCALATTN_INLINE bool next_chunk(Chunks &c) {
    if (c.size == 0) {
        if (c.now.end0 > c.all.begin0 || c.all.begin >= c.all.end || c.all.begin0 >= c.all.end0) return false;
        c.now = c.all;
        return true;
    }
    if (c.now.end < c.all.end) {
        c.now.begin = c.now.end;
    } else {
        ++c.now.begin0;
        c.now.begin = c.all.begin;
    }
    if (c.now.begin0 >= c.all.end0 || c.all.begin >= c.all.end) return false;
    c.now.end0 = c.now.begin0 + 1;
    // Rows may lie outside the map, at negative positions.
    const int64_t shifted = c.now.begin + (int64_t{1} << 40) / c.size * c.size;
    c.now.end = least(c.all.end, c.now.begin + c.size - shifted % c.size);
    return true;
}
LOCALATTN_INLINE Chunks chunks_of(const Plan &plan, const Chunk &all) {
    const bool fits = !plan.chunked && all.end - all.begin <= plan.ring1 && all.end0 - all.begin0 <= plan.ring0 &&
                      (all.end - all.begin) * (all.end0 - all.begin0) <= plan.chunk_rows;
    Chunks c{all, all, fits ? 0 : plan.chunk_rows};
    if (!fits) c.size = least(c.size, plan.ring1);
    c.now.begin0 = fits ? all.begin0 : all.begin0 - 1;
    c.now.end0 = all.begin0;
    c.now.end = all.end;
    return c;
}

// Rows in the ring, of one tensor in one form.
template <class V>
struct PackedRows {
    typename V::T *data;
    ptrdiff_t row;  // elements from row to row
};
// `channels` counts words.
template <class V>
LOCALATTN_INLINE PackedRows<V> take_rows(const Plan &plan, int64_t channels, Arena &arena, bool one = false) {
    using T = typename V::T;
    const ptrdiff_t row = channels * plan.packed;
    const int64_t rows = one ? 1 : plan.ring0 * plan.ring1;
    return {arena.take<T>(rows * row + most(plan.lead, V::lanes + plan.lane_axis.step)), one ? 0 : row};
}

// One tensor's rows in the ring, for both contractions: the same, unless operands are words.
template <class V>
struct PackedTensor {
    int64_t channels;
    PackedRows<V> scores, values;  // words of channels; words of positions
};
// What is not asked for is not there; of the words of channels then only one row, on the way to the others.
template <class V>
LOCALATTN_INLINE PackedTensor<V> take_tensor(const Plan &plan, int64_t channels, bool for_scores, bool for_values,
                                             Arena &arena) {
    PackedTensor<V> t{channels, {}, {}};
    t.scores = take_rows<V>(plan, V::words(channels), arena, V::word > 1 && !for_scores);
    if constexpr (V::word == 1) t.values = t.scores;
    if (V::word > 1 && for_values) {
        // No row begins in the zeros that follow another: the last of them holds the first position as well.
        const int64_t row = channels * plan.packed + most(plan.lead, V::lanes);
        t.values = {arena.take<typename V::T>(plan.ring0 * plan.ring1 * row), row};
    }
    return t;
}

struct RingSlots {
    int64_t *tag;
    int64_t ring0, ring1;
    int64_t of(int64_t b0, int64_t b) const { return b0 % ring0 * ring1 + b % ring1; }
    void clear() const {
        for (int64_t i = 0; i < ring0 * ring1; ++i) tag[i] = -1;
    }
    // Whether the row has to be packed; marks it as there.
    bool claims(int64_t b0, int64_t b, int64_t rows1) const {
        const int64_t id = b0 * rows1 + b;
        int64_t &t = tag[of(b0, b)];
        if (t == id) return false;
        t = id;
        return true;
    }
};

// body(b0, b, slot) for the chunk's rows of B that are in the map and not in the ring; marks them as there.
template <class Body>
LOCALATTN_INLINE void each_missing(const Plan &plan, const RingSlots &slots, const Chunk &chunk, const Body &body) {
    const int64_t rows0 = plan.rows0(plan.b()).count, rows1 = plan.rows1(plan.b()).count;
    for (int64_t b0 = most(0, chunk.begin0); b0 < least(rows0, chunk.end0); ++b0)
        for (int64_t b = most(0, chunk.begin); b < least(rows1, chunk.end); ++b)
            if (slots.claims(b0, b, rows1)) body(b0, b, slots.of(b0, b));
}

// Packs one row of B for a strip: all phases, all positions that the strip's tiles read, zeros outside the map.
template <class V>
LOCALATTN_INLINE void pack_row(const Plan &plan, const Codec<V> &codec, const Tensor &tensor, int64_t offset,
                               int64_t strip, int64_t channels, typename V::T *out, typename V::T factor = 1) {
    const LaneAxis &lane = plan.lane_axis;
    const Side b = plan.b();
    const int64_t period = lane.period(b), first = first_packed_lane(plan, strip);
    for (int64_t phase = 0; phase < period; ++phase) {
        const int64_t from = most(0, -first);
        const int64_t exist = (lane.extent(b) - phase + period - 1) / period;
        const int64_t to = least(plan.phase_stride, exist - first);
        const int64_t step = tensor.axis[2] * period;
        const int64_t columns = phase + 1 < period ? plan.phase_stride : plan.packed - phase * plan.phase_stride;
        codec.pack(at(codec, tensor, offset + phase * tensor.axis[2] + first * step), step, tensor.channel, from, to,
                   columns, channels, factor, out + phase * plan.phase_stride, plan.packed);
    }
    // What follows the last channel are the next row's first zeros, which need not be there yet.
    if (plan.strips == 1)
        for (int64_t x = 0; x < plan.lead; x += V::lanes)
            V::store(out + V::words(channels) * plan.packed + x, typename V::reg{});
}

// One number per position of B's row, `rest` where there is no position.
template <class V>
LOCALATTN_INLINE void pack_numbers(const Plan &plan, const typename V::T *source, int64_t step2, int64_t strip,
                                   typename V::T factor, typename V::T rest, typename V::T *out) {
    const LaneAxis &lane = plan.lane_axis;
    const Side b = plan.b();
    const int64_t period = lane.period(b), first = first_packed_lane(plan, strip);
    for (int64_t phase = 0; phase < period; ++phase) {
        for (int64_t x = 0; x < plan.phase_stride; ++x) {
            const int64_t position = lane.position(b, phase, first + x);
            const bool exists = position >= 0 && position < lane.extent(b);
            out[phase * plan.phase_stride + x] = exists ? factor * source[position * step2] : rest;
        }
    }
}

// The key mask of one row of keys as lane masks; positions outside the map are not masked.
template <class V>
LOCALATTN_INLINE void pack_key_mask(const Plan &plan, int64_t offset, int64_t strip, typename V::Mask *out) {
    const LaneAxis &lane = plan.lane_axis;
    const Tensor &mask = plan.problem->key_mask;
    const uint8_t *attends = static_cast<const uint8_t *>(mask.data) + offset;
    const int64_t first = first_packed_lane(plan, strip);
    for (int64_t phase = 0; phase < lane.key_period; ++phase) {
        for (int64_t x = 0; x < plan.phase_stride; ++x) {
            const int64_t position = lane.position(Side::key, phase, first + x);
            const bool outside = position < 0 || position >= lane.axis.keys;
            out[phase * plan.phase_stride + x] = outside || attends[position * mask.axis[2]] ? -1 : 0;
        }
    }
    if (plan.strips == 1)
        for (int64_t x = lane.key_period * plan.phase_stride; x < plan.packed + plan.lead; ++x) out[x] = -1;
}
// Masked positions of a packed row become zeros, so that whatever they held reaches no sum. `channels` counts words.
template <class V>
LOCALATTN_INLINE void clear_masked(const Plan &plan, const typename V::Mask *mask, int64_t channels,
                                   typename V::T *row) {
    const int64_t positions = plan.phase_stride * plan.lane_axis.key_period;
    for (int64_t x = 0; x < positions; x += V::lanes)
        for (int64_t c = 0; c < channels; ++c) {
            typename V::T *p = row + c * plan.packed + x;
            V::store(p, V::keep(V::load_mask(mask + x), V::load(p)));
        }
}

// Packs one row of B of one tensor, in the forms that it has.
template <class V>
LOCALATTN_INLINE void pack_tensor(const Plan &plan, const Codec<V> &codec, const Tensor &tensor, int64_t offset,
                                  int64_t strip, int64_t slot, const PackedTensor<V> &packed, typename V::T factor = 1,
                                  const typename V::Mask *key_mask = nullptr) {
    typename V::T *row = packed.scores.data + slot * packed.scores.row;
    pack_row<V>(plan, codec, tensor, offset, strip, packed.channels, row, factor);
    if (key_mask) clear_masked<V>(plan, key_mask, V::words(packed.channels), row);
    if constexpr (V::word > 1)
        if (packed.values.data)
            words_of_positions<V>(row, packed.channels, plan.packed, plan.lane_axis.step,
                                  plan.strips == 1 ? plan.lead : 0, packed.values.data + slot * packed.values.row);
}

// What scores multiply by: operands as they are packed, or, where those are words, sums.
template <class V>
struct ScoreFactor {
    typename V::T operand, sum;
};
template <class V>
LOCALATTN_INLINE ScoreFactor<V> score_factor(const Problem &problem) {
    const auto factor = static_cast<typename V::T>(problem.scale * log2_e);
    if (V::word > 1) return {1, factor};
    return {factor, 1};
}

// Keys and values of one head, for passes over queries.
template <class V>
struct KeyRing {
    using T = typename V::T;
    using Mask = typename V::Mask;
    RingSlots slots;
    PackedTensor<V> keys, values;
    Mask *key_mask;  // [ring rows][packed]; NULL without a key mask
    int64_t packed;

    const Mask *mask_of(int64_t b0, int64_t b, const LaneTile &tile) const {
        return key_mask ? key_mask + slots.of(b0, b) * packed + tile.column : nullptr;
    }

    // Makes the chunk's rows that are in the map be there.
    void pack(const Plan &plan, const Codec<V> &codec, int64_t batch, int64_t query_head, int64_t strip,
              const Chunk &chunk) const {
        const Problem &problem = *plan.problem;
        const int64_t head = query_head / (problem.heads / problem.kv_heads);
        each_missing(plan, slots, chunk, [&](int64_t b0, int64_t b, int64_t slot) {
            const auto offset = [&](const Tensor &t) { return row_offset(plan, t, batch, head, Side::key, b0, b); };
            Mask *mask = key_mask ? key_mask + slot * packed : nullptr;
            if (mask) pack_key_mask<V>(plan, offset(problem.key_mask), strip, mask);
            pack_tensor(plan, codec, problem.key, offset(problem.key), strip, slot, keys, T(1), mask);
            pack_tensor(plan, codec, problem.value, offset(problem.value), strip, slot, values, T(1), mask);
        });
    }
};
// The forward sums values by scores of keys; the backward's tiles of queries sum keys by scores of both.
template <class V>
LOCALATTN_INLINE void take_key_ring(KeyRing<V> &ring, const Plan &plan, Pass pass, Arena &arena) {
    const Problem &problem = *plan.problem;
    const int64_t rows = plan.ring0 * plan.ring1;
    ring.slots = {arena.take<int64_t>(rows), plan.ring0, plan.ring1};
    const bool forward = pass == Pass::forward;
    ring.keys = take_tensor<V>(plan, problem.channels, true, !forward, arena);
    ring.values = take_tensor<V>(plan, problem.value_channels, !forward, forward, arena);
    ring.key_mask = problem.key_mask.data ? arena.take<typename V::Mask>(rows * plan.packed + plan.lead) : nullptr;
    ring.packed = plan.packed;
}

}  // namespace localattn::cpu
