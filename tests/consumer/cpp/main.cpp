// Causal attention over a signal of equal scores: output i is the mean of values i-2 to i.
#include <localattn/localattn.h>

#include <cmath>
#include <cstdio>
#include <vector>

int main() {
    constexpr int length = 6, window = 3;
    std::vector<float> zeros(length), value(length), output(length);
    for (int i = 0; i < length; ++i) value[i] = static_cast<float>(i * i);
    auto p = LOCALATTN_INIT(localattn_attention_params);
    p.rank = 1;
    p.batch = p.heads = p.channels = 1;
    p.query_extent[0] = p.key_extent[0] = length;
    p.kernel_size[0] = window;
    p.is_causal[0] = 1;
    const auto view = [](std::vector<float> &data) {
        localattn_tensor tensor{};
        tensor.data = data.data();
        tensor.spatial_stride[0] = 1;
        return tensor;
    };
    p.query = p.key = view(zeros);
    p.value = view(value);
    p.output = view(output);
    if (localattn_attention_forward(nullptr, &p) != LOCALATTN_OK) {
        std::printf("%s\n", localattn_last_error());
        return 1;
    }
    for (int i = 0; i < length; ++i) {
        float sum = 0;
        int count = 0;
        for (int j = i < window ? 0 : i - window + 1; j <= i; ++j, ++count) sum += value[j];
        if (!(std::fabs(output[i] - sum / count) < 1e-5f)) return 1;
    }
    return 0;
}
