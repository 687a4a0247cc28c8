// Tensors in memory as a caller might have them: any order of axes, gaps, negative and zero strides, any alignment.
// And the same tensors as plain arrays of doubles, which the oracle computes on.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "config.h"
#include "device.h"

namespace test {

// batch, three spatial axes, head, channel (or window entry); row-major.
using Shape = std::array<int64_t, 6>;

struct Dense {
    Shape shape{};
    std::vector<double> data;

    Dense() = default;
    explicit Dense(const Shape &shape) : shape(shape), data(static_cast<size_t>(count(shape))) {}

    static int64_t count(const Shape &shape) {
        int64_t n = 1;
        for (const int64_t extent : shape) n *= extent;
        return n;
    }
    // A coordinate on an axis of extent 1 is taken as 0: the tensor broadcasts there.
    int64_t index(const Shape &at) const {
        int64_t i = 0;
        for (size_t a = 0; a < 6; ++a) i = i * shape[a] + (shape[a] == 1 ? 0 : at[a]);
        return i;
    }
    double &operator[](const Shape &at) { return data[static_cast<size_t>(index(at))]; }
    double operator[](const Shape &at) const { return data[static_cast<size_t>(index(at))]; }
};

enum class Element { float32, float64, float16, bfloat16, uint8 };

int64_t size_of(Element element);
// Nearest value of the type, ties to even. Written with ldexp and nearbyint: no code shared with the library.
double rounded(Element element, double x);
// Half the spacing of the type's values around 1.
double unit_roundoff(Element element);

class Memory {
public:
    Memory() = default;
    // `broadcast`: Axes whose stride is 0. Inputs may also overlap themselves.
    Memory(Random &random, Element element, const Shape &shape, unsigned broadcast, bool plain, bool result);

    Element element = Element::float32;
    Shape shape{};
    std::array<int64_t, 6> strides{};

    double get(const Shape &at) const;
    void set(const Shape &at, double x);
    Dense dense() const;  // with extent 1 on broadcast axes

    // Fills elements with values from -magnitude to magnitude; everything between elements with NaN.
    void fill_random(Random &random, double magnitude);
    void fill_mask(Random &random);
    // Elements become NaN; everything between and around them a pattern that untouched() looks for.
    void poison();
    bool untouched() const;

    localattn_tensor view(int rank);
    const Bytes &bytes() const { return bytes_; }

private:
    int64_t offset(const Shape &at) const;
    template <class Visit>
    void each(const Visit &visit) const;
    double read(int64_t byte) const;
    void write(int64_t byte, double x);

    Bytes bytes_;
    int64_t base_ = 0;  // byte of the element at 0, ..., 0
    std::vector<bool> covered_;
};

}  // namespace test
