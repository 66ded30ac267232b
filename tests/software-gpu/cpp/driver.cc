// A test double of libcuda: the calls that the engine makes, over host memory.
//
// Streams run late. A call only queues its work; work runs when somebody waits, or by chance while other calls are made,
// and streams take turns by chance. So code that does not wait reads what was there before, and code that changes memory
// too early changes what the work reads. The seed decides. SOFTWARE_GPU_* variables (see the crate's documentation) set
// the seed, the size of memory and faults.
#include "driver.h"
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>

namespace {

enum Status {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY = 209,
    NOT_FOUND = 500,
    NOT_READY = 600,
    OUT_OF_RESOURCES = 701,
    LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
};

struct Event {
    uint64_t recorded = 0;
    uint64_t completed = 0;
};

// Queued work. It can run when the event that it waits for has completed, or what is done outside of the streams.
struct Work {
    std::function<void()> run;
    std::shared_ptr<Event> waits_for;
    uint64_t ticket = 0;
    std::function<bool()> is_done_outside;

    bool can_run() const {
        return (!waits_for || waits_for->completed >= ticket) && (!is_done_outside || is_done_outside());
    }
};

struct Graph {
    std::vector<Work> work;
};

struct Stream {
    std::deque<Work> queue;
    std::shared_ptr<Graph> capture;
    bool capture_failed = false;
    // The thread that captures in thread-local mode. None in global mode, which concerns all threads.
    std::thread::id capturing_thread;
};

std::recursive_mutex mutex;
std::set<Stream *> streams;
Stream legacy;
std::map<uintptr_t, size_t> device_memory, pinned_memory;
size_t used_bytes = 0;
std::map<void *, std::shared_ptr<Event>> events;
bool started = false;
long launches_left = -1;
int failure = OK;
thread_local void *current_context = nullptr;
int the_context;

uint64_t variable(const char *name, uint64_t otherwise) {
    const char *value = std::getenv(name);
    return value ? std::strtoull(value, nullptr, 10) : otherwise;
}

uint64_t total_bytes() { return variable("SOFTWARE_GPU_MEMORY_BYTES", uint64_t(2) << 30); }
bool exports() { return variable("SOFTWARE_GPU_DMA_BUF", 0) != 0; }
int architecture() { return int(variable("SOFTWARE_GPU_ARCHITECTURE", 90)); }

void start() {
    if (started) return;
    started = true;
    streams.insert(&legacy);
    software_gpu::set_seed(variable("SOFTWARE_GPU_SEED", 1));
    launches_left = long(variable("SOFTWARE_GPU_LAUNCHES_UNTIL_LOST", uint64_t(-1)));
}

// Counts a launch. Fails from the one on that SOFTWARE_GPU_LAUNCHES_UNTIL_LOST names.
bool is_lost() {
    if (launches_left > 0) launches_left--;
    if (launches_left == 0) failure = LAUNCH_FAILED;
    return failure != OK;
}

// Runs one piece of work of any stream. False if no stream can go on.
bool step() {
    std::vector<Stream *> able;
    for (Stream *stream : streams) {
        if (stream->queue.empty()) continue;
        if (stream->queue.front().can_run()) able.push_back(stream);
    }
    if (able.empty()) return false;
    Stream *stream = able[software_gpu::random() % able.size()];
    Work work = std::move(stream->queue.front());
    stream->queue.pop_front();
    // A lost device computes nothing, but streams still end.
    if (work.run && failure == OK) work.run();
    return true;
}

// Whether a stream waits for what is done outside.
bool waits_for_outside() {
    return std::any_of(streams.begin(), streams.end(), [](const Stream *stream) {
        return !stream->queue.empty() && stream->queue.front().is_done_outside;
    });
}

// Lets other threads make calls, and what is outside go on. The caller holds the mutex once.
void wait_for_outside() {
    mutex.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    mutex.lock();
}

void run_until(const std::function<bool()> &condition) {
    while (!condition()) {
        if (step()) continue;
        if (!waits_for_outside()) software_gpu::fault("streams wait for events that nobody records");
        wait_for_outside();
    }
}

// As in CUDA, this waits for kernels that wait for another process.
void run_all() {
    while (step() || waits_for_outside()) {
        if (waits_for_outside()) wait_for_outside();
    }
}

// Now and then, work runs early.
void maybe_run() {
    if (software_gpu::random() % 4 != 0) return;
    for (uint64_t n = software_gpu::random() % 8; n > 0 && step(); n--) {
    }
}

Stream *stream_of(void *handle) { return handle == nullptr ? &legacy : static_cast<Stream *>(handle); }

void enqueue(Stream *stream, Work work) {
    if (stream->capture) {
        stream->capture->work.push_back(std::move(work));
        return;
    }
    stream->queue.push_back(std::move(work));
    maybe_run();
}

// What may not happen while a stream captures also spoils the capture, as in CUDA.
bool refused_by_capture() {
    bool refused = false;
    for (Stream *stream : streams) {
        const bool concerns = stream->capturing_thread == std::thread::id() || stream->capturing_thread == std::this_thread::get_id();
        if (stream->capture && concerns) refused = stream->capture_failed = true;
    }
    return refused;
}

bool inside(const std::map<uintptr_t, size_t> &memory, uintptr_t at, size_t bytes) {
    auto next = memory.upper_bound(at);
    if (next == memory.begin()) return false;
    --next;
    return at + bytes <= next->first + next->second;
}

void *allocate(size_t bytes) {
    void *memory = nullptr;
    if (bytes == 0 || posix_memalign(&memory, 256, bytes) != 0) return nullptr;
    // New memory holds NaN in every format.
    std::memset(memory, 0xff, bytes);
    return memory;
}

std::shared_ptr<Event> event_of(void *handle) {
    auto found = events.find(handle);
    return found == events.end() ? nullptr : found->second;
}

} // namespace

void software_gpu_enqueue(void *stream, std::function<void()> run) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    enqueue(stream_of(stream), {std::move(run), nullptr, 0, nullptr});
}

void software_gpu_enqueue_outside(void *stream, std::function<void()> start, std::function<bool()> is_done) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    // A capture would need the work of each launch.
    if (stream_of(stream)->capture) software_gpu::fault("work outside of the streams can't be captured");
    enqueue(stream_of(stream), {std::move(start), nullptr, 0, nullptr});
    enqueue(stream_of(stream), {nullptr, nullptr, 0, std::move(is_done)});
}

bool software_gpu_is_device_memory(const void *at, size_t bytes) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    return inside(device_memory, reinterpret_cast<uintptr_t>(at), bytes);
}

// Every call runs alone, and fails if the device is lost.
#define CALL(...)                                                                                                      \
    extern "C" OF_EXPORT int __VA_ARGS__ {                                                \
        std::lock_guard<std::recursive_mutex> guard(mutex);                                                            \
        start();                                                                                                       \
        if (failure != OK) return failure;
#define END                                                                                                            \
    return OK;                                                                                                         \
    }

CALL(cuInit(unsigned)) if (variable("SOFTWARE_GPU_DEVICES", 1) == 0) return NO_DEVICE; END
CALL(cuDriverGetVersion(int *version)) *version = 13000; END
CALL(cuDeviceGetCount(int *count)) *count = int(variable("SOFTWARE_GPU_DEVICES", 1)); END
CALL(cuDeviceGet(int *device, int ordinal))
    if (ordinal < 0 || ordinal >= int(variable("SOFTWARE_GPU_DEVICES", 1))) return INVALID_DEVICE;
    *device = ordinal;
END
CALL(cuDeviceGetName(char *name, int bytes, int)) std::snprintf(name, bytes, "software GPU"); END
CALL(cuDeviceTotalMem_v2(size_t *bytes, int)) *bytes = total_bytes(); END
CALL(cuDeviceGetAttribute(int *value, int attribute, int))
    switch (attribute) {
    case 16: *value = 4; break;                           // multiprocessors
    case 75: *value = architecture() / 10; break;         // compute capability, major
    case 76: *value = architecture() % 10; break;         // and minor
    case 118: *value = exports() ? 100 : 0; break;        // order of writes by other devices: the owner sees them
    case 124: *value = exports(); break;                  // dma-buf
    default: *value = 0;
    }
END
CALL(cuDevicePrimaryCtxRetain(void **context, int)) *context = &the_context; END
CALL(cuDevicePrimaryCtxRelease_v2(int)) END
CALL(cuCtxSetCurrent(void *context)) current_context = context; END
CALL(cuCtxGetCurrent(void **context)) *context = current_context; END
CALL(cuCtxGetDevice(int *device)) *device = 0; END
CALL(cuCtxSynchronize())
    if (refused_by_capture()) return CAPTURE_UNSUPPORTED;
    run_all();
    if (failure != OK) return failure;
END
CALL(cuMemGetInfo_v2(size_t *free_bytes, size_t *bytes))
    *bytes = total_bytes();
    *free_bytes = *bytes - std::min<size_t>(used_bytes, *bytes);
END

CALL(cuStreamCreate(void **stream, unsigned))
    auto *created = new Stream;
    streams.insert(created);
    *stream = created;
END
CALL(cuStreamDestroy_v2(void *stream))
    Stream *gone = stream_of(stream);
    run_until([&] { return gone->queue.empty(); });
    streams.erase(gone);
    delete gone;
END
CALL(cuStreamSynchronize(void *stream))
    if (stream_of(stream)->capture) {
        stream_of(stream)->capture_failed = true;
        return CAPTURE_UNSUPPORTED;
    }
    run_until([&] { return stream_of(stream)->queue.empty(); });
    if (failure != OK) return failure;
END
CALL(cuStreamQuery(void *stream))
    maybe_run();
    if (!stream_of(stream)->queue.empty()) return NOT_READY;
END
CALL(cuStreamWaitEvent(void *stream, void *event, unsigned))
    auto found = event_of(event);
    if (!found) return INVALID_VALUE;
    enqueue(stream_of(stream), {nullptr, found, found->recorded, nullptr});
END

CALL(cuEventCreate(void **event, unsigned))
    auto created = std::make_shared<Event>();
    *event = created.get();
    events[*event] = created;
END
CALL(cuEventDestroy_v2(void *event)) if (events.erase(event) == 0) return INVALID_VALUE; END
CALL(cuEventRecord(void *event, void *stream))
    auto found = event_of(event);
    if (!found) return INVALID_VALUE;
    const uint64_t ticket = ++found->recorded;
    enqueue(stream_of(stream), {[found, ticket] { found->completed = std::max(found->completed, ticket); }, nullptr, 0, nullptr});
END
CALL(cuEventQuery(void *event))
    auto found = event_of(event);
    if (!found) return INVALID_VALUE;
    maybe_run();
    if (found->completed < found->recorded) return NOT_READY;
END
CALL(cuEventSynchronize(void *event))
    auto found = event_of(event);
    if (!found) return INVALID_VALUE;
    run_until([&] { return failure != OK || found->completed >= found->recorded; });
    if (failure != OK) return failure;
END

CALL(cuMemAlloc_v2(uintptr_t *at, size_t bytes))
    if (refused_by_capture()) return CAPTURE_UNSUPPORTED;
    if (used_bytes + bytes > total_bytes()) return OUT_OF_MEMORY;
    void *memory = allocate(bytes);
    if (!memory) return INVALID_VALUE;
    *at = reinterpret_cast<uintptr_t>(memory);
    device_memory[*at] = bytes;
    used_bytes += bytes;
END
CALL(cuMemFree_v2(uintptr_t at))
    auto found = device_memory.find(at);
    if (found == device_memory.end()) return INVALID_VALUE;
    // Freeing waits for the device.
    run_all();
    used_bytes -= found->second;
    device_memory.erase(found);
    std::free(reinterpret_cast<void *>(at));
END
// A file stands for a dma-buf. It becomes the memory of the range, so what is written to it is there.
CALL(cuMemGetHandleForAddressRange(void *handle, uintptr_t at, size_t bytes, int type, unsigned long long flags))
    const size_t page = sysconf(_SC_PAGESIZE);
    if (!exports() || type != 1 || flags != 0 || !inside(device_memory, at, bytes)) return INVALID_VALUE;
    if (bytes == 0 || at % page != 0 || bytes % page != 0) return INVALID_VALUE;
    void *memory = reinterpret_cast<void *>(at);
    const int file = memfd_create("software GPU", MFD_CLOEXEC);
    if (file < 0 || pwrite(file, memory, bytes, 0) != ssize_t(bytes)) return OUT_OF_MEMORY;
    if (mmap(memory, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) != memory) return OUT_OF_MEMORY;
    std::memcpy(handle, &file, sizeof file);
END
CALL(cuMemHostAlloc(void **at, size_t bytes, unsigned))
    if (refused_by_capture()) return CAPTURE_UNSUPPORTED;
    *at = allocate(bytes);
    if (!*at) return INVALID_VALUE;
    pinned_memory[reinterpret_cast<uintptr_t>(*at)] = bytes;
END
CALL(cuMemFreeHost(void *at))
    if (pinned_memory.count(reinterpret_cast<uintptr_t>(at)) == 0) return INVALID_VALUE;
    run_all();
    pinned_memory.erase(reinterpret_cast<uintptr_t>(at));
    std::free(at);
END
CALL(cuMemcpyHtoDAsync_v2(uintptr_t to, const void *from, size_t bytes, void *stream))
    if (!inside(device_memory, to, bytes)) return INVALID_VALUE;
    void *target = reinterpret_cast<void *>(to);
    if (inside(pinned_memory, reinterpret_cast<uintptr_t>(from), bytes)) {
        enqueue(stream_of(stream), {[=] { std::memcpy(target, from, bytes); }, nullptr, 0, nullptr});
    } else {
        // The driver copies pageable memory before it returns.
        if (stream_of(stream)->capture) return CAPTURE_UNSUPPORTED;
        auto copy = std::make_shared<std::vector<char>>(static_cast<const char *>(from), static_cast<const char *>(from) + bytes);
        enqueue(stream_of(stream), {[=] { std::memcpy(target, copy->data(), bytes); }, nullptr, 0, nullptr});
    }
END
CALL(cuMemcpyDtoHAsync_v2(void *to, uintptr_t from, size_t bytes, void *stream))
    if (!inside(device_memory, from, bytes)) return INVALID_VALUE;
    const void *source = reinterpret_cast<const void *>(from);
    enqueue(stream_of(stream), {[=] { std::memcpy(to, source, bytes); }, nullptr, 0, nullptr});
    // A copy to pageable memory ends before the call returns.
    if (!inside(pinned_memory, reinterpret_cast<uintptr_t>(to), bytes)) {
        if (stream_of(stream)->capture) return CAPTURE_UNSUPPORTED;
        run_until([&] { return stream_of(stream)->queue.empty(); });
    }
END
CALL(cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, void *stream))
    if (!inside(device_memory, to, bytes) || !inside(device_memory, from, bytes)) return INVALID_VALUE;
    enqueue(stream_of(stream), {[=] { std::memmove(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes); }, nullptr, 0, nullptr});
END
CALL(cuMemsetD8Async(uintptr_t at, unsigned char value, size_t bytes, void *stream))
    if (!inside(device_memory, at, bytes)) return INVALID_VALUE;
    enqueue(stream_of(stream), {[=] { std::memset(reinterpret_cast<void *>(at), value, bytes); }, nullptr, 0, nullptr});
END

// The image holds code for real GPUs, which can't run here. It must be there all the same, and for this architecture.
CALL(cuModuleLoadData(void **module, const void *image))
    uint32_t magic;
    std::memcpy(&magic, image, 4);
    if (magic != 0xba55ed50) return INVALID_IMAGE;
    if (architecture() < 80) return NO_BINARY;
    *module = &the_context;
END
CALL(cuModuleUnload(void *)) END
CALL(cuModuleGetFunction(const void **function, void *, const char *name))
    *function = software_gpu::find(name);
    if (!*function) return NOT_FOUND;
END
CALL(cuLaunchKernel(const void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                    unsigned shared_bytes, void *stream, void **params, void **))
    const auto *kernel = static_cast<const software_gpu::Kernel *>(function);
    if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || shared_bytes != 0) return INVALID_VALUE;
    if (bx * by * bz == 0 || bx * by * bz > kernel->max_threads) return OUT_OF_RESOURCES;
    if (is_lost()) return failure;
    auto copy = std::make_shared<std::vector<char>>(static_cast<char *>(params[0]), static_cast<char *>(params[0]) + kernel->params_bytes);
    enqueue(stream_of(stream), {[=] { software_gpu::launch(*kernel, {gx, gy, gz}, {bx, by, bz}, copy->data()); }, nullptr, 0, nullptr});
END

CALL(cuStreamBeginCapture_v2(void *stream, int mode))
    // Modes: 0 global, 1 thread-local.
    if (stream == nullptr || stream_of(stream)->capture || mode > 1) return CAPTURE_UNSUPPORTED;
    stream_of(stream)->capturing_thread = mode == 1 ? std::this_thread::get_id() : std::thread::id();
    stream_of(stream)->capture = std::make_shared<Graph>();
    stream_of(stream)->capture_failed = false;
END
CALL(cuStreamEndCapture(void *stream, void **graph))
    Stream *captured = stream_of(stream);
    auto made = std::move(captured->capture);
    captured->capture = nullptr;
    *graph = nullptr;
    if (!made || captured->capture_failed) return CAPTURE_INVALIDATED;
    *graph = new std::shared_ptr<Graph>(std::move(made));
END
CALL(cuStreamIsCapturing(void *stream, int *status)) *status = stream_of(stream)->capture ? 1 : 0; END
CALL(cuGraphInstantiateWithFlags(void **made, void *graph, unsigned long long))
    *made = new std::shared_ptr<Graph>(*static_cast<std::shared_ptr<Graph> *>(graph));
END
CALL(cuGraphLaunch(void *graph, void *stream))
    if (is_lost()) return failure;
    for (const Work &work : (*static_cast<std::shared_ptr<Graph> *>(graph))->work) enqueue(stream_of(stream), work);
END
CALL(cuGraphDestroy(void *graph)) delete static_cast<std::shared_ptr<Graph> *>(graph); END
CALL(cuGraphExecDestroy(void *graph)) delete static_cast<std::shared_ptr<Graph> *>(graph); END

extern "C" OF_EXPORT int cuGetErrorName(int status, const char **name) {
    switch (status) {
    case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; break;
    case INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
    case INVALID_IMAGE: *name = "CUDA_ERROR_INVALID_IMAGE"; break;
    case NO_BINARY: *name = "CUDA_ERROR_NO_BINARY_FOR_GPU"; break;
    case NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; break;
    case OUT_OF_RESOURCES: *name = "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"; break;
    case LAUNCH_FAILED: *name = "CUDA_ERROR_LAUNCH_FAILED"; break;
    default: *name = "CUDA_ERROR_INVALID_VALUE";
    }
    return OK;
}
extern "C" OF_EXPORT int cuGetErrorString(int status, const char **text) {
    return cuGetErrorName(status, text);
}
