// Fused attention, backward, all gradients in one pass: five contractions a pair, and each tensor packed once.
//
//   p = exp(s - lse)      dp = grad_output . v      ds = p (dp - delta)      delta = grad_output . output - grad_lse
//   grad_query = scale sum ds k      grad_value = sum p grad_output      grad_key = scale sum ds q
//
// For each block of key rows: tiles of queries (lane = query) compute p and ds of all pairs with these rows and add to
// the queries' gradients, which stay in the ring until the last key row of their window; p and ds also go, by key
// lane, to the planes (JointPlan), from which tiles of keys (lane = key) sum the block's key and value gradients at
// once. Each gradient is finished in one place, in the order of its rows: no atomics, no halo to add up, one rounding,
// and no bit depends on how the map is cut into jobs.
#pragma once
#include "backward.h"
#include "joint_plan.h"

namespace localattn::cpu {

template <class V>
struct JointWorker {
    using T = typename V::T;
    using Mask = typename V::Mask;
    using reg = typename V::reg;

    const JointPlan &plan;  // A = key
    const Plan &by_query;
    const Problem &problem;
    const Codec<V> &codec;
    BiasGradients bias_gradients;
    LaneTile *key_tiles, *query_tiles;
    int64_t tiles_strip = -1;
    KeyRing<V> keys;  // of one block
    QueryRing<V> ring;
    T *grad_q;              // [ring rows][phase][tile of the strip][channel][lane]
    T *s, *dp;              // [query row of a block][key row][slot][lane]
    T *p_plane, *ds_plane;  // [key row][query row of a block][plane][column]
    T *grad_k, *grad_v;
    ptrdiff_t s_row, grad_q_row, k_row, v_row;
    Stream stream;

    JointWorker(const JointPlan &p, const Codec<V> &c) : plan(p), by_query(p.by_query), problem(*p.problem), codec(c) {}

    int64_t tiles_of_strip() const { return plan.strip_tiles * plan.lane_axis.key_period; }
    int64_t pair_step() const { return plan.planes * plan.plane_columns; }
    bool wants_keys() const { return problem.grad_key.data || problem.grad_value.data; }
    bool wants_queries() const { return problem.grad_query.data || bias_gradients.any(); }
    // The key rows of a query row; a bias has gradients of rows outside the map too.
    int64_t first_key(int64_t q) const {
        return bias_gradients.any() ? by_query.axis1.present_begin[q] : by_query.axis1.query.begin[q];
    }
    int64_t last_key(int64_t q) const {
        return bias_gradients.any() ? by_query.axis1.present_end[q] : by_query.axis1.query.end[q];
    }

    LOCALATTN_INLINE void take(JointWorker &w, Arena &arena) {
        const JointPlan &plan = w.plan;
        w.key_tiles = take_tiles(plan, arena);
        w.query_tiles = take_tiles(w.by_query, arena);
        take_key_ring(w.keys, w.by_query, arena);
        take_query_ring(w.ring, plan, arena);
        w.grad_q_row = padded(w.tiles_of_strip() * w.problem.channels * V::lanes, sizeof(T));
        w.grad_q = arena.take<T>(plan.ring0 * plan.ring1 * w.grad_q_row);
        w.s_row = padded(plan.block_rows * w.by_query.most_slots * V::lanes, sizeof(T));
        w.s = arena.take<T>(plan.block_rows * w.s_row);
        w.dp = arena.take<T>(plan.block_rows * w.s_row);
        w.p_plane = arena.take<T>(w.plane_elements());
        w.ds_plane = arena.take<T>(w.plane_elements());
        w.k_row = padded(w.problem.channels * V::lanes, sizeof(T));
        w.v_row = padded(w.problem.value_channels * V::lanes, sizeof(T));
        w.grad_k = arena.take<T>(w.tiles_of_strip() * plan.block_rows * w.k_row);
        w.grad_v = arena.take<T>(w.tiles_of_strip() * plan.block_rows * w.v_row);
    }
    int64_t plane_elements() const { return plan.block_rows * plan.block_rows * pair_step(); }

    // The rows that a job owns.
    struct Owned {
        int64_t begin, end;
        bool has(int64_t row) const { return row >= begin && row < end; }
    };

    // A query tile's lanes among the packed queries, and a tile's among the planes' columns.
    int64_t query_column(const Job &job, const LaneTile &tile) const {
        return tile.phase * plan.phase_stride + tile.lane - first_packed_lane(plan, job.strip);
    }
    int64_t plane_column(const Job &job, const LaneTile &tile) const {
        return tile.phase * plan.plane_phase + V::lanes + tile.lane - job.strip * plan.strip_lanes();
    }

    // A row of pairs to the planes, by key lane.
    void write_planes(const LaneTile &tile, int64_t column, const T *p, const T *ds, int64_t pair) {
        const LanePattern &pattern = *tile.pattern;
        // Plane 0 is of the key furthest on from the query.
        const int64_t first = tile.phase * by_query.phase_stride;
        const uint64_t beyond = static_cast<uint64_t>(plan.plane_phase - V::lanes);
        const int64_t in_phase = column - tile.phase * plan.plane_phase;
        for (int i = 0; i < pattern.slots; ++i) {
            const int64_t offset = pattern.column[i] - first;
            // Nothing reads what lies wholly outside the strip.
            if (static_cast<uint64_t>(in_phase + offset - 1) >= beyond - 1) continue;
            const int64_t plane = -offset - plan.lane_axis.lowest_offset(Side::key);
            const int64_t at = pair * pair_step() + plane * plan.plane_columns + column + offset;
            V::store(p_plane + at, V::load(p + i * V::lanes));
            V::store(ds_plane + at, V::load(ds + i * V::lanes));
        }
    }

    void differentiate_tile(const Job &job, const Block &block, const LaneTile &tile, const Chunk &chunk,
                            bool to_planes, bool owned) {
        const int64_t at = query_column(job, tile), column = plane_column(job, tile);
        const auto load = [&](const T *numbers, int r) {
            return V::load(numbers + ring.slots.of(block.row0, block.row + r) * plan.packed + at);
        };
        differentiate_queries<V>(
            by_query, codec, keys, owned ? bias_gradients : BiasGradients{}, job, block, tile, chunk,
            [&](int r) { return load(ring.lse, r); }, [&](int r) { return load(ring.delta, r); }, s, dp, s_row,
            [&](int r, int64_t b, bool partial, const Mask *key_mask, T *p, const T *ds) {
                if (!to_planes) return;
                mask_scores<V>(tile, partial, key_mask, reg{}, p);
                write_planes(tile, column, p, ds, (b - chunk.begin) * plan.block_rows + r);
            });
    }

    // Queries of one block against a block of keys.
    void run_queries(const Job &job, const Block &block, const Chunk &chunk, bool owns_keys, bool owns_queries) {
        const int64_t slot = ring.slots.of(block.row0, block.row);
        for (int64_t i = 0; i < tiles_in_strip(by_query); ++i) {
            const LaneTile &tile = query_tiles[i];
            if (tile.count == 0) continue;
            const int64_t in_strip = i % (plan.strip_tiles + 2 * by_query.halo_tiles) - by_query.halo_tiles;
            const bool owned = wants_queries() && owns_queries && in_strip >= 0 && in_strip < plan.strip_tiles;
            const bool to_planes = owns_keys && wants_keys();
            if (!owned && !to_planes) continue;
            const int64_t at = query_column(job, tile);
            const TileRows<V> q{ring.queries.data + slot * ring.queries.row + at, ring.queries.row, plan.packed};
            const TileRows<V> go{ring.grad_outputs.data + slot * ring.grad_outputs.row + at, ring.grad_outputs.row,
                                 plan.packed};
            score_chunk<V>(by_query, block, tile, chunk, keys.slots, keys.keys, problem.channels, q, s, s_row, stream);
            score_chunk<V>(by_query, block, tile, chunk, keys.slots, keys.values, problem.value_channels, go, dp, s_row,
                           stream);
            differentiate_tile(job, block, tile, chunk, to_planes, owned);
            if (owned && problem.grad_query.data) {
                T *sum = grad_q + slot * grad_q_row +
                         (tile.phase * plan.strip_tiles + in_strip) * problem.channels * V::lanes;
                weigh_chunk<V>(by_query, block, tile, chunk, keys.slots, keys.keys, problem.channels,
                               dense_weights<V>(tile, dp, s_row), sum, grad_q_row);
            }
        }
    }

    int64_t offset(const Tensor &t, const Job &job, int64_t row0, int64_t row, const LaneTile &tile) const {
        return job.batch * t.batch + job.head * t.head + plan.axis0.key.position[row0] * t.axis[0] +
               plan.axis1.key.position[row] * t.axis[1] +
               (tile.phase + plan.lane_axis.key_period * tile.lane) * t.axis[2];
    }

    void store(const Tensor &t, const Job &job, int64_t row0, int64_t row, const LaneTile &tile, int64_t channels,
               T factor, const T *sum) const {
        codec.unpack(sum, tile.count, channels, V::all(factor), at(codec, t, offset(t, job, row0, row, tile)),
                     t.axis[2] * plan.lane_axis.key_period, t.channel);
    }

    // One of the gradients of a block of keys, summed as [tile][key row][channel][lane].
    struct KeyGradient {
        const Tensor &result;
        const PackedRows<V> &queries;
        const T *planes;
        int64_t channels;
        T factor;
        T *sum;
        ptrdiff_t row;
    };
    template <class Body>
    LOCALATTN_INLINE void each_key_gradient(const JointWorker &w, const Body &body) {
        const Problem &p = w.problem;
        if (p.grad_value.data)
            body(KeyGradient{p.grad_value, w.ring.grad_outputs, w.p_plane, p.value_channels, T(1), w.grad_v, w.v_row});
        // The packed queries are scale * log2(e) times theirs.
        if (p.grad_key.data)
            body(KeyGradient{p.grad_key, w.ring.queries, w.ds_plane, p.channels, T(ln_2), w.grad_k, w.k_row});
    }

    // Adds what one block of queries gives to the gradients of a block of keys, from the planes.
    void run_keys(const Job &job, const Block &block, const Chunk &queries) {
        for (int64_t i = 0; i < tiles_of_strip(); ++i) {
            const LaneTile &tile = key_tiles[i];
            if (tile.count == 0) continue;
            each_key_gradient(*this, [&](const KeyGradient &g) {
                const TileWeights<V> weights{g.planes + plane_column(job, tile),
                                             static_cast<ptrdiff_t>(plan.block_rows * pair_step()),
                                             static_cast<ptrdiff_t>(pair_step()),
                                             static_cast<ptrdiff_t>(plan.plane_columns),
                                             true,
                                             tile.phase * plan.phase_stride + plan.lane_axis.lowest_offset(Side::key)};
                weigh_chunk<V>(plan, block, tile, queries, ring.slots, g.queries, g.channels, weights,
                               g.sum + i * plan.block_rows * g.row, g.row);
            });
        }
    }

    void store_keys(const Job &job, const Block &block) {
        for (int64_t i = 0; i < tiles_of_strip(); ++i) {
            const LaneTile &tile = key_tiles[i];
            if (tile.count == 0) continue;
            const int64_t column =
                tile.phase * by_query.phase_stride + tile.lane - first_packed_lane(by_query, job.strip);
            each_key_gradient(*this, [&](const KeyGradient &g) {
                for (int r = 0; r < block.rows; ++r) {
                    T *sum = g.sum + (i * plan.block_rows + r) * g.row;
                    if (keys.key_mask) {
                        // A masked key's gradient is zero whatever the queries hold.
                        const Mask *mask =
                            keys.key_mask + keys.slots.of(block.row0, block.row + r) * keys.packed + column;
                        for (int64_t c = 0; c < g.channels * V::lanes; c += V::lanes)
                            V::store(sum + c, V::keep(V::load_mask(mask), V::load(sum + c)));
                    }
                    store(g.result, job, block.row0, block.row + r, tile, g.channels, g.factor, sum);
                }
            });
        }
    }

    // The query rows that a job needs for a block of keys: all that pair, or only its own.
    Chunk queries_of(const Block &keys_block, const Owned &owned) const {
        if (owned.has(keys_block.row) && wants_keys()) return reach(plan, keys_block, false);
        const RowList &planes = plan.rows0();
        Chunk own{planes.begin[keys_block.row0], planes.end[keys_block.row0], owned.end, owned.end};
        for (int64_t q = owned.end; q-- > owned.begin;)
            if (first_key(q) < keys_block.row + keys_block.rows && last_key(q) > keys_block.row) own.begin = q;
        own.end = own.begin;
        while (own.end < owned.end && first_key(own.end) < keys_block.row + keys_block.rows) ++own.end;
        return own;
    }

    // The job's own among the query rows that pair with a block, where their gradients are wanted.
    template <class Body>
    void each_owned(const Chunk &queries, const Owned &owned, const Body &body) const {
        if (!problem.grad_query.data) return;
        for (int64_t q0 = queries.begin0; q0 < queries.end0; ++q0)
            for (int64_t q = most(queries.begin, owned.begin); q < least(queries.end, owned.end); ++q) body(q0, q);
    }

    void announce(const Job &job, const Block &block, const Chunk &queries) {
        stream.clear();
        if (queries.end0 != queries.begin0 + 1) return;
        const auto rows = [&](const Plan &p, const Tensor &t, int64_t begin, int64_t channels) {
            stream_rows(p, codec.element_size, t, job.batch, job.head, job.strip, false, block.row0, begin,
                        begin + plan.block_rows, channels, stream);
        };
        rows(by_query, problem.key, block.row + block.rows, problem.channels);
        rows(by_query, problem.value, block.row + block.rows, problem.value_channels);
        rows(plan, problem.query, queries.end, problem.channels);
        rows(plan, problem.grad_output, queries.end, problem.value_channels);
        rows(plan, problem.output, queries.end, problem.value_channels);
    }

    // Keys [row, row + rows): all that the job owns of the pairs with them.
    void run_block(const Job &job, const Block &block, const Owned &owned) {
        const int64_t row0 = block.row0, end = block.row + block.rows;
        const Chunk chunk{row0, row0 + 1, block.row, end};
        const bool owns_keys = owned.has(block.row);
        const Chunk queries = queries_of(block, owned);
        announce(job, block, queries);
        keys.pack(by_query, codec, job.batch, job.head, job.strip, chunk);
        ring.pack(plan, codec, job.batch, job.head, job.strip, queries, T(problem.scale * log2_e));

        each_owned(queries, owned, [&](int64_t q0, int64_t q) {
            const bool begins =
                by_query.axis0.query.begin[q0] == row0 && first_key(q) >= block.row && first_key(q) < end;
            T *sum = grad_q + ring.slots.of(q0, q) * grad_q_row;
            for (int64_t i = 0; begins && i < grad_q_row; i += V::lanes) V::store(sum + i, reg{});
        });
        if (owns_keys) {
            each_key_gradient(*this, [&](const KeyGradient &g) {
                for (int64_t i = 0; i < tiles_of_strip() * plan.block_rows * g.row; i += V::lanes)
                    V::store(g.sum + i, reg{});
            });
        }
        for (int64_t q0 = queries.begin0; q0 < queries.end0; ++q0) {
            for (int64_t q = queries.begin; q < queries.end;) {
                // In one piece in the ring, and owned as a whole or not at all.
                int64_t next = least(queries.end, (q / plan.block_rows + 1) * plan.block_rows);
                if (q < owned.begin) next = least(next, owned.begin);
                if (q < owned.end) next = least(next, owned.end);
                run_queries(job, {q0, q, static_cast<int>(next - q)}, chunk, owns_keys, owned.has(q));
                if (owns_keys) run_keys(job, block, {q0, q0 + 1, q, next});
                q = next;
            }
        }
        if (owns_keys) store_keys(job, block);
        each_owned(queries, owned, [&](int64_t q0, int64_t q) {
            const bool ends = by_query.axis0.query.end[q0] == row0 + 1 && last_key(q) > block.row && last_key(q) <= end;
            for (int64_t i = 0; ends && i < tiles_of_strip(); ++i)
                if (key_tiles[i].count > 0)
                    store(problem.grad_query, job, q0, q, key_tiles[i], problem.channels, T(problem.scale),
                          grad_q + ring.slots.of(q0, q) * grad_q_row + i * problem.channels * V::lanes);
        });
    }

    void run(const Job &job) {
        if (tiles_strip != job.strip) {
            tiles_strip = job.strip;
            build_tiles(plan, job.strip, key_tiles);
            build_tiles(by_query, job.strip, query_tiles);
        }
        keys.slots.clear();
        ring.slots.clear();
        // What no tile of queries writes, as its lanes do not pair, is read as zero.
        for (int64_t i = 0; wants_keys() && i < plane_elements(); i += V::lanes) {
            V::store(p_plane + i, reg{});
            V::store(ds_plane + i, reg{});
        }
        const Owned owned{plan.segment[job.segment], plan.segment[job.segment + 1]};
        int64_t first = owned.begin, last = owned.end;
        for (int64_t q = owned.begin; wants_queries() && q < owned.end; ++q) {
            first = least(first, first_key(q));
            last = most(last, last_key(q));
        }
        for (int64_t row0 = job.row0_begin; row0 < job.row0_end; ++row0) {
            const auto blocks = [&](int64_t begin, int64_t end) {
                for (int64_t row = begin; row < end; row += plan.block_rows)
                    run_block(job, {row0, row, static_cast<int>(least(plan.block_rows, end - row))}, owned);
            };
            blocks(first, owned.begin);
            blocks(owned.begin, owned.end);
            blocks(owned.end, last);
        }
    }
};

template <class V>
LOCALATTN_INLINE void run_job(JointWorker<V> &worker, const Job &job) {
    worker.run(job);
}

}  // namespace localattn::cpu
