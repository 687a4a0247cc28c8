// Runs a configuration through the library with one variant, and compares everything it wrote with the oracle.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "config.h"
#include "device.h"
#include "oracle.h"
#include "tensor.h"

namespace test {

Element element_of(localattn_dtype dtype);
Element wide_element_of(localattn_dtype dtype);  // of lse and of bias gradients

// The tensors of one configuration, in memory, and the params that point to them.
struct Tensors {
    explicit Tensors(const Config &config);

    Config config;
    Memory query, key, value, bias, rel_pos_bias, axis_bias[3], key_mask, grad_output, grad_lse;
    Memory output, lse, grad_query, grad_key, grad_value, grad_bias, grad_rel_pos_bias, grad_axis_bias[3];

    localattn_attention_params params();
    Inputs inputs() const;
    // Calls visit(name, memory) for each result that the pass writes.
    void each_result(localattn_pass pass, const std::function<void(const char *, Memory &)> &visit);
    // All that the pass' results hold, to compare bits.
    std::vector<unsigned char> result_bytes(localattn_pass pass);
    void poison(localattn_pass pass);
};

// Names of the variants of the tested device that this machine can run, best first.
std::vector<std::string> available_variants();

// An executor that claims `workers` workers and runs the tasks one after another, last first: if bits depended on the
// number of workers or on who does what, this would show it.
struct BackwardsExecutor {
    explicit BackwardsExecutor(int32_t workers);
    localattn_executor executor;
};

// Runs the variant forward and backward over both ways of providing workers and workspace; appends to `failures` what
// is wrong, and to `declined` the reason if the variant does not take the configuration.
void check_variant(Tensors &tensors, const Results &exact, const Results &plain, const std::string &variant,
                   std::vector<std::string> &failures, std::string &declined);

// Everything for one configuration and the variants named. Returns the failures as text, "" if there are none.
class Report {
public:
    void check(const Config &config, const std::vector<std::string> &variants, const std::string &reproduction);
    // Prints how much was run and which variants declined what; the number of failures.
    int finish(const char *what) const;

private:
    struct Declined {
        std::string reason;
        int count;
    };
    int configs_ = 0, runs_ = 0, failures_ = 0;
    std::vector<Declined> declined_;
};

}  // namespace test
