// The pieces that every operation's checks are made of. Each fails with one sentence: the field, its value, what is
// allowed.
#pragma once
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "error.h"
#include "localattn/localattn.h"
#include "validate.h"

namespace localattn {

inline constexpr int64_t largest_extent = INT32_MAX;       // so that a product of two fits 63 bits
inline constexpr size_t largest_struct = size_t{1} << 16;  // anything beyond is an uninitialised struct_size

struct FieldName {
    char text[48];
};

inline FieldName indexed(const char *field, int index) {
    FieldName name;
    std::snprintf(name.text, sizeof name.text, "%s[%d]", field, index);
    return name;
}

template <class Struct>
Struct copied(const Struct *given, const char *what) {
    if (!given) fail(LOCALATTN_INVALID_ARGUMENT, "%s is NULL, but must point to a struct", what);
    const size_t size = given->struct_size;
    if (size < sizeof given->struct_size || size > largest_struct) {
        fail(LOCALATTN_INVALID_ARGUMENT,
             "%s.struct_size is %zu, but must be the size of the struct, %zu here; set it with LOCALATTN_INIT", what,
             size, sizeof(Struct));
    }
    const unsigned char *bytes = reinterpret_cast<const unsigned char *>(given);
    for (size_t i = sizeof(Struct); i < size; ++i) {
        if (bytes[i]) {
            fail(LOCALATTN_INVALID_ARGUMENT,
                 "%s.struct_size is %zu and byte %zu is not zero, but localattn %d.%d.%d knows only the first %zu "
                 "bytes: the caller "
                 "was built for a newer version and uses a field of it",
                 what, size, i, LOCALATTN_VERSION_MAJOR, LOCALATTN_VERSION_MINOR, LOCALATTN_VERSION_PATCH,
                 sizeof(Struct));
        }
    }
    Struct copy{};
    std::memcpy(static_cast<void *>(&copy), given, size < sizeof copy ? size : sizeof copy);
    return copy;
}

inline void check_range(const char *field, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most) {
        fail(LOCALATTN_INVALID_ARGUMENT, "%s is %" PRId64 ", but must be from %" PRId64 " to %" PRId64, field, value,
             least, most);
    }
}

inline void check_flag(const char *field, int32_t value) {
    if (value != 0 && value != 1) fail(LOCALATTN_INVALID_ARGUMENT, "%s is %d, but must be 0 or 1", field, value);
}

inline void check_dtype(int32_t dtype) {
    if (dtype < LOCALATTN_FLOAT32 || dtype > LOCALATTN_BFLOAT16) {
        fail(LOCALATTN_UNSUPPORTED_DTYPE,
             "dtype is %d, but must be 0 (float32), 1 (float64), 2 (float16) or 3 (bfloat16)", dtype);
    }
}

// Bytes of an element, and of the type that its sums are kept in.
inline int64_t element_size(int32_t dtype) {
    return dtype == LOCALATTN_FLOAT64 ? 8 : dtype == LOCALATTN_FLOAT32 ? 4 : 2;
}
inline int64_t accumulated_size(int32_t dtype) { return dtype == LOCALATTN_FLOAT64 ? 8 : 4; }

enum class Role { input, result, summed_result };

// What one tensor of the params must satisfy, given the extents that its role gives it.
class TensorCheck {
public:
    TensorCheck(int32_t rank, Data data) : rank_(rank), data_(data) {}

    void operator()(const char *name, const localattn_tensor &tensor, Role role, bool required, int64_t element_size,
                    int64_t batch, const int64_t *extent, int64_t heads, int64_t channels) const {
        const Side sides[] = {{"batch_stride", -1, batch, tensor.batch_stride},
                              {"spatial_stride", 0, extent[0], tensor.spatial_stride[0]},
                              {"spatial_stride", 1, rank_ > 1 ? extent[1] : 1, tensor.spatial_stride[1]},
                              {"spatial_stride", 2, rank_ > 2 ? extent[2] : 1, tensor.spatial_stride[2]},
                              {"head_stride", -1, heads, tensor.head_stride},
                              {"channel_stride", -1, channels, tensor.channel_stride}};
        bool empty = false;
        for (const Side &side : sides) empty = empty || side.extent == 0;
        if (!tensor.data) {
            if (required && !empty && data_ == Data::used) {
                fail(LOCALATTN_INVALID_ARGUMENT, "%s.data is NULL, but this call needs it", name);
            }
            if (!required) return;
        } else if (data_ == Data::used && reinterpret_cast<uintptr_t>(tensor.data) % uintptr_t(element_size) != 0) {
            fail(LOCALATTN_INVALID_ARGUMENT, "%s.data is %p, but must be aligned to its elements of %" PRId64 " bytes",
                 name, tensor.data, element_size);
        }
        if (empty) return;

        int64_t count = 1, reach = 1;  // elements; how far the farthest lies from the first, in elements, plus one
        for (const Side &side : sides) {
            int64_t far;
            if (__builtin_mul_overflow(count, side.extent, &count)) {
                fail(LOCALATTN_INVALID_ARGUMENT,
                     "%s has more than 2^63-1 elements, which is more than can be counted; an extent of "
                     "it is %" PRId64,
                     name, side.extent);
            }
            const bool overflows =
                side.extent > 1 &&
                (side.stride == INT64_MIN ||
                 __builtin_mul_overflow(side.stride < 0 ? -side.stride : side.stride, side.extent - 1, &far) ||
                 __builtin_add_overflow(reach, far, &reach) || reach > INT64_MAX / element_size);
            if (overflows) {
                fail(LOCALATTN_INVALID_ARGUMENT,
                     "%s.%s is %" PRId64 ", but with an extent of %" PRId64
                     " offsets in bytes must stay "
                     "within 2^63-1",
                     name, side.text().text, side.stride, side.extent);
            }
            if (role == Role::result && tensor.data && side.extent > 1 && side.stride == 0) {
                fail(LOCALATTN_INVALID_ARGUMENT,
                     "%s.%s is 0 with an extent of %" PRId64 ", but a result's elements must not overlap", name,
                     side.text().text, side.extent);
            }
        }
    }

private:
    struct Side {
        const char *field;
        int index;
        int64_t extent, stride;

        FieldName text() const {
            if (index >= 0) return indexed(field, index);
            FieldName name;
            std::snprintf(name.text, sizeof name.text, "%s", field);
            return name;
        }
    };

    int32_t rank_;
    Data data_;
};

}  // namespace localattn
