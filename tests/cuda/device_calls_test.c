/* What a CUDA call answers where it cannot run: on a build for the CPU alone, and on a machine without a driver. The
 * same program passes where there is a GPU, if the call then succeeds. */
#include <stdio.h>
#include <string.h>

#include "localattn/localattn.h"

static int failures;

static void expect(int condition, const char *what) {
    if (!condition) failures++;
    printf("%s %s\n", condition ? "ok  " : "FAIL", what);
}

int main(void) {
    float zeros[64] = {0}, output[64];
    localattn_context context = LOCALATTN_INIT(localattn_context);
    localattn_attention_params params = LOCALATTN_INIT(localattn_attention_params);
    localattn_similarity_params similarity = LOCALATTN_INIT(localattn_similarity_params);
    localattn_tensor *const tensors[] = {&params.query, &params.key, &params.value, &params.output};
    const char *name = NULL;
    localattn_status status;
    size_t size = 0;
    int i, cuda_variants = 0;

    context.device_type = LOCALATTN_CUDA;
    params.rank = 1;
    params.batch = params.heads = 1;
    params.channels = 8;
    params.query_extent[0] = params.key_extent[0] = 8;
    params.kernel_size[0] = 3;
    similarity.rank = 1;
    similarity.batch = similarity.heads = similarity.channels = similarity.kernel_size[0] = 1;
    for (i = 0; i < 4; i++) {
        tensors[i]->data = i < 3 ? zeros : output;
        tensors[i]->spatial_stride[0] = 8;
        tensors[i]->channel_stride = 1;
    }

    for (i = 0; i < localattn_variant_count(); i++) {
        localattn_variant_info info = LOCALATTN_INIT(localattn_variant_info);
        expect(localattn_get_variant_info(i, &info) == LOCALATTN_OK, "a variant describes itself");
        if (strncmp(info.name, "cuda_", 5) == 0) {
            cuda_variants++;
            printf("     %s: %s\n", info.name, info.unavailable ? info.unavailable : "available");
        }
    }
    expect((cuda_variants > 0) == LOCALATTN_HAS_CUDA, "CUDA variants are listed exactly where they are built");

    status = localattn_attention_variant(&context, &params, LOCALATTN_FORWARD, &name, NULL, 0);
    printf("     %s: %s\n", localattn_status_name(status), status == LOCALATTN_OK ? name : localattn_last_error());
    if (status == LOCALATTN_OK) {
        expect(strncmp(name, "cuda_", 5) == 0, "a device takes the call");
        return failures != 0;
    }
    expect(status == (LOCALATTN_HAS_CUDA ? LOCALATTN_DEVICE_ERROR : LOCALATTN_UNSUPPORTED),
           "the status tells which is missing");
    expect(strstr(localattn_last_error(), "install") || strstr(localattn_last_error(), "driver"),
           "the text tells what to do");
    expect(localattn_attention_forward(&context, &params) == status, "forward answers the same");
    expect(localattn_attention_backward(&context, &params) != LOCALATTN_OK, "backward fails");
    expect(localattn_attention_workspace_size(&context, &params, LOCALATTN_FORWARD, &size) == status,
           "so does the query");
    expect(localattn_similarity_variant(&context, &similarity, LOCALATTN_FORWARD, &name, NULL, 0) == status,
           "so do other operations");

    context.device_type = LOCALATTN_CPU;
    expect(localattn_attention_forward(&context, &params) == LOCALATTN_OK, "the CPU still computes");
    return failures != 0;
}
