// The emulated multiprocessor: fibers, barriers, shared memory and number formats.
#include "software_gpu.h"
#include <algorithm>
#include <cstdio>
#include <map>
#include <numeric>
#include <sys/mman.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define OF_ASAN 1
#endif

#if !defined(__x86_64__)
#error "the software GPU switches fibers with x86-64 instructions"
#endif

// Saves the callee-saved registers on the stack, and continues on another stack.
extern "C" void software_gpu_switch(void **save, void *load);
asm(R"(.text
.globl software_gpu_switch
.hidden software_gpu_switch
.type software_gpu_switch,@function
software_gpu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size software_gpu_switch,.-software_gpu_switch
)");

namespace software_gpu {

dim3 thread_index, block_index, block_size, grid_size;

namespace {

enum class State { ready, at_block, at_warp, done };

struct Fiber {
    void *stack_pointer = nullptr;
    char *stack = nullptr;
    State state = State::done;
    Meeting meeting = Meeting::sync;
    size_t bytes = 0;
    // How often the thread has met its warp.
    unsigned meetings = 0;
};

// What the threads of a warp brought to the last two meetings.
struct Warp {
    alignas(16) unsigned char slots[2][32][32];
};

constexpr size_t STACK_BYTES = 128 << 10;

std::vector<Fiber> fibers;
std::vector<Warp> warps;
void *scheduler = nullptr;
unsigned current = 0, threads = 0;
const Kernel *running = nullptr;
const void *parameters = nullptr;
uint64_t state = 1;
std::map<const void *, std::pair<void *, size_t>> shared;

#ifdef OF_ASAN
const void *scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif

void to_scheduler(State next) {
    Fiber &fiber = fibers[current];
    fiber.state = next;
#ifdef OF_ASAN
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(next == State::done ? nullptr : &fake, scheduler_stack, scheduler_stack_bytes);
#endif
    software_gpu_switch(&fiber.stack_pointer, scheduler);
#ifdef OF_ASAN
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void fiber_main() {
#ifdef OF_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    running->body(parameters);
    to_scheduler(State::done);
    __builtin_unreachable();
}

void resume(unsigned thread) {
    current = thread;
    thread_index = {thread % block_size.x, thread / block_size.x % block_size.y, thread / (block_size.x * block_size.y)};
#ifdef OF_ASAN
    void *fake;
    __sanitizer_start_switch_fiber(&fake, fibers[thread].stack, STACK_BYTES);
#endif
    software_gpu_switch(&scheduler, fibers[thread].stack_pointer);
#ifdef OF_ASAN
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void start_fibers() {
    while (fibers.size() < threads) {
        void *stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) fault("no memory for a stack");
        fibers.emplace_back().stack = static_cast<char *>(stack);
    }
    warps.resize((threads + 31) / 32);
    for (unsigned t = 0; t < threads; t++) {
        Fiber &fiber = fibers[t];
        void **top = reinterpret_cast<void **>(fiber.stack + STACK_BYTES);
        // The address that fiber_main would return to, fiber_main, and six registers.
        *--top = nullptr;
        *--top = reinterpret_cast<void *>(fiber_main);
        for (int i = 0; i < 6; i++) *--top = nullptr;
        fiber.stack_pointer = top;
        fiber.state = State::ready;
        fiber.meetings = 0;
    }
}

// Lets a warp go on of which all threads have met. A GPU leaves it undefined what happens if some have ended.
bool release_warp(unsigned first) {
    const unsigned end = std::min(first + 32, threads);
    unsigned waiting = 0, done = 0;
    for (unsigned t = first; t < end; t++) {
        waiting += fibers[t].state == State::at_warp;
        done += fibers[t].state == State::done;
    }
    if (waiting == 0 || waiting + done < end - first) return false;
    if (done > 0 || end - first < 32) fault("a warp meets without all of its 32 threads");
    for (unsigned t = first; t < end; t++) {
        if (fibers[t].meeting != fibers[first].meeting || fibers[t].bytes != fibers[first].bytes)
            fault("the threads of a warp meet for different operations");
        fibers[t].state = State::ready;
    }
    return true;
}

bool release_block() {
    for (unsigned t = 0; t < threads; t++) {
        if (fibers[t].state != State::at_block && fibers[t].state != State::done) return false;
    }
    bool released = false;
    for (unsigned t = 0; t < threads; t++) {
        if (fibers[t].state == State::at_block) {
            fibers[t].state = State::ready;
            released = true;
        }
    }
    return released;
}

void run_block() {
    for (auto &[_, memory] : shared) std::memset(memory.first, 0xff, memory.second);
    start_fibers();
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0);
    for (;;) {
        for (unsigned i = threads - 1; i > 0; i--) std::swap(order[i], order[random() % (i + 1)]);
        bool went_on = false;
        for (unsigned t : order) {
            if (fibers[t].state == State::ready) {
                resume(t);
                went_on = true;
            }
        }
        for (unsigned first = 0; first < threads; first += 32) went_on |= release_warp(first);
        went_on |= release_block();
        bool done = std::all_of(fibers.begin(), fibers.begin() + threads, [](const Fiber &f) { return f.state == State::done; });
        if (done) return;
        if (!went_on) fault("the threads of a block wait for each other");
    }
}

std::vector<Kernel> &kernels() {
    static std::vector<Kernel> all;
    return all;
}

} // namespace

void fault(const std::string &what) {
    std::fprintf(stderr, "software GPU: %s: %s (block %u,%u,%u, thread %u)\n", running ? running->name.c_str() : "no kernel",
                 what.c_str(), block_index.x, block_index.y, block_index.z, current);
    std::abort();
}

unsigned lane() { return current % 32; }

void block_barrier() { to_scheduler(State::at_block); }

const unsigned char (*meet(Meeting what, const void *bring, size_t bytes))[32] {
    Fiber &fiber = fibers[current];
    // Two sets of slots: a thread may bring its next value before others have read this one.
    auto &slots = warps[current / 32].slots[fiber.meetings++ % 2];
    if (bytes > 0) std::memcpy(slots[lane()], bring, bytes);
    fiber.meeting = what;
    fiber.bytes = bytes;
    to_scheduler(State::at_warp);
    return slots;
}

void *shared_memory(const void *key, size_t bytes) {
    auto found = shared.find(key);
    if (found != shared.end()) return found->second.first;
    void *memory = nullptr;
    if (posix_memalign(&memory, 128, bytes) != 0) fault("no memory");
    std::memset(memory, 0xff, bytes);
    return shared.emplace(key, std::make_pair(memory, bytes)).first->second.first;
}

Register::Register(Kernel kernel) { kernels().push_back(std::move(kernel)); }

const Kernel *find(const std::string &name) {
    for (const Kernel &kernel : kernels()) {
        if (kernel.name == name) return &kernel;
    }
    return nullptr;
}

void launch(const Kernel &kernel, dim3 grid, dim3 block, const void *params) {
    running = &kernel;
    parameters = params;
    grid_size = grid;
    block_size = block;
    threads = block.x * block.y * block.z;
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    // Some order of all blocks: a stride without a divisor in common with their number.
    uint64_t at = random() % blocks, stride = random() % blocks;
    while (std::gcd(stride, blocks) != 1) stride = (stride + 1) % std::max<uint64_t>(blocks, 2);
    for (uint64_t i = 0; i < blocks; i++, at = (at + stride) % blocks) {
        block_index = {unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y)};
        run_block();
    }
    running = nullptr;
}

void set_seed(uint64_t seed) { state = seed; }

uint64_t random() {
    // SplitMix64.
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

} // namespace software_gpu

namespace {
uint32_t bits_of(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return bits;
}
float float_of(uint32_t bits) {
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}
} // namespace

float __bfloat162float(__nv_bfloat16 v) { return float_of(uint32_t(v.bits) << 16); }

__nv_bfloat16 __float2bfloat16(float v) {
    const uint32_t bits = bits_of(v);
    if (std::isnan(v)) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

float __half2float(__half v) {
    const float sign = v.bits & 0x8000 ? -1.f : 1.f;
    const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent == 0 ? std::ldexp(float(mantissa), -24) : std::ldexp(float(1024 + mantissa), exponent - 25));
}

__half __float2half(float v) {
    const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    const float size = std::fabs(v);
    if (std::isnan(v)) return {0x7fff};
    // The default rounding mode is to the nearest, ties to even. The encoding of a value that is rounded up to the next
    // power of two is the one of that power.
    if (size < std::ldexp(1.f, -14)) return {uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(size, 24))))};
    if (size >= 65520.f) return {uint16_t(sign | 0x7c00)};
    const int exponent = std::ilogb(size);
    const int mantissa = int(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return {uint16_t(sign | ((exponent + 14) * 1024 + mantissa))};
}

__nv_fp8_e4m3::__nv_fp8_e4m3(float v) {
    const uint8_t sign = std::signbit(v) ? 0x80 : 0;
    const float size = std::fabs(v);
    if (std::isnan(v)) {
        bits = 0x7f;
    } else if (size >= 448.f) {
        bits = sign | 0x7e;
    } else if (size < std::ldexp(1.f, -6)) {
        bits = sign | uint8_t(std::nearbyint(std::ldexp(size, 9)));
    } else {
        const int exponent = std::ilogb(size);
        const int mantissa = int(std::nearbyint(std::ldexp(size, 3 - exponent)));
        bits = sign | std::min((exponent + 6) * 8 + mantissa, 0x7e);
    }
}

__nv_fp8_e4m3::operator float() const {
    const float sign = bits & 0x80 ? -1.f : 1.f;
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if ((bits & 0x7f) == 0x7f) return NAN;
    return sign * (exponent == 0 ? std::ldexp(float(mantissa), -9) : std::ldexp(float(8 + mantissa), exponent - 10));
}
