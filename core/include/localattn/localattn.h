/* localattn: local (sliding-window) attention on images, signals and video.
 *
 * Every query attends to a window of keys around it:
 *
 *     score[q, u]  = scale * dot(query[q], key[k(q, u)]) + bias[q, u]
 *     output[q]    = sum_u softmax_u(score[q, :]) * value[k(q, u)]
 *     lse[q]       = log sum_u exp(score[q, u])                    (natural logarithm)
 *
 * where u runs over the entries of a kernel_size window. Which key k(q, u) is follows the window rule below.
 *
 * The contract, for every function here
 * -------------------------------------
 * - C99. No function exits, aborts, throws or prints. Every failure is a status, and localattn_last_error()
 *   gives, to the thread that made the call, one sentence that names the field, its value and what is allowed.
 *   Arguments are checked before any tensor is touched: a call that fails has written nothing, unless the caller's
 *   own executor or device failed half-way.
 * - Structs are plain and append-only. Set `struct_size = sizeof(the struct)` and zero everything else
 *   (LOCALATTN_INIT does both); then zero means the default. A shorter struct than this header's is completed
 *   with zeros; a longer one is accepted if what this library does not know of it is zero.
 * - Tensors are a data pointer, aligned to the element, and element strides. Any layout is accepted (channels-last,
 *   channels-first, views, negative strides), and inputs may overlap themselves; a stride of 0 broadcasts an input.
 *   The elements of a result must not overlap one another, another result or an input. Offsets are computed in
 *   64 bits. Strides along an extent of 1 do not matter.
 * - Sizes are at most 2^31-1 along each axis. A batch, a query_extent or a key_extent of 0 is no error: results
 *   are then empty, or those of queries that see no key. A tensor without elements may have NULL for data.
 * - A NaN or an infinity reaches the queries whose window holds it, as in plain arithmetic, and no other.
 * - Nothing is kept between calls, no thread either. Calls from several threads at once, and from a process that
 *   was forked from one that has made calls, are safe.
 * - The same variant gives the same bits for every number of workers.
 *
 * The window rule, for one axis
 * -----------------------------
 * With Lq queries, Lk keys, kernel size k, stride s (1 <= s <= k) and dilation d, query i has
 *   1. its centre c = floor((2i+1) * Lk / (2 * Lq)), the nearest key (i itself when Lq = Lk);
 *   2. dilation splits the keys into residue classes modulo d; in class c % d, which holds n keys, c becomes c / d;
 *   3. leader = (c/s)*s + s/2, on a causal axis (c/s)*s + s-1; under border shift and on causal axes at most n-1;
 *   4. entries u = 0..k-1 are the keys start + u of that class, where start is
 *        border shift:  max(0, min(leader - k/2, n - k)); entries >= n are absent        (NATTEN)
 *        border mask:   leader - k/2; entries outside the map are left out
 *        border zero:   the same; entries outside stay in the softmax with score 0 (plus bias) and value 0
 *        causal axis:   max(leader - k + 1, 0), and entries after c are absent, whatever the border.
 * Divisions round down. Several axes combine by product; entries are numbered in raster order. With
 * `raster_causal` (odd kernels, stride 1, border mask or zero, no is_causal) only the first prod(k)/2 + 1 entries
 * in raster order remain, the centre last. A query that sees no key gives zeros, lse = -infinity and zero gradients.
 */
#ifndef LOCALATTN_LOCALATTN_H
#define LOCALATTN_LOCALATTN_H

#include <stddef.h>
#include <stdint.h>

#define LOCALATTN_VERSION_MAJOR 0
#define LOCALATTN_VERSION_MINOR 1
#define LOCALATTN_VERSION_PATCH 0

/* The library is compiled with every other symbol hidden. */
#if defined(__GNUC__)
#define LOCALATTN_API __attribute__((visibility("default")))
#else
#define LOCALATTN_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum localattn_status {
    LOCALATTN_OK = 0,
    LOCALATTN_INVALID_ARGUMENT = 1,    /* a field's value is not allowed */
    LOCALATTN_UNSUPPORTED_DTYPE = 2,   /* the dtype is unknown, or no variant built here computes it */
    LOCALATTN_UNSUPPORTED = 3,         /* valid, but nothing built here, or the forced variant, can do it */
    LOCALATTN_WORKSPACE_TOO_SMALL = 4, /* context.workspace_size is below what the query function answers */
    LOCALATTN_OUT_OF_MEMORY = 5,       /* the host could not give the scratch memory */
    LOCALATTN_DEVICE_ERROR = 6,        /* the device or its driver failed, or there is none */
    LOCALATTN_INTERNAL_ERROR = 7       /* a defect of this library */
} localattn_status;

typedef enum localattn_dtype {
    LOCALATTN_FLOAT32 = 0,
    LOCALATTN_FLOAT64 = 1,
    LOCALATTN_FLOAT16 = 2, /* IEEE binary16 */
    LOCALATTN_BFLOAT16 = 3
} localattn_dtype;

typedef enum localattn_border {
    LOCALATTN_BORDER_MASK = 0,
    LOCALATTN_BORDER_ZERO = 1,
    LOCALATTN_BORDER_SHIFT = 2
} localattn_border;

typedef enum localattn_device { LOCALATTN_CPU = 0, LOCALATTN_CUDA = 1 } localattn_device;

typedef enum localattn_pass { LOCALATTN_FORWARD = 0, LOCALATTN_BACKWARD = 1 } localattn_pass;

/* Runs work on the caller's threads. `run` must call task(argument, i) once for every i in [0, num_tasks), in any
 * order, concurrently or one after another, and return when all have returned; num_tasks <= num_workers. */
typedef struct localattn_executor {
    void *self;
    int32_t num_workers; /* >= 1 */
    void (*run)(void *self, int32_t num_tasks, void (*task)(void *argument, int32_t index), void *argument);
} localattn_executor;

/* Where and with what a call runs. NULL instead of a context means all defaults: the CPU, all its cores. */
typedef struct localattn_context {
    size_t struct_size;
    int32_t device_type;                /* localattn_device */
    int32_t device_index;               /* CUDA: the device's number */
    void *stream;                       /* CUDA: the cudaStream_t to launch on */
    const localattn_executor *executor; /* CPU: NULL starts threads for the call and joins them before it returns */
    int32_t num_threads;                /* CPU without an executor: how many; 0 is one per core this process may use */
    int32_t reserved;
    void *workspace;       /* 64-byte aligned scratch, or NULL: the CPU then takes and returns memory itself */
    size_t workspace_size; /* bytes */
    const char *variant;   /* force a variant by name; NULL or "" takes the best that accepts. Without a name here the
                              environment's LOCALATTN_CPU_ISA forces one */
} localattn_context;

/* A strided tensor; strides count elements. Each tensor of the params has the axes that its comment lists, in any order
 * in memory; strides of other axes are not read. */
typedef struct localattn_tensor {
    void *data; /* NULL: absent */
    int64_t batch_stride;
    int64_t spatial_stride[3]; /* in the order of query_extent */
    int64_t head_stride;
    int64_t channel_stride; /* or the stride of the window entry, where the role has that axis */
} localattn_tensor;

/* Fused window attention, forward and backward.
 *
 * The forward reads query, key, value (and biases, key_mask) and writes output and, if given, lse.
 * The backward reads those inputs, output, lse (both as the forward wrote them), grad_output and, if given, grad_lse;
 * it writes each grad_* that is given.
 *
 * Element types: `dtype` for query, key, value, output, the biases, and the gradients of the first five. float32
 * (float64 for float64) for lse, grad_lse and the gradients of biases. uint8 for key_mask. Sums are accumulated in
 * float32 or wider, float64 in float64.
 *
 * Of every array of 3 the first `rank` are read. */
typedef struct localattn_attention_params {
    size_t struct_size;
    int32_t dtype; /* localattn_dtype */
    int32_t rank;  /* 1, 2 or 3 spatial axes */
    int64_t batch;
    int64_t heads;          /* of query */
    int64_t kv_heads;       /* divides heads; 0 means heads. Query head h uses key head h / (heads / kv_heads) */
    int64_t channels;       /* of query and key, per head; at least 1 */
    int64_t value_channels; /* of value and output, per head; 0 means channels */
    int64_t query_extent[3];
    int64_t key_extent[3]; /* 0 is an empty map, which no query sees */
    int64_t kernel_size[3];
    int64_t stride[3];   /* 0 means 1; at most kernel_size */
    int64_t dilation[3]; /* 0 means 1 */
    int32_t is_causal[3];
    int32_t raster_causal;
    int32_t border;    /* localattn_border */
    int32_t has_scale; /* 0: scale is channels^-0.5 */
    double scale;

    localattn_tensor query; /* (batch, *query_extent, heads, channels) */
    localattn_tensor key;   /* (batch, *key_extent, kv_heads, channels) */
    localattn_tensor value; /* (batch, *key_extent, kv_heads, value_channels) */
    /* Biases, each optional, are added to the score; to that of a zero outside the map, too. */
    localattn_tensor bias;         /* (batch, *query_extent, heads, prod(kernel_size)); with raster_causal the entries
                                      that are absent are not read */
    localattn_tensor rel_pos_bias; /* (heads, 2*kernel_size-1 per axis in spatial_stride): key - centre + k - 1, in
                                      dilated coordinates */
    localattn_tensor axis_bias[3]; /* each (batch, *query_extent, heads, kernel_size of that axis) */
    localattn_tensor key_mask;     /* (batch, *key_extent), uint8, optional: nonzero attends, 0 leaves that key out. The
                                      zeros outside the map are no keys and stay */

    localattn_tensor output; /* (batch, *query_extent, heads, value_channels) */
    localattn_tensor lse;    /* (batch, *query_extent, heads) */

    localattn_tensor grad_output; /* like output */
    localattn_tensor grad_lse;    /* like lse */
    localattn_tensor grad_query;
    localattn_tensor grad_key;
    localattn_tensor grad_value;
    /* Shaped as the bias, which must then be given. A stride of 0 sums over that axis, in a fixed order (an
       extent of 0, too: the sum is 0). Entries that are never present get 0. */
    localattn_tensor grad_bias;
    localattn_tensor grad_rel_pos_bias;
    localattn_tensor grad_axis_bias[3];
} localattn_attention_params;

/* The unfused pair, for those who change the scores in between or want the attention map:
 *
 *     similarity:  scores[q, u] = dot(query[q], key[k(q, u)])              (no scale)
 *     weighting:   output[q]    = sum over u of weights[q, u] * value[k(q, u)]
 *
 * over the same window rule. scores and weights are (batch, *query_extent, heads, window), where window is
 * prod(kernel_size), or prod(kernel_size) / 2 + 1 with raster_causal, in raster order, numbered along channel_stride.
 *
 * Scores of entries outside the map are `fill` (without has_fill: 0 under border zero, else -infinity), those of absent
 * entries always -infinity. What weights hold for entries that are no key is not read, and their gradient is 0; neither
 * is a gradient of such scores.
 *
 * Forward: reads query and key, writes scores; reads weights and value, writes output. Backward: reads the inputs (each
 * only if the gradient of the other one is asked for) and the gradient of the result, writes each gradient given. All
 * tensors have elements of `dtype`; sums are accumulated in float32 or wider, float64 in float64. The window's fields
 * are those of localattn_attention_params. */
typedef struct localattn_similarity_params {
    size_t struct_size;
    int32_t dtype; /* localattn_dtype */
    int32_t rank;  /* 1, 2 or 3 spatial axes */
    int64_t batch;
    int64_t heads;
    int64_t channels; /* per head; at least 1 */
    int64_t query_extent[3];
    int64_t key_extent[3];
    int64_t kernel_size[3];
    int64_t stride[3];   /* 0 means 1; at most kernel_size */
    int64_t dilation[3]; /* 0 means 1 */
    int32_t is_causal[3];
    int32_t raster_causal;
    int32_t border; /* localattn_border */
    int32_t has_fill;
    double fill;

    localattn_tensor query;  /* (batch, *query_extent, heads, channels) */
    localattn_tensor key;    /* (batch, *key_extent, heads, channels) */
    localattn_tensor scores; /* (batch, *query_extent, heads, window) */

    localattn_tensor grad_scores;
    localattn_tensor grad_query;
    localattn_tensor grad_key;
} localattn_similarity_params;

typedef struct localattn_weighting_params {
    size_t struct_size;
    int32_t dtype; /* localattn_dtype */
    int32_t rank;  /* 1, 2 or 3 spatial axes */
    int64_t batch;
    int64_t heads;
    int64_t channels; /* of value and output, per head; at least 1 */
    int64_t query_extent[3];
    int64_t key_extent[3];
    int64_t kernel_size[3];
    int64_t stride[3];   /* 0 means 1; at most kernel_size */
    int64_t dilation[3]; /* 0 means 1 */
    int32_t is_causal[3];
    int32_t raster_causal;
    int32_t border; /* localattn_border */
    int32_t reserved;

    localattn_tensor weights; /* (batch, *query_extent, heads, window) */
    localattn_tensor value;   /* (batch, *key_extent, heads, channels) */
    localattn_tensor output;  /* (batch, *query_extent, heads, channels) */

    localattn_tensor grad_output;
    localattn_tensor grad_weights;
    localattn_tensor grad_value;
} localattn_weighting_params;

/* Attention whose cost grows linearly with the number of pixels (Shen et al., 2018, arXiv 1812.01243): the key is
 * normalised over positions, the query over its channels, and nothing is scaled.
 *
 *     context[j, e] = sum over keys n of softmax_n(key[n, j]) * value[n, e]
 *     output[q, e]  = sum over channels j of softmax_j(query[q, j]) * context[j, e]
 *
 * per batch and head, over all positions of a map; the two maps may differ. Neither normalised tensor is stored. Keys
 * that key_mask leaves out count for nothing; where no key is left, context is 0 and key_lse -infinity.
 *
 * The forward reads query, key, value, key_mask, and writes output and, if given, context and key_lse. The backward
 * reads those inputs, context and key_lse (as the forward wrote them) and grad_output, and writes each gradient given.
 * dtype as for attention; context and key_lse are float32 (float64 for float64). */
typedef struct localattn_linear_attention_params {
    size_t struct_size;
    int32_t dtype; /* localattn_dtype */
    int32_t rank;  /* 1, 2 or 3 spatial axes */
    int64_t batch;
    int64_t heads;
    int64_t channels;       /* of query and key, per head; at least 1 */
    int64_t value_channels; /* of value and output, per head; 0 means channels */
    int64_t query_extent[3];
    int64_t key_extent[3];

    localattn_tensor query;    /* (batch, *query_extent, heads, channels) */
    localattn_tensor key;      /* (batch, *key_extent, heads, channels) */
    localattn_tensor value;    /* (batch, *key_extent, heads, value_channels) */
    localattn_tensor key_mask; /* (batch, *key_extent), uint8: nonzero attends, 0 leaves that key out */
    localattn_tensor output;   /* (batch, *query_extent, heads, value_channels) */
    localattn_tensor context;  /* (batch, heads, channels in spatial_stride[0], value_channels) */
    localattn_tensor key_lse;  /* (batch, heads, channels): log-sum-exp of the keys over their positions */

    localattn_tensor grad_output;
    localattn_tensor grad_query;
    localattn_tensor grad_key;
    localattn_tensor grad_value;
} localattn_linear_attention_params;

/* Attention of every region of queries to a few regions of keys (bi-level routing, Zhu et al., 2023, arXiv 2303.08810).
 * Both maps are cut into one grid of regions, numbered row by row. The queries of region r attend to all pixels of the
 * regions region_index[r, :], which are read where they lie; a region chosen twice counts twice. region_weight
 * multiplies the keys and the values of a choice. All indices are checked before anything else is read. On CUDA the
 * device checks them: an index out of range stops it with a device-side assertion, which the next synchronisation
 * reports.
 *
 * The forward writes output and, if given, lse; the backward reads the inputs, output, lse, grad_output and, if given,
 * grad_lse, and writes each gradient given. dtype as for attention; lse, grad_lse and grad_region_weight are float32
 * (float64 for float64). A query without keys (topk 0) gives zeros, lse = -infinity and zero gradients. */
typedef struct localattn_routed_attention_params {
    size_t struct_size;
    int32_t dtype;     /* localattn_dtype */
    int32_t has_scale; /* 0: scale is channels^-0.5 */
    double scale;
    int64_t batch;
    int64_t heads;
    int64_t channels;       /* of query and key, per head; at least 1 */
    int64_t value_channels; /* of value and output, per head; 0 means channels */
    int64_t query_extent[2];
    int64_t key_extent[2];
    int64_t region_size[2];    /* pixels per axis of a region of queries; divides query_extent */
    int64_t kv_region_size[2]; /* of keys; 0 means region_size; gives as many regions per axis */
    int64_t topk;              /* choices per region */
    int64_t reserved;

    localattn_tensor query;         /* (batch, *query_extent, heads, channels) */
    localattn_tensor key;           /* (batch, *key_extent, heads, channels) */
    localattn_tensor value;         /* (batch, *key_extent, heads, value_channels) */
    localattn_tensor region_index;  /* (batch, regions in spatial_stride[0], topk), int64 */
    localattn_tensor region_weight; /* the same, of dtype; absent: all 1 */
    localattn_tensor output;        /* (batch, *query_extent, heads, value_channels) */
    localattn_tensor lse;           /* (batch, *query_extent, heads) */

    localattn_tensor grad_output;
    localattn_tensor grad_lse;
    localattn_tensor grad_query;
    localattn_tensor grad_key;
    localattn_tensor grad_value;
    localattn_tensor grad_region_weight;
} localattn_routed_attention_params;

/* localattn_attention_params p = LOCALATTN_INIT(localattn_attention_params); zeroed, but for its struct_size. */
#ifdef __cplusplus
#define LOCALATTN_INIT(type)                \
    ([] {                                   \
        type zeroed{};                      \
        zeroed.struct_size = sizeof zeroed; \
        return zeroed;                      \
    }())
#else
#define LOCALATTN_INIT(type) ((type){.struct_size = sizeof(type)})
#endif

/* Each status above may come back from these. LOCALATTN_UNSUPPORTED is for a device that was not built in, and for a
 * forced variant that declines; left to choose, the library always finds a variant. */
LOCALATTN_API localattn_status localattn_attention_forward(const localattn_context *context,
                                                           const localattn_attention_params *params);
LOCALATTN_API localattn_status localattn_attention_backward(const localattn_context *context,
                                                            const localattn_attention_params *params);

/* Bytes of workspace that the same call would use with this context's executor or num_threads, which matter: so does
 * its variant, but not its workspace. Nothing is read through data pointers here, and those of required tensors may be
 * NULL; of optional ones, any that is not NULL says that the tensor will be there. */
LOCALATTN_API localattn_status localattn_attention_workspace_size(const localattn_context *context,
                                                                  const localattn_attention_params *params,
                                                                  localattn_pass pass, size_t *size);

/* The variant that would serve the call. `name` (may be NULL) receives a string that lives as long as the library;
 * `report` (may be NULL) of report_size bytes receives one line per better variant that declined, "name: reason\n",
 * cut to fit and always terminated. Data pointers as for the workspace query. */
LOCALATTN_API localattn_status localattn_attention_variant(const localattn_context *context,
                                                           const localattn_attention_params *params,
                                                           localattn_pass pass, const char **name, char *report,
                                                           size_t report_size);

/* Forward and backward, workspace and variant, as those of attention. */
LOCALATTN_API localattn_status localattn_similarity_forward(const localattn_context *context,
                                                            const localattn_similarity_params *params);
LOCALATTN_API localattn_status localattn_similarity_backward(const localattn_context *context,
                                                             const localattn_similarity_params *params);
LOCALATTN_API localattn_status localattn_similarity_workspace_size(const localattn_context *context,
                                                                   const localattn_similarity_params *params,
                                                                   localattn_pass pass, size_t *size);
LOCALATTN_API localattn_status localattn_similarity_variant(const localattn_context *context,
                                                            const localattn_similarity_params *params,
                                                            localattn_pass pass, const char **name, char *report,
                                                            size_t report_size);
LOCALATTN_API localattn_status localattn_weighting_forward(const localattn_context *context,
                                                           const localattn_weighting_params *params);
LOCALATTN_API localattn_status localattn_weighting_backward(const localattn_context *context,
                                                            const localattn_weighting_params *params);
LOCALATTN_API localattn_status localattn_weighting_workspace_size(const localattn_context *context,
                                                                  const localattn_weighting_params *params,
                                                                  localattn_pass pass, size_t *size);
LOCALATTN_API localattn_status localattn_weighting_variant(const localattn_context *context,
                                                           const localattn_weighting_params *params,
                                                           localattn_pass pass, const char **name, char *report,
                                                           size_t report_size);
LOCALATTN_API localattn_status localattn_linear_attention_forward(const localattn_context *context,
                                                                  const localattn_linear_attention_params *params);
LOCALATTN_API localattn_status localattn_linear_attention_backward(const localattn_context *context,
                                                                   const localattn_linear_attention_params *params);
LOCALATTN_API localattn_status localattn_linear_attention_workspace_size(
    const localattn_context *context, const localattn_linear_attention_params *params, localattn_pass pass,
    size_t *size);
LOCALATTN_API localattn_status localattn_linear_attention_variant(const localattn_context *context,
                                                                  const localattn_linear_attention_params *params,
                                                                  localattn_pass pass, const char **name, char *report,
                                                                  size_t report_size);
LOCALATTN_API localattn_status localattn_routed_attention_forward(const localattn_context *context,
                                                                  const localattn_routed_attention_params *params);
LOCALATTN_API localattn_status localattn_routed_attention_backward(const localattn_context *context,
                                                                   const localattn_routed_attention_params *params);
LOCALATTN_API localattn_status localattn_routed_attention_workspace_size(
    const localattn_context *context, const localattn_routed_attention_params *params, localattn_pass pass,
    size_t *size);
LOCALATTN_API localattn_status localattn_routed_attention_variant(const localattn_context *context,
                                                                  const localattn_routed_attention_params *params,
                                                                  localattn_pass pass, const char **name, char *report,
                                                                  size_t report_size);

/* The variants built into this library, best first: 0 <= index < localattn_variant_count(). `unavailable` is NULL if
 * this machine can run it, else the reason. All strings live as long as the library. */
typedef struct localattn_variant_info {
    size_t struct_size;
    const char *name;
    const char *description;
    const char *unavailable;
} localattn_variant_info;

LOCALATTN_API int32_t localattn_variant_count(void);
LOCALATTN_API localattn_status localattn_get_variant_info(int32_t index, localattn_variant_info *info);

/* "major.minor.patch" of the library that is running, which may be newer than this header. */
LOCALATTN_API const char *localattn_version(void);
/* Compiler, build type and languages the library was built with, for bug reports. */
LOCALATTN_API const char *localattn_build_info(void);
/* The sentence for this thread's last failed call; "" if none failed yet. Valid until this thread's next call. */
LOCALATTN_API const char *localattn_last_error(void);
/* The status's name, as in "LOCALATTN_INVALID_ARGUMENT". */
LOCALATTN_API const char *localattn_status_name(localattn_status status);

#ifdef __cplusplus
}
#endif
#endif
