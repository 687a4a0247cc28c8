// Scores of one tile against a chunk of B's rows, with biases and masks: what every pass begins with.
#pragma once
#include "bias.h"
#include "microkernels.h"

namespace localattn::cpu {

// A query that saw no key has lse = -infinity; as +infinity it gives it weights of zero, and its delta cannot matter.
// One with an infinite score has lse = +infinity; as NaN it makes every weight NaN, as in the forward.
template <class V>
LOCALATTN_INLINE void store_statistics(typename V::reg lse, typename V::reg delta, typename V::T *lse_out,
                                       typename V::T *delta_out) {
    using T = typename V::T;
    const typename V::reg lowest = V::all(-T(__builtin_inf()));
    V::store(lse_out, lse == lowest ? -lowest : lse == -lowest ? lse - lse : lse);
    V::store(delta_out, lse == lowest ? typename V::reg{} : delta);
}

// Of query row `row` of A: the rows of B present in its window for b0, those outside the map included.
LOCALATTN_INLINE void present_rows(const Plan &plan, int64_t row0, int64_t row, int64_t b0, int64_t &begin,
                                   int64_t &end) {
    begin = plan.axis1.present_begin[row];
    end = plan.axis1.present_end[row];
    if (plan.problem->raster) {
        if (b0 > plan.axis0.centre[row0]) end = begin;
        if (b0 == plan.axis0.centre[row0]) end = least(end, plan.axis1.centre[row] + 1);
    }
}

// Whether the pair of rows, one that is present in the window, is a row of keys and not of zeros outside the map.
LOCALATTN_INLINE bool is_real(const Plan &plan, const Block &block, int r, int64_t b0, int64_t b) {
    const RowList &rows0 = plan.axis0.query, &rows1 = plan.axis1.query;
    return b0 >= rows0.begin[block.row0] && b0 < rows0.end[block.row0] && b >= rows1.begin[block.row + r] &&
           b < rows1.end[block.row + r];
}

// The rows of A that a tile is about: [row][channel], each element a register of lanes.
template <class V>
struct TileRows {
    const typename V::T *data;
    ptrdiff_t row, channel = V::lanes;
};

template <class V>
LOCALATTN_INLINE TileWeights<V> dense_weights(const LaneTile &tile, typename V::T *s, ptrdiff_t s_row) {
    return {s, s_row, tile.pattern->slots * V::lanes};
}

// How many tiles from this one on, of `left`, go together: those that share a pattern of consecutive columns.
LOCALATTN_INLINE int tiles_together(const Plan &plan, const LaneTile *tile, int64_t left) {
    const LanePattern *pattern = tile->pattern;
    int n = 1;
    if (pattern->runs != 1 || plan.lane_axis.step != 1 || pattern->masks_values) return n;
    while (n < plan.tiles_at_once && n < left && tile[n].pattern == pattern) ++n;
    return n;
}

// The columns that tiles going together read are those of the first tile and `lanes` more for each further one:
// body(first column, count, begin, end) for runs of columns that the same tiles [begin, end) read. Column x is entry
// x - lanes * tile of a tile.
template <class Body>
LOCALATTN_INLINE void each_shared(int lanes, int entries, int tiles, int most_columns, const Body &body) {
    for (int x = 0, begin = 0, end = 1; begin < tiles;) {
        const int joins = end < tiles ? end * lanes : entries + (tiles - 1) * lanes, leaves = entries + begin * lanes;
        int next = joins < leaves ? joins : leaves;
        if (next > x + most_columns) next = x + most_columns;
        if (begin < end && next > x) body(x, next - x, begin, end);
        x = next;
        if (x == leaves) ++begin;
        if (x == joins && end < tiles) ++end;
        if (begin == end && end < tiles) x = end++ * lanes;
    }
}

// s[row][b][slot][lane] = a . b for the paired rows of the chunk; or s[tile][b][slot][lane] of a single row for `tiles`
// that go together, which then lie a.row and s_row apart.
template <class V>
LOCALATTN_INLINE void score_chunk(const Plan &plan, const Block &block, const LaneTile &tile, const Chunk &chunk,
                                  const RingSlots &slots, const PackedTensor<V> &tensor, const TileRows<V> &a,
                                  typename V::T factor, typename V::T *s, ptrdiff_t s_row, Stream &stream,
                                  int tiles = 1) {
    const PackedRows<V> &rows = tensor.scores;
    const LanePattern &pattern = *tile.pattern;
    if (pattern.slots == 0) return;
    const int64_t cell = pattern.slots * V::lanes;
    for (int64_t b0 = chunk.begin0; b0 < chunk.end0; ++b0) {
        for (int64_t b = chunk.begin; b < chunk.end; ++b) {
            const PairedRows paired = paired_rows(plan, block, b0, b);
            if (paired.begin >= paired.end) continue;
            const typename V::T *packed = rows.data + slots.of(b0, b) * rows.row + tile.column;
            const typename V::T *next = rows.data + slots.of(b0, b + 1) * rows.row + tile.column;
            typename V::T *out = s + paired.begin * s_row + chunk.index(b0, b) * cell;
            if (tiles > 1) {
                const LaneRun &run = pattern.run[0];
                const ptrdiff_t step = s_row - V::lanes * V::lanes;
                each_shared(V::lanes, run.count, tiles, run.count,
                            [&](int first, int count, int begin, int end) __attribute__((always_inline)) {
                                Microkernels<V>::scores(end - begin, a.data + begin * a.row, a.row, a.channel,
                                                        packed + run.column + first, plan.packed,
                                                        V::words(tensor.channels), factor, nullptr,
                                                        out + begin * step + first * V::lanes, step, count,
                                                        next + run.column + first, stream);
                            });
                continue;
            }
            const bool apart = pattern.runs > 1 || plan.lane_axis.step > 1;
            const int64_t first = apart ? 0 : pattern.run[0].column;
            Microkernels<V>::scores(paired.end - paired.begin, a.data + paired.begin * a.row, a.row, a.channel,
                                    packed + first, plan.packed, V::words(tensor.channels), factor,
                                    apart ? pattern.column : nullptr, out, s_row, pattern.slots, next + first, stream);
        }
    }
}

// Weights of the paired rows of the chunk to words of entries, where operands are words. In place, if both are the
// same: a word lies nowhere behind its entries.
template <class V>
LOCALATTN_INLINE void round_weights(const Plan &plan, const Block &block, const LaneTile &tile, const Chunk &chunk,
                                    const TileWeights<V> &from, const TileWeights<V> &to) {
    if constexpr (V::word > 1) {
        const LanePattern &pattern = *tile.pattern;
        for (int64_t b0 = chunk.begin0; b0 < chunk.end0; ++b0) {
            for (int64_t b = chunk.begin; b < chunk.end; ++b) {
                const PairedRows paired = paired_rows(plan, block, b0, b);
                for (int r = paired.begin; r < paired.end; ++r) {
                    for (int i = 0; i < pattern.runs; ++i) {
                        const LaneRun &run = pattern.run[i];
                        const auto *in = from.of(run) + r * from.row + chunk.index(b0, b) * from.b_row;
                        auto *out = to.of(run) + r * to.row + chunk.index(b0, b) * to.b_row;
                        int n = 0;
                        for (; n + 2 <= run.count; n += 2, in += 2 * from.entry, out += to.entry)
                            V::store(out, V::round(V::load(in), V::load(in + from.entry)));
                        if (n < run.count) V::store(out, V::round(V::load(in), typename V::reg{}));
                    }
                }
            }
        }
    }
}

// Runs of entries on their way to the micro-kernel, which adds them to the sums of `rows` rows, the first of them to
// zeros if these are `fresh`.
template <class V>
class RunList {
public:
    using T = typename V::T;
    struct Sums {
        T *data;
        ptrdiff_t row;  // from one to the next
        int rows, channels;
        bool fresh;
    };
    RunList(const Sums &sums, ptrdiff_t p_row, ptrdiff_t p_entry, ptrdiff_t v_entry, ptrdiff_t v_channel)
        : sums_(sums), p_row_(p_row), p_entry_(p_entry), v_entry_(v_entry), v_channel_(v_channel) {
        clear();
    }
    // Registers of weights, which are read once for each few channels: from L1, or in part from L2.
    static constexpr int budget = 49152 / (V::lanes * static_cast<int>(sizeof(T)));
    LOCALATTN_INLINE void add(RunList &list, const WeightedRun<V> &run) {
        const int weights = (run.end - run.begin) * run.count;
        if (weights <= 0) return;
        if (list.size_ == capacity || list.weights_ + weights > budget) list.flush();
        list.run_[list.size_++] = run;
        list.weights_ += weights;
        list.begin_ = run.begin < list.begin_ ? run.begin : list.begin_;
        list.end_ = run.end > list.end_ ? run.end : list.end_;
    }
    // Reads and writes the rows that the runs are about, and all that are fresh.
    void flush() {
        if (sums_.fresh) begin_ = 0, end_ = sums_.rows;
        if (begin_ >= end_) return;
        for (int i = 0; i < size_ && begin_ > 0; ++i) {
            run_[i].begin -= begin_;
            run_[i].end -= begin_;
        }
        Microkernels<V>::values(run_, size_, end_ - begin_, sums_.fresh, p_row_, p_entry_, v_entry_, v_channel_,
                                sums_.data + begin_ * sums_.row, sums_.row, sums_.channels);
        sums_.fresh = false;
        clear();
    }

private:
    static constexpr int capacity = 64;
    void clear() {
        size_ = weights_ = end_ = 0;
        begin_ = sums_.rows;
    }
    Sums sums_;
    ptrdiff_t p_row_, p_entry_, v_entry_, v_channel_;
    int size_, weights_, begin_, end_;
    WeightedRun<V> run_[capacity];
};

// o[row] += p . b over the paired rows of the chunk, or = if `fresh`. The order of a sum does not depend on the block's
// other rows. `tiles` that go together lie p.row and o_row apart.
template <class V>
LOCALATTN_INLINE void weigh_chunk(const Plan &plan, const Block &block, const LaneTile &tile, const Chunk &chunk,
                                  const RingSlots &slots, const PackedTensor<V> &tensor, const TileWeights<V> &p,
                                  typename V::T *o, ptrdiff_t o_row, int tiles = 1, bool fresh = false) {
    using Mask = typename V::Mask;
    const PackedRows<V> &rows = tensor.values;
    const LanePattern &pattern = *tile.pattern;
    const Mask *plain_mask = pattern.masks_values ? static_cast<const Mask *>(pattern.mask) : nullptr;
    const Mask *raster_mask = static_cast<const Mask *>(pattern.raster_mask);
    const ptrdiff_t p_row = tiles > 1 ? p.row - V::lanes * p.entry : p.row;
    RunList<V> list({o, o_row, tiles > 1 ? tiles : block.rows, static_cast<int>(tensor.channels), fresh}, p_row,
                    p.entry, plan.lane_axis.step, plan.packed);
    for (int64_t b0 = chunk.begin0; b0 < chunk.end0; ++b0) {
        for (int64_t b = chunk.begin; b < chunk.end; ++b) {
            const PairedRows paired = paired_rows(plan, block, b0, b);
            if (paired.begin >= paired.end) continue;
            const typename V::T *packed = rows.data + slots.of(b0, b) * rows.row + tile.column;
            const ptrdiff_t p_offset = chunk.index(b0, b) * p.b_row;
            if (tiles > 1) {
                const LaneRun &run = pattern.run[0];
                const auto *weights = p.of(run) + p_offset;
                each_shared(V::lanes, run.count, tiles, RunList<V>::budget / tiles,
                            [&](int first, int count, int begin, int end) __attribute__((always_inline)) {
                                RunList<V>::add(list, {weights + begin * p_row + first * p.entry,
                                                       packed + run.column + first, nullptr, count, begin, end});
                            });
                continue;
            }
            const auto weigh = [&](int begin, int end, const Mask *mask) __attribute__((always_inline)) {
                for (int i = 0; i < pattern.runs; ++i) {
                    const LaneRun &run = pattern.run[i];
                    RunList<V>::add(list, {p.of(run) + p_offset + begin * p_row, packed + run.column,
                                           mask ? mask + run.slot * V::lanes : nullptr, run.count, begin, end});
                }
            };
            if (paired.partial_begin < paired.partial_end) {
                weigh(paired.begin, paired.partial_begin, plain_mask);
                weigh(paired.partial_begin, paired.partial_end, raster_mask);
                weigh(paired.partial_end, paired.end, plain_mask);
            } else {
                weigh(paired.begin, paired.end, plain_mask);
            }
        }
    }
    list.flush();
}

// One row of scores: `lacking` where a lane does not have the slot, or its key is masked (key_mask slides with the
// lanes).
template <class V>
LOCALATTN_INLINE void mask_scores(const LaneTile &tile, bool partial, const typename V::Mask *key_mask,
                                  typename V::reg lacking, typename V::T *s) {
    using Mask = typename V::Mask;
    const LanePattern &pattern = *tile.pattern;
    if (pattern.masks_scores || partial) {
        const Mask *mask = static_cast<const Mask *>(partial ? pattern.raster_mask : pattern.mask);
        for (int i = 0; i < pattern.slots * V::lanes; i += V::lanes)
            V::store(s + i, V::choose(V::load_mask(mask + i), V::load(s + i), lacking));
    }
    if (key_mask) {
        for (int i = 0; i < pattern.slots; ++i) {
            typename V::T *p = s + i * V::lanes;
            V::store(p, V::choose(V::load_mask(key_mask + pattern.column[i]), V::load(p), lacking));
        }
    }
}

// Announces what the block after this one will read: its rows of A, and the rows of B that are not packed yet.
LOCALATTN_INLINE void stream_rows(const Plan &plan, int64_t element_size, const Tensor &tensor, int64_t batch,
                                  int64_t head, int64_t strip, bool of_a, int64_t row0, int64_t begin, int64_t end,
                                  int64_t channels, Stream &stream) {
    const LaneAxis &lane = plan.lane_axis;
    const Side side = of_a ? plan.a : plan.b();
    const int64_t first = of_a ? strip * plan.strip_lanes() : first_packed_lane(plan, strip);
    const int64_t count = of_a ? plan.strip_lanes() : plan.phase_stride;
    const int64_t from = most(0, first * lane.period(side));
    const int64_t to = least(lane.extent(side), (first + count) * lane.period(side));
    for (int64_t row = most(0, begin); row < least(end, plan.rows1(side).count); ++row) {
        const int64_t offset = row_offset(plan, tensor, batch, head, side, row0, row);
        stream.add_row(static_cast<const char *>(tensor.data) + offset * element_size, element_size, tensor.axis[2],
                       tensor.channel, from, to, channels);
    }
}

// What all passes do with a job: block by block of A's rows, each for all tiles of the strip.
template <class Worker>
LOCALATTN_INLINE void run_job(Worker &worker, const Job &job) {
    const Plan &plan = worker.plan;
    if (worker.tiles_strip != job.strip) build_tiles(plan, worker.tiles_strip = job.strip, worker.tiles);
    worker.packed_rows().clear();
    const int64_t end = plan.segment[job.segment + 1];
    for (int64_t row0 = job.row0_begin; row0 < job.row0_end; ++row0)
        for (int64_t row = plan.segment[job.segment]; row < end; row += plan.block_rows)
            worker.run_block(job, {row0, row, static_cast<int>(least(plan.block_rows, end - row))}, end);
}

}  // namespace localattn::cpu
