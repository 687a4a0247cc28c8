// Attention by brute force, straight from the definition: lists of keys, dense arrays, sums over all of a window. It
// shares nothing with the library, not even the window rule, which is written out here a second time.
#pragma once
#include "config.h"
#include "tensor.h"

namespace test {

struct Inputs {
    Dense query, key, value, bias, rel_pos_bias, axis_bias[3], key_mask, grad_output, grad_lse;
};

// A result, and what says how large its rounding errors may be: for each element the sum of the absolute values of the
// terms that it is a sum of, and the same weighted by how far an error in the scores carries.
struct Result {
    Dense value, terms, score_terms;

    void reset(const Shape &shape);
    void add(const Shape &at, double x, double magnitude, double spread);
};

struct Results {
    Result output, lse, grad_query, grad_key, grad_value, grad_bias, grad_rel_pos_bias, grad_axis_bias[3];
};

// What an entry of an axis' window is: a key's position, or one of these.
constexpr int64_t outside = -1;  // the zeros around the map
constexpr int64_t absent = -2;

struct AxisWindow {
    std::vector<int64_t> entries;  // kernel_size of them
    std::vector<int64_t> offsets;  // key - centre + kernel_size - 1, in dilated coordinates
};

AxisWindow axis_window(const Config &config, int axis, int64_t query);

// With sums in a type wider than the one that the library accumulates in for this dtype, or, for the errors that any
// plain implementation has, in that one.
enum class Sums { wider, plain };
Results attention(const Config &config, const Inputs &inputs, Sums sums);

// The keys that a query sees, as (key, entry) positions; used where only the pattern matters.
std::vector<Shape> visible_keys(const Config &config, const Dense &key_mask, int64_t batch, const Shape &query);

}  // namespace test
