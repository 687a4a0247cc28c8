/* Non-local means (Buades, Coll and Morel, 2005) as one call of local attention: every pixel becomes the mean of the
 * pixels in a window around it, each weighted by how alike the 3 x 3 neighbourhoods of the two are.
 *
 *     nonlocal_means noisy.ppm smooth.ppm [window [strength]]
 *
 * Images are binary PPM (P6) with 8 bits a channel, which most programs write: convert photo.jpg noisy.ppm. The window
 * is in pixels, 15 unless told; the strength is the noise's standard deviation, in 1/255, 20 unless told.
 *
 * The weight is exp(-|a - b|^2 / h^2) for neighbourhoods a of the query and b of the key. Since the softmax divides out
 * what a query has in common, that is attention with the score (2 a.b - |b|^2) / h^2: a query of (2a, -1), a key of
 * (b, |b|^2), and a scale of 1 / h^2. */
#include <localattn/localattn.h>
#include <stdio.h>
#include <stdlib.h>

enum { COLOURS = 3, NEIGHBOURHOOD = 9 * COLOURS, CHANNELS = NEIGHBOURHOOD + 1 };

typedef struct {
    int64_t height, width;
    float *pixels; /* [height][width][COLOURS], 0 to 255 */
} image;

/* The next number of a PPM header; comments run from # to the end of the line. */
static int read_number(FILE *file, int64_t *number) {
    int c;
    do {
        c = fgetc(file);
        if (c == '#') {
            while (c != '\n' && c != EOF) c = fgetc(file);
        }
    } while (c == ' ' || c == '\t' || c == '\r' || c == '\n');
    if (c < '0' || c > '9') return 0;
    for (*number = 0; c >= '0' && c <= '9'; c = fgetc(file)) {
        *number = *number * 10 + (c - '0');
        if (*number > 65535) return 0;
    }
    return 1; /* and the one white space after the number is consumed */
}

static const char *read_image(const char *path, image *result) {
    FILE *file = fopen(path, "rb");
    const char *problem = NULL;
    int64_t most = 0, count, i;
    if (!file) return "cannot be opened";
    if (fgetc(file) != 'P' || fgetc(file) != '6' || !read_number(file, &result->width) ||
        !read_number(file, &result->height) || !read_number(file, &most) || most != 255 || !result->width ||
        !result->height) {
        problem = "is no binary PPM (P6) with 8 bits a channel";
    } else {
        count = result->height * result->width * COLOURS;
        result->pixels = malloc((size_t)count * sizeof(float));
        if (!result->pixels) problem = "does not fit into memory";
        for (i = 0; !problem && i < count; ++i) {
            const int c = fgetc(file);
            if (c == EOF) problem = "ends too early";
            result->pixels[i] = (float)c;
        }
    }
    fclose(file);
    return problem;
}

static const char *write_image(const char *path, const image *result) {
    FILE *file = fopen(path, "wb");
    const int64_t count = result->height * result->width * COLOURS;
    int64_t i;
    int failed;
    if (!file) return "cannot be written";
    fprintf(file, "P6\n%ld %ld\n255\n", (long)result->width, (long)result->height);
    for (i = 0; i < count; ++i) {
        const float x = result->pixels[i] + 0.5f;
        fputc(x < 0 ? 0 : x > 255 ? 255 : (int)x, file);
    }
    failed = ferror(file);
    return fclose(file) || failed ? "could not be written whole" : NULL;
}

static int64_t clamped(int64_t at, int64_t extent) { return at < 0 ? 0 : at >= extent ? extent - 1 : at; }

/* Queries (2a, -1) and keys (b, |b|^2), each [height][width][CHANNELS]; a neighbourhood repeats the image's edge. */
static void describe(const image *of, float *queries, float *keys) {
    int64_t y, x, dy, dx, c;
    for (y = 0; y < of->height; ++y) {
        for (x = 0; x < of->width; ++x) {
            float square = 0;
            float *query = queries + (y * of->width + x) * CHANNELS, *key = keys + (y * of->width + x) * CHANNELS;
            int at = 0;
            for (dy = -1; dy <= 1; ++dy) {
                for (dx = -1; dx <= 1; ++dx) {
                    const int64_t pixel = clamped(y + dy, of->height) * of->width + clamped(x + dx, of->width);
                    for (c = 0; c < COLOURS; ++c, ++at) {
                        const float value = of->pixels[pixel * COLOURS + c];
                        query[at] = 2 * value;
                        key[at] = value;
                        square += value * value;
                    }
                }
            }
            query[at] = -1;
            key[at] = square;
        }
    }
}

/* A tensor of `channels` channels for each pixel. */
static localattn_tensor pixels(const image *of, float *data, int64_t channels) {
    localattn_tensor tensor = {0};
    tensor.data = data;
    tensor.spatial_stride[0] = of->width * channels;
    tensor.spatial_stride[1] = channels;
    tensor.channel_stride = 1;
    return tensor;
}

int main(int count, char **arguments) {
    image noisy = {0}, smooth = {0};
    const char *problem;
    float *queries, *keys;
    const int window = count > 3 ? atoi(arguments[3]) : 15;
    const double strength = count > 4 ? atof(arguments[4]) : 20;
    localattn_attention_params p = LOCALATTN_INIT(localattn_attention_params);
    size_t described;

    if (count < 3 || count > 5 || !(strength > 0)) {
        fprintf(stderr, "usage: %s noisy.ppm smooth.ppm [window [strength]]\n", arguments[0]);
        return 2;
    }
    problem = read_image(arguments[1], &noisy);
    if (problem) {
        fprintf(stderr, "%s %s\n", arguments[1], problem);
        return 1;
    }
    smooth.height = noisy.height;
    smooth.width = noisy.width;
    described = (size_t)(noisy.height * noisy.width) * CHANNELS * sizeof(float);
    smooth.pixels = malloc((size_t)(noisy.height * noisy.width) * COLOURS * sizeof(float));
    queries = malloc(described);
    keys = malloc(described);
    if (!smooth.pixels || !queries || !keys) {
        fprintf(stderr, "%s does not fit into memory\n", arguments[1]);
        return 1;
    }
    describe(&noisy, queries, keys);

    p.rank = 2;
    p.batch = p.heads = 1;
    p.channels = CHANNELS;
    p.value_channels = COLOURS;
    p.query_extent[0] = p.key_extent[0] = noisy.height;
    p.query_extent[1] = p.key_extent[1] = noisy.width;
    p.kernel_size[0] = p.kernel_size[1] = window;
    p.has_scale = 1;
    p.scale = 1 / (NEIGHBOURHOOD * 2 * strength * strength); /* two noisy neighbourhoods differ by so much */
    p.query = pixels(&noisy, queries, CHANNELS);
    p.key = pixels(&noisy, keys, CHANNELS);
    p.value = pixels(&noisy, noisy.pixels, COLOURS);
    p.output = pixels(&smooth, smooth.pixels, COLOURS);
    if (localattn_attention_forward(NULL, &p) != LOCALATTN_OK) {
        fprintf(stderr, "%s\n", localattn_last_error());
        return 1;
    }

    problem = write_image(arguments[2], &smooth);
    if (problem) fprintf(stderr, "%s %s\n", arguments[2], problem);
    free(keys);
    free(queries);
    free(smooth.pixels);
    free(noisy.pixels);
    return problem != NULL;
}
