// Fused attention, backward, in two passes that both recompute the scores; nothing of size k^2 a pixel is stored.
//
//   p = exp(s - lse)      dp = grad_output . v      ds = p (dp - delta)      delta = grad_output . output - grad_lse
//   query pass: grad_query = scale sum ds k         key pass: grad_value = sum p grad_output, grad_key = scale sum ds q
//
// The query pass walks keys for tiles of queries (A = query); the key pass walks queries for tiles of keys (A = key)
// over the transposed window. Each gradient is finished in one place: no atomics, no halo to add up, one rounding.
// Work a pair: 3 contractions and 4. joint_backward.h needs 5 in all; these passes are for what it does not take.
#pragma once
#include "scores.h"

namespace localattn::cpu {

// s to weights p, dp to ds, for one row of scores.
template <class V>
LOCALATTN_INLINE void differentiate(int64_t n, typename V::reg lse, typename V::reg delta, typename V::T *s,
                                    typename V::T *dp) {
    for (int64_t i = 0; i < n * V::lanes; i += V::lanes) {
        const typename V::reg p = V::exp2(V::load(s + i) - lse);
        V::store(s + i, p);
        V::store(dp + i, p * (V::load(dp + i) - delta));
    }
}

// The same for a chunk of scores whose lanes are queries, with biases, masks, and the gradients of biases that are
// asked for: s becomes p, unmasked, and dp becomes ds. For each row of pairs on the map, found(row of queries, row of
// keys, partial, key mask, p, ds) then sees them.
template <class V, class Lse, class Delta, class Found>
LOCALATTN_INLINE void differentiate_queries(const Plan &plan, const Codec<V> &codec, const KeyRing<V> &keys,
                                            const BiasGradients &bias_gradients, typename V::T *bias_scratch,
                                            const Job &job, const Block &block, const LaneTile &tile,
                                            const Chunk &chunk, const Lse &lse_of, const Delta &delta_of,
                                            typename V::T *s, typename V::T *dp, ptrdiff_t s_row, const Found &found) {
    using T = typename V::T;
    using reg = typename V::reg;
    const Problem &problem = *plan.problem;
    const LanePattern &pattern = *tile.pattern;
    const bool bias = problem.has_bias(), wants_bias = bias_gradients.any();
    for (int r = 0; r < block.rows; ++r) {
        const reg lse = lse_of(r), delta = delta_of(r);
        for (int64_t b0 = chunk.begin0; b0 < chunk.end0; ++b0) {
            int64_t begin, end;
            present_rows(plan, block.row0, block.row + r, b0, begin, end);
            begin = most(begin, chunk.begin);
            end = least(end, chunk.end);
            const auto real = [&](int64_t b) { return is_real(plan, block, r, b0, b); };
            // Rows outside the map matter to the gradients of biases only.
            while (!wants_bias && begin < end && !real(begin)) ++begin;
            while (!wants_bias && begin < end && !real(end - 1)) --end;
            if (begin >= end) continue;
            const auto cell = [&](int64_t b) { return r * s_row + chunk.index(b0, b) * pattern.slots * V::lanes; };
            for (int64_t b = begin; b < end; ++b) {
                for (int i = 0; i < pattern.slots && !real(b); ++i) {
                    V::store(s + cell(b) + i * V::lanes, reg{});
                    V::store(dp + cell(b) + i * V::lanes, reg{});
                }
            }
            const BiasRow row = bias_row(plan, job.batch, job.head, block.row0, block.row + r, b0, begin);
            if (bias) codec.add_query_bias(plan, tile, row, end - begin, T(log2_e), bias_scratch, s + cell(begin));
            for (int64_t b = begin; b < end; ++b) {
                T *scores = s + cell(b), *ds = dp + cell(b);
                differentiate<V>(pattern.slots, lse, delta, scores, ds);
                const bool partial =
                    problem.raster && b0 == plan.axis0.centre[block.row0] && b == plan.axis1.centre[block.row + r];
                const typename V::Mask *key_mask = real(b) ? keys.mask_of(b0, b, tile) : nullptr;
                mask_scores<V>(tile, partial, key_mask, reg{}, ds);
                if (real(b)) found(r, b, partial, key_mask, scores, ds);
            }
            if (wants_bias)
                add_bias_gradients<V>(plan, tile, row, end - begin, bias_gradients, bias_scratch, dp + cell(begin));
        }
    }
}

template <class V>
struct QueryPassWorker {
    using T = typename V::T;
    using Mask = typename V::Mask;
    using reg = typename V::reg;

    const Plan &plan;
    const Problem &problem;
    const Codec<V> &codec;
    BiasGradients bias_gradients;
    LaneTile *tiles;
    int64_t tiles_strip = -1;
    KeyRing<V> ring;
    T *q, *grad_o, *o, *grad_q, *s, *dp, *lse, *delta, *bias_scratch;
    ptrdiff_t q_row, o_row, s_row;
    Stream stream;

    QueryPassWorker(const Plan &p, const Codec<V> &c) : plan(p), problem(*p.problem), codec(c) {}

    LOCALATTN_INLINE void take(QueryPassWorker &w, Arena &arena) {
        const Plan &plan = w.plan;
        w.tiles = take_tiles(plan, arena);
        take_key_ring(w.ring, plan, Pass::backward, arena);
        w.q_row = odd_lines(w.problem.channels * V::lanes, sizeof(T));
        w.o_row = odd_lines(w.problem.value_channels * V::lanes, sizeof(T));
        w.s_row = odd_lines(plan.chunk_rows * plan.most_slots * V::lanes, sizeof(T));
        w.q = arena.take<T>(plan.block_rows * w.q_row);
        w.grad_q = arena.take<T>(plan.block_rows * w.q_row);
        w.grad_o = arena.take<T>(plan.block_rows * w.o_row);
        w.o = arena.take<T>(w.o_row);
        w.s = arena.take<T>(plan.block_rows * w.s_row);
        w.dp = arena.take<T>(plan.block_rows * w.s_row);
        w.lse = arena.take<T>(plan.block_rows * V::lanes);
        w.delta = arena.take<T>(plan.block_rows * V::lanes);
        w.bias_scratch = take_bias_scratch<V>(w.plan, arena);
    }

    void load_queries(const Job &job, const Block &block, const LaneTile &tile) {
        for (int r = 0; r < block.rows; ++r) {
            const auto pack = [&](const Tensor &t, int64_t channels, T factor, T *out) {
                pack_tile(plan, codec, t, row_of(plan, t, job, block, r), tile, channels, factor, out);
            };
            const auto numbers = [&](const Tensor &t, T rest) {
                return gather<V>(static_cast<const T *>(t.data) + row_of(plan, t, job, block, r) +
                                     lane_offset(plan, t, Side::query, tile),
                                 lane_step(plan, t, Side::query), tile.count, rest);
            };
            T *go = grad_o + r * o_row;
            pack(problem.query, problem.channels, score_factor<V>(problem).operand, q + r * q_row);
            pack(problem.grad_output, problem.value_channels, T(1), go);
            pack(problem.output, problem.value_channels, T(1), o);
            reg sum{};
            for (int64_t c = 0; c < V::words(problem.value_channels) * V::lanes; c += V::lanes)
                sum = V::multiply_add(sum, V::load(go + c), V::load(o + c));
            if (problem.grad_lse.data) sum -= numbers(problem.grad_lse, T(0));
            const reg natural = numbers(problem.lse, -T(__builtin_inf()));
            store_statistics<V>(natural * T(log2_e), sum, lse + r * V::lanes, delta + r * V::lanes);
            for (int64_t c = 0; c < problem.channels; ++c) V::store(grad_q + r * q_row + c * V::lanes, reg{});
        }
    }

    void differentiate_chunk(const Job &job, const Block &block, const LaneTile &tile, const Chunk &chunk) {
        const auto lse_of = [&](int r) { return V::load(lse + r * V::lanes); };
        const auto delta_of = [&](int r) { return V::load(delta + r * V::lanes); };
        differentiate_queries<V>(plan, codec, ring, bias_gradients, bias_scratch, job, block, tile, chunk, lse_of,
                                 delta_of, s, dp, s_row, [](int, int64_t, bool, const Mask *, T *, T *) {});
    }

    void run_tile(const Job &job, const Block &block, const Chunk &all, const LaneTile &tile) {
        load_queries(job, block, tile);
        for (Chunks chunks = chunks_of(plan, all); next_chunk(chunks);) {
            const Chunk &chunk = chunks.now;
            ring.pack(plan, codec, job.batch, job.head, job.strip, chunk);
            score_chunk<V>(plan, block, tile, chunk, ring.slots, ring.keys, {q, q_row}, score_factor<V>(problem).sum, s,
                           s_row, stream);
            score_chunk<V>(plan, block, tile, chunk, ring.slots, ring.values, {grad_o, o_row}, T(1), dp, s_row, stream);
            differentiate_chunk(job, block, tile, chunk);
            if (!problem.grad_query.data) continue;
            const TileWeights<V> weights = dense_weights<V>(tile, dp, s_row);
            round_weights<V>(plan, block, tile, chunk, weights, weights);
            weigh_chunk<V>(plan, block, tile, chunk, ring.slots, ring.keys, weights, grad_q, q_row);
        }
        const Tensor &g = problem.grad_query;
        if (!g.data) return;
        for (int r = 0; r < block.rows; ++r)
            unpack_tile(plan, codec, grad_q + r * q_row, Side::query, tile, problem.channels, V::all(T(problem.scale)),
                        g, row_of(plan, g, job, block, r));
    }

    void announce(const Job &job, const Block &block, const Chunk &all, int64_t end) {
        stream.clear();
        const int64_t next = block.row + block.rows, kv_head = job.head / (problem.heads / problem.kv_heads);
        if (next >= end || all.end0 != all.begin0 + 1) return;
        const int rows_of_a = static_cast<int>(least(plan.block_rows, end - next));
        const Chunk ahead = reach(plan, {block.row0, next, rows_of_a}, bias_gradients.any());
        const auto rows = [&](const Tensor &t, bool of_a, int64_t head, int64_t channels) {
            stream_rows(plan, codec.element_size, t, job.batch, head, job.strip, of_a, of_a ? block.row0 : all.begin0,
                        of_a ? next : all.end, of_a ? next + rows_of_a : ahead.end, channels, stream);
        };
        rows(problem.key, false, kv_head, problem.channels);
        rows(problem.value, false, kv_head, problem.value_channels);
        rows(problem.query, true, job.head, problem.channels);
        rows(problem.grad_output, true, job.head, problem.value_channels);
        rows(problem.output, true, job.head, problem.value_channels);
    }

    const RingSlots &packed_rows() const { return ring.slots; }

    // `end`: where the job's rows end.
    void run_block(const Job &job, const Block &block, int64_t end) {
        const Chunk all = reach(plan, block, bias_gradients.any());
        announce(job, block, all, end);
        for (int64_t i = 0; i < tiles_in_strip(plan); ++i)
            if (tiles[i].count > 0) run_tile(job, block, all, tiles[i]);
    }
};

// Queries of one head with all that a pass over keys asks of them.
template <class V>
struct QueryRing {
    using T = typename V::T;
    using reg = typename V::reg;
    RingSlots slots;
    PackedTensor<V> queries, grad_outputs;
    T *lse, *delta;  // [ring rows][packed], as store_statistics leaves them
    T *output;       // one packed row, for delta

    // Makes the chunk's rows be there, queries times `factor`.
    void pack(const Plan &plan, const Codec<V> &codec, int64_t batch, int64_t head, int64_t strip, const Chunk &chunk,
              T factor) const {
        const Problem &problem = *plan.problem;
        const int64_t columns = plan.phase_stride * plan.lane_axis.query_period;
        each_missing(plan, slots, chunk, [&](int64_t b0, int64_t b, int64_t slot) {
            const auto offset = [&](const Tensor &t) { return row_offset(plan, t, batch, head, Side::query, b0, b); };
            const T *go = grad_outputs.scores.data + slot * grad_outputs.scores.row;
            T *l = lse + slot * plan.packed, *d = delta + slot * plan.packed;
            pack_tensor(plan, codec, problem.query, offset(problem.query), strip, slot, queries, factor);
            pack_tensor(plan, codec, problem.grad_output, offset(problem.grad_output), strip, slot, grad_outputs);
            pack_row<V>(plan, codec, problem.output, offset(problem.output), strip, problem.value_channels, output);
            pack_numbers<V>(plan, static_cast<const T *>(problem.lse.data) + offset(problem.lse), problem.lse.axis[2],
                            strip, T(log2_e), -T(__builtin_inf()), l);
            if (problem.grad_lse.data)
                pack_numbers<V>(plan, static_cast<const T *>(problem.grad_lse.data) + offset(problem.grad_lse),
                                problem.grad_lse.axis[2], strip, T(-1), T(0), d);
            for (int64_t x = 0; x < columns; x += V::lanes) {
                reg sum = problem.grad_lse.data ? V::load(d + x) : reg{};
                for (int64_t c = 0; c < V::words(problem.value_channels); ++c)
                    sum =
                        V::multiply_add(sum, V::load(go + c * plan.packed + x), V::load(output + c * plan.packed + x));
                store_statistics<V>(V::load(l + x), sum, l + x, d + x);
            }
        });
    }
};
template <class V>
LOCALATTN_INLINE void take_query_ring(QueryRing<V> &ring, const Plan &plan, Arena &arena) {
    using T = typename V::T;
    const int64_t rows = plan.ring0 * plan.ring1;
    ring.slots = {arena.take<int64_t>(rows), plan.ring0, plan.ring1};
    const Problem &problem = *plan.problem;
    ring.queries = take_tensor<V>(plan, problem.channels, true, problem.grad_key.data != nullptr, arena);
    ring.grad_outputs = take_tensor<V>(plan, problem.value_channels, true, problem.grad_value.data != nullptr, arena);
    ring.lse = arena.take<T>(rows * plan.packed + plan.lead);
    ring.delta = arena.take<T>(rows * plan.packed + plan.lead);
    ring.output = arena.take<T>(V::words(problem.value_channels) * plan.packed + plan.lead);
}

template <class V>
struct KeyPassWorker {
    using T = typename V::T;
    using Mask = typename V::Mask;
    using reg = typename V::reg;

    const Plan &plan;
    const Problem &problem;
    const Codec<V> &codec;
    LaneTile *tiles;
    int64_t tiles_strip = -1;
    QueryRing<V> ring;
    T *k, *v, *grad_k, *grad_v, *s, *dp;
    Mask *key_mask;  // [rows][lanes]
    ptrdiff_t k_row, v_row, s_row;
    Stream stream;

    KeyPassWorker(const Plan &p, const Codec<V> &c) : plan(p), problem(*p.problem), codec(c) {}

    LOCALATTN_INLINE void take(KeyPassWorker &w, Arena &arena) {
        const Plan &plan = w.plan;
        w.tiles = take_tiles(plan, arena);
        take_query_ring(w.ring, plan, arena);
        w.k_row = odd_lines(w.problem.channels * V::lanes, sizeof(T));
        w.v_row = odd_lines(w.problem.value_channels * V::lanes, sizeof(T));
        w.s_row = odd_lines(plan.chunk_rows * plan.most_slots * V::lanes, sizeof(T));
        w.k = arena.take<T>(plan.block_rows * w.k_row);
        w.v = arena.take<T>(plan.block_rows * w.v_row);
        // Where query heads share keys, each head passes all tiles in turn, over the same packed rows.
        const int64_t sums = w.problem.heads > w.problem.kv_heads ? tiles_in_strip(plan) : 1;
        w.grad_k = arena.take<T>(sums * plan.block_rows * w.k_row);
        w.grad_v = arena.take<T>(sums * plan.block_rows * w.v_row);
        w.s = arena.take<T>(plan.block_rows * w.s_row);
        w.dp = arena.take<T>(plan.block_rows * w.s_row);
        w.key_mask = arena.take<Mask>(plan.block_rows * V::lanes);
    }

    void load_keys(const Job &job, const Block &block, const LaneTile &tile) {
        for (int r = 0; r < block.rows; ++r) {
            const auto pack = [&](const Tensor &t, int64_t channels, T factor, T *out) {
                pack_tile(plan, codec, t, row_of(plan, t, job, block, r), tile, channels, factor, out);
            };
            pack(problem.key, problem.channels, score_factor<V>(problem).operand, k + r * k_row);
            pack(problem.value, problem.value_channels, T(1), v + r * v_row);
            if (const Tensor &m = problem.key_mask; m.data) {
                const uint8_t *attends = static_cast<const uint8_t *>(m.data) + row_of(plan, m, job, block, r) +
                                         lane_offset(plan, m, Side::key, tile);
                for (int l = 0; l < V::lanes; ++l)
                    key_mask[r * V::lanes + l] = l < tile.count && attends[l * lane_step(plan, m, Side::key)] ? -1 : 0;
            }
        }
    }

    void differentiate_chunk(const Job &job, int64_t head, const Block &block, const LaneTile &tile,
                             const Chunk &chunk) {
        const LanePattern &pattern = *tile.pattern;
        const bool bias = problem.has_bias();
        for (int64_t b0 = chunk.begin0; b0 < chunk.end0; ++b0) {
            for (int64_t b = chunk.begin; b < chunk.end; ++b) {
                const PairedRows paired = paired_rows(plan, block, b0, b);
                const T *l = ring.lse + ring.slots.of(b0, b) * plan.packed + tile.column;
                const T *d = ring.delta + ring.slots.of(b0, b) * plan.packed + tile.column;
                for (int r = paired.begin; r < paired.end; ++r) {
                    const int64_t cell = chunk.index(b0, b) * pattern.slots * V::lanes;
                    T *scores = s + r * s_row + cell, *ds = dp + r * s_row + cell;
                    if (bias)
                        codec.add_key_bias(plan, tile,
                                           bias_row(plan, job.batch, head, b0, b, block.row0, block.row + r), T(log2_e),
                                           scores);
                    for (int i = 0; i < pattern.slots; ++i) {
                        const int64_t column = pattern.column[i];
                        differentiate<V>(1, V::load(l + column), V::load(d + column), scores + i * V::lanes,
                                         ds + i * V::lanes);
                    }
                    const bool partial = r >= paired.partial_begin && r < paired.partial_end;
                    mask_scores<V>(tile, partial, nullptr, reg{}, scores);
                    mask_scores<V>(tile, partial, nullptr, reg{}, ds);
                }
            }
        }
    }

    // `head` is one of the query heads that share the job's keys; the sums over all of them stay in `index`.
    void run_tile(const Job &job, int64_t head, const Block &block, const Chunk &all, const LaneTile &tile,
                  int64_t index) {
        T *sum_k = grad_k + index * plan.block_rows * k_row, *sum_v = grad_v + index * plan.block_rows * v_row;
        const int64_t share = problem.heads / problem.kv_heads;
        load_keys(job, block, tile);
        if (head == job.head * share) {
            for (int64_t i = 0; i < block.rows * k_row; i += V::lanes) V::store(sum_k + i, reg{});
            for (int64_t i = 0; i < block.rows * v_row; i += V::lanes) V::store(sum_v + i, reg{});
        }
        for (Chunks chunks = chunks_of(plan, all); next_chunk(chunks);) {
            const Chunk &chunk = chunks.now;
            ring.pack(plan, codec, job.batch, head, job.strip, chunk, T(1));
            score_chunk<V>(plan, block, tile, chunk, ring.slots, ring.queries, {k, k_row}, score_factor<V>(problem).sum,
                           s, s_row, stream);
            score_chunk<V>(plan, block, tile, chunk, ring.slots, ring.grad_outputs, {v, v_row}, T(1), dp, s_row,
                           stream);
            differentiate_chunk(job, head, block, tile, chunk);
            const auto weigh = [&](const Tensor &result, const PackedTensor<V> &queries, T *scores, T *sum,
                                   ptrdiff_t row) {
                if (!result.data) return;
                const TileWeights<V> weights = dense_weights<V>(tile, scores, s_row);
                round_weights<V>(plan, block, tile, chunk, weights, weights);
                weigh_chunk<V>(plan, block, tile, chunk, ring.slots, queries, weights, sum, row);
            };
            weigh(problem.grad_value, ring.grad_outputs, s, sum_v, v_row);
            weigh(problem.grad_key, ring.queries, dp, sum_k, k_row);
        }
        if (head + 1 < (job.head + 1) * share) return;
        const auto store = [&](const Tensor &t, int r, int64_t channels, T factor, T *g) {
            if (!t.data) return;
            if (problem.key_mask.data) {
                for (int64_t c = 0; c < channels * V::lanes; c += V::lanes)
                    V::store(g + c, V::keep(V::load_mask(key_mask + r * V::lanes), V::load(g + c)));
            }
            unpack_tile(plan, codec, g, Side::key, tile, channels, V::all(factor), t, row_of(plan, t, job, block, r));
        };
        for (int r = 0; r < block.rows; ++r) {
            store(problem.grad_key, r, problem.channels, T(problem.scale), sum_k + r * k_row);
            store(problem.grad_value, r, problem.value_channels, T(1), sum_v + r * v_row);
        }
    }

    void announce(const Job &job, const Block &block, const Chunk &all, int64_t end) {
        stream.clear();
        const int64_t next = block.row + block.rows;
        if (next >= end || all.end0 != all.begin0 + 1 || problem.heads != problem.kv_heads) return;
        const int rows_of_a = static_cast<int>(least(plan.block_rows, end - next));
        const Chunk ahead = reach(plan, {block.row0, next, rows_of_a}, false);
        const auto rows = [&](const Tensor &t, bool of_a, int64_t channels) {
            stream_rows(plan, codec.element_size, t, job.batch, job.head, job.strip, of_a,
                        of_a ? block.row0 : all.begin0, of_a ? next : all.end, of_a ? next + rows_of_a : ahead.end,
                        channels, stream);
        };
        rows(problem.query, false, problem.channels);
        rows(problem.grad_output, false, problem.value_channels);
        rows(problem.output, false, problem.value_channels);
        rows(problem.key, true, problem.channels);
        rows(problem.value, true, problem.value_channels);
    }

    const RingSlots &packed_rows() const { return ring.slots; }

    // `end`: where the job's rows end.
    void run_block(const Job &job, const Block &block, int64_t end) {
        const Chunk all = reach(plan, block, false);
        announce(job, block, all, end);
        const int64_t share = problem.heads / problem.kv_heads;
        for (int64_t head = job.head * share; head < (job.head + 1) * share; ++head) {
            if (share > 1) ring.slots.clear();
            for (int64_t i = 0; i < tiles_in_strip(plan); ++i)
                if (tiles[i].count > 0) run_tile(job, head, block, all, tiles[i], share > 1 ? i : 0);
        }
    }
};

}  // namespace localattn::cpu
