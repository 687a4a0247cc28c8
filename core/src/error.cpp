#include "error.h"

#include <cstdarg>
#include <cstdio>

namespace localattn {

namespace {
// A fixed buffer: reporting a failure must not itself be able to fail.
thread_local char message[1024] = "";
}  // namespace

void fail(localattn_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    throw Failure{status};
}

void set_last_error(const char *text) { std::snprintf(message, sizeof message, "%s", text); }

const char *last_error() { return message; }

}  // namespace localattn
