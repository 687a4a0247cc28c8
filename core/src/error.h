// How a failure leaves the library: fail() writes the thread's message and throws; the entry points in api.cpp turn
// that into a status. Inside, code may therefore assume that what it was handed is sound.
#pragma once
#include "localattn/localattn.h"

namespace localattn {

struct Failure {
    localattn_status status;
};

// `format` and what follows as in printf. The message is one sentence: the field, its value, what is allowed.
[[noreturn]] void fail(localattn_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

void set_last_error(const char *message);
const char *last_error();

}  // namespace localattn
