#include "joint_plan.h"

#include <algorithm>

namespace localattn::cpu {

namespace {

// What a job holds, wished for and at most: beyond, the passes over one side at a time need less.
constexpr int64_t wished_bytes = int64_t{4} << 20, most_bytes = int64_t{6} << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t odd_lines(int64_t elements, int element) {
    const int64_t line = 64 / element;
    return (ceil_div(elements, line) | 1) * line;
}

struct Shape {
    int64_t tiles;    // along the whole axis
    int64_t reached;  // tiles on either side that a tile pairs with
    int64_t planes;
    int64_t block, ring;  // rows of keys at once, rows of queries held
};

Shape shape_of(const Problem &problem, const PlanOptions &options, const LaneAxis &lane) {
    Arena nothing(nullptr);
    const RowAxis rows = make_row_axis(problem.axis[1], nothing);
    const int64_t low = lane.lowest_offset(Side::key), high = lane.highest_offset(Side::key);
    Shape s;
    s.tiles = ceil_div(lane.lanes(Side::key), options.lanes);
    s.reached = ceil_div(std::max(-low, high), options.lanes);
    s.planes = high - low + 1;
    s.block = block_rows_of(rows.longest_key_chain, options.block_rows);
    // A multiple of the block, so that a block of query rows is in one piece.
    s.ring = ceil_div(span_of(problem.axis[1], Side::key, rows, s.block), s.block) * s.block;
    return s;
}

// Of strips of `wide` tiles.
int64_t job_bytes(const Problem &problem, const PlanOptions &options, const LaneAxis &lane, const Shape &s,
                  int64_t wide) {
    const int64_t phases = lane.key_period, channels = problem.channels + problem.value_channels;
    const auto packed = [&](int64_t margin) {
        return odd_lines((wide * options.lanes + 2 * margin) * phases, options.element);
    };
    const int64_t queries =
        s.ring * (channels * packed(s.reached * options.lanes) + problem.channels * wide * options.lanes * phases);
    const int64_t keys = s.block * channels * packed(s.reached * options.lanes);
    const int64_t sums = s.block * channels * wide * options.lanes * phases;
    const int64_t weights = 2 * s.block * s.block * s.planes * packed(options.lanes);
    return (queries + keys + sums + weights) * options.element;
}

}  // namespace

bool joint_takes(const Problem &problem, PlanOptions options) {
    if (problem.heads != problem.kv_heads) return false;
    for (const Axis &axis : problem.axis)
        if (axis.queries != axis.keys || axis.stride != 1 || axis.keys == 0) return false;
    if (problem.axis[0].kernel != 1 || problem.axis[0].dilation != 1) return false;
    const LaneAxis lane = make_lane_axis(problem.axis[2]);
    if (lane.key_period != lane.query_period) return false;
    return job_bytes(problem, options, lane, shape_of(problem, options, lane), 1) <= most_bytes;
}

JointPlan make_joint_plan(const Problem &problem, PlanOptions options, Arena &arena) {
    const LaneAxis lane = make_lane_axis(problem.axis[2]);
    const Shape s = shape_of(problem, options, lane);
    int64_t wide = 1;
    while (wide < s.tiles && job_bytes(problem, options, lane, s, wide + 1) <= wished_bytes) ++wide;
    // Balanced, as make_plan does.
    wide = ceil_div(s.tiles, ceil_div(s.tiles, wide));
    const bool whole = wide == s.tiles;
    options.strip_tiles = wide;
    // Neighbouring jobs share more here.
    options.jobs_each = 2;

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
    plan.ring0 = 1;
    plan.ring1 = s.ring;
    plan.planes = s.planes;
    plan.plane_phase = (wide + 2) * options.lanes;
    plan.plane_columns = odd_lines(plan.plane_phase * lane.key_period, options.element);
    return plan;
}

}  // namespace localattn::cpu
