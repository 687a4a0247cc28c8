#include "device_calls.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "../error.h"
#include "../validate.h"
#include "module.h"

namespace localattn::cuda {

namespace {

constexpr const char *low_capability = "the device's compute capability is too low";

struct Opened {
    const Module *module = nullptr;
    std::string problem;
};

// The folder that the code calling this was loaded from, with its slash; "" if the loader does not say.
std::string own_folder() {
    Dl_info info;
    if (!dladdr(reinterpret_cast<const void *>(&listed_variant_count), &info) || !info.dli_fname) return "";
    const std::string path = info.dli_fname;
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "" : path.substr(0, slash + 1);
}

Opened open_module() {
    Opened opened;
    const std::string path = own_folder() + module_file;
    if (access(path.c_str(), F_OK) != 0) {
        opened.problem =
            "this localattn was built for the CPU alone; install a localattn package for CUDA (localattn-cu132, "
            "-cu130, -cu128, -cu126, -cu124 or -cu121), or build with -DLOCALATTN_CUDA=ON (its " +
            std::string(module_file) + " belongs beside liblocalattn)";
        return opened;
    }
    void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        opened.problem = path + " could not be opened: " + dlerror();
        return opened;
    }
    const auto entry = reinterpret_cast<const Module *(*)()>(dlsym(library, module_symbol));
    const Module *module = entry ? entry() : nullptr;
    if (module && module->interface == module_interface) {
        opened.module = module;
    } else {
        opened.problem = std::string(module_file) + " comes from another build of localattn; install both from one";
    }
    return opened;
}

const Opened &opened() {
    static const Opened once = open_module();
    return once;
}

const Module &module() {
    if (!opened().module)
        fail(LOCALATTN_UNSUPPORTED, "context.device_type is 1 (CUDA), but %s", opened().problem.c_str());
    return *opened().module;
}

}  // namespace

int32_t listed_variant_count() { return opened().module ? opened().module->variant_count : 0; }

const Variant &listed_variant(int32_t index) { return *module().variants[index]; }

const char *unavailable(const Variant &variant) {
    struct First {
        Device device;
        std::string problem;
        First() {
            if (const char *wrong = module().open_device(0, &device)) problem = wrong;
        }
    };
    static const First first;
    if (!first.problem.empty()) return first.problem.c_str();
    return first.device.capability < variant.capability ? low_capability : nullptr;
}

const Variant &choose_variant(const Declines &declines, const localattn_context &context, Report &report) {
    if (report.text && report.size) *report.text = '\0';
    const Module &m = module();
    Device device;
    if (const char *wrong = m.open_device(context.device_index, &device))
        fail(LOCALATTN_DEVICE_ERROR, "context.device_index is %d, but %s", context.device_index, wrong);
    const char *forced = context.variant;
    const bool is_forced = forced && *forced;
    std::string names;
    for (int32_t i = 0; i < m.variant_count; ++i) {
        const Variant &variant = *m.variants[i];
        names += (i ? ", " : "") + std::string(variant.name);
        if (is_forced && std::strcmp(forced, variant.name) != 0) continue;
        const char *reason = device.capability < variant.capability ? low_capability : declines(variant, device);
        if (!reason) return variant;
        if (is_forced)
            fail(LOCALATTN_UNSUPPORTED, "context.variant is \"%s\", but that variant declines: %s", forced, reason);
        report.add(variant.name, reason);
    }
    if (is_forced)
        fail(LOCALATTN_INVALID_ARGUMENT, "context.variant is \"%s\", but for CUDA this library has %s", forced,
             names.c_str());
    fail(LOCALATTN_UNSUPPORTED, "no CUDA variant built into this library takes the problem");
}

void run(const Variant &variant, size_t needed, const localattn_context &context, const Launch &launch) {
    if (needed && !context.workspace)
        fail(LOCALATTN_WORKSPACE_TOO_SMALL,
             "context.workspace is NULL, but a CUDA call needs %zu bytes of device memory", needed);
    check_workspace(context, needed);
    const Module &m = module();
    int32_t previous = 0, ignored = 0;
    const char *wrong = m.make_current(context.device_index, &previous);
    if (!wrong) {
        wrong = launch(context.stream, context.workspace);
        if (previous != context.device_index) m.make_current(previous, &ignored);
    }
    if (wrong)
        fail(LOCALATTN_DEVICE_ERROR, "device %d could not run the variant %s: %s", context.device_index, variant.name,
             wrong);
}

const Variant &choose_variant(const Problem &problem, Pass pass, const localattn_context &context, Report &report) {
    return choose_variant(
        [&](const Variant &variant, const Device &device) { return variant.declines(problem, pass, device); }, context,
        report);
}

size_t workspace_size(const Problem &problem, Pass pass, const localattn_context &context) {
    Report unread;
    return choose_variant(problem, pass, context, unread).workspace(problem, pass);
}

void attention(const Problem &problem, Pass pass, const localattn_context &context) {
    Report unread;
    const Variant &variant = choose_variant(problem, pass, context, unread);
    run(variant, variant.workspace(problem, pass), context,
        [&](void *stream, void *workspace) { return variant.run(problem, pass, stream, workspace); });
}

}  // namespace localattn::cuda
