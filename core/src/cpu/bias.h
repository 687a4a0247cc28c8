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
    const Problem &p = *plan.problem;
    const LanePattern &pattern = *tile.pattern;
    const int64_t entries = (row.entry0 * p.axis[1].kernel + row.entry1) * p.axis[2].kernel;
    const Element *bias = static_cast<const Element *>(p.bias.data);
    const Element *table = static_cast<const Element *>(p.rel_pos_bias.data);
    const Element *axis_bias[3];
    for (int i = 0; i < 3; ++i) {
        axis_bias[i] = static_cast<const Element *>(p.axis_bias[i].data);
        if (axis_bias[i]) axis_bias[i] += query_offset(p.axis_bias[i], row);
    }
    if (axis_bias[0]) axis_bias[0] += row.entry0 * p.axis_bias[0].channel;
    if (axis_bias[1]) axis_bias[1] += row.entry1 * p.axis_bias[1].channel;
    if (bias) bias += query_offset(p.bias, row) + entries * p.bias.channel;
    if (table) table += table_offset(p.rel_pos_bias, row);

    for (int slot = 0; slot < pattern.slots; ++slot) {
        alignas(64) T sum[V::lanes];
        const T shared = table ? load_as<T>(table + pattern.relative[slot] * p.rel_pos_bias.axis[2]) : T(0);
        for (int l = 0; l < V::lanes; ++l) {
            const int64_t u = pattern.entry[slot * V::lanes + l];
            const int64_t q = tile.query + pattern.query[slot] + plan.lane_axis.query_period * l;
            T value = shared;
            if (u >= 0) {
                if (bias) value += load_as<T>(bias + q * p.bias.axis[2] + u * p.bias.channel);
                for (int i = 0; i < 3; ++i) {
                    if (axis_bias[i])
                        value += load_as<T>(axis_bias[i] + q * p.axis_bias[i].axis[2] +
                                            (i == 2 ? u * p.axis_bias[2].channel : 0));
                }
            }
            sum[l] = value;
        }
        V::store(s + slot * V::lanes, V::load(s + slot * V::lanes) + factor * V::load(sum));
    }
}

// Adds the gradients of one row of scores, ds[slot][lane], in lane order to every bias gradient that is asked for.
template <class V>
static void add_bias_gradients(const Plan &plan, const LaneTile &tile, const BiasRow &row, const BiasGradients &out,
                               const typename V::T *ds) {
    using T = typename V::T;
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

    for (int slot = 0; slot < pattern.slots; ++slot) {
        for (int l = 0; l < tile.count; ++l) {
            const int64_t u = pattern.entry[slot * V::lanes + l];
            if (u < 0) continue;
            const int64_t q = tile.query + pattern.query[slot] + plan.lane_axis.query_period * l;
            const T g = ds[slot * V::lanes + l];
            if (bias) bias[q * out.bias.axis[2] + u * out.bias.channel] += g;
            if (table) table[pattern.relative[slot] * out.table.axis[2]] += g;
            for (int i = 0; i < 3; ++i) {
                if (axis[i]) axis[i][q * out.axis[i].axis[2] + (i == 2 ? u * out.axis[2].channel : 0)] += g;
            }
        }
    }
}

}  // namespace localattn::cpu
