#include "device_calls.h"

#include <dlfcn.h>

#include <cstring>
#include <string>

#include "../error.h"
#include "module.h"

namespace localattn::cuda {

namespace {

struct Opened {
    const Module *module = nullptr;
    std::string problem;
};

// The folder that the code calling this was loaded from, with its slash; "" if the loader does not say.
std::string own_folder() {
    Dl_info info;
    if (!dladdr(reinterpret_cast<const void *>(&unavailable), &info) || !info.dli_fname) return "";
    const std::string path = info.dli_fname;
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "" : path.substr(0, slash + 1);
}

Opened open_module() {
    Opened opened;
#if LOCALATTN_HAS_CUDA
    void *library = dlopen((own_folder() + module_file).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        opened.problem = std::string(module_file) + ", which belongs beside liblocalattn, could not be opened: " + dlerror();
        return opened;
    }
    const auto entry = reinterpret_cast<const Module *(*)()>(dlsym(library, module_symbol));
    const Module *module = entry ? entry() : nullptr;
    if (!module || module->interface != module_interface) {
        opened.problem = std::string(module_file) + " comes from another build of localattn; install both from one";
        return opened;
    }
    opened.module = module;
#else
    opened.problem =
        "this localattn was built for the CPU alone; install a localattn package for CUDA (localattn-cu130, -cu128, -cu126, "
        "-cu124 or -cu121), or build with -DLOCALATTN_CUDA=ON";
#endif
    return opened;
}

const Opened &opened() {
    static const Opened once = open_module();
    return once;
}

const Module &module() {
    if (!opened().module) fail(LOCALATTN_UNSUPPORTED, "context.device_type is 1 (CUDA), but %s", opened().problem.c_str());
    return *opened().module;
}

// Why the variant will not serve the problem on the device, or NULL.
const char *declines(const Variant &variant, const Problem &problem, Pass pass, const Device &device) {
    if (device.capability < variant.capability) return "the device's compute capability is too low";
    return variant.declines(problem, pass, device);
}

}  // namespace

const char *unavailable() { return opened().module ? nullptr : opened().problem.c_str(); }

int32_t listed_variant_count() { return opened().module ? opened().module->variant_count : 0; }

const Variant &listed_variant(int32_t index) { return *module().variants[index]; }

const Variant &choose_variant(const Problem &problem, Pass pass, int32_t device_index, const char *forced, Report &report) {
    const Module &m = module();
    Device device;
    if (const char *wrong = m.open_device(device_index, &device))
        fail(LOCALATTN_DEVICE_ERROR, "context.device_index is %d, but %s", device_index, wrong);
    const bool is_forced = forced && *forced;
    std::string names;
    for (int32_t i = 0; i < m.variant_count; ++i) {
        const Variant &variant = *m.variants[i];
        names += (i ? ", " : "") + std::string(variant.name);
        if (is_forced && std::strcmp(forced, variant.name) != 0) continue;
        const char *reason = declines(variant, problem, pass, device);
        if (!reason) return variant;
        if (is_forced)
            fail(LOCALATTN_UNSUPPORTED, "context.variant is \"%s\", but that variant declines: %s", forced, reason);
        report.add(variant.name, reason);
    }
    if (is_forced)
        fail(LOCALATTN_INVALID_ARGUMENT, "context.variant is \"%s\", but for CUDA this library has %s", forced, names.c_str());
    fail(LOCALATTN_UNSUPPORTED, "no CUDA variant built into this library takes the problem");
}

void run(const Variant &variant, const Problem &problem, Pass pass, const localattn_context &context) {
    const Module &m = module();
    const size_t needed = variant.workspace(problem, pass);
    if (needed && !context.workspace)
        fail(LOCALATTN_WORKSPACE_TOO_SMALL, "context.workspace is NULL, but a CUDA call needs %zu bytes of device memory", needed);
    if (context.workspace && context.workspace_size < needed)
        fail(LOCALATTN_WORKSPACE_TOO_SMALL, "context.workspace_size is %zu, but this call needs %zu", context.workspace_size, needed);
    int32_t previous = 0, ignored = 0;
    const char *wrong = m.make_current(context.device_index, &previous);
    if (!wrong) {
        wrong = variant.run(problem, pass, context.stream, context.workspace);
        if (previous != context.device_index) m.make_current(previous, &ignored);
    }
    if (wrong) fail(LOCALATTN_DEVICE_ERROR, "device %d could not run the variant %s: %s", context.device_index, variant.name, wrong);
}

}  // namespace localattn::cuda
