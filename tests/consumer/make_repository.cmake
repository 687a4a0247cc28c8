# cmake -DSOURCE=<source tree> -DREPOSITORY=<folder to make> -DTAG=<tag> -DGIT=git -P make_repository.cmake
# A git repository of what a project that takes the library in needs, as it stands in the source tree now.
file(REMOVE_RECURSE ${REPOSITORY})
file(COPY ${SOURCE}/CMakeLists.txt ${SOURCE}/core DESTINATION ${REPOSITORY})
foreach(command
    "init --quiet"
    "add ."
    "-c user.name=test -c user.email=test@localhost -c commit.gpgsign=false commit --quiet --message test"
    "-c tag.gpgsign=false tag ${TAG}")
    separate_arguments(arguments UNIX_COMMAND ${command})
    execute_process(COMMAND ${GIT} ${arguments} WORKING_DIRECTORY ${REPOSITORY} COMMAND_ERROR_IS_FATAL ANY)
endforeach()
