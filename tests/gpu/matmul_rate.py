"""Prints the rate of torch's bfloat16 matrix product, the ceiling that attention's useful work is compared with."""

import torch

n, repetitions = 8192, 20
a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
times = []
for _ in range(repetitions + 3):
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.mm(a, b)
    stop.record()
    torch.cuda.synchronize()
    times.append(start.elapsed_time(stop))
median = sorted(times[3:])[repetitions // 2]
rate = 2 * n**3 / median / 1e9
print(f"{torch.cuda.get_device_name()}: bfloat16 {n}x{n}x{n} matmul, median {median:.3f} ms, {rate:.0f} TFLOP/s")
