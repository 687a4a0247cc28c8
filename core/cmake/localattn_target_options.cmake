# localattn_target_options(<target>): the language level, warnings and sanitizers that everything compiled here shares.
function(localattn_target_options target)
    set_target_properties(${target} PROPERTIES
        C_STANDARD 99 C_STANDARD_REQUIRED ON C_EXTENSIONS OFF
        CXX_STANDARD 17 CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF
        C_VISIBILITY_PRESET hidden CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON
        POSITION_INDEPENDENT_CODE ON)
    target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic $<$<BOOL:${LOCALATTN_WERROR}>:-Werror>)
    if(LOCALATTN_SANITIZE)
        target_compile_options(${target} PRIVATE
            -fsanitize=${LOCALATTN_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
        target_link_options(${target} PRIVATE -fsanitize=${LOCALATTN_SANITIZE})
    endif()
endfunction()
