// Window attention and its gradients in float64, written from the words of localattn.h and from nothing else: no code
// is shared with the library. Slow; every entry of every window is listed.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace brute_force {

struct Axis {
    int queries, keys, kernel, stride, dilation;
    bool causal;
    char border;  // m(ask), z(ero), s(hift)
};

// Dense arrays, row-major: (batch, q0, q1, q2, head, last).
struct Shape {
    int batch, heads, kv_heads, channels, value_channels;
    Axis axis[3];
    bool raster;
    double scale;
    int queries() const { return axis[0].queries * axis[1].queries * axis[2].queries; }
    int keys() const { return axis[0].keys * axis[1].keys * axis[2].keys; }
    int entries() const { return axis[0].kernel * axis[1].kernel * axis[2].kernel; }
    int cells() const { return (2 * axis[0].kernel - 1) * (2 * axis[1].kernel - 1) * (2 * axis[2].kernel - 1); }
};

struct Inputs {
    std::vector<double> query, key, value, bias, table, axis_bias[3], grad_output, grad_lse;
    std::vector<int> key_mask;  // empty vectors: absent
};

struct Results {
    std::vector<double> output, lse, grad_query, grad_key, grad_value, grad_bias, grad_table, grad_axis_bias[3];
};

// One entry along one axis: absent, a zero outside the map, or a key.
struct AxisEntry {
    enum { absent, zero, key } kind;
    int position;  // of the key
    int cell;      // of the relative-position table
};

inline AxisEntry axis_entry(const Axis &a, int i, int u) {
    const long centre_position = long(2 * i + 1) * a.keys / (2L * a.queries);
    std::vector<long> members;  // the centre's residue class
    for (long position = centre_position % a.dilation; position < a.keys; position += a.dilation)
        members.push_back(position);
    const long n = long(members.size()), k = a.kernel, s = a.stride, c = centre_position / a.dilation;
    long leader = a.causal ? c / s * s + s - 1 : c / s * s + s / 2;
    if (a.causal || a.border == 's') leader = std::min(leader, n - 1);
    long start = leader - k / 2;
    if (a.border == 's') start = std::max(0L, std::min(start, n - k));
    if (a.causal) start = std::max(leader - k + 1, 0L);
    const long member = start + u;
    AxisEntry entry{AxisEntry::absent, 0, int(member - c + k - 1)};
    if (a.causal && member > c) return entry;
    if (a.border == 's' && member >= n) return entry;
    if (member >= 0 && member < n) {
        entry.kind = AxisEntry::key;
        entry.position = int(members[size_t(member)]);
    } else if (a.border == 'z') {
        entry.kind = AxisEntry::zero;
    }
    return entry;
}

inline Results attention(const Shape &p, const Inputs &in) {
    const Axis *x = p.axis;
    const int queries = p.queries(), keys = p.keys(), entries = p.entries(), D = p.channels, Dv = p.value_channels;
    Results r;
    r.output.assign(size_t(p.batch) * queries * p.heads * Dv, 0);
    r.lse.assign(size_t(p.batch) * queries * p.heads, -INFINITY);
    r.grad_query.assign(in.query.size(), 0);
    r.grad_key.assign(in.key.size(), 0);
    r.grad_value.assign(in.value.size(), 0);
    r.grad_bias.assign(size_t(p.batch) * queries * p.heads * entries, 0);
    r.grad_table.assign(size_t(p.heads) * p.cells(), 0);
    for (int a = 0; a < 3; a++) r.grad_axis_bias[a].assign(size_t(p.batch) * queries * p.heads * x[a].kernel, 0);

    struct Seen {
        int u[3], entry;
        long key;   // row of key and value, or -1 for a zero
        long cell;  // of the table
        double score;
    };
    for (int b = 0; b < p.batch; b++)
        for (int q = 0; q < queries; q++)
            for (int h = 0; h < p.heads; h++) {
                const long row = (long(b) * queries + q) * p.heads + h;
                const int at[3] = {q / x[2].queries / x[1].queries, q / x[2].queries % x[1].queries, q % x[2].queries};
                std::vector<Seen> seen;
                for (int entry = 0; entry < entries; entry++) {
                    if (keys == 0 || (p.raster && entry > entries / 2)) break;
                    Seen e{{entry / x[2].kernel / x[1].kernel, entry / x[2].kernel % x[1].kernel, entry % x[2].kernel},
                           entry,
                           0,
                           0,
                           0};
                    bool absent = false, is_key = true;
                    long position = 0;
                    for (int a = 0; a < 3; a++) {
                        const AxisEntry one = axis_entry(x[a], at[a], e.u[a]);
                        absent = absent || one.kind == AxisEntry::absent;
                        is_key = is_key && one.kind == AxisEntry::key;
                        position = position * x[a].keys + one.position;
                        e.cell = e.cell * (2 * x[a].kernel - 1) + one.cell;
                    }
                    if (absent) continue;
                    if (is_key && !in.key_mask.empty() && !in.key_mask[size_t(b * keys + position)]) continue;
                    e.cell += long(h) * p.cells();
                    e.key = is_key ? (long(b) * keys + position) * p.kv_heads + h / (p.heads / p.kv_heads) : -1;
                    if (is_key)
                        for (int c = 0; c < D; c++) e.score += p.scale * in.query[row * D + c] * in.key[e.key * D + c];
                    if (!in.bias.empty()) e.score += in.bias[row * entries + entry];
                    if (!in.table.empty()) e.score += in.table[e.cell];
                    for (int a = 0; a < 3; a++)
                        if (!in.axis_bias[a].empty()) e.score += in.axis_bias[a][row * x[a].kernel + e.u[a]];
                    seen.push_back(e);
                }
                double top = -INFINITY, total = 0;
                for (const Seen &e : seen) top = std::max(top, e.score);
                if (top == -INFINITY) continue;
                for (const Seen &e : seen) total += std::exp(e.score - top);
                r.lse[row] = top + std::log(total);
                for (const Seen &e : seen)
                    if (e.key >= 0)
                        for (int c = 0; c < Dv; c++)
                            r.output[row * Dv + c] += std::exp(e.score - r.lse[row]) * in.value[e.key * Dv + c];

                if (in.grad_output.empty()) continue;
                double mean = in.grad_lse.empty() ? 0 : -in.grad_lse[row];
                for (int c = 0; c < Dv; c++) mean += in.grad_output[row * Dv + c] * r.output[row * Dv + c];
                for (const Seen &e : seen) {
                    const double weight = std::exp(e.score - r.lse[row]);
                    double by_weight = 0;
                    if (e.key >= 0)
                        for (int c = 0; c < Dv; c++) {
                            by_weight += in.grad_output[row * Dv + c] * in.value[e.key * Dv + c];
                            r.grad_value[e.key * Dv + c] += weight * in.grad_output[row * Dv + c];
                        }
                    const double by_score = weight * (by_weight - mean);
                    if (e.key >= 0)
                        for (int c = 0; c < D; c++) {
                            r.grad_query[row * D + c] += p.scale * by_score * in.key[e.key * D + c];
                            r.grad_key[e.key * D + c] += p.scale * by_score * in.query[row * D + c];
                        }
                    r.grad_bias[row * entries + e.entry] += by_score;
                    r.grad_table[e.cell] += by_score;
                    for (int a = 0; a < 3; a++) r.grad_axis_bias[a][row * x[a].kernel + e.u[a]] += by_score;
                }
            }
    return r;
}

}  // namespace brute_force
