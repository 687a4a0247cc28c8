// Prints what every primitive that moves data between lanes does, on numbers whose sums are exact. Built for the host
// and for the device; the two outputs must be the same, or the emulation's fragment layouts are not the hardware's.
#include <cstdio>

#include "cuda/gpu.h"
#include "device_memory.h"

using namespace localattn;
using namespace localattn::gpu;

constexpr int words_a_lane = 21;

struct Probe {
    const uint16_t *source;  // 512
    uint32_t *words;         // 32 lanes of words_a_lane
};

GPU_KERNEL void probe(GPU_ARGUMENT Probe p) {
    const int lane = thread_index();
    const SharedAddress memory = shared_memory();
    for (int i = lane; i < 64; i += warp_size) copy_async(memory + SharedAddress(16 * i), p.source + 8 * i, i != 5);
    copy_commit();
    copy_wait<0>();
    synchronize();
    uint32_t plain[4], transposed[4];
    load_matrix(plain, memory + SharedAddress(16 * lane));
    load_matrix_transposed(transposed, memory + SharedAddress(512 + 16 * lane));
    float brain[4] = {}, half[4] = {float(lane), 1, 2, 3};
    multiply_add(bfloat16(), brain, plain, transposed[0], transposed[1]);
    uint32_t rounded[4];  // few enough bits that products of float16 stay exact
    for (int i = 0; i < 4; ++i) rounded[i] = plain[i] & 0xfff8fff8u;
    multiply_add(float16(), half, rounded, transposed[2] & 0xfff8fff8u, transposed[3] & 0xfff8fff8u);
    uint32_t *words = p.words + words_a_lane * lane;
    for (int i = 0; i < 4; ++i) {
        words[i] = plain[i];
        words[4 + i] = transposed[i];
        words[8 + i] = uint32_t(int32_t(brain[i] * 16384));
        words[12 + i] = uint32_t(int32_t(half[i] * 16384));
    }
    words[16] = uint32_t(shuffle_xor(float(lane * lane), 5));
    words[17] = any_in_warp(lane == 7);
    words[18] = pack(bfloat16(), 1.5f + float(lane), 257.f);
    words[19] = pack(float16(), 0.1f * float(lane), -2049.f);
    words[20] = uint32_t(warp_sum(float(lane)));
}

int main() {
    cuda::test_device();
    cuda::DeviceVector<uint16_t> source(512);
    cuda::DeviceVector<uint32_t> words(size_t(words_a_lane) * warp_size, 0xdeadbeef);
    for (uint32_t i = 0; i < 512; ++i)
        source[i] = uint16_t(0x3f80 + (i * 2654435761u >> 20) % 64);  // 1 + n/128 in bfloat16
    const char *error = launch<probe>({1, 1, 1}, warp_size, 1024, nullptr, Probe{source.data(), words.data()});
    if (!error) error = cuda::finish();
    if (error) {
        std::fprintf(stderr, "%s\n", error);
        return 1;
    }
    for (size_t i = 0; i < words.size(); ++i) std::printf("%08x%c", words[i], (i + 1) % words_a_lane ? ' ' : '\n');
    return 0;
}
