# LOCALATTN_MANYLINUX: what is built here runs on the machines that the wheel tag manylinux_2_28 stands for, though this
# one's glibc and libstdc++ are newer. Not needed in a manylinux_2_28 container, where both are that old.
#
# The linker binds each function to the newest version that this machine's glibc has. A few got a new version after 2.28
# (exp and log lost a wrapper; the functions of libdl and libpthread moved to libc in 2.34), while the old versions are
# still there, in every later glibc. So the linker is first shown libraries of the same names in which these functions
# have their oldest version alone, and does not look into the machine's own any more: what is called from libm, libdl,
# libpthread and librt stands here, whether or not it changed. They are seen at link time only. What libstdc++ lacks
# stands in old_libstdcxx.c.
option(LOCALATTN_MANYLINUX "Link for manylinux_2_28 on a machine with a newer glibc and libstdc++" OFF)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
    set(oldest_version GLIBC_2.2.5)
    set(oldest_version_of_dlmopen GLIBC_2.3.4)
else()
    set(oldest_version GLIBC_2.17)  # aarch64
endif()
set(LOCALATTN_MANYLINUX_LIBRARIES libm.so.6 libdl.so.2 libpthread.so.0 librt.so.1)
set(libm.so.6 exp exp2 log log2 pow sqrt)
set(libdl.so.2 dladdr dlclose dlerror dlmopen dlopen dlsym dlvsym)
set(libpthread.so.0 pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join
    pthread_key_create pthread_key_delete pthread_kill pthread_mutex_trylock pthread_mutexattr_destroy
    pthread_mutexattr_init pthread_mutexattr_setpshared pthread_mutexattr_settype pthread_once pthread_rwlock_destroy
    pthread_rwlock_init pthread_rwlock_rdlock pthread_rwlock_timedrdlock pthread_rwlock_timedwrlock
    pthread_rwlock_tryrdlock pthread_rwlock_trywrlock pthread_rwlock_unlock pthread_rwlock_wrlock
    pthread_rwlockattr_destroy pthread_rwlockattr_init pthread_rwlockattr_setpshared pthread_setspecific
    pthread_spin_destroy pthread_spin_init pthread_spin_lock pthread_spin_trylock pthread_spin_unlock sem_destroy sem_init
    sem_post sem_timedwait sem_trywait sem_wait)
set(librt.so.1 shm_open shm_unlink)

if(LOCALATTN_MANYLINUX)
    foreach(library IN LISTS LOCALATTN_MANYLINUX_LIBRARIES)
        set(path ${PROJECT_BINARY_DIR}/manylinux/${library})
        list(TRANSFORM ${library} REPLACE "(.+)" "void \\1(void) {}\n" OUTPUT_VARIABLE definitions)
        string(CONCAT definitions ${definitions})
        file(CONFIGURE OUTPUT ${path}.c CONTENT "${definitions}")
        foreach(function IN LISTS ${library})
            set(version ${oldest_version})
            if(DEFINED oldest_version_of_${function})
                set(version ${oldest_version_of_${function}})
            endif()
            string(APPEND functions_of_${version} " ${function};")
            list(APPEND ${library}_versions ${version})
        endforeach()
        list(REMOVE_DUPLICATES ${library}_versions)
        set(map "")
        foreach(version IN LISTS ${library}_versions)
            string(APPEND map "${version} { global:${functions_of_${version}} };\n")
            unset(functions_of_${version})
        endforeach()
        file(CONFIGURE OUTPUT ${path}.map CONTENT "${map}")
        add_library(${library} SHARED ${path}.c)
        set_target_properties(${library} PROPERTIES PREFIX "" OUTPUT_NAME ${library} SUFFIX "" NO_SONAME ON
            LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/manylinux LINK_DEPENDS ${path}.map)
        target_compile_options(${library} PRIVATE -fno-builtin -w)
        target_link_options(${library} PRIVATE -nostdlib -Wl,-soname,${library} -Wl,--version-script=${path}.map)
    endforeach()
endif()

# localattn_manylinux(<target> [ALL])
#
# With ALL the target needs all these libraries, whether or not it uses them: what refers to them may come after them
# when it is linked, as the static CUDA runtime does.
function(localattn_manylinux target)
    if(NOT LOCALATTN_MANYLINUX)
        return()
    endif()
    set(needed --as-needed)
    if("ALL" IN_LIST ARGN)
        set(needed --no-as-needed)
    endif()
    foreach(library IN LISTS LOCALATTN_MANYLINUX_LIBRARIES)
        add_dependencies(${target} ${library})
        set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS ${PROJECT_BINARY_DIR}/manylinux/${library})
        # As an option, so that no path to it is written into the target.
        target_link_libraries(${target} PRIVATE "-Wl,--push-state,${needed},$<TARGET_FILE:${library}>,--pop-state")
    endforeach()
    target_sources(${target} PRIVATE ${PROJECT_SOURCE_DIR}/core/cmake/old_libstdcxx.c)
endfunction()
