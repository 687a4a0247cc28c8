// The window products by their definition: every element of the result is one sum, accumulated in double.
#include "../window.h"
#include "operators.h"
#include "walk.h"

namespace localattn::reference {

namespace {

template <class T>
class Kernel {
public:
    explicit Kernel(const WindowProduct &p) : p_(p) {}

    void score(const Workers &workers) const {
        each(workers, rows(false), [&](int64_t number, int32_t) {
            const Row row = row_of(number, false);
            const Windows w = windows_of(row.at);
            for (int64_t entry = 0; entry < p_.entry_count(); ++entry) {
                const Position u = entry_at(entry);
                double x = p_.absent;
                if (is_key(w, u)) {
                    x = 0;
                    const int64_t query = at(p_.query, row.batch, row.at, row.head);
                    const int64_t key = at(p_.key, row.batch, key_at(w, u), row.head);
                    for (int64_t c = 0; c < p_.channels; ++c)
                        x +=
                            load<T>(p_.query, query + c * p_.query.channel) * load<T>(p_.key, key + c * p_.key.channel);
                } else if (is_outside(w, u)) {
                    x = p_.outside;
                }
                store<T>(p_.entries, at(p_.entries, row.batch, row.at, row.head) + entry * p_.entries.channel, x);
            }
        });
    }

    void weigh(const Workers &workers) const {
        each(workers, rows(false), [&](int64_t number, int32_t) {
            const Row row = row_of(number, false);
            const Windows w = windows_of(row.at);
            for (int64_t c = 0; c < p_.channels; ++c) {
                double sum = 0;
                for (int64_t entry = 0; entry < p_.entry_count(); ++entry) {
                    const Position u = entry_at(entry);
                    if (is_key(w, u))
                        sum += weight(row.batch, row.at, row.head, entry) * value(p_.key, row, key_at(w, u), c);
                }
                store<T>(p_.query, at(p_.query, row.batch, row.at, row.head) + c * p_.query.channel, sum);
            }
        });
    }

    void transposed(const Workers &workers) const {
        each(workers, rows(true), [&](int64_t number, int32_t) {
            const Row row = row_of(number, true);
            for (int64_t c = 0; c < p_.channels; ++c) {
                double sum = 0;
                Position q;
                for (q.axis[0] = 0; q.axis[0] < p_.axis[0].queries; ++q.axis[0]) {
                    for (q.axis[1] = 0; q.axis[1] < p_.axis[1].queries; ++q.axis[1]) {
                        for (q.axis[2] = 0; q.axis[2] < p_.axis[2].queries; ++q.axis[2]) {
                            const int64_t entry = entry_of(windows_of(q), row.at);
                            if (entry >= 0) sum += weight(row.batch, q, row.head, entry) * value(p_.query, row, q, c);
                        }
                    }
                }
                store<T>(p_.key, at(p_.key, row.batch, row.at, row.head) + c * p_.key.channel, sum);
            }
        });
    }

private:
    struct Row {
        int64_t batch, head;
        Position at;
    };
    struct Windows {
        Window axis[3];
    };

    int64_t rows(bool of_keys) const {
        int64_t n = p_.batch * p_.heads;
        for (const Axis &a : p_.axis) n *= of_keys ? a.keys : a.queries;
        return n;
    }
    Row row_of(int64_t number, bool of_keys) const {
        Row row;
        row.head = digit(number, p_.heads);
        for (int a = 2; a >= 0; --a) row.at.axis[a] = digit(number, of_keys ? p_.axis[a].keys : p_.axis[a].queries);
        row.batch = number;
        return row;
    }
    Windows windows_of(const Position &query) const {
        Windows w;
        for (int a = 0; a < 3; ++a) w.axis[a] = window_of(p_.axis[a], query.axis[a]);
        return w;
    }
    Position entry_at(int64_t entry) const {
        Position u;
        for (int a = 2; a >= 0; --a) u.axis[a] = digit(entry, p_.axis[a].kernel);
        return u;
    }
    bool is_key(const Windows &w, const Position &u) const {
        bool key = true;
        for (int a = 0; a < 3; ++a) key = key && w.axis[a].begin <= u.axis[a] && u.axis[a] < w.axis[a].end;
        return key;
    }
    // Border mask leaves entries out of `present` that lie outside the map, whose place is known all the same.
    bool is_outside(const Windows &w, const Position &u) const {
        for (int a = 0; a < 3; ++a) {
            if (w.axis[a].start + u.axis[a] > w.axis[a].centre && p_.axis[a].causal) return false;
            if (w.axis[a].start + u.axis[a] >= w.axis[a].length && p_.axis[a].border == Border::shift) return false;
        }
        return true;
    }
    Position key_at(const Windows &w, const Position &u) const {
        Position key;
        for (int a = 0; a < 3; ++a)
            key.axis[a] = w.axis[a].residue + p_.axis[a].dilation * (w.axis[a].start + u.axis[a]);
        return key;
    }
    // The entry that `key` is of the window, -1 if none.
    int64_t entry_of(const Windows &w, const Position &key) const {
        int64_t entry = 0;
        for (int a = 0; a < 3; ++a) {
            const int64_t distance = key.axis[a] - w.axis[a].residue - p_.axis[a].dilation * w.axis[a].start;
            const int64_t u = distance / p_.axis[a].dilation;
            if (distance % p_.axis[a].dilation != 0 || u < w.axis[a].begin || u >= w.axis[a].end) return -1;
            entry = entry * p_.axis[a].kernel + u;
        }
        return entry < p_.entry_count() ? entry : -1;
    }
    double weight(int64_t batch, const Position &query, int64_t head, int64_t entry) const {
        return load<T>(p_.entries, at(p_.entries, batch, query, head) + entry * p_.entries.channel);
    }
    static double value(const Tensor &t, const Row &row, const Position &x, int64_t c) {
        return load<T>(t, at(t, row.batch, x, row.head) + c * t.channel);
    }

    const WindowProduct &p_;
};

template <class T>
void run_as(const WindowProduct &p, const Workers &workers) {
    const Kernel<T> product(p);
    switch (p.product) {
        case Product::score:
            return product.score(workers);
        case Product::weigh:
            return product.weigh(workers);
        case Product::transposed:
            return product.transposed(workers);
    }
}

}  // namespace

size_t window_product_workspace(const WindowProduct &, int32_t) { return 0; }

void run_window_product(const WindowProduct &p, const Workers &workers, void *) {
    switch (p.dtype) {
        case Dtype::float32:
            return run_as<float>(p, workers);
        case Dtype::float64:
            return run_as<double>(p, workers);
        case Dtype::float16:
            return run_as<float16>(p, workers);
        case Dtype::bfloat16:
            return run_as<bfloat16>(p, workers);
    }
}

}  // namespace localattn::reference
