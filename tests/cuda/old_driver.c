/* A libcuda.so.1 as of CUDA 11.4, as far as the CUDA runtime looks at one that is too old for it. */
#include <string.h>

enum { success = 0, not_initialized = 3, not_found = 500, version = 11040 };

int cuDriverGetVersion(int *answer) {
    *answer = version;
    return success;
}

int cuInit(unsigned flags) {
    (void)flags;
    return success;
}

static int anything_else(void) { return not_initialized; }

int cuGetProcAddress(const char *name, void **address, int wanted_version, unsigned long long flags) {
    (void)flags;
    *address = NULL;
    if (wanted_version > version) return not_found;
    if (strcmp(name, "cuDriverGetVersion") == 0)
        *(int (**)(int *))address = cuDriverGetVersion;
    else if (strcmp(name, "cuInit") == 0)
        *(int (**)(unsigned))address = cuInit;
    else if (*name == '\0' || strcmp(name, "cuGetProcAddress") == 0)
        *(int (**)(const char *, void **, int, unsigned long long))address = cuGetProcAddress;
    else
        *(int (**)(void))address = anything_else;
    return success;
}
