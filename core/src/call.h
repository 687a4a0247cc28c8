// What every entry point does around its operation: check, choose, run. Whatever is thrown inside ends here as a
// status.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "cuda/device_calls.h"
#include "dispatch.h"
#include "error.h"
#include "localattn/localattn.h"
#include "parallel.h"
#include "validate.h"

namespace localattn {

template <class Body>
localattn_status guarded(Body body) noexcept {
    try {
        body();
        return LOCALATTN_OK;
    } catch (const Failure &failure) {
        return failure.status;
    } catch (const std::bad_alloc &) {
        set_last_error("the host has no memory left for this call's scratch");
        return LOCALATTN_OUT_OF_MEMORY;
    } catch (const std::exception &e) {
        // Not ours: nothing inside throws these. An executor written in C++ may.
        set_last_error(e.what());
        return LOCALATTN_INTERNAL_ERROR;
    } catch (...) {
        set_last_error("an exception of unknown type came out of the call, most likely out of its executor");
        return LOCALATTN_INTERNAL_ERROR;
    }
}

// What a C caller passes for an enum may be no value of it, which C++ must not even look at as one.
template <class Enum>
int32_t number_of(const Enum &value) {
    static_assert(sizeof(Enum) == sizeof(int32_t), "as the header has it");
    int32_t number;
    std::memcpy(&number, &value, sizeof number);
    return number;
}

inline Pass checked_pass(const localattn_pass &pass) {
    const int32_t value = number_of(pass);
    if (value != LOCALATTN_FORWARD && value != LOCALATTN_BACKWARD) {
        fail(LOCALATTN_INVALID_ARGUMENT, "pass is %d, but must be 0 (forward) or 1 (backward)", value);
    }
    return static_cast<Pass>(value);
}

// The caller's workspace, which must be large enough, or memory for the time of the call.
class Scratch {
public:
    Scratch(const localattn_context &context, size_t needed) : memory_(context.workspace) {
        check_workspace(context, needed);
        if (memory_ || !needed) return;
        own_.reset(std::aligned_alloc(64, (needed + 63) / 64 * 64));
        if (!own_) fail(LOCALATTN_OUT_OF_MEMORY, "the host could not give %zu bytes of scratch memory", needed);
        memory_ = own_.get();
    }
    void *memory() const { return memory_; }

private:
    struct Free {
        void operator()(void *memory) const { std::free(memory); }
    };
    std::unique_ptr<void, Free> own_;
    void *memory_;
};

// An operation other than attention: the kernel problems that one pass of it consists of, one after another.
template <class OneProblem>
struct Steps {
    Kernel<OneProblem> Variant::*kernel;
    const cuda::Kernel<OneProblem> *cuda::Variant::*device_kernel;
    std::vector<OneProblem> problems;
    double multiplications = 0;

    const Variant &choose(const localattn_context &context, Report &report) const {
        return choose_variant([this](const Variant &v) { return (v.*kernel).run ? nullptr : missing; }, context.variant,
                              report);
    }
    const cuda::Variant &choose_on_device(const localattn_context &context, Report &report) const {
        const auto declines = [this](const cuda::Variant &v, const cuda::Device &device) {
            const char *reason = v.*device_kernel ? nullptr : missing;
            for (size_t i = 0; i < problems.size() && !reason; ++i)
                reason = (v.*device_kernel)->declines(problems[i], device);
            return reason;
        };
        return cuda::choose_variant(declines, context, report);
    }
    const char *chosen_name(const localattn_context &context, Report &report) const {
        return on_device(context) ? choose_on_device(context, report).name : choose(context, report).name;
    }

    size_t workspace(const Variant &variant, const Workers &workers) const {
        return most([&](const OneProblem &problem) {
            return is_empty(problem) ? size_t{0} : (variant.*kernel).workspace(problem, workers.count);
        });
    }
    size_t workspace(const cuda::Variant &variant) const {
        return most([&](const OneProblem &problem) { return (variant.*device_kernel)->workspace(problem); });
    }
    size_t workspace(const localattn_context &context) const {
        Report unread;
        return on_device(context) ? workspace(choose_on_device(context, unread))
                                  : workspace(choose(context, unread), workers_for(context, multiplications));
    }

    void run(const localattn_context &context) const {
        Report unread;
        if (on_device(context)) {
            const cuda::Variant &variant = choose_on_device(context, unread);
            return cuda::run(variant, workspace(variant), context, [&](void *stream, void *memory) {
                const char *wrong = nullptr;
                for (size_t i = 0; i < problems.size() && !wrong; ++i)
                    wrong = (variant.*device_kernel)->run(problems[i], stream, memory);
                return wrong;
            });
        }
        for (const OneProblem &problem : problems) check_data(problem);
        const Variant &variant = choose(context, unread);
        const Workers workers = workers_for(context, multiplications);
        const Scratch scratch(context, workspace(variant, workers));
        for (const OneProblem &problem : problems) {
            if (is_empty(problem))
                answer_empty(problem);
            else
                (variant.*kernel).run(problem, workers, scratch.memory());
        }
    }

private:
    static constexpr const char *missing = "it does not have this operation";
    static bool on_device(const localattn_context &context) { return context.device_type == LOCALATTN_CUDA; }
    template <class Size>
    size_t most(const Size &size) const {
        size_t largest = 0;
        for (const OneProblem &problem : problems) largest = std::max(largest, size(problem));
        return largest;
    }
};

// The four entry points of an operation whose params become Steps by `make_steps(params, pass, Data)`.
template <class Params, class MakeSteps>
localattn_status run_call(const localattn_context *context, const Params *params, Pass pass, MakeSteps make_steps) {
    return guarded([&] {
        const localattn_context checked = checked_context(context);
        make_steps(params, pass, Data::used).run(checked);
    });
}
template <class Params, class MakeSteps>
localattn_status workspace_call(const localattn_context *context, const Params *params, localattn_pass pass,
                                size_t *size, MakeSteps make_steps) {
    return guarded([&] {
        if (!size) fail(LOCALATTN_INVALID_ARGUMENT, "size is NULL, but must point to where the answer goes");
        const Pass checked = checked_pass(pass);
        const localattn_context with = checked_context(context);
        *size = make_steps(params, checked, Data::described).workspace(with);
    });
}
template <class Params, class MakeSteps>
localattn_status variant_call(const localattn_context *context, const Params *params, localattn_pass pass,
                              const char **name, char *report_text, size_t report_size, MakeSteps make_steps) {
    return guarded([&] {
        const Pass checked = checked_pass(pass);
        const localattn_context with = checked_context(context);
        Report report{report_text, report_size};
        const char *chosen = make_steps(params, checked, Data::described).chosen_name(with, report);
        if (name) *name = chosen;
    });
}

}  // namespace localattn
