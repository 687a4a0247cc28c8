// Who does the work: executors, the library's own threads, several callers at once, forked children.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "harness.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool sanitized = true;
#else
constexpr bool sanitized = false;
#endif

namespace {

test::Config medium_config(uint64_t seed) {
    test::Config c;
    c.seed = seed;
    c.batch = 2;
    c.heads = 4;
    c.kv_heads = 2;
    c.channels = c.value_channels = 16;
    c.query_extent[0] = c.key_extent[0] = 17;
    c.query_extent[1] = c.key_extent[1] = 23;
    c.kernel_size[0] = c.kernel_size[1] = 5;
    c.has_bias = c.has_rel_pos_bias = true;
    c.bias_broadcast = test::batch_axis;
    return c;
}

localattn_status run(test::Tensors &tensors, const localattn_context &context) {
    tensors.poison(LOCALATTN_FORWARD);
    tensors.poison(LOCALATTN_BACKWARD);
    const localattn_attention_params p = tensors.params();
    const localattn_status status = localattn_attention_forward(&context, &p);
    return status == LOCALATTN_OK ? localattn_attention_backward(&context, &p) : status;
}

std::vector<unsigned char> all_bytes(test::Tensors &tensors) {
    std::vector<unsigned char> bytes = tensors.result_bytes(LOCALATTN_FORWARD);
    const std::vector<unsigned char> backward = tensors.result_bytes(LOCALATTN_BACKWARD);
    bytes.insert(bytes.end(), backward.begin(), backward.end());
    return bytes;
}

localattn_context context_for(const std::string &variant, int32_t threads) {
    localattn_context context = LOCALATTN_INIT(localattn_context);
    context.variant = variant.c_str();
    context.num_threads = threads;
    return context;
}

// Runs each task on a thread of its own, and notes what it was asked.
struct ThreadExecutor {
    localattn_executor executor{this, 3, run};
    std::atomic<int> calls{0}, tasks{0}, most_tasks{0};

    static void run(void *self, int32_t tasks, void (*task)(void *, int32_t), void *argument) {
        auto &own = *static_cast<ThreadExecutor *>(self);
        ++own.calls;
        own.tasks += tasks;
        if (tasks > own.most_tasks) own.most_tasks = tasks;
        std::vector<std::thread> threads;
        for (int32_t i = 0; i < tasks; ++i) threads.emplace_back(task, argument, i);
        for (std::thread &thread : threads) thread.join();
    }
};

}  // namespace

TEST(threads_and_executor_give_the_same_bits) {
    for (const std::string &variant : test::available_variants()) {
        test::Tensors tensors(medium_config(1));
        localattn_context context = context_for(variant, 1);
        CHECK(run(tensors, context) == LOCALATTN_OK) << localattn_last_error();
        const std::vector<unsigned char> wanted = all_bytes(tensors);
        for (const int32_t threads : {0, 2, 3, 8, 300}) {
            context.num_threads = threads;
            CHECK(run(tensors, context) == LOCALATTN_OK) << localattn_last_error();
            CHECK(all_bytes(tensors) == wanted) << variant << " with " << threads << " threads";
        }
        ThreadExecutor executor;
        context.executor = &executor.executor;
        CHECK(run(tensors, context) == LOCALATTN_OK) << localattn_last_error();
        CHECK(all_bytes(tensors) == wanted) << variant << " with an executor";
        CHECK(executor.calls > 0 && executor.most_tasks <= 3)
            << executor.calls << " calls, up to " << executor.most_tasks << " tasks";
    }
}

TEST(an_executor_that_throws) {
    static const localattn_executor throwing = {nullptr, 2, [](void *, int32_t, void (*)(void *, int32_t), void *) {
                                                    throw std::runtime_error("the pool is gone");
                                                }};
    for (const std::string &variant : test::available_variants()) {
        test::Tensors tensors(medium_config(1));
        localattn_context context = context_for(variant, 0);
        context.executor = &throwing;
        CHECK(run(tensors, context) == LOCALATTN_INTERNAL_ERROR);
        CHECK(std::string(localattn_last_error()) == "the pool is gone") << localattn_last_error();
    }
}

TEST(callers_at_once) {
    const std::vector<std::string> variants = test::available_variants();
    std::vector<std::vector<unsigned char>> wanted;
    for (size_t i = 0; i < 8; ++i) {
        test::Tensors tensors(medium_config(i));
        CHECK(run(tensors, context_for(variants[i % variants.size()], 1)) == LOCALATTN_OK) << localattn_last_error();
        wanted.push_back(all_bytes(tensors));
    }
    std::atomic<int> wrong{0}, wrong_messages{0};
    std::vector<std::thread> callers;
    for (size_t i = 0; i < 8; ++i) {
        callers.emplace_back([&, i] {
            for (int repeat = 0; repeat < 3; ++repeat) {
                test::Tensors tensors(medium_config(i));
                wrong += run(tensors, context_for(variants[i % variants.size()], 1 + int32_t(i % 3))) != LOCALATTN_OK;
                wrong += all_bytes(tensors) != wanted[i];
                // The message belongs to the thread.
                localattn_attention_params p = tensors.params();
                p.rank = 100 + static_cast<int32_t>(i);
                wrong_messages += localattn_attention_forward(nullptr, &p) != LOCALATTN_INVALID_ARGUMENT;
                std::this_thread::yield();
                const std::string number = std::to_string(100 + i);
                wrong_messages += std::string(localattn_last_error()).find("rank is " + number) == std::string::npos;
            }
        });
    }
    for (std::thread &caller : callers) caller.join();
    CHECK(wrong == 0) << wrong << " calls";
    CHECK(wrong_messages == 0) << wrong_messages << " messages";
}

TEST(inputs_shared_by_callers) {
    for (const std::string &variant : test::available_variants()) {
        test::Tensors shared(medium_config(5));
        CHECK(run(shared, context_for(variant, 1)) == LOCALATTN_OK) << localattn_last_error();
        const std::vector<unsigned char> wanted = shared.result_bytes(LOCALATTN_FORWARD);
        std::atomic<int> wrong{0};
        const localattn_attention_params from = shared.params();
        std::vector<std::thread> callers;
        for (int i = 0; i < 4; ++i) {
            callers.emplace_back([&] {
                test::Tensors own(medium_config(5));
                localattn_attention_params p = own.params();
                p.query = from.query;
                p.key = from.key;
                p.value = from.value;
                p.bias = from.bias;
                p.rel_pos_bias = from.rel_pos_bias;
                own.poison(LOCALATTN_FORWARD);
                const localattn_context context = context_for(variant, 2);
                wrong += localattn_attention_forward(&context, &p) != LOCALATTN_OK;
                wrong += own.result_bytes(LOCALATTN_FORWARD) != wanted;
            });
        }
        for (std::thread &caller : callers) caller.join();
        CHECK(wrong == 0) << variant;
    }
}

// Runs in a child; its exit status says what went wrong, and an alarm ends one that hangs.
template <class Body>
int in_child(const Body &body) {
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);
        _exit(body());
    }
    int status = 0;
    waitpid(child, &status, 0);
    return status;
}

TEST(a_forked_child_computes) {
    for (const std::string &variant : test::available_variants()) {
        test::Tensors tensors(medium_config(2));
        const localattn_context context = context_for(variant, 4);
        CHECK(run(tensors, context) == LOCALATTN_OK) << localattn_last_error();
        const std::vector<unsigned char> wanted = all_bytes(tensors);
        const int status =
            in_child([&] { return run(tensors, context) == LOCALATTN_OK && all_bytes(tensors) == wanted ? 0 : 1; });
        CHECK(status == 0) << variant << ", status " << status;
    }
}

TEST(fewer_threads_than_asked_for) {
    if (sanitized) {
        std::printf("not run: a sanitizer needs the address space that this test takes away\n");
        return;
    }
    for (const std::string &variant : test::available_variants()) {
        test::Tensors tensors(medium_config(2));
        CHECK(run(tensors, context_for(variant, 1)) == LOCALATTN_OK) << localattn_last_error();
        const std::vector<unsigned char> wanted = all_bytes(tensors);
        const int status = in_child([&] {
            // No address space for the stacks of more threads than a few.
            const rlimit limit = {size_t{64} << 20, size_t{64} << 20};
            if (setrlimit(RLIMIT_AS, &limit) != 0) return 2;
            return run(tensors, context_for(variant, 200)) == LOCALATTN_OK && all_bytes(tensors) == wanted ? 0 : 1;
        });
        CHECK(status == 0) << variant << ", status " << status;
    }
}

int main(int argc, char **argv) { return check::run(argc, argv); }
