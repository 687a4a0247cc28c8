/* The library as a plain C99 caller meets it: one head over a small map, forward and backward, checked against loops
 * that are written out here. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "localattn/localattn.h"

enum { HEIGHT = 5, WIDTH = 4, CHANNELS = 3, KERNEL = 3, PIXELS = HEIGHT * WIDTH, SIZE = PIXELS * CHANNELS };

static int failures = 0;

static void expect(int holds, const char *what, int line) {
    if (holds) return;
    ++failures;
    printf("test_c.c:%d: does not hold: %s (last error: %s)\n", line, what, localattn_last_error());
}
#define EXPECT(condition) expect((condition), #condition, __LINE__)

static void expect_close(const float *got, const double *wanted, int count, const char *what) {
    for (int i = 0; i < count; ++i) {
        if (!(fabs(got[i] - wanted[i]) <= 1e-5)) {
            ++failures;
            printf("%s[%d] is %.8g, not %.8g\n", what, i, got[i], wanted[i]);
            return;
        }
    }
}

static localattn_tensor tensor_of(float *data, int64_t channels) {
    localattn_tensor t;
    memset(&t, 0, sizeof t);
    t.data = data;
    t.batch_stride = PIXELS * channels;
    t.spatial_stride[0] = WIDTH * channels;
    t.spatial_stride[1] = channels;
    t.head_stride = channels;
    t.channel_stride = 1;
    return t;
}

static void fill(float *data, int count, unsigned seed) {
    for (int i = 0; i < count; ++i) {
        seed = seed * 1664525u + 1013904223u;
        data[i] = (float)(seed >> 8) / (float)(1 << 24) * 2 - 1;
    }
}

/* The key that entry (u, v) of pixel (y, x)'s 3 x 3 window is, or -1 outside the map, which border mask leaves out. */
static int key_of(int y, int x, int u, int v) {
    const int row = y + u - KERNEL / 2, column = x + v - KERNEL / 2;
    return row < 0 || row >= HEIGHT || column < 0 || column >= WIDTH ? -1 : row * WIDTH + column;
}

static float query[SIZE], key[SIZE], value[SIZE], grad_output[SIZE];
static float output[SIZE], lse[PIXELS], grad_query[SIZE], grad_key[SIZE], grad_value[SIZE];
static double true_output[SIZE], true_lse[PIXELS], true_grad_query[SIZE], true_grad_key[SIZE], true_grad_value[SIZE];

static double dot(const float *a, const float *b) {
    double sum = 0;
    for (int c = 0; c < CHANNELS; ++c) sum += (double)a[c] * b[c];
    return sum;
}

static void compute_truth(double scale) {
    for (int y = 0; y < HEIGHT; ++y) {
        for (int x = 0; x < WIDTH; ++x) {
            const int q = y * WIDTH + x;
            int keys[KERNEL * KERNEL], count = 0;
            double weight[KERNEL * KERNEL], total = 0, delta = 0;
            for (int u = 0; u < KERNEL; ++u) {
                for (int v = 0; v < KERNEL; ++v) {
                    const int k = key_of(y, x, u, v);
                    if (k < 0) continue;
                    keys[count] = k;
                    weight[count] = exp(scale * dot(query + q * CHANNELS, key + k * CHANNELS));
                    total += weight[count++];
                }
            }
            true_lse[q] = log(total);
            for (int i = 0; i < count; ++i) {
                weight[i] /= total;
                for (int c = 0; c < CHANNELS; ++c) {
                    true_output[q * CHANNELS + c] += weight[i] * value[keys[i] * CHANNELS + c];
                }
                delta += weight[i] * dot(grad_output + q * CHANNELS, value + keys[i] * CHANNELS);
            }
            for (int i = 0; i < count; ++i) {
                const int k = keys[i];
                const double grad = weight[i] * (dot(grad_output + q * CHANNELS, value + k * CHANNELS) - delta) * scale;
                for (int c = 0; c < CHANNELS; ++c) {
                    true_grad_value[k * CHANNELS + c] += weight[i] * grad_output[q * CHANNELS + c];
                    true_grad_key[k * CHANNELS + c] += grad * query[q * CHANNELS + c];
                    true_grad_query[q * CHANNELS + c] += grad * key[k * CHANNELS + c];
                }
            }
        }
    }
}

int main(void) {
    localattn_attention_params p = LOCALATTN_INIT(localattn_attention_params);
    localattn_context context = LOCALATTN_INIT(localattn_context);
    const char *name = NULL;
    size_t workspace = 0;

    fill(query, SIZE, 1);
    fill(key, SIZE, 2);
    fill(value, SIZE, 3);
    fill(grad_output, SIZE, 4);
    compute_truth(0.7);

    p.dtype = LOCALATTN_FLOAT32;
    p.rank = 2;
    p.batch = 1;
    p.heads = 1;
    p.channels = CHANNELS;
    p.query_extent[0] = p.key_extent[0] = HEIGHT;
    p.query_extent[1] = p.key_extent[1] = WIDTH;
    p.kernel_size[0] = p.kernel_size[1] = KERNEL;
    p.has_scale = 1;
    p.scale = 0.7;
    p.query = tensor_of(query, CHANNELS);
    p.key = tensor_of(key, CHANNELS);
    p.value = tensor_of(value, CHANNELS);
    p.output = tensor_of(output, CHANNELS);
    p.lse = tensor_of(lse, 1);
    p.grad_output = tensor_of(grad_output, CHANNELS);
    p.grad_query = tensor_of(grad_query, CHANNELS);
    p.grad_key = tensor_of(grad_key, CHANNELS);
    p.grad_value = tensor_of(grad_value, CHANNELS);

    EXPECT(localattn_attention_forward(NULL, &p) == LOCALATTN_OK);
    EXPECT(localattn_attention_backward(&context, &p) == LOCALATTN_OK);
    expect_close(output, true_output, SIZE, "output");
    expect_close(lse, true_lse, PIXELS, "lse");
    expect_close(grad_query, true_grad_query, SIZE, "grad_query");
    expect_close(grad_key, true_grad_key, SIZE, "grad_key");
    expect_close(grad_value, true_grad_value, SIZE, "grad_value");

    EXPECT(localattn_attention_variant(&context, &p, LOCALATTN_FORWARD, &name, NULL, 0) == LOCALATTN_OK);
    EXPECT(name != NULL);
    EXPECT(localattn_attention_workspace_size(&context, &p, LOCALATTN_BACKWARD, &workspace) == LOCALATTN_OK);

    /* Values that are none of the enum's, which only C may pass. */
    EXPECT(localattn_attention_workspace_size(&context, &p, (localattn_pass)2, &workspace) ==
           LOCALATTN_INVALID_ARGUMENT);
    EXPECT(strstr(localattn_last_error(), "pass is 2") != NULL);
    EXPECT(strcmp(localattn_status_name((localattn_status)99), "unknown localattn_status") == 0);

    p.kernel_size[1] = 0;
    EXPECT(localattn_attention_forward(NULL, &p) == LOCALATTN_INVALID_ARGUMENT);
    EXPECT(strstr(localattn_last_error(), "kernel_size[1] is 0") != NULL);
    EXPECT(strcmp(localattn_status_name(LOCALATTN_INVALID_ARGUMENT), "LOCALATTN_INVALID_ARGUMENT") == 0);

    printf("localattn %s (%s), variant %s: %d failures\n", localattn_version(), localattn_build_info(), name, failures);
    return failures != 0;
}
