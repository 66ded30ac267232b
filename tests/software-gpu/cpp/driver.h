// What the doubles of other libraries need of the double of libcuda.
#pragma once
#include "software_gpu.h"
#include <functional>

// Queues work on a stream.
OF_EXPORT void software_gpu_enqueue(void *stream, std::function<void()> run);
// Queues work that somebody else does: `start` begins it, and the stream goes on when `is_done` says so. Any thread may
// ask.
OF_EXPORT void software_gpu_enqueue_outside(void *stream, std::function<void()> start, std::function<bool()> is_done);
OF_EXPORT bool software_gpu_is_device_memory(const void *at, size_t bytes);
