// What every entry point does around its operation: check, choose, run. Whatever is thrown inside ends here as a
// status.
#pragma once
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

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
    std::vector<OneProblem> problems;
    double multiplications = 0;

    const Variant &choose(const localattn_context &context, Report &report) const {
        if (context.device_type == LOCALATTN_CUDA) {
            fail(LOCALATTN_UNSUPPORTED,
                 "context.device_type is 1 (CUDA), but of all operations only attention runs there; must be 0 (the "
                 "CPU)");
        }
        return choose_variant(
            [this](const Variant &v) { return (v.*kernel).run ? nullptr : "it does not have this operation"; },
            context.variant, report);
    }

    size_t workspace(const Variant &variant, const Workers &workers) const {
        size_t most = 0;
        for (const OneProblem &problem : problems) {
            if (is_empty(problem)) continue;
            const size_t needed = (variant.*kernel).workspace(problem, workers.count);
            if (needed > most) most = needed;
        }
        return most;
    }
};

template <class OneProblem>
void run(const localattn_context &context, const Steps<OneProblem> &steps) {
    Report unread;
    const Variant &variant = steps.choose(context, unread);
    const Workers workers = workers_for(context, steps.multiplications);
    const Scratch scratch(context, steps.workspace(variant, workers));
    for (const OneProblem &problem : steps.problems) {
        if (is_empty(problem))
            answer_empty(problem);
        else
            (variant.*steps.kernel).run(problem, workers, scratch.memory());
    }
}

// The four entry points of an operation whose params become Steps by `make_steps(params, pass, Data)`.
template <class Params, class MakeSteps>
localattn_status run_call(const localattn_context *context, const Params *params, Pass pass, MakeSteps make_steps) {
    return guarded([&] {
        const localattn_context checked = checked_context(context);
        run(checked, make_steps(params, pass, Data::used));
    });
}
template <class Params, class MakeSteps>
localattn_status workspace_call(const localattn_context *context, const Params *params, localattn_pass pass,
                                size_t *size, MakeSteps make_steps) {
    return guarded([&] {
        if (!size) fail(LOCALATTN_INVALID_ARGUMENT, "size is NULL, but must point to where the answer goes");
        const Pass checked = checked_pass(pass);
        const localattn_context with = checked_context(context);
        const auto steps = make_steps(params, checked, Data::described);
        Report unread;
        *size = steps.workspace(steps.choose(with, unread), workers_for(with, steps.multiplications));
    });
}
template <class Params, class MakeSteps>
localattn_status variant_call(const localattn_context *context, const Params *params, localattn_pass pass,
                              const char **name, char *report_text, size_t report_size, MakeSteps make_steps) {
    return guarded([&] {
        const Pass checked = checked_pass(pass);
        const localattn_context with = checked_context(context);
        Report report{report_text, report_size};
        const Variant &variant = make_steps(params, checked, Data::described).choose(with, report);
        if (name) *name = variant.name;
    });
}

}  // namespace localattn
