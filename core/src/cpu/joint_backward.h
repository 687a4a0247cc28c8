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
    T *words;               // of a tile of keys: [key row][query row of a block][slot][lane]
    T *grad_k, *grad_v;
    T *bias_scratch;
    ptrdiff_t s_row, grad_q_row, k_row, v_row;
    Stream stream;

    JointWorker(const JointPlan &p, const Codec<V> &c) : plan(p), by_query(p.by_query), problem(*p.problem), codec(c) {}

    int64_t key_tiles_of_strip() const { return plan.strip_tiles * plan.lane_axis.key_period; }
    int64_t query_tiles_of_strip() const { return plan.strip_tiles * plan.lane_axis.query_period; }
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
        take_key_ring(w.keys, w.by_query, Pass::backward, arena);
        take_query_ring(w.ring, plan, arena);
        w.grad_q_row = odd_lines(w.query_tiles_of_strip() * w.problem.channels * V::lanes, sizeof(T));
        w.grad_q = arena.take<T>(plan.ring0 * plan.ring1 * w.grad_q_row);
        w.s_row = odd_lines(plan.block_rows * w.by_query.most_slots * V::lanes, sizeof(T));
        const int64_t rows = most(plan.block_rows, w.by_query.tiles_at_once);
        w.s = arena.take<T>(rows * w.s_row);
        w.dp = arena.take<T>(rows * w.s_row);
        w.p_plane = arena.take<T>(w.plane_elements());
        w.ds_plane = arena.take<T>(w.plane_elements());
        w.words = arena.take<T>(V::word == 1 ? 0 : plan.block_rows * plan.block_rows * plan.most_slots * V::lanes);
        w.k_row = odd_lines(w.problem.channels * V::lanes, sizeof(T));
        w.v_row = odd_lines(w.problem.value_channels * V::lanes, sizeof(T));
        w.grad_k = arena.take<T>(w.key_tiles_of_strip() * plan.block_rows * w.k_row);
        w.grad_v = arena.take<T>(w.key_tiles_of_strip() * plan.block_rows * w.v_row);
        w.bias_scratch = take_bias_scratch<V>(w.by_query, arena);
    }
    int64_t plane_elements() const { return plan.block_rows * plan.block_rows * pair_step(); }

    // The rows that a job owns.
    struct Rows {
        int64_t begin, end;
        bool has(int64_t row) const { return row >= begin && row < end; }
    };
    struct Owned {
        Rows keys, queries;
    };
    Owned owned_by(const Job &job) const {
        const Rows keys{plan.segment[job.segment], plan.segment[job.segment + 1]};
        Rows queries{0, 0};
        while (queries.begin < plan.axis1.query.count && plan.axis1.centre[queries.begin] < keys.begin) ++queries.begin;
        queries.end = queries.begin;
        while (queries.end < plan.axis1.query.count && plan.axis1.centre[queries.end] < keys.end) ++queries.end;
        return {keys, queries};
    }

    // A query tile's lanes among the packed queries.
    int64_t query_column(const Job &job, const LaneTile &tile) const {
        return tile.phase * plan.phase_stride + tile.lane - first_packed_lane(plan, job.strip);
    }
    // A tile's lanes among those of a plane's phase.
    int64_t plane_lane(const Job &job, const LaneTile &tile) const {
        return V::lanes + tile.lane - job.strip * plan.strip_lanes();
    }

    // A row of pairs to the planes, by key lane.
    void write_planes(const LaneTile &tile, int64_t lane, const T *p, const T *ds, int64_t pair) {
        const LanePattern &pattern = *tile.pattern;
        const int64_t beyond = plan.plane_phase - V::lanes;
        for (int i = 0; i < pattern.runs; ++i) {
            const LaneRun &run = pattern.run[i];
            const int64_t plane = tile.phase * plan.offsets - run.offset - plan.lowest;
            const int64_t step = by_query.lane_axis.step, first = lane + run.offset * step;
            const int64_t at = pair * pair_step() + plane * plan.plane_columns + run.phase * plan.plane_phase + first;
            const ptrdiff_t back = plan.plane_columns - step;
            // Nothing reads what lies wholly outside the strip.
            const int64_t begin = first >= 1 ? 0 : (step - first) / step;
            const int64_t end = beyond <= first ? 0 : least(run.count, (beyond - first + step - 1) / step);
            T *p_to = p_plane + at, *ds_to = ds_plane + at;
            for (int64_t j = begin; j < end; ++j) {
                const int64_t from = (run.slot + j) * V::lanes;
                V::store(p_to - j * back, V::load(p + from));
                V::store(ds_to - j * back, V::load(ds + from));
            }
        }
    }

    // Queries that do not exist give nothing to a key that nobody sees, whatever it holds.
    void clear_beyond(const LaneTile &tile, T *p) const {
        if (plan.sees_all_keys || tile.count == V::lanes) return;
        for (int i = 0; i < tile.pattern->slots; ++i)
            for (int l = tile.count; l < V::lanes; ++l) p[i * V::lanes + l] = 0;
    }

    void differentiate_tile(const Job &job, const Block &block, const LaneTile &tile, const Chunk &chunk,
                            bool to_planes, bool owned, T *s, T *dp) {
        const int64_t at = query_column(job, tile), lane = plane_lane(job, tile);
        const auto load = [&](const T *numbers, int r) {
            return V::load(numbers + ring.slots.of(block.row0, block.row + r) * plan.packed + at);
        };
        differentiate_queries<V>(
            by_query, codec, keys, owned ? bias_gradients : BiasGradients{}, bias_scratch, job, block, tile, chunk,
            [&](int r) { return load(ring.lse, r); }, [&](int r) { return load(ring.delta, r); }, s, dp, s_row,
            [&](int r, int64_t b, bool partial, const Mask *key_mask, T *p, T *ds) {
                if (!to_planes) return;
                mask_scores<V>(tile, partial, key_mask, reg{}, p);
                clear_beyond(tile, p);
                clear_beyond(tile, ds);
                write_planes(tile, lane, p, ds, (b - chunk.begin) * plan.block_rows + r);
            });
    }

    // Which of its phase's tiles of the strip a query tile is; those of the halo lie outside.
    int64_t in_strip(int64_t i) const { return i % (plan.strip_tiles + 2 * by_query.halo_tiles) - by_query.halo_tiles; }

    // Queries of one block against a block of keys.
    void run_queries(const Job &job, const Block &block, const Chunk &chunk, bool owns_keys, bool owns_queries) {
        const int64_t slot = ring.slots.of(block.row0, block.row);
        const int64_t count = tiles_in_strip(by_query);
        for (int64_t i = 0, next = 1; i < count; i = next) {
            const LaneTile &tile = query_tiles[i];
            next = i + 1;
            if (tile.count == 0) continue;
            const int64_t in = in_strip(i);
            const bool owned = wants_queries() && owns_queries && in >= 0 && in < plan.strip_tiles;
            const bool to_planes = owns_keys && wants_keys();
            if (!owned && !to_planes) continue;
            // Those that share a pattern lie in the strip and are owned alike.
            const int tiles = tiles_together(by_query, &tile, count - i);
            next = i + tiles;
            const int64_t at = query_column(job, tile);
            const auto rows = [&](const PackedTensor<V> &t) {
                return TileRows<V>{t.scores.data + slot * t.scores.row + at, tiles > 1 ? V::lanes : t.scores.row,
                                   plan.packed};
            };
            score_chunk<V>(by_query, block, tile, chunk, keys.slots, keys.keys, rows(ring.queries),
                           score_factor<V>(problem).sum, s, s_row, stream, tiles);
            score_chunk<V>(by_query, block, tile, chunk, keys.slots, keys.values, rows(ring.grad_outputs), T(1), dp,
                           s_row, stream, tiles);
            for (int t = 0; t < tiles; ++t)
                differentiate_tile(job, block, query_tiles[i + t], chunk, to_planes, owned, s + t * s_row,
                                   dp + t * s_row);
            if (owned && problem.grad_query.data) {
                const ptrdiff_t tile_step = problem.channels * V::lanes;
                T *sum = grad_q + slot * grad_q_row + (tile.phase * plan.strip_tiles + in) * tile_step;
                const TileWeights<V> weights = dense_weights<V>(tile, dp, s_row);
                round_weights<V>(by_query, block, tile, chunk, weights, weights);
                weigh_chunk<V>(by_query, block, tile, chunk, keys.slots, keys.keys, weights, sum,
                               tiles > 1 ? tile_step : grad_q_row, tiles);
            }
        }
    }

    void store(const Tensor &t, const Job &job, int64_t row0, int64_t row, Side side, const LaneTile &tile,
               int64_t channels, T factor, const T *sum) const {
        unpack_tile(plan, codec, sum, side, tile, channels, V::all(factor), t,
                    row_offset(plan, t, job.batch, job.head, side, row0, row));
    }

    // The gradients of one row of queries, summed as [tile of the strip][channel][lane].
    void store_queries(const Job &job, int64_t q0, int64_t q, const T *sum) const {
        for (int64_t i = 0; i < tiles_in_strip(by_query); ++i) {
            const LaneTile &tile = query_tiles[i];
            const int64_t at = in_strip(i);
            if (tile.count == 0 || at < 0 || at >= plan.strip_tiles) continue;
            store(problem.grad_query, job, q0, q, Side::query, tile, problem.channels, T(problem.scale),
                  sum + (tile.phase * plan.strip_tiles + at) * problem.channels * V::lanes);
        }
    }

    // One of the gradients of a block of keys, summed as [tile][key row][channel][lane].
    struct KeyGradient {
        const Tensor &result;
        const PackedTensor<V> &queries;
        T *planes;
        T factor;
        T *sum;
        ptrdiff_t row;
    };
    template <class Body>
    LOCALATTN_INLINE void each_key_gradient(const JointWorker &w, const Body &body) {
        const Problem &p = w.problem;
        if (p.grad_value.data) body(KeyGradient{p.grad_value, w.ring.grad_outputs, w.p_plane, T(1), w.grad_v, w.v_row});
        // Packed queries may be scale * log2(e) times theirs.
        const T factor = V::word == 1 ? T(ln_2) : T(p.scale);
        if (p.grad_key.data) body(KeyGradient{p.grad_key, w.ring.queries, w.ds_plane, factor, w.grad_k, w.k_row});
    }

    // Adds what one block of queries, the first or a later one, gives to the gradients of a block of keys, from the
    // planes.
    void run_keys(const Job &job, const Block &block, const Chunk &queries, bool first) {
        const int64_t count = key_tiles_of_strip();
        for (int64_t i = 0, together = 1; i < count; i += together) {
            const LaneTile &tile = key_tiles[i];
            together = 1;
            if (tile.count == 0) continue;
            const int tiles = tiles_together(plan, &tile, count - i);
            together = tiles;
            each_key_gradient(*this, [&](const KeyGradient &g) {
                const ptrdiff_t plane = plan.plane_columns;
                TileWeights<V> weights{g.planes + tile.phase * plan.plane_phase + plane_lane(job, tile),
                                       tiles > 1 ? V::lanes : plan.block_rows * pair_step(),
                                       pair_step(),
                                       plane,
                                       0,
                                       plan.offsets * plane,
                                       plane};
                weights.data -= plan.lowest * plane;
                if (V::word > 1) {
                    const ptrdiff_t cell = tile.pattern->slots * V::lanes;
                    const TileWeights<V> rounded{words, plan.block_rows * cell, cell};
                    round_weights<V>(plan, block, tile, queries, weights, rounded);
                    weights = rounded;
                }
                weigh_chunk<V>(plan, block, tile, queries, ring.slots, g.queries, weights,
                               g.sum + i * plan.block_rows * g.row, g.row, tiles, first);
            });
        }
    }

    void store_keys(const Job &job, const Block &block) {
        for (int64_t i = 0; i < key_tiles_of_strip(); ++i) {
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
                        for (int64_t c = 0; c < g.queries.channels * V::lanes; c += V::lanes)
                            V::store(sum + c, V::keep(V::load_mask(mask), V::load(sum + c)));
                    }
                    store(g.result, job, block.row0, block.row + r, Side::key, tile, g.queries.channels, g.factor, sum);
                }
            });
        }
    }

    // The query rows that a job needs for a block of keys: all that pair, or only its own.
    Chunk queries_of(const Block &keys_block, const Owned &owned) const {
        if (owned.keys.has(keys_block.row) && wants_keys()) return reach(plan, keys_block, false);
        const RowList &planes = plan.rows0();
        const Rows &rows = owned.queries;
        Chunk own{planes.begin[keys_block.row0], planes.end[keys_block.row0], rows.end, rows.end};
        for (int64_t q = rows.end; q-- > rows.begin;)
            if (first_key(q) < keys_block.row + keys_block.rows && last_key(q) > keys_block.row) own.begin = q;
        own.end = own.begin;
        while (own.end < rows.end && first_key(own.end) < keys_block.row + keys_block.rows) ++own.end;
        return own;
    }

    // The job's own among the query rows that pair with a block, where their gradients are wanted.
    template <class Body>
    void each_owned(const Chunk &queries, const Owned &owned, const Body &body) const {
        if (!problem.grad_query.data) return;
        for (int64_t q0 = queries.begin0; q0 < queries.end0; ++q0)
            for (int64_t q = most(queries.begin, owned.queries.begin); q < least(queries.end, owned.queries.end); ++q)
                body(q0, q);
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
        const bool owns_keys = owned.keys.has(block.row);
        const Chunk queries = queries_of(block, owned);
        announce(job, block, queries);
        keys.pack(by_query, codec, job.batch, job.head, job.strip, chunk);
        ring.pack(plan, codec, job.batch, job.head, job.strip, queries, score_factor<V>(problem).operand);

        each_owned(queries, owned, [&](int64_t q0, int64_t q) {
            const bool begins =
                by_query.axis0.query.begin[q0] == row0 && first_key(q) >= block.row && first_key(q) < end;
            T *sum = grad_q + ring.slots.of(q0, q) * grad_q_row;
            for (int64_t i = 0; begins && i < grad_q_row; i += V::lanes) V::store(sum + i, reg{});
        });
        bool first = true;
        for (int64_t q0 = queries.begin0; q0 < queries.end0; ++q0) {
            for (int64_t q = queries.begin; q < queries.end;) {
                // In one piece in the ring, and owned as a whole or not at all.
                int64_t next = least(queries.end, (q / plan.block_rows + 1) * plan.block_rows);
                if (q < owned.queries.begin) next = least(next, owned.queries.begin);
                if (q < owned.queries.end) next = least(next, owned.queries.end);
                run_queries(job, {q0, q, static_cast<int>(next - q)}, chunk, owns_keys, owned.queries.has(q));
                if (owns_keys) run_keys(job, block, {q0, q0 + 1, q, next}, first);
                first = false;
                q = next;
            }
        }
        if (owns_keys && first) run_keys(job, block, {row0, row0, 0, 0}, first);
        if (owns_keys) store_keys(job, block);
        each_owned(queries, owned, [&](int64_t q0, int64_t q) {
            const bool ends = by_query.axis0.query.end[q0] == row0 + 1 && last_key(q) > block.row && last_key(q) <= end;
            if (ends) store_queries(job, q0, q, grad_q + ring.slots.of(q0, q) * grad_q_row);
        });
    }

    // The gradients of queries that no row of keys pairs with, as strided windows may lie outside the map.
    void store_unpaired(const Job &job, const Owned &owned) {
        if (!problem.grad_query.data) return;
        for (int64_t i = 0; i < grad_q_row; i += V::lanes) V::store(grad_q + i, reg{});
        const RowList &planes = plan.axis0.query, &rows = plan.axis1.query;
        for (int64_t q0 = 0; q0 < planes.count; ++q0) {
            if (plan.axis0.centre[q0] < job.row0_begin || plan.axis0.centre[q0] >= job.row0_end) continue;
            const bool none = planes.begin[q0] >= planes.end[q0];
            for (int64_t q = owned.queries.begin; q < owned.queries.end; ++q)
                if (none || rows.begin[q] >= rows.end[q]) store_queries(job, q0, q, grad_q);
        }
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
        const Owned owned = owned_by(job);
        store_unpaired(job, owned);
        int64_t first = owned.keys.begin, last = owned.keys.end;
        for (int64_t q = owned.queries.begin; wants_queries() && q < owned.queries.end; ++q) {
            if (first_key(q) >= last_key(q)) continue;
            first = least(first, first_key(q));
            last = most(last, last_key(q));
        }
        for (int64_t row0 = job.row0_begin; row0 < job.row0_end; ++row0) {
            const auto blocks = [&](int64_t begin, int64_t end) {
                for (int64_t row = begin; row < end; row += plan.block_rows)
                    run_block(job, {row0, row, static_cast<int>(least(plan.block_rows, end - row))}, owned);
            };
            blocks(first, owned.keys.begin);
            blocks(owned.keys.begin, owned.keys.end);
            blocks(owned.keys.end, last);
        }
    }
};

template <class V>
LOCALATTN_INLINE void run_job(JointWorker<V> &worker, const Job &job) {
    worker.run(job);
}

}  // namespace localattn::cpu
