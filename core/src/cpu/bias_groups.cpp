#include "bias_groups.h"

#include <algorithm>
#include <cstring>

namespace localattn::cpu {

namespace {

constexpr int axes = 6;  // batch, three spatial, head, window entry
constexpr int gradients = 5;
constexpr int64_t most_groups = 16;
constexpr int64_t most_copied_elements = int64_t{1} << 20;

struct Shape {
    int64_t extent[axes];
};

// The shape of gradient `which`: the bias, the table, three axis biases.
Shape shape_of(const Problem &p, int which) {
    const Axis *a = p.axis;
    if (which == 1) return {{1, 2 * a[0].kernel - 1, 2 * a[1].kernel - 1, 2 * a[2].kernel - 1, p.heads, 1}};
    const int64_t entries = which == 0 ? a[0].kernel * a[1].kernel * a[2].kernel : a[which - 2].kernel;
    return {{p.batch, a[0].queries, a[1].queries, a[2].queries, p.heads, entries}};
}

const Tensor &result_of(const Problem &p, int which) {
    return which == 0 ? p.grad_bias : which == 1 ? p.grad_rel_pos_bias : p.grad_axis_bias[which - 2];
}
Tensor &slot_of(BiasGradients &g, int which) { return which == 0 ? g.bias : which == 1 ? g.table : g.axis[which - 2]; }

void strides_of(const Tensor &t, int64_t (&stride)[axes]) {
    const int64_t all[axes] = {t.batch, t.axis[0], t.axis[1], t.axis[2], t.head, t.channel};
    std::copy(all, all + axes, stride);
}

// Whether numbers of the gradient are shared along any of the first `some` axes.
bool is_shared(const Problem &p, int which, int some) {
    int64_t stride[axes];
    strides_of(result_of(p, which), stride);
    const Shape shape = shape_of(p, which);
    // The table has no pixel axis, so that every pair of a head's adds to it.
    bool shared = which == 1;
    for (int i = 0; i < some; ++i) shared |= stride[i] == 0 && shape.extent[i] > 1;
    return shared;
}

// A dense tensor over the axes that the result does not sum over.
Tensor compact(const Problem &p, int which, int64_t &elements) {
    const Shape shape = shape_of(p, which);
    int64_t from[axes], to[axes];
    strides_of(result_of(p, which), from);
    int64_t step = 1;
    for (int i = axes - 1; i >= 0; --i) {
        to[i] = from[i] == 0 || shape.extent[i] == 1 ? 0 : step;
        if (to[i] != 0) step *= shape.extent[i];
    }
    elements = step;
    Tensor t;
    t.batch = to[0];
    t.axis[0] = to[1];
    t.axis[1] = to[2];
    t.axis[2] = to[3];
    t.head = to[4];
    t.channel = to[5];
    return t;
}

// Calls visit(result offset, step, compact offset, step, count) for the runs of window entries that make up the result.
template <class Visit>
void each_run(const Problem &p, int which, Visit visit) {
    Shape shape = shape_of(p, which);
    int64_t from[axes], to[axes], elements;
    strides_of(result_of(p, which), from);
    strides_of(compact(p, which, elements), to);
    for (int i = 0; i < axes; ++i)
        if (from[i] == 0) shape.extent[i] = 1;
    int64_t at[axes] = {};
    const int64_t run = shape.extent[axes - 1];
    for (int64_t n = 0; n < elements; n += run) {
        int64_t source = 0, target = 0;
        for (int i = 0; i < axes - 1; ++i) {
            source += at[i] * from[i];
            target += at[i] * to[i];
        }
        visit(source, from[axes - 1], target, to[axes - 1], run);
        for (int i = axes - 2; i >= 0 && ++at[i] == shape.extent[i]; --i) at[i] = 0;
    }
}

template <class T>
void clear_results(const BiasGroups &g) {
    for (int which = 0; which < gradients; ++which) {
        T *data = static_cast<T *>(result_of(*g.problem, which).data);
        if (!data) continue;
        each_run(*g.problem, which, [=](int64_t source, int64_t step, int64_t, int64_t, int64_t count) {
            if (step == 1) std::fill_n(data + source, count, T(0));
            for (int64_t j = 0; step != 1 && j < count; ++j) data[source + j * step] = 0;
        });
    }
}

template <class T>
void reduce_copies(const BiasGroups &g) {
    int64_t base = 0;
    for (int which = 0; which < gradients; ++which) {
        T *data = static_cast<T *>(result_of(*g.problem, which).data);
        if (!data) continue;
        const T *copies = static_cast<const T *>(g.copies) + base;
        each_run(*g.problem, which, [&](int64_t source, int64_t step, int64_t target, int64_t next, int64_t count) {
            for (int64_t j = 0; j < count; ++j) {
                T sum = 0;
                for (int64_t i = 0; i < g.groups; ++i) sum += copies[i * g.copy_elements + target + j * next];
                data[source + j * step] = sum;
            }
        });
        int64_t elements;
        compact(*g.problem, which, elements);
        base += elements;
    }
}

}  // namespace

BiasGroups make_bias_groups(const Problem &problem, int element, Arena &arena) {
    BiasGroups g;
    g.problem = &problem;
    g.element = element;
    bool meet = false;
    for (int which = 0; which < gradients; ++which) {
        if (!result_of(problem, which).data) continue;
        int64_t elements;
        meet |= is_shared(problem, which, axes - 1);
        compact(problem, which, elements);
        g.copy_elements += elements;
    }
    g.groups =
        meet ? std::clamp<int64_t>(most_copied_elements / std::max<int64_t>(1, g.copy_elements), 1, most_groups) : 0;
    if (g.groups > 1) g.copies = arena.take<char>(g.groups * g.copy_elements * element);
    return g;
}

void clear(const BiasGroups &g) {
    if (g.element == 4)
        clear_results<float>(g);
    else
        clear_results<double>(g);
    if (g.copies) std::memset(g.copies, 0, static_cast<size_t>(g.groups * g.copy_elements * g.element));
}

BiasGradients gradients_of(const BiasGroups &g, int64_t group) {
    BiasGradients out;
    out.bias_is_own = !is_shared(*g.problem, 0, axes);
    int64_t base = group * g.copy_elements;
    for (int which = 0; which < gradients; ++which) {
        const Tensor &result = result_of(*g.problem, which);
        if (!result.data) continue;
        if (!g.copies) {
            slot_of(out, which) = result;
            continue;
        }
        int64_t elements;
        Tensor t = compact(*g.problem, which, elements);
        t.data = static_cast<char *>(g.copies) + base * g.element;
        slot_of(out, which) = t;
        base += elements;
    }
    return out;
}

void reduce(const BiasGroups &g) {
    if (!g.copies) return;
    if (g.element == 4)
        reduce_copies<float>(g);
    else
        reduce_copies<double>(g);
}

}  // namespace localattn::cpu
