// A test double of NCCL: pairs of ranks that send and receive bytes, over sockets.
//
// It behaves as NCCL does where that hurts. Calls return at once, and groups reach the stream later. The first group of a
// rank is in progress until the other rank has called its first group. A send waits for the
// other rank's receive, and both block their stream. If the other rank has gone, the stream stays blocked until the
// communicator is aborted. Memory is read and written by a thread of its own, at times that vary. Sends and receives match by
// order; sizes that differ are an error.
#include "driver.h"
#include <arpa/inet.h>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <netinet/tcp.h>
#include <poll.h>
#include <random>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>
#include <utility>

namespace {

enum Result { OK = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };
enum Type { UINT8 = 1 };

struct Id {
    char bytes[128];
};

// The first fields of ncclConfig_t.
struct Config {
    size_t size;
    unsigned magic, version;
    int blocking;
};

// Whether SOFTWARE_GPU_NCCL_FAULTS names a fault; `at` is what follows the colon.
bool has_fault(const std::string &name, long at = -1) {
    const char *faults = std::getenv("SOFTWARE_GPU_NCCL_FAULTS");
    const std::string wanted = at < 0 ? name : name + ":" + std::to_string(at);
    std::string all = std::string(",") + (faults ? faults : "") + ",";
    return all.find("," + wanted + ",") != std::string::npos;
}

void pause_randomly() {
    thread_local std::minstd_rand numbers(std::random_device{}());
    std::this_thread::sleep_for(std::chrono::microseconds(numbers() % 400));
}

// One send or receive.
struct Operation {
    char *at;
    size_t bytes;
    bool is_send;
};

// A group of operations, as one piece of work on a stream.
struct Group {
    std::vector<Operation> operations;
    std::atomic<bool> done{false};
};

std::atomic<long> groups_started{0};

class Communicator {
public:
    std::atomic<int> state{IN_PROGRESS};

    Communicator(Id id, int own_rank) : rank(own_rank), thread([this, id] { run(id); }) {}

    ~Communicator() {
        if (fd >= 0) close(fd);
    }

    void push(std::shared_ptr<Group> group) {
        std::lock_guard<std::mutex> guard(mutex);
        if (aborted) {
            group->done = true;
            return;
        }
        groups.push_back(std::move(group));
        changed.notify_all();
    }

    bool is_connected = false;
    // Groups on their way to the stream.
    std::atomic<int> launching{0};

    // Meets the other rank's first group.
    bool connect_ranks() {
        char byte = 0;
        return transfer(&byte, 1, true) && transfer(&byte, 1, false);
    }

    // Ends everything. Groups that come later are done at once.
    void abort() {
        {
            std::lock_guard<std::mutex> guard(mutex);
            aborted = true;
            if (fd >= 0) shutdown(fd, SHUT_RDWR);
            changed.notify_all();
        }
        thread.join();
        while (launching > 0) std::this_thread::yield();
    }

private:
    int rank;
    int fd = -1;
    std::mutex mutex;
    std::condition_variable changed;
    bool aborted = false;
    std::deque<std::shared_ptr<Group>> groups;
    std::thread thread;

    bool is_aborted() {
        std::lock_guard<std::mutex> guard(mutex);
        return aborted;
    }

    void until_aborted() {
        std::unique_lock<std::mutex> guard(mutex);
        changed.wait(guard, [this] { return aborted; });
    }

    void run(Id id);
    bool join(const Id &id);
    int move(const Operation &operation, bool fails_halfway);
    bool transfer(char *at, size_t bytes, bool is_send);
};

std::mutex listeners_mutex;
// Sockets at which the ranks meet, by port, in the process that made the id.
std::map<int, int> listeners;

// Connects to the other rank. The first rank in the process that made the id accepts.
bool Communicator::join(const Id &id) {
    sockaddr_in address;
    pid_t maker;
    std::memcpy(&address, id.bytes, sizeof address);
    std::memcpy(&maker, id.bytes + sizeof address, sizeof maker);
    int listener = -1;
    if (maker == getpid()) {
        std::lock_guard<std::mutex> guard(listeners_mutex);
        auto found = listeners.find(address.sin_port);
        if (found != listeners.end()) {
            listener = found->second;
            listeners.erase(found);
        }
    }
    int connected = -1;
    if (listener >= 0) {
        while (!is_aborted() && connected < 0) {
            pollfd waiting{listener, POLLIN, 0};
            if (poll(&waiting, 1, 10) == 1) connected = accept(listener, nullptr, nullptr);
        }
        close(listener);
    } else {
        connected = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(connected, reinterpret_cast<sockaddr *>(&address), sizeof address) != 0) {
            close(connected);
            connected = -1;
        }
    }
    if (connected < 0) return false;
    int one = 1;
    setsockopt(connected, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    {
        std::lock_guard<std::mutex> guard(mutex);
        fd = connected;
        if (aborted) return false;
    }
    char own = char(rank), other = own;
    return transfer(&own, 1, true) && transfer(&other, 1, false) && other != own;
}

bool Communicator::transfer(char *at, size_t bytes, bool is_send) {
    while (bytes > 0) {
        const ssize_t n = is_send ? send(fd, at, bytes, MSG_NOSIGNAL) : recv(fd, at, bytes, 0);
        if (n <= 0) return false;
        at += n;
        bytes -= size_t(n);
    }
    return true;
}

// A receive says its size, and a send waits for that.
int Communicator::move(const Operation &operation, bool fails_halfway) {
    uint64_t size = operation.bytes;
    if (!transfer(reinterpret_cast<char *>(&size), sizeof size, !operation.is_send)) return REMOTE_ERROR;
    if (size != operation.bytes) return INVALID_USAGE;
    pause_randomly();
    const size_t bytes = fails_halfway ? operation.bytes / 2 : operation.bytes;
    if (!transfer(operation.at, bytes, operation.is_send)) return REMOTE_ERROR;
    return fails_halfway ? SYSTEM_ERROR : OK;
}

void Communicator::run(Id id) {
    pause_randomly();
    const bool joined = !has_fault("join-hangs") && join(id);
    // A rank that never comes is no error: the other one waits.
    if (joined) state = OK;
    std::unique_lock<std::mutex> guard(mutex);
    for (;;) {
        changed.wait(guard, [this] { return aborted || !groups.empty(); });
        if (aborted) break;
        auto group = groups.front();
        guard.unlock();
        const long number = groups_started++;
        int result = OK;
        for (const Operation &operation : group->operations) {
            pause_randomly();
            if (has_fault("stuck", number)) until_aborted();
            if (is_aborted()) break;
            result = move(operation, has_fault("late-failure", number));
            if (result != OK) break;
        }
        if (result != OK) {
            state = result;
            until_aborted();
        }
        guard.lock();
        group->done = true;
        groups.pop_front();
    }
    for (auto &group : groups) group->done = true;
    groups.clear();
}

// Communicators by handle. Groups on a stream may outlive an aborted communicator.
std::mutex communicators_mutex;
std::map<void *, std::shared_ptr<Communicator>> communicators;

std::shared_ptr<Communicator> find(void *handle) {
    std::lock_guard<std::mutex> guard(communicators_mutex);
    auto found = communicators.find(handle);
    return found == communicators.end() ? nullptr : found->second;
}

struct Queued {
    std::shared_ptr<Communicator> communicator;
    void *stream;
    std::shared_ptr<Group> group;
};

thread_local int depth = 0;
thread_local std::vector<Queued> queued;

void launch(const Queued &work) {
    auto [communicator, stream, group] = work;
    software_gpu_enqueue_outside(
        stream, [communicator = communicator, group = group] { communicator->push(group); },
        [communicator = communicator, group = group] { return group->done.load(); });
}

int queue(void *at, size_t count, int type, int peer, void *handle, void *stream, bool is_send) {
    auto communicator = find(handle);
    if (!communicator || type != UINT8 || peer < 0 || peer > 1) return INVALID_ARGUMENT;
    if (!software_gpu_is_device_memory(at, count)) return INVALID_ARGUMENT;
    // Outside of a group, and before the communicator is ready, NCCL allows less than this project needs to know.
    if (depth == 0 || communicator->state != OK) return INVALID_USAGE;
    if (queued.empty() || queued.back().communicator != communicator || queued.back().stream != stream) {
        queued.push_back({communicator, stream, std::make_shared<Group>()});
    }
    queued.back().group->operations.push_back({static_cast<char *>(at), count, is_send});
    return OK;
}

} // namespace

#define EXPORT extern "C" OF_EXPORT int

extern "C" OF_EXPORT const char *ncclGetErrorString(int result) {
    switch (result) {
    case OK: return "no error";
    case SYSTEM_ERROR: return "unhandled system error";
    case INVALID_ARGUMENT: return "invalid argument";
    case INVALID_USAGE: return "invalid usage";
    case REMOTE_ERROR: return "remote process exited or there was a network error";
    default: return "in progress";
    }
}

EXPORT ncclGetVersion(int *version) { *version = 23000; return OK; }

EXPORT ncclGetUniqueId(Id *id) {
    const int listener = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    if (bind(listener, reinterpret_cast<sockaddr *>(&address), length) != 0 || listen(listener, 1) != 0) return SYSTEM_ERROR;
    getsockname(listener, reinterpret_cast<sockaddr *>(&address), &length);
    const pid_t maker = getpid();
    std::memset(id, 0, sizeof *id);
    std::memcpy(id->bytes, &address, sizeof address);
    std::memcpy(id->bytes + sizeof address, &maker, sizeof maker);
    std::lock_guard<std::mutex> guard(listeners_mutex);
    listeners[address.sin_port] = listener;
    return OK;
}

EXPORT ncclCommInitRankConfig(void **handle, int ranks, Id id, int rank, const Config *config) {
    if (ranks != 2 || rank < 0 || rank > 1 || !config || config->magic != 0xcafebeef || config->size < sizeof *config) return INVALID_ARGUMENT;
    if (config->blocking != 0) return INVALID_USAGE;
    auto communicator = std::make_shared<Communicator>(id, rank);
    *handle = communicator.get();
    std::lock_guard<std::mutex> guard(communicators_mutex);
    communicators[*handle] = communicator;
    return IN_PROGRESS;
}

EXPORT ncclCommGetAsyncError(void *handle, int *state) {
    auto communicator = find(handle);
    if (!communicator) return INVALID_ARGUMENT;
    *state = communicator->state;
    return OK;
}

EXPORT ncclCommAbort(void *handle) {
    auto communicator = find(handle);
    if (!communicator) return INVALID_ARGUMENT;
    while (has_fault("abort-hangs")) std::this_thread::sleep_for(std::chrono::seconds(1));
    communicator->abort();
    std::lock_guard<std::mutex> guard(communicators_mutex);
    communicators.erase(handle);
    return OK;
}

EXPORT ncclGroupStart() { depth++; return OK; }

EXPORT ncclGroupEnd() {
    if (depth == 0) return INVALID_USAGE;
    if (--depth > 0) return OK;
    int result = OK;
    for (const Queued &work : std::exchange(queued, {})) {
        const bool is_first = !work.communicator->is_connected;
        work.communicator->is_connected = true;
        if (!is_first && std::random_device{}() % 2 == 0) {
            launch(work);
            continue;
        }
        // Later, on another thread.
        work.communicator->state = IN_PROGRESS;
        work.communicator->launching++;
        std::thread([work, is_first] {
            pause_randomly();
            if (!is_first || work.communicator->connect_ranks()) launch(work);
            int expected = IN_PROGRESS;
            work.communicator->state.compare_exchange_strong(expected, OK);
            work.communicator->launching--;
        }).detach();
        result = IN_PROGRESS;
    }
    return result;
}

EXPORT ncclSend(const void *at, size_t count, int type, int peer, void *communicator, void *stream) {
    return queue(const_cast<void *>(at), count, type, peer, communicator, stream, true);
}

EXPORT ncclRecv(void *at, size_t count, int type, int peer, void *communicator, void *stream) {
    return queue(at, count, type, peer, communicator, stream, false);
}
