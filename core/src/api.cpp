// The entry points of attention, and those that are about the library.
#include <cstring>

#include "build.h"
#include "call.h"
#include "cpu_features.h"
#include "cuda/device_calls.h"
#include "empty.h"
#include "error.h"
#include "localattn/localattn.h"

namespace localattn {

namespace {

size_t needed_workspace(const Variant &variant, const Problem &problem, Pass pass, const Workers &workers) {
    return is_empty(problem) ? 0 : variant.workspace(problem, pass, workers.count);
}

void attention(const localattn_context *given_context, const localattn_attention_params *params, Pass pass) {
    const localattn_context context = checked_context(given_context);
    const Problem problem = make_problem(checked_params(params, pass, Data::used));
    if (context.device_type == LOCALATTN_CUDA) return cuda::attention(problem, pass, context);
    Report unread;
    const Variant &variant = choose_variant(problem, pass, context.variant, unread);
    const Workers workers = workers_for(context, problem);
    const size_t needed = needed_workspace(variant, problem, pass, workers);
    const Scratch scratch(context, needed);
    if (is_empty(problem)) return answer_empty(problem, pass);
    variant.run(problem, pass, workers, scratch.memory());
}

}  // namespace

}  // namespace localattn

using namespace localattn;

localattn_status localattn_attention_forward(const localattn_context *context,
                                             const localattn_attention_params *params) {
    return guarded([&] { attention(context, params, Pass::forward); });
}

localattn_status localattn_attention_backward(const localattn_context *context,
                                              const localattn_attention_params *params) {
    return guarded([&] { attention(context, params, Pass::backward); });
}

localattn_status localattn_attention_workspace_size(const localattn_context *given_context,
                                                    const localattn_attention_params *params, localattn_pass given_pass,
                                                    size_t *size) {
    return guarded([&] {
        if (!size) fail(LOCALATTN_INVALID_ARGUMENT, "size is NULL, but must point to where the answer goes");
        const Pass pass = checked_pass(given_pass);
        const localattn_context context = checked_context(given_context);
        const Problem problem = make_problem(checked_params(params, pass, Data::described));
        if (context.device_type == LOCALATTN_CUDA) {
            *size = cuda::workspace_size(problem, pass, context);
            return;
        }
        Report unread;
        const Variant &variant = choose_variant(problem, pass, context.variant, unread);
        *size = needed_workspace(variant, problem, pass, workers_for(context, problem));
    });
}

localattn_status localattn_attention_variant(const localattn_context *given_context,
                                             const localattn_attention_params *params, localattn_pass given_pass,
                                             const char **name, char *report_text, size_t report_size) {
    return guarded([&] {
        const Pass pass = checked_pass(given_pass);
        const localattn_context context = checked_context(given_context);
        const Problem problem = make_problem(checked_params(params, pass, Data::described));
        Report report{report_text, report_size};
        const char *chosen = context.device_type == LOCALATTN_CUDA
                                 ? cuda::choose_variant(problem, pass, context, report).name
                                 : choose_variant(problem, pass, context.variant, report).name;
        if (name) *name = chosen;
    });
}

int32_t localattn_variant_count(void) { return variant_count() + cuda::listed_variant_count(); }

localattn_status localattn_get_variant_info(int32_t index, localattn_variant_info *info) {
    return guarded([&] {
        const int32_t count = localattn_variant_count();
        if (index < 0 || index >= count) {
            fail(LOCALATTN_INVALID_ARGUMENT, "index is %d, but must be from 0 to %d", index, count - 1);
        }
        if (!info) fail(LOCALATTN_INVALID_ARGUMENT, "info is NULL, but must point to a struct");
        if (info->struct_size < sizeof info->struct_size) {
            fail(LOCALATTN_INVALID_ARGUMENT, "info->struct_size is %zu, but must be the size of the struct, %zu here",
                 info->struct_size, sizeof *info);
        }
        localattn_variant_info filled{info->struct_size, nullptr, nullptr, nullptr};
        if (index < variant_count()) {
            const Variant &variant = variant_at(index);
            filled.name = variant.name;
            filled.description = variant.description;
            filled.unavailable = missing_cpu_feature(variant.cpu_features);
        } else {  // of CUDA, after those of the CPU
            const cuda::Variant &variant = cuda::listed_variant(index - variant_count());
            filled.name = variant.name;
            filled.description = variant.description;
            filled.unavailable = cuda::unavailable(variant);
        }
        std::memcpy(info, &filled, info->struct_size < sizeof filled ? info->struct_size : sizeof filled);
    });
}

#define LOCALATTN_TEXT_OF(x) #x
#define LOCALATTN_TEXT(x) LOCALATTN_TEXT_OF(x)

const char *localattn_version(void) {
    return LOCALATTN_TEXT(LOCALATTN_VERSION_MAJOR) "." LOCALATTN_TEXT(LOCALATTN_VERSION_MINOR) "." LOCALATTN_TEXT(
        LOCALATTN_VERSION_PATCH);
}

const char *localattn_build_info(void) {
#ifdef LOCALATTN_CUDA_BUILD
    return LOCALATTN_BUILD_INFO "; " LOCALATTN_CUDA_BUILD;
#else
    return LOCALATTN_BUILD_INFO;
#endif
}

const char *localattn_last_error(void) { return last_error(); }

const char *localattn_status_name(localattn_status status) {
    switch (number_of(status)) {
        case LOCALATTN_OK:
            return "LOCALATTN_OK";
        case LOCALATTN_INVALID_ARGUMENT:
            return "LOCALATTN_INVALID_ARGUMENT";
        case LOCALATTN_UNSUPPORTED_DTYPE:
            return "LOCALATTN_UNSUPPORTED_DTYPE";
        case LOCALATTN_UNSUPPORTED:
            return "LOCALATTN_UNSUPPORTED";
        case LOCALATTN_WORKSPACE_TOO_SMALL:
            return "LOCALATTN_WORKSPACE_TOO_SMALL";
        case LOCALATTN_OUT_OF_MEMORY:
            return "LOCALATTN_OUT_OF_MEMORY";
        case LOCALATTN_DEVICE_ERROR:
            return "LOCALATTN_DEVICE_ERROR";
        case LOCALATTN_INTERNAL_ERROR:
            return "LOCALATTN_INTERNAL_ERROR";
    }
    return "unknown localattn_status";
}
