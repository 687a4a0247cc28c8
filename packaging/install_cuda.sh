#!/usr/bin/env bash
# In a manylinux_2_28 container: NVIDIA's compiler for cu121, cu124 and so on, at /usr/local/cuda, and a g++ that it
# accepts, /usr/local/bin/cuda-host-g++. Nothing for cpu.
set -euo pipefail
flavour=${1:?usage: install_cuda.sh cpu|cu121|...}
[ "$flavour" = cpu ] && exit 0
number=${flavour#cu}
version=${number%?}-${number: -1} # cu121 is 12-1
dnf config-manager --add-repo https://developer.download.nvidia.com/compute/cuda/repos/rhel8/x86_64/cuda-rhel8.repo
dnf install -y "cuda-nvcc-$version" "cuda-cudart-devel-$version" "cuda-cccl-$version"
if [ "${number%?}" = 12 ]; then
    dnf install -y gcc-toolset-12-gcc-c++ # the newest that all of CUDA 12 takes
    ln -sf /opt/rh/gcc-toolset-12/root/usr/bin/g++ /usr/local/bin/cuda-host-g++
else
    ln -sf "$(command -v g++)" /usr/local/bin/cuda-host-g++
fi
/usr/local/cuda/bin/nvcc --version
