// The biases of a tile's scores, and their gradients.
//
// bias[q, u] = entry bias[q, u] + table[key - centre] + sum over axes of axis bias[q, u of that axis].
#pragma once
#include "bias_groups.h"
#include "ring.h"

namespace localattn::cpu {

// Where a row of scores lies along axes 0 and 1.
struct BiasRow {
    int64_t batch, head;
    int64_t query0, query1;        // positions
    int64_t entry0, entry1;        // window entries
    int64_t relative0, relative1;  // key - centre + kernel - 1
};
// query and key rows are positions in the lists, which for keys outside the map may lie outside the list too.
LOCALATTN_INLINE BiasRow bias_row(const Plan &plan, int64_t batch, int64_t head, int64_t query0, int64_t query1,
                                  int64_t key0, int64_t key1) {
    const RowAxis &a0 = plan.axis0, &a1 = plan.axis1;
    const Axis *axis = plan.problem->axis;
    return {batch,
            head,
            a0.query.position[query0],
            a1.query.position[query1],
            key0 - a0.first[query0],
            key1 - a1.first[query1],
            key0 - a0.centre[query0] + axis[0].kernel - 1,
            key1 - a1.centre[query1] + axis[1].kernel - 1};
}

LOCALATTN_INLINE int64_t query_offset(const Tensor &t, const BiasRow &row) {
    return row.batch * t.batch + row.query0 * t.axis[0] + row.query1 * t.axis[1] + row.head * t.head;
}
LOCALATTN_INLINE int64_t table_offset(const Tensor &t, const BiasRow &row) {
    return row.head * t.head + row.relative0 * t.axis[0] + row.relative1 * t.axis[1];
}

// The same for consecutive rows of keys, the first of which `row` is about.
LOCALATTN_INLINE BiasRow row_after(BiasRow row, int64_t rows) {
    row.entry1 += rows;
    row.relative1 += rows;
    return row;
}

// Lanes that are keys: s[slot][lane] += factor * bias, for all slots of a tile and one row of queries, gathered.
template <class V, class Element>
static void add_key_bias(const Plan &plan, const LaneTile &tile, const BiasRow &row, typename V::T factor,
                         typename V::T *s) {
    using T = typename V::T;
    using reg = typename V::reg;
    const Problem &p = *plan.problem;
    const LanePattern &pattern = *tile.pattern;
    const int64_t entries = (row.entry0 * p.axis[1].kernel + row.entry1) * p.axis[2].kernel;
    const Element *table = static_cast<const Element *>(p.rel_pos_bias.data);
    if (table) table += table_offset(p.rel_pos_bias, row);

    // The other biases, by their steps from query to query and from entry to entry along axis 2.
    struct Term {
        const Element *data;
        int64_t query, entry;
    };
    Term terms[4];
    int count = 0;
    const auto term = [&](const Tensor &t, int64_t offset, int64_t entry) {
        if (!t.data) return;
        const Element *data = static_cast<const Element *>(t.data) + query_offset(t, row) + offset;
        terms[count++] = {data + tile.query * t.axis[2], t.axis[2], entry};
    };
    term(p.axis_bias[0], row.entry0 * p.axis_bias[0].channel, 0);
    term(p.axis_bias[1], row.entry1 * p.axis_bias[1].channel, 0);
    term(p.axis_bias[2], 0, p.axis_bias[2].channel);
    term(p.bias, entries * p.bias.channel, p.bias.channel);

    const int64_t period = plan.lane_axis.query_period;
    for (int slot = 0; slot < pattern.slots; ++slot) {
        const int32_t *entry = pattern.entry + slot * V::lanes;
        reg sum{};
        if (table) sum += V::all(load_as<T>(table + pattern.relative[slot] * p.rel_pos_bias.axis[2]));
        for (int i = 0; i < count; ++i) {
            const Term &t = terms[i];
            const Element *data = t.data + pattern.query[slot] * t.query;
            const int64_t step = t.query * period;
            if (pattern.uniform) {
                data += pattern.shared[slot] * t.entry;
                sum += step == 0 ? V::all(load_as<T>(data)) : gather<V>(data, step, V::lanes, T(0));
            } else {
                alignas(64) T value[V::lanes];
                for (int l = 0; l < V::lanes; ++l)
                    value[l] = entry[l] >= 0 ? load_as<T>(data + l * step + entry[l] * t.entry) : T(0);
                sum += V::load(value);
            }
        }
        V::store(s + slot * V::lanes, V::load(s + slot * V::lanes) + V::all(factor) * sum);
    }
}

// How many rows of keys the passes with queries in their lanes take at once, so that these rows' biases, transposed,
// stay in the L1 cache; and the memory for that: [rows][entry][lane] of the bias, [entry][lane] of axis 2's,
// [row][lane] of axis 1's.
LOCALATTN_INLINE int64_t bias_rows_at_once(const Problem &p) {
    return most(1, least(p.axis[1].kernel, 256 / p.axis[2].kernel));
}
struct BiasScratch {
    int64_t axis2, axis1, size;  // in registers
};
LOCALATTN_INLINE BiasScratch bias_scratch_of(const Problem &p) {
    const int64_t rows = bias_rows_at_once(p), kernel = p.axis[2].kernel, axis1 = rows * kernel + kernel;
    return {rows * kernel, axis1, axis1 + rows};
}
template <class V>
LOCALATTN_INLINE typename V::T *take_bias_scratch(const Plan &plan, Arena &arena) {
    if (!plan.problem->has_bias() && !plan.problem->wants_bias_gradient()) return nullptr;
    return arena.take<typename V::T>(bias_scratch_of(*plan.problem).size * V::lanes);
}

// Of the first of the queries that are a tile's lanes.
LOCALATTN_INLINE int64_t query_position(const Plan &plan, const LaneTile &tile) {
    return plan.lane_axis.position(Side::query, tile.phase, tile.lane);
}

// Entries [first, first + count) of a bias of the tile's queries, as out[entry][lane].
template <class V, class Element>
LOCALATTN_INLINE void transpose_bias(const Plan &plan, const LaneTile &tile, const Tensor &t, const BiasRow &row,
                                     int64_t first, int64_t count, typename V::T *out) {
    using T = typename V::T;
    const Element *data = static_cast<const Element *>(t.data) + query_offset(t, row) + first * t.channel;
    if (t.axis[2] == 0) {
        for (int64_t e = 0; e < count; ++e) V::store(out + e * V::lanes, V::all(load_as<T>(data + e * t.channel)));
        return;
    }
    pack<V, Element>(data + query_position(plan, tile) * t.axis[2], plan.lane_axis.query_period * t.axis[2], t.channel,
                     0, tile.count, V::lanes, count, T(1), out, V::lanes);
}

// Lanes that are queries: s[row][slot][lane] += factor * bias for consecutive rows of keys. Pairs that do not exist get
// something too, and have to be masked later.
template <class V, class Element>
static void add_query_bias(const Plan &plan, const LaneTile &tile, const BiasRow &first, int64_t rows,
                           typename V::T factor, typename V::T *scratch, typename V::T *s) {
    using T = typename V::T;
    using reg = typename V::reg;
    constexpr int L = V::lanes;
    const Problem &p = *plan.problem;
    const LanePattern &pattern = *tile.pattern;
    const int64_t kernel = p.axis[2].kernel, at_once = bias_rows_at_once(p);
    const BiasScratch parts = bias_scratch_of(p);
    T *full = scratch, *axis2 = full + parts.axis2 * L, *axis1 = full + parts.axis1 * L;
    if (p.axis_bias[2].data) transpose_bias<V, Element>(plan, tile, p.axis_bias[2], first, 0, kernel, axis2);
    alignas(64) T axis0[L] = {};
    if (p.axis_bias[0].data) transpose_bias<V, Element>(plan, tile, p.axis_bias[0], first, first.entry0, 1, axis0);
    for (int64_t done = 0; done < rows; done += at_once) {
        const int64_t now = least(at_once, rows - done);
        const BiasRow row = row_after(first, done);
        if (p.bias.data)
            transpose_bias<V, Element>(plan, tile, p.bias, row, (row.entry0 * p.axis[1].kernel + row.entry1) * kernel,
                                       now * kernel, full);
        if (p.axis_bias[1].data) transpose_bias<V, Element>(plan, tile, p.axis_bias[1], row, row.entry1, now, axis1);
        for (int64_t b = 0; b < now; ++b, s += pattern.slots * L) {
            reg same = V::load(axis0);
            if (p.axis_bias[1].data) same += V::load(axis1 + b * L);
            const Element *table = static_cast<const Element *>(p.rel_pos_bias.data);
            if (table) table += table_offset(p.rel_pos_bias, row_after(row, b));
            for (int slot = 0; slot < pattern.slots; ++slot) {
                reg sum = same;
                if (table) sum += V::all(load_as<T>(table + pattern.relative[slot] * p.rel_pos_bias.axis[2]));
                // Of terms by entry, each lane has its own where the tile's entries are not alike.
                const auto add = [&](const T *term) __attribute__((always_inline)) {
                    if (pattern.alike) {
                        sum += V::load(term + pattern.shared[slot] * L);
                        return;
                    }
                    const int32_t *entry = pattern.entry + slot * L;
                    alignas(64) T value[L];
                    for (int l = 0; l < L; ++l) value[l] = entry[l] >= 0 ? term[entry[l] * L + l] : T(0);
                    sum += V::load(value);
                };
                if (p.bias.data) add(full + b * kernel * L);
                if (p.axis_bias[2].data) add(axis2);
                V::store(s + slot * L, V::load(s + slot * L) + V::all(factor) * sum);
            }
        }
    }
}

// One slot's gradients g[lane], whose sum is `total`, to row[lane * place + entry[lane] * step].
template <class V>
LOCALATTN_INLINE void add_slot(const LaneTile &tile, const int32_t *entry, const typename V::T *g, typename V::T total,
                               typename V::T *row, int64_t place, int64_t step) {
    const bool uniform = tile.pattern->uniform;
    if (place == 0 && (uniform || step == 0)) {
        row[entry[0] * step] += total;
    } else if (uniform) {
        row += entry[0] * step;
        LOCALATTN_UNROLL
        for (int l = 0; l < V::lanes; ++l) row[l * place] += g[l];
    } else {
        for (int l = 0; l < tile.count; ++l)
            if (entry[l] >= 0) row[l * place + entry[l] * step] += g[l];
    }
}

// The gradient of a bias that shares no number between pairs: written, a few rows of keys at a time.
template <class V>
LOCALATTN_INLINE void store_bias_gradient(const Plan &plan, const LaneTile &tile, const BiasRow &first, int64_t rows,
                                          const Tensor &out, typename V::T *scratch, const typename V::T *ds) {
    using T = typename V::T;
    constexpr int L = V::lanes;
    const Problem &p = *plan.problem;
    const LanePattern &pattern = *tile.pattern;
    const int64_t kernel = p.axis[2].kernel, at_once = bias_rows_at_once(p), cell = pattern.slots * L;
    bool by_entry = pattern.alike && pattern.slots == kernel;
    for (int slot = 0; slot < pattern.slots && by_entry; ++slot) by_entry = pattern.shared[slot] == slot;
    for (int64_t done = 0; done < rows; done += at_once) {
        const int64_t now = least(at_once, rows - done);
        const BiasRow row = row_after(first, done);
        const T *g = ds + done * cell;
        if (!by_entry) {
            for (int64_t i = 0; i < now * kernel * L; i += L) V::store(scratch + i, typename V::reg{});
            for (int64_t b = 0; b < now; ++b) {
                for (int i = 0; i < pattern.slots * L; ++i)
                    if (pattern.entry[i] >= 0) scratch[(b * kernel + pattern.entry[i]) * L + i % L] = g[b * cell + i];
            }
            g = scratch;
        }
        T *at = static_cast<T *>(out.data) + query_offset(out, row) +
                (row.entry0 * p.axis[1].kernel + row.entry1) * kernel * out.channel;
        unpack<V, T, false>(g, tile.count, now * kernel, V::all(T(1)), at + query_position(plan, tile) * out.axis[2],
                            plan.lane_axis.query_period * out.axis[2], out.channel);
    }
}

// Adds the gradients of consecutive rows of scores, ds[row][slot][lane], whose lanes are queries, to every bias
// gradient that is asked for. Pairs that do not exist have ds = 0.
template <class V>
static void add_bias_gradients(const Plan &plan, const LaneTile &tile, const BiasRow &first, int64_t rows,
                               const BiasGradients &out, typename V::T *scratch, const typename V::T *ds) {
    using T = typename V::T;
    using reg = typename V::reg;
    constexpr int L = V::lanes;
    const Problem &p = *plan.problem;
    const LanePattern &pattern = *tile.pattern;
    if (pattern.slots == 0) return;
    const int64_t kernel = p.axis[2].kernel, cell = pattern.slots * L;
    const auto total_of = [&](const T *g) {
        T total = 0;
        for (int l = 0; l < tile.count; ++l) total += g[l];
        return total;
    };
    const auto row_of = [&](const Tensor &t) {
        return static_cast<T *>(t.data) + query_offset(t, first) + query_position(plan, tile) * t.axis[2];
    };
    const auto place_of = [&](const Tensor &t) { return plan.lane_axis.query_period * t.axis[2]; };

    if (out.bias.data && out.bias_is_own) {
        store_bias_gradient<V>(plan, tile, first, rows, out.bias, scratch, ds);
    } else if (out.bias.data) {
        const int64_t entries = (first.entry0 * p.axis[1].kernel + first.entry1) * kernel;
        const int64_t place = place_of(out.bias);
        for (int64_t b = 0; b < rows; ++b) {
            T *row = row_of(out.bias) + (entries + b * kernel) * out.bias.channel;
            for (int slot = 0; slot < pattern.slots; ++slot) {
                const T *g = ds + b * cell + slot * L;
                add_slot<V>(tile, pattern.entry + slot * L, g, place == 0 ? total_of(g) : T(0), row, place,
                            out.bias.channel);
            }
        }
    }
    if (out.table.data) {
        for (int64_t b = 0; b < rows; ++b) {
            T *table = static_cast<T *>(out.table.data) + table_offset(out.table, row_after(first, b));
            for (int slot = 0; slot < pattern.slots; ++slot)
                table[pattern.relative[slot] * out.table.axis[2]] += total_of(ds + b * cell + slot * L);
        }
    }
    // Along axis 2, all rows give to the same numbers; along the others, all slots of a row.
    if (out.axis[2].data) {
        const int64_t place = place_of(out.axis[2]);
        for (int slot = 0; slot < pattern.slots; ++slot) {
            reg sum{};
            for (int64_t b = 0; b < rows; ++b) sum += V::load(ds + b * cell + slot * L);
            alignas(64) T g[L];
            V::store(g, sum);
            add_slot<V>(tile, pattern.entry + slot * L, g, place == 0 ? total_of(g) : T(0), row_of(out.axis[2]), place,
                        out.axis[2].channel);
        }
    }
    if (!out.axis[0].data && !out.axis[1].data) return;
    reg all{};
    const auto add_lanes = [&](const Tensor &t, int64_t entry, reg sum) {
        T *row = row_of(t) + entry * t.channel;
        alignas(64) T g[L];
        V::store(g, sum);
        for (int l = 0; l < tile.count; ++l) row[l * place_of(t)] += g[l];
    };
    for (int64_t b = 0; b < rows; ++b) {
        reg sum{};
        for (int slot = 0; slot < pattern.slots; ++slot) sum += V::load(ds + b * cell + slot * L);
        all += sum;
        if (out.axis[1].data) add_lanes(out.axis[1], first.entry1 + b, sum);
    }
    if (out.axis[0].data) add_lanes(out.axis[0], first.entry0, all);
}

}  // namespace localattn::cpu
