// Host SIMT runtime: runs the threads of a CUDA block as fibers (default) or as std::threads (-DSIMT_THREADS).
//
// Fibers: one block at a time, one thread at a time. Threads switch only where CUDA threads meet (barriers, warp
// primitives, atomics), in an order drawn from a seed that likes to let one warp run far ahead or fall far behind.
// A missing barrier then changes the numbers, and AddressSanitizer sees every access.
// Threads: one std::thread per CUDA thread, for ThreadSanitizer. A warp has its own lock: a lock shared by the whole
// block would order its warps and hide their races.
#pragma once
#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>
#ifdef SIMT_THREADS
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#else
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

constexpr int kWarp = 32;
constexpr unsigned char kPoison = 0xA5;

#ifdef SIMT_THREADS
#define SIMT_PER_THREAD thread_local
#else
#define SIMT_PER_THREAD
#endif

// Values handed over by the lanes of one warp that call a primitive with the same mask. Two sets of slots: a lane
// cannot enter meeting g + 2 before every lane has read meeting g.
struct Exchange {
    uint64_t slots[2][kWarp] = {};
    unsigned arrived = 0;
    uint64_t generation = 0;
};

struct Warp {
    std::map<unsigned, Exchange> exchanges;
#ifdef SIMT_THREADS
    std::mutex mutex;
    std::condition_variable changed;
#endif
};

struct Block {
    int size = 0, live = 0, arrived = 0;
    uint64_t generation = 0;
    const char* file = nullptr;  // where the threads that have arrived at the barrier wait
    int line = 0;
    int vote[2] = {0, 0};  // number of true votes, by parity of the generation
    std::vector<std::unique_ptr<Warp>> warps;
#ifdef SIMT_THREADS
    std::mutex mutex;
    std::condition_variable changed;
#endif
};

inline Block* block = nullptr;
inline unsigned char* dynamic_shared = nullptr;
inline dim3 grid_dim, block_dim;
inline SIMT_PER_THREAD uint3 block_index;
inline SIMT_PER_THREAD int thread_rank = 0;

inline int lane() {
    return thread_rank % kWarp;
}
inline int warp_rank() {
    return thread_rank / kWarp;
}

[[noreturn]] inline void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    std::fprintf(stderr, "SIMT: ");
    std::vfprintf(stderr, format, values);
    std::fprintf(stderr, " [block (%u,%u,%u), thread %d]\n", block_index.x, block_index.y, block_index.z, thread_rank);
    va_end(values);
    std::_Exit(3);
}

// Static shared variables announce themselves on first use and are filled with poison before every block.
inline std::vector<std::pair<void*, size_t>>& shared_variables() {
    static std::vector<std::pair<void*, size_t>> list;
    return list;
}
#ifdef SIMT_THREADS
inline std::mutex shared_variables_mutex;
#endif
struct SharedVariable {
    SharedVariable(void* address, size_t bytes) {
#ifdef SIMT_THREADS
        std::lock_guard<std::mutex> lock(shared_variables_mutex);
#endif
        std::memset(address, kPoison, bytes);
        shared_variables().emplace_back(address, bytes);
    }
};

#ifndef SIMT_THREADS
// ---------------------------------------------------------------------------------------------------- fibers

struct Fiber {
    ucontext_t context;
    bool finished = false;
    const char* waits_for = nullptr;
};
inline ucontext_t scheduler_context;
inline std::vector<Fiber> fibers;
inline const std::function<void()>* kernel_call = nullptr;
inline std::mt19937 schedule;
inline bool adversarial = false;
inline uint64_t progress = 0;         // grows whenever some thread can go on: a sweep without it is a deadlock
constexpr size_t kStack = 256 << 10;  // nothing guards its end, and unoptimised frames under a sanitizer are large

inline void switch_context(ucontext_t* from, ucontext_t* to, const void* stack, size_t bytes, bool last = false) {
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, stack, bytes);
    swapcontext(from, to);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
    (void)stack, (void)bytes, (void)last;
    swapcontext(from, to);
#endif
}

inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_bytes = 0;

inline void yield(bool last = false) {
    switch_context(&fibers[thread_rank].context, &scheduler_context, scheduler_stack, scheduler_stack_bytes, last);
}

inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    (*kernel_call)();
    fibers[thread_rank].finished = true;
    --block->live;
    ++progress;
    yield(/*last=*/true);
}

template <class Ready>
void wait_until(Ready ready, const char* what) {
    fibers[thread_rank].waits_for = what;
    while (!ready()) yield();
    fibers[thread_rank].waits_for = nullptr;
}

// An atomic is where threads race by design: let others go first, now and then.
inline void maybe_yield() {
    if (adversarial && schedule() % 4 == 0) {
        ++progress;
        yield();
    }
}

[[noreturn]] inline void report_deadlock() {
    std::map<std::string, int> waiting;
    for (const Fiber& fiber : fibers)
        ++waiting[fiber.finished ? "have returned" : fiber.waits_for ? fiber.waits_for : "are runnable"];
    std::string text;
    for (const auto& [what, count] : waiting)
        text += (text.empty() ? "" : ", ") + std::to_string(count) + (what.rfind("have", 0) ? " wait at " : " ") + what;
    if (block->file) text += " (" + std::string(block->file) + ":" + std::to_string(block->line) + ")";
    fail("divergent barrier or warp primitive: of %d threads %s", block->size, text.c_str());
}

// Which warp is favoured (runs ahead alone) or held back, and for how many sweeps.
struct Bias {
    int warp = -1, sweeps = 0;
    bool hold_back = false;
    void redraw(int warps) {
        if (sweeps-- > 0) return;
        warp = static_cast<int>(schedule() % warps);
        sweeps = static_cast<int>(schedule() % 40);
        hold_back = schedule() % 2;
    }
    bool admits(int thread) const { return sweeps <= 0 || (thread / kWarp == warp) != hold_back; }
};

inline void run_block(const std::function<void()>& call, uint3 index) {
    static std::unique_ptr<unsigned char[]> stacks;  // not touched before a thread needs it
    static int n_stacks = 0;
    if (n_stacks < block->size) {
        stacks.reset(new unsigned char[kStack * block->size]);
        n_stacks = block->size;
    }
    fibers.assign(block->size, {});
    kernel_call = &call;
    block_index = index;
    std::vector<int> order(block->size);
    for (int thread = 0; thread < block->size; ++thread) {
        order[thread] = thread;
        ucontext_t& context = fibers[thread].context;
        getcontext(&context);
        context.uc_stack.ss_sp = stacks.get() + kStack * thread;
        context.uc_stack.ss_size = kStack;
        context.uc_link = nullptr;
        makecontext(&context, fiber_main, 0);
    }
    Bias bias;
    while (block->live) {
        if (adversarial) {
            std::shuffle(order.begin(), order.end(), schedule);
            bias.redraw(static_cast<int>(block->warps.size()));
        }
        uint64_t before = progress;
        bool everyone = true;
        for (int thread : order) {
            if (fibers[thread].finished) continue;
            if (adversarial && !bias.admits(thread)) {
                everyone = false;
                continue;
            }
            thread_rank = thread;
            switch_context(&scheduler_context, &fibers[thread].context, stacks.get() + kStack * thread, kStack);
        }
        if (progress == before) {
            if (everyone && block->live) report_deadlock();
            bias.sweeps = 0;
        }
    }
}
#else
// ------------------------------------------------------------------------------------------------- std::threads

inline void maybe_yield() {
    std::this_thread::yield();
}

inline void run_block(const std::function<void()>& call, uint3 index) {
    std::vector<std::thread> threads;
    std::atomic<bool> go{false};  // relaxed: all threads are alive before the first one runs, and nothing orders them
    for (int thread = 0; thread < block->size; ++thread)
        threads.emplace_back([&call, &go, index, thread] {
            thread_rank = thread;
            block_index = index;
            while (!go.load(std::memory_order_relaxed)) std::this_thread::yield();
            call();
        });
    go.store(true, std::memory_order_relaxed);
    for (std::thread& thread : threads) thread.join();
}
#endif

// ----------------------------------------------------------------------------------------------------- meetings

// The barrier of the whole block. Every thread must come, also those that could have returned early. Returns the
// number of true votes, for __syncthreads_count and its kin.
inline int barrier(const char* file, int line, int vote = 0) {
#ifdef SIMT_THREADS
    std::unique_lock<std::mutex> lock(block->mutex);
#endif
    uint64_t generation = block->generation;
    int parity = static_cast<int>(generation & 1);
    if (block->arrived++ == 0) {
        block->file = file;
        block->line = line;
        block->vote[parity] = 0;
    } else if (block->line != line || std::strcmp(block->file, file) != 0) {
        fail("divergent barrier: this thread waits at %s:%d, others at %s:%d", file, line, block->file, block->line);
    }
    block->vote[parity] += vote != 0;
    if (block->arrived == block->size) {
        block->arrived = 0;
        block->file = nullptr;
        ++block->generation;
#ifdef SIMT_THREADS
        block->changed.notify_all();
    } else {
        block->changed.wait(lock, [&] { return block->generation != generation; });
#else
        ++progress;
    } else {
        ++progress;
        wait_until([&] { return block->generation != generation; }, "a barrier");
#endif
    }
    return block->vote[parity];
}

// Hands `value` to the lanes of `mask` and returns what each of them handed over. Lanes beyond the end of a partial
// warp are left out, as on the device.
inline const uint64_t* exchange(unsigned mask, uint64_t value, const char* what) {
    Warp& warp = *block->warps[warp_rank()];
    if (!(mask >> lane() & 1)) fail("%s: lane %d is not in its own mask %08x", what, lane(), mask);
    int lanes = std::min(kWarp, block->size - warp_rank() * kWarp);
    unsigned expected = lanes == kWarp ? mask : mask & ((1u << lanes) - 1);
#ifdef SIMT_THREADS
    std::unique_lock<std::mutex> lock(warp.mutex);
#endif
    Exchange& meeting = warp.exchanges[mask];
    uint64_t generation = meeting.generation;
    uint64_t* slots = meeting.slots[generation & 1];
    slots[lane()] = value;
    meeting.arrived |= 1u << lane();
    if (meeting.arrived == expected) {
        meeting.arrived = 0;
        ++meeting.generation;
#ifdef SIMT_THREADS
        warp.changed.notify_all();
    } else {
        warp.changed.wait(lock, [&] { return meeting.generation != generation; });
#else
        ++progress;
    } else {
        ++progress;
        wait_until([&] { return meeting.generation != generation; }, what);
#endif
    }
    return slots;
}

// ------------------------------------------------------------------------------------------------------- launch

// Runs every block of the grid, one after another; a seed other than 0 shuffles blocks, warps and threads.
inline void launch(dim3 grid, dim3 threads, size_t shared_bytes, unsigned seed, const std::function<void()>& call) {
    grid_dim = grid;
    block_dim = threads;
    int size = static_cast<int>(threads.x * threads.y * threads.z);
    if (size < 1 || size > 1024) fail("a block has 1 to 1024 threads, got %d", size);
    std::vector<uint3> order;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) order.push_back({x, y, z});
    std::mt19937 block_order(seed);
    if (seed) std::shuffle(order.begin(), order.end(), block_order);
#ifndef SIMT_THREADS
    adversarial = seed != 0;
    schedule.seed(seed);
#endif
    for (uint3 index : order) {
        Block state;
        state.size = state.live = size;
        for (int warp = 0; warp * kWarp < size; ++warp) state.warps.push_back(std::make_unique<Warp>());
        block = &state;
        for (auto [address, bytes] : shared_variables()) std::memset(address, kPoison, bytes);
        void* memory = nullptr;  // exactly as long as asked for: AddressSanitizer then sees the first byte beyond it
        if (posix_memalign(&memory, 128, std::max<size_t>(shared_bytes, 1))) fail("out of memory");
        dynamic_shared = static_cast<unsigned char*>(memory);
        std::memset(dynamic_shared, kPoison, shared_bytes);
        run_block(call, index);
        std::free(memory);
    }
}

}  // namespace simt
