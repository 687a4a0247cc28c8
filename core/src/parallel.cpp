#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <system_error>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

namespace localattn {

namespace {

// Tasks are handed out one by one, so that a worker that is late takes fewer. Nothing may depend on who runs what:
// that is the variants' side of "the same bits for every number of workers".
struct Queue {
    std::atomic<int32_t> next{0};
    int32_t tasks;
    void (*body)(void *argument, int32_t index);
    void *argument;

    Queue(int32_t tasks, void (*body)(void *, int32_t), void *argument)
        : tasks(tasks), body(body), argument(argument) {}

    void drain() {
        for (int32_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(argument, index);
    }
};

void run_on_executor(const Workers &self, int32_t tasks, void (*body)(void *, int32_t), void *argument) {
    const auto &executor = *static_cast<const localattn_executor *>(self.implementation);
    Queue queue(tasks, body, argument);
    executor.run(
        executor.self, std::min(tasks, self.count), [](void *q, int32_t) { static_cast<Queue *>(q)->drain(); }, &queue);
}

void run_on_threads(const Workers &self, int32_t tasks, void (*body)(void *, int32_t), void *argument) {
    Queue queue(tasks, body, argument);
    const int32_t wanted = std::min(tasks, self.count) - 1;  // this thread works too
    std::unique_ptr<std::thread[]> threads;
    int32_t started = 0;
    if (wanted > 0) threads.reset(new (std::nothrow) std::thread[static_cast<size_t>(wanted)]);
    if (threads) {
        // Where the system has no more threads to give, those that there are do the work.
        try {
            for (; started < wanted; ++started) threads[started] = std::thread([&queue] { queue.drain(); });
        } catch (const std::system_error &) {
        } catch (const std::bad_alloc &) {
        }
    }
    queue.drain();
    for (int32_t i = 0; i < started; ++i) threads[i].join();
}

int32_t available_cores() {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
    return std::max(1, static_cast<int32_t>(std::thread::hardware_concurrency()));
}

// How many threads are worth their start: one for each quarter of a million multiplications.
int32_t worthwhile_threads(double multiplications, int32_t limit) {
    return multiplications / 250e3 >= limit ? limit : static_cast<int32_t>(multiplications / 250e3) + 1;
}

}  // namespace

Workers workers_for(const localattn_context &context, double multiplications) {
    Workers workers;
    if (context.executor) {
        workers.count = context.executor->num_workers;
        workers.run = run_on_executor;
        workers.implementation = context.executor;
    } else {
        workers.count =
            context.num_threads > 0 ? context.num_threads : worthwhile_threads(multiplications, available_cores());
        workers.run = run_on_threads;
    }
    return workers;
}

Workers workers_for(const localattn_context &context, const Problem &p) {
    double work = double(p.batch) * double(p.heads) * double(p.channels + p.value_channels);
    for (const Axis &a : p.axis) work *= double(a.queries) * double(std::min(a.kernel, a.keys));
    return workers_for(context, work);
}

}  // namespace localattn
