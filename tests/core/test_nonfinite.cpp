// A NaN or an infinity reaches the queries whose window holds it, and what follows from those; everything else keeps
// its bits.
#include <cmath>
#include <limits>
#include <set>
#include <string>

#include "check.h"
#include "harness.h"

namespace {

using test::Config;
using test::Dense;
using test::Shape;
using test::Tensors;

std::vector<Config> configs() {
    std::vector<Config> all;
    for (int dtype = 0; dtype < 4; ++dtype) {
        for (int kind = 0; kind < 10; ++kind) {
            Config c;
            c.seed = static_cast<uint64_t>(dtype * 10 + kind + 1);
            c.dtype = static_cast<localattn_dtype>(dtype);
            c.heads = c.kv_heads = kind == 1 ? 2 : 1;
            c.channels = 9;
            c.value_channels = 17;
            c.query_extent[0] = c.key_extent[0] = 6;
            c.query_extent[1] = c.key_extent[1] = 37;
            c.kernel_size[0] = 3;
            c.kernel_size[1] = 5;
            c.border = static_cast<localattn_border>(kind % 3);
            c.is_causal[1] = kind == 3;
            c.raster_causal = kind == 4;
            if (kind == 5) c.stride[0] = 3, c.stride[1] = 4;
            if (kind == 6) c.key_extent[0] = 3, c.key_extent[1] = 74;
            if (kind == 7) c.dilation[1] = 3, c.has_key_mask = true;
            // Residue classes of five positions share a register.
            if (kind >= 8) c.dilation[1] = 9, c.has_key_mask = kind == 9;
            c.plain_layout = true;
            all.push_back(c);
        }
    }
    return all;
}

struct Both {
    std::vector<Dense> forward, backward;
};

Both run(Tensors &tensors, const std::string &variant, bool &declined) {
    localattn_context context = LOCALATTN_INIT(localattn_context);
    context.variant = variant.c_str();
    context.num_threads = 1;
    const localattn_attention_params params = tensors.params();
    tensors.poison(LOCALATTN_FORWARD);
    tensors.poison(LOCALATTN_BACKWARD);
    Both both;
    const localattn_status forward = localattn_attention_forward(&context, &params);
    const localattn_status backward =
        forward == LOCALATTN_OK ? localattn_attention_backward(&context, &params) : forward;
    declined = forward == LOCALATTN_UNSUPPORTED || backward == LOCALATTN_UNSUPPORTED;
    CHECK(declined || (forward == LOCALATTN_OK && backward == LOCALATTN_OK)) << localattn_last_error();
    tensors.each_result(LOCALATTN_FORWARD, [&](const char *, test::Memory &m) { both.forward.push_back(m.dense()); });
    tensors.each_result(LOCALATTN_BACKWARD, [&](const char *, test::Memory &m) { both.backward.push_back(m.dense()); });
    return both;
}

enum Where { in_key, in_value, in_query, in_grad_output };
const char *const where_names[] = {"key", "value", "query", "grad_output"};

// Positions of the map, as (batch, position, 0, 0).
using Set = std::set<Shape>;

Shape place(const Shape &at) { return {at[0], at[1], at[2], at[3], 0, 0}; }

// Whether every element of a result differs from the clean run exactly at the places in `reached`, being NaN there if
// `all_nan`; head 0 alone is looked at where the fault is in head 0 alone.
void compare(const Dense &clean, const Dense &faulty, const Set &reached, bool all_nan, int64_t only_channel,
             const std::string &what) {
    Shape at{};
    int wrong = 0;
    Shape first{};
    for (at[1] = 0; at[1] < clean.shape[1]; ++at[1])
        for (at[2] = 0; at[2] < clean.shape[2]; ++at[2])
            for (at[3] = 0; at[3] < clean.shape[3]; ++at[3])
                for (at[4] = 0; at[4] < clean.shape[4]; ++at[4])
                    for (at[5] = 0; at[5] < clean.shape[5]; ++at[5]) {
                        const bool hit =
                            at[4] == 0 && reached.count(place(at)) && (only_channel < 0 || only_channel == at[5]);
                        const double x = faulty[at];
                        const bool good = hit ? !all_nan || std::isnan(x) : x == clean[at];
                        if (!good && wrong++ == 0) first = at;
                    }
    CHECK(wrong == 0) << what << ": " << wrong << " elements, first at " << first[1] << "," << first[2] << ","
                      << first[3] << " head " << first[4] << " channel " << first[5] << ": " << faulty[first]
                      << ", clean " << clean[first];
}

void check_fault(const Config &config, const std::string &variant, Where where, double fault) {
    Tensors tensors(config);
    bool declined = false;
    const Both clean = run(tensors, variant, declined);
    if (declined) {
        std::printf("variant %s declines %s: %s\n", variant.c_str(), test::describe(config).c_str(),
                    localattn_last_error());
        return;
    }
    // The middle of the map, head 0, channel 2.
    test::Memory &memory = where == in_key     ? tensors.key
                           : where == in_value ? tensors.value
                           : where == in_query ? tensors.query
                                               : tensors.grad_output;
    const Shape spot = {0, memory.shape[1] / 2, memory.shape[2] / 2, memory.shape[3] / 2, 0, 2};
    if (config.has_key_mask) tensors.key_mask.set(place(spot), 1);
    const Both unmasked = config.has_key_mask ? run(tensors, variant, declined) : clean;
    memory.set(spot, fault);
    const Both faulty = run(tensors, variant, declined);

    const Dense mask = config.has_key_mask ? tensors.key_mask.dense() : Dense();
    Set queries, keys;  // reached by the fault; keys, in the backward, through those queries
    Shape q{};
    for (q[1] = 0; q[1] < config.query_extent[0]; ++q[1])
        for (q[2] = 0; q[2] < config.query_extent[1]; ++q[2])
            for (q[3] = 0; q[3] < config.query_extent[2]; ++q[3]) {
                bool reached = (where == in_query || where == in_grad_output) && place(q) == place(spot);
                const std::vector<Shape> seen = test::visible_keys(config, mask, 0, q);
                for (const Shape &key : seen) {
                    reached = reached || ((where == in_key || where == in_value) && place(key) == place(spot));
                }
                if (!reached) continue;
                queries.insert(place(q));
                for (const Shape &key : seen) keys.insert(place(key));
            }
    const bool nan = std::isnan(fault);
    const std::string what =
        variant + ", " + where_names[where] + " " + std::to_string(fault) + ", " + test::describe(config);
    const Set none;
    const int64_t channel = where == in_value ? 2 : -1;
    compare(unmasked.forward[0], faulty.forward[0], where == in_grad_output ? none : queries, nan, channel,
            what + ", output");
    compare(unmasked.forward[1], faulty.forward[1], where == in_key || where == in_query ? queries : none, nan, -1,
            what + ", lse");
    // A query with grad_output not finite spoils what its window gets; of grad_value only that channel.
    compare(unmasked.backward[0], faulty.backward[0], queries, nan, -1, what + ", grad_query");
    compare(unmasked.backward[1], faulty.backward[1], keys, nan, -1, what + ", grad_key");
    compare(unmasked.backward[2], faulty.backward[2], where == in_value ? none : keys, nan,
            where == in_grad_output ? 2 : -1, what + ", grad_value");
}

}  // namespace

TEST(nan_reaches_just_the_windows_that_hold_it) {
    for (const std::string &variant : test::available_variants()) {
        for (const Config &config : configs()) {
            for (const Where where : {in_key, in_value, in_query, in_grad_output}) {
                check_fault(config, variant, where, std::numeric_limits<double>::quiet_NaN());
            }
        }
    }
}

TEST(infinity_reaches_no_other_window) {
    for (const std::string &variant : test::available_variants()) {
        for (const Config &config : configs()) {
            for (const Where where : {in_key, in_value, in_query, in_grad_output}) {
                check_fault(config, variant, where, std::numeric_limits<double>::infinity());
                check_fault(config, variant, where, -std::numeric_limits<double>::infinity());
            }
        }
    }
}

TEST(infinite_scores_are_those_of_the_definition) {
    const double infinity = std::numeric_limits<double>::infinity();
    for (const std::string &variant : test::available_variants()) {
        for (Config config : configs()) {
            config.has_bias = true;
            for (const double fault : {infinity, -infinity}) {
                Tensors tensors(config);
                test::Random random(3);
                // Some entries infinite; some queries with no other.
                Shape at{};
                const Shape &s = tensors.bias.shape;
                for (at[1] = 0; at[1] < s[1]; ++at[1])
                    for (at[2] = 0; at[2] < s[2]; ++at[2])
                        for (at[4] = 0; at[4] < s[4]; ++at[4]) {
                            const bool all = test::chance(random, 10);
                            for (at[5] = 0; at[5] < s[5]; ++at[5]) {
                                if (all || test::chance(random, 5)) tensors.bias.set(at, fault);
                            }
                        }
                bool declined = false;
                const Both both = run(tensors, variant, declined);
                if (declined) continue;
                const test::Results wanted = test::attention(config, tensors.inputs(), test::Sums::wider);
                int wrong = 0;
                for (size_t i = 0; i < both.forward[0].data.size(); ++i) {
                    const double x = both.forward[0].data[i], y = wanted.output.value.data[i];
                    wrong += std::isnan(x) != std::isnan(y) || (std::isfinite(y) && std::fabs(x - y) > 0.1);
                }
                CHECK(wrong == 0) << variant << ", bias " << fault << ", " << test::describe(config) << ": " << wrong
                                  << " elements of output";
                for (size_t i = 0; i < both.forward[1].data.size(); ++i) {
                    const double x = both.forward[1].data[i], y = wanted.lse.value.data[i];
                    wrong += std::isinf(y) ? x != y : !std::isfinite(x);
                }
                CHECK(wrong == 0) << variant << ", bias " << fault << ", " << test::describe(config) << ": " << wrong
                                  << " of lse";
                if (fault > 0) {  // the softmax of such a query is NaN, and so are the gradients it takes part in
                    const Dense *const gradients[] = {&wanted.grad_query.value, &wanted.grad_key.value,
                                                      &wanted.grad_value.value};
                    for (size_t g = 0; g < 3; ++g) {
                        for (size_t i = 0; i < gradients[g]->data.size(); ++i)
                            wrong += std::isnan(both.backward[g].data[i]) != std::isnan(gradients[g]->data[i]);
                    }
                    CHECK(wrong == 0) << variant << ", bias " << fault << ", " << test::describe(config) << ": "
                                      << wrong << " gradients NaN or not";
                    continue;
                }
                for (const Dense &gradient : both.backward) {
                    for (const double x : gradient.data) wrong += !std::isfinite(x);
                }
                CHECK(wrong == 0) << variant << ", bias " << fault << ", " << test::describe(config) << ": " << wrong
                                  << " gradients not finite";
            }
        }
    }
}

TEST(a_masked_key_is_not_read) {
    for (const std::string &variant : test::available_variants()) {
        for (Config config : configs()) {
            config.has_key_mask = true;
            Tensors tensors(config);
            const Dense mask = tensors.key_mask.dense();
            bool declined = false;
            const Both clean = run(tensors, variant, declined);
            if (declined) continue;
            Shape at{};
            for (at[1] = 0; at[1] < mask.shape[1]; ++at[1])
                for (at[2] = 0; at[2] < mask.shape[2]; ++at[2]) {
                    at[5] = 0;
                    if (mask[at] != 0) continue;
                    for (; at[5] < config.channels; ++at[5]) {
                        tensors.key.set(at, std::numeric_limits<double>::quiet_NaN());
                        tensors.value.set(at, std::numeric_limits<double>::infinity());
                    }
                }
            const Both faulty = run(tensors, variant, declined);
            for (size_t i = 0; i < 2; ++i) {
                CHECK(clean.forward[i].data == faulty.forward[i].data) << variant << ", " << test::describe(config);
            }
            for (size_t i = 0; i < 3; ++i) {
                CHECK(clean.backward[i].data == faulty.backward[i].data) << variant << ", " << test::describe(config);
            }
        }
    }
}

int main(int argc, char **argv) { return check::run(argc, argv); }
