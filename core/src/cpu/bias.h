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

// s[slot][lane] += factor * bias, for all slots of a tile.
template <class V, class Element>
static void add_bias(const Plan &plan, const LaneTile &tile, const BiasRow &row, typename V::T factor,
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
    // With queries in the lanes, all slots belong to the same queries: what does not depend on the entry is the same
    // for all, and entries that a border leaves out can be read (and masked later) where the query exists.
    const bool of_queries = plan.a == Side::query;
    const bool whole = pattern.uniform || (of_queries && pattern.alike && tile.count == V::lanes);
    reg same{};
    if (of_queries) {
        int rest = 0;
        for (int i = 0; i < count; ++i) {
            const Term &t = terms[i];
            if (t.entry == 0 && pattern.slots > 0)
                same += gather<V>(t.data + pattern.query[0] * t.query, t.query * period, tile.count, T(0));
            else
                terms[rest++] = t;
        }
        count = rest;
    }
    for (int slot = 0; slot < pattern.slots; ++slot) {
        const int32_t *entry = pattern.entry + slot * V::lanes;
        reg sum = same;
        if (table) sum += V::all(load_as<T>(table + pattern.relative[slot] * p.rel_pos_bias.axis[2]));
        for (int i = 0; i < count; ++i) {
            const Term &t = terms[i];
            const Element *data = t.data + pattern.query[slot] * t.query;
            const int64_t step = t.query * period;
            if (whole) {
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

// One slot's gradients g[lane], whose sum is `total`, to at[lane * query + entry[lane] * step].
template <class V>
LOCALATTN_INLINE void add_slot(const LaneTile &tile, const int32_t *entry, const typename V::T *g, typename V::T total,
                               typename V::T *at, int64_t query, int64_t step) {
    const bool uniform = tile.pattern->uniform;
    if (query == 0 && (uniform || step == 0)) {
        at[entry[0] * step] += total;
    } else if (uniform) {
        at += entry[0] * step;
        LOCALATTN_UNROLL
        for (int l = 0; l < V::lanes; ++l) at[l * query] += g[l];
    } else {
        for (int l = 0; l < tile.count; ++l)
            if (entry[l] >= 0) at[l * query + entry[l] * step] += g[l];
    }
}

// Adds the gradients of one row of scores, ds[slot][lane], in lane order to every bias gradient that is asked for.
template <class V>
static void add_bias_gradients(const Plan &plan, const LaneTile &tile, const BiasRow &row, const BiasGradients &out,
                               const typename V::T *ds) {
    using T = typename V::T;
    using reg = typename V::reg;
    const Problem &p = *plan.problem;
    const LanePattern &pattern = *tile.pattern;
    const int64_t entries = (row.entry0 * p.axis[1].kernel + row.entry1) * p.axis[2].kernel;
    T *bias = static_cast<T *>(out.bias.data), *table = static_cast<T *>(out.table.data);
    if (bias) bias += query_offset(out.bias, row) + entries * out.bias.channel;
    if (table) table += table_offset(out.table, row);
    T *axis[3];
    for (int i = 0; i < 3; ++i) {
        axis[i] = static_cast<T *>(out.axis[i].data);
        if (axis[i]) axis[i] += query_offset(out.axis[i], row);
    }
    if (axis[0]) axis[0] += row.entry0 * out.axis[0].channel;
    if (axis[1]) axis[1] += row.entry1 * out.axis[1].channel;

    // Pairs that do not exist have ds = 0, so that a slot's lanes can be summed without asking which do.
    const int64_t period = plan.lane_axis.query_period;
    // Sums over the lanes are for gradients that these share.
    const bool summed = table || (bias && out.bias.axis[2] == 0) || (axis[2] && out.axis[2].axis[2] == 0);
    for (int slot = 0; slot < pattern.slots; ++slot) {
        const T *g = ds + slot * V::lanes;
        const int32_t *entry = pattern.entry + slot * V::lanes;
        T total = 0;
        for (int l = 0; summed && l < tile.count; ++l) total += g[l];
        if (table) table[pattern.relative[slot] * out.table.axis[2]] += total;
        if (bias) {
            T *at = bias + (tile.query + pattern.query[slot]) * out.bias.axis[2];
            add_slot<V>(tile, entry, g, total, at, period * out.bias.axis[2], out.bias.channel);
        }
        if (axis[2]) {
            T *at = axis[2] + (tile.query + pattern.query[slot]) * out.axis[2].axis[2];
            add_slot<V>(tile, entry, g, total, at, period * out.axis[2].axis[2], out.axis[2].channel);
        }
    }
    // The other axes' entries are the row's own: one sum over the slots for each query.
    if (!axis[0] && !axis[1]) return;
    reg over_slots{};
    for (int slot = 0; slot < pattern.slots; ++slot) over_slots += V::load(ds + slot * V::lanes);
    alignas(64) T sum[V::lanes];
    V::store(sum, over_slots);
    for (int i = 0; i < 2 && pattern.slots > 0; ++i) {
        if (!axis[i]) continue;
        T *at = axis[i] + (tile.query + pattern.query[0]) * out.axis[i].axis[2];
        for (int l = 0; l < tile.count; ++l) at[l * period * out.axis[i].axis[2]] += sum[l];
    }
}

}  // namespace localattn::cpu
