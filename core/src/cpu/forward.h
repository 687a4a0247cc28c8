// Fused attention, forward.
//
//   o[q] = sum_u exp(s[q,u] - max) v[u] / sum_u exp(s[q,u] - max),   s = scale q.k + bias,   lse = max + log(sum)
//
// Work: 2 (channels + value channels) multiply-adds a pair, one exp2. Bytes: Q, K, V, O once each, K and V packed into
// L2-sized strips and read from there k^2/rows times. A job is a strip of columns for a run of query rows of one head;
// within it a block of query rows x one tile of 16 (or 8, 4) columns has all scores in cache at a time, so nothing of
// size k^2 a pixel leaves it. Windows too large for that are taken in chunks with a running maximum.
#pragma once
#include "scores.h"

namespace localattn::cpu {

template <class V>
struct ForwardWorker {
    using T = typename V::T;
    using Mask = typename V::Mask;
    using reg = typename V::reg;

    const Plan &plan;
    const Problem &problem;
    const Codec<V> &codec;
    LaneTile *tiles;
    int64_t tiles_strip = -1;
    KeyRing<V> ring;
    T *q, *o, *s, *maximum, *sum, *bias_scratch;
    ptrdiff_t q_row, o_row, s_row;
    Stream stream;

    ForwardWorker(const Plan &p, const Codec<V> &c) : plan(p), problem(*p.problem), codec(c) {}

    LOCALATTN_INLINE void take(ForwardWorker &w, Arena &arena) {
        const Plan &plan = w.plan;
        w.tiles = take_tiles(plan, arena);
        take_key_ring(w.ring, plan, Pass::forward, arena);
        w.q_row = odd_lines(V::words(w.problem.channels) * V::lanes, sizeof(T));
        w.o_row = odd_lines(w.problem.value_channels * V::lanes, sizeof(T));
        w.s_row = odd_lines(plan.chunk_rows * plan.most_slots * V::lanes, sizeof(T));
        const int64_t rows = plan.block_rows * plan.tiles_at_once;
        w.q = arena.take<T>(rows * w.q_row);
        w.o = arena.take<T>(rows * w.o_row);
        w.s = arena.take<T>(rows * w.s_row);
        w.maximum = arena.take<T>(rows * V::lanes);
        w.sum = arena.take<T>(rows * V::lanes);
        w.bias_scratch = take_bias_scratch<V>(w.plan, arena);
    }

    // What the micro-kernel left out: rows outside the map, biases, masks.
    void finish_scores(const Job &job, const Block &block, const LaneTile &tile, const Chunk &chunk, int index) {
        const LanePattern &pattern = *tile.pattern;
        const bool bias = problem.has_bias(), outside = problem.axis[2].border == Border::zero;
        if (!bias && !outside && !pattern.masks_scores && !ring.key_mask && !problem.raster) return;
        for (int r = 0; r < block.rows; ++r) {
            for (int64_t b0 = chunk.begin0; b0 < chunk.end0; ++b0) {
                int64_t begin, end;
                present_rows(plan, block.row0, block.row + r, b0, begin, end);
                begin = most(begin, chunk.begin);
                end = least(end, chunk.end);
                if (begin >= end) continue;
                const auto row = [&](int64_t b) {
                    return s + (index + r) * s_row + chunk.index(b0, b) * pattern.slots * V::lanes;
                };
                const auto real = [&](int64_t b) { return is_real(plan, block, r, b0, b); };
                for (int64_t b = begin; b < end; ++b)
                    for (int i = 0; i < pattern.slots && !real(b); ++i) V::store(row(b) + i * V::lanes, reg{});
                if (bias)
                    codec.add_query_bias(plan, tile,
                                         bias_row(plan, job.batch, job.head, block.row0, block.row + r, b0, begin),
                                         end - begin, T(log2_e), bias_scratch, row(begin));
                for (int64_t b = begin; b < end; ++b) {
                    const bool partial =
                        problem.raster && b0 == plan.axis0.centre[block.row0] && b == plan.axis1.centre[block.row + r];
                    mask_scores<V>(tile, partial, real(b) ? ring.mask_of(b0, b, tile) : nullptr,
                                   V::all(-T(__builtin_inf())), row(b));
                }
            }
        }
    }

    // Scores to weights, exp2(s - maximum); earlier chunks' sums move to the new maximum.
    void soften(const Block &block, const LaneTile &tile, const Chunk &chunk, bool first, int index) {
        const int64_t cell = tile.pattern->slots * V::lanes;
        const reg lowest = V::all(-T(__builtin_inf()));
        for (int r = 0; r < block.rows; ++r) {
            reg m0 = V::load(maximum + (index + r) * V::lanes), m1 = lowest, m2 = lowest, m3 = lowest;
            const reg before = m0;
            T *row = s + (index + r) * s_row;
            const auto each_piece = [&](auto &&piece) __attribute__((always_inline)) {
                for (int64_t b0 = chunk.begin0; b0 < chunk.end0; ++b0) {
                    int64_t begin, end;
                    present_rows(plan, block.row0, block.row + r, b0, begin, end);
                    begin = most(begin, chunk.begin);
                    end = least(end, chunk.end);
                    if (begin < end) piece(row + chunk.index(b0, begin) * cell, (end - begin) * tile.pattern->slots);
                }
            };
            each_piece([&](const T *p, int64_t n) __attribute__((always_inline)) {
                int64_t i = 0;
                for (; i + 4 <= n; i += 4, p += 4 * V::lanes) {
                    m0 = V::max(m0, V::load(p));
                    m1 = V::max(m1, V::load(p + V::lanes));
                    m2 = V::max(m2, V::load(p + 2 * V::lanes));
                    m3 = V::max(m3, V::load(p + 3 * V::lanes));
                }
                for (; i < n; ++i, p += V::lanes) m0 = V::max(m0, V::load(p));
            });
            m0 = V::max(V::max(m0, m1), V::max(m2, m3));
            V::store(maximum + (index + r) * V::lanes, m0);
            const reg shift = V::shift_of(m0);
            reg s0{}, s1{};
            if (!first) {
                const reg decay = V::exp2(before - shift);
                s0 = decay * V::load(sum + (index + r) * V::lanes);
                for (int64_t c = 0; c < problem.value_channels; ++c) {
                    T *p = o + (index + r) * o_row + c * V::lanes;
                    V::store(p, decay * V::load(p));
                }
            }
            each_piece([&](T *p, int64_t n) __attribute__((always_inline)) {
                int64_t i = 0;
                for (; i + 4 <= n; i += 4, p += 4 * V::lanes) {
                    const reg a = V::exp2(V::load(p) - shift);
                    const reg b = V::exp2(V::load(p + V::lanes) - shift);
                    const reg c = V::exp2(V::load(p + 2 * V::lanes) - shift);
                    const reg d = V::exp2(V::load(p + 3 * V::lanes) - shift);
                    V::store(p, a);
                    V::store(p + V::lanes, b);
                    V::store(p + 2 * V::lanes, c);
                    V::store(p + 3 * V::lanes, d);
                    s0 += a + b;
                    s1 += c + d;
                }
                for (; i < n; ++i, p += V::lanes) {
                    const reg a = V::exp2(V::load(p) - shift);
                    V::store(p, a);
                    s0 += a;
                }
            });
            V::store(sum + (index + r) * V::lanes, s0 + s1);
        }
    }

    void finish(const Job &job, const Block &block, const LaneTile &tile, int index) {
        for (int r = 0; r < block.rows; ++r) {
            const reg total = V::load(sum + (index + r) * V::lanes);
            const reg inverse = V::inverse_of(total);
            const Tensor &out = problem.output, &lse = problem.lse;
            unpack_tile(plan, codec, o + (index + r) * o_row, Side::query, tile, problem.value_channels, inverse, out,
                        row_of(plan, out, job, block, r));
            if (lse.data) {
                alignas(64) T natural[V::lanes];
                V::store(natural, (V::load(maximum + (index + r) * V::lanes) + V::log2(total)) * T(ln_2));
                const int64_t step = lane_step(plan, lse, Side::query);
                T *row = static_cast<T *>(lse.data) + row_of(plan, lse, job, block, r) +
                         lane_offset(plan, lse, Side::query, tile);
                for (int l = 0; l < tile.count; ++l) row[l * step] = natural[l];
            }
        }
    }

    void begin(const Job &job, const Block &block, const LaneTile &tile, int index) {
        const Tensor &query = problem.query;
        for (int r = 0; r < block.rows; ++r) {
            pack_tile(plan, codec, query, row_of(plan, query, job, block, r), tile, problem.channels,
                      score_factor<V>(problem).operand, q + (index + r) * q_row);
            V::store(maximum + (index + r) * V::lanes, V::all(-T(__builtin_inf())));
            V::store(sum + (index + r) * V::lanes, reg{});
        }
    }

    // One tile, or, of a block of one row, several. What belongs to a row of queries is found by `index` + row.
    void run_tiles(const Job &job, const Block &block, const Chunk &all, const LaneTile *tile, int tiles) {
        for (int i = 0; i < tiles; ++i) begin(job, block, tile[i], i);
        bool first = true;
        for (Chunks chunks = chunks_of(plan, all); next_chunk(chunks); first = false) {
            const Chunk &chunk = chunks.now;
            ring.pack(plan, codec, job.batch, job.head, job.strip, chunk);
            score_chunk<V>(plan, block, *tile, chunk, ring.slots, ring.keys, {q, q_row}, score_factor<V>(problem).sum,
                           s, s_row, stream, tiles);
            for (int i = 0; i < tiles; ++i) {
                finish_scores(job, block, tile[i], chunk, i);
                soften(block, tile[i], chunk, first, i);
            }
            const TileWeights<V> weights = dense_weights<V>(*tile, s, s_row);
            round_weights<V>(plan, block, *tile, chunk, weights, weights);
            weigh_chunk<V>(plan, block, *tile, chunk, ring.slots, ring.values, weights, o, o_row, tiles, first);
        }
        for (int i = 0; i < tiles; ++i) finish(job, block, tile[i], i);
    }

    void announce(const Job &job, const Block &block, const Chunk &all, int64_t end) {
        stream.clear();
        const int64_t next = block.row + block.rows, kv_head = job.head / (problem.heads / problem.kv_heads);
        if (next >= end || all.end0 != all.begin0 + 1) return;
        const int rows_of_a = static_cast<int>(least(plan.block_rows, end - next));
        const Chunk ahead = reach(plan, {block.row0, next, rows_of_a}, true);
        const auto rows = [&](const Tensor &t, bool of_a, int64_t head, int64_t channels) {
            stream_rows(plan, codec.element_size, t, job.batch, head, job.strip, of_a, of_a ? block.row0 : all.begin0,
                        of_a ? next : all.end, of_a ? next + rows_of_a : ahead.end, channels, stream);
        };
        rows(problem.key, false, kv_head, problem.channels);
        rows(problem.value, false, kv_head, problem.value_channels);
        rows(problem.query, true, job.head, problem.channels);
    }

    const RingSlots &packed_rows() const { return ring.slots; }

    // `end`: where the job's rows end.
    void run_block(const Job &job, const Block &block, int64_t end) {
        const Chunk all = reach(plan, block, true);
        announce(job, block, all, end);
        const int64_t count = tiles_in_strip(plan);
        for (int64_t i = 0, together = 1; i < count; i += together) {
            together = 1;
            if (tiles[i].count == 0) continue;
            together = tiles_together(plan, tiles + i, count - i);
            run_tiles(job, block, all, tiles + i, static_cast<int>(together));
        }
    }
};

}  // namespace localattn::cpu
