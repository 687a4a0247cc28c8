// Routed attention on tensor cores, for 16-bit floats. Device and launches: arch/sm80_routed_attention.cu. Formulas:
// generic_routed_attention.h. The routing and its inverse: routing.h. Operands of mma: tensor_core_tiles.h.
//
// A warp owns 16 pixels of a region, the m of one mma; a block's warps own pixels of the same region and head. The
// pixels of the regions that it is routed to stream through shared memory, where they lie in the map, 64 at a time, as
// one list of slots: entry by entry (an entry is one chosen region), pixel by pixel. So regions smaller than a stage
// are packed together and nothing is gathered beforehand.
//
//   tensor_core_routed_forward     queries; keys and values stream by
//   tensor_core_routed_grad_query  the same, for dQ and the parts of dw
//   tensor_core_routed_grad_key    keys; queries and grad_outputs of the regions that chose theirs stream by: dK, dV
//
// What a slot means to a score lies beside it in shared memory, so that neither absent slots nor entries with weights
// of their own need a branch.
#pragma once
#include "generic_routed_attention.h"
#include "tensor_core_backward.h"

namespace localattn::cuda {

template <int width_>
struct RoutedTile {
    static constexpr int width = width_, slot_bytes = 2 * width, units = width / 8;  // of 16 bytes
    static constexpr int pixels = 16;                                                // of a warp
    static constexpr int most_warps = 4, most_threads = most_warps * warp_size;
    static constexpr int stage_slots = 64, chunks = stage_slots / 16;
    static constexpr int tensor_bytes = stage_slots * slot_bytes, note_bytes = stage_slots * 16;
    static constexpr int stage_bytes = 2 * tensor_bytes + note_bytes, shared_bytes = 2 * stage_bytes;
    static_assert(width == 32 || width % 64 == 0, "the phases below");
    static_assert(warp_size % units == 0, "a thread copies one unit of every slot it visits");

    GPU_METHOD static constexpr int phase(int slot) { return width == 32 ? slot >> 1 & 3 : slot & 7; }
};

// Division of numbers below 2^31 by a constant of the launch.
struct Divisor {
    uint32_t factor = 0;
    int32_t shift = 0;

    Divisor() = default;
    explicit Divisor(int64_t by) {
        while (int64_t(1) << shift < by) ++shift;
        shift += 31;
        factor = uint32_t(((uint64_t(1) << shift) + uint64_t(by) - 1) / uint64_t(by));
    }
    GPU_METHOD int divide(int x) const { return int(uint64_t(uint32_t(x)) * factor >> shift); }
};

// One of the two maps, cut into regions.
struct RegionMap {
    int32_t rows, columns;  // pixels of a region
    int32_t pixels;
    Divisor by_columns;

    GPU_METHOD int place(int pixel, int row_stride, int column_stride) const {
        const int row = by_columns.divide(pixel);
        return row * row_stride + (pixel - row * columns) * column_stride;
    }
};

template <class T>
struct RoutedView {
    T *data;
    View view;

    GPU_METHOD T *head(int batch, int head) const { return data + (batch * view.batch + head * view.head); }
};

template <class T>
struct RoutedArguments {
    RoutedView<const T> query, key, value, grad_output;
    RoutedView<T> output, grad_query, grad_key, grad_value;  // of the last two, either may be NULL
    RoutedView<float> lse;                                   // or NULL
    Tensor region_index, region_weight;
    RegionMap queries, keys;
    Divisor by_grid_columns;
    int32_t grid_columns, regions, topk, heads, channels, value_channels;
    int32_t blocks;  // of a region's pixels
    // Slots of an entry: its pixels, or more, where every 16 slots must belong to one entry.
    int32_t entry_slots;
    Divisor by_entry_slots;
    float scale;
    const Statistics *statistics;  // of the queries, in the order of Site::at
    InverseRouting inverse;
    float *weight_parts;  // (batch, regions, topk, heads, blocks * warps), or NULL

    GPU_METHOD int region_place(const RegionMap &map, const View &view, int region) const {
        const int row = by_grid_columns.divide(region);
        return row * map.rows * view.row + (region - row * grid_columns) * map.columns * view.column;
    }
    GPU_METHOD int offset(const RegionMap &map, const View &view, int region, int pixel) const {
        return region_place(map, view, region) + map.place(pixel, view.row, view.column);
    }
    GPU_METHOD float weight(int batch, int region, int choice) const {
        if (!region_weight.data) return 1;
        return widen(static_cast<const T *>(
            region_weight.data)[RoutedProblem::choice_offset(region_weight, batch, region, choice)]);
    }
    GPU_METHOD const Statistics &statistics_of(int batch, int head, int region, int pixel) const {
        return statistics[((int64_t(batch) * regions + region) * queries.pixels + pixel) * heads + head];
    }
};

// Which pixels a block and its warps own.
struct RoutedPlace {
    int batch, head, region, first;  // pixel of the warp

    template <class T>
    GPU_METHOD explicit RoutedPlace(const RoutedArguments<T> &a) {
        int block = block_index().x;
        first = block % a.blocks * (block_threads() / warp_size) * 16 + uniform(thread_index() / warp_size) * 16;
        block /= a.blocks;
        region = block % a.regions;
        block /= a.regions;
        head = block % a.heads;
        batch = block / a.heads;
    }
    // Of row r (0 or 1) of this lane's accumulators.
    GPU_METHOD int pixel(int r) const { return first + lane_index() / 4 + 8 * r; }
};

// Beside a slot: score -> score * factor + addend is its part of the softmax's exponent, in base 2, before the row's
// maximum or log-sum-exp; values weigh `weight`. In the key pass a slot is a query: minus its log-sum-exp is the
// addend, and `delta` its own.
struct Note {
    float factor, addend, weight, delta;
};
GPU_FUNCTION void write_note(SharedAddress notes, int slot, const Note &note) {
    const SharedAddress to = notes + SharedAddress(16 * slot);
    store_shared_number(to, note.factor);
    store_shared_number(to + 4, note.addend);
    store_shared_number(to + 8, note.weight);
    store_shared_number(to + 12, note.delta);
}
// Of the slot that accumulator [n][2 * r + b] of the chunk belongs to.
GPU_FUNCTION Note read_note(SharedAddress notes, int chunk, int n, int b) {
    float values[4];
    load_shared(values, notes + SharedAddress(16 * (16 * chunk + 8 * n + lane_index() % 4 * 2 + b)));
    return {values[0], values[1], values[2], values[3]};
}

// The entries of a block in the forward and the query pass: the region's own choices.
template <class T>
struct ChosenRegions {
    const RoutedArguments<T> &a;
    int batch, head, region;

    GPU_METHOD int count() const { return a.topk; }
    GPU_METHOD const RegionMap &map() const { return a.keys; }
    GPU_METHOD int region_of(int entry) const {
        return int(static_cast<const int64_t *>(
            a.region_index.data)[RoutedProblem::choice_offset(a.region_index, batch, region, entry)]);
    }
    GPU_METHOD Note note(int entry, int) const {
        const float weight = a.weight(batch, region, entry);
        return {weight * (a.scale * log2_of_e), 0, weight, 0};
    }
};

// And in the key pass: the choices that fell on the region.
template <class T>
struct ChoosingRegions {
    const RoutedArguments<T> &a;
    int batch, head;
    int64_t first;
    int entries;

    GPU_METHOD ChoosingRegions(const RoutedArguments<T> &arguments, int batch, int head, int region)
        : a(arguments), batch(batch), head(head) {
        const int64_t *const begin = a.inverse.begin + batch * int64_t(a.regions + 1) + region;
        first = batch * int64_t(a.regions) * a.topk + begin[0];
        entries = int(begin[1] - begin[0]);
    }
    GPU_METHOD int count() const { return entries; }
    GPU_METHOD const RegionMap &map() const { return a.queries; }
    GPU_METHOD int region_of(int entry) const { return a.inverse.choices[first + entry].region; }
    GPU_METHOD Note note(int entry, int pixel) const {
        const Choice choice = a.inverse.choices[first + entry];
        const float weight = a.weight(batch, choice.region, choice.number);
        const Statistics of = a.statistics_of(batch, head, choice.region, pixel);
        return {weight * (a.scale * log2_of_e), -of.lse, weight, of.delta};
    }
};

// Copies stages of two tensors asynchronously, and their notes. Absent slots and padding are zeros.
template <class C, class T, class Entries>
struct RoutedLoader {
    const RoutedArguments<T> &a;
    const Entries &entries;
    const T *first, *second;
    View first_view, second_view;

    GPU_METHOD int slots() const { return entries.count() * a.entry_slots; }
    GPU_METHOD int stages() const { return (slots() + C::stage_slots - 1) / C::stage_slots; }
    GPU_METHOD bool find(int slot, int &entry, int &pixel) const {
        entry = a.by_entry_slots.divide(slot);
        pixel = slot - entry * a.entry_slots;
        return slot < slots() && pixel < entries.map().pixels;
    }
    GPU_METHOD void load(SharedAddress stage, int first_slot) const {
        const int unit = thread_index() % C::units, channel = 8 * unit;
        for (int slot = thread_index() / C::units; slot < C::stage_slots; slot += block_threads() / C::units) {
            int entry, pixel, first_place = 0, second_place = 0;
            const bool in = find(first_slot + slot, entry, pixel);
            if (in) {
                const int region = entries.region_of(entry);
                first_place = a.offset(entries.map(), first_view, region, pixel) + channel;
                second_place = a.offset(entries.map(), second_view, region, pixel) + channel;
            }
            const SharedAddress to = stage + SharedAddress(slot * C::slot_bytes + ((unit ^ C::phase(slot)) << 4));
            const bool has_first = in && channel < a.channels, has_second = in && channel < a.value_channels;
            copy_async(to, first + (has_first ? first_place : 0), has_first);
            copy_async(to + C::tensor_bytes, second + (has_second ? second_place : 0), has_second);
        }
        copy_commit();
        for (int slot = thread_index(); slot < C::stage_slots; slot += block_threads()) {
            int entry, pixel;
            Note note = {0, -INFINITY, 0, 0};
            if (find(first_slot + slot, entry, pixel)) note = entries.note(entry, pixel);
            write_note(stage + 2 * C::tensor_bytes, slot, note);
        }
    }
};

// Streams all stages by: calls visit(address of the stage, first slot) in every warp.
template <class C, class Loader, class Visit>
GPU_FUNCTION void for_each_stage(const Loader &loader, Visit visit) {
    const int stages = loader.stages();
    const SharedAddress memory = shared_memory();
    if (stages > 0) loader.load(memory, 0);
    for (int stage = 0; stage < stages; ++stage) {
        if (stage + 1 < stages) {
            loader.load(memory + SharedAddress((stage + 1) % 2 * C::stage_bytes), (stage + 1) * C::stage_slots);
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        synchronize();
        visit(memory + SharedAddress(stage % 2 * C::stage_bytes), stage * C::stage_slots);
        synchronize();
    }
}

// The warp's rows of a tensor as the left operand of products over channels; zeros where there is no pixel or channel.
template <class C, class T>
GPU_FUNCTION void load_pixels(uint32_t (&fragments)[C::width / 16][4], const RoutedArguments<T> &a,
                              const RegionMap &map, const RoutedView<const T> &tensor, const RoutedPlace &place,
                              int channels) {
    GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
        const int pixel = place.pixel(r);
        const bool exists = pixel < map.pixels;
        const T *from = tensor.head(place.batch, place.head);
        if (exists) from += a.offset(map, tensor.view, place.region, pixel);
        GPU_UNROLL_FOR (int d = 0; d < C::width / 16; ++d)
            GPU_UNROLL_FOR (int h = 0; h < 2; ++h) {
                const int channel = 16 * d + 8 * h + lane_index() % 4 * 2;
                fragments[d][r + 2 * h] = exists && channel < channels ? load_pair(from + channel) : 0;
            }
    }
}

// Writes row r of the warp's sums, times `factor`, if there is such a pixel.
template <class C, class T>
GPU_FUNCTION void write_pixel(const RoutedArguments<T> &a, const RegionMap &map, const RoutedView<T> &tensor,
                              const RoutedPlace &place, const float (&sum)[C::width / 8][4], int r, float factor,
                              int channels) {
    if (place.pixel(r) >= map.pixels) return;
    T *const to = tensor.head(place.batch, place.head) + a.offset(map, tensor.view, place.region, place.pixel(r));
    write_row(to, sum, r, factor, channels);
}

// Products over channels of the warp's rows and a chunk's slots.
template <class C, class T>
GPU_FUNCTION void multiply_chunk(float (&product)[2][4], const uint32_t (&rows)[C::width / 16][4],
                                 const ChunkReader<C> &reader, SharedAddress offset) {
    GPU_UNROLL_FOR (int i = 0; i < 8; ++i) product[i / 4][i % 4] = 0;
    GPU_UNROLL_FOR (int d = 0; d < C::width / 16; ++d) {
        uint32_t slots[4];
        reader.read(slots, offset, d);
        multiply_add(T(), product[0], rows[d], slots[0], slots[1]);
        multiply_add(T(), product[1], rows[d], slots[2], slots[3]);
    }
}

// Adds products over a chunk's slots: factors of the pairs times the slots' rows.
template <class C, class T>
GPU_FUNCTION void accumulate_chunk(float (&sum)[C::width / 8][4], const uint32_t (&factors)[4],
                                   const ChunkReader<C> &reader, SharedAddress offset) {
    GPU_UNROLL_FOR (int d = 0; d < C::width / 16; ++d) {
        uint32_t slots[4];
        reader.read_transposed(slots, offset, d);
        multiply_add(T(), sum[2 * d], factors, slots[0], slots[1]);
        multiply_add(T(), sum[2 * d + 1], factors, slots[2], slots[3]);
    }
}

template <class T>
struct RoutedStatisticsArguments {
    RoutedProblem problem;
    Statistics *statistics;
};

template <class T>
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1)
    fill_routed_statistics(GPU_ARGUMENT RoutedStatisticsArguments<T> arguments) {
    const RoutedProblem &p = arguments.problem;
    for (int64_t index = first_warp(); index < query_count(p); index += warp_step()) {
        const Site query = Site::at(p, index, p.queries());
        const float delta = routed_delta<T>(p, query), lse = *query_row<const float>(p, p.lse, query);
        if (lane_index() == 0) arguments.statistics[index] = query_statistics<T>(lse, delta);
    }
}

struct WeightPartsArguments {
    int64_t batch, regions, topk, parts;  // parts of each choice
    const float *part;
    Tensor gradient;
};

// Adds up the parts of each choice's gradient, in order.
GPU_KERNEL void GPU_BOUNDS(generic_threads, 1) sum_weight_parts(GPU_ARGUMENT WeightPartsArguments a) {
    const int64_t choices = a.batch * a.regions * a.topk;
    for (int64_t i = int64_t(block_index().x) * generic_threads + thread_index(); i < choices;
         i += int64_t(grid_extent().x) * generic_threads) {
        float sum = 0;
        for (int64_t part = 0; part < a.parts; ++part) sum += a.part[i * a.parts + part];
        static_cast<float *>(a.gradient.data)[RoutedProblem::choice_offset(a.gradient, i / a.topk / a.regions,
                                                                           i / a.topk % a.regions, i % a.topk)] = sum;
    }
}

template <class C, class T>
GPU_KERNEL void GPU_BOUNDS(C::most_threads, 2) tensor_core_routed_forward(GPU_ARGUMENT RoutedArguments<T> a) {
    const RoutedPlace place(a);
    const ChosenRegions<T> entries{a, place.batch, place.head, place.region};
    const RoutedLoader<C, T, ChosenRegions<T>> loader = {
        a,          entries,     a.key.head(place.batch, place.head), a.value.head(place.batch, place.head),
        a.key.view, a.value.view};
    uint32_t query[C::width / 16][4];
    load_pixels<C>(query, a, a.queries, a.query, place, a.channels);
    float output[C::width / 8][4], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    clear(output);

    for_each_stage<C>(loader, [&](SharedAddress stage, int first_slot) {
        const ChunkReader<C> reader(stage, 0);
        const SharedAddress notes = stage + 2 * C::tensor_bytes;
        float score[C::chunks][2][4];
        float high[2] = {top[0], top[1]};
        GPU_UNROLL_FOR (int c = 0; c < C::chunks; ++c) {
            multiply_chunk<C, T>(score[c], query, reader, SharedAddress(c * reader.chunk_bytes));
            GPU_UNROLL_FOR (int n = 0; n < 2; ++n)
                GPU_UNROLL_FOR (int b = 0; b < 2; ++b) {
                    const Note note = read_note(notes, c, n, b);
                    GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
                        float &x = score[c][n][2 * r + b];
                        x = x * note.factor + note.addend;
                        high[r] = fmaxf(high[r], x);
                    }
                }
        }
        float base[2];
        GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
            high[r] = fmaxf(high[r], shuffle_xor(high[r], 1));
            high[r] = fmaxf(high[r], shuffle_xor(high[r], 2));
            base[r] = softmax_base(high[r]);
        }
        if (any_in_warp(high[0] > top[0] || high[1] > top[1])) {
            GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
                const float shrink = high[r] == top[r] ? 1 : fast_exp2(top[r] - base[r]);  // both may be infinite
                top[r] = high[r];
                sum[r] *= shrink;
                GPU_UNROLL_FOR (int d = 0; d < C::width / 8; ++d) {
                    output[d][2 * r] *= shrink;
                    output[d][2 * r + 1] *= shrink;
                }
            }
        }
        GPU_UNROLL_FOR (int c = 0; c < C::chunks; ++c) {
            if (first_slot + 16 * c >= loader.slots()) continue;
            GPU_UNROLL_FOR (int n = 0; n < 2; ++n)
                GPU_UNROLL_FOR (int b = 0; b < 2; ++b) {
                    const float weight = a.region_weight.data ? read_note(notes, c, n, b).weight : 1;
                    GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
                        float &x = score[c][n][2 * r + b];
                        x = fast_exp2(x - base[r]);
                        sum[r] += x;
                        x *= weight;
                    }
                }
            uint32_t weights[4];
            pack_fragment<T>(weights, score[c]);
            accumulate_chunk<C, T>(output, weights, reader, SharedAddress(C::tensor_bytes + c * reader.chunk_bytes));
        }
    });

    GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
        float total = sum[r];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        write_pixel<C>(a, a.queries, a.output, place, output, r, total == 0 ? 0 : fast_reciprocal(total),
                       a.value_channels);
        if (a.lse.data && lane_index() % 4 == 0 && place.pixel(r) < a.queries.pixels)
            a.lse.head(place.batch, place.head)[a.offset(a.queries, a.lse.view, place.region, place.pixel(r))] =
                total == 0 ? -INFINITY : (top[r] + fast_log2(total)) * (1 / log2_of_e);
    }
}

template <class C, class T>
GPU_KERNEL void GPU_BOUNDS(C::most_threads, 2) tensor_core_routed_grad_query(GPU_ARGUMENT RoutedArguments<T> a) {
    const RoutedPlace place(a);
    const ChosenRegions<T> entries{a, place.batch, place.head, place.region};
    const RoutedLoader<C, T, ChosenRegions<T>> loader = {
        a,          entries,     a.key.head(place.batch, place.head), a.value.head(place.batch, place.head),
        a.key.view, a.value.view};
    uint32_t query[C::width / 16][4], grad_output[C::width / 16][4];
    load_pixels<C>(query, a, a.queries, a.query, place, a.channels);
    load_pixels<C>(grad_output, a, a.queries, a.grad_output, place, a.value_channels);
    Statistics statistics[2];
    GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
        statistics[r] = {INFINITY, 0};
        if (place.pixel(r) < a.queries.pixels)
            statistics[r] = a.statistics_of(place.batch, place.head, place.region, place.pixel(r));
    }
    float sum[C::width / 8][4];
    clear(sum);
    float by_weight = 0;  // of the entry at hand
    int entry = 0;
    const auto finish_entry = [&]() {
        const float part = warp_sum(by_weight);
        const int warps = block_threads() / warp_size;
        if (lane_index() == 0)
            a.weight_parts[(((int64_t(place.batch) * a.regions + place.region) * a.topk + entry) * a.heads +
                            place.head) *
                               (a.blocks * warps) +
                           place.first / 16] = part;
        by_weight = 0;
        ++entry;
    };

    for_each_stage<C>(loader, [&](SharedAddress stage, int first_slot) {
        const ChunkReader<C> reader(stage, 0);
        const SharedAddress notes = stage + 2 * C::tensor_bytes;
        for (int c = 0; c < C::chunks; ++c) {
            if (first_slot + 16 * c >= loader.slots()) break;
            if (a.weight_parts && first_slot + 16 * c == (entry + 1) * a.entry_slots) finish_entry();
            const SharedAddress offset = SharedAddress(c * reader.chunk_bytes);
            float score[2][4], by_probability[2][4];
            multiply_chunk<C, T>(score, query, reader, offset);
            multiply_chunk<C, T>(by_probability, grad_output, reader, offset + C::tensor_bytes);
            GPU_UNROLL_FOR (int n = 0; n < 2; ++n)
                GPU_UNROLL_FOR (int b = 0; b < 2; ++b) {
                    const Note note = read_note(notes, c, n, b);
                    GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
                        const float dot = score[n][2 * r + b], by = by_probability[n][2 * r + b];
                        const float probability = fast_exp2(dot * note.factor + note.addend - statistics[r].lse);
                        const float by_score = probability * (by * note.weight - statistics[r].delta);
                        by_weight += by_score * (dot * a.scale) + probability * by;
                        score[n][2 * r + b] = by_score * note.weight;
                    }
                }
            uint32_t factors[4];
            pack_fragment<T>(factors, score);
            accumulate_chunk<C, T>(sum, factors, reader, offset);
        }
    });
    if (a.weight_parts && a.topk > 0) finish_entry();
    if (a.grad_query.data)
        GPU_UNROLL_FOR (int r = 0; r < 2; ++r)
            write_pixel<C>(a, a.queries, a.grad_query, place, sum, r, a.scale, a.channels);
}

// Either gradient or both at once, which computes the weights once but takes twice the registers for sums.
template <class C, class T, bool with_key, bool with_value>
GPU_KERNEL void GPU_BOUNDS(C::most_threads, 2) tensor_core_routed_grad_key(GPU_ARGUMENT RoutedArguments<T> a) {
    const RoutedPlace place(a);
    const ChoosingRegions<T> entries(a, place.batch, place.head, place.region);
    const RoutedLoader<C, T, ChoosingRegions<T>> loader = {a,
                                                           entries,
                                                           a.query.head(place.batch, place.head),
                                                           a.grad_output.head(place.batch, place.head),
                                                           a.query.view,
                                                           a.grad_output.view};
    uint32_t key[C::width / 16][4], value[C::width / 16][4];
    load_pixels<C>(key, a, a.keys, a.key, place, a.channels);
    if constexpr (with_key) load_pixels<C>(value, a, a.keys, a.value, place, a.value_channels);
    float key_sum[C::width / 8][4], value_sum[C::width / 8][4];
    clear(key_sum);
    clear(value_sum);

    for_each_stage<C>(loader, [&](SharedAddress stage, int first_slot) {
        const ChunkReader<C> reader(stage, 0);
        const SharedAddress notes = stage + 2 * C::tensor_bytes;
        for (int c = 0; c < C::chunks; ++c) {
            if (first_slot + 16 * c >= loader.slots()) break;
            const SharedAddress offset = SharedAddress(c * reader.chunk_bytes);
            float score[2][4], by_probability[2][4];
            multiply_chunk<C, T>(score, key, reader, offset);
            if constexpr (with_key) multiply_chunk<C, T>(by_probability, value, reader, offset + C::tensor_bytes);
            GPU_UNROLL_FOR (int n = 0; n < 2; ++n)
                GPU_UNROLL_FOR (int b = 0; b < 2; ++b) {
                    const Note note = read_note(notes, c, n, b);
                    GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
                        const float probability = fast_exp2(score[n][2 * r + b] * note.factor + note.addend);
                        score[n][2 * r + b] = probability * note.weight;
                        if constexpr (with_key) {
                            float &by = by_probability[n][2 * r + b];
                            by = probability * (by * note.weight - note.delta) * note.weight;
                        }
                    }
                }
            uint32_t factors[4];
            if constexpr (with_value) {
                pack_fragment<T>(factors, score);
                accumulate_chunk<C, T>(value_sum, factors, reader, offset + C::tensor_bytes);
            }
            if constexpr (with_key) {
                pack_fragment<T>(factors, by_probability);
                accumulate_chunk<C, T>(key_sum, factors, reader, offset);
            }
        }
    });
    GPU_UNROLL_FOR (int r = 0; r < 2; ++r) {
        if (with_key && a.grad_key.data) write_pixel<C>(a, a.keys, a.grad_key, place, key_sum, r, a.scale, a.channels);
        if (with_value && a.grad_value.data)
            write_pixel<C>(a, a.keys, a.grad_value, place, value_sum, r, 1, a.value_channels);
    }
}

}  // namespace localattn::cuda
