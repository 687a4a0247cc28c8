// Launches of linear attention.
#include "../generic_linear_attention.h"

#include "generic_operators.h"

namespace localattn::cuda {

namespace {

// Of the positions of a sum: enough blocks for a large device, of at least so many positions.
int64_t parts_of(int64_t positions) {
    constexpr int64_t least = 256, most = 64;
    const int64_t parts = (positions + least - 1) / least;
    return parts < 1 ? 1 : parts > most ? most : parts;
}

template <class T>
struct Plan {
    using Real = Accumulator<T>;
    LinearArguments<T> arguments{};
    size_t bytes;

    Plan(const LinearProblem &p, void *memory) {
        const bool forward = p.pass == Pass::forward;
        LinearArguments<T> &a = arguments;
        a.problem = p;
        for (int x = 0; x < 3; ++x) a.queries.extent[x] = p.queries[x], a.keys.extent[x] = p.keys[x];
        a.query_count = p.query_count(), a.key_count = p.key_count();
        const int64_t heads = p.batch * p.heads, rows = heads * p.channels;
        a.workspace.parts = parts_of(forward ? a.key_count : a.query_count);
        int64_t count = 0;
        const auto take = [&](int64_t items) {
            Real *at = static_cast<Real *>(memory) + count;
            count += items;
            return at;
        };
        a.workspace.part_max = take(forward ? rows * a.workspace.parts : 0);
        a.workspace.part_total = take(forward ? rows * a.workspace.parts : 0);
        a.workspace.part_context = take(rows * a.workspace.parts * p.value_channels);
        a.workspace.context = take(rows * p.value_channels);
        a.workspace.mean = take(forward ? 0 : rows);
        a.workspace.query_lse = take(heads * a.query_count);
        bytes = size_t(count) * sizeof(Real);
    }
};

const char *declines(const LinearProblem &, const Device &) { return nullptr; }

size_t workspace(const LinearProblem &p) {
    alignas(8) static char nowhere[8];  // only the sizes matter
    return with_type(p.dtype, [&](auto element) { return Plan<decltype(element)>(p, nowhere).bytes; });
}

int64_t tiles(int64_t extent) { return (extent + product_tile - 1) / product_tile; }

template <auto kernel, class T>
const char *launch_blocks(int64_t blocks, void *stream, const LinearArguments<T> &arguments) {
    if (blocks == 0) return nullptr;
    return launch<kernel>(grid_for(blocks, 1), product_threads, BlockProduct<Accumulator<T>>::shared_bytes, stream,
                          arguments);
}

template <class T>
const char *run_typed(const LinearProblem &p, void *stream, void *memory) {
    const LinearArguments<T> a = Plan<T>(p, memory).arguments;
    const int64_t heads = p.batch * p.heads, channel_tiles = tiles(p.channels), value_tiles = tiles(p.value_channels);
    const int64_t query_tiles = tiles(a.query_count), key_tiles = tiles(a.key_count);
    const int64_t sums = heads * a.workspace.parts * channel_tiles * value_tiles;
    const char *error = launch_warps<linear_query_lse<T>>(heads * a.query_count, stream, a);
    if (p.pass == Pass::forward) {
        if (!error) error = launch_blocks<linear_sum_keys<T>>(sums, stream, a);
        if (!error) error = launch_warps<linear_merge_keys<T>>(heads * p.channels, stream, a);
        if (!error) error = launch_blocks<linear_output<T>>(heads * query_tiles * value_tiles, stream, a);
        return error;
    }
    if (!error && p.grad_query.data) error = launch_blocks<linear_grad_query<T>>(heads * query_tiles, stream, a);
    if (!p.grad_key.data && !p.grad_value.data) return error;
    if (!error) error = launch_blocks<linear_sum_queries<T>>(sums, stream, a);
    if (!error) error = launch_warps<linear_merge_queries<T>>(heads * p.channels, stream, a);
    if (!error && p.grad_value.data)
        error = launch_blocks<linear_grad_value<T>>(heads * key_tiles * value_tiles, stream, a);
    if (!error && p.grad_key.data)
        error = launch_blocks<linear_grad_key<T>>(heads * key_tiles * channel_tiles, stream, a);
    return error;
}

const char *run(const LinearProblem &p, void *stream, void *workspace) {
    return with_type(p.dtype, [&](auto element) { return run_typed<decltype(element)>(p, stream, workspace); });
}

}  // namespace

const Kernel<LinearProblem> generic_linear_attention = {declines, workspace, run};

}  // namespace localattn::cuda
