// The window products (see ../window_product.h) on the walk of plan.h and the two contractions of microkernels.h.
//
//   score       A = query: score_chunk, then scores to `entries`
//   weigh       A = query: `entries` to weights, then weigh_chunk
//   transposed  A = key:   `entries` to weights, then weigh_chunk over the transposed window
//
// Work: `channels` multiply-adds a pair. Bytes: all three tensors once each, the walked side from its ring in L2. The
// window entries of a query lie side by side in memory while lanes are queries, so they are transposed on the way in or
// out (pack.h), many entries at a time; tiles at borders, whose lanes differ in what their slots mean, take an extra
// scalar step.
#pragma once
#include "../window_product.h"
#include "scores.h"

namespace localattn::cpu {

LOCALATTN_INLINE const WindowProduct &product_of(const Plan &plan) {
    return static_cast<const WindowProduct &>(*plan.problem);
}

// Window entries [first, first + count) of one row, those of (u0, u1) for neighbouring u1: what there is of them.
LOCALATTN_INLINE int64_t entries_left(const WindowProduct &p, int64_t first, int64_t count) {
    return most(0, least(count, p.entry_count() - first));
}

// What the lanes of a strip's tiles make of their slots, and what `score` writes where there is no key.
template <class V>
struct Slots {
    using T = typename V::T;
    using Mask = typename V::Mask;
    bool *same;      // [tile]: every slot is one entry, a key, for all lanes
    Mask *real;      // [tile][most_slots][lanes]: the pair exists, and is with a key
    T *inside_row;   // [tile][kernel][lanes]: of a row inside the map, the entries that are no key; else 0
    T *outside_row;  // the same for a row outside the map
    int64_t most_slots, kernel;

    LOCALATTN_INLINE void take(Slots &s, const Plan &plan, bool rows, Arena &arena) {
        const int64_t tiles = tiles_in_strip(plan);
        s.most_slots = plan.most_slots + 1;
        s.kernel = plan.lane_axis.axis.kernel;
        s.same = arena.take<bool>(tiles);
        s.real = arena.take<Mask>(tiles * s.most_slots * V::lanes);
        s.inside_row = arena.take<T>(rows ? tiles * s.kernel * V::lanes : 0);
        s.outside_row = arena.take<T>(rows ? tiles * s.kernel * V::lanes : 0);
    }

    const Mask *real_of(int64_t tile) const { return real + tile * most_slots * V::lanes; }

    void build(const Plan &plan, const LaneTile *tiles, bool rows) const {
        const Axis &axis = plan.lane_axis.axis;
        const WindowProduct &p = product_of(plan);
        for (int64_t i = 0; i < tiles_in_strip(plan); ++i) {
            const LaneTile &tile = tiles[i];
            if (tile.count == 0) continue;
            const LanePattern &pattern = *tile.pattern;
            same[i] = true;
            Mask *mask = real + i * most_slots * V::lanes;
            for (int slot = 0; slot < pattern.slots; ++slot) {
                for (int l = 0; l < V::lanes; ++l) {
                    const int32_t u = pattern.entry[slot * V::lanes + l];
                    const int64_t query = tile.query + pattern.query[slot] + plan.lane_axis.query_period * l;
                    bool key = u >= 0;
                    if (key) {
                        const Window w = window_of(axis, query);
                        key = w.begin <= u && u < w.end;
                    }
                    mask[slot * V::lanes + l] = key ? -1 : 0;
                    if (l < tile.count && (!key || u != pattern.entry[slot * V::lanes])) same[i] = false;
                }
            }
            if (!rows) continue;
            same[i] = same[i] && pattern.slots == kernel;
            for (int l = 0; l < V::lanes; ++l) {
                const Window w = window_of(
                    axis, least(axis.queries - 1, tile.phase + plan.lane_axis.query_period * (tile.lane + l)));
                for (int64_t u = 0; u < kernel; ++u) {
                    const int64_t at = (i * kernel + u) * V::lanes + l;
                    const bool absent = (axis.causal && w.start + u > w.centre) ||
                                        (axis.border == Border::shift && w.start + u >= w.length);
                    const bool key = w.begin <= u && u < w.end;
                    outside_row[at] = T(absent ? p.absent : p.outside);
                    inside_row[at] = key ? T(0) : outside_row[at];
                }
            }
        }
    }
};

// Rows of the walked side, one tensor.
template <class V>
struct OneRing {
    using T = typename V::T;
    RingSlots slots;
    PackedTensor<V> rows;

    LOCALATTN_INLINE void take(OneRing &ring, const Plan &plan, Arena &arena) {
        ring.slots = {arena.take<int64_t>(plan.ring0 * plan.ring1), plan.ring0, plan.ring1};
        ring.rows = take_tensor<V>(plan, plan.problem->channels, true, true, arena);
    }
    // Makes the chunk's rows that are in the map be there.
    void pack(const Plan &plan, const Codec<V> &codec, const Tensor &t, const Job &job, const Chunk &chunk) const {
        each_missing(plan, slots, chunk, [&](int64_t b0, int64_t b, int64_t slot) {
            pack_tensor(plan, codec, t, row_offset(plan, t, job.batch, job.head, plan.b(), b0, b), job.strip, slot,
                        rows);
        });
    }
};

// What the three workers share: tiles, the ring, one tile of A and its scores.
template <class V>
struct ProductWorker {
    using T = typename V::T;
    using Mask = typename V::Mask;
    using reg = typename V::reg;

    const Plan &plan;
    const WindowProduct &problem;
    const Codec<V> &codec;
    LaneTile *tiles;
    int64_t tiles_strip = -1, slots_strip = -1;  // of `tiles` and of `slots`
    Slots<V> slots;
    OneRing<V> ring;
    T *a, *s;
    T *entries;  // a few rows of entries, as lanes are
    ptrdiff_t a_row, s_row;
    Stream stream;

    ProductWorker(const Plan &p, const Codec<V> &c) : plan(p), problem(product_of(p)), codec(c) {}

    LOCALATTN_INLINE void take_shared(ProductWorker &w, int64_t entries, Arena &arena) {
        const Plan &plan = w.plan;
        w.tiles = take_tiles(plan, arena);
        Slots<V>::take(w.slots, plan, w.problem.product == Product::score, arena);
        OneRing<V>::take(w.ring, plan, arena);
        w.a_row = odd_lines(w.problem.channels * V::lanes, sizeof(T));
        w.s_row = odd_lines(plan.chunk_rows * plan.most_slots * V::lanes, sizeof(T));
        w.a = arena.take<T>(plan.block_rows * w.a_row);
        w.s = arena.take<T>(plan.block_rows * w.s_row);
        w.entries = arena.take<T>(entries);
    }

    void pack_a(const Tensor &t, const Job &job, const Block &block, const LaneTile &tile) {
        for (int r = 0; r < block.rows; ++r)
            pack_tile(plan, codec, t, row_of(plan, t, job, block, r), tile, problem.channels, T(1), a + r * a_row);
    }
    void clear_a(const Block &block) {
        for (int r = 0; r < block.rows; ++r)
            for (int64_t c = 0; c < problem.channels; ++c) V::store(a + r * a_row + c * V::lanes, reg{});
    }
    void unpack_a(const Tensor &t, const Job &job, const Block &block, const LaneTile &tile) {
        for (int r = 0; r < block.rows; ++r)
            unpack_tile(plan, codec, a + r * a_row, plan.a, tile, problem.channels, V::all(T(1)), t,
                        row_of(plan, t, job, block, r));
    }

    const RingSlots &packed_rows() const { return ring.slots; }

    void know_slots(const Job &job) {
        if (slots_strip == job.strip) return;
        slots.build(plan, tiles, problem.product == Product::score);
        slots_strip = job.strip;
    }
};

// Rows [begin, end) of the walked side inside the chunk that query row `row` pairs with, for b0: their window entries
// are consecutive.
struct RowSpan {
    int64_t begin, end;
    int64_t first;  // window entry of the first
};
LOCALATTN_INLINE RowSpan keys_of_row(const Plan &plan, const Block &block, int r, int64_t b0, const Chunk &chunk) {
    const RowAxis &axis0 = plan.axis0, &axis1 = plan.axis1;
    const int64_t row = block.row + r;
    RowSpan span{0, 0, 0};
    if (b0 < axis0.query.begin[block.row0] || b0 >= axis0.query.end[block.row0]) return span;
    span.begin = most(axis1.query.begin[row], chunk.begin);
    span.end = least(axis1.query.end[row], chunk.end);
    if (plan.problem->raster) {
        if (b0 > axis0.centre[block.row0]) span.end = span.begin;
        if (b0 == axis0.centre[block.row0]) span.end = least(span.end, axis1.centre[row] + 1);
    }
    const Axis *axis = plan.problem->axis;
    span.first = ((b0 - axis0.first[block.row0]) * axis[1].kernel + span.begin - axis1.first[row]) * axis[2].kernel;
    return span;
}

template <class V>
struct ScoreWorker : ProductWorker<V> {
    using Base = ProductWorker<V>;
    using Base::Base;
    using Base::codec, Base::entries, Base::plan, Base::problem, Base::ring, Base::s, Base::s_row, Base::slots,
        Base::tiles;
    using typename Base::Mask;
    using typename Base::T;

    LOCALATTN_INLINE void take(ScoreWorker &w, Arena &arena) {
        const Axis *axis = w.problem.axis;
        Base::take_shared(w, axis[1].kernel * axis[2].kernel * V::lanes, arena);
    }

    void write(const Job &job, const Block &block, int r, const LaneTile &tile, const T *from, int64_t first,
               int64_t count) {
        const Tensor &t = problem.entries;
        unpack_tile(plan, codec, from, Side::query, tile, entries_left(problem, first, count), V::all(T(1)), t,
                    row_of(plan, t, job, block, r) + first * t.channel);
    }

    void write_scores(const Job &job, const Block &block, int64_t i, const Chunk &chunk) {
        const LaneTile &tile = tiles[i];
        const LanePattern &pattern = *tile.pattern;
        const int64_t kernel = slots.kernel, L = V::lanes;
        const T *template_row = slots.inside_row + i * kernel * L;
        const Mask *real = slots.real_of(i);
        for (int r = 0; r < block.rows; ++r) {
            for (int64_t b0 = chunk.begin0; b0 < chunk.end0; ++b0) {
                const RowSpan span = keys_of_row(plan, block, r, b0, chunk);
                if (span.begin >= span.end) continue;
                T *to = entries;
                for (int64_t b = span.begin; b < span.end; ++b, to += kernel * L) {
                    const T *from = s + r * s_row + chunk.index(b0, b) * pattern.slots * L;
                    if (slots.same[i]) {
                        for (int slot = 0; slot < pattern.slots; ++slot)
                            V::store(to + pattern.entry[slot * L] * L, V::load(from + slot * L));
                        continue;
                    }
                    for (int64_t u = 0; u < kernel * L; u += L) V::store(to + u, V::load(template_row + u));
                    for (int slot = 0; slot < pattern.slots; ++slot)
                        for (int l = 0; l < L; ++l)
                            if (real[slot * L + l]) to[pattern.entry[slot * L + l] * L + l] = from[slot * L + l];
                }
                write(job, block, r, tile, entries, span.first, (span.end - span.begin) * kernel);
            }
        }
    }

    // Of the rows of the window that are no keys.
    void write_rest(const Job &job, const Block &block, int64_t i) {
        const RowAxis &axis0 = plan.axis0, &axis1 = plan.axis1;
        const Axis *axis = problem.axis;
        const int64_t kernel = slots.kernel;
        const auto absent = [](const Axis &x, const RowAxis &rows, int64_t row, int64_t key) {
            const int64_t chain_end = rows.query.end[row];
            return (x.causal && key > rows.centre[row]) || (x.border == Border::shift && key >= chain_end);
        };
        for (int r = 0; r < block.rows; ++r) {
            const int64_t row = block.row + r;
            for (int64_t u0 = 0; u0 < axis[0].kernel; ++u0) {
                const int64_t b0 = axis0.first[block.row0] + u0;
                const bool inside0 = b0 >= axis0.query.begin[block.row0] && b0 < axis0.query.end[block.row0];
                for (int64_t u1 = 0; u1 < axis[1].kernel; ++u1) {
                    const int64_t b = axis1.first[row] + u1;
                    if (inside0 && b >= axis1.query.begin[row] && b < axis1.query.end[row]) {
                        u1 = axis1.query.end[row] - axis1.first[row] - 1;
                        continue;
                    }
                    const T *from = slots.outside_row + i * kernel * V::lanes;
                    if (absent(axis[0], axis0, block.row0, b0) || absent(axis[1], axis1, row, b)) {
                        for (int64_t u = 0; u < kernel; ++u)
                            V::store(entries + u * V::lanes, V::all(T(problem.absent)));
                        from = entries;
                    }
                    write(job, block, r, tiles[i], from, (u0 * axis[1].kernel + u1) * kernel, kernel);
                }
            }
        }
    }

    void run_block(const Job &job, const Block &block, int64_t) {
        this->know_slots(job);
        const Chunk all = reach(plan, block, false);
        for (int64_t i = 0; i < tiles_in_strip(plan); ++i) {
            const LaneTile &tile = tiles[i];
            if (tile.count == 0) continue;
            this->pack_a(problem.query, job, block, tile);
            for (Chunks chunks = chunks_of(plan, all); next_chunk(chunks);) {
                ring.pack(plan, codec, problem.key, job, chunks.now);
                score_chunk<V>(plan, block, tile, chunks.now, ring.slots, ring.rows, {this->a, this->a_row}, T(1), s,
                               s_row, this->stream);
                write_scores(job, block, i, chunks.now);
            }
            write_rest(job, block, i);
        }
    }
};

template <class V>
struct WeighWorker : ProductWorker<V> {
    using Base = ProductWorker<V>;
    using Base::Base;
    using Base::codec, Base::entries, Base::plan, Base::problem, Base::ring, Base::s, Base::s_row, Base::slots,
        Base::tiles;
    using typename Base::Mask;
    using typename Base::T;

    LOCALATTN_INLINE void take(WeighWorker &w, Arena &arena) {
        const Axis *axis = w.problem.axis;
        Base::take_shared(w, axis[1].kernel * axis[2].kernel * V::lanes, arena);
    }

    void read_weights(const Job &job, const Block &block, int64_t i, const Chunk &chunk) {
        const LaneTile &tile = tiles[i];
        const LanePattern &pattern = *tile.pattern;
        const int64_t kernel = slots.kernel, L = V::lanes;
        const Tensor &t = problem.entries;
        const Mask *real = slots.real_of(i);
        for (int r = 0; r < block.rows; ++r) {
            for (int64_t b0 = chunk.begin0; b0 < chunk.end0; ++b0) {
                const RowSpan span = keys_of_row(plan, block, r, b0, chunk);
                if (span.begin >= span.end) continue;
                const int64_t left = entries_left(problem, span.first, (span.end - span.begin) * kernel);
                pack_tile(plan, codec, t, row_of(plan, t, job, block, r) + span.first * t.channel, tile, left, T(1),
                          entries);
                for (int64_t b = span.begin; b < span.end; ++b) {
                    const int64_t before = (b - span.begin) * kernel;
                    const T *from = entries + before * L;
                    T *to = s + r * s_row + chunk.index(b0, b) * pattern.slots * L;
                    for (int slot = 0; slot < pattern.slots; ++slot) {
                        if (slots.same[i]) {
                            const int64_t u = pattern.entry[slot * L];
                            V::store(to + slot * L, before + u < left ? V::load(from + u * L) : typename V::reg{});
                            continue;
                        }
                        for (int l = 0; l < L; ++l) {
                            const int64_t u = pattern.entry[slot * L + l];
                            to[slot * L + l] = real[slot * L + l] && before + u < left ? from[u * L + l] : T(0);
                        }
                    }
                }
            }
        }
    }

    void run_block(const Job &job, const Block &block, int64_t) {
        this->know_slots(job);
        const Chunk all = reach(plan, block, false);
        for (int64_t i = 0; i < tiles_in_strip(plan); ++i) {
            if (tiles[i].count == 0) continue;
            this->clear_a(block);
            for (Chunks chunks = chunks_of(plan, all); next_chunk(chunks);) {
                ring.pack(plan, codec, problem.key, job, chunks.now);
                read_weights(job, block, i, chunks.now);
                weigh_chunk<V>(plan, block, tiles[i], chunks.now, ring.slots, ring.rows,
                               dense_weights<V>(tiles[i], s, s_row), this->a, this->a_row);
            }
            this->unpack_a(problem.query, job, block, tiles[i]);
        }
    }
};

template <class V>
struct TransposedWorker : ProductWorker<V> {
    using Base = ProductWorker<V>;
    using Base::Base;
    using Base::codec, Base::entries, Base::plan, Base::problem, Base::ring, Base::s, Base::s_row, Base::slots,
        Base::tiles;
    using typename Base::Mask;
    using typename Base::T;

    int64_t *tag;  // [ring rows] of `entries`, which holds for each row of queries in reach what the block pairs with

    // Entries of one row of queries that a block of key rows pairs with.
    LOCALATTN_INLINE int64_t most_entries(const Plan &plan) {
        return least(plan.block_rows, plan.problem->axis[1].kernel) * plan.problem->axis[2].kernel;
    }
    LOCALATTN_INLINE void take(TransposedWorker &w, Arena &arena) {
        const Plan &plan = w.plan;
        Base::take_shared(w, plan.ring0 * plan.ring1 * most_entries(plan) * plan.packed + most(plan.lead, V::lanes),
                          arena);
        w.tag = arena.take<int64_t>(plan.ring0 * plan.ring1);
    }

    void read_weights(const Job &job, const Block &block, int64_t i, const Chunk &chunk) {
        const LaneTile &tile = tiles[i];
        const LanePattern &pattern = *tile.pattern;
        const Axis *axis = problem.axis;
        const int64_t kernel = slots.kernel, L = V::lanes;
        const Tensor &t = problem.entries;
        const Mask *real = slots.real_of(i);
        const RingSlots held{tag, plan.ring0, plan.ring1};
        for (int64_t b0 = chunk.begin0; b0 < chunk.end0; ++b0) {
            for (int64_t b = chunk.begin; b < chunk.end; ++b) {
                const PairedRows paired = paired_rows(plan, block, b0, b);
                if (paired.begin >= paired.end) continue;
                const int64_t u0 = block.row0 - plan.axis0.first[b0];
                const int64_t u1 = block.row + paired.begin - plan.axis1.first[b];
                const int64_t first = (u0 * axis[1].kernel + u1) * kernel;
                const int64_t left = entries_left(problem, first, (paired.end - paired.begin) * kernel);
                T *packed = entries + held.of(b0, b) * most_entries(plan) * plan.packed;
                if (held.claims(b0, b, plan.axis1.query.count))
                    pack_row<V>(plan, codec, t,
                                row_offset(plan, t, job.batch, job.head, Side::query, b0, b) + first * t.channel,
                                job.strip, left, packed);
                for (int r = paired.begin; r < paired.end; ++r) {
                    const int64_t before = (r - paired.begin) * kernel;
                    const T *from = packed + before * plan.packed + tile.column;
                    T *to = s + r * s_row + chunk.index(b0, b) * pattern.slots * L;
                    for (int slot = 0; slot < pattern.slots; ++slot) {
                        const T *column = from + pattern.column[slot];
                        if (slots.same[i]) {
                            const int64_t u = pattern.entry[slot * L];
                            V::store(to + slot * L,
                                     before + u < left ? V::load(column + u * plan.packed) : typename V::reg{});
                            continue;
                        }
                        for (int l = 0; l < L; ++l) {
                            const int64_t u = pattern.entry[slot * L + l];
                            to[slot * L + l] =
                                real[slot * L + l] && before + u < left ? column[u * plan.packed + l] : T(0);
                        }
                    }
                }
            }
        }
    }

    void run_block(const Job &job, const Block &block, int64_t) {
        this->know_slots(job);
        const Chunk all = reach(plan, block, false);
        RingSlots{tag, plan.ring0, plan.ring1}.clear();
        for (int64_t i = 0; i < tiles_in_strip(plan); ++i) {
            if (tiles[i].count == 0) continue;
            this->clear_a(block);
            for (Chunks chunks = chunks_of(plan, all); next_chunk(chunks);) {
                ring.pack(plan, codec, problem.query, job, chunks.now);
                read_weights(job, block, i, chunks.now);
                weigh_chunk<V>(plan, block, tiles[i], chunks.now, ring.slots, ring.rows,
                               dense_weights<V>(tiles[i], s, s_row), this->a, this->a_row);
            }
            this->unpack_a(problem.key, job, block, tiles[i]);
        }
    }
};

}  // namespace localattn::cpu
