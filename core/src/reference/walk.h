// What the slow variants have in common: how work is shared out, and where elements lie.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../scalar.h"
#include "../variant.h"

namespace localattn::reference {

struct Position {
    int64_t axis[3];
};

// Takes the last, fastest digit off a mixed-radix number.
inline int64_t digit(int64_t &number, int64_t radix) {
    const int64_t last = number % radix;
    number /= radix;
    return last;
}

// Calls visit(i, worker) for i in [0, count), each worker on a range of its own.
template <class Visit>
void each(const Workers &workers, int64_t count, const Visit &visit) {
    struct Job {
        const Visit &visit;
        int64_t count, workers;
    } job{visit, count, std::min<int64_t>(workers.count, count)};
    const auto body = [](void *argument, int32_t worker) {
        const Job &j = *static_cast<const Job *>(argument);
        const int64_t share = (j.count + j.workers - 1) / j.workers;
        const int64_t end = std::min(j.count, (worker + 1) * share);
        for (int64_t i = worker * share; i < end; ++i) j.visit(i, worker);
    };
    workers.run(workers, static_cast<int32_t>(job.workers), body, &job);
}

inline int64_t at(const Tensor &t, int64_t batch, const Position &x, int64_t head) {
    return batch * t.batch + x.axis[0] * t.axis[0] + x.axis[1] * t.axis[1] + x.axis[2] * t.axis[2] + head * t.head;
}

template <class Element>
double load(const Tensor &t, int64_t offset) {
    return load_as<double>(static_cast<const Element *>(t.data) + offset);
}

template <class Element>
void store(const Tensor &t, int64_t offset, double x) {
    store_from(x, static_cast<Element *>(t.data) + offset);
}

}  // namespace localattn::reference
