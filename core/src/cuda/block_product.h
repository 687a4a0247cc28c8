// A block's tile of a product of two matrices whose elements are computed as they are read: any strides, any type.
//
//     sum[r][c] += sum over k of left(r, k) * right(k, c)         64x64, of which a thread has 4x4
//
// Slabs of 16 terms k are staged in shared memory in the type of the sums.
#pragma once
#include "gpu.h"

namespace localattn::cuda {

using namespace gpu;

constexpr int product_threads = 256, product_tile = 64, product_slab = 16;

// Which index consecutive threads take when they read an operand: the one that is contiguous in memory.
enum class Along { side, terms };

template <class Real>
struct BlockProduct {
    static constexpr int per_thread = 4, threads_a_row = product_tile / per_thread;
    static constexpr int row_elements = product_tile + 4;  // so that no two terms of a slab start in the same bank
    static constexpr int shared_bytes = 2 * product_slab * row_elements * int(sizeof(Real));
    Real sum[per_thread][per_thread];

    GPU_METHOD BlockProduct() {
        GPU_UNROLL_FOR (int i = 0; i < per_thread; ++i)
            GPU_UNROLL_FOR (int j = 0; j < per_thread; ++j) sum[i][j] = 0;
    }
    // Of this thread's sums, in the tile.
    GPU_METHOD static int row(int i) { return thread_index() / threads_a_row * per_thread + i; }
    GPU_METHOD static int column(int j) { return thread_index() % threads_a_row * per_thread + j; }

    // Over terms [begin, end). left(r, k) and right(c, k) are called for r and c below 64 and such k alone.
    template <Along left_along, Along right_along, class Left, class Right>
    GPU_METHOD void add(int64_t begin, int64_t end, Left left, Right right) {
        const SharedAddress lefts = shared_memory(), rights = lefts + shared_bytes / 2;
        for (int64_t first = begin; first < end; first += product_slab) {
            synchronize();
            stage<left_along>(lefts, first, end, left);
            stage<right_along>(rights, first, end, right);
            synchronize();
            GPU_UNROLL_FOR (int k = 0; k < product_slab; ++k) {
                Real l[per_thread], r[per_thread];
                read(l, lefts, k, row(0));
                read(r, rights, k, column(0));
                GPU_UNROLL_FOR (int i = 0; i < per_thread; ++i)
                    GPU_UNROLL_FOR (int j = 0; j < per_thread; ++j) sum[i][j] += l[i] * r[j];
            }
        }
    }

private:
    GPU_METHOD static SharedAddress at(SharedAddress slab, int k, int side) {
        return slab + SharedAddress((k * row_elements + side) * int(sizeof(Real)));
    }
    template <Along along, class Operand>
    GPU_METHOD static void stage(SharedAddress slab, int64_t first, int64_t end, Operand operand) {
        GPU_UNROLL_FOR (int i = thread_index(); i < product_tile * product_slab; i += product_threads) {
            const int side = along == Along::side ? i % product_tile : i / product_slab;
            const int k = along == Along::side ? i / product_tile : i % product_slab;
            store_shared_number(at(slab, k, side), first + k < end ? Real(operand(side, first + k)) : Real(0));
        }
    }
    GPU_METHOD static void read(float (&values)[per_thread], SharedAddress slab, int k, int side) {
        load_shared(values, at(slab, k, side));
    }
    GPU_METHOD static void read(double (&values)[per_thread], SharedAddress slab, int k, int side) {
        GPU_UNROLL_FOR (int i = 0; i < per_thread; ++i) values[i] = load_shared_number<double>(at(slab, k, side + i));
    }
};

}  // namespace localattn::cuda
