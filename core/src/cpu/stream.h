// Memory that will be needed soon, handed out in pieces to whoever can prefetch it between multiply-adds.
#pragma once
#include <cstddef>
#include <cstdint>

namespace localattn::cpu {

class Stream {
public:
    // `count` lines, `step` bytes apart.
    struct Piece {
        const char *address;
        ptrdiff_t step;
    };
    void clear() { size_ = next_ = 0; }
    // What does not fit the list is not prefetched.
    void add(const char *address, ptrdiff_t step, int64_t count) {
        if (size_ < capacity && count > 0) pieces_[size_++] = {{address, step}, count};
    }
    // Up to `count` lines; when nothing is left, the same harmless line again and again.
    Piece take(int64_t count) {
        if (next_ >= size_) return {reinterpret_cast<const char *>(pieces_), 0};
        Entry &e = pieces_[next_];
        const Piece piece = e.piece;
        e.piece.address += count * e.piece.step;
        e.count -= count;
        if (e.count <= 0) ++next_;
        return piece;
    }
    // The positions [from, to) of a row of `channels`, of a tensor in either common layout: one line-wide column of it
    // after the other.
    void add_row(const char *row, int64_t element_size, int64_t position, int64_t channel, int64_t from, int64_t to,
                 int64_t channels) {
        if (from >= to) return;
        const bool by_position = channel == 1;
        if (!by_position && position != 1) return;
        const int64_t run = by_position ? channels : to - from, runs = by_position ? to - from : channels;
        const int64_t step = (by_position ? position : channel) * element_size;
        const char *start = row + from * position * element_size;
        for (int64_t line = 0; line < run * element_size; line += 64) add(start + line, step, runs);
    }

private:
    struct Entry {
        Piece piece;
        int64_t count;
    };
    static constexpr int capacity = 512;
    Entry pieces_[capacity];
    int size_ = 0, next_ = 0;
};

}  // namespace localattn::cpu
