// The public header on its own as C++17; test_c.c is the same for C99. Both with every warning an error.
#include <localattn/localattn.h>

#include <type_traits>

static_assert(std::is_trivial<localattn_attention_params>::value &&
                  std::is_standard_layout<localattn_attention_params>::value,
              "params are plain data");
static_assert(std::is_trivial<localattn_context>::value && std::is_standard_layout<localattn_context>::value,
              "so is the context");

int main() {
    const localattn_attention_params params = LOCALATTN_INIT(localattn_attention_params);
    const localattn_context context = LOCALATTN_INIT(localattn_context);
    const localattn_variant_info info = LOCALATTN_INIT(localattn_variant_info);
    const bool sized =
        params.struct_size == sizeof params && context.struct_size == sizeof context && info.struct_size == sizeof info;
    const bool zeroed = params.kernel_size[2] == 0 && !params.grad_axis_bias[2].data && !context.variant && !info.name;
    return sized && zeroed && localattn_attention_forward(&context, &params) == LOCALATTN_INVALID_ARGUMENT ? 0 : 1;
}
