/* A window of one pixel: the output is the value. */
#include <localattn/localattn.h>
#include <stdio.h>

int main(void) {
    float query[4] = {1, 2, 3, 4}, key[4] = {4, 3, 2, 1}, value[4] = {5, 6, 7, 8}, output[4] = {0, 0, 0, 0};
    localattn_attention_params p = LOCALATTN_INIT(localattn_attention_params);
    int i;
    p.rank = 1;
    p.batch = p.heads = p.channels = p.kernel_size[0] = 1;
    p.query_extent[0] = p.key_extent[0] = 4;
    p.query.data = query;
    p.key.data = key;
    p.value.data = value;
    p.output.data = output;
    p.query.spatial_stride[0] = p.key.spatial_stride[0] = p.value.spatial_stride[0] = p.output.spatial_stride[0] = 1;
    if (localattn_attention_forward(NULL, &p) != LOCALATTN_OK) {
        printf("%s\n", localattn_last_error());
        return 1;
    }
    for (i = 0; i < 4; ++i) {
        if (output[i] != value[i]) return 1;
    }
    printf("localattn %s\n", localattn_version());
    return 0;
}
