// The window rule, for one axis: which keys a query attends to. The only place where it is written; kernels of every
// device, the reference and the plans ask here. In words: localattn.h.
//
// Keys of one axis fall into residue classes modulo the dilation; `centre`, `start` and the entry ranges are in
// coordinates of the query's own class. Entry u is key start + u of the class, at position
// residue + dilation * (start + u) of the axis.
#pragma once
#include <cstdint>

// Internal linkage, and inlined even without optimisation: files compiled for one instruction set may leave no symbol
// that the linker could pick for all.
#if defined(__CUDACC__)
#define LOCALATTN_HOST_DEVICE static __host__ __device__ __forceinline__
#define LOCALATTN_HOST_DEVICE_METHOD __host__ __device__ __forceinline__
#else
#define LOCALATTN_HOST_DEVICE_METHOD
#define LOCALATTN_HOST_DEVICE static inline __attribute__((always_inline))
#endif

namespace localattn {

enum class Border : int32_t { mask = 0, zero = 1, shift = 2 };

struct Axis {
    int64_t queries = 1;  // extents of the two maps along this axis
    int64_t keys = 1;
    int64_t kernel = 1;
    int64_t stride = 1;
    int64_t dilation = 1;
    bool causal = false;
    Border border = Border::mask;
};

struct Window {
    int64_t residue;  // the class
    int64_t length;   // keys in the class
    int64_t centre;
    int64_t start;
    // Entries that are keys: [begin, end). Entries that are there at all, keys or border zeros outside the map:
    // [present_begin, present_end), a superset; the same range unless the border is zero.
    int64_t begin, end;
    int64_t present_begin, present_end;
};

LOCALATTN_HOST_DEVICE int64_t centre_of(const Axis &a, int64_t query) {
    return (2 * query + 1) * a.keys / (2 * a.queries);
}

LOCALATTN_HOST_DEVICE Window window_of(const Axis &a, int64_t query) {
    const int64_t k = a.kernel, s = a.stride;
    const int64_t c = centre_of(a, query);
    Window w;
    w.residue = c % a.dilation;
    w.centre = c / a.dilation;
    w.length = (a.keys - w.residue + a.dilation - 1) / a.dilation;
    const int64_t n = w.length;
    int64_t leader = w.centre / s * s + (a.causal ? s - 1 : s / 2);
    if ((a.causal || a.border == Border::shift) && leader > n - 1) leader = n - 1;
    int64_t present_end = k;
    if (a.causal) {
        w.start = leader - k + 1 > 0 ? leader - k + 1 : 0;
        present_end = w.centre - w.start + 1 < k ? w.centre - w.start + 1 : k;
    } else {
        w.start = leader - k / 2;
        if (a.border == Border::shift) {
            if (w.start > n - k) w.start = n - k;
            if (w.start < 0) w.start = 0;
            if (n - w.start < k) present_end = n - w.start;
        }
    }
    w.begin = w.start < 0 ? -w.start : 0;
    w.end = n - w.start < present_end ? n - w.start : present_end;
    if (w.end < w.begin) w.end = w.begin;
    const bool zeros = a.border == Border::zero;
    w.present_begin = zeros ? 0 : w.begin;
    w.present_end = zeros ? present_end : w.end;
    return w;
}

}  // namespace localattn
