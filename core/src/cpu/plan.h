// How the vector kernels walk a problem. All of it is plain integer work in baseline code.
//
// Every pass pairs an accumulating side A, of which a register tile is finished at a time, with a walked side B, whose
// rows are packed into a ring: the forward and the query gradient have A = query, B = key; the key and value gradients
// have A = key, B = query, over the transposed window. Pairs are found along each axis on its own:
//
//   rows (axes 0 and 1): each side's rows are sorted by residue class, so that the rows of B that a row of A pairs with
//     are one interval of B's list, and neighbours in A's list have neighbouring intervals, whatever the stride,
//     dilation, border or ratio of extents.
//   lanes (axis 2): positions are cut into `phases`, position = period * lane + phase, with periods chosen so that from
//     one lane to the next the window moves by exactly one lane of the other side. Then entry e of all lanes of a tile
//     lies at consecutive packed positions of one phase of B: a `slot`. Only near borders do lanes of a tile differ
//     (shifted or cut windows); there a slot has a mask of the lanes that it serves. Windows that are dilated and
//     nothing else need no phases: the next entry's slot is `step` positions on.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../problem.h"

namespace localattn::cpu {

// Rounded up; b > 0.
int64_t ceil_div(int64_t a, int64_t b);
// At least so many elements of `element` bytes: an odd number of cache lines, so that rows or channels as far apart do
// not fall into the same sets.
int64_t odd_lines(int64_t elements, int element);

// Hands out 64-byte aligned pieces of one block; over no block it only counts, which gives the workspace's size.
class Arena {
public:
    explicit Arena(void *base) : base_(static_cast<char *>(base)) {}
    template <class T>
    T *take(int64_t count) {
        char *piece = base_ ? base_ + used_ : nullptr;
        used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return reinterpret_cast<T *>(piece);
    }
    size_t used() const { return used_; }
    bool counting() const { return base_ == nullptr; }

private:
    char *base_;
    size_t used_ = 0;
};

// One side's rows along one axis, sorted by class and then by position. Intervals are of the other side's list.
struct RowList {
    int64_t count = 0;
    int64_t *position = nullptr;
    int64_t *begin = nullptr, *end = nullptr;  // rows paired with this one
    int64_t *chain = nullptr;                  // [classes + 1], where each class begins
};
struct RowAxis {
    RowList query, key;
    int64_t classes = 0;
    // Of each query row, as positions in the key list that may lie outside its class: window entry 0, the centre, and
    // the entries present (with border zero a superset of begin, end).
    int64_t *first = nullptr, *centre = nullptr, *present_begin = nullptr, *present_end = nullptr;
    int64_t longest_query_chain = 0, longest_key_chain = 0;
};
RowAxis make_row_axis(const Axis &, Arena &);

enum class Side { query, key };

struct LaneAxis {
    Axis axis;
    int64_t query_period = 1, key_period = 1;
    int64_t step = 1;  // lanes from an entry of a window to the next
    // Bounds of (key position - key_period * query lane) over all pairs present.
    int64_t lowest = 0, highest = 0;
    // Queries whose windows no border moves or cuts: [inner_begin, inner_end).
    int64_t inner_begin = 0, inner_end = 0;

    int64_t period(Side s) const { return s == Side::query ? query_period : key_period; }
    int64_t extent(Side s) const { return s == Side::query ? axis.queries : axis.keys; }
    int64_t lanes(Side s) const { return (extent(s) + period(s) - 1) / period(s); }
    // Bounds of (B lane - A lane) over all pairs.
    int64_t lowest_offset(Side a) const;
    int64_t highest_offset(Side a) const;
    int64_t most_slots(Side a) const;

    int64_t position(Side s, int64_t phase, int64_t lane) const { return period(s) * lane + phase; }
};

// Slots at packed positions one step apart.
struct LaneRun {
    int32_t slot, count;
    int64_t phase, offset;  // of B, and B lane - A lane in steps, of the first slot
    int64_t column;         // of the first slot, as below
};

// How the lanes of a tile pair with B. Tiles away from the borders share one pattern per phase.
struct LanePattern {
    int32_t slots, runs;
    bool masks_scores;  // some lane lacks some slot
    bool masks_values;  // and that slot holds a real element there
    bool alike;         // the lanes that have an entry in a slot all have the same one: shared[slot]
    bool uniform;       // alike, and all lanes have one in every slot
    LaneRun *run;
    int64_t *column;    // [slots] packed position of lane 0, less LaneTile::column
    int64_t *query;     // [slots] query position of lane 0, less LaneTile::query; lane l is at + query_period * l
    int32_t *relative;  // [slots] key - centre + kernel - 1 in dilated coordinates
    int32_t *shared;    // [slots]
    int32_t *entry;     // [slots][lanes] window entry along this axis, -1 where the pair does not exist
    void *mask;         // [slots][lanes] of integers as wide as an element: all ones where the pair exists
    void *raster_mask;  // the same, entries up to the centre only; NULL unless the problem is raster causal
};

// `lanes` neighbouring lanes of one phase of A, starting at `lane`.
struct LaneTile {
    int64_t phase, lane;
    int32_t count;  // lanes that exist; the results of the others are thrown away
    int64_t column, query;
    const LanePattern *pattern;
    LanePattern own;
};

// What one pass of one problem needs to know, the same for all workers.
struct Plan {
    const Problem *problem = nullptr;
    Side a = Side::query;
    int lanes = 0, element = 0;  // of a register: lanes, bytes of one
    int block_rows = 0;          // rows of A per register tile
    int tiles_at_once = 1;  // where that is one row, neighbouring tiles, which mostly read the same of B, go together
    RowAxis axis0, axis1;
    LaneAxis lane_axis;

    int64_t strips = 0, strip_tiles = 0;  // tiles along the lanes; each strip has all phases
    int64_t halo_tiles = 0;               // tiles on either side of the strip that it knows as well
    int64_t lead = 0;                     // packed lanes of B before the strip's first
    int64_t phase_stride = 0;             // packed positions per phase of B
    int64_t packed = 0;                   // packed positions per channel: a row of B is [channels][packed]
    int64_t most_slots = 0;
    int64_t ring0 = 0, ring1 = 0;  // rows of B held, along axis 0 and axis 1
    int64_t chunk_rows = 0;        // rows of B per chunk of scores
    bool chunked = false;          // one block's rows do not all fit a chunk

    // With a window along axis 0, a job goes through all of axis 0 for one block of rows, so that the packed rows of
    // neighbouring planes are there already; without, through a segment of rows for one plane.
    bool sweeps = false;
    int64_t segments = 0;
    int64_t *segment = nullptr;  // [segments + 1] of A's list along axis 1; none spans two classes
    int64_t a_heads = 0;         // heads a job is about: query heads, or kv heads when A = key
    int64_t jobs = 0;

    const RowList &rows0(Side s) const { return s == Side::query ? axis0.query : axis0.key; }
    const RowList &rows1(Side s) const { return s == Side::query ? axis1.query : axis1.key; }
    const RowList &rows0() const { return rows0(a); }
    const RowList &rows1() const { return rows1(a); }
    Side b() const { return a == Side::query ? Side::key : Side::query; }
    int64_t strip_lanes() const { return strip_tiles * lanes; }
};

struct Job {
    int64_t batch, head, segment, strip;
    int64_t row0_begin, row0_end;  // of A's list along axis 0
};

struct PlanOptions {
    Side a = Side::query;
    int lanes = 0, element = 0, block_rows = 0;
    int32_t workers = 1, jobs_each = 4;  // as many jobs for each worker, if none gets too short
    int64_t ring_bytes = 0;              // what the ring may take: sized to the L2 cache
    int64_t score_bytes = 0;             // what one chunk's scores may take
    bool whole_rows = true;              // scores of all rows at once where they fit (softmax), else few rows at a time
    int64_t strip_tiles = 0;             // 0: as wide as the ring allows
    int64_t halo_tiles = 0;
    bool groups_tiles = false;  // tiles of a single row may go together
    int64_t sweep_rows = 1;     // rows of A per job where jobs sweep axis 0, if a block has fewer
    int64_t margin = 0;         // lanes of B packed on either side of the strip, if its tiles do not need more
};
LaneAxis make_lane_axis(const Problem &, const PlanOptions &);
Plan make_plan(const Problem &, const PlanOptions &, Arena &);
Job job_of(const Plan &, int64_t index);

// How many rows of B `block` neighbouring rows of one class of A pair with, at most; those outside the map count where
// they stay in the softmax. Exact, except for dilated windows between maps of different extents.
int64_t span_of(const Axis &, Side a, const RowAxis &, int64_t block);
// Rows of A per register tile, at most `most`: blocks of equal height, as 14 rows are 5 + 5 + 4, not 6 + 6 + 2.
int block_rows_of(int64_t longest_chain, int most);

// Memory for the tiles of one strip, and the tiles themselves, [phase][tile], those of the halo included; these pair
// with the strip's own lanes of B only.
LaneTile *take_tiles(const Plan &, Arena &);
void build_tiles(const Plan &, int64_t strip, LaneTile *);
// First lane of B that a strip's packed rows hold; position of phase 0 at packed column 0.
int64_t first_packed_lane(const Plan &, int64_t strip);
inline int64_t tiles_in_strip(const Plan &plan) {
    return (plan.strip_tiles + 2 * plan.halo_tiles) * plan.lane_axis.period(plan.a);
}

}  // namespace localattn::cpu
