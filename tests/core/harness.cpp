#include "harness.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>

namespace test {

Element element_of(localattn_dtype dtype) {
    switch (dtype) {
        case LOCALATTN_FLOAT64:
            return Element::float64;
        case LOCALATTN_FLOAT16:
            return Element::float16;
        case LOCALATTN_BFLOAT16:
            return Element::bfloat16;
        default:
            return Element::float32;
    }
}

Element wide_element_of(localattn_dtype dtype) {
    return dtype == LOCALATTN_FLOAT64 ? Element::float64 : Element::float32;
}

Tensors::Tensors(const Config &c) : config(c) {
    Random random(c.seed);
    const Element narrow = element_of(c.dtype), wide = wide_element_of(c.dtype);
    const int64_t *sq = c.query_extent, *sk = c.key_extent, *k = c.kernel_size;
    const auto at_queries = [&](int64_t channels) { return Shape{c.batch, sq[0], sq[1], sq[2], c.heads, channels}; };
    const auto at_keys = [&](int64_t channels) { return Shape{c.batch, sk[0], sk[1], sk[2], c.kv_heads, channels}; };
    const Shape table = {1, 2 * k[0] - 1, 2 * k[1] - 1, 2 * k[2] - 1, c.heads, 1};

    const auto input = [&](Memory &memory, Element element, const Shape &shape, double magnitude, unsigned broadcast) {
        if (!c.plain_layout && broadcast == 0 && chance(random, 8)) broadcast = 1u << pick(random, 0, 5);
        // Extents of 0 keep their axis: the tensor is empty, not broadcast.
        for (size_t a = 0; a < 6; ++a) {
            if (shape[a] == 0) broadcast &= ~(1u << a);
        }
        memory = Memory(random, element, shape, broadcast, c.plain_layout, false);
        memory.fill_random(random, magnitude);
    };
    input(query, narrow, at_queries(c.channels), c.magnitude, 0);
    input(key, narrow, at_keys(c.channels), c.magnitude, 0);
    input(value, narrow, at_keys(c.value_channels), 1, 0);
    if (c.has_bias) input(bias, narrow, at_queries(c.window()), 1, c.bias_broadcast);
    if (c.has_rel_pos_bias) input(rel_pos_bias, narrow, table, 1, 0);
    for (int a = 0; a < 3; ++a) {
        if (c.has_axis_bias[a]) input(axis_bias[a], narrow, at_queries(k[a]), 1, c.bias_broadcast);
    }
    if (c.has_key_mask) {
        key_mask = Memory(random, Element::uint8, {c.batch, sk[0], sk[1], sk[2], 1, 1}, 0, c.plain_layout, false);
        key_mask.fill_mask(random);
    }
    input(grad_output, narrow, at_queries(c.value_channels), 1, 0);
    if (c.has_grad_lse) input(grad_lse, wide, at_queries(1), 1, 0);

    const auto result = [&](Memory &memory, Element element, const Shape &shape, unsigned summed) {
        memory = Memory(random, element, shape, summed, c.plain_layout, true);
    };
    result(output, narrow, at_queries(c.value_channels), 0);
    result(lse, wide, at_queries(1), 0);
    result(grad_query, narrow, at_queries(c.channels), 0);
    result(grad_key, narrow, at_keys(c.channels), 0);
    result(grad_value, narrow, at_keys(c.value_channels), 0);
    if (c.has_bias) result(grad_bias, wide, at_queries(c.window()), c.bias_broadcast);
    if (c.has_rel_pos_bias) result(grad_rel_pos_bias, wide, table, 0);
    for (int a = 0; a < 3; ++a) {
        if (c.has_axis_bias[a]) result(grad_axis_bias[a], wide, at_queries(k[a]), c.bias_broadcast);
    }
}

localattn_attention_params Tensors::params() {
    const Config &c = config;
    localattn_attention_params p = LOCALATTN_INIT(localattn_attention_params);
    p.dtype = c.dtype;
    p.rank = c.rank;
    p.batch = c.batch;
    p.heads = c.heads;
    p.kv_heads = c.kv_heads;
    p.channels = c.channels;
    p.value_channels = c.value_channels;
    for (int a = 0; a < c.rank; ++a) {
        p.query_extent[a] = c.query_extent[a];
        p.key_extent[a] = c.key_extent[a];
        p.kernel_size[a] = c.kernel_size[a];
        p.stride[a] = c.stride[a];
        p.dilation[a] = c.dilation[a];
        p.is_causal[a] = c.is_causal[a];
    }
    p.raster_causal = c.raster_causal;
    p.border = c.border;
    p.has_scale = c.has_scale;
    p.scale = c.scale;
    const auto view = [&](Memory &memory) { return memory.view(c.rank); };
    p.query = view(query);
    p.key = view(key);
    p.value = view(value);
    p.output = view(output);
    p.lse = view(lse);
    p.grad_output = view(grad_output);
    p.grad_query = view(grad_query);
    p.grad_key = view(grad_key);
    p.grad_value = view(grad_value);
    if (c.has_bias) p.bias = view(bias), p.grad_bias = view(grad_bias);
    if (c.has_rel_pos_bias) p.rel_pos_bias = view(rel_pos_bias), p.grad_rel_pos_bias = view(grad_rel_pos_bias);
    for (int a = 0; a < c.rank; ++a) {
        if (c.has_axis_bias[a]) {
            p.axis_bias[a] = view(axis_bias[a]);
            p.grad_axis_bias[a] = view(grad_axis_bias[a]);
        }
    }
    if (c.has_key_mask) p.key_mask = view(key_mask);
    if (c.has_grad_lse) p.grad_lse = view(grad_lse);
    return p;
}

Inputs Tensors::inputs() const {
    Inputs in;
    in.query = query.dense();
    in.key = key.dense();
    in.value = value.dense();
    in.grad_output = grad_output.dense();
    if (config.has_bias) in.bias = bias.dense();
    if (config.has_rel_pos_bias) in.rel_pos_bias = rel_pos_bias.dense();
    for (int a = 0; a < 3; ++a) {
        if (config.has_axis_bias[a]) in.axis_bias[a] = axis_bias[a].dense();
    }
    if (config.has_key_mask) in.key_mask = key_mask.dense();
    if (config.has_grad_lse) in.grad_lse = grad_lse.dense();
    return in;
}

void Tensors::each_result(localattn_pass pass, const std::function<void(const char *, Memory &)> &visit) {
    if (pass == LOCALATTN_FORWARD) {
        visit("output", output);
        visit("lse", lse);
        return;
    }
    visit("grad_query", grad_query);
    visit("grad_key", grad_key);
    visit("grad_value", grad_value);
    if (config.has_bias) visit("grad_bias", grad_bias);
    if (config.has_rel_pos_bias) visit("grad_rel_pos_bias", grad_rel_pos_bias);
    static const char *const names[] = {"grad_axis_bias[0]", "grad_axis_bias[1]", "grad_axis_bias[2]"};
    for (int a = 0; a < 3; ++a) {
        if (config.has_axis_bias[a]) visit(names[a], grad_axis_bias[a]);
    }
}

std::vector<unsigned char> Tensors::result_bytes(localattn_pass pass) {
    std::vector<unsigned char> all;
    each_result(pass, [&](const char *, Memory &m) { all.insert(all.end(), m.bytes().begin(), m.bytes().end()); });
    return all;
}

void Tensors::poison(localattn_pass pass) {
    each_result(pass, [](const char *, Memory &memory) { memory.poison(); });
}

std::vector<std::string> available_variants() {
    std::vector<std::string> names;
    for (int32_t i = 0; i < localattn_variant_count(); ++i) {
        localattn_variant_info info = LOCALATTN_INIT(localattn_variant_info);
        if (localattn_get_variant_info(i, &info) != LOCALATTN_OK) continue;
        if (device_of(info.name) != tested_device) {
            std::printf("variant %s is not tested here, but in %s\n", info.name,
                        tested_device ? "tests/core" : "tests/cuda");
        } else if (info.unavailable) {
            std::printf("variant %s is not tested here: %s\n", info.name, info.unavailable);
        } else {
            names.push_back(info.name);
        }
    }
    return names;
}

BackwardsExecutor::BackwardsExecutor(int32_t workers) {
    executor.self = nullptr;
    executor.num_workers = workers;
    executor.run = [](void *, int32_t tasks, void (*task)(void *, int32_t), void *argument) {
        for (int32_t i = tasks; i-- > 0;) task(argument, i);
    };
}

namespace {

const Result &result_named(const Results &results, const std::string &name) {
    if (name == "output") return results.output;
    if (name == "lse") return results.lse;
    if (name == "grad_query") return results.grad_query;
    if (name == "grad_key") return results.grad_key;
    if (name == "grad_value") return results.grad_value;
    if (name == "grad_bias") return results.grad_bias;
    if (name == "grad_rel_pos_bias") return results.grad_rel_pos_bias;
    return results.grad_axis_bias[name[15] - '0'];
}

// How far from the exact value an element may be: a few times the error that plain sums in the type of accumulation
// have anywhere in this tensor, a few roundings of the terms that make up the element to the tensors' type, and a few
// roundings of the scores to the type of accumulation.
void compare(const char *name, const Memory &memory, const Result &exact, const Result &plain, Element narrow,
             std::vector<std::string> &failures) {
    const Dense got = memory.dense();
    const bool is_lse = std::strcmp(name, "lse") == 0;
    const double wide_roundoff = unit_roundoff(narrow == Element::float64 ? Element::float64 : Element::float32);
    const double roundoff = is_lse ? wide_roundoff : unit_roundoff(narrow);
    double plain_error = 0;
    for (size_t i = 0; i < exact.value.data.size(); ++i) {
        const double error = std::fabs(plain.value.data[i] - exact.value.data[i]);
        if (error > plain_error) plain_error = error;  // not where both are -infinity
    }
    if (got.data.size() != exact.value.data.size()) {
        failures.push_back(std::string(name) + ": the test's own shapes differ");
        return;
    }
    // Below this an element cannot be told from 0.
    const double least = narrow == Element::float16 ? 0x1p-24 : narrow == Element::float64 ? 1e-300 : 1e-37;
    int wrong = 0;
    std::ostringstream text;
    for (size_t i = 0; i < got.data.size(); ++i) {
        const double x = got.data[i], wanted = exact.value.data[i];
        const double tolerance = 4 * plain_error + 4 * roundoff * exact.terms.data[i] +
                                 8 * wide_roundoff * exact.score_terms.data[i] + least;
        if (x == wanted || std::fabs(x - wanted) <= tolerance) continue;
        if (++wrong > 1) continue;
        Shape at;
        int64_t rest = static_cast<int64_t>(i);
        for (int a = 5; a >= 0; --a) {
            at[size_t(a)] = rest % got.shape[size_t(a)];
            rest /= got.shape[size_t(a)];
        }
        text.precision(9);
        text << name << " at batch " << at[0] << ", position " << at[1] << "," << at[2] << "," << at[3] << ", head "
             << at[4] << ", channel " << at[5] << " is " << x << ", not " << wanted << " within " << tolerance;
    }
    if (wrong == 0) return;
    text << " (" << wrong << " of " << got.data.size() << " elements wrong)";
    failures.push_back(text.str());
}

struct Free {
    void operator()(unsigned char *memory) const { std::free(memory); }
};

// A workspace of exactly the size asked for, with a pattern behind it.
class Workspace {
public:
    explicit Workspace(size_t size) : size_(size) {
        memory_.reset(static_cast<unsigned char *>(std::aligned_alloc(64, (size + 128) / 64 * 64)));
        std::memset(memory_.get(), 0xff, size);
        std::memset(memory_.get() + size, 0x5a, (size + 128) / 64 * 64 - size);
    }
    void *data() { return memory_.get(); }
    bool overrun() const {
        for (size_t i = size_; i < (size_ + 128) / 64 * 64; ++i) {
            if (memory_.get()[i] != 0x5a) return true;
        }
        return false;
    }

private:
    size_t size_;
    std::unique_ptr<unsigned char, Free> memory_;
};

}  // namespace

void check_variant(Tensors &tensors, const Results &exact, const Results &plain, const std::string &variant,
                   std::vector<std::string> &failures, std::string &declined) {
    const localattn_attention_params params = tensors.params();
    Random random(tensors.config.seed ^ 0x5bd1e995);
    for (const localattn_pass pass : {LOCALATTN_FORWARD, LOCALATTN_BACKWARD}) {
        const char *pass_name = pass == LOCALATTN_FORWARD ? "forward" : "backward";
        const auto call = pass == LOCALATTN_FORWARD ? localattn_attention_forward : localattn_attention_backward;
        const auto say = [&](const std::string &text) { failures.push_back(std::string(pass_name) + ": " + text); };

        localattn_context context = LOCALATTN_INIT(localattn_context);
        context.variant = variant.c_str();
        context.num_threads = 1;
        tensors.poison(pass);
        localattn_status status = call(&context, &params);
        if (status == LOCALATTN_UNSUPPORTED) {
            declined = std::string(pass_name) + ": " + localattn_last_error();
            return;
        }
        if (status != LOCALATTN_OK)
            return say(std::string(localattn_status_name(status)) + ": " + localattn_last_error());
        std::vector<std::string> wrong;
        tensors.each_result(pass, [&](const char *name, Memory &memory) {
            compare(name, memory, result_named(exact, name), result_named(plain, name),
                    element_of(tensors.config.dtype), wrong);
            if (!memory.untouched()) wrong.push_back(std::string(name) + ": memory beside its elements was written");
        });
        for (const std::string &text : wrong) say(text);
        const std::vector<unsigned char> bytes = tensors.result_bytes(pass);

        const int32_t workers = static_cast<int32_t>(pick(random, 2, 5));
        const BackwardsExecutor backwards(workers);
        context.executor = &backwards.executor;
        size_t size = 0;
        status = localattn_attention_workspace_size(&context, &params, pass, &size);
        if (status != LOCALATTN_OK) return say("workspace query: " + std::string(localattn_last_error()));
        Workspace workspace(size);
        context.workspace = workspace.data();
        context.workspace_size = size;
        tensors.poison(pass);
        status = call(&context, &params);
        if (status != LOCALATTN_OK) return say("with an executor: " + std::string(localattn_last_error()));
        if (tensors.result_bytes(pass) != bytes) {
            say("the bits differ between one worker and " + std::to_string(workers));
        }
        if (workspace.overrun()) say("memory behind the workspace was written");

        if (pass == LOCALATTN_FORWARD && chance(random, 20)) {
            localattn_attention_params without_lse = params;
            without_lse.lse = {};
            const Bytes with = tensors.output.bytes();
            tensors.output.poison();
            if (call(&context, &without_lse) != LOCALATTN_OK)
                return say("without lse: " + std::string(localattn_last_error()));
            if (tensors.output.bytes() != with) say("the output's bits differ when lse is not asked for");
        }
        if (pass == LOCALATTN_BACKWARD && chance(random, 20)) {
            // One gradient alone is the same as among all.
            localattn_attention_params alone = params;
            const int64_t which = pick(random, 0, 2);
            if (which != 0) alone.grad_query = {};
            if (which != 1) alone.grad_key = {};
            if (which != 2) alone.grad_value = {};
            alone.grad_bias = alone.grad_rel_pos_bias = {};
            for (localattn_tensor &t : alone.grad_axis_bias) t = {};
            context.workspace = nullptr;
            context.workspace_size = 0;
            Memory &memory = which == 0 ? tensors.grad_query : which == 1 ? tensors.grad_key : tensors.grad_value;
            const Bytes among = memory.bytes();
            memory.poison();
            if (call(&context, &alone) != LOCALATTN_OK)
                return say("one gradient alone: " + std::string(localattn_last_error()));
            if (memory.bytes() != among) {
                say(std::string(which == 0   ? "grad_query"
                                : which == 1 ? "grad_key"
                                             : "grad_value") +
                    ": the bits differ when no other gradient is asked for");
            }
        }
    }
}

void Report::check(const Config &config, const std::vector<std::string> &variants, const std::string &reproduction) {
    Tensors tensors(config);
    const Inputs inputs = tensors.inputs();
    const Results exact = attention(config, inputs, Sums::wider);
    const Results plain = attention(config, inputs, Sums::plain);
    ++configs_;
    for (const std::string &variant : variants) {
        std::vector<std::string> failures;
        std::string declined;
        check_variant(tensors, exact, plain, variant, failures, declined);
        ++runs_;
        if (!declined.empty()) {
            const auto known = std::find_if(declined_.begin(), declined_.end(),
                                            [&](const Declined &d) { return d.reason == declined; });
            known == declined_.end() ? declined_.push_back({declined, 1}) : void(++known->count);
        }
        if (failures.empty()) continue;
        ++failures_;
        if (failures_ > 40) continue;
        std::printf("FAILED %s --variant %s\n    %s\n", reproduction.c_str(), variant.c_str(),
                    describe(config).c_str());
        for (const std::string &failure : failures) std::printf("    %s\n", failure.c_str());
        std::fflush(stdout);
    }
}

int Report::finish(const char *what) const {
    std::printf("%s: %d configurations, %d runs, %d failures\n", what, configs_, runs_, failures_);
    for (const Declined &d : declined_) std::printf("    declined %d times: %s\n", d.count, d.reason.c_str());
    return failures_;
}

}  // namespace test
