#include "joint_plan.h"

#include <algorithm>

namespace localattn::cpu {

namespace {

// Jobs for each worker, if none gets too short: few, as neighbouring jobs compute some pairs twice.
constexpr int32_t jobs_each = 2;
// What a job holds, wished for and at most: beyond, the passes over one side at a time need less.
constexpr int64_t wished_bytes = int64_t{4} << 20, most_bytes = int64_t{6} << 20;

struct Shape {
    int64_t tiles;        // along the whole axis
    int64_t reached;      // tiles on either side that a tile pairs with
    int64_t offsets;      // of query lanes from key lanes, in steps
    int64_t block;        // rows of keys at once
    int64_t ring0, ring;  // rows of queries held, along axes 0 and 1
    int64_t wide;         // tiles of a strip
    int64_t sweep_rows;   // rows of a job that sweeps axis 0
};

int64_t job_bytes(const Problem &problem, const PlanOptions &options, const LaneAxis &lane, const Shape &s) {
    const int64_t channels = problem.channels + problem.value_channels;
    const auto packed = [&](int64_t margin, int64_t phases) {
        return odd_lines((s.wide * options.lanes + 2 * margin) * phases, options.element);
    };
    const int64_t reached = s.reached * options.lanes, own = s.wide * options.lanes;
    const int64_t queries =
        s.ring0 * s.ring * (channels * packed(reached, lane.query_period) + problem.channels * own * lane.query_period);
    const int64_t keys = s.block * channels * packed(reached, lane.key_period);
    const int64_t sums = s.block * channels * own * lane.key_period;
    const int64_t weights =
        2 * s.block * s.block * lane.query_period * s.offsets * packed(options.lanes, lane.key_period);
    return (queries + keys + sums + weights) * options.element;
}

// The largest jobs that stay within what is wished for; where even the smallest does not, that.
Shape shape_of(const Problem &problem, const PlanOptions &options, const LaneAxis &lane) {
    Arena nothing(nullptr);
    const RowAxis planes = make_row_axis(problem.axis[0], nothing), rows = make_row_axis(problem.axis[1], nothing);
    const bool sweeps = problem.axis[0].kernel > 1 && problem.axis[0].keys > 1;
    const int64_t low = lane.lowest_offset(Side::key), high = lane.highest_offset(Side::key);
    Shape s;
    s.tiles = ceil_div(lane.lanes(Side::key), options.lanes);
    s.reached = ceil_div(std::max(-low, high), options.lanes);
    s.offsets = (high - low) / lane.step + 1;
    s.block = block_rows_of(rows.longest_key_chain, options.block_rows);
    s.ring0 = span_of(problem.axis[0], Side::key, planes, 1);
    s.wide = 1;
    s.sweep_rows = s.block;
    // A multiple of the block, so that a block of query rows is in one piece.
    const auto ring_of = [&](int64_t height) {
        return ceil_div(span_of(problem.axis[1], Side::key, rows, height), s.block) * s.block;
    };
    s.ring = ring_of(s.block);
    const auto fits = [&](const Shape &larger) { return job_bytes(problem, options, lane, larger) <= wished_bytes; };
    for (Shape larger = s; s.wide < s.tiles; s = larger) {
        ++larger.wide;
        if (!fits(larger)) break;
    }
    // Balanced, as make_plan does.
    s.wide = ceil_div(s.tiles, ceil_div(s.tiles, s.wide));
    const int64_t others = problem.batch * problem.kv_heads * ceil_div(s.tiles, s.wide) * rows.classes;
    for (Shape larger = s; sweeps && s.sweep_rows < rows.longest_key_chain; s = larger) {
        larger.sweep_rows += s.block;
        larger.ring = ring_of(larger.sweep_rows);
        const int64_t jobs = others * ceil_div(rows.longest_key_chain, larger.sweep_rows);
        if (!fits(larger) || jobs < jobs_each * options.workers) break;
    }
    return s;
}

// Each query at a key of its own, which it sees.
bool shares_map(const Axis &axis) { return axis.queries == axis.keys && axis.stride == 1; }

}  // namespace

bool joint_takes(const Problem &problem, const PlanOptions &options) {
    if (problem.heads != problem.kv_heads) return false;
    for (const Axis &axis : problem.axis)
        if (axis.queries == 0 || axis.keys == 0) return false;
    const Axis &planes = problem.axis[0];
    // Planes outside the map, of which a bias would have a gradient, are not walked.
    if (problem.has_bias() && (planes.kernel > 1 || !shares_map(planes))) return false;
    // Where jobs sweep planes, the ring holds no query rows but those that pair with the job's keys: all that it owns
    // must be among them.
    if (planes.kernel > 1 && planes.keys > 1 && !shares_map(problem.axis[1])) return false;
    const LaneAxis lane = make_lane_axis(problem, options);
    const Shape s = shape_of(problem, options, lane);
    return job_bytes(problem, options, lane, s) <= most_bytes;
}

JointPlan make_joint_plan(const Problem &problem, PlanOptions options, Arena &arena) {
    const LaneAxis lane = make_lane_axis(problem, options);
    const Shape s = shape_of(problem, options, lane);
    const bool whole = s.wide == s.tiles;
    options.strip_tiles = s.wide;
    options.sweep_rows = s.sweep_rows;
    options.jobs_each = jobs_each;

    JointPlan plan;
    PlanOptions by_query = options;
    by_query.a = Side::query;
    by_query.halo_tiles = whole ? 0 : s.reached;
    by_query.margin = whole ? 0 : options.lanes - 1;
    plan.by_query = make_plan(problem, by_query, arena);
    plan.by_query.ring0 = 1;
    plan.by_query.ring1 = s.block;

    options.a = Side::key;
    // Whole tiles, so that a tile of queries is aligned.
    options.margin = s.reached * options.lanes;
    static_cast<Plan &>(plan) = make_plan(problem, options, arena);
    plan.ring0 = s.ring0;
    plan.ring1 = s.ring;
    plan.offsets = s.offsets;
    plan.lowest = lane.lowest_offset(Side::key) / lane.step;
    plan.planes = lane.query_period * s.offsets;
    plan.plane_phase = (s.wide + 2) * options.lanes;
    plan.plane_columns = odd_lines(plan.plane_phase * lane.key_period, options.element);
    plan.sees_all_keys = true;
    for (const Axis &axis : problem.axis) plan.sees_all_keys &= shares_map(axis);
    return plan;
}

}  // namespace localattn::cpu
