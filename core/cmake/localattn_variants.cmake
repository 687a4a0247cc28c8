# localattn_cpu_variant(<file> [<flag>...])
#
# Adds one variant: src/cpu/isa/<name>.cpp, which defines the record <name>_variant, compiled with its own flags. Call it
# best first: dispatch.cpp tries variants in this order. Only these files may get instruction set flags. A flag on any
# other file would let the compiler use those instructions in code that runs before the CPU has been asked.
function(localattn_cpu_variant file)
    get_filename_component(name ${file} NAME_WE)
    target_sources(localattn_objects PRIVATE ${file})
    # Without optimisation inline functions would stay behind as weak symbols, compiled for this instruction set, of which
    # the linker keeps one copy for all.
    set(optimised $<$<OR:$<CONFIG:Debug>,$<STREQUAL:$<CONFIG>,>>:-O1>)
    # The unrolled kernels would take gcc ten minutes with every check on every load. Bounds are what matters there:
    # loads are declared unaligned, and no pointer is made from an integer.
    set(checked "")
    if(LOCALATTN_SANITIZE MATCHES "undefined")
        set(checked -O1 -fno-sanitize=alignment,null,object-size)
    endif()
    set_source_files_properties(${file} PROPERTIES COMPILE_OPTIONS "${ARGN};${optimised};${checked}")
    set_property(TARGET localattn_objects APPEND PROPERTY LOCALATTN_CPU_VARIANTS ${name})
endfunction()
