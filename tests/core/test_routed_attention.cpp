// routed_attention on random configurations, each variant in turn, against its definition in doubles; and what it
// refuses.
//
//     test_routed_attention [--case SEED] [--variant NAME]
#include <algorithm>
#include <limits>
#include <sstream>

#include "operators.h"

namespace {

using namespace test;

const double infinity = std::numeric_limits<double>::infinity();

const Operation<localattn_routed_attention_params> operation = {
    localattn_routed_attention_forward, localattn_routed_attention_backward, localattn_routed_attention_workspace_size,
    localattn_routed_attention_variant};

std::string check(uint64_t seed, const std::string &variant, std::vector<std::string> &failures) {
    Random random(seed);
    const localattn_dtype dtypes[] = {LOCALATTN_FLOAT32, LOCALATTN_FLOAT64, LOCALATTN_FLOAT16, LOCALATTN_BFLOAT16};
    // On a GPU every kernel in turn: each dtype, and each width of what tensor cores take.
    const bool on_cuda = tested_device == LOCALATTN_CUDA, tiled = on_cuda && seed % 2;
    const int64_t widest = int64_t(32) << seed / 4 % 3;
    const localattn_dtype dtype = dtypes[tiled     ? 2 + seed / 2 % 2
                                         : on_cuda ? seed / 2 % 4
                                                   : uint64_t(pick(random, 0, 3))];
    const Element element = element_of(dtype), wide = wide_element_of(dtype);
    // An emulated device is slow.
    const bool large = chance(random, 15), small = large && on_cuda;
    const int64_t batch = pick(random, 0, 20) ? pick(random, 1, 2) : 0, heads = small ? 1 : pick(random, 1, 3);
    const auto pick_channels = [&] {
        return tiled ? 8 * pick(random, widest == 32 ? 1 : widest / 16 + 1, widest / 8)
                     : pick(random, 1, chance(random, 20) ? 40 : 9);
    };
    const int64_t channels = pick_channels(), width = pick_channels();
    const int64_t grid[2] = {chance(random, 3) ? 0 : pick(random, 1, small ? 1 : 4), pick(random, 1, small ? 2 : 4)};
    const int64_t rq[2] = {pick(random, 1, large ? 12 : 5), pick(random, 1, large ? 20 : 5)};
    const bool same = chance(random, 50);
    const int64_t rk[2] = {same ? rq[0] : pick(random, 1, 4), same ? rq[1] : pick(random, 1, large ? 18 : 4)};
    const int64_t regions = grid[0] * grid[1], topk = chance(random, 5) ? 0 : pick(random, 1, small ? 2 : 4);
    const bool plain = tiled || chance(random, 40), weighted = chance(random, 50), has_grad_lse = chance(random, 40);
    const bool has_scale = chance(random, 50);
    const double scale = has_scale ? double(pick(random, -8, 16)) / 16 : 1 / std::sqrt(double(channels));
    const double magnitude = chance(random, 20) ? 6 : 1;

    const auto input = [&](const Shape &shape, double size) {
        Memory m(random, element, shape, 0, plain, false);
        m.fill_random(random, size);
        return m;
    };
    const auto result = [&](Element type, const Shape &shape) { return Memory(random, type, shape, 0, plain, true); };
    const int64_t H = grid[0] * rq[0], W = grid[1] * rq[1], Hk = grid[0] * rk[0], Wk = grid[1] * rk[1];
    const auto at_queries = [&](int64_t c) { return Shape{batch, H, W, 1, heads, c}; };
    const auto at_keys = [&](int64_t c) { return Shape{batch, Hk, Wk, 1, heads, c}; };
    const Shape choices = {batch, regions, 1, 1, 1, topk};
    Memory query = input(at_queries(channels), magnitude), key = input(at_keys(channels), magnitude);
    Memory value = input(at_keys(width), 1), grad_output = input(at_queries(width), 1);
    Memory weights = input(choices, 1);
    Memory grad_lse(random, wide, at_queries(1), 0, plain, false);
    grad_lse.fill_random(random, 1);
    Memory output = result(element, at_queries(width)), lse = result(wide, at_queries(1));
    Memory grad_query = result(element, at_queries(channels)), grad_key = result(element, at_keys(channels));
    Memory grad_value = result(element, at_keys(width)), grad_weight = result(wide, choices);
    Vector<int64_t> index(size_t(std::max<int64_t>(1, batch * regions * topk)));
    for (int64_t &i : index) i = pick(random, 0, std::max<int64_t>(0, regions - 1));

    const Dense q = query.dense(), k = key.dense(), v = value.dense(), g = grad_output.dense(), w = weights.dense();
    const Dense gl = grad_lse.dense();
    Written o("output", output), l("lse", lse), gq("grad_query", grad_query), gk("grad_key", grad_key);
    Written gv("grad_value", grad_value), gw("grad_region_weight", grad_weight);
    struct Seen {
        Shape key;
        int64_t choice;
        double weight, dot, score;
    };
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t y = 0; y < H; ++y)
            for (int64_t x = 0; x < W; ++x)
                for (int64_t h = 0; h < heads; ++h) {
                    const int64_t region = y / rq[0] * grid[1] + x / rq[1];
                    std::vector<Seen> seen;
                    double most = -infinity, total = 0, error = 1;  // error: how many roundings a score carries
                    for (int64_t t = 0; t < topk; ++t) {
                        const int64_t there = index[size_t((b * regions + region) * topk + t)];
                        const double weight = weighted ? w[{b, region, 0, 0, 0, t}] : 1;
                        for (int64_t i = 0; i < rk[0] * rk[1]; ++i) {
                            Shape at = {
                                b, there / grid[1] * rk[0] + i / rk[1], there % grid[1] * rk[1] + i % rk[1], 0, h, 0};
                            double dot = 0, terms = 0;
                            for (int64_t c = 0; c < channels; ++c) {
                                at[5] = c;
                                dot += q[{b, y, x, 0, h, c}] * k[at];
                                terms += std::fabs(q[{b, y, x, 0, h, c}] * k[at]);
                            }
                            error = std::max(error, 1 + std::fabs(terms * scale * weight));
                            seen.push_back({at, t, weight, dot * scale, dot * scale * weight});
                            most = std::max(most, dot * scale * weight);
                        }
                    }
                    for (const Seen &s : seen) total += std::exp(s.score - most);
                    const double log_sum = seen.empty() ? -infinity : most + std::log(total);
                    l.add({b, y, x, 0, h, 0}, log_sum, seen.empty() ? 0 : 2 * error);
                    double delta = has_grad_lse ? -gl[{b, y, x, 0, h, 0}] : 0, delta_terms = std::fabs(delta);
                    for (Seen &s : seen)
                        for (int64_t e = 0; e < width; ++e) {
                            s.key[5] = e;
                            const double p = std::exp(s.score - log_sum) * s.weight * v[s.key];
                            o.add({b, y, x, 0, h, e}, p, std::fabs(p) * 2 * error);
                            delta += p * g[{b, y, x, 0, h, e}];
                            delta_terms += std::fabs(p * g[{b, y, x, 0, h, e}]);
                        }
                    // The backward gets the output as it was rounded.
                    for (int64_t e = 0; e < width; ++e)
                        delta_terms += std::fabs(o.exact[{b, y, x, 0, h, e}] * g[{b, y, x, 0, h, e}]) *
                                       unit_roundoff(element) / unit_roundoff(wide);
                    for (Seen &s : seen) {
                        const double p = std::exp(s.score - log_sum);
                        double dp = 0, dp_terms = 0;
                        for (int64_t e = 0; e < width; ++e) {
                            s.key[5] = e;
                            const double up = g[{b, y, x, 0, h, e}];
                            dp += up * v[s.key];
                            dp_terms += std::fabs(up * v[s.key]);
                            gv.add(s.key, p * s.weight * up, std::fabs(p * s.weight * up) * 2 * error);
                        }
                        const double ds = p * (dp * s.weight - delta);
                        const double ds_terms = p * (dp_terms * std::fabs(s.weight) + delta_terms) * 2 * error;
                        for (int64_t c = 0; c < channels; ++c) {
                            s.key[5] = c;
                            const double to_query = ds * scale * s.weight * k[s.key];
                            const double to_key = ds * scale * s.weight * q[{b, y, x, 0, h, c}];
                            gq.add({b, y, x, 0, h, c}, to_query, ds_terms * std::fabs(scale * s.weight * k[s.key]));
                            gk.add(s.key, to_key, ds_terms * std::fabs(scale * s.weight * q[{b, y, x, 0, h, c}]));
                        }
                        gw.add({b, region, 0, 0, 0, s.choice}, ds * s.dot + p * dp,
                               ds_terms * (error + std::fabs(s.dot)) + p * dp_terms * error);
                    }
                }

    auto p = LOCALATTN_INIT(localattn_routed_attention_params);
    p.dtype = dtype;
    p.batch = batch;
    p.heads = heads;
    p.channels = channels;
    p.value_channels = width;
    p.has_scale = has_scale;
    p.scale = has_scale ? scale : 0;
    p.query_extent[0] = H;
    p.query_extent[1] = W;
    p.key_extent[0] = Hk;
    p.key_extent[1] = Wk;
    for (int a = 0; a < 2; ++a) {
        p.region_size[a] = rq[a];
        p.kv_region_size[a] = same ? 0 : rk[a];
    }
    p.topk = topk;
    // The tests' axes are three, of which these maps use the first two.
    const auto view = [](Memory &m) {
        localattn_tensor t = m.view(3);
        return t;
    };
    p.query = view(query);
    p.key = view(key);
    p.value = view(value);
    p.region_index.data = index.data();
    p.region_index.batch_stride = regions * topk;
    p.region_index.spatial_stride[0] = topk;
    p.region_index.channel_stride = 1;
    if (weighted) p.region_weight = view(weights);
    p.output = view(output);
    p.lse = view(lse);
    const auto run = [&](localattn_pass pass, std::vector<Written> results) {
        std::vector<std::string> found;
        operation.check(p, variant, pass, results, element, 32, seed, found);
        for (const std::string &text : found)
            failures.push_back((pass == LOCALATTN_FORWARD ? "forward: " : "backward: ") + text);
    };
    run(LOCALATTN_FORWARD, {o, l});
    p.grad_output = view(grad_output);
    if (has_grad_lse) p.grad_lse = view(grad_lse);
    p.grad_query = view(grad_query);
    p.grad_key = view(grad_key);
    p.grad_value = view(grad_value);
    std::vector<Written> gradients = {gq, gk, gv};
    if (weighted) {
        p.grad_region_weight = view(grad_weight);
        gradients.push_back(gw);
    }
    run(LOCALATTN_BACKWARD, gradients);

    // An infinite score makes the log-sum-exp infinite and the output NaN, of the queries that see it alone.
    if (plain && regions > 0 && topk > 0 && batch > 0 && chance(random, 30)) {
        key.set({0, 0, 0, 0, 0, 0}, infinity);  // of region 0
        p.has_scale = 1;
        p.scale = 0.5;
        p.region_weight = {};
        localattn_context context = LOCALATTN_INIT(localattn_context);
        context.variant = variant.c_str();
        context.device_type = device_of(variant);
        const localattn_status status = localattn_routed_attention_forward(&context, &p);
        int wrong = status != LOCALATTN_OK && status != LOCALATTN_UNSUPPORTED;
        const Dense logs = lse.dense(), rows = output.dense();
        for (int64_t y = 0; y < H && status == LOCALATTN_OK; ++y)
            for (int64_t x = 0; x < W; ++x) {
                const auto chosen = index.begin() + (y / rq[0] * grid[1] + x / rq[1]) * topk;
                const bool sees = std::find(chosen, chosen + topk, 0) != chosen + topk;
                const double log = logs[{0, y, x, 0, 0, 0}], first = rows[{0, y, x, 0, 0, 0}];
                const double factor = query.get({0, y, x, 0, 0, 0});
                if (sees && factor == 0) continue;  // 0 times infinity
                wrong += sees && factor > 0 ? log != infinity || !std::isnan(first)
                                            : std::isnan(log) || log == infinity || !std::isfinite(first);
            }
        if (wrong) failures.push_back("an infinite score is not told by " + std::to_string(wrong) + " queries");
    }

    // An index out of range is told before anything is computed: by the call, or, on a device, by a kernel, which on a
    // GPU would end this process' use of it.
    if (!on_gpu && regions > 0 && topk > 0 && batch > 0 && chance(random, 10)) {
        const size_t which = random() % size_t(batch * regions * topk);
        index[which] = chance(random, 50) ? -1 : regions;
        output.poison();
        const Bytes before = output.bytes();
        localattn_context context = LOCALATTN_INIT(localattn_context);
        context.variant = variant.c_str();
        context.device_type = device_of(variant);
        const bool by_call = context.device_type == LOCALATTN_CPU;
        const localattn_status status = localattn_routed_attention_forward(&context, &p);
        const bool right =
            status == (by_call ? LOCALATTN_INVALID_ARGUMENT : LOCALATTN_INTERNAL_ERROR) &&
            std::string(localattn_last_error()).find(by_call ? "region_index at batch" : "region_index must be") == 0;
        if (!right && (by_call || status != LOCALATTN_UNSUPPORTED))
            failures.push_back("an index out of range is not refused");
        if (output.bytes() != before) failures.push_back("a refused call has written");
    }

    std::ostringstream text;
    text << "dtype " << dtype << " batch " << batch << " heads " << heads << " channels " << channels << "/" << width
         << " grid " << grid[0] << "x" << grid[1] << " regions " << rq[0] << "x" << rq[1] << "/" << rk[0] << "x"
         << rk[1] << " topk " << topk << (weighted ? " weighted" : "") << (has_grad_lse ? " grad_lse" : "") << " scale "
         << scale << (plain ? " contiguous" : " strided") << " magnitude " << magnitude;
    return text.str();
}

}  // namespace

int main(int argc, char **argv) { return run_random("test_routed_attention", argc, argv, 600, check); }
