// What the doubles of other libraries need of the double of libcuda.
#pragma once
#include "software_gpu.h"
#include <functional>

// Queues work on a stream.
OF_EXPORT void software_gpu_enqueue(void *stream, std::function<void()> run);
OF_EXPORT bool software_gpu_is_device_memory(const void *at, size_t bytes);
