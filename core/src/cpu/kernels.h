// The vector variant of one instruction set: everything that an isa/ file compiles for itself.
#pragma once
#include "../variant.h"
#include "blocked_attention.h"
#include "forward.h"
#include "joint_backward.h"
#include "linear_attention.h"
#include "routed_attention.h"
#include "window_product.h"

namespace localattn::cpu {

// Cache budgets, for cores with 1 MiB of L2 (512 KiB lose a few percent): the packed ring and the scores of a chunk.
inline constexpr int64_t ring_bytes = 600 * 1024, forward_score_bytes = 256 * 1024, backward_score_bytes = 48 * 1024;
// More than a core's share of the last cache on most machines.
inline constexpr double past_cache_bytes = 12 * 1024 * 1024;

template <class V, class Element>
LOCALATTN_INLINE Codec<V> make_codec() {
    constexpr bool lines = V::Isa::writes_lines && std::is_same_v<Element, typename V::T>;
    return {pack<V, Element>,           unpack<V, Element, false>, unpack<V, Element, lines>,
            add_query_bias<V, Element>, add_key_bias<V, Element>,  sizeof(Element)};
}

// The same of a vector whose operands are words.
template <class V>
LOCALATTN_INLINE Codec<V> make_word_codec() {
    return {pack_words<V>,
            unpack_words<V, false>,
            unpack_words<V, true>,
            add_query_bias<V, bfloat16>,
            add_key_bias<V, bfloat16>,
            sizeof(bfloat16)};
}

// The codec for a call that goes through so many elements: where they are more than caches keep, results are written
// past these, which halves what writing them moves.
template <class V>
LOCALATTN_INLINE Codec<V> codec_for(Codec<V> codec, double elements) {
    if (elements * static_cast<double>(codec.element_size) > past_cache_bytes) codec.unpack = codec.unpack_past_cache;
    return codec;
}
inline double elements_of(const Problem &p, Pass pass) {
    double queries = 1, keys = 1;
    for (const Axis &axis : p.axis) {
        queries *= static_cast<double>(axis.queries);
        keys *= static_cast<double>(axis.keys);
    }
    const double vectors = queries * static_cast<double>(p.heads) + keys * static_cast<double>(p.kv_heads);
    const double channels = static_cast<double>(p.channels) + static_cast<double>(p.value_channels);
    return static_cast<double>(p.batch) * vectors * channels * (pass == Pass::backward ? 2 : 1);
}

template <class V>
LOCALATTN_INLINE PlanOptions options_for(Side a, bool forward, int32_t workers) {
    PlanOptions o;
    o.a = a;
    o.lanes = V::lanes;
    o.element = sizeof(typename V::T);
    o.block_rows = max_rows(V::registers);
    o.workers = workers;
    o.ring_bytes = ring_bytes;
    o.score_bytes = forward ? forward_score_bytes : backward_score_bytes;
    o.whole_rows = forward;
    o.groups_tiles = V::word == 1;
    return o;
}

inline void make(Plan &plan, const Problem &problem, const PlanOptions &options, Arena &arena) {
    plan = make_plan(problem, options, arena);
}
inline void make(JointPlan &plan, const Problem &problem, const PlanOptions &options, Arena &arena) {
    plan = make_joint_plan(problem, options, arena);
}
template <class Worker>
using PlanFor = std::remove_cv_t<std::remove_reference_t<decltype(Worker::plan)>>;

// Jobs are handed out one by one: which worker does which changes no result.
template <class V, class Worker>
struct PassRun {
    const PlanFor<Worker> *plan;
    const Codec<V> *codec;
    const BiasGroups *bias_groups;
    int64_t groups;  // of consecutive jobs that one worker does in order
    int64_t next;
    char *memory;
    size_t worker_bytes;
};

template <class Worker>
LOCALATTN_INLINE auto set_bias_gradients(Worker &w, const BiasGroups *groups, int64_t group, int)
    -> decltype(void(w.bias_gradients)) {
    if (groups) w.bias_gradients = gradients_of(*groups, groups->groups == 0 ? 0 : group);
}
template <class Worker>
LOCALATTN_INLINE void set_bias_gradients(Worker &, const BiasGroups *, int64_t, long) {}

template <class V, class Worker>
static void work(void *argument, int32_t index) {
    auto &pass = *static_cast<PassRun<V, Worker> *>(argument);
    Worker worker(*pass.plan, *pass.codec);
    Arena arena(pass.memory + static_cast<size_t>(index) * pass.worker_bytes);
    Worker::take(worker, arena);
    const int64_t jobs = pass.plan->jobs;
    for (;;) {
        const int64_t group = __atomic_fetch_add(&pass.next, 1, __ATOMIC_RELAXED);
        if (group >= pass.groups) break;
        set_bias_gradients(worker, pass.bias_groups, group, 0);
        for (int64_t j = jobs * group / pass.groups; j < jobs * (group + 1) / pass.groups; ++j)
            run_job(worker, job_of(*pass.plan, j));
    }
    publish_lines();
}

// Runs one pass, or, without memory, measures what it needs.
template <class V, class Worker>
static size_t run_pass(const Problem &problem, const PlanOptions &options, const Codec<V> &codec,
                       const Workers &workers, bool bias_gradients, void *memory) {
    Arena arena(memory);
    BiasGroups groups;
    if (bias_gradients) groups = make_bias_groups(problem, options.element, arena);
    PlanFor<Worker> plan;
    make(plan, problem, options, arena);
    Arena measure(nullptr);
    Worker worker(plan, codec);
    Worker::take(worker, measure);
    const size_t shared = arena.used(), each = measure.used();
    if (memory) {
        if (bias_gradients) clear(groups);
        const bool grouped = bias_gradients && groups.groups > 0;
        PassRun<V, Worker> pass{&plan,
                                &codec,
                                bias_gradients ? &groups : nullptr,
                                grouped ? least(groups.groups, most(1, plan.jobs)) : plan.jobs,
                                0,
                                static_cast<char *>(memory) + shared,
                                each};
        workers.run(workers, static_cast<int32_t>(least(workers.count, pass.groups)), work<V, Worker>, &pass);
        if (bias_gradients) reduce(groups);
    }
    return shared + static_cast<size_t>(workers.count) * each;
}

// On the walk of plan.h.
template <class V>
static size_t run_windows(const Problem &problem, Pass pass, const Codec<V> &codec, const Workers &workers,
                          void *memory) {
    const bool bias = problem.wants_bias_gradient();
    if (pass == Pass::forward) {
        const PlanOptions options = options_for<V>(Side::query, true, workers.count);
        return run_pass<V, ForwardWorker<V>>(problem, options, codec, workers, false, memory);
    }
    size_t most_bytes = 0;
    // With gradients added up over jobs, the jobs must be the same for any number of workers.
    const int32_t counted = bias ? 8 : workers.count;
    const PlanOptions joint = options_for<V>(Side::key, false, counted);
    if (joint_takes(problem, joint)) return run_pass<V, JointWorker<V>>(problem, joint, codec, workers, bias, memory);
    if (problem.grad_query.data || bias) {
        const PlanOptions options = options_for<V>(Side::query, false, counted);
        most_bytes = run_pass<V, QueryPassWorker<V>>(problem, options, codec, workers, bias, memory);
    }
    if (problem.grad_key.data || problem.grad_value.data) {
        const PlanOptions options = options_for<V>(Side::key, false, workers.count);
        const size_t bytes = run_pass<V, KeyPassWorker<V>>(problem, options, codec, workers, false, memory);
        if (bytes > most_bytes) most_bytes = bytes;
    }
    return most_bytes;
}

template <class V>
static size_t run_all(const Problem &problem, Pass pass, const Codec<V> &codec, const Workers &workers, void *memory) {
    if (Blocked<V>::takes(problem, pass)) return Blocked<V>{problem, codec}.run(pass, workers, memory);
    return run_windows(problem, pass, codec, workers, memory);
}

template <class V>
static size_t run_window_product(const WindowProduct &given, const Codec<V> &codec, const Workers &workers,
                                 void *memory) {
    WindowProduct problem = given;
    if (problem.product == Product::transposed) {
        // The ring holds, beside the queries, the entries that a block pairs with them.
        problem.value_channels = max_rows(V::registers) * problem.axis[2].kernel;
        const PlanOptions options = options_for<V>(Side::key, false, workers.count);
        return run_pass<V, TransposedWorker<V>>(problem, options, codec, workers, false, memory);
    }
    const PlanOptions options = options_for<V>(Side::query, false, workers.count);
    if (problem.product == Product::score)
        return run_pass<V, ScoreWorker<V>>(problem, options, codec, workers, false, memory);
    return run_pass<V, WeighWorker<V>>(problem, options, codec, workers, false, memory);
}

// Calls body(codec) with the compute type and the element type that go with the dtype.
template <class Isa, class Body>
LOCALATTN_INLINE size_t with_codec(Dtype dtype, const Body &body) {
    using Single = Vector<Isa, float>;
    using Double = Vector<Isa, double>;
    switch (dtype) {
        case Dtype::float64:
            return body(make_codec<Double, double>());
        case Dtype::float16:
            return body(make_codec<Single, float16>());
        case Dtype::bfloat16:
            return body(make_codec<Single, bfloat16>());
        default:
            return body(make_codec<Single, float>());
    }
}

template <class Isa>
static size_t run_dtype(const Problem &problem, Pass pass, const Workers &workers, void *memory) {
    return with_codec<Isa>(problem.dtype, [&](const auto &codec) {
        return run_all(problem, pass, codec_for(codec, elements_of(problem, pass)), workers, memory);
    });
}

static const char *declines_nothing(const Problem &, Pass) { return nullptr; }

template <class Isa>
static size_t workspace(const Problem &problem, Pass pass, int32_t count) {
    Workers workers;
    workers.count = count;
    return run_dtype<Isa>(problem, pass, workers, nullptr);
}
template <class Isa>
static void run(const Problem &problem, Pass pass, const Workers &workers, void *memory) {
    run_dtype<Isa>(problem, pass, workers, memory);
}

// The operations other than attention, for the variant's record.
template <class Isa>
struct Operators {
    static size_t window_product(const WindowProduct &problem, const Workers &workers, void *memory) {
        return with_codec<Isa>(problem.dtype,
                               [&](const auto &codec) { return run_window_product(problem, codec, workers, memory); });
    }
    static size_t linear_attention(const LinearProblem &problem, const Workers &workers, void *memory) {
        return with_codec<Isa>(problem.dtype,
                               [&](const auto &codec) { return linear(problem, codec, workers, memory); });
    }
    static size_t routed_attention(const RoutedProblem &problem, const Workers &workers, void *memory) {
        return with_codec<Isa>(problem.dtype,
                               [&](const auto &codec) { return routed(problem, codec, workers, memory); });
    }

private:
    template <class V>
    static size_t linear(const LinearProblem &problem, const Codec<V> &codec, const Workers &workers, void *memory) {
        return Linear<V>{problem, codec}.run(workers, memory);
    }
    template <class V>
    static size_t routed(const RoutedProblem &problem, const Codec<V> &codec, const Workers &workers, void *memory) {
        return Routed<V>{problem, codec}.run(workers, memory);
    }
};

// A kernel of the record from a function that runs a problem or, without memory, measures what it needs.
template <class OneProblem, size_t (*run)(const OneProblem &, const Workers &, void *)>
struct KernelOf {
    static size_t workspace(const OneProblem &problem, int32_t count) {
        Workers workers;
        workers.count = count;
        return run(problem, workers, nullptr);
    }
    static void start(const OneProblem &problem, const Workers &workers, void *memory) {
        run(problem, workers, memory);
    }
};

template <class Isa>
struct Records {
    static constexpr Kernel<WindowProduct> window_product{
        KernelOf<WindowProduct, Operators<Isa>::window_product>::workspace,
        KernelOf<WindowProduct, Operators<Isa>::window_product>::start};
    static constexpr Kernel<LinearProblem> linear_attention{
        KernelOf<LinearProblem, Operators<Isa>::linear_attention>::workspace,
        KernelOf<LinearProblem, Operators<Isa>::linear_attention>::start};
    static constexpr Kernel<RoutedProblem> routed_attention{
        KernelOf<RoutedProblem, Operators<Isa>::routed_attention>::workspace,
        KernelOf<RoutedProblem, Operators<Isa>::routed_attention>::start};
};

}  // namespace localattn::cpu
