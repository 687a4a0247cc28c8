// What bad input gets: a status, a sentence that names the field, its value and what is allowed, and not one byte
// written. And the rules by which structs of other versions are read.
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "check.h"
#include "harness.h"

namespace {

using Params = localattn_attention_params;

test::Config small_config() {
    test::Config c;
    c.heads = 4;
    c.kv_heads = 2;
    c.channels = 3;
    c.value_channels = 5;
    c.query_extent[0] = c.key_extent[0] = 4;
    c.query_extent[1] = c.key_extent[1] = 6;
    c.kernel_size[0] = c.kernel_size[1] = 3;
    c.has_bias = c.has_rel_pos_bias = c.has_axis_bias[0] = c.has_key_mask = c.has_grad_lse = true;
    c.plain_layout = true;
    return c;
}

struct Expectation {
    std::function<void(Params &, localattn_context &)> spoil;
    localattn_status status;
    std::vector<std::string> says;
    bool backward = false;
};

void check_fails(const Expectation &e) {
    test::Tensors tensors(small_config());
    tensors.poison(LOCALATTN_FORWARD);
    tensors.poison(LOCALATTN_BACKWARD);
    Params p = tensors.params();
    localattn_context context = LOCALATTN_INIT(localattn_context);
    e.spoil(p, context);
    const std::vector<unsigned char> forward = tensors.result_bytes(LOCALATTN_FORWARD);
    const std::vector<unsigned char> backward = tensors.result_bytes(LOCALATTN_BACKWARD);
    const localattn_status status =
        e.backward ? localattn_attention_backward(&context, &p) : localattn_attention_forward(&context, &p);
    const std::string message = localattn_last_error();
    CHECK(status == e.status) << localattn_status_name(status) << " for what should say " << e.says[0]
                              << ", but says: " << message;
    for (const std::string &part : e.says) {
        CHECK(message.find(part) != std::string::npos) << "\"" << part << "\" is not in: " << message;
    }
    CHECK(forward == tensors.result_bytes(LOCALATTN_FORWARD)) << "output or lse was written, although: " << message;
    CHECK(backward == tensors.result_bytes(LOCALATTN_BACKWARD)) << "a gradient was written, although: " << message;
}

using Context = localattn_context;
constexpr localattn_status invalid = LOCALATTN_INVALID_ARGUMENT;
alignas(64) unsigned char workspace[1 << 20];

void no_run(void *, int32_t, void (*)(void *, int32_t), void *) {}

}  // namespace

TEST(sizes) {
    for (const Expectation &e : std::vector<Expectation>{
             {[](Params &p, Context &) { p.rank = 0; }, invalid, {"rank is 0", "from 1 to 3"}},
             {[](Params &p, Context &) { p.rank = 4; }, invalid, {"rank is 4", "from 1 to 3"}},
             {[](Params &p, Context &) { p.dtype = 4; },
              LOCALATTN_UNSUPPORTED_DTYPE,
              {"dtype is 4", "float32", "bfloat16"}},
             {[](Params &p, Context &) { p.dtype = -1; }, LOCALATTN_UNSUPPORTED_DTYPE, {"dtype is -1"}},
             {[](Params &p, Context &) { p.batch = -1; }, invalid, {"batch is -1", "from 0"}},
             {[](Params &p, Context &) { p.heads = 0; }, invalid, {"heads is 0", "from 1"}},
             {[](Params &p, Context &) { p.kv_heads = 3; }, invalid, {"kv_heads is 3", "divide heads", "4"}},
             {[](Params &p, Context &) { p.kv_heads = -2; }, invalid, {"kv_heads is -2"}},
             {[](Params &p, Context &) { p.kv_heads = 8; }, invalid, {"kv_heads is 8", "divide heads"}},
             {[](Params &p, Context &) { p.channels = 0; }, invalid, {"channels is 0", "from 1"}},
             {[](Params &p, Context &) { p.value_channels = -1; }, invalid, {"value_channels is -1"}},
             {[](Params &p, Context &) { p.query_extent[1] = -6; }, invalid, {"query_extent[1] is -6", "from 0"}},
             {[](Params &p, Context &) { p.key_extent[0] = INT64_C(1) << 31; },
              invalid,
              {"key_extent[0] is 2147483648", "to 2147483647"}},
             {[](Params &p, Context &) { p.batch = INT64_MAX; },
              invalid,
              {"batch is 9223372036854775807", "to 2147483647"}},
         }) {
        check_fails(e);
    }
}

TEST(window) {
    for (const Expectation &e : std::vector<Expectation>{
             {[](Params &p, Context &) { p.kernel_size[0] = 0; }, invalid, {"kernel_size[0] is 0", "from 1"}},
             {[](Params &p, Context &) { p.kernel_size[1] = -3; }, invalid, {"kernel_size[1] is -3"}},
             {[](Params &p, Context &) { p.kernel_size[1] = INT64_C(1) << 40; },
              invalid,
              {"kernel_size[1] is 1099511627776", "to 2147483647"}},
             {[](Params &p, Context &) { p.stride[1] = 4; },
              invalid,
              {"stride[1] is 4", "at most kernel_size[1], which is 3"}},
             {[](Params &p, Context &) { p.stride[0] = -1; }, invalid, {"stride[0] is -1"}},
             {[](Params &p, Context &) { p.dilation[0] = -2; }, invalid, {"dilation[0] is -2", "from 1"}},
             {[](Params &p, Context &) { p.dilation[1] = INT64_MAX; }, invalid, {"dilation[1] is"}},
             {[](Params &p, Context &) { p.is_causal[0] = 2; }, invalid, {"is_causal[0] is 2", "0 or 1"}},
             {[](Params &p, Context &) { p.border = 3; }, invalid, {"border is 3", "from 0 to 2"}},
             {[](Params &p, Context &) { p.border = -1; }, invalid, {"border is -1"}},
             {[](Params &p, Context &) { p.has_scale = 5; }, invalid, {"has_scale is 5", "0 or 1"}},
             {[](Params &p, Context &) { p.raster_causal = -1; }, invalid, {"raster_causal is -1", "0 or 1"}},
             {[](Params &p, Context &) { p.raster_causal = 1, p.border = LOCALATTN_BORDER_SHIFT; },
              invalid,
              {"border is 2", "by raster"}},
             {[](Params &p, Context &) { p.raster_causal = 1, p.kernel_size[1] = 4; },
              invalid,
              {"kernel_size[1] is 4", "odd"}},
             {[](Params &p, Context &) { p.raster_causal = 1, p.stride[0] = 2; },
              invalid,
              {"stride[0] is 2", "must be 1"}},
             {[](Params &p, Context &) { p.raster_causal = 1, p.is_causal[1] = 1; },
              invalid,
              {"is_causal[1] is 1", "must be 0"}},
         }) {
        check_fails(e);
    }
    test::Tensors tensors(small_config());
    Params p = tensors.params();
    p.rank = 3;
    for (int a = 0; a < 3; ++a) {
        p.query_extent[a] = p.key_extent[a] = 1;
        p.kernel_size[a] = INT32_MAX;
    }
    CHECK(localattn_attention_forward(nullptr, &p) == invalid);
    CHECK(std::strstr(localattn_last_error(), "kernel_size[2] is 2147483647, but the window") != nullptr)
        << localattn_last_error();
}

TEST(tensors) {
    for (const Expectation &e : std::vector<Expectation>{
             {[](Params &p, Context &) { p.query.data = nullptr; }, invalid, {"query.data is NULL"}},
             {[](Params &p, Context &) { p.key.data = nullptr; }, invalid, {"key.data is NULL"}},
             {[](Params &p, Context &) { p.value.data = nullptr; }, invalid, {"value.data is NULL"}},
             {[](Params &p, Context &) { p.output.data = nullptr; }, invalid, {"output.data is NULL"}},
             {[](Params &p, Context &) { p.output.data = nullptr; }, invalid, {"output.data is NULL"}, true},
             {[](Params &p, Context &) { p.lse.data = nullptr; }, invalid, {"lse.data is NULL"}, true},
             {[](Params &p, Context &) { p.grad_output.data = nullptr; }, invalid, {"grad_output.data is NULL"}, true},
             {[](Params &p, Context &) { p.bias.data = nullptr; },
              invalid,
              {"grad_bias is given, but bias.data is NULL"},
              true},
             {[](Params &p, Context &) { p.rel_pos_bias.data = nullptr; },
              invalid,
              {"grad_rel_pos_bias is given"},
              true},
             {[](Params &p, Context &) { p.axis_bias[0].data = nullptr; },
              invalid,
              {"grad_axis_bias[0] is given"},
              true},
             {[](Params &p, Context &) { p.axis_bias[2] = p.axis_bias[0]; },
              invalid,
              {"axis_bias[2] is given", "rank is 2"}},
             {[](Params &p, Context &) { p.grad_axis_bias[2] = p.bias; },
              invalid,
              {"grad_axis_bias[2] is given", "rank is 2"},
              true},
             {[](Params &p, Context &) { p.query.data = static_cast<char *>(p.query.data) + 1; },
              invalid,
              {"query.data is", "aligned", "4 bytes"}},
             {[](Params &p, Context &) { p.output.channel_stride = 0; },
              invalid,
              {"output.channel_stride is 0", "extent of 5"}},
             {[](Params &p, Context &) { p.lse.spatial_stride[1] = 0; },
              invalid,
              {"lse.spatial_stride[1] is 0", "extent of 6"}},
             {[](Params &p, Context &) { p.grad_key.head_stride = 0; }, invalid, {"grad_key.head_stride is 0"}, true},
             {[](Params &p, Context &) { p.query.head_stride = INT64_MAX; },
              invalid,
              {"query.head_stride is 9223372036854775807", "2^63-1"}},
             {[](Params &p, Context &) { p.query.head_stride = INT64_MIN; },
              invalid,
              {"query.head_stride is -9223372036854775808"}},
             {[](Params &p, Context &) { p.key.spatial_stride[0] = INT64_C(1) << 61; },
              invalid,
              {"key.spatial_stride[0] is", "2^63-1"}},
             // Each fits alone; their sum does not.
             {[](Params &p, Context &) { p.value.spatial_stride[0] = p.value.spatial_stride[1] = INT64_C(1) << 58; },
              invalid,
              {"value.spatial_stride[1] is"}},
             {[](Params &p, Context &) { p.batch = p.heads = INT32_MAX, p.channels = 8, p.kv_heads = 0; },
              invalid,
              {"query", "2^63-1"}},
         }) {
        check_fails(e);
    }
}

TEST(context) {
    static const localattn_executor no_workers = {nullptr, 0, no_run}, no_function = {nullptr, 2, nullptr};
    for (const Expectation &e : std::vector<Expectation>{
             {[](Params &, Context &c) { c.device_type = 2; }, invalid, {"context.device_type is 2"}},
             {[](Params &, Context &c) { c.num_threads = -1; }, invalid, {"context.num_threads is -1", "from 0"}},
             {[](Params &, Context &c) { c.reserved = 1; }, invalid, {"context.reserved is 1"}},
             {[](Params &, Context &c) { c.executor = &no_workers; }, invalid, {"num_workers is 0", "from 1"}},
             {[](Params &, Context &c) { c.executor = &no_function; }, invalid, {"run is NULL"}},
             {[](Params &, Context &c) { c.workspace = workspace + 8, c.workspace_size = 1 << 16; },
              invalid,
              {"context.workspace is", "aligned to 64 bytes"}},
             {[](Params &, Context &c) { c.workspace_size = 7; },
              invalid,
              {"context.workspace is NULL", "workspace_size is 7"}},
             {[](Params &, Context &c) { c.variant = "avx9000"; },
              invalid,
              {"context.variant is \"avx9000\"", "reference"}},
         }) {
        check_fails(e);
    }
}

TEST(workspace_too_small) {
    for (const std::string &variant : test::available_variants()) {
        for (const localattn_pass pass : {LOCALATTN_FORWARD, LOCALATTN_BACKWARD}) {
            test::Tensors tensors(small_config());
            const Params p = tensors.params();
            Context context = LOCALATTN_INIT(localattn_context);
            context.variant = variant.c_str();
            context.num_threads = 2;
            size_t size = 0;
            const localattn_status status = localattn_attention_workspace_size(&context, &p, pass, &size);
            if (status == LOCALATTN_UNSUPPORTED) {
                std::printf("variant %s declines: %s\n", variant.c_str(), localattn_last_error());
                continue;
            }
            CHECK(status == LOCALATTN_OK) << localattn_last_error();
            if (size == 0) continue;
            const std::string needed = std::to_string(size);
            check_fails({[&](Params &, Context &c) {
                             c.variant = variant.c_str();
                             c.num_threads = 2;
                             c.workspace = workspace;
                             c.workspace_size = size - 1;
                         },
                         LOCALATTN_WORKSPACE_TOO_SMALL,
                         {"workspace_size is " + std::to_string(size - 1), "at least " + needed},
                         pass == LOCALATTN_BACKWARD});
        }
    }
}

TEST(null_arguments) {
    test::Tensors tensors(small_config());
    const Params p = tensors.params();
    CHECK(localattn_attention_forward(nullptr, nullptr) == invalid);
    CHECK(std::strstr(localattn_last_error(), "params is NULL")) << localattn_last_error();
    CHECK(localattn_attention_workspace_size(nullptr, &p, LOCALATTN_FORWARD, nullptr) == invalid);
    CHECK(std::strstr(localattn_last_error(), "size is NULL")) << localattn_last_error();
    CHECK(localattn_get_variant_info(0, nullptr) == invalid);
    localattn_variant_info info = LOCALATTN_INIT(localattn_variant_info);
    CHECK(localattn_get_variant_info(-1, &info) == invalid);
    CHECK(localattn_get_variant_info(localattn_variant_count(), &info) == invalid);
    CHECK(std::strstr(localattn_last_error(), "index is")) << localattn_last_error();
    CHECK(localattn_attention_variant(nullptr, &p, LOCALATTN_FORWARD, nullptr, nullptr, 0) == LOCALATTN_OK)
        << localattn_last_error();
}

TEST(struct_sizes) {
    test::Tensors tensors(small_config());
    Params p = tensors.params();
    p.struct_size = 0;
    CHECK(localattn_attention_forward(nullptr, &p) == invalid);
    CHECK(std::strstr(localattn_last_error(), "params.struct_size is 0")) << localattn_last_error();
    p.struct_size = size_t{1} << 40;
    CHECK(localattn_attention_forward(nullptr, &p) == invalid);
    CHECK(std::strstr(localattn_last_error(), "params.struct_size is 1099511627776")) << localattn_last_error();

    // A newer caller's struct: accepted while what is unknown is zero.
    struct Newer {
        Params known;
        int64_t unknown[2];
    } newer{tensors.params(), {0, 0}};
    newer.known.struct_size = sizeof newer;
    CHECK(localattn_attention_forward(nullptr, &newer.known) == LOCALATTN_OK) << localattn_last_error();
    newer.unknown[1] = 1;
    CHECK(localattn_attention_forward(nullptr, &newer.known) == invalid);
    CHECK(std::strstr(localattn_last_error(), "params.struct_size") &&
          std::strstr(localattn_last_error(), "newer version"))
        << localattn_last_error();

    // An older caller's struct, which ended before the gradients: what follows is not read.
    test::Config config = small_config();
    config.has_grad_lse = false;
    test::Tensors old_tensors(config);
    old_tensors.poison(LOCALATTN_FORWARD);
    Params older = old_tensors.params();
    CHECK(localattn_attention_forward(nullptr, &older) == LOCALATTN_OK) << localattn_last_error();
    const std::vector<unsigned char> wanted = old_tensors.result_bytes(LOCALATTN_FORWARD);
    old_tensors.poison(LOCALATTN_FORWARD);
    older.struct_size = offsetof(Params, grad_output);
    std::vector<unsigned char> exact(older.struct_size);  // no byte behind, for AddressSanitizer to watch
    std::memcpy(exact.data(), &older, older.struct_size);
    CHECK(localattn_attention_forward(nullptr, reinterpret_cast<const Params *>(exact.data())) == LOCALATTN_OK)
        << localattn_last_error();
    CHECK(old_tensors.result_bytes(LOCALATTN_FORWARD) == wanted);
    CHECK(localattn_attention_backward(nullptr, reinterpret_cast<const Params *>(exact.data())) == invalid);
    CHECK(std::strstr(localattn_last_error(), "grad_output.data is NULL")) << localattn_last_error();

    localattn_context context{};
    CHECK(localattn_attention_forward(&context, &older) == invalid);
    CHECK(std::strstr(localattn_last_error(), "context.struct_size is 0")) << localattn_last_error();

    localattn_variant_info info{};
    CHECK(localattn_get_variant_info(0, &info) == invalid);
    info.struct_size = offsetof(localattn_variant_info, description);
    info.description = "untouched";
    CHECK(localattn_get_variant_info(0, &info) == LOCALATTN_OK) << localattn_last_error();
    CHECK(info.name && info.description == std::string("untouched"));
}

TEST(data_may_be_null_in_questions) {
    test::Tensors tensors(small_config());
    Params p = tensors.params();
    size_t with_data = 1, without = 2;
    const char *name = nullptr;
    CHECK(localattn_attention_workspace_size(nullptr, &p, LOCALATTN_BACKWARD, &with_data) == LOCALATTN_OK);
    p.query.data = p.key.data = p.value.data = p.output.data = p.lse.data = p.grad_output.data = nullptr;
    CHECK(localattn_attention_workspace_size(nullptr, &p, LOCALATTN_BACKWARD, &without) == LOCALATTN_OK)
        << localattn_last_error();
    CHECK(with_data == without) << with_data << " and " << without;
    CHECK(localattn_attention_variant(nullptr, &p, LOCALATTN_BACKWARD, &name, nullptr, 0) == LOCALATTN_OK);
    CHECK(name != nullptr);
}

TEST(variants_by_name) {
    test::Tensors tensors(small_config());
    const Params p = tensors.params();
    Context context = LOCALATTN_INIT(localattn_context);
    std::string last;
    for (int32_t i = 0; i < localattn_variant_count(); ++i) {
        localattn_variant_info info = LOCALATTN_INIT(localattn_variant_info);
        CHECK(localattn_get_variant_info(i, &info) == LOCALATTN_OK);
        CHECK(info.name && *info.name && info.description && *info.description);
        if (std::string(info.name).rfind("cuda", 0) == 0) continue;  // after those of the CPU
        last = info.name;
        const char *name = nullptr;
        context.variant = info.name;
        localattn_status status = localattn_attention_variant(&context, &p, LOCALATTN_FORWARD, &name, nullptr, 0);
        if (info.unavailable) {
            CHECK(status == LOCALATTN_UNSUPPORTED);
            CHECK(std::strstr(localattn_last_error(), info.unavailable)) << localattn_last_error();
            continue;
        }
        CHECK(status == LOCALATTN_OK || status == LOCALATTN_UNSUPPORTED) << localattn_last_error();
        if (status == LOCALATTN_OK) CHECK(name == last) << name;

        // The environment forces where the context does not.
        setenv("LOCALATTN_CPU_ISA", info.name, 1);
        context.variant = "";
        status = localattn_attention_variant(&context, &p, LOCALATTN_FORWARD, &name, nullptr, 0);
        if (status == LOCALATTN_OK) CHECK(name == last) << name;
        context.variant = "reference";
        CHECK(localattn_attention_variant(&context, &p, LOCALATTN_FORWARD, &name, nullptr, 0) == LOCALATTN_OK);
        CHECK(name == std::string("reference")) << name;
        unsetenv("LOCALATTN_CPU_ISA");
    }
    CHECK(last == "reference") << "the reference is the CPU's last, not " << last;

    setenv("LOCALATTN_CPU_ISA", "sse9", 1);
    context.variant = nullptr;
    CHECK(localattn_attention_forward(&context, &p) == invalid);
    const std::string message = localattn_last_error();
    unsetenv("LOCALATTN_CPU_ISA");
    CHECK(message.find("LOCALATTN_CPU_ISA is \"sse9\"") != std::string::npos) << message;
    for (int32_t i = 0; i < localattn_variant_count(); ++i) {
        localattn_variant_info info = LOCALATTN_INIT(localattn_variant_info);
        localattn_get_variant_info(i, &info);
        CHECK(message.find(info.name) != std::string::npos) << info.name << " is not in: " << message;
    }
}

TEST(reports_are_cut_to_fit) {
    test::Tensors tensors(small_config());
    const Params p = tensors.params();
    for (const size_t size : {0, 1, 2, 20, 500}) {
        std::vector<char> report(size + 1, '#');
        CHECK(localattn_attention_variant(nullptr, &p, LOCALATTN_FORWARD, nullptr, report.data(), size) ==
              LOCALATTN_OK);
        CHECK(report[size] == '#');
        if (size) CHECK(std::memchr(report.data(), 0, size)) << "not terminated within " << size;
    }
}

TEST(versions_and_names) {
    const std::string version = std::to_string(LOCALATTN_VERSION_MAJOR) + "." +
                                std::to_string(LOCALATTN_VERSION_MINOR) + "." + std::to_string(LOCALATTN_VERSION_PATCH);
    CHECK(localattn_version() == version) << localattn_version();
    CHECK(std::string(localattn_status_name(LOCALATTN_OUT_OF_MEMORY)) == "LOCALATTN_OUT_OF_MEMORY");
    CHECK(*localattn_build_info());
}

int main(int argc, char **argv) { return check::run(argc, argv); }
