#include "plan.h"

#include <algorithm>
#include <numeric>

namespace localattn::cpu {

namespace {

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

}  // namespace

int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

int64_t odd_lines(int64_t elements, int element) {
    const int64_t line = 64 / element;
    return (ceil_div(elements, line) | 1) * line;
}

namespace {

void take_list(RowList &list, int64_t count, int64_t classes, Arena &arena) {
    list.count = count;
    list.position = arena.take<int64_t>(count);
    list.begin = arena.take<int64_t>(count);
    list.end = arena.take<int64_t>(count);
    list.chain = arena.take<int64_t>(classes + 1);
}

}  // namespace

RowAxis make_row_axis(const Axis &axis, Arena &arena) {
    RowAxis rows;
    rows.classes = std::min(axis.dilation, axis.keys);
    take_list(rows.query, axis.queries, rows.classes, arena);
    take_list(rows.key, axis.keys, rows.classes, arena);
    rows.first = arena.take<int64_t>(axis.queries);
    rows.centre = arena.take<int64_t>(axis.queries);
    rows.present_begin = arena.take<int64_t>(axis.queries);
    rows.present_end = arena.take<int64_t>(axis.queries);
    rows.longest_key_chain = ceil_div(axis.keys, axis.dilation);
    // Exact without dilation; with it, each key is the centre of at most ceil(Lq / Lk) queries.
    rows.longest_query_chain = axis.dilation == 1
                                   ? axis.queries
                                   : std::min(axis.queries, rows.longest_key_chain * ceil_div(axis.queries, axis.keys));
    if (arena.counting()) return rows;

    int64_t next = 0;
    for (int64_t g = 0; g < rows.classes; ++g) {
        rows.key.chain[g] = next;
        for (int64_t j = g; j < axis.keys; j += axis.dilation) rows.key.position[next++] = j;
    }
    rows.key.chain[rows.classes] = next;

    // A stable counting sort of the queries by class.
    std::fill(rows.query.chain, rows.query.chain + rows.classes + 1, 0);
    for (int64_t i = 0; i < axis.queries; ++i) ++rows.query.chain[centre_of(axis, i) % axis.dilation + 1];
    for (int64_t g = 0; g < rows.classes; ++g) rows.query.chain[g + 1] += rows.query.chain[g];
    for (int64_t i = 0; i < axis.queries; ++i) {
        const int64_t g = centre_of(axis, i) % axis.dilation;
        rows.query.position[rows.query.chain[g]++] = i;
    }
    for (int64_t g = rows.classes; g > 0; --g) rows.query.chain[g] = rows.query.chain[g - 1];
    rows.query.chain[0] = 0;

    for (int64_t g = 0; g < rows.classes; ++g) {
        const int64_t keys = rows.key.chain[g];
        int64_t from = rows.query.chain[g], to = from;  // queries whose windows hold the key at hand
        for (int64_t a = rows.query.chain[g]; a < rows.query.chain[g + 1]; ++a) {
            const Window w = window_of(axis, rows.query.position[a]);
            rows.first[a] = keys + w.start;
            rows.centre[a] = keys + w.centre;
            rows.query.begin[a] = keys + w.start + w.begin;
            rows.query.end[a] = keys + w.start + w.end;
            rows.present_begin[a] = keys + w.start + w.present_begin;
            rows.present_end[a] = keys + w.start + w.present_end;
        }
        for (int64_t b = keys; b < rows.key.chain[g + 1]; ++b) {
            while (from < rows.query.chain[g + 1] && rows.query.end[from] <= b) ++from;
            to = std::max(to, from);
            while (to < rows.query.chain[g + 1] && rows.query.begin[to] <= b) ++to;
            rows.key.begin[b] = from;
            rows.key.end[b] = to;
        }
    }
    return rows;
}

// With dilation as phases or, if `steps` and nothing else needs phases, as steps.
static LaneAxis make_lane_axis(const Axis &axis, bool steps) {
    LaneAxis lane;
    lane.axis = axis;
    if (steps && axis.kernel > 1 && axis.stride == 1 && axis.queries == axis.keys && axis.dilation < axis.keys)
        lane.step = axis.dilation;
    const int64_t common = std::gcd(axis.queries, axis.keys);
    const int64_t p = axis.queries / common, q = axis.keys / common;
    // A period of the extent means one lane, as would any longer one, whose product might not fit.
    const int64_t apart = axis.dilation / lane.step * axis.stride;
    const int64_t step = apart >= axis.keys ? axis.keys : std::lcm(q, apart);
    if (step >= axis.keys) {
        lane.key_period = axis.keys;
        lane.query_period = axis.queries;
    } else {
        lane.key_period = step;
        lane.query_period = step / q * p;
    }
    // A window is moved or cut if the same axis without ends would give another one.
    const auto untouched = [&](const Window &w) {
        const int64_t leader = w.centre / axis.stride * axis.stride + (axis.causal ? axis.stride - 1 : axis.stride / 2);
        const int64_t start = leader - (axis.causal ? axis.kernel - 1 : axis.kernel / 2);
        return start == w.start && start >= 0 && (axis.causal || start + axis.kernel <= w.length);
    };
    // Away from the ends one period is like the next, so that the ends and one period between them tell all.
    const int64_t entries = axis.kernel + axis.stride + 2;
    int64_t end = axis.queries;
    if (entries < axis.keys / axis.dilation)
        end = ceil_div(entries * axis.dilation * axis.queries, axis.keys) + lane.query_period;
    const bool long_axis = end < axis.queries / 2 - lane.query_period;
    lane.inner_end = axis.queries;
    for (int64_t i = 0; i < axis.queries; ++i) {
        if (long_axis && i == end + lane.query_period) i = axis.queries - end;
        const Window w = window_of(axis, i);
        if (!untouched(w)) {
            if (i < axis.queries / 2)
                lane.inner_begin = i + 1;
            else
                lane.inner_end = std::min(lane.inner_end, i);
        }
        if (w.present_begin >= w.present_end) continue;
        const int64_t base = w.residue - lane.key_period * (i / lane.query_period);
        lane.lowest = std::min(lane.lowest, base + axis.dilation * (w.start + w.present_begin));
        lane.highest = std::max(lane.highest, base + axis.dilation * (w.start + w.present_end - 1));
    }
    return lane;
}

LaneAxis make_lane_axis(const Problem &problem, const PlanOptions &options) {
    // Tiles of a single row go together where they read consecutive columns.
    const bool single = problem.axis[1].queries == 1 && problem.axis[1].keys == 1;
    return make_lane_axis(problem.axis[2], !single || !options.groups_tiles);
}

// With A = query a pair's key is at key_period * (query lane) + r with lowest <= r <= highest; with A = key, at
// key_period * (key lane) + phase, so that the query's lane is key lane + (phase - r) / key_period.
int64_t LaneAxis::lowest_offset(Side a) const {
    return a == Side::query ? floor_div(lowest, key_period) : ceil_div(-highest, key_period);
}
int64_t LaneAxis::highest_offset(Side a) const {
    return a == Side::query ? floor_div(highest, key_period) : floor_div(key_period - 1 - lowest, key_period);
}
int64_t LaneAxis::most_slots(Side a) const {
    if (a == Side::query) return (highest - lowest) / axis.dilation + 1;
    return query_period * ((highest - lowest) / (key_period * step) + 1);
}

namespace {

// span_of for one class of rows, an axis without dilation.
int64_t span_in_class(const Axis &axis, Side a, int64_t block) {
    int64_t most = 1, last = 0;
    for (int64_t first = 0; first < axis.queries; ++first) {
        const Window w = window_of(axis, first);
        if (w.present_begin >= w.present_end) continue;
        if (a == Side::query) {
            for (last = std::min(first + block, axis.queries) - 1; last > first; --last)
                if (const Window v = window_of(axis, last); v.present_begin < v.present_end) break;
            const Window v = window_of(axis, last);
            most = std::max(most, v.start + v.present_end - w.start - w.present_begin);
        } else if (w.begin < w.end) {
            // Keys from the last one of this window on.
            const int64_t end = w.start + w.end - 1 + block;
            for (last = std::max(last, first); last + 1 < axis.queries; ++last)
                if (const Window v = window_of(axis, last + 1); v.begin < v.end && v.start + v.begin >= end) break;
            most = std::max(most, last - first + 1);
        }
    }
    return most;
}

}  // namespace

int64_t span_of(const Axis &axis, Side a, const RowAxis &rows, int64_t block) {
    const bool from_queries = a == Side::query;
    if (axis.dilation == 1) return span_in_class(axis, a, block);
    if (axis.queries == axis.keys) {
        // Classes are of two lengths at most.
        Axis one = axis;
        one.dilation = 1;
        one.queries = one.keys = rows.longest_key_chain;
        const int64_t most = span_in_class(one, a, block);
        one.queries = one.keys = axis.keys / axis.dilation;
        return std::max(most, span_in_class(one, a, block));
    }
    // Rows of one class step through the other side's at most this fast.
    const int64_t k = axis.kernel, s = axis.stride;
    const int64_t step = from_queries ? ceil_div(axis.keys, axis.queries) : ceil_div(axis.queries, axis.keys);
    int64_t most = (from_queries ? k + 2 * s : (k + 2 * s) * step) + (block + 1) * step + 1;
    if (!from_queries && (axis.border == Border::shift || axis.causal)) most += (k + s) * step;
    const int64_t longest = from_queries ? rows.longest_key_chain : rows.longest_query_chain;
    return from_queries && axis.border == Border::zero ? most : std::min(most, longest);
}

int block_rows_of(int64_t longest_chain, int most) {
    return static_cast<int>(ceil_div(longest_chain, ceil_div(longest_chain, most)));
}

Plan make_plan(const Problem &problem, const PlanOptions &options, Arena &arena) {
    Plan plan;
    plan.problem = &problem;
    plan.a = options.a;
    plan.lanes = options.lanes;
    plan.element = options.element;
    plan.axis0 = make_row_axis(problem.axis[0], arena);
    plan.axis1 = make_row_axis(problem.axis[1], arena);
    plan.lane_axis = make_lane_axis(problem, options);
    const LaneAxis &lane = plan.lane_axis;
    const Side a = plan.a, b = plan.b();
    plan.most_slots = lane.most_slots(a);

    // Rows of A that one block can have, and rows of B that such a block can pair with.
    const Axis &axis1 = problem.axis[1];
    const bool from_queries = a == Side::query;
    const int64_t chain1 = from_queries ? plan.axis1.longest_query_chain : plan.axis1.longest_key_chain;
    plan.block_rows = block_rows_of(chain1, options.block_rows);
    if (options.groups_tiles && plan.block_rows == 1 && !problem.raster) plan.tiles_at_once = options.block_rows;
    plan.sweeps = problem.axis[0].kernel > 1 && plan.rows0().count > 1;
    const int64_t span0 = span_of(problem.axis[0], a, plan.axis0, 1);
    const int64_t span1 = span_of(axis1, a, plan.axis1, plan.block_rows);

    // Strips as wide as the ring's budget allows, balanced; one tile at least.
    const int64_t tiles = ceil_div(lane.lanes(a), plan.lanes);
    plan.halo_tiles = options.halo_tiles;
    plan.lead = -lane.lowest_offset(a);
    int64_t trail = lane.highest_offset(a);
    if (options.margin > 0) {
        plan.lead = std::max(plan.lead, options.margin);
        trail = std::max(trail, options.margin);
    }
    const int64_t offsets = plan.lead + trail;
    const int64_t channels = problem.channels + problem.value_channels;
    const auto packed_positions = [&](int64_t strip_tiles) {
        const int64_t phase = ceil_div(strip_tiles * plan.lanes + offsets, plan.lanes) * plan.lanes;
        return odd_lines(phase * lane.period(b), plan.element);
    };
    const auto ring_bytes = [&](int64_t strip_tiles) {
        return span0 * span1 * channels * packed_positions(strip_tiles) * plan.element;
    };
    int64_t wide = std::max<int64_t>(1, options.strip_tiles);
    // What a strip shares with the next ones is packed for each of them: a wider ring costs less than more of that.
    const auto budget = [&](int64_t strip_tiles) {
        return strip_tiles * plan.lanes <= offsets ? options.ring_bytes * 5 / 2 : options.ring_bytes;
    };
    while (options.strip_tiles == 0 && wide < tiles && ring_bytes(wide + 1) <= budget(wide)) ++wide;
    plan.strips = ceil_div(tiles, wide);
    plan.strip_tiles = ceil_div(tiles, plan.strips);
    plan.strips = ceil_div(tiles, plan.strip_tiles);
    plan.phase_stride = ceil_div(plan.strip_tiles * plan.lanes + offsets, plan.lanes) * plan.lanes;
    if (plan.strips == 1) {
        // Nothing but zeros on either side: whole registers of them before each phase are also what follows the one
        // before, and what exists fills as few registers as can be.
        plan.lead = ceil_div(std::max(plan.lead, trail), plan.lanes) * plan.lanes;
        plan.phase_stride = plan.lead + plan.strip_tiles * plan.lanes;
    }
    plan.packed = odd_lines(plan.phase_stride * lane.period(b), plan.element);

    const int64_t row_bytes = channels * plan.packed * plan.element;
    const int64_t score_row_bytes = plan.block_rows * plan.most_slots * plan.lanes * plan.element;
    const int64_t ring_rows = std::max<int64_t>(1, 2 * options.ring_bytes / row_bytes);
    const int64_t score_rows = std::max<int64_t>(1, options.score_bytes / std::max<int64_t>(1, score_row_bytes));
    if (span0 * span1 <= ring_rows) {
        plan.ring0 = span0;
        plan.ring1 = span1;
    } else {
        plan.ring0 = 1;
        plan.ring1 = std::min(span1, ring_rows);
    }
    plan.chunk_rows = span0 * span1;
    plan.chunked = !options.whole_rows || plan.chunk_rows > score_rows || span0 * span1 > plan.ring0 * plan.ring1;
    if (plan.chunked) plan.chunk_rows = std::min({plan.chunk_rows, score_rows, plan.ring1});

    // Segments: enough jobs for every worker to have several, none so short that refilling the ring dominates.
    const RowAxis &rows = plan.axis1;
    const int64_t rows_a = plan.rows1().count;
    plan.a_heads = from_queries ? problem.heads : problem.kv_heads;
    const int64_t planes = plan.sweeps ? 1 : plan.rows0().count;
    const int64_t others = problem.batch * plan.a_heads * planes * plan.strips * rows.classes;
    const int64_t shortest = std::max<int64_t>(plan.block_rows, span1 + span1 / 2 - plan.block_rows);
    int64_t parts = 1;
    while (others * parts < options.jobs_each * options.workers && chain1 / (parts + 1) >= shortest) ++parts;
    int64_t length = plan.sweeps ? std::max<int64_t>(plan.block_rows, options.sweep_rows)
                                 : std::max<int64_t>(1, ceil_div(chain1, parts));
    length = ceil_div(length, plan.block_rows) * plan.block_rows;
    const int64_t most_segments = rows_a / length + rows.classes;
    plan.segment = arena.take<int64_t>(most_segments + 1);
    if (!arena.counting()) {
        const int64_t *chain = plan.rows1().chain;
        plan.segments = 0;
        for (int64_t g = 0; g < rows.classes; ++g)
            for (int64_t row = chain[g]; row < chain[g + 1]; row += length) plan.segment[plan.segments++] = row;
        plan.segment[plan.segments] = rows_a;
        plan.jobs = problem.batch * plan.a_heads * planes * plan.strips * plan.segments;
    }
    return plan;
}

Job job_of(const Plan &plan, int64_t index) {
    Job job;
    job.segment = index % plan.segments;
    index /= plan.segments;
    job.head = index % plan.a_heads;
    index /= plan.a_heads;
    job.row0_begin = 0;
    job.row0_end = plan.rows0().count;
    if (!plan.sweeps) {
        job.row0_begin = index % plan.rows0().count;
        job.row0_end = job.row0_begin + 1;
        index /= plan.rows0().count;
    }
    job.batch = index % plan.problem->batch;
    job.strip = index / plan.problem->batch;
    return job;
}

int64_t first_packed_lane(const Plan &plan, int64_t strip) { return strip * plan.strip_lanes() - plan.lead; }

namespace {

void set_mask(void *mask, int element, int64_t cell, bool value) {
    if (element == 4)
        static_cast<int32_t *>(mask)[cell] = value ? -1 : 0;
    else
        static_cast<int64_t *>(mask)[cell] = value ? -1 : 0;
}

// Adds to the tile's own pattern the slot whose B elements have this phase and are `offset` lanes on, if any lane of
// the tile pairs with it.
void add_slot(const Plan &plan, int64_t b_phase, int64_t offset, LaneTile &tile) {
    const LaneAxis &lane = plan.lane_axis;
    const Axis &axis = lane.axis;
    LanePattern &pattern = tile.own;
    const Side a = plan.a, b = plan.b();
    const int64_t cell = static_cast<int64_t>(pattern.slots) * plan.lanes;
    bool any = false, lacks = false, lacks_real = false;
    for (int l = 0; l < plan.lanes; ++l) {
        const int64_t a_position = lane.position(a, tile.phase, tile.lane + l);
        const int64_t b_position = lane.position(b, b_phase, tile.lane + l + offset);
        const int64_t query = a == Side::query ? a_position : b_position;
        const int64_t key = a == Side::query ? b_position : a_position;
        int64_t u = -1;
        if (l < tile.count && query >= 0 && query < axis.queries) {
            const Window w = window_of(axis, query);
            const int64_t distance = key - (w.residue + axis.dilation * w.start);
            if (distance % axis.dilation == 0 && distance / axis.dilation >= w.present_begin &&
                distance / axis.dilation < w.present_end) {
                u = distance / axis.dilation;
                any = true;
                pattern.relative[pattern.slots] =
                    static_cast<int32_t>((key - w.residue) / axis.dilation - w.centre + axis.kernel - 1);
            }
        }
        pattern.entry[cell + l] = static_cast<int32_t>(u);
        // Lanes beyond the map take part in anything: their results are thrown away.
        const bool paired = u >= 0 || l >= tile.count;
        set_mask(pattern.mask, plan.element, cell + l, paired);
        if (pattern.raster_mask) set_mask(pattern.raster_mask, plan.element, cell + l, paired && u <= axis.kernel / 2);
        if (!paired) {
            lacks = true;
            lacks_real |= b_position >= 0 && b_position < lane.extent(b);
        }
    }
    if (!any) return;
    int32_t &shared = pattern.shared[pattern.slots] = -1;
    for (int l = 0; l < plan.lanes; ++l) {
        const int32_t entry = pattern.entry[cell + l];
        if (shared < 0) shared = entry;
        pattern.alike &= entry < 0 || entry == shared;
        pattern.uniform &= entry >= 0;
    }
    pattern.uniform &= pattern.alike;
    const int64_t column = b_phase * plan.phase_stride + offset;
    pattern.column[pattern.slots] = column;
    pattern.query[pattern.slots] = a == Side::query ? tile.phase : lane.query_period * offset + b_phase;
    LaneRun *last = pattern.runs > 0 ? &pattern.run[pattern.runs - 1] : nullptr;
    if (last && last->phase == b_phase && last->offset + last->count == offset / lane.step)
        ++last->count;
    else
        pattern.run[pattern.runs++] = {pattern.slots, 1, b_phase, offset / lane.step, column};
    ++pattern.slots;
    pattern.masks_scores |= lacks;
    pattern.masks_values |= lacks_real;
}

// Tile `i` of a phase's in a strip, without its pattern.
LaneTile tile_at(const Plan &plan, int64_t strip, int64_t phase, int64_t i) {
    const LaneAxis &lane = plan.lane_axis;
    LaneTile tile{};
    tile.phase = phase;
    tile.lane = strip * plan.strip_lanes() + i * plan.lanes;
    tile.column = tile.lane - first_packed_lane(plan, strip);
    tile.query = lane.query_period * tile.lane;
    const int64_t period = lane.period(plan.a);
    const int64_t existing = (lane.extent(plan.a) - phase + period - 1) / period - tile.lane;
    tile.count = tile.lane < 0 ? 0 : static_cast<int32_t>(std::clamp<int64_t>(existing, 0, plan.lanes));
    return tile;
}

// Whether the tile has the pattern that all tiles of a phase have whose pairs no border touches.
bool is_inner(const Plan &plan, int64_t strip, int64_t phase, int64_t i) {
    if (i < 0 || i >= plan.strip_tiles) return false;
    const LaneTile tile = tile_at(plan, strip, phase, i);
    const LaneAxis &lane = plan.lane_axis;
    const int64_t low = plan.a == Side::query ? 0 : lane.lowest_offset(plan.a);
    const int64_t high = plan.a == Side::query ? 0 : lane.highest_offset(plan.a);
    return tile.count == plan.lanes && lane.query_period * (tile.lane + low) >= lane.inner_begin &&
           lane.query_period * (tile.lane + plan.lanes + high) <= lane.inner_end;
}

// Whether the tile before it has the same pattern.
bool borrows(const Plan &plan, int64_t strip, int64_t phase, int64_t i) {
    return is_inner(plan, strip, phase, i) && is_inner(plan, strip, phase, i - 1);
}

}  // namespace

LaneTile *take_tiles(const Plan &plan, Arena &arena) {
    const int64_t tiles = tiles_in_strip(plan), of_phase = plan.strip_tiles + 2 * plan.halo_tiles;
    LaneTile *all = arena.take<LaneTile>(tiles);
    const int64_t slots = plan.most_slots + 1;  // one that is written before it proves empty
    const int64_t cells = slots * plan.lanes;
    // Strips that no border touches, up to this one at least, are all alike.
    const LaneAxis &lane = plan.lane_axis;
    const int64_t last_alike =
        (lane.inner_end / lane.query_period - lane.highest_offset(plan.a)) / plan.strip_lanes() - 2;
    for (int64_t index = 0; index < tiles; ++index) {
        const int64_t phase = index / of_phase, i = index % of_phase - plan.halo_tiles;
        LanePattern own{};
        bool needed = false;
        for (int64_t strip = 0; strip < plan.strips && !needed; ++strip) {
            needed = tile_at(plan, strip, phase, i).count > 0 && !borrows(plan, strip, phase, i);
            if (is_inner(plan, strip, phase, 0) && is_inner(plan, strip, phase, plan.strip_tiles - 1))
                strip = std::max(strip, last_alike);
        }
        if (needed) {
            own.run = arena.take<LaneRun>(slots);
            own.column = arena.take<int64_t>(slots);
            own.query = arena.take<int64_t>(slots);
            own.relative = arena.take<int32_t>(slots);
            own.shared = arena.take<int32_t>(slots);
            own.entry = arena.take<int32_t>(cells);
            own.mask = arena.take<char>(cells * plan.element);
            own.raster_mask = plan.problem->raster ? arena.take<char>(cells * plan.element) : nullptr;
        }
        if (!arena.counting()) {
            all[index] = LaneTile{};
            all[index].own = own;
        }
    }
    return all;
}

void build_tiles(const Plan &plan, int64_t strip, LaneTile *tiles) {
    const LaneAxis &lane = plan.lane_axis;
    const Side a = plan.a, b = plan.b();
    for (int64_t phase = 0; phase < lane.period(a); ++phase) {
        const LanePattern *before = nullptr;
        for (int64_t i = -plan.halo_tiles; i < plan.strip_tiles + plan.halo_tiles; ++i) {
            LaneTile &tile = *tiles++;
            const LanePattern own = tile.own;
            tile = tile_at(plan, strip, phase, i);
            tile.own = own;
            if (tile.count == 0) continue;
            if (borrows(plan, strip, phase, i)) {
                tile.pattern = before;
                continue;
            }
            before = tile.pattern = &tile.own;
            tile.own.slots = tile.own.runs = 0;
            tile.own.masks_scores = tile.own.masks_values = false;
            tile.own.alike = tile.own.uniform = true;
            int64_t from = lane.lowest_offset(a), to = lane.highest_offset(a);
            if (i < 0) from = std::max(from, ceil_div(-i * plan.lanes - (plan.lanes - 1), lane.step) * lane.step);
            if (i >= plan.strip_tiles) to = std::min(to, (plan.strip_tiles - i) * plan.lanes - 1);
            for (int64_t b_phase = 0; b_phase < lane.period(b); ++b_phase)
                for (int64_t offset = from; offset <= to; offset += lane.step) add_slot(plan, b_phase, offset, tile);
        }
    }
}

}  // namespace localattn::cpu
