// Small dense products on register tiles, and maps of positions as blocks for them: what the attentions without windows
// are made of.
//
//     c[row][lane] = from[row][lane] + sum over steps of a[step, row] * b[step][lane]
//
// a is read one number at a time and spread over the lanes, the others by whole registers. Work: one multiply-add a
// lane, step and row. Loads a step: Rows numbers + Columns registers for Rows * Columns multiply-adds.
#pragma once
#include "codec.h"
#include "ring.h"

namespace localattn::cpu {

template <class V, int Rows, int Columns>
__attribute__((noinline)) static void product_tile(const typename V::T *__restrict a, ptrdiff_t a_step, ptrdiff_t a_row,
                                                   const typename V::T *__restrict b, ptrdiff_t b_step, int64_t steps,
                                                   typename V::T *c, ptrdiff_t c_row, const typename V::T *from,
                                                   ptrdiff_t from_row) {
    using reg = typename V::reg;
    reg sum[Rows][Columns];
    LOCALATTN_UNROLL
    for (int r = 0; r < Rows; ++r) LOCALATTN_UNROLL
    for (int n = 0; n < Columns; ++n) sum[r][n] = V::load(from + r * from_row + n * V::lanes);
#pragma GCC unroll 1
    for (int64_t k = 0; k < steps; ++k) {
        reg y[Columns];
        LOCALATTN_UNROLL
        for (int n = 0; n < Columns; ++n) {
            y[n] = V::load(b + n * V::lanes);
            V::hold(y[n]);
        }
        LOCALATTN_UNROLL
        for (int r = 0; r < Rows; ++r) {
            const reg x = V::all(a[r * a_row]);
            LOCALATTN_UNROLL
            for (int n = 0; n < Columns; ++n) sum[r][n] += x * y[n];
        }
        a += a_step;
        b += b_step;
    }
    LOCALATTN_UNROLL
    for (int r = 0; r < Rows; ++r) LOCALATTN_UNROLL
    for (int n = 0; n < Columns; ++n) V::store(c + r * c_row + n * V::lanes, sum[r][n]);
}

template <class V>
struct Products {
    using T = typename V::T;
    using Tile = void (*)(const T *, ptrdiff_t, ptrdiff_t, const T *, ptrdiff_t, int64_t, T *, ptrdiff_t, const T *,
                          ptrdiff_t);
    static constexpr int rows = V::registers >= 32 ? 6 : 4, columns = V::registers >= 32 ? 4 : 2;

    struct Table {
        Tile tile[rows + 1][columns + 1] = {};
    };
    template <int R, int N>
    static constexpr void fill(Table &t) {
        t.tile[R][N] = product_tile<V, R, N>;
        if constexpr (N > 1) fill<R, N - 1>(t);
        if constexpr (N == columns && R > 1) fill<R - 1, columns>(t);
    }
    static constexpr Table make() {
        Table t;
        fill<rows, columns>(t);
        return t;
    }
    static constexpr Table table = make();
    alignas(64) static constexpr T zeros[columns * V::lanes] = {};
};

// c = from + product. `width` in lanes, a multiple of V::lanes.
template <class V>
LOCALATTN_INLINE void multiply_onto(const typename V::T *from, ptrdiff_t from_row, ptrdiff_t from_part,
                                    const typename V::T *a, ptrdiff_t a_step, ptrdiff_t a_row, const typename V::T *b,
                                    ptrdiff_t b_step, int64_t steps, typename V::T *c, ptrdiff_t c_row, int64_t rows,
                                    int64_t width) {
    using P = Products<V>;
    const int64_t registers = width / V::lanes, parts = (registers + P::columns - 1) / P::columns;
    for (int64_t part = 0, x = 0; part < parts; ++part) {
        const int64_t n = registers / parts + (part < registers % parts);
        const int64_t bands = (rows + P::rows - 1) / P::rows;
        for (int64_t band = 0, r = 0; band < bands; ++band) {
            const int64_t m = rows / bands + (band < rows % bands);
            P::table.tile[m][n](a + r * a_row, a_step, a_row, b + x * V::lanes, b_step, steps,
                                c + r * c_row + x * V::lanes, c_row, from + r * from_row + x * from_part, from_row);
            r += m;
        }
        x += n;
    }
}
// c += product
template <class V>
LOCALATTN_INLINE void add_product(const typename V::T *a, ptrdiff_t a_step, ptrdiff_t a_row, const typename V::T *b,
                                  ptrdiff_t b_step, int64_t steps, typename V::T *c, ptrdiff_t c_row, int64_t rows,
                                  int64_t width) {
    multiply_onto<V>(c, c_row, V::lanes, a, a_step, a_row, b, b_step, steps, c, c_row, rows, width);
}
// c = product
template <class V>
LOCALATTN_INLINE void set_product(const typename V::T *a, ptrdiff_t a_step, ptrdiff_t a_row, const typename V::T *b,
                                  ptrdiff_t b_step, int64_t steps, typename V::T *c, ptrdiff_t c_row, int64_t rows,
                                  int64_t width) {
    multiply_onto<V>(Products<V>::zeros, 0, 0, a, a_step, a_row, b, b_step, steps, c, c_row, rows, width);
}

template <class V>
LOCALATTN_INLINE void clear(typename V::T *data, int64_t count) {  // of whole registers
    for (int64_t i = 0; i < count; i += V::lanes) V::store(data + i, typename V::reg{});
}

LOCALATTN_INLINE int64_t whole_lanes(int64_t count, int lanes) { return (count + lanes - 1) / lanes * lanes; }

// A part of a map as one sequence of positions: rows of `width`, planes of `height` rows, from an offset on. Rows that
// lie end to end in memory are taken as one.
struct Sequence {
    int64_t offset, plane, row, position;  // strides
    int64_t height, width;
};
LOCALATTN_INLINE Sequence sequence_of(int64_t offset, const Tensor &t, int64_t height, int64_t width) {
    Sequence s{offset, t.axis[0], t.axis[1], t.axis[2], height, width};
    if (s.row == s.position * s.width || s.height == 1) {
        s.width *= s.height;
        s.height = 1;
        s.row = s.plane;
        // Then a plane is a row.
        if (s.plane == s.position * s.width) s.width = INT64_MAX;
    }
    return s;
}
// Calls visit(i, offset, count) for runs of positions [first, first + count) with one stride, i counted from 0.
template <class Visit>
LOCALATTN_INLINE void each_run(const Sequence &s, int64_t first, int64_t count, const Visit &visit) {
    for (int64_t i = 0; i < count;) {
        const int64_t n = first + i, x = n % s.width, rows = n / s.width;
        const int64_t run = least(s.width - x, count - i);
        visit(i, s.offset + rows / s.height * s.plane + rows % s.height * s.row + x * s.position, run);
        i += run;
    }
}

// to[channel][i] = factor * element for `count` positions from `first` on. Up to V::lanes - 1 positions beyond are
// written: with zeros after the last, so that a row needs that much more room.
template <class V>
LOCALATTN_INLINE void pack_by_channel(const Codec<V> &codec, const Tensor &t, const Sequence &s, int64_t first,
                                      int64_t count, int64_t channels, typename V::T factor, typename V::T *to,
                                      ptrdiff_t to_row) {
    each_run(s, first, count, [&](int64_t i, int64_t offset, int64_t run) __attribute__((always_inline)) {
        codec.pack(at(codec, t, offset), s.position, t.channel, 0, run, whole_lanes(run, V::lanes), channels, factor,
                   to + i, to_row);
    });
}
// to[i][channel], channels padded with zeros to whole registers, which is what rows are apart.
template <class V>
LOCALATTN_INLINE void pack_by_position(const Codec<V> &codec, const Tensor &t, const Sequence &s, int64_t first,
                                       int64_t count, int64_t channels, typename V::T factor, typename V::T *to) {
    const int64_t row = whole_lanes(channels, V::lanes);
    each_run(s, first, count, [&](int64_t i, int64_t offset, int64_t run) __attribute__((always_inline)) {
        codec.pack(at(codec, t, offset), t.channel, s.position, 0, channels, row, run, factor, to + i * row, row);
    });
}
// The inverse of pack_by_channel; `scratch` has channels * V::lanes elements.
template <class V>
LOCALATTN_INLINE void unpack_by_channel(const Codec<V> &codec, const typename V::T *from, ptrdiff_t from_row,
                                        const Tensor &t, const Sequence &s, int64_t first, int64_t count,
                                        int64_t channels, typename V::T factor, typename V::T *scratch) {
    each_run(s, first, count, [&](int64_t i, int64_t offset, int64_t run) {
        for (int64_t x = 0; x < run; x += V::lanes) {
            for (int64_t c = 0; c < channels; ++c)
                V::store(scratch + c * V::lanes, V::load(from + c * from_row + i + x));
            codec.unpack(scratch, static_cast<int>(least(V::lanes, run - x)), channels, V::all(factor),
                         at(codec, t, offset + x * s.position), s.position, t.channel);
        }
    });
}
// The inverse of pack_by_position, from position 0 on; `scratch` has room for 64 * V::lanes elements.
template <class V>
LOCALATTN_INLINE void unpack_by_position(const Codec<V> &codec, const typename V::T *from, const Tensor &t,
                                         const Sequence &s, int64_t count, int64_t channels, typename V::T factor,
                                         typename V::T *scratch) {
    const int64_t row = whole_lanes(channels, V::lanes);
    each_run(s, 0, count, [&](int64_t i, int64_t offset, int64_t run) {
        for (int64_t x = 0; x < run; x += 64) {
            const int64_t n = least(64, run - x);
            for (int64_t c = 0; c < channels; c += V::lanes) {
                for (int64_t y = 0; y < n; ++y) V::store(scratch + y * V::lanes, V::load(from + (i + x + y) * row + c));
                codec.unpack(scratch, static_cast<int>(least(V::lanes, channels - c)), n, V::all(factor),
                             at(codec, t, offset + x * s.position + c * t.channel), t.channel, s.position);
            }
        }
    });
}
// Asks for positions that will be packed soon.
template <class V>
LOCALATTN_INLINE void prefetch(const Codec<V> &codec, const Tensor &t, const Sequence &s, int64_t first, int64_t count,
                               int64_t channels) {
    const bool by_position = t.channel == 1;
    if (!by_position && s.position != 1) return;
    each_run(s, first, count, [&](int64_t, int64_t offset, int64_t run) {
        const char *from = at(codec, t, offset);
        const int64_t rows = by_position ? run : channels, bytes = (by_position ? channels : run) * codec.element_size;
        const int64_t row = (by_position ? s.position : t.channel) * codec.element_size;
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + i * row + line, 0, 2);
    });
}
// One number a position, of the compute type.
template <class V>
LOCALATTN_INLINE void read_numbers(const Tensor &t, const Sequence &s, int64_t first, int64_t count,
                                   typename V::T *to) {
    const auto *from = static_cast<const typename V::T *>(t.data);
    each_run(s, first, count, [&](int64_t i, int64_t offset, int64_t run) {
        for (int64_t x = 0; x < run; ++x) to[i + x] = from[offset + x * s.position];
    });
}
template <class V>
LOCALATTN_INLINE void write_numbers(const typename V::T *from, const Tensor &t, const Sequence &s, int64_t first,
                                    int64_t count) {
    auto *to = static_cast<typename V::T *>(t.data);
    each_run(s, first, count, [&](int64_t i, int64_t offset, int64_t run) {
        for (int64_t x = 0; x < run; ++x) to[offset + x * s.position] = from[i + x];
    });
}

// Calls body(job, memory) for every job, each worker with memory of its own. Jobs are handed out one by one: which
// worker does which must change no result.
template <class Body>
struct JobQueue {
    const Body *body;
    int64_t jobs, next;
    char *memory;
    size_t each;

    static void work(void *argument, int32_t worker) {
        auto &queue = *static_cast<JobQueue *>(argument);
        for (;;) {
            const int64_t job = __atomic_fetch_add(&queue.next, 1, __ATOMIC_RELAXED);
            if (job >= queue.jobs) break;
            (*queue.body)(job, queue.memory + static_cast<size_t>(worker) * queue.each);
        }
        publish_lines();
    }
};
template <class Body>
LOCALATTN_INLINE void run_jobs(const Workers &workers, int64_t jobs, char *memory, size_t each, const Body &body) {
    if (jobs <= 0) return;
    JobQueue<Body> queue{&body, jobs, 0, memory, each};
    workers.run(workers, static_cast<int32_t>(least(workers.count, jobs)), JobQueue<Body>::work, &queue);
}

}  // namespace localattn::cpu
