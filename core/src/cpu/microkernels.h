// The two contractions that all attention passes are made of, on register tiles of `Rows` x `Columns`.
//
// Lane = position: each lane of a register is one position of the accumulating side (a query in the forward) along the
// fastest axis. The other side lies packed as [channel][position], so loading from one position further on moves all
// lanes to their next window entry: no pair outside the window is computed.
//
//   scores:  s[row][entry][lane]   = sum over channels  a[row][channel][lane] * b[channel][column + entry + lane]
//   values:  o[row][channel][lane] += sum over runs and entries  p[row][run][entry][lane]
//                                                              * v[run][channel][entry + lane]
//
// Where a lane holds words of two numbers (dot_vector.h), scores go through words of channels and values through words
// of entries: half as many steps.
//
// The scores prefetch as they go, one line of each a channel: `next`, the packed row that comes next, into L1, and
// `stream`, tensor rows that the next block will pack, into L2. All at once instead, it would gain nothing.
//
// Work: one multiply-add a lane and inner step. Loads a step: Rows (aligned) + Columns (mostly unaligned) for
// Rows*Columns multiply-adds, hence tiles as large as the register file: the table below.
#pragma once
#include <type_traits>

#include "dot_vector.h"
#include "plan.h"
#include "stream.h"

namespace localattn::cpu {

constexpr int max_rows(int registers) { return registers >= 32 ? 6 : 4; }
// Accumulators, a register for each row or column, whichever are fewer, and one that goes through the others.
constexpr int registers_of(int rows, int columns) { return rows * columns + (rows < columns ? rows : columns) + 1; }
constexpr int max_columns(int registers, int rows) {
    int columns = 1;
    while (columns < 16 && registers_of(rows, columns + 1) <= registers) ++columns;
    return columns;
}

// How `total` columns are cut into register tiles: `parts` tiles whose widths differ by at most one.
struct TileSplit {
    int parts;
    int width(int total, int part) const { return total / parts + (part < total % parts); }
};
LOCALATTN_INLINE TileSplit split_tiles(int total, int widest) { return {(total + widest - 1) / widest}; }

// `channels` counts words. Where operands are words, the sums are multiplied by `factor`; else the operands were.
// Entries lie side by side, or each at a column of its own.
template <class V, int Rows, int Columns, bool Apart>
__attribute__((noinline)) static void scores_tile(const typename V::T *__restrict a, ptrdiff_t a_row,
                                                  ptrdiff_t a_channel, const typename V::T *__restrict b,
                                                  ptrdiff_t b_channel, int64_t channels, typename V::T factor,
                                                  const int64_t *column, typename V::T *__restrict s, ptrdiff_t s_row,
                                                  const typename V::T *next, const char *stream,
                                                  ptrdiff_t stream_step) {
    using reg = typename V::reg;
    reg sum[Rows][Columns];
    LOCALATTN_UNROLL
    for (int r = 0; r < Rows; ++r) LOCALATTN_UNROLL
    for (int n = 0; n < Columns; ++n) sum[r][n] = reg{};
#pragma GCC unroll 1
    for (int64_t c = 0; c < channels; ++c) {
        const auto load = [](const typename V::T *p) __attribute__((always_inline)) {
            reg x = V::load(p);
            V::hold(x);
            return x;
        };
        __builtin_prefetch(Apart ? next + column[0] : next);
        if (Apart) __builtin_prefetch(next + column[Columns - 1]);
        next += b_channel;
        __builtin_prefetch(stream, 0, 2);
        stream += stream_step;
        reg held[Rows < Columns ? Rows : Columns];
        const auto of_b = [&](int n) __attribute__((always_inline)) { return b + (Apart ? column[n] : n); };
        if constexpr (Rows < Columns) {
            LOCALATTN_UNROLL
            for (int r = 0; r < Rows; ++r) held[r] = load(a + r * a_row);
            LOCALATTN_UNROLL
            for (int n = 0; n < Columns; ++n) {
                const reg y = load(of_b(n));
                LOCALATTN_UNROLL
                for (int r = 0; r < Rows; ++r) sum[r][n] = V::multiply_add(sum[r][n], held[r], y);
            }
        } else {
            LOCALATTN_UNROLL
            for (int n = 0; n < Columns; ++n) held[n] = load(of_b(n));
            LOCALATTN_UNROLL
            for (int r = 0; r < Rows; ++r) {
                const reg x = load(a + r * a_row);
                LOCALATTN_UNROLL
                for (int n = 0; n < Columns; ++n) sum[r][n] = V::multiply_add(sum[r][n], x, held[n]);
            }
        }
        a += a_channel;
        b += b_channel;
    }
    LOCALATTN_UNROLL
    for (int r = 0; r < Rows; ++r) LOCALATTN_UNROLL
    for (int n = 0; n < Columns; ++n)
        V::store(s + r * s_row + n * V::lanes, V::word == 1 ? sum[r][n] : sum[r][n] * factor);
}

// The weights of a tile, [row of A][row of B][entry], each element a register of lanes: by slot of the tile's pattern,
// or, where tiles share an array, by phase of B and offset between the lanes. Words of entries follow the run's first.
template <class V>
struct TileWeights {
    typename V::T *data;
    ptrdiff_t row, b_row, entry = V::lanes;
    ptrdiff_t slot = V::lanes, phase = 0, offset = 0;
    typename V::T *of(const LaneRun &run) const {
        return data + run.slot * slot + run.phase * phase + run.offset * offset;
    }
};

// A run of entries of one row of B that rows [begin, end) of a tile weigh.
template <class V>
struct WeightedRun {
    const typename V::T *p;        // weights of row `begin` for the first entry
    const typename V::T *v;        // the first entry's elements, first channel
    const typename V::Mask *mask;  // [entry][lane], or NULL
    int count, begin, end;
};

// body(begin, end) with both as constants, for any 0 <= begin < end <= Rows.
template <int Rows, int Begin = 0, int End = Rows, class Body>
LOCALATTN_INLINE void with_constant_rows(int begin, int end, const Body &body) {
    if (begin == Begin && end == End) {
        body(std::integral_constant<int, Begin>{}, std::integral_constant<int, End>{});
    } else if constexpr (End > Begin + 1) {
        with_constant_rows<Rows, Begin, End - 1>(begin, end, body);
    } else if constexpr (Begin + 1 < Rows) {
        with_constant_rows<Rows, Begin + 1, Rows>(begin, end, body);
    }
}

// The sums, which begin with what o holds or, if `fresh`, with 0, stay in registers from run to run, whichever of the
// tile's rows a run is about: as these are constants, each set of rows has a loop of its own. Where a mask leaves a
// lane out of an entry, the element counts as 0 there, so that what the lane must not see (NaN and infinity too) cannot
// reach it.
template <class V, int Columns>
__attribute__((noinline)) static void values_tile(const WeightedRun<V> *run, int runs, int rows, bool fresh,
                                                  ptrdiff_t p_row, ptrdiff_t p_entry, ptrdiff_t v_entry,
                                                  ptrdiff_t v_offset, ptrdiff_t v_channel, typename V::T *__restrict o,
                                                  ptrdiff_t o_row) {
    using reg = typename V::reg;
    constexpr int Rows = max_rows(V::registers);
    reg sum[Rows][Columns];
    LOCALATTN_UNROLL
    for (int r = 0; r < Rows; ++r) LOCALATTN_UNROLL
    for (int n = 0; n < Columns; ++n) sum[r][n] = r < rows && !fresh ? V::load(o + r * o_row + n * V::lanes) : reg{};
#pragma GCC unroll 1
    for (const WeightedRun<V> *last_run = run + runs; run < last_run; ++run) {
        with_constant_rows<Rows>(run->begin, run->end, [&](auto first, auto last) __attribute__((always_inline)) {
            constexpr int begin = decltype(first)::value, end = decltype(last)::value;
            const typename V::T *p = run->p, *v = run->v + v_offset;
            const typename V::Mask *mask = run->mask;
            const int entries = run->count, whole = entries / V::word * V::word;
            const auto add = [&](bool masked, typename V::mask m) __attribute__((always_inline)) {
                reg z[Columns];
                LOCALATTN_UNROLL
                for (int n = 0; n < Columns; ++n) {
                    z[n] = V::load(v + n * v_channel);
                    if (masked) z[n] = V::keep(m, z[n]);
                    V::hold(z[n]);
                }
                LOCALATTN_UNROLL
                for (int r = begin; r < end; ++r) {
                    reg x = V::load(p + (r - begin) * p_row);
                    V::hold(x);
                    LOCALATTN_UNROLL
                    for (int n = 0; n < Columns; ++n) sum[r][n] = V::multiply_add(sum[r][n], x, z[n]);
                }
                p += p_entry;
                v += V::word * v_entry;
            };
            if (mask) {
#pragma GCC unroll 1
                for (int e = 0; e < entries; e += V::word) add(true, V::word_mask(mask, e, entries));
            } else {
#pragma GCC unroll 1
                for (int e = 0; e < whole; e += V::word) add(false, typename V::mask{});
                if (V::word > 1 && whole < entries) add(true, V::word_mask(nullptr, whole, entries));
            }
        });
    }
    // Keeps gcc from holding the addresses of all sums through the loop.
    asm("" : "+r"(o), "+r"(o_row));
    LOCALATTN_UNROLL
    for (int r = 0; r < Rows; ++r) LOCALATTN_UNROLL
    for (int n = 0; n < Columns; ++n)
        if (r < rows) V::store(o + r * o_row + n * V::lanes, sum[r][n]);
}

// The tiles by number of rows and columns, filled at compile time.
template <class V>
struct Microkernels {
    using T = typename V::T;
    using Scores = void (*)(const T *, ptrdiff_t, ptrdiff_t, const T *, ptrdiff_t, int64_t, T, const int64_t *, T *,
                            ptrdiff_t, const T *, const char *, ptrdiff_t);
    using Values = void (*)(const WeightedRun<V> *, int, int, bool, ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t,
                            ptrdiff_t, T *, ptrdiff_t);
    static constexpr int rows = max_rows(V::registers);

    struct Table {
        Scores scores[2][rows + 1][17] = {};
        Values values[17] = {};
    };
    template <int R, int N>
    static constexpr void fill_scores(Table &t) {
        t.scores[0][R][N] = scores_tile<V, R, N, false>;
        t.scores[1][R][N] = scores_tile<V, R, N, true>;
        if constexpr (N > 1) fill_scores<R, N - 1>(t);
        if constexpr (R > 1 && N == max_columns(V::registers, R))
            fill_scores<R - 1, max_columns(V::registers, R - 1)>(t);
    }
    template <int N>
    static constexpr void fill_values(Table &t) {
        t.values[N] = values_tile<V, N>;
        if constexpr (N > 1) fill_values<N - 1>(t);
    }
    static constexpr Table make() {
        Table t;
        fill_scores<rows, max_columns(V::registers, rows)>(t);
        fill_values<max_columns(V::registers, rows)>(t);
        return t;
    }
    static constexpr Table table = make();

    // Scores of `count` entries, consecutive or, if they are given, at `columns`; `channels` counts words.
    LOCALATTN_INLINE void scores(int r, const T *a, ptrdiff_t a_row, ptrdiff_t a_channel, const T *b,
                                 ptrdiff_t b_channel, int64_t channels, T factor, const int64_t *columns, T *s,
                                 ptrdiff_t s_row, int count, const T *next, Stream &stream) {
        const TileSplit split = split_tiles(count, max_columns(V::registers, r));
        for (int i = 0, done = 0; i < split.parts; ++i) {
            const int n = split.width(count, i);
            const Stream::Piece piece = stream.take(channels);
            const int line = 64 / static_cast<int>(sizeof(T));
            table.scores[columns != nullptr][r][n](a, a_row, a_channel, columns ? b : b + done, b_channel, channels,
                                                   factor, columns ? columns + done : nullptr, s + done * V::lanes,
                                                   s_row, columns ? next : next + i * line, piece.address, piece.step);
            done += n;
        }
    }
    // Adds what the runs give to all channels of `r` rows, or, if `fresh`, sets these to it.
    LOCALATTN_INLINE void values(const WeightedRun<V> *run, int runs, int r, bool fresh, ptrdiff_t p_row,
                                 ptrdiff_t p_entry, ptrdiff_t v_entry, ptrdiff_t v_channel, T *o, ptrdiff_t o_row,
                                 int channels) {
        const TileSplit split = split_tiles(channels, max_columns(V::registers, rows));
        for (int i = 0, done = 0; i < split.parts; ++i) {
            const int n = split.width(channels, i);
            table.values[n](run, runs, r, fresh, p_row, p_entry, v_entry, done * v_channel, v_channel,
                            o + done * V::lanes, o_row);
            done += n;
        }
    }
};

}  // namespace localattn::cpu
