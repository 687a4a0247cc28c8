/* Symbols that g++ 12's headers refer to and the libstdc++ of manylinux_2_28 lacks, each in terms of what it has. They
 * stay inside the library that this file is linked into. */
#define HERE __attribute__((visibility("hidden")))

/* Whether a shared_ptr may be counted without atomics (glibc 2.32): no. */
HERE char __libc_single_threaded;

/* std::__throw_bad_array_new_length() */
__attribute__((noreturn)) void __cxa_throw_bad_array_new_length(void);
HERE __attribute__((noreturn)) void throw_bad_array_new_length(void) __asm__("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length(void) { __cxa_throw_bad_array_new_length(); }

/* A std::exception_ptr is one pointer. Its copy constructor and its destructor have been in libstdc++ from the start;
 * inlined by newer headers, they call the two counting functions below. */
struct exception_ptr {
    void *object;
};
void copy_construct(struct exception_ptr *self,
                    const struct exception_ptr *other) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void destroy(struct exception_ptr *self) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");

HERE void add_reference(struct exception_ptr *self) __asm__("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void add_reference(struct exception_ptr *self) {
    struct exception_ptr never_destroyed;
    copy_construct(&never_destroyed, self);
}

HERE void release(struct exception_ptr *self) __asm__("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void release(struct exception_ptr *self) {
    struct exception_ptr last = *self;
    self->object = 0;
    destroy(&last);
}
